"""Language models: find, load, adapt (LoRA), shard, export.

The trainer, the reference and the transformers engine load through here, so that all of them hold the same model.
"""

import string
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from grpo.config_sections import ALL_LINEAR, LoraConfig
from grpo.errors import ConfigError, one_line
from grpo.four_bit import four_bit_layers, is_codes, load_four_bit, outline, plain, values
from grpo.sources import check_model

DTYPES = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of train.mixed_precision
ADAPTER = ".lora_"  # in the names of the parameters that peft adds, and in no other


def read_config(name: str) -> PreTrainedConfig:
    """The transformers configuration of a local directory or hub name; ConfigError where there is none."""
    check_model(name)
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.name ({name}) is not a model that can be read: {one_line(error)[:200]}") from None


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a local directory or hub name; ConfigError where there is none that can be read."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.name ({path}) has no tokenizer that can be read: {one_line(error)[:200]}") from None
    # Where the file is missing, transformers makes one that knows special tokens alone.
    if set(tokenizer(string.printable)["input_ids"]) <= set(tokenizer.all_special_ids):
        raise ConfigError(f"model.name ({path}) has no tokenizer that can be read: it lacks tokenizer.json, its vocabulary")
    return tokenizer


def load_model(
    path: str,
    device: torch.device,
    attn_implementation: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    in_four_bits: bool = False,
) -> PreTrainedModel:
    """The model in `dtype` on `device`, in evaluation mode; or with its linear layers alone in `dtype`, `in_four_bits`.

    Evaluation mode turns dropout off: with dropout the ratio of a rollout to its own policy would not be 1.
    """
    if device.type == "cpu":
        torch.set_flush_denormal(True)  # subnormal gradients and optimiser states slow a CPU down many times
    if in_four_bits:
        model = load_four_bit(path, device, attn_implementation, dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attn_implementation).to(device)
    model.config.use_cache = False
    return model.eval()


def add_lora(model: PreTrainedModel, lora: LoraConfig, seed: int) -> PeftModel:
    """Wrap `model` with adapters in place: its own parameters freeze, those of the adapters train.

    They start at B = 0, which leaves the model's outputs as they are, and the same A for the same seed. Raises ConfigError
    for a target that is no linear layer of the model; the output layer cannot be one.
    """
    head = model.get_output_embeddings()
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D) and m is not head]
    for target in lora.target_modules if lora.target_modules != [ALL_LINEAR] else []:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            there = ", ".join(dict.fromkeys(name.split(".")[-1] for name in linear))
            raise ConfigError(
                f"train_model.lora.target_modules ({target}) is no linear layer of the model, which has {there}"
            )
    settings = PeftLoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=ALL_LINEAR if lora.target_modules == [ALL_LINEAR] else lora.target_modules,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, settings).eval()


