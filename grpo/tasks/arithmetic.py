"""Multi-step arithmetic: `What is (a op1 b) op2 c?` with operands 0 to 9, at most one `*`, answered in an answer tag.

All 8,000 expressions are split once, by a fixed seed, into test, validation, warm-up (for the built-in model's
demonstrations) and train. Commuted twins and reorderings of a sum are one family, and a family stays on one side.
"""

import random
import re
from collections import defaultdict

from grpo.config_sections import EnvConfig
from grpo.errors import ConfigError, DataError
from grpo.rewards import Grade
from grpo.tasks import Problem

Expression = tuple[int, str, int, str, int]

OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
ANSWER = re.compile(r"<answer>\s*([-−]?\d{1,18})\s*</answer>")
SPLIT_SEED = 1234
SPLIT_SIZES = {"test": 1000, "validation": 500, "warm_up": 3500}  # at least; the rest is train


def value(expression: Expression) -> int:
    a, first, b, second, c = expression
    return OPERATIONS[second](OPERATIONS[first](a, b), c)


def question(expression: Expression) -> str:
    a, first, b, second, c = expression
    return f"What is ({a} {first} {b}) {second} {c}?"


def solution(expression: Expression) -> str:
    a, first, b, second, c = expression
    inner = OPERATIONS[first](a, b)
    return f"{a} {first} {b} = {inner}, {inner} {second} {c} = {value(expression)}. <answer>{value(expression)}</answer>"


def family(expression: Expression) -> tuple:
    """Equal for expressions that are the same sum or product in another order."""
    a, first, b, second, c = expression
    if "*" not in (first, second):
        terms = [(1, a), (1 if first == "+" else -1, b), (1 if second == "+" else -1, c)]
        return ("sum", *sorted(terms))
    if first in "+*":
        a, b = sorted((a, b))
    return (a, first, b, second, c)


def split_expressions() -> dict[str, list[Expression]]:
    """Every expression under test, validation, warm_up or train; the same on every machine."""
    families = defaultdict(list)
    for a in range(10):
        for first in OPERATIONS:
            for b in range(10):
                for second in OPERATIONS:
                    if first + second != "**":
                        for c in range(10):
                            families[family((a, first, b, second, c))].append((a, first, b, second, c))
    keys = sorted(families, key=str)
    random.Random(SPLIT_SEED).shuffle(keys)
    splits: dict[str, list[Expression]] = {name: [] for name in (*SPLIT_SIZES, "train")}
    for key in keys:
        name = next((n for n, size in SPLIT_SIZES.items() if len(splits[n]) < size), "train")
        splits[name] += families[key]
    return splits


class Arithmetic:
    system_prompt = "Work the expression out step by step, then give the result as <answer>NUMBER</answer>."

    def __init__(self, few_shot: int = 0, max_samples: int | None = None) -> None:
        self.expressions = split_expressions()
        train = self.expressions["train"]
        self.examples = [(question(e), solution(e)) for e in train[:few_shot]]
        self.expressions["train"] = train[few_shot:][:max_samples]

    def problems(self, split: str) -> list[Problem]:
        return [Problem(question(e), str(value(e))) for e in self.expressions[split]]

    def grade(self, problem: Problem, response: str) -> Grade:
        """0.2 for exactly one answer tag with a whole number in it, 0.2 for within 1 of the value, 0.6 for the value."""
        stated = self.parse(response)
        if stated is None:
            return Grade({"format": 0.0, "near": 0.0, "exact": 0.0}, "unparseable", None)
        parsed, expected = int(stated), int(problem.answer)
        near, exact = abs(parsed - expected) <= 1, parsed == expected
        terms = {"format": 0.2, "near": 0.2 * near, "exact": 0.6 * exact}
        return Grade(terms, "correct" if exact else "wrong", stated)

    def parse(self, response: str) -> str | None:
        found = ANSWER.findall(response)
        if len(found) != 1 or response.count("<answer>") != 1:
            return None
        return str(int(found[0].replace("−", "-")))


def row_problem(row: dict, where: str) -> Problem:
    """{answer}, a whole number; the question may be missing."""
    answer = row.get("answer")
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    if isinstance(answer, bool) or not re.fullmatch(r"\s*[-+]?[0-9]{1,18}\s*", str(answer)):
        raise DataError(f"{where}: answer ({str(answer)[:60]}) must be a whole number")
    return Problem(str(row.get("question", "")), str(int(answer)))


def grader(config: EnvConfig) -> Arithmetic:
    return Arithmetic()


def load(config: EnvConfig) -> Arithmetic:
    if config.data is not None:
        raise ConfigError(f"env.data ({config.data}) must be null: the arithmetic task makes its own expressions")
    if config.few_shot >= len(split_expressions()["train"]):
        raise ConfigError(f"env.few_shot ({config.few_shot}) must leave problems to train on: lower it")
    return Arithmetic(config.few_shot, config.max_samples)
