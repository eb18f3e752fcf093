"""Adapters that are there already, in peft's format: what `lora_path` names. New ones are made in grpo/models.py."""

import math
from pathlib import Path

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from grpo.errors import ConfigError, one_line
from grpo.sources import check_adapter_files


def adapter_settings(path: str) -> PeftLoraConfig:
    """What `adapter_config.json` of the directory says; ConfigError where these are not plain LoRA adapters."""
    check_adapter_files(path)
    try:
        settings = PeftConfig.from_pretrained(path)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"lora_path ({path}): its adapter_config.json cannot be read: {one_line(error)[:200]}") from None
    plain = settings.peft_type == "LORA" and not settings.use_dora and settings.bias == "none" and not settings.lora_bias
    if not plain or settings.modules_to_save or settings.trainable_token_indices:
        raise ConfigError(
            f"lora_path ({path}) must hold LoRA adapters alone: no DoRA, no biases, no modules_to_save, no "
            "trainable_token_indices"
        )
    return settings


def check_adapter(config: PreTrainedConfig, path: str) -> int:
    """The number of parameters of the adapters at `path`; ConfigError where they are not adapters of this architecture."""
    settings = adapter_settings(path)
    settings.base_model_name_or_path = None  # peft warns where that is another, which shapes will tell
    try:
        with torch.device("meta"):
            model = get_peft_model(AutoModelForCausalLM.from_config(config), settings)
        head = model.get_output_embeddings()  # the adapted layer, where it is one
        if any(layer.lora_embedding_A or layer is head for layer in model.modules() if isinstance(layer, LoraLayer)):
            raise ConfigError(f"lora_path ({path}) adapts embeddings or the output layer: only linear layers inside can be")
        expected = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(model).items()}
    except ValueError as error:  # a target that the architecture does not have
        raise ConfigError(f"lora_path ({path}) holds adapters of another model: {one_line(error)[:200]}") from None
    try:
        with safe_open(Path(path) / "adapter_model.safetensors", "pt") as file:
            there = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except SafetensorError as error:
        raise ConfigError(f"lora_path ({path}): its adapter_model.safetensors is damaged: {one_line(error)[:200]}") from None
    for name in sorted(expected.keys() | there.keys()):
        if expected.get(name) != there.get(name):
            raise ConfigError(
                f"lora_path ({path}) holds adapters of another model: {name} is {there.get(name, 'missing')} there and "
                f"{expected.get(name, 'not in this one')}"
            )
    return sum(math.prod(shape) for shape in there.values())


def load_lora(model: PreTrainedModel, path: str) -> PeftModel:
    """Wrap `model` with the adapters at `path`, which stay trainable; its own parameters freeze."""
    return PeftModel.from_pretrained(model, path, is_trainable=True).eval()
