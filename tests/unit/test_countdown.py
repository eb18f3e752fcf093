import json
from fractions import Fraction
from itertools import islice

import pytest

from grpo import tasks
from grpo.config_sections import EnvConfig
from grpo.errors import ConfigError, DataError
from grpo.tasks.countdown import (
    COUNTS,
    NUMBERS,
    TARGETS,
    TRAIN_SIZE,
    Countdown,
    ExpressionError,
    evaluate,
    generate,
    make_problem,
)
from tests.unit.hostile import pathological, random_texts

PROBLEM = make_problem([3, 5, 7], 22)


def grade(response: str):
    return Countdown({}).grade(PROBLEM, response)


@pytest.mark.parametrize(
    ("expression", "value", "numbers"),
    [
        ("3 * 5 + 7", 22, [3, 5, 7]),
        ("3+5*7", 38, [3, 5, 7]),
        ("(3+5)*7", 56, [3, 5, 7]),
        ("10-3-2", 5, [10, 3, 2]),
        ("12/3/2", 2, [12, 3, 2]),
        ("12/(3/2)", 8, [12, 3, 2]),
        ("1/3", Fraction(1, 3), [1, 3]),
        ("1/3*3", 1, [1, 3, 3]),
        ("8/(3-8/3)", 24, [8, 3, 8, 3]),
        ("-3+5", 2, [3, 5]),
        ("5--3", 8, [5, 3]),
        ("3 × 5 − 10 ÷ 2", 10, [3, 5, 10, 2]),
        ("((((7))))", 7, [7]),
        ("007", 7, [7]),
        ("2*-3", -6, [2, 3]),
        ("[3 • 5] ＋ 7", 22, [3, 5, 7]),
        (r"\frac{10}{5} \times 4", 8, [10, 5, 4]),
        (r"\left(\dfrac{10 - 2}{2 \cdot 2}\right) - 1", 1, [10, 2, 2, 2, 1]),
        (r"\[ 3 \times \tfrac{8}{2} \]", 12, [3, 8, 2]),
    ],
)
def test_expressions_are_worth_their_exact_value(expression, value, numbers):
    assert evaluate(expression) == (value, numbers)


@pytest.mark.parametrize(
    "expression",
    [
        *(
            "",
            " ",
            "3 +",
            "+",
            "(3",
            "3)",
            "()",
            "3 5",
            "3 * * 5",
            "2**3",
            "2 ** 3",
            "7//2",
            "9**9**9**9",
            "2^3",
            "3.5",
            "3e2",
        ),
        *("x", "3x", "1/0", "1/(3-3)", "__import__('os')", "5!", "sqrt(4)", "3,5", "٣", "3 == 3", "1" * 10, "(" * 100 + "1"),
        *(r"3\frac{1}{2}", r"\frac{1}{0}", r"\frac{1}{}", "[3, 5]"),
        *("(" * 30 + "1" + ")" * 30, "-" * 30 + "1", "+".join("1" * 150), "\x00", "\ud800", "3(5)", "(3)(5)", "3\\frac5"),
    ],
)
def test_what_is_no_expression_is_refused(expression):
    with pytest.raises(ExpressionError):
        evaluate(expression)


