"""Actors that are killed, stopped, or dead at every start: runs go on by themselves, or say why they cannot."""

import json
import os
import random
import signal
import statistics
import sys
from pathlib import Path
from signal import SIGKILL, SIGSTOP

import psutil
import pytest

import grpo_async
import grpo_sync
import grpo_utils
from benchmarks.machine import describe
from grpo.checkpoint import newest
from grpo.errors import ActorError
from grpo.inference import InferenceActor
from grpo.launch import compose
from grpo.leftovers import identity

from .conftest import SMALL, Finished, same_weights
from .faults import ROLES, Fault, Faults, is_loopback, listening
from .test_async import ASYNC, each_group_once
from .test_resume import ROOT, STEPS, TRANSFORMERS, Process, check_same

HEARTBEAT = "ray.heartbeat_timeout_s=2"
START = "ray.start_timeout_s=60"  # within which an actor that is stopped before its first heartbeat is found out
DYING = "GRPO_TEST_DYING"  # names the file at whose presence InferenceDying dies


# How often a run comes to a phase, at least.
MOMENTS = {
    "sync": {"generate": 3, "grade": 5, "reference": 3, "train": 12, "push": 3, "evaluate": 4, "save": 4},
    "async": {"wait": 8, "train": 8, "push": 8, "evaluate": 2, "save": 3},
}


def run_sync_disturbed(run_dir: Path) -> Finished:
    grpo_sync.main(compose("grpo_arithmetic", [*SMALL, *STEPS, TRANSFORMERS, HEARTBEAT, START]), run_dir)
    return Finished(run_dir)


def run_async_disturbed(run_dir: Path) -> Finished:
    settings = [TRANSFORMERS, HEARTBEAT, START, "train.max_staleness=2", "train.checkpoint_frequency=2"]
    grpo_async.main(compose("grpo_arithmetic", [*SMALL, *ASYNC, *settings]), run_dir)
    return Finished(run_dir)


def check_each_trained_once(run: Finished) -> None:
    """Every prompt in one step, none of them too old, and each step in the metrics once."""
    assert [row["step"] for row in run.metrics] == list(range(1, 9))
    assert each_group_once(run, 64)
    for line in run.rollouts:
        version = run.metrics[line["step"] - 1]["policy_version"]
        assert 0 <= version - min(line["token_versions"]) <= 2
    assert run.summary["samples_trained"] == 512


def check_recovered(run: Finished, faults: list[Fault]) -> None:
    """All struck, none was waited for until ray.timeout_s, and no grader was replaced that nothing had happened to."""
    ray = compose("grpo_arithmetic", [HEARTBEAT, START]).ray
    # Until it is found out, and until all actors are up again; twice, for one that is struck while that goes on.
    most_s = 2 * (ray.heartbeat_timeout_s + ray.start_timeout_s)
    assert most_s < ray.timeout_s
    assert all(fault.struck_s is not None for fault in faults)
    assert max((fault.recovery_s for fault in faults if fault.recovery_s is not None), default=0.0) <= most_s
    # Whether a grading process had something to do just then is chance.
    assert run.summary["restarts"].get("grading", 0) <= sum(fault.role == "grading" for fault in faults)


def test_a_synchronous_run_whose_actors_die_and_hang_ends_in_the_same_weights(run_sync, tmp_path, monkeypatch):
    expected = run_sync(*STEPS, TRANSFORMERS)
    faults = Faults(
        [
            Fault("generate", 2, "inference", SIGKILL),
            Fault("reference", 2, "reference", SIGSTOP),  # before the last collection, which cannot do without it
            Fault("grade", 4, "grading", SIGKILL),
            Fault("train", 11, "training", SIGSTOP),
        ]
    )
    faults.install(monkeypatch)
    run = run_sync_disturbed(tmp_path)
    check_same(run, expected)
    check_recovered(run, faults.faults)
    assert run.summary["restarts"] | {"grading": 1} == {"inference": 1, "training": 1, "reference": 1, "grading": 1}


def test_an_asynchronous_run_whose_actors_die_and_hang_trains_on_each_prompt_once(tmp_path, monkeypatch, model_path):
    faults = Faults(
        [
            Fault("train", 2, "inference", SIGSTOP),
            Fault("push", 3, "collector", SIGKILL),
            Fault("wait", 4, "replay buffer", SIGSTOP),
            Fault("train", 7, "training", SIGKILL),
        ]
    )
    faults.install(monkeypatch)
    run = run_async_disturbed(tmp_path)
    check_each_trained_once(run)
    check_recovered(run, faults.faults)
    assert run.summary["restarts"] == {"inference": 1, "collector": 1, "replay buffer": 1, "training": 1}


class InferenceDying(InferenceActor):
    """Dies at every start once a file is there. (Its name is how its process is found.)"""

    async def start(self) -> int:
        if os.path.exists(os.environ[DYING]):
            print("no such luck", file=sys.stderr, flush=True)
            os.kill(os.getpid(), SIGKILL)
        return await super().start()


