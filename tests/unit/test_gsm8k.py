import json
import os
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

from grpo.config_sections import EnvConfig
from grpo.errors import DataError
from grpo.stated_numbers import Value, final_answer, written
from grpo.tasks import Problem, load
from grpo.tasks.gsm8k import GSM8K, asking_sentence, gold
from tests.unit.hostile import pathological, random_texts

HERE = Path(__file__).parent
SHARED_DATA = Path(os.environ.get("GRPO_SHARED_DATA", HERE.parents[1].parent / "shared" / "data"))


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
        ({"question": 7, "answer": "7"}, r"data.jsonl:5: question \(7\) must be a text$"),
        ({"question": "Why?", "answer": [7]}, r"data.jsonl:5: answer \(\[7\]\) must be a text$"),
        ({"question": "Why?", "answer": True}, r"data.jsonl:5: answer \(True\) must be a text$"),
        ({"question": "Why?", "answer": None}, r"data.jsonl:5: needs the texts question and answer"),
        ({"question": "\ud83d?", "answer": "#### 4"}, r"data.jsonl:5: question \('\\ud83d\?'\) has half of a character"),
        ({"question": "Why?", "answer": "because"}, r"data.jsonl:5: its answer has no '#### NUMBER': 'because'"),
    ],
)
def test_a_bad_line_is_named_with_its_file_and_number(tmp_path, bad, message):
    lines = [*rows(4), bad, *rows(7)]
    with pytest.raises(DataError, match=message) as raised:
        load(env(write(tmp_path / "data.jsonl", lines)))
    assert "\n" not in str(raised.value)


def test_an_answer_may_be_a_number_alone_as_a_text_or_not(tmp_path):
    lines = [*rows(3), *({"question": f"{answer!r}?", "answer": answer} for answer in (18, "-7", " 0.35 "))]
    config = EnvConfig(dataset="gsm8k", data=write(tmp_path / "data.jsonl", lines), validation_size=1, test_size=4)
    assert [(p.answer, p.solution) for p in load(config).problems("test")[1:]] == [
        ("18", "#### 18"),
        ("-7", "#### -7"),
        ("0.35", "#### 0.35"),
    ]


def test_blank_lines_are_skipped_and_the_others_keep_their_numbers(tmp_path):
    path = write(tmp_path / "data.jsonl", ["", *rows(4), "  ", *rows(11)[4:], "", ""])
    assert load(env(path)).splits == load(env(write(tmp_path / "same.jsonl", rows(11)))).splits
    with pytest.raises(DataError, match=r"data.jsonl:3 is not JSON"):
        load(env(write(tmp_path / "data.jsonl", ["", *rows(1), "{", *rows(9)])))


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
        ("#### 1000,000", "1000000", (1.0, "correct", "1000000")),
        ("#### 1'000'000", "1000000", (1.0, "correct", "1000000")),
        ("#### 1_000", "1000", (1.0, "correct", "1000")),
        ("#### Rs. 500/-", "500", (1.0, "correct", "500")),
        ("#### 5'11", "5", (0.0, "unparseable", None)),
        ("#### $1,234,567", "1234567", (1.0, "correct", "1234567")),
        ("#### -5", "-5", (1.0, "correct", "-5")),
        ("#### −5", "-5", (1.0, "correct", "-5")),
        ("#### -$5", "-5", (1.0, "correct", "-5")),
        ("#### .5", "1/2", (1.0, "correct", "0.5")),
        ("#### 5/6", "5", (0.1, "wrong", "5/6")),
        ("#### 1e3", "1", (0.0, "unparseable", None)),
        ("#### 14 apples", "14", (1.0, "correct", "14")),
        ("#### 0.1", "1/10", (1.0, "correct", "0.1")),
        ("#### 3, or rather\n#### 4", "4", (1.0, "correct", "4")),
        ("#### 4\n#### 3", "4", (0.1, "wrong", "3")),
        ("#### 4\n#### none", "4", (1.0, "correct", "4")),
        ("#### 19", "18", (0.1, "wrong", "19")),
        ("#### 5", "-5", (0.1, "wrong", "5")),
        ("#### 100", "1000", (0.1, "wrong", "100")),
        ("#### 18.001", "18", (0.1, "wrong", "18.001")),
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


