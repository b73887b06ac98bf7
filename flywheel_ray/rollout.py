"""A rollout compares arms with the teacher on live traffic: as shadows (copies nobody sees) or as an A/B.

    rollout = config.load("configs/rollouts/demo.yaml", Rollout)
    assign(rollout, unit_of(rollout, "acme", "support", request))         # "teacher", the same on every replica
    summary = report(rollout, store.scan(LogQuery(rollout=rollout.name)))
    decide(summary.arm("student"), rollout.gates)     # Decision(action="hold", reason="agreement ≥ 0.942 …")

Who gets a request, and what becomes of an arm, are pure functions of the request, the configuration and the logs: every
replica agrees without talking to the others, and a promotion can be replayed.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, field_validator

from flywheel_ray import sequences, stats
from flywheel_ray.records import TEACHER, Completion, Record, conversation_of
from flywheel_ray.scoring import FUNCTION_NAME, FUNCTION_NAME_AND_ARGS, score_tool_calls
from flywheel_ray.text_scoring import EXACT_TEXT, exact_text
from flywheel_ray.values import EndpointUrl, Value

QUEUE_FULL = "queue_full"
SHUTDOWN = "shutdown"
CLIENT_CLOSED = "client_closed"
DROPS = (QUEUE_FULL, SHUTDOWN, CLIENT_CLOSED)
"""Let go by the gateway or the client, so no word about the arm. Any other `Record.error` is the arm's failure."""

AgreementMetric = Literal["function_name_and_args_accuracy", "function_name_accuracy", "exact_text"]
NAME = r"^[A-Za-z0-9._-]+$"
Url = Annotated[EndpointUrl, Field(pattern=r"^https?://[^\s/]+")]


class Endpoint(Value):
    """An OpenAI-compatible server. `url` ends before `/chat/completions`, usually in `/v1`."""

    url: Url
    model: str | None = None
    """Replaces the request's `model`; None leaves what the client asked for."""
    api_key_env: str | None = None
    """Name of the environment variable with the key; None passes on the client's own `Authorization`."""
    timeout_s: float = Field(default=60, gt=0)


class UrlTarget(Value):
    """An arm that somebody else serves. The client's `Authorization` is never sent there."""

    type: Literal["url"] = "url"
    url: Url
    model: str | None = None
    api_key_env: str | None = None


class Resources(Value):
    """What Ray reserves for a student; GPUs may be fractions."""

    num_cpus: float = Field(default=1, gt=0)
    num_gpus: float = Field(default=0, ge=0)


class StudentTarget(Value):
    """An arm that the gateway hosts: the candidate of a finished trial."""

    type: Literal["student"] = "student"
    trial: str = Field(default="best", min_length=1)
    """A ledger key, a unique prefix of one, or "best" (of the rollout's workload)."""
    ledger: str | None = None
    resources: Resources = Resources()
    max_batch_size: int = Field(default=8, ge=1)
    max_tokens: int = Field(default=128, ge=1)


Target = Annotated[UrlTarget | StudentTarget, Field(discriminator="type")]


class Arm(Value):
    """One alternative to the teacher, and how much traffic it sees."""

    name: str = Field(pattern=NAME)
    target: Target
    weight: float = Field(default=0.0, ge=0, le=1)
    """Share of units whose requests this arm answers (A/B)."""
    shadow: float = Field(default=0.0, ge=0, le=1)
    """Share of the teacher-answered requests that are copied to this arm."""
    timeout_s: float = Field(default=30, gt=0)
    """Time for one answer, counted from when the request is sent."""
    queue: int = Field(default=64, ge=1)
    """Shadow copies that may wait; further ones are dropped and counted."""
    workers: int = Field(default=4, ge=1)
    """Shadow copies in flight at a time."""

    @property
    def patience_s(self) -> float:
        """The longest that a copy may wait and be answered, in seconds: by then it is in the logs, or never will be."""
        return self.timeout_s * (1 + self.queue / self.workers)


