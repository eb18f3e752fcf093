"""Responses to one prompt in one row of a forward pass, so that the prompt is computed once for all of them.

    rows [B, T]                     one row of the layout [R, L]

    prompt a a a _ _                prompt a a a b b c c c _ _        tokens
    prompt b b _ _ _       ──>      0 1 2  3 4 5 3 4 3 4 5 _ _        positions
    prompt c c c _ _                a response sees the prompt, itself, and no other response

What a causal model computes for a token depends on nothing but what it sees and where that lies, so log-probs and gradients
are those of separate rows, but for the order of sums.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from grpo.errors import ConfigError

MULTIPLE = 8  # of a row's tokens: a GPU's kernels copy masks of other sizes, once a layer
WINDOWS = "sliding_window", "window_size", "attention_window_size", "attention_chunk_size"


def check_attends_to_all(model: PreTrainedConfig) -> None:
    """Raise ConfigError where a token sees but a part of what is before it: others in its row would push that out."""
    config = model.get_text_config()
    kinds = {*(getattr(config, "layer_types", None) or ())} - {"full_attention"}
    kinds |= {name for name in WINDOWS if getattr(config, name, None) is not None}
    if kinds:
        raise ConfigError(
            f"train.share_prompts: layers of {config.model_type} do not attend to all that is before a token "
            f"({', '.join(sorted(kinds))}): use train.share_prompts=false"
        )


@dataclass(frozen=True)
class Layout:
    """R rows of L tokens in place of B rows, which follow one another where their prompts are equal.

    tokens, positions: int64 [R, L]. visible: bool [R, 1, L, L], what each token sees. is_response: bool [B, T], the rows'
    response tokens; row, before: int64 [N], where in the layout what predicts each of them lies. shortest: the shortest
    prompt's length, before which nothing predicts a response.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    visible: torch.Tensor
    is_response: torch.Tensor
    row: torch.Tensor
    before: torch.Tensor
    shortest: int


def runs(tokens: torch.Tensor, prompt_length: torch.Tensor) -> torch.Tensor:
    """int64 [B]: which run of rows [B, T] with equal prompts each row is in, counted from 0."""
    is_prompt = torch.arange(tokens.shape[1], device=tokens.device) < prompt_length[1:, None]
    differs = ((tokens[1:] != tokens[:-1]) & is_prompt).any(1) | (prompt_length[1:] != prompt_length[:-1])
    return torch.nn.functional.pad(differs.long().cumsum(0), (1, 0))


def lay_out(tokens: torch.Tensor, prompt_length: torch.Tensor, response_length: torch.Tensor) -> Layout:
    """The layout of rows [B, T], a prompt and a response each; padding on the right."""
    device, run = tokens.device, runs(tokens, prompt_length)
    first = torch.ones_like(run, dtype=torch.bool)  # rows that begin a run
    first[1:] = run[1:] != run[:-1]
    prompts, starts = prompt_length[first], response_length.cumsum(0) - response_length
    offset = starts - starts[first][run]  # of a response in its row of the layout, besides its prompt
    sizes = prompts.index_add(0, run, response_length)
    shape = len(sizes), -(-int(sizes.max()) // MULTIPLE) * MULTIPLE

    column = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
    is_prompt = (column < prompt_length[:, None]) & first[:, None]
    is_response = (column >= prompt_length[:, None]) & (column < (prompt_length + response_length)[:, None])
    kept = is_prompt | is_response
    place = column + torch.where(is_response, offset[:, None], 0)
    here = run[:, None].expand_as(tokens)[kept], place[kept]
    part = torch.where(is_prompt, -1, torch.arange(1, len(run) + 1, device=device)[:, None])  # 0: padding, which sees itself
    laid, positions, parts = (
        torch.zeros(shape, dtype=torch.int64, device=device).index_put(here, values[kept])
        for values in (tokens, column, part)
    )
    visible = (parts[:, :, None] == parts[:, None]) | (parts[:, None] == -1)
    before = torch.where(column == prompt_length[:, None], column, place) - 1
    return Layout(
        tokens=laid,
        positions=positions,
        visible=visible.tril()[:, None],
        is_response=is_response,
        row=run[:, None].expand_as(tokens)[is_response],
        before=before[is_response],
        shortest=int(prompts.min()),
    )
