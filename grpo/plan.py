"""What a run will use, worked out before anything starts: device, processes, memory, steps, staleness.

The checks that need the machine are here; those of the configuration alone are in grpo/config.py and
grpo/config_sections.py.
"""

from dataclasses import dataclass

import psutil
import torch
from transformers import PreTrainedConfig

from grpo import builtin
from grpo.config import RunConfig
from grpo.config_sections import RayConfig
from grpo.devices import engine_device, num_cores
from grpo.errors import ConfigError, times
from grpo.memory import (
    check_memory,
    check_shared_gpus,
    count_parameters,
    gpu_phases_of,
    phases_of,
    role_bytes,
    states_bytes,
)
from grpo.models import read_config
from grpo.nodes import Node, cluster_nodes, find_address, join_cluster
from grpo.placement import num_threads, place_roles
from grpo.shared_prompts import check_attends_to_all
from grpo.sources import BUILTIN, LARGE, stated_parameters
from grpo.throughput import forecast, shape_of


@dataclass(frozen=True)
class Plan:
    """The answer; `device` is what every actor runs on."""

    device: str
    nodes: list[Node]  # this machine, or the cluster's, the driver's first
    places: dict[str, list[int]]  # the node of each process, by role
    gpus_per_process: float  # below 1 where several share one
    threads: dict[str, int]  # a process of each role
    transport: str  # of weight pushes
    parameters: int
    trained: int  # of them, or the adapters' with LoRA
    in_four_bits: int  # of them, of the policy
    # Estimates a role: weights, optimiser and key-value cache; activations come on top. On GPUs of what is there, where
    # vLLM's engines have their share instead.
    memory_bytes: dict[str, int]
    phases: dict[str, dict[str, int]]  # the same while the run samples and while it trains, where those are not one
    states_bytes: int  # of driver and replay buffer: the hidden states that divergence=ot compares with, at full length

    @property
    def roles(self) -> dict[str, int]:
        """Processes a role."""
        return {role: len(its) for role, its in self.places.items()}

    @property
    def nodes_of(self) -> dict[str, list[Node]]:
        """The node of each process, by role."""
        return {role: [self.nodes[i] for i in its] for role, its in self.places.items()}

    @property
    def total_memory_bytes(self) -> int:
        return max(self._bytes(memory) for memory in self.phases.values()) + self.states_bytes

    def _bytes(self, memory: dict[str, int]) -> int:
        return sum(memory[role] * count for role, count in self.roles.items())

    def describe(self, config: RunConfig) -> str:
        """What dry_run=true prints."""
        gib, budget = 2**30, config.train.max_tokens_per_micro_batch
        total, whose = f"about {self.total_memory_bytes / gib:.2f} GiB for", "of them"
        if self.device == "cuda":
            total, whose = "of GPUs, for", "of the CPU's memory"
        lines = [
            f"device            {self.device}" + f", {self.gpus_per_process:.2g} GPU a process" * (self.device == "cuda"),
            *(
                f"process           {count} x {role}, {self._held(role, config)} and {self.threads[role]} threads each"
                for role, count in self.roles.items()
            ),
            *self._nodes(config.ray),
            f"memory            {total} {self.parameters / 1e6:.1f} million parameters, activations not counted",
            *self._in_turns(config),
            *([f"anchor states     about {self.states_bytes / gib:.2f} GiB {whose}"] if self.states_bytes else []),
            f"trained           {self._trained(config)}",
            f"reference         {self._reference(config)}",
            f"weight pushes     {self.transport}, probed every {config.train.probe_frequency}"
            if config.train.probe_frequency
            else f"weight pushes     {self.transport}, never probed",
            f"collections       {config.num_collections} of {config.train.dialog_turns_per_batch} responses "
            f"({config.train.dialog_turns_per_batch // config.env.repeats} prompts x {config.env.repeats})",
            f"optimiser steps   {config.num_steps} of {config.train.optim_batch_size} responses in "
            f"{config.train.gradient_accumulation_steps} micro-batches a rank"
            + f", or more of at most {budget} tokens"
            * (budget is not None),
            f"samples           {self._samples(config)}",
            f"staleness         at most {config.staleness_bound} policy versions",
            f"time              {self._time(config)}",
        ]
        return "\n".join(lines)

    def _nodes(self, config: RayConfig) -> list[str]:
        return [] if config.address is None else describe_nodes(self.nodes, self.places)

    def _has_share(self, role: str, config: RunConfig) -> bool:
        """Whether it takes inference_model.gpu_memory_utilization of its GPU, whatever the model."""
        return role == "inference" and self.device == "cuda" and config.inference_model.backend == "vllm"

    def _held(self, role: str, config: RunConfig) -> str:
        if self._has_share(role, config):
            gpus = config.inference_model.tensor_parallel_size
            of = "its GPU" if gpus == 1 else f"each of its {gpus} GPUs"
            return f"{config.inference_model.gpu_memory_utilization:g} of {of}"
        return f"about {self.memory_bytes[role] / 2**30:.2f} GiB"

    def _in_turns(self, config: RunConfig) -> list[str]:
        needed = []
        for phase, memory in self.phases.items():
            beside = " beside the engine" if memory["inference"] and self._has_share("inference", config) else ""
            counted = memory | {"inference": 0} if beside else memory
            needed.append(f"{self._bytes(counted) / 2**30:.2f} GiB{beside} {phase}")
        return [f"in turns          {', '.join(needed)}"] if len(needed) > 1 else []

    def _samples(self, config: RunConfig) -> str:
        total = config.train.total_dialog_turns
        if config.train.replay == "uniform":
            return f"{total} responses, drawn at random from the last {config.buffered_groups * config.env.repeats}"
        return f"{total} responses, each trained on {times(config.train.epochs)}"

    def _trained(self, config: RunConfig) -> str:
        what = "LoRA adapters" if config.train_model.lora.enabled else "all"
        passes = {"none": "float32", "bf16": "bfloat16", "fp16": "float16"}[config.train.mixed_precision]
        base = f", on a base with {self.in_four_bits / 1e6:.3g} million in 4 bits" * (self.in_four_bits > 0)
        return f"{what}: {self.trained / 1e6:.3g} million parameters in float32, passes in {passes}" + base

    def _reference(self, config: RunConfig) -> str:
        if not config.uses_reference:
            return "none"
        return "in processes of its own" if config.num_references else "the trainer without its adapters"

    def _time(self, config: RunConfig) -> str:
        adapters = self.trained if config.train_model.lora.enabled else 0
        shape = shape_of(find_architecture(config.model.name, self.device), self.parameters, adapters)
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        return forecast(config, shape, self.device, gpu)


