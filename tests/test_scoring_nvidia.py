"""Our tool-call scores beside NVIDIA's, case by case: the table of edge cases in the benchmarks' README, executable.

The function `nvidia` states NVIDIA's rules as they were seen when its open evaluator was run (the `tool-calling`
metric of NeMo Platform 0.6.0 and Helix 0.8.1); it is no copy of NVIDIA's code. Calls become a dict from name to
arguments; names are compared as sets; the reference's arguments must be an object and the prediction's a JSON string,
which is parsed; a prediction that cannot be parsed is NaN and leaves the mean; values are compared by Python's `==`
(so "true for 1" is inferred). Row files are read through Arrow, which pads keys that other rows have with null. Where
the table says that we differ, we do so on purpose, and it says why.
"""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

import pyarrow
import pytest

from flywheel_ray.records import Completion, ToolCall, read_arguments
from flywheel_ray.scoring import score_tool_calls

Calls = list[tuple[str, Any]]
"""(name, arguments), as a message has them: an object in the reference, JSON text in the prediction."""


def nvidia(reference: Calls, predicted: Calls) -> tuple[float, float]:
    """`function_name_accuracy` and `function_name_and_args_accuracy` of one row by NVIDIA's rules; NaN is left out."""
    if not predicted:
        return 0.0, 0.0
    wanted, called = dict(reference), dict(predicted)  # of two calls of one function the last stays
    if wanted.keys() != called.keys():
        return 0.0, 0.0
    if not all(isinstance(arguments, dict) for arguments in wanted.values()):
        return 1.0, 0.0
    try:
        parsed = {name: {} if text is None else json.loads(text) for name, text in called.items()}
    except (TypeError, ValueError):
        return 1.0, math.nan
    return 1.0, float(parsed == wanted)


def ours(reference: Calls, predicted: Calls) -> tuple[float | None, float | None]:
    """As our records are read: arguments as text or object on either side."""
    sides = [
        Completion(tool_calls=tuple(ToolCall(name=n, arguments=read_arguments(a)) for n, a in calls))
        for calls in (reference, predicted)
    ]
    name, args = score_tool_calls(*sides)
    return name.value, args.value


class Row(NamedTuple):
    """One row of the table. `why` is empty where both say the same."""

    case: str
    reference: Calls
    predicted: Calls
    theirs: tuple[float, float]
    ours: tuple[float, float]
    why: str = ""


