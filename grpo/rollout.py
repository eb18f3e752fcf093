"""The rollout contract: which keys a batch of responses has, what shapes and masks, and how ragged responses get there.

A batch is a TensorDict of batch size [B]; B is rollouts, T the longest prompt + response of the batch in tokens.

    tokens               int64   [B, T]  prompt then response, padded on the right with 0
    prompt_length        int64   [B]
    response_length      int64   [B]     at least 1: the end-of-sequence token counts
    response_mask        bool    [B, T]  true on response tokens; made from lengths, since the pad id may be a real token
    inference_log_probs  float32 [B, T]  of the policy that sampled the token, under the sampling temperature
    reference_log_probs  float32 [B, T]  of the frozen reference; only where a reference is used
    anchor_states        float16 [B, T, D]  directions (unit vectors) of the last hidden states that a token was predicted
                                         from, under the model that divergence=ot compares with; only where it does
    token_versions       int32   [B, T]  policy_version that sampled the token
    policy_version       int64   [B]     the oldest of a rollout's token_versions
    stopped              bool    [B]     the response ended by itself, not at its token budget
    problem              int64   [B]     index into the task's training problems
    group_id             int64   [B]     one integer a group; batching never splits a group
    graded               bool    [B]     there is a verdict; without one the advantage is 0 and the reward says nothing
    reward, advantage    float32 [B]

`log_probs[b, t]` belongs to `tokens[b, t]`: position 0 has none. Per-token floats are 0 outside the response mask.
Padding is on the right, so that causal attention needs no mask: a real token never sees a pad token.

A collection has batch size [G] of groups: every key above with shape [G, K, ...], and `record`, a GroupRecord a group
with the texts and verdicts for rollouts.jsonl. The replay buffer stores groups; `collate` makes a batch [B] of them.
"""

from dataclasses import dataclass

import numpy as np
import torch
from tensordict import NonTensorData, NonTensorStack, TensorDict
from torch.nn.functional import pad

from grpo.rewards import Grade

PER_TOKEN = (
    "tokens",
    "response_mask",
    "inference_log_probs",
    "reference_log_probs",
    "anchor_states",
    "token_versions",
    "log_probs",
    "proximal_log_probs",
)


