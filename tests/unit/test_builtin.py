import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace

import pytest
import torch
from filelock import FileLock
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

from grpo import builtin
from grpo.builtin import demonstration, make, make_config, make_tokenizer, resolve, supervise
from grpo.config_sections import EnvConfig
from grpo.errors import ConfigError
from grpo.preemption import Preempted, listen
from grpo.tasks import Problem, encode, load
from grpo.tasks.arithmetic import question, split_expressions, value

from .conftest import TINY, file_names

QUICK = builtin.Recipe(steps=2, batch_size=4, hidden_size=16, layers=1, heads=2, kv_heads=1, feed_forward=32)


def some_expressions(count: int) -> list:
    everything = [expression for split in split_expressions().values() for expression in split]
    return random.Random(0).sample(everything, count)


def test_the_tokenizer_reloads_as_itself_and_loses_nothing_of_any_text_there_is(tmp_path):
    made = make_tokenizer()
    made.save_pretrained(tmp_path)
    make_config(TINY, made).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    task = load(EnvConfig(dataset="arithmetic"))
    for expression in some_expressions(200):
        prompt = encode(Problem(question(expression), ""), task, made)
        assert encode(Problem(question(expression), ""), task, loaded) == prompt
        assert made.decode(prompt) == f"<|user|>{question(expression)}<|end|><|assistant|>"
        for right in (True, False):
            text = demonstration(expression, right)
            ids = made(text, add_special_tokens=False)["input_ids"]
            assert loaded(text, add_special_tokens=False)["input_ids"] == ids
            assert made.decode(ids) == loaded.decode(ids, skip_special_tokens=True) == text
    assert (loaded.eos_token, loaded.pad_token) == ("<|end|>", "<|pad|>")


def test_there_is_one_token_a_character_and_one_an_answer_tag():
    tokenizer = make_tokenizer()
    assert len(tokenizer.tokenize("3*4=12;")) == 7
    assert tokenizer.tokenize("<answer>-8</answer>") == ["<answer>", "-", "8", "</answer>"]
    assert None not in tokenizer("What is (3 * 4) - 9?")["input_ids"]


def test_every_prompt_and_demonstration_fits_the_shipped_limits():
    # config/grpo_arithmetic.yaml: 32 prompt tokens, 24 response tokens.
    tokenizer, task = make_tokenizer(), load(EnvConfig(dataset="arithmetic"))
    for expression in some_expressions(300):
        assert len(encode(Problem(question(expression), ""), task, tokenizer)) <= 32
        for right in (True, False):
            assert len(tokenizer(demonstration(expression, right))["input_ids"]) + 1 <= 24


@pytest.mark.parametrize(
    ("expression", "right", "expected"),
    [
        ((3, "+", 4, "*", 2), True, "3+4=7;7*2=14<answer>14</answer>"),
        ((3, "+", 4, "*", 2), False, "3*4=12;12+2=14<answer>14</answer>"),
        ((1, "-", 5, "*", 3), True, "1-5=-4;-4*3=-12<answer>-12</answer>"),
        ((1, "-", 5, "*", 3), False, "1*5=5;5-3=2<answer>2</answer>"),
        ((9, "+", 1, "+", 2), False, "9+1=10;10+2=12<answer>12</answer>"),
    ],
)
def test_demonstrations_of_both_kinds(expression, right, expected):
    assert demonstration(expression, right) == expected


def test_every_demonstration_computes_correctly_and_right_ones_reach_the_value():
    step = re.compile(r"(-?\d+)([-+*])(\d+)=(-?\d+)")
    for expression in split_expressions()["warm_up"]:
        a, first, b, second, c = expression
        for right in (True, False):
            text = demonstration(expression, right)
            scratchpad, answer = re.fullmatch(r"(.*)<answer>(-?\d+)</answer>", text).groups()
            (x, op1, y, between), (carried, op2, z, result) = (step.fullmatch(s).groups() for s in scratchpad.split(";"))
            assert (int(x), int(y), int(z)) == (a, b, c)
            assert (op1, op2) == ((first, second) if right else (second, first))
            assert eval(f"{x}{op1}{y}") == int(between)
            assert carried == between
            assert eval(f"({carried}){op2}{z}") == int(result)
            assert answer == result
            if right:
                assert int(answer) == value(expression)


