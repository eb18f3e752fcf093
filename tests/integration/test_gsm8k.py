"""A model in hub format from a local directory, on a task whose data is a local file."""

import json

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from grpo.builtin import make_tokenizer

from .conftest import same_weights

# Longer than a block of vLLM's cache, so that prompts share cached keys and values.
SHARED = "once upon a time in a very small town by the sea"


def test_a_local_model_trains_on_local_gsm8k_data(run_sync, tmp_path):
    """The model is random, so nothing is learned; every part of the way has to work with a model that is not built in."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    lines = [
        {"question": f"{SHARED} tom has {n} plums and eats one. how many are left?", "answer": f"#### {n - 1}"}
        for n in range(2, 42)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    (tmp_path / "rewards.py").write_text(
        "def length(prompts, responses, answers):\n    return [len(r) / 16 for r in responses]\n"
    )
    overrides = (
        "env.dataset=gsm8k",
        f"env.data={tmp_path}/data.jsonl",
        f"env.reward_fn={tmp_path}/rewards.py:length",
        "env.validation_size=8",
        "env.test_size=8",
        "env.max_prompt_length=120",
        f"model.name={tmp_path}/model",
        "inference_model.max_tokens=16",
    )
    run = run_sync(*overrides)
    assert run.summary["eval"]["after"]["n"] == 8
    held_out = {line["question"] for line in lines[-16:]}
    assert not held_out & {line["prompt"] for line in run.rollouts}
    assert all(line["terms"] == {"reward_fn": len(line["response"]) / 16} for line in run.rollouts)
    largest = max(abs(a - b) for r in run.rollouts for a, b in zip(r["inference_log_probs"], r["log_probs"], strict=True))
    assert largest < 1e-5
    assert run.metrics[2]["train/kl_to_reference"] > 0
    # An evaluation between collections leaves other prompts in the engine's cache; training must not notice.
    assert same_weights(run, run_sync(*overrides, "train.eval_frequency=1"))
