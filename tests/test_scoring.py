"""The tool-call scorer on the cases that decide a leaderboard."""

from __future__ import annotations

from typing import Any

import pytest

from flywheel_ray.records import Completion, ToolCall
from flywheel_ray.scoring import score_tool_calls


def answer(*calls: tuple[str, Any], text: str = "") -> Completion:
    return Completion(text=text, tool_calls=tuple(ToolCall(name=n, arguments=a) for n, a in calls))


def scores(reference: Completion, predicted: Completion) -> tuple[float | None, float | None]:
    name, args = score_tool_calls(reference, predicted)
    return name.value, args.value


@pytest.mark.parametrize(
    ("predicted", "expected"),
    [
        (answer(("f", {"a": 1, "b": [1, 2]})), (1, 1)),
        (answer(("f", {"b": [1, 2], "a": 1.0})), (1, 1)),  # objects are unordered, 1 is 1.0
        (answer(("f", {"a": "1", "b": [1, 2]})), (1, 0)),
        (answer(("f", {"a": True, "b": [1, 2]})), (1, 0)),  # true is not 1
        (answer(("f", {"a": 1, "b": [2, 1]})), (1, 0)),
        (answer(("f", {"a": 1})), (1, 0)),
        (answer(("f", {"a": 1, "b": [1, 2], "c": None})), (1, 0)),
        (answer(("f", '{"a": 1, "b": [1, 2]')), (1, 0)),  # malformed is wrong, not missing
        (answer(("g", {"a": 1, "b": [1, 2]})), (0, 0)),
        (answer(("f", {"a": 1, "b": [1, 2]}), ("f", {"a": 1, "b": [1, 2]})), (0, 0)),
        (answer(text="no"), (0, 0)),
    ],
)
def test_one_call(predicted: Completion, expected: tuple[float, float]) -> None:
    assert scores(answer(("f", {"a": 1, "b": [1, 2]})), predicted) == expected


def test_parallel_calls_are_a_multiset() -> None:
    reference = answer(("f", {"a": 1}), ("f", {"a": 2}), ("g", {}))
    assert scores(reference, answer(("g", {}), ("f", {"a": 2}), ("f", {"a": 1}))) == (1, 1)
    assert scores(reference, answer(("g", {}), ("f", {"a": 2}), ("f", {"a": 2}))) == (1, 0)


def test_abstention_is_scored_both_ways() -> None:
    assert scores(answer(text="Hello!"), answer(text="Hi.")) == (1, 1)
    assert scores(answer(text="Hello!"), answer(("f", {}))) == (0, 0)
    assert scores(answer(("f", {})), answer(text="Hello!")) == (0, 0)


def test_a_reference_that_cannot_be_scored_is_refused() -> None:
    with pytest.raises(ValueError, match="reference"):
        score_tool_calls(answer(("f", "{")), answer(("f", {})))


def test_not_a_number_equals_nothing_sensible() -> None:
    assert scores(answer(("f", {"a": 1})), answer(("f", {"a": float("nan")}))) == (1, 0)
