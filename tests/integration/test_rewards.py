"""A reward function of the user's that fails while a run goes on: the run goes on too, or stops, by the rate of failures."""

import json

import pytest

import grpo_sync
from grpo.errors import RewardError
from grpo.launch import compose

from .conftest import SMALL, Finished

# Problems are "What is (N + 1) * 2?", N being 0 to 7 where they train. The first call, at start, is given the answers.
REWARDS = """
import time

FAILURES = {
    "raise": lambda responses: {}["no such key"],
    "hang": lambda responses: time.sleep(3600),
    "nan": lambda responses: [float("nan")] * len(responses),
    "string": lambda responses: ["1.0"] * len(responses),
    "length": lambda responses: [1.0],
}

def lengths(responses):
    return [float(len(response)) for response in responses]

def each_its_own(prompts, responses, answers):
    failures = dict(enumerate(FAILURES.values()))
    number = int(prompts[0].split("(")[1].split()[0])
    return lengths(responses) if responses == answers else failures.get(number, lengths)(responses)

def make(kind, at_start):
    def function(prompts, responses, answers):
        return FAILURES[kind](responses) if at_start or responses != answers else lengths(responses)
    return function

for kind in FAILURES:
    globals()[f"always_{kind}"] = make(kind, at_start=True)
    globals()[f"later_{kind}"] = make(kind, at_start=False)
"""
NOTES = {
    "raise": "raised KeyError: 'no such key'",
    "hang": "no answer within 0.5 s",
    "nan": "returned nan where a finite number is needed",
    "string": "returned '1.0' where a finite number is needed",
    "length": "returned 1 rewards for 8 responses",
}
FAST = ("raise", "hang")  # that stop a run in make test; all do in make test-soak


@pytest.fixture
def overrides(tmp_path, model_path):
    """A function from a reward function's name to the configuration of a run with it."""
    (tmp_path / "run").mkdir()
    (tmp_path / "mine.py").write_text(REWARDS)
    rows = [{"question": f"What is ({n} + 1) * 2?", "answer": f"#### {2 * n + 2}"} for n in range(10)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return lambda name: [
        *SMALL,
        "env.dataset=gsm8k",
        f"env.data={tmp_path}/data.jsonl",
        "env.validation_size=1",
        "env.test_size=1",
        f"env.reward_fn={tmp_path}/mine.py:{name}",
        "env.reward_timeout_s=0.5",
        "inference_model.backend=transformers",
    ]


def test_a_reward_function_that_fails_on_some_groups_costs_those_groups_and_no_more(overrides, tmp_path):
    failing = 5 / 8
    config = compose("grpo_arithmetic", [*overrides("each_its_own"), f"train.max_grader_error_rate={failing}"])
    grpo_sync.main(config, tmp_path / "run")
    run = Finished(tmp_path / "run")
    assert run.summary["steps"] == 3
    assert len(run.rollouts) == 192
    for line in run.rollouts:
        number = int(line["prompt"].split("(")[1].split()[0])
        if number < len(NOTES):
            assert line["outcome"] == "grader_error"
            assert "mine.py:each_its_own: " in line["note"] and list(NOTES.values())[number] in line["note"]
            assert (line["reward"], line["advantage"], line["terms"]) == (0, 0, {})
        else:
            assert line["outcome"] in ("correct", "wrong", "unparseable") and "note" not in line
            assert line["reward"] == len(line["response"])
    assert any(line["advantage"] != 0 for line in run.rollouts)
    assert [row["rollout/grader_error"] for row in run.metrics] == [failing] * 3
    assert all(row["train/grad_norm"] > 0 for row in run.metrics)


@pytest.mark.parametrize("kind", [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in NOTES])
def test_a_reward_function_that_fails_more_often_than_allowed_stops_the_run(overrides, tmp_path, kind):
    with pytest.raises(RewardError) as caught:
        grpo_sync.main(compose("grpo_arithmetic", overrides(f"later_{kind}")), tmp_path / "run")
    message = str(caught.value)
    assert message.startswith("64 of 64 responses could not be graded, more than train.max_grader_error_rate (0.1) allows; ")
    assert f"mine.py:later_{kind}: " in message and NOTES[kind] in message
    assert "\n" not in message


@pytest.mark.parametrize("kind", NOTES)
def test_a_reward_function_that_fails_in_its_first_call_starts_nothing(overrides, tmp_path, kind):
    with pytest.raises(RewardError) as caught:
        grpo_sync.main(compose("grpo_arithmetic", overrides(f"always_{kind}")), tmp_path / "run")
    message = str(caught.value)
    assert f"mine.py:always_{kind}: " in message and NOTES[kind] in message
    assert "\n" not in message
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
