"""Checkpoints: everything that a resume needs, on the disk, whole or absent.

    RUN_DIR/checkpoints/
      checkpoint_000040/
        trainer/*.safetensors       weights (the adapters with LoRA), optimiser and random states, a file a rank
        collection.safetensors      the collection that is being trained on, where the step is not its last one
        collection.json             its texts and verdicts
        ahead.safetensors, .json    train.sync_iter=false: the collection that was sampled meanwhile
        state.json                  counters, data position, metrics position, schedule, configuration
        manifest.json               size and SHA-256 of each file above, and its own
      LATEST, BEST                  the name of a checkpoint

A checkpoint is written under a name that `newest` does not look at, and renamed once every byte is on the disk.
Nothing is unpickled: tensors are safetensors, the rest is JSON, and no file is read before its checksum was.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tensordict import NonTensorData, NonTensorStack, TensorDict

from grpo.errors import CheckpointError, one_line
from grpo.pools import TrainerPool
from grpo.rewards import Grade
from grpo.rollout import GroupRecord

MANIFEST, STATE, TRAINER = "manifest.json", "state.json", "trainer"


@dataclass(frozen=True)
class Checkpoint:
    """A whole one."""

    path: Path
    state: dict

    @property
    def trainer(self) -> Path:
        return self.path / TRAINER

    def collection(self, name: str) -> TensorDict | None:
        """The collection [G] kept as `name`, if there is one."""
        if not (self.path / f"{name}.json").is_file():
            return None
        tensors = load_file(self.path / f"{name}.safetensors")
        records = [
            GroupRecord(**record | {"grades": [Grade(**grade) for grade in record["grades"]]})
            for record in json.loads((self.path / f"{name}.json").read_text())
        ]
        rollouts = TensorDict(tensors, batch_size=[len(records)])
        return rollouts.set("record", NonTensorStack(*[NonTensorData(record) for record in records]))


def newest(run_dir: Path) -> Checkpoint | None:
    """The newest whole checkpoint of a run, or None where none was ever written.

    Damaged ones are passed over with a warning; CheckpointError where there is no other.
    """
    for hidden in (run_dir / "checkpoints").glob(".replaced.*"):  # killed between the two renames of a replacement
        original = hidden.with_name(hidden.name.split(".")[2])
        if not original.exists():
            os.rename(hidden, original)
    candidates = _by_step(run_dir / "checkpoints")[::-1]
    for path in candidates:
        if (reason := damage(path)) is None:
            return Checkpoint(path, json.loads((path / STATE).read_text()))
        print(f"Warning: {path} is damaged and passed over: {reason}", file=sys.stderr)
    if candidates:
        raise CheckpointError(f"no checkpoint in {run_dir / 'checkpoints'} is whole: start again in another directory")
    return None


def _by_step(folder: Path) -> list[Path]:
    found = {path: path.name.removeprefix("checkpoint_") for path in folder.glob("checkpoint_*")}
    return sorted((path for path, step in found.items() if step.isdecimal()), key=lambda path: int(found[path]))


def damage(path: Path) -> str | None:
    """What is wrong with the checkpoint at `path`: every file's size and SHA-256 are compared with the manifest's."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        expected = manifest["files"]
        if manifest["sha256"] != _manifest_sum(expected):
            return f"{MANIFEST} is not what was written"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} cannot be read"
    actual = {str(file.relative_to(path)): file for file in _files(path)}
    for name in sorted(expected.keys() | actual.keys()):
        if name not in actual:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} does not belong to it"
        try:
            size, found = actual[name].stat().st_size, _sha256(actual[name])
        except OSError as error:
            return f"{name} cannot be read: {one_line(error)}"
        if size != expected[name]["bytes"]:
            return f"{name} has {size} bytes instead of {expected[name]['bytes']}"
        if found != expected[name]["sha256"]:
            return f"{name} is not what was written"
    return None


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if not file.is_dir() and file != path / MANIFEST)


def _sha256(file: Path) -> str:
    with open(file, "rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def _manifest_sum(files: dict) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    """Wait until the file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, text: str) -> None:
    path.write_text(text)
    _sync(path)


def _name(path: Path, pointer: str) -> None:
    """Have LATEST or BEST name the checkpoint at `path`."""
    temporary = path.parent / f".{pointer}.{os.getpid()}"
    _write(temporary, path.name + "\n")
    os.replace(temporary, path.parent / pointer)
    _sync(path.parent)


def _save_collection(rollouts: TensorDict, path: Path, name: str) -> None:
    tensors = {key: rollouts[key].contiguous().clone() for key in rollouts.keys() if key != "record"}
    save_file(tensors, path / f"{name}.safetensors")
    records = [asdict(rollouts[i]["record"]) for i in range(len(rollouts))]
    _write(path / f"{name}.json", json.dumps(records))


def _directory(step: int) -> str:
    return f"checkpoint_{step:06d}"


