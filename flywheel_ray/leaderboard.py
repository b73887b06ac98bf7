"""The leaderboard ranks the candidates of one dataset against the teacher, each figure with its interval.

    board = leaderboard(results, teacher, metric="function_name_and_args_accuracy", prices=prices, margin=0.02)
    board.rows[0].quality          # Interval(estimate=0.95, low=0.91, high=0.973, n=200, …)
    board.winner, board.verdict    # the cheapest candidate shown non-inferior, or None and why

The teacher's answers are the reference, so the teacher's own quality is known (1, or 0.5 where a judge prefers one of
two) and a student's score is its agreement with the teacher. Only `Scored` trials are ranked; failed ones are listed
with their stage, never as a 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from flywheel_ray.datasets import Example
from flywheel_ray.errors import LedgerError
from flywheel_ray.judge import JUDGED, PREFERENCE
from flywheel_ray.records import TEACHER, Completion
from flywheel_ray.results import Cost, Failed, Outcome, Price, Scored, cost_of
from flywheel_ray.scoring import FUNCTION_NAME_AND_ARGS, SIMILARITY
from flywheel_ray.stats import (
    Interval,
    ScoreMean,
    design_effect,
    holm,
    mean_interval,
    non_inferiority,
    paired_difference,
    pairs_needed,
)
from flywheel_ray.values import Value

POWER = 0.8
"""Probability of a verdict on as many records as a leaderboard asks for."""


class Row(Value):
    """One ranked candidate. `scores` has an interval for every metric, None where no row was scored."""

    key: str
    label: str
    model: str
    evaluation: str
    quality: Interval | None
    """Of the ranked metric; where labels correct a judge, the corrected one."""
    calibrated: bool = False
    """True where `quality` is a judge's, corrected by labels (prediction-powered inference)."""
    difference: Interval | None = None
    """Candidate − teacher on the same examples. An example the candidate did not answer counts as wrong here."""
    p_value: float | None = None
    """Of "worse than the teacher by the margin or more", one-sided, adjusted for the number of candidates (Holm); None
    where nothing is known but a judge's opinion."""
    scores: dict[str, Interval | None]
    unscored: dict[str, int]
    """Rows without a value, for each metric: counted beside the mean, never inside it."""
    cost: Cost
    usd_per_1000_successes: float | None = None
    """What 1,000 right answers cost: the cost of 1,000 answers over the share of right ones; None without a price or a
    success, and where answers are not right or wrong but graded."""
    train_s: float | None = None
    evaluation_s: float | None = None
    pareto: bool = False
    """True where no other row is both better and cheaper, as measured."""
    dominated_by: str | None = None
    """Key of a cheaper (without prices: faster) candidate that is better, or no worse by the margin, on the same
    examples, each at the leaderboard's confidence; None where scores are a judge's opinion."""


class Recommendation(Value):
    """What may be claimed: `verdict` says it in a sentence."""

    status: Literal["winner", "not_enough_evidence", "uncalibrated_judge", "none"]
    winner: str | None = None
    verdict: str
    records_needed: int | None = None
    """About how many more held-out records would settle it, where that is what is missing."""


class Leaderboard(Recommendation):
    """The ranking on one dataset, and what may be claimed of it."""

    fingerprint: str
    metric: str
    judge: str
    margin: float
    teacher: Row
    rows: tuple[Row, ...]
    failed: tuple[Failed, ...] = ()


