"""Actors that are killed, stopped, or dead at every start: runs go on by themselves, or say why they cannot."""

import os
import signal
import sys
from pathlib import Path
from signal import SIGKILL, SIGSTOP

import psutil
import pytest

import grpo_async
import grpo_sync
import grpo_utils
from grpo.checkpoint import newest
from grpo.errors import ActorError
from grpo.inference import InferenceActor
from grpo.launch import compose
from grpo.leftovers import identity

from .conftest import SMALL, Finished, same_weights
from .faults import Fault, Faults
from .test_async import ASYNC, each_group_once
from .test_resume import STEPS, TRANSFORMERS, Process, check_same

HEARTBEAT = "ray.heartbeat_timeout_s=2"
DYING = "GRPO_TEST_DYING"  # names the file at whose presence DyingEngine dies


def test_a_synchronous_run_whose_actors_die_and_hang_ends_in_the_same_weights(run_sync, tmp_path, monkeypatch):
    expected = run_sync(*STEPS, TRANSFORMERS)
    faults = Faults(
        [
            Fault("generate", 2, "inference", SIGKILL),
            Fault("train", 7, "training", SIGSTOP),
            Fault("grade", 4, "grading", SIGKILL),
            Fault("reference", 4, "reference", SIGSTOP),
        ]
    )
    faults.install(monkeypatch)
    grpo_sync.main(compose("grpo_arithmetic", [*SMALL, *STEPS, TRANSFORMERS, HEARTBEAT]), tmp_path)
    run = Finished(tmp_path)
    check_same(run, expected)
    assert {role: run.summary["restarts"][role] for role in ("inference", "training", "reference")} == {
        "inference": 1,
        "training": 1,
        "reference": 1,
    }
    assert all(fault.struck_s is not None for fault in faults.faults)


def test_an_asynchronous_run_whose_actors_die_and_hang_trains_on_each_prompt_once(tmp_path, monkeypatch, model_path):
    faults = Faults(
        [
            Fault("train", 2, "inference", SIGSTOP),
            Fault("push", 3, "collector", SIGKILL),
            Fault("wait", 5, "replay buffer", SIGSTOP),
            Fault("save", 2, "training", SIGKILL),
        ]
    )
    faults.install(monkeypatch)
    settings = [TRANSFORMERS, HEARTBEAT, "train.max_staleness=2", "train.checkpoint_frequency=2"]
    grpo_async.main(compose("grpo_arithmetic", [*SMALL, *ASYNC, *settings]), tmp_path)
    run = Finished(tmp_path)
    assert [row["step"] for row in run.metrics] == list(range(1, 9))
    assert each_group_once(run, 64)
    for line in run.rollouts:
        version = run.metrics[line["step"] - 1]["policy_version"]
        assert 0 <= version - min(line["token_versions"]) <= 2
    assert run.summary["samples_trained"] == 512
    assert run.summary["restarts"] == {"inference": 1, "collector": 1, "replay buffer": 1, "training": 1}


class DyingEngine(InferenceActor):
    """Dies at every start once a file is there."""

    async def start(self) -> int:
        if os.path.exists(os.environ[DYING]):
            print("no such luck", file=sys.stderr, flush=True)
            os.kill(os.getpid(), SIGKILL)
        return await super().start()


def test_an_actor_that_dies_at_every_start_ends_the_run_with_its_last_words(tmp_path, monkeypatch, model_path):
    run_dir, dying = tmp_path / "run", tmp_path / "dying"
    run_dir.mkdir()
    monkeypatch.setenv(DYING, str(dying))
    monkeypatch.setattr(grpo_utils, "InferenceActor", DyingEngine)
    Faults([Fault("push", 2, "inference", SIGKILL)]).install(monkeypatch)
    push = grpo_utils.WeightPush.__call__

    def push_and_doom(its, version: int) -> None:
        if version == 2:
            dying.touch()
        push(its, version)

    monkeypatch.setattr(grpo_utils.WeightPush, "__call__", push_and_doom)
    settings = [TRANSFORMERS, "train.checkpoint_frequency=1", "ray.max_restarts=1"]
    with pytest.raises(ActorError) as raised:
        grpo_sync.main(compose("grpo_arithmetic", [*SMALL, *settings]), run_dir)
    said = str(raised.value)
    assert said.startswith("the inference actor died while starting: ") and "\n" not in said
    assert "no such luck" in said
    assert (
        "it was started again 1 times, as often as ray.max_restarts allows; checkpoint_000001 is whole: go on with" in said
    )
    assert newest(run_dir).path.name == "checkpoint_000001"


def listening(process: psutil.Process) -> set[str]:
    """The addresses that the processes of a run listen to."""
    family = [process, *process.children(recursive=True)]
    return {c.laddr.ip for one in family for c in one.net_connections("inet") if c.status == psutil.CONN_LISTEN}


def test_two_runs_do_not_disturb_each_other_and_clean_up_behind_a_killed_one(run_sync, tmp_path, model_path):
    one_collection = [TRANSFORMERS, "train.total_dialog_turns=64", "train.eval_frequency=0"]
    runs = {}
    for name in ("killed", "first", "second"):
        (tmp_path / name).mkdir()
    killed = Process(tmp_path / "killed" / "run", *one_collection)
    assert killed.wait_for("train", 1), (tmp_path / "killed" / "stderr").read_text()
    (engine,) = [child for child in killed.children if child.name().startswith("ray::Inference")]
    segment = Path("/dev/shm") / f"grpo-{identity(killed.process.pid)}-weights-test"
    segment.touch()
    engine.send_signal(signal.SIGSTOP)
    killed.process.kill()
    killed.end()
    assert engine.is_running()
    for name in ("first", "second"):
        runs[name] = Process(tmp_path / name / "run", *one_collection)
    for name, run in runs.items():
        assert run.wait_for("train", 2), (tmp_path / name / "stderr").read_text()
        addresses = listening(psutil.Process(run.process.pid))
        assert addresses and addresses <= {"127.0.0.1", "::1"}
    assert not psutil.pid_exists(engine.pid) or engine.status() == psutil.STATUS_ZOMBIE
    assert not segment.exists()
    for name, run in runs.items():
        assert run.end() == 0, (tmp_path / name / "stderr").read_text()
        assert not run.left()
    expected = run_sync(*STEPS, *one_collection)
    for name in runs:
        assert same_weights(Finished(tmp_path / name / "run"), expected)
