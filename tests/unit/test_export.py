"""What cannot be exported is said before anything is read."""

import sys

import pytest

from grpo.errors import CheckpointError, ConfigError
from grpo.export import export_checkpoint, find_checkpoint, main
from grpo.launch import compose
from grpo.resume import write_config


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    """A run with two checkpoints, neither of them the best."""
    found = tmp_path / "outputs" / "DATE" / "TIME"
    for step in (1, 2):
        (found / "checkpoints" / f"checkpoint_{step:06d}").mkdir(parents=True)
    (found / "checkpoints" / "LATEST").write_text("checkpoint_000002\n")
    write_config(compose("grpo_arithmetic"), found)
    monkeypatch.chdir(tmp_path)
    return found


def test_a_checkpoint_is_found_by_its_name_or_by_what_names_it(run_dir):
    folder = run_dir / "checkpoints"
    assert (
        find_checkpoint(run_dir, "LATEST") == find_checkpoint(run_dir, "checkpoint_000002") == folder / "checkpoint_000002"
    )
    (folder / "BEST").write_text("checkpoint_000001\n")
    assert find_checkpoint(run_dir, "BEST") == folder / "checkpoint_000001"


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (
            ["run=outputs/DATE/TIME"],
            r"^checkpoint \(BEST\): outputs/DATE/TIME has none, since it was not evaluated on .* exports its newest$",
        ),
        ([], r"^there is no run with checkpoints/BEST under outputs/: train one"),
        (["checkpoint=7"], r"^there is no run with checkpoints/7"),
        (
            ["run=outputs/DATE/TIME", "checkpoint=7"],
            r"^checkpoint \(7\): there is no .*/checkpoints/7; there are LATEST, checkpoint_000001, checkpoint_000002$",
        ),
        (["run=nowhere"], r"^run \(nowhere\): there is no run there"),
        (["checkpoint=LATEST", "out=outputs"], r"^out \(outputs\) is there already: give another$"),
        (["checkpoint=LATEST", "out=a/b"], r"^out \(a/b\): there is no directory a$"),
        (["best"], r"^best: write key=value$"),
    ],
)
def test_what_is_typed_wrong_is_said_in_one_line(run_dir, monkeypatch, typed, message):
    monkeypatch.setattr(sys, "argv", ["grpo.export", *typed])
    with pytest.raises(ConfigError, match=message):
        main()


def test_a_run_without_a_whole_checkpoint_or_whose_best_was_set_aside_says_so(run_dir):
    folder = run_dir / "checkpoints"
    (folder / "BEST").write_text("checkpoint_000007\n")
    with pytest.raises(
        ConfigError, match=r"^checkpoint \(BEST\): there is no .*checkpoint_000007; there are BEST, LATEST, "
    ):
        find_checkpoint(run_dir, "BEST")
    for name, why in (("LATEST", "none is whole yet"), ("BEST", r".* or not yet \(train.eval_frequency\)")):
        (folder / name).unlink()
        with pytest.raises(ConfigError, match=rf"^checkpoint \({name}\): .*/DATE/TIME has none, since {why}$"):
            find_checkpoint(run_dir, name)


def test_one_that_the_run_removes_meanwhile_is_not_called_damaged(run_dir, monkeypatch):
    checkpoint = find_checkpoint(run_dir, "LATEST")

    def remove(path):
        path.rmdir()
        return "state.json is missing"

    monkeypatch.setattr("grpo.checkpoint.damage", remove)
    with pytest.raises(
        CheckpointError, match=r"checkpoint_000002 was removed by its run meanwhile: type the command again$"
    ):
        export_checkpoint(run_dir, checkpoint, run_dir / "latest")


def test_a_damaged_checkpoint_is_not_read_and_nothing_is_written(run_dir):
    checkpoint = find_checkpoint(run_dir, "LATEST")
    with pytest.raises(
        CheckpointError, match=r"checkpoint_000002 is damaged: manifest.json cannot be read: take another one"
    ):
        export_checkpoint(run_dir, checkpoint, run_dir / "latest")
    assert not (run_dir / "latest").exists()
