"""Evidence that may be looked at after every request: e-processes and confidence sequences for live, paired outcomes.

    paired = close(differences, conversations, times, idle_s=300, as_of=now)
    found = weigh(paired, margin=0.02)       # Evidence(decision="promote", decided_at=1431, e_promote=21.3, …)

An e-process starts at 1 and, while its hypothesis is true, is expected to stay there; it passes 1/α with probability α
at most, however often it is looked at and whenever one stops (Ville's inequality). A pair is one request answered by
both models, so what the two share (a hard question, a bad hour) cancels, and the pairs they agree on cost nothing.
Turns of a conversation share their fate, so what is weighed is a conversation's mean, each as much as any other:
then nothing is assumed but that conversations are independent. All pure. What is read once is in `stats.py`.
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
log 8 at most against the best one, and far less in the mean. Fixed beforehand, so that no order matters."""

SAMPLE_RATIO_CONCENTRATION = 1000.0
"""How near to the intended shares the alternative of `sample_ratio_e_value` lies, in units seen."""


@dataclass(frozen=True)
class Paired:
    """Mean differences of conversations, in the order in which those ended.

    `means` and `sizes` have shape (G,): a conversation's mean difference, and of how many pairs. `open_pairs` wait for
    their conversation to end.
    """

    means: np.ndarray
    sizes: np.ndarray
    open_pairs: int = 0

    @property
    def n(self) -> int:
        """Pairs that count."""
        return int(self.sizes.sum())

    def first(self, conversations: int) -> Paired:
        """What was known when as many conversations had ended."""
        return Paired(self.means[:conversations], self.sizes[:conversations])


class Evidence(Value):
    """What paired outcomes say by now."""

    decision: Literal["promote", "roll_back"] | None
    """The first that the evidence allowed, and it stands; but a rollback takes a promotion back."""
    decided_at: int | None
    """Pairs that had been counted when the decision fell."""
    difference: Interval
    """Mean over conversations of arm − teacher. Each bound alone holds at all times with the confidence of a decision,
    so the two-sided confidence said here is lower."""
    drifted: bool = False
    """True where no mean is left that was possible at all times: the arm, or its traffic, has changed."""
    e_promote: float
    """Highest value so far of the evidence against "worse by the margin or more"; 20 decides at 95%."""
    e_roll_back: float
    """Highest value so far of the evidence against "not worse than the rollback margin"."""
    conversations: int
    open_pairs: int


def close(
    values: Sequence[float],
    conversations: Sequence[Hashable] | None = None,
    times: Sequence[float] | None = None,
    idle_s: float | None = None,
    as_of: float | None = None,
) -> Paired:
    """Gather pairs into conversations that have ended.

    A conversation ends when none of its pairs has come for `idle_s`; what bears its name later is another one. Its end
    depends on times alone, never on outcomes, which is what makes stopping at any moment safe.

    Args:
        values: differences arm − teacher, shape (n,).
        conversations: n labels; None makes each pair its own.
        times: n times of arrival in seconds; None takes the values in the order given, all conversations ended.
        idle_s: how long a conversation must be silent to have ended; None never ends one by time, and takes all that
            bear a name together as they stand, which is right for one look at the end.
        as_of: the present, in the same clock; conversations that end later are open. None: all have ended.

    Raises:
        ValueError: labels or times that are not as many as values.
    """
    x = np.asarray(values, dtype=float)
    labels = list(range(x.size)) if conversations is None else list(conversations)
    moments = list(range(x.size)) if times is None else list(times)
    if not len(labels) == len(moments) == x.size:
        raise ValueError(f"{x.size} values, {len(labels)} conversations and {len(moments)} times do not go together")
    silence = math.inf if idle_s is None or times is None else idle_s
    sums: list[float] = []
    sizes: list[int] = []
    last: list[tuple[float, int]] = []
    current: dict[Hashable, int] = {}
    for i in sorted(range(x.size), key=lambda i: (moments[i], i)):
        at = current.get(labels[i])
        if at is None or moments[i] - last[at][0] >= silence:
            at = current[labels[i]] = len(sums)
            sums.append(0.0)
            sizes.append(0)
            last.append((moments[i], i))
        sums[at] += float(x[i])
        sizes[at] += 1
        last[at] = (moments[i], i)
    wait = 0.0 if math.isinf(silence) else silence
    ended = [c for c in range(len(sums)) if as_of is None or last[c][0] + wait <= as_of]
    ended.sort(key=lambda c: last[c])
    counted = np.asarray([sizes[c] for c in ended], dtype=float)
    return Paired(
        means=np.asarray([sums[c] for c in ended], dtype=float) / counted,
        sizes=counted,
        open_pairs=sum(sizes) - int(counted.sum()),
    )


