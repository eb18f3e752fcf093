"""What does sampling while training gain? The same samples, synchronous and asynchronous, each role on a core of its own.

    python -m benchmarks.overlap                # writes benchmarks/results/overlap.json
    python -m benchmarks.overlap --in-flight 2 --name overlap_long       # generation about three times as long as training

A model of 6M random parameters, trained on in small micro-batches: both sides stay in their caches, where an engine that
reads 200 MB a token and a trainer with as many activations would meet on a memory bus that separate devices do not share.
The engine's process is bound to one core and the trainer's to another, as if they were such devices, and each computes with
one thread; driver, collector and buffer use either. Then the asynchronous run can at best take as long as the longer of its
two sides. A third run, synchronous and free to use both cores in both phases, says what the binding costs; raw vLLM on the
engine's core, with the asynchronous run's requests, how much of the time its engine could have idled. Rewards are hashes, so
every group has an advantage.
"""

import argparse
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import ray

from benchmarks.bare import Part, serve_generation
from benchmarks.report import save, table
from benchmarks.step import actor_state
from benchmarks.subjects import configuration, random_model
from grpo.config import RunConfig
from grpo.plan import Plan, make_plan

RESPONSES = 24  # a step


def bind(actors: list, core: int) -> None:
    """Have each actor's process run on `core` alone."""
    for actor in actors:
        bind_process(ray.get(actor.__ray_call__.remote(lambda self: os.getpid())), core)


def bind_process(pid: int, core: int) -> None:
    for thread in os.listdir(f"/proc/{pid}/task"):
        os.sched_setaffinity(int(thread), {core})


def bare_seconds(engine: dict, config: RunConfig, prompts: list[list[int]], core: int) -> float:
    """Seconds in which raw vLLM, set up like the run's `engine`, responds to `prompts` on `core`."""
    inference, part = config.inference_model, Part(serve_generation, engine["environment"], engine["spec"])
    question = {"group_size": config.env.repeats, "max_tokens": inference.max_tokens, "temperature": inference.temperature}
    try:
        part.ask(question | {"prompts": prompts[:1]})
        bind_process(part.process.pid, core)
        part.ask(question | {"prompts": prompts[:2]})
        return part.ask(question | {"prompts": prompts})["seconds"]
    finally:
        part.close()


def measure(mode: str, bound: bool, steps: int, overrides: list[str]) -> dict:
    """The summary of a run of `steps` optimiser steps, with how old its data was, and what its engine and prompts were."""
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
            engine = actor_state(run.engines.actors[0])
            groups = range(config.num_groups)
            prompts = [run.data["train"].prompts[run.stream.at(i)] for i in groups]
        found = json.loads((Path(folder) / "summary.json").read_text())
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    found["staleness_max"] = max(line["buffer/staleness_max"] for line in lines)
    found["staleness_mean"] = sum(line["buffer/staleness_mean"] for line in lines) / len(lines)
    return found | {"config": config, "engine": engine, "prompts": prompts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--in-flight", type=int, default=8, help="responses at a time: the fewer, the longer generation takes"
    )
    parser.add_argument("--name", default="overlap", help="of the result")
    parser.add_argument("overrides", nargs="*", help="configuration keys, key=value")
    arguments = parser.parse_args()
    overrides = [
        f"model.name={random_model('random6m', hidden=256, layers=6, words=6144)}",
        "train.kl_to_ref_coeff=0",
        "env.test_size=8",
        "env.validation_size=8",
        "inference_model.max_tokens=64",
        "env.num_envs=1",
        f"env.repeats={arguments.in_flight}",
        f"train.dialog_turns_per_batch={RESPONSES}",
        f"train.optim_batch_size={RESPONSES}",
        "train.gradient_accumulation_steps=8",
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
    core = min(os.sched_getaffinity(0))
    bare_s = bare_seconds(asynchronous["engine"], config, asynchronous["prompts"], core)
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
        "bare_engine_s": round(bare_s, 3),
        "share_of_bare_engine": round(bare_s / asynchronous["wall_s"], 3),
        "times_as_fast_as_free": round(runs["synchronous, free"]["wall_s"] / asynchronous["wall_s"], 3),
    }
    save(arguments.name, config, figures)
    rows = [
        [name, run["wall_s"], run["samples_per_s"], run["phases_s"]["generate"], run["phases_s"]["train"]]
        for name, run in runs.items()
    ]
    table(["run", "s", "samples a second", "generating s", "training s"], rows)
    print(f"asynchronous: {figures['times_as_fast']} times as fast (limit of this split: {figures['limit']})")
    print(f"its engine reached {figures['share_of_bare_engine']:.0%} of the bare engine's responses a second")


if __name__ == "__main__":
    main()
