import random
from collections import Counter
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import stats as scipy_stats

from flywheel_ray.records import Record, conversation_of, from_hit
from flywheel_ray.rollout import (
    CLIENT_CLOSED,
    EXACT_TEXT,
    QUEUE_FULL,
    SHUTDOWN,
    Arm,
    Decision,
    Gates,
    Rollout,
    UrlTarget,
    assign,
    decide,
    pairs_of,
    report,
    shadowed,
    unit_of,
)
from flywheel_ray.scoring import FUNCTION_NAME, FUNCTION_NAME_AND_ARGS

CONFIGS = sorted((Path(__file__).parent.parent / "configs" / "rollouts").glob("*.yaml"))
TOOLS = [{"type": "function", "function": {"name": "route", "parameters": {}}}]


def rollout(*weights: float, shadow: float = 1.0, unit: str = "conversation", **more) -> Rollout:
    target = {"type": "url", "url": "http://localhost:1/v1"}
    arms = [{"name": f"arm{i}", "target": target, "weight": w, "shadow": shadow} for i, w in enumerate(weights)]
    teacher = {"url": "http://localhost:2/v1"}
    basis = {"type": "rollout", "name": "r", "client_id": "acme", "workload_id": "support", "teacher": teacher}
    return Rollout.model_validate({**basis, "arms": arms, "unit": unit, **more})


def record(i: int, queue: str | None = "cards", text: str = "", tools: bool = True, **fields) -> Record:
    """Exchange number i. An answer of one call, or of text where `queue` is None."""
    call = {"function": {"name": "route", "arguments": f'{{"queue": "{queue}"}}'}}
    message = {"content": text or None, "tool_calls": [call] if queue else None}
    request = {"messages": [{"role": "user", "content": f"question {i}"}], **({"tools": TOOLS} if tools else {})}
    hit = {
        "client_id": "acme",
        "workload_id": "support",
        "timestamp": 1000.0 + i,
        "request": request | fields.pop("request", {}),
        "response": {}
        if fields.get("error")
        else {"choices": [{"message": message}], "usage": fields.pop("usage", None)},
        "exchange_id": f"e{i}",
        "rollout": "r",
        **fields,
    }
    found = from_hit(hit)
    assert isinstance(found, Record), found
    return found


def copy(i: int, queue: str | None = "cards", **fields) -> Record:
    return record(i, queue, **{"served_by": "arm0", "arm": "arm0", "shadow": True, **fields})


# ── configuration ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_rollout_config_is_one(path):
    assert Rollout.model_validate(yaml.safe_load(path.read_text())).arms


def test_there_are_rollout_configs():
    assert CONFIGS


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"arms": []}, "at least 1"),
        ({"wieght": 1}, "wieght"),
        ({"teacher": {"url": "localhost:8000"}}, "url"),
        ({"gates": {"metric": "vibes"}}, "metric"),
    ],
)
def test_wrong_configurations_fail(change, said):
    with pytest.raises(ValidationError, match=said):
        rollout(0.1, **change)


def test_arms_are_told_apart_and_share_at_most_all_traffic():
    arm = Arm(name="a", target=UrlTarget(url="http://x/v1"))
    for arms, said in [
        ((arm, arm), "two arms are called 'a'"),
        ((arm.model_copy(update={"name": "teacher"}),), "rename it"),
    ]:
        with pytest.raises(ValidationError, match=said):
            rollout(0.1, arms=[a.model_dump() for a in arms])
    with pytest.raises(ValidationError, match=r"sum to 1\.1"):
        rollout(0.5, 0.6)
    assert rollout(0.1, 0.2, 0.7).arm("arm2").weight == 0.7
    with pytest.raises(KeyError):
        rollout(0.1).arm("nobody")


