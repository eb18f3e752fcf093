"""How much memory each process of a run needs, estimated from shapes alone, and whether there is that much.

Weights, gradients, optimiser states, key-value caches and anchor states are counted; activations come on top.
"""

import math
from collections import Counter
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from grpo.config import RunConfig
from grpo.errors import ConfigError
from grpo.four_bit import BYTES as FOUR_BITS
from grpo.four_bit import check_four_bit
from grpo.models import DTYPES, kv_cache_bytes, num_adapter_parameters, num_parameters
from grpo.nodes import Node

FLOAT32, FLOAT16 = 4, 2  # bytes
CUDA_BYTES = 512 << 20  # of CUDA's own that every process has on a GPU


@dataclass(frozen=True)
class Parameters:
    """How many a run's model has."""

    all: int
    trained: int  # of them, or the adapters' with LoRA
    in_four_bits: int  # of the policy's
    reference_in_four_bits: int  # of the reference's


def count_parameters(config: RunConfig, model: PreTrainedConfig) -> Parameters:
    """Of the models that the run loads; ConfigError where `model` cannot be loaded in 4 bits, and is to be."""
    number, lora = num_parameters(model), config.train_model.lora
    return Parameters(
        all=number,
        trained=num_adapter_parameters(model, lora) if lora.enabled else number,
        in_four_bits=check_four_bit(model, "train_model.quantization.enabled")
        if config.train_model.quantization.enabled
        else 0,
        reference_in_four_bits=check_four_bit(model, "ref_model.quantization.enabled")
        if config.reference_in_four_bits
        else 0,
    )


def role_bytes(config: RunConfig, model: PreTrainedConfig, count: Parameters, length: int) -> dict[str, int]:
    """What a process of each role holds; prompt and response are at most `length` tokens."""
    train, in_flight = config.train_model, config.env.num_envs * config.env.repeats
    optimizer, ranks = config.optimizer.name, train.num_devices
    reference, passes = count.reference_in_four_bits, DTYPES[config.train.mixed_precision]
    return {
        "trainer": trainer_bytes(count.all, count.in_four_bits, count.trained, train.lora.enabled, optimizer, ranks),
        "inference": count.all * FLOAT32 + kv_cache_bytes(model, in_flight * length, FLOAT32),
        "reference": int((count.all - reference) * passes.itemsize + reference * FOUR_BITS),
    }


def trainer_bytes(parameters: int, in_four_bits: int, trained: int, has_adapters: bool, optimizer: str, ranks: int) -> int:
    """What a training rank holds: weights, gradients and optimiser states in shards, and a full copy of the weights.

    The copy is loaded, pushed or gathered. Weights in 4 bits are whole on every rank.
    """
    sharded, updated = (parameters - in_four_bits) * FLOAT32, trained * FLOAT32
    states = {"adamw": 2, "adamw_offload": 2, "adamw_8bit": 0.5, "adam": 2, "sgd": 0}[optimizer]
    own = (sharded + updated * (has_adapters + 1 + states)) // ranks
    return int(own + in_four_bits * FOUR_BITS + parameters * FLOAT32)


def phases_of(config: RunConfig, memory: dict[str, int], count: Parameters) -> dict[str, dict[str, int]]:
    """Bytes a process of each role, by what the run does meanwhile.

    With colocate=true a trainer at rest has neither gradients nor the whole copy of the weights, and an engine asleep has
    nothing.
    """
    passing = count.trained * FLOAT32 // config.train_model.num_devices + count.all * FLOAT32
    return _in_turns(memory, passing) if config.colocate else {"at all times": memory}


def gpu_trainer_bytes(trainer: int, parameters: int, in_four_bits: int, optimizer: str) -> int:
    """Those of `trainer_bytes` that are on a GPU: the whole copy of the weights is the CPU's, and what is offloaded too."""
    return int(in_four_bits * FOUR_BITS) if optimizer == "adamw_offload" else trainer - parameters * FLOAT32


