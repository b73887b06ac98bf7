"""Splits: a threshold on a hash, care for rare tools, wanted sizes and hold-outs, and that no record ever moves."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from flywheel_ray.splits import Conversations, Sides, Split, SplitPolicy
from flywheel_ray.splits import settle as settle_columns

PINNED = ["eval", "train", "train", "train", "train", "train", "train", "eval"]


class Conversation(NamedTuple):
    name: str
    first_seen: float
    rows: int
    tools: frozenset[str]


def settle(policy: SplitPolicy, conversations: list[Conversation], previous: Sides | None = None) -> Sides:
    listed = sorted(conversations)
    columns = Conversations(
        [c.name for c in listed],
        np.array([c.first_seen for c in listed], dtype=float),
        np.array([c.rows for c in listed], dtype=np.int64),
        lambda i: listed[i].tools,
        frozenset().union(*(c.tools for c in listed)),
    )
    return settle_columns(policy, columns, previous)


def sides(policy: SplitPolicy, conversations: list[Conversation], previous: Sides | None = None) -> dict[str, Split]:
    rule = settle(policy, conversations, previous)
    return {c.name: rule.of(c.name, c.first_seen) for c in conversations}


def plain(count: int, tools: str = "", start: int = 0) -> list[Conversation]:
    return [Conversation(f"{start + n:016x}", float(start + n), 1, frozenset(tools)) for n in range(count)]


def test_the_side_is_a_threshold_on_a_hash() -> None:
    policy = SplitPolicy(eval_fraction=0.2, validation_fraction=0.1, class_aware=False)
    dealt = Counter(sides(policy, plain(20_000)).values())
    assert abs(dealt["eval"] / 20_000 - 0.2) < 0.01 and abs(dealt["validation"] / 20_000 - 0.1) < 0.01
    wider = SplitPolicy(eval_fraction=0.3, validation_fraction=0.1, class_aware=False)
    before, after = sides(policy, plain(2_000)), sides(wider, plain(2_000))
    assert all(after[name] == "eval" for name, side in before.items() if side == "eval")
    assert before != sides(SplitPolicy(salt="other", class_aware=False), plain(2_000))
    # Pinned: another answer here would move records between the sides of every dataset that exists.
    names = [Conversation(n, 0, 1, frozenset()) for n in "abcdefgh"]
    assert list(sides(SplitPolicy(), names).values()) == PINNED
    for fraction, side in ((1, "eval"), (0, "train")):
        assert set(sides(SplitPolicy(eval_fraction=fraction, validation_fraction=0), plain(9, "x")).values()) == {side}
    with pytest.raises(ValidationError, match="more than 1"):
        SplitPolicy(eval_fraction=0.8, validation_fraction=0.3)


def test_every_tool_with_two_conversations_reaches_evaluation() -> None:
    policy = SplitPolicy(eval_fraction=0.05, validation_fraction=0)
    for count in range(40):
        common = plain(200, "c")
        rare = [Conversation(f"r{count}-{n}", 1000.0 + n, 1, frozenset({"rare", "c"})) for n in range(count)]
        dealt = sides(policy, common + rare)
        reached = [c for c in rare if dealt[c.name] == "eval"]
        assert bool(reached) or count < 2
        assert count < 3 or len(reached) < count
    # One conversation is enough for all the tools that it calls.
    several = [Conversation(f"s{n}", n, 1, frozenset("abcdefgh")) for n in range(6)]
    assert Counter(sides(SplitPolicy(eval_fraction=1e-9), several).values())["eval"] == 1
    assert "eval" not in sides(SplitPolicy(eval_fraction=1e-9, class_aware=False), several).values()


@pytest.mark.parametrize("wanted", [1, 7, 50, 333, 1_000, 5_000])
def test_a_wanted_number_of_rows_is_met_as_nearly_as_conversations_allow(wanted: int) -> None:
    conversations = [Conversation(f"{n:x}", n, 1 + n % 4, frozenset()) for n in range(1_000)]
    policy = SplitPolicy(eval_records=wanted)
    rule = settle(policy, conversations)
    rows = sum(c.rows for c in conversations if rule.of(c.name, c.first_seen) == "eval")
    assert abs(rows - min(wanted, 2_500)) <= 2
    grown = [*conversations, *[Conversation(f"new {n:x}", 2_000 + n, 1, frozenset()) for n in range(4_000)]]
    again = settle(policy, grown, rule)
    assert again.eval_fraction == rule.eval_fraction
    assert all(again.of(c.name, c.first_seen) == rule.of(c.name, c.first_seen) for c in conversations)


def test_what_begins_after_the_hold_out_is_for_evaluation() -> None:
    policy = SplitPolicy(eval_fraction=0, validation_fraction=0.2, holdout_since="1970-01-01T00:01:40Z")  # type: ignore[arg-type]
    assert policy.holdout_since == 100.0
    dealt = sides(policy, plain(200))
    assert {dealt[c.name] for c in plain(100)} == {"train", "validation"}
    assert {dealt[c.name] for c in plain(100, start=100)} == {"eval"}
    with pytest.raises(ValidationError, match="holdout_since"):
        SplitPolicy(holdout_since="soon")  # type: ignore[arg-type]
    both = SplitPolicy(eval_records=130, holdout_since=100)
    assert Counter(sides(both, plain(200)).values())["eval"] == 130


names = st.integers(0, 40).map(str)
conversations = st.dictionaries(
    names, st.tuples(st.integers(0, 20), st.integers(1, 3), st.frozensets(st.sampled_from("abcdef"), max_size=3))
).map(lambda found: [Conversation(name, float(at), rows, tools) for name, (at, rows, tools) in found.items()])
split_policies = st.sampled_from(
    [
        SplitPolicy(),
        SplitPolicy(eval_fraction=0.02),
        SplitPolicy(eval_records=5),
        SplitPolicy(eval_fraction=0.1, holdout_since=15),
    ]
)


@settings(max_examples=300, deadline=None)
@given(conversations, conversations, split_policies, st.randoms(use_true_random=False))
def test_nothing_moves_from_one_build_to_the_next(old, new, policy, random) -> None:  # type: ignore[no-untyped-def]
    rule = settle(policy, old)
    shuffled = list(old)
    random.shuffle(shuffled)
    assert settle(policy, shuffled) == rule
    # What was known goes on: more rows, more tools, never an earlier beginning. What is new may have any time.
    later = {c.name: c for c in new}
    goes_on = [
        c._replace(rows=c.rows + 1, tools=c.tools | later.pop(c.name).tools) if c.name in later else c for c in old
    ]
    again = settle(policy, goes_on + list(later.values()), rule)
    for c in old:
        assert again.of(c.name, c.first_seen) == rule.of(c.name, c.first_seen)
    for before, after in ((rule, again),):
        assert before.held_out.items() <= after.held_out.items()
        assert Sides.model_validate_json(after.model_dump_json()) == after


@settings(max_examples=300, deadline=None)
@given(conversations, conversations)
def test_conversations_that_begin_later_move_nothing(old, new) -> None:  # type: ignore[no-untyped-def]
    known = {c.name for c in old}
    later = [c._replace(first_seen=c.first_seen + 100) for c in new if c.name not in known]
    before, after = sides(SplitPolicy(), old), sides(SplitPolicy(), old + later)
    assert all(after[name] == side for name, side in before.items())