class Gates(Value):
    """What an arm must show before it is promoted, and what sends it back."""

    metric: AgreementMetric = "function_name_and_args_accuracy"
    margin: float = Field(default=0.02, ge=0, lt=1)
    """Disagreement with the teacher that is acceptable: an arm is promoted once it surely disagrees less often."""
    rollback_margin: float | None = Field(default=None, ge=0, lt=1)
    """Disagreement that sends an arm back once it is surely exceeded; None takes `margin`."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """A wrong promotion and a wrong rollback by quality each have probability 1 − confidence at most, over all looks; a
    wrong rollback by errors half of that."""
    min_pairs: int = Field(default=50, ge=1)
    """No promotion before as many pairs."""
    idle_s: float | None = Field(default=300, gt=0)
    """A conversation counts once none of its pairs has come for so long; None counts each as it stands, for one look at
    the end."""
    max_error_rate: float = Field(default=0.05, ge=0, le=1)


class Rollout(Value):
    """The YAML of a rollout. `client_id` and `workload_id` tag requests that bring no tags of their own."""

    type: Literal["rollout"]
    name: str = Field(pattern=NAME)
    client_id: str = Field(min_length=1)
    workload_id: str = Field(min_length=1)
    teacher: Endpoint
    arms: tuple[Arm, ...] = Field(min_length=1)
    unit: Literal["user", "conversation"] = "conversation"
    """What sticks to one arm. A request without a user falls back to its conversation."""
    salt: str | None = None
    """Seeds the assignment; None takes the rollout's name. Two rollouts with one salt treat the same units."""
    gates: Gates = Gates()

    @field_validator("arms")
    @classmethod
    def _check_arms(cls, arms: tuple[Arm, ...]) -> tuple[Arm, ...]:
        names = [arm.name for arm in arms]
        if TEACHER in names:
            raise ValueError('an arm is called "teacher", which is the name of the model in production; rename it')
        if repeated := [name for name, n in Counter(names).items() if n > 1]:
            raise ValueError(f"two arms are called {repeated[0]!r}; rename one")
        if sum(arm.weight for arm in arms) > 1 + 1e-9:
            raise ValueError(f"the weights sum to {sum(arm.weight for arm in arms):g}; they may sum to 1 at most")
        return arms

    def arm(self, name: str) -> Arm:
        """The arm of that name. Raises KeyError."""
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise KeyError(name)


# ── who gets a request ────────────────────────────────────────────────────────────────────────────────────────────────


def user_of(request: Mapping[str, Any]) -> str | None:
    """The end user of a chat request: OpenAI's `user`, else `metadata.user_id`; None where it names nobody."""
    metadata = request.get("metadata")
    for value in (request.get("user"), metadata.get("user_id") if isinstance(metadata, dict) else None):
        if isinstance(value, str | int) and not isinstance(value, bool) and str(value):
            return str(value)
    return None


def unit_of(rollout: Rollout, client_id: str, workload_id: str, request: Mapping[str, Any]) -> str:
    """What a request sticks by: its user or its conversation, as the rollout says. Never raises."""
    if rollout.unit == "user" and (user := user_of(request)) is not None:
        return f"user:{client_id}:{user}"
    messages = request.get("messages")
    turns = [m for m in messages if isinstance(m, dict)] if isinstance(messages, list) else []
    return conversation_of(client_id, workload_id, turns)


def assign(rollout: Rollout, unit: str) -> str:
    """Name of the arm that answers this unit's requests, or "teacher". Sticky, by hash.

    A unit is a point in [0, 1). The first arm owns the stretch from 0 up, the second the stretch from 1 down, further
    arms follow on either side, and the teacher keeps the middle. So raising a weight only ever takes units from the
    teacher, and with one or two arms no unit changes between arms either.
    """
    point = _point(rollout, "assign", unit)
    low, high = 0.0, 1.0
    for i, arm in enumerate(rollout.arms):
        if i % 2 == 0:
            if low <= point < low + arm.weight:
                return arm.name
            low += arm.weight
        else:
            if high - arm.weight <= point < high:
                return arm.name
            high -= arm.weight
    return TEACHER


def shadowed(rollout: Rollout, arm: Arm, exchange_id: str) -> bool:
    """Whether this exchange is copied to the arm: its `shadow` share, by hash, independent of the assignment."""
    return _point(rollout, f"shadow:{arm.name}", exchange_id) < arm.shadow


def _point(rollout: Rollout, purpose: str, subject: str) -> float:
    """A point in [0, 1), uniform over subjects and independent between purposes."""
    text = "\0".join((rollout.salt or rollout.name, purpose, subject))
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53  # 53 bits: the quotient is exact and below 1


# ── what the logs say ─────────────────────────────────────────────────────────────────────────────────────────────────


