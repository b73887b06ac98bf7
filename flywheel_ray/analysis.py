"""The ledger and a rollout's logs as pandas DataFrames, for a notebook; `plots` draws, `write_report` makes the page.

    ledger = Ledger("runs/ledger")
    trials_frame(ledger)[["label", "function_name_and_args_accuracy", "usd_per_1000"]]
    shadow_frame(store.scan(LogQuery(rollout="demo-shadow"))).groupby("arm")["arm_latency_s"].median()

A figure that nobody measured is missing (NaN) and never 0. Needs the extra `flywheel-ray[analysis]`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flywheel_ray.errors import FlywheelError
from flywheel_ray.leaderboard import Row
from flywheel_ray.ledger import Ledger
from flywheel_ray.records import Record
from flywheel_ray.report import answer_text, prompt_text, write_report
from flywheel_ray.results import Failed, Scored
from flywheel_ray.rollout import EXACT_TEXT, pairs_of
from flywheel_ray.scoring import FUNCTION_NAME, FUNCTION_NAME_AND_ARGS

try:
    import pandas as pd
except ModuleNotFoundError as missing:
    raise FlywheelError(
        f"analysis needs {missing.name}, which is not installed: pip install 'flywheel-ray[analysis]'"
    ) from None

__all__ = [
    "answer_text",
    "losses_frame",
    "outcomes_frame",
    "prompt_text",
    "shadow_frame",
    "trials_frame",
    "write_report",
]

_PAIR_METRICS = (FUNCTION_NAME_AND_ARGS, FUNCTION_NAME, EXACT_TEXT)


def trials_frame(ledger: Ledger, fingerprint: str | None = None) -> pd.DataFrame:
    """One row a trial, best first and failed ones last.

    Columns: key, label, status ("scored" or "failed"), model, evaluation, adaptation and its parameters (`rank`,
    `shots`, …), each metric as `m`, `m_low`, `m_high`, `m_n` and `m_unscored`, latency_p50_s, latency_p95_s (s),
    prompt_tokens, completion_tokens (means), usd_per_1000, usd_per_1000_successes, p_value, pareto, dominated_by (as
    `leaderboard.Row` says), train_s, evaluation_s, judge, stage, error, latest_sweep, fingerprint.
    Prices are those of the latest sweep on the dataset.

    Args:
        ledger: where the results are.
        fingerprint: of the dataset; None takes the one whose results were written last.
    """
    fingerprint = fingerprint or ledger.latest()
    results = {result.key: result for result in ledger.results(fingerprint)}
    board = ledger.board(fingerprint, every=True)
    recent = (ledger.sweep(fingerprint) or {}).get("keys", list(results))
    rows = [_trial(results[row.key]) | _figures(row) for row in board.rows] + [
        _trial(failed) for failed in board.failed
    ]
    for row in rows:
        row |= {"latest_sweep": row["key"] in recent, "fingerprint": fingerprint}
    metrics = [f"{name}{part}" for name in board.teacher.scores for part in ("", "_low", "_high", "_n", "_unscored")]
    head = ["key", "label", "status", "model", "evaluation", "adaptation"]
    costs = ["p_value", "latency_p50_s", "latency_p95_s", "prompt_tokens", "completion_tokens", "usd_per_1000"]
    costs += ["usd_per_1000_successes", "pareto", "dominated_by"]
    tail = ["train_s", "evaluation_s", "judge", "stage", "error", "latest_sweep", "fingerprint"]
    known = dict.fromkeys([*head, *metrics, *costs, *tail])
    parameters = list(dict.fromkeys(name for row in rows for name in row if name not in known))
    return pd.DataFrame(rows, columns=[*head, *parameters, *metrics, *costs, *tail])


def outcomes_frame(ledger: Ledger, fingerprint: str | None = None) -> pd.DataFrame:
    """One row for each scored trial and evaluation example: key, label, example_id, conversation, answer, every metric
    (NaN where unscored), unscored (why), latency_s, prompt_tokens, completion_tokens.
    """
    rows: list[dict[str, Any]] = []
    metrics: dict[str, None] = {}
    for result in ledger.results(fingerprint or ledger.latest()):
        if isinstance(result, Failed):
            continue
        metrics |= dict.fromkeys(result.metrics())
        for outcome in result.outcomes:
            answer = outcome.completion
            rows.append(
                {
                    "key": result.key,
                    "label": result.candidate.label,
                    "example_id": outcome.example_id,
                    "conversation": outcome.conversation,
                    "answer": answer_text(answer) if answer else None,
                    **outcome.scores,
                    "unscored": "; ".join(f"{name}: {why}" for name, why in outcome.unscored.items()) or None,
                    "latency_s": answer.latency_s if answer else None,
                    "prompt_tokens": answer.prompt_tokens if answer else None,
                    "completion_tokens": answer.completion_tokens if answer else None,
                }
            )
    head = ["key", "label", "example_id", "conversation", "answer"]
    tail = ["unscored", "latency_s", "prompt_tokens", "completion_tokens"]
    return _numeric(pd.DataFrame(rows, columns=[*head, *metrics, *tail]), [*metrics, *tail[1:]])


def losses_frame(ledger: Ledger, fingerprint: str | None = None) -> pd.DataFrame:
    """One row for each loss that a LoRA trial logged: key, label, step, epoch, kind ("train" or "validation") and value
    (nats per target token).
    """
    rows = []
    for result in ledger.results(fingerprint or ledger.latest()):
        if isinstance(result, Failed) or result.training is None:
            continue
        series = {"train": result.training.train_losses, "validation": result.training.validation_losses}
        for kind, points in series.items():
            same = {"key": result.key, "label": result.candidate.label, "kind": kind}
            rows += [{**same, "step": p.step, "epoch": p.epoch, "value": p.value} for p in points]
    return pd.DataFrame(rows, columns=["key", "label", "step", "epoch", "kind", "value"])


def shadow_frame(records: Iterable[Record]) -> pd.DataFrame:
    """One row a pair: a teacher's answer and an arm's shadow answer to one exchange, by arm, in order of arrival.

    Columns: exchange_id, conversation, arm, timestamp (UTC), each agreement metric (1 or 0; NaN where it does not
    apply), teacher_latency_s, arm_latency_s, teacher_tokens, arm_tokens (of the completion), error (why the arm gave no
    answer), prompt, teacher_answer, arm_answer. Copies that the gateway dropped make no pair: `rollout.report` counts
    them.
    """
    rows = []
    for arm, pairs in pairs_of(records).items():
        for pair in pairs:
            teacher, student = pair.teacher.completion, pair.shadow.completion
            rows.append(
                {
                    "exchange_id": pair.teacher.exchange_id,
                    "conversation": pair.conversation,
                    "arm": arm,
                    "timestamp": pd.Timestamp(pair.teacher.timestamp, unit="s", tz="UTC"),
                    **{metric: pair.agreement(metric) for metric in _PAIR_METRICS},
                    "teacher_latency_s": teacher.latency_s,
                    "arm_latency_s": student.latency_s,
                    "teacher_tokens": teacher.completion_tokens,
                    "arm_tokens": student.completion_tokens,
                    "error": pair.shadow.error,
                    "prompt": prompt_text(pair.teacher.messages),
                    "teacher_answer": answer_text(teacher),
                    "arm_answer": None if pair.failed else answer_text(student),
                }
            )
    figures = [*_PAIR_METRICS, "teacher_latency_s", "arm_latency_s", "teacher_tokens", "arm_tokens"]
    words = ["error", "prompt", "teacher_answer", "arm_answer"]
    return _numeric(
        pd.DataFrame(rows, columns=["exchange_id", "conversation", "arm", "timestamp", *figures, *words]), figures
    )


def _trial(result: Scored | Failed) -> dict[str, Any]:
    """What a trial was, and how it ended."""
    adaptation = result.candidate.adaptation.model_dump(mode="json")
    row = {
        "key": result.key,
        "label": result.candidate.label,
        "status": result.type,
        "model": result.candidate.model,
        "evaluation": result.candidate.evaluation,
        "adaptation": adaptation.pop("type"),
        **adaptation,
    }
    if isinstance(result, Failed):
        return row | {"stage": result.stage, "error": result.error}
    return row | {"judge": result.judge}


def _figures(row: Row) -> dict[str, Any]:
    """What a trial's row on the leaderboard measured."""
    figures: dict[str, Any] = {"pareto": row.pareto, "train_s": row.train_s, "evaluation_s": row.evaluation_s}
    for name, interval in row.scores.items():
        figures[f"{name}_unscored"] = row.unscored[name]
        figures[f"{name}_n"] = interval.n if interval else 0
        if interval:
            figures |= {name: interval.estimate, f"{name}_low": interval.low, f"{name}_high": interval.high}
    figures |= {"p_value": row.p_value, "dominated_by": row.dominated_by}
    return figures | row.cost.model_dump() | {"usd_per_1000_successes": row.usd_per_1000_successes}


def _numeric(frame: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """Missing figures as NaN, also in a column that has nothing else."""
    return frame.astype(dict.fromkeys(columns, float))
