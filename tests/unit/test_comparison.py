"""From verdicts to the figures of a comparison, by hand."""

from dataclasses import replace

import pytest

from grpo.comparison import Answers, improvements, table
from grpo.intervals import clustered_share, paired_means, wilson
from grpo.rewards import Grade

RIGHT, WRONG = Grade({"format": 0.2, "exact": 0.8}, "correct", "4"), Grade({"format": 0.2}, "wrong", "5")
LATE = Grade({}, "timed_out", None, "no answer within 10 s")


def answers(*grades: Grade | None, samples: list[list[Grade]] | None = None) -> Answers:
    n = len(grades)
    return Answers([f"text {i}" for i in range(n)], list(range(3, 3 + n)), [True] * n, [*grades], samples or [[]] * n)


BEFORE = answers(RIGHT, WRONG, WRONG, LATE, samples=[[RIGHT, RIGHT], [WRONG, RIGHT], [WRONG, WRONG], [LATE, WRONG]])
AFTER = answers(RIGHT, RIGHT, RIGHT, WRONG, samples=[[RIGHT, RIGHT]] * 3 + [[WRONG, RIGHT]])


def test_a_models_figures_are_those_of_its_verdicts():
    found = BEFORE.metrics()
    assert (found["accuracy"], found["n"], found["mean_at_k"]) == (0.25, 4, 0.375)
    assert found["accuracy_interval_95"] == wilson(0.25, 4)
    assert found["mean_at_k_interval_95"] == clustered_share([1.0, 0.5, 0.0, 0.0], 2)
    assert found["reward_mean"] == pytest.approx((1.0 + 0.2 + 0.2 + 0.0) / 4)
    assert found["length_mean"] == 4.5
    assert found["outcomes"] == {"correct": 1, "wrong": 2, "timed_out": 1}
    assert found["sampled_outcomes"] == {"correct": 3, "wrong": 4, "timed_out": 1}


def test_improvements_are_paired_and_relative_to_before():
    found = improvements(BEFORE, AFTER)
    assert (found["improvement"], found["improvement_percentage"]) == (0.5, 200.0)
    low, high = found["improvement_interval_95"]
    assert low < 1 / 3 < high  # 2 turned right, none wrong: centred at 2 / (4 + 2)
    assert found["reward_improvement"] == pytest.approx((0.0 + 0.8 + 0.8 + 0.2) / 4)
    assert found["reward_improvement_interval_95"] == paired_means(BEFORE.rewards, AFTER.rewards, 1.0)
    assert found["reward_improvement_percentage"] == pytest.approx(100 * 1.8 / 1.4)
    assert found["mean_at_k_improvement"] == 0.5
    assert found["mean_at_k_improvement_interval_95"] == paired_means([1, 0.5, 0, 0], [1, 1, 1, 0.5], 1.0)
    assert found["mean_at_k_improvement_percentage"] == pytest.approx(100 * 0.5 / 0.375)


def test_there_is_no_percentage_of_nothing():
    found = improvements(answers(WRONG, LATE), answers(RIGHT, LATE))
    assert (found["improvement"], found["improvement_percentage"]) == (0.5, None)
    assert "mean_at_k_improvement" not in found


def test_prompts_without_an_answer_count_for_the_length_alone():
    mixed = answers(RIGHT, None, samples=[[RIGHT, WRONG], []])
    assert (mixed.metrics()["n"], mixed.metrics()["accuracy"], mixed.metrics()["length_mean"]) == (1, 1.0, 3.5)
    assert (mixed.metrics()["mean_at_k"], mixed.metrics()["reward_mean_interval_95"]) == (0.5, None)
    assert mixed.row(0) == {
        "response": "text 0",
        "length": 3,
        "reward": 1.0,
        "outcome": "correct",
        "parsed": "4",
        "mean_at_k": 0.5,
    }
    assert mixed.row(1) == {"response": "text 1", "length": 4, "reward": None, "outcome": None, "parsed": None}
    texts = answers(None, None)
    assert texts.metrics() == {"length_mean": 3.5, "stopped": 1.0}
    assert improvements(texts, texts) == {}


def test_a_response_without_a_verdict_says_why():
    assert BEFORE.without_verdict == [LATE, LATE] and AFTER.without_verdict == []
    assert BEFORE.row(3)["note"] == "no answer within 10 s"


def test_the_table_has_the_models_and_their_difference():
    lines = table({"before": BEFORE.metrics(), "after": AFTER.metrics()}, improvements(BEFORE, AFTER), 2).splitlines()
    assert [line.split()[0] for line in lines] == ["pass@1", "before", "after", "difference"]
    assert "mean@2" in lines[0] and "25.0% [4.6, 69.9]" in lines[1] and "75.0%" in lines[2]
    assert "+50.0 [" in lines[3] and "+0.450 [" in lines[3] and lines[3].endswith("+0.0")


def test_the_table_of_texts_alone_has_their_lengths():
    assert table({"model": answers(None, None).metrics()}, {}, 8).split() == ["mean", "length", "model", "3.5"]


def test_a_reward_wider_than_its_column_does_not_run_into_the_next_one():
    large = Grade({"x": -123456.789}, "wrong", "5")
    found = answers(large, large, replace(large, terms={"x": -98765.432})).metrics()
    cell, length = table({"model": found}, {}, 0).splitlines()[1].rsplit("  ", 1)
    assert (cell[-1], length) == ("]", "4.0")
