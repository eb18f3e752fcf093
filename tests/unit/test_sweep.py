import csv
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from hydra._internal.utils import get_args_parser

import grpo.sweep
from grpo import launch
from grpo.errors import ConfigError
from grpo.launch import CONFIG_DIR
from grpo.sweep import Job, _reason, jobs, read_jobs, sweep, varying, write_table

# What the sweep's jobs start in place of grpo_sync.py: it ends in the way that its learning rate says.
SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path

typed = dict(item.split("=", 1) for item in sys.argv[1:] if "=" in item)
run_dir = Path(typed["hydra.run.dir"].strip("'"))
assert typed["resume"] == "auto" and typed["logging.progress"] == "false", typed
(run_dir / "typed").open("a").write(" ".join(sys.argv[1:3]))
lr = float(typed["optimizer.lr"])
if lr == 0.1:
    sys.exit("Error: optimizer.lr (0.1) is too high")
if lr == 0.2:
    os.kill(os.getpid(), signal.SIGKILL)
if lr == 0.3:
    raise ValueError("a defect")
if lr == 0.4:
    def save(number, frame):
        print("Ended by SIGTERM after saving checkpoint_000001", file=sys.stderr)
        sys.exit(75)
    signal.signal(signal.SIGTERM, save)
    (run_dir / "ready").touch()
    time.sleep(60)