class Pair(Value):
    """One exchange that the teacher answered and an arm was given a copy of."""

    teacher: Record
    shadow: Record

    @property
    def failed(self) -> bool:
        """The arm gave no answer, so a user would have got nothing."""
        return self.shadow.error is not None

    @property
    def conversation(self) -> str:
        """What groups pairs that are not independent."""
        return _conversation(self.teacher)

    def agreement(self, metric: str) -> float | None:
        """1 or 0; None where the metric does not apply: tool metrics need tools in the request, exact text none."""
        reference = self.teacher.completion
        if bool(self.teacher.tools) != (metric != EXACT_TEXT) or _malformed(reference):
            return None
        if self.failed:
            return 0.0
        if metric == EXACT_TEXT:
            return exact_text(reference.text, self.shadow.completion.text)
        scores = score_tool_calls(reference, self.shadow.completion, self.teacher.tools)
        return {s.metric: s.value for s in scores}[metric]


class Agreement(Value):
    """How often an arm did what the teacher did. `interval` is for reading once, `evidence` for looking at any time."""

    metric: str
    interval: stats.Interval
    """Of all pairs, clustered by conversation."""
    evidence: sequences.Evidence
    """Of the conversations that have ended, at the gates' margins; decisions rest on this one."""

    @property
    def sequence(self) -> stats.Interval:
        """Anytime-valid interval of the agreement, on the conversations that have ended."""
        return self.evidence.difference.shifted(1.0)


class Latency(Value):
    """Percentiles in seconds over the same exchanges, n of them."""

    n: int
    teacher_p50_s: float
    teacher_p95_s: float
    arm_p50_s: float
    arm_p95_s: float


class Tokens(Value):
    """Mean completion tokens over the same exchanges, n of them."""

    n: int
    teacher: float
    arm: float


class ArmReport(Value):
    """What the logs say about one arm. `copies` = answered + failed + dropped shadow copies."""

    arm: str
    copies: int = 0
    answered: int = 0
    drops: dict[str, int] = Field(default_factory=dict)
    """Copies that never reached the arm, by cause (`DROPS`)."""
    failures: dict[str, int] = Field(default_factory=dict)
    """Copies the arm failed, by cause: timeout, http_500, connection, bad_response, …"""
    live_requests: int = 0
    """Requests assigned to this arm (A/B)."""
    live_failures: dict[str, int] = Field(default_factory=dict)
    """Assigned requests that the teacher had to answer instead, by cause."""
    pairs: int = 0
    """Copies, answered or failed, whose teacher answer is in the logs too."""
    unpaired: int = 0
    """Copies, answered or failed, without one."""
    unscored: int = 0
    """Pairs that the gate's metric does not apply to."""
    agreement: dict[str, Agreement] = Field(default_factory=dict)
    """By metric, for those that apply to some pair."""
    error_rate: stats.Interval | None = None
    """Anytime-valid share of failures among all that the arm was really asked, in conversations that have ended; None
    where there is none."""
    latency: Latency | None = None
    tokens: Tokens | None = None


class RolloutReport(Value):
    """What the logs say about a rollout. The sample ratio is by unit: requests of one unit are not independent."""

    rollout: str
    exchanges: int
    teacher_requests: int
    """Requests that the teacher answered or should have: everything not assigned to an arm."""
    teacher_errors: dict[str, int]
    arms: tuple[ArmReport, ...]
    units: dict[str, int] = Field(default_factory=dict)
    """Distinct units by whom they were assigned to first."""
    sample_ratio_p_value: float | None = None
    """Under the rollout's present weights, valid at every look; None without an A/B. Below 0.001 the assignment or the
    logging is broken."""

    def arm(self, name: str) -> ArmReport:
        """The report of the arm of that name. Raises KeyError."""
        for arm in self.arms:
            if arm.arm == name:
                return arm
        raise KeyError(name)


class Decision(Value):
    """What to do with an arm, and the figures that say so."""

    arm: str
    action: Literal["promote", "hold", "roll_back"]
    reason: str


def pairs_of(records: Iterable[Record]) -> dict[str, list[Pair]]:
    """By arm, in order of arrival: shadow records that reached it, with the teacher's answer to the same exchange.

    Copies the gateway dropped, and exchanges the teacher itself failed, make no pair.
    """
    logged = list(records)
    teacher = {
        r.exchange_id: r for r in logged if r.exchange_id and r.served_by == TEACHER and not r.shadow and not r.error
    }
    pairs: dict[str, list[Pair]] = {}
    for record in sorted((r for r in logged if _reached(r)), key=_arrival):
        if record.arm and record.exchange_id in teacher:
            pairs.setdefault(record.arm, []).append(Pair(teacher=teacher[record.exchange_id], shadow=record))
    return pairs


