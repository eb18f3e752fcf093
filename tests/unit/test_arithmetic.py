from collections import Counter

import pytest

from grpo.config_sections import EnvConfig
from grpo.errors import ConfigError
from grpo.tasks import Problem, load
from grpo.tasks.arithmetic import family, question, split_expressions, value


@pytest.fixture(scope="module")
def splits():
    return split_expressions()


@pytest.fixture(scope="module")
def task():
    return load(EnvConfig(dataset="arithmetic"))


def test_every_expression_is_in_exactly_one_split(splits):
    counts = Counter(expression for split in splits.values() for expression in split)
    operators = [first + second for first in "+-*" for second in "+-*" if first + second != "**"]
    assert len(operators) == 8
    every = {(a, o[0], b, o[1], c) for o in operators for a in range(10) for b in range(10) for c in range(10)}
    assert counts.keys() == every
    assert set(counts.values()) == {1}
    assert len(every) == 8000


def test_the_splits_have_their_sizes(splits):
    # A family is never cut and has 6 members at most, so a split may hold up to 5 more than it needs.
    assert splits.keys() == {"test", "validation", "warm_up", "train"}
    assert len(splits["test"]) == 1000
    assert 500 <= len(splits["validation"]) <= 505
    assert len(splits["warm_up"]) == 3500
    assert len(splits["train"]) > 2900


def test_no_family_is_in_two_splits(splits):
    families = {name: {family(e) for e in split} for name, split in splits.items()}
    names = list(families)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            assert not families[first] & families[second]


def test_commuted_twins_and_reorderings_stay_together(splits):
    where = {expression: name for name, split in splits.items() for expression in split}
    for (a, first, b, second, c), name in where.items():
        if first in "+*":
            assert where[b, first, a, second, c] == name
        if first == second == "+":
            assert where[a, "+", c, "+", b] == where[c, "+", b, "+", a] == name
        if first == second == "-":
            assert where[a, "-", c, "-", b] == name  # a - b - c = a - c - b
        if (first, second) == ("+", "-"):
            assert where[a, "-", c, "+", b] == name  # a + b - c = a - c + b


def test_a_family_holds_only_expressions_of_one_value(splits):
    values = {}
    for split in splits.values():
        for expression in split:
            assert values.setdefault(family(expression), value(expression)) == value(expression)


def test_the_split_is_the_same_every_time(splits):
    assert split_expressions() == splits
    # Pinned: another order would let a model made earlier have seen today's test problems.
    assert splits["test"][:2] == [(8, "-", 6, "*", 3), (2, "+", 2, "-", 5)]
    assert splits["train"][-1] == (9, "-", 8, "*", 8)


@pytest.mark.parametrize(
    ("expression", "text", "result"),
    [
        ((3, "+", 4, "*", 2), "What is (3 + 4) * 2?", 14),  # the brackets come first
        ((3, "*", 4, "-", 9), "What is (3 * 4) - 9?", 3),
        ((0, "-", 9, "*", 9), "What is (0 - 9) * 9?", -81),
        ((1, "-", 2, "-", 3), "What is (1 - 2) - 3?", -4),
    ],
)
def test_questions_and_their_values(expression, text, result):
    assert question(expression) == text
    assert value(expression) == result


def test_problems_carry_the_question_and_its_value(task, splits):
    for split in ("train", "validation", "test"):
        problems = task.problems(split)
        assert len(problems) == len(splits[split])
        assert problems[7] == Problem(question(splits[split][7]), str(value(splits[split][7])))


UNPARSEABLE = (0.0, "unparseable", None)


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("<answer>14</answer>", "14", (1.0, "correct", "14")),
        ("3+4=7;7*2=14<answer>14</answer>", "14", (1.0, "correct", "14")),
        ("<answer>14</answer> and so on", "14", (1.0, "correct", "14")),
        ("<answer> 14\n</answer>", "14", (1.0, "correct", "14")),
        ("<answer>014</answer>", "14", (1.0, "correct", "14")),
        ("<answer>-4</answer>", "-4", (1.0, "correct", "-4")),
        ("<answer>−4</answer>", "-4", (1.0, "correct", "-4")),  # the typographic minus
        ("<answer>4</answer>", "-4", (0.2, "wrong", "4")),
        ("<answer>13</answer>", "14", (0.4, "wrong", "13")),
        ("<answer>15</answer>", "14", (0.4, "wrong", "15")),
        ("<answer>16</answer>", "14", (0.2, "wrong", "16")),
        ("<answer>1</answer>", "-1", (0.2, "wrong", "1")),
        ("<answer>0</answer>", "-1", (0.4, "wrong", "0")),
        ("<answer>14</answer><answer>14</answer>", "14", UNPARSEABLE),
        ("<answer>14</answer><answer>", "14", UNPARSEABLE),
        ("<answer><answer>14</answer>", "14", UNPARSEABLE),
        ("14", "14", UNPARSEABLE),
        ("", "14", UNPARSEABLE),
        ("<answer></answer>", "14", UNPARSEABLE),
        ("<answer>14", "14", UNPARSEABLE),
        ("14</answer>", "14", UNPARSEABLE),
        ("<answer>14.0</answer>", "14", UNPARSEABLE),
        ("<answer>7*2</answer>", "14", UNPARSEABLE),
        ("<answer>1 4</answer>", "14", UNPARSEABLE),
        ("<answer>- 4</answer>", "-4", UNPARSEABLE),
        ("<answer>--4</answer>", "-4", UNPARSEABLE),
        ("<answer>x</answer>", "14", UNPARSEABLE),
        ("<ANSWER>14</ANSWER>", "14", UNPARSEABLE),
    ],
)
def test_grades(task, response, answer, expected):
    grade = task.grade(Problem("", answer), response)
    assert (grade.reward, grade.outcome, grade.parsed) == (pytest.approx(expected[0]), *expected[1:])
    assert grade.correct == (expected[1] == "correct")
    assert list(grade.terms) == ["format", "near", "exact"]


def test_the_same_verdict_is_the_same_number_so_that_equal_groups_are_seen(task):
    rewards = {task.grade(Problem("", "5"), f"<answer>{n}</answer>").reward for n in (4, 6)}
    assert len(rewards) == 1
    assert task.grade(Problem("", "5"), "<answer>5</answer>").reward == 1.0


def test_grading_never_raises_however_long_the_number(task):
    grade = task.grade(Problem("", "14"), f"<answer>{'9' * 5000}</answer>")
    assert not grade.correct


def test_data_of_ones_own_is_refused():
    with pytest.raises(ConfigError, match=r"env.data \(mine.jsonl\) must be null"):
        load(EnvConfig(dataset="arithmetic", data="mine.jsonl"))