def leaderboard(
    results: Sequence[Scored | Failed],
    evaluation: Sequence[Example],
    metric: str | None = None,
    prices: Mapping[str, Price] | None = None,
    margin: float = 0.02,
    confidence: float = 0.95,
    corrected: Mapping[str, Mapping[str, ScoreMean]] | None = None,
    trust_judge: bool = False,
) -> Leaderboard:
    """Rank results of one dataset.

    Args:
        results: trials of one dataset fingerprint.
        evaluation: that dataset's evaluation split, which holds the teacher's own answers, latency and tokens.
        metric: what to rank by; None takes args accuracy where there are tools, else similarity.
        prices: price by model name, and under "teacher" the teacher's.
        margin: how much worse than the teacher a candidate may be and still replace it, in points of the metric / 100.
        confidence: of every interval; a winner is claimed in error with probability (1 − confidence)/2, about, for all
            candidates of these results together.
        corrected: judged metric → key → the quality that people's labels correct the judge's to.
        trust_judge: name a winner by a judge that no labels correct.

    Raises:
        LedgerError: the results are of different datasets, or none carries the metric.
    """
    fingerprints = {r.fingerprint for r in results}
    if len(fingerprints) != 1:
        raise LedgerError(f"a leaderboard compares results of one dataset; these are of {len(fingerprints)}: name one")
    prices = prices or {}
    scored = [r for r in results if isinstance(r, Scored)]
    carried = list(dict.fromkeys(name for r in scored for name in r.metrics()))
    if metric is None:
        metric = FUNCTION_NAME_AND_ARGS if not carried or FUNCTION_NAME_AND_ARGS in carried else SIMILARITY
    elif scored and metric not in carried:
        raise LedgerError(f"no trial carries the metric {metric!r}; there are: {', '.join(carried)}")
    known = (corrected or {}).get(metric, {}) if metric in JUDGED else {}
    trusted = trust_judge or metric not in JUDGED
    rows = [
        _row(r, metric, carried, prices.get(r.candidate.model), margin, confidence, known.get(r.key), trusted)
        for r in scored
    ]
    tested = [row for row in rows if row.p_value is not None]
    adjusted = dict(zip([row.key for row in tested], holm([row.p_value or 0.0 for row in tested]), strict=True))
    by_key, costs = {r.key: r for r in scored}, _prices(rows)
    front = _front(rows, costs)
    rows = [
        row.model_copy(
            update={
                "p_value": adjusted.get(row.key),
                "pareto": row.key in front,
                "dominated_by": _dominated_by(row, costs, by_key, metric, margin, confidence) if trusted else None,
            }
        )
        for row in rows
    ]
    rows.sort(key=lambda r: (-(r.quality.estimate if r.quality else -1.0), r.cost.usd_per_1000 or 0.0, r.key))
    found = _recommend(rows, by_key, metric, margin, confidence)
    judges = list(dict.fromkeys(r.judge for r in scored))
    return Leaderboard(
        fingerprint=fingerprints.pop(),
        metric=metric,
        judge=", ".join(judges),
        margin=margin,
        teacher=_teacher_row([e.reference for e in evaluation], metric, carried, prices.get(TEACHER)),
        rows=tuple(rows),
        failed=tuple(r for r in results if isinstance(r, Failed)),
        **found.model_dump(),
    )


def teacher_score(metric: str) -> float:
    """What the teacher itself scores: it agrees with itself, and is preferred to itself half of the time."""
    return 0.5 if metric == PREFERENCE else 1.0


def _row(
    result: Scored,
    metric: str,
    metrics: Sequence[str],
    price: Price | None,
    margin: float,
    confidence: float,
    corrected: ScoreMean | None,
    trusted: bool,
) -> Row:
    scores = {name: _interval(result, name, confidence) for name in metrics}
    quality = corrected.interval(confidence) if corrected else scores.get(metric)
    graded = any(v not in (0.0, 1.0) for v in result.values(metric))
    answered = [o.completion for o in result.outcomes if o.completion is not None]
    rate = len(answered) / result.evaluation_s * 3600 if result.evaluation_s > 0 and answered else None
    cost = cost_of(answered, price, rate)
    difference, p_value = _against_teacher(result, metric, margin, confidence, corrected)
    if corrected is None and not trusted:
        p_value = None  # of an opinion nothing is known
    return Row(
        key=result.key,
        label=result.candidate.label,
        model=result.candidate.model,
        evaluation=result.candidate.evaluation,
        quality=quality,
        calibrated=corrected is not None,
        difference=difference,
        p_value=p_value,
        scores=scores,
        unscored={name: sum(name in o.unscored for o in result.outcomes) for name in metrics},
        cost=cost,
        usd_per_1000_successes=cost.usd_per_1000 / quality.estimate
        if cost.usd_per_1000 is not None and quality and quality.estimate > 0 and not graded
        else None,
        train_s=result.training.train_s if result.training else None,
        evaluation_s=result.evaluation_s,
    )


def _interval(result: Scored, metric: str, confidence: float) -> Interval | None:
    pairs = [(v, o.conversation) for o in result.outcomes if (v := o.scores.get(metric)) is not None]
    return mean_interval([v for v, _ in pairs], [c for _, c in pairs], confidence) if pairs else None


