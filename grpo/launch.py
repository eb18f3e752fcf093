"""From the command line to a checked configuration and a run directory; every script's entry.

Hydra parses, composes and makes the run directory. Before it does, the overrides are checked here, so that a wrong one
ends in one line, in a second or two, with nothing started and nothing written.
"""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from grpo.config import RunConfig, check_keys, from_dictconfig, known_keys, readable
from grpo.errors import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_PREEMPTED, ConfigError, UserError, one_line
from grpo.offline_config import AUTO, OfflineConfig
from grpo.preemption import GraceOver, Preempted, deferred_interrupt
from grpo.resume import Config, find_run, key_value, resumed_config
from grpo.rules import one_of
from grpo.sources import check_sources
from grpo.sweep import add_override, jobs, parse_override, sweep, varying

CONFIG_DIR = Path(__file__).resolve().parent.parent / "config"
MOST_CHECKED = 64  # runs of a sweep, before the first one starts


class Script(NamedTuple):
    """What a mode is run by. The modules are imported once the keys are right, since that takes seconds."""

    file: str
    config: type
    plan: str  # a module with `make_plan(config)`
    parts: str  # what its main builds the run with


SCRIPTS = {
    "sync": Script("grpo_sync.py", RunConfig, "grpo.plan", "grpo_utils"),
    "async": Script("grpo_async.py", RunConfig, "grpo.plan", "grpo_utils"),
    "offline": Script("grpo_offline.py", OfflineConfig, "grpo.offline_plan", "grpo.offline"),
}


def compose(config_name: str, overrides: Sequence[str] = (), cls: type[Config] = RunConfig) -> Config:
    """The checked configuration of config/`config_name`.yaml with `overrides`; raises ConfigError in one line.

    Only keys of `cls` may be overridden.
    """
    return from_dictconfig(compose_unchecked(config_name, overrides, cls))


def compose_unchecked(config_name: str, overrides: Sequence[str], cls: type[Config]) -> DictConfig:
    """The same before its values are checked: only that the keys are there, and of their types."""
    if not (CONFIG_DIR / f"{config_name.removesuffix('.yaml')}.yaml").is_file():
        known = ", ".join(sorted(path.stem for path in CONFIG_DIR.glob("*.yaml")))
        raise ConfigError(f"there is no configuration {config_name}; there are {known}")
    groups = sorted(path.name for path in CONFIG_DIR.iterdir() if path.is_dir())
    parsed = [parse_override(override) for override in overrides]
    for override in parsed:
        if cls is OfflineConfig and override.key_or_group == "objective" and not override.is_delete():
            raise ConfigError(
                f"objective ({override.value()}) must be left out of an offline run, which has objective.log_prob, "
                "objective.temperature and objective.target_temperature only"
            )
    try:
        check_keys([override.key_or_group for override in parsed], groups, cls)
        with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            return hydra.compose(config_name, overrides=list(overrides))
    except MissingConfigException as error:
        raise ConfigError(_missing(error, parsed)) from None
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(readable(error)) from None


def _missing(error: MissingConfigException, typed: list[Override]) -> str:
    """What was asked of a configuration group that it does not have, and what it has."""
    for override in typed:
        group, name = override.key_or_group, override.value()
        if error.options and error.missing_cfg_file == f"{group}/{name}":
            other = f"; another model is model.name={name}" if group == "model" else ""
            return f"{group} ({name}) must be one of {', '.join(error.options)}{other}"
    return readable(error)


def launch(mode: str, default_config: str, main: Callable[[Config, Path], None]) -> None:
    """Run `main(config, run_dir)` under Hydra, or go on with the run that resume= means.

    User errors end in one line on stderr; the exit codes are those of grpo/errors.py.
    """
    starting = ExitStack()
    starting.enter_context(deferred_interrupt())
    arguments = get_args_parser().parse_args()
    if mode == "async" and not any(override.startswith("mode=") for override in arguments.overrides):
        add_override("mode=async", arguments.overrides)  # which the configurations, made for both, do not say
    information = arguments.help or arguments.hydra_help or arguments.info or arguments.cfg
    resumed = None
    try:
        if arguments.multirun and not information:
            planned = _check_sweep(arguments, mode, default_config)
            starting.close()
            sys.exit(sweep(CONFIG_DIR, default_config, arguments.overrides, planned))
        if not information:
            resumed = _check(arguments, mode, default_config)
    except UserError as error:
        sys.exit(_report(error))

    def run(config: Config, run_dir: Path) -> None:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # TorchRL imports vLLM here too
        try:
            importlib.import_module(SCRIPTS[mode].parts)
            starting.close()
            main(config, run_dir)
        except Preempted as stop:
            print(stop.told(f"python {SCRIPTS[mode].file} resume={run_dir}"), file=sys.stderr)
            raise
        except GraceOver as error:
            _report(error)
            sys.exit(EXIT_PREEMPTED)
        except UserError as error:
            sys.exit(_report(error))
        except KeyboardInterrupt:
            print(f"Interrupted; what was logged is in {run_dir}", file=sys.stderr)
            sys.exit(EXIT_INTERRUPTED)

    if resumed is not None:
        run(*resumed)
        return

    @hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=default_config)
    def under_hydra(config: DictConfig) -> None:
        run(from_dictconfig(config), Path(HydraConfig.get().runtime.output_dir))

    under_hydra()


