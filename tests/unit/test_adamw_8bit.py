"""The 8-bit optimiser on a sharded layer. In a trainer: test_offline_trainer.py; on two ranks: test_ranks.py."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torchao.optim.subclass_8bit import OptimState8bit

from grpo.adamw_8bit import AdamW8bit, block_size
from grpo.optimizers import packed_state, plain_state


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def layer(mesh) -> torch.nn.Module:
    """64 rows of 96 numbers, 64 biases."""
    torch.manual_seed(0)
    return fully_shard(torch.nn.Linear(96, 64), mesh=mesh)


def give_gradients(module: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        # Of many sizes, as gradients are.
        values = torch.randn(parameter.shape, generator=generator) * 10 ** torch.randn(
            parameter.shape[:1] + (1,) * (parameter.ndim - 1), generator=generator
        )
        parameter.grad = DTensor.from_local(values, parameter.device_mesh, parameter.placements)


SIZES = [
    ((1024, 256), 256),
    ((1024, 2048), 256),
    ((151936, 896), 128),  # 896 is 7 x 128
    ((52, 128), 128),
    ((16, 896), 128),  # an adapter's A
    ((4864, 16), 16),  # an adapter's B
    ((4864, 8), None),  # its scales would be as large as what the codes save
    ((100, 1000), None),
    ((31, 128), None),  # 3,968 numbers
    ((32, 128), 128),
    ((4096,), None),
    ((0, 256), None),
]


@pytest.mark.parametrize(("shape", "block"), SIZES, ids=str)
def test_a_block_lies_within_a_row_and_small_parameters_have_none(shape, block):
    assert block_size(torch.Size(shape)) == block


def test_the_moments_are_adams_rounded_block_by_block(mesh):
    module = layer(mesh)
    optimizer = AdamW8bit(module.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0)
    give_gradients(module, 0)
    gradient = module.weight.grad.to_local().clone()
    optimizer.step()
    state = optimizer.state[module.weight]
    for key, exact in (("exp_avg", 0.1 * gradient), ("exp_avg_sq", 0.01 * gradient.square())):
        local = state[key].to_local()
        assert isinstance(local, OptimState8bit) and local.block_size == 32
        largest = exact.view(-1, 32).abs().amax(-1)
        assert torch.allclose(local.scale, largest, rtol=1e-6)
        error = ((local.dequantize() - exact).view(-1, 32).abs().amax(-1) / largest).max()
        assert 1e-4 < error < 0.02  # neighbouring codes are at most 1/32 of the block's largest number apart
    assert state["exp_avg"].to_local().codes.dtype == torch.uint8
    assert type(optimizer.state[module.bias]["exp_avg"].to_local()) is torch.Tensor


def test_the_first_step_is_adamws_and_later_ones_stay_close(mesh):
    ours, theirs = layer(mesh), layer(mesh)
    settings = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
    optimizers = AdamW8bit(ours.parameters(), **settings), torch.optim.AdamW(theirs.parameters(), **settings)
    for number in range(20):
        for module, optimizer in zip((ours, theirs), optimizers, strict=True):
            give_gradients(module, number)
            optimizer.step()
        difference = (ours.weight - theirs.weight).to_local().detach().abs()
        if number == 0:
            assert difference.max() < 1e-6  # a step is taken with the moments before they are rounded
            assert torch.allclose(ours.bias.to_local(), theirs.bias.to_local(), atol=1e-6)
    assert torch.allclose(ours.bias.to_local(), theirs.bias.to_local(), atol=1e-6)  # its moments are not rounded
    moved = (theirs.weight - layer(mesh).weight).to_local().detach().abs()
    assert 1e-5 < difference.mean() < 0.1 * moved.mean()


def test_a_state_takes_a_byte_a_number_and_a_scale_a_block(mesh):
    module = layer(mesh)
    optimizer = AdamW8bit(module.parameters(), lr=1e-2)
    give_gradients(module, 0)
    optimizer.step()
    plain = plain_state(optimizer, optimizer.state[module.weight])
    num_bytes = {key: value.numel() * value.dtype.itemsize for key, value in plain.items()}
    number, blocks = 64 * 96, 64 * 3
    moments = {
        f"{key}{part}": size
        for key in ("exp_avg", "exp_avg_sq")
        for part, size in (("_codes", number), ("_scales", 4 * blocks))
    }
    assert num_bytes == moments | {"step": 4}
    adamw = torch.optim.AdamW(module.parameters())
    give_gradients(module, 0)
    adamw.step()
    theirs = sum(value.numel() * value.dtype.itemsize for value in adamw.state[module.weight].values())
    assert sum(num_bytes.values()) < 0.3 * theirs


def test_packing_what_was_plain_gives_the_same_state(mesh):
    module = layer(mesh)
    optimizer = AdamW8bit(module.parameters(), lr=1e-2)
    for number in range(3):
        give_gradients(module, number)
        optimizer.step()
    for parameter in module.parameters():
        state = optimizer.state[parameter]
        again = packed_state(optimizer, {key: value.clone() for key, value in plain_state(optimizer, state).items()})
        assert again.keys() == state.keys()
        for key, value in state.items():
            assert again[key].shape == value.shape
            if isinstance(value, DTensor) and isinstance(value.to_local(), OptimState8bit):
                for part in ("codes", "scale", "qmap"):
                    ours, theirs = getattr(again[key].to_local(), part), getattr(value.to_local(), part)
                    assert torch.equal(ours, theirs)
            else:
                assert torch.equal(again[key], value)