def describe_nodes(nodes: list[Node], places: dict[str, list[int]]) -> list[str]:
    """A line a node of the cluster: what runs there."""
    lines = []
    for i, node in enumerate(nodes):
        there = [f"{its.count(i)} x {role}" for role, its in places.items() if i in its]
        lines.append(f"node              {node.name}: {', '.join(there) or 'nothing'}")
    return lines


def find_nodes(config: RayConfig) -> list[Node]:
    """This machine; or the nodes of the cluster at ray.address, which this process joins, its own first."""
    address = find_address(config)
    if address is None:
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return [Node("this machine", num_cores(), gpus, psutil.virtual_memory().available)]
    join_cluster(address)
    return cluster_nodes()


def choose_transport(config: RunConfig, places: dict[str, list[int]], sharing: int) -> str:
    """Of weight pushes; ConfigError for one that cannot work."""
    transport, one_host = config.train.weight_transport, set(places["inference"]) == {places["trainer"][0]}
    if transport == "auto":
        if sharing == 1 and config.inference_model.backend == "vllm":
            return "nccl"
        return "shared_memory" if one_host else "gloo"
    if transport == "nccl" and sharing != 1:
        raise ConfigError("train.weight_transport (nccl) needs a GPU of its own for each process: use shared_memory")
    if transport == "shared_memory" and not one_host:
        raise ConfigError(
            "train.weight_transport (shared_memory) needs every engine on the first training rank's node: use gloo"
        )
    return transport


