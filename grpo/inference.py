"""The inference actor: hosts one engine and steps it; requests go in, finished responses come out.

Everything runs on the actor's one event loop, so a weight update happens between two engine steps by construction:

    generate, submit ──> engine.add ─┐
                                     ├─ loop: engine.step() ──> finished responses ──> generate returns, or take
    update_weights ──────────────────┘       (whenever the engine has work)

An engine (vLLM or transformers) implements `Engine`; the actor adds nothing but the loop.
"""

import asyncio
import importlib
import os
import re
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from grpo.config import RunConfig
from grpo.errors import Restarted, one_line
from grpo.nodes import use_node_interface
from grpo.rollout import Completions
from grpo.weight_sync import Receipt


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn."""

    num_responses: int
    max_tokens: int
    temperature: float  # 0: greedy
    top_p: float = 1.0


@dataclass(frozen=True)
class Request:
    """One prompt to respond to. `request_id` is the caller's, unique among the requests in flight."""

    request_id: int
    prompt: list[int]
    sampling: Sampling


@dataclass(frozen=True)
class EngineSpec:
    """What an engine needs to start."""

    backend: str  # vllm or transformers
    model: str
    device: str
    dtype: str  # of vLLM's weights; transformers runs in float32
    seed: int
    max_concurrent: int  # responses in flight
    max_length: int  # prompt + response, tokens
    top_p: float
    gpu_memory_utilization: float
    enforce_eager: bool
    tensor_parallel_size: int = 1
    sleeps: bool = False  # between its last response and the next push, while others have its device


def engine_spec(config: RunConfig, model: str, device: str) -> EngineSpec:
    """The engine of a run with this configuration, for the model at `model` (a path or hub name) on `device`."""
    inference = config.inference_model
    return EngineSpec(
        backend=inference.backend,
        model=model,
        device=device,
        dtype="float32" if device == "cpu" else inference.dtype,
        seed=config.seed,
        max_concurrent=config.env.num_envs * config.env.repeats,
        max_length=config.env.max_prompt_length + inference.max_tokens,
        top_p=inference.top_p,
        gpu_memory_utilization=inference.gpu_memory_utilization,
        enforce_eager=inference.enforce_eager or device == "cpu",
        tensor_parallel_size=inference.tensor_parallel_size,
    )


def engine_environment(spec: EngineSpec) -> dict[str, str]:
    """Environment variables for an engine's process."""
    if spec.backend != "vllm":
        return {}
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    if spec.device == "cpu":
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    if spec.device == "cuda" and spec.dtype == "float32":
        # vLLM's kernel for attention in float32 is one of Triton's, whose products are rounded to TF32 by default (10 bits),
        # which would tell its log-probs from the trainer's.
        variables["TRITON_F32_DEFAULT"] = "ieee"
    if spec.enforce_eager:
        variables["TORCHDYNAMO_DISABLE"] = "1"
    return variables


class Engine(Protocol):
    """Samples responses one step at a time; weights may change between two steps."""

    policy_version: int
    dtype: str  # of its weights, as torch names it

    def connect(self, description: dict, engine: str, first_index: int, aliases: list[str]) -> list[str]:
        """Take part in the trainer's pushes (`Sender.description`) as receiver `first_index` and following.

        `engine` is its name in errors, `aliases` the further names of tied weights. Returns the names that it can only
        tell a projection of.
        """

    def add(self, request: Request) -> None:
        """Queue a request."""

    def has_work(self) -> bool:
        """Whether any request is unfinished."""

    def has_room(self) -> bool:
        """Whether it could begin another response with its next step."""

    def step(self) -> Completions | None:
        """Advance, and return the requests that finished, each with all its responses."""

    def update_weights(self, version: int) -> Receipt:
        """Receive and load push `version`, then tell what is held; running requests go on under the new weights.

        An engine that sleeps is awake again afterwards.
        """

    def log_probs(self, tokens: list[int]) -> np.ndarray:
        """Log-probs [T - 1] of all tokens but the first, in nats at temperature 1, under the current weights."""

    def reseed(self, seed: int) -> None:
        """Make what is sampled next depend on `seed` and the requests alone."""

    def sleep(self) -> None:
        """Give the memory of weights and cache back; an idle engine, which the next push wakes. Asleep, it stays so."""


ENGINES = {
    "vllm": "grpo.engine_vllm:VLLMEngine",
    "transformers": "grpo.engine_transformers:TransformersEngine",
}


# What vLLM says, as ValueError or RuntimeError, where a GPU has too little memory for its weights or its cache.
SHORT_OF_MEMORY = re.compile("free memory on device|available memory for the cache|available KV cache|out of memory", re.I)


def make_engine(spec: EngineSpec) -> Engine:
    """The engine, with its model; raises torch.OutOfMemoryError where its GPU has too little memory."""
    module, _, name = ENGINES[spec.backend].partition(":")
    try:
        return getattr(importlib.import_module(module), name)(spec)
    except (ValueError, RuntimeError) as error:
        if spec.device != "cuda" or not SHORT_OF_MEMORY.search(str(error)):
            raise
        raise torch.OutOfMemoryError(one_line(error)) from error


class Inbox:
    """Finished responses that wait for whoever asked for them."""

    def __init__(self) -> None:
        self.finished: list[Completions] = []
        self.waiting_for = 0  # requests
        self.changed = asyncio.Event()

    def take(self) -> list[Completions]:
        """What has finished, by the engine steps in which anything did."""
        taken, self.finished = self.finished, []
        return taken


