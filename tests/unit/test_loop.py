"""A run's loop without actors: what it collects, leaves out, keeps in a checkpoint, and takes up again."""

from itertools import count
from types import SimpleNamespace

import pytest
import torch

from grpo import run_async
from grpo.errors import TrainingError
from grpo.replay import Seen
from grpo.run_async import AsyncRun
from grpo.run_sync import SyncRun

from .test_replay import collection

SKIPPING = SimpleNamespace(
    train=SimpleNamespace(skip_zero_advantage=True),
    groups_per_collection=2,
    groups_per_batch=1,
    ray=SimpleNamespace(timeout_s=1.0),
)


def rounds(*teaching: int):
    """Collections of 2 groups, of which so many have an advantage; what comes after `teaching` has none."""
    for i in range(100):
        groups = collection(2 * i, 2)
        groups["advantage"] = torch.zeros(groups["reward"].shape)
        groups["advantage"][: teaching[i] if i < len(teaching) else 0] = 1.0
        yield groups


@pytest.mark.parametrize(("teach", "in_a_row"), [((), 52), ((1,), 52), ((0, 0, 1), 52)])
def test_a_collection_is_given_up_where_nothing_teaches_any_more_though_one_group_did(teach, in_a_row):
    its = SyncRun.__new__(SyncRun)
    its.config, its._collections = SKIPPING, rounds(*teach)
    with pytest.raises(TrainingError, match=rf"^{in_a_row} groups in a row had equal rewards"):
        its._collect()


def test_groups_that_are_left_out_are_no_row_where_one_between_them_teaches():
    its = SyncRun.__new__(SyncRun)
    its.config, its._collections = SKIPPING, rounds(*[0] * 25, 1, *[0] * 25, 1)
    kept, dropped = its._collect()
    assert kept["group_id"][:, 0].tolist() == [50, 102]
    assert len(dropped) == 102


@pytest.fixture
def looking(monkeypatch):
    """An asynchronous run, and a function that has it look at a buffer with so many groups more in it, or left out."""
    monkeypatch.setattr(run_async, "get", lambda seen, *_: seen)
    its, ids, there = AsyncRun.__new__(AsyncRun), count(), []
    its.config, its.finished, its.dropped = SKIPPING, set(), {}
    its.engines, its.admission = SimpleNamespace(sampled=lambda ids: None), SimpleNamespace(deadlines=range(1000))
    its.admission.drop = lambda ids: None

    def look(finished: int, dropped: int) -> None:
        there.extend(next(ids) for _ in range(finished))
        seen = Seen([], list(there), {next(ids): [] for _ in range(dropped)})
        its.buffer = SimpleNamespace(look=SimpleNamespace(remote=lambda: seen))
        its._look()

    return look


def test_a_row_of_groups_that_are_left_out_begins_anew_with_one_that_teaches(looking):
    for finished, dropped in [(0, 30), (1, 20), (0, 30), (2, 0), (0, 50)]:
        looking(finished, dropped)
    with pytest.raises(TrainingError, match=r"^51 groups in a row had equal rewards"):
        looking(0, 1)
