"""Transports in one process: what is sent is received bit for bit, and what is not is named."""

import os
import threading
import time

import pytest
import torch

from grpo import transports
from grpo.errors import PushError, UserError
from grpo.transports import SharedMemoryReceiver, SharedMemorySender, buckets, make_receiver, make_sender
from grpo.weight_sync import Receiver, Sender, make_layout

from .conftest import CPU

TIMEOUT_S = 10.0


def parameters(seed: int) -> list[tuple[str, torch.Tensor]]:
    """Sizes that fill no cache line evenly."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed": (7, 5), "norm": (3,), "scale": (), "head": (1, 33), "wide": (2, 3, 5), "last": (1,)}
    return [(name, torch.randn(shape, generator=generator)) for name, shape in shapes.items()]


def joined(transport: str, dtype: str = "float32", num_receivers: int = 2) -> tuple[Sender, list[Receiver]]:
    sender = make_sender(transport, "127.0.0.1", parameters(0), dtype, num_receivers, TIMEOUT_S)
    receivers: dict[int, Receiver] = {}

    def join(index: int) -> None:
        receivers[index] = make_receiver(sender.description(), f"engine {index}", index, CPU)

    threads = [threading.Thread(target=join, args=(i,)) for i in range(num_receivers)]
    for thread in threads:
        thread.start()
    sender.join()
    for thread in threads:
        thread.join()
    return sender, [receivers[i] for i in range(num_receivers)]


def pushed(sender: Sender, receivers: list[Receiver], version: int, tensors: list[tuple[str, torch.Tensor]]):
    """One push, with every receiver in a thread of its own: (sent, tensors a receiver)."""
    taken: dict[int, list] = {}

    def take(index: int) -> None:
        taken[index] = [(name, tensor.clone()) for name, tensor in receivers[index].receive(version)]

    threads = [threading.Thread(target=take, args=(i,)) for i in range(len(receivers))]
    for thread in threads:
        thread.start()
    sent = sender.send(version, tensors)
    for thread in threads:
        thread.join()
    return sent, [taken[i] for i in range(len(receivers))]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("transport", ["shared_memory", "gloo"])
@pytest.mark.parametrize("bucket", [64 << 20, 200, 1])
def test_what_is_sent_is_received_by_all_bit_for_bit_in_the_engines_dtype(monkeypatch, transport, dtype, bucket):
    monkeypatch.setattr(transports, "BUCKET", bucket)
    sender, receivers = joined(transport, dtype)
    for version in (0, 1, 2):
        sent, taken = pushed(sender, receivers, version, parameters(version))
        assert sent.version == version
        for receiver, tensors in zip(receivers, taken, strict=True):
            assert [name for name, _ in tensors] == [name for name, _ in parameters(0)]
            for (name, tensor), (_, original) in zip(tensors, parameters(version), strict=True):
                assert torch.equal(tensor, original.to(getattr(torch, dtype))), name
            assert receiver.arrived == sent.checksums


def test_buckets_hold_consecutive_slots_up_to_a_size(monkeypatch):
    slots = make_layout([(str(i), torch.zeros(n)) for i, n in enumerate((16, 16, 16, 100, 1, 1))], torch.float32)
    monkeypatch.setattr(transports, "BUCKET", 128)
    assert [[slot.name for slot in bucket] for bucket in buckets(slots)] == [["0", "1"], ["2"], ["3"], ["4", "5"]]
    monkeypatch.setattr(transports, "BUCKET", 1)
    assert [len(bucket) for bucket in buckets(slots)] == [1] * 6


def test_loading_begins_while_sending_goes_on():
    sender, (receiver,) = joined("shared_memory", num_receivers=1)
    waiting = receiver.receive(1)
    tensors = iter(parameters(1))

    def slowly():
        yield next(tensors)
        first.wait(TIMEOUT_S)
        yield from tensors

    first = threading.Event()
    thread = threading.Thread(target=sender.send, args=(1, slowly()))
    thread.start()
    name, tensor = next(waiting)  # comes although nothing else was sent yet
    assert name == "embed"
    assert torch.equal(tensor, parameters(1)[0][1])
    first.set()
    assert len(list(waiting)) == len(parameters(1)) - 1
    thread.join()


def test_a_tensor_that_is_left_out_is_named_at_once_and_one_that_is_late_at_the_deadline():
    sender, (receiver,) = joined("shared_memory", num_receivers=1)
    put = SharedMemorySender._put.__get__(sender)
    sender._put = lambda version, index, tensor: None if index == 2 else put(version, index, tensor)
    sender.send(1, parameters(1))
    with pytest.raises(PushError, match=r"^engine 0: tensor scale of version 1 was never sent$"):
        list(receiver.receive(1))
    receiver.timeout_s = 0.2
    start = time.monotonic()
    with pytest.raises(PushError, match=r"^engine 0: tensor embed of version 2 did not come within 0.2 s$"):
        list(receiver.receive(2))
    assert 0.2 <= time.monotonic() - start < 5


def test_another_versions_broadcast_is_refused():
    sender, receivers = joined("gloo", num_receivers=1)
    raised = []

    def take() -> None:
        try:
            list(receivers[0].receive(5))
        except PushError as error:
            raised.append(str(error))

    thread = threading.Thread(target=take)
    thread.start()
    sender._begin(4)
    thread.join()
    assert raised == ["engine 0: version 4 came in a push of version 5"]


@pytest.mark.parametrize("transport", ["shared_memory", "gloo"])
def test_parameters_in_another_order_or_number_are_refused(transport):
    sender, _ = joined(transport, num_receivers=1) if transport == "shared_memory" else (None, None)
    if sender is None:
        sender = make_sender(transport, "127.0.0.1", parameters(0), "float32", 1, TIMEOUT_S)
        sender._begin = sender._put = lambda *args: None
    first, second, *rest = parameters(1)
    with pytest.raises(AssertionError, match="parameter norm where the layout has embed"):
        sender.send(1, [second, first, *rest])
    for wrong in ([first, second, *rest, ("extra", torch.zeros(1))], [first, second, *rest[:-1]]):
        with pytest.raises(ValueError, match="zip"):
            sender.send(1, wrong)


def test_the_segment_has_no_name_that_could_be_left_behind():
    before = set(os.listdir(transports.SHARED_MEMORY))
    sender = SharedMemorySender(parameters(0), "float32", 1, TIMEOUT_S)
    assert not [name for name in set(os.listdir(transports.SHARED_MEMORY)) - before if name.startswith("grpo-")]
    receiver = SharedMemoryReceiver(sender.description(), "engine", 0, CPU)
    sender.join()
    sender.send(1, parameters(5))
    assert torch.equal(dict(receiver.receive(1))["head"], dict(parameters(5))["head"])


def test_an_engine_that_does_not_map_the_segment_is_an_error_that_says_what_to_do():
    sender = SharedMemorySender(parameters(0), "float32", 2, 0.2)
    SharedMemoryReceiver(sender.description(), "engine", 1, CPU)
    with pytest.raises(PushError, match=r"^1 of 2 engine processes did not map .* use train.weight_transport=gloo$"):
        sender.join()


def test_a_model_that_shared_memory_has_no_room_for_is_an_error_that_names_it_and_leaves_no_file(monkeypatch, tmp_path):
    monkeypatch.setattr(transports, "SHARED_MEMORY", str(tmp_path))
    with pytest.raises(UserError) as raised:
        SharedMemorySender([("a", torch.empty(2**58, device="meta"))], "float32", 1, TIMEOUT_S)
    message = str(raised.value)
    assert message.startswith(str(tmp_path))
    assert f"{2**40} MiB" in message
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == []
