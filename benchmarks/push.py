"""How fast is a proven weight push, as a share of what copying memory reaches?

    python -m benchmarks.push      # writes benchmarks/results/push.json

A training rank and a vLLM engine as a run has them, with random models of 4 MB, 200 MB and 1 GB in float32. A push is all
that `Run.push_weights` does: gather, checksum, send, load, pack for the engine's kernels, tell what is held, verify. Beside
it, in the same process tree and in turns: torch's copy of as many bytes on one thread.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.report import save, spread, table
from benchmarks.subjects import CACHE
from grpo import builtin
from grpo.launch import compose
from grpo_utils import build

WARM_UP, REPEATS = 4, 7
SIZES = {
    "4 MB": {"hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 384, "vocab_size": 512},
    "200 MB": {"hidden_size": 512, "num_hidden_layers": 12, "intermediate_size": 1728, "vocab_size": 16_384},
    "1 GB": {"hidden_size": 1024, "num_hidden_layers": 16, "intermediate_size": 4096, "vocab_size": 16_384},
}


def random_model(size: str) -> Path:
    """A Qwen2 of that many bytes in float32, made on first use."""
    path = CACHE / f"random-{size.replace(' ', '')}"
    if not (path / "tokenizer_config.json").is_file():
        heads = SIZES[size]["hidden_size"] // 64
        model = Qwen2ForCausalLM(
            Qwen2Config(
                **SIZES[size],
                num_attention_heads=heads,
                num_key_value_heads=heads // 2,
                max_position_embeddings=512,
                tie_word_embeddings=True,
            )
        )
        model.save_pretrained(path)
        builtin.make_tokenizer().save_pretrained(path)
    return path


def seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(size: str) -> tuple[dict, object]:
    """Pushes and copies of one model, in turns."""
    model = random_model(size)
    config = compose(
        "grpo_arithmetic", [f"model.name={model}", "train.kl_to_ref_coeff=0", "env.num_envs=1", "logging.progress=false"]
    )
    with tempfile.TemporaryDirectory() as folder, build(config, Path(folder)) as run:
        num_bytes = sum(4 * parameter.numel() for parameter in Qwen2ForCausalLM.from_pretrained(model).parameters())
        source, target = (torch.ones(num_bytes, dtype=torch.uint8) for _ in range(2))
        torch.set_num_threads(1)
        pushes, copies = [], []
        for version in range(1, 1 + WARM_UP + REPEATS):
            pushes.append(seconds(lambda version=version: run.push(version)))
            copies.append(seconds(lambda: target.copy_(source)))
        pushes, copies = pushes[WARM_UP:], copies[WARM_UP:]
    push, copy = spread(pushes), spread(copies)
    return {
        "bytes": num_bytes,
        "push_s": push,
        "memcpy_s": copy,
        "push_bytes_per_s": num_bytes / push["median"],
        "memcpy_bytes_per_s": num_bytes / copy["median"],
        "share_of_memcpy": copy["median"] / push["median"],
    }, config


def main() -> None:
    results = {}
    for size in SIZES:
        results[size], config = measure(size)
    save("push", config, {"sizes": results})
    table(
        ["model", "push s", "memcpy s", "push GB/s", "share of memcpy"],
        [
            [size, r["push_s"]["median"], r["memcpy_s"]["median"], r["push_bytes_per_s"] / 1e9, r["share_of_memcpy"]]
            for size, r in results.items()
        ],
    )


if __name__ == "__main__":
    main()