def report(rollout: Rollout, records: Iterable[Record], as_of: float | None = None) -> RolloutReport:
    """Summarise a rollout's logs; records of other rollouts are passed over. Their order does not matter.

    Give it the records of one configuration: logs from before a weight was changed spoil the sample ratio.

    Args:
        rollout: whose logs to read, and by which gates.
        records: the logs.
        as_of: the present, in seconds since the epoch, while traffic goes on: conversations that may still go on, or
            whose copies may still be under way, are not counted as evidence yet. None: the traffic has ended.
    """
    logged = [r for r in records if r.rollout == rollout.name]
    pairs = pairs_of(logged)
    live = sorted((r for r in logged if not r.shadow), key=_arrival)
    assigned = {r.exchange_id: r.arm for r in live if r.arm}
    primary = [r for r in live if r.served_by == TEACHER and r.exchange_id not in assigned]
    units = _units(rollout, live, assigned)
    return RolloutReport(
        rollout=rollout.name,
        exchanges=len({r.exchange_id for r in live}),
        teacher_requests=len(primary),
        teacher_errors=_causes(primary),
        arms=tuple(_arm_report(rollout, arm, logged, pairs.get(arm.name, []), as_of) for arm in rollout.arms),
        units=units,
        sample_ratio_p_value=_sample_ratio(rollout, units),
    )


def decide(arm: ArmReport, gates: Gates) -> Decision:
    """Promote, hold or roll back, from bounds that stay valid however often this is asked.

    Roll back when the arm surely fails too often or surely disagrees by more than the margin; promote when it surely
    agrees within the margin, on enough pairs; hold otherwise.
    """

    def say(action: Literal["promote", "hold", "roll_back"], reason: str) -> Decision:
        return Decision(arm=arm.arm, action=action, reason=reason)

    errors = arm.error_rate
    # An outage long over keeps the sequence above the gate for good, so the rate itself has to be above it too.
    if errors is not None and min(errors.low, errors.estimate) > gates.max_error_rate:
        return say("roll_back", f"{_errors(errors)}: more than {gates.max_error_rate:.3f} allowed")
    if (found := arm.agreement.get(gates.metric)) is None:
        return say("hold", f"no pair to score by {gates.metric}: {_nothing(arm)}")
    floor, seen, evidence = 1 - gates.margin, found.sequence, found.evidence
    if not seen.n:
        return say("hold", f"no conversation has ended yet: {evidence.open_pairs} pairs wait")
    ceiling = floor if gates.rollback_margin is None else 1 - gates.rollback_margin
    figures = (
        f"{gates.metric} {seen.estimate:.3f} in [{seen.low:.3f}, {seen.high:.3f}] over {seen.n} pairs of "
        f"{evidence.conversations} conversations" + (", and it changed meanwhile" if evidence.drifted else "")
    )
    if evidence.decision == "roll_back":
        return say("roll_back", f"{figures}: surely below {ceiling:.3f} since pair {evidence.decided_at}")
    if evidence.decision is None:
        waiting = f"; {evidence.open_pairs} wait for their conversations to end" if evidence.open_pairs else ""
        if seen.n < gates.min_pairs:
            return say("hold", f"{figures}: {gates.min_pairs} pairs are needed{waiting}")
        return say("hold", f"{figures}: not yet surely above {floor:.3f}{waiting}")
    sure = f"{figures}: surely at least {floor:.3f} since pair {evidence.decided_at}"
    if errors is not None and errors.estimate > gates.max_error_rate:
        return say("hold", f"{sure}, but {_errors(errors)}: more than {gates.max_error_rate:.3f} allowed")
    return say("promote", sure + (f"; {_errors(errors)}" if errors else ""))


def _errors(errors: stats.Interval) -> str:
    return f"error rate {errors.estimate:.3f} in [{errors.low:.3f}, {errors.high:.3f}] over {errors.n} requests"


def _nothing(arm: ArmReport) -> str:
    if arm.pairs:
        return f"it applies to none of the {arm.pairs} pairs"
    if arm.copies:
        return f"none of the {arm.copies} copies reached the arm beside a teacher's answer"
    return "no shadow copy is in the logs; give the arm a `shadow` share"


