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
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from grpo.errors import ConfigError, one_line


def read_config(name: str):
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


def token_log_probs(
    model: PreTrainedModel, tokens: torch.Tensor, first: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of `tokens` [B, T] and the entropy of their distributions, from position `first` on.

    Both are float32 [B, T] in nats under softmax(logits / temperature), 0 before `first` (at least 1). Tokens are padded
    on the right, so no attention mask is needed.
    """
    length = tokens.shape[1]
    logits = model(input_ids=tokens, logits_to_keep=length - first + 1).logits[:, :-1].float() / temperature
    chosen = tokens[:, first:]
    log_probs = -torch.nn.functional.cross_entropy(logits.flatten(0, 1), chosen.flatten(), reduction="none")
    all_log_probs = logits.log_softmax(-1)
    entropy = -(all_log_probs.exp() * all_log_probs).sum(-1)
    pad = (first, 0)
    return (
        torch.nn.functional.pad(log_probs.view_as(chosen), pad),
        torch.nn.functional.pad(entropy, pad),
    )


@torch.no_grad()
def score(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    prompt_length: torch.Tensor,
    response_mask: torch.Tensor,
    temperature: float,
    micro_batch: int,
) -> torch.Tensor:
    """Log-probs [B, T] of the response tokens without gradients, `micro_batch` rows at a time; 0 elsewhere."""
    parts = [
        token_log_probs(model, rows, int(lengths.min()), temperature)[0]
        for rows, lengths in zip(tokens.split(micro_batch), prompt_length.split(micro_batch), strict=True)
    ]
    return torch.where(response_mask, torch.cat(parts), 0.0)


def full_parameters(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Each parameter whole, under its transformers name, tied ones once. A collective: every rank iterates it alike."""
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Write the whole model in transformers format from rank 0. A collective."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        model.save_pretrained(path, state_dict=state)
        tokenizer.save_pretrained(path)


def num_parameters(config) -> int:
    """Parameters of the architecture, tied ones once, without allocating any."""
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
