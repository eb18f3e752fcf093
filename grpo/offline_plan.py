"""What an offline run will use, worked out before anything starts: its data, device, processes, memory and steps."""

from dataclasses import dataclass

from grpo.adapters import check_adapter
from grpo.devices import resolve_device
from grpo.errors import ConfigError
from grpo.four_bit import check_four_bit
from grpo.memory import check_memory, gpu_trainer_bytes, trainer_bytes
from grpo.models import num_adapter_parameters, num_parameters
from grpo.nodes import Node
from grpo.offline_config import OfflineConfig
from grpo.placement import num_threads, place_roles
from grpo.plan import describe_nodes, find_architecture, find_nodes
from grpo.scored import hold_out, read_groups


@dataclass(frozen=True)
class OfflinePlan:
    """The answer; completions that are too long are known only once there is a tokenizer."""

    device: str
    nodes: list[Node]  # this machine, or the cluster's, the driver's first
    places: dict[str, list[int]]  # the node of each rank, under "trainer"
    gpus_per_process: float
    threads: int  # a rank
    parameters: int
    trained: int  # of them, or the adapters'
    in_four_bits: int  # of them
    memory_bytes: (
        int  # estimate a rank (its GPU's, where it has one): weights, gradients, optimiser; activations come on top
    )
    num_groups: int  # to train on
    num_held_out: int
    num_completions: int  # of the largest group

    def describe(self, config: OfflineConfig) -> str:
        """What dry_run=true prints."""
        gib, what = 2**30, "LoRA adapters" if config.has_adapters else "all"
        passes = {"none": "float32", "bf16": "bfloat16", "fp16": "float16"}[config.train.mixed_precision]
        steps = config.num_epochs * -(-self.num_groups // config.batch_size)
        lines = [
            f"device            {self.device}" + f", {self.gpus_per_process:.2g} GPU a process" * (self.device == "cuda"),
            f"process           {config.train_model.num_devices} x trainer, about {self.memory_bytes / gib:.2f} GiB and "
            f"{self.threads} threads each",
            *([] if config.ray.address is None else describe_nodes(self.nodes, self.places)),
            f"memory            for {self.parameters / 1e6:.1f} million parameters, activations not counted",
            f"trained           {what}: {self.trained / 1e6:.3g} million parameters in float32, passes in {passes}"
            + f", on a base with {self.in_four_bits / 1e6:.3g} million in 4 bits" * (self.in_four_bits > 0),
            f"data              {self.num_groups} groups to train on and {self.num_held_out} held out, of at most "
            f"{self.num_completions} completions; those longer than {config.max_seq_length} tokens will be left out",
            f"optimiser steps   {steps} of {config.batch_size} groups in {config.train.gradient_accumulation_steps} "
            f"micro-batches a rank, {config.num_epochs} epochs",
        ]
        return "\n".join(lines)


def make_plan(config: OfflineConfig) -> OfflinePlan:
    """Check data, configuration and this machine, or the cluster, together; ConfigError or DataError in one line."""
    train, held_out = hold_out(read_groups(config.data), config.eval_share, config.seed)
    nodes = find_nodes(config.ray)
    device = resolve_device(config.device, nodes)
    model, name = find_architecture(config.model.name, device), config.model.name
    positions = getattr(model, "max_position_embeddings", None)
    if positions is not None and config.max_seq_length > positions:
        raise ConfigError(f"max_seq_length ({config.max_seq_length}) must be at most the model's {positions} positions")
    parameters, lora, ranks = num_parameters(model), config.train_model.lora, config.train_model.num_devices
    in_four_bits = (
        check_four_bit(model, "train_model.quantization.enabled") if config.train_model.quantization.enabled else 0
    )
    trained = parameters
    if config.lora_path is not None:
        trained = check_adapter(model, config.lora_path)
    elif lora.enabled:
        trained = num_adapter_parameters(model, lora)
    memory = trainer_bytes(parameters, in_four_bits, trained, config.has_adapters, config.optimizer.name, ranks)
    gpus = sum(node.gpus for node in nodes) if device == "cuda" else 0
    if device == "cuda" and ranks > gpus:
        where = "this machine" if config.ray.address is None else "the cluster"
        raise ConfigError(f"train_model.num_devices ({ranks}) must be at most {where}'s {gpus} GPUs")
    roles, sizes = {"trainer": ranks}, {"trainer": 1}
    places = place_roles(config.ray, nodes, roles, sizes, device, sharing=1)
    if device == "cuda":
        memory = gpu_trainer_bytes(memory, parameters, in_four_bits, config.optimizer.name)
    if device == "cpu":
        check_memory(name, nodes, places, {"trainer": memory}, 0, "train_model.lora.enabled=true")
    return OfflinePlan(
        device=device,
        nodes=nodes,
        places=places,
        gpus_per_process=1.0 if gpus else 0.0,
        threads=num_threads(nodes, places, sizes, in_turns=True)["trainer"],
        parameters=parameters,
        trained=trained,
        in_four_bits=in_four_bits,
        memory_bytes=memory,
        num_groups=len(train),
        num_held_out=len(held_out),
        num_completions=max(len(group.texts) for group in train + held_out),
    )
