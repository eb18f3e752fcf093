"""The replay buffer: whole groups in, optimiser batches out, each group once an epoch."""

import torch
from torchrl.data import ListStorage, ReplayBuffer
from torchrl.data.replay_buffers import SamplerWithoutReplacement

from grpo.rollout import collate


def make_replay_buffer(num_groups: int, groups_per_batch: int, seed: int) -> ReplayBuffer:
    """A buffer of `num_groups` groups. One pass of `for batch in buffer` yields each group once, in a seeded order."""
    buffer = ReplayBuffer(
        storage=ListStorage(num_groups),
        sampler=SamplerWithoutReplacement(),
        collate_fn=collate,
        batch_size=groups_per_batch,
    )
    buffer.set_rng(torch.Generator().manual_seed(seed))
    return buffer
