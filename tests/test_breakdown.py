"""Where tool calls went wrong, counted by tool, by argument, by confusion and by abstention."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flywheel_ray.breakdown import UNKNOWN_TOOL, Abstention, ArgumentAccuracy, Breakdown, breakdown
from flywheel_ray.datasets import NO_TOOL
from flywheel_ray.records import Completion
from flywheel_ray.scoring import score_tool_calls
from tests.test_scoring import ARGUMENTS, DEFAULTS, answer, tool

ROUTE, REFUND = tool({"queue": {"type": "string"}}, name="route"), tool({}, name="refund")
TOOLS = [ROUTE, REFUND]


def of(*pairs: tuple[Completion, Completion], tools: Any = TOOLS) -> Breakdown:
    return breakdown((wanted, tools, called) for wanted, called in pairs)


def faults(found: Breakdown) -> dict[str, tuple[int, int, int, int, int]]:
    return {a.path: (a.n, a.wrong, a.missing, a.extra, a.wrong_type) for a in found.arguments}


def test_tools_confusion_and_abstention() -> None:
    card, refund, nothing = answer(("route", {"queue": "card"})), answer(("refund", {})), answer(text="Hello")
    found = of(
        (card, card),
        (card, answer(("route", {"queue": "pin"}))),
        (card, refund),
        (card, nothing),
        (refund, answer(("escalate", {}))),
        (nothing, refund),
        (nothing, nothing),
    )
    assert found.n == 7
    assert [(t.tool, t.n, t.right_name, t.right_args) for t in found.tools] == [("route", 4, 2, 1), ("refund", 1, 0, 0)]
    assert {(c.wanted, c.called): c.n for c in found.confusion} == {
        ("route", "route"): 2,
        ("route", "refund"): 1,
        ("route", NO_TOOL): 1,
        ("refund", UNKNOWN_TOOL): 1,
        (NO_TOOL, "refund"): 1,
    }
    assert found.abstention == Abstention(
        wanted_called=4, wanted_not_called=1, not_wanted_called=1, not_wanted_not_called=1
    )
    assert found.arguments == (ArgumentAccuracy(tool="route", path="queue", n=2, wrong=1),)
    assert found.arguments[0].right == 1


def test_arguments_are_counted_where_they_differ() -> None:
    wanted = {"a": 1, "b": "x", "c": {"d": True, "e": [1, 2]}, "rows": [{"id": 1}, {"id": 2}]}
    called = {"a": "1", "c": {"d": 1, "e": [1]}, "rows": [{"id": 1}, {"id": 3}], "new": {"deep": 1}}
    assert faults(of((answer(("route", wanted)), answer(("route", called))))) == {
        "a": (1, 0, 0, 0, 1),
        "b": (1, 0, 1, 0, 0),
        "c": (1, 0, 0, 0, 0),
        "c.d": (1, 0, 0, 0, 1),
        "c.e": (1, 1, 0, 0, 0),
        "rows": (1, 0, 0, 0, 0),
        "rows[]": (2, 0, 0, 0, 0),
        "rows[].id": (2, 1, 0, 0, 0),
        "new": (1, 0, 0, 1, 0),
    }


def test_parallel_calls_are_matched_so_that_little_differs() -> None:
    wanted = answer(*(("route", {"queue": q, "n": n}) for q, n in (("a", 1), ("b", 2), ("c", 3))))
    called = answer(*(("route", {"queue": q, "n": n}) for q, n in (("c", 3), ("a", 9), ("b", 2))))
    found = of((wanted, called))
    assert (found.tools[0].right_name, found.tools[0].right_args) == (3, 2)
    assert faults(found) == {"n": (3, 1, 0, 0, 0), "queue": (3, 0, 0, 0, 0)}


def test_a_call_too_many_of_one_tool_is_a_call_for_nothing() -> None:
    card = ("route", {"queue": "card"})
    found = of((answer(card), answer(card, card)), (answer(card, card), answer(card)))
    assert {(c.wanted, c.called): c.n for c in found.confusion} == {
        ("route", "route"): 2,
        (NO_TOOL, "route"): 1,
        ("route", NO_TOOL): 1,
    }
    assert (found.tools[0].n, found.tools[0].right_args) == (3, 2)


def test_malformed_arguments_count_for_the_name_only() -> None:
    good, broken = ("route", {"queue": "card"}), ("route", '{"queue": ')
    found = of((answer(good), answer(broken)), (answer(good, good), answer(broken, good)))
    assert found.malformed == 2
    assert (found.tools[0].n, found.tools[0].right_name, found.tools[0].right_args) == (3, 3, 1)
    with pytest.raises(ValueError, match="reference"):
        of((answer(broken), answer(good)))


def test_what_the_policy_forgives_is_no_fault() -> None:
    pair = answer(("f", {"queue": "a"})), [DEFAULTS], answer(("f", {"queue": "a", "limit": 10, "note": None}))
    assert {a.path for a in breakdown([pair]).arguments if a.right < a.n} == {"limit", "note"}
    assert breakdown([pair], "schema").tools[0].right_args == 1


def test_a_schema_or_a_name_that_is_none_is_passed_over() -> None:
    broken = tool({"q": {"anyOf": [{"type": {}}]}})
    nameless = [{"function": {"name": ["f"]}}, {"function": {"name": {}}}, {"function": None}]
    pair = answer(("f", {"q": ["a"]})), [*nameless, broken], answer(("f", {"q": ["A"]}))
    assert [breakdown([pair], strictness).tools[0].right_args for strictness in ("schema", "case_insensitive")] == [
        0,
        1,
    ]


@pytest.mark.parametrize("bad", [float("nan"), 10**5000], ids=["nan", "long"])
def test_what_is_no_json_is_no_argument(bad: Any) -> None:
    """It is left out of the arguments, and the calls beside it are read by the schema still."""
    good, less = ("f", {"queue": "a"}), ("f", {"queue": "b", "limit": 10})
    found = breakdown(
        [(answer(good, ("f", {"queue": "b"})), [DEFAULTS], answer(("f", {"queue": bad}), less))], "schema"
    )
    assert (found.tools[0].right_name, found.tools[0].right_args) == (2, 1)


@settings(deadline=None, max_examples=60)
@given(st.lists(ARGUMENTS, max_size=3), st.lists(ARGUMENTS, max_size=3))
def test_the_counts_are_those_of_the_scorer(wanted: list[Any], called: list[Any]) -> None:
    reference, predicted = (answer(*(("f", a) for a in side)) for side in (wanted, called))
    found = breakdown([(reference, [DEFAULTS], predicted)])
    right = sum(t.right_args for t in found.tools)
    assert (right == len(wanted) == len(called)) is (score_tool_calls(reference, predicted, [DEFAULTS])[1].value == 1)
    assert all(a.right >= 0 for a in found.arguments)
    assert sum(c.n for c in found.confusion if c.wanted != NO_TOOL) == len(wanted)
    assert sum(c.n for c in found.confusion if c.called != NO_TOOL) == len(called)
