"""Tasks: each module here owns a data set, its prompts, and how a response is parsed and scored.

A new task is one file with a `load(config: EnvConfig) -> Task`, chosen by `env.dataset=FILE_NAME`.
"""

import hashlib
import importlib
import json
import pkgutil
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

from jinja2 import TemplateError

from grpo.chat import chat_tokens
from grpo.config_sections import EnvConfig
from grpo.errors import ConfigError, DataError
from grpo.rewards import Grade

if TYPE_CHECKING:  # graders need no transformers, and their processes start faster without
    from transformers import PreTrainedTokenizerBase

SPLITS = ("train", "validation", "test")
THOUGHT = "<think>"  # begins what a model thinks before it answers, which </think> ends, as Qwen3 and others write it


@dataclass(frozen=True)
class Problem:
    """One prompt and the answer that its responses are graded against."""

    question: str
    answer: str
    solution: str = ""  # the data set's own, where it has one: what an example of `env.few_shot` shows


class Grader(Protocol):
    """What grades the responses of a task, and reads them."""

    def grade(self, problem: Problem, response: str) -> Grade:
        """Score one response. Never raises for a strange response: that is what `unparseable` is for."""
        ...

    def parse(self, response: str) -> str | None:
        """The answer that a response states, whatever the right one is; None where it states none."""
        ...


class Task(Grader, Protocol):
    """What a task module's `load` returns, and `grader` without problems and examples."""

    system_prompt: str  # what the task expects of a response; `env.system_prompt` replaces it
    examples: list[tuple[str, str]]  # questions and responses shown before every question, none of them in a split

    def problems(self, split: str) -> list[Problem]:
        """The problems of `train`, `validation` or `test`; no problem is in two of them."""
        ...


def after_thought(response: str) -> str:
    """What comes after the last </think>; the response where it has none, and nothing where it only opens a thought."""
    _, closed, answer = response.rpartition("</think>")
    if closed:
        return answer.lstrip("\n")
    return "" if response.lstrip().startswith(THOUGHT) else response


def opened_thought(prompt: list[int], tokenizer: "PreTrainedTokenizerBase") -> str:
    """THOUGHT where the prompt ends in it, as some chat templates have it, so that responses begin inside; else nothing."""
    return THOUGHT if tokenizer.decode(prompt[-8:]).rstrip().endswith(THOUGHT) else ""


def check_name(dataset: str) -> None:
    """Raise ConfigError where there is no such task."""
    if dataset not in names():
        raise ConfigError(f"env.dataset ({dataset}) must be one of {', '.join(names())}")


def _module(dataset: str) -> ModuleType:
    check_name(dataset)
    return importlib.import_module(f"{__name__}.{dataset}")


def grader(config: EnvConfig) -> Grader:
    """What grades for the task that `env.dataset` names, without its data, in the shape that `env.reward_shape` names.

    Raises ConfigError where there is no such task or shape.
    """
    from grpo.shapes import Shaped

    found = _module(config.dataset).grader(config)
    return found if config.reward_shape is None else Shaped(found, config.reward_shape, config.reward_weights)


def row_problem(dataset: str, row: dict, where: str) -> Problem:
    """The problem of a row that holds what its response is graded against; raises DataError, which begins with `where`."""
    return _module(dataset).row_problem(row, where)


def names() -> list[str]:
    """The tasks there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "data")  # which reads for them


def load(config: EnvConfig) -> Task:
    """The task that `env.dataset` names; raises ConfigError where there is none."""
    return _asking(_module(config.dataset).load(config), config)


def without_data(config: EnvConfig) -> Task:
    """The same to ask other questions than its own: its data is read only where env.few_shot shows some of it."""
    return load(config) if config.few_shot else _asking(_module(config.dataset).grader(config), config)


def _asking(task: Task, config: EnvConfig) -> Task:
    if config.system_prompt is not None:
        task.system_prompt = config.system_prompt
    return task


def encode(problem: Problem, task: Task, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The prompt's token ids: the chat template where the tokenizer has one, plain text where it has none.

    The task's examples come between the system prompt and the question, as turns of user and assistant.
    """
    if tokenizer.chat_template is None:
        shown = "".join(f"{question}\n{response}\n\n" for question, response in task.examples)
        return tokenizer(f"{task.system_prompt}\n\n{shown}{problem.question}\n")["input_ids"]
    turns = [
        {"role": role, "content": content}
        for example in task.examples
        for role, content in zip(("user", "assistant"), example, strict=True)
    ]
    turns.append({"role": "user", "content": problem.question})
    try:
        return chat_tokens([{"role": "system", "content": task.system_prompt}, *turns], tokenizer)
    except TemplateError:  # some templates refuse a system message: it is then told by the user
        first = turns[0] | {"content": f"{task.system_prompt}\n\n{turns[0]['content']}"}
        return chat_tokens([first, *turns[1:]], tokenizer)


@dataclass
class EncodedProblems:
    """A split's problems with their prompts as token ids, those too long left out and counted."""

    problems: list[Problem]
    prompts: list[list[int]]
    dropped: int
    thought: str = ""  # what the prompts have opened (`opened_thought`): graders get it in front of a response

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the problems and their prompts, in their order."""
        text = json.dumps([[p.question, p.answer, prompt] for p, prompt in zip(self.problems, self.prompts, strict=True)])
        return hashlib.sha256(text.encode()).hexdigest()


def fingerprint(data: dict[str, EncodedProblems]) -> str:
    """SHA-256 of all splits: what a run is trained on, and what it is measured by."""
    return hashlib.sha256("".join(data[split].fingerprint for split in SPLITS).encode()).hexdigest()


def encode_split(
    task: Task, split: str, tokenizer: "PreTrainedTokenizerBase", max_length: int, limit: int | None = None
) -> EncodedProblems:
    """Tokenize the first `limit` problems of `split`; raises DataError where no prompt fits in `max_length` tokens."""
    problems = task.problems(split)[:limit]
    prompts = [encode(problem, task, tokenizer) for problem in problems]
    kept = [i for i, prompt in enumerate(prompts) if len(prompt) <= max_length]
    if not kept:
        raise DataError(
            f"the {split} split has no prompt to use: {len(problems)} problems, {len(problems) - len(kept)} of them "
            f"longer than env.max_prompt_length ({max_length}); give more data or raise the limit"
        )
    thought = opened_thought(prompts[kept[0]], tokenizer)
    return EncodedProblems([problems[i] for i in kept], [prompts[i] for i in kept], len(problems) - len(kept), thought)
