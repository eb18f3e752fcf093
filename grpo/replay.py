"""The replay buffer: whole groups in, optimiser batches out, each group once an epoch."""

import numpy as np
import torch
from tensordict import TensorDict
from torchrl.data import ListStorage, ReplayBuffer
from torchrl.data.replay_buffers import SamplerWithoutReplacement

from grpo.rollout import collate


def make_replay_buffer(num_groups: int, groups_per_batch: int) -> ReplayBuffer:
    """A buffer of `num_groups` groups. One pass of `for batch in buffer` yields each group once, in a random order."""
    return ReplayBuffer(
        storage=ListStorage(num_groups),
        sampler=SamplerWithoutReplacement(),
        collate_fn=collate,
        batch_size=groups_per_batch,
    )


def refill(buffer: ReplayBuffer, groups: TensorDict, seed: list[int]) -> None:
    """Have the buffer hold `groups` [G] alone, in an order that depends on `seed` and on nothing before."""
    buffer.empty()
    buffer.extend(groups)
    buffer.set_rng(torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0])))
