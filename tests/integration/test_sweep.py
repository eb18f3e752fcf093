"""Sweeps as a user types them: real runs, each in a process of its own."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import SMALL, Finished, same_weights

ROOT = Path(__file__).parents[2]
ONE_STEP = ["train.total_dialog_turns=64", "inference_model.backend=transformers", "train.kl_to_ref_coeff=0"]
NO_PROMPT = "the train split has no prompt to use"


def run_sweep(sweep_dir: Path, *overrides: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "grpo_sync.py", "--config-name", "grpo_arithmetic", "--multirun", *SMALL, *ONE_STEP]
    command += [*overrides, f"hydra.sweep.dir={sweep_dir}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)


def rows(sweep_dir: Path) -> dict[str, dict[str, str]]:
    """The table, by the number of the run."""
    with open(sweep_dir / "table.csv", newline="") as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def test_a_value_that_cannot_work_is_found_before_the_first_run_starts(tmp_path):
    ended = run_sweep(tmp_path / "sweep", "optimizer.lr=1e-4,-1")
    assert ended.returncode == 1
    assert "Error: run 1 (optimizer.lr=-1): optimizer.lr (-1.0) must be above 0" in ended.stderr
    assert not (tmp_path / "sweep").exists()


def test_a_run_of_a_sweep_is_the_run_that_it_is_alone_and_a_failed_one_stops_nothing(tmp_path, model_path, run_sync):
    ended = run_sweep(tmp_path, "env.max_prompt_length=1,32")
    assert ended.returncode == 1
    found = rows(tmp_path)
    assert found["0"]["reason"].startswith(NO_PROMPT)
    assert found["1"]["reason"] == "" and found["1"]["steps"] == "1"
    assert same_weights(Finished(tmp_path / "1"), run_sync(*ONE_STEP, "env.max_prompt_length=32"))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "submitit_local"])
def test_four_runs_of_which_one_fails_end_with_three_results_and_a_reason(tmp_path, model_path, launcher):
    where = [f"hydra/launcher={launcher}", *(["hydra.launcher.timeout_min=10"] if launcher != "basic" else [])]
    ended = run_sweep(tmp_path, *where, "env.max_prompt_length=30,31,32,1")
    assert ended.returncode == 1, ended.stderr
    found = rows(tmp_path)
    assert [number for number, row in found.items() if row["reason"]] == ["3"]
    assert found["3"]["reason"].startswith(NO_PROMPT)
    assert all(float(found[number]["after"]) > 0 and found[number]["n"] == "20" for number in ("0", "1", "2"))
    assert (tmp_path / "table.txt").read_text() in ended.stdout