@pytest.mark.parametrize(
    ("response", "reward", "outcome", "parsed"),
    [
        ("<answer>3 * 5 + 7</answer>", 1.0, "correct", "3 * 5 + 7"),
        ("<answer>7 + 5 * 3</answer>", 1.0, "correct", "7 + 5 * 3"),
        ("<think>3*5=15, 15+7=22</think>\n<answer>(3 × 5) + 7 = 22</answer>", 1.0, "correct", "(3 × 5) + 7"),
        ("<answer>$3 * 5 + 7$</answer>", 1.0, "correct", "3 * 5 + 7"),
        ("Answer: 3 * 5 + 7", 1.0, "correct", "3 * 5 + 7"),
        ("**Answer:** 3 * 5 + 7.", 1.0, "correct", "3 * 5 + 7"),
        ("<answer>3 + 5</answer> no <answer>3*5+7</answer>", 1.0, "correct", "3*5+7"),
        ("<answer>3*5+7</answer> no <answer>3+5+7</answer>", 0.1, "wrong", "3+5+7"),
        ("<answer>3 * 5</answer>", 0.1, "wrong", "3 * 5"),
        ("<answer>22</answer>", 0.1, "wrong", "22"),
        ("<answer>3 + 5 + 7 + 7</answer>", 0.1, "wrong", "3 + 5 + 7 + 7"),
        ("<answer>3 * 5 + 7 + 0</answer>", 0.1, "wrong", "3 * 5 + 7 + 0"),
        ("<answer>35 - 13</answer>", 0.1, "wrong", "35 - 13"),
        ("<answer>3 - 5 * 7</answer>", 0.1, "wrong", "3 - 5 * 7"),
        ("<answer>5 + 17</answer>", 0.1, "wrong", "5 + 17"),
        ("<answer>22 = 3 * 5 + 7</answer>", 1.0, "correct", "3 * 5 + 7"),
        ("<answer>3 * 5 + 7 = 15 + 7 = 22</answer>", 1.0, "correct", "3 * 5 + 7"),
        ("<answer>22 = 22</answer>", 0.1, "wrong", "22"),
        ("<answer>3 x 5 + 7</answer>", 1.0, "correct", "3 x 5 + 7"),
        ("<answer>3x5+7</answer>", 1.0, "correct", "3x5+7"),
        ("<answer>3 \\times 5 + 7</answer>", 1.0, "correct", "3 \\times 5 + 7"),
        ("<answer>\\(3 \\cdot 5 + 7\\)</answer>", 1.0, "correct", "\\(3 \\cdot 5 + 7\\)"),
        ("<answer>3⋅5+7</answer>", 1.0, "correct", "3⋅5+7"),
        ("<answer>3∗5+7</answer>", 1.0, "correct", "3∗5+7"),
        ("So it is $\\boxed{3 \\times 5 + 7 = 22}$.", 1.0, "correct", "3 \\times 5 + 7"),
        ("<answer>\\boxed{3*5+7}</answer>", 1.0, "correct", "3*5+7"),
        (r"\boxed{1 + 1} no \boxed{\frac{3}{5} + 7}", 0.1, "wrong", r"\frac{3}{5} + 7"),
        (r"\boxed{3*5+7} no \boxed{\frac{\frac{3}{1}}{5} + 7}", 0.0, "unparseable", None),  # two levels of braces
        (r"\boxed{3*5+7} no \boxed{3*5", 0.0, "unparseable", None),
        (r"\boxed{7 + \left(\frac{3}{1}\right) \times 5 = 22}", 0.1, "wrong", r"7 + \left(\frac{3}{1}\right) \times 5"),
        ("<answer>EXPRESSION: 3*5+7</answer>", 1.0, "correct", "3*5+7"),
        ("Answer:\n3 * 5 + 7 = 22\n", 1.0, "correct", "3 * 5 + 7"),
        ("**Answer:**\n\n\\[\n3 \\times 5 + 7\n\\]", 1.0, "correct", "3 \\times 5 + 7"),
        ("The answer is 3*5+7", 1.0, "correct", "3*5+7"),
        ("The answer is: $3 \\times 5 + 7 = 22$.\nIt was easy.", 1.0, "correct", "3 \\times 5 + 7"),
        ("The answer is 3*5+7, which is 22", 0.0, "unparseable", None),
        ("Answer: 3*5+7\nSo the answer is 22.", 1.0, "correct", "3*5+7"),
        ("Answer: 3*5+7\nThe answer is right.", 1.0, "correct", "3*5+7"),
        ("The answer is 3+5+7. No, the answer is 3*5+7", 1.0, "correct", "3*5+7"),
        ("<answer>3 xx 5 + 7</answer>", 0.0, "unparseable", None),
        ("<answer>x * 5 + 7</answer>", 0.0, "unparseable", None),
        ("<answer></answer>", 0.0, "unparseable", None),
        ("<answer>impossible</answer>", 0.0, "unparseable", None),
        ("<answer>3 * 5 + 7", 0.0, "unparseable", None),
        ("3 * 5 + 7", 0.0, "unparseable", None),
        ("<answer>3 ** 5 + 7</answer>", 0.0, "unparseable", None),
        ("", 0.0, "unparseable", None),
    ],
)
def test_grades(response, reward, outcome, parsed):
    verdict = grade(response)
    assert (verdict.reward, verdict.outcome, verdict.parsed) == (pytest.approx(reward), outcome, parsed)
    assert list(verdict.terms) == ["format", "exact"]


def test_a_number_given_twice_is_to_be_used_twice():
    problem = make_problem([4, 4, 2], 10)
    assert Countdown({}).grade(problem, "<answer>4 + 4 + 2</answer>").correct
    assert not Countdown({}).grade(problem, "<answer>4 * 2 + 2</answer>").correct


def test_a_target_reached_by_way_of_a_fraction_is_reached():
    assert Countdown({}).grade(make_problem([3, 3, 8, 8], 24), "<answer>8 / (3 - 8 / 3)</answer>").correct


def test_every_generated_problem_is_solved_by_its_own_solution():
    task = Countdown({})
    for problem in islice(generate("train"), 2000):
        asked = json.loads(problem.answer)
        assert asked["target"] in TARGETS
        assert len(asked["numbers"]) in COUNTS
        assert all(number in NUMBERS for number in asked["numbers"])
        assert task.grade(problem, f"<answer>{problem.solution}</answer>").correct


