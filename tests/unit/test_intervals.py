"""Intervals of evaluations against tables, hand-worked values, and simulated truth."""

from statistics import fmean

import numpy as np
import pytest
from scipy import stats

from grpo.intervals import clustered_share, mean_interval, paired_means, paired_shares, student, wilson

SETS = 2000


def coverage(intervals: list[tuple[float, float]], truth: float) -> float:
    return fmean(low <= truth <= high for low, high in intervals)


def test_wilsons_interval_of_8_in_10():
    # (0.8 + 0.192073 ± 1.959964 sqrt(0.016 + 0.0096036)) / 1.384146
    assert wilson(0.8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)


def test_wilsons_interval_has_a_width_at_both_ends_and_stays_within_0_and_1():
    # At 0 of n the upper end is Z^2 / (n + Z^2).
    assert wilson(0, 10) == pytest.approx((0, 3.841459 / 13.841459), abs=1e-6)
    assert wilson(1, 10) == pytest.approx((10 / 13.841459, 1), abs=1e-6)


@pytest.mark.parametrize("freedom", [*range(1, 31), 100, 1000])
def test_students_quantile_is_that_of_scipy(freedom):
    assert student(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-5 if freedom <= 10 else 2e-4)


def test_the_interval_of_a_mean_is_students():
    # Mean 3, variance 2.5, 5 values: 3 ± 2.7764 sqrt(0.5).
    assert mean_interval([1, 2, 3, 4, 5]) == pytest.approx((3 - 1.9632, 3 + 1.9632), abs=1e-4)
    assert mean_interval([2.0]) is None
    assert mean_interval([1.0] * 5) is None


def test_the_interval_of_paired_means_has_a_width_where_nothing_changed_and_stays_within_the_range():
    # Ten differences of 0 or 1 and two more, -1 and 1: mean 1 / 4, variance (5 - 12 / 16) / 11.
    low, high = paired_means([0.0] * 10, [1.0] * 3 + [0.0] * 7, 1.0)
    assert (low, high) == pytest.approx((0.25 - 2.20099 * 0.179435, 0.25 + 2.20099 * 0.179435), abs=1e-3)
    low, high = paired_means([1.0] * 8, [1.0] * 8, 1.0)
    assert low == -high == pytest.approx(-2.26216 * (2 / 9 / 10) ** 0.5)
    assert paired_means([0.0, 0.0], [2.0, 2.0], 2.0)[1] == 2.0
    assert paired_means([1.0], [0.0], 1.0) is None
    assert paired_means([1.0] * 8, [1.0] * 8, 0.0) is None


@pytest.mark.parametrize(
    ("change", "n"), [(0.01, 30), (0.01, 100), (0.02, 100), (0.02, 300), (0.05, 30), (0.2, 30), (0.2, 200)]
)
def test_rare_changes_are_within_the_interval_in_92_of_100_sets(change, n):
    rng = np.random.default_rng(4)
    after = (rng.random((SETS, n)) < change).astype(float)
    intervals = [paired_means([0.0] * n, row.tolist(), 1.0) for row in after]
    assert coverage(intervals, change) >= 0.92


def test_the_interval_of_a_paired_difference():
    # 5 turned right, 1 wrong, 4 stayed: (5 - 1) / 12 ± 1.959964 sqrt(7 - 16 / 12) / 12
    before = [False] * 5 + [True] * 5
    after = [True] * 5 + [False] + [True] * 4
    assert paired_shares(before, after) == pytest.approx((1 / 3 - 0.388800, 1 / 3 + 0.388800), abs=1e-5)


def test_the_interval_of_a_paired_difference_has_a_width_and_stays_within_1():
    assert paired_shares([False] * 3, [True] * 3)[1] == 1
    low, high = paired_shares([True] * 10, [True] * 10)
    assert low == -high < 0


def test_responses_that_agree_within_a_problem_count_as_one():
    """Eight equal responses tell as much as one; eight that differ freely tell eight times that."""
    shares = [1.0] * 30 + [0.0] * 20
    assert clustered_share(shares, 8) == pytest.approx(wilson(0.6, 49))
    assert clustered_share([0.5] * 49 + [0.55], 8) == wilson(0.501, 400)


def test_a_share_without_spread_is_one_trial_a_problem():
    assert clustered_share([1.0] * 20, 8) == wilson(1, 20)
    assert clustered_share([0.25], 8) == wilson(0.25, 1)


@pytest.mark.parametrize("share", [0.3, 0.9])
@pytest.mark.parametrize("n", [20, 200])
def test_wilsons_interval_holds_the_truth_in_95_of_100_sets(n, share):
    found = np.random.default_rng(0).binomial(n, share, SETS) / n
    assert 0.93 <= coverage([wilson(x, n) for x in found], share) <= 0.98


@pytest.mark.parametrize(("a", "b"), [(0.3, 0.3), (2.0, 2.0), (5.0, 1.0)])
@pytest.mark.parametrize("n", [30, 200])
def test_mean_at_k_holds_the_truth_in_95_of_100_sets_however_alike_a_problems_responses_are(n, a, b):
    rng = np.random.default_rng(1)
    shares = rng.binomial(8, rng.beta(a, b, (SETS, n))) / 8
    intervals = [clustered_share(row.tolist(), 8) for row in shares]
    assert 0.93 <= coverage(intervals, a / (a + b)) <= 0.975
    if (a, b) == (0.3, 0.3):  # taking all responses for independent trials would promise far too much
        assert coverage([wilson(row.mean(), 8 * n) for row in shares], 0.5) < 0.7


@pytest.mark.parametrize(("right", "wrong"), [(0.3, 0.05), (0.1, 0.1), (0.65, 0.01)])
@pytest.mark.parametrize("n", [20, 200])
def test_a_paired_difference_holds_the_truth_in_95_of_100_sets(n, right, wrong):
    rng = np.random.default_rng(2)
    draws = rng.random((SETS, n))
    before = (draws >= right) & (draws < right + wrong + 0.1)
    after = (draws < right) | ((draws >= right + wrong) & (draws < right + wrong + 0.1))
    intervals = [paired_shares(b, a) for b, a in zip(before.tolist(), after.tolist(), strict=True)]
    assert 0.93 <= coverage(intervals, right - wrong) <= 0.99


@pytest.mark.parametrize("n", [5, 20, 200])
def test_a_mean_holds_the_truth_in_95_of_100_sets(n):
    values = np.random.default_rng(3).normal(1.5, 2.0, (SETS, n))
    assert 0.935 <= coverage([mean_interval(row.tolist()) for row in values], 1.5) <= 0.965


def test_wilsons_interval_has_its_share_in_it_whatever_rounding_does():
    for n in range(1, 60):
        for right in range(n + 1):
            low, high = wilson(right / n, n)
            assert 0 <= low <= right / n <= high <= 1
