import json
from pathlib import Path

import pytest

from grpo.config import EnvConfig
from grpo.errors import DataError
from grpo.tasks import Problem, load
from grpo.tasks.gsm8k import GSM8K


def rows(count: int) -> list[dict]:
    return [{"question": f"Question {i}?", "answer": f"It is {i} times 1,000.\n#### {i},000"} for i in range(1, count + 1)]


def write(path: Path, lines: list) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def env(data: str, validation_size: int = 3, test_size: int = 2) -> EnvConfig:
    return EnvConfig(dataset="gsm8k", data=data, validation_size=validation_size, test_size=test_size)


def test_a_local_file_is_split_into_three_parts_that_share_nothing(tmp_path):
    task = load(env(write(tmp_path / "data.jsonl", rows(12))))
    splits = {split: task.problems(split) for split in ("train", "validation", "test")}
    assert {split: len(problems) for split, problems in splits.items()} == {"train": 7, "validation": 3, "test": 2}
    questions = [problem.question for problems in splits.values() for problem in problems]
    assert sorted(questions) == sorted(row["question"] for row in rows(12))
    assert Problem("Question 1?", "1000", "It is 1 times 1,000.\n#### 1,000") in splits["train"]
    assert [problem.answer for problem in splits["test"]] == ["11000", "12000"]


def test_the_last_stated_number_of_a_solution_is_its_answer(tmp_path):
    lines = rows(12)
    lines[0]["answer"] = "First #### 3, no: #### -1,234.50"
    lines[1]["answer"] = "#### $18"
    problems = sorted(
        load(env(write(tmp_path / "data.jsonl", lines))).problems("train"), key=lambda p: int(p.question[9:-1])
    )
    task = GSM8K({})
    assert task.grade(problems[0], "#### -1234.5").correct
    assert not task.grade(problems[0], "#### 3").correct
    assert problems[1].answer == "18"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{not json", r"data.jsonl:5 is not JSON"),
        ({"question": "Why?"}, r"data.jsonl:5: needs the texts question and answer, has \['question'\]"),
        ({"question": "Why?", "answer": 7}, r"data.jsonl:5: needs the texts question and answer"),
        ({"question": "Why?", "answer": "because"}, r"data.jsonl:5: its answer has no '#### NUMBER': 'because'"),
    ],
)
def test_a_bad_line_is_named_with_its_file_and_number(tmp_path, bad, message):
    lines = [*rows(4), bad, *rows(7)]
    with pytest.raises(DataError, match=message) as raised:
        load(env(write(tmp_path / "data.jsonl", lines)))
    assert "\n" not in str(raised.value)


def test_a_line_that_is_json_but_no_object_is_named_too(tmp_path):
    with pytest.raises(DataError, match=r"data.jsonl:5"):
        load(env(write(tmp_path / "data.jsonl", [*rows(4), "[1, 2]", *rows(7)])))


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path):
    lines = rows(12)
    lines[0]["question"] = "One\u2028line?"
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    assert "One\u2028line?" in [problem.question for problem in load(env(str(path))).problems("train")]


def test_a_missing_file_is_named():
    with pytest.raises(DataError, match=r"env.data \(nowhere.jsonl\): there is no such file"):
        load(env("nowhere.jsonl"))


@pytest.mark.parametrize(("count", "enough"), [(4, False), (5, False), (6, True)])
def test_too_little_data_to_train_on_is_an_error_with_a_remedy(tmp_path, count, enough):
    config = env(write(tmp_path / "data.jsonl", rows(count)))
    if enough:
        assert len(load(config).problems("train")) == 1
        return
    with pytest.raises(DataError, match=rf"has {count} problems, which leaves none to train on: lower") as raised:
        load(config)
    assert "env.validation_size (3) or env.test_size (2)" in str(raised.value)


UNPARSEABLE = (0.0, "unparseable", None)


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("So it is\n#### 18", "18", (1.0, "correct", "18")),
        ("####18", "18", (1.0, "correct", "18")),
        ("#### 18.", "18", (1.0, "correct", "18")),
        ("#### 18.0", "18", (1.0, "correct", "18")),
        ("#### $18", "18", (1.0, "correct", "18")),
        ("#### $18.00 a day", "18", (1.0, "correct", "18")),
        ("#### 1,000", "1000", (1.0, "correct", "1000")),
        ("#### 1,000.", "1000", (1.0, "correct", "1000")),
        ("#### $1,234,567", "1234567", (1.0, "correct", "1234567")),
        ("#### -5", "-5", (1.0, "correct", "-5")),
        ("#### −5", "-5", (1.0, "correct", "-5")),
        ("#### -$5", "-5", (1.0, "correct", "-5")),
        ("#### .5", "1/2", (1.0, "correct", "1/2")),
        ("#### 5/6", "5", (0.1, "wrong", "5/6")),
        ("#### 1e3", "1", (0.0, "unparseable", None)),
        ("#### 14 apples", "14", (1.0, "correct", "14")),
        ("#### 0.1", "1/10", (1.0, "correct", "1/10")),
        ("#### 3, or rather\n#### 4", "4", (1.0, "correct", "4")),
        ("#### 4\n#### 3", "4", (0.1, "wrong", "3")),
        ("#### 4\n#### none", "4", (1.0, "correct", "4")),
        ("#### 19", "18", (0.1, "wrong", "19")),
        ("#### 5", "-5", (0.1, "wrong", "5")),
        ("#### 100", "1000", (0.1, "wrong", "100")),
        ("#### 18.001", "18", (0.1, "wrong", "18001/1000")),
        ("18", "18", UNPARSEABLE),
        ("### 18", "18", UNPARSEABLE),
        ("#### eighteen", "18", UNPARSEABLE),
        ("#### ,", "18", UNPARSEABLE),
        ("#### -", "18", UNPARSEABLE),
        ("", "18", UNPARSEABLE),
    ],
)
def test_grades(response, answer, expected):
    grade = GSM8K({}).grade(Problem("", answer), response)
    assert (grade.reward, grade.outcome, grade.parsed) == (pytest.approx(expected[0]), *expected[1:])
    assert list(grade.terms) == ["format", "exact"]


def test_grading_never_raises_however_long_the_number():
    grade = GSM8K({}).grade(Problem("", "14"), f"#### {'9' * 5000}")
    assert not grade.correct
