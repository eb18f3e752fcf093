"""Checkpoints on the disk: whole or passed over, and nothing in them is executed."""

import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from grpo.checkpoint import CheckpointWriter, damage, newest
from grpo.errors import CheckpointError
from grpo.preemption import GraceOver
from grpo.rewards import Grade
from grpo.rollout import GroupRecord

from .conftest import file_names
from .test_replay import collection


class OneFileTrainer:
    """A TrainerPool that writes one tensor, filled with `value`."""

    def __init__(self) -> None:
        self.value, self.done, self.error = 0.0, True, None

    def save(self, path: Path) -> dict:
        save_file({"weight": torch.full((64,), self.value)}, path / "shard-00001.safetensors")
        return {"scheduled": int(self.value)}

    def saved(self, wait: bool) -> bool:
        if self.error is not None:
            raise self.error
        return wait or self.done


@pytest.fixture
def write(tmp_path):
    """Write whole checkpoints of some steps, by one writer; returns it."""
    trainer = OneFileTrainer()
    writer = CheckpointWriter(tmp_path, 3, trainer)

    def write(*steps: int, best: int | None = None) -> CheckpointWriter:
        for step in steps:
            trainer.value = float(step)
            writer.start(step, {"step": step}, {"collection": collection(step, 2)}, best_step=best)
            writer.finish()
        return writer

    write.writer, write.trainer = writer, trainer
    yield write
    writer.close()


def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def test_a_run_without_checkpoints_has_none(tmp_path):
    assert newest(tmp_path) is None


def test_the_newest_is_read_back_as_it_was_written(write, tmp_path):
    write(4, 12)
    checkpoint = newest(tmp_path)
    assert checkpoint.path.name == "checkpoint_000012"
    assert checkpoint.state == {"step": 12, "trainer": {"scheduled": 12}}
    assert (folder(tmp_path) / "LATEST").read_text() == "checkpoint_000012\n"
    assert file_names(checkpoint.trainer) == ["shard-00001.safetensors"]


def test_a_collection_comes_back_bit_for_bit_with_its_texts(write, tmp_path):
    whole = collection(0, 3)
    record = GroupRecord("2 + 2 = ?", "4", ["4", "vier", "\u22124"], [Grade({"a": 0.1, "b": 1 / 3}, "correct", "4")] * 3)
    whole[1]["record"].grades = record.grades
    writer = write.writer
    writer.start(1, {}, {"collection": whole})
    writer.finish()
    back = newest(tmp_path).collection("collection")
    assert back.batch_size == whole.batch_size
    for key in whole.keys():
        if key != "record":
            assert torch.equal(back[key], whole[key]) and back[key].dtype == whole[key].dtype
    assert [back[i]["record"] for i in range(3)] == [whole[i]["record"] for i in range(3)]
    assert back[1]["record"].grades[0].reward == record.grades[0].reward
    assert newest(tmp_path).collection("ahead") is None


def test_the_last_ones_and_the_best_are_kept(write, tmp_path):
    write(1, 2, 3, 4, 5, best=2)
    assert file_names(folder(tmp_path)) == ["BEST", "LATEST", *(f"checkpoint_{n:06d}" for n in (2, 3, 4, 5))]
    assert (folder(tmp_path) / "BEST").read_text() == "checkpoint_000002\n"


def test_a_copy_of_the_users_beside_them_is_left_alone(write, tmp_path):
    write(1, 2)
    copy = shutil.copytree(folder(tmp_path) / "checkpoint_000002", folder(tmp_path) / "checkpoint_000002_copy")
    assert newest(tmp_path).path.name == "checkpoint_000002"
    CheckpointWriter(tmp_path, 1, write.trainer, newest(tmp_path)).close()
    write(3, 4, 5)
    assert damage(copy) is None
    assert file_names(folder(tmp_path)) == ["LATEST", "checkpoint_000002_copy", *(f"checkpoint_{n:06d}" for n in (3, 4, 5))]


