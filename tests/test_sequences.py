"""Sequences that may be looked at all the time: by hand, against exact probabilities, and by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from flywheel_ray.sequences import (
    BETS,
    bounds,
    close,
    confidence_sequence,
    decide,
    log_e_process,
    sample_ratio_e_value,
    weigh,
)

signs = st.lists(st.sampled_from([-1.0, 0.0, 1.0]), max_size=60)


def drawn(rng: np.random.Generator, n: int, difference: float, discordance: float) -> list[float]:
    u = rng.random(n)
    better, worse = (discordance + difference) / 2, (discordance - difference) / 2
    return ((u < better).astype(float) - (u > 1 - worse)).tolist()


# ── conversations ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_pairs_wait_for_their_conversation_to_end() -> None:
    values, labels, times = [1.0, 0.0, -1.0, 1.0], ["a", "b", "a", "c"], [0.0, 1.0, 5.0, 100.0]
    found = close(values, labels, times, idle_s=10, as_of=104)
    assert (found.means.tolist(), found.sizes.tolist()) == ([0.0, 0.0], [1.0, 2.0])  # b ended first, then a
    assert (found.n, found.open_pairs) == (3, 1)
    assert close(values, labels, times, idle_s=10, as_of=109.9).open_pairs == 1
    assert close(values, labels, times, idle_s=10, as_of=110).open_pairs == 0
    assert close(values, labels, times, idle_s=10).n == 4  # no present: everything has ended


def test_what_comes_after_the_end_is_another_conversation() -> None:
    assert close([1.0, -1.0], ["a", "a"], [0.0, 9.9], idle_s=10).means.tolist() == [0.0]
    assert close([1.0, -1.0], ["a", "a"], [0.0, 10.0], idle_s=10).means.tolist() == [1.0, -1.0]
    assert close([1.0, -1.0], ["a", "a"], [0.0, 10.0]).means.tolist() == [0.0]  # one look at the end


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_time_only_adds_conversations(data: st.DataObject) -> None:
    """What has been counted at one look is counted the same at every later one: so a decision can be replayed."""
    n = data.draw(st.integers(0, 20))
    labels = data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n))
    times = sorted(data.draw(st.lists(st.integers(0, 100), min_size=n, max_size=n)))
    values = [float(i) for i in range(n)]
    now, later = sorted(data.draw(st.tuples(st.integers(0, 120), st.integers(0, 120))))

    def seen(at: int) -> list[float]:
        k = sum(t <= at for t in times)
        return close(values[:k], labels[:k], times[:k], 7, at).means.tolist()

    assert seen(later)[: len(seen(now))] == seen(now)


def test_labels_must_be_as_many_as_values() -> None:
    with pytest.raises(ValueError, match="do not go together"):
        close([1.0], ["a", "b"])


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_records_in_any_order_give_the_same_evidence(data: st.DataObject) -> None:
    n = data.draw(st.integers(0, 20))
    values = data.draw(st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=n, max_size=n))
    labels = data.draw(st.lists(st.integers(0, 6), min_size=n, max_size=n))
    times = data.draw(st.lists(st.integers(0, 100), min_size=n, max_size=n, unique=True))
    order = data.draw(st.permutations(range(n)))

    def found(indices: list[int]) -> object:
        return weigh(
            close([values[i] for i in indices], [labels[i] for i in indices], [times[i] for i in indices], 7, 90), 0.02
        )

    assert found(list(range(n))) == found(list(order))


# ── e-processes ───────────────────────────────────────────────────────────────────────────────────────────────────────


@given(signs)
def test_at_zero_only_discordant_pairs_count(values: list[float]) -> None:
    """By hand: the mean over the stakes of (1 + stake)^better · (1 − stake)^worse."""
    paired = close(values)
    log_e = log_e_process(paired, 0.0, "above")
    better, worse = values.count(1.0), values.count(-1.0)
    expected = np.mean((1 + BETS) ** better * (1 - BETS) ** worse)
    assert (log_e[-1] if values else 0.0) == pytest.approx(np.log(expected), abs=1e-9)


@given(st.floats(-0.5, 0.5), st.floats(0.0, 1.0))
def test_the_expected_e_value_is_at_most_one_under_its_hypothesis(mean: float, extra: float) -> None:
    """Exactly, over all 3³ outcomes of three pairs: the law has the hypothesis' mean and any discordance it allows."""
    discordance = abs(mean) + extra * (1 - abs(mean))
    law = {1.0: (discordance + mean) / 2, -1.0: (discordance - mean) / 2, 0.0: 1 - discordance}
    for side in ("above", "below"):
        total = 0.0
        for outcome in np.array(np.meshgrid(*[[-1.0, 0.0, 1.0]] * 3)).reshape(3, -1).T:
            chance = np.prod([law[float(x)] for x in outcome])
            total += chance * np.exp(log_e_process(close(outcome.tolist()), mean, side)[-1])  # type: ignore[arg-type]
        assert total == pytest.approx(1.0, abs=1e-9)


