"""Optimisers by `optimizer.name`, and what of their states a checkpoint holds.

The table knows nothing of shards: parameters are DTensors, and so is what an optimiser keeps of them.
"""

from functools import singledispatch

import torch

from grpo.config import OptimizerConfig

State = dict[str, torch.Tensor]  # of one parameter


def _adamw(parameters: list[torch.nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, betas=config.betas)


def _adamw_8bit(parameters: list[torch.nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    from grpo.adamw_8bit import AdamW8bit  # torchao takes a while to import, which other runs do without

    return AdamW8bit(parameters, lr=config.lr, weight_decay=config.weight_decay, betas=config.betas)


OPTIMIZERS = {
    "adamw": _adamw,
    "adamw_offload": _adamw,  # `grpo.models.shard` puts what it works on in the CPU's memory
    "adamw_8bit": _adamw_8bit,
    "adam": lambda p, c: torch.optim.Adam(p, lr=c.lr, weight_decay=c.weight_decay, betas=c.betas),
    "sgd": lambda p, c: torch.optim.SGD(p, lr=c.lr, weight_decay=c.weight_decay),
}


@singledispatch
def plain_state(optimizer: torch.optim.Optimizer, state: State) -> State:
    """`state` as tensors that safetensors can hold, sharing their memory."""
    return state


@singledispatch
def packed_state(optimizer: torch.optim.Optimizer, state: State) -> State:
    """The inverse of `plain_state`."""
    return state
