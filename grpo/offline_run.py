"""An offline run in progress: what its loop calls. Batches of groups in; optimiser steps and evaluations out.

The parts are handed in (by `grpo.offline.build`); nothing is started here.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tensordict import TensorDict

from grpo.checkpoint import Checkpoint
from grpo.objectives.offline import ranks_best_first, sequence_log_probs
from grpo.offline_config import OfflineConfig
from grpo.offline_trainer import OfflineTrainerPool, PolicyPool
from grpo.preemption import REQUEST
from grpo.scored import EncodedGroup, EncodedGroups, batches_of, collate
from grpo.session import Session, is_due


@dataclass(kw_only=True)
class OfflineRun(Session):
    """The parts of a run, and how far it is."""

    SUSPECT, SAMPLES = "the scores", "completions"

    config: OfflineConfig
    train: EncodedGroups
    held_out: EncodedGroups  # groups whose scores differ
    trainer: OfflineTrainerPool
    policy: PolicyPool

    def batches(self) -> Iterator[list[EncodedGroup]]:
        """The groups of each optimiser step; a resumed run leaves out what it has done."""
        config, groups = self.config, self.train.groups
        steps = batches_of(len(groups), config.batch_size, config.num_epochs, config.seed, self.progress.num_steps)
        for batch in steps:
            REQUEST.check()
            yield [groups[i] for i in batch]

    def step(self, groups: list[EncodedGroup]) -> None:
        """One optimiser step on `groups`, logged; evaluate and save where it is time to."""
        now, count = self.progress, sum(len(group.completions) for group in groups)
        with self.clock.phase("train"):
            batch = collate(groups, self.config.parts)
            metrics = self.trainer.step(batch, now.num_steps + 1, len(groups))
        now.num_steps += 1
        now.samples_trained += count
        lengths = batch["response_length"][: len(groups)]
        metrics |= {
            "rollout/groups": len(groups),
            "rollout/group_size_mean": count / len(groups),
            "rollout/response_length_mean": float(lengths.sum() / count),
            "rollout/response_length_max": float(lengths.max()),
        }
        last, self.stepped_s = self.stepped_s, self._training_clock()
        metrics |= self.clock.take() | {"time/samples_per_s": count / (self.stepped_s - last)}
        self.log.step(now.num_steps, None, metrics)
        self._count_skipped(metrics)
        self.writer.poll()
        now.evaluated = not is_due(self.config.train.eval_frequency, now.num_steps - 1, now.num_steps)
        if not now.evaluated:
            self._evaluate()
        self._save_if_due(now.num_steps - 1)

    def evaluate(self) -> dict[str, float]:
        """How often the policy ranks the best-scored completion of a held-out group first: {"accuracy", "n"}."""
        right, groups = 0.0, self.held_out.groups
        with self.clock.phase("eval"):
            for i in range(0, len(groups), self.config.batch_size):
                batch = collate(groups[i : i + self.config.batch_size])
                there = batch["response_length"] > 0
                rows = {key: batch[key][there] for key in ("tokens", "prompt_length", "response_mask")}
                log_probs = torch.zeros(batch["tokens"].shape)
                log_probs[there] = self.policy.score(TensorDict(rows, batch_size=[int(there.sum())]))
                values = sequence_log_probs(log_probs, batch["response_mask"], self.config.objective.log_prob)
                right += float(ranks_best_first(values, batch["score"], there).sum())
        return {"accuracy": right / len(groups), "n": len(groups)}

    _test = _validate = evaluate

    def _state(self) -> dict[str, TensorDict]:
        return {}

    def _restore(self, checkpoint: Checkpoint) -> None:
        """`progress` and the trainer's state are all there is."""

    @property
    def _fingerprint(self) -> str:
        return self.train.fingerprint

    def _account(self, summary: dict, training_s: float) -> dict:
        return {"phases_s": {"train": summary["phases_s"]["train"]}}

    def _judged(self, before: dict[str, float], after: dict[str, float]) -> str:
        return (
            f"Best-scored completion ranked first in {after['n']} held-out groups: {before['accuracy']:.1%} before, "
            f"{after['accuracy']:.1%} after"
        )


def differing(groups: EncodedGroups) -> EncodedGroups:
    """Those of `groups` whose scores are not all equal: in the others there is nothing to rank."""
    kept = [group for group in groups.groups if len(set(torch.tensor(group.scores).tolist())) > 1]
    return EncodedGroups(kept, groups.too_long, groups.too_small)
