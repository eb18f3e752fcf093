"""What runs inside vLLM's workers: receiving a push, applying it, and telling what the worker then computes with.

`Transfer` is registered with vLLM's weight-transfer interface as `grpo` when vLLM imports this module for `WorkerExtension`.
With tensor parallelism every worker receives whole tensors and keeps its shard; `combine` puts the workers' tellings
together.
"""

import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.linear import LinearBase, RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import materialize_layer, restore_layer_on_meta
from vllm.utils.torch_utils import set_random_seed

from grpo.errors import PushError
from grpo.transports import make_receiver
from grpo.weight_sync import Slot, checksum, one_thread, probe_vector

TRANSFER = "grpo"


@dataclass
class InitInfo(WeightTransferInitInfo):
    description: dict
    engine: str
    first_index: int  # of the engine's workers among the receivers


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    version: int


def packed_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """On a CPU, the layers that compute with a packed copy of their weight; linear layers keep nothing else.

    A tied output layer is one of them: it shares its weight with the embedding, but its packed copy is its own, and stays
    what it was until it is made again.
    """
    return [m for m in model.modules() if isinstance(m, LinearBase | ParallelLMHead) and hasattr(m, "cpu_linear")]


def is_loaded(layer: torch.nn.Module) -> bool:
    """Whether a restored weight has been written over: some models' `load_weights` collects tensors first."""
    weight = layer.weight.data
    return not (math.isnan(weight[0, 0]) or math.isnan(weight[-1, -1]))


