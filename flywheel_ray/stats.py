"""Intervals and tests for a sample that is looked at once: a leaderboard, a report. All pure, each with its source.

    wilson(successes=95, n=100)                         # Interval(estimate=0.95, low=0.888, high=0.978, n=100, …)
    paired_difference(student, teacher, conversations)  # mean(student − teacher) with an interval
    non_inferiority(student, teacher, margin=0.02)      # …, and the p-value of "worse by the margin or more"
    holm([0.01, 0.04])                                  # adjusted for having tried two candidates

What may be looked at again and again while data arrive is in `sequences.py`. The distributions come from
`scipy.special`, which imports in a tenth of the time of `scipy.stats`; statsmodels is what the tests compare with.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
from scipy import special

from flywheel_ray.values import Value

PSEUDO_CLUSTERS = 0.1
"""Added to the clusters seen, at either extreme, when a design effect is estimated: where few clusters hold all the
failures the plain estimate is too small too often, and coverage falls to 92%. A tenth was chosen by simulation."""


class Interval(Value):
    """An estimate with its two-sided interval, from n observations (pairs, for a difference)."""

    estimate: float
    low: float
    high: float
    n: int
    confidence: float = 0.95

    def shifted(self, by: float) -> Interval:
        """The interval of the same quantity plus a constant."""
        moved = {"estimate": self.estimate + by, "low": self.low + by, "high": self.high + by}
        return self.model_copy(update=moved)


class ScoreMean(Value):
    """A mean in [0, 1], and how sure it is: `effective` independent 0/1 values would tell as much."""

    estimate: float
    n: int
    effective: float
    df: float | None = None
    """Degrees of freedom of Student's t; None takes the normal distribution."""

    def interval(self, confidence: float = 0.95) -> Interval:
        """Wilson's interval at the effective size."""
        if self.df is None:
            return _wilson(self.estimate, self.effective, self.n, _z(confidence), confidence)
        quantile = float(special.stdtrit(self.df, 0.5 + confidence / 2))
        return _wilson(self.estimate, self.effective, self.n, quantile, confidence)

    def p_value(self, bar: float) -> float:
        """One-sided p-value of "the true mean is at most `bar`", of the test that the interval inverts."""
        above = self.estimate - bar
        if not 0 < bar < 1:
            return float(above <= 0)
        statistic = above / math.sqrt(bar * (1 - bar) / self.effective)
        return float(special.ndtr(-statistic) if self.df is None else special.stdtr(self.df, -statistic))


class NonInferiority(Value):
    """The difference from the teacher, and the one-sided p-value of "worse by the margin or more"."""

    difference: Interval
    margin: float
    p_value: float


# ── one proportion or mean ────────────────────────────────────────────────────────────────────────────────────────────


def wilson(successes: float, n: float, confidence: float = 0.95) -> Interval:
    """Wilson score interval of a proportion. Counts may be fractions, as effective counts are.

    Source: Wilson 1927, JASA 22:209, in the form of Brown, Cai and DasGupta 2001, Statistical Science 16:101, eq. 4.

    Raises:
        ValueError: n is not positive, or successes are not within 0 … n.
    """
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} are no proportion")
    return _wilson(successes / n, n, round(n), _z(confidence), confidence)


def clopper_pearson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Exact interval of a proportion: coverage is never below `confidence`, and usually above it.

    Source: Clopper and Pearson 1934, Biometrika 26:404, by quantiles of the beta distribution.

    Raises:
        ValueError: n is below 1, or successes are not within 0 … n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} are no proportion")
    tail = (1 - confidence) / 2
    low = float(special.betaincinv(successes, n - successes + 1, tail)) if successes else 0.0
    high = float(special.betaincinv(successes + 1, n - successes, 1 - tail)) if successes < n else 1.0
    return Interval(estimate=successes / n, low=low, high=high, n=n, confidence=confidence)


