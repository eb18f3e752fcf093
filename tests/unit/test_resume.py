"""Which run goes on, and with which configuration."""

import errno
import fcntl
import os

import pytest
from hydra._internal.utils import get_args_parser

from grpo import launch
from grpo.config import RunConfig
from grpo.errors import ConfigError
from grpo.launch import compose, compose_unchecked
from grpo.resume import find_run, find_runs, locked, resumed_config, write_config
from grpo.session import claimed
from grpo.tool import find_run as find_run_of_a_tool


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


def resumed(run_dir, *overrides: str):
    """As launch calls it."""
    composed = compose_unchecked("grpo_arithmetic", overrides, RunConfig)
    return resumed_config(run_dir, [override.split("=")[0] for override in overrides], composed)


def test_a_run_goes_on_with_its_own_configuration(make_run):
    own = ["seed=5", "optimizer.lr=3e-5", "train_model.lora.target_modules=[q_proj,v_proj]", "optimizer.betas=[0.8,0.9]"]
    assert resumed(make_run("a", *own)) == config_of(*own)


def test_what_is_typed_comes_on_top(make_run):
    run_dir = make_run("a", "seed=5")
    config = resumed(run_dir, "train.total_dialog_turns=102400", "logging.wandb=true", f"resume={run_dir}")
    assert (config.train.total_dialog_turns, config.logging.wandb, config.seed) == (102400, True, 5)


def test_the_same_command_again_is_no_change(make_run):
    own = ["objective=grpo", "train_model.lora.target_modules=[q_proj,v_proj]", "optimizer.betas=[0.8,0.9]", "seed=3"]
    assert resumed(make_run("a", *own), *own) == config_of(*own)


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        ("seed=1", r"seed \(0 -> 1\)"),
        ("model.name=other/model", r"model.name \(builtin/arithmetic -> other/model\)"),
        ("model=qwen2_5_3b", r"model.name \(builtin/arithmetic -> Qwen/Qwen2.5-3B-Instruct\)"),
        ("env.dataset=gsm8k", "env.dataset"),
        ("train.optim_batch_size=256", "train.optim_batch_size"),
        ("optimizer.lr=1.0", "optimizer.lr"),
        ("train_model.lora.enabled=true", "train_model.lora.enabled"),
        ("optimizer.betas=[0.5,0.5]", "optimizer.betas"),
    ],
)
def test_a_change_that_matters_is_refused_by_name_unless_forced(make_run, override, shown):
    run_dir = make_run("a")
    with pytest.raises(ConfigError, match=rf"{shown}.*would make another run of it: .*resume_force=true"):
        resumed(run_dir, override)
    forced = resumed(run_dir, override, "resume_force=true")
    assert forced == config_of(override, "resume_force=true")


@pytest.mark.parametrize(
    "override", ["train_model.num_devices=2", "inference_model.num_devices=2", "train.checkpoint_frequency=7"]
)
def test_how_a_run_is_spread_and_saved_may_change(make_run, override):
    assert resumed(make_run("a"), override) == config_of(override)


@pytest.fixture
def typed_again(monkeypatch):
    """What a script goes on with that is given `resume=DIR` and `overrides`; its default configuration is another task's."""
    monkeypatch.setattr(launch, "_plan", lambda config, mode: None)

    def check(run_dir, *overrides: str, mode: str = "sync"):
        arguments = get_args_parser().parse_args([f"resume={run_dir}", *overrides])
        config, found = launch._check(arguments, mode, "grpo_gsm8k")
        assert found == run_dir
        return config

    return check


