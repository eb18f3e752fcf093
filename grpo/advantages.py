"""Group-relative advantages: pure functions of rewards and group ids."""

import torch


def group_advantages(rewards: torch.Tensor, group_ids: torch.Tensor, epsilon: float = 1e-4) -> torch.Tensor:
    """A_i = (r_i - mean(r of i's group)) / (std(r of i's group) + epsilon), with the unbiased standard deviation.

    rewards: float [B]; group_ids: int64 [B], in any order, groups of any size. Returns float32 [B]. A group whose
    rewards are all equal gets exactly 0, and so does a group of one.

    Source: DeepSeekMath, arXiv 2402.03300, section 4.1.2 (outcome supervision).
    """
    _, group, size = group_ids.unique(return_inverse=True, return_counts=True)
    rewards = rewards.double()
    zeros = torch.zeros(len(size), dtype=torch.float64, device=rewards.device)
    mean = zeros.index_add(0, group, rewards) / size
    centred = rewards - mean[group]
    variance = zeros.index_add(0, group, centred.square()) / (size - 1).clamp_min(1)
    highest = zeros.scatter_reduce(0, group, rewards, "amax", include_self=False)
    lowest = zeros.scatter_reduce(0, group, rewards, "amin", include_self=False)
    advantages = centred / (variance.sqrt()[group] + epsilon)
    return torch.where((highest == lowest)[group], 0.0, advantages).float()
