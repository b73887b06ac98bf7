"""The leaderboard ranks the candidates of one dataset against the teacher, each figure with its interval.

    board = leaderboard(results, teacher, metric="function_name_and_args_accuracy", prices=prices, margin=0.02)
    board.rows[0].quality          # Interval(estimate=0.95, low=0.91, high=0.973, n=200, …)
    board.winner, board.verdict    # the cheapest candidate shown non-inferior, or None and why

The teacher's answers are the reference, so the teacher's own quality is 1 by definition and a student's score is its
agreement with the teacher. Only `Scored` trials are ranked; failed ones are listed with their stage, never as a 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import Field

from flywheel_ray.datasets import Example
from flywheel_ray.errors import LedgerError
from flywheel_ray.records import TEACHER, Completion
from flywheel_ray.results import Cost, Failed, Price, Scored, cost_of
from flywheel_ray.scoring import FUNCTION_NAME_AND_ARGS, SIMILARITY
from flywheel_ray.stats import Interval, mean_interval
from flywheel_ray.values import Value


class Row(Value):
    """One ranked candidate. `scores` has an interval for every metric, None where no row was scored."""

    key: str
    label: str
    model: str
    evaluation: str
    quality: Interval | None
    scores: dict[str, Interval | None]
    unscored: dict[str, int]
    """Rows without a value, for each metric: counted beside the mean, never inside it."""
    cost: Cost
    train_s: float | None = None
    evaluation_s: float | None = None
    pareto: bool = False
    """True where no other row is both better and cheaper."""


class Leaderboard(Value):
    """The ranking on one dataset. `verdict` says in a sentence what may be claimed."""

    fingerprint: str
    metric: str
    judge: str
    margin: float
    teacher: Row
    rows: tuple[Row, ...]
    failed: tuple[Failed, ...] = ()
    winner: str | None = None
    verdict: str = ""


def leaderboard(
    results: Sequence[Scored | Failed],
    evaluation: Sequence[Example],
    metric: str | None = None,
    prices: Mapping[str, Price] | None = None,
    margin: float = 0.02,
    confidence: float = 0.95,
) -> Leaderboard:
    """Rank results of one dataset.

    Args:
        results: trials of one dataset fingerprint.
        evaluation: that dataset's evaluation split, which holds the teacher's own answers, latency and tokens.
        metric: what to rank by; None takes args accuracy where there are tools, else similarity.
        prices: price by model name, and under "teacher" the teacher's.
        margin: how much worse than the teacher a candidate may be and still replace it, in points of the metric / 100.
        confidence: of every interval.

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
    rows = [_row(r, metric, carried, prices.get(r.candidate.model), confidence) for r in scored]
    rows = [row.model_copy(update={"pareto": _on_front(row, rows)}) for row in rows]
    rows.sort(key=lambda r: (-(r.quality.estimate if r.quality else -1.0), r.cost.usd_per_1000 or 0.0, r.key))
    winner, verdict = _recommend(rows, metric, margin)
    judges = list(dict.fromkeys(r.judge for r in scored))
    return Leaderboard(
        fingerprint=fingerprints.pop(),
        metric=metric,
        judge=", ".join(judges),
        margin=margin,
        teacher=_teacher_row([e.reference for e in evaluation], metric, carried, prices.get(TEACHER)),
        rows=tuple(rows),
        failed=tuple(r for r in results if isinstance(r, Failed)),
        winner=winner,
        verdict=verdict,
    )


def _row(result: Scored, metric: str, metrics: Sequence[str], price: Price | None, confidence: float) -> Row:
    scores = {name: _interval(result, name, confidence) for name in metrics}
    answered = [o.completion for o in result.outcomes if o.completion is not None]
    rate = len(answered) / result.evaluation_s * 3600 if result.evaluation_s > 0 and answered else None
    return Row(
        key=result.key,
        label=result.candidate.label,
        model=result.candidate.model,
        evaluation=result.candidate.evaluation,
        quality=scores.get(metric),
        scores=scores,
        unscored={name: sum(name in o.unscored for o in result.outcomes) for name in metrics},
        cost=cost_of(answered, price, rate),
        train_s=result.training.train_s if result.training else None,
        evaluation_s=result.evaluation_s,
    )


def _interval(result: Scored, metric: str, confidence: float) -> Interval | None:
    pairs = [(v, o.conversation) for o in result.outcomes if (v := o.scores.get(metric)) is not None]
    return mean_interval([v for v, _ in pairs], [c for _, c in pairs], confidence) if pairs else None


def _teacher_row(answers: Sequence[Completion], metric: str, metrics: Sequence[str], price: Price | None) -> Row:
    one = Interval(estimate=1.0, low=1.0, high=1.0, n=len(answers))
    return Row(
        key=TEACHER,
        label="teacher (the reference)",
        model=TEACHER,
        evaluation="reference",
        quality=one,
        scores=dict.fromkeys(metrics, one),
        unscored=dict.fromkeys(metrics, 0),
        cost=cost_of(answers, price),
    )


def _on_front(row: Row, rows: Sequence[Row]) -> bool:
    def point(r: Row) -> tuple[float, float] | None:
        cost = r.cost.usd_per_1000 if r.cost.usd_per_1000 is not None else r.cost.latency_p50_s
        return None if r.quality is None or cost is None else (r.quality.estimate, -cost)

    mine = point(row)
    others = [p for r in rows if (p := point(r)) is not None]
    if mine is None:
        return False
    return not any(p != mine and p[0] >= mine[0] and p[1] >= mine[1] for p in others)


def _recommend(rows: Sequence[Row], metric: str, margin: float) -> tuple[str | None, str]:
    """The cheapest row whose interval lies above 1 − margin; otherwise no winner and what is missing."""
    ranked = [r for r in rows if r.quality is not None]
    if not ranked:
        return None, "No candidate was scored."
    bar = 1 - margin
    good = [r for r in ranked if r.quality and r.quality.low >= bar]
    if good:
        best = min(good, key=lambda r: (r.cost.usd_per_1000 is None, r.cost.usd_per_1000 or 0.0))
        assert best.quality
        return best.key, (
            f"{best.label} is within {margin:.0%} of the teacher: {metric} {best.quality.estimate:.3f}, "
            f"{best.quality.confidence:.0%} interval from {best.quality.low:.3f}, on {best.quality.n} held-out records."
        )
    first = ranked[0]
    assert first.quality
    if first.quality.high >= bar:
        return None, (
            f"Not enough evidence: {first.label} scores {first.quality.estimate:.3f} "
            f"[{first.quality.low:.3f}, {first.quality.high:.3f}] on {first.quality.n} records; "
            f"{bar:.3f} is neither shown nor excluded."
        )
    return None, (
        f"No candidate is good enough: the best, {first.label}, scores {first.quality.estimate:.3f} "
        f"[{first.quality.low:.3f}, {first.quality.high:.3f}], below {bar:.3f}."
    )


class LeaderboardSettings(Value):
    """How a sweep's leaderboard ranks; the same words as `leaderboard()`."""

    metric: str | None = None
    margin: float = Field(default=0.02, ge=0, le=1)
    confidence: float = Field(default=0.95, gt=0, lt=1)
