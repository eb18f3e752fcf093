"""The composition root: builds the parts of a run from its configuration on Ray, and closes them in reverse.

`build` checks what can be checked, makes the data, then starts Ray and the actors. `Run` is what a loop needs:
collections in, optimiser steps and weight pushes out.
"""

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import ray
import torch
from tensordict import TensorDict

from grpo import builtin, tasks
from grpo.collect import EnginePool, Finish, GroupCollector, InferencePolicy, PromptEnv, PromptStream
from grpo.config import RunConfig
from grpo.evaluate import accuracy
from grpo.inference import EngineSpec, InferenceActor, Sampling
from grpo.metrics import Clock, RunLog, rollout_metrics
from grpo.models import load_tokenizer
from grpo.plan import Plan, make_plan
from grpo.plot import plot_run
from grpo.reference import ReferenceActor
from grpo.remote import get
from grpo.replay import make_replay_buffer
from grpo.rewards import load_reward_function
from grpo.trainer import TrainerActor, TrainerSpec

CLOSE_TIMEOUT_S = 5.0


class Run:
    """The parts of a run and what the loops do with them. Made by `build`."""

    def __init__(self, config: RunConfig, run_dir: Path, data: dict[str, tasks.EncodedProblems]) -> None:
        self.config, self.run_dir, self.data = config, run_dir, data
        self.clock = Clock()
        self.num_steps = self.samples_trained = self.policy_version = 0
        self.ahead: Future | None = None
        self.step_ended = time.perf_counter()

    # Parts that `build` sets.
    task: tasks.Task
    tokenizer: object
    engines: EnginePool
    trainer: object
    collector: GroupCollector
    replay_buffer: object
    log: RunLog
    background: ThreadPoolExecutor

    def collections(self) -> Iterator[TensorDict]:
        """The run's collections. With train.sync_iter=false the next one is sampled while one is trained on."""
        collections = iter(self.collector)
        self.step_ended = self.started = time.perf_counter()
        self.eval_before_s = self.clock.total["eval"]
        self.clock.take()
        if self.config.train.sync_iter:
            yield from collections
            return
        self.ahead = self.background.submit(next, collections, None)
        while (rollouts := self._collected_ahead()) is not None:
            self.ahead = self.background.submit(next, collections, None)
            yield rollouts

    def _collected_ahead(self) -> TensorDict | None:
        with self.clock.phase("wait"):
            return self.ahead.result()

    def step(self, batch: TensorDict) -> None:
        """One optimiser step on `batch` [B], logged."""
        first_use = self.num_steps % (self.config.train.epochs * self.config.batches_per_collection)
        first_use = first_use < self.config.batches_per_collection
        with_log_probs = first_use and self.config.logging.rollout_tokens
        with self.clock.phase("train"):
            metrics, log_probs = get(
                self.trainer.step.remote(batch.exclude("records"), with_log_probs),
                self.config.ray.timeout_s,
                "the training actor",
                f"taking optimiser step {self.num_steps + 1}",
            )
        self.num_steps += 1
        self.samples_trained += len(batch)
        now = time.perf_counter()
        metrics |= rollout_metrics(batch, self.policy_version) | self.clock.take()
        metrics["time/samples_per_s"] = len(batch) / (now - self.step_ended)
        self.step_ended = now
        if first_use:
            self.log.rollouts(self.num_steps, batch, log_probs)
        self.log.step(self.num_steps, self.policy_version, metrics)

    def push_weights(self) -> None:
        """Give the engines the trainer's weights as the next policy version; evaluate where it is time to."""
        if self.ahead is not None:
            with self.clock.phase("wait"):
                self.ahead.exception()  # only wait: a collection is sampled under one version
        with self.clock.phase("push"):
            doing = f"publishing weights version {self.policy_version + 1}"
            get(self.trainer.publish.remote(), self.config.ray.timeout_s, "the training actor", doing)
            self.policy_version += 1
            self.engines.update_weights(self.policy_version)
        metrics = self.clock.take()
        frequency, steps = self.config.train.eval_frequency, self.config.num_steps // self.config.num_collections
        if frequency and self.num_steps // frequency > (self.num_steps - steps) // frequency:
            metrics["eval/accuracy"] = self.evaluate("validation")["accuracy"]
            metrics |= self.clock.take()
        self.log.add(metrics)

    def evaluate(self, split: str) -> dict[str, float]:
        """Greedy accuracy of the engines' weights on a held-out split: {"accuracy", "n"}."""
        start = time.perf_counter()
        max_tokens = self.config.inference_model.max_tokens
        with self.clock.phase("eval"):
            result = accuracy(self.engines, self.task, self.data[split], self.tokenizer, max_tokens)
        self.step_ended += time.perf_counter() - start  # samples_per_s is training's
        return result

    def finish(self, before: dict[str, float]) -> dict:
        """Evaluate, export the model, write summary.json and the plots; returns the summary."""
        training_s = time.perf_counter() - self.started - (self.clock.total["eval"] - self.eval_before_s)
        self.log.flush()
        after = self.evaluate("test")
        get(
            self.trainer.export.remote(self.run_dir / "model"),
            self.config.ray.timeout_s,
            "the training actor",
            "export",
        )
        phases = {name: round(seconds, 3) for name, seconds in self.clock.total.items() if name != "eval"}
        summary = {
            "eval": {"before": before, "after": after},
            "steps": self.num_steps,
            "samples_trained": self.samples_trained,
            "policy_version": self.policy_version,
            "wall_s": round(training_s, 3),
            "samples_per_s": round(self.samples_trained / training_s, 1),
            "phases_s": phases,
            "restarts": {},
        }
        (self.run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        plot_run(self.run_dir)
        self.log.close()
        return summary


def report(run: Run, summary: dict) -> None:
    """The last lines that a user sees."""
    before, after = summary["eval"]["before"], summary["eval"]["after"]
    print(
        f"\n{summary['samples_trained']} responses in {summary['steps']} steps, {summary['wall_s']:.0f} s of training "
        f"({summary['samples_per_s']:.0f} a second); model, metrics and plots are in {os.path.relpath(run.run_dir)}\n"
        f"Held-out accuracy on {after['n']} test problems: {before['accuracy']:.1%} before, "
        f"{after['accuracy']:.1%} after"
    )


def load_data(config: RunConfig, task: tasks.Task, tokenizer) -> dict[str, tasks.EncodedProblems]:
    """The three splits as token ids; raises DataError where one is empty."""
    limits = {"train": None, "validation": config.env.validation_size, "test": config.env.test_size}
    return {
        split: tasks.encode_split(task, split, tokenizer, config.env.max_prompt_length, limit)
        for split, limit in limits.items()
    }


@contextmanager
def build(config: RunConfig, run_dir: Path) -> Iterator[Run]:
    """A run whose actors are up; leaving the context ends every process that it started."""
    plan = make_plan(config)
    torch.set_num_threads(plan.threads)
    task = tasks.load(config.env)
    reward_function = load_reward_function(config.env.reward_fn) if config.env.reward_fn else None
    model = builtin.resolve(config.model.name, config.model.cache_dir)
    tokenizer = load_tokenizer(model)
    data = load_data(config, task, tokenizer)
    run = Run(config, run_dir, data)
    run.task, run.tokenizer = task, tokenizer
    with ExitStack() as closing:
        _start_ray(config, plan, closing)
        run.trainer, reference, engines = _start_actors(config, plan, model)
        run.engines = EnginePool(engines, config.ray.timeout_s)
        _connect(run.trainer, engines, config)
        run.collector = _make_collector(run, reference, reward_function)
        group_size = config.env.repeats
        run.replay_buffer = make_replay_buffer(
            config.train.buffer_size // group_size, config.train.optim_batch_size // group_size, config.seed
        )
        run.background = ThreadPoolExecutor(1, thread_name_prefix="collect")
        closing.callback(run.background.shutdown, wait=False, cancel_futures=True)
        run.log = RunLog(run_dir, config.logging, config.num_steps, asdict(config))
        closing.callback(run.log.close)
        yield run


def _start_ray(config: RunConfig, plan: Plan, closing: ExitStack) -> None:
    local = {
        "num_cpus": sum(plan.roles.values()),
        "object_store_memory": config.ray.object_store_memory,
        "_temp_dir": config.ray.temp_dir,
        "include_dashboard": False,
    }
    path = [str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    ray.init(
        address=config.ray.address,
        log_to_driver=False,
        logging_level="error",
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(path)}},
        **(local if config.ray.address == "local" else {}),
    )
    closing.callback(ray.shutdown)


