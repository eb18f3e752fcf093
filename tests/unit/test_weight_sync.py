import json
from copy import deepcopy

import numpy as np
import pytest
import torch

from grpo.errors import PushError
from grpo.weight_sync import WORD, Receipt, Sent, checksum, make_layout, probe_vector, verify


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_checksum_is_the_sum_of_the_64_bit_words_modulo_2_to_the_64():
    assert checksum(torch.tensor([1, 2, 3])) == 6
    assert checksum(torch.tensor([2**63 - 1, 1])) == -(2**63)
    assert checksum(torch.tensor([1, 0, 5], dtype=torch.int32)) == 1 + 5  # the last half word is padded with zeros
    assert checksum(torch.tensor(7, dtype=torch.uint8)) == 7
    assert checksum(torch.zeros(0)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (7, 5), (2, 3, 5), (64, 33)])
def test_any_flipped_bit_changes_a_checksum(dtype, shape):
    tensor = (100 * draw(*shape)).to(dtype)
    before = checksum(tensor)
    data = tensor.reshape(-1).view(torch.uint8)
    for byte in {0, len(data) // 2, len(data) - 1}:
        for bit in (1, 16, 128):
            data[byte] ^= bit
            assert checksum(tensor) != before
            data[byte] ^= bit
    assert checksum(tensor) == before


def test_checksums_of_slices_and_shards_add_up_to_the_wholes():
    tensor = draw(6, 8)
    rows = sum(checksum(part) for part in tensor.split([1, 2, 3]))
    columns = sum(checksum(part) for part in tensor.chunk(2, dim=1))
    assert (rows - checksum(tensor)) % 2**64 == (columns - checksum(tensor)) % 2**64 == 0
    assert checksum(tensor[1:]) == checksum(tensor[1:].clone())  # wherever its memory begins
    assert checksum(draw(9)[1:]) == checksum(draw(9)[1:].clone())
    assert checksum(tensor.T) == checksum(tensor.T.clone(memory_format=torch.contiguous_format))


def test_slices_of_the_probe_vector_are_the_same_wherever_they_are_made():
    assert torch.equal(probe_vector(10)[:4], probe_vector(4))
    assert probe_vector(1000).abs().mean() > 0.5


def test_slots_are_aligned_in_order_and_do_not_overlap():
    parameters = [("a", draw(7, 5)), ("b", draw(3)), ("c", draw()), ("d", draw(2, 3, 5))]
    slots = make_layout(parameters, torch.bfloat16, first=5 * WORD)
    assert [slot.num_bytes for slot in slots] == [70, 6, 2, 60]
    assert [slot.offset for slot in slots] == [64, 192, 256, 320]
    assert [slot.name for slot in slots] == ["a", "b", "c", "d"]


@pytest.fixture
def pushed() -> tuple[Sent, Receipt]:
    """A push of a layer and an embedding, of which the engine tells the layer's projection and the tied output layer."""
    layer, embedding = draw(6, 4), draw(5, 4, seed=1)
    projections = {"layer": (layer @ probe_vector(4)).numpy(), "embedding": (embedding @ probe_vector(4)).numpy()}
    checksums = {"layer": checksum(layer), "embedding": checksum(embedding)}
    padded = np.concatenate([projections["embedding"], np.zeros(3, np.float32)])  # as vLLM pads its vocabulary
    held = {"layer": projections["layer"] * np.float32(1 + 1e-7), "head": padded}
    receipt = Receipt(7, [dict(checksums), dict(checksums)], {"embedding": checksums["embedding"]}, held)
    return Sent(7, checksums, projections), receipt


TIED = {"head": "embedding"}


def test_a_receipt_of_what_was_sent_passes(pushed):
    verify(*pushed, "engine 3", TIED)


MISSING = object()


def of(receipt: Receipt, field: str, name: str, value) -> Receipt:
    changed = deepcopy(receipt)
    where = changed.arrived[1] if field == "arrived" else getattr(changed, field)
    if value is MISSING:
        del where[name]
    else:
        where[name] = value
    return changed


@pytest.mark.parametrize(
    ("field", "name", "value", "message"),
    [
        ("arrived", "layer", 5, "tensor layer was changed on its way (checksum 5, sent "),
        ("arrived", "layer", MISSING, "tensor layer was never received"),
        ("checksums", "embedding", 5, "tensor embedding arrived but is not what the engine computes with"),
        ("checksums", "embedding", None, "tensor embedding arrived but is not what the engine computes with"),
        ("checksums", "embedding", MISSING, "it does not say what it holds of tensor embedding"),
        ("projections", "layer", np.ones(6, np.float32), "tensor layer arrived but is not what the engine computes with"),
        ("projections", "layer", np.full(6, np.nan), "tensor layer arrived but is not what the engine computes with"),
        ("projections", "head", np.ones(8, np.float32), "tensor head arrived but is not what the engine computes with"),
        ("projections", "head", MISSING, "it does not say what it holds of tensor head"),
    ],
)
def test_a_receipt_of_anything_else_names_engine_version_and_tensor(pushed, field, name, value, message):
    sent, receipt = pushed
    with pytest.raises(PushError) as raised:
        verify(sent, of(receipt, field, name, value), "engine 3", TIED)
    assert str(raised.value).startswith(f"engine 3, version 7: {message}")


def test_an_update_as_small_as_a_training_steps_shows_in_a_projection(pushed):
    """Weights of 0.03 that every step moves by 1e-6, as Adam does at that learning rate."""
    old = 0.03 * draw(512, 1024)
    new = old + 1e-6 * draw(512, 1024, seed=1).sign()
    x = probe_vector(1024)
    sent = Sent(1, {"layer": 0}, {"layer": (new @ x).numpy()})
    rounded = torch.stack([(new[:, i::8] * x[i::8]).sum(1) for i in range(8)]).sum(0)  # the same in another order
    verify(sent, Receipt(1, [{"layer": 0}], {}, {"layer": rounded.numpy()}), "engine", {})
    with pytest.raises(PushError, match="tensor layer arrived but is not what"):
        verify(sent, Receipt(1, [{"layer": 0}], {}, {"layer": (old @ x).numpy()}), "engine", {})


def test_an_engine_that_acknowledges_another_version_is_named(pushed):
    sent, receipt = pushed
    receipt.version = 6
    with pytest.raises(PushError, match=r"^engine 3, version 7: it acknowledged version 6$"):
        verify(sent, receipt, "engine 3", TIED)


def test_what_an_engine_needs_to_take_part_survives_a_trip_as_json():
    from grpo.transports import SharedMemoryReceiver, SharedMemorySender

    sender = SharedMemorySender([("a", draw(3, 4)), ("b", draw(5))], "float32", 1, 5.0)
    receiver = SharedMemoryReceiver(json.loads(json.dumps(sender.description())), "e", 0, torch.device("cpu"))
    sender.join()
    sender.send(1, [("a", draw(3, 4)), ("b", draw(5))])
    assert torch.equal(dict(receiver.receive(1))["a"], draw(3, 4))


def test_a_step_within_the_tolerance_shows_beside_the_push_before():
    """The first steps of a ramp move weights by a tenth of a small learning rate: by 1e-7 here."""
    old = 0.03 * draw(512, 1024)
    new = old + 1e-7 * draw(512, 1024, seed=1).sign()
    x = probe_vector(1024)
    before = Sent(1, {"layer": 0}, {"layer": (old @ x).numpy()})
    sent = Sent(2, {"layer": 1}, {"layer": (new @ x).numpy()})
    stale = Receipt(2, [{"layer": 1}], {}, {"layer": (old @ x).numpy()})
    verify(sent, stale, "engine", {})  # cannot be told by itself
    with pytest.raises(PushError, match="tensor layer arrived but is not what"):
        verify(sent, stale, "engine", {}, before)
    rounded = torch.stack([(new[:, i::8] * x[i::8]).sum(1) for i in range(8)]).sum(0)  # the same in another order
    verify(sent, Receipt(2, [{"layer": 1}], {}, {"layer": rounded.numpy()}), "engine", {}, before)


def test_a_step_below_rounding_is_no_fault():
    """One that moves the last bits alone: the engine's rounding may happen to be nearer to the old weights'."""
    old = 0.03 * draw(512, 1024)
    new = old + 1e-12 * draw(512, 1024, seed=1).sign()
    x = probe_vector(1024)
    before, sent = (Sent(i, {"layer": i}, {"layer": (w @ x).numpy()}) for i, w in ((1, old), (2, new)))
    rounded = torch.stack([(new[:, i::8] * x[i::8]).sum(1) for i in range(8)]).sum(0)
    verify(sent, Receipt(2, [{"layer": 2}], {}, {"layer": rounded.numpy()}), "engine", {}, before)
    verify(sent, Receipt(2, [{"layer": 2}], {}, before.projections), "engine", {}, before)
