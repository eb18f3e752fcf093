"""Where rows come from, how they are split, and what of them training sees."""

import json
from collections import Counter
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from grpo import tasks
from grpo.config_sections import EnvConfig
from grpo.errors import ConfigError, DataError
from grpo.tasks import Problem
from grpo.tasks.data import HubSplit, read_hub, split_problems

SPLITS = ("train", "validation", "test")


def rows(count: int) -> list[dict]:
    return [{"question": f"Question {i}?", "answer": f"#### {i}"} for i in range(count)]


def write(path: Path, lines: list[dict]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def load(data: str, **keys) -> tasks.Task:
    return tasks.load(EnvConfig(dataset="gsm8k", data=data, **{"validation_size": 3, "test_size": 4, **keys}))


def questions(task: tasks.Task, split: str) -> list[str]:
    return [problem.question for problem in task.problems(split)]


def test_a_parquet_file_gives_the_same_problems_as_the_json_lines(tmp_path):
    parquet.write_table(pyarrow.Table.from_pylist(rows(20)), tmp_path / "rows.parquet")
    from_parquet = load(str(tmp_path / "rows.parquet"))
    from_lines = load(write(tmp_path / "rows.jsonl", rows(20)))
    for split in SPLITS:
        assert from_parquet.problems(split) == from_lines.problems(split)
    assert len(from_parquet.problems("train")) == 13


def test_a_file_that_is_not_parquet_is_a_data_error_of_one_line(tmp_path):
    (tmp_path / "rows.parquet").write_text("no parquet")
    with pytest.raises(DataError, match=r"env.data \(.*rows.parquet\) is not a Parquet file that can be read") as raised:
        load(str(tmp_path / "rows.parquet"))
    assert "\n" not in str(raised.value)


def test_training_problems_are_shuffled_alike_each_time_and_held_out_ones_stay(tmp_path):
    path = write(tmp_path / "rows.jsonl", rows(100))
    first, second = load(path), load(path)
    assert questions(first, "train") == questions(second, "train")
    assert questions(first, "train") != [f"Question {i}?" for i in range(93)]
    assert sorted(questions(first, "train")) == sorted(f"Question {i}?" for i in range(93))
    assert questions(first, "validation") == [f"Question {i}?" for i in range(93, 96)]
    assert questions(first, "test") == [f"Question {i}?" for i in range(96, 100)]


def test_max_samples_takes_a_sample_of_the_training_problems_only(tmp_path):
    path = write(tmp_path / "rows.jsonl", rows(100))
    whole, part = load(path), load(path, max_samples=10)
    assert part.problems("train") == whole.problems("train")[:10]
    assert set(questions(part, "train")) != {f"Question {i}?" for i in range(10)}
    assert part.problems("validation") == whole.problems("validation")
    assert part.problems("test") == whole.problems("test")


@pytest.mark.parametrize(
    ("asked", "twin"), [("Question 99?", "test"), ("question  99?\n", "test"), ("Question 94?", "validation")]
)
def test_a_training_problem_that_a_held_out_split_asks_too_is_left_out(tmp_path, caplog, asked, twin):
    lines = rows(100)
    lines[5]["question"] = asked
    task = load(write(tmp_path / "rows.jsonl", lines))
    assert asked not in questions(task, "train")
    assert len(task.problems("train")) == 92
    assert asked.strip().lower().split() in [question.lower().split() for question in questions(task, twin)]
    assert "1 problems left out" in caplog.text


def test_a_validation_problem_that_the_test_split_asks_too_is_left_out():
    config = EnvConfig(validation_size=2)
    problems = [Problem(f"{i}?", str(i)) for i in range(6)]
    splits = split_problems(problems, [Problem("5?", "5"), Problem("9?", "9")], config, "here")
    assert splits["validation"] == [Problem("4?", "4")]
    assert sorted(p.question for p in splits["train"]) == ["0?", "1?", "2?", "3?"]
    assert [p.question for p in splits["test"]] == ["5?", "9?"]


@pytest.mark.parametrize("dataset", ["gsm8k", "math"])
def test_without_a_network_the_error_names_both_ways_and_the_hubs_client_does_not_try(monkeypatch, dataset):
    import datasets
    from huggingface_hub import constants, get_session

    def unreachable(*args, **kwargs):
        with pytest.raises(ConnectionError, match="offline mode is enabled"):
            get_session().get("http://127.0.0.1:9")
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("grpo.tasks.data.hub_reachable", lambda: False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        DataError, match=r"cannot be reached \(ConnectionError\): connect, or give .* env.data=PATH"
    ) as raised:
        tasks.load(EnvConfig(dataset=dataset))
    assert "\n" not in str(raised.value)


@pytest.fixture
def hub(monkeypatch):
    """A hub whose splits are what is put into it; what it was asked for."""
    import datasets

    asked, splits = [], {}
    monkeypatch.setattr("grpo.tasks.data.hub_reachable", lambda: True)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, subset, split: asked.append((name, subset, split)) or splits[split]
    )
    return splits, asked