def score_mean(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> ScoreMean:
    """The mean of scores in [0, 1].

    The effective number is n over the design effect (Kish 1965, Survey Sampling), and more where scores are spread less
    than 0/1 ones of the same mean (for the variance half a score of 0 and half a 1 are added, after Agresti and Min
    2005, Statistics in Medicine 24:729). Wilson's interval at an effective size is one of the forms that Franco et al.
    2019, J. Survey Statistics and Methodology 7:334, recommend. They find that all of them cover too little where a
    design effect is estimated from few clusters, which is what `PSEUDO_CLUSTERS` is for. Degrees of freedom count
    clusters by their shares, (Σ size)² / Σ size², less one.

    Args:
        values: n scores.
        clusters: n labels; values of one label (turns of a conversation) are not independent. None: all independent.

    Raises:
        ValueError: no values, values outside [0, 1], or labels that are not as many.
    """
    x = np.asarray(values, dtype=float)
    if x.size == 0:
        raise ValueError("the mean of no values has no interval")
    if not bool(((x >= 0) & (x <= 1)).all()):
        raise ValueError("scores lie in [0, 1]")
    effective, df = _effective(x, cluster_codes(clusters, x.size))
    if not _are_binary(x):
        p = (float(x.sum()) + 0.5) / (x.size + 1)
        variance = (float(np.sum((x - p) ** 2)) + 0.5 * (p**2 + (1 - p) ** 2)) / (x.size + 1)
        effective *= p * (1 - p) / variance
    return ScoreMean(estimate=float(x.mean()), n=x.size, effective=effective, df=df)


def mean_interval(
    values: Sequence[float], clusters: Sequence[Hashable] | None = None, confidence: float = 0.95
) -> Interval:
    """Interval of the mean of scores in [0, 1]; see `score_mean`. For independent 0/1 scores it is `wilson`."""
    return score_mean(values, clusters).interval(confidence)


# ── two models on the same examples ───────────────────────────────────────────────────────────────────────────────────


def paired_difference(
    a: Sequence[float],
    b: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> Interval:
    """Mean of a − b over pairs scored on the same example.

    Where all b are the same (a teacher that is the reference) it is the interval of a, shifted (`score_mean`). Pairs of
    0/1 scores get Tango's score interval (`tango`), with discordant counts and n over the design effect where they come
    in clusters, and Student's t. Others get a t interval with the cluster-robust standard error (CR1: Liang and Zeger
    1986, Biometrika 73:13, with the factor G/(G−1); Cameron and Miller 2015, J. Human Resources 50:317), and where no
    variance is to be seen Wilson's bound on a change: certainty from a small sample would be false.

    Args:
        a, b: n scores in [0, 1] each.
        clusters: n labels; pairs of one label are not independent. None: all independent.

    Raises:
        ValueError: the two differ in length, or are empty.
    """
    return non_inferiority(a, b, 0.0, clusters, confidence).difference


def non_inferiority(
    a: Sequence[float],
    b: Sequence[float],
    margin: float,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> NonInferiority:
    """How a compares with b, and the one-sided p-value of the hypothesis mean(a − b) ≤ −margin.

    A p-value of at most (1 − confidence)/2 and a lower bound of at least −margin say the same: it is the test that the
    interval of `paired_difference` inverts. Liu et al. 2002, Statistics in Medicine 21:231, on Tango's score test for
    non-inferiority.

    Raises:
        ValueError: the two differ in length, or are empty.
    """
    if len(a) != len(b) or not len(a):
        raise ValueError(f"{len(a)} and {len(b)} scores do not make pairs")
    x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    d = x - y
    mean, groups = float(d.mean()), cluster_codes(clusters, d.size)
    if bool((y == y[0]).all()):
        found = score_mean(a, clusters)
        interval, p = found.interval(confidence).shifted(-float(y[0])), found.p_value(float(y[0]) - margin)
        return NonInferiority(difference=interval, margin=margin, p_value=p)
    effective, df = _effective(d, groups)
    binary = _are_binary(x) and _are_binary(y)
    if df is None and not binary:
        df = max(d.size - 1, 1)
    quantile = _z(confidence) if df is None else float(special.stdtrit(df, 0.5 + confidence / 2))
    if binary:
        only_a, only_b = (d > 0).sum() * effective / d.size, (d < 0).sum() * effective / d.size
        low, high = _tango_bounds(only_a, only_b, effective, quantile)
        statistic = _tango_statistic(only_a, only_b, effective, -margin)
    else:
        error = _clustered_error(d - mean, groups)
        count = int(groups.max()) + 1
        half = quantile * error if error > 1e-12 else _wilson(0.0, count, count, _z(confidence), confidence).high
        low, high = max(-1.0, mean - half), min(1.0, mean + half)
        statistic = (mean + margin) * quantile / half
    p = float(special.ndtr(-statistic) if df is None else special.stdtr(df, -statistic))
    interval = Interval(estimate=mean, low=low, high=high, n=d.size, confidence=confidence)
    return NonInferiority(difference=interval, margin=margin, p_value=p)


def tango(only_a: float, only_b: float, n: float, confidence: float = 0.95) -> Interval:
    """Score interval of the difference p_a − p_b of two paired proportions.

    Args:
        only_a: pairs where only A was right.
        only_b: pairs where only B was right.
        n: all pairs.

    Source: Tango 1998, Statistics in Medicine 17:891, eq. 11 to 14; recommended for paired proportions by Fagerland,
    Lydersen and Laake 2014, Statistics in Medicine 33:2850. Its limits solve the score test for each difference.

    Raises:
        ValueError: n is not positive, or there are more discordant pairs than pairs.
    """
    if n <= 0 or min(only_a, only_b) < 0 or only_a + only_b > n:
        raise ValueError(f"{only_a} and {only_b} discordant pairs of {n} are no table")
    low, high = _tango_bounds(only_a, only_b, n, _z(confidence))
    return Interval(estimate=(only_a - only_b) / n, low=low, high=high, n=round(n), confidence=confidence)


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided exact p-value that two paired classifiers are equally often right.

    Args:
        only_a: pairs where only A was right.
        only_b: pairs where only B was right.

    Source: McNemar 1947, Psychometrika 12:153; exact form as a binomial test on the discordant pairs.
    """
    n = only_a + only_b
    # Under the null hypothesis the distribution is symmetric, so the two tails are equal.
    return 1.0 if n == 0 else min(1.0, 2 * float(special.bdtr(min(only_a, only_b), n, 0.5)))


# ── several candidates, and how much data ─────────────────────────────────────────────────────────────────────────────


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number: rejecting those ≤ α makes any false claim with probability α at most.

    Source: Holm 1979, Scandinavian J. Statistics 6:65. It needs no independence, and candidates that share their
    evaluation examples have none.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def pairs_needed(
    difference: float,
    discordance: float,
    margin: float = 0.0,
    alpha: float = 0.025,
    power: float = 0.8,
    design_effect: float = 1.0,
) -> int | None:
    """How many pairs a one-sided test needs to tell the true difference from −margin; None where they are the same.

    Args:
        difference: true mean of a − b. Above −margin: pairs to show non-inferiority. Below: pairs to show inferiority.
        discordance: share of pairs that differ, in (0, 1], at least |difference|.
        margin: 0 makes it the sample size of McNemar's test.
        alpha: one-sided error.
        power: probability of a decision at that size.
        design_effect: by how much clustered pairs are worth less than independent ones (Kish 1965).

    Source: Nam 1997, Biometrics 53:1422: the variance under the hypothesis is that of Tango's test at the expected
    counts; for margin 0 that is Connor 1987, Biometrics 43:207.

    Raises:
        ValueError: discordance is not in [|difference|, 1], or alpha, power or design_effect is no such number.
    """
    if not abs(difference) <= discordance <= 1 or not 0 < alpha < 1 or not 0 < power < 1 or design_effect <= 0:
        raise ValueError(
            f"no test has difference {difference}, discordance {discordance}, alpha {alpha}, power {power}"
        )
    gap = abs(difference + margin)
    if gap < 1e-12:
        return None
    better, worse = (discordance + difference) / 2, (discordance - difference) / 2
    under_null = 2 * _only_b(better, worse, 1.0, -margin) - margin * (1 + margin)
    under_truth = discordance - difference**2
    root = _quantile(1 - alpha) * math.sqrt(max(under_null, 0)) + _quantile(power) * math.sqrt(max(under_truth, 0))
    return max(1, math.ceil(design_effect * (root / gap) ** 2))


def design_effect(values: Sequence[float], clusters: Sequence[Hashable] | None) -> float:
    """How many clustered values tell as much as one independent one; at least 1. Source: Kish 1965, Survey Sampling."""
    x = np.asarray(values, dtype=float)
    return x.size / _effective(x, cluster_codes(clusters, x.size))[0]


def sample_ratio_p_value(counts: Sequence[int], weights: Sequence[float]) -> float:
    """Chi-square p-value that traffic was split by these weights, for one look at a finished experiment.

    Source: Fabijan et al. 2019, KDD, "Diagnosing Sample Ratio Mismatch in Online Controlled Experiments". While traffic
    still arrives use `sequences.sample_ratio_e_value`.

    Raises:
        ValueError: counts and weights differ in length, or a weight is not positive.
    """
    if len(counts) != len(weights) or any(w <= 0 for w in weights):
        raise ValueError("every count needs one positive weight")
    total = sum(counts)
    if total == 0 or len(counts) < 2:
        return 1.0
    expected = [total * w / sum(weights) for w in weights]
    statistic = sum((count - e) ** 2 / e for count, e in zip(counts, expected, strict=True))
    return float(special.chdtrc(len(counts) - 1, statistic))


# ── within ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _quantile(p: float) -> float:
    return float(special.ndtri(p))


def _z(confidence: float) -> float:
    return _quantile(0.5 + confidence / 2)


def _wilson(p: float, n: float, shown: int, z: float, confidence: float) -> Interval:
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At 0 and 1 the exact bound is the estimate; rounding must not put it on the other side.
    low, high = min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half))
    return Interval(estimate=p, low=low, high=high, n=shown, confidence=confidence)


def _only_b(only_a: float, only_b: float, n: float, difference: float) -> float:
    """The probability that only B is right, by maximum likelihood where p_a − p_b is `difference` (Tango 1998)."""
    linear = -only_a - only_b + (2 * n - only_a + only_b) * difference
    constant = -only_b * difference * (1 - difference)
    return (math.sqrt(max(linear**2 - 8 * n * constant, 0.0)) - linear) / (4 * n)


def _tango_statistic(only_a: float, only_b: float, n: float, difference: float) -> float:
    """Standard normal under p_a − p_b = difference; falls as `difference` grows."""
    variance = n * (2 * _only_b(only_a, only_b, n, difference) + difference * (1 - difference))
    above = only_a - only_b - n * difference
    if variance <= 1e-15:
        return 0.0 if abs(above) < 1e-12 else math.copysign(math.inf, above)
    return above / math.sqrt(variance)


def _tango_bounds(only_a: float, only_b: float, n: float, z: float) -> tuple[float, float]:
    from scipy import optimize  # a third of a second, which commands without paired intervals need not wait for

    estimate = (only_a - only_b) / n

    def bound(end: float, target: float) -> float:
        def above(difference: float) -> float:
            return min(max(_tango_statistic(only_a, only_b, n, difference), -1e9), 1e9) - target

        if abs(estimate - end) < 1e-12 or above(end) * above(estimate) > 0:
            return end
        return float(optimize.brentq(above, *sorted((end, estimate)), xtol=1e-12))

    return bound(-1.0, z), bound(1.0, -z)


def _are_binary(x: np.ndarray) -> bool:
    return bool(((x == 0) | (x == 1)).all())


def cluster_codes(clusters: Sequence[Hashable] | None, n: int) -> np.ndarray:
    """Cluster labels as 0 … G−1, in first-seen order; shape (n,). None: each value is its own.

    Raises:
        ValueError: there are not n labels.
    """
    if clusters is None:
        return np.arange(n)
    if len(clusters) != n:
        raise ValueError(f"{len(clusters)} cluster labels for {n} values")
    index: dict[Hashable, int] = {}
    return np.asarray([index.setdefault(label, len(index)) for label in clusters], dtype=int)


def _effective(x: np.ndarray, groups: np.ndarray) -> tuple[float, float | None]:
    """The number of independent values that tell as much, and the degrees of freedom that go with it."""
    n, count = x.size, int(groups.max()) + 1
    if count == n:
        return float(n), None
    sizes = np.bincount(groups, minlength=count)
    df = max(n**2 / float(np.sum(sizes.astype(float) ** 2)) - 1, 1.0)
    least, most = float(x.min()), float(x.max())
    if least == most:
        # Nothing shows how alike one cluster's values are, so each cluster counts once.
        return float(count), df
    extra = PSEUDO_CLUSTERS * n / count
    total = n + 2 * extra
    mean = (float(x.sum()) + extra * (least + most)) / total
    spread = (least - mean) ** 2 + (most - mean) ** 2
    sums = np.bincount(groups, weights=x - mean, minlength=count)
    independent = float(np.sum((x - mean) ** 2)) + extra * spread
    clustered = float(np.sum(sums**2)) + PSEUDO_CLUSTERS * (n / count) ** 2 * spread
    clusters = count + 2 * PSEUDO_CLUSTERS
    return n / max(clusters / (clusters - 1) * clustered / independent, 1.0), df


def _clustered_error(residuals: np.ndarray, groups: np.ndarray) -> float:
    """CR1 standard error of a mean from its residuals; 0.0 where fewer than two clusters leave it unknown."""
    count = int(groups.max()) + 1
    if count < 2:
        return 0.0
    sums = np.bincount(groups, weights=residuals, minlength=count)
    return float(np.sqrt(count / (count - 1) * np.sum(sums**2)) / residuals.size)
