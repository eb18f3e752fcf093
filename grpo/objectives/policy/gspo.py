"""GSPO: the clipped surrogate with one importance ratio a response, of the same likelihoods that the reward is about."""

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
    """-min(s A, clip(s, 1 - clip_low, 1 + clip_high) A) on every token of a response, with s its sequence-level ratio.

        s = exp(1/|o| sum_t (log_probs - inference_log_probs))

    A response's mean over its tokens is so the paper's loss. A response is clipped whole.

    Source: GSPO, arXiv 2507.18071.
    """
    log_ratio = torch.where(response_mask, log_probs - inference_log_probs, 0.0)
    ratio = (log_ratio.sum(1, keepdim=True) / response_mask.sum(1, keepdim=True)).exp()
    advantage = advantages[:, None]
    unclipped, clipped = ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage
    binds = response_mask & (clipped < unclipped)
    carries = response_mask & (advantage != 0) & ~binds
    loss = -torch.minimum(unclipped, clipped).expand_as(log_probs)
    return PolicyLoss(loss, binds & (advantage < 0), binds & (advantage > 0), carries)
