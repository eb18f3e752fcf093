"""Countdown: make an expression of given numbers, each used exactly once, that is worth a target.

Problems are generated from a fixed seed, each from a random expression, so that every one is solvable, or read from a
local file of {"numbers": [3, 5, 7], "target": 22} rows. Numbers belong to one split, whatever its size, and each split
has a stream of its own, so that no change of the sizes moves a problem from one to another. Expressions are evaluated
here, over exact fractions: + - * / (also × · ÷ − and LaTeX's signs) and parentheses, nothing else.
"""

import json
import random
import re
import zlib
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from itertools import islice

from grpo.config_sections import EnvConfig
from grpo.errors import DataError
from grpo.rewards import Grade
from grpo.rules import check
from grpo.tasks import Problem, after_thought
from grpo.tasks.data import read_answer, read_file, split_problems, take_examples

SEEDS = {"train": 1234, "validation": 1235, "test": 1236}
COUNTS = (3, 4)  # numbers a problem, drawn alike: a 3B model solves some of both
NUMBERS = range(1, 51)
TARGETS = range(1, 101)
TRAIN_SIZE = 10_000
MOST = 20_000  # problems of a split: there are about 100,000 different numbers for each

MAX_EXPRESSION = 200  # characters
MAX_DEPTH = 20  # parentheses and signs inside one another
MAX_DIGITS = 9
MAX_NUMBERS = 20  # in a row of a local file

TAG = re.compile(r"<answer>([^<]{0,400})</answer>", re.IGNORECASE)
# What follows `Answer:` on its line or the next, or `The answer is` where there are no words in it.
LINE = re.compile(
    r"\banswer(?:[*_]{0,2} ?:[*_]{0,2}(?:\s|\\\[){0,8}+(?P<line>[^\n]{0,400})"
    r"| is:?(?P<words>(?:[^A-Za-z\n\\]|[xX](?![A-Za-z])|\\[A-Za-z]{1,10}+|\\[^A-Za-z\n]){0,400}+)$)",
    re.IGNORECASE | re.MULTILINE,
)
LABEL = re.compile(r"\s*expression ?:", re.IGNORECASE)
TOKEN = re.compile(rf"\s*+(?:(?P<number>[0-9]{{1,{MAX_DIGITS}}})(?![0-9.])|(?P<sign>[-+*/()])(?!(?<=\*)\*|(?<=/)/))")
# One level of braces in it; without what it holds where that is not closed, or has more.
BOX = re.compile(r"\\boxed ?\{(?:([^{}]{0,400}+(?:\{[^{}]{0,400}+\}[^{}]{0,400}+){0,12}+)\})?")
SIGNS = str.maketrans(
    {**dict.fromkeys("×·⋅∗•✕✖＊", "*"), "÷": "/", "−": "-", "–": "-", "＋": "+", "[": "(", "]": ")", "\u00a0": " "}
)
LATEX = [
    (re.compile(pattern), sign)
    for pattern, sign in (
        (r"\\[dt]?frac ?\{([^{}]{1,200})\} ?\{([^{}]{1,200})\}", r"((\1)/(\2))"),
        (r"\\(?:times|cdot|ast)(?![a-zA-Z])", "*"),
        (r"\\div(?![a-zA-Z])", "/"),
        (r"\\(?:left|right)(?![a-zA-Z])|\\[(),;! ]", " "),
        (r"(?<=[0-9)])(\s?)[xX](?=\s?[0-9(])", r"\1*"),
    )
]
OPERATION = re.compile(r"[0-9)]\s{0,8}+[-+*/]")


class ExpressionError(Exception):
    """A text that is no expression of this grammar, or divides by zero."""


