"""One table of metric names, how they are made from a batch, and where they go.

Every step gives one object to metrics.jsonl, and to Weights & Biases and TensorBoard where they are on. rollouts.jsonl
gets a line a response; Weights & Biases also a histogram of the batch's rewards and a table of a few of its groups.
"""

import json
import os
import secrets
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from statistics import harmonic_mean
from typing import IO, Any

import torch
from tensordict import TensorDict
from tqdm import tqdm

from grpo.config import RunConfig
from grpo.errors import ConfigError, one_line
from grpo.offline_config import OfflineConfig
from grpo.rewards import OUTCOMES

METRICS = {
    "rollout/reward_mean": "mean reward of the batch's responses",
    "rollout/reward_std": "its standard deviation",
    "rollout/reward_min": "smallest reward",
    "rollout/reward_q25": "first quartile",
    "rollout/reward_median": "median reward",
    "rollout/reward_q75": "third quartile",
    "rollout/reward_max": "largest reward",
    "rollout/accuracy": "share of responses with the right answer",
    "rollout/wrong": "share of responses with a wrong answer",
    "rollout/unparseable": "share of responses without an answer that can be read",
    "rollout/timed_out": "share of responses that could not be graded within the time limit",
    "rollout/grader_error": "share of responses whose grading failed",
    "rollout/term_*": "mean of the reward's term of that name, of the responses with a verdict: a metric for each term",
    "rollout/truncated": "share of responses cut at their token budget",
    "rollout/response_length_mean": "tokens a response",
    "rollout/response_length_max": "tokens of the longest response",
    "rollout/advantage_mean": "mean advantage",
    "rollout/advantage_std": "standard deviation of the advantages",
    "rollout/groups": "groups in the batch",
    "rollout/group_size_mean": "responses a group",
    "rollout/equal_groups": "share of groups whose rewards, where there is a verdict, are all equal: they teach nothing",
    "rollout/kl_penalty_mean": "mean of what the reference takes off a reward (kl_coef_in_loss=false)",
    "rollout/kl_penalty_std": "its standard deviation",
    "rollout/gradient_groups": "share of groups with an advantage: the others carry no gradient of the policy loss",
    "train/loss": "the loss, averaged as objective.aggregation has it; offline: KL(policy || target), mean a group",
    "train/objective": "what the policy loss raises, a token: the clipped surrogate, or weight x advantage x log-prob",
    "train/penalty": "what objective.divergence charges a token, before its coefficient",
    "train/over_margin": "share of tokens in responses beyond kl_margin or ot_target, which alone are charged",
    "train/transport": "transport cost of a response's hidden states to the anchor's, mean over tokens (divergence=ot)",
    "train/kl_to_reference": "k3 estimate of KL(policy || reference), nats a token",
    "train/kl_to_reference_std": "its standard deviation over tokens",
    "train/kl_to_inference": "k1 estimate of KL(inference || policy), nats a token",
    "train/entropy": "entropy of the next-token distribution, nats",
    "train/clip_fraction": "share of tokens where the clip binds",
    "train/clip_fraction_low": "share of tokens where its lower bound does",
    "train/clip_fraction_high": "share of tokens where its upper bound does",
    "train/gradient_tokens": "share of tokens that carry the policy loss's gradient: an advantage, and neither clipped off "
    "nor masked",
    "train/ratio_mean": "mean importance ratio of policy to inference policy; with train.is_correction to the policy that "
    "first trained on the batch",
    "train/ratio_std": "its standard deviation over tokens",
    "train/ratio_max": "the largest",
    "train/ess": "effective sample size of the ratios to what sampled (train/is_raw_*, with a correction) as a share of the "
    "tokens",
    "train/ranking_accuracy": "offline: of the batch's groups whose scores differ, the share whose best-scored completion "
    "the policy ranks first",
    "train/group_entropy": "offline: entropy of the policy's distribution over a group's completions, nats",
    "train/target_entropy": "offline: entropy of the scores' distribution over them, nats",
    "train/completion_log_prob": "offline: log-prob of the completions, nats a token",
    "train/mismatch": "mean |trainer now - inference| log-prob of a token, nats: what staleness and the engine's arithmetic "
    "make together; sync/probe_difference is the second alone",
    "train/is_weight_mean": "importance weight between trainer and inference as the loss has it (train.is_correction)",
    "train/is_raw_mean": "the same before train.is_cap",
    "train/is_raw_std": "its standard deviation over tokens",
    "train/is_raw_max": "the largest",
    "train/is_limited": "share of tokens whose weight was truncated or masked",
    "train/grad_norm": "gradient norm before clipping",
    "train/lr": "learning rate",
    "train/skipped_updates": "1 where every advantage was 0 and the weights stayed",
    "train/not_finite": "1 where loss or gradients were not finite and the weights stayed",
    "train/overflows": "1 where gradients overflowed float16 and the weights stayed (mixed_precision=fp16)",
    "train/grad_scale": "factor that keeps gradients in float16's range (mixed_precision=fp16)",
    "buffer/staleness_max": "policy versions between sampling and training, the largest",
    "buffer/staleness_mean": "the same, mean over rollouts",
    "buffer/staleness_steps_max": "optimiser steps between the weights that sampled and those that are trained, the largest",
    "rollout/dropped_groups": "groups with equal rewards that others took the place of (train.skip_zero_advantage)",
    "rollout/reward_mean_with_dropped": "mean reward over the batch's groups, or the collection's, and those",
    "rollout/uses_mean": "train.replay=uniform: times that the batch's groups have been trained on, this one too, the mean",
    "rollout/uses_max": "the largest",
    "buffer/left_unused": "train.replay=uniform: groups that left the buffer since the last batch and were never drawn",
    "buffer/size": "async: finished groups that wait in the buffer when a batch was taken",
    "buffer/in_flight": "async: groups that were started and not finished then",
    "sync/probe_difference": "mean |trainer - engine| log-prob of a probe text after a push, the largest engine's, nats",
    "eval/accuracy": "greedy accuracy on the validation split; offline: ranking accuracy on the held-out groups",
    "eval/problems": "problems, or groups, that it is a share of",
    "time/generate_s": "sampling responses; async: beside the steps, so its total alone is known, in summary.json",
    "time/reward_s": "grading them; async: the same",
    "time/reference_s": "scoring them under the reference; async: the same",
    "time/train_s": "the optimiser step",
    "time/push_s": "pushing weights to the engines, and with colocate=true putting them to sleep",
    "time/wait_s": "waiting for a collection that runs beside training",
    "time/eval_s": "evaluating",
    "time/checkpoint_s": "what training waited for checkpoints",
    "time/samples_per_s": "responses trained on a second, over the whole step; the first one behind a push has the push in "
    "it, and sync's sampling",
}
PHASES = ("generate", "reward", "reference", "train", "push", "wait", "eval", "checkpoint")


