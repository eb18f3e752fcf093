"""Bounded staleness: hand-worked cases, and random durations and pushes against what the rules promise."""

import random
from collections import Counter

import pytest

from grpo.admission import Admission, UniformAdmission


def test_staleness_0_starts_exactly_what_one_version_trains_on():
    admission = Admission(groups_per_batch=4, num_groups=100, max_staleness=0, batches_per_version=2)
    assert admission.start() == list(range(8))
    assert admission.start() == []
    assert admission.choose([5, 0, 3, 1, 2]) == [0, 1, 2, 3]
    assert admission.start() == []  # what is started now would be trained on after the push
    assert admission.choose([4, 5, 6]) is None
    assert admission.choose([4, 5, 6, 7]) == [4, 5, 6, 7]
    admission.pushed()
    assert admission.start() == list(range(8, 16))


def test_a_bound_of_one_keeps_one_version_of_groups_ahead():
    admission = Admission(groups_per_batch=2, num_groups=100, max_staleness=1)
    assert admission.start() == [0, 1, 2, 3]
    assert admission.choose([0, 1]) == [0, 1]
    assert admission.start() == []
    admission.pushed()
    assert admission.start() == [4, 5]


def test_finished_groups_do_not_wait_for_a_straggler_that_has_time():
    admission = Admission(groups_per_batch=2, num_groups=100, max_staleness=2)
    assert admission.start() == [0, 1, 2, 3, 4, 5]
    assert admission.choose([1, 2]) == [1, 2]
    admission.pushed()
    assert admission.start() == [6, 7]
    assert admission.choose([3, 4]) == [3, 4]
    admission.pushed()
    # Group 0 was started under version 0: this is the last batch that may have it.
    assert admission.choose([5, 6, 7]) is None
    assert admission.choose([0, 5, 6, 7]) == [0, 5]


def test_an_early_push_begins_a_version_of_its_own():
    admission = Admission(groups_per_batch=1, num_groups=100, max_staleness=0, batches_per_version=3)
    assert admission.start() == [0, 1, 2]
    for i in range(2):
        assert admission.choose([0, 1, 2]) == [i]
    admission.pushed()  # group 2 was started under the version before
    assert admission.deadlines == {2: 2}
    assert admission.start() == [3, 4]
    assert admission.choose([3, 4]) is None
    assert admission.choose([2, 3, 4]) == [2]


def test_the_end_of_the_run_starts_nothing_more():
    admission = Admission(groups_per_batch=2, num_groups=4, max_staleness=9)
    assert admission.start() == [0, 1, 2, 3]
    assert admission.choose([0, 1, 2, 3]) == [0, 1]
    assert not admission.is_over
    assert admission.choose([2, 3]) == [2, 3]
    assert admission.is_over


def test_the_room_in_the_buffer_bounds_what_is_started():
    admission = Admission(groups_per_batch=2, num_groups=40, max_staleness=9, most_started=3)
    assert admission.start() == [0, 1, 2]
    assert admission.choose([1, 2]) == [1, 2]
    assert admission.start() == [3, 4]


def test_a_dropped_group_is_replaced_by_the_next_prompt():
    admission = Admission(groups_per_batch=2, num_groups=4, max_staleness=0)
    assert admission.start() == [0, 1]
    admission.drop([1])
    assert admission.start() == [2]
    assert admission.choose([0, 2]) == [0, 2]
    admission.pushed()
    assert admission.start() == [3, 4]
    assert admission.choose([3, 4]) == [3, 4]
    assert admission.is_over


def test_a_resumed_run_starts_the_lost_groups_first():
    admission = Admission(groups_per_batch=2, num_groups=10, max_staleness=1)
    admission.restore(batch=2, first_batch=2, next_id=7, again=[3, 5, 6])
    assert admission.start() == [3, 5, 6, 7]
    assert admission.deadline == 3
    assert admission.state == {"batch": 2, "first_batch": 2, "next_id": 8, "again": [3, 5, 6, 7]}
    assert admission.choose([5, 7]) == [5, 7]
    assert admission.state == {"batch": 3, "first_batch": 2, "next_id": 8, "again": [3, 6]}


