"""Whole training runs for a benchmark: started as users start them, kept in one result file, made once each."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, stdev

from benchmarks.machine import describe
from benchmarks.report import RESULTS
from benchmarks.subjects import ROOT
from grpo.intervals import STUDENT, wilson

LAST = 5  # steps that a metric's end is the mean of
KEPT = ("eval", "steps", "samples_trained", "wall_s", "samples_per_s", "phases_s")


def full_command(script: str, overrides: list[str]) -> list[str]:
    return [*script.split(), "--config-name", "grpo_arithmetic", "logging.progress=false", *overrides]


def train(script: str, *overrides: str, metrics: tuple[str, ...] = ()) -> dict:
    """One run of grpo_arithmetic: the command, its summary, validation accuracy by responses, and the end of `metrics`.

    script: what Python is to run, grpo_sync.py for one.
    """
    command = full_command(script, list(overrides))
    with tempfile.TemporaryDirectory() as folder:
        quiet = {"stdout": subprocess.DEVNULL}
        subprocess.run([sys.executable, *command, f"hydra.run.dir={folder}"], cwd=ROOT, check=True, **quiet)
        summary = json.loads((Path(folder) / "summary.json").read_text())
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        if (halfway := Path(folder) / "halfway.json").exists():
            summary["eval"]["halfway"] = json.loads(halfway.read_text())
    for result in summary["eval"].values():
        result["interval_95"] = [round(end, 4) for end in wilson(result["accuracy"], result["n"])]
    a_step = summary["samples_trained"] / summary["steps"]
    curve = [[round(line["step"] * a_step), line["eval/accuracy"]] for line in lines if "eval/accuracy" in line]
    series = {name: [line[name] for line in lines if name in line] for name in metrics}
    ends = {name: mean(values[-LAST:]) for name, values in series.items() if values}
    means = {f"{name} (mean)": mean(series[name]) for name in ends}
    result = {"command": " ".join(["python", *command])} | {key: summary[key] for key in KEPT}
    return result | {"validation": curve, "metrics": {name: round(value, 6) for name, value in (ends | means).items()}}


def train_all(name: str, jobs: list[tuple[dict, str, list[str]]], metrics: tuple[str, ...]) -> list[dict]:
    """The runs of `jobs` (labels, script, overrides), kept in benchmarks/results/NAME.json as each ends.

    A run whose command is in that file is not made again: a call that was cut short is gone on with; delete the file to
    measure anew.
    """
    path = RESULTS / f"{name}.json"
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    kept, found = {run["command"]: run for run in runs}, []
    for i, (labels, script, overrides) in enumerate(jobs):
        run = kept.get(" ".join(["python", *full_command(script, overrides)]))
        found.append(run or labels | {"commit": describe()["commit"]} | train(script, *overrides, metrics=metrics))
        if run is None:
            RESULTS.mkdir(exist_ok=True)
            kept[found[-1]["command"]] = found[-1]
            path.write_text(json.dumps({"machine": describe(), "runs": list(kept.values())}, indent=2) + "\n")
            print(f"{i + 1} of {len(jobs)}: {labels}: {found[-1]['eval']['after']['accuracy']:.1%} after", flush=True)
    return found


def mean_interval(values: list[float]) -> tuple[float, float]:
    """The mean over seeds and half the width of its 95% interval (Student's)."""
    return mean(values), STUDENT[len(values) - 2] * stdev(values) / len(values) ** 0.5
