"""Bounded staleness: hand-worked cases, and random durations and pushes against what the rules promise."""

import random

import pytest

from grpo.admission import Admission


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
