"""From prompts to scored rollouts: the collecting function of every mode.

    PromptEnv.reset ──> InferencePolicy ──> PromptEnv.step ──> Finish
     next prompts        engines respond     grades             reference log-probs, group advantages

One turn of `GroupCollector` (grpo/collector.py, a TorchRL LLMCollector) is one collection: G groups of K rollouts, see
grpo/rollout.py. In async mode (grpo/background.py) the policy's place is taken by what the engines have finished meanwhile.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from tensordict import NonTensorData, NonTensorStack, TensorDict, TensorDictBase
from torchrl.data import Categorical, Composite, Unbounded
from torchrl.envs import EnvBase
from transformers import PreTrainedTokenizerBase

from grpo.advantages import group_advantages
from grpo.config import RunConfig
from grpo.grading import Failed, GradingPool
from grpo.metrics import Clock
from grpo.objectives.divergences import ESTIMATES, Estimate, k3
from grpo.pools import ReferencePool
from grpo.rollout import GroupRecord
from grpo.tasks import EncodedProblems


class PromptStream:
    """Which problem comes next: a seeded shuffle of the training problems, a new one each data pass.

    `position` is how many were used so far, and all the state there is.
    """

    def __init__(self, num_problems: int, seed: int) -> None:
        self.num_problems, self.seed, self.position = num_problems, seed, 0
        self._order: tuple[int, np.ndarray | None] = (-1, None)  # a data pass, and its problems

    @contextmanager
    def taken_back(self) -> Iterator[None]:
        """Have the problems be the next ones again that were used by what was left in the middle."""
        before = self.position
        try:
            yield
        except BaseException:  # a request to end too: the run is saved as it was before
            self.position = before
            raise

    def upcoming(self, count: int) -> list[int]:
        """The next `count` problem indices; asking does not use them up."""
        return [self.at(self.position + i) for i in range(count)]

    def at(self, position: int) -> int:
        """The problem at `position`, which is also its group's id."""
        data_pass, offset = divmod(position, self.num_problems)
        of_pass, order = self._order
        if of_pass != data_pass:
            order = np.random.default_rng([self.seed, data_pass]).permutation(self.num_problems)
            self._order = data_pass, order  # at once: the threads of a collector share the stream
        return int(order[offset])


class PromptEnv(EnvBase):
    """One-turn environment over [G, K]: a reset shows the next G prompts, a step grades K responses to each.

    Only a step moves the stream on, so resets (TorchRL makes one when a collector is built) skip no prompt.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        grading: GradingPool,
        data: EncodedProblems,
        stream: PromptStream,
        tokenizer: PreTrainedTokenizerBase,
        clock: Clock,
    ) -> None:
        super().__init__(batch_size=shape)
        self.grading, self.data, self.stream, self.tokenizer, self.clock = grading, data, stream, tokenizer, clock
        self.observation_spec = Composite(
            problem=Unbounded(shape=shape, dtype=torch.int64),
            group_id=Unbounded(shape=shape, dtype=torch.int64),
            graded=Unbounded(shape=shape, dtype=torch.bool),
            shape=shape,
        )
        self.action_spec = Composite(tokens=Unbounded(shape=(*shape, 1), dtype=torch.int64), shape=shape)
        self.reward_spec = Unbounded(shape=(*shape, 1))
        self.done_spec = Categorical(2, shape=(*shape, 1), dtype=torch.bool)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs) -> TensorDict:
        num_groups, first = self.batch_size[0], self.stream.position
        problem = torch.tensor(self.stream.upcoming(num_groups))
        group_id = torch.arange(first, first + num_groups)
        columns = {"problem": problem, "group_id": group_id}
        return TensorDict({k: v[:, None].expand(self.batch_size) for k, v in columns.items()}, batch_size=self.batch_size)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        with self.clock.phase("reward"):
            records = self._grade(tensordict)
        rewards = torch.tensor([[grade.reward for grade in record.grades] for record in records])
        done = torch.ones(*tensordict.batch_size, 1, dtype=torch.bool)
        graded = torch.tensor([[grade.is_verdict for grade in record.grades] for record in records])
        result = TensorDict(
            reward=rewards[..., None].float(),
            graded=graded,
            done=done,
            terminated=done.clone(),
            problem=tensordict["problem"],
            group_id=tensordict["group_id"],
            batch_size=tensordict.batch_size,
        )
        self.records = records
        self.stream.position += len(tensordict)
        return result

    def _grade(self, rollouts: TensorDictBase) -> list[GroupRecord]:
        flat = rollouts.reshape(-1)
        rows = [tokens[mask].tolist() for tokens, mask in zip(flat["tokens"], flat["response_mask"], strict=True)]
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        problems, size = [self.data.problems[i] for i in flat["problem"].tolist()], rollouts.batch_size[1]
        grades = self.grading.grade(problems, [self.data.thought + text for text in texts])
        groups = [
            GroupRecord(problems[i].question, problems[i].answer, texts[i : i + size], grades[i : i + size])
            for i in range(0, len(texts), size)
        ]
        return rewarded(groups, self.grading) if self.grading.reward_function else groups

    def _set_seed(self, seed: int | None) -> None:
        """The stream's seed decides everything; there is nothing else random here."""


