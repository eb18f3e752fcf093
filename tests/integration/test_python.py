"""The Python interface: the walk-through, whole runs in one call, and the lines that docs/python.md shows."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import grpo
from examples import walk_through
from grpo.preemption import Preempted

from .conftest import SMALL

ROOT = Path(__file__).parents[2]
QUICK = [*SMALL, "inference_model.backend=transformers"]


def test_the_walk_through_trains_compares_and_shows(model_path, tmp_path, monkeypatch, capsys):
    run_dir = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["walk_through", str(run_dir), *QUICK])
    walk_through.main()
    said = capsys.readouterr().out
    assert re.findall(r"^version (\d): mean reward 0\.\d{3}$", said, flags=re.MULTILINE) == ["1", "2", "3"]
    lines = [json.loads(line) for line in (run_dir / "rollouts.jsonl").read_text().splitlines()]
    for line in lines:  # the example's own reward, in the place of the task's
        assert line["terms"] == {"reward_fn": pytest.approx(line["reward"])}
        assert line["reward"] == pytest.approx({"correct": 1.0, "wrong": 0.2, "unparseable": 0.0}[line["outcome"]])
    last = [line for line in lines if line["step"] == 3]
    for best in (max, min):
        assert f"{best(line['reward'] for line in last):+.3f} " in said
    compared = json.loads((run_dir / "comparison.json").read_text())
    assert compared["before"]["n"] == compared["after"]["n"] == 20
    mended = [p for p in compared["problems"] if (p["before"]["outcome"], p["after"]["outcome"]) == ("wrong", "correct")]
    assert f"\n{len(mended)} problems that were answered wrong before are answered right now\n" in said


@pytest.mark.slow
def test_a_whole_run_is_one_call_and_going_on_with_it_another(model_path, tmp_path):
    config = grpo.compose("grpo_arithmetic", [*QUICK, "train.max_wall_time=1"])
    with pytest.raises(Preempted):
        grpo.train(config, tmp_path / "run")
    with pytest.raises(grpo.UserError, match="holds a run already: type resume="):
        grpo.train(config, tmp_path / "run")
    config = grpo.compose("grpo_arithmetic", QUICK)
    config.resume = str(tmp_path / "run")
    summary = grpo.train(config, tmp_path / "run")
    assert (summary["steps"], summary["samples_trained"], summary["policy_version"]) == (3, 192, 3)
    with pytest.raises(grpo.UserError, match=r"the run has ended with its step 3: raise train.total_dialog_turns"):
        grpo.resume_run(tmp_path / "run")


@pytest.mark.slow
def test_the_lines_that_are_shown_train_and_compare(model_path, tmp_path):
    shown = re.search(r"^```python\n(.*?)^```", (ROOT / "docs" / "python.md").read_text(), flags=re.DOTALL | re.MULTILINE)[1]
    script = tmp_path / "shown.py"
    script.write_text(shown.replace("outputs/mine", f"{tmp_path}/mine"))
    run = subprocess.run(
        [sys.executable, script], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=500
    )
    assert run.returncode == 0, run.stderr
    low, high = map(float, re.findall(r"-?\d+\.\d+", run.stdout.splitlines()[-1]))
    summary = json.loads((tmp_path / "mine" / "summary.json").read_text())["eval"]
    assert low <= summary["after"]["accuracy"] - summary["before"]["accuracy"] <= high