def log_e_process(
    paired: Paired, mean: float, side: Literal["above", "below"], low: float = -1.0, high: float = 1.0
) -> np.ndarray:
    """Evidence that the true mean lies above (or below) `mean`, after each conversation; natural logarithm, shape (G,).

    The capital of a gambler who stakes fixed shares of it on each conversation (Waudby-Smith and Ramdas 2024, JRSS-B
    86:1, arXiv:2010.09686, section 4: capital processes), averaged over the shares: a mixture (Robbins 1970, Annals of
    Mathematical Statistics 41:1397). At `mean` 0 conversations that agree change nothing: for single pairs it is the
    sequential test of discordant pairs, a product of (1 ± stake) that anybody can check by hand.

    Args:
        paired: see `close`; conversations are independent.
        mean: the hypothesis: the mean over conversations is at most (side "above") or at least ("below") this.
        low, high: bounds of a single difference, known beforehand.

    Raises:
        ValueError: a difference outside the bounds, or a hypothesis that is not between them.
    """
    x = paired.means
    if x.size and not (float(x.min()) >= low - 1e-9 and float(x.max()) <= high + 1e-9):
        raise ValueError(f"a difference lies outside [{low}, {high}]")
    if not low <= mean <= high:
        raise ValueError(f"a mean of {mean} is not in [{low}, {high}]")
    gain = x - mean if side == "above" else mean - x
    room = mean - low if side == "above" else high - mean
    if room <= 0:  # nothing lies beyond the bound: the hypothesis is certain to be false unless all values sit on it
        return np.where(np.cumsum(gain) > 1e-9, np.inf, 0.0)
    wealth = np.cumsum(np.log1p(np.maximum(BETS[:, None] * (gain / room)[None, :], -BETS[-1])), axis=1)
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
    values: Sequence[float] | Paired, low: float = 0.0, high: float = 1.0, confidence: float = 0.95
) -> Interval:
    """Two-sided interval of a mean of bounded, independent values that holds however often it is looked at.

    Args:
        values: observations in [low, high], in order of arrival, or those of conversations (`close`).
        low, high: the bounds known before any observation.

    Raises:
        ValueError: a value outside the bounds.
    """
    paired = values if isinstance(values, Paired) else close(values)
    if not paired.n:
        return Interval(estimate=(low + high) / 2, low=low, high=high, n=0, confidence=confidence)
    lower, upper = bounds(paired, (1 + confidence) / 2, low, high)
    return Interval(
        estimate=float(paired.means.mean()),
        low=min(lower, upper),
        high=max(lower, upper),
        n=paired.n,
        confidence=confidence,
    )


class Decided(NamedTuple):
    """What the evidence allows, the pairs it took to be sure, and the highest e-value on either side."""

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
    """Promote an arm that is surely not worse by the margin; roll back one that is surely worse by more than the
    rollback margin, also where it was promoted before.

    For an arm that stays as it is each error has probability 1 − confidence at most, over all looks together. What was
    decided stands whatever comes later, but for a rollback after a promotion: the arm has changed then, or the
    promotion was in error.

    Args:
        paired: see `close`.
        margin: how much worse, in the metric's units, an arm may be and still be promoted.
        rollback_margin: what an arm may be worse by before it is sent back; None takes `margin`, 0 sends back whatever
            is surely worse at all. Below `margin` both can be true of an arm, and then it is sent back.
        min_pairs: no promotion before as many pairs.
        low, high: bounds of one difference. Where the teacher is the reference nothing is above 0, and `high=0` rolls a
            hopeless arm back after a few conversations.
    """
    threshold = math.log(1 / (1 - confidence))
    floor = -margin if rollback_margin is None else -rollback_margin
    counted = np.cumsum(paired.sizes)
    above = np.where(counted >= min_pairs, log_e_process(paired, -margin, "above", low, high), -np.inf)
    below = log_e_process(paired, floor, "below", low, high)
    for decision, log_e in (("roll_back", below), ("promote", above)):
        if (first := _first(log_e, threshold)) is not None:
            return Decided(decision, int(counted[first]), _peak(above), _peak(below))  # type: ignore[arg-type]
    return Decided(None, None, _peak(above), _peak(below))


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
            estimate=float(paired.means.mean()) if paired.n else 0.0,
            low=min(lower, upper),
            high=max(lower, upper),
            n=paired.n,
            confidence=max(0.0, 2 * confidence - 1),
        ),
        drifted=lower > upper,
        e_promote=decided.e_promote,
        e_roll_back=decided.e_roll_back,
        conversations=int(paired.sizes.size),
        open_pairs=paired.open_pairs,
    )


def sample_ratio_e_value(counts: Sequence[int], weights: Sequence[float]) -> float:
    """Evidence that traffic is not split by these weights; the split is broken with 99.9% confidence from 1,000 on.

    The Bayes factor of a Dirichlet alternative around the intended shares, which may be looked at after every unit:
    Lindon and Malek 2022, NeurIPS, "Anytime-Valid Inference for Multinomial Count Data" (arXiv:2011.03567), eq. 6.

    Raises:
        ValueError: counts and weights differ in length, or a weight is negative.
    """
    if len(counts) != len(weights) or any(w < 0 for w in weights) or not any(weights):
        raise ValueError("every count needs one weight, none of them negative")
    if any(count and not weight for count, weight in zip(counts, weights, strict=True)):
        return _exp(math.inf)  # traffic where none was meant to go
    counts, weights = zip(*((c, w) for c, w in zip(counts, weights, strict=True) if w), strict=True)
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

    middle = float(np.clip(paired.means.mean(), low, high))
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