@pytest.mark.parametrize("seed", range(400))
def test_nothing_older_than_the_bound_is_trained_on_nothing_is_lost_and_nothing_blocks(seed):
    """Random durations, pushes on time, processes that end at any batch, and groups that are dropped."""
    draw = random.Random(seed)
    batches_per_version, max_staleness = draw.randint(1, 4), draw.randint(0, 4)
    size, batches = draw.randint(1, 4), draw.randint(1, 25)
    room = draw.choice([None, None, size, 3 * size])
    share_dropped, share_ended = draw.choice([0.0, 0.0, 0.3]), draw.choice([0.0, 0.1])
    settings = size, size * batches, max_staleness, batches_per_version, room
    admission = Admission(*settings)
    version, since_push = 0, 0
    started: dict[int, int] = {}  # version
    running: dict[int, int] = {}  # time left
    finished, trained, dropped = set(), [], set()
    while not admission.is_over:
        if draw.random() < share_ended:  # killed, and resumed: what was not trained on is lost, and weights are pushed
            state, admission = admission.state, Admission(*settings)
            admission.restore(**state)
            assert set(state["again"]) == running.keys() | finished
            running, finished = {}, set()
            if since_push:
                version, since_push = version + 1, 0
                admission.pushed()
        ids = admission.start()
        assert not set(ids) & (running.keys() | finished | set(trained) | dropped)
        started |= dict.fromkeys(ids, version)
        running |= {i: draw.choice([1, draw.randint(1, 60)]) for i in ids}
        batch = admission.choose(finished)
        if batch is None:
            assert running, "only something that still runs can be waited for: else it would block for ever"
            soonest = min(running.values())
            running = {i: left - soonest for i, left in running.items()}
            for i in [i for i, left in running.items() if left <= 0]:
                del running[i]
                if draw.random() < share_dropped:
                    dropped.add(i)
                    admission.drop([i])
                else:
                    finished.add(i)
            continue
        assert len(batch) == size
        finished -= set(batch)
        assert all(version - started[i] <= max_staleness for i in batch)
        trained += batch
        since_push += 1
        if since_push == batches_per_version:
            version, since_push = version + 1, 0
            admission.pushed()
    assert len(trained) == len(set(trained)) == size * batches
    if not dropped:
        assert sorted(trained) == list(range(size * batches))


def uniform(**changes) -> UniformAdmission:
    """Two groups a batch and a batch a version; 4 prompts at the engines."""
    settings = {"groups_per_batch": 2, "num_groups": 100, "max_staleness": 1, "batches_per_version": 1}
    return UniformAdmission(**settings | {"most_running": 4, "capacity": 50, "seed": 0} | changes)


def test_a_uniform_draw_is_from_all_that_is_there_and_leaves_it_there():
    admission = uniform(max_staleness=10_000)
    assert admission.start() == [0, 1, 2, 3]
    drawn = Counter()
    assert admission.choose([2]) is None
    assert admission.start() == [4]  # in the place of the one that finished
    for _ in range(2000):
        batch = admission.choose([0, 1, 2, 3])
        assert len(set(batch)) == 2
        assert admission.leaving == []
        drawn.update(batch)
        metrics = admission.of_batch(batch)
        assert metrics["rollout/uses_mean"] == sum(drawn[i] for i in batch) / 2
        assert metrics["rollout/uses_max"] == max(drawn[i] for i in batch)
    # 1,000 each, with a standard deviation of 22.
    assert drawn.keys() == {0, 1, 2, 3}
    assert all(abs(count - 1000) < 90 for count in drawn.values())


def test_a_group_leaves_with_its_last_batch_and_is_counted_where_it_was_never_drawn():
    admission = uniform()
    admission.start()
    first = admission.choose([0, 1, 2, 3])
    admission.of_batch(first)
    admission.pushed()
    assert admission.start() == [4, 5, 6, 7]
    assert admission.choose([0, 1, 2, 3]) is not None  # their last: 4 to 7 have another one
    second = {i for i, uses in admission.uses.items() if uses}
    admission.pushed()
    batch = admission.choose([0, 1, 2, 3, 4, 5])
    assert batch is None  # 6 and 7 could not be drawn any more
    batch = admission.choose([0, 1, 2, 3, 4, 5, 6, 7])
    assert set(batch) <= {4, 5, 6, 7}
    assert admission.leaving == [0, 1, 2, 3]
    assert admission.of_batch(batch)["buffer/left_unused"] == 4 - len(second)
    assert admission.of_batch(batch)["buffer/left_unused"] == 0