def steps_per_push(config: RunConfig | OfflineConfig) -> int:
    """Optimiser steps that have everything in them once: the first of them has the push, and sync's sampling."""
    return config.steps_per_push if isinstance(config, RunConfig) else 1


def metric(name: str) -> str:
    """The name under which METRICS has a metric."""
    return "rollout/term_*" if name.startswith("rollout/term_") else name


class Clock:
    """Seconds a phase: since the last `take`, and in total. Phases may overlap where a collection runs beside training."""

    def __init__(self) -> None:
        self.since = defaultdict(float)
        self.total = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self.since[name] += seconds
            self.total[name] += seconds

    def take(self) -> dict[str, float]:
        taken, self.since = self.since, defaultdict(float)
        return {f"time/{name}_s": seconds for name, seconds in taken.items()}


def rollout_metrics(
    batch: TensorDict, trainer_version: int, steps_since_push: int = 0, steps_per_push: int = 1
) -> dict[str, float]:
    """What a batch of rollouts [B] (with its `records`) looked like when it was trained on.

    The trainer was `steps_since_push` optimiser steps behind its push `trainer_version`.
    """
    graded, advantage = batch["graded"], batch["advantage"]
    reward = batch["reward"][graded] if graded.sum() > 1 else torch.zeros(2)
    length = batch["response_length"].float()
    grades = [grade for record in batch["records"] for grade in record.grades]
    equal = [len({grade.reward for grade in record.grades if grade.is_verdict}) <= 1 for record in batch["records"]]
    sizes = [len(record.grades) for record in batch["records"]]
    staleness = (trainer_version - batch["policy_version"]).float()
    outcomes = Counter(grade.outcome for grade in grades)
    verdicts = [grade.terms for grade in grades if grade.is_verdict]
    names = dict.fromkeys(name for its in verdicts for name in its)  # each once
    terms = {name: sum(its.get(name, 0.0) for its in verdicts) / len(verdicts) for name in names}

    def share(outcome: str) -> float:
        return outcomes[outcome] / len(grades)

    quartiles = torch.quantile(reward, torch.tensor([0.25, 0.5, 0.75]))
    metrics = {
        "rollout/reward_mean": reward.mean(),
        "rollout/reward_std": reward.std(),
        "rollout/reward_min": reward.min(),
        "rollout/reward_q25": quartiles[0],
        "rollout/reward_median": quartiles[1],
        "rollout/reward_q75": quartiles[2],
        "rollout/reward_max": reward.max(),
        "rollout/accuracy": share("correct"),
        **{f"rollout/{outcome}": share(outcome) for outcome in OUTCOMES if outcome != "correct"},
        **{f"rollout/term_{name}": mean for name, mean in terms.items()},
        "rollout/truncated": 1 - batch["stopped"].float().mean(),
        "rollout/response_length_mean": length.mean(),
        "rollout/response_length_max": length.max(),
        "rollout/advantage_mean": advantage.mean(),
        "rollout/advantage_std": advantage.std(),
        "rollout/groups": len(batch["records"]),
        "rollout/group_size_mean": len(grades) / len(batch["records"]),
        "rollout/equal_groups": sum(equal) / len(equal),
        "rollout/gradient_groups": sum(part.any().item() for part in advantage.split(sizes)) / len(sizes),
        "buffer/staleness_max": staleness.max(),
        "buffer/staleness_mean": staleness.mean(),
        "buffer/staleness_steps_max": staleness.max() * steps_per_push + steps_since_push,
    }
    if "kl_penalty" in batch:
        metrics["rollout/kl_penalty_mean"] = batch["kl_penalty"].mean()
        metrics["rollout/kl_penalty_std"] = batch["kl_penalty"].std()
    return {name: float(value) for name, value in metrics.items()}


