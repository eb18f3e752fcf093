"""A run in progress: what the loops call. Collections in; optimiser steps, weight pushes and evaluations out.

The parts are handed in (by `grpo_utils.build`); nothing is started here. With train.sync_iter=false one background thread
waits for the next collection while the driver waits for the trainer:

    driver       step ... step │ wait │ push │ step ... step │ wait │ push
    background   collection n + 1 ────┘      collection n + 2 ────┘
"""

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tensordict import TensorDict
from torchrl.data import ReplayBuffer
from transformers import PreTrainedTokenizerBase

from grpo.collect import GroupCollector
from grpo.config import RunConfig
from grpo.errors import ActorError
from grpo.evaluate import accuracy
from grpo.metrics import Clock, RunLog, rollout_metrics
from grpo.plot import plot_run
from grpo.pools import EnginePool, TrainerPool, WeightPush
from grpo.tasks import EncodedProblems, Task

PROBE_TOKENS = 512  # of a probe text, at most


@dataclass
class Run:
    """The parts of a run, and how far it is."""

    config: RunConfig
    run_dir: Path
    task: Task
    tokenizer: PreTrainedTokenizerBase
    data: dict[str, EncodedProblems]  # by split
    trainer: TrainerPool
    engines: EnginePool
    push: WeightPush
    collector: GroupCollector
    replay_buffer: ReplayBuffer
    background: ThreadPoolExecutor
    clock: Clock
    log: RunLog
    num_steps: int = 0
    samples_trained: int = 0
    policy_version: int = 0
    probe: list[int] = field(default_factory=list)  # tokens of a response that was trained on
    ahead: Future | None = None
    started_s: float = 0.0  # `_training_clock` when the loop began,
    stepped_s: float = 0.0  # and at the last step

    def collections(self) -> Iterator[TensorDict]:
        """The run's collections. With train.sync_iter=false the next one is sampled while one is trained on."""
        collections = iter(self.collector)
        self.clock.take()
        self.started_s = self.stepped_s = self._training_clock()
        if self.config.train.sync_iter:
            yield from collections
            return
        self.ahead = self.background.submit(next, collections, None)
        while (rollouts := self._wait_for_collection()) is not None:
            self.ahead = self.background.submit(next, collections, None)
            yield rollouts

    def _wait_for_collection(self) -> TensorDict | None:
        with self.clock.phase("wait"):
            try:
                return self.ahead.result(self.config.ray.timeout_s)
            except TimeoutError:
                raise ActorError(
                    f"the collection behind step {self.num_steps} did not end within {self.config.ray.timeout_s:g} s: "
                    "if neither engine nor reward function hangs, raise ray.timeout_s"
                ) from None

    def step(self, batch: TensorDict) -> None:
        """One optimiser step on `batch` [B], logged."""
        first_epoch = self.num_steps % self.config.steps_per_collection < self.config.batches_per_collection
        with_log_probs = first_epoch and self.config.logging.rollout_tokens
        with self.clock.phase("train"):
            metrics, log_probs = self.trainer.step(batch.exclude("records"), self.num_steps + 1, with_log_probs)
        self.num_steps += 1
        length = int(batch["prompt_length"][0] + batch["response_length"][0])
        self.probe = batch["tokens"][0, : min(length - 1, PROBE_TOKENS)].tolist()  # vLLM wants room for one more
        self.samples_trained += len(batch)
        metrics |= rollout_metrics(batch, self.policy_version) | self.clock.take()
        last, self.stepped_s = self.stepped_s, self._training_clock()
        metrics["time/samples_per_s"] = len(batch) / (self.stepped_s - last)
        if first_epoch:
            self.log.rollouts(self.num_steps, batch, log_probs)
        self.log.step(self.num_steps, self.policy_version, metrics)

    def push_weights(self) -> None:
        """Give the engines the trainer's weights as the next policy version; evaluate where it is time to."""
        if self.ahead is not None:
            self._wait_for_collection()  # a collection is sampled under one version
        with self.clock.phase("push"):
            self.policy_version += 1
            self.push(self.policy_version)
        metrics = self.clock.take()
        if self.config.train.probe_frequency and self.policy_version % self.config.train.probe_frequency == 0:
            metrics["sync/probe_difference"] = self.push.probe(self.policy_version, self.probe)
        frequency, before = self.config.train.eval_frequency, self.num_steps - self.config.steps_per_collection
        if frequency and self.num_steps // frequency > before // frequency:
            metrics["eval/accuracy"] = self.evaluate("validation")["accuracy"]
            metrics |= self.clock.take()
        self.log.add(metrics)

    def evaluate(self, split: str) -> dict[str, float]:
        """Greedy accuracy of the engines' weights on a held-out split: {"accuracy", "n"}."""
        with self.clock.phase("eval"):
            max_tokens = self.config.inference_model.max_tokens
            return accuracy(self.engines, self.task, self.data[split], self.tokenizer, max_tokens)

    def _training_clock(self) -> float:
        """Seconds that stand still during evaluations."""
        return time.perf_counter() - self.clock.total["eval"]

    def finish(self, before: dict[str, float]) -> None:
        """Evaluate, export the model, write summary.json and the plots, and tell the user."""
        training_s = self._training_clock() - self.started_s
        after = self.evaluate("test")
        self.trainer.export(self.run_dir / "model")
        self.log.close()
        summary = {
            "eval": {"before": before, "after": after},
            "steps": self.num_steps,
            "samples_trained": self.samples_trained,
            "policy_version": self.policy_version,
            "wall_s": round(training_s, 3),
            "samples_per_s": round(self.samples_trained / training_s, 1),
            "phases_s": {name: round(s, 3) for name, s in self.clock.total.items() if name != "eval"},
            "restarts": {},
        }
        (self.run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        plot_run(self.run_dir)
        print(
            f"\n{self.samples_trained} responses in {self.num_steps} steps, {training_s:.0f} s of training "
            f"({summary['samples_per_s']:.0f} a second); model, metrics and plots are in {os.path.relpath(self.run_dir)}\n"
            f"Held-out accuracy on {after['n']} test problems: {before['accuracy']:.1%} before, "
            f"{after['accuracy']:.1%} after"
        )
