import math

import pytest
import torch

from grpo.objectives.divergences import ESTIMATES, k1, k2, k3, kl_penalty, token_penalty, transport_penalty

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


def test_k2_is_half_the_squared_difference_and_close_to_the_divergence_of_near_policies():
    assert k2(torch.tensor(-1.0), torch.tensor(-2.5)) == pytest.approx(1.125)
    near = (POLICY.exp() + torch.tensor([0.01, -0.01, 0.005, -0.005]).double()).log()
    exact = float((POLICY.exp() * (POLICY - near)).sum())
    assert float((POLICY.exp() * k2(POLICY, near)).sum()) == pytest.approx(exact, rel=0.05)


def expected_gradient(estimate) -> torch.Tensor:
    """E over the policy's samples of the gradient of one sample's estimate, by the policy's logits [4]."""
    logits = POLICY.clone().requires_grad_()
    estimates = estimate(logits.log_softmax(-1), OTHER)
    return sum(
        p * torch.autograd.grad(e, logits, retain_graph=True)[0] for p, e in zip(POLICY.exp(), estimates, strict=True)
    )


def gradient_of_kl(forward: bool) -> torch.Tensor:
    """The gradient of KL(policy || other), or of KL(other || policy), summed over the vocabulary, by the logits."""
    logits = POLICY.clone().requires_grad_()
    first, second = (logits.log_softmax(-1), OTHER) if forward else (OTHER, logits.log_softmax(-1))
    return torch.autograd.grad((first.exp() * (first - second)).sum(), logits)[0]


def test_the_expected_gradients_are_those_that_the_table_says():
    forward, backward = gradient_of_kl(True), gradient_of_kl(False)
    assert torch.allclose(expected_gradient(k1), torch.zeros(4).double(), atol=1e-12)
    assert torch.allclose(expected_gradient(k2), forward, atol=1e-12)
    assert torch.allclose(expected_gradient(k3), backward, atol=1e-12)
    assert (forward - backward).abs().max() > 0.1  # so that the two are told apart


def ragged() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs, reference log-probs and mask [2, 4] of responses of 3 and 2 tokens with anything around them."""
    log_probs = torch.tensor([[7.0, -1.0, -2.0, -0.5], [9.0, -1.0, -1.0, 700.0]], dtype=torch.float64)
    reference = torch.tensor([[-300.0, -1.5, -1.0, -0.5], [5.0, -1.2, -1.0, -700.0]], dtype=torch.float64)
    return log_probs, reference, torch.tensor([[0, 1, 1, 1], [0, 1, 1, 0]]).bool()


def test_the_hinge_of_a_response_is_on_its_mean_and_leaves_those_within_the_margin_alone():
    log_probs, reference, mask = ragged()
    log_probs.requires_grad_()
    # First: (0.5^2 + 1 + 0) / 2 / 3 = 0.625 / 3; second: 0.2^2 / 2 / 2 = 0.01.
    found = kl_penalty(log_probs, reference, mask, margin=0.05)
    assert found["penalty"][:, 0].tolist() == pytest.approx([0.625 / 3 - 0.05, 0.0])
    assert found["over_margin"].tolist() == [[True], [False]]
    (gradient,) = torch.autograd.grad(found["penalty"].sum(), log_probs)
    # (log policy - log reference) / length
    expected = torch.tensor([[0, 0.5 / 3, -1.0 / 3, 0], [0, 0, 0, 0]], dtype=torch.float64)
    assert torch.allclose(gradient, expected, atol=1e-12)


@pytest.mark.parametrize("name", ESTIMATES)
def test_a_token_penalty_is_its_estimate_whatever_surrounds_the_response(name):
    log_probs, reference, mask = ragged()
    log_probs.requires_grad_()
    penalty = token_penalty(log_probs, reference, mask, estimate=ESTIMATES[name])["penalty"]
    assert torch.equal(penalty[mask], ESTIMATES[name](log_probs, reference)[mask])
    (gradient,) = torch.autograd.grad(penalty[mask].sum(), log_probs)
    assert gradient.isfinite().all()
    assert not gradient[~mask].any()


@pytest.mark.parametrize("name", ["k1", "k2", "k3", "kl", "ot"])
def test_the_gradient_of_a_penalty_agrees_with_finite_differences(name):
    torch.manual_seed(0)
    mask = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]).bool()
    reference, anchor = torch.randn(2, 5).double(), torch.randn(2, 5, 3).double()
    by_name = {
        "kl": lambda values: kl_penalty(values, reference, mask, margin=0.1)["penalty"],
        "ot": lambda values: transport_penalty(values, anchor, mask, target=0.05, window=2, epsilon=0.1, iterations=5)[
            "penalty"
        ],
    }
    estimate = ESTIMATES.get(name)
    penalty = by_name.get(name, lambda values: token_penalty(values, reference, mask, estimate=estimate)["penalty"])
    values = (torch.randn(2, 5, 3) if name == "ot" else torch.randn(2, 5)).double().requires_grad_()
    assert (torch.where(mask, penalty(values), 0.0) != 0).any(1).all()
    assert torch.autograd.gradcheck(lambda values: torch.where(mask, penalty(values), 0.0), (values,))


def test_the_transport_penalty_begins_at_its_target():
    states = torch.eye(3, dtype=torch.float64)[None]
    mask = torch.ones(1, 3, dtype=torch.bool)
    settings = {"window": 0, "epsilon": 0.1, "iterations": 1}
    # With no window a token meets itself: the cost is the mean of 1 - cos, here (0 + 1 + 1) / 3.
    found = transport_penalty(states, states[:, [0, 2, 1]], mask, target=0.5, **settings)
    assert float(found["transport"]) == pytest.approx(2 / 3)
    assert float(found["penalty"]) == pytest.approx(2 / 3 - 0.5)
    assert bool(found["over_margin"])
    assert float(transport_penalty(states, states, mask, target=0.5, **settings)["penalty"]) == 0
