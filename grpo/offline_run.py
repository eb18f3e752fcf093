"""An offline run in progress: what its loop calls. Batches of groups in; optimiser steps and evaluations out.

The parts are handed in (by `grpo.offline.build`); nothing is started here.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tensordict import TensorDict

from grpo.checkpoint import Checkpoint, CheckpointWriter
from grpo.metrics import Clock, RunLog
from grpo.objectives.offline import ranks_best_first, sequence_log_probs
from grpo.offline_config import OfflineConfig
from grpo.offline_trainer import OfflineTrainerPool, PolicyPool
from grpo.plot import plot_run
from grpo.preemption import REQUEST
from grpo.resume import SUMMARY, write_whole
from grpo.scored import EncodedGroup, EncodedGroups, batches_of, collate
from grpo.session import Session, is_due
from grpo.supervision import Supervisor


@dataclass
class OfflineProgress:
    """How far a run is: its state but for tensors and files."""

    num_steps: int = 0
    samples_trained: int = 0  # completions
    evaluated: bool = True  # whether the evaluation that was due after the last step was made
    skipped_in_a_row: int = 0  # steps that were not finite
    before: dict[str, float] | None = None  # held-out ranking accuracy before training
    best_accuracy: float | None = None  # of the evaluations between steps,
    best_step: int | None = None  # after this step
    training_s: float = 0.0  # of the processes before this one
    phases_s: dict[str, float] = field(default_factory=dict)  # `Clock.total`


@dataclass
class OfflineRun(Session):
    """The parts of a run, and how far it is."""

    SUSPECT = "the scores"

    config: OfflineConfig
    run_dir: Path
    train: EncodedGroups
    held_out: EncodedGroups  # groups whose scores differ
    trainer: OfflineTrainerPool
    policy: PolicyPool
    clock: Clock
    log: RunLog
    writer: CheckpointWriter
    resumed: Checkpoint | None
    supervisor: Supervisor
    progress: OfflineProgress = field(default_factory=OfflineProgress)
    started_s: float | None = None  # `_training_clock` when the loop began,
    stepped_s: float = 0.0  # and at the last step
    saved: tuple | None = None  # `_where` of the last checkpoint that was started

    def begin(self) -> None:
        """Take up the checkpoint that the run goes on from, if there is one, and evaluate the untrained model once."""
        if self.resumed is not None:
            state = self.resumed.state
            self.trainer.load(self.resumed.trainer, state["trainer"])
            self.supervisor.take_up(state["restarts"])
            self.progress = OfflineProgress(**state["progress"])
            self.clock.total |= self.progress.phases_s
            self.saved = self._where
        if self.progress.before is None:
            self.progress.before = self.evaluate()
        self._start_clock()
        if not self.progress.evaluated:
            self._evaluate()

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

    def _evaluate(self) -> None:
        """Between steps; the best so far is kept as a checkpoint."""
        now, found = self.progress, self.evaluate()["accuracy"]
        self.log.add({"eval/accuracy": found} | self.clock.take())
        now.evaluated = True
        if now.best_accuracy is None or found > now.best_accuracy:
            now.best_accuracy, now.best_step = found, now.num_steps
            self.save()

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

    @property
    def _where(self) -> tuple:
        return self.progress.num_steps, self.progress.evaluated, self.progress.before is None

    def save(self) -> None:
        """Begin a checkpoint of the run as it is now, unless there is one; it is written beside what follows."""
        if self.saved == self._where:
            return
        with self.clock.phase("checkpoint"):
            times = {"training_s": self._training_s, "phases_s": dict(self.clock.total)}
            state = {
                "progress": asdict(self.progress) | times,
                "log": self.log.position,
                "config": asdict(self.config),
                "restarts": self.supervisor.restarts,
                "data": self.train.fingerprint,
            }
            self.writer.start(self.progress.num_steps, state, {}, self.progress.best_step)
            self.saved = self._where

    def finish(self) -> None:
        """Save, evaluate, export the model, write summary.json and the plots, and tell the user."""
        now, training_s = self.progress, self._training_s
        self.save()
        self.writer.finish()
        before, after = now.before, self.evaluate()
        self.trainer.export(self.run_dir / "model")
        self.log.close()
        summary = {
            "eval": {"before": before, "after": after},
            "steps": now.num_steps,
            "samples_trained": now.samples_trained,
            "wall_s": round(training_s, 3),
            "samples_per_s": round(now.samples_trained / training_s, 1),
            "phases_s": {"train": round(self.clock.total["train"], 3)},
            "restarts": self.supervisor.restarts,
        }
        write_whole(self.run_dir / SUMMARY, json.dumps(summary, indent=2) + "\n")
        plot_run(self.run_dir)
        print(
            f"\n{now.samples_trained} completions in {now.num_steps} steps, {training_s:.0f} s of training "
            f"({summary['samples_per_s']:.0f} a second); model, metrics and plots are in {os.path.relpath(self.run_dir)}\n"
            f"Best-scored completion ranked first in {after['n']} held-out groups: {before['accuracy']:.1%} before, "
            f"{after['accuracy']:.1%} after"
        )


def differing(groups: EncodedGroups) -> EncodedGroups:
    """Those of `groups` whose scores are not all equal: in the others there is nothing to rank."""
    kept = [group for group in groups.groups if len(set(torch.tensor(group.scores).tolist())) > 1]
    return EncodedGroups(kept, groups.too_long, groups.too_small)