@pytest.mark.parametrize(
    ("own", "override"),
    [
        (["inference_model.num_devices=4"], "ray.min_engines=2"),
        (["train_model.lora.enabled=true"], "ref_model.num_devices=0"),
        ([], "train.max_tokens_per_micro_batch=1024"),  # too few for the prompts of the default configuration
        (
            ["train.dialog_turns_per_batch=384", "train.optim_batch_size=384", "train.total_dialog_turns=3840"],
            "train.total_dialog_turns=57600",  # no multiple of its 512
        ),
    ],
)
def test_what_is_typed_must_go_with_what_the_run_has_and_not_with_the_defaults(make_run, typed_again, own, override):
    run_dir = make_run("a", *own)
    assert typed_again(run_dir, override) == config_of(*own, override, f"resume={run_dir}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ray.min_engines=2", r"ray.min_engines \(2\) must be at most inference_model.num_devices \(1\)"),
        ("ray.max_restarts=-1", r"ray.max_restarts \(-1\) must be at least 0"),
        ("ray.max_restarts=many", "ray.max_restarts: .*'many'"),
        ("ray.min_engine=2", "unknown key ray.min_engine"),
        ("objective=dr_grpo", r"resume \(.*\): .*objective.aggregation \(response -> constant\).* another run of it"),
        ("mode=asink", r"mode \(asink\) must be one of sync, async, offline"),
        ("mode=async", r"mode \(async\) must be sync for grpo_sync.py: use grpo_async.py"),
    ],
)
def test_what_is_typed_for_a_run_is_checked_with_it(make_run, typed_again, override, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        typed_again(make_run("a"), override)


def test_a_configuration_that_cannot_be_read_is_said_so(make_run):
    run_dir = make_run("a")
    (run_dir / "config.yaml").write_text("train: {epochs: [")
    with pytest.raises(ConfigError, match=r"config.yaml cannot be read"):
        resumed(run_dir)


def test_a_run_directory_belongs_to_one_process(make_run):
    run_dir = make_run("a")
    with locked(run_dir):
        with pytest.raises(ConfigError, match="another process is training there"), locked(run_dir):
            pass
        assert find_run("auto", None, run_dir.parents[1], config_of()) is None
    assert find_run("auto", None, run_dir.parents[1], config_of()) == run_dir


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said_in_one_line(make_run, tmp_path, monkeypatch, number):
    def flock(file, operation) -> None:
        raise OSError(number, os.strerror(number))

    run_dir = make_run("a")
    monkeypatch.setattr(fcntl, "flock", flock)
    message = (
        rf"^{run_dir}: its file system has no locks \({os.strerror(number)}\), .*: mount it with flock, or type another"
    )
    with pytest.raises(ConfigError, match=message), locked(run_dir):
        pass
    with pytest.raises(ConfigError, match=message):
        find_run("auto", None, tmp_path / "outputs", config_of())


def test_a_run_that_has_ended_and_whose_checkpoints_are_gone_is_left_as_it_is(make_run):
    run_dir = make_run("a", ended=True)
    with (
        pytest.raises(
            ConfigError, match=r"^resume \(.*\): the run has ended and its checkpoints are gone: start a new one$"
        ),
        claimed(run_dir, str(run_dir)),
    ):
        pass


def test_a_run_that_has_no_checkpoint_yet_starts_from_step_0_and_says_so(make_run, tmp_path, capsys):
    run_dir = make_run("a")
    with claimed(run_dir, str(run_dir)) as checkpoint:
        assert checkpoint is None
    assert capsys.readouterr().out == f"resume ({run_dir}): there is no checkpoint: it starts from step 0\n"
    with claimed(tmp_path, "auto") as checkpoint:  # a new run
        assert checkpoint is None
    assert capsys.readouterr().out == ""


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


@pytest.mark.parametrize("written", ["train: {epoch: 2}", "train: {epochs: [", "train: {epochs: 0}"])
def test_auto_passes_over_a_run_whose_configuration_cannot_be_read_and_says_so(make_run, tmp_path, capsys, written):
    readable = make_run("a", age_s=50)
    (unreadable := make_run("b") / "config.yaml").write_text(written)
    assert find_run("auto", None, tmp_path / "outputs", config_of()) == readable
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"resume (auto): passed over {unreadable.parent}, which did not end: ")


def test_auto_takes_the_run_directory_that_was_typed(make_run, tmp_path):
    run_dir = make_run("a")
    make_run("b")
    assert find_run("auto", str(run_dir), tmp_path / "outputs", config_of()) == run_dir
    assert find_run("auto", str(tmp_path / "new"), tmp_path / "outputs", config_of()) is None


def test_a_run_whose_directory_was_typed_is_found_and_hydras_own_copy_of_its_configuration_is_none(
    make_run, tmp_path, monkeypatch
):
    older = make_run("a", age_s=50)
    named = tmp_path / "outputs" / "mine"
    for folder in (named, named / ".hydra", older / ".hydra", tmp_path / "outputs" / ".kept" / "b"):
        folder.mkdir(parents=True)
        write_config(config_of(), folder)
    assert sorted(find_runs(tmp_path / "outputs")) == [older, named]
    assert find_run("auto", None, tmp_path / "outputs", config_of()) == named
    (older / "model").mkdir()
    (named / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_run_of_a_tool(None, "model").name == "mine"
