"""The account of an asynchronous run, by hand."""

import pytest

from grpo.account import MOST_PUSHING, Stopwatches, describe, make_account


def test_shares_and_recommendations_by_hand():
    phases = {"generate": 90.0, "train": 45.0, "wait": 40.0, "push": 12.0}
    account = make_account(phases, wall_s=100.0, engine_devices=2, num_ranks=4, steps_per_push=1)
    assert account == {
        "engines_busy": 0.9,
        "trainer_busy": 0.45,
        "waiting_for_data": 0.4,
        "pushing": 0.12,
        "inference_devices": 0.5,  # 2 x 90 device seconds of sampling, 4 x 45 of training
        "weight_update_frequency": 3,  # 12 % in pushes; every third step 4 of 92
    }
    assert describe(account) == (
        "Engines were busy 90% of the time, the trainer 45%; it waited for data 40%, pushes took 12.0%. Balanced would be "
        "50% of the devices for inference, and train.weight_update_frequency=3"
    )


def test_a_clock_that_was_started_again_has_gone_on_by_what_it_shows():
    watches = Stopwatches()
    assert watches.since({"a": 5.0, "b": 2.0}) == {"a": 5.0, "b": 2.0}
    assert watches.since({"a": 6.5, "b": 0.5}) == {"a": 1.5, "b": 0.5}  # b died at 2 or later
    assert watches.since({"a": 8.0}) == {"a": 1.5}  # b is away
    assert watches.since({"a": 8.0, "b": 1.5}) == {"a": 0.0, "b": 1.0}


def test_pushes_that_cost_little_stay_as_they_are():
    phases = {"generate": 50.0, "train": 50.0, "wait": 0.0, "push": 4.0}
    assert make_account(phases, 100.0, 1, 1, steps_per_push=2)["weight_update_frequency"] == 2


@pytest.mark.parametrize(("push", "rest", "frequency"), [(10, 90, 3), (20, 80, 5), (33, 67, 10), (60, 40, 29)])
def test_the_recommended_frequency_is_the_first_that_keeps_pushes_below_a_twentieth(push, rest, frequency):
    phases = {"generate": 50.0, "train": 50.0, "wait": 0.0, "push": float(push)}
    assert make_account(phases, float(push + rest), 1, 1, steps_per_push=2)["weight_update_frequency"] == 2 * frequency
    shares = [push / r / (rest + push / r) for r in (frequency - 1, frequency)]
    assert shares[0] > MOST_PUSHING >= shares[1]
