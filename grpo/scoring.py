"""Log-probs that a model gives to tokens: with gradients for the trainer, without for the reference, probes and engines.

Owns every forward pass, so that trainer, reference and transformers engine compute the same numbers.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from grpo.errors import ConfigError, one_line
from grpo.models import transformers_model
from grpo.shared_prompts import lay_out

LOGITS = 2**27  # that are scored at a time: 512 MiB in float32
SHARING_TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}  # nats a token, for rounding
TOKENS = 2**13  # that are scored at a time: more gain nothing on a GPU, and leave a CPU's cache


def _response_logits(model: PreTrainedModel, tokens: torch.Tensor, first: int) -> torch.Tensor:
    """Float32 [B, T - first, V]: what predicts `tokens[:, first:]`. Padding is on the right, so no mask is needed."""
    kept = tokens.shape[1] - first + 1
    return model(input_ids=tokens, logits_to_keep=kept).logits[:, :-1].float()


class _LogProbsAndEntropy(torch.autograd.Function):
    """log p(chosen) and H(p), both [N], where p = softmax(z / t) for logits z float32 [N, V] and chosen [N].

    Of the size of the logits only p is kept, and each gradient is one expression of it:

        t d log p(c) / dz = 1[c] - p,    t dH / dz = -p (log p + H)

    Autograd's own way through log_softmax makes and fills several more, which costs a large vocabulary most of the memory.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, chosen: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        log_p = (logits if temperature == 1 else logits / temperature).log_softmax(-1)
        p = log_p.exp()
        log_probs = log_p.gather(-1, chosen[:, None])[:, 0]
        entropy = -log_p.mul_(p).sum(-1)
        ctx.save_for_backward(p, chosen, entropy)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return log_probs, entropy

    @staticmethod
    def backward(ctx, to_log_probs: torch.Tensor | None, to_entropy: torch.Tensor | None) -> tuple:
        p, chosen, entropy = ctx.saved_tensors
        gradient = None
        if to_log_probs is not None:
            scaled = to_log_probs[:, None] / ctx.temperature
            gradient = (p * -scaled).scatter_add_(-1, chosen[:, None], scaled)
        if to_entropy is not None:
            of_entropy = (torch.special.entr(p) - p * entropy[:, None]) * (to_entropy[:, None] / ctx.temperature)
            gradient = of_entropy if gradient is None else gradient + of_entropy
        return gradient, None, None


