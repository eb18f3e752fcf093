"""python -m grpo.grade: texts in, verdicts out."""

import json
import subprocess
import sys

import pytest

from grpo.config_sections import EnvConfig
from grpo.errors import ConfigError, DataError
from grpo.grade import grade_file, main, summary
from grpo.rewards import Grade
from grpo.tasks import grader, names, row_problem
from grpo.tool import parse_arguments

ROWS = {
    "arithmetic": ({"answer": 12}, "<answer>12</answer>", "<answer>13</answer>"),
    "gsm8k": ({"answer": "so 6 * 3 = 18\n#### 18"}, "The answer is $18.00.", "The answer is $81.00."),
    "countdown": ({"numbers": [3, 5, 7], "target": 22}, "<answer>5 * 3 + 7</answer>", "<answer>5 + 3 + 7</answer>"),
    "math": ({"answer": "\\frac{1}{2}"}, "so it is \\boxed{0.5}", "so it is \\boxed{2}"),
    "ifeval": (
        {"prompt": "No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
        "Here are none",
        "Here, one",
    ),
}


def write(path, lines: list) -> None:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


def test_there_is_a_row_for_every_task():
    assert sorted(ROWS) == names()


@pytest.mark.parametrize("dataset", ROWS)
def test_every_task_grades_lines_without_its_data(dataset, tmp_path):
    row, right, wrong = ROWS[dataset]
    write(tmp_path / "in.jsonl", [row | {"response": text} for text in (right, wrong, "")])
    config = EnvConfig(dataset=dataset, grading_processes=1)
    grades, problems = grade_file(config, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert [grade.outcome for grade in grades] == ["correct", "wrong", "unparseable"]
    assert problems == []
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for line, grade, text in zip(lines, grades, (right, wrong, ""), strict=True):
        assert (line["response"], line["reward"], line["outcome"], line["parsed"]) == (
            text,
            grade.reward,
            grade.outcome,
            grade.parsed,
        )
        assert row.items() <= line.items()
    assert lines[0]["reward"] == pytest.approx(1.0)
    if dataset == "ifeval":
        assert [line["follow_strict"] for line in lines] == [[True], [False], [False]]
        assert [line["follow_loose"] for line in lines] == [[True], [False], [False]]


@pytest.mark.parametrize("dataset", ROWS)
def test_a_row_that_cannot_be_graded_is_named(dataset):
    with pytest.raises(DataError, match=r"^line 7: "):
        row_problem(dataset, {"response": "x", "answer": None}, "line 7")


def test_bad_lines_are_reported_by_number_and_stop_nothing(tmp_path):
    good = {"response": "#### 4", "answer": "4"}
    bad = ["nonsense", "[1]", '{"answer": "4"}', '{"response": 4, "answer": "4"}', '{"response": "#### 4"}', "[" * 100_000]
    write(tmp_path / "in.jsonl", [good, *bad, "", good])
    grades, problems = grade_file(EnvConfig(grading_processes=1), tmp_path / "in.jsonl", None)
    assert [grade.outcome for grade in grades] == ["correct", "correct"]
    assert [problem.split(":")[0].split(" is")[0] for problem in problems] == [f"line {n}" for n in range(2, 8)]
    assert summary(grades, problems).startswith("2 responses: correct 2 (100.0%), wrong 0 (0.0%)")
    assert summary(grades, problems).endswith("mean reward 1.0000; 6 lines could not be read")


def test_a_shape_and_a_function_give_the_reward(tmp_path):
    write(tmp_path / "in.jsonl", [{"response": text, "answer": "4"} for text in ("#### 4", "#### 5")])
    shaped = EnvConfig(reward_shape="correctness", reward_weights={"correct": 3.0}, grading_processes=1)
    assert [g.reward for g in grade_file(shaped, tmp_path / "in.jsonl", None)[0]] == [3.0, 0.0]
    (tmp_path / "mine.py").write_text("def score(prompts, responses, answers):\n    return [len(r) for r in responses]\n")
    mine = EnvConfig(reward_fn=f"{tmp_path}/mine.py:score", grading_processes=1)
    assert [(g.reward, g.outcome) for g in grade_file(mine, tmp_path / "in.jsonl", None)[0]] == [
        (6, "correct"),
        (6, "wrong"),
    ]


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("none.py", r"env.reward_fn \(.*/none.py:score\): there is no file .*/none.py"),
        ("mine.py", r"env.reward_fn \(.*\): importing .*/mine.py raised ValueError: mine \(.*/mine.py:1\)"),
    ],
)
def test_a_function_that_is_not_there_is_said_before_anything_starts(file, message, tmp_path, monkeypatch):
    write(tmp_path / "in.jsonl", [{"response": "#### 4", "answer": "4"}])
    (tmp_path / "mine.py").write_text('raise ValueError("mine")\n')
    monkeypatch.setattr("grpo.grade.grading_pool", None)
    monkeypatch.setattr(sys, "argv", ["grade", f"responses={tmp_path}/in.jsonl", f"env.reward_fn={tmp_path}/{file}:score"])
    with pytest.raises(ConfigError, match=rf"^{message}$"):
        main()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("in.jsonl", "must not be responses, which it would replace"),
        ("link.jsonl", "must not be responses"),
        ("nowhere/out.jsonl", "there is no directory .*/nowhere"),
        (".", "is there, and no file: give another name"),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_anything_is_opened(name, message, tmp_path):
    write(tmp_path / "in.jsonl", [{"response": "#### 4", "answer": "4"}])
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "in.jsonl")
    before = (tmp_path / "in.jsonl").read_text()
    with pytest.raises(ConfigError, match=rf"^out \(.*\):? ?{message}") as raised:
        grade_file(EnvConfig(grading_processes=1), tmp_path / "in.jsonl", tmp_path / name)
    assert "\n" not in str(raised.value)
    assert (tmp_path / "in.jsonl").read_text() == before


