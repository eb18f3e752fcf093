import json
import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from grpo import weight_sync
from grpo.errors import UserError
from grpo.weight_sync import ALIGNMENT, SharedMemoryReceiver, SharedMemorySender, make_layout


def parameters(seed: int) -> list[tuple[str, torch.Tensor]]:
    """Mixed dtypes and sizes that fill no cache line evenly."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return [
        ("embed", draw(7, 5)),
        ("norm", draw(3).to(torch.bfloat16)),
        ("scale", draw()),
        ("head", draw(1, 33).half()),
        ("wide", draw(2, 3, 5).double()),
        ("steps", torch.tensor([seed, 2**40, -1])),
        ("last", draw(1)),
    ]


@pytest.fixture
def sender():
    made = SharedMemorySender(parameters(0))
    yield made
    if os.path.exists(made.path):
        made.unlink()


def assert_received(receiver: SharedMemoryReceiver, expected: list[tuple[str, torch.Tensor]]) -> None:
    received = list(receiver.parameters())
    assert [name for name, _ in received] == [name for name, _ in expected]
    for (name, tensor), (_, original) in zip(received, expected, strict=True):
        assert tensor.dtype == original.dtype, name
        assert torch.equal(tensor, original), name


def test_what_is_written_is_received_bit_for_bit_in_every_dtype_and_size(sender):
    receivers = [SharedMemoryReceiver(**sender.description()) for _ in range(2)]
    for seed in (1, 2):
        sender.write(parameters(seed))
        for receiver in receivers:
            assert_received(receiver, parameters(seed))


def test_the_description_survives_a_trip_as_json_as_vllm_makes_it(sender):
    receiver = SharedMemoryReceiver(**json.loads(json.dumps(sender.description())))
    sender.write(parameters(1))
    assert_received(receiver, parameters(1))


def test_slots_are_aligned_in_order_and_do_not_overlap():
    slots = make_layout(parameters(0))
    assert [slot.num_bytes for slot in slots] == [140, 6, 4, 66, 240, 24, 4]
    assert [slot.offset for slot in slots] == [0, 192, 256, 320, 448, 704, 768]
    for slot, following in pairwise(slots):
        assert slot.offset % ALIGNMENT == following.offset % ALIGNMENT == 0
        assert slot.offset + slot.num_bytes <= following.offset


def test_writing_one_parameter_leaves_its_neighbours_alone(sender):
    sender.write(parameters(1))
    changed = [(name, torch.zeros_like(t) if name == "scale" else t) for name, t in parameters(1)]
    sender.write(changed)
    assert_received(SharedMemoryReceiver(**sender.description()), changed)


def test_parameters_in_another_order_are_refused(sender):
    first, second, *rest = parameters(1)
    with pytest.raises(AssertionError, match="parameter norm where the layout has embed"):
        sender.write([second, first, *rest])


@pytest.mark.parametrize("change", [lambda p: p[:-1], lambda p: [*p, ("extra", torch.zeros(1))]])
def test_too_few_or_too_many_parameters_are_refused(sender, change):
    with pytest.raises(ValueError, match="zip"):
        sender.write(change(parameters(1)))


def test_after_unlink_the_mapping_works_and_no_file_is_left(sender):
    receiver = SharedMemoryReceiver(**sender.description())
    assert Path(sender.path).parent == Path(weight_sync.SHARED_MEMORY)
    assert Path(sender.path).stat().st_size == 772
    sender.unlink()
    assert not os.path.exists(sender.path)
    sender.write(parameters(5))
    assert_received(receiver, parameters(5))


def test_a_model_that_shared_memory_has_no_room_for_is_an_error_that_names_it_and_leaves_no_file(monkeypatch, tmp_path):
    monkeypatch.setattr(weight_sync, "SHARED_MEMORY", str(tmp_path))
    with pytest.raises(UserError) as raised:
        SharedMemorySender([("a", torch.empty(2**58, device="meta"))])
    message = str(raised.value)
    assert message.startswith(str(tmp_path))
    assert f"{2**40} MiB" in message
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == []
