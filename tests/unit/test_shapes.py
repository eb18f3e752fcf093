import pytest

from grpo.errors import ConfigError
from grpo.rewards import Grade
from grpo.shapes import SHAPES, Shaped, shape
from grpo.tasks import Problem

RIGHT, WRONG, NONE = (Grade({}, "correct", "18"), Grade({}, "wrong", "20"), Grade({}, "unparseable", None))


def earned(name, response="", grade=NONE, answer="18", weights=None):
    return shape(name, weights or {}, Problem("How many?", answer), response, grade)


@pytest.mark.parametrize(
    ("name", "grade", "terms"),
    [
        ("correctness", RIGHT, {"correct": 1.0}),
        ("correctness", WRONG, {"correct": 0.0}),
        ("correctness", NONE, {"correct": 0.0}),
        ("format", RIGHT, {"format": 0.1, "correct": 0.9}),
        ("format", WRONG, {"format": 0.1, "correct": 0.0}),
        ("format", NONE, {"format": 0.0, "correct": 0.0}),
        ("arithmetic", RIGHT, {"format": 0.2, "near": 0.2, "exact": 0.6}),
        ("arithmetic", WRONG, {"format": 0.2, "near": 0.0, "exact": 0.0}),
        ("arithmetic", NONE, {"format": 0.0, "near": 0.0, "exact": 0.0}),
        ("correctness", Grade({}, "timed_out", None), {"correct": 0.0}),
        ("format", Grade({}, "grader_error", None), {"format": 0.0, "correct": 0.0}),
    ],
)
def test_the_shapes_that_look_at_the_grade_alone(name, grade, terms):
    assert earned(name, "#### 18 is the answer, step by step", grade) == terms


@pytest.mark.parametrize(
    ("parsed", "answer", "near"),
    [
        ("17", "18", 1),
        ("19", "18", 1),
        ("16", "18", 0),
        ("20", "18", 0),
        ("37/2", "18", 1),
        ("17.5", "18", 1),
        ("19.01", "18", 0),
        ("-18", "18", 0),
        ("-1", "0", 1),
        ("1/2", "1/3", 1),
        ("3/0", "3", 0),
        ("9" * 5000, "18", 0),
        ("2/3", '{"instruction_id_list": []}', 0),
        ("x + 1", "x", 0),
    ],
)
def test_an_answer_is_near_when_it_is_at_most_1_from_the_number(parsed, answer, near):
    assert earned("arithmetic", "", Grade({}, "wrong", parsed), answer)["near"] == pytest.approx(0.2 * near)


def test_a_right_answer_that_is_no_number_is_near_too():
    grade = Grade({}, "correct", "x + 1")
    assert sum(earned("arithmetic", "", grade, "x + 1").values()) == pytest.approx(1.0)


def test_hybrid_has_the_weights_it_is_known_by():
    assert {name: term.weight for name, term in SHAPES["hybrid"].items()} == {
        "correct": 0.6,
        "wrong": 0.2,
        "fallback": 0.3,
        "length": 0.2,
        "mathematics": 0.1,
        "steps": 0.3,
        "format_hashes": 0.15,
        "format_other": 0.1,
        "numbers": 0.1,
        "calculations": 0.1,
    }