def test_an_output_that_was_there_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    write(tmp_path / "in.jsonl", [{"response": "#### 4", "answer": "4"}])
    (tmp_path / "out.jsonl").write_text("old")

    def interrupted(grade: Grade) -> dict:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("grpo.grade.verdict", interrupted)
        grade_file(EnvConfig(grading_processes=1), tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "old"
    grade_file(EnvConfig(grading_processes=1), tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text())["outcome"] == "correct"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


@pytest.mark.parametrize("dataset", ROWS)
def test_a_line_of_rollouts_is_a_row_of_its_task(dataset):
    row, right, wrong = ROWS[dataset]
    problem = row_problem(dataset, row, "here")
    line = {"prompt": problem.question, "response": right, "answer": problem.answer}
    again = row_problem(dataset, json.loads(json.dumps(line)), "there")
    task = grader(EnvConfig(dataset=dataset))
    assert [task.grade(again, text).outcome for text in (right, wrong)] == ["correct", "wrong"]


@pytest.mark.parametrize("answer", ["Infinity", "NaN", "4.7", '"4.7"', "true", "null", "1e300", "[4]"])
def test_an_answer_that_is_no_whole_number_is_reported_by_line(answer, tmp_path):
    write(
        tmp_path / "in.jsonl", [f'{{"response": "<answer>4</answer>", "answer": {answer}}}', {"response": "", "answer": 4.0}]
    )
    grades, problems = grade_file(EnvConfig(dataset="arithmetic", grading_processes=1), tmp_path / "in.jsonl", None)
    assert len(grades) == 1
    assert len(problems) == 1 and problems[0].startswith("line 1: answer (") and "must be a whole number" in problems[0]


def test_the_command(tmp_path):
    write(tmp_path / "in.jsonl", [{"response": "#### 4", "answer": "4"}, "nonsense"])
    command = [sys.executable, "-m", "grpo.grade", "env.dataset=gsm8k", f"responses={tmp_path}/in.jsonl"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0
    assert ended.stdout.startswith("1 responses: correct 1 (100.0%)") and ended.stderr.startswith("line 2 is not JSON")


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ([], "responses= is missing"),
        (["responses"], "responses: write key=value"),
        (["responses=a", "seed=1"], "seed is not an argument here: there are responses, out and env.KEY"),
        (["responses=a", "env.datset=gsm8k"], "the nearest known key is env.dataset"),
        (["responses=a", "env.repeats=many"], "env.repeats"),
        (["responses=a", "env.repeats=1"], r"env.repeats \(1\) must be at least 2"),
    ],
)
def test_wrong_arguments_end_in_one_line(typed, message):
    with pytest.raises(ConfigError, match=message) as raised:
        parse_arguments(typed, {"responses": True, "out": False}, EnvConfig, "env")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("tool", ["grade", "evaluate"])
def test_help_is_the_modules_own_words(tool):
    ended = subprocess.run([sys.executable, "-m", f"grpo.{tool}", "--help"], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0 and f"python -m grpo.{tool} " in ended.stdout