@dataclass
class Completions:
    """N finished responses as flat arrays: what an engine hands over, cheap to send between processes.

    Response n has `length[n]` tokens, which follow those of response n - 1 in the flat arrays.
    """

    request_id: np.ndarray  # int64 [N]; the K responses to one request stand together
    length: np.ndarray  # int64 [N]
    stopped: np.ndarray  # bool [N]
    tokens: np.ndarray  # int64 [sum of length]
    log_probs: np.ndarray  # float32 [sum of length]
    versions: np.ndarray  # int32 [sum of length]

    def __len__(self) -> int:
        return len(self.length)

    def responses(self) -> list[list[int]]:
        """Token ids, a list a response."""
        return [part.tolist() for part in np.split(self.tokens, np.cumsum(self.length)[:-1])] if len(self) else []

    @staticmethod
    def concatenate(parts: list["Completions"]) -> "Completions":
        names = ("request_id", "length", "stopped", "tokens", "log_probs", "versions")
        return Completions(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def in_request_order(self) -> "Completions":
        """The same responses sorted by request id, so that nothing downstream depends on who finished first."""
        order = np.argsort(self.request_id, kind="stable")
        return self if (order[:-1] <= order[1:]).all() else self.select(order)

    def select(self, which: np.ndarray) -> "Completions":
        """The responses `which`: bool [N], or indices in the order that they are wanted in."""
        order = np.flatnonzero(which) if which.dtype == bool else which
        pieces = np.split(np.arange(len(self.tokens)), np.cumsum(self.length)[:-1])
        flat = np.concatenate([pieces[i] for i in order])
        return Completions(
            self.request_id[order],
            self.length[order],
            self.stopped[order],
            self.tokens[flat],
            self.log_probs[flat],
            self.versions[flat],
        )


def length_mask(start: torch.Tensor, length: torch.Tensor, size: int) -> torch.Tensor:
    """Bool [..., size]: true at positions start <= t < start + length. `start`, `length`: int64 [...]."""
    position = torch.arange(size, device=start.device)
    return (position >= start[..., None]) & (position < (start + length)[..., None])


def pack(prompts: list[list[int]], completions: Completions) -> TensorDict:
    """Dense rollouts [N] from one prompt a rollout and its completion; keys up to `stopped` of the contract."""
    prompt_length = torch.tensor([len(prompt) for prompt in prompts])
    response_length = torch.tensor(completions.length)
    size = int((prompt_length + response_length).max())
    prompt_mask = length_mask(torch.zeros_like(prompt_length), prompt_length, size)
    response_mask = length_mask(prompt_length, response_length, size)
    tokens = torch.zeros(len(prompts), size, dtype=torch.int64)
    tokens[prompt_mask] = torch.tensor([token for prompt in prompts for token in prompt])
    tokens[response_mask] = torch.tensor(completions.tokens)
    log_probs = torch.zeros(len(prompts), size)
    log_probs[response_mask] = torch.tensor(completions.log_probs)
    versions = torch.zeros(len(prompts), size, dtype=torch.int32)
    versions[response_mask] = torch.tensor(completions.versions)
    oldest = versions.masked_fill(~response_mask, torch.iinfo(torch.int32).max).amin(1).long()
    return TensorDict(
        tokens=tokens,
        prompt_length=prompt_length,
        response_length=response_length,
        response_mask=response_mask,
        inference_log_probs=log_probs,
        token_versions=versions,
        policy_version=oldest,
        stopped=torch.tensor(completions.stopped),
        batch_size=[len(prompts)],
    )


def trim(batch: TensorDict) -> TensorDict:
    """The same rollouts [...] cut to their longest prompt + response."""
    size = int((batch["prompt_length"] + batch["response_length"]).max())
    if size == batch["tokens"].shape[-1]:
        return batch
    along = batch["tokens"].ndim - 1
    cut = {key: batch[key].narrow(along, 0, size) for key in PER_TOKEN if key in batch}
    return batch.clone(recurse=False).update(cut)


@dataclass
class GroupRecord:
    """What rollouts.jsonl says of one group besides its tensors."""

    prompt: str
    answer: str
    responses: list[str]
    grades: list[Grade]


def _widened(column: torch.Tensor, width: int) -> torch.Tensor:
    """[K, T, ...] with zeros up to T = width."""
    more = width - column.shape[1]
    return column if more == 0 else pad(column, (0, 0) * (column.ndim - 2) + (0, more))


def collate(groups: list[TensorDict]) -> TensorDict:
    """A batch [B] from groups of shape [K, ...] and any widths, group by group; `records` holds their GroupRecords."""
    width = max(group["tokens"].shape[1] for group in groups)

    def rows(key: str) -> torch.Tensor:
        parts = [group[key] for group in groups]
        if key in PER_TOKEN:
            parts = [_widened(part, width) for part in parts]
        return torch.cat(parts)

    keys = [key for key in groups[0].keys() if key != "record"]
    batch = TensorDict({key: rows(key) for key in keys})
    batch.auto_batch_size_(1)
    return trim(batch).set_non_tensor("records", [group["record"] for group in groups])


def regroup(groups: list[TensorDict]) -> TensorDict:
    """A collection [G] of groups of shape [K, ...] and any widths."""
    batch, records = collate(groups), [group["record"] for group in groups]
    collection = batch.exclude("records").unflatten(0, (len(groups), -1))
    collection.batch_size = [len(groups)]
    return collection.set("record", NonTensorStack(*[NonTensorData(record) for record in records]))


def teaching(groups: TensorDict) -> tuple[list[TensorDict], list[TensorDict]]:
    """The groups of a collection [G] in which an advantage is not 0, and the others, whose rewards are all equal."""
    parts: tuple[list[TensorDict], list[TensorDict]] = ([], [])
    for group in groups.unbind(0):
        parts[0 if group["advantage"].any() else 1].append(group)
    return parts
