"""A run in progress, whatever its mode: optimiser steps, weight pushes, evaluations and checkpoints.

The parts are handed in (by `grpo_utils.build`); nothing is started here. Where batches come from is the mode's:
grpo/run_sync.py, grpo/run_async.py.
"""

from abc import abstractmethod
from collections import Counter
from dataclasses import dataclass, field

from tensordict import TensorDict
from transformers import PreTrainedTokenizerBase

from grpo import session
from grpo.config import RunConfig
from grpo.errors import RewardError, TrainingError, times
from grpo.grading import GradingPool
from grpo.measure import accuracy
from grpo.metrics import rollout_metrics
from grpo.pools import EnginePool
from grpo.push import WeightPush
from grpo.rewards import Grade
from grpo.session import Session, is_due
from grpo.tasks import EncodedProblems, fingerprint

MOST_DROPPED = 50  # batches of groups without advantage in a row
PROBE_TOKENS = 512  # of a probe text, at most


@dataclass
class Progress(session.Progress):
    """What runs with engines have besides."""

    steps_since_push: int = 0
    policy_version: int = 0
    collections: int = 0  # sync: that were handed out,
    position: int = 0  # and prompts that were used;
    of_collection: dict[str, float] = field(default_factory=dict)  # `Run.of_batch` of the one that is being trained on,
    dropped_ahead: list = field(default_factory=list)  # and verdicts on the groups that were left out of the one ahead:
    surplus_ahead: list = field(default_factory=list)  # those without advantage, and those beyond its size
    admission: dict = field(default_factory=dict)  # async: `Admission.state`


@dataclass(kw_only=True)
class Run(Session):
    """The parts of a run, and how far it is."""

    config: RunConfig
    grading: GradingPool
    tokenizer: PreTrainedTokenizerBase
    data: dict[str, EncodedProblems]  # by split
    engines: EnginePool
    push: WeightPush
    progress: Progress = field(default_factory=Progress)
    first_use: bool = True  # whether the batch in hand has not been trained on before
    of_batch: dict[str, float] = field(default_factory=dict)  # what its mode has to say of it in metrics.jsonl
    probe: list[int] = field(default_factory=list)  # tokens of a response that was trained on

    def begin(self) -> None:
        if self.resumed is None and self._differs:
            self.push(0)
        super().begin()

    @property
    def _differs(self) -> bool:
        """Whether the policy is not that of the model's files, which engines start with: it was trained, or is in 4 bits."""
        return self.progress.policy_version > 0 or self.config.train_model.quantization.enabled

    def _check_grading(self, grades: list[Grade]) -> None:
        """Raise RewardError where more than train.max_grader_error_rate of them are no verdicts, timed out or failed.

        Of fewer than a collection's, as many may be none as of a collection's: what comes may be verdicts.
        """
        notes, train = Counter(grade.note for grade in grades if not grade.is_verdict), self.config.train
        if notes.total() > train.max_grader_error_rate * max(len(grades), train.dialog_turns_per_batch):
            note, count = notes.most_common(1)[0]
            raise RewardError(
                f"{notes.total()} of {len(grades)} responses could not be graded, more than train.max_grader_error_rate "
                f"({train.max_grader_error_rate:g}) allows; {times(count)}: {note}"
            )

    def _tell_dropped(self, kept: list[list[Grade]], dropped: list[list[Grade]]) -> None:
        """Have metrics.jsonl say what train.skip_zero_advantage left out, from verdicts on groups [K].

        kept: of all groups with an advantage that were sampled, trained on or not, or the mean would not be the policy's.
        """
        if self.config.train.skip_zero_advantage:
            rewards = [grade.reward for group in kept + dropped for grade in group if grade.is_verdict]
            self.of_batch |= {"rollout/dropped_groups": len(dropped)}
            self.of_batch |= {"rollout/reward_mean_with_dropped": sum(rewards) / max(1, len(rewards))}

    def _check_dropped(self, in_a_row: list[list[Grade]]) -> None:
        """Raise TrainingError where nothing but groups without advantage comes; RewardError where they have no verdicts."""
        self._check_grading([grade for group in in_a_row[-self.config.groups_per_collection :] for grade in group])
        if len(in_a_row) > MOST_DROPPED * self.config.groups_per_batch:
            raise TrainingError(
                f"{len(in_a_row)} groups in a row had equal rewards, and train.skip_zero_advantage (true) leaves them out: "
                "the problems are too easy or too hard for this model; choose others, or raise env.repeats"
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

    def evaluate(self, split: str) -> dict[str, float]:
        """Greedy accuracy on a held-out split: {"accuracy", "n"}.

        It is that of the engines' weights: those of the last push, or of the checkpoint that a run has just gone on from.
        """
        with self.clock.phase("eval"):
            max_tokens = self.config.inference_model.max_tokens
            return accuracy(self.engines, self.grading, self.data[split], self.tokenizer, max_tokens, self._eval_seed)

    def _pushed(self) -> None:
        """The engines have the weights of `progress.policy_version`."""

    def _test(self) -> dict[str, float]:
        return self.evaluate("test")

    def _validate(self) -> dict[str, float]:
        return self.evaluate("validation")

    @property
    @abstractmethod
    def _eval_seed(self) -> int | None:
        """What the engines are seeded with before an evaluation; None where they are not idle."""

    @property
    def _fingerprint(self) -> str:
        return fingerprint(self.data)

    def _account(self, summary: dict, training_s: float) -> dict:
        if self._grading_restarts:
            summary["restarts"]["grading"] = summary["restarts"].get("grading", 0) + self._grading_restarts
        return {"policy_version": self.progress.policy_version}

    @property
    def _grading_restarts(self) -> int:
        """How often grading processes were replaced, since the actors were started."""
        return self.grading.restarts

    def _judged(self, before: dict[str, float], after: dict[str, float]) -> str:
        return (
            f"Held-out accuracy on {after['n']} test problems: {before['accuracy']:.1%} before, "
            f"{after['accuracy']:.1%} after"
        )
