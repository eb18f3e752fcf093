"""How work is split over ranks."""

import pytest
import torch

from grpo.pools import named, split_rows


@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 1), (1, 4), (2, 1), (2, 4), (4, 2)])
def test_every_row_goes_to_exactly_one_rank_in_equal_parts(ranks, micro_batches):
    lengths = torch.randint(1, 100, (16,), generator=torch.Generator().manual_seed(0))
    shares = split_rows(lengths, ranks, micro_batches)
    assert sorted(torch.cat([share.rows for share in shares]).tolist()) == list(range(16))
    assert [share.sizes for share in shares] == [[16 // ranks // micro_batches] * micro_batches] * ranks


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


def test_several_actors_are_told_apart_by_number():
    assert list(named("inference", ["x"])) == ["the inference actor"]
    assert named("training", ["x", "y"]) == {"training actor 0": "x", "training actor 1": "y"}
