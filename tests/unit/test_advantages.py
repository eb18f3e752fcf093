import math

import pytest
import torch

from grpo.advantages import group_advantages


def test_advantages_are_centred_and_divided_by_the_unbiased_std_plus_epsilon():
    # mean 2, deviations -2, 0, 2; the unbiased variance is (4 + 0 + 4) / 2 = 4, the biased one 8 / 3.
    advantages = group_advantages(torch.tensor([0.0, 2.0, 4.0]), torch.tensor([5, 5, 5]))
    assert advantages.dtype == torch.float32
    assert advantages.tolist() == pytest.approx([-2 / 2.0001, 0.0, 2 / 2.0001], rel=1e-6)


def test_epsilon_is_added_to_the_std_and_is_one_ten_thousandth():
    # Deviations of 0.5e-4 have the unbiased std sqrt(0.5) 1e-4, so epsilon more than halves the advantage.
    advantages = group_advantages(torch.tensor([0.0, 1e-4], dtype=torch.float64), torch.tensor([0, 0]))
    expected = 0.5 / (math.sqrt(0.5) + 1)
    assert advantages.tolist() == pytest.approx([-expected, expected], rel=1e-6)
    with_epsilon_one = group_advantages(torch.tensor([0.0, 2.0]), torch.tensor([0, 0]), epsilon=1.0)
    assert with_epsilon_one.tolist() == pytest.approx([-1 / (math.sqrt(2) + 1), 1 / (math.sqrt(2) + 1)], rel=1e-6)


def test_groups_may_be_interleaved_and_of_unequal_size():
    # Group 7: 0, 2, 4 as above. Group 3: 1, 0 with mean 0.5 and std sqrt(0.5).
    rewards = torch.tensor([4.0, 1.0, 0.0, 0.0, 2.0])
    groups = torch.tensor([7, 3, 7, 3, 7])
    of_pair = 0.5 / (math.sqrt(0.5) + 1e-4)
    expected = [2 / 2.0001, of_pair, -2 / 2.0001, -of_pair, 0.0]
    assert group_advantages(rewards, groups).tolist() == pytest.approx(expected, rel=1e-6)


def test_a_permutation_of_the_batch_permutes_the_advantages():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(40, generator=generator)
    groups = torch.randint(0, 6, (40,), generator=generator)
    advantages = group_advantages(rewards, groups)
    order = torch.randperm(40, generator=generator)
    assert torch.allclose(group_advantages(rewards[order], groups[order]), advantages[order], atol=1e-6)
    for group in groups.unique():
        assert advantages[groups == group].mean().abs() < 1e-6


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 0.1 + 0.2, 1 / 3, -1e8 / 3, 1e-8])
@pytest.mark.parametrize("size", [2, 3, 7, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_zero_although_their_mean_rounds(reward, size, dtype):
    advantages = group_advantages(torch.full((size,), reward, dtype=dtype), torch.zeros(size, dtype=torch.int64))
    assert advantages.tolist() == [0.0] * size


def test_the_mean_of_equal_rewards_does_round_so_that_the_test_above_can_fail():
    assert any(sum([reward] * size) / size != reward for reward in (0.1, 0.1 + 0.2) for size in (3, 7, 10))


def test_an_equal_group_beside_an_unequal_one_is_zero_and_leaves_it_alone():
    rewards = torch.tensor([0.3, 1.0, 0.3, 0.0, 0.3])
    groups = torch.tensor([0, 1, 0, 1, 0])
    advantages = group_advantages(rewards, groups)
    assert advantages[[0, 2, 4]].tolist() == [0.0, 0.0, 0.0]
    assert torch.equal(advantages[[1, 3]], group_advantages(torch.tensor([1.0, 0.0]), torch.tensor([1, 1])))


def test_a_group_of_one_gets_zero():
    assert group_advantages(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0, 1, 1]))[0] == 0.0


def test_groups_with_the_same_rewards_are_not_merged():
    # Two groups of 0 and 1 each: merged, the std would be sqrt(1/3) instead of sqrt(1/2).
    advantages = group_advantages(torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.tensor([0, 0, 1, 1]))
    of_pair = 0.5 / (math.sqrt(0.5) + 1e-4)
    assert advantages.tolist() == pytest.approx([-of_pair, of_pair, -of_pair, of_pair], rel=1e-6)


def test_large_group_ids_are_told_apart():
    # Neighbours at 2^62 are the same number in float64.
    groups = torch.tensor([2**62, 2**62, 2**62 + 1, 2**62 + 1, -1, -1])
    rewards = torch.tensor([0.0, 2.0, 100.0, 102.0, 5.0, 5.0])
    one = 1 / (math.sqrt(2) + 1e-4)
    assert group_advantages(rewards, groups).tolist() == pytest.approx([-one, one, -one, one, 0.0, 0.0], rel=1e-6)


# Group 5: 0, 2, 4 (mean 2, std 2); group 7: 1, 0 (mean 0.5, std sqrt(0.5)); all five: mean 1.4, squares 21, variance 2.8.
REWARDS, GROUPS = torch.tensor([0.0, 2.0, 4.0, 1.0, 0.0]), torch.tensor([5, 5, 5, 7, 7])
CENTRED = [-2.0, 0.0, 2.0, 0.5, -0.5]


def test_without_a_scale_advantages_are_the_centred_rewards():
    assert group_advantages(REWARDS, GROUPS, scale="none").tolist() == pytest.approx(CENTRED)


def test_scaled_by_the_batch_every_group_is_divided_by_the_std_of_all_rewards():
    expected = [value / (math.sqrt(2.8) + 1e-4) for value in CENTRED]
    assert group_advantages(REWARDS, GROUPS, scale="batch").tolist() == pytest.approx(expected, rel=1e-6)


def test_the_baseline_leaves_a_response_out_of_its_own():
    # 0 - (2 + 4) / 2, 2 - (0 + 4) / 2, 4 - (0 + 2) / 2; 1 - 0, 0 - 1.
    advantages = group_advantages(REWARDS, GROUPS, scale="none", baseline="leave_one_out")
    assert advantages.tolist() == pytest.approx([-3.0, 0.0, 3.0, 1.0, -1.0])


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_whatever_the_baseline_and_scale_equal_rewards_and_lone_responses_get_exactly_zero(scale, baseline):
    rewards = torch.tensor([0.1, 0.1, 0.1, 3.0, 1.0, 2.0])
    groups = torch.tensor([0, 0, 0, 1, 2, 2])
    advantages = group_advantages(rewards, groups, scale=scale, baseline=baseline)
    assert advantages[:4].tolist() == [0.0] * 4
    assert advantages[4] == -advantages[5] < 0
    assert group_advantages(torch.tensor([2.0]), torch.tensor([0]), scale=scale, baseline=baseline).tolist() == [0.0]
