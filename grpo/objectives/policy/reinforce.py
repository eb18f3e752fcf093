"""REINFORCE: the score function, for rollouts that the policy itself sampled; rloo and reinforce differ in the baseline."""

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
    """-A log_probs a token. There is no ratio and no clip: what another policy sampled is taken as its own.

    Source: Williams, "Simple statistical gradient-following algorithms", 1992; for language models Ahmadian et al.,
    arXiv 2402.14740.
    """
    advantage = advantages[:, None]
    never = torch.zeros_like(response_mask)
    loss = -advantage * torch.where(response_mask, log_probs, 0.0)
    return PolicyLoss(loss, never, never, response_mask & (advantage != 0))