def lora_layers(model: torch.nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def set_lora_dropout(model: torch.nn.Module, on: bool) -> None:
    """Turn the adapters' dropout on or off, and no other."""
    for _, layer in lora_layers(model):
        layer.lora_dropout.train(on)


@contextmanager
def adapters_off(model: torch.nn.Module) -> Iterator[None]:
    """Compute as the model that the adapters were added to.

    peft's own context turns off the adapters' requires_grad meanwhile. FSDP keeps what it was at the first pass, so that
    adapters that scored a reference before their first step would never train.
    """
    layers = [layer for _, layer in lora_layers(model)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def decoder_layers(model: PreTrainedModel | PeftModel) -> list[torch.nn.Module]:
    classes = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in classes]


def checkpoint_gradients(model: PreTrainedModel | PeftModel) -> None:
    """Have each decoder layer keep its input only, and compute the rest again in the backward pass.

    The layer's own forward is wrapped, because transformers' switch for it works in training mode alone, which would turn
    dropout on; and because FSDP's hooks then stay outside, so that nothing is gathered or cast twice.
    """
    layers = decoder_layers(model)
    if not layers:
        name = type(transformers_model(model)).__name__
        raise ConfigError(
            f"train_model.gradient_checkpointing (true): {name} does not say which its layers are; leave it false"
        )
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def shard(
    model: PreTrainedModel | PeftModel, mesh: DeviceMesh, dtype: torch.dtype = torch.float32, offload: bool = False
) -> PreTrainedModel | PeftModel:
    """Wrap `model` with FSDP2 in place, a shard group a decoder layer, which moves each to the mesh's device on its own.

    With `offload` the shards stay in the CPU's memory, and so what an optimiser keeps of them: a layer is on the device
    while it computes, its gradients go back.

    Passes are computed in `dtype`; parameters stay as they are and gradients are summed in float32. They are summed over
    ranks, not averaged: the loss is already divided by the count over all ranks. On gloo that needs forced sum reduction,
    on every module. Weights in 4 bits are not sharded: they stay whole on every rank.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    home = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
    codes = {layer.weight for _, layer in four_bit_layers(model)}
    for module in [*decoder_layers(model), model]:
        fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=home, ignored_params=codes)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model


def base_parameters(model: PreTrainedModel | PeftModel) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's own parameters under their transformers names, tied ones once, as this rank holds them; no adapters.

    Of one in 4 bits it is the outline.
    """
    for name, parameter in _own_parameters(model):
        yield name, outline(parameter) if is_codes(parameter) else parameter


def _own_parameters(model: PreTrainedModel | PeftModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for name, parameter in transformers_model(model).named_parameters():
        if ADAPTER not in name:
            yield name.replace(".base_layer.", "."), parameter


def transformers_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model without peft's wrapper; its layers keep their adapters."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@torch.no_grad()
def full_parameters(model: PreTrainedModel | PeftModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Each of `base_parameters` whole, with its adapter added: W + alpha / r * B A. The model itself is not changed.

    A collective: every rank iterates it alike.
    """
    reshard(model)
    adapted = {f"{name}.weight": layer for name, layer in lora_layers(transformers_model(model))}
    for name, parameter in _own_parameters(model):
        weight = values(parameter) if is_codes(parameter) else _whole(parameter)
        if name in adapted:
            layer = adapted[name]
            a, b = (_whole(part["default"].weight) for part in (layer.lora_A, layer.lora_B))
            change = b @ a  # [out, in]
            weight = weight + layer.scaling["default"] * (change.T if layer.fan_in_fan_out else change)
        yield name, weight


def reshard(model: torch.nn.Module) -> None:
    """After a pass without gradients FSDP leaves the root's parameters gathered, and rounded to the passes' dtype."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _whole(parameter: torch.nn.Parameter) -> torch.Tensor:
    tensor = parameter.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    tensor = tensor.to(tensor.device_mesh.device_type)  # where offloaded shards are not
    return tensor.full_tensor() if tensor.device_mesh.size() > 1 else tensor.to_local()  # which copies nothing


def tied_names(model: PreTrainedModel | PeftModel) -> dict[str, str]:
    """Further names of parameters that appear twice in the model, by the name that `full_parameters` has for them."""
    base = transformers_model(model)
    return dict(base.all_tied_weights_keys) if base.config.tie_word_embeddings else {}


def export(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Write the whole model, adapters merged, in transformers format from rank 0. A collective.

    Adapters are also written by themselves, in peft's format, to the directory `adapter` next to it.
    """
    first = dist.get_rank() == 0
    state = {}
    for name, tensor in full_parameters(model):
        if first:  # elsewhere a whole copy would be for nothing
            state[name] = tensor.cpu()
    if first:
        base = transformers_model(model)
        shell = plain(base) if any(four_bit_layers(base)) else base
        shell.save_pretrained(path, state_dict=state | _persistent_buffers(model))
        tokenizer.save_pretrained(path)
    if isinstance(model, PeftModel):
        adapter = {name: _whole(p).cpu() for name, p in model.named_parameters() if ADAPTER in name}
        if first:
            model.save_pretrained(path.parent / "adapter", state_dict=adapter, save_embedding_layers=False)


def _persistent_buffers(model: PreTrainedModel | PeftModel) -> dict[str, torch.Tensor]:
    base = transformers_model(model)
    saved = base.state_dict().keys()
    return {name.replace(".base_layer.", "."): b.cpu() for name, b in base.named_buffers() if name in saved}


def num_parameters(config: PreTrainedConfig) -> int:
    """Parameters of the architecture, tied ones once, without allocating any; ConfigError where it is no causal LM."""
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    except ValueError as error:
        raise ConfigError(f"model.name: {config.model_type} is no causal language model: {one_line(error)[:80]}") from None


def num_adapter_parameters(config: PreTrainedConfig, lora: LoraConfig) -> int:
    """Parameters that train with `lora`, without allocating any; ConfigError where it does not fit the architecture."""
    with torch.device("meta"):
        model = add_lora(AutoModelForCausalLM.from_config(config), lora, seed=0)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def kv_cache_bytes(config: PreTrainedConfig, num_tokens: int, bytes_per_number: int) -> int:
    """Size of the keys and values of `num_tokens` tokens."""
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return num_tokens * 2 * config.num_hidden_layers * heads * head_dim * bytes_per_number
