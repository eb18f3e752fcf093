"""How a batch is split over training ranks and their micro-batches: by length, within a budget of tokens."""

from collections import Counter
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Share:
    """A rank's part of a batch: its rows, one micro-batch after the other, and how many rows each of those has.

    The first `num_training` micro-batches carry gradient; of the others only metrics are wanted.
    """

    rows: torch.Tensor
    sizes: list[int]
    num_training: int


def split_rows(
    lengths: torch.Tensor,
    num_ranks: int,
    num_micro_batches: int,
    max_tokens: int | None = None,
    training: torch.Tensor | None = None,
    groups: torch.Tensor | None = None,
) -> list[Share]:
    """Each rank's share of a batch, in `num_micro_batches` micro-batches a rank, or more where `max_tokens` takes it.

    lengths: int64 [B] tokens a row; B must be a multiple of num_ranks * num_micro_batches. training: bool [B], the rows that
    carry gradient (default: all); a few others join them so that each rank can have as many. groups: int64 [B] below B, of
    rows that follow one another, as one row of a pass (default: each by itself). A micro-batch has at most
    B / (num_ranks * num_micro_batches) rows, and its groups times the tokens of the largest is at most `max_tokens`; each
    rank has as many of them, and each row is in one. Groups with similar longest rows fall into one micro-batch, and the
    ranks' micro-batches of one turn are alike, so little is padded and no rank waits long.
    """
    groups = torch.arange(len(lengths)) if groups is None else groups
    longest = torch.zeros_like(lengths).scatter_reduce(0, groups, lengths, "amax")[groups]
    order = (longest * len(lengths) - groups).argsort(descending=True, stable=True)
    trains = torch.ones(len(order), dtype=torch.bool) if training is None else training[order]
    joining = -int(trains.sum()) % num_ranks
    trains[(~trains).nonzero()[:joining, 0]] = True
    most = len(lengths) // (num_ranks * num_micro_batches)
    first, others = (_parts(rows, lengths, groups, num_ranks, most, max_tokens) for rows in (order[trains], order[~trains]))
    turns = [(first + others)[rank::num_ranks] for rank in range(num_ranks)]
    return [Share(torch.cat(mine), [len(part) for part in mine], len(first) // num_ranks) for mine in turns]


def _parts(
    order: torch.Tensor, lengths: torch.Tensor, groups: torch.Tensor, num_ranks: int, most: int, max_tokens: int | None
) -> list[torch.Tensor]:
    """Rows of `order` (longest first) in micro-batches, a multiple of `num_ranks` of them."""
    parts, start = [], 0
    while start < len(order):
        part = order[start : start + most]
        if max_tokens is not None:
            part = part[: _fitting(lengths[part].tolist(), groups[part].tolist(), max_tokens)]
        parts.append(part)
        start += len(part)
    while len(parts) % num_ranks:  # one row a part, at the latest, is a multiple
        largest = max(range(len(parts)), key=lambda i: (len(parts[i]) > 1, len(parts[i]) * int(lengths[parts[i]].max())))
        parts[largest : largest + 1] = parts[largest].tensor_split(2)
    return parts


def _fitting(lengths: list[int], groups: list[int], max_tokens: int) -> int:
    """How many of these rows, from the first, are within the budget."""
    sizes: Counter[int] = Counter()
    for count, (length, group) in enumerate(zip(lengths, groups, strict=True)):
        sizes[group] += length
        if len(sizes) * max(sizes.values()) > max_tokens:
            assert count > 0, f"a row of {length} tokens is over the budget of {max_tokens} a micro-batch"
            return count
    return len(lengths)
