"""What every run does alike around its loop: has its directory for itself, keeps its clock, saves and ends when asked to."""

import errno
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grpo.checkpoint import Checkpoint, CheckpointWriter, newest
from grpo.errors import ActorError, ConfigError, TrainingError
from grpo.metrics import Clock
from grpo.preemption import Preempted, saved_in_time
from grpo.resume import CONFIG, SUMMARY, locked, write_config


@contextmanager
def claimed(run_dir: Path, resume: str | None) -> Iterator[Checkpoint | None]:
    """Have `run_dir` for this process alone; gives the checkpoint to go on from, if there is one."""
    with locked(run_dir):
        if resume is None and (run_dir / CONFIG).is_file():
            raise ConfigError(f"{run_dir} holds a run already: type resume={run_dir}, or another hydra.run.dir")
        yield newest(run_dir)


class Session:
    """The part of a run that no loop is in. The run itself has these, and says what a checkpoint of it is."""

    SUSPECT = "rollouts.jsonl"  # what to look at when losses are not finite

    config: Any
    run_dir: Path
    clock: Clock
    writer: CheckpointWriter
    resumed: Checkpoint | None
    progress: Any  # num_steps, skipped_in_a_row, training_s
    started_s: float | None  # `_training_clock` when the loop began,
    stepped_s: float  # and at the last step

    def save(self) -> None:
        """Begin a checkpoint of the run as it is now, unless there is one; it is written beside what follows."""
        raise NotImplementedError

    @contextmanager
    def kept(self) -> Iterator[None]:
        """While the run goes on: a request to end saves it, and a full disk is said in one line."""
        write_config(self.config, self.run_dir)
        (self.run_dir / SUMMARY).unlink(missing_ok=True)  # of the shorter run that is gone on with
        try:
            try:
                yield
            except Preempted as stop:
                stop.saved = self._save_and_end()
                raise
            except ActorError as error:
                error.step = self.progress.num_steps
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