class _Parser:
    """Recursive descent over tokens, at most MAX_DEPTH deep.

    sum = product {(+|-) product}; product = unary {(*|/) unary}; unary = (+|-) unary | ( sum ) | number.
    """

    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.at, self.depth = tokens, 0, 0

    def next_is(self, signs: str) -> str | None:
        """The next token, taken, where it is one of `signs`."""
        if self.at < len(self.tokens) and self.tokens[self.at] in signs:
            self.at += 1
            return self.tokens[self.at - 1]
        return None

    def sum(self) -> Fraction:
        value = self.product()
        while sign := self.next_is("+-"):
            value = value + self.product() if sign == "+" else value - self.product()
        return value

    def product(self) -> Fraction:
        value = self.unary()
        while sign := self.next_is("*/"):
            other = self.unary()
            if sign == "/" and other == 0:
                raise ExpressionError("division by zero")
            value = value * other if sign == "*" else value / other
        return value

    def unary(self) -> Fraction:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ExpressionError(f"deeper than {MAX_DEPTH}")
        value = self._unary()
        self.depth -= 1
        return value

    def _unary(self) -> Fraction:
        if sign := self.next_is("+-"):
            return -self.unary() if sign == "-" else self.unary()
        if self.next_is("("):
            value = self.sum()
            if not self.next_is(")"):
                raise ExpressionError("a parenthesis is not closed")
            return value
        if self.at == len(self.tokens) or not self.tokens[self.at].isdigit():
            raise ExpressionError("a number is missing")
        self.at += 1
        return Fraction(int(self.tokens[self.at - 1]))


def evaluate(expression: str) -> tuple[Fraction, list[int]]:
    """An expression's exact value and the numbers in it, in their order; raises ExpressionError where it is none."""
    if len(expression) > MAX_EXPRESSION:
        raise ExpressionError(f"longer than {MAX_EXPRESSION} characters")
    text, at, tokens = _plain(expression).strip(), 0, []
    while at < len(text):
        found = TOKEN.match(text, at)
        if found is None:
            raise ExpressionError(f"{text[at]!r} is not part of an expression")
        tokens.append(found["number"] or found["sign"])
        at = found.end()
    parser = _Parser(tokens)
    value = parser.sum()
    if parser.at != len(tokens):
        raise ExpressionError(f"{tokens[parser.at]!r} where an operator is due")
    return value, [int(token) for token in tokens if token.isdigit()]


def _plain(expression: str) -> str:
    """`expression` with the four signs and parentheses in the place of unicode's and LaTeX's."""
    text = expression.translate(SIGNS)
    for pattern, sign in LATEX:
        text = pattern.sub(sign, text)
    return text


def stated_expression(response: str) -> str | None:
    """What the last answer tag holds, or the last box, or the line after the last `Answer:`; no thought counts.

    Of an equation, `3 * 5 + 7 = 22` or `22 = 3 * 5 + 7`, its first side with an operation.
    """
    response = after_thought(response)
    found = TAG.findall(response) or BOX.findall(response) or _lines(response)
    if not found:
        return None
    sides = LABEL.sub("", (BOX.findall(found[-1]) or found)[-1], count=1).split("=")
    return next((side for side in sides if OPERATION.search(_plain(side))), sides[0]).strip(" \t\r\n.*`$")


def _lines(response: str) -> list[str]:
    """What comes after each `Answer:`, and after each `The answer is` that an operation follows."""
    found = [(line["line"], line["words"]) for line in LINE.finditer(response)]
    return [words if line is None else line for line, words in found if line is not None or OPERATION.search(_plain(words))]


@lru_cache(maxsize=1 << 16)
def _asked(answer: str) -> tuple[int, list[int]]:
    problem = json.loads(answer)
    return problem["target"], sorted(problem["numbers"])


def make_problem(numbers: list[int], target: int, solution: str = "") -> Problem:
    question = (
        f"Using the numbers {numbers}, write an expression that equals {target}. Use each number exactly once, "
        "with + - * / and parentheses."
    )
    return Problem(question, json.dumps({"numbers": numbers, "target": target}), solution)


def _draw(generator: random.Random, numbers: list[int]) -> tuple[int, str] | None:
    """Target and a solution, from a random expression of `numbers`; None where its value is no target."""
    parts = [(Fraction(number), str(number)) for number in numbers]
    while len(parts) > 1:
        (a, left), (b, right) = (parts.pop(generator.randrange(len(parts))) for _ in range(2))
        sign = generator.choice("+-*/")
        if sign == "/" and (b == 0 or (a / b).denominator != 1):
            return None
        value = {"+": a + b, "-": a - b, "*": a * b}[sign] if sign != "/" else a / b
        parts.append((value, f"({left} {sign} {right})"))
    value, solution = parts[0]
    return (int(value), solution[1:-1]) if value in TARGETS else None


