"""The built-in model: a tiny Qwen2 with a character tokenizer, made on the spot by a supervised warm-up.

What it is for: the whole pipeline can run, learn and be tested where no model can be downloaded. The warm-up's
demonstrations are of mixed quality: every one computes correctly, but nine in ten take the two operators of the
expression in the wrong order. The model so learns to write and to compute, and mostly the wrong procedure; GRPO, from
rewards alone, makes it choose the right one. It shows that the pipeline optimises what the reward asks for; it says
nothing about how large language models reason.
"""

import hashlib
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from tokenizers import AddedToken
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from grpo.preemption import at_once
from grpo.sources import BUILTIN, check_model
from grpo.tasks.arithmetic import OPERATIONS, Expression, question, split_expressions

TELL_S, LOOK_S = 10.0, 0.5  # between two lines on how far it is; before the first one on a wait

Log = Callable[[str], None]


def tell(line: str) -> None:
    """Say at once how far it is; standard output is a tool's answer."""
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Recipe:
    """Everything the made model depends on; its hash names the cache entry."""

    seed: int = 0
    steps: int = 600
    batch_size: int = 64
    lr: float = 3e-3
    right_share: float = 0.1  # of the demonstrations that take the operators in the right order
    hidden_size: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    feed_forward: int = 384
    version: int = 1  # raise it when the code below changes what is made


# A system message has no place in the template: the model knows one task only.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer() -> Qwen2Tokenizer:
    """One token a character, and one each for the answer tags.

    It is the architecture's own tokenizer class without merges: AutoTokenizer loads any other as that one.
    """
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
    characters = "0123456789+-*()=;?.,Wabcdefghijklmnopqrstuvwxyz" + "Ġ"  # byte-level BPE writes a space as Ġ
    tokenizer = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate([*special, *characters])},
        merges=[],
        unk_token=None,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=special[2:],
    )
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in ("<answer>", "</answer>")])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_config(recipe: Recipe, tokenizer: Qwen2Tokenizer) -> Qwen2Config:
    """The architecture. Its vocabulary is the tokenizer's: a padding row could be sampled."""
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        intermediate_size=recipe.feed_forward,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )


def demonstration(expression: Expression, right: bool) -> str:
    """The scratchpad and answer that work out `expression`, or the same with its two operators swapped."""
    a, first, b, second, c = expression
    if not right:
        first, second = second, first
    between = OPERATIONS[first](a, b)
    result = OPERATIONS[second](between, c)
    return f"{a}{first}{b}={between};{between}{second}{c}={result}<answer>{result}</answer>"


def supervise(
    model: Qwen2ForCausalLM,
    tokenizer: Qwen2Tokenizer,
    expressions: list[Expression],
    recipe: Recipe,
    log: Log = tell,
) -> None:
    """Train `model` in place on demonstrations drawn anew for each batch."""
    rng = random.Random(recipe.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=0.0, betas=(0.9, 0.95))

    def encode(expression: Expression, right: bool) -> tuple[list[int], int]:
        messages = [{"role": "user", "content": question(expression)}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        response = tokenizer(demonstration(expression, right), add_special_tokens=False)["input_ids"]
        return prompt + response + [tokenizer.eos_token_id], len(prompt)

    encoded = {(e, right): encode(e, right) for e in expressions for right in (True, False)}
    order: list[Expression] = []
    start = told = time.perf_counter()
    model.train()
    for step in range(1, recipe.steps + 1):
        while len(order) < recipe.batch_size:
            order += rng.sample(expressions, len(expressions))
        batch, order = order[: recipe.batch_size], order[recipe.batch_size :]
        rows = [encoded[e, rng.random() < recipe.right_share] for e in batch]
        width = max(len(tokens) for tokens, _ in rows)
        tokens = torch.full((len(rows), width), tokenizer.pad_token_id)
        labels = torch.full((len(rows), width), -100)
        for i, (row, prompt_length) in enumerate(rows):
            tokens[i, : len(row)] = torch.tensor(row)
            labels[i, prompt_length : len(row)] = tokens[i, prompt_length : len(row)]
        logits = model(input_ids=tokens).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * min(1, step / 20) * max(0.02, 1 - step / recipe.steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        now = time.perf_counter()
        if now - told >= TELL_S or step == recipe.steps:
            told = now
            log(f"  warm-up step {step}/{recipe.steps}  loss {loss.item():.3f}  {now - start:.0f} s")
    model.eval()


def make(path: Path, recipe: Recipe, log: Log = tell) -> None:
    """Write the warmed-up model and its tokenizer to `path`, whole or not at all."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        tokenizer = make_tokenizer()
        model = Qwen2ForCausalLM(make_config(recipe, tokenizer)).float()
        supervise(model, tokenizer, split_expressions()["warm_up"], recipe, log)
    save(model, tokenizer, path)


def save(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, path: Path) -> None:
    """Write model and tokenizer in transformers format, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{path.name}.", dir=path.parent))
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        os.rename(unfinished, path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


@contextmanager
def locked(path: Path, log: Log) -> Iterator[None]:
    """Have the making of `path` for this process alone; what waits for another one says so."""
    lock, start, wait_s = FileLock(f"{path}.lock"), time.perf_counter(), LOOK_S
    while True:
        try:
            lock.acquire(timeout=wait_s)
            break
        except Timeout:
            waited_s, wait_s = time.perf_counter() - start, TELL_S
            log(f"Waiting for another process to make {BUILTIN}, {waited_s:.0f} s so far (it holds {path}.lock)")
    try:
        yield
    finally:
        lock.release()


def resolve(name: str, cache_dir: str, log: Log = tell) -> str:
    """The path or hub name that transformers loads for `model.name`; makes a built-in model on its first use.

    Raises Preempted as soon as a run is asked to end meanwhile.
    """
    if not name.startswith("builtin/"):
        return name
    check_model(name)
    recipe = Recipe()
    digest = hashlib.sha256(repr(sorted(asdict(recipe).items())).encode()).hexdigest()[:12]
    path = Path(cache_dir).absolute() / f"arithmetic-{digest}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with at_once(), locked(path, log):
        if not path.is_dir():
            log(f"Making {BUILTIN}, in about a minute: a warm-up on demonstrations of mixed quality, kept in {cache_dir}")
            make(path, recipe, log)
    return str(path)
