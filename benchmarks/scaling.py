"""What does the pipeline itself cost a response, and does it stay flat as collections grow?

    python -m benchmarks.scaling        # writes benchmarks/results/scaling.json

Everything but the models' work is real and in one process: the collector, grading, advantages, the replay buffer, batches,
splitting rows over micro-batches, metrics, metrics.jsonl and rollouts.jsonl. The engine answers at once with ready-made
completions, the trainer with ready-made metrics. What would go to an actor is pickled there and back, as Ray does it.

The answer is microseconds a response at each size, with its parts.
"""

import argparse
import cProfile
import gc
import pickle
import pstats
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import numpy as np
import torch

import grpo.collect
import grpo.run
from benchmarks.report import save, spread, table
from benchmarks.subjects import CACHE, model_path
from grpo import builtin, tasks
from grpo.collect import PromptEnv, PromptStream
from grpo.config import RunConfig
from grpo.grading import GradingPool
from grpo.inference import Request
from grpo.launch import compose
from grpo.metrics import Clock, RunLog
from grpo.micro_batches import split_rows
from grpo.models import load_tokenizer
from grpo.objectives.online import summarise
from grpo.replay import make_replay_buffer
from grpo.rollout import Completions
from grpo.tasks.arithmetic import split_expressions

SIZES = (64, 512, 4096, 32_768)  # responses a collection
RESPONSES = 65_536  # measured at a size, in whole collections, at least 3
WARM_UP = 3  # collections
OTHER = "the rest of the collector"