def labelled() -> list[dict]:
    return [json.loads(line) for line in (HERE / "data" / "gsm8k_labelled.jsonl").read_text().splitlines()]


def test_the_labelled_set_is_large_and_has_every_outcome():
    outcomes = Counter(row["outcome"] for row in labelled())
    assert sum(outcomes.values()) >= 300
    assert set(outcomes) == {"correct", "wrong", "unparseable"}
    assert min(outcomes.values()) >= 100


def test_the_labelled_set_is_graded_without_a_mistake():
    task = GSM8K({})
    mistakes = []
    for row in labelled():
        outcome = task.grade(Problem(row["question"], row["answer"]), row["response"]).outcome
        if outcome != row["outcome"]:
            mistakes.append(f"{row['response']!r} for {row['answer']} is {row['outcome']}, was graded {outcome}")
    assert not mistakes, "\n".join(mistakes)


def published_files() -> list[Path]:
    files = [SHARED_DATA / "gsm8k_train.jsonl", SHARED_DATA / "gsm8k_test.jsonl"]
    if not all(path.is_file() for path in files):
        pytest.skip(f"no GSM8K files in {SHARED_DATA}: set GRPO_SHARED_DATA")
    return files


def test_every_reference_solution_is_right_for_its_own_problem_and_wrong_for_the_next():
    files = published_files()
    lines = [json.loads(line) for path in files for line in path.open()]
    assert len(lines) == 8792
    task = GSM8K({})
    stated = [line["answer"].rpartition("####")[2].strip().replace(",", "") for line in lines]
    for i, line in enumerate(lines):
        problem, following = Problem(line["question"], stated[i]), (i + 1) % len(lines)
        own, other = task.grade(problem, line["answer"]), task.grade(problem, lines[following]["answer"])
        assert (own.outcome, own.parsed) == ("correct", written(Fraction(stated[i]))), line
        equal = Fraction(stated[i]) == Fraction(stated[following])
        assert other.outcome == ("correct" if equal else "wrong"), (line, lines[following])


@pytest.mark.parametrize(
    ("question", "sentence"),
    [
        ("He has 20% off. What is the price?", "what is the price?"),
        ("What percent is left? Round to a whole number.", "what percent is left?"),
        ("He has 3 cats. Find the percentage.", "find the percentage."),
        ("A costs 2.50? B costs 3.75. How much is both?", "how much is both?"),
        ("How many", "how many"),
        (
            "He is 9. What percent of that is Mr. Roger's, and Mrs. St. John's?",
            "what percent of that is mr. roger's, and mrs. st. john's?",
        ),
        ("He was 1st. How much?", "how much?"),
        ("", ""),
    ],
)
def test_the_sentence_that_asks(question, sentence):
    assert asking_sentence(question) == sentence


@pytest.mark.parametrize(
    ("question", "stated", "outcome"),
    [
        ("340 of 500 passed. What is the school's overall pass rate?", "70%", "correct"),
        ("What are the odds that all three will be good?", "70%", "correct"),
        ("There are 5 blue candies. How likely is it that it's blue?", "70%", "correct"),
        ("Boys get an 80% on the test. What is the class average?", "70%", "correct"),
        ("What is the percentage obtained by Mr. Roger's friend?", "70%", "correct"),
        ("What is the class average?", "70%", "wrong"),
        ("Prices increase by 25%. How much more expensive will 5 bottles be?", "70%", "wrong"),
        ("It is 25% off. What is the price now?", "70%", "wrong"),
        ("Boys get an 80% on the test. What is the class average?", "0.7%", "wrong"),
        ("Boys get an 80% on the test. What is the class average?", "0.7", "wrong"),
    ],
)
def test_percent_may_be_asked_for_without_the_word(question, stated, outcome):
    assert GSM8K({}).grade(Problem(question, "70"), f"#### {stated}").outcome == outcome