def test_an_actor_that_dies_at_every_start_ends_the_run_with_its_last_words(tmp_path, monkeypatch, model_path):
    run_dir, dying = tmp_path / "run", tmp_path / "dying"
    run_dir.mkdir()
    monkeypatch.setenv(DYING, str(dying))
    monkeypatch.setattr(grpo_utils, "InferenceActor", InferenceDying)
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
    whole = newest(run_dir).path.name  # of step 1, or of a later one where the kill took its time
    assert f"it was started again once, as often as ray.max_restarts allows; {whole} is whole: go on with" in said


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
        runs[name] = Process(tmp_path / name / "run", *one_collection, held="evaluate")
    for name, run in runs.items():
        assert run.wait_for("evaluate", 1), (tmp_path / name / "stderr").read_text()
        addresses = listening(psutil.Process(run.process.pid))
        assert addresses and all(map(is_loopback, addresses))
    assert not psutil.pid_exists(engine.pid) or engine.status() == psutil.STATUS_ZOMBIE
    assert not segment.exists()
    for name, run in runs.items():
        assert run.end() == 0, (tmp_path / name / "stderr").read_text()
        assert not run.left()
    expected = run_sync(*STEPS, *one_collection)
    for name in runs:
        assert same_weights(Finished(tmp_path / name / "run"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_run_goes_on_without_an_engine_that_is_gone_for_good(tmp_path, monkeypatch, model_path, capsys, mode):
    fault = Fault({"sync": "generate", "async": "train"}[mode], 3, "inference", SIGKILL)
    Faults([fault]).install(monkeypatch)
    least = ["inference_model.num_devices=2", "ray.min_engines=1", "ray.max_restarts=0"]
    if mode == "sync":
        settings = [*SMALL, *STEPS, TRANSFORMERS, *least]
        grpo_sync.main(compose("grpo_arithmetic", settings), tmp_path)
    else:
        settings = [*SMALL, *ASYNC, TRANSFORMERS, "train.max_staleness=2", *least]
        grpo_async.main(compose("grpo_arithmetic", settings), tmp_path)
    assert fault.struck_s is not None
    assert "the run goes on with the others (ray.min_engines)" in capsys.readouterr().err
    run = Finished(tmp_path)
    if mode == "async":
        check_each_trained_once(run)
    samples = {"sync": 384, "async": 512}[mode]  # two epochs in one, one in the other
    assert run.summary["samples_trained"] == samples and len(run.rollouts) in (192, 512)
    assert run.summary["restarts"] == {}


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("seed", range(5))
def test_six_faults_at_random_moments(run_sync, tmp_path, monkeypatch, model_path, mode, seed):
    """Sixty over the ten; recovery times by kind go to benchmarks/results/recovery.json."""
    rng, moments = (
        random.Random(f"{mode} {seed}"),
        [(phase, i + 1) for phase, most in MOMENTS[mode].items() for i in range(most)],
    )
    roles = rng.sample(ROLES[mode], len(ROLES[mode]))
    faults = Faults(
        [
            Fault(*moment, roles[i % len(roles)], (SIGKILL, SIGSTOP)[(i + seed) % 2])
            for i, moment in enumerate(rng.sample(moments, 6))
        ],
        rng,
    )
    expected = run_sync(*STEPS, TRANSFORMERS) if mode == "sync" else None
    faults.install(monkeypatch)
    run = (run_sync_disturbed if mode == "sync" else run_async_disturbed)(tmp_path)
    if mode == "sync":
        check_same(run, expected)
    else:
        check_each_trained_once(run)
    check_recovered(run, faults.faults)
    record(mode, seed, faults.faults, run)


def record(mode: str, seed: int, struck: list[Fault], run: Finished) -> None:
    """Add a run's faults to benchmarks/results/recovery.json, which a table of their times by kind is made from."""
    path = ROOT / "benchmarks" / "results" / "recovery.json"
    told = json.loads(path.read_text()) if path.is_file() else {"runs": {}}
    told["runs"][f"{mode} {seed}"] = {
        "faults": [
            {
                "role": fault.role,
                "signal": fault.signal.name,
                "phase": fault.phase,
                "recovery_s": None if fault.recovery_s is None else round(fault.recovery_s, 1),
            }
            for fault in struck
        ],
        "restarts": run.summary["restarts"],
    }
    times: dict[str, list[float]] = {}
    for name, its in told["runs"].items():
        for fault in its["faults"]:
            if fault["recovery_s"] is not None:
                times.setdefault(f"{name.split()[0]} {fault['role']} {fault['signal']}", []).append(fault["recovery_s"])
    told["recovery_s"] = {
        kind: {"faults": len(its), "median": round(statistics.median(its), 1), "longest": max(its)}
        for kind, its in sorted(times.items())
    }
    told["machine"] = describe()
    path.write_text(json.dumps(told, indent=1) + "\n")
