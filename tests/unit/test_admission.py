"""Bounded staleness: hand-worked cases, and random durations and pushes against what the rules promise."""

import random

import pytest

from grpo.admission import Admission, least_staleness


def test_staleness_0_starts_exactly_what_one_version_trains_on():
    admission = Admission(groups_per_batch=4, num_groups=100, max_staleness=0, steps_per_version=2)
    assert admission.start() == list(range(8))
    assert admission.start() == []
    assert admission.choose([5, 0, 3, 1, 2]) == [0, 1, 2, 3]
    assert admission.start() == []  # what is started now would be trained on after the push
    assert admission.choose([4, 5, 6]) is None
    assert admission.choose([4, 5, 6, 7]) == [4, 5, 6, 7]
    admission.pushed(1)
    assert admission.start() == list(range(8, 16))


def test_a_bound_of_one_keeps_one_version_of_groups_ahead():
    admission = Admission(groups_per_batch=2, num_groups=100, max_staleness=1)
    assert admission.start() == [0, 1, 2, 3]
    assert admission.choose([0, 1]) == [0, 1]
    assert admission.start() == []
    admission.pushed(1)
    assert admission.start() == [4, 5]


def test_finished_groups_do_not_wait_for_a_straggler_that_has_time():
    admission = Admission(groups_per_batch=2, num_groups=100, max_staleness=2)
    assert admission.start() == [0, 1, 2, 3, 4, 5]
    assert admission.choose([1, 2]) == [1, 2]
    admission.pushed(1)
    assert admission.start() == [6, 7]
    assert admission.choose([3, 4]) == [3, 4]
    admission.pushed(2)
    # Group 0 was started under version 0: this is the last batch that may have it.
    assert admission.choose([5, 6, 7]) is None
    assert admission.choose([0, 5, 6, 7]) == [0, 5]


def test_the_last_step_of_several_epochs_counts():
    # Batch b takes steps 2b and 2b + 1, each under a version of its own.
    assert least_staleness(epochs=2, steps_per_version=1) == 1
    admission = Admission(groups_per_batch=1, num_groups=9, max_staleness=1, steps_per_version=1, epochs=2)
    assert admission.start() == [0]
    assert admission.choose([0]) == [0]
    admission.pushed(1)
    assert admission.start() == []  # batch 1 ends under version 3
    admission.pushed(2)
    assert admission.start() == [1]


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
    admission.pushed(1)
    assert admission.start() == [3, 4]
    assert admission.choose([3, 4]) == [3, 4]
    assert admission.is_over


def test_a_resumed_run_starts_the_lost_groups_first():
    admission = Admission(groups_per_batch=2, num_groups=10, max_staleness=1)
    admission.restore(batch=2, next_id=7, again=[3, 5, 6], version=2)
    assert admission.start() == [3, 5, 6, 7]
    assert admission.deadline == 3
    assert admission.state == {"batch": 2, "next_id": 8, "again": [3, 5, 6, 7], "version": 2}
    assert admission.choose([5, 7]) == [5, 7]
    assert admission.state == {"batch": 3, "next_id": 8, "again": [3, 6], "version": 2}


@pytest.mark.parametrize("seed", range(300))
def test_nothing_older_than_the_bound_is_trained_on_nothing_is_lost_and_nothing_blocks(seed):
    draw = random.Random(seed)
    epochs, steps_per_version = draw.randint(1, 3), draw.randint(1, 4)
    max_staleness = least_staleness(epochs, steps_per_version) + draw.randint(0, 4)
    size, batches = draw.randint(1, 4), draw.randint(1, 25)
    room = draw.choice([None, None, size, 3 * size])
    admission = Admission(size, size * batches, max_staleness, steps_per_version, epochs, room)
    version, step, started, finished, trained, dropped = 0, 0, {}, set(), [], set()
    share_dropped = draw.choice([0.0, 0.0, 0.3])
    duration = {}
    while not admission.is_over:
        ids = admission.start()
        assert not set(ids) & started.keys()
        started |= dict.fromkeys(ids, version)
        for i in ids:
            duration[i] = draw.choice([1, draw.randint(1, 60)])
        running = list(duration)
        batch = admission.choose(finished)
        if batch is None:
            # Only something that still runs can be waited for: else it would block for ever.
            assert running
            soonest = min(duration[i] for i in running)
            for i in running:
                duration[i] -= soonest
                if duration[i] <= 0:
                    del duration[i]
                    if draw.random() < share_dropped:
                        dropped.add(i)
                        admission.drop([i])
                    else:
                        finished.add(i)
            continue
        assert len(batch) == size
        finished -= set(batch)
        for _ in range(epochs):
            assert all(version - started[i] <= max_staleness for i in batch)
            step += 1
            if step % steps_per_version == 0:
                version += 1
                admission.pushed(version)
        trained += batch
    assert len(trained) == len(set(trained)) == size * batches
    assert not set(trained) & dropped
    if room is None and not dropped:
        assert sorted(trained) == list(range(size * batches))
