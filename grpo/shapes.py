"""Reward shapes: what a graded response earns, as weighted named terms whose sum is the reward.

SHAPES is the table of them. A term is a pure function of (problem, response, grade) with a bounded value, linear in the
text; its weight is what one unit of it earns. The grade says whether an answer was found and whether it is right; the
remaining terms of `hybrid` look at the text alone, and a policy can learn to earn them without solving anything: they are
there to give a weak model a gradient, and are logged one by one so that this shows.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple

from grpo.errors import ConfigError
from grpo.rewards import Grade
from grpo.tasks import Grader, Problem

MIN_LENGTH = 50  # characters; longer responses earn the length term
MAX_INDICATORS = 5

NUMBER = re.compile(r"[-+]?\d{1,40}(?:\.\d{1,40}|/0{0,40}[1-9]\d{0,40})?")
INDICATORS = tuple(  # each counted once, however often it is there
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"=",
        r"\d\s{0,4}\+",
        r"\d\s{0,4}[-−–]\s{0,4}\d",
        r"\d\s{0,4}(?:[*×·]|x\s{0,4}\d|\\times)",
        r"\d\s{0,4}[/÷]|\\d?frac",
        r"%|\bpercent\b",
        r"\b(?:sum|total|altogether|combined)\b",
        r"\b(?:difference|remaining|left over|subtract(?:ed|ing)?)\b",
        r"\b(?:product|times|multipl(?:y|ied|ying)|twice|double)\b",
        r"\b(?:quotient|divid(?:e|ed|ing)|half|each|per|average)\b",
    )
)
STEP = re.compile(
    r"\b(?:step|first(?:ly)?|second(?:ly)?|third(?:ly)?|next|then|finally|therefore|thus|hence|so|because|since)\b",
    re.IGNORECASE,
)
HASHES = re.compile(r"####\s{0,8}[-−+]?\s?\$?\.?\d")
OTHER_FORMAT = re.compile(
    r"\\boxed\s?\{\s{0,8}[^\s}]"
    r"|<answer>\s{0,8}[^\s<][^<]{0,200}</answer>"
    r"|\banswer\s{0,4}(?:is|:|=)\s{0,4}\S",
    re.IGNORECASE,
)
DIGIT = re.compile(r"\d")
CALCULATION = re.compile(r"\d\s{0,4}(?:[-−–+*×·/÷x]|\\times|\\div)\s{0,4}\$?\s{0,4}\d|\d\s{0,4}=|=\s{0,4}\$?\s{0,4}[-−]?\d")


def correct(problem: Problem, response: str, grade: Grade) -> float:
    return float(grade.outcome == "correct")


def wrong(problem: Problem, response: str, grade: Grade) -> float:
    return float(grade.outcome == "wrong")


def stated(problem: Problem, response: str, grade: Grade) -> float:
    return float(grade.outcome in ("correct", "wrong"))


def unparseable(problem: Problem, response: str, grade: Grade) -> float:
    return float(grade.outcome == "unparseable")


def near(problem: Problem, response: str, grade: Grade) -> float:
    """1 for a right answer, or a number at most 1 from the right one, both of at most 40 digits a part."""
    if grade.correct:
        return 1.0
    if grade.parsed is None or not (NUMBER.fullmatch(grade.parsed) and NUMBER.fullmatch(problem.answer)):
        return 0.0
    return float(abs(Fraction(grade.parsed) - Fraction(problem.answer)) <= 1)


def long_enough(problem: Problem, response: str, grade: Grade) -> float:
    return float(len(response.strip()) > MIN_LENGTH)


def indicators(problem: Problem, response: str, grade: Grade) -> float:
    return float(min(MAX_INDICATORS, sum(pattern.search(response) is not None for pattern in INDICATORS)))


def step_words(problem: Problem, response: str, grade: Grade) -> float:
    return float(STEP.search(response) is not None)


def hashes(problem: Problem, response: str, grade: Grade) -> float:
    return float(HASHES.search(response) is not None)


def other_format(problem: Problem, response: str, grade: Grade) -> float:
    """1 for another stated format, where there is no `#### NUMBER`: the two formats do not add up."""
    return float(HASHES.search(response) is None and OTHER_FORMAT.search(response) is not None)


def numbers(problem: Problem, response: str, grade: Grade) -> float:
    return float(DIGIT.search(response) is not None)


def calculations(problem: Problem, response: str, grade: Grade) -> float:
    return float(CALCULATION.search(response) is not None)


class Term(NamedTuple):
    """One named part of a reward: `weight` times the value of `function`, which is in [0, `maximum`]."""

    weight: float
    function: Callable[[Problem, str, Grade], float]
    maximum: int = 1


SHAPES: dict[str, dict[str, Term]] = {
    # The right answer, and nothing else.
    "correctness": {"correct": Term(1.0, correct)},
    # A little for an answer in a form that the task reads, right or wrong.
    "format": {"format": Term(0.1, stated), "correct": Term(0.9, correct)},
    # An answer; one at most 1 from the expected number; that number.
    "arithmetic": {"format": Term(0.2, stated), "near": Term(0.2, near), "exact": Term(0.6, correct)},
    "hybrid": {
        "correct": Term(0.6, correct),
        "wrong": Term(0.2, wrong),  # an answer was found, but not the right one
        "fallback": Term(0.3, unparseable),  # none was found
        "length": Term(0.2, long_enough),  # more than 50 characters, white space around them not counted
        "mathematics": Term(0.1, indicators, MAX_INDICATORS),  # for each of INDICATORS that is there, up to five
        "steps": Term(0.3, step_words),  # one of the words of STEP or more
        "format_hashes": Term(0.15, hashes),  # `#### NUMBER`
        "format_other": Term(0.1, other_format),  # \boxed{}, <answer></answer> or `answer is`, and no `#### NUMBER`
        "numbers": Term(0.1, numbers),  # a digit or more
        "calculations": Term(0.1, calculations),  # a number, an operation or an equals sign, a number
    },
}


@dataclass(frozen=True)
class Shaped:
    """A grader whose verdicts stand, and earn the terms of a shape."""

    grader: Grader
    name: str
    weights: dict[str, float]

    def __post_init__(self) -> None:
        check(self.name, self.weights)

    def grade(self, problem: Problem, response: str) -> Grade:
        grade = self.grader.grade(problem, response)
        return replace(grade, terms=shape(self.name, self.weights, problem, response, grade))

    def parse(self, response: str) -> str | None:
        return self.grader.parse(response)


def check(name: str, weights: dict[str, float]) -> None:
    """Raise ConfigError for a shape, a term or a weight that there cannot be."""
    if name not in SHAPES:
        raise ConfigError(f"env.reward_shape ({name}) must be one of {', '.join(SHAPES)}")
    for term, weight in weights.items():
        if term not in SHAPES[name]:
            raise ConfigError(f"env.reward_weights ({term}): the shape {name} has the terms {', '.join(SHAPES[name])}")
        if not math.isfinite(weight):
            raise ConfigError(f"env.reward_weights ({term}: {weight}) must be a finite number")


def shape(name: str, weights: dict[str, float], problem: Problem, response: str, grade: Grade) -> dict[str, float]:
    """The weighted terms of the shape `name`, whose sum is the reward of `response`.

    `weights` takes the place of the weights in SHAPES for the terms that it names; `check` says which may be there.
    """
    terms = SHAPES[name].items()
    return {key: weights.get(key, term.weight) * term.function(problem, response, grade) for key, term in terms}
