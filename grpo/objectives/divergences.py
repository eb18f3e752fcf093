"""Divergences of the policy from a reference, estimated from samples of the policy, and the penalties made of them.

`k1`, `k2` and `k3` take log-probs of the sampled tokens, any shape, and return an estimate a token of the same shape. Their
values and their gradients estimate different things, for tokens sampled from `log_probs`:

            expectation           expectation of the gradient
    k1      KL(policy || other)   0: as a penalty it is noise, and its place is in the reward
    k2      close to it           that of KL(policy || other)
    k3      KL(policy || other)   that of KL(other || policy)

A penalty is `penalty`, what a token or a response is charged before its coefficient, and what is logged of it besides.

Source: J. Schulman, "Approximating KL Divergence", 2020; k3 is equation 4 of DeepSeekMath, arXiv 2402.03300; the gradients
are worked out in Tang and Munos, arXiv 2506.09477.
"""

from collections.abc import Callable

import torch

from grpo.objectives.transport import transport_cost


def k1(log_probs: torch.Tensor, other_log_probs: torch.Tensor) -> torch.Tensor:
    """log policy - log other: unbiased, may be negative."""
    return log_probs - other_log_probs


def k2(log_probs: torch.Tensor, other_log_probs: torch.Tensor) -> torch.Tensor:
    """(log policy - log other)^2 / 2: never negative, and biased by terms of third order in the difference."""
    return (log_probs - other_log_probs).square() / 2


def k3(log_probs: torch.Tensor, other_log_probs: torch.Tensor) -> torch.Tensor:
    """expm1(d) - d with d = other - policy: unbiased, never negative."""
    delta = other_log_probs - log_probs
    return delta.expm1() - delta


Estimate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
ESTIMATES: dict[str, Estimate] = {"k1": k1, "k2": k2, "k3": k3}


def token_penalty(
    log_probs: torch.Tensor, reference_log_probs: torch.Tensor, response_mask: torch.Tensor, *, estimate: Estimate
) -> dict[str, torch.Tensor]:
    """`penalty` [B, T]: the `estimate` (k1, k2 or k3) of KL(policy || reference) of each token, in nats."""
    reference_log_probs = torch.where(response_mask, reference_log_probs, log_probs.detach())
    return {"penalty": estimate(log_probs, reference_log_probs)}


def kl_penalty(
    log_probs: torch.Tensor, reference_log_probs: torch.Tensor, response_mask: torch.Tensor, *, margin: float
) -> dict[str, torch.Tensor]:
    """`penalty` [B, 1]: max(0, KL - margin), where KL is the mean of k2 over the response's tokens, nats a token.

    k2 is the estimate whose gradient is that of KL(policy || reference), for each token given those before it.
    """
    reference_log_probs = torch.where(response_mask, reference_log_probs, log_probs.detach())
    kl = k2(log_probs, reference_log_probs).sum(1, keepdim=True) / response_mask.sum(1, keepdim=True)
    return _hinge(kl, margin)


def transport_penalty(
    states: torch.Tensor,
    anchor_states: torch.Tensor,
    response_mask: torch.Tensor,
    *,
    target: float,
    window: int,
    epsilon: float,
    iterations: int,
) -> dict[str, torch.Tensor]:
    """`penalty` [B, 1]: max(0, <P, C> - target), where <P, C> (`transport`) is that of `transport_cost`."""
    settings = {"window": window, "epsilon": epsilon, "iterations": iterations}
    cost = transport_cost(states, anchor_states, response_mask, **settings)[:, None]
    return _hinge(cost, target) | {"transport": cost.detach()}


def _hinge(values: torch.Tensor, margin: float) -> dict[str, torch.Tensor]:
    """A response within the margin costs nothing and has no gradient."""
    return {"penalty": (values - margin).clamp_min(0), "over_margin": values > margin}
