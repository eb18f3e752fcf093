"""The inference actor's loop on a stub engine, without Ray."""

import asyncio
import sys
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from grpo import inference
from grpo.inference import InferenceActor, Request, Sampling, engine_environment, engine_spec, make_engine
from grpo.launch import compose
from grpo.rollout import Completions
from grpo.weight_sync import Receipt


class Counting:
    """Finishes one queued request a step; its responses hold the prompt and the version of that step."""

    def __init__(self, spec=None) -> None:
        self.queue: list[Request] = []
        self.policy_version, self.seeds, self.sleeps = 0, [], 0
        self.error = RuntimeError("the engine broke")

    def add(self, request: Request) -> None:
        self.queue.append(request)

    def has_work(self) -> bool:
        return bool(self.queue)

    def has_room(self) -> bool:
        return len(self.queue) < 3

    def step(self) -> Completions | None:
        request = self.queue.pop()
        if not request.prompt:
            raise self.error
        n, size = request.sampling.num_responses, len(request.prompt)
        return Completions(
            np.full(n, request.request_id),
            np.full(n, size),
            np.full(n, True),
            np.tile(request.prompt, n),
            np.zeros(n * size, dtype=np.float32),
            np.full(n * size, self.policy_version, dtype=np.int32),
        )

    def update_weights(self, version: int) -> Receipt:
        self.policy_version = version
        return Receipt(version, [], {}, {})

    def reseed(self, seed: int) -> None:
        self.seeds.append(seed)

    def sleep(self) -> None:
        self.sleeps += 1


@pytest.fixture
def actor(monkeypatch) -> InferenceActor:
    monkeypatch.setattr(inference, "make_engine", Counting)
    return InferenceActor(None)


def requests(*ids: int, num_responses: int = 2) -> list[Request]:
    return [Request(i, [i, i + 1], Sampling(num_responses, 4, 1.0)) for i in ids]


def test_every_request_gets_its_responses_and_none_is_returned_twice(actor):
    async def scenario() -> None:
        await actor.start()
        first = await actor.generate(requests(3, 1, 2), seed=9)
        assert first.in_request_order().request_id.tolist() == [1, 1, 2, 2, 3, 3]
        assert first.in_request_order().responses() == [[1, 2], [1, 2], [2, 3], [2, 3], [3, 4], [3, 4]]
        second = await actor.generate(requests(7))
        assert second.request_id.tolist() == [7, 7]
        assert actor.engine.seeds == [9]

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_what_is_submitted_is_taken_as_it_finishes_and_apart_from_what_is_generated_meanwhile(actor):
    async def scenario() -> None:
        await actor.start()
        assert await actor.take(0.01) == []
        await actor.submit(requests(0, 1, 2, 3), seed=4)
        assert actor.engine.seeds == [4]
        early = await actor.take(5)
        assert all(len(part) == 2 for part in early)  # one request finishes a step
        assert 1 <= len(early) < 4
        await actor.submit(requests(4), seed=5)
        assert actor.engine.seeds == [4]  # it was not idle
        between = await actor.generate(requests(0, 9))  # ids of one caller's may be those of another's
        assert sorted(between.request_id) == [0, 0, 9, 9]
        taken = [i for part in early for i in part.request_id]
        while len(taken) < 10:
            taken += [i for part in await actor.take(5) for i in part.request_id]
        assert sorted(taken) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
        assert await actor.take(0.01) == []
        assert actor.busy_s > 0

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_a_drained_engine_begins_nothing_more_before_the_push(actor):
    async def scenario() -> None:
        await actor.start()
        await actor.submit(requests(*range(6)), seed=0)
        await asyncio.sleep(0)  # which begins some of them
        await actor.drain()
        assert not actor.engine.has_work()
        assert len(actor.held) > 0
        before = Completions.concatenate(await actor.take(5))
        assert set(before.versions) == {0}
        await actor.update_weights(1)
        after = []
        while len(before) + len(after) < 12:
            for part in await actor.take(5):
                assert set(part.versions) == {1}
                after += part.request_id.tolist()

    asyncio.run(asyncio.wait_for(scenario(), 10))


async def drained(actor: InferenceActor, *more: Request) -> None:
    """Have the actor hold what it has not begun, and `more`; all that it has begun is taken."""
    await actor.start()
    await actor.submit([*requests(*range(4)), *more], seed=0)
    await asyncio.sleep(0)
    await actor.drain()
    await actor.take(5)
    assert actor.held and not actor.engine.has_work()


