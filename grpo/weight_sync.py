"""Versioned weight pushes: the trainer packs its parameters, engines load them between two engine steps.

Transport here is shared memory on one host. The trainer owns a segment laid out as `Layout` says and writes the whole
model into it; an engine maps the same segment and loads from it. The segment's name lives only until every engine has
mapped it, so that a run that is killed later leaves nothing behind.

    trainer: write ──> segment ──> engine: load, take the new version
             the driver orders the two calls, so nobody writes while an engine reads
"""

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

import torch

from grpo.errors import UserError

SHARED_MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir()
ALIGNMENT = 64  # bytes; a cache line


@dataclass(frozen=True)
class Slot:
    """Where one parameter lies in the segment."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    num_bytes: int


def make_layout(parameters: Iterable[tuple[str, torch.Tensor]]) -> list[Slot]:
    """A slot for each parameter, in order, each aligned."""
    slots, offset = [], 0
    for name, tensor in parameters:
        num_bytes = tensor.numel() * tensor.element_size()
        slots.append(Slot(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), offset, num_bytes))
        offset += -(-num_bytes // ALIGNMENT) * ALIGNMENT
    return slots


def views(segment: torch.Tensor, slots: Iterable[Slot]) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters inside `segment` (uint8 [N]) as tensors that share its memory."""
    for slot in slots:
        flat = segment[slot.offset : slot.offset + slot.num_bytes]
        yield slot.name, flat.view(getattr(torch, slot.dtype)).view(slot.shape)


class SharedMemorySender:
    """The trainer's end."""

    def __init__(self, parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Allocate a segment for `parameters`, of which only names, shapes and dtypes are read."""
        self.slots = make_layout(parameters)
        num_bytes = self.slots[-1].offset + self.slots[-1].num_bytes
        free = shutil.disk_usage(SHARED_MEMORY).free
        if free < num_bytes:
            raise UserError(
                f"{SHARED_MEMORY} has {free / 2**20:.0f} MiB free and a weight push needs {num_bytes / 2**20:.0f} MiB: "
                "give the container or machine more shared memory"
            )
        descriptor, self.path = tempfile.mkstemp(prefix="grpo-weights-", dir=SHARED_MEMORY)
        os.truncate(descriptor, num_bytes)
        if hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(descriptor, 0, num_bytes)
        os.close(descriptor)
        self.segment = torch.from_file(self.path, shared=True, size=num_bytes, dtype=torch.uint8)

    def description(self) -> dict:
        """What an engine needs to map the segment: the `init_info` of vLLM's weight-transfer interface."""
        return {"path": self.path, "num_bytes": len(self.segment), "slots": [asdict(slot) for slot in self.slots]}

    def write(self, parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy every parameter into its slot; the names must come in the layout's order."""
        for (name, tensor), (expected, target) in zip(parameters, views(self.segment, self.slots), strict=True):
            assert name == expected, f"parameter {name} where the layout has {expected}"
            target.copy_(tensor)

    def unlink(self) -> None:
        """Remove the segment's name; the mappings stay."""
        os.unlink(self.path)


class SharedMemoryReceiver:
    """An engine's end: what both backends load from."""

    def __init__(self, path: str, num_bytes: int, slots: list[dict]) -> None:
        self.slots = [Slot(**slot) for slot in slots]
        self.segment = torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8)

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What the trainer last wrote."""
        return views(self.segment, self.slots)
