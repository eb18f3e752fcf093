"""Which run goes on, and with which configuration."""

import os

import pytest

from grpo.errors import ConfigError
from grpo.launch import compose
from grpo.resume import find_run, resumed_config, write_config


def config_of(*overrides: str):
    return compose("grpo_arithmetic", list(overrides))


@pytest.fixture
def make_run(tmp_path):
    """A run directory outputs/DATE/TIME with this configuration."""

    def make(name: str, *overrides: str, ended: bool = False, age_s: float = 0.0):
        run_dir = tmp_path / "outputs" / "2026-01-01" / name
        run_dir.mkdir(parents=True)
        write_config(config_of(*overrides), run_dir)
        if ended:
            (run_dir / "summary.json").write_text("{}")
        written = (run_dir / "config.yaml").stat().st_mtime - age_s
        os.utime(run_dir / "config.yaml", (written, written))
        return run_dir

    return make


def test_a_run_goes_on_with_its_own_configuration(make_run):
    run_dir = make_run(
        "a", "seed=5", "optimizer.lr=3e-5", "train_model.lora.target_modules=[q_proj,v_proj]", "objective=grpo"
    )
    assert resumed_config(run_dir, []) == config_of(
        "seed=5", "optimizer.lr=3e-5", "train_model.lora.target_modules=[q_proj,v_proj]"
    )


def test_what_is_typed_comes_on_top(make_run):
    run_dir = make_run("a", "seed=5")
    config = resumed_config(
        run_dir, [("train.total_dialog_turns", 102400), ("logging.wandb", True), ("resume", str(run_dir))]
    )
    assert (config.train.total_dialog_turns, config.logging.wandb, config.seed) == (102400, True, 5)


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("seed", 1, r"seed \(0 -> 1\)"),
        ("model.name", "other/model", r"model.name \(builtin/arithmetic -> other/model\)"),
        ("env.dataset", "gsm8k", "env.dataset"),
        ("train.dialog_turns_per_batch", 1024, "train.dialog_turns_per_batch"),
        ("optimizer.lr", 1.0, "optimizer.lr"),
        ("train_model.lora.enabled", True, "train_model.lora.enabled"),
    ],
)
def test_a_change_that_matters_is_refused_by_name_unless_forced(make_run, key, value, shown):
    run_dir = make_run("a")
    typed = [(key, value)] + [("train.buffer_size", value)] * (key == "train.dialog_turns_per_batch")
    with pytest.raises(ConfigError, match=rf"{shown}.*would make another run of it: .*resume_force=true"):
        resumed_config(run_dir, typed)
    forced = resumed_config(run_dir, [*typed, ("resume_force", True)])
    for name in key.split("."):
        forced = getattr(forced, name)
    assert forced == value


@pytest.mark.parametrize(
    ("key", "value"), [("train_model.num_devices", 2), ("inference_model.num_devices", 2), ("train.checkpoint_frequency", 7)]
)
def test_how_a_run_is_spread_and_saved_may_change(make_run, key, value):
    resumed_config(make_run("a"), [(key, value)])


def test_wrong_values_and_whole_groups_are_refused(make_run):
    run_dir = make_run("a")
    with pytest.raises(ConfigError, match=r"optimizer.lr \(-1.0\) must be above 0"):
        resumed_config(run_dir, [("optimizer.lr", -1.0)])
    with pytest.raises(ConfigError, match="objective: a run that goes on keeps its own"):
        resumed_config(run_dir, [("objective", "grpo")])


def test_a_directory_without_a_run_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"resume \(nowhere\): there is no run there"):
        find_run("nowhere", None, tmp_path, None)


def test_auto_takes_the_newest_run_of_this_configuration_that_did_not_end(make_run, tmp_path):
    outputs = tmp_path / "outputs"
    assert find_run("auto", None, outputs, config_of()) is None
    older = make_run("a", age_s=100)
    newer = make_run("b", age_s=50)
    make_run("c", "seed=1", age_s=20)
    make_run("d", ended=True)
    assert find_run("auto", None, outputs, config_of()) == newer
    (newer / "summary.json").write_text("{}")
    assert find_run("auto", None, outputs, config_of("train.checkpoint_frequency=3")) == older
    assert find_run("auto", None, outputs, config_of("optimizer.lr=0.5")) is None


def test_auto_takes_the_run_directory_that_was_typed(make_run, tmp_path):
    run_dir = make_run("a")
    make_run("b")
    assert find_run("auto", str(run_dir), tmp_path / "outputs", config_of()) == run_dir
    assert find_run("auto", str(tmp_path / "new"), tmp_path / "outputs", config_of()) is None