def check_positions(config: RunConfig, model: PreTrainedConfig) -> int:
    """The longest prompt and response in tokens; raises ConfigError where the model has fewer positions."""
    length = config.env.max_prompt_length + config.inference_model.max_tokens
    positions = getattr(model, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ConfigError(
            f"env.max_prompt_length ({config.env.max_prompt_length}) + inference_model.max_tokens "
            f"({config.inference_model.max_tokens}) must be at most the model's {positions} positions"
        )
    return length


def find_architecture(name: str, device: str) -> PreTrainedConfig:
    """The transformers configuration of `model.name`; ConfigError where there is none, or it is too large for a CPU."""
    stated = stated_parameters(name)
    if device == "cpu" and stated >= LARGE:
        raise ConfigError(
            f"model.name ({name}) has about {stated / 1e9:g} billion parameters and wants a GPU, and this machine has "
            "none: python grpo_sync.py --config-name grpo_arithmetic runs here"
        )
    if name == BUILTIN:
        return builtin.make_config(builtin.Recipe(), builtin.make_tokenizer())
    return read_config(name)


def check_colocate(config: RunConfig, device: str) -> None:
    """Raise ConfigError where the run's processes cannot have one device in turns."""
    inference = config.inference_model
    if device == "cpu" and inference.backend == "vllm":
        raise ConfigError("colocate (true) needs inference_model.backend=transformers on a CPU: vLLM sleeps on GPUs only")
    if device == "cuda" and (config.train_model.num_devices > 1 or inference.tensor_parallel_size > 1):
        raise ConfigError(
            "colocate (true) keeps a run on one GPU, which training ranks, or an engine's parts, cannot share: it needs "
            "train_model.num_devices=1 and inference_model.tensor_parallel_size=1"
        )


def check_heads(config: RunConfig, model: PreTrainedConfig) -> None:
    """Raise ConfigError where an engine cannot give each of its GPUs the same number of the model's heads."""
    size = config.inference_model.tensor_parallel_size
    for key in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(model, key, size)
        if heads % size:
            raise ConfigError(f"inference_model.tensor_parallel_size ({size}) must divide the model's {key} ({heads})")


def processes_per_gpu(config: RunConfig, nodes: list[Node], roles: dict[str, int], sizes: dict[str, int]) -> int:
    """On the fullest GPU; ConfigError where processes that need one of their own would have to share it."""
    gpus = sum(node.gpus for node in nodes)
    processes = sum(count * sizes[role] for role, count in roles.items())
    sharing = -(-processes // (1 if config.colocate else gpus))
    where = "this machine" if config.ray.address is None else "the cluster"
    if sharing > 1 and roles["trainer"] > 1:
        raise ConfigError(
            f"train_model.num_devices ({roles['trainer']}) needs a GPU for each of the run's {processes} processes, since "
            f"training ranks cannot share one, and {where} has {gpus}: lower it, or the other num_devices"
        )
    if sharing > 1 and sizes["inference"] > 1:
        raise ConfigError(
            f"inference_model.tensor_parallel_size ({sizes['inference']}) needs a GPU for each of the run's {processes} "
            f"processes, and {where} has {gpus}: lower it, or the num_devices"
        )
    return sharing


def make_plan(config: RunConfig) -> Plan:
    """Check the configuration against this machine, or the cluster; raises ConfigError in one line."""
    nodes = find_nodes(config.ray)
    device = engine_device(config, nodes)
    model = find_architecture(config.model.name, device)
    length = check_positions(config, model)
    check_heads(config, model)
    if config.train.share_prompts:
        check_attends_to_all(model)
    if config.colocate:
        check_colocate(config, device)
    roles = {
        "trainer": config.train_model.num_devices,
        "inference": config.inference_model.num_devices,
        "reference": config.num_references,
    }
    roles = {role: number for role, number in roles.items() if number}
    sizes = {role: config.inference_model.tensor_parallel_size if role == "inference" else 1 for role in roles}
    count = count_parameters(config, model)
    memory = role_bytes(config, model, count, length)
    memory = {role: memory[role] for role in roles}
    phases = (gpu_phases_of if device == "cuda" else phases_of)(config, memory, count)
    states = states_bytes(config, model, length)
    sharing = processes_per_gpu(config, nodes, roles, sizes) if device == "cuda" else 0
    places = place_roles(config.ray, nodes, roles, sizes, device, sharing)
    if sharing > 1 and config.ray.address is None and config.inference_model.backend == "vllm":
        check_shared_gpus(config, roles, phases, sharing)
    if device == "cpu":
        held = ", or train.dialog_turns_per_batch" if config.mode == "sync" else ", or train.buffer_size"
        remedy = "lower env.num_envs or inference_model.max_tokens" + held * (states > 0)
        for needed in phases.values():
            check_memory(config.model.name, nodes, places, needed, states, remedy)
    return Plan(
        device=device,
        nodes=nodes,
        places=places,
        gpus_per_process=1 / sharing if sharing else 0.0,
        # In turns each role has the cores for itself; otherwise engines sample while trainers optimise.
        threads=num_threads(nodes, places, sizes, in_turns=config.staleness_bound == 0),
        transport=choose_transport(config, places, sharing),
        parameters=count.all,
        trained=count.trained,
        in_four_bits=count.in_four_bits,
        memory_bytes={role: max(its[role] for its in phases.values()) for role in roles},
        phases=phases,
        states_bytes=states,
    )