NAN = math.nan
TABLE = [
    Row("the same call", [("f", {"a": 1})], [("f", '{"a": 1}')], (1, 1), (1, 1)),
    Row("other order of calls", [("f", {}), ("g", {})], [("g", "{}"), ("f", "{}")], (1, 1), (1, 1)),
    Row("1 for 1.0", [("f", {"a": 1})], [("f", '{"a": 1.0}')], (1, 1), (1, 1)),
    Row('"1" for 1', [("f", {"a": 1})], [("f", '{"a": "1"}')], (1, 0), (1, 0)),
    Row("other case", [("f", {"a": "Paris"})], [("f", '{"a": "paris"}')], (1, 0), (1, 0)),
    Row("an extra argument", [("f", {"a": 1})], [("f", '{"a": 1, "b": 2}')], (1, 0), (1, 0)),
    Row("a missing argument", [("f", {"a": 1, "b": 2})], [("f", '{"a": 1}')], (1, 0), (1, 0)),
    Row("another function", [("f", {})], [("g", "{}")], (0, 0), (0, 0)),
    Row("a call too many", [("f", {})], [("f", "{}"), ("g", "{}")], (0, 0), (0, 0)),
    Row("no call where one is wanted", [("f", {})], [], (0, 0), (0, 0)),
    Row("null for no arguments", [("f", {})], [("f", None)], (1, 1), (1, 1)),
    Row(
        "malformed arguments", [("f", {"a": 1})], [("f", '{"a": 1')], (1, NAN), (1, 0),
        "a row that leaves the mean makes broken output score better than wrong output",
    ),
    Row(
        "predicted arguments as an object", [("f", {"a": 1})], [("f", {"a": 1})], (1, NAN), (1, 1),
        "some servers and loggers send objects; the form of the message says nothing about the answer",
    ),
    Row(
        "reference arguments as a string", [("f", '{"a": 1}')], [("f", '{"a": 1}')], (1, 0), (1, 1),
        "that is the form in which OpenAI's API logs them",
    ),
    Row(
        "one of two calls of a function", [("f", {"a": 1}), ("f", {"a": 2})], [("f", '{"a": 2}')], (1, 1), (0, 0),
        "half of the work is not done",
    ),
    Row(
        "the same call twice for once", [("f", {"a": 1})], [("f", '{"a": 1}')] * 2, (1, 1), (0, 0),
        "it would be carried out twice",
    ),
    Row(
        "two calls of a function, first wrong", [("f", {"a": 1}), ("f", {"a": 2})],
        [("f", '{"a": 9}'), ("f", '{"a": 2}')], (1, 1), (1, 0),
        "every call counts, not only the last",
    ),
    Row(
        "two calls of a function, in other order", [("f", {"a": 1}), ("f", {"a": 2})],
        [("f", '{"a": 2}'), ("f", '{"a": 1}')], (1, 0), (1, 1),
        "parallel calls have no order",
    ),
    Row(
        "no call wanted, none made", [], [], (0, 0), (1, 1),
        "to abstain is an answer, and here the right one; NVIDIA's blueprint forces `tool_choice` to required",
    ),
    Row("no call wanted, one made", [], [("f", "{}")], (0, 0), (0, 0)),
    Row(
        "true for 1", [("f", {"a": 1})], [("f", '{"a": true}')], (1, 1), (1, 0),
        "in JSON a boolean is no number; Python's == does not tell them apart",
    ),
]  # fmt: skip


@pytest.mark.parametrize("row", TABLE, ids=[row.case for row in TABLE])
def test_where_we_differ_it_is_on_purpose(row: Row) -> None:
    assert nvidia(row.reference, row.predicted) == pytest.approx(row.theirs, nan_ok=True)
    assert ours(row.reference, row.predicted) == row.ours
    assert bool(row.why) is (row.theirs != row.ours)


def test_broken_output_raises_their_mean_and_lowers_ours() -> None:
    right = ([("f", {"a": 1})], [("f", '{"a": 1}')])
    wrong = ([("f", {"a": 1})], [("f", '{"a": 2}')])
    broken = ([("f", {"a": 1})], [("f", '{"a": ')])
    theirs = [nvidia(*row)[1] for row in (right, wrong, broken)]
    counted = [value for value in theirs if not math.isnan(value)]
    assert sum(counted) / len(counted) == 0.5
    assert sum(ours(*row)[1] or 0 for row in (right, wrong, broken)) / 3 == pytest.approx(1 / 3)


def test_arrow_pads_other_tools_arguments_and_we_read_no_rows_through_it() -> None:
    """Two rows with two tools: through Arrow each reference gets the other's arguments as null, and matches nothing."""
    rows: list[dict[str, Any]] = [{"name": "f", "arguments": {"city": "Bonn"}}, {"name": "g", "arguments": {"id": 7}}]
    padded = pyarrow.Table.from_pylist(rows).to_pylist()
    assert padded[0]["arguments"] == {"city": "Bonn", "id": None}
    answers = [json.dumps(row["arguments"]) for row in rows]
    through_arrow = [
        nvidia([(p["name"], p["arguments"])], [(p["name"], a)])[1] for p, a in zip(padded, answers, strict=True)
    ]
    as_logged = [ours([(r["name"], r["arguments"])], [(r["name"], a)])[1] for r, a in zip(rows, answers, strict=True)]
    assert through_arrow == [0, 0] and as_logged == [1, 1]
