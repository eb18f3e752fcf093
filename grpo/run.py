"""A run in progress, whatever its mode: optimiser steps, weight pushes, evaluations and checkpoints.

The parts are handed in (by `grpo_utils.build`); nothing is started here. Where batches come from is the mode's:
grpo/run_sync.py, grpo/run_async.py.
"""

import json
import os
from abc import abstractmethod
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tensordict import TensorDict
from transformers import PreTrainedTokenizerBase

from grpo.checkpoint import Checkpoint, CheckpointWriter
from grpo.config import RunConfig
from grpo.errors import RewardError, TrainingError
from grpo.evaluate import accuracy
from grpo.grading import GradingPool
from grpo.metrics import Clock, RunLog, rollout_metrics
from grpo.plot import plot_run
from grpo.pools import EnginePool, TrainerPool, WeightPush
from grpo.resume import SUMMARY, write_whole
from grpo.rewards import Grade
from grpo.session import Session, is_due
from grpo.supervision import Supervisor
from grpo.tasks import EncodedProblems

MOST_DROPPED = 50  # batches of groups without advantage in a row
PROBE_TOKENS = 512  # of a probe text, at most


@dataclass
class Progress:
    """How far a run is: its state but for tensors and files."""

    num_steps: int = 0
    steps_since_push: int = 0
    samples_trained: int = 0
    policy_version: int = 0
    collections: int = 0  # sync: that were handed out,
    position: int = 0  # and prompts that were used
    admission: dict = field(default_factory=dict)  # async: `Admission.state`
    evaluated: bool = True  # whether the evaluation that was due after the last push was made
    skipped_in_a_row: int = 0  # steps that were not finite
    before: dict[str, float] | None = None  # held-out accuracy before training
    best_accuracy: float | None = None  # on the validation split,
    best_step: int | None = None  # after this step
    evaluations_since_best: int = 0
    training_s: float = 0.0  # of the processes before this one
    phases_s: dict[str, float] = field(default_factory=dict)  # `Clock.total`


