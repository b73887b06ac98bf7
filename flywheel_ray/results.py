"""What a trial ends as: `Scored`, with one outcome for every evaluation example, or `Failed`, with the stage and why.

    match result:
        case Scored(): result.mean("function_name_and_args_accuracy")     # 0.95, over the scored outcomes
        case Failed(): print(result.stage, result.error)                  # "training", "cancelled by the scheduler"

`Failed` is a value and never a score of 0. Latency and cost summaries live here because both need only outcomes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, TypeAdapter

from flywheel_ray.candidates import Candidate
from flywheel_ray.judge import JudgeUsage, Verdict
from flywheel_ray.prices import HourPrice, Price, TokenPrice
from flywheel_ray.records import Completion
from flywheel_ray.values import Value


class Outcome(Value):
    """One evaluation example as one candidate answered it.

    `scores` holds a value in [0, 1] for each metric, or None where the row is unscored; `unscored` says why.
    """

    example_id: str
    repeat: int = 0
    """Which answer to the example this is, from 0, where a trial asked for several."""
    conversation: str
    completion: Completion | None
    """None where the model gave no answer at all (`unscored` has the reason)."""
    scores: dict[str, float | None]
    unscored: dict[str, str] = Field(default_factory=dict)
    verdicts: tuple[Verdict, ...] = ()
    """What the judge's score of this row was made of."""


class LossPoint(Value):
    """A loss (mean cross-entropy per target token, in nats) after `step` optimizer steps, `epoch` passes."""

    step: int
    epoch: float
    value: float


class TrainingSummary(Value):
    """What fine-tuning did: loss series, seconds, tokens and the adapter's opaque reference on its platform."""

    job: str
    adapter: str
    train_losses: tuple[LossPoint, ...] = ()
    validation_losses: tuple[LossPoint, ...] = ()
    train_s: float | None = None
    train_tokens: int | None = None
    train_records: int | None = None


class Scored(Value):
    """A finished trial: every evaluation example has its outcome."""

    type: Literal["scored"] = "scored"
    key: str
    candidate: Candidate
    fingerprint: str
    scorer_version: str
    judge: str
    """Which judge gave the judged metrics, e.g. "rubric (offline, no LLM)"."""
    judging: JudgeUsage = JudgeUsage()
    outcomes: tuple[Outcome, ...]
    shots: tuple[tuple[dict[str, Any], ...], ...] = ()
    """The in-context examples every prompt carried, each a list of messages; serving needs the same ones."""
    training: TrainingSummary | None = None
    evaluation_s: float
    """Wall time of answering all examples, in seconds."""

    def values(self, metric: str) -> list[float]:
        """The scored values of a metric, in dataset order."""
        return [v for o in self.outcomes if (v := o.scores.get(metric)) is not None]

    def mean(self, metric: str) -> float | None:
        """Mean over the scored outcomes, or None where none was scored."""
        values = self.values(metric)
        return sum(values) / len(values) if values else None

    def metrics(self) -> tuple[str, ...]:
        """Every metric that some outcome carries, in first-seen order."""
        return tuple(dict.fromkeys(name for o in self.outcomes for name in o.scores))


Stage = Literal["prompts", "dataset", "training", "hosting", "generation", "scoring", "process"]
"""Where a trial is, or stopped; "process" where its process was stopped or lost before it could say."""


class Failed(Value):
    """A trial that did not finish: where it stopped and why, in the words of the error."""

    type: Literal["failed"] = "failed"
    key: str
    candidate: Candidate
    fingerprint: str
    stage: Stage
    error: str
    transient: bool = False
    """True where the same trial may succeed when repeated (a platform that did not answer)."""


TrialResult = Annotated[Scored | Failed, Field(discriminator="type")]
TRIAL_RESULT: TypeAdapter[Scored | Failed] = TypeAdapter(TrialResult)


class Cost(Value):
    """Latency percentiles (s), mean tokens a request and US dollars per 1,000 requests; None where unmeasured."""

    latency_p50_s: float | None
    latency_p95_s: float | None
    prompt_tokens: float | None
    completion_tokens: float | None
    usd_per_1000: float | None


def cost_of(completions: Sequence[Completion], price: Price | None, requests_per_hour: float | None = None) -> Cost:
    """Summarise what answering cost.

    Args:
        completions: the answers given; figures missing from some are averaged over those that have them.
        price: how this model is paid for, or None where the price table does not list it.
        requests_per_hour: measured throughput, used by an `HourPrice` that names none.
    """
    latencies = [c.latency_s for c in completions if c.latency_s is not None]
    p50, p95 = (float(v) for v in np.percentile(latencies, [50, 95])) if latencies else (None, None)
    prompt = _mean([c.prompt_tokens for c in completions])
    completion = _mean([c.completion_tokens for c in completions])
    usd: float | None = None
    if isinstance(price, TokenPrice) and prompt is not None and completion is not None:
        usd = price.usd(prompt, completion) * 1000
    elif isinstance(price, HourPrice):
        rate = price.requests_per_hour or requests_per_hour
        usd = price.usd_per_hour / rate * 1000 if rate else None
    return Cost(
        latency_p50_s=p50, latency_p95_s=p95, prompt_tokens=prompt, completion_tokens=completion, usd_per_1000=usd
    )


def _mean(values: Sequence[int | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None
