import pytest

from grpo.errors import ConfigError, RewardError
from grpo.rewards import Grade, apply_reward_function, load_reward_function


def rewarding(*values):
    def my_reward(prompts: list[str], responses: list[str], answers: list[str]) -> list[float]:
        return list(values)

    return my_reward


def apply(function) -> list[float]:
    return apply_reward_function(function, ["first?", "second?"], ["one", "two"], ["1", "2"])


def test_a_grade_is_the_sum_of_its_terms():
    grade = Grade({"format": 0.2, "near": 0.2, "exact": 0.0}, "wrong", "3")
    assert grade.reward == pytest.approx(0.4)
    assert not grade.correct
    assert Grade({"exact": 1.0}, "correct", "3").correct


def test_a_function_is_loaded_from_its_file_and_gets_prompts_responses_and_answers(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def score(prompts, responses, answers):\n    return [len(p) - int(a) for p, a in zip(prompts, answers)]\n"
    )
    function = load_reward_function(f"{path}:score")
    assert apply_reward_function(function, ["ab", "c"], ["de", "f"], ["1", "5"]) == [1.0, -4.0]


def test_a_missing_file_or_function_is_a_config_error_that_names_it(tmp_path):
    path = tmp_path / "mine.py"
    with pytest.raises(ConfigError, match=rf"env.reward_fn \({path}:score\): there is no file {path}"):
        load_reward_function(f"{path}:score")
    path.write_text("score = 3\n")
    for name in ("score", "other"):
        with pytest.raises(ConfigError, match=rf"{path} has no function {name}"):
            load_reward_function(f"{path}:{name}")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e39, -(10**400), None, "1", [1.0]])
def test_anything_but_a_finite_number_is_an_error_that_names_function_value_response_and_prompt(value):
    with pytest.raises(RewardError) as raised:
        apply(rewarding(0.0, value))
    message = str(raised.value)
    for part in ("env.reward_fn my_reward", f"returned {value!r}", "response 'two'", "prompt 'second?'"):
        assert part in message
    assert "'one'" not in message


@pytest.mark.parametrize("values", [(), (1.0,), (1.0, 2.0, 3.0)])
def test_another_number_of_rewards_than_responses_is_an_error(values):
    with pytest.raises(RewardError, match=rf"env.reward_fn my_reward returned {len(values)} rewards for 2 responses"):
        apply(rewarding(*values))


def test_whole_numbers_and_truth_values_are_rewards_and_become_floats():
    rewards = apply(rewarding(True, 3))
    assert rewards == [1.0, 3.0]
    assert {type(reward) for reward in rewards} == {float}


def test_any_sequence_of_rewards_will_do():
    assert apply(lambda prompts, responses, answers: (0.5, -0.5)) == [0.5, -0.5]
    assert apply(lambda prompts, responses, answers: (float(len(r)) for r in responses)) == [3.0, 3.0]


def test_a_function_that_forgets_to_return_is_a_reward_error():
    def my_reward(prompts, responses, answers):
        pass

    with pytest.raises(RewardError, match="my_reward"):
        apply(my_reward)


def test_a_function_that_raises_is_a_reward_error_that_names_it():
    def my_reward(prompts, responses, answers):
        raise KeyError("no such answer")

    with pytest.raises(RewardError, match="my_reward"):
        apply(my_reward)


@pytest.mark.parametrize(
    ("source", "what"), [("def score(:\n", "SyntaxError"), ("import no_such_module\n", "no_such_module")]
)
def test_a_file_that_cannot_be_imported_is_a_config_error_that_names_it(tmp_path, source, what):
    path = tmp_path / "mine.py"
    path.write_text(source)
    with pytest.raises(ConfigError) as raised:
        load_reward_function(f"{path}:score")
    assert str(path) in str(raised.value)
    assert what in str(raised.value)
