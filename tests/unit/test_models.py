import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from grpo.builtin import make_config, make_tokenizer
from grpo.errors import ConfigError
from grpo.models import (
    checkpoint_gradients,
    full_parameters,
    load_model,
    load_tokenizer,
    num_parameters,
    read_config,
)
from grpo.scoring import token_log_probs
from grpo.sources import check_files

from .conftest import CPU, TINY


def test_a_missing_directory_is_a_config_error_that_names_it(tmp_path):
    for name in (str(tmp_path / "nowhere"), "./nowhere", "a/b/c"):
        with pytest.raises(ConfigError, match=rf"model.name \({name}\): there is no such directory"):
            read_config(name)


def test_a_directory_without_a_model_is_a_config_error_in_one_line(tmp_path):
    with pytest.raises(ConfigError, match="is not a model that can be read") as raised:
        read_config(str(tmp_path))
    assert "\n" not in str(raised.value)
    assert str(tmp_path) in str(raised.value)


def test_a_directory_without_weights_or_tokenizer_is_refused(tmp_path, model_path):
    check_files(model_path)
    read_config(model_path).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"must hold \*.safetensors and tokenizer_config.json"):
        check_files(str(tmp_path))


def test_read_config_gives_the_architecture(model_path):
    config = read_config(model_path)
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (16, 2, len(make_tokenizer()))


def test_a_loaded_model_is_in_float32_and_evaluation_mode(tmp_path):
    config = make_config(TINY, make_tokenizer())
    config.attention_dropout = 0.5
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), CPU)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    tokens = torch.tensor([[4, 0, 17, 30]])
    first, second = (token_log_probs(model, tokens, 1, 1.0)[0] for _ in range(2))
    assert torch.equal(first, second)  # no dropout
    assert torch.equal(token_log_probs(model.train(), tokens, 1, 1.0)[0], first) is False


def test_checkpointing_a_model_that_names_no_layers_is_an_error_and_not_a_switch_without_effect(model):
    model._no_split_modules = None
    with pytest.raises(ConfigError, match=r"train_model.gradient_checkpointing \(true\): Qwen2ForCausalLM does not say"):
        checkpoint_gradients(model)


def test_full_parameters_lists_tied_weights_once_under_their_transformers_names(model, model_path):
    listed = dict(full_parameters(model))
    assert len(listed) == len(list(full_parameters(model)))
    assert "model.embed_tokens.weight" in listed
    assert "lm_head.weight" not in listed
    plain = AutoModelForCausalLM.from_pretrained(model_path).state_dict()
    assert listed.keys() == plain.keys() - {"lm_head.weight"}
    for name, tensor in listed.items():
        assert torch.equal(tensor, plain[name])
        assert not tensor.requires_grad


@pytest.mark.parametrize("tied", [True, False])
def test_num_parameters_is_the_real_count_with_tied_ones_once(tied):
    config = make_config(TINY, make_tokenizer())
    config.tie_word_embeddings = tied
    real = {id(p): p.numel() for p in Qwen2ForCausalLM(config).parameters()}
    assert num_parameters(config) == sum(real.values())
    vocabulary = config.vocab_size * config.hidden_size
    # Attention: q and o are 16 x 16, k and v 16 x 8, with biases on q, k, v; three matrices of 16 x 32; two norms.
    layer = 2 * 256 + 2 * 128 + 16 + 8 + 8 + 3 * 512 + 2 * 16
    assert num_parameters(config) == vocabulary * (1 if tied else 2) + 2 * layer + 16


def test_num_parameters_of_a_large_model_allocates_nothing():
    config = Qwen2Config(hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, intermediate_size=29568)
    assert num_parameters(config) > 50e9


@pytest.mark.parametrize("text", [None, "", "no JSON"])
def test_a_tokenizer_that_cannot_be_read_is_said_in_one_line(tmp_path, model_path, text):
    copy = tmp_path / "copy"
    shutil.copytree(model_path, copy)
    (copy / "tokenizer.json").unlink()
    if text is not None:
        (copy / "tokenizer.json").write_text(text)
    with pytest.raises(ConfigError, match=r"^model.name \(.*/copy\) has no tokenizer that can be read: ") as raised:
        load_tokenizer(str(copy))
    assert "\n" not in str(raised.value)


def test_the_tokenizer_is_loaded_with_its_template(model_path):
    tokenizer = load_tokenizer(model_path)
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()
    assert tokenizer.chat_template == make_tokenizer().chat_template
