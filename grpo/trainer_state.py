"""The tensors of a training rank in a checkpoint: what it trains, the optimiser's state, the generators' states.

torch.distributed.checkpoint writes and reads them, in safetensors, so that another number of ranks can read them too.
"""

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import zeros as sharded_zeros

from grpo.models import reshard


def save(model: torch.nn.Module, optimizer: torch.optim.Optimizer, path: Path, group: dist.ProcessGroup) -> Future:
    """Copy the state and write it to the directory `path` in the background. A collective; `group` must be of gloo."""
    reshard(model)
    state = {}
    for name, parameter in _trained(model):
        state[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"optimizer.{name}.{key}"] = value
    state |= {_generator(device): value for device, value in _generators(model).items()}
    writer = HuggingFaceStorageWriter(str(path), save_distributed=True)
    return dcp.async_save(state, storage_writer=writer, process_group=group)


def load(model: torch.nn.Module, optimizer: torch.optim.Optimizer, path: Path, group: dist.ProcessGroup) -> None:
    """Restore in place what `save` wrote, on any number of ranks. A collective.

    A rank that the writing run did not have keeps its generators as they are.
    """
    reshard(model)
    reader = HuggingFaceStorageReader(str(path))
    there = reader.read_metadata().state_dict_metadata
    state, of_optimizer = {}, {}
    for name, parameter in _trained(model):
        state[f"model.{name}"] = parameter.detach()
        prefix = f"optimizer.{name}."
        keys = [key for key in there if key.startswith(prefix) and "." not in key.removeprefix(prefix)]
        of_optimizer[parameter] = {
            key.removeprefix(prefix): _room(parameter.detach(), there[key].size, there[key].properties.dtype) for key in keys
        }
        state |= {prefix + key: value for key, value in of_optimizer[parameter].items()}
    generators = {
        device: torch.empty_like(value) for device, value in _generators(model).items() if _generator(device) in there
    }
    state |= {_generator(device): value for device, value in generators.items()}
    dcp.load(state, storage_reader=reader, process_group=group)
    for parameter, values in of_optimizer.items():
        if values:
            optimizer.state[parameter] = values
    if "cpu" in generators:
        torch.set_rng_state(generators["cpu"])
    if "cuda" in generators:
        torch.cuda.set_rng_state(generators["cuda"])


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Restore in place the trained parameters that `save` wrote, of a model that is not sharded. A collective."""
    state = {f"model.{name}": parameter.detach() for name, parameter in _trained(model)}
    dcp.load(state, storage_reader=HuggingFaceStorageReader(str(path)))


@contextmanager
def one_process() -> Iterator[None]:
    """Have collectives run within this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _trained(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _room(parameter: DTensor, size: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Room for a part of the optimiser's state: what has a row for each of the parameter's is sharded like it."""
    if size == parameter.shape and size:
        return torch.zeros_like(parameter, dtype=dtype)
    if size[:1] == parameter.shape[:1]:
        return sharded_zeros(size, dtype=dtype, device_mesh=parameter.device_mesh, placements=parameter.placements)
    return torch.zeros(size, dtype=dtype)


def _generators(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if next(model.parameters()).device_mesh.device_type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _generator(device: str) -> str:
    return f"generator.{device}.{dist.get_rank()}"
