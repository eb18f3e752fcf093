"""How the tensors of a weight push travel: shared memory on one host, gloo between hosts, NCCL between GPUs.

`shared_memory` is one segment that all processes of a host map; `gloo` and `nccl` broadcast through a process group of
their own. All are `Sender` and `Receiver` of grpo/weight_sync.py, which adds versions and proof.
"""

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from grpo.errors import PushError, UserError
from grpo.leftovers import SHARED_MEMORY, segment_prefix
from grpo.weight_sync import WORD, Receiver, Sender, Slot, view

BUCKET = 64 << 20  # bytes a broadcast
POLL_S = 1e-4


class SharedMemorySender(Sender):
    """One segment of the host's shared memory holds the whole model.

    Header, int64: [0] the last version that was sent whole, [1 + i] the version of slot i, [1 + slots + r] whether
    receiver r has mapped the segment. It has no name that could be left behind: receivers map it through the sender's open
    file (where there is no /proc, it has one until all of them have mapped it).
    """

    transport = "shared_memory"

    def __init__(self, parameters: list[tuple[str, torch.Tensor]], dtype: str, num_receivers: int, timeout_s: float) -> None:
        super().__init__(parameters, dtype, num_receivers, timeout_s)
        num_bytes = self.slots[-1].offset + self.slots[-1].num_bytes
        free = shutil.disk_usage(SHARED_MEMORY).free
        if free < num_bytes:
            raise UserError(
                f"{SHARED_MEMORY} has {free / 2**20:.0f} MiB free and a weight push needs {num_bytes / 2**20:.0f} MiB: "
                "give the container or machine more shared memory"
            )
        descriptor, self.path = tempfile.mkstemp(prefix=segment_prefix("weights"), dir=SHARED_MEMORY)
        os.truncate(descriptor, num_bytes)
        if hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(descriptor, 0, num_bytes)
        if os.path.isdir("/proc/self/fd"):
            os.unlink(self.path)
            self.path = f"/proc/{os.getpid()}/fd/{descriptor}"
        self.segment = torch.from_file(self.path, shared=True, size=num_bytes, dtype=torch.uint8)
        self.header = _header(self.segment, len(self.slots) + num_receivers)
        self.header[: 1 + len(self.slots)] = -1  # no version yet: 0 is one

    def _header_bytes(self, num_parameters: int) -> int:
        return WORD * (1 + num_parameters + self.num_receivers)

    def description(self) -> dict:
        return super().description() | {"path": self.path, "num_bytes": len(self.segment)}

    def join(self) -> None:
        deadline = time.monotonic() + self.timeout_s
        mapped = self.header[1 + len(self.slots) :]
        while not mapped.all():
            if time.monotonic() > deadline:
                raise PushError(
                    f"{len(mapped) - int(mapped.sum())} of {len(mapped)} engine processes did not map the trainer's weights "
                    f"within {self.timeout_s:g} s: engines must run on the trainer's host, or use "
                    "train.weight_transport=gloo"
                )
            time.sleep(0.01)
        if not self.path.startswith("/proc/"):
            os.unlink(self.path)

    def _begin(self, version: int) -> None:
        pass

    def _put(self, version: int, index: int, tensor: torch.Tensor) -> None:
        view(self.segment, self.slots[index], self.dtype).copy_(tensor)
        self.header[1 + index] = version

    def _end(self, version: int) -> None:
        self.header[0] = version


class SharedMemoryReceiver(Receiver):
    """Maps the sender's segment."""

    def __init__(self, description: dict, engine: str, index: int, device: torch.device) -> None:
        super().__init__(description, engine, index, device)
        self.segment = torch.from_file(description["path"], shared=True, size=description["num_bytes"], dtype=torch.uint8)
        self.header = _header(self.segment, len(self.slots) + description["num_receivers"])
        self.header[1 + len(self.slots) + index] = 1

    def _take(self, version: int) -> Iterator[tuple[Slot, torch.Tensor]]:
        deadline = time.monotonic() + self.timeout_s
        for i, slot in enumerate(self.slots):
            while self.header[1 + i] != version:
                # Read in this order: a sender that is done has marked every slot that it sent.
                if self.header[0] == version and self.header[1 + i] != version:
                    raise PushError(f"{self.engine}: tensor {slot.name} of version {version} was never sent")
                if time.monotonic() > deadline:
                    raise PushError(
                        f"{self.engine}: tensor {slot.name} of version {version} did not come within {self.timeout_s:g} s"
                    )
                time.sleep(POLL_S)
            yield slot, view(self.segment, slot, self.dtype)


def _header(segment: torch.Tensor, num_marks: int) -> np.ndarray:
    return segment[: WORD * (1 + num_marks)].view(torch.int64).numpy()