# ── assignment ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("weights", [(0.2,), (0.1, 0.3), (0.05, 0.15, 0.5)])
def test_weights_are_the_shares_of_units(weights):
    config = rollout(*weights)
    counts = Counter(assign(config, f"unit{i}") for i in range(100_000))
    expected = {f"arm{i}": w * 1e5 for i, w in enumerate(weights)} | {"teacher": (1 - sum(weights)) * 1e5}
    assert scipy_stats.chisquare([counts[k] for k in expected], list(expected.values())).pvalue > 1e-3


def test_all_traffic_can_be_given_away():
    assert {assign(rollout(1.0), str(i)) for i in range(1000)} == {"arm0"}
    assert {assign(rollout(0.5, 0.5), str(i)) for i in range(1000)} == {"arm0", "arm1"}
    assert {assign(rollout(0.0), str(i)) for i in range(1000)} == {"teacher"}


@given(st.floats(0, 0.5), st.floats(0, 0.5), st.floats(0, 0.5), st.lists(st.text(), min_size=1, max_size=50))
def test_a_ramp_only_takes_units_from_the_teacher(first, low, high, units):
    low, high = sorted((low, high))
    for unit in units:
        before, after = assign(rollout(first, low), unit), assign(rollout(first, high), unit)
        assert after in ((before,) if before != "teacher" else ("teacher", "arm1"))
        before, after = assign(rollout(low, first), unit), assign(rollout(high, first), unit)
        assert after in ((before,) if before != "teacher" else ("teacher", "arm0"))


@given(st.lists(st.floats(0, 0.2), min_size=4, max_size=4), st.integers(0, 3), st.text())
def test_no_ramp_returns_a_unit_to_the_teacher(weights, which, unit):
    raised = [w + 0.2 * (i == which) for i, w in enumerate(weights)]
    if assign(rollout(*weights), unit) != "teacher":
        assert assign(rollout(*raised), unit) != "teacher"


def test_the_salt_is_the_name_unless_given_and_decides_the_units():
    units = [str(i) for i in range(2000)]

    def share(config: Rollout) -> list[str]:
        return [assign(config, u) for u in units]

    assert share(rollout(0.5)) == share(rollout(0.5, salt="r"))
    assert share(rollout(0.5)) != share(rollout(0.5, name="s"))
    assert share(rollout(0.5, salt="x")) == share(rollout(0.5, salt="x", name="s"))


def test_shadow_share_is_independent_of_arm_and_assignment():
    config = rollout(0.5, 0.5, shadow=0.3)
    ids = [f"e{i}" for i in range(20_000)]
    first, second = ({e for e in ids if shadowed(config, arm, e)} for arm in config.arms)
    assert abs(len(first) - 6000) < 300
    assert abs(len(first & second) - 1800) < 200
    assert not any(shadowed(rollout(0, shadow=0), rollout(0, shadow=0).arms[0], e) for e in ids)
    assert all(shadowed(rollout(0), rollout(0).arms[0], e) for e in ids)


def test_the_unit_is_the_user_or_the_conversation():
    messages = [{"role": "user", "content": "Hi"}]
    by_user, by_talk = rollout(0.1, unit="user"), rollout(0.1)
    talk = conversation_of("c", "w", messages)
    assert unit_of(by_user, "c", "w", {"messages": messages, "user": "ann"}) == "user:c:ann"
    assert unit_of(by_user, "c", "w", {"messages": messages, "metadata": {"user_id": "bob"}}) == "user:c:bob"
    assert unit_of(by_user, "c", "w", {"messages": messages}) == talk
    assert unit_of(by_talk, "c", "w", {"messages": messages, "user": "ann"}) == talk
    for odd in ({}, {"messages": None}, {"messages": ["x"]}, {"messages": [], "metadata": 3, "user": True}):
        assert unit_of(by_user, "c", "w", odd)