@pytest.mark.parametrize(
    ("term", "response", "value"),
    [
        ("length", "x" * 50, 0.0),
        ("length", "x" * 51, 0.2),
        ("length", "x" * 50 + " " * 20, 0.0),
        ("mathematics", "no idea", 0.0),
        ("mathematics", "the sum", 0.1),
        ("mathematics", "the sum, and the sum again", 0.1),
        ("mathematics", "5 + 3 = 8", 0.2),
        ("mathematics", "5 + 3 - 2 = 6, half of 12 / 1", 0.5),
        ("mathematics", "1 + 2 - 3 * 4 / 5 = 6% of the total difference, twice each", 0.5),
        ("mathematics", "summer teaches assumptions", 0.0),
        ("steps", "First, count.", 0.3),
        ("steps", "Step 1: First, then. Therefore.", 0.3),
        ("steps", "THEREFORE 3", 0.3),
        ("steps", "a stepmother sold sofas", 0.0),
        ("format_hashes", "#### 18", 0.15),
        ("format_hashes", "####-$1.5", 0.15),
        ("format_hashes", "#### .5", 0.15),
        ("format_hashes", "#### Heading", 0.0),
        ("format_hashes", "### 18", 0.0),
        ("format_hashes", "\\boxed{18}", 0.0),
        ("format_other", "\\boxed{18}", 0.1),
        ("format_other", "<answer>18</answer>", 0.1),
        ("format_other", "The answer is 18", 0.1),
        ("format_other", "Answer: 18", 0.1),
        ("format_other", "The answer is 18\n#### 18", 0.0),
        ("format_other", "<answer></answer>", 0.0),
        ("format_other", "\\boxed{}", 0.0),
        ("format_other", "<answer>18", 0.0),
        ("format_other", "I know no answer", 0.0),
        ("numbers", "it is 7", 0.1),
        ("numbers", "it is seven", 0.0),
        ("calculations", "5 + 3", 0.1),
        ("calculations", "5×$3", 0.1),
        ("calculations", "x = 5", 0.1),
        ("calculations", "5 apples and 3 pears", 0.0),
        ("calculations", "plus = minus", 0.0),
    ],
)
def test_hybrid_terms_that_look_at_the_text(term, response, value):
    assert earned("hybrid", response)[term] == pytest.approx(value)


@pytest.mark.parametrize(
    ("grade", "terms"),
    [
        (RIGHT, {"correct": 0.6, "wrong": 0, "fallback": 0}),
        (WRONG, {"correct": 0, "wrong": 0.2, "fallback": 0}),
        (NONE, {"correct": 0, "wrong": 0, "fallback": 0.3}),
        (Grade({}, "timed_out", None), {"correct": 0, "wrong": 0, "fallback": 0}),
    ],
)
def test_hybrid_terms_that_look_at_the_grade(grade, terms):
    assert {name: value for name, value in earned("hybrid", "", grade).items() if name in terms} == terms
    assert sum(earned("hybrid", "", grade).values()) == pytest.approx(sum(terms.values()))


def test_a_worked_solution_earns_every_term_of_hybrid_but_the_other_cases():
    solution = "First, the sum is 9 + 9 = 18. Then half of 36 / 1 is 18 too, so it is 18 in total.\n#### 18"
    terms = earned("hybrid", solution, RIGHT)
    assert terms["wrong"] == terms["fallback"] == terms["format_other"] == 0
    assert sum(terms.values()) == pytest.approx(0.6 + 0.2 + 0.5 + 0.3 + 0.15 + 0.1 + 0.1)


def test_weights_of_ones_own_take_the_place_of_those_they_name():
    terms = earned("hybrid", "#### 18", RIGHT, weights={"correct": 2.0, "numbers": 0.0})
    assert (terms["correct"], terms["numbers"], terms["format_hashes"]) == (2.0, 0.0, pytest.approx(0.15))


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("hybird", {}, r"env.reward_shape \(hybird\) must be one of correctness, format, arithmetic, hybrid"),
        ("format", {"formt": 1.0}, r"env.reward_weights \(formt\): the shape format has the terms format, correct"),
    ],
)
def test_what_there_is_not_is_named(name, weights, message):
    with pytest.raises(ConfigError, match=message):
        Shaped(None, name, weights)


HOSTILE = [
    "\x00",
    "\ud800 5 + 3",
    "<answer>" * 12_000,
    "####" * 25_000,
    "\\boxed{" * 14_000,
    "9" * 100_000,
    "1 " * 50_000,
    "answer " * 14_000,
    "5    " * 20_000,
    "(" * 100_000,
    "\U0001d7d9 + \U0001d7d9 = ٣",
]


@pytest.mark.parametrize("response", HOSTILE, ids=[repr(text[:12]) for text in HOSTILE])
@pytest.mark.timeout(5)
def test_every_term_of_a_hostile_text_is_within_its_bounds(response):
    for name, terms in SHAPES.items():
        for grade in (RIGHT, WRONG, NONE, Grade({}, "wrong", response)):
            values = earned(name, response, grade)
            for key, term in terms.items():
                assert 0 <= values[key] <= term.weight * term.maximum + 1e-9
