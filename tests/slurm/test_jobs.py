"""The job scripts as they are shipped, over two nodes of a real Slurm."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.conftest import SMALL, Finished, same_weights
from tests.integration.test_ranks import largest_difference

from .cluster import ROOT, Job, Slurm, wait_until

SYNC, ASYNC = "slurm/grpo_sync_multi_node.sbatch", "slurm/grpo_async_multi_node.sbatch"
REWARDS = Path(__file__).with_name("rewards.py")
ARITHMETIC = ["--config-name", "grpo_arithmetic", *SMALL]
TRANSFORMERS = "inference_model.backend=transformers"  # whose engines start faster
TWO_EACH = ["train_model.num_devices=2", "inference_model.num_devices=2", "train.use_kl_to_ref=false", TRANSFORMERS]
A_NODE = "--cpus-per-task=2"  # for a rank and an engine; with twice as many on one node a process has as many threads
EXACT = [f"env.reward_fn={REWARDS}:is_exact", "env.reward_timeout_s=300", "train.total_dialog_turns=320"]


def arguments(run_dir: Path, *more: str) -> list[str]:
    return [*ARITHMETIC, *EXACT, *more, f"hydra.run.dir={run_dir}"]


def actors_on(run_dir: Path, host: str) -> set[str]:
    """Classes of the actors that a job had on a node, from the logs that it kept of that node's Ray."""
    logs = (path.read_text(errors="replace") for path in (run_dir / "nodes" / host).glob("worker-*"))
    return {line.split(":")[-1] for log in logs for line in log.splitlines() if line.startswith(":actor_name:")}


def num_steps(run_dir: Path) -> int:
    metrics = run_dir / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.is_file() else 0


def wait_for_steps(job: Job, run_dir: Path, count: int) -> None:
    wait_until(lambda: num_steps(run_dir) >= count or job.has_ended, 300, f"step {count}", lambda: job.said)
    assert not job.has_ended, job.said


@pytest.fixture(scope="module")
def jobs(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Job, Path]]:
    """A synchronous and an asynchronous job, which share both nodes; and, afterwards, the first one's run on one of them."""
    folder = tmp_path_factory.mktemp("jobs")

    def submit(name: str, script: str, more: list[str], *options: str) -> tuple[Job, Path]:
        return slurm.submit(script, arguments(folder / name, *more), *options), folder / name

    jobs = {"sync": submit("sync", SYNC, TWO_EACH, A_NODE), "async": submit("async", ASYNC, [])}
    then = f"--dependency=afterany:{jobs['sync'][0].number}"
    jobs["one"] = submit("one", SYNC, TWO_EACH, "--nodes=1", "--cpus-per-task=4", then)
    jobs["sync"][0].wait(400)
    jobs["async"][0].wait(400)
    return jobs


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_job_script_trains_over_both_nodes_beside_another_job(jobs, mode):
    job, run_dir = jobs[mode]
    end = job.show()
    assert (end["JobState"], end["ExitCode"], end["NodeList"]) == ("COMPLETED", "0:0", "n[1-2]"), job.said
    summary = Finished(run_dir).summary
    assert (summary["steps"], summary["samples_trained"]) == (5, 320)
    on = {host: actors_on(run_dir, host) for host in ("n1", "n2")}
    roles = {"TrainerActor", "InferenceActor"}
    if mode == "sync":
        assert roles <= on["n1"] and roles <= on["n2"]
    else:
        assert "TrainerActor" in on["n1"] and "InferenceActor" in on["n2"]
        assert "CollectorActor" in on["n2"]  # beside its engine


def test_a_job_that_is_cut_at_its_time_limit_is_requeued_and_ends_as_if_it_had_not_been(jobs, slurm, tmp_path):
    paused = f"--export=ALL,PAUSED_RUN={tmp_path}"
    job = slurm.submit(SYNC, arguments(tmp_path, *TWO_EACH), A_NODE, "--time=10", paused)
    wait_for_steps(job, tmp_path, 2)
    job.cut_soon()
    wait_until(lambda: "SIGUSR1: saving" in job.said, 60, "the signal", lambda: job.said)
    (tmp_path / "go").touch()
    wait_until(lambda: job.show()["Restarts"] == "1", 60, "requeued", lambda: job.said)
    job.update(TimeLimit="10")
    assert job.wait(300)["JobState"] == "COMPLETED", job.said
    (saved,) = re.findall(r"Ended by SIGUSR1 after saving checkpoint_(\d+);", job.said)
    assert 2 <= int(saved) < 5  # in its midst
    assert [line["step"] for line in Finished(tmp_path).metrics] == [1, 2, 3, 4, 5]
    assert same_weights(Finished(tmp_path), Finished(jobs["sync"][1]))


def test_two_nodes_end_with_the_weights_of_one(jobs):
    job, run_dir = jobs["one"]
    end = job.wait(300)
    assert (end["JobState"], end["NumNodes"]) == ("COMPLETED", "1"), job.said
    assert largest_difference(Finished(run_dir).weights, Finished(jobs["sync"][1]).weights) <= 1e-5


def test_a_stranger_without_the_jobs_token_cannot_join_and_a_lost_node_ends_the_job(slurm, tmp_path):
    endless = ["train.total_dialog_turns=64000", "train.checkpoint_frequency=1", "train.use_kl_to_ref=false", TRANSFORMERS]
    job = slurm.submit(SYNC, arguments(tmp_path, *endless))
    wait_for_steps(job, tmp_path, 1)
    address = (tmp_path / "nodes" / "address").read_text()
    stranger = os.environ | {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    command = [sys.executable, "-m", "grpo.nodes", "1", str(tmp_path / "joined")]
    refused = subprocess.run(command, cwd=ROOT, env=stranger, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 1
    assert f"ray.address ({address}): this run could not join a Ray cluster there" in refused.stderr
    slurm.kill_node("n2")
    wait_until(lambda: job.has_ended, 90, "the end of the job", lambda: job.said)
    slurm.start_nodes()
    end = job.wait(60)
    assert (end["JobState"], end["ExitCode"]) == ("FAILED", "1:0"), job.said
    address = slurm.address_of("n2")
    # Who finds out first: Ray's head, Slurm's srun, or the run, whose actor is gone.
    assert re.search(rf"Error: (node {address} was lost|a node of the job|.* actor.* died)", job.said), job.said
