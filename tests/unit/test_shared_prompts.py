"""Prompts that are computed once for all their responses."""

import pytest
import torch

from grpo.scoring import shared_log_probs, token_log_probs
from grpo.shared_prompts import lay_out, runs


def rows(seed: int, groups: list[int], vocabulary: int = 50) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, prompt and response lengths of as many responses to each of some prompts as `groups` says."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    prompts = [prompt for size in groups for prompt in [draw(1, vocabulary, int(draw(1, 9)))] * size]
    made = [(prompt, draw(1, vocabulary, int(draw(1, 12)))) for prompt in prompts]
    tokens = torch.nn.utils.rnn.pad_sequence([torch.cat(pair) for pair in made], batch_first=True)
    return tokens, *(torch.tensor([len(pair[i]) for pair in made]) for i in range(2))


def test_a_layout_worked_by_hand():
    tokens = torch.tensor([[1, 2, 3, 4, 0], [1, 2, 5, 0, 0], [1, 6, 7, 0, 0]])
    layout = lay_out(tokens, torch.tensor([2, 2, 1]), torch.tensor([2, 1, 2]))
    assert layout.tokens.tolist() == [[1, 2, 3, 4, 5], [1, 6, 7, 0, 0]]
    assert layout.positions.tolist() == [[0, 1, 2, 3, 2], [0, 1, 2, 0, 0]]
    assert layout.is_response.int().tolist() == [[0, 0, 1, 1, 0], [0, 0, 1, 0, 0], [0, 1, 1, 0, 0]]
    assert layout.row.tolist() == [0, 0, 0, 1, 1]
    assert layout.before.tolist() == [1, 2, 1, 0, 1]  # the second response begins behind the prompt as well
    assert layout.shortest == 1
    assert layout.visible[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
    assert layout.visible.any(-1).all()  # padding sees something too: a softmax over nothing is not a number


def test_a_prompt_that_begins_like_another_is_another():
    tokens = torch.tensor([[1, 2, 3], [1, 2, 4], [1, 5, 4], [1, 5, 4]])
    assert runs(tokens, torch.tensor([2, 2, 2, 1])).tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("groups", [[1], [3], [4, 4], [1, 5, 2, 1]])
def test_log_probs_entropies_and_gradients_are_those_of_separate_rows(model, seed, groups):
    tokens, prompt_length, response_length = rows(seed, groups)
    column = torch.arange(tokens.shape[1])
    mask = (column >= prompt_length[:, None]) & (column < (prompt_length + response_length)[:, None])
    weights = torch.randn(2, *tokens.shape, generator=torch.Generator().manual_seed(seed))

    def of(both: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        values = torch.where(mask, torch.stack(both), 0.0)
        gradients = torch.autograd.grad((values * weights).sum(), list(model.parameters()))
        return values.detach(), torch.cat([gradient.flatten() for gradient in gradients])

    expected, its_gradient = of(token_log_probs(model, tokens, int(prompt_length.min()), 0.7))
    found, gradient = of(shared_log_probs(model, tokens, prompt_length, response_length, 0.7))
    assert torch.allclose(found, expected, atol=1e-5)
    assert float((gradient - its_gradient).norm()) < 1e-5 * float(its_gradient.norm())


def test_what_another_response_says_changes_nothing(model):
    tokens, prompt_length, response_length = rows(3, [3])
    before = shared_log_probs(model, tokens, prompt_length, response_length, 1.0)[0]
    tokens[1, int(prompt_length[1])] = 49 - tokens[1, int(prompt_length[1])]
    after = shared_log_probs(model, tokens, prompt_length, response_length, 1.0)[0]
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[2], before[2])
    assert not torch.equal(after[1], before[1])
