"""The usual line and the record read the same: whatever is logged, a dataset gets the same keys, rows and counts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import fields
from itertools import islice
from typing import Any

import pytest

from experiments.sample_traffic import generate
from flywheel_ray.datasets import DatasetPolicy
from flywheel_ray.intake import BUCKETS, Intake, MemoryRows, Taken
from flywheel_ray.lines import usual_line
from flywheel_ray.records import Rejected, parse_line
from tests.test_fuzz import HARD, mutants, seeds
from tests.test_planted_defects import Corpus
from tests.values import TOOL, hit

IN_WHAT_IS_NOT_READ = ("not JSON", "the line nests deeper than 100 levels")


def same_either_way(lines: Iterable[bytes], client_id: str = "acme", workload_id: str = "router") -> Taken:
    """Take lines in by both ways, one after another, and compare what comes of each."""
    policy = DatasetPolicy(near_duplicates=None, invalid_calls="keep")
    rows = MemoryRows(), MemoryRows()
    one, other = (Intake(policy, client_id, workload_id, where) for where in rows)
    for line in lines:
        record = parse_line(line)
        if isinstance(record, Rejected) and usual_line(line) is not None:
            assert record.kind in IN_WHAT_IS_NOT_READ, (line, record)
            continue
        one.add_line(line)
        other.add(record)
        if told(one.taken) != told(other.taken):
            raise AssertionError(f"{line!r}: {differing(one.taken, other.taken)}")
    assert [rows[0].read(bucket) for bucket in range(BUCKETS)] == [rows[1].read(bucket) for bucket in range(BUCKETS)]
    assert one.taken == other.taken
    return one.taken


def told(taken: Taken) -> list[Any]:
    """All that a line may have changed."""
    return [len(taken.keys), taken.keys[-68:], len(taken.labels), taken.excluded, taken.several_choices]


def differing(one: Taken, other: Taken) -> list[tuple[Any, Any]]:
    return [
        (getattr(one, f.name), getattr(other, f.name))
        for f in fields(Taken)
        if getattr(one, f.name) != getattr(other, f.name) and f.name != "keys"
    ]


@pytest.mark.parametrize(("lines", "seed"), [(3000, 0), pytest.param(50_000, 2, marks=pytest.mark.slow)])
def test_of_damaged_lines(lines: int, seed: int) -> None:
    taken = same_either_way(islice(mutants(seeds(), seed), lines), "acme-support", "support.assistant")
    assert len(taken.keys) > lines and len(taken.excluded) > 10
    taken = same_either_way(islice(mutants(seeds(), seed), lines // 4))
    assert len(taken.keys) > lines


def test_of_lines_that_once_went_wrong() -> None:
    same_either_way(HARD.values())


def test_of_planted_defects() -> None:
    corpus = Corpus()
    same_either_way((line for line in corpus.lines if line.strip()), "acme-support", "support.assistant")


@pytest.mark.parametrize("workload", ["summaries", "support"])
def test_of_sample_traffic_which_is_usual(workload: str) -> None:
    lines = [json.dumps(one).encode() for one in generate(3000, seed=3, workload=workload)]  # type: ignore[arg-type]
    first = json.loads(lines[0])
    same_either_way(lines, first["client_id"], first["workload_id"])
    assert sum(usual_line(line) is None for line in lines) == 0


def usual(**changes: Any) -> dict[str, Any]:
    call = {"id": "call_x", "type": "function", "function": {"name": "route", "arguments": '{"queue": "cards"}'}}
    messages = [
        {"role": "user", "content": "Where is my card?"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "content": "on its way", "tool_call_id": "call_x"},
    ]
    answer = {"choices": [{"message": {"content": "On its way.", "tool_calls": [call]}, "finish_reason": "stop"}]}
    made: dict[str, Any] = {
        **hit(0),
        "request": {"messages": messages, "tools": [TOOL], "tool_choice": {"type": "function"}},
        "response": {**answer, "usage": {"prompt_tokens": 3, "completion_tokens": 1}},
        "latency_s": 1,
    }
    for path, value in changes.items():
        *parents, last = path.split("__")
        place: Any = made
        for key in parents:
            place = place[int(key) if key.isdigit() else key]
        place[last] = value
    return made


MESSAGE = "request__messages__1__"
ANSWER = "response__choices__0__message__"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {MESSAGE + "content": ""},
        {MESSAGE + "content": "", MESSAGE + "tool_calls": []},
        {MESSAGE + "tool_calls": None},
        {MESSAGE + "name": ""},
        {"request__messages__0__content": " \n"},
        {"request__messages__0__content": ""},
        {"request__messages__0__content": None},
        {"request__messages__0__role": "system"},
        {"request__messages__0__role": "function"},
        {"request__messages__2__tool_call_id": "nobody's"},
        {"request__messages__2__extra": {"b": [1, {"z": 1, "a": 2}], "a": 1}},
        {"request__functions": [{"name": "route"}]},
        {"request__function_call": "auto"},
        {"request__tool_choice": {"b": {"z": 1, "y": 2}, "a": None}},
        {"request__tool_choice": 12345678901234567890123},
        {"request__tools": []},
        {"request__tools": None},
        {"request__tools": "flywheel-ray: tools as in an earlier line"},
        {ANSWER + "content": None, ANSWER + "tool_calls": []},
        {ANSWER + "content": "  ", ANSWER + "tool_calls": None},
        {ANSWER + "refusal": "no", ANSWER + "tool_calls": None, ANSWER + "content": None},
        {ANSWER + "reasoning": "hm"},
        {ANSWER + "reasoning_content": ""},
        {ANSWER + "function_call": {"name": "route", "arguments": "{}"}},
        {ANSWER + "tool_calls": [{"function": {"name": "route", "arguments": {"queue": "cards"}}}]},
        {ANSWER + "tool_calls": [{"function": {"name": "route"}}]},
        {ANSWER + "tool_calls": [{"function": {"name": "route", "arguments": ""}}] * 2},
        {ANSWER + "tool_calls": [{"function": {"name": "route", "arguments": '{"a": NaN}'}}]},
        {ANSWER + "tool_calls": [{"function": {"name": "route", "arguments": '{"a": 1e999}'}}]},
        {"response__choices__0__finish_reason": "length"},
        {"response__choices__0__finish_reason": 3},
        {"response__usage": None},
        {"response__usage__prompt_tokens": -1},
        {"response__usage__prompt_tokens": True},
        {"response__usage__prompt_tokens": 1.5},
        {"latency_s": -1},
        {"latency_s": 0.1 + 0.2},
        {"latency_s": None},
        {"timestamp": 1755000000},
        {"timestamp": "2025-08-12T12:00:00Z"},
        {"timestamp": 1e300},
        {"timestamp": True},
        {"served_by": "teacher"},
        {"served_by": ""},
        {"served_by": "student"},
        {"served_by": 3},
        {"arm": ""},
        {"arm": "student"},
        {"shadow": False},
        {"shadow": True},
        {"shadow": "no"},
        {"error": ""},
        {"error": "timeout"},
        {"exchange_id": "e", "rollout": "r"},
        {"exchange_id": 1},
        {"client_id": ""},
        {"workload_id": "another"},
        {"more": json.loads("[" * 150 + "]" * 150)},
        {"request__model": json.loads("[" * 90 + "]" * 90)},
    ],
    ids=str,
)
def test_of_one_change(changes: dict[str, Any]) -> None:
    taken = same_either_way([json.dumps(usual(**changes)).encode()] * 2)
    assert taken.scanned == 2
    assert taken.keys or taken.excluded


def test_the_usual_line_is_usual() -> None:
    text = json.dumps(usual()).encode()
    parse_line(text)  # from here on its tools are known
    assert len(same_either_way([text]).keys) == 68
    line = usual_line(text)
    assert line is not None and line.calls == [{"name": "route", "arguments": {"queue": "cards"}}]
    assert [message.tool_call_id for message in line.messages] == [None, None, "call_1_0"]