# ── report ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_copy_is_answered_failed_or_dropped():
    config = rollout(0.0)
    logs = [record(i) for i in range(10)]
    logs += [copy(i) for i in range(4)] + [copy(4, "fees")]
    logs += [copy(5, error="timeout"), copy(6, error="http_500"), copy(7, error=QUEUE_FULL), copy(8, error=SHUTDOWN)]
    logs += [copy(99), record(1, rollout="other")]
    random.Random(0).shuffle(logs)
    found = report(config, iter(logs))
    arm = found.arm("arm0")
    assert (arm.copies, arm.answered, arm.pairs, arm.unpaired) == (10, 6, 7, 1)
    assert arm.drops == {QUEUE_FULL: 1, SHUTDOWN: 1} and arm.failures == {"timeout": 1, "http_500": 1}
    assert arm.copies == arm.answered + sum(arm.drops.values()) + sum(arm.failures.values())
    exact = arm.agreement[FUNCTION_NAME_AND_ARGS]
    assert (exact.sequence.n, exact.sequence.estimate) == (7, pytest.approx(4 / 7))
    assert arm.agreement[FUNCTION_NAME].sequence.estimate == pytest.approx(5 / 7)
    assert EXACT_TEXT not in arm.agreement
    assert (arm.error_rate.n, arm.error_rate.estimate) == (8, 0.25)
    assert (found.exchanges, found.teacher_requests, found.teacher_errors) == (10, 10, {})
    assert found.sample_ratio_p_value is None
    assert report(config, reversed(logs)) == found


def test_pairs_need_a_teachers_answer():
    logs = [record(0), copy(0), record(1, error="http_500"), copy(1), copy(2, error=QUEUE_FULL), record(2)]
    assert [p.shadow.exchange_id for p in pairs_of(logs)["arm0"]] == ["e0"]


def test_malformed_arguments_of_a_shadow_are_wrong_and_kept():
    call = {"function": {"name": "route", "arguments": '{"queue": '}}
    shadow = copy(0, response={"choices": [{"message": {"tool_calls": [call]}}]})
    (pair,) = pairs_of([record(0), shadow])["arm0"]
    assert (pair.agreement(FUNCTION_NAME), pair.agreement(FUNCTION_NAME_AND_ARGS)) == (1.0, 0.0)


def test_text_is_compared_only_where_the_request_has_no_tools():
    logs = [record(0, None, "Yes, it does."), copy(0, None, text="Yes, it does.")]  # tools, and an abstention
    logs += [record(1, None, "No.", tools=False), copy(1, None, text=" no. ", tools=False)]
    logs += [record(2, None, "No.", tools=False), copy(2, None, text="Yes.", tools=False)]
    arm = report(rollout(0.0), logs).arm("arm0")
    assert arm.agreement[EXACT_TEXT].sequence.estimate == 0.5
    assert arm.agreement[FUNCTION_NAME_AND_ARGS].sequence.n == 1
    assert (arm.pairs, arm.unscored) == (3, 2)


def test_latency_and_tokens_are_of_the_same_exchanges():
    logs = []
    for i in range(100):
        logs.append(record(i, latency_s=1.0 + i / 100, usage={"completion_tokens": 10}))
        logs.append(copy(i, latency_s=0.1, usage={"completion_tokens": 20}) if i < 50 else copy(i, error="timeout"))
    arm = report(rollout(0.0), logs).arm("arm0")
    assert arm.latency.n == 50 and arm.latency.teacher_p50_s == pytest.approx(1.245)
    assert arm.latency.teacher_p95_s == pytest.approx(1.4655) and arm.latency.arm_p95_s == pytest.approx(0.1)
    assert (arm.tokens.n, arm.tokens.teacher, arm.tokens.arm) == (50, 10, 20)
    assert report(rollout(0.0), logs[:1]).arm("arm0").latency is None


def ab_logs(config: Rollout, requests: int, misassigned: float = 0.0, failing: float = 0.0) -> list[Record]:
    logs, chance = [], random.Random(0)
    for i in range(requests):
        fields = {"request": {"user": f"u{i // 3}"}}
        probe = record(i, **fields)
        arm = assign(config, unit_of(config, probe.client_id, probe.workload_id, probe.request))
        if arm == "teacher" or chance.random() < misassigned:
            logs.append(probe)
            continue
        failed = chance.random() < failing
        logs.append(record(i, served_by=arm, arm=arm, error="timeout" if failed else None, **fields))
        if failed:
            logs.append(probe)  # the teacher stood in
    return logs