class CheckpointWriter:
    """Writes a run's checkpoints beside its training.

    `start` returns as soon as the trainer's state is copied; then `poll`, between steps, moves the writing on. An error of
    the disk comes out of whichever is called next, as CheckpointError, and leaves the checkpoints before it as they were.
    """

    def __init__(self, run_dir: Path, keep: int, trainer: TrainerPool, resumed: Checkpoint | None = None) -> None:
        """Of the checkpoints that are there, those after `resumed` are damaged, and set aside."""
        self.folder, self.keep, self.trainer = run_dir / "checkpoints", keep, trainer
        self.background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.abandoned = False
        self.pending: tuple[Path, dict, dict[str, TensorDict], int | None] | None = None  # what the ranks are still writing
        self.completing: Future | None = None
        self.newest: str | None = None  # its name, once it is whole
        for path in self.folder.glob(".*"):  # left by a run that was killed
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        for path in _by_step(self.folder)[::-1]:
            if resumed is None or path == resumed.path:
                break
            os.rename(path, path.with_name(f"damaged_{path.name}_{os.getpid()}"))

    def start(self, step: int, state: dict, collections: dict[str, TensorDict], best_step: int | None = None) -> None:
        """Begin to write the checkpoint of `step`; one that is still being written is finished first.

        BEST will name the one of `best_step`.
        """
        self.finish()
        path = self.folder / f".{_directory(step)}.{os.getpid()}"
        with self._errors(path):
            shutil.rmtree(path, ignore_errors=True)
            (path / TRAINER).mkdir(parents=True)
            numbers = self.trainer.save(path / TRAINER)
        self.pending = path, state | {"trainer": numbers}, collections, best_step

    def poll(self) -> None:
        """Move on what is being written, without waiting."""
        if self.pending is not None:
            with self._errors(self.pending[0]):
                written = self.trainer.saved(wait=False)
            if written:
                self.completing = self.background.submit(self._complete, *self.pending)
                self.pending = None
        elif self.completing is not None and self.completing.done():
            self.finish()

    def finish(self) -> None:
        """Wait until what was started is whole."""
        if self.pending is not None:
            with self._errors(self.pending[0]):
                self.trainer.saved(wait=True)
            self.completing = self.background.submit(self._complete, *self.pending)
            self.pending = None
        if self.completing is not None:
            completing, self.completing = self.completing, None
            self.newest = completing.result()

    def close(self) -> None:
        """What is not whole by now will not be."""
        self.abandoned = True
        self.background.shutdown()

    def _complete(self, path: Path, state: dict, collections: dict[str, TensorDict], best_step: int | None) -> str:
        with self._errors(path):
            for name, rollouts in collections.items():
                _save_collection(rollouts, path, name)
            _write(path / STATE, json.dumps(state, indent=1))
            files = {}
            for file in _files(path):
                if self.abandoned:
                    raise CheckpointError("the run has ended")
                _sync(file)
                files[str(file.relative_to(path))] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
            manifest = {"files": files, "sha256": _manifest_sum(files)}
            _write(path / MANIFEST, json.dumps(manifest, indent=1))
            _sync(path / TRAINER)
            _sync(path)
            final = self.folder / path.name.removeprefix(".").split(".")[0]
            replaced = self._hide(final, "replaced") if final.exists() else None  # without the evaluation of its step
            os.rename(path, final)
            _sync(self.folder)
            _name(final, "LATEST")
            best = self.folder / _directory(best_step) if best_step is not None else None
            if best is not None and best.exists():
                _name(best, "BEST")
            if replaced is not None:
                shutil.rmtree(replaced, ignore_errors=True)  # what is left is out of sight, and the next start's to remove
            self._prune()
        return final.name

    def _prune(self) -> None:
        best = self.folder / "BEST"
        kept = {best.read_text().strip()} if best.is_file() else set()
        for path in _by_step(self.folder)[: -self.keep]:
            if path.name not in kept:
                shutil.rmtree(self._hide(path, "removed"), ignore_errors=True)

    def _hide(self, path: Path, why: str) -> Path:
        """Take it out of sight, so that one cut in half is never looked at."""
        hidden = self.folder / f".{why}.{path.name}.{os.getpid()}"
        os.rename(path, hidden)
        return hidden

    @contextmanager
    def _errors(self, path: Path) -> Iterator[None]:
        """Turn an error of the disk into CheckpointError, and remove what was written at `path`."""
        try:
            yield
        except (OSError, CheckpointError, SafetensorError) as error:
            shutil.rmtree(path, ignore_errors=True)
            step = int(path.name.split("_")[1].split(".")[0])
            raise self.disk_error(f"the checkpoint of step {step} could not be written to {self.folder}", error) from None

    def disk_error(self, what: str, error: Exception) -> CheckpointError:
        """`what` failed: says why, which checkpoint there is, and what to do."""
        latest = self.folder / "LATEST"
        kept = f"{latest.read_text().strip()} is whole" if latest.is_file() else "there is no checkpoint before it"
        return CheckpointError(
            f"{what}: {one_line(error)}; {kept}: free space there, then go on with resume={self.folder.parent}"
        )