def _against_teacher(
    result: Scored, metric: str, margin: float, confidence: float, corrected: ScoreMean | None
) -> tuple[Interval | None, float | None]:
    teacher = teacher_score(metric)
    if corrected is not None:
        return corrected.interval(confidence).shifted(-teacher), corrected.p_value(teacher - margin)
    values, conversations = _claimed(result, metric)
    if not values:
        return None, None
    found = non_inferiority(values, [teacher] * len(values), margin, conversations, confidence)
    return found.difference, found.p_value


def _claimed(result: Scored, metric: str) -> tuple[list[float], list[str]]:
    """Scores as a claim may use them: what was not answered is wrong, what could not be judged is left out."""
    rows = [(_claim(o, metric), o.conversation) for o in result.outcomes if metric in o.scores]
    return [v for v, _ in rows if v is not None], [c for v, c in rows if v is not None]


def _claim(outcome: Outcome, metric: str) -> float | None:
    return 0.0 if outcome.completion is None else outcome.scores.get(metric)


def _teacher_row(answers: Sequence[Completion], metric: str, metrics: Sequence[str], price: Price | None) -> Row:
    def known(name: str) -> Interval:
        level = teacher_score(name)
        return Interval(estimate=level, low=level, high=level, n=len(answers))

    return Row(
        key=TEACHER,
        label="teacher (the reference)",
        model=TEACHER,
        evaluation="reference",
        quality=known(metric),
        scores={name: known(name) for name in metrics},
        unscored=dict.fromkeys(metrics, 0),
        cost=cost_of(answers, price),
    )


def _priced(rows: Sequence[Row]) -> bool:
    """Whether dollars can compare these rows; where one has no price they are compared by latency."""
    return all(row.cost.usd_per_1000 is not None for row in rows)


def _prices(rows: Sequence[Row]) -> dict[str, float]:
    """What makes each of these rows cheap, by key; those without a figure are left out."""
    priced = _priced(rows)
    prices = {row.key: row.cost.usd_per_1000 if priced else row.cost.latency_p50_s for row in rows}
    return {key: price for key, price in prices.items() if price is not None}


def _front(rows: Sequence[Row], prices: Mapping[str, float]) -> set[str]:
    """Keys of the rows that no other row is both better and cheaper than, as measured."""
    points = {r.key: (r.quality.estimate, -prices[r.key]) for r in rows if r.quality and r.key in prices}
    return {
        key
        for key, mine in points.items()
        if not any(p != mine and p[0] >= mine[0] and p[1] >= mine[1] for p in points.values())
    }


def _dominated_by(
    row: Row, prices: Mapping[str, float], results: Mapping[str, Scored], metric: str, margin: float, confidence: float
) -> str | None:
    """The cheapest row that makes this one pointless: by an interval on paired examples, so noise dominates nobody."""
    if row.key not in prices or row.quality is None:
        return None
    mine = prices[row.key]
    for price, key in sorted((price, key) for key, price in prices.items() if key != row.key and price <= mine):
        found = _between(results[key], results[row.key], metric, confidence)
        if found and (found.low > 0 or (price < mine and found.low >= -margin)):
            return key
    return None


def _between(one: Scored, other: Scored, metric: str, confidence: float) -> Interval | None:
    """Mean of one − other over the examples that both have a score for, repeats of an example averaged first."""
    scores: list[dict[str, list[float]]] = [{}, {}]
    conversation = {}
    for side, result in enumerate((one, other)):
        for outcome in result.outcomes:
            if metric in outcome.scores and (value := _claim(outcome, metric)) is not None:
                scores[side].setdefault(outcome.example_id, []).append(value)
                conversation[outcome.example_id] = outcome.conversation
    shared = [e for e in scores[0] if e in scores[1]]
    if not shared:
        return None
    a, b = ([sum(side[e]) / len(side[e]) for e in shared] for side in scores)
    return paired_difference(a, b, [conversation[e] for e in shared], confidence)


