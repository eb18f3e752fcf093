"""What the scripts and tools do, from Python; docs/python.md shows it.

Nothing is done here: a configuration's mode says which script and which parts it is for, and `compare` is
python -m grpo.evaluate. The parts are imported once they are needed, since that takes seconds.
"""

import importlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grpo.launch import SCRIPTS
from grpo.preemption import Preempted
from grpo.resume import SUMMARY, Config, read_config


@contextmanager
def build(config: Config, run_dir: str | Path) -> Iterator[Any]:
    """A run in the directory `run_dir`, whose actors are up; leaving the context ends every process that it started.

    An actor that cannot be started again where it is ends it; `train` then starts them all again. Raises `Preempted` where
    the run is asked to end, once it is saved.
    """
    path = _made(run_dir)
    parts = importlib.import_module(SCRIPTS[config.mode].parts)
    from grpo.supervision import attended  # here: it imports Ray

    with _telling(path), attended(config), parts.build(config, path) as run:
        yield run


def train(config: Config, run_dir: str | Path) -> dict:
    """The whole run, as the mode's script has it; returns what is in summary.json.

    `run_dir` is new, or that of the run that `config.resume` names. Raises UserError with what the script's one line says,
    and `Preempted` as `build` does.
    """
    script = importlib.import_module(SCRIPTS[config.mode].file.removesuffix(".py"))
    path = _made(run_dir)
    with _telling(path):
        script.main(config, path)
    return json.loads((Path(run_dir) / SUMMARY).read_text())


def resume_run(run_dir: str | Path) -> dict:
    """Go on with the run in `run_dir`, which did not end, under its own configuration; returns what is in summary.json."""
    config = read_config(Path(run_dir))
    config.resume = str(run_dir)
    return train(config, run_dir)


def compare(**arguments: Any) -> dict:
    """What `python -m grpo.evaluate KEY=VALUE ...` prints and writes, as a dictionary.

    `compare(run="outputs/mine", k=4)`; a key with a dot in it is handed over as `**{"env.style": "think"}`.
    """
    from grpo.evaluate import evaluate

    return evaluate([f"{key}={value}" for key, value in arguments.items()])


@contextmanager
def _telling(run_dir: Path) -> Iterator[None]:
    """Say how a run goes on that was asked to end; who does not catch Preempted ends as the scripts do."""
    try:
        yield
    except Preempted as stop:
        print(stop.told(f"grpo.resume_run({str(run_dir)!r})"), file=sys.stderr)
        raise


def _made(run_dir: str | Path) -> Path:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # TorchRL imports vLLM here too
    path = Path(run_dir).absolute()
    path.mkdir(parents=True, exist_ok=True)
    return path