def rollout_lines(step: int, batch: TensorDict, log_probs: torch.Tensor | None) -> Iterator[dict]:
    """The lines of rollouts.jsonl for a batch; with the trainer's `log_probs` [B, T] also what belongs to its tokens."""
    columns = {key: batch[key].tolist() for key in ("group_id", "advantage", "policy_version")}
    row = 0
    for record in batch["records"]:
        for response, grade in zip(record.responses, record.grades, strict=True):
            line = {
                "step": step,
                "group_id": columns["group_id"][row],
                "prompt": record.prompt,
                "response": response,
                "answer": record.answer,
                "reward": grade.reward,
                "terms": grade.terms,
                "outcome": grade.outcome,
                **({"note": grade.note} if grade.note else {}),
                "parsed": grade.parsed,
                "advantage": columns["advantage"][row],
                "policy_version": columns["policy_version"][row],
            }
            if log_probs is not None:
                mask = batch["response_mask"][row]
                line["tokens"] = batch["tokens"][row][mask].tolist()
                line["inference_log_probs"] = batch["inference_log_probs"][row][mask].tolist()
                line["log_probs"] = log_probs[row][mask].tolist()
                line["token_versions"] = batch["token_versions"][row][mask].tolist()
            yield line
            row += 1


SAMPLED_GROUPS = 2  # of a batch, in the table that Weights & Biases gets
SAMPLE_COLUMNS = ("group_id", "prompt", "response", "answer", "parsed", "outcome", "reward", "advantage", "policy_version")


def wandb_samples(batch: TensorDict) -> dict[str, Any]:
    """A batch's rewards as a histogram, and its first groups as a table, for Weights & Biases."""
    import wandb

    shown = sum(len(record.grades) for record in batch["records"][:SAMPLED_GROUPS])
    rows = [[line[name] for name in SAMPLE_COLUMNS] for line in islice(rollout_lines(0, batch, None), shown)]
    return {
        "rollout/rewards": wandb.Histogram(batch["reward"][batch["graded"]].tolist()),
        "rollout/samples": wandb.Table(list(SAMPLE_COLUMNS), rows),
    }


METRICS_FILE, ROLLOUTS_FILE = LOGS = ("metrics.jsonl", "rollouts.jsonl")
# What the progress bar shows of a step, where it is there.
SHOWN = {
    "reward": "rollout/reward_mean",
    "staleness": "buffer/staleness_max",
    "kl": "train/kl_to_reference",
    "loss": "train/loss",
    "ranked": "train/ranking_accuracy",
}
RATE = "time/samples_per_s"  # shown is that of the last `steps_per_push` steps together


def _open_at(path: Path, position: int) -> IO[str]:
    """The file opened for appending, cut to its first `position` bytes."""
    file = open(path, "a")  # noqa: SIM115
    size = os.fstat(file.fileno()).st_size
    if size < position:
        print(f"Warning: {path} has lost its last {position - size} bytes; it goes on from there", file=sys.stderr)
    file.truncate(min(size, position))
    file.seek(0, os.SEEK_END)
    return file


