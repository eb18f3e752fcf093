import pytest
import torch

import grpo.scoring
from grpo.scoring import _LogProbsAndEntropy, last_states, score, score_with_states, token_log_probs

from .conftest import ragged_rollouts


def naive(model, row: list[int], temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of `row`'s tokens and entropies [T], from a forward pass over that row alone; position 0 has none."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row])).logits[0].double() / temperature
    distribution = logits.log_softmax(-1)
    log_probs = [0.0] + [float(distribution[t - 1, row[t]]) for t in range(1, len(row))]
    entropy = [0.0] + [float(-(distribution[t - 1].exp() * distribution[t - 1]).sum()) for t in range(1, len(row))]
    return torch.tensor(log_probs), torch.tensor(entropy)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
def test_log_probs_and_entropies_are_those_of_the_tempered_softmax_at_each_tokens_own_position(model, temperature):
    rows = [[4, 0, 17, 30, 0, 51], [7, 7, 2, 0, 0, 1]]
    log_probs, entropy = token_log_probs(model, torch.tensor(rows), 1, temperature)
    for i, row in enumerate(rows):
        expected_log_probs, expected_entropy = naive(model, row, temperature)
        assert torch.allclose(log_probs[i], expected_log_probs, atol=1e-5)
        assert torch.allclose(entropy[i], expected_entropy, atol=1e-5)
    assert log_probs.std() > 0.1  # far from uniform, so that a shifted position would be seen
    assert log_probs.dtype == entropy.dtype == torch.float32


@pytest.mark.parametrize("first", [1, 2, 4, 5])
def test_first_only_leaves_out_what_comes_before_it(model, first):
    tokens = torch.tensor([[4, 0, 17, 30, 0, 51], [7, 7, 2, 0, 0, 1]])
    whole = token_log_probs(model, tokens, 1, 0.7)
    for part, all_of_it in zip(token_log_probs(model, tokens, first, 0.7), whole, strict=True):
        assert torch.allclose(part[:, first:], all_of_it[:, first:], atol=1e-6)
        assert not part[:, :first].any()


def test_padding_on_the_right_changes_no_real_token(model):
    batch = ragged_rollouts()
    log_probs, entropy = token_log_probs(model, batch["tokens"], 1, 1.0)
    padded = torch.nn.functional.pad(batch["tokens"], (0, 5), value=23)
    log_probs_padded, entropy_padded = token_log_probs(model, padded, 1, 1.0)
    lengths = (batch["prompt_length"] + batch["response_length"]).tolist()
    for i, length in enumerate(lengths):
        expected_log_probs, expected_entropy = naive(model, batch["tokens"][i, :length].tolist(), 1.0)
        for values in (log_probs, log_probs_padded):
            assert torch.allclose(values[i, :length], expected_log_probs, atol=1e-5)
        for values in (entropy, entropy_padded):
            assert torch.allclose(values[i, :length], expected_entropy, atol=1e-5)


def test_the_gradient_of_log_probs_reaches_the_weights(model):
    tokens = torch.tensor([[4, 0, 17, 30]])
    weight = model.model.embed_tokens.weight
    log_probs, _ = token_log_probs(model, tokens, 2, 1.0)
    (gradient,) = torch.autograd.grad(log_probs.sum(), weight)
    step = torch.zeros_like(weight)
    step[17, 3] = 1e-2
    with torch.no_grad():
        weight += step
        up = token_log_probs(model, tokens, 2, 1.0)[0].sum()
        weight -= 2 * step
        down = token_log_probs(model, tokens, 2, 1.0)[0].sum()
    assert float(gradient[17, 3]) == pytest.approx(float(up - down) / 2e-2, rel=1e-2)


@pytest.mark.parametrize("rows", [1, 3, 8, 100])
def test_scoring_does_not_depend_on_how_many_rows_are_scored_at_a_time(model, rows, monkeypatch):
    batch = ragged_rollouts()
    monkeypatch.setattr(grpo.scoring, "LOGITS", rows * batch["tokens"].shape[1] * model.config.vocab_size)
    inputs = (batch["tokens"], batch["prompt_length"], batch["response_mask"])
    scored = score(model, *inputs, temperature=0.8)
    log_probs = token_log_probs(model, batch["tokens"], 1, 0.8)[0]
    assert torch.allclose(scored, torch.where(batch["response_mask"], log_probs, 0.0), atol=1e-5)
    assert not scored[~batch["response_mask"]].any()
    assert not scored.requires_grad


@pytest.mark.parametrize("first", [1, 3])
def test_last_states_are_those_that_predict_each_token_and_pass_gradients_on(model, first):
    tokens = torch.tensor([[4, 0, 17, 30, 0, 51], [7, 7, 2, 0, 0, 1]])
    with last_states(model) as its_states:
        log_probs, _ = token_log_probs(model, tokens, first, 1.0)
        states = its_states()
    expected = model(input_ids=tokens, output_hidden_states=True).hidden_states[-1][:, first - 1 : -1]
    assert torch.allclose(states, expected, atol=1e-6)
    # What the output layer makes of them is what the log-probs are of.
    again = model.lm_head(states).log_softmax(-1).gather(-1, tokens[:, first:, None])[..., 0]
    assert torch.allclose(again, log_probs[:, first:], atol=1e-5)
    weights = torch.arange(states.numel()).view_as(states) / 100
    parameters = [model.model.embed_tokens.weight, model.model.norm.weight, model.model.layers[0].mlp.up_proj.weight]
    found, plain = (torch.autograd.grad((s.sin() * weights).sum(), parameters) for s in (states, expected))
    for its, theirs in zip(found, plain, strict=True):
        assert torch.allclose(its, theirs, atol=1e-4)
    assert not model.lm_head._forward_pre_hooks


def test_scoring_with_states_gives_their_directions_on_response_tokens_alone(model, monkeypatch):
    batch = ragged_rollouts()
    monkeypatch.setattr(grpo.scoring, "LOGITS", 3 * batch["tokens"].shape[1] * model.config.vocab_size)
    inputs = batch["tokens"], batch["prompt_length"], batch["response_mask"], 0.8
    log_probs, states = score_with_states(model, *inputs)
    assert torch.equal(log_probs, score(model, *inputs))
    whole = model(input_ids=batch["tokens"], output_hidden_states=True).hidden_states[-1]
    expected = torch.nn.functional.normalize(whole, dim=-1)[:, :-1]
    mask = batch["response_mask"]
    assert (states[:, 1:].float() - expected)[mask[:, 1:]].abs().max() < 1e-3
    assert not states[~mask].any()
    assert states.dtype == torch.float16


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("part", [lambda a, b: a, lambda a, b: b, lambda a, b: a.sin() * b])
def test_the_written_out_gradients_are_those_of_autograd(temperature, part):
    torch.manual_seed(0)
    logits = torch.randn(5, 7, dtype=torch.float64) * 3
    logits[0, 3] = 800.0  # every other probability is 0
    logits.requires_grad_()
    chosen, weights = torch.tensor([3, 0, 6, 2, 2]), torch.randn(5, dtype=torch.float64)
    (ours,) = torch.autograd.grad((weights * part(*_LogProbsAndEntropy.apply(logits, chosen, temperature))).sum(), logits)
    log_p = (logits / temperature).log_softmax(-1)
    plain = log_p[torch.arange(5), chosen], -(log_p.exp() * log_p).sum(-1)
    (expected,) = torch.autograd.grad((weights * part(*plain)).sum(), logits)
    assert expected.abs().max() > 0.01
    assert torch.allclose(ours, expected, atol=1e-12)