def owner(numbers: list[int]) -> str:
    """The split that problems with these numbers belong to, a third of all numbers each."""
    return list(SEEDS)[zlib.crc32(str(sorted(numbers)).encode()) % len(SEEDS)]


def generate(split: str) -> Iterator[Problem]:
    """Solvable problems of `split` (at most MOST), always the same, no two with the same numbers."""
    generator, seen = random.Random(SEEDS[split]), set()
    while True:
        numbers = [generator.choice(NUMBERS) for _ in range(generator.choice(COUNTS))]
        if owner(numbers) != split or tuple(sorted(numbers)) in seen:
            continue
        drawn = _draw(generator, numbers)
        if drawn is not None:
            seen.add(tuple(sorted(numbers)))
            yield make_problem(numbers, *drawn)


class Countdown:
    system_prompt = (
        "Find an expression that uses each of the given numbers exactly once and equals the target. Think step by step, "
        "then give the expression alone as <answer>EXPRESSION</answer>."
    )

    def __init__(self, splits: dict[str, list[Problem]], examples: list[tuple[str, str]] | None = None) -> None:
        self.splits, self.examples = splits, examples or []

    def problems(self, split: str) -> list[Problem]:
        return self.splits[split]

    def grade(self, problem: Problem, response: str) -> Grade:
        """0.1 for an expression as the answer, 0.9 for its being worth the target with each number used exactly once."""
        target, numbers = _asked(problem.answer)
        expression = stated_expression(response)
        try:
            value, used = evaluate(expression or "")
        except ExpressionError:
            return Grade({"format": 0.0, "exact": 0.0}, "unparseable", None)
        exact = value == target and sorted(used) == numbers
        return Grade({"format": 0.1, "exact": 0.9 * exact}, "correct" if exact else "wrong", expression)

    def parse(self, response: str) -> str | None:
        expression = stated_expression(response)
        try:
            evaluate(expression or "")
        except ExpressionError:
            return None
        return expression


def row_problem(row: dict, where: str) -> Problem:
    """{numbers, target}, or {answer} with them as JSON, as in a run's rollouts.jsonl."""
    if "numbers" not in row and isinstance(row.get("answer"), str):
        row = read_answer(row, where)
    numbers, target = row.get("numbers"), row.get("target")

    def whole(value: object) -> bool:
        return type(value) is int and abs(value) < 10**MAX_DIGITS

    if not isinstance(numbers, list) or not 2 <= len(numbers) <= MAX_NUMBERS or not all(map(whole, numbers)):
        raise DataError(f"{where}: numbers ({str(numbers)[:60]}) must be a list of 2 to {MAX_NUMBERS} whole numbers")
    if min(numbers) < 0 or not whole(target):
        raise DataError(f"{where}: target ({str(target)[:60]}) must be a whole number, and numbers must not be negative")
    return make_problem(sorted(numbers), target)  # so that rows in another order count as the same question


def grader(config: EnvConfig) -> Countdown:
    return Countdown({})


def load(config: EnvConfig) -> Countdown:
    if config.data is None:
        sizes = {"train": TRAIN_SIZE, "validation": config.validation_size, "test": config.test_size}
        for split in ("validation", "test"):
            check(sizes[split] <= MOST, f"env.{split}_size", sizes[split], f"must be at most {MOST} where problems are made")
        check(
            config.few_shot < TRAIN_SIZE,
            "env.few_shot",
            config.few_shot,
            f"must be below {TRAIN_SIZE}, to train on the rest",
        )
        splits = {split: list(islice(generate(split), size)) for split, size in sizes.items()}
    else:
        if config.few_shot:
            raise DataError(f"env.few_shot ({config.few_shot}) must be 0 with env.data: its rows have no solutions to show")
        rows = [row_problem(row, where) for where, row in read_file(config.data)]
        splits = split_problems(rows, None, config, f"env.data ({config.data})")
    examples = take_examples(splits, config)
    return Countdown(splits, [(p.question, f"<answer>{p.solution}</answer>") for p in examples])