def _start_actors(config: RunConfig, plan: Plan, model: str) -> tuple[object, object | None, list]:
    """Start the actors side by side and wait until each has its model: (trainer, reference or None, engines)."""
    gpus = 1 if plan.device == "cuda" else 0
    threads = {"OMP_NUM_THREADS": str(plan.threads)}

    def remote(cls, environment: dict[str, str]):
        return ray.remote(num_cpus=1, num_gpus=gpus, runtime_env={"env_vars": threads | environment})(cls)

    inference, train = config.inference_model, config.train
    micro_batch = train.optim_batch_size // train.gradient_accumulation_steps
    attention = config.model.attn_implementation
    objective = (config.objective, train, config.optimizer, config.uses_reference)
    trainer = remote(TrainerActor, {}).remote(TrainerSpec(model, attention, plan.device, inference.temperature, *objective))
    reference = None
    if config.uses_reference:
        reference = remote(ReferenceActor, {}).remote(model, attention, plan.device, inference.temperature, micro_batch)
    spec = EngineSpec(
        backend=inference.backend,
        model=model,
        device=plan.device,
        seed=config.seed,
        max_concurrent=config.env.num_envs * config.env.repeats,
        max_length=config.env.max_prompt_length + inference.max_tokens,
        temperature=inference.temperature,
        top_p=inference.top_p,
        gpu_memory_utilization=inference.gpu_memory_utilization,
        enforce_eager=inference.enforce_eager or plan.device == "cpu",
    )
    engines = [remote(InferenceActor, engine_environment(spec)).remote(spec)]
    timeout, key = config.ray.start_timeout_s, "ray.start_timeout_s"
    rendezvous = get(trainer.open_rendezvous.remote(), timeout, "the training actor", "starting", key)
    starting = {
        "the inference actor": engines[0].start.remote(),
        "the training actor": trainer.start.remote(0, 1, rendezvous, config.ray.timeout_s),
    }
    if reference is not None:
        starting["the reference actor"] = reference.start.remote()
    for name, call in starting.items():
        get(call, timeout, name, "starting", key)
    return trainer, reference, engines


