"""95% intervals of evaluations: pure functions of plain numbers.

The unit is always the problem: k responses to one problem are no k independent trials. Compare models by intervals of
their difference, problem by problem (`paired_shares`, `paired_means`), never by whether their own intervals overlap.
"""

from collections.abc import Sequence
from math import sqrt
from statistics import NormalDist, fmean, variance

Z = NormalDist().inv_cdf(0.975)

STUDENT = (12.7062, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.306, 2.26216, 2.22814)  # 1 to 10 degrees

Interval = tuple[float, float]


def wilson(share: float, n: float) -> Interval:
    """Of a share in [0, 1] of `n` independent trials: Wilson's score interval, which never leaves [0, 1].

        (share + Z^2 / 2n ± Z sqrt(share (1 - share) / n + Z^2 / 4n^2)) / (1 + Z^2 / n)

    Wilson, Journal of the American Statistical Association 22 (1927).
    """
    half = Z * sqrt(share * (1 - share) / n + (Z / (2 * n)) ** 2)
    low, high = ((share + Z * Z / (2 * n) + side * half) / (1 + Z * Z / n) for side in (-1, 1))
    return min(share, max(0.0, low)), max(share, min(1.0, high))  # which rounding could leave out at 0 and 1


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


def paired_means(before: Sequence[float], after: Sequence[float], span: float) -> Interval | None:
    """Of mean(after) - mean(before) over the same n problems, whose differences d are in [-span, span]; None below n = 2.

    Student's interval of those differences and two more, -span and span, so that it has a width where no problem changed,
    or few did: paired_shares' half an observation at either end would promise too much there, as simulation shows. (Agresti
    and Caffo, The American Statistician 54 (2000), add as many, a success and a failure, to each share that they compare.)

    Differences problem by problem: Miller, arXiv 2411.00640. With `span` 0, where all rewards are equal, it is None too.
    """
    differences = [second - first for first, second in zip(before, after, strict=True)]
    if len(differences) < 2 or span == 0:
        return None
    low, high = mean_interval([*differences, -span, span])
    return max(-span, low), min(span, high)


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Of the mean of `values`, one a problem: Student's interval; None of a single one, and where all are equal."""
    n = len(values)
    if n < 2 or min(values) == max(values):
        return None
    mean, half = fmean(values), student(n - 1) * sqrt(variance(values) / n)
    return mean - half, mean + half


def student(freedom: int) -> float:
    """The 97.5% quantile of Student's t: of a table up to 10 degrees of freedom, beyond by its expansion at the normal one.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5, three terms.
    """
    if freedom <= len(STUDENT):
        return STUDENT[freedom - 1]
    first = (Z**3 + Z) / 4
    second = (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96
    third = (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384
    return Z + first / freedom + second / freedom**2 + third / freedom**3
