"""AdamW whose moments take 8 bits a number: a code, and a float32 scale for each block of them. torchao's, with our blocks.

torchao cuts a rank's shard into blocks of 256 numbers wherever its rows end. Here a block lies within a row, which no shard
cuts: states, and so the training, are the same on any number of ranks, and a checkpoint of some can be read by others.

Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861, section 2.
"""

import math

import torch
from torch.distributed.tensor import DTensor
from torchao.optim import AdamW8bit as TorchaoAdamW8bit
from torchao.optim.subclass_8bit import OptimState8bit

from grpo.optimizers import State, packed_state, plain_state

BLOCK = 256  # numbers that share a scale, at most
MIN_BLOCK = 16  # with fewer their scales take up what the codes save
MIN_NUMBERS = 4096  # of a parameter; smaller ones, such as norms and biases, keep float32 moments, as in bitsandbytes
SIGNED = {"exp_avg": True, "exp_avg_sq": False}
CODES, SCALES = "_codes", "_scales"  # uint8 in the parameter's shape; float32 [rows, blocks a row]


def block_size(shape: torch.Size) -> int | None:
    """Numbers a block for a parameter of this (whole) shape; None where its moments stay in float32."""
    numbers = math.prod(shape)
    block = math.gcd(numbers // shape[0], BLOCK) if numbers else 0
    return block if numbers >= MIN_NUMBERS and block >= MIN_BLOCK else None


class AdamW8bit(TorchaoAdamW8bit):
    """torchao's optimiser, for DTensors that are sharded by rows."""

    def _new_buffer(self, p: DTensor, signed: bool) -> DTensor:
        local, block = p.to_local(), block_size(p.shape)
        if block is None or not local.numel():
            return torch.zeros_like(p)
        return _like(p, OptimState8bit.zeros(local.shape, signed, block, local.device, local.dtype))

    @torch.no_grad()
    def step(self, closure=None):
        """On a CPU as it stands: compiling it for each shape would take longer than many a run there."""
        on_cpu = all(p.device.type == "cpu" for group in self.param_groups for p in group["params"])
        with torch.compiler.set_stance("force_eager" if on_cpu else "default"):
            return super().step(closure)


@plain_state.register
def _(optimizer: AdamW8bit, state: State) -> State:
    plain = {}
    for key, value in state.items():
        block = block_size(value.shape) if key in SIGNED else None
        if block is None:
            plain[key] = value
            continue
        local, rows, width = value.to_local(), value.shape[0], value.numel() // value.shape[0] // block
        is_packed = isinstance(local, OptimState8bit)  # all are but those of a rank without rows
        codes = local.codes if is_packed else local.to(torch.uint8)
        scales = local.scale.view(-1, width) if is_packed else local.new_zeros(0, width)
        plain[key + CODES] = _like(value, codes)
        plain[key + SCALES] = DTensor.from_local(
            scales, value.device_mesh, value.placements, run_check=False, shape=torch.Size([rows, width]), stride=(width, 1)
        )
    return plain


@packed_state.register
def _(optimizer: AdamW8bit, state: State) -> State:
    packed = {key: value for key, value in state.items() if not key.endswith((CODES, SCALES))}
    for key, signed in SIGNED.items():
        if key + CODES not in state:
            continue
        codes, scales = state[key + CODES], state[key + SCALES].to_local()
        local = codes.to_local().float()
        if local.numel():
            local = OptimState8bit.zeros(
                local.shape, signed, codes.numel() // math.prod(state[key + SCALES].shape), local.device, local.dtype
            )
            local.codes.copy_(codes.to_local())
            local.scale.copy_(scales.flatten())
        packed[key] = _like(codes, local)
    return packed


def _like(other: DTensor, local: torch.Tensor) -> DTensor:
    """`local` as this rank's part of a DTensor that is sharded as `other`."""
    return DTensor.from_local(
        local, other.device_mesh, other.placements, run_check=False, shape=other.shape, stride=other.stride()
    )