def test_who_waits_for_a_drained_engine_sleeps_until_the_push(actor, monkeypatch):
    waits, wait_until_more = [], actor._next

    def counted(inbox: inference.Inbox):
        waits.append(inbox)
        return wait_until_more(inbox)

    async def scenario() -> None:
        await drained(actor, *requests(5))
        monkeypatch.setattr(actor, "_next", counted)
        assert await actor.take(0.2) == []
        assert len(waits) == 1
        waiting = asyncio.create_task(actor.take(5))
        await asyncio.sleep(0.1)
        await actor.update_weights(1)
        assert set(Completions.concatenate(await waiting).versions) == {1}
        assert len(waits) <= 4

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_an_engines_error_behind_a_push_reaches_who_waits_since_before_it(actor):
    async def scenario() -> None:
        await drained(actor, Request(9, [], Sampling(1, 4, 1.0)))
        actor.held = deque([actor.held[-1]])
        waiting = asyncio.create_task(actor.take(60))
        await asyncio.sleep(0.01)
        await actor.update_weights(1)
        with pytest.raises(RuntimeError, match="the engine broke"):
            await waiting

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_a_weight_update_falls_between_two_steps_and_answers_its_version(actor):
    async def scenario() -> None:
        await actor.start()
        running = asyncio.create_task(actor.generate(requests(*range(6))))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert (await actor.update_weights(5)).version == 5
        assert set((await running).versions.tolist()) == {0, 5}

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_an_engines_error_reaches_whoever_waits(actor):
    async def scenario() -> None:
        await actor.start()
        broken = Request(1, [], Sampling(1, 4, 1.0))
        with pytest.raises(RuntimeError, match="the engine broke"):
            await actor.generate([broken])

    asyncio.run(asyncio.wait_for(scenario(), 10))


@pytest.mark.parametrize("error", [RuntimeError("the engine broke"), TimeoutError("execute_model timed out")])
def test_an_engines_error_reaches_who_waits_for_the_stream(actor, error):
    async def scenario() -> None:
        await actor.start()
        actor.engine.error = error
        await actor.submit([Request(1, [], Sampling(1, 4, 1.0))], seed=0)
        with pytest.raises(type(error), match=str(error)):
            await actor.take(5)

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_reseeding_a_busy_engine_is_refused(actor):
    async def scenario() -> None:
        await actor.start()
        actor.engine.add(requests(1)[0])
        with pytest.raises(AssertionError, match="only while it is idle"):
            await actor.generate([], seed=1)

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_an_engine_that_sleeps_is_asked_for_nothing_before_the_next_push(actor):
    async def work():
        await actor.start()
        await actor.sleep()
        for asked in (actor.generate(requests(1)), actor.log_probs([1, 2])):
            with pytest.raises(AssertionError, match="an engine that sleeps has no weights"):
                await asked
        await actor.sleep()
        await actor.update_weights(1)
        found = await actor.generate(requests(1))
        actor.engine.add(requests(2)[0])
        with pytest.raises(AssertionError, match="an engine can go to sleep only while it is idle"):
            await actor.sleep()
        return found

    assert asyncio.run(work()).versions.tolist() == 4 * [1]
    assert actor.engine.sleeps == 2


# What vLLM 0.32 and torch raise at an engine's start.
SHORT = [
    ValueError("Free memory on device cuda:0 (61.2/79.1 GiB) on startup is less than desired GPU memory utilization (0.9,"),
    ValueError("No available memory for the cache blocks. Try increasing `gpu_memory_utilization`"),
    ValueError("To serve one request, 3.5 GiB KV cache is needed, which is larger than the available KV cache memory"),
    RuntimeError("Worker failed with error 'CUDA out of memory. Tried to allocate 2 GiB'"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
]


def engine_that_raises(monkeypatch, error: Exception, device: str):
    def start(spec):
        raise error

    monkeypatch.setitem(sys.modules, "an_engine", SimpleNamespace(Engine=start))
    monkeypatch.setitem(inference.ENGINES, "vllm", "an_engine:Engine")
    make_engine(SimpleNamespace(backend="vllm", device=device))


@pytest.mark.parametrize("error", SHORT)
def test_whatever_an_engine_says_when_its_gpu_is_full_is_one_kind_of_error(monkeypatch, error):
    with pytest.raises(torch.OutOfMemoryError) as raised:
        engine_that_raises(monkeypatch, error, "cuda")
    assert str(raised.value) == str(error)


def test_other_errors_of_an_engine_stay_what_they_are(monkeypatch):
    with pytest.raises(ValueError, match="no such model"):
        engine_that_raises(monkeypatch, ValueError("no such model"), "cuda")
    with pytest.raises(ValueError, match=r"^Free memory"):
        engine_that_raises(monkeypatch, SHORT[0], "cpu")  # a CPU's memory is another matter


@pytest.mark.parametrize(
    ("device", "dtype", "precision"),
    [("cuda", "float32", "ieee"), ("cuda", "bfloat16", None), ("cuda", "auto", None), ("cpu", "float32", None)],
)
def test_an_engine_in_float32_on_a_gpu_attends_in_float32(device, dtype, precision):
    spec = engine_spec(compose("grpo_arithmetic", [f"inference_model.{dtype=!s}"]), "model", device)
    assert engine_environment(spec).get("TRITON_F32_DEFAULT") == precision
