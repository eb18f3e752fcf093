"""The clipped surrogate of PPO with one advantage a response: grpo, dapo and dr_grpo."""

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
    """-min(w A, clip(w, 1 - clip_low, 1 + clip_high) A) a token, with w = exp(log_probs - inference_log_probs).

    Source: DeepSeekMath, arXiv 2402.03300, equation 3; the two bounds are DAPO's, arXiv 2503.14476, equation 10.
    """
    ratio = torch.where(response_mask, log_probs - inference_log_probs, 0.0).exp()
    advantage = advantages[:, None]
    unclipped, clipped = ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage
    binds = response_mask & (clipped < unclipped)
    carries = response_mask & (advantage != 0) & ~binds
    return PolicyLoss(-torch.minimum(unclipped, clipped), binds & (advantage < 0), binds & (advantage > 0), carries)
