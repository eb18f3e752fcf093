"""Entropic optimal transport between the hidden states of two passes over a response: how far its tokens have moved.

    min over P of <P, C> - epsilon H(P),   C[i, j] = 1 - cos(x_i, y_j),   P >= 0 with uniform marginals,   |i - j| <= window

solved by Sinkhorn's iteration in the log domain, a fixed number of times. The gradient is the exact one of what is computed:
it goes through the iterations. What is outside the band has no entry: tokens are cut into blocks as long as the window, and
a block meets itself and its two neighbours alone, so that memory grows with T times the window and never with T squared.

    y      ... | block n - 1 | block n | block n + 1 | ...
    x                        | block n |

Source: Cuturi, "Sinkhorn Distances", arXiv 1306.0895; in the log domain Peyré and Cuturi, arXiv 1803.00567, section 4.4.
"""

from typing import NamedTuple

import torch
from torch.nn.functional import normalize, pad

NEVER = -1e9  # a log-weight that no iteration brings back, and whose gradient is 0 and not NaN


class Band(NamedTuple):
    """A matrix [T, T] near its diagonal: `values` [B, N, S, S + 2 W], row n S + i and column n S - W + j at [:, n, i, j]."""

    values: torch.Tensor
    allowed: torch.Tensor  # bool: inside the band, and both tokens are there
    window: int  # W; blocks have S = max(W, 1) rows


def _neighbours(values: torch.Tensor, window: int, size: int, missing: float | bool) -> torch.Tensor:
    """[B, N, S + 2 W, ...]: what block n of S rows may meet of `values` [B, N S, ...]."""
    edges = torch.full_like(values[:, :1], missing).expand(-1, window, *values.shape[2:])
    return torch.cat([edges, values, edges], 1).unfold(1, size + 2 * window, size).movedim(-1, 2)


def _costs(x: torch.Tensor, y: torch.Tensor, x_mask: torch.Tensor, y_mask: torch.Tensor, window: int) -> Band:
    """C in a band, from unit vectors [B, N S, D]."""
    size = max(window, 1)
    blocks = x.unflatten(1, (-1, size))
    values = 1 - blocks @ _neighbours(y, window, size, 0.0).mT
    row, column = (torch.arange(length, device=x.device) for length in (size, size + 2 * window))
    near = (column - window - row[:, None]).abs() <= window
    there = x_mask.unflatten(1, (-1, size))[..., None] & _neighbours(y_mask, window, size, False)[:, :, None]
    return Band(values, near & there, window)


def _turned(band: Band) -> Band:
    """The transposed matrix: a block of its rows is what three neighbouring blocks have in that block's columns."""
    size = max(band.window, 1)

    def turn(values: torch.Tensor) -> torch.Tensor:
        if band.window == 0:
            return values
        before, here, after = values.unflatten(-1, (3, size)).flip(-2).unbind(-2)
        edge = torch.zeros_like(here[:, :1])
        return torch.cat([torch.cat([edge, before[:, :-1]], 1), here, torch.cat([after[:, 1:], edge], 1)], 2).mT

    return Band(turn(band.values), turn(band.allowed), band.window)


def _scaled(costs: Band, potential: torch.Tensor, epsilon: float) -> torch.Tensor:
    """log of exp(-C / epsilon) times the column's factor, [B, N, S, S + 2 W]; `potential` [B, N S] is the factor's log."""
    beside = _neighbours(potential, costs.window, max(costs.window, 1), 0.0)[:, :, None]
    return torch.where(costs.allowed, beside - costs.values / epsilon, NEVER)


def sinkhorn(
    x: torch.Tensor,
    y: torch.Tensor,
    x_mask: torch.Tensor,
    y_mask: torch.Tensor,
    *,
    window: int,
    epsilon: float,
    iterations: int,
) -> tuple[torch.Tensor, Band]:
    """The plan P and its costs C in a band, from states x, y float [B, T, D]; masks bool [B, T] say which tokens there are.

    A row's tokens of x have 1 / their number each, and so have those of y. The last update is that of y's marginal, which P
    has exactly; that of x it has up to what the iterations leave.
    """
    width = x.shape[1]
    window = min(window, width - 1)
    more = -width % max(window, 1)
    x, y = (pad(normalize(states, dim=-1), (0, 0, 0, more)) for states in (x, y))
    x_mask, y_mask = (pad(mask, (0, more)) for mask in (x_mask, y_mask))
    costs = _costs(x, y, x_mask, y_mask, window)
    turned = _turned(costs)
    share_x, share_y = (-mask.sum(1, keepdim=True).to(x.dtype).log() for mask in (x_mask, y_mask))
    u = v = torch.zeros_like(x[..., 0])
    for _ in range(iterations):
        u = torch.where(x_mask, share_x - _scaled(costs, v, epsilon).logsumexp(-1).flatten(1), 0.0)
        v = torch.where(y_mask, share_y - _scaled(turned, u, epsilon).logsumexp(-1).flatten(1), 0.0)
    plan = (_scaled(costs, v, epsilon) + u.unflatten(1, (-1, max(window, 1)))[..., None]).exp()
    return torch.where(costs.allowed, plan, 0.0), costs


def transport_cost(
    states: torch.Tensor,
    anchor_states: torch.Tensor,
    response_mask: torch.Tensor,
    *,
    window: int,
    epsilon: float,
    iterations: int,
) -> torch.Tensor:
    """<P, C> of each response between its states under two models, float [B], between 0 and 2.

    states, anchor_states: float [B, T, D], anything outside response_mask, bool [B, T]. Entropy spreads the plan over tokens
    whose states are alike, so that two equal models are not quite at 0.
    """
    columns = response_mask.any(0).nonzero()[:, 0]
    kept = slice(int(columns[0]), int(columns[-1]) + 1)
    x, y, mask = states[:, kept], anchor_states[:, kept].to(states.dtype), response_mask[:, kept]
    plan, costs = sinkhorn(x, y, mask, mask, window=window, epsilon=epsilon, iterations=iterations)
    return (plan * costs.values).flatten(1).sum(1)


def dense(band: torch.Tensor, window: int, size: tuple[int, int]) -> torch.Tensor:
    """The values [N, S, S + 2 W] of one band as a matrix of that size, 0 outside the band."""
    blocks, rows, columns = band.shape
    whole = band.new_zeros(blocks * rows, blocks * rows + 2 * window)
    for n in range(blocks):
        whole[n * rows : (n + 1) * rows, n * rows : n * rows + columns] = band[n]
    return whole[:, window:][: size[0], : size[1]]