def _arm_report(
    rollout: Rollout, arm: Arm, logged: Sequence[Record], pairs: Sequence[Pair], as_of: float | None
) -> ArmReport:
    mine = sorted((r for r in logged if r.arm == arm.name), key=_arrival)
    settled = None  # without an idle time the look is at the end, when all is there
    if as_of is not None and rollout.gates.idle_s is not None:
        settled = as_of - arm.patience_s - rollout.teacher.timeout_s
    copies = [r for r in mine if r.shadow]
    live = [r for r in mine if not r.shadow]
    asked = [r for r in mine if r.error not in DROPS]
    reached = [r for r in copies if r.error not in DROPS]
    metrics = (FUNCTION_NAME_AND_ARGS, FUNCTION_NAME, EXACT_TEXT)
    failed = sequences.close(
        [float(r.error is not None) for r in asked],
        [_conversation(r) for r in asked],
        [r.timestamp for r in asked],
        rollout.gates.idle_s,
        settled,
    )
    return ArmReport(
        arm=arm.name,
        copies=len(copies),
        answered=sum(r.error is None for r in copies),
        drops=_causes(r for r in copies if r.error in DROPS),
        failures=_causes(reached),
        live_requests=len(live),
        live_failures=_causes(live),
        pairs=len(pairs),
        unpaired=len(reached) - len(pairs),
        unscored=sum(p.agreement(rollout.gates.metric) is None for p in pairs),
        agreement={m: a for m in metrics if (a := _agreement(m, pairs, rollout.gates, settled)) is not None},
        error_rate=sequences.confidence_sequence(failed, confidence=rollout.gates.confidence) if failed.n else None,
        latency=_latency(pairs),
        tokens=_tokens(pairs),
    )


def _agreement(metric: str, pairs: Sequence[Pair], gates: Gates, as_of: float | None) -> Agreement | None:
    scored = [(p, value) for p in pairs if (value := p.agreement(metric)) is not None]
    if not scored:
        return None
    values = [value for _, value in scored]
    conversations = [p.conversation for p, _ in scored]
    ended = sequences.close(
        [value - 1.0 for value in values],  # the teacher agrees with itself
        conversations,
        [p.shadow.timestamp for p, _ in scored],
        gates.idle_s,
        as_of,
    )
    return Agreement(
        metric=metric,
        interval=stats.mean_interval(values, conversations, gates.confidence),
        evidence=sequences.weigh(
            ended, gates.margin, gates.rollback_margin, gates.confidence, gates.min_pairs, high=0.0
        ),
    )


def _latency(pairs: Sequence[Pair]) -> Latency | None:
    both = [
        (p.teacher.completion.latency_s, p.shadow.completion.latency_s)
        for p in pairs
        if not p.failed and p.teacher.completion.latency_s is not None and p.shadow.completion.latency_s is not None
    ]
    if not both:
        return None
    table = np.percentile(np.asarray(both, dtype=float), [50, 95], axis=0)
    return Latency(
        n=len(both),
        teacher_p50_s=float(table[0, 0]),
        teacher_p95_s=float(table[1, 0]),
        arm_p50_s=float(table[0, 1]),
        arm_p95_s=float(table[1, 1]),
    )


def _tokens(pairs: Sequence[Pair]) -> Tokens | None:
    both = [
        (t, s)
        for p in pairs
        if (t := p.teacher.completion.completion_tokens) is not None
        and (s := p.shadow.completion.completion_tokens) is not None
    ]
    if not both:
        return None
    return Tokens(n=len(both), teacher=sum(t for t, _ in both) / len(both), arm=sum(s for _, s in both) / len(both))


def _units(rollout: Rollout, live: Sequence[Record], assigned: Mapping[str | None, str | None]) -> dict[str, int]:
    first: dict[str, str] = {}
    for record in live:
        unit = unit_of(rollout, record.client_id, record.workload_id, record.request)
        first.setdefault(unit, assigned.get(record.exchange_id) or TEACHER)
    return dict(sorted(Counter(first.values()).items()))


def _sample_ratio(rollout: Rollout, units: Mapping[str, int]) -> float | None:
    weights = {arm.name: arm.weight for arm in rollout.arms}
    if not any(weights.values()) or not units:
        return None
    weights[TEACHER] = max(0.0, 1 - sum(weights.values()))
    if weights[TEACHER] < 1e-9:
        weights[TEACHER] = 0.0
    counts = [units.get(name, 0) for name in weights]
    return min(1.0, 1 / sequences.sample_ratio_e_value(counts, list(weights.values())))


def _reached(record: Record) -> bool:
    return record.shadow and record.error not in DROPS


def _arrival(record: Record) -> tuple[float, str, str]:
    return record.timestamp, record.exchange_id or "", record.id


def _causes(records: Iterable[Record]) -> dict[str, int]:
    return dict(sorted(Counter(r.error for r in records if r.error).items()))


def _conversation(record: Record) -> str:
    # Many users open with the same words, and where the request names its user they are told apart.
    conversation = conversation_of(record.client_id, record.workload_id, record.messages)
    return f"{user_of(record.request) or ''}:{conversation}"


def _malformed(completion: Completion) -> bool:
    return any(isinstance(call.arguments, str) for call in completion.tool_calls)
