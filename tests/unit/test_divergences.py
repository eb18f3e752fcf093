import math

import pytest
import torch

from grpo.objectives.divergences import k1, k3

POLICY = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64).log()
OTHER = torch.tensor([0.2, 0.2, 0.2, 0.4], dtype=torch.float64).log()


@pytest.mark.parametrize("estimate", [k1, k3])
def test_the_expectation_under_the_policy_is_its_kl_divergence_to_the_other(estimate):
    def expectation(policy: torch.Tensor, other: torch.Tensor) -> float:
        return float((policy.exp() * estimate(policy, other)).sum())

    forward = sum(p * math.log(p / q) for p, q in zip([0.5, 0.3, 0.15, 0.05], [0.2, 0.2, 0.2, 0.4], strict=True))
    backward = sum(q * math.log(q / p) for p, q in zip([0.5, 0.3, 0.15, 0.05], [0.2, 0.2, 0.2, 0.4], strict=True))
    assert expectation(POLICY, OTHER) == pytest.approx(forward, rel=1e-12)
    assert expectation(OTHER, POLICY) == pytest.approx(backward, rel=1e-12)
    assert abs(forward - backward) > 0.1  # so that the direction matters


def test_k3_is_never_negative_and_zero_only_where_the_two_agree():
    delta = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    values = k3(torch.zeros_like(delta), delta)
    assert (values >= 0).all()
    assert (values[delta.abs() > 1e-9] > 0).all()
    assert k3(torch.tensor(-1.3), torch.tensor(-1.3)) == 0


def test_hand_worked_values():
    policy, other = torch.tensor([-1.0, -2.0]).double(), torch.tensor([-2.0, -1.5]).double()
    assert k1(policy, other).tolist() == pytest.approx([1.0, -0.5])
    assert k3(policy, other).tolist() == pytest.approx([math.exp(-1) - 1 + 1, math.exp(0.5) - 1 - 0.5])


def test_k3_keeps_its_precision_near_zero_in_float32():
    # For a small difference d, k3 is d^2 / 2; exp(d) - 1 - d would be lost in rounding.
    assert float(k3(torch.tensor(0.0), torch.tensor(1e-3))) == pytest.approx(0.5e-6, rel=1e-2)
    assert (k3(torch.zeros(100), torch.linspace(-1e-3, 1e-3, 100)) >= 0).all()


def test_the_gradient_of_k3_is_one_minus_the_ratio_of_other_to_policy():
    policy = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    other = torch.tensor([-2.0, -1.5, -0.5])
    k3(policy, other).sum().backward()
    assert policy.grad.tolist() == pytest.approx([1 - math.exp(-1), 1 - math.exp(0.5), 0.0], abs=1e-6)
