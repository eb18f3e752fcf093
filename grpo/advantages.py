"""Group-relative advantages: pure functions of rewards and group ids."""

import torch


def group_advantages(
    rewards: torch.Tensor,
    group_ids: torch.Tensor,
    epsilon: float = 1e-4,
    *,
    scale: str = "group",
    baseline: str = "mean",
) -> torch.Tensor:
    """A_i = (r_i - b_i) / (s_i + epsilon), or r_i - b_i with scale=none.

    b_i is the mean reward of i's group, with baseline=leave_one_out that of the others in it. s_i is the unbiased standard
    deviation of the rewards of i's group, with scale=batch that of all rewards.

    rewards: float [B]; group_ids: int64 [B], in any order, groups of any size. Returns float32 [B]. A group whose
    rewards are all equal gets exactly 0, and so does a group of one.

    Source: DeepSeekMath, arXiv 2402.03300, section 4.1.2 (outcome supervision); leave_one_out: RLOO, arXiv 2402.14740;
    none: Dr. GRPO, arXiv 2503.20783; batch: Lite PPO, arXiv 2508.08221.
    """
    _, group, size = group_ids.unique(return_inverse=True, return_counts=True)
    rewards = rewards.double()
    zeros = torch.zeros(len(size), dtype=torch.float64, device=rewards.device)
    mean = zeros.index_add(0, group, rewards) / size
    centred = rewards - mean[group]
    advantages = centred
    if baseline == "leave_one_out":
        advantages = centred * (size / (size - 1).clamp_min(1))[group]
    if scale == "group":
        variance = zeros.index_add(0, group, centred.square()) / (size - 1).clamp_min(1)
        advantages = advantages / (variance.sqrt()[group] + epsilon)
    elif scale == "batch":
        deviation = rewards.std() if len(rewards) > 1 else 0.0
        advantages = advantages / (deviation + epsilon)
    highest = zeros.scatter_reduce(0, group, rewards, "amax", include_self=False)
    lowest = zeros.scatter_reduce(0, group, rewards, "amin", include_self=False)
    return torch.where((highest == lowest)[group], 0.0, advantages).float()