def token_log_probs(
    model: PreTrainedModel, tokens: torch.Tensor, first: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of `tokens` [B, T] and the entropy of their distributions, from position `first` on.

    Both are float32 [B, T] in nats under softmax(logits / temperature), 0 before `first` (at least 1).
    """
    logits, chosen = _response_logits(model, tokens, first), tokens[:, first:]
    both = _LogProbsAndEntropy.apply(logits.flatten(0, 1), chosen.flatten(), temperature)
    log_probs, entropy = (torch.nn.functional.pad(values.view_as(chosen), (first, 0)) for values in both)
    return log_probs, entropy


def shared_log_probs(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    prompt_length: torch.Tensor,
    response_length: torch.Tensor,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `token_log_probs` gives for the response tokens, with each prompt computed once for the rows that follow with it.

    The model must attend to all that a mask shows it, at the positions that it is told (`check_shares_prompts`).
    """
    layout = lay_out(tokens, prompt_length, response_length)
    kept = layout.tokens.shape[1] - layout.shortest + 1
    logits = model(
        input_ids=layout.tokens,
        position_ids=layout.positions,
        attention_mask=torch.where(layout.visible, 0.0, -torch.inf),
        logits_to_keep=kept,
    ).logits
    # Indexing would add up the gradients of what predicts several tokens, a group's first ones, in any order.
    places = layout.row * kept + layout.before - layout.shortest + 1
    chosen = torch.nn.functional.embedding(places, logits.flatten(0, 1)).float()
    both = _LogProbsAndEntropy.apply(chosen, tokens[layout.is_response], temperature)
    zeros = torch.zeros(tokens.shape, device=tokens.device)
    log_probs, entropy = (zeros.masked_scatter(layout.is_response, values) for values in both)
    return log_probs, entropy


@torch.no_grad()
def check_shares_prompts(model: PreTrainedModel, precision: str) -> None:
    """Raise ConfigError where a response's log-probs, computed in `precision`, depend on the others in its row."""
    tokens = torch.arange(80, device=model.device).view(8, 10) % model.config.vocab_size
    tokens[:, :2] = tokens[0, :2]
    lengths = torch.tensor([[2], [8]], device=model.device).expand(2, 8)
    separate = token_log_probs(model, tokens, 2, 1.0)[0]
    try:
        difference = float((shared_log_probs(model, tokens, *lengths, 1.0)[0] - separate).abs().mean())
        why = f"log-probs of a text change by {difference:.2g} nats a token"
    except (TypeError, ValueError) as error:  # it takes no positions, or no mask of its own for each token
        difference, why = math.inf, one_line(error)[:200]
    if not difference < SHARING_TOLERANCE[precision]:
        raise ConfigError(
            f"train.share_prompts: {type(transformers_model(model)).__name__} does more than attend to what a mask shows it "
            f"({why}): use train.share_prompts=false"
        )


@contextmanager
def last_states(model: PreTrainedModel | PeftModel) -> Iterator[Callable[[], torch.Tensor]]:
    """Within it, a function that gives the last hidden states of the pass before, as the output layer got them.

    They are float32 [B, T - first, D], of the positions that predict `tokens[:, first:]`, and gradients go through them.
    Asking transformers for them would keep those of every layer.
    """
    seen: list[torch.Tensor] = []
    head = transformers_model(model).get_output_embeddings()

    def keep(module: torch.nn.Module, inputs: tuple) -> None:
        seen[:] = inputs[:1]

    handle = head.register_forward_pre_hook(keep)
    try:
        yield lambda: seen[0][:, :-1].float()
    finally:
        handle.remove()


def score(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    prompt_length: torch.Tensor,
    response_mask: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """Log-probs [B, T] of the response tokens without gradients; 0 elsewhere."""
    return _score(model, tokens, prompt_length, response_mask, temperature, None)


def score_with_states(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    prompt_length: torch.Tensor,
    response_mask: torch.Tensor,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `score` gives, and the directions of the last hidden states it comes from: float16 [B, T, D], 0 elsewhere."""
    states = torch.zeros(*tokens.shape, model.config.hidden_size, dtype=torch.float16, device=tokens.device)
    return _score(model, tokens, prompt_length, response_mask, temperature, states), states


@torch.no_grad()
def _score(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    prompt_length: torch.Tensor,
    response_mask: torch.Tensor,
    temperature: float,
    states: torch.Tensor | None,
) -> torch.Tensor:
    """Log-probs [B, T], with hidden states written into `states`, if given.

    Rows of similar length are scored together, as many at a time as TOKENS and LOGITS allow. How many passes that takes
    depends on shapes alone, since training ranks must all run as many.
    """
    width = tokens.shape[1]
    rows = max(1, min(TOKENS, LOGITS // model.config.vocab_size) // width)
    ends = (response_mask * torch.arange(1, width + 1, device=tokens.device)).amax(1)
    log_probs = torch.zeros(tokens.shape, device=tokens.device)
    with last_states(model) as its_states:
        for mine in ends.argsort(descending=True, stable=True).split(rows):
            part, first = tokens[mine, : int(ends[mine[0]])], int(prompt_length[mine].min())
            logits, chosen = _response_logits(model, part, first) / temperature, part[:, first:]
            negative = torch.nn.functional.cross_entropy(logits.flatten(0, 1), chosen.flatten(), reduction="none")
            log_probs[mine, first : part.shape[1]] = -negative.view_as(chosen)
            if states is not None:
                directions = torch.nn.functional.normalize(its_states(), dim=-1)
                here = response_mask[mine, first : part.shape[1], None]
                states[mine, first : part.shape[1]] = torch.where(here, directions, 0.0).half()
    return torch.where(response_mask, log_probs, 0.0)


def score_text(model: PreTrainedModel, tokens: list[int], device: torch.device) -> np.ndarray:
    """Log-probs [T - 1] of all tokens but the first, in nats at temperature 1, without gradients."""
    row = torch.tensor([tokens], device=device)
    is_scored = torch.arange(len(tokens), device=device)[None] > 0
    return score(model, row, torch.ones(1, dtype=torch.int64, device=device), is_scored, 1.0)[0, 1:].cpu().numpy()
