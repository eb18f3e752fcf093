"""Importance weights between the trainer and what sampled: older weights, and an engine's own arithmetic.

They stand apart from the ratio of the policy loss, which then compares with the trainer's own policy when it first trained
on the batch (the proximal policy), not with the one that sampled. The loss of each token is multiplied by its weight, which
carries no gradient.

Source: the split into the two is decoupled PPO's, Hilton et al., arXiv 2110.00641; truncation is Ionides 2008's.
"""

import torch


def correction_weights(
    proximal_log_probs: torch.Tensor,
    inference_log_probs: torch.Tensor,
    response_mask: torch.Tensor,
    *,
    how: str,
    level: str,
    cap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of the loss, and the raw ones, both float [B, T] without gradient.

    Raw is w = exp(proximal - inference) a token, or with `level` sequence the product of a response's w on each of its
    tokens. `how` is truncate, min(w, cap), or mask, which is w up to `cap` and 0 beyond.

    proximal_log_probs, inference_log_probs: float [B, T], nats; response_mask: bool [B, T]; cap: above 0. Outside the mask
    both are 1.
    """
    log_ratio = torch.where(response_mask, proximal_log_probs - inference_log_probs, 0.0).detach()
    if level == "sequence":
        log_ratio = torch.where(response_mask, log_ratio.sum(1, keepdim=True), 0.0)
    raw = log_ratio.exp()
    return (raw.clamp(max=cap) if how == "truncate" else torch.where(raw > cap, 0.0, raw)), raw