class InferenceActor:
    """A Ray actor (asyncio): see the module's drawing."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.stream = Inbox()
        self.held: deque[Request] = deque()  # submitted, and not yet the engine's
        self.asked: dict[int, tuple[Inbox, int]] = {}  # who asked for a request, and under which id, by the engine's id
        self.num_requests = 0
        self.loop_task: asyncio.Task | None = None
        self.busy_s = 0.0
        self.draining = False
        self.asleep = False

    def __getattr__(self, name: str) -> None:
        if name == "engine":  # which `start` makes: this process took the place of one that had died
            raise Restarted
        raise AttributeError(name)

    async def start(self) -> int:
        """Load the model; returns the process id."""
        use_node_interface()
        self.engine = make_engine(self.spec)
        return os.getpid()

    async def weights_dtype(self) -> str:
        return self.engine.dtype

    async def connect(self, description: dict, engine: str, first_index: int, aliases: list[str]) -> list[str]:
        return self.engine.connect(description, engine, first_index, aliases)

    async def generate(self, requests: list[Request], seed: int | None = None) -> Completions:
        """The responses to `requests`, once all are finished.

        With `seed`, what they sample depends on it and on them alone; the engine must then be idle.
        """
        if seed is not None:
            assert not self.engine.has_work(), "an engine can be reseeded only while it is idle"
            self.engine.reseed(seed)
        inbox = Inbox()
        inbox.waiting_for = len(requests)
        self._add(requests, inbox)
        self._go_on()
        while inbox.waiting_for:
            await self._next(inbox)
        return Completions.concatenate(inbox.take())

    async def submit(self, requests: list[Request], seed: int) -> None:
        """Queue `requests`, whose responses `take` gives; an idle engine is seeded first.

        They are held back until the engine has room, so that what is asked for meanwhile (a probe, an evaluation) waits for
        what runs alone.
        """
        if not self.engine.has_work():
            self.engine.reseed(seed)
        self.held += requests
        self.stream.waiting_for += len(requests)
        self._go_on()

    async def take(self, wait_s: float) -> list[Completions]:
        """What has finished of what was submitted, once there is any or `wait_s` seconds are over: a part an engine step."""
        try:
            async with asyncio.timeout(wait_s) as waiting:
                while not self.stream.finished:
                    await self._next(self.stream)
        except TimeoutError:
            if not waiting.expired():  # it is the engine's own
                raise
        return self.stream.take()

    async def holding(self) -> list[int]:
        """The ids of what was submitted and not taken."""
        ids = [request.request_id for request in self.held]
        ids += [i for inbox, i in self.asked.values() if inbox is self.stream]
        return ids + [i for finished in self.stream.finished for i in set(finished.request_id.tolist())]

    async def hold_nothing(self) -> None:
        """Give up what was submitted and is not the engine's yet."""
        self.stream.waiting_for -= len(self.held)
        self.held.clear()

    def _add(self, requests: list[Request], inbox: Inbox) -> None:
        assert not self.asleep, "an engine that sleeps has no weights to sample with before the next push"
        for request in requests:
            self.asked[self.num_requests] = inbox, request.request_id
            self.engine.add(replace(request, request_id=self.num_requests))
            self.num_requests += 1

    def _go_on(self) -> None:
        if self.loop_task is None or self.loop_task.done():
            self.loop_task = asyncio.create_task(self._run())
            self.stream.changed.set()  # who waits for what was held back looks at the new task from now on

    async def _next(self, inbox: Inbox) -> None:
        """Wait until more may be in `inbox`; an engine's error belongs to whoever waits for its responses."""
        inbox.changed.clear()
        running = {self.loop_task} if inbox.waiting_for else set()
        if running and self.loop_task.done():  # with an error, or drained: then nothing comes before the next push
            self.loop_task.result()
            running = set()
        change = asyncio.create_task(inbox.changed.wait())
        try:
            await asyncio.wait({change, *running}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            change.cancel()

    async def _run(self) -> None:
        while self.engine.has_work() or (self.held and not self.draining):
            while self.held and not self.draining and self.engine.has_room():
                self._add([self.held.popleft()], self.stream)
            start = time.perf_counter()
            finished = self.engine.step()
            self.busy_s += time.perf_counter() - start
            if finished is not None:
                self._deliver(finished)
            await asyncio.sleep(0)  # let calls in

    def _deliver(self, finished: Completions) -> None:
        ids = finished.request_id.tolist()
        asked = {i: self.asked.pop(i) for i in set(ids)}
        finished.request_id = np.array([asked[i][1] for i in ids])
        for inbox in {inbox for inbox, _ in asked.values()}:
            mine = np.array([asked[i][0] is inbox for i in ids])
            inbox.finished.append(finished if mine.all() else finished.select(mine))
            inbox.waiting_for -= sum(1 for its, _ in asked.values() if its is inbox)
            inbox.changed.set()

    async def update_weights(self, version: int) -> Receipt:
        """Receive push `version` and acknowledge it once it was applied."""
        receipt = self.engine.update_weights(version)
        self.draining = self.asleep = False
        self._go_on()
        return receipt

    async def drain(self) -> None:
        """Wait until nothing runs, and begin nothing more before the next push: what runs ends under its first weights."""
        self.draining = True
        while self.engine.has_work():
            await asyncio.wait({self.loop_task})
            self.loop_task.result()

    async def sleep(self) -> None:
        """Give the engine's memory back until the next push, which alone wakes it: until then there are no weights."""
        assert not self.engine.has_work(), "an engine can go to sleep only while it is idle"
        self.engine.sleep()
        self.asleep = True

    async def log_probs(self, tokens: list[int]) -> np.ndarray:
        """Log-probs [T - 1] of all tokens but the first under the current weights."""
        assert not self.asleep, "an engine that sleeps has no weights to score with before the next push"
        return self.engine.log_probs(tokens)

    async def busy(self) -> float:
        """Seconds spent in engine steps so far."""
        return self.busy_s