def gpu_phases_of(config: RunConfig, memory: dict[str, int], count: Parameters) -> dict[str, dict[str, int]]:
    """`phases_of` what is on a GPU. An engine of vLLM takes its share of the GPU there instead of what it has here."""
    optimizer = config.optimizer.name
    offloads = optimizer == "adamw_offload"
    gradients = 0 if offloads else count.trained * FLOAT32 // config.train_model.num_devices
    held = memory | {"trainer": gpu_trainer_bytes(memory["trainer"], count.all, count.in_four_bits, optimizer)}
    return _in_turns(held, gradients) if config.colocate else {"at all times": held}


def _in_turns(memory: dict[str, int], passing: int) -> dict[str, dict[str, int]]:
    return {"sampling": memory | {"trainer": memory["trainer"] - passing}, "training": memory | {"inference": 0}}


def states_bytes(config: RunConfig, model: PreTrainedConfig, length: int) -> int:
    """Of driver and replay buffer: the hidden states that divergence=ot compares with, of `length` tokens each."""
    return held_responses(config) * length * model.hidden_size * FLOAT16 if config.anchor else 0


def held_responses(config: RunConfig) -> int:
    """Responses that driver and replay buffer hold at one time, each copy counted."""
    if config.mode == "sync":
        # As they are scored, in the collection, and in the batch; with train.sync_iter=false there are two collections.
        return (3 if config.train.sync_iter else 5) * config.train.dialog_turns_per_batch
    groups = config.buffered_groups + (config.running_groups if config.train.replay == "uniform" else 0)
    # In the buffer or on the way to it; and a batch, as it is put together and as the driver has it.
    return groups * config.env.repeats + 2 * config.train.optim_batch_size


def check_memory(
    name: str, nodes: list[Node], places: dict[str, list[int]], memory: dict[str, int], extra: int, remedy: str
) -> None:
    """Raise ConfigError where a node has less memory than its processes of model `name` need; the first has `extra` too."""
    for i, node in enumerate(nodes):
        needed = sum(memory[role] * its.count(i) for role, its in places.items()) + extra * (i == 0)
        if needed > node.memory_bytes:
            where = "are free" if len(nodes) == 1 else f"are free on node {node.name}"
            raise ConfigError(
                f"model.name ({name}) needs about {needed / 2**30:.1f} GiB of memory and "
                f"{node.memory_bytes / 2**30:.1f} GiB {where}: use a smaller model, or {remedy}"
            )


def gpu_bytes(index: int) -> int:
    """The memory of a GPU of this machine."""
    return torch.cuda.get_device_properties(index).total_memory


def check_shared_gpus(config: RunConfig, roles: dict[str, int], phases: dict[str, dict[str, int]], sharing: int) -> None:
    """Raise ConfigError where the share of a GPU that vLLM is to take is not left by the processes beside it.

    `phases` are the bytes that a process of each role holds on its GPU at least; activations come on top. Ray fills one GPU
    with `sharing` processes before it takes the next, in the order in which the actors are started.
    """
    share, gib = config.inference_model.gpu_memory_utilization, 2**30
    started = [role for role in ("inference", "reference", "trainer") for _ in range(roles.get(role, 0))]
    for index in range(-(-len(started) // sharing)):
        here, total = Counter(started[index * sharing : (index + 1) * sharing]), gpu_bytes(index)
        for memory in phases.values():
            held = here.total() * CUDA_BYTES + sum(memory[role] * here[role] for role in here if role != "inference")
            engines = here["inference"] if memory["inference"] else 0  # one that sleeps takes nothing
            if held + engines * share * total <= total:
                continue
            beside = " and ".join(f"{here[role]} x {role}" for role in ("trainer", "reference") if here[role])
            others = f"{beside} beside it take" if beside else "CUDA takes"
            most = math.floor(100 * (total - held) / total / max(1, engines)) / 100
            if engines == 0 or most <= 0:
                raise ConfigError(
                    f"model.name ({config.model.name}): {beside} take at least {held / gib:.1f} GiB of a GPU that has "
                    f"{total / gib:.1f}: use more GPUs, a smaller model, or what docs/memory.md has"
                )
            turns = " or set colocate=true," if beside and config.mode == "sync" and not config.colocate else ""
            raise ConfigError(
                f"inference_model.gpu_memory_utilization ({share:g}) must be at most {most:g}, less what activations take: "
                f"{engines} x inference on a GPU of {total / gib:.1f} GiB, of which {others} at least {held / gib:.1f}: "
                f"lower it,{turns} see docs/memory.md"
            )