def _recommend(
    rows: Sequence[Row],
    results: Mapping[str, Scored],
    metric: str,
    margin: float,
    confidence: float,
) -> Recommendation:
    """The cheapest row that is surely within the margin; otherwise no winner, what is missing, and how much of it."""
    ranked = [r for r in rows if r.quality is not None and r.difference is not None]
    if not ranked:
        return Recommendation(status="none", verdict="No candidate was scored.")
    tested = [r for r in ranked if r.p_value is not None]
    unknown = len(ranked) - len(tested)
    if not tested:
        return Recommendation(
            status="uncalibrated_judge",
            verdict=f"No winner is named: {metric} is a judge's opinion, and no labels say how good it is. Label rows "
            "(`flywheel label`, `flywheel judge calibrate`), or set `leaderboard: {trust_judge: true}`.",
        )
    waiting = f" {unknown} more without enough labels were not considered." if unknown else ""
    ranked = tested
    bar, alpha = teacher_score(metric) - margin, (1 - confidence) / 2
    good = [r for r in ranked if r.p_value is not None and r.p_value <= alpha]
    if good:
        prices = _prices(good)
        best = min(good, key=lambda r: prices.get(r.key, math.inf))
        most = "cheapest" if _priced(good) else "fastest"
        cheapest = f" (the {most} of {len(good)} that are)" if len(good) > 1 else ""
        return Recommendation(
            status="winner",
            winner=best.key,
            verdict=f"{best.label} is within {margin:.0%} of the teacher{cheapest}: {metric} {_figures(best, metric)} "
            f"held-out records, p {best.p_value:.2g} adjusted for {len(ranked)} tried.{waiting}",
        )
    undecided = [r for r in ranked if r.difference and r.difference.high >= -margin]
    if not undecided:
        return Recommendation(
            status="none",
            verdict=f"No candidate is good enough: the best, {ranked[0].label}, scores {_figures(ranked[0], metric)} "
            f"records, below {bar:.3f}.{waiting}",
        )
    # Holm asks the smallest p-value of k candidates to stay below α/k, so that is what more records must reach.
    wanted = {r.key: _more(r, results[r.key], metric, margin, alpha / len(ranked)) for r in undecided}
    best = min(undecided, key=lambda r: (wanted[r.key] is None, not _promising(r, margin), wanted[r.key] or 0))
    more = wanted[best.key]
    if best.calibrated:
        missing = "more labels are needed to say"
    elif more is None:
        missing = "no number of records would settle it"
    elif _promising(best, margin):
        missing = f"about {more:,} more held-out records would show it"
    else:
        missing = f"it stands below {bar:.3f}, and about {more:,} more held-out records would show that"
    power = f" ({POWER:.0%} power)" if more is not None else ""
    return Recommendation(
        status="not_enough_evidence",
        verdict=f"Not enough evidence: {best.label} scores {_figures(best, metric)} records; {bar:.3f} is neither "
        f"shown nor excluded. At its present score {missing}{power}.{waiting}",
        records_needed=more,
    )


def _promising(row: Row, margin: float) -> bool:
    return row.difference is not None and row.difference.estimate > -margin


def _figures(row: Row, metric: str) -> str:
    """The score that is claimed: of all examples, those without an answer included."""
    assert row.difference
    q = row.difference.shifted(teacher_score(metric))
    how = ", corrected by labels," if row.calibrated else ""
    return f"{q.estimate:.3f} [{q.low:.3f}, {q.high:.3f}]{how} on {q.n}"


def _more(row: Row, result: Scored, metric: str, margin: float, alpha: float) -> int | None:
    """How many records beyond those at hand settle, at the row's present score, on which side of the margin it lies.

    None where no number would, and where labels are what is missing.
    """
    values, conversations = _claimed(result, metric)
    if row.difference is None or row.calibrated or not values:
        return None
    losses = [(v - teacher_score(metric)) ** 2 for v in values]
    # Two pairs more, one of them discordant, so that a clean sheet is not taken for a rate of 0.
    discordance = (sum(losses) + 1) / (len(losses) + 2)
    difference = row.difference.estimate
    effect = design_effect(values, conversations)
    total = pairs_needed(difference, max(discordance, abs(difference)), margin, alpha, POWER, effect)
    repeats = len(values) / len({o.example_id for o in result.outcomes if metric in o.scores})
    return None if total is None else max(1, math.ceil((total - len(values)) / repeats))


class LeaderboardSettings(Value):
    """How a sweep's leaderboard ranks; the same words as `leaderboard()`."""

    metric: str | None = None
    margin: float = Field(default=0.02, ge=0, le=1)
    confidence: float = Field(default=0.95, gt=0, lt=1)
    trust_judge: bool = False
    """Name a winner by a judged metric although no labels correct the judge."""