def buckets(slots: list[Slot]) -> Iterator[list[Slot]]:
    """Consecutive slots of at most BUCKET bytes together, or one larger one."""
    bucket: list[Slot] = []
    for slot in slots:
        if bucket and slot.offset + slot.num_bytes - bucket[0].offset > BUCKET:
            yield bucket
            bucket = []
        bucket.append(slot)
    yield bucket


def open_store(host: str, timeout: timedelta) -> dist.TCPStore:
    """A store at a free port of `host`, to which alone it listens; torch would listen to every address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, 0), family=family)
    port = listening.getsockname()[1]
    descriptor = listening.detach()
    return dist.TCPStore(host, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=descriptor)


class Broadcast:
    """A process group of its own for pushes: rank 0 is training rank 0, the others are receivers."""

    def __init__(self, transport: str, store: dist.Store, rank: int, world_size: int, timeout_s: float) -> None:
        timeout = timedelta(seconds=timeout_s)
        if transport == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self.group = dist.ProcessGroupNCCL(store, rank, world_size, options)
        else:
            self.group = dist.ProcessGroupGloo(store, rank, world_size, timeout)
        self.device = torch.device("cuda", torch.cuda.current_device()) if transport == "nccl" else torch.device("cpu")

    def __call__(self, data: torch.Tensor) -> torch.Tensor:
        """`data` as rank 0 has it, in place."""
        self.group.broadcast([data], dist.BroadcastOptions()).wait()
        return data


class BroadcastSender(Sender):
    """Sends buckets of tensors through a gloo or NCCL process group."""

    def __init__(
        self,
        transport: str,
        host: str,
        parameters: list[tuple[str, torch.Tensor]],
        dtype: str,
        num_receivers: int,
        timeout_s: float,
    ) -> None:
        super().__init__(parameters, dtype, num_receivers, timeout_s)
        self.transport, self.host = transport, host
        timeout = timedelta(seconds=timeout_s)
        self.store = open_store(host, timeout)
        self.last = {bucket[-1].name: bucket for bucket in buckets(self.slots)}  # by the tensor that fills them

    def description(self) -> dict:
        return super().description() | {"host": self.host, "port": self.store.port}

    def join(self) -> None:
        self.broadcast = Broadcast(self.transport, self.store, 0, 1 + self.num_receivers, self.timeout_s)

    def _begin(self, version: int) -> None:
        self.bucket: dict[str, torch.Tensor] = {}
        self.broadcast(torch.tensor([version], device=self.broadcast.device))

    def _put(self, version: int, index: int, tensor: torch.Tensor) -> None:
        self.bucket[self.slots[index].name] = tensor
        slots = self.last.get(self.slots[index].name)
        if slots is None:
            return
        data = torch.empty(_size(slots), dtype=torch.uint8, device=self.broadcast.device)
        for slot in slots:
            view(data, slot, self.dtype, slots[0].offset).copy_(self.bucket.pop(slot.name))
        self.broadcast(data)

    def _end(self, version: int) -> None:
        pass


class BroadcastReceiver(Receiver):
    """Takes part in the sender's broadcasts."""

    def __init__(self, description: dict, engine: str, index: int, device: torch.device) -> None:
        super().__init__(description, engine, index, device)
        timeout = timedelta(seconds=self.timeout_s)
        store = dist.TCPStore(description["host"], description["port"], is_master=False, timeout=timeout)
        world_size = 1 + description["num_receivers"]
        self.broadcast = Broadcast(description["transport"], store, 1 + index, world_size, self.timeout_s)

    def _take(self, version: int) -> Iterator[tuple[Slot, torch.Tensor]]:
        coming = int(self.broadcast(torch.zeros(1, dtype=torch.int64, device=self.broadcast.device)))
        if coming != version:
            raise PushError(f"{self.engine}: version {coming} came in a push of version {version}")
        for slots in buckets(self.slots):
            # Fresh memory each time: a backend may keep a bucket's tensors until a later one completes their layer.
            data = self.broadcast(torch.empty(_size(slots), dtype=torch.uint8, device=self.broadcast.device))
            for slot in slots:
                yield slot, view(data, slot, self.dtype, slots[0].offset)


def _size(slots: list[Slot]) -> int:
    return slots[-1].offset + slots[-1].num_bytes - slots[0].offset


def make_sender(
    transport: str, host: str, parameters: list[tuple[str, torch.Tensor]], dtype: str, num_receivers: int, timeout_s: float
) -> Sender:
    """The trainer's end of `transport`: shared_memory, gloo or nccl."""
    if transport == "shared_memory":
        return SharedMemorySender(parameters, dtype, num_receivers, timeout_s)
    return BroadcastSender(transport, host, parameters, dtype, num_receivers, timeout_s)


def make_receiver(description: dict, engine: str, index: int, device: torch.device) -> Receiver:
    """The engine's end of the sender's transport."""
    cls = SharedMemoryReceiver if description["transport"] == "shared_memory" else BroadcastReceiver
    return cls(description, engine, index, device)
