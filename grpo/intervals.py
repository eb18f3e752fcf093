"""95% intervals of evaluations: pure functions of plain numbers.

The unit is always the problem: k responses to one problem are no k independent trials. Compare models by intervals of
their difference, problem by problem (`paired_shares`, `mean_interval`), never by whether their own intervals overlap.
"""

from collections.abc import Sequence
from math import sqrt
from statistics import NormalDist, fmean, variance

Z = NormalDist().inv_cdf(0.975)

Interval = tuple[float, float]


def wilson(share: float, n: float) -> Interval:
    """Of a share in [0, 1] of `n` independent trials: Wilson's score interval, which never leaves [0, 1].

        (share + Z^2 / 2n ± Z sqrt(share (1 - share) / n + Z^2 / 4n^2)) / (1 + Z^2 / n)

    Wilson, Journal of the American Statistical Association 22 (1927).
    """
    half = Z * sqrt(share * (1 - share) / n + (Z / (2 * n)) ** 2)
    low, high = ((share + Z * Z / (2 * n) + side * half) / (1 + Z * Z / n) for side in (-1, 1))
    return max(0.0, low), min(1.0, high)


def clustered_share(shares: Sequence[float], k: int) -> Interval:
    """Of the mean of `shares`, each of them the share of right ones among the k responses to one problem.

    Wilson's interval for as many independent trials as have the variance that the problems' shares show,

        n_effective = mean (1 - mean) / (variance(shares) / n),   at most n k

    and n where they do not vary. Franco, Little, Louis, Slud, Journal of Survey Statistics and Methodology 7 (2019).
    """
    n, mean = len(shares), fmean(shares)
    spread = variance(shares) / n if n > 1 else 0.0
    return wilson(mean, min(n * k, mean * (1 - mean) / spread) if spread > 0 else n)


def paired_shares(before: Sequence[bool], after: Sequence[bool]) -> Interval:
    """Of share(after) - share(before) over the same n problems: Wald's interval with half a problem added to each case.

    With `right` and `wrong` the numbers of problems that turned right and wrong:

        (right - wrong) / (n + 2) ± Z sqrt(right + wrong + 1 - (right - wrong)^2 / (n + 2)) / (n + 2)

    Agresti and Min, Statistics in Medicine 24 (2005).
    """
    pairs = list(zip(before, after, strict=True))
    right, wrong, n = pairs.count((False, True)), pairs.count((True, False)), len(pairs) + 2
    centre, half = (right - wrong) / n, Z * sqrt(right + wrong + 1 - (right - wrong) ** 2 / n) / n
    return max(-1.0, centre - half), min(1.0, centre + half)


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Of the mean of `values`, one a problem: Student's interval, without width where all are equal; None of a single one.

    For two models the values are the differences problem by problem: Miller, arXiv 2411.00640.
    """
    n = len(values)
    if n < 2:
        return None
    mean, half = fmean(values), student(n - 1) * sqrt(variance(values) / n)
    return mean - half, mean + half


def student(freedom: int) -> float:
    """The 97.5% quantile of Student's t, by its expansion at the normal one: 0.3% short at 4 degrees of freedom, 3% at 2.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5, three terms.
    """
    first = (Z**3 + Z) / 4
    second = (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96
    third = (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384
    return Z + first / freedom + second / freedom**2 + third / freedom**3
