"""The 8-bit optimiser on a sharded layer. In a trainer: test_offline_trainer.py; on two ranks: test_ranks.py."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from grpo.adamw_8bit import AdamW8bit, block_size, dynamic_map, restored, rounded


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


def test_the_map_is_that_of_the_paper():
    """Seven decades, each of twice as many values as the one below; the middles of equal parts of [0.1, 1]."""
    signed, positive = dynamic_map(True), dynamic_map(False)
    assert len(signed) == len(positive) == 256
    assert (signed.diff() > 0).all() and (positive.diff() > 0).all()
    assert positive[:4].tolist() == pytest.approx([0.0, 0.325e-6, 0.775e-6, 2.125e-6])
    assert positive[-3:].tolist() == pytest.approx([1 - 0.9 * 3 / 256, 1 - 0.9 / 256, 1.0])
    assert signed[126:130].tolist() == pytest.approx([-0.55e-6, 0.0, 0.55e-6, 3.25e-6])
    assert signed[0] == pytest.approx(-(1 - 0.9 / 128))  # only the positive largest number is exact


def test_rounding_takes_the_nearest_value_and_keeps_zeros_and_the_largest():
    values = dynamic_map(False)
    moment = torch.zeros(2, 32)
    moment[0, :4] = torch.tensor([3.0, 1.5, 2e-6, 1e-9])
    codes, scales = rounded(moment, 16, values)
    assert codes.dtype == torch.uint8
    assert scales.tolist() == [[3.0, 0.0], [0.0, 0.0]]
    nearest = [3.0 * float(values[(values - share).abs().argmin()]) for share in (1.0, 0.5, 2e-6 / 3, 1e-9 / 3)]
    found = restored(codes, scales, values)
    assert found[0, :4].tolist() == pytest.approx(nearest) and nearest[3] == 0
    assert not found[0, 4:].any() and not found[1].any()
    none = restored(*rounded(torch.empty(0, 32), 16, values), values)  # a rank may have no row
    assert none.shape == (0, 32)


def test_the_moments_are_adams_rounded_block_by_block(mesh):
    module = layer(mesh)
    optimizer = AdamW8bit(list(module.parameters()), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0)
    give_gradients(module, 0)
    gradient = module.weight.grad.to_local().clone()
    optimizer.step()
    state = optimizer.state[module.weight]
    for name, exact in (("exp_avg", 0.1 * gradient), ("exp_avg_sq", 0.01 * gradient.square())):
        codes, scales = (state[f"{name}_{part}"] for part in ("codes", "scales"))
        assert (codes.shape, scales.shape) == ((64, 96), (64, 3))
        largest = exact.view(64, 3, 32).abs().amax(-1)
        assert torch.allclose(scales.to_local(), largest, rtol=1e-6)
        found = restored(codes.to_local(), scales.to_local(), optimizer.maps[name])
        error = ((found - exact).view(64, 3, 32).abs().amax(-1) / largest).max()
        assert 1e-4 < error <= 0.0071  # neighbouring values are at most 0.9 / 64 of the block's largest number apart
    assert state.keys() == {"step", "exp_avg_codes", "exp_avg_scales", "exp_avg_sq_codes", "exp_avg_sq_scales"}
    small = optimizer.state[module.bias]
    assert small.keys() == {"step", "exp_avg", "exp_avg_sq"} and small["exp_avg"].dtype == torch.float32


def test_the_first_step_is_adamws_and_later_ones_stay_close(mesh):
    ours, theirs = layer(mesh), layer(mesh)
    settings = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
    optimizers = AdamW8bit(list(ours.parameters()), **settings), torch.optim.AdamW(theirs.parameters(), **settings)
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


def test_numbers_that_are_small_beside_others_of_their_block_move_no_further_than_with_adamw(mesh):
    """Squares of a millionth of the block's largest, and less, are nearer to 0 than to the map's smallest value above it."""
    ours, theirs = layer(mesh), layer(mesh)
    settings = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.0}
    optimizers = AdamW8bit(list(ours.parameters()), **settings), torch.optim.AdamW(theirs.parameters(), **settings)
    sizes = torch.ones(64, 96)
    sizes[:, 1::4], sizes[:, 2::4], sizes[:, 3::4] = 1e-3, 1e-4, 0
    sizes[0] = 0  # blocks of zeros
    generator, furthest = torch.Generator().manual_seed(1), [0.0, 0.0]
    for _ in range(30):
        gradient = torch.randn(64, 96, generator=generator) * sizes
        for i, (module, optimizer) in enumerate(zip((ours, theirs), optimizers, strict=True)):
            module.weight.grad = DTensor.from_local(gradient.clone(), mesh, module.weight.placements)
            before = module.weight.to_local().detach().clone()
            optimizer.step()
            moved = (module.weight.to_local().detach() - before).abs()
            assert not moved[sizes == 0].any()
            furthest[i] = max(furthest[i], float(moved[(sizes > 0) & (sizes < 1)].max()))
    assert 0.01 < furthest[0] <= 2 * furthest[1]


def test_a_state_takes_a_byte_a_number_and_a_scale_a_block(mesh):
    module = layer(mesh)
    optimizer = AdamW8bit(list(module.parameters()), lr=1e-2, weight_decay=0.0, betas=(0.9, 0.99))
    give_gradients(module, 0)
    optimizer.step()
    num_bytes = {key: value.numel() * value.dtype.itemsize for key, value in optimizer.state[module.weight].items()}
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
