"""python -m grpo.evaluate on a finished run, as a user types it, and its engine when that fails."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from grpo.errors import ActorError
from grpo.inference import EngineSpec, Sampling
from grpo.standalone import Part, sample

from .conftest import Finished

ROOT = Path(__file__).parents[2]
TRANSFORMERS = "inference_model.backend=transformers"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "grpo.evaluate", *arguments]


def evaluate(run: Finished, *arguments: str) -> tuple[dict, subprocess.CompletedProcess]:
    """What it wrote, and how it ended."""
    (run.run_dir / "comparison.json").unlink(missing_ok=True)
    ended = subprocess.run(command(f"run={run.run_dir}", *arguments), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return json.loads((run.run_dir / "comparison.json").read_text()), ended


@pytest.mark.parametrize("backend", ["transformers", pytest.param("vllm", marks=pytest.mark.slow)])
def test_before_and_after_are_those_that_the_run_measured(run_sync, backend):
    run = run_sync(f"inference_model.backend={backend}")
    found, ended = evaluate(run, "k=4")
    for name in ("before", "after"):
        assert {key: found[name][key] for key in ("accuracy", "n")} == run.summary["eval"][name]
        low, high = found[name]["accuracy_interval_95"]
        assert 0 <= low <= found[name]["accuracy"] <= high <= 1
        assert sum(found[name]["sampled_outcomes"].values()) == 4 * 20
    before, after = (run.summary["eval"][name]["accuracy"] for name in ("before", "after"))
    assert found["improvement"] == pytest.approx(after - before)
    assert found["improvement_percentage"] == pytest.approx(100 * (after - before) / before)
    assert len(found["problems"]) == 20
    for problem in found["problems"]:
        assert problem["prompt"].startswith("What is (")
        for name in ("before", "after"):
            its = problem[name]
            assert (its["outcome"] == "correct") == (its["parsed"] == problem["answer"]) == (its["reward"] > 0.9)
            assert its["mean_at_k"] in (0, 0.25, 0.5, 0.75, 1)
    changed = [problem for problem in found["problems"] if problem["before"]["response"] != problem["after"]["response"]]
    assert changed, "three steps changed no response"
    rows = [line.split()[0] for line in ended.stdout.splitlines() if line]  # nothing of the engine's among them
    assert rows == ["Asking", "Asking", "pass@1", "before", "after", "difference", "20"]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_comparison(run_sync):
    run = run_sync(TRANSFORMERS)
    first, _ = evaluate(run, "k=2", "max_samples=6")
    second, _ = evaluate(run, "k=2", "max_samples=6")
    assert first == second
    other, _ = evaluate(run, "k=2", "max_samples=6", "seed=1")
    assert [problem["after"]["response"] for problem in other["problems"]] == [
        problem["after"]["response"] for problem in first["problems"]
    ]
    assert other != first | {"seed": 1}


@pytest.mark.slow
def test_prompts_of_the_users_own(run_sync, tmp_path):
    run, mine = run_sync(TRANSFORMERS), tmp_path / "mine.jsonl"
    lines = [
        json.dumps({"question": "What is (2 + 3) + 4?", "answer": 9}),
        json.dumps({"prompt": "What is (1 + 1) + 1?"}),
        "nonsense",
        json.dumps({"prompt": "What is " + "(" * 60 + "1 + 1?"}),
    ]
    mine.write_text("\n".join(lines))
    found, ended = evaluate(run, f"prompts={mine}", "k=0")
    assert [problem["answer"] for problem in found["problems"]] == ["9", None]
    assert [problem["after"]["outcome"] is None for problem in found["problems"]] == [False, True]
    assert all(problem[name]["response"] for problem in found["problems"] for name in ("before", "after"))
    assert (found["before"]["n"], found["too_long"], found["unreadable_lines"]) == (1, 1, 1)
    assert "line 3 is not JSON" in ended.stderr
    assert "1 prompts are longer than env.max_prompt_length (32) and left out" in ended.stdout


@pytest.mark.parametrize("wait_s", [0.5, 6])  # while the engine imports, and later
def test_ctrl_c_leaves_no_process_behind(run_sync, wait_s):
    run = run_sync(TRANSFORMERS)
    process = subprocess.Popen(
        command(f"run={run.run_dir}", "k=64"),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.readline().startswith("Asking ")
    time.sleep(wait_s)
    started = psutil.Process(process.pid).children(recursive=True)
    assert len(started) >= 4  # two graders with their server, and the engine
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in errors
    _, alive = psutil.wait_procs(started, timeout=10)
    assert not alive


def spec(model: str) -> EngineSpec:
    return EngineSpec("transformers", model, "cpu", "float32", 0, 8, 64, 1.0, 0.9, True)


def test_an_engine_that_dies_is_named(model_path):
    def kill() -> None:
        while not multiprocessing.active_children():
            time.sleep(0.05)
        multiprocessing.active_children()[0].kill()

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(ActorError, match=f"^the engine of {model_path} died while starting, with exit code -9$"):
        sample(spec(model_path), [[1]], [Part(Sampling(1, 4, 0.0), 0)], 60, 60)
    thread.join()


def test_what_an_engine_said_is_shown_where_it_fails_and_else_not(model_path, capfd):
    assert len(sample(spec(model_path), [[1]], [Part(Sampling(1, 4, 0.0), 0)], 60, 60)) == 1
    assert capfd.readouterr() == ("", "")
    with pytest.raises(ActorError, match=r"died while starting, with exit code 1$"):
        sample(spec("./nowhere"), [[1]], [Part(Sampling(1, 4, 0.0), 0)], 60, 60)
    said = capfd.readouterr().err
    assert said.startswith("Traceback") or "\nTraceback" in said
    assert "./nowhere" in said.splitlines()[-1]


def test_an_engine_that_is_late_is_named_and_ended(model_path):
    with pytest.raises(ActorError, match=r"did not answer within 0.2 s while starting; .* raise ray.start_timeout_s$"):
        sample(spec(model_path), [[1]], [Part(Sampling(1, 4, 0.0), 0)], 0.2, 60)
    assert not multiprocessing.active_children()
