"""A base model in 4 bits under LoRA: bitsandbytes keeps the weights of its linear layers as NF4 codes, which never change.

What a layer computes with are the codes' values, rounded weights W'. They are the policy's base everywhere: adapters train
on them, the reference is the model without adapters, and engines and exported models get W' + alpha / r * B A. Every rank
holds all codes, since bitsandbytes' tensors cannot be cut into shards; the remaining weights are sharded as ever.

Source: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314, section 3.
"""

from collections.abc import Iterator
from copy import deepcopy
from importlib.util import find_spec

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import dequantize_bnb_weight
from transformers.pytorch_utils import Conv1D

from grpo.errors import ConfigError

TESTED = "0.50.2"  # of bitsandbytes, which is not among the requirements: wherever it is there, peft takes 2 s to import it
BLOCK = 64  # numbers that share a scale; the kernel for CPUs restores rows of other multiples wrongly, without a word
BYTES = 0.5 + 1 / BLOCK  # a number: its code, and its share of a scale, which has 8 bits itself


def check_four_bit(config: PreTrainedConfig, key: str) -> int:
    """How many weights of the architecture `key` would put in 4 bits; ConfigError where that cannot be done."""
    if find_spec("bitsandbytes") is None:
        raise ConfigError(f"{key} (true) needs bitsandbytes: pip install bitsandbytes=={TESTED}, or leave it false")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if any(isinstance(module, Conv1D) for module in model.modules()):
        raise ConfigError(f"{key} (true): {type(model).__name__} keeps its weights transposed; leave it false")
    head = model.get_output_embeddings()
    linear = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    for name, layer in linear.items():
        if layer.in_features % BLOCK:
            raise ConfigError(
                f"{key} (true) needs layers whose inputs are a multiple of {BLOCK}, and {name} has {layer.in_features}: "
                "leave it false"
            )
    return sum(layer.weight.numel() for layer in linear.values())


def load_four_bit(path: str, device: torch.device, attn_implementation: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model on `device`: codes for the weights of its linear layers, which compute in `dtype`; the rest in float32."""
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float32,
        attn_implementation=attn_implementation,
        quantization_config=settings,
        device_map={"": device},
    )
    for _, layer in four_bit_layers(model):
        # Else a CPU that has bfloat16 repacks the codes at the first pass without gradients, for a kernel that has none.
        layer.support_avx512bf16_for_cpu = False
    return model


def is_codes(parameter: torch.Tensor | None) -> bool:
    """By the name of bitsandbytes' class, so that runs without it never import it."""
    return type(parameter).__name__ == "Params4bit"


def four_bit_layers(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The layers whose weights are codes."""
    return ((name, module) for name, module in model.named_modules() if is_codes(module._parameters.get("weight")))


def values(codes: torch.nn.Parameter) -> torch.Tensor:
    """What they stand for, float32 [out, in]."""
    return dequantize_bnb_weight(codes)


def outline(codes: torch.nn.Parameter) -> torch.Tensor:
    """A tensor of the shape of their values, without any."""
    return torch.empty(codes.quant_state.shape, device="meta")


def plain(model: PreTrainedModel) -> PreTrainedModel:
    """The architecture of `model` without weights and without codes, to save other weights with."""
    config = deepcopy(model.config)
    del config.quantization_config
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    empty.generation_config = model.generation_config
    return empty