class RunLog:
    """Everything a run writes while it goes on.

    A step's metrics are held back until the next step or `flush`, so that the push and the evaluation that follow a step
    stand in its line.
    """

    def __init__(
        self,
        run_dir: Path,
        run_config: RunConfig | OfflineConfig,
        position: dict | None = None,
        num_steps: int | None = None,
        logs: tuple[str, ...] = LOGS,
    ) -> None:
        """With `position`, what `self.position` was, everything written after it is taken back.

        `num_steps` of the run are those of its configuration where that knows them.
        """
        config, self.frequency = run_config.logging, run_config.train.logging_frequency
        position = position or {"step": 0, "seconds": 0.0, "held": None, "files": {}, "wandb": secrets.token_hex(4)}
        self.held, self.start, self.last_step = position["held"], time.time() - position["seconds"], position["step"]
        self.wandb_id = position["wandb"]
        self.rates: deque[float] = deque(maxlen=steps_per_push(run_config))
        self.wandb = self.tensorboard = None
        self.samples: dict[str, Any] = {}  # what goes to Weights & Biases with the step that is held back
        name = config.run_name or "_".join(run_dir.parts[-2:])
        if config.wandb:
            import wandb

            quiet = wandb.Settings(quiet=True, console="off")
            try:
                mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False, verify=False) else "offline")
                self.wandb = wandb.init(
                    project=config.project,
                    name=name,
                    id=self.wandb_id,
                    resume="allow",
                    mode=mode,
                    dir=run_dir,
                    config=asdict(run_config),
                    settings=quiet,
                )
            except wandb.Error as error:
                raise ConfigError(
                    f"logging.wandb (true): Weights & Biases did not start: {one_line(error)[:200]}: connect, set "
                    "WANDB_MODE=offline and send the run later by wandb sync, or leave it out"
                ) from None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(run_dir / "tensorboard", purge_step=self.last_step + 1)
        self.files = {name: _open_at(run_dir / name, position["files"].get(name, 0)) for name in logs}
        self.bar = tqdm(
            total=run_config.num_steps if num_steps is None else num_steps,
            initial=self.last_step,
            unit="step",
            disable=not config.progress,
            dynamic_ncols=True,
        )

    @property
    def position(self) -> dict:
        """How far everything that is written is: what a resumed run goes on from."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        return {
            "step": self.last_step,
            "seconds": round(time.time() - self.start, 3),
            "held": None if self.held is None else dict(self.held),
            "files": {name: file.tell() for name, file in self.files.items()},
            "wandb": self.wandb_id,
        }

    def step(self, step: int, policy_version: int | None, metrics: dict[str, float]) -> None:
        """Take a step's metrics; the previous step's are written. Without pushes there is no `policy_version`."""
        self.flush()
        self.last_step = step
        version = {} if policy_version is None else {"policy_version": policy_version}
        self.held = {"step": step, "time_s": round(time.time() - self.start, 3)} | version | metrics
        self.bar.update(1)
        shown = {name: metrics[metric] for name, metric in SHOWN.items() if metric in metrics}
        if RATE in metrics:
            self.rates.append(metrics[RATE])
            shown["samples/s"] = harmonic_mean(self.rates)
        self.bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items()})

    def add(self, metrics: dict[str, float]) -> None:
        """Add to the step last taken."""
        assert self.held is not None, "there is no step to add to"
        for name, value in metrics.items():
            self.held[name] = self.held.get(name, 0.0) + value

    def rollouts(self, step: int, batch: TensorDict, log_probs: torch.Tensor | None) -> None:
        for line in rollout_lines(step, batch, log_probs):
            self.files[ROLLOUTS_FILE].write(json.dumps(line) + "\n")
        if self.wandb is not None and step % self.frequency == 0:
            self.flush()  # the step before, which is still held back
            self.samples = wandb_samples(batch)

    def flush(self) -> None:
        """Write what is held."""
        if ROLLOUTS_FILE in self.files:
            self.files[ROLLOUTS_FILE].flush()
        if self.held is None:
            return
        record, self.held = self.held, None
        unknown = set(map(metric, record)) - METRICS.keys() - {"step", "time_s", "policy_version"}
        assert not unknown, f"metrics without a line in the table: {sorted(unknown)}"
        self.files[METRICS_FILE].write(json.dumps(record) + "\n")
        self.files[METRICS_FILE].flush()
        if record["step"] % self.frequency == 0 or "eval/accuracy" in record:
            points = {name: value for name, value in record.items() if metric(name) in METRICS}
            if self.wandb is not None:
                self.wandb.log(points | self.samples, step=record["step"])
                self.samples = {}
            if self.tensorboard is not None:
                for name, value in points.items():
                    self.tensorboard.add_scalar(name, value, record["step"])

    def abandon(self) -> None:
        """Close what `close` did not: the run has failed, and says why. A disk that is full stays so."""
        with suppress(OSError):
            self.close()

    def close(self) -> None:
        if self.files[METRICS_FILE].closed:
            return
        self.flush()
        self.bar.close()
        for file in self.files.values():
            file.close()
        if self.wandb is not None:
            self.wandb.finish()
        if self.tensorboard is not None:
            self.tensorboard.close()
