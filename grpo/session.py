"""What every run does alike around its loop: has its directory for itself, keeps its clock, begins, saves and ends.

A run is a `Session` with a loop, and says what only it can by the abstract methods.
"""

import errno
import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tensordict import TensorDict

from grpo.checkpoint import Checkpoint, CheckpointWriter, newest
from grpo.errors import CheckpointError, ConfigError, TrainingError
from grpo.metrics import Clock, RunLog
from grpo.plot import plot_run
from grpo.pools import TrainerPool
from grpo.preemption import Preempted, saved_in_time
from grpo.resume import CONFIG, SUMMARY, locked, write_config, write_whole
from grpo.supervision import Supervisor


@contextmanager
def claimed(run_dir: Path, resume: str | None) -> Iterator[Checkpoint | None]:
    """Have `run_dir` for this process alone; gives the checkpoint to go on from, if there is one."""
    with locked(run_dir):
        holds_run = (run_dir / CONFIG).is_file()
        if resume is None and holds_run:
            raise ConfigError(f"{run_dir} holds a run already: type resume={run_dir}, or another hydra.run.dir")
        checkpoint = newest(run_dir)
        if holds_run and checkpoint is None:
            if (run_dir / SUMMARY).is_file():
                raise ConfigError(f"resume ({run_dir}): the run has ended and its checkpoints are gone: start a new one")
            print(f"resume ({run_dir}): there is no checkpoint: it starts from step 0")
        yield checkpoint


@dataclass
class Progress:
    """How far a run is: its state but for tensors and files."""

    num_steps: int = 0
    samples_trained: int = 0
    evaluated: bool = True  # whether the evaluation that was due last was made
    skipped_in_a_row: int = 0  # steps that were not finite
    before: dict[str, float] | None = None  # held-out accuracy before training
    best_accuracy: float | None = None  # of the evaluations on the way,
    best_step: int | None = None  # after this step
    evaluations_since_best: int = 0
    training_s: float = 0.0  # of the processes before this one
    phases_s: dict[str, float] = field(default_factory=dict)  # `Clock.total`


