"""Which run `resume=` means, and with which configuration it goes on: its own, and what is typed now.

Nothing here imports torch, so a wrong answer is given at once.
"""

import errno
import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from grpo.config import RunConfig, from_dictconfig, known_keys, readable
from grpo.errors import ConfigError, one_line
from grpo.offline_config import AUTO, OfflineConfig

# In a run directory: the configuration that the run has now, what says that it has ended, and whose it is.
CONFIG, SUMMARY, LOCK = "config.yaml", "summary.json", ".lock"


Config = RunConfig | OfflineConfig

# What may be another in a resumed run, which is still the same run: keys, or sections.
MAY_CHANGE = (
    "resume",
    "resume_force",
    "dry_run",
    "colocate",
    "logging",
    "ray",
    "env.grading_processes",
    "env.grading_memory_gb",
    "env.grading_timeout_s",
    "env.reward_timeout_s",
    "model.cache_dir",
    "num_epochs",
    "inference_model.gpu_memory_utilization",
    "inference_model.num_devices",
    "inference_model.tensor_parallel_size",
    "ref_model.num_devices",
    "train_model.gradient_checkpointing",
    "train_model.num_devices",
    *(
        f"train.{name}"
        for name in (
            "checkpoint_frequency",
            "eval_frequency",
            "grace_s",
            "gradient_accumulation_steps",
            "keep_checkpoints",
            "logging_frequency",
            "max_grader_error_rate",
            "max_skipped_steps",
            "max_tokens_per_micro_batch",
            "max_wall_time",
            "probe_frequency",
            "share_prompts",
            "stop_when",
            "total_dialog_turns",
            "weight_transport",
        )
    ),
)


def differences(before: Config, now: Config) -> list[str]:
    """Keys that make another run of it, with both values: `key (before -> now)`; both must be of one class."""
    return [
        f"{key} ({key_value(before, key)} -> {key_value(now, key)})"
        for key in known_keys(type(before))
        if key_value(before, key) != key_value(now, key) and key not in MAY_CHANGE and key.split(".")[0] not in MAY_CHANGE
    ]


def key_value(config: Config | DictConfig, key: str) -> Any:
    """What `config` has for `section.name`."""
    for name in key.split("."):
        config = getattr(config, name)
    return config


def write_whole(path: Path, text: str) -> None:
    """Write the file so that a kill leaves the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_config(config: Config, run_dir: Path) -> None:
    now = asdict(config) | {"resume": None, "resume_force": False}
    write_whole(run_dir / CONFIG, OmegaConf.to_yaml(OmegaConf.create(now)))


def read_config(run_dir: Path) -> Config:
    """The configuration of the run in `run_dir`, of the class that its mode says."""
    try:
        written = OmegaConf.load(run_dir / CONFIG)
        cls = OfflineConfig if written.get("mode") == "offline" else RunConfig
        return from_dictconfig(OmegaConf.merge(OmegaConf.structured(cls), written))
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"{run_dir / CONFIG} cannot be read: {readable(error)}") from None


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Have the run directory for this process alone, until its end; ConfigError where another one has it."""
    with open(run_dir / LOCK, "a") as file:
        if not _lock(file, run_dir):
            raise ConfigError(f"{run_dir}: another process is training there: wait for its end, or end it")
        yield


def _is_locked(run_dir: Path) -> bool:
    with open(run_dir / LOCK, "a") as file:
        return not _lock(file, run_dir)


def _lock(file: IO[str], run_dir: Path) -> bool:
    """Whether this process has the run directory now, until `file` is closed."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        raise ConfigError(
            f"{run_dir}: its file system has no locks ({error.strerror}), which keep other runs out of it: mount it with "
            "flock, or type another hydra.run.dir"
        ) from None
    return True


def resumed_config(run_dir: Path, typed: list[str], composed: DictConfig) -> Config:
    """The configuration of the run in `run_dir` with what `composed` has for the keys, or sections, that were `typed`.

    What is checked is the two together: `composed` need not be a configuration that could run. Raises ConfigError where
    they cannot, or make another run of it and resume_force=true is not among them.
    """
    before = read_config(run_dir)
    if type(before) is not OmegaConf.get_type(composed):
        raise ConfigError(f"resume ({run_dir}): that is a run of mode={before.mode}: go on with it by its own script")
    merged = OmegaConf.structured(type(before)(**vars(before)))
    for key in known_keys(type(before)):
        if any(key == name or key.startswith(f"{name}.") for name in typed):
            OmegaConf.update(merged, key, key_value(composed, key))
    config = from_dictconfig(merged)
    changed = differences(before, config)
    if changed and not config.resume_force:
        raise ConfigError(
            f"resume ({run_dir}): {', '.join(changed)} would make another run of it: leave that out, start a new run, or "
            "type resume_force=true"
        )
    return config


def find_runs(outputs: Path) -> list[Path]:
    """The directories of runs that are OUTPUTS/DATE/TIME or, with a hydra.run.dir that was typed, OUTPUTS/NAME."""
    found = [path.parent for depth in ("*", "*/*") for path in outputs.glob(f"{depth}/{CONFIG}")]
    # A pattern takes hidden names too, and Hydra writes a file of the same name to a run's .hydra.
    return [run for run in found if not any(part.startswith(".") for part in run.relative_to(outputs).parts)]


def find_run(resume: str, run_dir: str | None, outputs: Path, config: Config | None) -> Path | None:
    """The directory of the run that `resume` means; with `auto`, None where a new one is to start.

    `auto` means `run_dir` (what was typed as hydra.run.dir), or else the newest run under `outputs` of the same
    `config` that did not end and that no other process is at. A run whose configuration cannot be read is told of, and
    passed over.
    """
    if resume != AUTO:
        if not (Path(resume) / CONFIG).is_file():
            raise ConfigError(f"resume ({resume}): there is no run there: give the directory of one, or auto")
        return Path(resume)
    if run_dir is not None:
        return Path(run_dir) if (Path(run_dir) / CONFIG).is_file() else None
    newest_first = sorted(find_runs(outputs), key=lambda run: (run / CONFIG).stat().st_mtime, reverse=True)
    for here in newest_first:
        if (here / SUMMARY).exists() or _is_locked(here):
            continue
        try:
            found = read_config(here)
        except ConfigError as error:  # an earlier version's, perhaps
            print(f"resume ({AUTO}): passed over {here}, which did not end: {one_line(error)}", file=sys.stderr)
            continue
        if type(found) is type(config) and not differences(found, config):
            return here
    return None