class Stopwatch:
    """Seconds a part, without those of the parts inside it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.inside = [0.0]

    def timed(self, part: str, function: Callable) -> Callable:
        def call(*arguments, **kwargs):
            self.inside.append(0.0)
            start = time.perf_counter()
            try:
                return function(*arguments, **kwargs)
            finally:
                seconds = time.perf_counter() - start
                self.seconds[part] += seconds - self.inside.pop()
                self.inside[-1] += seconds

        return call

    def garbage(self, phase: str, information: dict) -> None:
        """A callback for gc.callbacks: collections are a part of their own, whoever set them off."""
        if phase == "start":
            self.collecting_since = time.perf_counter()
        else:
            seconds = time.perf_counter() - self.collecting_since
            self.seconds["garbage collection"] += seconds
            self.inside[-1] += seconds


def over_the_wire(message):
    """As an actor would receive it."""
    return pickle.loads(pickle.dumps(message, protocol=5))


class ReadyEngines:
    """An EnginePool whose responses are ready: demonstrations with the operators in either order."""

    def __init__(self, config: RunConfig, tokenizer, watch: Stopwatch) -> None:
        rng, expressions = random.Random(0), split_expressions()["train"]
        rows = []
        for _ in range(config.train.dialog_turns_per_batch):
            text = builtin.demonstration(rng.choice(expressions), rng.random() < 0.5)
            rows.append([*tokenizer(text)["input_ids"], tokenizer.eos_token_id])
        tokens = np.array([token for row in rows for token in row])
        self.completions = Completions(
            request_id=np.arange(len(rows)) // config.env.repeats,
            length=np.array([len(row) for row in rows]),
            stopped=np.ones(len(rows), dtype=bool),
            tokens=tokens,
            log_probs=np.random.default_rng(0).uniform(-2, 0, len(tokens)).astype(np.float32),
            versions=np.zeros(len(tokens), dtype=np.int32),
        )
        self.transport = watch.timed("pickling for actors", over_the_wire)

    def generate(self, prompts: list[list[int]], sampling, seed: int) -> Completions:
        requests = self.transport([Request(i, prompt, sampling) for i, prompt in enumerate(prompts)])
        assert len(requests) == len(prompts)
        return Completions.concatenate([self.transport(self.completions)]).in_request_order()


class ReadyTrainer:
    """A TrainerPool of one rank whose optimiser steps take no time."""

    def __init__(self, config: RunConfig, watch: Stopwatch) -> None:
        self.num_micro_batches = config.train.gradient_accumulation_steps
        self.transport = watch.timed("pickling for actors", over_the_wire)
        names = ("objective", "ratio", "ratio_squared", "clipped_low", "clipped_high", "carries", "kl_to_inference")
        sums = dict.fromkeys((*names, "entropy", "loss", "tokens"), 1.0)
        self.metrics = summarise(sums, {"ratio": 1.0}, 1)

    def step(self, batch, number: int, with_log_probs: bool) -> tuple[dict[str, float], None]:
        lengths = batch["prompt_length"] + batch["response_length"]
        for share in split_rows(lengths, 1, self.num_micro_batches):
            self.transport(batch[share.rows])
        return dict(self.metrics), None


class ReadyPush:
    """A WeightPush that takes no time."""

    def __call__(self, version: int) -> None:
        pass

    def probe(self, version: int, tokens: list[int]) -> float:
        return 0.0


class ReadyWriter:
    """A CheckpointWriter that has nothing to write."""

    def poll(self) -> None:
        pass


def make_run(config: RunConfig, run_dir: Path, watch: Stopwatch, grading: GradingPool) -> grpo.run.Run:
    """What grpo_utils.build makes, with both pools replaced."""
    from grpo_utils import load_data, make_collector

    task, tokenizer, clock = tasks.load(config.env), load_tokenizer(model_path(config)), Clock()
    data = load_data(config, task, tokenizer)
    size, responses = config.env.repeats, config.train.dialog_turns_per_batch
    stream = PromptStream(len(data["train"].problems), config.seed)
    env = PromptEnv((responses // size, size), grading, data["train"], stream, tokenizer, clock)
    env._grade = watch.timed("grading", env._grade)
    engines = ReadyEngines(config, tokenizer, watch)
    collector = make_collector(config, env, engines, None)
    collector.policy.forward = watch.timed("packing", collector.policy.forward)
    log = RunLog(run_dir, config)
    log.rollouts = watch.timed("rollouts.jsonl", log.rollouts)
    log.step = watch.timed("metrics.jsonl", log.step)
    return grpo.run.Run(
        config=config,
        run_dir=run_dir,
        grading=grading,
        tokenizer=tokenizer,
        data=data,
        trainer=ReadyTrainer(config, watch),
        old=None,
        engines=engines,
        push=ReadyPush(),
        collector=collector,
        replay_buffer=make_replay_buffer(config.train.buffer_size // size, config.train.optim_batch_size // size),
        background=ThreadPoolExecutor(1),
        clock=clock,
        log=log,
        writer=ReadyWriter(),
        resumed=None,
    )


def measure(size: int, profile: bool) -> tuple[RunConfig, dict]:
    """Microseconds a response at `size` responses a collection, in all and a part; `profile` prints where they go."""
    repeats = max(3, RESPONSES // size)
    config = compose(
        "grpo_arithmetic",
        [
            f"model.cache_dir={CACHE}",
            f"train.dialog_turns_per_batch={size}",
            f"train.optim_batch_size={min(size, 512)}",
            f"train.total_dialog_turns={size * (WARM_UP + repeats)}",
            f"env.num_envs={size // 8}",
            "train.kl_to_ref_coeff=0",
            "train.eval_frequency=0",
            "train.checkpoint_frequency=0",
            "logging.progress=false",
        ],
    )
    watch, collections, parts = Stopwatch(), [], []
    kept, grpo.run.rollout_metrics = grpo.run.rollout_metrics, watch.timed("metrics", grpo.run.rollout_metrics)
    gc.callbacks.append(watch.garbage)
    from grpo_utils import rare_garbage_collection

    grader = GradingPool(tasks.grader(config.env), config.env.grading_processes, config.env.grading_timeout_s)
    with tempfile.TemporaryDirectory() as folder, grader as grading, rare_garbage_collection():
        run = make_run(config, Path(folder), watch, grading)
        turns = run.collections()
        collect = watch.timed(OTHER, lambda: next(turns))
        step = watch.timed("splitting rows, the rest of a step", run.step)
        profiler = cProfile.Profile()
        for turn in range(WARM_UP + repeats):
            if turn == WARM_UP and profile:
                profiler.enable()
            watch.seconds.clear()
            start = time.perf_counter()
            batches = run.batches(collect())
            following = watch.timed("replay buffer", lambda batches=batches: next(batches, None))
            while (batch := following()) is not None:
                step(batch)
            run.push_weights()
            if turn >= WARM_UP:
                collections.append((time.perf_counter() - start) / size * 1e6)
                parts.append({part: seconds / size * 1e6 for part, seconds in watch.seconds.items()})
        profiler.disable()
        run.log.close()
        run.background.shutdown()
    gc.callbacks.remove(watch.garbage)
    grpo.run.rollout_metrics = kept
    if profile:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
    return config, {
        "us_a_response": spread(collections),
        "parts": {part: round(median(turn.get(part, 0.0) for turn in parts), 3) for part in parts[-1]},
        "optim_batch_size": config.train.optim_batch_size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--profile", action="store_true", help="print the functions that take most time; writes no result")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes = {}
    for size in arguments.sizes:
        config, sizes[size] = measure(size, arguments.profile)
    if not arguments.profile:
        save("scaling", config, {"responses_a_collection": sizes})
    totals = [sizes[size]["us_a_response"]["median"] for size in sizes]
    parts = sorted(sizes[max(sizes)]["parts"], key=lambda part: -sizes[max(sizes)]["parts"][part])
    rows = [[part, *(sizes[size]["parts"].get(part, 0.0) for size in sizes)] for part in parts]
    table(["µs a response, by responses a collection", *map(str, sizes)], [*rows, ["in all", *totals]])
    print(f"largest over smallest collection: {totals[-1] / totals[0]:.2f}")


if __name__ == "__main__":
    main()
