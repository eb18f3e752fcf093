"""The GRPO loss, and the metrics that say what it did.

The contract of an objective: it returns a sum over the rollouts it was given and sums for its metrics. Whoever calls it
divides by the count over all ranks and micro-batches (responses, here), so the gradient is the same however a batch is
split.
"""

import torch

from grpo.objectives.divergences import k3


def grpo_loss(
    log_probs: torch.Tensor,
    entropy: torch.Tensor,
    inference_log_probs: torch.Tensor,
    reference_log_probs: torch.Tensor | None,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    kl_to_ref_coeff: float,
    kl_to_inference_coeff: float,
    entropy_coeff: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Clipped surrogate with divergence penalties, averaged over a response's tokens and summed over responses.

        L = sum_i 1/|o_i| sum_t [ -min(w A, clip(w, 1 - clip_low, 1 + clip_high) A)
                                  + kl_to_ref_coeff k3(policy, reference)
                                  + kl_to_inference_coeff (inference - current)
                                  - entropy_coeff H ],      w = exp(log_probs - inference_log_probs)

    log_probs, entropy, inference_log_probs, reference_log_probs: float [B, T]; advantages: float [B];
    response_mask: bool [B, T] with at least one true a row. Log-probs in nats. `reference_log_probs` is None where no
    reference is used. Divide the loss by the number of responses, over all ranks and micro-batches.

    Returns the scalar loss and token sums for `summarise`.

    Source: DeepSeekMath, arXiv 2402.03300, equations 3 and 4; the two bounds of the clip are DAPO's, arXiv 2503.14476.
    """
    log_ratio = torch.where(response_mask, log_probs - inference_log_probs, 0.0)
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1 - clip_low, 1 + clip_high)
    advantage = advantages[:, None]
    unclipped, clipped = ratio * advantage, clipped_ratio * advantage
    surrogate = torch.minimum(unclipped, clipped)
    token_loss = -surrogate
    kl_to_inference = -log_ratio
    token_loss = token_loss + kl_to_inference_coeff * kl_to_inference - entropy_coeff * entropy
    sums = {
        "objective": surrogate,
        "ratio": ratio,
        "ratio_squared": ratio.double().square(),
        "clipped": (clipped < unclipped).float(),
        "kl_to_inference": kl_to_inference,
        "entropy": entropy,
    }
    if reference_log_probs is not None:
        kl_to_reference = k3(log_probs, torch.where(response_mask, reference_log_probs, log_probs.detach()))
        token_loss = token_loss + kl_to_ref_coeff * kl_to_reference
        sums["kl_to_reference"] = kl_to_reference
        sums["kl_to_reference_squared"] = kl_to_reference.square()
    mask = response_mask.float()
    loss = ((token_loss * mask).sum(1) / mask.sum(1)).sum()
    totals = {name: (value.detach().double() * mask).sum() for name, value in sums.items()}
    return loss, totals | {"loss": loss.detach().double(), "tokens": mask.double().sum()}


def summarise(sums: dict[str, float], responses: int) -> dict[str, float]:
    """Means a token (the loss: a response) from the sums of every rank and micro-batch.

    `ess` is Kish's effective sample size of the importance weights as a share of the tokens: (sum w)^2 / (n sum w^2).
    """
    tokens = sums["tokens"]

    def mean(name: str) -> float:
        return sums[name] / tokens

    def std(name: str) -> float:
        return max(0.0, mean(f"{name}_squared") - mean(name) ** 2) ** 0.5

    metrics = {
        "train/loss": sums["loss"] / responses,
        "train/objective": mean("objective"),
        "train/kl_to_inference": mean("kl_to_inference"),
        "train/entropy": mean("entropy"),
        "train/clip_fraction": mean("clipped"),
        "train/ratio_mean": mean("ratio"),
        "train/ratio_std": std("ratio"),
        "train/ess": sums["ratio"] ** 2 / (tokens * sums["ratio_squared"]),
    }
    if "kl_to_reference" in sums:
        metrics["train/kl_to_reference"] = mean("kl_to_reference")
        metrics["train/kl_to_reference_std"] = std("kl_to_reference")
    return metrics