def test_the_hub_is_asked_for_the_splits_by_name(hub):
    splits, asked = hub
    splits |= {"train": rows(9), "test": rows(5)}
    task = tasks.load(EnvConfig(dataset="gsm8k", validation_size=2))
    assert asked == [("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")]
    assert questions(task, "test") == [f"Question {i}?" for i in range(5)]
    assert {*questions(task, "validation"), *questions(task, "train")} == {f"Question {i}?" for i in range(5, 9)}
    assert read_hub(HubSplit("a", "test")) == rows(5)


def test_validation_is_a_fair_sample_of_the_hubs_rows_though_they_stand_in_order_of_subject(hub):
    subjects = [f"{subject} {i}" for subject in ("algebra", "counting", "geometry", "number theory") for i in range(250)]
    splits, _ = hub
    splits |= {
        "train": [{"problem": subject, "answer": "1"} for subject in subjects],
        "test": [{"problem": "?", "answer": "1"}],
    }
    first, again = (tasks.load(EnvConfig(dataset="math", validation_size=100)) for _ in range(2))
    counts = Counter(question.split()[0] for question in questions(first, "validation"))
    assert len(counts) == 4 and min(counts.values()) >= 15
    assert {*questions(first, "validation"), *questions(first, "train")} == set(subjects)
    for split in SPLITS:
        assert first.problems(split) == again.problems(split)


def test_examples_are_taken_out_of_training_and_of_no_other_split(tmp_path):
    path = write(tmp_path / "rows.jsonl", rows(20))
    whole, shown = load(path), load(path, few_shot=2)
    first = whole.problems("train")[:2]
    assert shown.examples == [(problem.question, f"#### {problem.answer}") for problem in first]
    assert shown.problems("train") == whole.problems("train")[2:]
    assert whole.examples == []
    assert len(load(path, few_shot=2, max_samples=3).problems("train")) == 3


def test_too_many_examples_are_an_error_with_a_remedy(tmp_path):
    with pytest.raises(DataError, match=r"leaves none to train on: .* or lower env.few_shot \(13\)"):
        load(write(tmp_path / "rows.jsonl", rows(20)), few_shot=13)


def test_arithmetic_takes_its_examples_from_training_too():
    whole = tasks.load(EnvConfig(dataset="arithmetic"))
    shown = tasks.load(EnvConfig(dataset="arithmetic", few_shot=2, max_samples=5))
    assert shown.problems("train") == whole.problems("train")[2:7]
    for (question, response), problem in zip(shown.examples, whole.problems("train"), strict=False):
        assert question == problem.question
        assert whole.grade(problem, response).correct
    with pytest.raises(ConfigError, match=r"env.few_shot \(5000\) must leave problems to train on"):
        tasks.load(EnvConfig(dataset="arithmetic", few_shot=5000))


@pytest.mark.parametrize("take", [tasks.load, tasks.without_data])
@pytest.mark.parametrize("dataset", ["arithmetic", "countdown"])
def test_the_system_prompt_can_be_replaced(dataset, take):
    assert take(EnvConfig(dataset=dataset, system_prompt="Be brief.")).system_prompt == "Be brief."
    assert take(EnvConfig(dataset=dataset, system_prompt="")).system_prompt == ""
    assert "<answer>" in take(EnvConfig(dataset=dataset)).system_prompt


@pytest.mark.parametrize("dataset", tasks.names())
def test_every_task_can_be_taken_without_its_data(dataset, hub):
    _, asked = hub
    task = tasks.without_data(EnvConfig(dataset=dataset))
    assert asked == [] and task.system_prompt and not task.examples
    if dataset == "arithmetic":
        shown = EnvConfig(dataset=dataset, few_shot=2)
        assert tasks.without_data(shown).examples == tasks.load(shown).examples != []