def engine_environment(spec: EngineSpec) -> dict[str, str]:
    """Environment variables for an engine's process."""
    if spec.backend != "vllm":
        return {}
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    if spec.device == "cpu":
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    if spec.enforce_eager:
        variables["TORCHDYNAMO_DISABLE"] = "1"
    return variables


def _connect(trainer, engines: list, config: RunConfig) -> None:
    """Let every engine map the trainer's weights."""
    timeout = config.ray.timeout_s
    description = get(trainer.weights_description.remote(), timeout, "the training actor", "describing its weights")
    calls = [engine.connect.remote(description) for engine in engines]
    get(calls, timeout, "the inference actor", "connecting to the trainer's weights")
    get(trainer.weights_mapped.remote(), timeout, "the training actor", "connecting to the engines")


def _make_collector(run: Run, reference, reward_function) -> GroupCollector:
    config, data = run.config, run.data["train"]
    inference, train = config.inference_model, config.train
    sampling = Sampling(config.env.repeats, inference.max_tokens, inference.temperature, inference.top_p)
    stream = PromptStream(len(data.problems), config.seed)
    num_groups = train.dialog_turns_per_batch // config.env.repeats
    env = PromptEnv(num_groups, config.env.repeats, run.task, data, stream, run.tokenizer, reward_function, run.clock)
    kl_in_reward = 0.0 if train.kl_coef_in_loss or reference is None else train.kl_to_ref_coeff
    return GroupCollector(
        env,
        policy=InferencePolicy(run.engines, data, sampling, config.seed, run.clock),
        dialog_turns_per_batch=train.dialog_turns_per_batch,
        total_dialog_turns=train.total_dialog_turns,
        postproc=Finish(env, reference, kl_in_reward, config.ray.timeout_s),
    )
