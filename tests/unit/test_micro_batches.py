"""How a batch is split over ranks and micro-batches."""

import numpy as np
import pytest
import torch

from grpo.micro_batches import split_rows


@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 1), (1, 4), (2, 1), (2, 4), (4, 2)])
def test_every_row_goes_to_exactly_one_rank_in_equal_parts(ranks, micro_batches):
    lengths = torch.randint(1, 100, (16,), generator=torch.Generator().manual_seed(0))
    shares = split_rows(lengths, ranks, micro_batches)
    assert sorted(torch.cat([share.rows for share in shares]).tolist()) == list(range(16))
    assert [share.sizes for share in shares] == [[16 // ranks // micro_batches] * micro_batches] * ranks


@pytest.mark.parametrize("seed", range(40))
def test_with_a_token_budget_no_micro_batch_is_over_it_and_ranks_have_as_many(seed):
    generator = torch.Generator().manual_seed(seed)
    ranks, at_least, longest = (int(torch.randint(1, high, (), generator=generator)) for high in (5, 4, 60))
    rows = ranks * at_least * int(torch.randint(1, 9, (), generator=generator))
    lengths = torch.randint(1, longest + 1, (rows,), generator=generator)
    budget = longest + int(torch.randint(0, 4 * longest, (), generator=generator))
    shares = split_rows(lengths, ranks, at_least, budget)
    assert sorted(torch.cat([share.rows for share in shares]).tolist()) == list(range(rows))
    assert len({len(share.sizes) for share in shares}) == 1
    assert len(shares[0].sizes) >= at_least
    for share in shares:
        assert sum(share.sizes) == len(share.rows)
        for part in lengths[share.rows].split(share.sizes):
            assert 1 <= len(part) <= rows // (ranks * at_least)
            assert int(part.max()) * len(part) <= budget


def test_the_budget_fills_micro_batches_by_the_longest_row():
    lengths = torch.tensor([10, 2, 9, 3, 2, 1, 5, 4])
    (share,) = split_rows(lengths, 1, 1, max_tokens=20)
    assert [part.tolist() for part in lengths[share.rows].split(share.sizes)] == [[10, 9], [5, 4, 3, 2], [2, 1]]
    first, second = split_rows(lengths, 2, 1, max_tokens=20)  # three parts: the largest is halved, so that each rank has two
    assert [part.tolist() for part in lengths[first.rows].split(first.sizes)] == [[10], [5, 4, 3, 2]]
    assert [part.tolist() for part in lengths[second.rows].split(second.sizes)] == [[9], [2, 1]]


def test_a_wide_budget_changes_nothing():
    lengths = torch.randint(1, 100, (16,), generator=torch.Generator().manual_seed(0))
    for without, wide in zip(split_rows(lengths, 2, 2), split_rows(lengths, 2, 2, 10_000), strict=True):
        assert torch.equal(without.rows, wide.rows)
        assert without.sizes == wide.sizes


def test_rows_of_similar_length_share_a_micro_batch_and_ranks_take_turns():
    lengths = torch.tensor([5, 80, 7, 79, 40, 6, 41, 8])
    first, second = split_rows(lengths, num_ranks=2, num_micro_batches=2)
    assert lengths[first.rows].tolist() == [80, 79, 8, 7]
    assert lengths[second.rows].tolist() == [41, 40, 6, 5]


def test_padding_is_never_more_than_in_order_of_arrival():
    lengths = torch.randint(1, 1000, (64,), generator=torch.Generator().manual_seed(1))
    padded = sum(int(part.max()) * len(part) for part in lengths[split_rows(lengths, 1, 8)[0].rows].chunk(8))
    in_order = sum(int(part.max()) * len(part) for part in lengths.chunk(8))
    assert padded < 0.7 * in_order


@pytest.mark.parametrize("seed", range(30))
def test_rows_without_gradient_come_last_on_every_rank_and_no_row_is_lost(seed):
    rng = np.random.default_rng(seed)
    ranks, micro_batches = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    size = ranks * micro_batches * int(rng.integers(1, 7))
    lengths = torch.from_numpy(rng.integers(1, 30, size))
    training = torch.from_numpy(rng.random(size) < rng.choice([0.0, 0.1, 0.5, 0.9, 1.0]))
    budget = int(rng.choice([30, 60, 10_000]))
    shares = split_rows(lengths, ranks, micro_batches, budget, training)
    assert sorted(torch.cat([share.rows for share in shares]).tolist()) == list(range(size))
    assert len({(len(share.sizes), share.num_training) for share in shares}) == 1
    num_joined = 0
    for share in shares:
        for i, rows in enumerate(share.rows.split(share.sizes)):
            assert len(rows) <= size // (ranks * micro_batches)
            assert len(rows) * int(lengths[rows].max()) <= budget
            if i >= share.num_training:
                assert not training[rows].any()
            else:
                num_joined += int((~training[rows]).sum())
    assert num_joined < ranks
    assert (shares[0].num_training > 0) == bool(training.any())
