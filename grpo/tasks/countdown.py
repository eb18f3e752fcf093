"""Countdown: make an expression of given numbers, each used exactly once, that is worth a target.

Problems are generated from a fixed seed, each from a random expression, so that every one is solvable, or read from a
local file of {"numbers": [3, 5, 7], "target": 22} rows. No two generated problems have the same numbers, so no two splits
share any. Expressions are evaluated here, over exact fractions: + - * / (also × ÷ −) and parentheses, nothing else.
"""

import json
import random
import re
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache

from grpo.config import EnvConfig
from grpo.errors import DataError
from grpo.rewards import Grade
from grpo.tasks import Problem
from grpo.tasks.data import read_file, split_problems, take_examples

SEED = 1234
COUNTS = (3, 4)  # numbers a problem, drawn alike: a 3B model solves some of both
NUMBERS = range(1, 51)
TARGETS = range(1, 101)
TRAIN_SIZE = 10_000

MAX_EXPRESSION = 200  # characters
MAX_DEPTH = 20  # parentheses and signs inside one another
MAX_DIGITS = 9
MAX_NUMBERS = 20  # in a row of a local file

TAG = re.compile(r"<answer>([^<]{0,400})</answer>", re.IGNORECASE)
LINE = re.compile(r"\banswer[*_]{0,2} ?:[*_]{0,2}[ \t]{0,8}+([^\n]{0,400})", re.IGNORECASE)
TOKEN = re.compile(rf"\s*+(?:(?P<number>[0-9]{{1,{MAX_DIGITS}}})(?![0-9.])|(?P<sign>[-+*/()])(?!(?<=\*)\*|(?<=/)/))")
SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "\u00a0": " "})


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
    text, at, tokens = expression.translate(SIGNS).strip(), 0, []
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


def stated_expression(response: str) -> str | None:
    """What the last answer tag holds, or the rest of the last line with `Answer:`; without what follows a `=`."""
    found = TAG.findall(response) or LINE.findall(response)
    return found[-1].split("=")[0].strip(" \t\r\n.*`$") if found else None


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


def _draw(generator: random.Random, count: int) -> tuple[list[int], int, str] | None:
    """Numbers, target and a solution, from a random expression; None where its value is no target."""
    numbers = [generator.choice(NUMBERS) for _ in range(count)]
    parts = [(Fraction(number), str(number)) for number in numbers]
    while len(parts) > 1:
        (a, left), (b, right) = (parts.pop(generator.randrange(len(parts))) for _ in range(2))
        sign = generator.choice("+-*/")
        if sign == "/" and (b == 0 or (a / b).denominator != 1):
            return None
        value = {"+": a + b, "-": a - b, "*": a * b}[sign] if sign != "/" else a / b
        parts.append((value, f"({left} {sign} {right})"))
    value, solution = parts[0]
    return (numbers, int(value), solution[1:-1]) if value in TARGETS else None


def generate(seed: int) -> Iterator[Problem]:
    """Solvable problems without end, the same for the same seed, no two with the same numbers."""
    generator, seen = random.Random(seed), set()
    while True:
        drawn = _draw(generator, generator.choice(COUNTS))
        if drawn is not None and tuple(sorted(drawn[0])) not in seen:
            seen.add(tuple(sorted(drawn[0])))
            yield make_problem(*drawn)


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


def row_problem(row: dict, where: str) -> Problem:
    """{numbers, target}."""
    numbers, target = row.get("numbers"), row.get("target")

    def whole(value: object) -> bool:
        return type(value) is int and abs(value) < 10**MAX_DIGITS

    if not isinstance(numbers, list) or not 2 <= len(numbers) <= MAX_NUMBERS or not all(map(whole, numbers)):
        raise DataError(f"{where}: numbers ({str(numbers)[:60]}) must be a list of 2 to {MAX_NUMBERS} whole numbers")
    if min(numbers) < 0 or not whole(target):
        raise DataError(f"{where}: target ({str(target)[:60]}) must be a whole number, and numbers must not be negative")
    return make_problem(sorted(numbers), target)  # so that rows in another order count as the same question


def grader() -> Countdown:
    return Countdown({})


def load(config: EnvConfig) -> Countdown:
    if config.data is None:
        source = generate(SEED)
        test = [next(source) for _ in range(config.test_size)]
        rows = [next(source) for _ in range(TRAIN_SIZE + config.validation_size)]
        splits = split_problems(rows, test, config, "countdown")
    else:
        if config.few_shot:
            raise DataError(f"env.few_shot ({config.few_shot}) must be 0 with env.data: its rows have no solutions to show")
        rows = [row_problem(row, f"env.data {config.data}:{i}") for i, row in enumerate(read_file(config.data), start=1)]
        splits = split_problems(rows, None, config, f"env.data ({config.data})")
    examples = take_examples(splits, config)
    return Countdown(splits, [(p.question, f"<answer>{p.solution}</answer>") for p in examples])
