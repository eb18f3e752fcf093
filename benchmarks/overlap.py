"""What does sampling while training gain? The same samples, synchronous and asynchronous, each role on a core of its own.

    python -m benchmarks.overlap                # writes benchmarks/results/overlap.json
    python -m benchmarks.overlap --in-flight 3 --name overlap_long       # generation about three times as long as training

The random 50M-parameter model. The engine's process is bound to one core and the trainer's to another, as if they were
devices of their own, and each computes with one thread; driver, collector and buffer use either. Then the asynchronous run
can at best take as long as the longer of its two sides. A third run, synchronous and free to use both cores in both phases,
says what the binding costs. Rewards are hashes, so every group has an advantage.
"""

import argparse
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import ray

from benchmarks.report import save, table
from benchmarks.subjects import configuration
from grpo.config import RunConfig
from grpo.plan import Plan, make_plan

RESPONSES = 24  # a step


def bind(actors: list, core: int) -> None:
    """Have each actor's process run on `core` alone."""
    for actor in actors:
        pid = ray.get(actor.__ray_call__.remote(lambda self: os.getpid()))
        for thread in os.listdir(f"/proc/{pid}/task"):
            os.sched_setaffinity(int(thread), {core})


def measure(mode: str, bound: bool, steps: int, overrides: list[str]) -> dict:
    """The summary of a run of `steps` optimiser steps, with how old its data was."""
    import grpo_async
    import grpo_sync
    import grpo_utils

    def plan_bound(config: RunConfig) -> Plan:
        plan = make_plan(config)
        return replace(plan, threads=dict.fromkeys(plan.threads, 1)) if bound else plan

    grpo_utils.make_plan = plan_bound
    config = configuration("random50m", steps, *overrides, *(["mode=async"] if mode == "async" else []))
    with tempfile.TemporaryDirectory(dir=".") as folder:
        with grpo_utils.build(config, Path(folder)) as run:
            if bound:
                cores = sorted(os.sched_getaffinity(0))
                bind(run.engines.actors, cores[0])
                bind(run.trainer.actors, cores[1])
            run.begin()
            {"sync": grpo_sync, "async": grpo_async}[mode].train(run)
            run.finish()
        found = json.loads((Path(folder) / "summary.json").read_text())
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    found["staleness_max"] = max(line["buffer/staleness_max"] for line in lines)
    found["staleness_mean"] = sum(line["buffer/staleness_mean"] for line in lines) / len(lines)
    return found | {"config": config}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--in-flight", type=int, default=12, help="responses at a time: the fewer, the longer generation takes"
    )
    parser.add_argument("--name", default="overlap", help="of the result")
    parser.add_argument("overrides", nargs="*", help="configuration keys, key=value")
    arguments = parser.parse_args()
    overrides = [
        "train.kl_to_ref_coeff=0",
        "env.test_size=8",
        "env.validation_size=8",
        "inference_model.max_tokens=64",
        "env.num_envs=1",
        f"env.repeats={arguments.in_flight}",
        f"train.dialog_turns_per_batch={RESPONSES}",
        f"train.optim_batch_size={RESPONSES}",
        "train.gradient_accumulation_steps=2",
        f"train.total_dialog_turns={arguments.steps * RESPONSES}",
        *arguments.overrides,
    ]
    runs = {
        "synchronous": measure("sync", True, arguments.steps, overrides),
        "asynchronous": measure("async", True, arguments.steps, overrides),
        "synchronous, free": measure("sync", False, arguments.steps, overrides),
    }
    config = runs["asynchronous"]["config"]
    sync, asynchronous = runs["synchronous"], runs["asynchronous"]
    phases = sync["phases_s"]
    limit = sync["wall_s"] / max(phases["generate"], phases["train"])
    figures = {
        "runs": {
            name: {key: run[key] for key in ("wall_s", "samples_per_s", "phases_s", "staleness_max", "staleness_mean")}
            for name, run in runs.items()
        },
        "account": asynchronous["account"],
        "times_as_fast": round(sync["wall_s"] / asynchronous["wall_s"], 3),
        "limit": round(limit, 3),
        "times_as_fast_as_free": round(runs["synchronous, free"]["wall_s"] / asynchronous["wall_s"], 3),
    }
    save(arguments.name, config, figures)
    rows = [
        [name, run["wall_s"], run["samples_per_s"], run["phases_s"]["generate"], run["phases_s"]["train"]]
        for name, run in runs.items()
    ]
    table(["run", "s", "samples a second", "generating s", "training s"], rows)
    print(f"asynchronous: {figures['times_as_fast']} times as fast (limit of this split: {figures['limit']})")


if __name__ == "__main__":
    main()
