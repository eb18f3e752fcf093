"""CISPO: REINFORCE with clipped importance weights, so that no token loses its gradient."""

import torch

from grpo.objectives.policy import PolicyLoss


def policy_loss(
    log_probs: torch.Tensor,
    inference_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> PolicyLoss:
    """-sg(clip(w, 1 - clip_low, 1 + clip_high)) A log_probs a token, with w = exp(log_probs - inference_log_probs).

    sg passes no gradient: the weight scales the token's gradient and has none of its own. clip_low = 1 is no lower bound.

    Source: MiniMax-M1, arXiv 2506.13585.
    """
    ratio = torch.where(response_mask, log_probs - inference_log_probs, 0.0).detach().exp()
    advantage = advantages[:, None]
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -weight * advantage * torch.where(response_mask, log_probs, 0.0)
    return PolicyLoss(loss, ratio < weight, ratio > weight, response_mask & (advantage != 0))
