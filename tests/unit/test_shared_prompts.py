"""Prompts that are computed once for all their responses."""

import pytest
import torch
from tensordict import TensorDict
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, LlamaConfig, MistralConfig, PreTrainedConfig

from grpo.config_sections import TrainModelConfig
from grpo.errors import ConfigError
from grpo.micro_batches import split_rows
from grpo.scoring import check_shares_prompts, shared_log_probs, token_log_probs
from grpo.shared_prompts import check_attends_to_all, lay_out, runs

from .trainers import LORA, largest_difference, weights


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
    assert layout.tokens.tolist() == [[1, 2, 3, 4, 5, 0, 0, 0], [1, 6, 7, 0, 0, 0, 0, 0]]
    assert layout.positions.tolist() == [[0, 1, 2, 3, 2, 0, 0, 0], [0, 1, 2, 0, 0, 0, 0, 0]]
    assert layout.is_response.int().tolist() == [[0, 0, 1, 1, 0], [0, 0, 1, 0, 0], [0, 1, 1, 0, 0]]
    assert layout.row.tolist() == [0, 0, 0, 1, 1]
    assert layout.before.tolist() == [1, 2, 1, 0, 1]  # the second response begins behind the prompt as well
    assert layout.shortest == 1
    assert layout.visible[0, 0, :5, :5].int().tolist() == [
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


def test_the_gradient_is_the_same_to_the_last_bit_every_time(model):
    """The first tokens of a group are predicted by one position: threads must not add to its gradient in any order."""
    batch = rows(0, [200])  # enough that two threads share the work
    weight = torch.randn(batch[0].shape, generator=torch.Generator().manual_seed(1))
    threads, found = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        for _ in range(6):
            log_probs = shared_log_probs(model, *batch, 1.0)[0]
            found.append(torch.autograd.grad((log_probs * weight).sum(), model.model.embed_tokens.weight)[0])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(other, found[0]) for other in found[1:])


def test_what_another_response_says_changes_nothing(model):
    tokens, prompt_length, response_length = rows(3, [3])
    before = shared_log_probs(model, tokens, prompt_length, response_length, 1.0)[0]
    tokens[1, int(prompt_length[1])] = 49 - tokens[1, int(prompt_length[1])]
    after = shared_log_probs(model, tokens, prompt_length, response_length, 1.0)[0]
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[2], before[2])
    assert not torch.equal(after[1], before[1])


@pytest.mark.parametrize("seed", range(20))
def test_rows_of_a_group_stay_together_and_no_micro_batch_is_over_its_budget(seed):
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(12).repeat_interleave(4)
    lengths = torch.randint(1, 60, (48,), generator=generator)
    for share in split_rows(lengths, 2, 2, groups=groups):
        assert share.sizes == [12, 12]
        for part in groups[share.rows].split(share.sizes):
            assert len(part.unique()) == 3
    shares = split_rows(lengths, 2, 2, 150, groups=groups)
    assert sorted(torch.cat([share.rows for share in shares]).tolist()) == list(range(48))
    for share in shares:
        for part in share.rows.split(share.sizes):
            sizes = torch.zeros(12, dtype=torch.int64).index_add(0, groups[part], lengths[part])
            assert int((sizes > 0).sum()) * int(sizes.max()) <= 150


ROUNDED = {"mixed_precision": "bf16", "train_model": TrainModelConfig(gradient_checkpointing=True, lora=LORA)}


@pytest.mark.parametrize(
    ("settings", "tolerance"), [({}, 1e-4), (ROUNDED, 0.1)], ids=["float32", "bf16, LoRA, checkpointing"]
)
def test_a_step_moves_the_weights_as_it_does_without(make_trainer, settings, tolerance):
    tokens, prompt_length, response_length = rows(0, [4, 4])
    column = torch.arange(tokens.shape[1])
    mask = (column >= prompt_length[:, None]) & (column < (prompt_length + response_length)[:, None])
    sampled = torch.where(mask, -2.0, 0.0)
    batch = TensorDict(
        tokens=tokens,
        prompt_length=prompt_length,
        response_length=response_length,
        response_mask=mask,
        inference_log_probs=sampled,
        reference_log_probs=1.1 * sampled,
        advantage=torch.linspace(-1, 1, 8),
        batch_size=[8],
    )
    after, metrics, log_probs = [], [], []
    for shared in (True, False):
        trainer = make_trainer(share_prompts=shared, gradient_accumulation_steps=2, **settings)
        before = weights(trainer)
        found, its = trainer.step(batch, with_log_probs=True)
        after.append(weights(trainer))
        metrics.append(found)
        log_probs.append(its)
    moved = largest_difference(after[0], before)
    assert moved > 1e-2
    assert largest_difference(*after) < tolerance * moved
    assert metrics[0]["train/loss"] == pytest.approx(metrics[1]["train/loss"], rel=tolerance, abs=tolerance)
    assert torch.allclose(*log_probs, atol=tolerance)


SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.mark.parametrize(
    ("config", "shares"),
    [
        (LlamaConfig(**SMALL), True),
        (GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2), True),
        (BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=2), False),  # takes no mask of its own for each token
        (MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=16), False),  # windows
    ],
    ids=lambda value: value.model_type if isinstance(value, PreTrainedConfig) else None,
)
def test_models_that_do_more_than_attend_by_a_mask_are_refused(config, shares):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    if shares:
        check_attends_to_all(config)
        check_shares_prompts(model, "float32")
        return
    with pytest.raises(ConfigError, match=r"use train\.share_prompts=false"):
        check_attends_to_all(config)
        check_shares_prompts(model, "float32")


@pytest.mark.parametrize("kind", [{"layer_types": ["full_attention", "linear_attention"]}, {"window_size": 256}])
def test_layers_that_see_but_a_part_are_named(kind):
    config = LlamaConfig(**SMALL)
    for name, value in kind.items():
        setattr(config, name, value)
    with pytest.raises(ConfigError, match=r"linear_attention|window_size"):
        check_attends_to_all(config)
