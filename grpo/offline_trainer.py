"""The training actor of scored completions, and the driver's side of it: a step of the same ranks with another loss."""

from functools import partial

import torch
from tensordict import TensorDict

from grpo.micro_batches import split_rows
from grpo.objectives.offline import group_kl_loss, summarise
from grpo.pools import ReferencePool, TrainerPool
from grpo.scoring import score, token_log_probs
from grpo.trainer import TrainerActor


class OfflineTrainerActor(TrainerActor):
    """A rank whose batches are groups [B] of scored completions, see `grpo.scored.collate`."""

    def _prepare_loss(self) -> None:
        objective = self.spec.objective
        self.loss = partial(
            group_kl_loss,
            log_prob=objective.log_prob,
            temperature=objective.temperature,
            target_temperature=objective.target_temperature,
        )

    def _loss(self, batch: TensorDict) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor], dict]:
        there = batch["response_length"] > 0  # [B, K]: no pass for completions that a group does not have
        rows, first = batch["tokens"][there], int(batch["prompt_length"][there].min())
        log_probs = torch.zeros(batch["tokens"].shape, device=rows.device)
        log_probs[there], _ = token_log_probs(self.model, rows, first, self.spec.temperature)
        loss, totals = self.loss(log_probs, batch["response_mask"], batch["score"])
        return log_probs, loss, totals, {}

    def _summarise(self, sums: dict[str, float], maxima: dict[str, float], groups: int) -> dict[str, float]:
        return summarise(sums, groups)

    def score_policy(self, rows: TensorDict) -> torch.Tensor:
        """Log-probs, float32 [N, T], of completions under the policy as it is now. Every rank must get as many rows."""
        rows = rows.to(self.device)
        return score(self.model, rows["tokens"], rows["prompt_length"], rows["response_mask"], self.spec.temperature).cpu()


class OfflineTrainerPool(TrainerPool):
    """The training ranks, whose batches are groups."""

    def step(self, batch: TensorDict, number: int, num_groups: int) -> dict[str, float]:
        """Optimiser step `number` on groups [B], of which `num_groups` are real: its metrics."""
        lengths = (batch["prompt_length"] + batch["response_length"]).amax(1)
        shares = split_rows(lengths, len(self.actors), self.num_micro_batches)
        arguments = [(batch[share.rows], share.sizes, share.num_training, num_groups, False) for share in shares]
        return self._call("step", arguments, f"taking optimiser step {number}")[0][0]


class PolicyPool(ReferencePool):
    """The training ranks as what scores completions under the policy itself."""

    method = "score_policy"