@given(signs, st.floats(-0.9, 0.9), st.floats(-0.9, 0.9))
def test_evidence_falls_with_the_hypothesis(values: list[float], one: float, other: float) -> None:
    paired, (least, most) = close([*values, 0.0]), sorted((one, other))
    assert (log_e_process(paired, least, "above") >= log_e_process(paired, most, "above") - 1e-9).all()
    assert (log_e_process(paired, least, "below") <= log_e_process(paired, most, "below") + 1e-9).all()


@given(signs, st.integers(1, 20))
@settings(deadline=None)
def test_a_decision_stands_whatever_comes_later(values: list[float], looks: int) -> None:
    """So it does not matter how often one looked: the replay of the stored pairs finds the same decision."""
    full = weigh(close(values), 0.3, 0.1, 0.8)
    for cut in sorted({len(values) * i // looks for i in range(looks + 1)}):
        part = weigh(close(values[:cut]), 0.3, 0.1, 0.8)
        if part.decision == "roll_back":
            assert (part.decision, part.decided_at) == (full.decision, full.decided_at)
        elif part.decision == "promote":
            assert (full.decision, full.decided_at) == ("promote", part.decided_at) or full.decision == "roll_back"
        else:
            assert full.decided_at is None or full.decided_at > cut


def test_an_arm_that_breaks_after_its_promotion_is_sent_back() -> None:
    good = weigh(close([0.0] * 300), 0.02, high=0.0)
    broken = weigh(close([0.0] * 300 + [-1.0] * 700), 0.02, high=0.0)
    assert (good.decision, broken.decision) == ("promote", "roll_back")
    assert broken.drifted and not good.drifted
    assert broken.difference.low <= broken.difference.high


def test_a_conversation_counts_once_however_long_it_is() -> None:
    values, labels = [-1.0] * 50 + [1.0] * 200, ["long"] * 50 + [f"c{i}" for i in range(200)]
    found = weigh(close(values, labels), 0.02)
    assert found.decision == "promote"
    assert found.difference.estimate == pytest.approx(199 / 201)
    assert (found.conversations, found.difference.n) == (201, 250)


@pytest.mark.parametrize(("long", "share"), [(3, 0.3), (20, 0.1)])
def test_harder_long_conversations_make_no_false_promotions(long: int, share: float) -> None:
    """Only the long ones err, and their mean is at the margin exactly."""
    rng = np.random.default_rng(10)
    promoted = 0
    for _ in range(200):
        sizes = np.where(rng.random(1500) < share, long, 1)
        labels = np.repeat(np.arange(1500), sizes)
        wrong = (sizes[labels] > 1) & (rng.random(labels.size) < 0.02 / share)
        promoted += (
            decide(close((-wrong.astype(float)).tolist(), labels.tolist()), 0.02, high=0.0).decision == "promote"
        )
    assert promoted <= 200 * 0.05


def test_values_must_be_within_the_bounds() -> None:
    with pytest.raises(ValueError, match="outside"):
        log_e_process(close([2.0]), 0.0, "above")
    with pytest.raises(ValueError, match="is not in"):
        log_e_process(close([1.0]), 2.0, "above")
    with pytest.raises(ValueError, match="outside"):
        confidence_sequence([2.0])


# ── errors and power, by simulation (the benchmark has more runs) ─────────────────────────────────────────────────────


@pytest.mark.parametrize("clustered", [False, True])
def test_wrong_decisions_are_rare_under_a_look_at_every_pair(clustered: bool) -> None:
    """At the margin exactly, where both promoting and rolling back are at their most tempting."""
    rng = np.random.default_rng(4)
    promoted = rolled_back = 0
    runs = 300
    for _ in range(runs):
        if clustered:  # turns of one conversation share their fate
            fate = np.asarray(drawn(rng, 500, -0.02, 0.3))
            sizes = 1 + rng.poisson(2, 500)
            labels = np.repeat(np.arange(500), sizes)
            values = fate[labels].tolist()
        else:
            values, labels = drawn(rng, 1500, -0.02, 0.3), np.arange(1500)
        found = decide(close(values, labels.tolist()), 0.02, confidence=0.9)
        promoted += found.decision == "promote"
        rolled_back += found.decision == "roll_back"
    assert promoted / runs <= 0.1 and rolled_back / runs <= 0.1


def test_equal_models_are_promoted_and_worse_ones_are_sent_back() -> None:
    rng = np.random.default_rng(5)
    equal = [decide(close(drawn(rng, 5000, 0.0, 0.09)), 0.02).decision for _ in range(60)]
    worse = [decide(close(drawn(rng, 5000, -0.03, 0.09)), 0.02, 0.0).decision for _ in range(60)]
    assert equal.count("promote") >= 55 and equal.count("roll_back") == 0
    assert worse.count("roll_back") >= 57


def test_a_hopeless_arm_is_sent_back_at_once_where_the_teacher_is_the_reference() -> None:
    found = weigh(close([-1.0] * 4), 0.02, min_pairs=50, high=0.0)
    assert (found.decision, found.decided_at) == ("roll_back", 2)
    assert weigh(close([0.0] * 400), 0.02, min_pairs=300, high=0.0).decided_at == 300


def test_nothing_yet_is_no_decision() -> None:
    found = weigh(close([]), 0.02)
    assert (found.decision, found.difference.n, found.difference.low, found.difference.high) == (None, 0, -1.0, 1.0)


@pytest.mark.parametrize("rate", [0.5, 0.9, 0.98])
def test_a_confidence_sequence_holds_at_every_look(rate: float) -> None:
    """It is a running intersection, so the last look fails if any look did."""
    rng = np.random.default_rng(3)
    runs, missed = 200, 0
    for _ in range(runs):
        found = confidence_sequence((rng.random(1000) < rate).astype(float).tolist())
        missed += not found.low <= rate <= found.high
    assert missed / runs <= 0.05


def test_a_confidence_sequence_narrows() -> None:
    assert (confidence_sequence([]).low, confidence_sequence([]).high) == (0.0, 1.0)
    narrow, wide = confidence_sequence([1.0] * 500), confidence_sequence([1.0] * 20)
    assert narrow.low > 0.98 > 0.8 > wide.low
    # Never narrower than the exact interval for one look.
    fixed = scipy_stats.binomtest(450, 500).proportion_ci(0.95)
    always = confidence_sequence(([1.0] * 9 + [0.0]) * 50)
    assert always.low < fixed.low and fixed.high < always.high


def test_bounds_are_the_hypotheses_that_are_not_rejected() -> None:
    paired = close(drawn(np.random.default_rng(1), 800, 0.1, 0.3))
    low, high = bounds(paired)
    for mean, side, rejected in (
        (low - 1e-6, "above", True),
        (low + 1e-6, "above", False),
        (high + 1e-6, "below", True),
        (high - 1e-6, "below", False),
    ):
        assert (log_e_process(paired, mean, side).max() >= np.log(20)) == rejected  # type: ignore[arg-type]


# ── sample ratio ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_sample_ratio() -> None:
    # Fabijan et al. 2019: 821,588 against 815,482 users at 50/50 is a mismatch.
    assert sample_ratio_e_value([821588, 815482], [1, 1]) > 1000
    assert sample_ratio_e_value([500, 500], [1, 1]) < 1
    with pytest.raises(ValueError, match="one weight"):
        sample_ratio_e_value([1, 2], [1])
    # Units where none were meant to go, or none where all were.
    assert sample_ratio_e_value([0, 5000], [1, 0]) > 1e299
    assert sample_ratio_e_value([50, 50, 0], [1, 1, 0]) == sample_ratio_e_value([50, 50], [1, 1])


def test_the_sample_ratio_e_value_is_the_beta_binomial_over_the_binomial() -> None:
    for k, n in ((3, 10), (40, 60)):
        ratio = scipy_stats.betabinom.pmf(k, n, 300, 700) / scipy_stats.binom.pmf(k, n, 0.3)
        assert sample_ratio_e_value([k, n - k], [3, 7]) == pytest.approx(ratio)


def test_the_sample_ratio_may_be_looked_at_after_every_unit() -> None:
    rng = np.random.default_rng(9)
    alarms = caught = 0
    for _ in range(150):
        fair, skewed = np.cumsum(rng.random(3000) < 0.5), np.cumsum(rng.random(3000) < 0.56)
        looks = range(20, 3001, 20)
        alarms += any(sample_ratio_e_value([fair[i - 1], i - fair[i - 1]], [1, 1]) > 20 for i in looks)
        caught += any(sample_ratio_e_value([skewed[i - 1], i - skewed[i - 1]], [1, 1]) > 1000 for i in looks)
    assert alarms <= 150 * 0.05 and caught >= 135
