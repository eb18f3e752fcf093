"""Versioned weight pushes with proof: the trainer sends its parameters, engines load them and say what they now hold.

A transport moves the parameters in the order of one layout, a tensor at a time, so that sending and loading overlap:

    training rank 0   send:    tensor 0 ── tensor 1 ── tensor 2 ── ...        each with its checksum, made before it leaves
                                   ╲           ╲           ╲
    each engine       receive:   tensor 0 ── tensor 1 ── tensor 2 ── ...      checksum on arrival, load, then what is held

How one tensor travels is the transports' business, see grpo/transports.py. `verify` compares what was sent with an
engine's receipt. What an engine holds is read from the parameters that it computes with; where it keeps a weight W only in
a packed form that cannot be read, it answers with the projection W x on a fixed x, and the trainer computes the same.

A checksum is the sum of a tensor's 64-bit words modulo 2^64: any one flipped bit changes it, and it is additive, so slices
and shards of a tensor can be compared with the whole.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np
import torch

from grpo.errors import PushError

ALIGNMENT = 64  # bytes; a cache line
WORD = 8  # bytes
PROJECTION_TOLERANCE = 1e-5  # of the projection's norm, between the trainer's and an engine's
PROJECTION_ROUNDING = 1e-6  # what float32 rounding of a matrix-vector product stays well below (1e-7 was seen)


@dataclass(frozen=True)
class Slot:
    """Where one parameter lies in the bytes of a push."""

    name: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass
class Sent:
    """What the trainer sent: a checksum a tensor, and projections of those that an engine cannot show otherwise."""

    version: int
    checksums: dict[str, int]
    projections: dict[str, np.ndarray]


@dataclass
class Receipt:
    """An engine's acknowledgement of `version`, made after it was applied.

    `arrived` are checksums of what came in, for each of the engine's processes. `checksums` and `projections` are of what
    the engine now computes with, by the names that the trainer uses; tied weights appear under each of their names.
    """

    version: int
    arrived: list[dict[str, int]]
    checksums: dict[str, int | None]  # None where its processes disagree
    projections: dict[str, np.ndarray]


def checksum(tensor: torch.Tensor) -> int:
    """Sum of the tensor's 64-bit words modulo 2^64, as a signed integer; its bytes are padded with zeros to whole words."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    size = data.numel()
    whole = size // WORD * WORD
    words = data[:whole]
    if words.data_ptr() % WORD:
        words = words.clone()
    total = int(words.view(torch.int64).sum())
    if whole < size:
        total += int(torch.nn.functional.pad(data[whole:], (0, WORD - (size - whole))).view(torch.int64))
    return (total + 2**63) % 2**64 - 2**63


@lru_cache
def probe_vector(size: int) -> torch.Tensor:
    """The fixed x, float32 [size], of a projection; any slice of it is the same wherever it is made."""
    return torch.sin(torch.arange(1, size + 1, dtype=torch.float64) * 12.9898).float()


