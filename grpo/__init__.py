"""Group Relative Policy Optimisation for language models with verifiable rewards.

What PUBLIC names is the Python interface (docs/python.md). Each is imported when it is asked for, so that `import grpo`
takes no time.
"""

import importlib
from typing import Any

PUBLIC = {
    "compose": "grpo.launch",
    "build": "grpo.interface",
    "train": "grpo.interface",
    "resume_run": "grpo.interface",
    "compare": "grpo.interface",
    "UserError": "grpo.errors",
    "Preempted": "grpo.preemption",
}


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *PUBLIC])
