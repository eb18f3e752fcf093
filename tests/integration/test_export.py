"""Checkpoints as models: what is exported is what the run had at that step, bit for bit."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from grpo import generate
from grpo.export import export_checkpoint, find_checkpoint

from .conftest import Finished
from .test_resume import ROOT, TRANSFORMERS

EVALUATED = (TRANSFORMERS, "train.eval_frequency=1")
ADAPTED = (TRANSFORMERS, "train_model.lora.enabled=true", "train.checkpoint_frequency=0")


def check_is_the_runs(model: dict[str, torch.Tensor], run: Finished) -> None:
    assert model.keys() == run.weights.keys()
    assert all(torch.equal(model[name], weights) for name, weights in run.weights.items())


def test_the_newest_is_the_runs_model_and_the_best_can_be_asked_as_the_run_asks(run_sync, tmp_path):
    run = run_sync(*EVALUATED)
    export_checkpoint(run.run_dir, find_checkpoint(run.run_dir, "LATEST"), tmp_path / "latest")
    check_is_the_runs(load_file(tmp_path / "latest" / "model.safetensors"), run)
    accuracies = [row["eval/accuracy"] for row in run.metrics]
    best = accuracies.index(max(accuracies)) + 1
    command = [sys.executable, "-m", "grpo.export", f"run={run.run_dir}"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    said = f"the weights after step {best} (checkpoint_{best:06d}, validation accuracy {max(accuracies):.1%})"
    assert ended.stdout.strip() == f"{run.run_dir}/best: {said}"
    config, model = generate.configure(f"{run.run_dir}/best", {})
    assert (config.seed, config.env.dataset, model) == (0, "arithmetic", f"{run.run_dir}/best")
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert again.returncode == 1
    assert again.stderr.strip() == f"Error: out ({run.run_dir}/best) is there already: give another"


@pytest.mark.slow
def test_one_on_the_way_is_what_a_run_of_as_many_steps_ends_with(run_sync, tmp_path):
    run, shorter = run_sync(*EVALUATED), run_sync(*EVALUATED, "train.total_dialog_turns=128")
    second = export_checkpoint(run.run_dir, find_checkpoint(run.run_dir, "checkpoint_000002"), tmp_path / "second")
    assert second["progress"]["num_steps"] == 2
    check_is_the_runs(load_file(tmp_path / "second" / "model.safetensors"), shorter)


@pytest.mark.slow
def test_adapters_are_merged_and_written_by_themselves(run_sync, tmp_path):
    run = run_sync(*ADAPTED)
    export_checkpoint(run.run_dir, find_checkpoint(run.run_dir, "LATEST"), tmp_path / "latest")
    check_is_the_runs(load_file(tmp_path / "latest" / "model.safetensors"), run)
    ours, theirs = (
        load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (tmp_path / "latest", run.run_dir)
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]