@contextmanager
def one_thread() -> Iterator[None]:
    """Sender and receiver copy and sum at the same time: more threads get in each other's way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def unrounded_products() -> Iterator[None]:
    """Whatever model.matmul_precision says."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def make_layout(parameters: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype, first: int = 0) -> list[Slot]:
    """A slot for each parameter once it has `dtype`, in order, each aligned, from byte `first` on."""
    slots, offset = [], -(-first // ALIGNMENT) * ALIGNMENT
    for name, tensor in parameters:
        num_bytes = tensor.numel() * dtype.itemsize
        slots.append(Slot(name, tuple(tensor.shape), offset, num_bytes))
        offset += -(-num_bytes // ALIGNMENT) * ALIGNMENT
    return slots


def view(data: torch.Tensor, slot: Slot, dtype: torch.dtype, first: int = 0) -> torch.Tensor:
    """The parameter at `slot` inside `data` (uint8 [N], which starts at byte `first` of the layout), sharing its memory."""
    return data[slot.offset - first : slot.offset - first + slot.num_bytes].view(dtype).view(slot.shape)


class Sender(ABC):
    """The trainer's end of a transport. Subclasses say how one tensor goes out."""

    transport: str

    def __init__(self, parameters: list[tuple[str, torch.Tensor]], dtype: str, num_receivers: int, timeout_s: float) -> None:
        """`parameters` give names and shapes; they are sent as `dtype`, the engines' own, to `num_receivers` processes."""
        self.dtype = getattr(torch, dtype)
        self.num_receivers, self.timeout_s = num_receivers, timeout_s
        self.slots = make_layout(parameters, self.dtype, first=self._header_bytes(len(parameters)))
        self.projected: set[str] = set()  # names of which engines hold a packed form only

    def _header_bytes(self, num_parameters: int) -> int:
        return 0

    def description(self) -> dict:
        """What a receiver needs to take part, as plain values."""
        return {
            "transport": self.transport,
            "slots": [asdict(slot) for slot in self.slots],
            "dtype": str(self.dtype).removeprefix("torch."),
            "num_receivers": self.num_receivers,
            "timeout_s": self.timeout_s,
        }

    @abstractmethod
    def join(self) -> None:
        """Wait until every receiver takes part."""

    def send(self, version: int, parameters: Iterable[tuple[str, torch.Tensor]]) -> Sent:
        """Send every parameter, in the layout's order."""
        sent = Sent(version, {}, {})
        self._begin(version)
        for index, ((name, tensor), slot) in enumerate(zip(parameters, self.slots, strict=True)):
            assert name == slot.name, f"parameter {name} where the layout has {slot.name}"
            tensor = tensor.to(self.dtype)
            self._put(version, index, tensor)  # first: receivers load it meanwhile
            sent.checksums[name] = checksum(tensor)
            if name in self.projected:
                x = probe_vector(tensor.shape[-1]).to(tensor.device)
                with unrounded_products():
                    sent.projections[name] = (tensor.float() @ x).cpu().numpy()
        self._end(version)
        return sent

    @abstractmethod
    def _begin(self, version: int) -> None:
        """The tensors of `version` follow."""

    @abstractmethod
    def _put(self, version: int, index: int, tensor: torch.Tensor) -> None:
        """Send the tensor of slot `index`."""

    @abstractmethod
    def _end(self, version: int) -> None:
        """Every tensor of `version` was put."""


class Receiver(ABC):
    """An engine's end of a transport; both backends load from it."""

    def __init__(self, description: dict, engine: str, index: int, device: torch.device) -> None:
        """Take part as receiver `index` of the sender's `description`; `engine` is the name that errors use."""
        self.slots = [Slot(**slot) for slot in description["slots"]]
        self.dtype = getattr(torch, description["dtype"])
        self.timeout_s = description["timeout_s"]
        self.engine, self.device = engine, device
        self.arrived: dict[str, int] = {}

    def receive(self, version: int) -> Iterator[tuple[str, torch.Tensor]]:
        """The parameters of `version` as they come in; `arrived` has their checksums afterwards.

        Raises PushError for a tensor that does not come, and for another version's.
        """
        self.arrived = {}
        for slot, tensor in self._take(version):
            self.arrived[slot.name] = checksum(tensor)
            yield slot.name, tensor

    @abstractmethod
    def _take(self, version: int) -> Iterator[tuple[Slot, torch.Tensor]]:
        """Each slot with its tensor, in the layout's order, as they come in."""


def verify(sent: Sent, receipt: Receipt, engine: str, aliases: dict[str, str], before: Sent | None = None) -> None:
    """Raise PushError unless `engine` holds what was sent.

    `aliases`: tied names, by the name that they are sent under. With the push `before` this one, a projection must also be
    nearer to the new weights' than to theirs, so that steps down to PROJECTION_ROUNDING are told apart.
    """
    about = f"{engine}, version {sent.version}"
    if receipt.version != sent.version:
        raise PushError(f"{about}: it acknowledged version {receipt.version}")
    for name, expected in sent.checksums.items():
        for arrived in receipt.arrived:
            if name not in arrived:
                raise PushError(f"{about}: tensor {name} was never received")
            if arrived[name] != expected:
                raise PushError(
                    f"{about}: tensor {name} was changed on its way (checksum {arrived[name]:x}, sent {expected:x})"
                )
    for name in [*sent.checksums, *aliases]:
        source = aliases.get(name, name)
        if name in receipt.checksums:
            held = receipt.checksums[name] == sent.checksums[source]
        elif name in receipt.projections:
            expected, actual = sent.projections[source], receipt.projections[name]
            actual = actual[: len(expected)]  # vLLM pads its vocabulary
            size, distance = np.linalg.norm(expected), np.linalg.norm(actual - expected)
            held = distance <= PROJECTION_TOLERANCE * size
            if before is not None:
                old = before.projections[source]
                is_step_seen = np.linalg.norm(expected - old) > PROJECTION_ROUNDING * size
                held = held and (not is_step_seen or distance < np.linalg.norm(actual - old))
        else:
            raise PushError(f"{about}: it does not say what it holds of tensor {name}")
        if not held:
            raise PushError(f"{about}: tensor {name} arrived but is not what the engine computes with")
