"""Per-token estimates of a KL divergence from samples of the policy.

Every function takes log-probs of the sampled tokens, any shape, and returns an estimate a token of the same shape; the
mean over tokens sampled from `log_probs` estimates KL(policy || other) in nats a token.

Source: J. Schulman, "Approximating KL Divergence", 2020; k3 is equation 4 of DeepSeekMath, arXiv 2402.03300.
"""

import torch


def k1(log_probs: torch.Tensor, other_log_probs: torch.Tensor) -> torch.Tensor:
    """log policy - log other: unbiased, may be negative."""
    return log_probs - other_log_probs


def k3(log_probs: torch.Tensor, other_log_probs: torch.Tensor) -> torch.Tensor:
    """expm1(d) - d with d = other - policy: unbiased, never negative."""
    delta = other_log_probs - log_probs
    return delta.expm1() - delta
