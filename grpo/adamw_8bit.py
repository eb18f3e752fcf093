"""AdamW whose two moments take 8 bits a number: a code, and a float32 scale for each block of them.

    moment = MAP[code] * scale,    scale = the largest magnitude of the block,    code = that of the nearest value of MAP

MAP's values lie close together around 0 and far apart around 1, since what is rounded spans many orders of magnitude. A step
takes the moments before they are rounded. A second moment is rounded to MAP's smallest value above 0 at least: over the root
of 0, a first moment that is there would move its weight hundreds of rates far. A block lies within a row, which no shard
cuts: states, and so the training, are the same on any number of ranks, and what some wrote to a checkpoint any other number
can read.

There are such optimisers in torchao and bitsandbytes. transformers and peft import either one wherever it is installed, with
warnings on every command, and their blocks are those of a rank's shard.

Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861, sections 2 and 1.3.
"""

import math

import torch
from torch.distributed.tensor import DTensor

BLOCK = 256  # numbers that share a scale, at most
MIN_BLOCK = 16  # with fewer their scales take up what the codes save
MIN_NUMBERS = 4096  # of a parameter; smaller ones, such as norms and biases, keep float32 moments, as in bitsandbytes
TINY = torch.finfo(torch.float32).tiny  # what a scale of 0 is divided by
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # whether it has a sign


def block_size(shape: torch.Size) -> int | None:
    """Numbers a block for a parameter of this (whole) shape; None where its moments stay in float32."""
    numbers = math.prod(shape)
    block = math.gcd(numbers // shape[0], BLOCK) if numbers else 0
    return block if numbers >= MIN_NUMBERS and block >= MIN_BLOCK else None


def dynamic_map(signed: bool) -> torch.Tensor:
    """MAP, float32 [256], ascending: per decade from 1e-7 to 1 twice as many values as in the one below; 0 and 1."""
    values = [0.0, 1.0]
    for decade in range(7):
        count = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1, count + 1, dtype=torch.float64)
        middles = ((edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6)).tolist()
        values += middles + [-value for value in middles] * signed
    return torch.tensor(sorted(values))


def rounded(moment: torch.Tensor, block: int, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes, uint8 in the shape of `moment` [N, ...], and scales, float32 [N, blocks a row]; `values` is MAP."""
    blocks = moment.flatten(1).unflatten(1, (-1, block))
    scales = blocks.abs().amax(2)
    middles = (values[1:] + values[:-1]) / 2
    codes = torch.bucketize(blocks / scales[..., None].clamp_min(TINY), middles)
    return codes.to(torch.uint8).view_as(moment), scales


def restored(codes: torch.Tensor, scales: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The moment, float32 in the shape of `codes`."""
    blocks = values[codes.int()].flatten(1).unflatten(1, (scales.shape[1], -1))
    return (blocks * scales[..., None]).view_as(codes)


class AdamW8bit(torch.optim.Optimizer):
    """For DTensors that are sharded by rows: `step`, and for each moment NAME either NAME or NAME_codes and NAME_scales."""

    def __init__(
        self, parameters: list[torch.nn.Parameter], lr: float, weight_decay: float, betas: tuple[float, float]
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "betas": tuple(betas), "eps": 1e-8})
        device = parameters[0].device
        self.maps = {name: dynamic_map(signed).to(device) for name, signed in MOMENTS.items()}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: DTensor, group: dict) -> None:
        state, block = self.state[parameter], block_size(parameter.shape)
        gradient, weight = parameter.grad.to_local(), parameter.to_local()
        state["step"] = state.get("step", torch.tensor(0.0)) + 1
        moments = {}
        for name, power, beta in zip(MOMENTS, (1, 2), group["betas"], strict=True):
            moment = self._moment(state, name, weight).lerp_(gradient**power, 1 - beta)
            self._keep(state, name, moment, block, parameter)
            moments[name] = moment / (1 - beta ** float(state["step"]))
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.addcdiv_(moments["exp_avg"], moments["exp_avg_sq"].sqrt_().add_(group["eps"]), value=-group["lr"])

    def _moment(self, state: dict, name: str, weight: torch.Tensor) -> torch.Tensor:
        if f"{name}_codes" in state:
            return restored(state[f"{name}_codes"].to_local(), state[f"{name}_scales"].to_local(), self.maps[name])
        return state[name].to_local() if name in state else torch.zeros_like(weight)

    def _keep(self, state: dict, name: str, moment: torch.Tensor, block: int | None, parameter: DTensor) -> None:
        if block is None:
            state[name] = _sharded(moment, parameter.shape, parameter)
            return
        codes, scales = rounded(moment, block, self.maps[name])
        if name == "exp_avg_sq":
            codes.clamp_min_(1)  # a block of zeros is one by its scale
        width = math.prod(parameter.shape[1:]) // block
        state[f"{name}_codes"] = _sharded(codes, parameter.shape, parameter)
        state[f"{name}_scales"] = _sharded(scales, torch.Size([parameter.shape[0], width]), parameter)


def _sharded(local: torch.Tensor, shape: torch.Size, parameter: DTensor) -> DTensor:
    """`local` as this rank's rows of a DTensor of that shape, which is sharded as `parameter`."""
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
    )
