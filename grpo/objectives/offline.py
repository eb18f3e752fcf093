"""The loss of groups of completions that have scores already: the policy is to rank them as the scores do.

The contract is that of every objective: sums over the groups that were given, which whoever calls divides by their
number over all ranks and micro-batches. A group must come whole.
"""

import math

import torch


def sequence_log_probs(log_probs: torch.Tensor, response_mask: torch.Tensor, reduction: str) -> torch.Tensor:
    """log pi(completion | prompt), [..., K] in nats: the `sum`, or the `mean`, of its tokens' log_probs [..., K, T].

    0 where a completion has no token: there is none.
    """
    total = torch.where(response_mask, log_probs, 0.0).sum(-1)
    return total if reduction == "sum" else total / response_mask.sum(-1).clamp(min=1)


def log_softmax_of(values: torch.Tensor, present: torch.Tensor, temperature: float) -> torch.Tensor:
    """log softmax(values / temperature) over the completions of a group that are there, [B, K]; 0 for the others."""
    absent = torch.finfo(values.dtype).min  # not -inf, whose gradient is not a number
    return torch.where(present, (values / temperature).masked_fill(~present, absent).log_softmax(-1), 0.0)


def ranks_best_first(values: torch.Tensor, scores: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """[B]: of a group's completions with the largest of `values`, the share that have the largest score.

    That is 0 or 1 where no values are equal, and else the chance to be right of a pick among the largest.
    values, scores: float [B, K]; present: bool [B, K], with at least one true a row.
    """

    def largest(of: torch.Tensor) -> torch.Tensor:
        of = of.masked_fill(~present, -torch.inf)
        return of == of.amax(-1, keepdim=True)

    first = largest(values) & present
    return (first & largest(scores)).sum(-1) / first.sum(-1)


def group_kl_loss(
    log_probs: torch.Tensor,
    response_mask: torch.Tensor,
    scores: torch.Tensor,
    *,
    log_prob: str,
    temperature: float,
    target_temperature: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """KL(policy || target) of each group, summed over groups.

        L = sum_g sum_k p_gk (log p_gk - log q_gk)
        p_g = softmax_k(log pi(o_gk | prompt_g) / temperature),    q_g = softmax_k(score_gk / target_temperature)

    log_probs: float [B, K, T] in nats; response_mask: bool [B, K, T], without a true where a group has fewer than K
    completions, and in all K of a group that only fills the batch up; scores: float [B, K], constants. `log_prob` is
    `sum` or `mean`, see `sequence_log_probs`. Divide the loss by the number of groups, over all ranks and micro-batches.

    Returns the scalar loss and sums for `summarise`.

    Source: the offline recipe of GRPO on scored completions, KL over relative sequence scores.
    """
    present = response_mask.any(-1)
    values = sequence_log_probs(log_probs, response_mask, log_prob)
    log_p = log_softmax_of(values, present, temperature)
    log_q = log_softmax_of(scores.detach().to(values.dtype), present, target_temperature)
    p = torch.where(present, log_p.exp(), 0.0)
    loss = (p * (log_p - log_q)).sum()
    with torch.no_grad():
        differ = scores.masked_fill(~present, -torch.inf).amax(-1) > scores.masked_fill(~present, torch.inf).amin(-1)
        right = ranks_best_first(values[differ], scores[differ], present[differ])
        sums = {
            "loss": loss,
            "accuracy": right.sum(),
            "ranked": differ.sum(),
            "entropy": -(p * log_p).sum(),
            "target_entropy": -(log_q.exp() * log_q).sum(),  # 0 where there is none, whose log_q is 0
            "log_prob": torch.where(response_mask, log_probs, 0.0).sum(),
            "tokens": response_mask.sum(),
        }
    return loss, {name: value.detach().double() for name, value in sums.items()}


def summarise(sums: dict[str, float], groups: int) -> dict[str, float]:
    """Means a group (log_prob: a token) from the sums of every rank and micro-batch.

    The accuracy is that of the groups whose scores differ, and not a number where there are none.
    """
    return {
        "train/loss": sums["loss"] / groups,
        "train/ranking_accuracy": sums["accuracy"] / sums["ranked"] if sums["ranked"] else math.nan,
        "train/group_entropy": sums["entropy"] / groups,
        "train/target_entropy": sums["target_entropy"] / groups,
        "train/completion_log_prob": sums["log_prob"] / sums["tokens"],
    }
