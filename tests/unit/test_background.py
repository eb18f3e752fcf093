"""The collector's threads hand each other what was sampled."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from grpo.background import CollectorActor, Waiting
from grpo.errors import Restarted

from .conftest import completions


def parts(*ids: int) -> list:
    """An engine step's completions each: one response to the request of that id."""
    made = [completions([3], seed=i) for i in ids]
    for i, part in zip(ids, made, strict=True):
        part.request_id[:] = i
    return made


def test_each_thread_takes_its_share_of_what_waits_the_oldest_first():
    waiting = Waiting()
    waiting.put(parts(0, 1, 2))
    waiting.put(parts(3, 4))
    assert waiting.take(1, share=2).request_id.tolist() == [0, 1, 2]
    assert waiting.take(1, share=2).request_id.tolist() == [3]
    assert waiting.take(1, share=2).request_id.tolist() == [4]
    assert waiting.take(0.01, share=2) is None


def test_a_thread_that_waits_is_woken_by_what_comes():
    waiting = Waiting()
    with ThreadPoolExecutor(1) as pool:
        start = time.monotonic()
        taken = pool.submit(waiting.take, 30, 1)
        time.sleep(0.05)
        waiting.put(parts(7))
        assert taken.result(5).request_id.tolist() == [7]
        assert time.monotonic() - start < 5


def test_a_collector_that_took_the_place_of_one_that_died_says_so_when_it_is_to_run():
    with pytest.raises(Restarted):
        CollectorActor(None, "a model", "the inference actor").run()