results = {"before": {"accuracy": 0.3, "n": 1000}, "after": {"accuracy": 1 - lr, "n": 1000}}
summary = {"eval": results, "steps": 8, "samples_trained": 512, "wall_s": 4.0, "samples_per_s": 128.0}
(run_dir / "summary.json").write_text(json.dumps(summary))
"""


@pytest.fixture
def run_sweep(tmp_path, monkeypatch):
    """Run a sweep over optimizer.lr from this process; returns its exit code and directory."""
    (tmp_path / "grpo_sync.py").write_text(SCRIPT)
    monkeypatch.setattr(grpo.sweep, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", "")

    def run(*values: str, planned: bool = True) -> tuple[int, Path]:
        where, swept = tmp_path / "sweep", f"optimizer.lr={','.join(values)}"
        typed = [swept, "seed=1", f"hydra.sweep.dir={where}"]
        monkeypatch.setattr(sys, "argv", ["grpo_sync.py", *typed, "--multirun"])
        overrides = list(jobs(typed[:2], {})) if planned else []
        return sweep(CONFIG_DIR, "grpo_arithmetic", typed, overrides), where

    return run


def rows(sweep_dir: Path) -> list[dict[str, str]]:
    with open(sweep_dir / "table.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_jobs_come_in_hydras_order():
    assert list(jobs(["a=1,2", "b=x", "c=range(3,6)"], {})) == [
        [f"a={a}", "b=x", f"c={c}"] for a, c in ((1, 3), (1, 4), (1, 5), (2, 3), (2, 4), (2, 5))
    ]


def test_of_a_key_that_is_typed_twice_the_last_counts():
    assert list(jobs(["a=1", "b=2,3", "a=4,5", "b=6"], {})) == [["a=4", "b=6"], ["a=5", "b=6"]]


def test_a_pattern_means_the_names_of_its_group():
    groups = {"objective": ["dapo", "dr_grpo", "grpo"]}
    assert list(jobs(["objective=glob(d*)"], groups)) == [["objective=dapo"], ["objective=dr_grpo"]]
    with pytest.raises(ConfigError, match="nothing there has such a name; there are dapo, dr_grpo, grpo"):
        list(jobs(["objective=glob(z*)"], groups))
    with pytest.raises(ConfigError, match="a pattern needs a group of configurations, objective"):
        list(jobs(["seed=glob(*)"], groups))


def test_of_an_interval_the_ends_are_looked_at():
    assert list(jobs(["optimizer.lr=tag(log,interval(1e-5,1e-3))"], {})) == [["optimizer.lr=1e-05"], ["optimizer.lr=0.001"]]


def test_what_varies_is_what_differs_between_runs():
    assert varying([["a=1", "b=2", "c=3"], ["a=1", "b=4"]]) == ["b", "c"]
    assert varying([["a=1"]]) == []
    assert varying(list(jobs(["~objective", "seed=1,2"], {}))) == ["seed"]  # a key that is taken away has no value
    assert varying([["~a", "b=1"], ["b=1"]]) == ["~a"]
    assert [Job(0, ["~a", "b=x=1"], None, None).value(key) for key in ("~a", "b", "c")] == ["", "x=1", ""]


def test_a_failed_run_stops_no_other_and_its_reason_is_in_the_table(run_sweep, capsys):
    code, where = run_sweep("0.05", "0.1", "0.2", "0.3", "0.01")
    assert code == 1
    found = rows(where)
    assert [row["optimizer.lr"] for row in found] == ["0.01", "0.05", "0.1", "0.2", "0.3"]  # the best first, failures last
    assert [row["after"] for row in found] == ["0.99", "0.95", "", "", ""]
    assert found[2]["reason"] == "optimizer.lr (0.1) is too high"
    assert found[3]["reason"].startswith("killed by SIGKILL; see ")
    assert found[4]["reason"].startswith("ValueError: a defect; see ")
    assert "seed" not in found[0]  # it is the same in every run
    text = (where / "table.txt").read_text()
    assert text.splitlines()[1].split()[:5] == ["4", "0.01", "30.0%", "99.0%", "98.2%"]
    assert "1    0.1           optimizer.lr (0.1) is too high" in text
    printed = capsys.readouterr().out
    assert text in printed and "3 of 5 runs have no result" in printed
    assert (where / "table.png").read_bytes().startswith(b"\x89PNG")


def test_a_sweep_whose_runs_all_end_is_a_success(run_sweep):
    code, where = run_sweep("0.05", "0.01")
    assert code == 0
    assert [row["run"] for row in rows(where)] == ["1", "0"]
    assert (where / "0" / "typed").read_text() == "--config-name grpo_arithmetic"


def test_the_same_sweep_again_leaves_out_what_has_ended(run_sweep):
    run_sweep("0.05", "0.1")
    code, where = run_sweep("0.05", "0.1")
    assert code == 1
    assert (where / "0" / "typed").read_text().count("--config-name") == 1
    assert (where / "1" / "typed").read_text().count("--config-name") == 2


def test_a_reason_is_that_of_the_last_attempt(tmp_path):
    output = tmp_path / "output.log"
    output.write_text("Error: of the first\n")
    start = output.stat().st_size
    assert _reason(1, output, 0) == "of the first"
    with open(output, "a") as file:
        file.write("Traceback\nValueError: of the second\n")
    assert _reason(1, output, start) == f"ValueError: of the second; see {output}"
    assert _reason(3, output, output.stat().st_size) == f"exit code 3; see {output}"


def test_another_sweep_in_the_same_directory_is_refused(run_sweep, capsys):
    run_sweep("0.05", "0.01")
    code, where = run_sweep("0.02", "0.01")
    assert code == 1
    assert "holds another run (optimizer.lr=0.05 seed=1)" in capsys.readouterr().err
    assert rows(where)[1]["optimizer.lr"] == "0.05"


def test_a_request_to_end_reaches_the_run_and_ends_the_sweep(run_sweep, tmp_path):
    def ask() -> None:
        while not (tmp_path / "sweep" / "0" / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    asking = threading.Thread(target=ask)
    asking.start()
    code, where = run_sweep("0.4", "0.01")
    asking.join()
    assert code == 75
    assert [row["reason"] for row in rows(where)] == ["Ended by SIGTERM after saving checkpoint_000001", "did not start"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_table_is_made_again_from_the_directories_alone(run_sweep):
    _, where = run_sweep("0.05", "0.1", planned=False)
    summary = json.loads((where / "0" / "summary.json").read_text())
    summary["eval"]["after"]["accuracy"] = 0.97
    (where / "1" / "summary.json").write_text(json.dumps(summary))
    assert write_table(where, []) == 0
    assert [(row["run"], row["after"], row["reason"]) for row in rows(where)] == [("1", "0.97", ""), ("0", "0.95", "")]


def test_a_directory_without_runs_is_said(tmp_path):
    with pytest.raises(ConfigError, match="there is no run of a sweep there"):
        write_table(tmp_path, [])


def test_a_run_that_was_planned_and_is_not_there_did_not_start(tmp_path):
    assert read_jobs(tmp_path, [["a=1"]]) == [Job(0, ["a=1"], "did not start", None)]


def test_runs_that_are_slurm_jobs_are_not_planned_for_the_machine_that_submits_them(gpus):
    gpus(0)

    def checked(*typed: str) -> list[list[str]]:
        return launch._check_sweep(get_args_parser().parse_args(["--multirun", "seed=1,2", *typed]), "sync", "grpo_gsm8k")

    on_slurm = ["hydra/launcher=submitit_slurm", "hydra.launcher.gpus_per_node=3"]
    for typed in ([], ["hydra/launcher=submitit_local"], [*on_slurm, "dry_run=true"]):
        with pytest.raises(ConfigError, match=r"^run 0 \(seed=1\): model.name \(.*\) has .* and wants a GPU"):
            checked(*typed)
    assert checked(*on_slurm) == [["seed=1"], ["seed=2"]]
    with pytest.raises(ConfigError, match=r"^run 0 \(seed=1\): env.data \(nowhere.jsonl\)"):
        checked(*on_slurm, "env.data=nowhere.jsonl")
