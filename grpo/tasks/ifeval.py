"""IFEval: prompts with one to three verifiable instructions (Zhou et al. 2023, arXiv 2311.07911), of 25 kinds.

The data is the hub's `google/IFEval`, or a local JSONL file of {"key", "prompt", "instruction_id_list", "kwargs"} lines as
Google published them. It is one file of 541 prompts, made as a test set: a fixed seed splits its prompts into test,
validation and train. grpo/instructions.py owns the verdicts.
"""

import importlib.util
import json
import random

from grpo.config_sections import EnvConfig
from grpo.errors import ConfigError, DataError
from grpo.instructions import fault, verdicts
from grpo.rewards import Grade
from grpo.tasks import Problem, after_thought
from grpo.tasks.data import HubSplit, check_text, key, read_answer, read_file, read_hub

SPLIT_SEED = 1234


class IFEval:
    system_prompt = "Do what the user asks, and follow every instruction about the form of the response to the letter."

    examples: tuple = ()

    def __init__(self, splits: dict[str, list[Problem]]) -> None:
        self.splits = splits

    def problems(self, split: str) -> list[Problem]:
        return self.splits[split]

    def grade(self, problem: Problem, response: str) -> Grade:
        """0.5 times the share of instructions followed loosely, 0.5 for following all of them strictly.

        What a model thinks first is no part of its answer (`after_thought`). `parsed` tells how many are followed strictly,
        as 2/3; only a blank answer is unparseable. `details` has a verdict an instruction.
        """
        asked, answer = json.loads(problem.answer), after_thought(response)
        strict, loose = verdicts(asked["instruction_id_list"], asked["kwargs"], answer)
        details = {"follow_strict": strict, "follow_loose": loose}
        if not answer.strip():
            return Grade({"followed": 0.0, "all": 0.0}, "unparseable", None, details=details)
        terms = {"followed": 0.5 * sum(loose) / len(loose), "all": 0.5 * all(strict)}
        return Grade(terms, "correct" if all(strict) else "wrong", f"{sum(strict)}/{len(strict)}", details=details)

    def parse(self, response: str) -> str | None:
        """The whole response is the answer, but for thoughts before it; None where it is blank."""
        return after_thought(response).strip() or None


def row_problem(row: dict, where: str) -> Problem:
    """The problem of a row {prompt, instruction_id_list, kwargs}; raises DataError, which begins with `where`.

    A line of rollouts.jsonl has the last two in its `answer`. The hub gives every row all the keyword arguments there are:
    those that are null are left out.
    """
    if "instruction_id_list" not in row and isinstance(row.get("answer"), str):
        row = row | read_answer(row, where)
    prompt, ids, kwargs = row.get("prompt"), row.get("instruction_id_list"), row.get("kwargs")
    if not isinstance(prompt, str) or not isinstance(ids, list) or not isinstance(kwargs, list):
        raise DataError(f"{where}: needs the text prompt and the lists instruction_id_list and kwargs, has {sorted(row)}")
    check_text(prompt, f"{where}: prompt")
    if not ids or len(ids) != len(kwargs):
        raise DataError(
            f"{where}: instruction_id_list ({len(ids)}) and kwargs ({len(kwargs)}) must be of one length, 1 or more"
        )
    kwargs = [{k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given for given in kwargs]
    for instruction_id, given in zip(ids, kwargs, strict=True):
        if found := fault(instruction_id, given):
            raise DataError(f"{where}: {found}; correct or remove the row")
    return Problem(prompt, json.dumps({"instruction_id_list": ids, "kwargs": kwargs}))


def split_problems(problems: list[Problem], validation_size: int, test_size: int) -> dict[str, list[Problem]]:
    """Test, validation and train, which share no prompt, whatever its case and white space; the same on every machine.

    Test and validation get as many prompts as asked for, but at most a quarter of all of them each.
    """
    prompts = list(dict.fromkeys(map(key, problems)))
    random.Random(SPLIT_SEED).shuffle(prompts)
    quarter = len(prompts) // 4
    test = set(prompts[: min(test_size, quarter)])
    validation = set(prompts[len(test) :][: min(validation_size, quarter)])
    held_out = test | validation
    return {
        "train": [p for p in problems if key(p) not in held_out],
        "validation": [p for p in problems if key(p) in validation],
        "test": [p for p in problems if key(p) in test],
    }


def _rows(config: EnvConfig) -> list[tuple[str, dict]]:
    """Each row with the words that name it in an error."""
    if config.data is not None:
        return read_file(config.data)
    rows = enumerate(read_hub(HubSplit("google/IFEval", "train")))  # its only split
    return [(f"google/IFEval row {i} (key {row['key']})", row) for i, row in rows]


def grader(config: EnvConfig) -> IFEval:
    """Raises ConfigError without langdetect."""
    if importlib.util.find_spec("langdetect") is None:
        raise ConfigError(
            "env.dataset (ifeval) needs the package langdetect: python -m pip install -r requirements_ifeval.txt"
        )
    return IFEval({})


def load(config: EnvConfig) -> IFEval:
    """The task; raises ConfigError without langdetect, DataError for data that it cannot use."""
    grader(config)
    if config.few_shot:
        raise ConfigError(f"env.few_shot ({config.few_shot}) must be 0 for ifeval, whose rows have no solutions")
    rows = _rows(config)
    splits = split_problems([row_problem(row, where) for where, row in rows], config.validation_size, config.test_size)
    if not splits["test"]:
        raise DataError(f"env.data ({config.data}) has {len(rows)} rows: give 4 different prompts or more, to split them")
    splits["train"] = splits["train"][: config.max_samples]
    return IFEval(splits)
