"""Which run `resume=` means, and with which configuration it goes on: its own, and what is typed now.

Nothing here imports torch, so a wrong answer is given at once.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from grpo.config import RunConfig, differences, from_dictconfig, readable
from grpo.errors import ConfigError

AUTO = "auto"
CONFIG = "config.yaml"  # in a run directory: the configuration that the run has now


def write_config(config: RunConfig, run_dir: Path) -> None:
    (run_dir / CONFIG).write_text(
        OmegaConf.to_yaml(OmegaConf.create(asdict(config) | {"resume": None, "resume_force": False}))
    )


def resumed_config(run_dir: Path, typed: list[tuple[str, Any]]) -> RunConfig:
    """The configuration of the run in `run_dir` with the keys and values `typed`.

    Raises ConfigError where they make another run of it and resume_force=true is not among them.
    """
    try:
        saved = OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.load(run_dir / CONFIG))
        before = from_dictconfig(saved)
        for key, value in typed:
            if OmegaConf.is_config(OmegaConf.select(saved, key)):
                raise ConfigError(f"{key}: a run that goes on keeps its own; type single keys, as {key}.KEY=VALUE")
            OmegaConf.update(saved, key, value)
        config = from_dictconfig(saved)
    except OmegaConfBaseException as error:
        raise ConfigError(readable(error)) from None
    changed = differences(before, config)
    if changed and not config.resume_force:
        raise ConfigError(
            f"resume ({run_dir}): {', '.join(changed)} would make another run of it: leave that out, start a new run, or "
            "type resume_force=true"
        )
    return config


def find_run(resume: str, run_dir: str | None, outputs: Path, config: RunConfig | None) -> Path | None:
    """The directory of the run that `resume` means; with `auto`, None where a new one is to start.

    `auto` means `run_dir` (what was typed as hydra.run.dir), or else the newest run under `outputs` of the same
    `config` that did not end.
    """
    if resume != AUTO:
        if not (Path(resume) / CONFIG).is_file():
            raise ConfigError(f"resume ({resume}): there is no run there: give the directory of one, or auto")
        return Path(resume)
    if run_dir is not None:
        return Path(run_dir) if (Path(run_dir) / CONFIG).is_file() else None
    newest_first = sorted(outputs.glob(f"*/*/{CONFIG}"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in newest_first:
        if not (path.parent / "summary.json").exists() and not differences(resumed_config(path.parent, []), config):
            return path.parent
    return None
