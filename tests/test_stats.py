"""Formulas against published values and a reference implementation, coverage by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as scipy_stats
from scipy.optimize import minimize
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from flywheel_ray.stats import (
    clopper_pearson,
    design_effect,
    holm,
    mcnemar_exact,
    mean_interval,
    non_inferiority,
    paired_difference,
    pairs_needed,
    sample_ratio_p_value,
    score_mean,
    tango,
    wilson,
)


def test_wilson_equals_scipy_and_a_published_example() -> None:
    for k, n in ((0, 10), (3, 10), (95, 100), (100, 100)):
        reference = scipy_stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
        found = wilson(k, n)
        assert (found.low, found.high) == pytest.approx((reference.low, reference.high), abs=1e-12)
        assert (found.low, found.high) == pytest.approx(proportion_confint(k, n, 0.05, "wilson"), abs=1e-12)
        exact = clopper_pearson(k, n)
        assert (exact.low, exact.high) == pytest.approx(proportion_confint(k, n, 0.05, "beta"), abs=1e-12)
    # Newcombe 1998, Statistics in Medicine 17:857, Table I, method 3: 81 of 263.
    newcombe = wilson(81, 263)
    assert (round(newcombe.low, 4), round(newcombe.high, 4)) == (0.2553, 0.3662)
    # The same table, method 5, the exact interval.
    exact = clopper_pearson(81, 263)
    assert (round(exact.low, 4), round(exact.high, 4)) == (0.2527, 0.3676)


def test_wilson_refuses_what_is_no_proportion() -> None:
    for interval in (wilson, clopper_pearson):
        with pytest.raises(ValueError, match="no proportion"):
            interval(3, 2)
        with pytest.raises(ValueError, match="no proportion"):
            interval(0, 0)


def test_mcnemar_is_the_binomial_test_of_the_discordant_pairs() -> None:
    # 59 of 160 in closed form: twice the lower tail of Binomial(160, 1/2).
    assert mcnemar_exact(59, 101) == pytest.approx(2 * scipy_stats.binom.cdf(59, 160, 0.5))
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(0, 6) == pytest.approx(2 * 0.5**6)


def test_mcnemar_equals_statsmodels() -> None:
    for b, c in ((0, 1), (3, 3), (4, 11), (59, 101)):
        assert mcnemar_exact(b, c) == pytest.approx(mcnemar([[9, b], [c, 9]], exact=True).pvalue)


def test_tango_equals_published_intervals() -> None:
    # Fagerland, Lydersen and Laake 2014, Statistics in Medicine 33:2850: airway hyper-responsiveness, (1, 1, 7, 12).
    airway = tango(1, 7, 21)
    assert (round(airway.low, 3), round(airway.high, 3)) == (-0.517, -0.026)


@pytest.mark.parametrize(("b", "c", "n"), [(1, 7, 21), (40, 20, 160), (0, 5, 50), (12, 2, 50)])
def test_tango_bounds_are_where_the_score_test_says_so(b: int, c: int, n: int) -> None:
    """Against the definition: the constrained likelihood is maximised numerically, not by the closed form."""
    found = tango(b, c, n)

    def z(difference: float) -> float:
        def negative_likelihood(q: np.ndarray) -> float:
            p = np.array([q[0] + difference, q[0], 1 - 2 * q[0] - difference])
            return -float(np.sum(np.array([b, c, n - b - c]) * np.log(np.maximum(p, 1e-300))))

        low = max(0.0, -difference) + 1e-12
        best = minimize(negative_likelihood, [low + 0.01], bounds=[(low, (1 - difference) / 2 - 1e-12)], tol=1e-14)
        variance = n * (2 * best.x[0] + difference - difference**2)
        return float((b - c - n * difference) / np.sqrt(variance))

    assert z(found.low) == pytest.approx(1.959964, abs=2e-3)
    assert z(found.high) == pytest.approx(-1.959964, abs=2e-3)


def test_a_teacher_that_is_the_reference_makes_the_difference_wilson() -> None:
    """Where the teacher is right by definition the paired interval is the interval of agreement, shifted by one."""
    student = [1.0] * 187 + [0.0] * 13
    found, agreement = paired_difference(student, [1.0] * 200), mean_interval(student)
    assert (found.low, found.high) == pytest.approx((agreement.low - 1, agreement.high - 1), abs=1e-9)
    assert agreement.shifted(-1).low == pytest.approx(found.low)


def test_non_inferiority_says_what_the_interval_says() -> None:
    rng = np.random.default_rng(5)
    seen = set()
    for size, clusters in ((300, None), (300, np.arange(300) // 3)):
        for _ in range(40):
            a, b = (rng.random((2, size)) < 0.95).astype(float)
            labels = None if clusters is None else clusters.tolist()
            found = non_inferiority(a.tolist(), b.tolist(), 0.03, labels)
            shown = found.difference.low >= -0.03
            assert shown == (found.p_value <= 0.025)
            seen.add(shown)
    assert seen == {True, False}
    graded = non_inferiority([0.9, 0.8, 1.0, 0.7] * 20, [0.9, 0.9, 0.9, 0.8] * 20, 0.1)
    assert (graded.p_value <= 0.025) == (graded.difference.low >= -0.1)


def test_non_inferiority_at_the_margin_errs_as_often_as_it_may() -> None:
    """4% only the teacher right, 2% only the student: exactly 2 points worse, so 2.5% of tests may say otherwise."""
    rng = np.random.default_rng(6)
    shown, runs = 0, 1500
    for _ in range(runs):
        u = rng.random(400)
        a, b = np.where(u < 0.04, 0.0, 1.0), np.where((u >= 0.04) & (u < 0.06), 0.0, 1.0)
        shown += non_inferiority(a.tolist(), b.tolist(), 0.02).p_value <= 0.025
    assert 0.012 <= shown / runs <= 0.04


def test_holm_equals_statsmodels() -> None:
    for p_values in ([0.01], [0.04, 0.01, 0.03, 0.9], [0.5, 0.5, 0.001], []):
        expected = multipletests(p_values, method="holm")[1].tolist() if p_values else []
        assert holm(p_values) == pytest.approx(expected)


def test_pairs_needed_reach_their_power() -> None:
    # Nam 1997, by Tango's variance at the expected counts: 549 where 2% differ, and 387 if that were 2% − 0.0004.
    assert pairs_needed(0.0, 0.02, margin=0.02) == 549
    # Connor 1987: (1.95996·√0.09 + 0.84162·√(0.09 − 0.0009))² / 0.0009 = 782.5, by hand.
    assert pairs_needed(-0.03, 0.09) == 783
    assert pairs_needed(-0.02, 0.09, margin=0.02) is None
    assert pairs_needed(0.0, 0.09, margin=0.02, design_effect=2) == pytest.approx(
        2 * pairs_needed(0.0, 0.09, margin=0.02), abs=1
    )
    rng = np.random.default_rng(7)
    size = pairs_needed(0.0, 0.06, margin=0.02)
    shown, runs = 0, 500
    for _ in range(runs):
        u = rng.random(size)
        shown += (
            non_inferiority((u >= 0.03).astype(float).tolist(), (u < 0.97).astype(float).tolist(), 0.02).p_value < 0.025
        )
    assert 0.75 <= shown / runs <= 0.86
    for wrong in ({"discordance": 0.01}, {"discordance": 2.0}, {"discordance": 0.1, "alpha": 0.0}):
        with pytest.raises(ValueError, match="no test"):
            pairs_needed(-0.03, **wrong)


def test_design_effect() -> None:
    rng = np.random.default_rng(8)
    rates = rng.beta(1, 1, size=400)
    values = (rng.random((400, 5)) < rates[:, None]).astype(float).ravel()
    labels = np.repeat(np.arange(400), 5).tolist()
    # An intraclass correlation of 1/3 among five values: 1 + 4/3 (Kish 1965).
    assert design_effect(values.tolist(), labels) == pytest.approx(1 + 4 / 3, rel=0.15)
    assert design_effect(values.tolist(), None) == 1.0
    assert design_effect([1.0] * 20, ["a", "b"] * 10) == 10.0


def test_clustered_interval_is_wider_and_covers() -> None:
    rng = np.random.default_rng(1)
    runs, covered, naive = 600, 0, 0
    for _ in range(runs):
        rates = rng.beta(4, 1, size=60)  # mean 0.8; turns of one conversation share their rate
        values = np.concatenate([rng.random(4) < rate for rate in rates]).astype(float)
        clusters = np.repeat(np.arange(60), 4)
        found = mean_interval(values.tolist(), clusters.tolist())
        covered += found.low <= 0.8 <= found.high
        flat = wilson(int(values.sum()), values.size)
        naive += flat.low <= 0.8 <= flat.high
    assert 0.92 <= covered / runs <= 0.98
    assert naive < covered


def test_intervals_claim_no_certainty_from_a_clean_sheet() -> None:
    assert mean_interval([1.0] * 20).low < 0.9
    assert mean_interval([1.0] * 20, ["a", "b"] * 10).low < 0.5
    assert paired_difference([1.0] * 20, [1.0] * 20).low < -0.1
    clean = paired_difference([1.0, 0.0] * 10, [1.0, 0.0] * 10)
    assert clean.low < -0.1 < 0.1 < clean.high
    graded = paired_difference([0.3, 0.7] * 10, [0.3, 0.7] * 10)
    assert graded.low < -0.1 < 0.1 < graded.high


def test_graded_scores_near_the_top_claim_no_more_than_they_know() -> None:
    """A single 0.99 among ones once made 60 scores certain; and the test errs as often as it may at the bar."""
    assert mean_interval([1.0] * 59 + [0.99]).low < 0.95
    rng = np.random.default_rng(4)
    for size in (60, 200, 500):
        shown = 0
        for _ in range(600):
            x = rng.choice([0.0, 0.9, 1.0], p=[0.015, 0.05, 0.935], size=size)  # mean 0.98
            shown += score_mean(x.tolist()).p_value(0.98) <= 0.025
        assert shown / 600 <= 0.06, size


def test_scores_must_be_scores() -> None:
    for wrong in ([1.5], [-0.1], [float("nan")]):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            score_mean(wrong)
    with pytest.raises(ValueError, match="no values"):
        score_mean([])


def test_a_p_value_says_what_the_interval_says() -> None:
    rng = np.random.default_rng(9)
    for clusters in (None, np.arange(120) // 4):
        labels = None if clusters is None else clusters.tolist()
        for x in (rng.random(120), (rng.random(120) < 0.9).astype(float)):
            found = score_mean(x.tolist(), labels)
            for confidence in (0.9, 0.95, 0.99):
                low = found.interval(confidence).low
                assert found.p_value(low) == pytest.approx((1 - confidence) / 2, rel=1e-6)


def test_paired_difference_matches_the_paired_t_interval() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.random(50), rng.random(50)
    reference = scipy_stats.ttest_rel(a, b).confidence_interval(0.95)
    found = paired_difference(a.tolist(), b.tolist())
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high))


def test_exact_and_chi_square_p_values_equal_scipy_stats() -> None:
    for b, c in ((0, 1), (3, 3), (4, 11), (59, 101)):
        assert mcnemar_exact(b, c) == pytest.approx(scipy_stats.binomtest(b, b + c, 0.5).pvalue)
    for counts, weights in (([480, 520], [1, 1]), ([100, 210, 690], [0.1, 0.2, 0.7])):
        expected = [sum(counts) * w / sum(weights) for w in weights]
        assert sample_ratio_p_value(counts, weights) == pytest.approx(scipy_stats.chisquare(counts, expected).pvalue)


def test_sample_ratio() -> None:
    assert sample_ratio_p_value([500, 500], [1, 1]) == 1.0
    # Fabijan et al. 2019: 821,588 against 815,482 users at 50/50 is a mismatch.
    assert sample_ratio_p_value([821588, 815482], [1, 1]) < 1e-5