def test_younger_groups_take_the_room_of_the_oldest():
    admission = uniform(max_staleness=9, capacity=3, most_running=9)
    admission.start()
    admission.choose([5])
    admission.choose([5, 1])
    assert set(admission.choose([5, 1, 7, 8])) <= {1, 7, 8}
    assert admission.leaving == [5]


def test_a_resumed_uniform_run_starts_what_was_never_trained_on():
    admission = uniform()
    admission.start()
    assert admission.choose([0, 2, 3]) is not None
    (unused,) = (i for i in (0, 2, 3) if admission.uses[i] == 0)
    state = admission.state
    assert state == {"batch": 1, "first_batch": 0, "next_id": 4, "again": [unused, 1]}
    other = uniform()
    other.restore(**state)
    assert other.start() == [unused, 1]  # no more of this version can be in its last batch, the next
    assert other.uses == {}


def test_draws_depend_on_the_seed_and_the_batch_alone():
    def draws(seed: int) -> list[list[int]]:
        admission = uniform(seed=seed, max_staleness=1000, most_running=40)
        admission.start()
        return [admission.choose(range(40)) for _ in range(5)]

    assert draws(1) == draws(1) != draws(2)
    assert len({tuple(batch) for batch in draws(1)}) > 1


@pytest.mark.parametrize("seed", range(300))
def test_a_uniform_draw_has_nothing_older_than_the_bound_loses_no_prompt_and_blocks_never(seed):
    """As above: random durations, pushes, ends and drops; and every group could be drawn, however long it took."""
    draw = random.Random(seed)
    batches_per_version, max_staleness, size = draw.randint(1, 3), draw.randint(1, 4), draw.randint(1, 4)
    batches, most_running = draw.randint(1, 30), size + draw.randint(0, 12)
    capacity = draw.choice([10_000, size, 2 * size])
    share_dropped, share_ended = draw.choice([0.0, 0.0, 0.3]), draw.choice([0.0, 0.1])
    settings = size, size * batches, max_staleness, batches_per_version, most_running, capacity, seed
    admission = UniformAdmission(*settings)
    version, since_push = 0, 0
    started, running, finished = {}, {}, set()
    again, could_be_drawn, trained, dropped, expired = set(), set(), Counter(), set(), set()
    while not admission.is_over:
        if draw.random() < share_ended:
            state, unused = admission.state, {i for i in finished if i not in trained} - set(admission.expired)
            assert set(state["again"]) == running.keys() | unused | again
            admission = UniformAdmission(*settings)
            admission.restore(**state)
            running, finished, again = {}, set(), set(state["again"])
            if since_push:
                version, since_push = version + 1, 0
                admission.pushed()
        ids = admission.start()
        assert not set(ids) & (running.keys() | finished | dropped | expired | set(trained))
        again -= set(ids)
        started |= dict.fromkeys(ids, version)
        running |= {i: draw.choice([1, draw.randint(1, 60)]) for i in ids}
        assert len(running) <= most_running
        batch = admission.choose(finished)
        if batch is None:
            assert running, "only something that still runs can be waited for: else it would block for ever"
            soonest = min(running.values())
            running = {i: left - soonest for i, left in running.items()}
            for i in [i for i, left in running.items() if left <= 0]:
                del running[i]
                if draw.random() < share_dropped:
                    dropped.add(i)
                    admission.drop([i])
                else:
                    finished.add(i)
            continue
        assert len(set(batch)) == size
        assert not set(batch) & set(admission.leaving)
        if capacity == 10_000:
            assert set(admission.leaving) <= could_be_drawn
        expired |= set(admission.leaving)
        finished -= set(admission.leaving)
        assert all(version - started[i] <= max_staleness for i in finished)
        assert len(finished) <= capacity
        could_be_drawn |= finished
        trained.update(batch)
        since_push += 1
        if since_push == batches_per_version:
            version, since_push = version + 1, 0
            admission.pushed()
    assert trained.total() == size * batches
    if capacity == 10_000 and not dropped | running.keys() | again:
        assert could_be_drawn == started.keys()
