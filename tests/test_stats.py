"""Formulas against published values and a reference implementation, coverage by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as scipy_stats

from flywheel_ray.stats import (
    confidence_sequence,
    mcnemar_exact,
    mean_interval,
    paired_difference,
    sample_ratio_p_value,
    wilson,
)


def test_wilson_equals_scipy_and_a_published_example() -> None:
    for k, n in ((0, 10), (3, 10), (95, 100), (100, 100)):
        reference = scipy_stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
        found = wilson(k, n)
        assert (found.low, found.high) == pytest.approx((reference.low, reference.high), abs=1e-12)
    # Newcombe 1998, Statistics in Medicine 17:857, Table I, method 3: 81 of 263.
    newcombe = wilson(81, 263)
    assert (round(newcombe.low, 4), round(newcombe.high, 4)) == (0.2553, 0.3662)


def test_wilson_refuses_what_is_no_proportion() -> None:
    with pytest.raises(ValueError, match="no proportion"):
        wilson(3, 2)


def test_mcnemar_is_the_binomial_test_of_the_discordant_pairs() -> None:
    # 59 of 160 in closed form: twice the lower tail of Binomial(160, 1/2).
    assert mcnemar_exact(59, 101) == pytest.approx(2 * scipy_stats.binom.cdf(59, 160, 0.5))
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(0, 6) == pytest.approx(2 * 0.5**6)


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
    clean = paired_difference([1.0] * 20, [1.0] * 20)
    assert clean.low < -0.1 < 0.1 < clean.high


def test_paired_difference_matches_the_paired_t_interval() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.random(50), rng.random(50)
    reference = scipy_stats.ttest_rel(a, b).confidence_interval(0.95)
    found = paired_difference(a.tolist(), b.tolist())
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high))


@pytest.mark.parametrize("rate", [0.5, 0.9, 0.98])
def test_confidence_sequence_holds_at_every_look(rate: float) -> None:
    """Missing the truth at any of 1,000 looks happens in at most 5% of runs, where a fixed interval misses far more."""
    rng = np.random.default_rng(3)
    runs, missed = 400, 0
    for _ in range(runs):
        values = (rng.random(1000) < rate).astype(float).tolist()
        # The sequence is a running intersection, so the last look fails if any look did.
        found = confidence_sequence(values)
        missed += not found.low <= rate <= found.high
    assert missed / runs <= 0.05


def test_confidence_sequence_narrows_and_checks_bounds() -> None:
    assert (confidence_sequence([]).low, confidence_sequence([]).high) == (0.0, 1.0)
    narrow, wide = confidence_sequence([1.0] * 500), confidence_sequence([1.0] * 20)
    assert narrow.low > 0.95 > wide.low
    with pytest.raises(ValueError, match="outside"):
        confidence_sequence([2.0])


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