def test_the_task_grades_a_right_demonstration_as_correct():
    task = load(EnvConfig(dataset="arithmetic"))
    right = [task.grade(Problem("", str(value(e))), demonstration(e, True)) for e in some_expressions(100)]
    assert all(grade.correct and grade.reward == 1.0 for grade in right)
    swapped = [task.grade(Problem("", str(value(e))), demonstration(e, False)).correct for e in some_expressions(300)]
    assert 0.1 < sum(swapped) / 300 < 0.6  # the swapped procedure is wrong often enough for GRPO to have work


def demonstration_loss(model, expressions: list) -> float:
    tokenizer = make_tokenizer()
    losses = []
    for expression in expressions:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question(expression)}], add_generation_prompt=True, return_dict=False
        )
        response = tokenizer(demonstration(expression, False))["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        losses.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor(response))))
    return sum(losses) / len(losses)


def test_a_short_warm_up_lowers_the_loss_of_expressions_it_did_not_see():
    torch.manual_seed(0)
    tokenizer, expressions = make_tokenizer(), some_expressions(220)
    recipe = builtin.Recipe(steps=60, batch_size=16, hidden_size=32, layers=1, heads=2, kv_heads=1, feed_forward=64)
    model = Qwen2ForCausalLM(make_config(recipe, tokenizer)).float()
    before = demonstration_loss(model, expressions[:20])
    supervise(model, tokenizer, expressions[20:], recipe, log=lambda line: None)
    after = demonstration_loss(model, expressions[:20])
    assert before > 3.5  # near ln(53): nothing is known yet
    assert after < 0.7 * before
    assert not model.training


def test_only_demonstrations_and_their_end_token_are_trained_on(monkeypatch):
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(make_config(QUICK, tokenizer)).float()
    seen = []
    original = torch.nn.functional.cross_entropy

    def spy(logits, labels, **kwargs):
        seen.append(labels.clone())
        return original(logits, labels, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", spy)
    supervise(model, tokenizer, [(3, "+", 4, "*", 2)], QUICK, log=lambda line: None)
    rows = {tuple(row[row != -100].tolist()) for labels in seen for row in labels.view(QUICK.batch_size, -1)}
    texts = {tokenizer.decode(row) for row in rows}
    assert texts <= {f"{demonstration((3, '+', 4, '*', 2), right)}<|end|>" for right in (True, False)}
    assert texts


def test_make_writes_a_model_that_transformers_reads(tmp_path):
    make(tmp_path / "a" / "model", QUICK, log=lambda line: None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a" / "model")
    assert model.config.vocab_size == len(tokenizer)
    assert AutoConfig.from_pretrained(tmp_path / "a" / "model").eos_token_id == tokenizer.eos_token_id
    assert file_names(tmp_path / "a") == ["model"]


def test_the_same_recipe_makes_the_same_model_and_leaves_the_random_state_alone(tmp_path):
    models = []
    for name in ("first", "second"):
        torch.manual_seed(len(name))
        state = torch.get_rng_state()
        make(tmp_path / name, QUICK, log=lambda line: None)
        assert torch.equal(torch.get_rng_state(), state)
        models.append(AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_warm_up_that_fails_leaves_nothing(tmp_path, monkeypatch, error):
    def fail(*arguments) -> None:
        raise error("half way")

    monkeypatch.setattr(builtin, "supervise", fail)
    with pytest.raises(error):
        make(tmp_path / "model", QUICK)
    assert file_names(tmp_path) == []


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch, error):
    def fail(self, path, **kwargs) -> None:
        assert list(path.iterdir())  # the model is there already
        raise error("disk full")

    monkeypatch.setattr(builtin.Qwen2Tokenizer, "save_pretrained", fail)
    with pytest.raises(error):
        make(tmp_path / "model", QUICK, log=lambda line: None)
    assert file_names(tmp_path) == []


def test_resolve_passes_other_names_through_and_refuses_unknown_builtin_ones(tmp_path):
    assert resolve("Qwen/Qwen2.5-3B-Instruct", str(tmp_path)) == "Qwen/Qwen2.5-3B-Instruct"
    with pytest.raises(ConfigError, match=r"model.name \(builtin/algebra\): the only built-in model is builtin/arithmetic"):
        resolve("builtin/algebra", str(tmp_path))
    assert file_names(tmp_path) == []


def test_resolve_makes_the_model_once_and_another_recipe_has_another_place(tmp_path, monkeypatch):
    made = []

    def record(path, recipe, log) -> None:
        made.append(recipe)
        path.mkdir()

    monkeypatch.setattr(builtin, "make", record)
    first = resolve("builtin/arithmetic", str(tmp_path), log=lambda line: None)
    assert resolve("builtin/arithmetic", str(tmp_path), log=lambda line: None) == first
    assert made == [builtin.Recipe()]
    monkeypatch.setattr(builtin, "Recipe", lambda: QUICK)
    assert resolve("builtin/arithmetic", str(tmp_path), log=lambda line: None) != first
    assert made[1:] == [QUICK]


LONG = replace(QUICK, steps=10**6)


@pytest.fixture
def long_warm_up(monkeypatch):
    monkeypatch.setattr(builtin, "Recipe", lambda: LONG)
    monkeypatch.setattr(builtin, "TELL_S", 0.2)


def interrupt(number: int, lines: list[str], count: int) -> threading.Thread:
    """Send this process a signal once `count` of `lines` were said."""

    def send() -> None:
        deadline = time.monotonic() + 60
        while len(lines) < count and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, Preempted), (signal.SIGINT, KeyboardInterrupt)])
