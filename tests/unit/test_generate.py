"""Asking a model: what is asked of which one, what comes back, and what is refused."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from grpo import generate, tasks, tool
from grpo.config import RunConfig
from grpo.config_sections import EnvConfig, InferenceModelConfig, ModelConfig, TrainConfig
from grpo.errors import ConfigError, DataError
from grpo.evaluate import evaluate
from grpo.inference import Sampling
from grpo.launch import compose
from grpo.models import load_tokenizer
from grpo.offline_config import OfflineConfig
from grpo.resume import write_config
from grpo.rollout import Completions
from grpo.standalone import Part
from grpo.tasks.gsm8k import STYLES

from .conftest import DirectGrading

ENV = EnvConfig(dataset="arithmetic", max_prompt_length=32)


class Parrot:
    """An engine that answers every prompt with the same text."""

    def __init__(self, tokenizer, text: str, stopped: bool = True) -> None:
        self.tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        self.stopped, self.asked, self.seeds = stopped, [], []

    def sample(self, prompts: list[list[int]], part: Part) -> Completions:
        self.asked += prompts
        self.seeds.append(part.seed)
        n = len(prompts)
        return Completions(
            request_id=np.arange(n),
            length=np.full(n, len(self.tokens)),
            stopped=np.full(n, self.stopped),
            tokens=np.array(self.tokens * n),
            log_probs=np.zeros(n * len(self.tokens), dtype=np.float32),
            versions=np.zeros(n * len(self.tokens), dtype=np.int32),
        )


def asker(model_path: str, text: str, stopped: bool = True, env: EnvConfig = ENV) -> generate.Asker:
    tokenizer, task = load_tokenizer(model_path), tasks.load(env)
    part = Part(Sampling(1, 24, 0.0), 7)
    return generate.Asker(Parrot(tokenizer, text, stopped), tokenizer, task, tasks.grader(env), part, env.max_prompt_length)


def write_run(run_dir: Path, config: RunConfig | OfflineConfig) -> Path:
    for name in ("model", "checkpoints"):
        (run_dir / name).mkdir(parents=True)
    write_config(config, run_dir)
    return run_dir


def test_a_response_comes_with_the_answer_that_the_task_reads_in_it(model_path):
    asking = asker(model_path, "3+4=7<answer>7</answer>")
    prompt = asking.encode("What is (1 + 2) + 4?")
    assert prompt == tasks.encode(tasks.Problem("What is (1 + 2) + 4?", ""), asking.task, asking.tokenizer)
    (response,) = asking.ask([prompt])
    assert response == generate.Response("3+4=7<answer>7</answer>", "7", True)
    assert response.shown() == "3+4=7<answer>7</answer>\nAnswer: 7\n"
    (response,) = asker(model_path, "3+4", stopped=False).ask([prompt])
    assert response.shown() == "3+4\n(cut at inference_model.max_tokens)\nAnswer: none that can be read\n"


def test_a_run_is_asked_in_its_own_style(model_path):
    env = EnvConfig(dataset="arithmetic", system_prompt="1+1", few_shot=1, max_prompt_length=200)
    asking = asker(model_path, "7", env=env)
    plain = asker(model_path, "7")
    assert len(asking.encode("2")) > len(plain.encode("2"))
    assert asking.task.system_prompt == "1+1" and len(asking.task.examples) == 1


def no_data(monkeypatch) -> None:
    def read(*arguments: object) -> None:
        raise AssertionError("data was read")

    monkeypatch.setattr("grpo.tasks.data.read_hub", read)
    monkeypatch.setattr("grpo.tasks.ifeval.read_hub", read)


def test_a_model_is_asked_without_the_data_of_its_task(model_path, monkeypatch):
    no_data(monkeypatch)
    monkeypatch.setattr("grpo.standalone.started", lambda *arguments: nullcontext("the engine"))
    lengths = ["env.max_prompt_length=32", "inference_model.max_tokens=24", "device=cpu"]
    config = compose("grpo_gsm8k", ["env.style=think", *lengths])
    with generate.asker(config, model_path, 0.0) as asking:
        assert (asking.task.system_prompt, asking.task.examples) == (STYLES["think"], [])
    config.env.few_shot = 1  # which is shown
    with pytest.raises(AssertionError, match="data was read"), generate.asker(config, model_path, 0.0):
        pass


def test_prompts_of_ones_own_are_evaluated_without_the_data_of_the_task(model_path, tmp_path, monkeypatch):
    no_data(monkeypatch)
    asked = []

    def ask(config, models, questions, task, *rest) -> None:
        asked.append((task.system_prompt, [question.problem.question for question in questions]))
        raise KeyboardInterrupt

    monkeypatch.setattr("grpo.measure.ask", ask)
    monkeypatch.setattr("grpo.evaluate.grading_pool", nullcontext)
    (tmp_path / "mine.jsonl").write_text('{"prompt": "What is 1?"}\n')
    typed = [f"model={model_path}", f"prompts={tmp_path}/mine.jsonl", "env.dataset=gsm8k", f"out={tmp_path}/out.json"]
    with pytest.raises(KeyboardInterrupt):
        evaluate([*typed, "env.style=think"])
    assert asked == [(STYLES["think"], ["What is 1?"])]
    with pytest.raises(AssertionError, match="data was read"):
        evaluate([item for item in typed if not item.startswith("prompts=")])


def test_a_prompt_longer_than_the_engine_was_made_for_is_refused(model_path):
    asking = asker(model_path, "7")
    length = len(tasks.encode(tasks.Problem("1" * 40, ""), asking.task, asking.tokenizer))
    with pytest.raises(DataError, match=rf"the prompt has {length} tokens .* env.max_prompt_length \(32\): raise it"):
        asking.encode("1" * 40)


@pytest.mark.parametrize(
    "dataset, response, parsed",
    [
        ("arithmetic", "3+4=7<answer>-7</answer>", "-7"),
        ("arithmetic", "<answer>7</answer><answer>8</answer>", None),
        ("gsm8k", "So 3 * 6 = 18.\n#### $1,800.50", "1800.5"),
        ("gsm8k", "I do not know", None),
        ("countdown", "<answer>(3 + 5) * 7 = 56</answer>", "(3 + 5) * 7"),
        ("countdown", "<answer>3 +</answer>", None),
        ("math", r"It is \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("math", "It is a half", None),
        ("ifeval", " A poem. ", "A poem."),
    ],
)
def test_each_task_reads_an_answer_without_knowing_the_right_one(dataset, response, parsed):
    grader = tasks.grader(EnvConfig(dataset=dataset))
    assert grader.parse(response) == parsed
    if dataset not in ("ifeval", "math"):
        shaped = tasks.grader(EnvConfig(dataset=dataset, reward_shape="format"))
        assert shaped.parse(response) == parsed


def test_what_is_read_is_what_a_grade_has():
    task = tasks.load(ENV)
    problems = task.problems("test")[:3]
    for grade, text in zip(DirectGrading(task).grade(problems, TEXTS), TEXTS, strict=True):
        assert grade.parsed == task.parse(text)


TEXTS = ["1+1=2<answer>2</answer>", "<answer>−3</answer>", "<answer>"]


def test_prompts_are_lines_or_objects_and_keep_what_else_they_have(model_path, tmp_path, capsys):
    plain, rows = tmp_path / "p.txt", tmp_path / "p.jsonl"
    plain.write_text("What is 1?\n\n  What is 2?\n")
    assert generate.read_prompts(plain, []) == [{"prompt": "What is 1?"}, {"prompt": "What is 2?"}]
    faults: list[str] = []
    rows.write_text('{"question": "What is 3?", "answer": 7}\n{"prompt": 3}\nno\n{"prompt": "' + "1" * 40 + '"}\n')
    found = generate.read_prompts(rows, faults)
    assert found[0] == {"question": "What is 3?", "answer": 7}
    assert [fault.split(":")[0] for fault in faults] == ["line 2", "line 3 is not JSON"]
    asking, out = asker(model_path, "<answer>7</answer>"), tmp_path / "out.jsonl"
    assert generate.ask_file(asking, found, out, faults) == 1
    (line,) = map(json.loads, out.read_text().splitlines())
    assert line == found[0] | {"response": "<answer>7</answer>", "parsed": "7", "finished": True}
    assert faults[2].startswith("'1111")
    generate.ask_file(asking, found[:1], None, faults)
    assert capsys.readouterr().out == "> What is 3?\n<answer>7</answer>\nAnswer: 7\n\n"


@pytest.mark.parametrize(
    "prompt",
    [
        "x=5. What is x + 1?",
        "x = 5",
        "env.x is y=1?",
        "Trainer.epochs=2",
        "What is 1?",
        "model",
    ],
)
def test_what_is_no_key_before_an_equals_sign_is_a_prompt(prompt, model_path, monkeypatch, capsys):
    monkeypatch.setattr(generate, "asker", lambda *arguments: nullcontext(asker(model_path, "<answer>7</answer>")))
    asked = []
    monkeypatch.setattr(generate.Asker, "encode", lambda self, text: asked.append(text) or [1])
    typed = [prompt, f"model={model_path}", "env.dataset=arithmetic", "temperature=0.5", "seed=3"]
    monkeypatch.setattr(sys, "argv", ["generate", *typed])
    generate.main()
    assert asked == [prompt]
    assert capsys.readouterr().out == "<answer>7</answer>\nAnswer: 7\n"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_line_of_a_text_file_ends_where_the_file_says_so_and_nowhere_else(tmp_path, end):
    lines = ["What is 1?", "Read\u2028this", "page one\x0cpage two", "", "a\x85b\x1cc"]
    (tmp_path / "p.txt").write_bytes(end.join(["\ufeff" + lines[0], *lines[1:]]).encode())
    assert [row["prompt"] for row in generate.read_prompts(tmp_path / "p.txt", [])] == [line for line in lines if line]


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("", r"out \(.*\) is there, and no file: give another name"),
        ("no/where.jsonl", r"out \(.*\): there is no directory .*/no"),
        ("q.jsonl", r"out \(.*/q.jsonl\) must not be prompts, which it would replace: give another name"),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_anything_starts(out, message, tmp_path, monkeypatch):
    (tmp_path / "q.jsonl").write_text('{"prompt": "What is 1?"}\n')
    monkeypatch.setattr(sys, "argv", ["generate", f"prompts={tmp_path}/q.jsonl", f"out={tmp_path / out}"])
    monkeypatch.setattr(generate, "asker", None)
    with pytest.raises(ConfigError, match=message):
        generate.main()


def test_what_no_tokenizer_reads_is_refused_where_it_stands(model_path, tmp_path):
    rows, faults, half = tmp_path / "p.jsonl", [], r"has half of a character, which no tokenizer reads: correct or remove it"
    rows.write_text('{"prompt": "1+1="}\n{"prompt": "\\ud83d"}\n{"question": "a\\udc00"}\n')
    assert generate.read_prompts(rows, faults) == [{"prompt": "1+1="}]
    assert faults == [f"line 2: its prompt ('\\ud83d') {half}", f"line 3: its prompt ('a\\udc00') {half}"]
    with pytest.raises(
        DataError, match=rf"^the prompt \('caf\\udce9'\) {half}$"
    ):  # typed in another encoding than the terminal's
        asker(model_path, "7").encode("caf\udce9")


def test_a_text_file_in_another_encoding_is_refused_in_one_line(tmp_path):
    (tmp_path / "p.txt").write_bytes("What is 1?\nWhat is a café?\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"^prompts \(.*/p\.txt\) is not UTF-8 at byte 24: save it as UTF-8$"):
        generate.read_prompts(tmp_path / "p.txt", [])


def test_a_conversation_asks_each_line_by_itself_until_there_is_none(model_path, monkeypatch, capsys):
    asking = asker(model_path, "<answer>7</answer>")
    lines = iter(["What is 1?", "  ", "1" * 40, "What is 1?"])

    def typed(shown: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    generate.converse(asking)
    said = capsys.readouterr().out
    assert said.count("Answer: 7") == 2 and said.count("env.max_prompt_length (32)") == 1
    first, second = asking.engine.asked
    assert first == second
    assert len(set(asking.engine.seeds)) == 2  # with a temperature, other responses


def test_the_model_is_a_runs_or_a_path_with_the_settings_of_its_task(tmp_path, monkeypatch):
    own = RunConfig(
        train=TrainConfig(total_dialog_turns=512),
        env=ENV,
        model=ModelConfig(name="x"),
        inference_model=InferenceModelConfig(max_tokens=99),
    )
    run = write_run(tmp_path / "day" / "1", own)
    for typed in (str(run), str(run / "model")):
        config, model = generate.configure(typed, {"inference_model.temperature": "0.5"})
        assert model == str(run / "model")
        assert (config.env, config.inference_model.max_tokens, config.inference_model.temperature) == (ENV, 99, 0.5)
    config, model = generate.configure("org/name", {"env.dataset": "countdown"})
    assert (config.env.dataset, model) == ("countdown", "org/name")
    offline = write_run(tmp_path / "of" / "another" / "day", OfflineConfig(data="x.jsonl"))
    config, model = generate.configure(str(offline), {"env.dataset": "arithmetic"})
    assert (config.env.dataset, model) == ("arithmetic", str(offline / "model"))
    for typed in (str(offline), str(offline / "model")):
        with pytest.raises(
            ConfigError, match=r"^model \(.*/day/model\) is of a run of mode=offline, .*: give env\.dataset=NAME too$"
        ):
            generate.configure(typed, {})
    monkeypatch.setattr(tool, "OUTPUTS", tmp_path)
    assert generate.configure(None, {})[1] == str(run / "model")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["What", "is", "1?"], "there are 3 prompts: put one in quotes"),
        (["What is x = 1?", "prompts=a.txt"], "give a prompt or prompts=FILE, not both"),
        (["What is 1?", "out=a.jsonl"], r"out \(a.jsonl\) goes with prompts=FILE"),
        ([], "there is nothing to ask"),
        (["1", "temperature=-1"], r"temperature \(-1\) must be a number of at least 0"),
        (
            ["1", "model=m", "env.dataset=arithmetic", "temperature=3"],
            r"^temperature \(3.0\) must be at most 2 with backend=vllm",
        ),
        (["1", "train.epochs=2"], "train.epochs is not an argument here"),
        (["1", "temprature=0.5"], "temprature is not an argument here"),
        (["x=5. What is x + 1?", "1"], "there are 2 prompts: put one in quotes"),
        (["x.y=5. What is x.y + 1?", "prompts=a.txt"], "give a prompt or prompts=FILE, not both"),
        (["prompts=none.txt"], r"prompts \(none.txt\): there is no such file"),
        (["1", "model=m", "env.dataset=chess"], r"env.dataset \(chess\) has no config/grpo_chess.yaml"),
    ],
)
def test_what_cannot_be_asked_is_said_before_anything_starts(arguments, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["generate", *arguments])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    with pytest.raises(ConfigError, match=message):
        generate.main()
