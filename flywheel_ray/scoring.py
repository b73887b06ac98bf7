"""A score says how good one completion is against the reference; None means unscored, with the reason, and never 0.

    score_tool_calls(reference=teacher_answer, predicted=student_answer)
    # (Score(metric="function_name_accuracy", value=1.0), Score(metric="function_name_and_args_accuracy", value=0.0))

Calls are a multiset, matched one to one whatever their order; two calls of one function do not collapse. Arguments are
compared as JSON: objects unordered, arrays ordered, 1 equals 1.0, "1" does not equal 1, true does not equal 1.
Malformed arguments are wrong, not missing. Abstention is an answer: no call where the reference has none is right.

The two names follow NVIDIA's NeMo Evaluator, so that figures can be read side by side; where ours differ on purpose
(duplicate calls, malformed arguments, abstention) the README says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from flywheel_ray.records import Completion, ToolCall
from flywheel_ray.values import Value, canonical_json

SCORER_VERSION = "1"
"""Part of every candidate's key: raise it whenever the same completion may get another score."""

FUNCTION_NAME = "function_name_accuracy"
FUNCTION_NAME_AND_ARGS = "function_name_and_args_accuracy"
TOOL_CALLING_CORRECTNESS = "tool_calling_correctness"
SIMILARITY = "similarity"

TOOL_METRICS = (FUNCTION_NAME_AND_ARGS, FUNCTION_NAME, TOOL_CALLING_CORRECTNESS)
TEXT_METRICS = (SIMILARITY,)


class Score(Value):
    """One metric of one completion in [0, 1], or None with the reason why there is no value."""

    metric: str
    value: float | None
    reason: str | None = None


def score_tool_calls(reference: Completion, predicted: Completion) -> tuple[Score, Score]:
    """`function_name_accuracy` and `function_name_and_args_accuracy` of one completion, each 0 or 1.

    Raises:
        ValueError: the reference itself has arguments that are not an object; such an example cannot be scored and
            must have been kept out of the dataset.
    """
    if any(isinstance(call.arguments, str) for call in reference.tool_calls):
        raise ValueError("the reference's tool-call arguments are not a JSON object")
    names = _names(reference.tool_calls) == _names(predicted.tool_calls)
    exact = names and _calls(reference.tool_calls) == _calls(predicted.tool_calls)
    return Score(metric=FUNCTION_NAME, value=float(names)), Score(metric=FUNCTION_NAME_AND_ARGS, value=float(exact))


def _names(calls: Iterable[ToolCall]) -> Counter[str]:
    return Counter(call.name for call in calls)


def _calls(calls: Iterable[ToolCall]) -> Counter[tuple[str, str]]:
    # Raw text gets a mark no canonical JSON starts with, so malformed arguments equal nothing in the reference.
    return Counter(
        (c.name, "!" + c.arguments if isinstance(c.arguments, str) else canonical_json(_canonical_numbers(c.arguments)))
        for c in calls
    )


def _canonical_numbers(value: Any) -> Any:
    """1.0 and 1 are the same JSON number; Python writes them differently."""
    if isinstance(value, float):
        if value.is_integer():
            return int(value)
        return value if value == value and abs(value) != float("inf") else repr(value)
    if isinstance(value, dict):
        return {k: _canonical_numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_canonical_numbers(v) for v in value]
    return value
