"""GSM8K: grade-school word problems, answered as `#### NUMBER`.

The data is the hub's `openai/gsm8k`, or a local JSONL file of {"question", "answer"} lines as OpenAI published them.
Validation is the end of the training file; the test split is the hub's, or, with a local file, a part of it that training
never sees.
"""

import json
import re
from fractions import Fraction
from pathlib import Path

from grpo.config import EnvConfig
from grpo.errors import DataError
from grpo.rewards import Grade
from grpo.tasks import Problem

# A whole number, never a part of one: 5 is not read out of 5/6, 1e3 or 5.x.
STATED = re.compile(r"####\s*([-−]?\$?(?:\d[\d,]{0,30}(?:\.\d{1,30})?|\.\d{1,30}))(?!\w|/|[.,]\d)")


def number(text: str) -> Fraction:
    return Fraction(text.replace(",", "").replace("$", "").replace("−", "-"))


class GSM8K:
    system_prompt = "Solve the problem step by step. End with the final answer on a line of its own as: #### NUMBER"

    def __init__(self, splits: dict[str, list[Problem]]) -> None:
        self.splits = splits

    def problems(self, split: str) -> list[Problem]:
        return self.splits[split]

    def grade(self, problem: Problem, response: str) -> Grade:
        """0.1 for a stated final answer, 0.9 for its being right, compared as exact numbers."""
        found = STATED.findall(response)
        if not found:
            return Grade({"format": 0.0, "exact": 0.0}, "unparseable", None)
        parsed = number(found[-1])
        exact = parsed == number(problem.answer)
        return Grade({"format": 0.1, "exact": 0.9 * exact}, "correct" if exact else "wrong", str(parsed))


def _problem(row: dict, where: str) -> Problem:
    if not isinstance(row.get("question"), str) or not isinstance(row.get("answer"), str):
        raise DataError(f"{where}: needs the texts question and answer, has {sorted(row)}")
    stated = STATED.findall(row["answer"])
    if not stated:
        raise DataError(f"{where}: its answer has no '#### NUMBER': {row['answer'][-60:]!r}")
    return Problem(row["question"], str(number(stated[-1])))


def _read_jsonl(path: str) -> list[dict]:
    if not Path(path).is_file():
        raise DataError(f"env.data ({path}): there is no such file")
    rows = []
    with open(path, "rb") as lines:
        for line_number, line in enumerate(lines, start=1):
            try:
                rows.append(json.loads(line))
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise DataError(f"env.data {path}:{line_number} is not JSON: {error}") from None
            if not isinstance(rows[-1], dict):
                raise DataError(f"env.data {path}:{line_number} is not a JSON object")
    return rows


def load(config: EnvConfig) -> GSM8K:
    held_out = config.validation_size
    if config.data is not None:
        rows = [_problem(row, f"env.data {config.data}:{i}") for i, row in enumerate(_read_jsonl(config.data), start=1)]
        if len(rows) <= held_out + config.test_size:
            raise DataError(
                f"env.data ({config.data}) has {len(rows)} problems, which leaves none to train on: lower "
                f"env.validation_size ({held_out}) or env.test_size ({config.test_size}), or give more data"
            )
        test, rows = rows[-config.test_size :], rows[: -config.test_size]
    else:
        from datasets import load_dataset

        try:
            hub = load_dataset("openai/gsm8k", "main")
        except (ConnectionError, OSError) as error:
            raise DataError(
                f"openai/gsm8k is not cached here and the hub cannot be reached ({type(error).__name__}): connect, or "
                "give a local copy with env.data=PATH.jsonl"
            ) from None
        rows = [_problem(row, f"openai/gsm8k train row {i}") for i, row in enumerate(hub["train"])]
        test = [_problem(row, f"openai/gsm8k test row {i}") for i, row in enumerate(hub["test"])]
    return GSM8K({"train": rows[:-held_out], "validation": rows[-held_out:], "test": test})
