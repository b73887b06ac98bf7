"""Evidence that may be looked at after every request: e-processes and confidence sequences for live, paired outcomes.

    paired = close(differences, conversations, times, idle_s=300, as_of=now)
    found = weigh(paired, margin=0.02)       # Evidence(decision="promote", decided_at=1431, e_promote=21.3, …)

An e-process starts at 1 and, while its hypothesis is true, is expected to stay there; it passes 1/α with probability α
at most, however often it is looked at and whenever one stops (Ville's inequality). A pair is one request answered by
both models, so what the two share (a hard question, a bad hour) cancels, and the pairs they agree on cost nothing.
All pure. What is read once, at the end, is in `stats.py`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy import special

from flywheel_ray.stats import Interval
from flywheel_ray.values import Value

BETS = np.geomspace(0.02, 0.95, 8)
"""Shares of the wealth that may be staked on each conversation: the e-process is the average over them all, which costs
log 8 at most against the best one, and far less in the mean. Fixed beforehand, so that no order of pairs matters."""

SAMPLE_RATIO_CONCENTRATION = 1000.0
"""How near to the intended shares the alternative of `sample_ratio_e_value` lies, in units seen."""


@dataclass(frozen=True)
class Paired:
    """Differences by conversation, in the order in which the conversations ended.

    `sums` and `sizes` have shape (G,): the sum of a conversation's differences, and how many there are. `open_pairs`
    wait for their conversation to end; `late_pairs` came after it had ended, and are left out.
    """

    sums: np.ndarray
    sizes: np.ndarray
    open_pairs: int = 0
    late_pairs: int = 0

    @property
    def n(self) -> int:
        """Pairs that count."""
        return int(self.sizes.sum())

    def first(self, conversations: int) -> Paired:
        """What was known when as many conversations had ended."""
        return Paired(self.sums[:conversations], self.sizes[:conversations])


class Evidence(Value):
    """What paired outcomes say by now. A decision once made stands: later pairs do not undo it."""

    decision: Literal["promote", "roll_back"] | None
    decided_at: int | None
    """Pairs that had been counted when the decision fell."""
    difference: Interval
    """Mean of arm − teacher; each bound alone holds at all times with the confidence of a decision, so the two-sided
    confidence said here is lower."""
    e_promote: float
    """Highest value so far of the evidence against "worse by the margin or more"; 20 decides at 95%."""
    e_roll_back: float
    """Highest value so far of the evidence against "not worse than the rollback margin"."""
    conversations: int
    open_pairs: int
    late_pairs: int


def close(
    values: Sequence[float],
    conversations: Sequence[Hashable] | None = None,
    times: Sequence[float] | None = None,
    idle_s: float = 0.0,
    as_of: float | None = None,
) -> Paired:
    """Gather pairs into conversations that have ended.

    Turns of a conversation are not independent, so an e-process may bet on a conversation but not on its turns. A
    conversation ends when none of its pairs has come for `idle_s`; that depends on times alone, never on outcomes,
    which is what makes stopping at any moment safe. Pairs of one conversation are expected to be scored by one rule.

    Args:
        values: differences arm − teacher, shape (n,).
        conversations: n labels; None makes each pair its own.
        times: n times of arrival in seconds; None takes the values in the order given, all conversations ended.
        idle_s: how long a conversation must be silent to have ended.
        as_of: the present, in the same clock; conversations that end later are open. None: all have ended.

    Raises:
        ValueError: labels or times that are not as many as values.
    """
    x = np.asarray(values, dtype=float)
    labels = list(range(x.size)) if conversations is None else list(conversations)
    moments = list(range(x.size)) if times is None else list(times)
    if not len(labels) == len(moments) == x.size:
        raise ValueError(f"{x.size} values, {len(labels)} conversations and {len(moments)} times do not go together")
    if times is None:
        idle_s, as_of = math.inf, None
    sums: dict[Hashable, float] = {}
    sizes: dict[Hashable, int] = {}
    last: dict[Hashable, tuple[float, int]] = {}
    late = 0
    for i in sorted(range(x.size), key=lambda i: (moments[i], i)):
        label = labels[i]
        # With no idle time every conversation is taken as it stands: right for one look, at the end.
        if label in last and 0 < idle_s < moments[i] - last[label][0]:
            late += 1
            continue
        sums[label] = sums.get(label, 0.0) + float(x[i])
        sizes[label] = sizes.get(label, 0) + 1
        last[label] = (moments[i], i)
    ended = [c for c in sums if as_of is None or last[c][0] + idle_s <= as_of]
    ended.sort(key=lambda c: last[c])
    count = sum(sizes[c] for c in ended)
    return Paired(
        sums=np.asarray([sums[c] for c in ended], dtype=float),
        sizes=np.asarray([sizes[c] for c in ended], dtype=float),
        open_pairs=sum(sizes.values()) - count,
        late_pairs=late,
    )


def log_e_process(
    paired: Paired, mean: float, side: Literal["above", "below"], low: float = -1.0, high: float = 1.0
) -> np.ndarray:
    """Evidence that the true mean lies above (or below) `mean`, after each conversation; natural logarithm, shape (G,).

    The capital of a gambler who stakes fixed shares of it on each conversation: Waudby-Smith and Ramdas 2024, JRSS-B
    86:1 (arXiv:2010.09686), section 4, with a mixture over the stakes in place of predicted ones (their section 5.3;
    Robbins 1970, Annals of Mathematical Statistics 41:1397). At `mean` 0 pairs that agree change nothing, and it is
    the sequential test of discordant pairs, a product of (1 ± stake) that anybody can check by hand.

    It needs independent conversations, and one expected difference whatever a conversation's length: a conversation
    so long that the stake could lose everything counts for less.

    Args:
        paired: see `close`.
        mean: the hypothesis: the mean difference is at most (side "above") or at least ("below") this.
        low, high: bounds of a single difference, known beforehand.

    Raises:
        ValueError: a difference outside the bounds, or a hypothesis that is not between them.
    """
    sums, sizes = paired.sums, paired.sizes
    slack = 1e-9 * np.maximum(sizes, 1)
    if bool((sums < low * sizes - slack).any() or (sums > high * sizes + slack).any()):
        raise ValueError(f"a difference lies outside [{low}, {high}]")
    if not low <= mean <= high:
        raise ValueError(f"a mean of {mean} is not in [{low}, {high}]")
    gain = sums - mean * sizes if side == "above" else mean * sizes - sums
    room = mean - low if side == "above" else high - mean
    if room <= 0:  # nothing lies beyond the bound: the hypothesis is certain to be false unless all values sit on it
        return np.where(np.cumsum(gain) > slack, np.inf, 0.0)
    stakes = np.minimum(BETS[:, None], BETS[-1] / sizes[None, :])
    wealth = np.cumsum(np.log1p(stakes * (gain / room)[None, :]), axis=1)
    return special.logsumexp(wealth, axis=0) - math.log(len(BETS))


def bounds(paired: Paired, confidence: float = 0.95, low: float = -1.0, high: float = 1.0) -> tuple[float, float]:
    """The lower and the upper confidence sequence of the mean: each holds at all times with this confidence.

    The means that `log_e_process` has not rejected at any time so far (running intersection).
    """
    return (
        _bound(paired, "above", math.log(1 / (1 - confidence)), low, high),
        _bound(paired, "below", math.log(1 / (1 - confidence)), low, high),
    )


def confidence_sequence(
    values: Sequence[float], low: float = 0.0, high: float = 1.0, confidence: float = 0.95
) -> Interval:
    """Two-sided interval of a mean of bounded, independent values that holds however often it is looked at.

    Args:
        values: observations in [low, high], in order of arrival.
        low, high: the bounds known before any observation.

    Raises:
        ValueError: a value outside the bounds.
    """
    if not len(values):
        return Interval(estimate=(low + high) / 2, low=low, high=high, n=0, confidence=confidence)
    paired = close(values)
    lower, upper = bounds(paired, (1 + confidence) / 2, low, high)
    return Interval(estimate=float(paired.sums.mean()), low=lower, high=upper, n=len(values), confidence=confidence)


class Decided(NamedTuple):
    """The first decision that the evidence allowed, the pairs it took, and the highest e-value on either side."""

    decision: Literal["promote", "roll_back"] | None
    at: int | None
    e_promote: float
    e_roll_back: float


def decide(
    paired: Paired,
    margin: float,
    rollback_margin: float | None = None,
    confidence: float = 0.95,
    min_pairs: int = 1,
    low: float = -1.0,
    high: float = 1.0,
) -> Decided:
    """Promote where the arm is surely not worse by the margin; roll back where it is surely worse by more than the
    rollback margin. Each error has probability 1 − confidence at most, over all looks together. The first wins.

    Args:
        paired: see `close`.
        margin: how much worse, in the metric's units, an arm may be and still be promoted.
        rollback_margin: what an arm may be worse by before it is sent back; None takes `margin`, 0 sends back whatever
            is surely worse at all.
        min_pairs: no promotion before as many pairs.
        low, high: bounds of one difference. Where the teacher is the reference nothing is above 0, and `high=0` rolls a
            hopeless arm back after a few pairs.
    """
    threshold = math.log(1 / (1 - confidence))
    floor = -margin if rollback_margin is None else -rollback_margin
    counted = np.cumsum(paired.sizes)
    above = np.where(counted >= min_pairs, log_e_process(paired, -margin, "above", low, high), -np.inf)
    below = log_e_process(paired, floor, "below", low, high)
    promote, roll_back = _first(above, threshold), _first(below, threshold)
    first = min((i for i in (promote, roll_back) if i is not None), default=None)
    if first is None:
        return Decided(None, None, _peak(above), _peak(below))
    return Decided("roll_back" if first == roll_back else "promote", int(counted[first]), _peak(above), _peak(below))


def weigh(
    paired: Paired,
    margin: float,
    rollback_margin: float | None = None,
    confidence: float = 0.95,
    min_pairs: int = 1,
    low: float = -1.0,
    high: float = 1.0,
) -> Evidence:
    """The decision of `decide`, whose arguments these are, with the figures a person wants to see beside it."""
    decided = decide(paired, margin, rollback_margin, confidence, min_pairs, low, high)
    lower, upper = bounds(paired, confidence, low, high) if paired.n else (low, high)
    return Evidence(
        decision=decided.decision,
        decided_at=decided.at,
        difference=Interval(
            estimate=float(paired.sums.sum()) / paired.n if paired.n else 0.0,
            low=lower,
            high=upper,
            n=paired.n,
            confidence=max(0.0, 2 * confidence - 1),
        ),
        e_promote=decided.e_promote,
        e_roll_back=decided.e_roll_back,
        conversations=int(paired.sizes.size),
        open_pairs=paired.open_pairs,
        late_pairs=paired.late_pairs,
    )


def sample_ratio_e_value(counts: Sequence[int], weights: Sequence[float]) -> float:
    """Evidence that traffic is not split by these weights; the split is broken with 99.9% confidence from 1,000 on.

    The Bayes factor of a Dirichlet alternative around the intended shares, which may be looked at after every unit:
    Lindon and Malek 2022, NeurIPS, "Anytime-Valid Inference for Multinomial Count Data" (arXiv:2011.03567), eq. 6.

    Raises:
        ValueError: counts and weights differ in length, or a weight is not positive.
    """
    if len(counts) != len(weights) or any(w <= 0 for w in weights):
        raise ValueError("every count needs one positive weight")
    seen = np.asarray(counts, dtype=float)
    shares = np.asarray(weights, dtype=float) / sum(weights)
    prior = SAMPLE_RATIO_CONCENTRATION * shares
    log_e = (
        special.gammaln(prior.sum())
        - special.gammaln(prior.sum() + seen.sum())
        + float(np.sum(special.gammaln(prior + seen) - special.gammaln(prior)))
        - float(np.sum(seen * np.log(shares)))
    )
    return _exp(float(log_e))


def _bound(paired: Paired, side: Literal["above", "below"], threshold: float, low: float, high: float) -> float:
    """Bisection: evidence against "at most m" falls with m, so the rejected m are those below one point."""
    inside, outside = (high, low) if side == "above" else (low, high)

    def rejected(mean: float) -> bool:
        return bool(np.max(log_e_process(paired, mean, side, low, high)) >= threshold)

    middle = float(paired.sums.sum() / paired.sizes.sum())
    if rejected(middle):  # an event of probability ≤ α, or a mean that drifts
        outside = middle
    else:
        inside = middle
    if not rejected(outside + (inside - outside) * 1e-9):
        return outside
    for _ in range(30):
        mean = (inside + outside) / 2
        if rejected(mean):
            outside = mean
        else:
            inside = mean
    return outside


def _first(log_e: np.ndarray, threshold: float) -> int | None:
    crossed = log_e >= threshold
    return int(crossed.argmax()) if bool(crossed.any()) else None


def _peak(log_e: np.ndarray) -> float:
    return max(1.0, _exp(float(log_e.max()))) if log_e.size else 1.0


def _exp(log_e: float) -> float:
    return math.exp(min(log_e, 690.0))  # beyond it a float cannot say how sure one is
