"""Adapters on a model without ranks or shards; tests/unit/test_trainer.py trains them."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from grpo.builtin import make_config, make_tokenizer
from grpo.config_sections import LoraConfig
from grpo.errors import ConfigError
from grpo.models import (
    adapters_off,
    add_lora,
    full_parameters,
    load_model,
    lora_layers,
    num_adapter_parameters,
    set_lora_dropout,
)
from grpo.scoring import score, token_log_probs

from .conftest import CPU, TINY, ragged_rollouts, tiny_model

TOKENS = torch.tensor([[4, 0, 17, 30, 0, 51], [7, 7, 2, 0, 0, 1]])
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """Its linear layers are Conv1D, whose weights are stored transposed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = GPT2Config(vocab_size=52, n_positions=64, n_embd=16, n_layer=2, n_head=2, use_cache=False)
        model = GPT2LMHeadModel(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def adapted(model: PreTrainedModel, seed: int = 0, **lora):
    """With adapters that change the model, as training does."""
    model = add_lora(model, LoraConfig(r=4, alpha=6.0, **lora), seed)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            weight = layer.lora_B["default"].weight
            weight.copy_(0.5 * torch.randn(weight.shape, generator=generator))
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("make", [tiny_model, gpt2])
def test_adapters_start_as_the_model_itself_and_can_be_turned_off_when_trained(make):
    plain = logits(make())
    assert torch.equal(logits(add_lora(make(), LoraConfig(), 0)), plain)
    model = adapted(make())
    assert (logits(model) - plain).abs().max() > 0.1
    with adapters_off(model):
        assert torch.equal(logits(model), plain)
    assert (logits(model) - plain).abs().max() > 0.1


@pytest.mark.parametrize("make", [tiny_model, gpt2])
def test_full_parameters_are_the_merged_weights_under_the_models_own_names(make):
    model, merged = adapted(make()), make()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    listed = dict(full_parameters(model))
    assert list(listed) == [name for name, _ in merged.named_parameters()]
    changed = {name for name, parameter in merged.named_parameters() if not torch.equal(parameter, listed[name])}
    assert changed == {f"{n}.weight".removeprefix("base_model.model.") for n, _ in lora_layers(model)}
    merged.load_state_dict(listed, strict=False)
    assert torch.allclose(logits(merged), logits(model), atol=1e-5)
    for name, parameter in model.named_parameters():  # nothing was merged in place
        assert torch.equal(parameter, before[name])
    assert all(torch.equal(tensor, listed[name]) for name, tensor in full_parameters(model))


def test_log_probs_and_scores_of_an_adapted_model_are_those_of_the_merged_one():
    model, merged = adapted(tiny_model()), tiny_model()
    merged.load_state_dict(dict(full_parameters(model)), strict=False)
    for ours, expected in zip(token_log_probs(model, TOKENS, 2, 0.7), token_log_probs(merged, TOKENS, 2, 0.7), strict=True):
        assert torch.allclose(ours, expected, atol=1e-5)
    batch = ragged_rollouts()
    rows = batch["tokens"], batch["prompt_length"], batch["response_mask"], 0.7
    assert torch.allclose(score(model, *rows), score(merged, *rows), atol=1e-5)
    with adapters_off(model):
        assert torch.equal(score(model, *rows), score(tiny_model(), *rows))


def test_the_same_seed_makes_the_same_adapters_and_leaves_other_randomness_alone():
    def adapters(seed: int) -> list[torch.Tensor]:
        return [p for p in add_lora(tiny_model(), LoraConfig(), seed).parameters() if p.requires_grad]

    torch.manual_seed(5)
    first = adapters(3)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)
    assert all(torch.equal(a, b) for a, b in zip(first, adapters(3), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, adapters(4), strict=True))


@pytest.mark.parametrize(
    ("targets", "names"),
    [("all-linear", TARGETS), ("q_proj, v_proj", ["q_proj", "v_proj"]), ("mlp.up_proj", ["up_proj"])],
)
def test_only_the_targets_adapters_train(targets, names):
    model = add_lora(tiny_model(), LoraConfig(r=3, target_modules=targets), 0)
    assert sorted(name.split(".")[-1] for name, _ in lora_layers(model)) == sorted(names * 2)
    training = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(training) == 2 * 2 * len(names)
    assert all(".lora_A." in name or ".lora_B." in name for name in training)


@pytest.mark.parametrize("targets", ["query", "q_proj,query", "lm_head", "embed_tokens", "proj"])
def test_a_target_that_is_no_linear_layer_inside_the_model_is_refused(targets):
    with pytest.raises(ConfigError) as raised:
        add_lora(tiny_model(), LoraConfig(target_modules=targets), 0)
    name = targets.split(",")[-1]
    expected = f"train_model.lora.target_modules ({name}) is no linear layer of the model, which has {', '.join(TARGETS)}"
    assert str(raised.value) == expected


def test_an_untied_output_layer_has_no_adapter(tmp_path):
    config = make_config(TINY, make_tokenizer())
    config.tie_word_embeddings = False
    type(tiny_model())(config).save_pretrained(tmp_path)
    model = add_lora(load_model(str(tmp_path), CPU), LoraConfig(), 0)
    assert "lm_head" not in {name.split(".")[-1] for name, _ in lora_layers(model)}
    assert "lm_head.weight" in dict(full_parameters(model))


def test_dropout_is_only_the_adapters_and_only_while_it_is_on():
    model = adapted(tiny_model(), dropout=0.5)
    still = logits(model)
    assert torch.equal(logits(model), still)
    set_lora_dropout(model, True)
    assert not torch.equal(logits(model), logits(model))
    on = {name for name, module in model.named_modules() if module.training}
    assert on and all(".lora_dropout" in name for name in on)
    with adapters_off(model):
        assert torch.equal(logits(model), logits(tiny_model()))
    set_lora_dropout(model, False)
    assert torch.equal(logits(model), still)


@pytest.mark.parametrize("targets", ["all-linear", "q_proj,down_proj"])
def test_the_number_of_adapter_parameters_is_counted_without_a_model(targets):
    lora = LoraConfig(r=5, target_modules=targets)
    real = sum(p.numel() for p in add_lora(tiny_model(), lora, 0).parameters() if p.requires_grad)
    assert num_adapter_parameters(make_config(TINY, make_tokenizer()), lora) == real > 0