def test_an_ab_counts_requests_failures_and_units():
    config = rollout(0.3, unit="user")
    found = report(config, ab_logs(config, 3000, failing=0.1))
    arm = found.arm("arm0")
    assert found.exchanges == 3000 == found.teacher_requests + arm.live_requests
    assert sum(found.units.values()) == 1000
    assert 0.05 < arm.live_failures["timeout"] / arm.live_requests < 0.15
    assert arm.error_rate.n == arm.live_requests
    assert found.sample_ratio_p_value > 0.01
    assert arm.pairs == 0 and arm.agreement == {}


def test_a_broken_split_shows_in_the_sample_ratio():
    config = rollout(0.3, unit="user")
    assert report(config, ab_logs(config, 3000, misassigned=0.5)).sample_ratio_p_value < 0.001


# ── decisions ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def judged(
    agreeing: int, disagreeing: int = 0, failing: int = 0, gates: Gates | None = None, dropped: int = 0
) -> Decision:
    """What is decided after so many copies, shuffled."""
    fates = ["cards"] * agreeing + ["fees"] * disagreeing + [None] * failing + [QUEUE_FULL] * dropped
    random.Random(1).shuffle(fates)
    logs = []
    for i, fate in enumerate(fates):
        logs.append(record(i))
        error = "timeout" if fate is None else fate if fate == QUEUE_FULL else None
        logs.append(copy(i, error=error) if error else copy(i, fate))
    config = rollout(0.0, gates=(gates or Gates()).model_dump())
    return decide(report(config, logs).arm("arm0"), config.gates)


def test_full_agreement_is_promoted_when_there_is_enough_of_it():
    early, late = judged(100), judged(600)
    assert early.action == "hold" and "not yet surely above 0.980" in early.reason
    assert late.action == "promote" and "over 600 pairs" in late.reason


def test_few_pairs_hold():
    gates = Gates(margin=0.5, min_pairs=80)
    assert judged(60, gates=gates).reason.endswith("80 pairs are needed")
    assert judged(80, gates=gates).action == "promote"


def test_clear_disagreement_is_rolled_back():
    assert judged(150, 100).action == "roll_back"
    assert judged(290, 10).action == "hold"


def test_failures_count_against_quality_and_dropped_copies_do_not():
    assert judged(600, failing=60).action == "roll_back"
    assert judged(600, dropped=600).action == "promote"


def test_the_error_rate_is_a_gate_of_its_own():
    lax = {"margin": 0.9, "min_pairs": 1}
    broken = judged(100, failing=60, gates=Gates(**lax))
    assert broken.action == "roll_back" and broken.reason.startswith("error rate 0.375")
    doubtful = judged(180, failing=14, gates=Gates(**lax))
    assert doubtful.action == "hold" and "but error rate 0.072" in doubtful.reason
    assert judged(180, failing=2, gates=Gates(**lax)).action == "promote"


def test_a_dead_arm_is_rolled_back_soon():
    assert judged(0, failing=20).action == "roll_back"


@pytest.mark.parametrize(
    ("logs", "reason"),
    [
        ([], "give the arm a `shadow` share"),
        ([record(0), copy(0, error=CLIENT_CLOSED)], "none of the 1 copies reached"),
        ([record(0, None, "Hi", tools=False), copy(0, None, text="Hi", tools=False)], "none of the 1 pairs"),
    ],
)
def test_nothing_to_go_by_holds_and_says_why(logs, reason):
    config = rollout(0.0)
    found = decide(report(config, logs).arm("arm0"), config.gates)
    assert found.action == "hold" and reason in found.reason