@dataclass
class Run(Session):
    """The parts of a run, and how far it is."""

    config: RunConfig
    run_dir: Path
    grading: GradingPool
    tokenizer: PreTrainedTokenizerBase
    data: dict[str, EncodedProblems]  # by split
    trainer: TrainerPool
    engines: EnginePool
    push: WeightPush
    clock: Clock
    log: RunLog
    writer: CheckpointWriter
    resumed: Checkpoint | None
    supervisor: Supervisor
    progress: Progress = field(default_factory=Progress)
    first_use: bool = True  # whether the batch in hand has not been trained on before
    of_batch: dict[str, float] = field(default_factory=dict)  # what its mode has to say of it in metrics.jsonl
    probe: list[int] = field(default_factory=list)  # tokens of a response that was trained on
    started_s: float | None = None  # `_training_clock` when the loop began,
    stepped_s: float = 0.0  # and at the last step
    saved: tuple | None = None  # what the last checkpoint that was started has of (num_steps, evaluated)

    def begin(self) -> None:
        """Take up the checkpoint that the run goes on from, if there is one, and evaluate the untrained model once."""
        if self.resumed is not None:
            state = self.resumed.state
            self.trainer.load(self.resumed.trainer, state["trainer"])
            self.supervisor.take_up(state["restarts"])
            self.progress = Progress(**state["progress"])
            self.clock.total |= self.progress.phases_s
            self._restore(self.resumed)
            self.saved = self._where
        if self.progress.before is None:
            self.progress.before = self.evaluate("test")
        self._start_clock()
        if not self.progress.evaluated:
            self._evaluate()

    @abstractmethod
    def _restore(self, checkpoint: Checkpoint) -> None:
        """Take up what of `checkpoint` is the mode's; the engines are to have the weights that they had."""

    @abstractmethod
    def _state(self) -> dict[str, TensorDict]:
        """Bring `progress` up to date for a checkpoint; returns the collections that belong to it."""

    def _check_grading(self, grades: list[Grade]) -> None:
        """Raise RewardError where more than train.max_grader_error_rate of them are no verdicts, timed out or failed."""
        notes = Counter(grade.note for grade in grades if not grade.is_verdict)
        if notes.total() > self.config.train.max_grader_error_rate * len(grades):
            note, count = notes.most_common(1)[0]
            raise RewardError(
                f"{notes.total()} of {len(grades)} responses could not be graded, more than train.max_grader_error_rate "
                f"({self.config.train.max_grader_error_rate:g}) allows; {count} times: {note}"
            )

    def _look_at(self, kept: list[list[Grade]], dropped: list[list[Grade]]) -> None:
        """What is to be known of verdicts on groups [K] before those that are `kept` are trained on."""
        grades = [grade for group in kept + dropped for grade in group]
        self._check_grading(grades)
        if self.config.train.skip_zero_advantage:
            rewards = [grade.reward for grade in grades if grade.is_verdict]
            self.of_batch |= {"rollout/dropped_groups": len(dropped)}
            self.of_batch |= {"rollout/reward_mean_with_dropped": sum(rewards) / max(1, len(rewards))}

    def _check_dropped(self, count: int) -> None:
        """Raise TrainingError where nothing but groups without advantage comes."""
        if count > MOST_DROPPED * self.config.groups_per_batch:
            raise TrainingError(
                f"{count} groups in a row had equal rewards, and train.skip_zero_advantage (true) leaves them out: the "
                "problems are too easy or too hard for this model; choose others, or raise env.repeats"
            )

    @property
    def _at_plateau(self) -> bool:
        plateau = self.config.train.stop_when
        return plateau is not None and self.progress.evaluations_since_best >= plateau

    def step(self, batch: TensorDict) -> None:
        """One optimiser step on `batch` [B], logged."""
        now = self.progress
        proximal = self.config.train.is_correction != "none" and self.config.train.epochs > 1
        with_log_probs = self.first_use and (self.config.logging.rollout_tokens or proximal)
        with self.clock.phase("train"):
            metrics, log_probs = self.trainer.step(batch.exclude("records"), now.num_steps + 1, with_log_probs)
        if self.first_use and proximal:  # later steps on this batch compare with the policy as it was before this one
            batch["proximal_log_probs"] = log_probs
        now.num_steps += 1
        now.steps_since_push += 1
        length = int(batch["prompt_length"][0] + batch["response_length"][0])
        self.probe = batch["tokens"][0, : min(length - 1, PROBE_TOKENS)].tolist()  # vLLM wants room for one more
        now.samples_trained += len(batch)
        steps = now.policy_version, now.steps_since_push - 1, self.config.steps_per_push
        metrics |= rollout_metrics(batch, *steps) | self.of_batch | self.clock.take()
        last, self.stepped_s = self.stepped_s, self._training_clock()
        metrics["time/samples_per_s"] = len(batch) / (self.stepped_s - last)
        if self.first_use:
            self.log.rollouts(now.num_steps, batch, log_probs if self.config.logging.rollout_tokens else None)
        self.log.step(now.num_steps, now.policy_version, metrics)
        self._count_skipped(metrics)
        self.writer.poll()

    def push_weights(self) -> None:
        """Give the engines the trainer's weights as the next policy version, and evaluate where it is time to."""
        now = self.progress
        with self.clock.phase("push"):
            now.policy_version += 1
            self.push(now.policy_version)
            self._pushed()
        taken, now.steps_since_push = now.steps_since_push, 0
        metrics = self.clock.take()
        if self.probe and self.config.train.probe_frequency and now.policy_version % self.config.train.probe_frequency == 0:
            metrics["sync/probe_difference"] = self.push.probe(now.policy_version, self.probe)
        self.log.add(metrics)
        now.evaluated = not is_due(self.config.train.eval_frequency, now.num_steps - taken, now.num_steps)
        if not now.evaluated:
            self._evaluate()

    def _evaluate(self) -> None:
        """On the validation split; the best so far is kept as a checkpoint."""
        now, found = self.progress, self.evaluate("validation")["accuracy"]
        self.log.add({"eval/accuracy": found} | self.clock.take())
        now.evaluated, is_best = True, now.best_accuracy is None or found > now.best_accuracy
        now.evaluations_since_best = 0 if is_best else now.evaluations_since_best + 1
        if is_best:
            now.best_accuracy, now.best_step = found, now.num_steps
            self.save()

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
                "data": self.data["train"].fingerprint,
            }
            self.writer.start(self.progress.num_steps, state, collections, self.progress.best_step)
            self.saved = self._where

    def evaluate(self, split: str) -> dict[str, float]:
        """Greedy accuracy of the engines' weights on a held-out split: {"accuracy", "n"}."""
        with self.clock.phase("eval"):
            max_tokens = self.config.inference_model.max_tokens
            return accuracy(self.engines, self.grading, self.data[split], self.tokenizer, max_tokens, self._eval_seed)

    def _pushed(self) -> None:
        """The engines have the weights of `progress.policy_version`."""

    def _account(self, summary: dict) -> dict:
        """What the mode has to add to summary.json."""
        return {}

    @property
    @abstractmethod
    def _eval_seed(self) -> int | None:
        """What the engines are seeded with before an evaluation; None where they are not idle."""

    def finish(self) -> None:
        """Save, evaluate, export the model, write summary.json and the plots, and tell the user."""
        now = self.progress
        training_s = self._training_s
        self.save()
        self.writer.finish()
        before, after = now.before, self.evaluate("test")
        self.trainer.export(self.run_dir / "model")
        self.log.close()
        summary = {
            "eval": {"before": before, "after": after},
            "steps": now.num_steps,
            "samples_trained": now.samples_trained,
            "policy_version": now.policy_version,
            "wall_s": round(training_s, 3),
            "samples_per_s": round(now.samples_trained / training_s, 1),
            "phases_s": {name: round(s, 3) for name, s in self.clock.total.items() if name not in ("eval", "checkpoint")},
            "restarts": self.supervisor.restarts,
        }
        summary |= self._account(summary)
        write_whole(self.run_dir / SUMMARY, json.dumps(summary, indent=2) + "\n")
        plot_run(self.run_dir)
        print(
            f"\n{now.samples_trained} responses in {now.num_steps} steps, {training_s:.0f} s of training "
            f"({summary['samples_per_s']:.0f} a second); model, metrics and plots are in {os.path.relpath(self.run_dir)}\n"
            f"Held-out accuracy on {after['n']} test problems: {before['accuracy']:.1%} before, "
            f"{after['accuracy']:.1%} after"
        )
