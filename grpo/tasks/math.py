"""Competition mathematics: problems whose solution ends in a boxed answer, which may be any LaTeX.

The data is the hub's `DigitalLearningGmbH/MATH-lighteval` to train on and `HuggingFaceH4/MATH-500` to test on, or a local
file of {"problem", "solution"} rows, the answer being the last \\boxed{...} or \\boxed TOKEN of the solution, or
{"problem", "answer"} rows.

Answers are compared by math-verify (https://github.com/huggingface/Math-Verify), as expressions and not as text. Where one
of them is a decimal it compares both rounded to DECIMALS places (its own default, 6, takes 0.333333 for 1/3). Its own time
limits are signals and are switched off: a comparison may take as long as SymPy likes, so grade() belongs in a process
with a time limit. Only the last boxed answer goes into it, whole or not at all.

Before that, percent signs are dropped, which it cannot read: 50\\% is 50, and not 1/2. Of `5 = x` it would take the x, of
`\\text{5 inches}` the text, and of numbers in some base it would forget the base.
"""

import logging
import re
from functools import lru_cache
from typing import Any

import math_verify

from grpo.config_sections import EnvConfig
from grpo.errors import DataError
from grpo.rewards import Grade
from grpo.tasks import Problem, after_thought
from grpo.tasks.data import HubSplit, NoAnswer, read_problems, take_examples, text_fields, with_text

MAX_ANSWER = 1000  # characters of a boxed answer
DECIMALS = 12  # math-verify's float_rounding
# \boxed{...}, or \boxed and a number or a letter that stands alone, as TeX and some solutions of MATH have it.
BOX = re.compile(
    r"\\(?:boxed|fbox)(?:\s{0,4}\{| {1,4}(?P<token>[-+]?(?:[0-9][0-9.,/]{0,40}+|[A-Za-z]))(?=[\s$)\]},.;]|\\[)\]]|$))"
)
TRAILING = re.compile(r"(?<!\\)[.,;\s]+$")
WHOLE = re.compile(r"[-+]?[0-9]{1,40}")
NUMBER = re.compile(r"[-+]?[0-9][0-9.,]{0,40}")
PERCENT = re.compile(r"\s*+\\?%")
SOLVED = re.compile(r"((?:\\[A-Za-z]++|[^=<>,;A-Za-z\\])++)=\s*([A-Za-z])")  # a number on the left, a letter on the right
# A number and up to three words, none of which says that there is more to it.
UNITS = re.compile(
    rf"\\text ?\{{ *({NUMBER.pattern})(?: (?!and|or|to|dozen|hundred|thousand|[mbtr]+illion)[A-Za-z]+){{0,3}}\.? *\}}"
)
BASED = re.compile(r"([0-9A-F]+)_\{?([0-9]+)\}?")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is none

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off


def last_boxed(text: str) -> str | None:
    """What the last box of `text` holds, without a comma or full stop at its end.

    None where there is none, it is not closed, or is over MAX_ANSWER long.
    """
    found = None
    for found in BOX.finditer(text):  # noqa: B007 - the last one is what is wanted
        pass
    if found is None:
        return None
    if found["token"] is not None:
        return _bare(found["token"])
    depth = 1
    for brace in BRACE.finditer(text, found.end(), found.end() + MAX_ANSWER + 1):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return _bare(text[found.end() : brace.start()])
    return None


def _bare(answer: str) -> str:
    return TRAILING.sub("", answer.strip()) if answer.strip(" .,;") else answer.strip()


def _is_whole(answer: str) -> bool:
    """Whether `answer` is not a part of an expression only: braces and environments are closed, no side is missing."""
    closed = last_boxed(rf"\boxed{{{answer}}}") == answer
    return closed and not answer.endswith("=") and answer.count(r"\begin{") == answer.count(r"\end{")