class Transfer(WeightTransferEngine[InitInfo, UpdateInfo]):
    """vLLM's side of a push."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        index = init_info.first_index + get_tensor_model_parallel_rank()
        self.receiver = make_receiver(init_info.description, init_info.engine, index, self.device)

    def start_weight_update(self) -> None:
        if self.device.type != "cpu":
            initialize_layerwise_reload(self.model)
            return
        # Plain tensors to load into, as at the start: several times as fast as layerwise reloading, which on top never
        # visits a tied output layer.
        self.unpacked = packed_layers(self.model)
        restored = [layer for layer in self.unpacked if layer.weight.numel() == 0]
        for layer in restored:
            info = get_layerwise_info(layer)
            restore_layer_on_meta(layer, info)
            materialize_layer(layer, info)
            layer.weight[[0, -1], [0, -1]] = torch.nan  # until it is loaded
        holdings, last = Holdings(self.model, self.receiver.slots), {}
        for slot in self.receiver.slots:
            layer = holdings.modules.get(holdings.place(slot.name)[0])
            if layer in restored:
                last[layer] = slot.name
        self.complete = {name: layer for layer, name in last.items()}  # layers, by the tensor that completes them

    @one_thread()
    @torch.no_grad()
    def receive_weights(self, update_info: UpdateInfo) -> None:
        arriving = self.receiver.receive(update_info.version)
        if self.device.type != "cpu":
            self.model.load_weights(arriving)
            return
        packed: list[Future] = []
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as packer:
            self.model.load_weights(self._packing(arriving, packer, packed))
        for layer in packed:
            layer.result()

    def _packing(
        self, arriving: Iterator[tuple[str, torch.Tensor]], packer: ThreadPoolExecutor, packed: list[Future]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """What arrives; each layer is packed once its last tensor is loaded, while the next ones are received."""
        for name, tensor in arriving:
            yield name, tensor
            layer = self.complete.get(name)
            if layer is not None and is_loaded(layer):
                self.unpacked.remove(layer)
                packed.append(packer.submit(self._pack, layer))

    @torch.no_grad()  # which holds in the thread that said it alone
    def _pack(self, layer: torch.nn.Module) -> None:
        layer.quant_method.process_weights_after_loading(layer)

    def finish_weight_update(self) -> None:
        if self.device.type != "cpu":
            finalize_layerwise_reload(self.model, self.model_config)
            return
        for layer in self.unpacked:  # the output layer, and what this model does not load as it arrives
            self._pack(layer)

    def shutdown(self) -> None:
        pass


if TRANSFER not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(TRANSFER, Transfer)


class WorkerExtension:
    """Mixed into every vLLM worker; naming it makes vLLM import this module there."""

    def reseed(self, seed: int) -> None:
        set_random_seed(seed)  # vLLM's runners draw from torch's generator or from numpy's

    def held(self, aliases: list[str]) -> tuple[dict[str, int], list[tuple[str, str, int | np.ndarray]]]:
        """What came in with the last push, and what this worker now computes with.

        The second are (name, how, value), for the trainer's names and their `aliases`: a checksum of a `whole` tensor or
        of a `part`, or a projection of all or some output `rows`, or the worker's `share` of every row.
        """
        receiver = self.weight_transfer_engine.receiver
        holdings = Holdings(self.get_model(), receiver.slots)
        shapes = {slot.name: slot.shape for slot in receiver.slots}
        names = [*shapes, *(alias for alias in aliases if alias not in shapes)]
        with torch.no_grad():
            return receiver.arrived, [holdings.tell(name, shapes.get(name)) for name in names]


class Holdings:
    """Finds the trainer's tensors in a vLLM model, which fuses some (q, k, v), packs some, and shards some."""

    def __init__(self, model: torch.nn.Module, slots: list[Slot]) -> None:
        self.model, self.packed = model, packed_layers(model)
        self.modules = dict(model.named_modules())
        self.rows = {slot.name: slot.shape[0] for slot in slots if slot.shape}
        fused = getattr(model, "packed_modules_mapping", {})
        self.fused = {part: (whole, parts) for whole, parts in fused.items() for part in parts}
        self.projections: dict[str, torch.Tensor] = {}

    def place(self, name: str) -> tuple[str, slice]:
        """The path of the module that holds tensor `name`, and its rows there."""
        path, kind = name.rsplit(".", 1)
        parent, _, leaf = path.rpartition(".")
        if leaf not in self.fused:
            return path, slice(None)
        whole, parts = self.fused[leaf]
        sizes = [self.rows[f"{parent}.{part}.{kind}"] // get_tensor_model_parallel_world_size() for part in parts]
        start = sum(sizes[: parts.index(leaf)])
        return f"{parent}.{whole}", slice(start, start + sizes[parts.index(leaf)])

    def tell(self, name: str, shape: tuple[int, ...] | None) -> tuple[str, str, int | np.ndarray]:
        """See `WorkerExtension.held`."""
        path, rows = self.place(name)
        module, kind = self.modules.get(path), name.rpartition(".")[2]
        if module is None:
            raise PushError(
                f"tensor {name} has no counterpart in vLLM's {type(self.model).__name__}, so pushes to it cannot be proven: "
                "use inference_model.backend=transformers"
            )
        if kind == "weight" and module in self.packed:
            how = "share" if isinstance(module, RowParallelLinear) else "rows"
            projection = self._project(path, module)[rows]
            self._check_rows(name, module, len(projection))
            return name, how, projection.numpy()
        tensor = getattr(module, kind)[rows] if rows != slice(None) else getattr(module, kind)
        if kind == "weight":
            self._check_rows(name, module, len(tensor))
        is_whole = shape is not None and tensor.numel() == int(np.prod(shape))
        return name, "whole" if is_whole else "part", checksum(tensor)

    def _check_rows(self, name: str, module: torch.nn.Module, held: int) -> None:
        """Some models' weights lie transposed in vLLM (GPT-2's); sums and products would then differ for no fault."""
        if not isinstance(module, LinearBase):
            return
        expected = self.rows[name]
        if not isinstance(module, RowParallelLinear):
            expected //= get_tensor_model_parallel_world_size()
        if held != expected:
            raise PushError(
                f"tensor {name} has {held} rows in vLLM and {expected} in the trainer, so pushes to it cannot be proven: "
                "use inference_model.backend=transformers"
            )

    def _project(self, path: str, module: torch.nn.Module) -> torch.Tensor:
        """What the layer computes for the probe vector, without its bias."""
        if path not in self.projections:
            if isinstance(module, RowParallelLinear):
                size, rank = module.input_size_per_partition, get_tensor_model_parallel_rank()
                x = probe_vector(module.input_size)[rank * size : (rank + 1) * size]
            else:
                x = probe_vector(module.embedding_dim if isinstance(module, ParallelLMHead) else module.input_size)
            self.projections[path] = module.quant_method.apply(module, x[None])[0].float()
        return self.projections[path]


def combine(tellings: list[list[tuple[str, str, int | np.ndarray]]]) -> tuple[dict[str, int | None], dict[str, np.ndarray]]:
    """Checksums and projections of whole tensors from what each worker told of its shard."""
    checksums: dict[str, int | None] = {}
    projections: dict[str, np.ndarray] = {}
    for shards in zip(*tellings, strict=True):
        name, how, first = shards[0]
        values = [value for _, _, value in shards]
        if how == "whole":
            checksums[name] = first if all(value == first for value in values) else None
        elif how == "part":
            checksums[name] = (sum(values) + 2**63) % 2**64 - 2**63
        else:
            projections[name] = np.concatenate(values) if how == "rows" else np.sum(values, axis=0)
    return checksums, projections