def test_an_old_one_that_cannot_be_removed_at_once_is_no_error(write, tmp_path, monkeypatch):
    remove = shutil.rmtree

    def busy(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(39, "Directory not empty")

    write(1, 2, 3)
    monkeypatch.setattr(shutil, "rmtree", busy)
    write(3, 4)
    names = [name.rsplit(".", 1)[0] for name in file_names(folder(tmp_path)) if name.startswith(".")]
    assert sorted(names) == [".removed.checkpoint_000001", ".replaced.checkpoint_000003"]
    assert (newest(tmp_path).state["step"], damage(folder(tmp_path) / "checkpoint_000003")) == (4, None)
    monkeypatch.setattr(shutil, "rmtree", remove)
    CheckpointWriter(tmp_path, 3, write.trainer, newest(tmp_path)).close()
    assert file_names(folder(tmp_path)) == ["LATEST", *(f"checkpoint_{n:06d}" for n in (2, 3, 4))]


def test_best_is_named_again_where_a_kill_came_before_it(write, tmp_path):
    write(1, 2, best=1)
    (folder(tmp_path) / "BEST").unlink()
    write(3, best=1)
    assert (folder(tmp_path) / "BEST").read_text() == "checkpoint_000001\n"


def test_steps_are_compared_as_numbers(write, tmp_path):
    write(999_999, 1_000_000, 1_000_001, 1_000_002)
    assert newest(tmp_path).state["step"] == 1_000_002
    assert not (folder(tmp_path) / "checkpoint_999999").exists()


def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(write, tmp_path):
    write(1)
    whole = folder(tmp_path) / "checkpoint_000001"
    os.rename(whole, folder(tmp_path) / ".replaced.checkpoint_000001.4711")
    assert newest(tmp_path).path == whole


def test_damaged_ones_are_set_aside_and_count_for_nothing(write, tmp_path):
    write(1, 2, 3)
    for name in ("checkpoint_000002", "checkpoint_000003"):
        flip(folder(tmp_path) / name)
    writer = CheckpointWriter(tmp_path, 1, write.trainer, newest(tmp_path))
    writer.start(2, {"step": 2}, {})
    writer.finish()
    writer.close()
    assert newest(tmp_path).state["step"] == 2
    names = file_names(folder(tmp_path))
    assert names[:2] == ["LATEST", "checkpoint_000002"]
    assert [name.rsplit("_", 1)[0] for name in names[2:]] == ["damaged_checkpoint_000002", "damaged_checkpoint_000003"]


def test_what_is_not_whole_yet_is_not_seen(write, tmp_path):
    write(1)
    write.trainer.done = False
    write.writer.start(2, {}, {})
    write.writer.poll()
    assert newest(tmp_path).path.name == "checkpoint_000001"
    write.trainer.done = True
    write.writer.poll()
    write.writer.finish()
    assert newest(tmp_path).path.name == "checkpoint_000002"


def test_what_a_killed_run_left_is_cleared_away(write, tmp_path):
    write(1)
    (folder(tmp_path) / ".checkpoint_000002.4711" / "trainer").mkdir(parents=True)
    (folder(tmp_path) / ".LATEST.4711").write_text("checkpo")
    CheckpointWriter(tmp_path, 3, write.trainer).close()
    assert file_names(folder(tmp_path)) == ["LATEST", "checkpoint_000001"]


def truncate(path: Path) -> None:
    """Cut one file of the checkpoint at a random byte."""
    file = random.choice([file for file in sorted(path.rglob("*")) if file.is_file()])
    os.truncate(file, random.randrange(file.stat().st_size))


def flip(path: Path) -> None:
    """Change one bit of one file."""
    file = random.choice([file for file in sorted(path.rglob("*")) if file.is_file()])
    data = bytearray(file.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    file.write_bytes(data)


@pytest.mark.parametrize("spoil", [truncate, flip])
@pytest.mark.parametrize("seed", range(20))
def test_a_spoiled_byte_is_seen_and_the_one_before_is_used(write, tmp_path, capsys, spoil, seed):
    write(1, 2)
    random.seed(seed)
    spoil(folder(tmp_path) / "checkpoint_000002")
    assert newest(tmp_path).state["step"] == 1
    assert "checkpoint_000002 is damaged and passed over: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["trainer/shard-00001.safetensors", "collection.safetensors", "collection.json", "state.json", "manifest.json"]
)
def test_a_missing_file_is_named_and_the_one_before_is_used(write, tmp_path, capsys, name):
    write(1, 2)
    (folder(tmp_path) / "checkpoint_000002" / name).unlink()
    assert newest(tmp_path).state["step"] == 1
    assert name in capsys.readouterr().err


class Command:
    """What unpickling would execute."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("name", ["trainer/shard-00001.safetensors", "trainer/.metadata", "state.json", "manifest.json"])
def test_a_pickled_command_is_seen_and_never_run(write, tmp_path, name):
    write(1, 2)
    target = tmp_path / "executed"
    (folder(tmp_path) / "checkpoint_000002" / name).write_bytes(pickle.dumps(Command(target)))
    assert newest(tmp_path).state["step"] == 1
    assert not target.exists()


def test_where_none_is_whole_that_is_said(write, tmp_path):
    write(1)
    (folder(tmp_path) / "checkpoint_000001" / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole"):
        newest(tmp_path)


def test_a_damaged_one_is_replaced_when_its_step_comes_again(write, tmp_path):
    write(1, 2)
    flip(folder(tmp_path) / "checkpoint_000002")
    write(2)
    assert damage(folder(tmp_path) / "checkpoint_000002") is None
    assert file_names(folder(tmp_path)) == ["LATEST", "checkpoint_000001", "checkpoint_000002"]


def test_an_error_of_the_disk_names_the_step_and_the_one_that_is_whole(write, tmp_path, monkeypatch):
    write(1)
    write.trainer.error = CheckpointError("No space left on device")
    with pytest.raises(
        CheckpointError,
        match=r"the checkpoint of step 2 could not be written to .*: No space left on device; checkpoint_000001 is whole: "
        "free space there, then go on with resume=",
    ):
        write(2)
    assert file_names(folder(tmp_path)) == ["LATEST", "checkpoint_000001"]
    assert newest(tmp_path).state["step"] == 1


def test_a_save_that_outlasts_the_grace_period_is_no_error_of_the_disk(write, tmp_path):
    write(1)
    write.trainer.error = GraceOver("it could not be saved within train.grace_s")
    write.writer.start(2, {}, {})
    with pytest.raises(GraceOver, match=r"^it could not be saved within train.grace_s$"):
        write.writer.finish()
    assert newest(tmp_path).state["step"] == 1
    CheckpointWriter(tmp_path, 3, write.trainer).close()
    assert file_names(folder(tmp_path)) == ["LATEST", "checkpoint_000001"]


def test_an_error_beside_training_comes_out_of_the_next_call(write, tmp_path, monkeypatch):
    write(1)

    def full(*arguments) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("grpo.checkpoint.save_file", full)
    write.writer.start(2, {}, {"collection": collection(0, 2)})
    write.writer.poll()
    with pytest.raises(CheckpointError, match="No space left on device"):
        write.writer.finish()
    assert newest(tmp_path).state["step"] == 1


def test_the_manifest_is_over_every_file(write, tmp_path):
    write(1)
    path = folder(tmp_path) / "checkpoint_000001"
    manifest = json.loads((path / "manifest.json").read_text())
    files = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert manifest["files"].keys() == files - {"manifest.json"}
    shutil.copy(path / "state.json", path / "stranger.json")
    assert damage(path) == "stranger.json does not belong to it"