def test_the_ten_questions_that_ask_for_percent_without_the_word_in_their_last_sentence():
    rows = {
        "train": {2364: 27, 4121: 24, 4987: 25, 5145: 86, 5475: 30, 6272: 25, 7274: 6},
        "test": {806: 70, 1012: 94, 1079: 10},
    }
    published_files()
    right = []
    for split, answers in rows.items():
        lines = (SHARED_DATA / f"gsm8k_{split}.jsonl").read_text().splitlines()
        for i, answer in answers.items():
            question = json.loads(lines[i])["question"]
            if GSM8K({}).grade(Problem(question, str(answer)), f"#### {answer}%").correct:
                right.append(i)
    assert right == [2364, 4121, 5145, 5475, 6272, 7274, 806, 1012, 1079]  # 4987 asks for dollars


@pytest.mark.parametrize(
    ("number", "text"),
    [
        ("7/20", "0.35"),
        ("-1/2", "-0.5"),
        ("18001/1000", "18.001"),
        ("-2469/2", "-1234.5"),
        ("1/1024", "0.0009765625"),
        ("18", "18"),
        ("1/3", "1/3"),
        ("-7/6", "-7/6"),
        (f"1/{2**41}", f"1/{2**41}"),  # has 41 decimals
    ],
)
def test_a_number_is_written_as_people_do_and_read_as_the_same(number, text):
    assert written(Fraction(number)) == text
    for value, form in ((Value(Fraction(number)), text), (Value(Fraction(number), "percent"), f"{text}%")):
        assert (str(value), gold(form), gold(f"#### {form}")) == (form, value, value)


def test_an_answer_in_cents_reaches_examples_and_rewards_as_it_stands_in_the_data(tmp_path):
    lines = [{"question": f"{i}?", "answer": "It is 7 / 20.\n#### 0.35"} for i in range(9)]
    path = write(tmp_path / "data.jsonl", lines)
    task = load(EnvConfig(dataset="gsm8k", data=path, validation_size=1, test_size=1, few_shot=1, style="think"))
    assert {problem.answer for problem in task.problems("train")} == {"0.35"}
    assert task.examples[0][1] == "<think>It is 7 / 20.</think><answer>0.35</answer>"


def test_an_answer_that_is_no_number_is_a_data_error():
    with pytest.raises(DataError, match=r"answer \('blue'\) must be a number, or end in '#### NUMBER'"):
        GSM8K({}).grade(Problem("", "blue"), "#### 18")


@pytest.mark.parametrize("style", ["hash", "think"])
def test_examples_show_the_style_that_the_prompt_asks_for_and_are_right(tmp_path, style):
    lines = [{"question": f"{i}?", "answer": f"It is 2 * {i} = <<2*{i}={2 * i}>>{2 * i}.\n#### {2 * i}"} for i in range(9)]
    path = write(tmp_path / "data.jsonl", lines)
    config = EnvConfig(dataset="gsm8k", data=path, validation_size=1, test_size=1, few_shot=2, style=style)
    task = load(config)
    expected = {
        "hash": "It is 2 * {0} = {1}.\n#### {1}",
        "think": "<think>It is 2 * {0} = {1}.</think><answer>{1}</answer>",
    }[style]
    for question, response in task.examples:
        number = int(question[:-1])
        assert response == expected.format(number, 2 * number)
        assert task.grade(Problem(question, str(2 * number)), response).correct
    assert len(task.examples) == 2
    assert ("####" in task.system_prompt, "<answer>" in task.system_prompt) == (style == "hash", style == "think")


def test_no_hostile_text_raises_or_takes_long():
    task, problem = GSM8K({}), Problem("", "123456789")
    for text in (*pathological(), *random_texts(5000, seed=2)):
        started = time.monotonic()
        verdict = task.grade(problem, text)
        assert time.monotonic() - started < 10, text[:200]  # half a second for the worst; a quadratic search takes hours
        assert verdict.outcome in ("wrong", "unparseable"), text[:200]


def test_an_answer_is_found_before_and_after_a_megabyte():
    filler = "one two three\n" * 70_000
    assert str(final_answer(f"#### 18\n{filler}")) == "18"
    assert str(final_answer(f"{filler}#### 18")) == "18"
    assert final_answer(filler) is None
