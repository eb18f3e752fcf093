"""A run in progress: what the loops call. Collections in; optimiser steps, weight pushes and evaluations out.

The parts are handed in (by `grpo_utils.build`); nothing is started here. With train.sync_iter=false one background thread
waits for the next collection while the driver waits for the trainer:

    driver       step ... step │ wait │ push │ step ... step │ wait │ push
    background   collection n + 1 ────┘      collection n + 2 ────┘
"""

import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import chain, islice
from pathlib import Path

from tensordict import TensorDict
from torchrl.data import ReplayBuffer
from transformers import PreTrainedTokenizerBase

from grpo.checkpoint import Checkpoint, CheckpointWriter
from grpo.collect import GroupCollector
from grpo.config import RunConfig
from grpo.errors import ActorError, RewardError, TrainingError
from grpo.evaluate import accuracy
from grpo.grading import GradingPool
from grpo.metrics import Clock, RunLog, rollout_metrics
from grpo.plot import plot_run
from grpo.pools import EnginePool, ReferencePool, TrainerPool, WeightPush
from grpo.preemption import REQUEST, saved_in_time
from grpo.replay import refill
from grpo.resume import SUMMARY, write_whole
from grpo.tasks import EncodedProblems

PROBE_TOKENS = 512  # of a probe text, at most


@dataclass
class Progress:
    """How far a run is: its state but for tensors and files."""

    num_steps: int = 0
    steps_of_collection: int = 0  # of them, on the collection that is being trained on
    samples_trained: int = 0
    policy_version: int = 0
    position: int = 0  # prompts whose collections were handed out
    evaluated: bool = True  # whether the evaluation that was due after the last push was made
    skipped_in_a_row: int = 0  # steps that were not finite
    before: dict[str, float] | None = None  # held-out accuracy before training
    best_accuracy: float | None = None  # on the validation split,
    best_step: int | None = None  # after this step
    evaluations_since_best: int = 0
    training_s: float = 0.0  # of the processes before this one
    phases_s: dict[str, float] = field(default_factory=dict)  # `Clock.total`


