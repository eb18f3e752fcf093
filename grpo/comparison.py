"""From verdicts to figures: what one model answered, how two differ problem by problem, and the table a user reads.

Pure: responses and grades in, numbers and text out. The intervals are those of grpo/intervals.py.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean

from grpo.intervals import Interval, clustered_share, mean_interval, paired_means, paired_shares, wilson
from grpo.rewards import OUTCOMES, Grade
from grpo.tasks import Problem


@dataclass(frozen=True)
class Question:
    """A prompt; where it is not `graded`, its problem has no answer."""

    problem: Problem
    graded: bool = True


@dataclass(frozen=True)
class Answers:
    """One model's greedy response to each prompt, with its verdict, and the verdicts on k samples of each."""

    responses: list[str]
    lengths: list[int]  # tokens
    stopped: list[bool]  # the response ended by itself, not at its token budget
    grades: list[Grade | None]  # None where the prompt has no answer to grade against
    samples: list[list[Grade]]  # empty lists there, and where k is 0

    @property
    def greedy(self) -> list[Grade]:
        return [grade for grade in self.grades if grade is not None]

    @property
    def right(self) -> list[bool]:
        return [grade.correct for grade in self.greedy]

    @property
    def rewards(self) -> list[float]:
        return [grade.reward for grade in self.greedy]

    @property
    def shares(self) -> list[float]:
        """Of right samples, one a problem."""
        return [_share(group) for group in self.samples if group]

    @property
    def without_verdict(self) -> list[Grade]:
        return [grade for grade in [*self.greedy, *chain.from_iterable(self.samples)] if not grade.is_verdict]

    def metrics(self) -> dict:
        """The model's figures; those of graded prompts alone have intervals."""
        found = {"length_mean": fmean(self.lengths), "stopped": fmean(self.stopped)}
        if self.greedy:
            accuracy, n = fmean(self.right), len(self.right)
            found |= {"accuracy": accuracy, "accuracy_interval_95": wilson(accuracy, n), "n": n}
            found |= {"reward_mean": fmean(self.rewards), "reward_mean_interval_95": mean_interval(self.rewards)}
            found["outcomes"] = _count(self.greedy)
        if self.shares:
            samples, n = list(chain.from_iterable(self.samples)), len(self.shares)
            interval = clustered_share(self.shares, len(samples) // n)
            found |= {"mean_at_k": fmean(self.shares), "mean_at_k_interval_95": interval}
            found["sampled_outcomes"] = _count(samples)
        return found

    def row(self, i: int) -> dict:
        """What it answered to prompt `i`."""
        row = {"response": self.responses[i], "length": self.lengths[i], "reward": None, "outcome": None, "parsed": None}
        grade = self.grades[i]
        if grade is not None:
            row |= {"reward": grade.reward, "outcome": grade.outcome, "parsed": grade.parsed}
            row |= {"note": grade.note} if grade.note else {}
        return row | ({"mean_at_k": _share(self.samples[i])} if self.samples[i] else {})


def _share(grades: list[Grade]) -> float:
    return fmean(grade.correct for grade in grades)


def _count(grades: list[Grade]) -> dict[str, int]:
    counts = Counter(grade.outcome for grade in grades)
    return {outcome: counts[outcome] for outcome in OUTCOMES if counts[outcome]}


def improvements(before: Answers, after: Answers) -> dict:
    """After minus before over the same problems: `improvement` of pass@1, and of the mean reward and mean@k.

    Each has its interval, and a percentage of the value before, which is null where that is not above 0.
    """
    if not before.right:
        return {}
    found = _change("improvement", before.right, after.right, paired_shares(before.right, after.right))
    rewards = before.rewards + after.rewards
    span = max(rewards) - min(rewards)  # no more is known of the range of a user's own rewards
    interval = paired_means(before.rewards, after.rewards, span)
    found |= _change("reward_improvement", before.rewards, after.rewards, interval)
    if before.shares:
        interval = paired_means(before.shares, after.shares, 1.0)
        found |= _change("mean_at_k_improvement", before.shares, after.shares, interval)
    return found


def _change(name: str, before: Sequence[float], after: Sequence[float], interval: Interval | None) -> dict:
    start, change = fmean(before), fmean(after) - fmean(before)
    percentage = 100 * change / start if start > 0 else None
    return {name: change, f"{name}_interval_95": interval, f"{name}_percentage": percentage}


def table(models: dict[str, dict], changes: dict, k: int) -> str:
    """Rows of models (`metrics` by name) and, of two, their difference (`improvements`), with 95% intervals."""
    columns = [("pass@1", "accuracy", 24, "improvement", 100)] if "accuracy" in next(iter(models.values())) else []
    if columns and k:
        columns.append((f"mean@{k}", "mean_at_k", 24, "mean_at_k_improvement", 100))
    if columns:
        columns.append(("mean reward", "reward_mean", 27, "reward_improvement", 1))
    heads = "".join(f"{head:<{width}}" for head, _, width, _, _ in columns)
    lines = [f"{'':<12}{heads}mean length"]
    for name, metrics in models.items():
        cells = [_cell(metrics[key], metrics[f"{key}_interval_95"], scale, width) for _, key, width, _, scale in columns]
        lines.append(f"{name:<12}{''.join(cells)}{metrics['length_mean']:.1f}")
    if len(models) == 2:
        cells = [_cell(changes[key], changes[f"{key}_interval_95"], s, width, "+") for _, _, width, key, s in columns]
        first, second = (metrics["length_mean"] for metrics in models.values())
        lines.append(f"{'difference':<12}{''.join(cells)}{second - first:+.1f}")
    return "\n".join(lines)


def _cell(value: float, interval: Interval | None, scale: int, width: int, sign: str = "") -> str:
    """`96.3% [94.9, 97.3]` for a share (scale 100), `0.963 [0.949, 0.973]` for a reward."""
    form, unit = (f"{sign}.1f", "%" if not sign else "") if scale == 100 else (f"{sign}.3f", "")
    ends = "" if interval is None else " [" + ", ".join(f"{scale * end:{form}}" for end in interval) + "]"
    return f"{f'{scale * value:{form}}{unit}{ends}':<{width - 2}}  "
