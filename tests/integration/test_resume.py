"""Runs that are killed, asked to end, or out of disk, and go on: to the same weights, bit for bit."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from grpo.checkpoint import newest

from .announced import HELD
from .conftest import SMALL, Finished, same_weights, vllm_on_cpu

ROOT = Path(__file__).parents[2]
# 3 collections of 4 optimiser steps, in two epochs; a checkpoint every third step is mostly amid a collection.
STEPS = ["train.optim_batch_size=32", "train.epochs=2", "train.checkpoint_frequency=3", "train.eval_frequency=4"]
RANKS = "train_model.num_devices=2"
LORA = ["train_model.lora.enabled=true", "train_model.lora.dropout=0.1", "ref_model.num_devices=0"]
TRANSFORMERS = "inference_model.backend=transformers"
PREEMPTED = 75


class Process:
    """grpo_sync as a user starts it, announcing its phases."""

    def __init__(self, run_dir: Path, *overrides: str, errors: Path | None = None, held: str = "") -> None:
        """Its stderr goes to `errors`, by default next to the run directory. `held`: the phase that it waits in for end()"""
        first = not (run_dir / "config.yaml").is_file()
        if first:
            arguments = ["--config-name", "grpo_arithmetic", *SMALL, *STEPS, f"hydra.run.dir={run_dir}", *overrides]
        else:
            arguments = [f"resume={run_dir}", *overrides]
        self.errors = open(errors or run_dir.parent / "stderr", "a+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.announced", *arguments],
            cwd=ROOT,
            env=os.environ | {HELD: held},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            start_new_session=True,
        )
        self.children: list[psutil.Process] = []

    def wait_for(self, phase: str, occurrence: int) -> bool:
        """Wait until it is about to do `phase` for the given time; whether it came to that."""
        for line in self.process.stdout:
            if line.strip() == phase:
                occurrence -= 1
                if occurrence == 0:
                    self.children = psutil.Process(self.process.pid).children(recursive=True)
                    return True
        return False

    def end(self) -> int:
        """Wait for its end; returns its exit code."""
        self.process.stdin.close()
        self.process.stdout.read()
        code = self.process.wait(300)
        self.errors.close()
        return code

    def left(self) -> list[psutil.Process]:
        """Of the processes that were there in the phase, those that still run 5 s after its end."""
        _, alive = psutil.wait_procs(self.children, timeout=5)
        return alive


def comparable(lines: list[dict]) -> list[dict]:
    """Metrics without what another machine, or another day, would change."""
    return [{k: v for k, v in line.items() if not k.startswith("time")} for line in lines]


def check_same(run: Finished, expected: Finished) -> None:
    assert same_weights(run, expected)
    assert [line["step"] for line in run.metrics] == list(range(1, 13))
    assert comparable(run.metrics) == comparable(expected.metrics)
    assert run.rollouts == expected.rollouts
    for key in ("eval", "steps", "samples_trained", "policy_version"):
        assert run.summary[key] == expected.summary[key]


def killed_and_resumed(tmp_path: Path, kills: list[tuple[str, int]], overrides: list[str]) -> tuple[Finished, list[str]]:
    """The run in the end, and what happened on the way."""
    run_dir, story = tmp_path / "run", []
    for phase, occurrence in kills:
        process = Process(run_dir, *(overrides if not story else []))
        assert process.wait_for(phase, occurrence), (run_dir.parent / "stderr").read_text()
        delay = random.uniform(0, 0.3)
        time.sleep(delay)
        process.process.send_signal(signal.SIGKILL)
        process.end()
        left = process.left()  # Ray's own agents see only after a while that their raylet is gone
        assert not any("Actor" in child.name() for child in left if child.is_running())
        for child in left:
            child.kill()
        found = newest(run_dir)
        story.append(f"killed {delay:.3f} s into {phase} {occurrence}, whole: {found and found.path.name}")
    process = Process(run_dir)
    assert process.end() == 0, (run_dir.parent / "stderr").read_text()
    return Finished(run_dir), story


def test_a_run_that_is_killed_three_times_ends_in_the_same_weights(run_sync, tmp_path):
    random.seed(0)
    kills = [("train", 4), ("complete", 1), ("push", 1)]
    run, story = killed_and_resumed(tmp_path, kills, [TRANSFORMERS])
    check_same(run, run_sync(*STEPS, TRANSFORMERS))
    print(*story, sep="\n")


PHASES = ["generate", "train", "push", "evaluate", "save", "complete"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["inference_model.backend=vllm"], marks=vllm_on_cpu),
        [TRANSFORMERS, RANKS],
        [TRANSFORMERS, *LORA],
        [TRANSFORMERS, RANKS, *LORA],
    ],
    ids=["one rank", "two ranks", "one rank, LoRA", "two ranks, LoRA"],
)
def test_kills_at_random_moments(run_sync, tmp_path, overrides):
    """Twelve over the four; the story goes to benchmarks/results/kills.json."""
    seed = len(overrides)
    random.seed(seed)
    phases = random.sample(PHASES, 3)
    kills = [(phase, 1) for phase in sorted(phases, key=lambda phase: phase != "generate")]  # later there may be none
    run, story = killed_and_resumed(tmp_path, kills, overrides)
    check_same(run, run_sync(*STEPS, *overrides))
    path = ROOT / "benchmarks" / "results" / "kills.json"
    told = json.loads(path.read_text()) if path.is_file() else {}
    told[" ".join(overrides)] = [*story, "ended in the weights, metrics and rollouts of the run that was never killed"]
    path.write_text(json.dumps(told, indent=1) + "\n")


ASKED = [("evaluate", 1), ("generate", 1), ("reference", 1), ("train", 3), ("push", 1), ("evaluate", 1), ("complete", 1)]


@pytest.mark.parametrize(
    "asked", [ASKED[2:4], pytest.param(ASKED, marks=pytest.mark.slow)], ids=["two phases", "each phase"]
)
def test_a_run_that_is_asked_to_end_goes_on_exactly(run_sync, tmp_path, asked):
    run_dir = tmp_path / "run"
    for phase, occurrence in asked:
        process = Process(run_dir, *([] if run_dir.exists() else [TRANSFORMERS]))
        assert process.wait_for(phase, occurrence), (tmp_path / "stderr").read_text()
        process.process.send_signal(signal.SIGTERM)
        assert process.end() == PREEMPTED, (tmp_path / "stderr").read_text()
        assert "Traceback" not in (tmp_path / "stderr").read_text()
        said = (tmp_path / "stderr").read_text().splitlines()[-1]
        assert said.startswith("Ended by SIGTERM after saving checkpoint_") and f"resume={run_dir}" in said
        assert not process.left()
        assert newest(run_dir).path.name in said
    assert Process(run_dir).end() == 0, (tmp_path / "stderr").read_text()
    check_same(Finished(run_dir), run_sync(*STEPS, TRANSFORMERS))


@pytest.mark.slow
def test_a_collection_that_runs_beside_training_is_not_sampled_again(run_sync, tmp_path):
    beside = ["train.sync_iter=false", TRANSFORMERS]
    run_dir = tmp_path / "run"
    process = Process(run_dir, *beside)
    assert process.wait_for("train", 6)
    process.process.send_signal(signal.SIGUSR1)
    assert process.end() == PREEMPTED, (tmp_path / "stderr").read_text()
    assert newest(run_dir).collection("ahead") is not None
    assert Process(run_dir).end() == 0, (tmp_path / "stderr").read_text()
    run, expected = Finished(run_dir), run_sync(*STEPS, *beside)
    assert same_weights(run, expected)
    assert comparable(run.metrics) == comparable(expected.metrics)


@pytest.mark.slow
def test_a_second_signal_ends_at_once_and_no_other_process_takes_the_directory(tmp_path):
    run_dir = tmp_path / "run"
    process = Process(run_dir, TRANSFORMERS)
    assert process.wait_for("train", 5)
    process.process.send_signal(signal.SIGSTOP)
    refused = subprocess.run(
        [sys.executable, "grpo_sync.py", f"resume={run_dir}"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert refused.returncode == 1
    assert "another process is training there" in refused.stderr and "Traceback" not in refused.stderr
    process.process.send_signal(signal.SIGTERM)  # both are there when it goes on
    process.process.send_signal(signal.SIGUSR1)
    process.process.send_signal(signal.SIGCONT)
    assert process.end() == 130
    assert not process.left()
    assert newest(run_dir).path.name == "checkpoint_000003"


@pytest.mark.slow
def test_two_ranks_go_on_as_one(tmp_path):
    run_dir = tmp_path / "run"
    process = Process(run_dir, TRANSFORMERS, RANKS)
    assert process.wait_for("train", 6)
    process.process.send_signal(signal.SIGTERM)
    assert process.end() == PREEMPTED
    assert Process(run_dir, "train_model.num_devices=1").end() == 0, (tmp_path / "stderr").read_text()
    assert [line["step"] for line in Finished(run_dir).metrics] == list(range(1, 13))


@pytest.mark.slow
def test_the_clock_ends_a_run_as_a_signal_does(tmp_path):
    run_dir = tmp_path / "run"
    process = Process(run_dir, TRANSFORMERS, "train.max_wall_time=1")
    assert process.end() == PREEMPTED
    assert "Ended by train.max_wall_time after saving checkpoint_" in (tmp_path / "stderr").read_text()
    assert newest(run_dir) is not None


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_ends_in_one_line_and_the_checkpoint_before_it_resumes(run_sync, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=11m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        run_dir, errors = disk / "run", tmp_path / "stderr"
        assert Process(run_dir, TRANSFORMERS, "train.eval_frequency=0", errors=errors).end() == 1
        assert "Traceback" not in errors.read_text()
        said = errors.read_text().splitlines()[-1]
        assert said.startswith("Error: ") and "could not be written to" in said and "No space left on device" in said
        assert f"{newest(run_dir).path.name} is whole: free space there, then go on with resume={run_dir}" in said
        subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
        assert Process(run_dir, errors=errors).end() == 0, errors.read_text()
        assert same_weights(Finished(run_dir), run_sync(*STEPS, TRANSFORMERS))
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_what_cannot_go_on_is_said_before_anything_starts(tmp_path, run_sync):
    ended = tmp_path / "run"
    shutil.copytree(run_sync(*STEPS, TRANSFORMERS).run_dir, ended)
    for overrides, expected in [
        ([f"resume={ended}"], "the run has ended with its step 12: raise train.total_dialog_turns"),
        ([f"resume={ended}", "seed=1"], "seed (0 -> 1) would make another run of it"),
        ([f"resume={tmp_path}"], "there is no run there"),
    ]:
        refused = subprocess.run(
            [sys.executable, "grpo_sync.py", *overrides], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert refused.returncode == 1
        assert expected in refused.stderr and len(refused.stderr.splitlines()) == 1