def test_a_text_workload_is_judged_by_exact_text():
    config = rollout(0.0, gates={"metric": EXACT_TEXT})
    logs = [f(i, None, text="Yes", tools=False) for i in range(600) for f in (record, copy)]
    assert decide(report(config, logs).arm("arm0"), config.gates).action == "promote"


# ── looking while traffic goes on ─────────────────────────────────────────────────────────────────────────────────────


def test_what_may_still_go_on_or_arrive_is_not_counted_yet():
    """A conversation counts when it has been silent, and when the slowest copy of it would be in the logs."""
    config = rollout(0.0)
    patience = config.arm("arm0").patience_s + config.teacher.timeout_s
    assert config.arm("arm0").patience_s == 30 * (1 + 64 / 4)
    logs = [r for i in range(600) for r in (record(i), copy(i))]
    last = max(r.timestamp for r in logs)

    def seen(as_of: float | None):
        return report(config, logs, as_of).arm("arm0").agreement[FUNCTION_NAME_AND_ARGS].evidence

    assert seen(None).decision == "promote"
    # One request a second: the last 300 could still be answered when the slowest copy of them has arrived.
    assert (seen(last + patience).open_pairs, seen(last + patience).difference.n) == (300, 300)
    now = report(config, logs, last).arm("arm0")
    assert decide(now, config.gates).reason == "no conversation has ended yet: 600 pairs wait"
    early = report(config, logs, last + patience - 260).arm("arm0")
    assert decide(early, config.gates).reason.endswith("50 pairs are needed; 560 wait for their conversations to end")
    assert seen(last + patience + config.gates.idle_s).decision == "promote"
    # One look at the end needs no waiting.
    end = rollout(0.0, gates={"idle_s": None})
    assert report(end, logs, last).arm("arm0").agreement[FUNCTION_NAME_AND_ARGS].evidence.decision == "promote"


def test_users_who_open_with_the_same_words_are_told_apart():
    def asked(user: int | None) -> str:
        request = {"messages": [{"role": "user", "content": "Hi"}]} | ({"user": f"u{user}"} if user is not None else {})
        [pair] = pairs_of([record(0, request=request), copy(0, request=request)])["arm0"]
        return pair.conversation

    assert asked(1) == asked(1) != asked(2)
    assert asked(None) == asked(None) != asked(1)


def test_an_arm_that_breaks_after_its_promotion_is_rolled_back():
    config = rollout(0.0)
    good = [r for i in range(400) for r in (record(i), copy(i))]
    bad = [r for i in range(400, 900) for r in (record(i), copy(i, "fees"))]
    assert decide(report(config, good).arm("arm0"), config.gates).action == "promote"
    found = decide(report(config, good + bad).arm("arm0"), config.gates)
    assert found.action == "roll_back" and "it changed meanwhile" in found.reason


def test_an_outage_long_over_is_no_reason_to_roll_back():
    config = rollout(0.0, gates={"margin": 0.9, "min_pairs": 1})
    logs = [record(0)] + [record(i) for i in range(1, 2000)]
    logs += [copy(i, error="timeout") if i < 8 else copy(i) for i in range(2000)]
    arm = report(config, logs).arm("arm0")
    assert arm.error_rate.high >= arm.error_rate.low and arm.error_rate.estimate == pytest.approx(0.004)
    assert decide(arm, config.gates).action == "promote"


def test_traffic_that_should_not_be_shows_in_the_sample_ratio():
    everything = rollout(1.0, unit="user")
    assert report(everything, [record(i, request={"user": f"u{i}"}) for i in range(200)]).sample_ratio_p_value < 1e-9
    two = rollout(0.5, 0.0, unit="user")
    logs = ab_logs(two, 3000)
    assert report(two, logs).sample_ratio_p_value > 0.01
    logs += [record(i, served_by="arm1", arm="arm1", request={"user": f"v{i}"}) for i in range(3000, 3005)]
    assert report(two, logs).sample_ratio_p_value < 1e-9