def _comparable(answer: str, other: str) -> str:
    """`answer` as math-verify can compare it with `other`; neither has percent signs any more."""
    if (solved := SOLVED.fullmatch(answer)) is not None:
        return f"{solved[2]}={solved[1]}"
    units = UNITS.fullmatch(answer)
    return answer if units is None or not NUMBER.fullmatch(other) else units[1]


@lru_cache(maxsize=1 << 12)
def parse(answer: str) -> list[Any]:
    """math-verify's readings of a boxed answer, as SymPy objects and text; empty where it has none.

    Cached, since it takes tens of milliseconds and the responses of a group state the same few answers.
    """
    return math_verify.parse(rf"\boxed{{{answer}}}", parsing_timeout=None)


def same(answer: str, reference: str) -> bool | None:
    """Whether the two are equal; None where `answer` cannot be parsed, DataError where `reference` cannot."""
    answer, reference = (PERCENT.sub("", text) for text in (answer, reference))
    answer, reference = _comparable(answer, reference), _comparable(reference, answer)
    based = BASED.fullmatch(answer), BASED.fullmatch(reference)
    if all(based):
        return based[0].groups() == based[1].groups()
    if WHOLE.fullmatch(answer) and WHOLE.fullmatch(reference):  # most answers: no need of SymPy
        return int(answer) == int(reference)
    if not answer or not parse(answer):
        return None
    if not parse(reference):
        raise DataError(f"answer ({reference[:60]!r}) cannot be parsed: correct or remove the row")
    return math_verify.verify(parse(reference), parse(answer), float_rounding=DECIMALS, timeout_seconds=None)


class Math:
    system_prompt = "Solve the problem step by step. Put the final answer within \\boxed{}."

    def __init__(self, splits: dict[str, list[Problem]], examples: list[tuple[str, str]] | None = None) -> None:
        self.splits, self.examples = splits, examples or []

    def problems(self, split: str) -> list[Problem]:
        return self.splits[split]

    def grade(self, problem: Problem, response: str) -> Grade:
        """0.1 for a boxed answer, 0.9 for its being equal to the reference. Has no time limit of its own."""
        answer = self.parse(response)
        exact = None if answer is None else answer == problem.answer or same(answer, problem.answer)
        if exact is None:
            return Grade({"format": 0.0, "exact": 0.0}, "unparseable", None)
        return Grade({"format": 0.1, "exact": 0.9 * exact}, "correct" if exact else "wrong", answer)

    def parse(self, response: str) -> str | None:
        return last_boxed(after_thought(response))


def _problem(row: dict, where: str) -> Problem:
    row = with_text(row, "answer")
    (question,) = text_fields(row, ("problem",), where)
    if isinstance(row.get("answer"), str):
        (answer,), solution = text_fields(row, ("answer",), where), str(row.get("solution") or "")
        answer = last_boxed(answer) or _bare(answer)
    else:
        (solution,) = text_fields(row, ("solution",), where)
        answer = last_boxed(solution)
    if not answer or len(answer) > MAX_ANSWER:
        raise NoAnswer(f"{where}: needs a text answer, or a solution with \\boxed{{...}}, of 1 to {MAX_ANSWER} characters")
    if not _is_whole(answer):
        raise NoAnswer(f"{where}: its answer is not one whole expression: {answer[:60]!r}; correct or remove the row")
    return Problem(question, answer, solution)


def row_problem(row: dict, where: str) -> Problem:
    """{answer} or {solution}; the problem may be missing."""
    return _problem({"problem": "", **row}, where)


def grader(config: EnvConfig) -> Math:
    return Math({})


def load(config: EnvConfig) -> Math:
    train, test = HubSplit("DigitalLearningGmbH/MATH-lighteval", "train"), HubSplit("HuggingFaceH4/MATH-500", "test")
    splits = read_problems(config, train, test, _problem)
    examples = take_examples(splits, config)
    return Math(splits, [(p.question, p.solution or f"\\boxed{{{p.answer}}}") for p in examples])