def test_a_warm_up_says_how_far_it_is_and_ends_at_once_when_it_is_asked_to(tmp_path, long_warm_up, number, error):
    lines: list[str] = []
    thread = interrupt(number, lines, count=3)
    with pytest.raises(error), listen(60, None):
        resolve("builtin/arithmetic", str(tmp_path), log=lines.append)
    thread.join()
    assert 3 <= len(lines) < 10
    assert lines[0].startswith("Making builtin/arithmetic, in about a minute")
    steps = [int(re.match(r"  warm-up step (\d+)/1000000  loss \d\.\d{3}  \d+ s$", line)[1]) for line in lines[1:]]
    assert steps == sorted(set(steps))
    assert [name for name in file_names(tmp_path) if not name.endswith(".lock")] == []
    assert not FileLock(next(tmp_path.glob("*.lock"))).is_locked


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, Preempted), (signal.SIGINT, KeyboardInterrupt)])
def test_one_that_waits_for_another_process_says_so_and_ends_at_once_too(tmp_path, long_warm_up, monkeypatch, number, error):
    monkeypatch.setattr(builtin, "LOOK_S", 0.1)
    lock = (
        "import sys, filelock; held = filelock.FileLock(sys.argv[1]); held.acquire(); print(1, flush=True); sys.stdin.read()"
    )
    monkeypatch.setattr(builtin, "make", lambda *_: pytest.fail("another process is at it"))
    digest = hashlib.sha256(repr(sorted(asdict(LONG).items())).encode()).hexdigest()[:12]
    path = tmp_path / f"arithmetic-{digest}.lock"
    command = [sys.executable, "-c", lock, path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        lines: list[str] = []
        thread = interrupt(number, lines, count=2)
        with pytest.raises(error), listen(60, None):
            resolve("builtin/arithmetic", str(tmp_path), log=lines.append)
        thread.join()
        other.stdin.close()
    assert 2 <= len(lines) < 10
    for line in lines:
        assert re.fullmatch(
            rf"Waiting for another process to make builtin/arithmetic, \d+ s so far \(it holds {path}\)", line
        )


def test_what_it_says_is_no_part_of_a_tools_answer(capsys):
    builtin.tell("Making it")
    assert capsys.readouterr() == ("", "Making it\n")
