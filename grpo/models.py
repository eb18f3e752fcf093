"""Language models: find, load, shard, score, export.

Owns everything that touches a transformers model except sampling from it. The trainer, the reference and the
transformers engine load through here, so that all of them compute the same log-probs.
"""

import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
import torch.distributed as dist
from huggingface_hub import constants as hub_constants
from huggingface_hub import try_to_load_from_cache
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from grpo.errors import ConfigError, one_line

LOGITS = 2**27  # that are scored at a time: 512 MiB in float32


def read_config(name: str) -> PreTrainedConfig:
    """The transformers configuration of a local directory or hub name; ConfigError where there is none."""
    if not Path(name).is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise ConfigError(f"model.name ({name}): there is no such directory; give one in transformers format")
        if not isinstance(try_to_load_from_cache(name, "config.json"), str) and not _hub_reachable():
            raise ConfigError(
                f"model.name ({name}) is no directory here, is not in the hub's cache, and the hub cannot be reached: "
                "connect, or give a local directory in transformers format"
            )
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.name ({name}) is not a model that can be read: {one_line(error)[:200]}") from None


def _hub_reachable() -> bool:
    """Asked first, since the hub's client retries for half a minute where there is no network."""
    if getproxies():
        return True
    try:
        socket.create_connection((urlsplit(hub_constants.ENDPOINT).hostname, 443), timeout=5).close()
    except OSError:
        return False
    return True


def check_files(path: str) -> None:
    """Raise ConfigError where a local model directory lacks its weights or its tokenizer."""
    folder = Path(path)
    if folder.is_dir() and not (any(folder.glob("*.safetensors")) and (folder / "tokenizer_config.json").is_file()):
        raise ConfigError(f"model.name ({path}) must hold *.safetensors and tokenizer_config.json, as save_pretrained does")


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(path)


def load_model(path: str, device: torch.device, attn_implementation: str = "sdpa") -> PreTrainedModel:
    """The model in float32 on `device`, in evaluation mode.

    Evaluation mode turns dropout off: with dropout the ratio of a rollout to its own policy would not be 1.
    """
    if device.type == "cpu":
        torch.set_flush_denormal(True)  # subnormal gradients and optimiser states slow a CPU down many times
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=attn_implementation)
    model = model.to(device)
    model.config.use_cache = False
    return model.eval()


def shard(model: PreTrainedModel, mesh: DeviceMesh) -> PreTrainedModel:
    """Wrap `model` with FSDP2 in place, a shard group a decoder layer.

    Gradients are summed over ranks, not averaged: the loss is already divided by the count over all ranks. On gloo that
    needs forced sum reduction, on every module.
    """
    layer_classes = set(model._no_split_modules or ())
    for module in model.modules():
        if type(module).__name__ in layer_classes:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model


def _response_logits(model: PreTrainedModel, tokens: torch.Tensor, first: int, temperature: float) -> torch.Tensor:
    """Float32 [B, T - first, V]: what predicts `tokens[:, first:]`. Padding is on the right, so no mask is needed."""
    kept = tokens.shape[1] - first + 1
    return model(input_ids=tokens, logits_to_keep=kept).logits[:, :-1].float() / temperature


def _log_probs(logits: torch.Tensor, tokens: torch.Tensor, first: int) -> torch.Tensor:
    chosen = tokens[:, first:]
    negative = torch.nn.functional.cross_entropy(logits.flatten(0, 1), chosen.flatten(), reduction="none")
    return torch.nn.functional.pad(-negative.view_as(chosen), (first, 0))


def token_log_probs(
    model: PreTrainedModel, tokens: torch.Tensor, first: int, temperature: float, entropy_gradient: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of `tokens` [B, T] and the entropy of their distributions, from position `first` on.

    Both are float32 [B, T] in nats under softmax(logits / temperature), 0 before `first` (at least 1). Without
    `entropy_gradient` the entropy is a number only, which saves several times the logits in memory.
    """
    logits = _response_logits(model, tokens, first, temperature)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        all_log_probs = logits.log_softmax(-1)
        entropy = -(all_log_probs.exp() * all_log_probs).sum(-1)
    return _log_probs(logits, tokens, first), torch.nn.functional.pad(entropy, (first, 0))


@torch.no_grad()
def score(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    prompt_length: torch.Tensor,
    response_mask: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """Log-probs [B, T] of the response tokens without gradients, so many rows at a time as LOGITS allows; 0 elsewhere."""
    rows = max(1, LOGITS // (tokens.shape[1] * model.config.vocab_size))
    parts = []
    for part, lengths in zip(tokens.split(rows), prompt_length.split(rows), strict=True):
        first = int(lengths.min())
        parts.append(_log_probs(_response_logits(model, part, first, temperature), part, first))
    return torch.where(response_mask, torch.cat(parts), 0.0)


def full_parameters(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Each parameter whole, under its transformers name, tied ones once. A collective: every rank iterates it alike."""
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Further names of parameters that appear twice in the model, by the name that `full_parameters` has for them."""
    return dict(model.all_tied_weights_keys) if model.config.tie_word_embeddings else {}


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Write the whole model in transformers format from rank 0. A collective."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        model.save_pretrained(path, state_dict=state)
        tokenizer.save_pretrained(path)


def num_parameters(config: PreTrainedConfig) -> int:
    """Parameters of the architecture, tied ones once, without allocating any; ConfigError where it is no causal LM."""
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    except ValueError as error:
        raise ConfigError(f"model.name: {config.model_type} is no causal language model: {one_line(error)[:80]}") from None


def kv_cache_bytes(config: PreTrainedConfig, num_tokens: int, bytes_per_number: int) -> int:
    """Size of the keys and values of `num_tokens` tokens."""
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return num_tokens * 2 * config.num_hidden_layers * heads * head_dim * bytes_per_number