def test_problems_are_the_same_each_time_and_others_for_each_split():
    first, again, other = (list(islice(generate(split), 20)) for split in ("train", "train", "test"))
    assert first == again
    assert not {problem.answer for problem in first} & {problem.answer for problem in other}


def test_other_sizes_move_no_problem_to_another_split():
    def numbers(**sizes: int) -> dict[str, list[tuple[int, ...]]]:
        task = tasks.load(EnvConfig(dataset="countdown", **sizes))
        return {
            split: [tuple(sorted(json.loads(p.answer)["numbers"])) for p in task.problems(split)] for split in tasks.SPLITS
        }

    small, large = numbers(validation_size=20, test_size=30), numbers(validation_size=300, test_size=4000)
    assert large["test"][:30] == small["test"]
    assert large["validation"][:20] == small["validation"]
    assert large["train"] == small["train"] and len(set(small["train"])) == TRAIN_SIZE
    assert not set(small["train"]) & {*large["test"], *large["validation"]}
    with pytest.raises(ConfigError, match=r"env.test_size \(20001\) must be at most 20000"):
        tasks.load(EnvConfig(dataset="countdown", test_size=20_001))
    with pytest.raises(ConfigError, match=r"env.few_shot \(10000\) must be below 10000"):
        tasks.load(EnvConfig(dataset="countdown", few_shot=10_000))


def test_no_two_splits_share_numbers():
    task = tasks.load(EnvConfig(dataset="countdown", validation_size=100, test_size=200, max_samples=3000))
    numbers = {
        split: {tuple(sorted(json.loads(p.answer)["numbers"])) for p in task.problems(split)}
        for split in ("train", "validation", "test")
    }
    assert {split: len(found) for split, found in numbers.items()} == {"train": 3000, "validation": 100, "test": 200}
    assert not numbers["train"] & numbers["test"]
    assert not numbers["train"] & numbers["validation"]
    assert not numbers["validation"] & numbers["test"]


def test_rows_in_another_order_are_the_same_problem(tmp_path):
    rows = [{"numbers": [i, 2, 3], "target": 9} for i in range(10)]
    rows[0]["numbers"] = [2, 9, 3]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = tasks.load(EnvConfig(dataset="countdown", data=str(path), validation_size=2, test_size=3))
    assert len(task.problems("train")) == 4
    assert task.problems("test")[-1] not in task.problems("train")


def test_rows_of_a_local_file_are_problems(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"numbers": [i, 2, 3], "target": i + 5}) + "\n" for i in range(10)))
    task = tasks.load(EnvConfig(dataset="countdown", data=str(path), validation_size=2, test_size=3))
    assert [len(task.problems(split)) for split in ("train", "validation", "test")] == [5, 2, 3]
    assert "[2, 3, 9]" in task.problems("test")[-1].question
    assert "14" in task.problems("test")[-1].question
    assert task.grade(task.problems("test")[-1], "<answer>9 + 2 + 3</answer>").correct
    with pytest.raises(DataError, match=r"env.few_shot \(1\) must be 0 with env.data"):
        tasks.load(EnvConfig(dataset="countdown", data=str(path), validation_size=2, test_size=3, few_shot=1))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"target": 5}, r"rows.jsonl:2: numbers \(None\) must be a list of 2 to 20 whole numbers"),
        ({"numbers": [5], "target": 5}, r"rows.jsonl:2: numbers \(\[5\]\) must be"),
        ({"numbers": [5, 1.5], "target": 5}, r"rows.jsonl:2: numbers \(\[5, 1.5\]\) must be"),
        ({"numbers": [5, True], "target": 5}, r"rows.jsonl:2: numbers"),
        ({"numbers": [5, 10**9], "target": 5}, r"rows.jsonl:2: numbers"),
        ({"numbers": [5, -1], "target": 5}, r"rows.jsonl:2: .* numbers must not be negative"),
        ({"numbers": [5, 1], "target": "5"}, r"rows.jsonl:2: target \(5\) must be a whole number"),
        ({"numbers": [5, 1]}, r"rows.jsonl:2: target \(None\) must be a whole number"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in ({"numbers": [1, 2], "target": 3}, row)))
    with pytest.raises(DataError, match=message):
        tasks.load(EnvConfig(dataset="countdown", data=str(path)))


def test_no_hostile_text_raises_or_is_right():
    for text in (*pathological(), *random_texts(5000, seed=3)):
        verdict = grade(text)
        assert verdict.outcome in ("wrong", "unparseable"), text[:200]
        assert verdict.reward in (0.0, 0.1)