@dataclass
class Run:
    """The parts of a run, and how far it is."""

    config: RunConfig
    run_dir: Path
    grading: GradingPool
    tokenizer: PreTrainedTokenizerBase
    data: dict[str, EncodedProblems]  # by split
    trainer: TrainerPool
    old: ReferencePool | None  # the training ranks, where the policy is compared with what it was
    engines: EnginePool
    push: WeightPush
    collector: GroupCollector
    replay_buffer: ReplayBuffer
    background: ThreadPoolExecutor
    clock: Clock
    log: RunLog
    writer: CheckpointWriter
    resumed: Checkpoint | None
    progress: Progress = field(default_factory=Progress)
    rollouts: TensorDict | None = None  # the collection that is being trained on
    probe: list[int] = field(default_factory=list)  # tokens of a response that was trained on
    ahead: Future | None = None
    started_s: float | None = None  # `_training_clock` when the loop began,
    stepped_s: float = 0.0  # and at the last step
    saved: tuple | None = None  # what the last checkpoint that was started has of (num_steps, evaluated)

    def begin(self) -> None:
        """Take up the checkpoint that the run goes on from, if there is one, and evaluate the untrained model once."""
        if self.resumed is not None:
            self._restore(self.resumed)
        if self.progress.before is None:
            self.progress.before = self.evaluate("test")
        self._start_clock()
        if not self.progress.evaluated:
            self._evaluate()

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        self.trainer.load(checkpoint.trainer, state["trainer"])
        self.progress = Progress(**state["progress"])
        self.clock.total |= self.progress.phases_s
        self.collector.env.stream.position = self.progress.position
        self.rollouts = checkpoint.collection("collection")
        ahead = checkpoint.collection("ahead")
        if ahead is not None:
            self.ahead = Future()
            self.ahead.set_result(ahead)
            self.collector.env.stream.position += len(ahead)
        if self.progress.policy_version > 0 and self.rollouts is None:
            self.push(self.progress.policy_version)
        self.saved = self._where

    def collections(self) -> Iterator[TensorDict]:
        """The run's collections. With train.sync_iter=false the next one is sampled while one is trained on."""
        if self.rollouts is not None:  # a resumed run's, of which some steps are done
            yield self.rollouts
        while self._wants_more:
            REQUEST.check()
            self.rollouts = self._next_collection()
            self._check_grading(self.rollouts)
            self.progress.position += len(self.rollouts)
            if self._wants_more and not self.config.train.sync_iter:
                self.ahead = self.background.submit(self._collect)
            yield self.rollouts

    def _check_grading(self, rollouts: TensorDict) -> None:
        grades = [grade for i in range(len(rollouts)) for grade in rollouts[i]["record"].grades]
        notes = Counter(grade.note for grade in grades if grade.outcome == "grader_error")
        if notes.total() > self.config.train.max_grader_error_rate * len(grades):
            note, count = notes.most_common(1)[0]
            raise RewardError(
                f"{notes.total()} of {len(grades)} responses could not be graded, more than train.max_grader_error_rate "
                f"({self.config.train.max_grader_error_rate:g}) allows; {count} times: {note}"
            )

    @property
    def _wants_more(self) -> bool:
        plateau = self.config.train.stop_when
        if plateau is not None and self.progress.evaluations_since_best >= plateau:
            return False
        return self.progress.position < self.config.num_collections * self.config.groups_per_collection

    def _collect(self) -> TensorDict:
        return next(self._collections)

    @cached_property
    def _collections(self) -> Iterator[TensorDict]:
        return iter(self.collector)

    def _next_collection(self) -> TensorDict:
        if self.ahead is None:
            return self._collect()
        rollouts, self.ahead = self._wait_for_collection(), None
        return rollouts

    def batches(self, rollouts: TensorDict) -> Iterator[TensorDict]:
        """train.epochs passes over `rollouts` [G] in optimiser batches [B]; a resumed run leaves out what it has done."""
        if self.old is not None and self.progress.steps_of_collection == 0:
            with self.clock.phase("train"):
                self._anchor(rollouts)
        refill(self.replay_buffer, rollouts, [self.config.seed, self.progress.position])
        batches = chain.from_iterable(self.replay_buffer for _ in range(self.config.train.epochs))
        yield from islice(batches, self.progress.steps_of_collection, None)

    def _anchor(self, rollouts: TensorDict) -> None:
        """Have `rollouts` [G] hold the hidden states that the policy has before the collection's first step."""
        keys = ("tokens", "prompt_length", "response_mask")
        rows = TensorDict(
            {key: rollouts[key].flatten(0, 1) for key in keys}, batch_size=[rollouts["tokens"][..., 0].numel()]
        )
        _, states = self.old.own_states(rows)
        rollouts["anchor_states"] = states.unflatten(0, rollouts["tokens"].shape[:2])

    def _wait_for_collection(self) -> TensorDict:
        with self.clock.phase("wait"):
            try:
                return self.ahead.result(self.config.ray.timeout_s)
            except TimeoutError:
                raise ActorError(
                    f"the collection behind step {self.progress.num_steps} did not end within "
                    f"{self.config.ray.timeout_s:g} s: if neither engine nor reward function hangs, raise ray.timeout_s"
                ) from None

    def step(self, batch: TensorDict) -> None:
        """One optimiser step on `batch` [B], logged."""
        now = self.progress
        first_epoch = now.steps_of_collection < self.config.batches_per_collection
        with_log_probs = first_epoch and self.config.logging.rollout_tokens
        with self.clock.phase("train"):
            metrics, log_probs = self.trainer.step(batch.exclude("records"), now.num_steps + 1, with_log_probs)
        now.num_steps += 1
        now.steps_of_collection += 1
        length = int(batch["prompt_length"][0] + batch["response_length"][0])
        self.probe = batch["tokens"][0, : min(length - 1, PROBE_TOKENS)].tolist()  # vLLM wants room for one more
        now.samples_trained += len(batch)
        metrics |= rollout_metrics(batch, now.policy_version) | self.clock.take()
        last, self.stepped_s = self.stepped_s, self._training_clock()
        metrics["time/samples_per_s"] = len(batch) / (self.stepped_s - last)
        if first_epoch:
            self.log.rollouts(now.num_steps, batch, log_probs)
        self.log.step(now.num_steps, now.policy_version, metrics)
        self._count_skipped(metrics)
        self.writer.poll()
        if now.steps_of_collection < self.config.steps_per_collection:  # after the last one comes the push
            if self.config.train.sync_iter:  # else the collection beside it would have to be waited for
                self._save_if_due(now.num_steps - 1)
            REQUEST.check()

    def _count_skipped(self, metrics: dict[str, float]) -> None:
        self.progress.skipped_in_a_row = self.progress.skipped_in_a_row + 1 if metrics.get("train/not_finite") else 0
        if self.progress.skipped_in_a_row >= self.config.train.max_skipped_steps:
            raise TrainingError(
                f"loss or gradients were not finite in the last {self.progress.skipped_in_a_row} steps "
                f"(train.max_skipped_steps), up to step {self.progress.num_steps}; the weights were left as they were: "
                "look at rollouts.jsonl, or try a lower optimizer.lr"
            )

    def push_weights(self) -> None:
        """Give the engines the trainer's weights as the next policy version; evaluate and save where it is time to."""
        now = self.progress
        if self.ahead is not None:
            self._wait_for_collection()  # a collection is sampled under one version
        with self.clock.phase("push"):
            now.policy_version += 1
            self.push(now.policy_version)
        taken, now.steps_of_collection, self.rollouts = now.steps_of_collection, 0, None
        metrics = self.clock.take()
        if self.config.train.probe_frequency and now.policy_version % self.config.train.probe_frequency == 0:
            metrics["sync/probe_difference"] = self.push.probe(now.policy_version, self.probe)
        self.log.add(metrics)
        before = now.num_steps - taken
        now.evaluated = not _is_due(self.config.train.eval_frequency, before, now.num_steps)
        if not now.evaluated:
            self._evaluate()
        # What was due at an earlier step of the collection was saved there, but for a collection beside training.
        self._save_if_due(now.num_steps - 1 if self.config.train.sync_iter else before)
        REQUEST.check()

    def _evaluate(self) -> None:
        """On the validation split; the best so far is kept as a checkpoint."""
        now, found = self.progress, self.evaluate("validation")["accuracy"]
        self.log.add({"eval/accuracy": found} | self.clock.take())
        now.evaluated, is_best = True, now.best_accuracy is None or found > now.best_accuracy
        now.evaluations_since_best = 0 if is_best else now.evaluations_since_best + 1
        if is_best:
            now.best_accuracy, now.best_step = found, now.num_steps
            self.save()

    def _save_if_due(self, before: int) -> None:
        if _is_due(self.config.train.checkpoint_frequency, before, self.progress.num_steps):
            self.save()

    @property
    def _where(self) -> tuple:
        return self.progress.num_steps, self.progress.evaluated, self.progress.before is None

    def save(self) -> None:
        """Begin a checkpoint of the run as it is now, unless there is one; it is written beside what follows."""
        if self.saved == self._where:
            return
        with self.clock.phase("checkpoint"):
            collections = {}
            if self.progress.steps_of_collection:
                collections["collection"] = self.rollouts
            if self.ahead is not None:  # it was sampled under weights that are gone by then
                collections["ahead"] = self._wait_for_collection()
            times = {"training_s": self._training_s, "phases_s": dict(self.clock.total)}
            state = {
                "progress": asdict(self.progress) | times,
                "log": self.log.position,
                "config": asdict(self.config),
                "data": self.data["train"].fingerprint,
            }
            self.writer.start(self.progress.num_steps, state, collections, self.progress.best_step)
            self.saved = self._where

    def save_and_end(self) -> str:
        """Save the run as it is, and wait until that is done; returns the checkpoint's name."""
        self.save()
        self.writer.finish()
        saved_in_time()
        return self.writer.newest or self.resumed.path.name

    def evaluate(self, split: str) -> dict[str, float]:
        """Greedy accuracy of the engines' weights on a held-out split: {"accuracy", "n"}."""
        with self.clock.phase("eval"):
            max_tokens = self.config.inference_model.max_tokens
            return accuracy(self.engines, self.grading, self.data[split], self.tokenizer, max_tokens)

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
            "restarts": {},
        }
        write_whole(self.run_dir / SUMMARY, json.dumps(summary, indent=2) + "\n")
        plot_run(self.run_dir)
        print(
            f"\n{now.samples_trained} responses in {now.num_steps} steps, {training_s:.0f} s of training "
            f"({summary['samples_per_s']:.0f} a second); model, metrics and plots are in {os.path.relpath(self.run_dir)}\n"
            f"Held-out accuracy on {after['n']} test problems: {before['accuracy']:.1%} before, "
            f"{after['accuracy']:.1%} after"
        )


def _is_due(frequency: int, before: int, now: int) -> bool:
    """Whether a multiple of `frequency` steps lies after step `before`, up to step `now`."""
    return frequency > 0 and now // frequency > before // frequency