def _check_sweep(arguments, mode: str, default_config: str) -> list[list[str]]:
    """Raise ConfigError for a run of the sweep that cannot work; returns the runs' overrides, where they are known ahead."""
    name = arguments.config_name or default_config
    if "hydra/sweeper=optuna" in arguments.overrides and find_spec("optuna") is None:
        raise ConfigError("hydra/sweeper=optuna needs pip install --no-deps -r requirements_optuna.txt")
    groups = {path.name: sorted(file.stem for file in path.glob("*.yaml")) for path in CONFIG_DIR.iterdir() if path.is_dir()}
    chosen = any(override.startswith("hydra/sweeper=") for override in arguments.overrides)
    planned = list(islice(jobs(arguments.overrides, groups), MOST_CHECKED if chosen else None))
    keys = varying(planned)
    which = [
        f"run {number} ({' '.join(item for item in its if item.split('=', 1)[0] in keys)})"
        for number, its in enumerate(planned[:MOST_CHECKED])
    ]

    def checked(number: int, check: Callable[..., Any], *arguments) -> Any:
        try:
            return check(*arguments)
        except UserError as error:
            raise ConfigError(f"{which[number]}: {one_line(error)}") from None

    # All of them before the first plan is made, which imports torch.
    configs = [checked(i, compose, name, planned[i], SCRIPTS[mode].config) for i in range(len(which))]
    for config in configs:
        if config.resume is not None:
            raise ConfigError(f"resume ({config.resume}) cannot be swept over: go on with each run by itself")
    for i, config in enumerate(configs):
        checked(i, _check_script, config, mode)
    dry_run = any(config.dry_run for config in configs)
    # A Slurm job plans for its own machine, which the one that submits it, often without a GPU, need not be like.
    elsewhere = "hydra/launcher=submitit_slurm" in arguments.overrides and not dry_run
    plans = [] if elsewhere else [checked(i, _plan, config, mode) for i, config in enumerate(configs)]
    if dry_run:
        described = (plan.describe(config) for plan, config in zip(plans, configs, strict=True))
        print("\n\n".join(f"{run}\n{text}" for run, text in zip(which, described, strict=True)))
        sys.exit(0)
    return [] if chosen else [[item for item in its if not item.startswith("hydra")] for its in planned]


def _check(arguments, mode: str, default_config: str) -> tuple[Config, Path] | None:
    """Raise ConfigError for what cannot work; returns the run to go on with, if that was asked for."""
    name, overrides, cls = arguments.config_name or default_config, list(arguments.overrides), SCRIPTS[mode].config
    composed = compose_unchecked(name, overrides, cls)
    typed = {parsed.key_or_group: parsed.value() for parsed in map(parse_override, overrides)}
    run_dir, typed_dir = None, typed.get("hydra.run.dir")
    # What is typed beside the directory of a run need not go with the defaults, but with what that run has.
    config = from_dictconfig(composed) if composed.resume in (None, AUTO) else None
    if composed.resume is not None:
        run_dir = find_run(composed.resume, None if typed_dir is None else str(typed_dir), Path("outputs"), config)
    if run_dir is not None:
        _check_mode(composed.mode, mode)
        changed = [key for key in typed if key != "mode"]  # a run stays in its own, and is told which script that is
        groups = [key for key in changed if (CONFIG_DIR / key).is_dir()]
        if groups:  # a preset may set keys of other sections too
            others = [override for override in overrides if parse_override(override).key_or_group not in groups]
            plain = compose_unchecked(name, others, cls)
            changed += [key for key in known_keys(cls) if key_value(plain, key) != key_value(composed, key)]
        config = resumed_config(run_dir, changed, composed)
    _check_script(config, mode)
    plan = _plan(config, mode)
    if config.dry_run:
        print(plan.describe(config))
        sys.exit(0)
    return None if run_dir is None else (config, run_dir)


def _check_script(config: Config, mode: str) -> None:
    """Raise ConfigError where `config` is for another script, or names what is not there."""
    _check_mode(config.mode, mode)
    check_sources(config)


def _check_mode(found: str, mode: str) -> None:
    one_of("mode", found, tuple(SCRIPTS))
    if found != mode:
        raise ConfigError(f"mode ({found}) must be {mode} for {SCRIPTS[mode].file}: use {SCRIPTS[found].file}")


def _plan(config: Config, mode: str) -> Any:
    """What `config` will use; raises ConfigError where it cannot work here."""
    return importlib.import_module(SCRIPTS[mode].plan).make_plan(config)


def _report(error: UserError) -> int:
    print(f"Error: {one_line(error)}", file=sys.stderr)
    return EXIT_ERROR
