"""From a response's text to its score: what a grade says, and how a user's own reward function is called.

A grade tells what was decided and why; a score that is not a finite number ends the run, since an advantage made from it
would poison a whole group.
"""

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from types import ModuleType

from grpo.errors import ConfigError, RewardError

OUTCOMES = ("correct", "wrong", "unparseable", "timed_out", "grader_error")
NO_VERDICT = ("timed_out", "grader_error")  # those that say nothing about the response

LARGEST = 3.4028234663852886e38  # of float32, which rewards and advantages are kept in

RewardFunction = Callable[[list[str], list[str], list[str]], list[float]]


@dataclass(frozen=True)
class Grade:
    """The verdict on one response: `reward` is the sum of its `terms`."""

    terms: dict[str, float]
    outcome: str  # one of OUTCOMES
    parsed: str | None  # the answer found in the response
    note: str = ""  # why there is no verdict
    details: dict[str, list[bool]] = field(default_factory=dict)  # what else the task says of it, for python -m grpo.grade

    @property
    def reward(self) -> float:
        return sum(self.terms.values(), 0.0)

    @property
    def correct(self) -> bool:
        return self.outcome == "correct"

    @property
    def is_verdict(self) -> bool:
        """Whether it says something about the response; without one, the response teaches nothing."""
        return self.outcome not in NO_VERDICT


def load_reward_function(spec: str) -> RewardFunction:
    """The function named by PATH.py:FUNCTION or by MODULE:FUNCTION, where the module can be imported from here.

    It is called on a group: three lists of equal length, prompts, responses and answers; it returns one finite number a
    response. Raises ConfigError where there is no such file, module or function.
    """
    where, _, name = spec.rpartition(":")
    check_reward_file(spec)
    try:
        module = _load_file(Path(where), spec) if where.endswith(".py") else importlib.import_module(where)
    except Exception as error:  # the user's code may raise anything
        raise ConfigError(f"env.reward_fn ({spec}): importing {where} raised {_what_and_where(error)}") from error
    if not callable(getattr(module, name, None)):
        raise ConfigError(f"env.reward_fn ({spec}): {where} has no function {name}")
    return getattr(module, name)


def check_reward_file(spec: str) -> None:
    """Raise ConfigError where `spec` is a PATH.py:FUNCTION, and the file is not there."""
    where = spec.rpartition(":")[0]
    if where.endswith(".py") and not Path(where).is_file():
        raise ConfigError(f"env.reward_fn ({spec}): there is no file {where}")


def _load_file(path: Path, spec: str) -> ModuleType:
    module_spec = importlib.util.spec_from_file_location(f"reward_fn_{path.stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses look their module up there
    module_spec.loader.exec_module(module)
    return module


def _what_and_where(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})"


def apply_reward_function(
    function: RewardFunction, prompts: list[str], responses: list[str], answers: list[str]
) -> list[float]:
    """The rewards that `function` gives, checked: as many as there are responses, each finite, as float32 too."""
    name = getattr(function, "__name__", repr(function))
    try:
        rewards = list(function(prompts, responses, answers))
    except Exception as error:  # the user's code may raise anything
        raise RewardError(f"env.reward_fn {name} raised {_what_and_where(error)}") from error
    if len(rewards) != len(responses):
        raise RewardError(f"env.reward_fn {name} returned {len(rewards)} rewards for {len(responses)} responses")
    for reward, prompt, response in zip(rewards, prompts, responses, strict=True):
        if not isinstance(reward, Real) or not abs(reward) <= LARGEST:  # nan is not
            raise RewardError(
                f"env.reward_fn {name} returned {reward!r} where a finite number is needed, of float32's range, "
                f"for the response {response[:80]!r} to the prompt {prompt[:80]!r}"
            )
    return [float(reward) for reward in rewards]
