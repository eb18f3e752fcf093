"""A sweep whose runs are jobs of a real Slurm."""

import subprocess
import sys

from tests.integration.test_sweep import NO_PROMPT, ONE_STEP, rows

from .cluster import ROOT, Slurm
from .test_jobs import ARITHMETIC


def test_four_jobs_of_which_one_fails_end_with_three_results_and_a_reason(slurm: Slurm, tmp_path):
    submitted = ["hydra/launcher=submitit_slurm", "hydra.launcher.cpus_per_task=2", "hydra.launcher.timeout_min=10"]
    command = [sys.executable, "grpo_sync.py", "--multirun", *ARITHMETIC, *ONE_STEP, "env.max_prompt_length=30,31,32,1"]
    command += [*submitted, f"hydra.sweep.dir={tmp_path}"]
    ended = subprocess.run(command, cwd=ROOT, env=slurm.environment, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 1, ended.stderr
    found = rows(tmp_path)
    assert [number for number, row in found.items() if row["reason"]] == ["3"]
    assert found["3"]["reason"].startswith(NO_PROMPT)
    assert all(found[number]["n"] == "20" for number in ("0", "1", "2"))
