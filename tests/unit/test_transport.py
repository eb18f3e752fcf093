"""Banded Sinkhorn: against POT's, against what can be worked out by hand, and how much memory it takes."""

import numpy as np
import ot
import pytest
import torch
from torch.nn.functional import normalize

from grpo.objectives.transport import dense, sinkhorn, transport_cost

SETTINGS = {"epsilon": 0.1, "iterations": 5}


def draw(rows: int, width: int, dimensions: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, dimensions, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def everything(states: torch.Tensor) -> torch.Tensor:
    return torch.ones(states.shape[:2], dtype=torch.bool)


def costs_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """1 - cos of one pair of states each, [T, T]."""
    return 1 - normalize(x, dim=-1) @ normalize(y, dim=-1).T


def pot(costs: torch.Tensor, epsilon: float) -> np.ndarray:
    rows, columns = costs.shape
    uniform = np.full(rows, 1 / rows), np.full(columns, 1 / columns)
    return ot.sinkhorn(*uniform, costs.numpy(), epsilon, numItermax=100_000, stopThr=1e-12)


@pytest.mark.parametrize(("width", "window"), [(1, 0), (2, 1), (7, 7), (7, 40), (12, 11)])
@pytest.mark.parametrize("epsilon", [0.05, 0.1, 1.0])
def test_with_a_window_over_everything_the_plan_is_that_of_pot(width, window, epsilon):
    x, y = draw(1, width), draw(1, width, seed=1)
    mask = everything(x)
    plan, costs = sinkhorn(x, y, mask, mask, window=window, epsilon=epsilon, iterations=5000)
    expected = pot(costs_of(x[0], y[0]), epsilon)
    assert np.abs(dense(plan[0], costs.window, (width, width)).numpy() - expected).max() < 1e-8
    cost = transport_cost(x, y, mask, window=window, epsilon=epsilon, iterations=5000)
    assert float(cost) == pytest.approx(float((expected * costs_of(x[0], y[0]).numpy()).sum()), abs=1e-8)


@pytest.mark.parametrize("window", [1, 2, 3, 5])
def test_a_band_is_pot_where_leaving_it_costs_too_much(window):
    x, y = draw(1, 9), draw(1, 9, seed=1)
    mask = everything(x)
    plan, costs = sinkhorn(x, y, mask, mask, window=window, epsilon=0.1, iterations=5000)
    outside = (torch.arange(9)[:, None] - torch.arange(9)).abs() > window
    expected = pot(torch.where(outside, 100.0, costs_of(x[0], y[0])), 0.1)
    found = dense(plan[0], costs.window, (9, 9))
    assert not found[outside].any()
    assert np.abs(found.numpy() - expected).max() < 1e-4


def test_lengths_may_differ():
    x, y = draw(1, 6), draw(1, 6, seed=1)
    y_mask = torch.arange(6)[None] < 4
    plan, costs = sinkhorn(x, y, everything(x), y_mask, window=6, epsilon=0.1, iterations=5000)
    expected = pot(costs_of(x[0], y[0, :4]), 0.1)
    assert np.abs(dense(plan[0], costs.window, (6, 4)).numpy() - expected).max() < 1e-8


def test_five_iterations_leave_the_anchors_marginal_exact_and_the_policys_near():
    x, y = draw(3, 20), draw(3, 20, seed=1)
    mask = everything(x)
    plan, costs = sinkhorn(x, y, mask, mask, window=4, **SETTINGS)
    for row in range(3):
        whole = dense(plan[row], costs.window, (20, 20))
        assert torch.allclose(whole.sum(0), torch.full((20,), 1 / 20).double(), atol=1e-12)
        assert (whole.sum(1) - 1 / 20).abs().max() < 0.02


def test_without_a_window_the_cost_is_the_mean_over_tokens_of_one_minus_cosine():
    x, y = draw(2, 5), draw(2, 5, seed=1)
    mask = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]).bool()
    cosines = torch.cosine_similarity(x, y, dim=-1)
    expected = ((1 - cosines) * mask).sum(1) / mask.sum(1)
    assert torch.allclose(transport_cost(x, y, mask, window=0, **SETTINGS), expected, atol=1e-12)


def test_states_that_moved_along_by_a_token_cost_little_with_a_window_and_much_without():
    x = draw(1, 30, dimensions=64)
    moved = torch.cat([x[:, :1], x[:, :-1]], 1)
    mask = everything(x)
    without, within = (float(transport_cost(x, moved, mask, window=w, epsilon=0.02, iterations=50)) for w in (0, 2))
    assert without > 0.9
    assert within < 0.1


def test_scale_and_what_surrounds_a_response_change_nothing():
    x, y = draw(2, 9), draw(2, 9, seed=1)
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0, 2:7], mask[1, 3:6] = True, True
    expected = transport_cost(x, y, mask, window=2, **SETTINGS)
    for row, (first, last) in enumerate([(2, 7), (3, 6)]):
        alone = slice(row, row + 1), slice(first, last)
        found = transport_cost(x[alone], y[alone], mask[alone], window=2, **SETTINGS)
        assert float(found) == pytest.approx(float(expected[row]), rel=1e-12)
    other = torch.where(mask[..., None], 7 * x, 1e4)
    assert torch.allclose(transport_cost(other, 0.1 * y, mask, window=2, **SETTINGS), expected, atol=1e-12)


@pytest.mark.parametrize("window", [0, 1, 3, 20])
def test_the_gradient_is_that_of_the_iterations_as_they_are(window):
    x, y = draw(2, 9, dimensions=3).requires_grad_(), draw(2, 9, dimensions=3, seed=1)
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0, 1:7], mask[1, 3:9] = True, True
    assert torch.autograd.gradcheck(lambda states: transport_cost(states, y, mask, window=window, **SETTINGS), (x,))
    (gradient,) = torch.autograd.grad(transport_cost(x, y, mask, window=window, **SETTINGS).sum(), x)
    assert not gradient[~mask].any()
    assert gradient[mask].any()


def test_half_precision_of_the_anchor_is_harmless():
    x, y = draw(4, 50, dimensions=128).float(), draw(4, 50, dimensions=128, seed=1).float()
    mask = everything(x)
    exact = transport_cost(x, y, mask, window=16, **SETTINGS)
    rounded = transport_cost(x, normalize(y, dim=-1).half(), mask, window=16, **SETTINGS)
    assert (exact - rounded).abs().max() < 1e-4


def kept_bytes(width: int) -> int:
    """Bytes that the backward pass needs, each piece of memory once; and every tensor in them is counted."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x, y = draw(1, width).requires_grad_(), draw(1, width, seed=1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        transport_cost(x, y, everything(x), window=16, **SETTINGS)
    return sum(kept.values())


def test_memory_is_linear_in_the_number_of_tokens():
    small, large = kept_bytes(512), kept_bytes(1024)
    assert large == pytest.approx(2 * small, rel=0.05)
    assert kept_bytes(4096) == pytest.approx(8 * small, rel=0.05)
    assert kept_bytes(4096) < 20 * 4096 * 48 * 8  # twenty bands of three windows; a square matrix alone is 134 MB


def test_no_tensor_is_square_in_the_number_of_tokens():
    width, largest = 2048, 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    x, y = draw(1, width).requires_grad_(), draw(1, width, seed=1)
    with Watch():
        transport_cost(x, y, everything(x), window=16, **SETTINGS).sum().backward()
    assert width * 48 <= largest < width * width / 10
