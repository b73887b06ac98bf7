"""Records: what is read, what is rejected and why, and that nothing a log contains can crash the reader."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flywheel_ray.records import (
    MAX_DEPTH,
    TEACHER,
    Completion,
    Record,
    Rejected,
    ToolCall,
    content_text,
    conversation_of,
    from_hit,
    parse_line,
    read_arguments,
    read_completion,
    readable,
    to_hit,
    to_json_line,
)


def answer(
    content: Any = None, arguments: Any = '{"queue": "card_arrival", "n": [1, 2]}', **extra: Any
) -> dict[str, Any]:
    """A ChatCompletion with one call of `route`, or with text only where there is content."""
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if content is None:
        message["tool_calls"] = [
            {"id": "call_1", "type": "function", "function": {"name": "route", "arguments": arguments}}
        ]
    return {
        "choices": [{"message": message, "finish_reason": "stop", **extra}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 4},
    }


def hit(**fields: Any) -> dict[str, Any]:
    """A whole logged object; keyword arguments replace its fields."""
    return {
        "client_id": "acme",
        "workload_id": "support",
        "timestamp": 1755000074,
        "request": {
            "messages": [{"role": "system", "content": "Route."}, {"role": "user", "content": "Where is my card?"}],
            "tools": [{"type": "function", "function": {"name": "route", "parameters": {"type": "object"}}}],
        },
        "response": answer(),
        **fields,
    }


def read(**fields: Any) -> Record:
    outcome = from_hit(hit(**fields))
    assert isinstance(outcome, Record), outcome
    return outcome


def reason(**fields: Any) -> str:
    outcome = from_hit(hit(**fields))
    assert isinstance(outcome, Rejected)
    return outcome.reason


def test_a_plain_log_line_is_the_teachers() -> None:
    record = read()
    assert record.served_by == TEACHER and not record.shadow and record.arm is None
    assert record.timestamp == 1755000074.0
    assert record.completion == Completion(
        tool_calls=(ToolCall(name="route", arguments={"queue": "card_arrival", "n": [1, 2]}),),
        finish_reason="stop",
        prompt_tokens=9,
        completion_tokens=4,
    )
    assert [t["function"]["name"] for t in record.tools] == ["route"]


def test_object_and_text_arguments_are_equal() -> None:
    assert read(response=answer(arguments={"n": [1, 2], "queue": "card_arrival"})).completion == read().completion


@pytest.mark.parametrize("arguments", [None, "", "{}", {}])
def test_no_arguments_are_an_empty_object(arguments: Any) -> None:
    assert read(response=answer(arguments=arguments)).completion.tool_calls[0].arguments == {}


MALFORMED = [
    '{"queue": ',
    "card_arrival",
    "[1]",
    "null",
    '"x"',
    [1],
    7,
    '{"n": NaN}',
    '{"n": 1e999}',
    '{"a":' * 200 + "1" + "}" * 200,
]


@pytest.mark.parametrize("arguments", MALFORMED)
def test_malformed_arguments_reject_a_teachers_line(arguments: Any) -> None:
    where = "response.choices[0].message.tool_calls[0].function.arguments is not a JSON object: "
    assert reason(response=answer(arguments=arguments)).startswith(where)
    assert Rejected(reason=reason(response=answer(arguments=arguments))).kind == (
        "response.choices[].message.tool_calls[].function.arguments is not a JSON object"
    )


@pytest.mark.parametrize("arguments", MALFORMED)
@pytest.mark.parametrize(
    "who", [{"served_by": "student", "arm": "student"}, {"arm": "teacher"}, {"served_by": "student"}]
)
def test_malformed_arguments_of_an_arm_are_kept_as_text(arguments: Any, who: dict[str, str]) -> None:
    record = read(response=answer(arguments=arguments), **who)
    kept = record.completion.tool_calls[0].arguments
    assert isinstance(kept, str)
    if isinstance(arguments, str):
        assert kept == arguments
    assert from_hit(json.loads(to_json_line(to_hit(record)))) == record
    assert read_completion(record.response) == record.completion


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"client_id": None}, "client_id is missing"),
        ({"client_id": 7}, "client_id is a number, not a string"),
        ({"workload_id": ""}, "client_id or workload_id is empty"),
        ({"client_id": "a\ud800"}, r"client_id is not Unicode text: 'a\ud800'"),
        ({"timestamp": None}, "timestamp is missing"),
        ({"timestamp": True}, "timestamp is a boolean, not a number or a string"),
        ({"timestamp": "yesterday"}, "timestamp is neither epoch seconds nor ISO 8601: 'yesterday'"),
        ({"timestamp": 1755000074000}, "timestamp is not a time in epoch seconds (milliseconds?): 1755000074000"),
        ({"timestamp": float("nan")}, "timestamp is not a time in epoch seconds (milliseconds?): nan"),
        ({"timestamp": 10**400}, f"timestamp is not a time in epoch seconds (milliseconds?): 1{'0' * 39}"),
        ({"request": []}, "request is a list, not an object"),
        ({"request": {}}, "request.messages is missing"),
        ({"request": {"messages": []}}, "request.messages is empty"),
        ({"request": {"messages": ["hi"]}}, "request.messages[0] is not an object with a role"),
        (
            {"request": {"messages": [{"role": "user", "content": 5}]}},
            "request.messages[0].content is a number, not a string or a list",
        ),
        ({"request": {"messages": [{"role": "user"}], "tools": {}}}, "request.tools is an object, not a list"),
        (
            {"request": {"messages": [{"role": "user"}], "tools": [{}]}},
            "request.tools[0] is not a function with a name",
        ),
        ({"response": None}, "response is missing"),
        ({"response": {}}, "response.choices is missing or empty"),
        ({"response": {"choices": []}}, "response.choices is missing or empty"),
        ({"response": {"choices": [{}]}}, "response.choices[0].message is missing"),
        (
            {"response": {"choices": [{"message": {"tool_calls": {}, "content": 3}}]}},
            "response.choices[0].message.content is a number, not a string or a list",
        ),
        (
            {"response": {"choices": [{"message": {"tool_calls": "x"}}]}},
            "response.choices[0].message.tool_calls is a string, not a list",
        ),
        (
            {"response": {"choices": [{"message": {"tool_calls": [{}]}}]}},
            "response.choices[0].message.tool_calls[0] has no function name",
        ),
        (
            {"response": {"choices": [{"message": {"function_call": {"arguments": "{}"}}}]}},
            "response.choices[0].message.function_call has no function name",
        ),
        (
            {"response": {"choices": [{"message": {"function_call": {"name": "f", "arguments": "{"}}}]}},
            "response.choices[0].message.function_call.arguments is not a JSON object: '{'",
        ),
        ({"response": [1]}, "response[0] is a number, not a chunk of a stream"),
        ({"response": []}, "response.choices is missing or empty"),
        (
            {"request": {"messages": [{"role": "user", "content": [7]}]}},
            "request.messages[0].content[0] is a number, not a string or an object",
        ),
        (
            {"request": {"messages": [{"role": "assistant", "tool_calls": {}}]}},
            "request.messages[0].tool_calls is an object, not a list",
        ),
        (
            {"request": {"messages": [{"role": "user", "content": ""}], "functions": [{}]}},
            "request.functions[0] is not a function with a name",
        ),
        ({"latency_s": -1}, "latency_s is not a length of time: -1.0"),
        ({"latency_s": "fast"}, "latency_s is a string, not a number"),
        ({"shadow": "false"}, "shadow is a string, not a boolean"),
        ({"served_by": 3}, "served_by is a number, not a string"),
        ({"error": {"code": 1}}, "error is an object, not a string"),
    ],
)
def test_reasons_name_the_field(fields: dict[str, Any], expected: str) -> None:
    assert reason(**fields) == expected


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "[]",
        "null",
        "7",
        '"text"',
        b"\xff\xfe\x00",
        b"\x80abc",
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"a": NaN}',
        "9" * 5000,
    ],
)
def test_lines_that_are_no_object_are_rejected(line: str | bytes) -> None:
    outcome = parse_line(line)
    assert isinstance(outcome, Rejected) and outcome.reason and outcome.kind


def test_depth_is_limited_before_the_stack_is() -> None:
    deep: Any = 1
    for _ in range(MAX_DEPTH + 1):
        deep = [deep]
    assert (
        reason(request={"messages": [{"role": "user"}], "extra": deep})
        == f"the line nests deeper than {MAX_DEPTH} levels"
    )


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2025-08-12T12:01:14Z", 1755000074),
        ("2025-08-12T14:01:14+02:00", 1755000074),
        ("2025-08-12T12:01:14.5", 1755000074.5),
    ],
)
def test_iso_timestamps_are_utc_where_they_do_not_say(text: str, seconds: float) -> None:
    assert read(timestamp=text).timestamp == seconds


def test_lone_surrogates_stay_in_the_log_and_leave_what_is_read() -> None:
    record = read(
        response=answer(content="ok \ud83d"), request={"messages": [{"role": "user", "content": "hi \ude00"}]}
    )
    assert record.request["messages"][0]["content"] == "hi \ude00"
    assert record.completion.text == "ok \ufffd"
    assert from_hit(json.loads(to_json_line(to_hit(record)))) == record
    assert readable({"k\ud800": ["\ud83d\ude00", 1, None]}) == {"k\ufffd": ["😀", 1, None]}


def test_a_failed_exchange_has_no_completion() -> None:
    record = read(
        response={},
        error="timeout",
        served_by="student",
        arm="student",
        rollout="r",
        exchange_id="x",
        shadow=True,
        latency_s=2,
    )
    assert record.error == "timeout" and record.completion == Completion(latency_s=2.0)
    assert from_hit(to_hit(record)) == record


def test_empty_tags_are_absent_ones() -> None:
    assert read(error="", arm="", rollout="", served_by="") == read()


def test_the_id_covers_the_exchange() -> None:
    assert read().id == read().id
    others = [read(timestamp=2), read(client_id="b"), read(arm="a"), read(exchange_id="e"), read(response=answer("hi"))]
    assert len({r.id for r in [read(), *others]}) == 6


def test_content_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, "b", {"type": "image_url", "image_url": {}}, {"text": 5}, None]
    assert content_text(parts) == "ab"
    assert content_text(None) == ""


def test_conversation_is_the_first_user_message() -> None:
    first = [{"role": "system", "content": "It is 9:00"}, {"role": "user", "content": "Where  is my\nCARD?"}]
    later = [
        {"role": "system", "content": "It is 9:05"},
        {"role": "user", "content": [{"type": "text", "text": "where is my card?"}]},
        {"role": "assistant", "content": "On its way."},
    ]
    assert conversation_of("a", "w", first) == conversation_of("a", "w", later) != conversation_of("b", "w", first)
    assert conversation_of("a", "w", [{"role": "system", "content": "x"}]) != conversation_of(
        "a", "w", [{"role": "system", "content": "y"}]
    )


def test_message_is_what_read_completion_reads() -> None:
    for completion in (
        Completion(text="hi"),
        Completion(tool_calls=(ToolCall(name="f", arguments={"a": "é"}), ToolCall(name="g", arguments='{"broken'))),
        Completion(text="", tool_calls=()),
    ):
        assert read_completion({"choices": [{"message": completion.message()}]}) == completion


@pytest.mark.parametrize(
    "response", [None, [], "x", 7, {"choices": 3}, {"choices": [{"message": {"tool_calls": [3]}}]}]
)
def test_read_completion_never_raises(response: Any) -> None:
    assert isinstance(read_completion(response), Rejected)


def test_usage_that_is_no_count_is_absent() -> None:
    completion = read(response={**answer("hi"), "usage": {"prompt_tokens": -1, "completion_tokens": "7"}}).completion
    assert completion.prompt_tokens is None and completion.completion_tokens is None


# ── properties ──────────────────────────────────────────────────────────────

any_text = st.text(st.characters(exclude_categories=()), max_size=12)  # with lone surrogates
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3),
    max_leaves=8,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every path into a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] + [p for key, item in inside for p in places(item, (*path, key))]


PLACES = places(
    hit(served_by="student", arm="a", error=None, shadow=True, latency_s=1.5, rollout="r", exchange_id="e")
)[1:]


@settings(max_examples=1500, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(PLACES), any_json | st.just("DELETE")), min_size=1, max_size=3))
def test_a_mutated_hit_is_a_record_or_has_a_reason(mutations: list[tuple[tuple[Any, ...], Any]]) -> None:
    data = hit(served_by="student", arm="a", error=None, shadow=True, latency_s=1.5, rollout="r", exchange_id="e")
    for path, value in mutations:
        target: Any = data
        try:
            for key in path[:-1]:
                target = target[key]
            if value == "DELETE":
                del target[path[-1]]
            else:
                target[path[-1]] = copy.deepcopy(value)
        except (KeyError, IndexError, TypeError):
            continue
    for outcome in (from_hit(data), parse_line(json.dumps(data))):
        if isinstance(outcome, Rejected):
            assert outcome.reason and outcome.kind
            outcome.reason.encode("utf-8", "backslashreplace")
        else:
            assert from_hit(json.loads(to_json_line(to_hit(outcome)))) == outcome
            json.dumps(outcome.completion.message(), ensure_ascii=False).encode("utf-8")
            conversation_of(outcome.client_id, outcome.workload_id, outcome.messages)


LINE = json.dumps(hit()).encode()


@settings(max_examples=2000, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, len(LINE)), st.integers(0, 20), st.binary(max_size=6)), min_size=1, max_size=4)
)
def test_a_mutated_line_never_raises(cuts: list[tuple[int, int, bytes]]) -> None:
    line = LINE
    for at, length, new in cuts:
        line = line[:at] + new + line[at + length :]
    outcome = parse_line(line)
    assert isinstance(outcome, Record) or (outcome.reason and outcome.kind)


@settings(max_examples=300, deadline=None)
@given(any_json)
def test_arguments_are_an_object_or_text_that_can_be_written(arguments: Any) -> None:
    value = read_arguments(arguments)
    assert isinstance(value, dict | str)
    to_json_line(value).decode("utf-8")
