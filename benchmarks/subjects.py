"""What is measured: the two models, and the configuration that each is trained with.

    builtin     the built-in 0.4M-parameter model, config/grpo_arithmetic.yaml as shipped: 64 prompts x 8 responses of at
                most 24 tokens. Arithmetic is cheap here, so what surrounds it shows.
    random50m   a Qwen2 of 50M random parameters: 16 prompts x 8 responses of exactly 256 tokens. Arithmetic is most of it.

Evaluations are off. Everything else is as a user's run has it.
"""

from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from grpo import builtin
from grpo.config import RunConfig
from grpo.launch import compose

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
NAMES = ("builtin", "random50m")
VOCABULARY = 16_384


def configuration(subject: str, steps: int, *overrides: str) -> RunConfig:
    """The run of `subject` that lasts `steps` collections."""
    chosen = ["train.eval_frequency=0", "train.checkpoint_frequency=0", "logging.progress=false", f"model.cache_dir={CACHE}"]
    responses = 512
    if subject == "random50m":
        responses = 128
        chosen += [
            f"model.name={random_model()}",
            "env.num_envs=16",
            "ray.timeout_s=3600",
            f"env.reward_fn={ROOT}/benchmarks/hashed_rewards.py:hashed",
            "inference_model.max_tokens=256",
            f"train.dialog_turns_per_batch={responses}",
            f"train.optim_batch_size={responses}",
            "train.gradient_accumulation_steps=8",
            "train.share_prompts=false",  # responses are a dozen times as long
        ]
    return compose("grpo_arithmetic", [*chosen, f"train.total_dialog_turns={steps * responses}", *overrides])


def model_path(config: RunConfig) -> str:
    return builtin.resolve(config.model.name, config.model.cache_dir)


def random_model(name: str = "random50m", hidden: int = 512, layers: int = 12, words: int = VOCABULARY) -> Path:
    """The directory of a Qwen2 of random parameters, 50M of them by default; made on first use.

    Its end-of-sequence id is one past the vocabulary, so that no response ends before its token budget. The characters of
    the built-in tokenizer are its first tokens; the rest are made-up words that random sampling writes.
    """
    path = CACHE / name
    if path.is_dir():
        return path
    base = builtin.make_tokenizer()
    vocabulary = dict(sorted(base.get_vocab().items(), key=lambda item: item[1]))
    vocabulary |= {f"w{i}": i for i in range(len(vocabulary), words)}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[],
        unk_token=None,
        eos_token="<|never|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|end|>", "<|user|>", "<|assistant|>"],
    )
    assert tokenizer.eos_token_id == words, tokenizer.eos_token_id
    tokenizer.chat_template = builtin.CHAT_TEMPLATE
    config = Qwen2Config(
        vocab_size=words,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128 or 1,
        intermediate_size=hidden * 27 // 8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=None,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config).float()
    builtin.save(model, tokenizer, path)
    return path