def rewarded(groups: list[GroupRecord], grading: GradingPool) -> list[GroupRecord]:
    """The groups with the rewards of the user's function in the place of the task's terms.

    Such a reward is learned from, whether or not the task could grade the response: without a verdict, it has no answer.
    """
    rewards = grading.reward([([g.prompt] * len(g.responses), g.responses, [g.answer] * len(g.responses)) for g in groups])
    return [
        replace(
            group,
            grades=[found.grade] * len(group.grades)
            if isinstance(found, Failed)
            else [
                replace(grade, terms={"reward_fn": r}, outcome=grade.outcome if grade.is_verdict else "unparseable")
                for grade, r in zip(group.grades, found, strict=True)
            ],
        )
        for group, found in zip(groups, rewards, strict=True)
    ]


def sampling_seed(seed: int, first_group: int) -> int:
    """What engines are seeded with before they sample `first_group` and those that follow it."""
    return int(np.random.SeedSequence([seed, first_group]).generate_state(1)[0])


def graded_turn(env: PromptEnv, rollouts: TensorDictBase) -> TensorDict:
    """The rollouts [G, K] with what a step of `env` says of them: `reward` and `graded`."""
    turn = env.step(rollouts)
    turn["reward"] = turn["next", "reward"].squeeze(-1)
    turn["graded"] = turn["next", "graded"]
    return turn.exclude("next", "done", "terminated")


class Finish:
    """A collection's last station: reference log-probs, the reward's divergence penalty, group advantages, records.

    With `kl_in_reward` above 0, the `estimate` of a response's KL to the reference (summed over its tokens, in nats) is
    taken off its reward before advantages are made; `reward` itself stays what the task gave. With `with_states` the
    reference also says which hidden states its log-probs come from.
    """

    def __init__(
        self,
        env: PromptEnv,
        reference: ReferencePool | None,
        kl_in_reward: float,
        estimate: Estimate = k3,
        advantages: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = group_advantages,
        with_states: bool = False,
    ) -> None:
        self.env, self.reference, self.kl_in_reward, self.estimate = env, reference, kl_in_reward, estimate
        self.advantages, self.with_states = advantages, with_states

    def __call__(self, rollouts: TensorDict) -> TensorDict:
        flat = rollouts.reshape(-1)
        if self.reference is not None:
            with self.env.clock.phase("reference"):
                if self.with_states:
                    flat["reference_log_probs"], flat["anchor_states"] = self.reference.score_with_states(flat)
                else:
                    flat["reference_log_probs"] = self.reference.score(flat)
        penalised = flat["reward"]
        if self.kl_in_reward > 0:
            kl = self.estimate(flat["inference_log_probs"], flat["reference_log_probs"]).sum(-1)
            flat["kl_penalty"] = self.kl_in_reward * kl
            penalised = penalised - flat["kl_penalty"]
        graded = flat["graded"]  # a response without a verdict teaches nothing, and its group is the others
        flat["advantage"] = torch.zeros_like(penalised)
        flat["advantage"][graded] = self.advantages(penalised[graded], flat["group_id"][graded])
        groups = flat.reshape(rollouts.batch_size)
        groups.batch_size = rollouts.batch_size[:1]
        return groups.set("record", NonTensorStack(*[NonTensorData(record) for record in self.env.records]))


def make_finish(config: RunConfig, env: PromptEnv, reference: ReferencePool | None) -> Finish:
    objective = config.objective
    return Finish(
        env,
        reference,
        config.kl_in_reward,
        ESTIMATES.get(objective.divergence, k3),
        partial(group_advantages, scale=objective.advantage_scale, baseline=objective.baseline),
        config.anchor == "reference",
    )