@dataclass(kw_only=True)
class Session(ABC):
    """The part of a run that no loop is in."""

    SUSPECT = "rollouts.jsonl"  # what to look at when losses are not finite
    SAMPLES = "responses"

    config: Any
    run_dir: Path
    trainer: TrainerPool
    clock: Clock
    log: RunLog
    writer: CheckpointWriter
    resumed: Checkpoint | None
    supervisor: Supervisor
    progress: Progress = field(default_factory=Progress)
    started_s: float | None = None  # `_training_clock` when the loop began,
    stepped_s: float = 0.0  # and at the last step
    saved: tuple | None = None  # `_where` of the last checkpoint that was started

    @abstractmethod
    def _test(self) -> dict[str, float]:
        """What the run is judged by, before and after: {"accuracy", "n"}."""

    @abstractmethod
    def _validate(self) -> dict[str, float]:
        """The same between steps."""

    @property
    @abstractmethod
    def _fingerprint(self) -> str:
        """Of the data: a resumed run must have the same."""

    @abstractmethod
    def _account(self, summary: dict, training_s: float) -> dict:
        """What the run has to add to summary.json after `training_s`, which is `_training_s` when training ended."""

    @abstractmethod
    def _judged(self, before: dict[str, float], after: dict[str, float]) -> str:
        """The line that a run ends with."""

    @abstractmethod
    def _state(self) -> dict[str, TensorDict]:
        """Bring `progress` up to date for a checkpoint; returns the collections that belong to it."""

    @abstractmethod
    def _restore(self, checkpoint: Checkpoint) -> None:
        """Take up what of `checkpoint` is the run's own."""

    def begin(self) -> None:
        """Take up the checkpoint that the run goes on from, if there is one, and evaluate the untrained model once."""
        if self.resumed is not None:
            state = self.resumed.state
            self.trainer.load(self.resumed.trainer, state["trainer"])
            self.supervisor.take_up(state["restarts"])
            self.progress = type(self.progress)(**state["progress"])
            self.clock.total |= self.progress.phases_s
            self._restore(self.resumed)
            self.saved = self._where
        if self.progress.before is None:
            self.progress.before = self._test()
        self._start_clock()
        if not self.progress.evaluated:
            self._evaluate()

    @property
    def _where(self) -> tuple:
        return self.progress.num_steps, self.progress.evaluated, self.progress.before is None

    def save(self) -> None:
        """Begin a checkpoint of the run as it is now, unless there is one; it is written beside what follows."""
        if self.saved == self._where:
            return
        with self.clock.phase("checkpoint"):
            collections = self._state()
            times = {"training_s": self._training_s, "phases_s": dict(self.clock.total)}
            state = {
                "progress": asdict(self.progress) | times,
                "log": self.log.position,
                "config": asdict(self.config),
                "restarts": self.supervisor.restarts,
                "data": self._fingerprint,
            }
            self.writer.start(self.progress.num_steps, state, collections, self.progress.best_step)
            self.saved = self._where

    def _evaluate(self) -> None:
        """Between steps; the best so far is kept as a checkpoint."""
        now, result = self.progress, self._validate()
        found = result["accuracy"]
        self.log.add({"eval/accuracy": found, "eval/problems": result["n"]} | self.clock.take())
        now.evaluated, is_best = True, now.best_accuracy is None or found > now.best_accuracy
        now.evaluations_since_best = 0 if is_best else now.evaluations_since_best + 1
        if is_best:
            now.best_accuracy, now.best_step = found, now.num_steps
            self.save()

    def finish(self) -> None:
        """Save, evaluate, export the model, write summary.json and the plots, and tell the user."""
        now, training_s = self.progress, self._training_s
        self.save()
        self.writer.finish()
        before, after = now.before, self._test()
        try:
            self.trainer.export(self.run_dir / "model")
        except CheckpointError as error:
            raise self.writer.disk_error(f"the model could not be written to {self.run_dir}", error) from None
        self.log.close()
        summary = {
            "eval": {"before": before, "after": after},
            "steps": now.num_steps,
            "samples_trained": now.samples_trained,
            "wall_s": round(training_s, 3),
            "samples_per_s": round(now.samples_trained / training_s, 1),
            "phases_s": {name: round(s, 3) for name, s in self.clock.total.items() if name not in ("eval", "checkpoint")},
            "restarts": self.supervisor.restarts,
        }
        summary |= self._account(summary, training_s)
        write_whole(self.run_dir / SUMMARY, json.dumps(summary, indent=2) + "\n")
        plot_run(self.run_dir)
        print(
            f"\n{now.samples_trained} {self.SAMPLES} in {now.num_steps} steps, {training_s:.0f} s of training "
            f"({summary['samples_per_s']:.0f} a second); model, metrics and plots are in {os.path.relpath(self.run_dir)}\n"
            f"{self._judged(before, after)}"
        )

    @contextmanager
    def kept(self) -> Iterator[None]:
        """While the run goes on: a request to end saves it, and a full disk is said in one line."""
        write_config(self.config, self.run_dir)
        self.supervisor.at = lambda: self.progress.num_steps
        (self.run_dir / SUMMARY).unlink(missing_ok=True)  # of the shorter run that is gone on with
        try:
            try:
                yield
            except Preempted as stop:
                stop.saved = self._save_and_end()
                raise
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            what = f"metrics and rollouts could not be written to {self.run_dir}"
            raise self.writer.disk_error(what, error) from None

    def _save_and_end(self) -> str:
        """Save the run as it is, and wait until that is done; returns the checkpoint's name."""
        self.save()
        self.writer.finish()
        saved_in_time()
        return self.writer.newest or self.resumed.path.name

    def _save_if_due(self, before: int) -> None:
        if is_due(self.config.train.checkpoint_frequency, before, self.progress.num_steps):
            self.save()

    def _count_skipped(self, metrics: dict[str, float]) -> None:
        self.progress.skipped_in_a_row = self.progress.skipped_in_a_row + 1 if metrics.get("train/not_finite") else 0
        if self.progress.skipped_in_a_row >= self.config.train.max_skipped_steps:
            raise TrainingError(
                f"loss or gradients were not finite in the last {self.progress.skipped_in_a_row} steps "
                f"(train.max_skipped_steps), up to step {self.progress.num_steps}; the weights were left as they were: "
                f"look at {self.SUSPECT}, or try a lower optimizer.lr"
            )

    def _training_clock(self) -> float:
        """Seconds that stand still during evaluations."""
        return time.perf_counter() - self.clock.total["eval"]

    @property
    def _training_s(self) -> float:
        """Seconds of training so far, those of the processes before this one too."""
        here = 0.0 if self.started_s is None else self._training_clock() - self.started_s
        return self.progress.training_s + here

    def _start_clock(self) -> None:
        self.clock.take()
        self.started_s = self.stepped_s = self._training_clock()


def is_due(frequency: int, before: int, now: int) -> bool:
    """Whether a multiple of `frequency` steps lies after step `before`, up to step `now`."""
    return frequency > 0 and now // frequency > before // frequency
