"""Damaged log lines: whatever stands in one, it becomes a record or is rejected with a reason, and both readers agree.

for line in islice(mutants(seeds(), seed=0), 1000): assert isinstance(parse_line(line), Record | Rejected)

Most of the damage is done to JSON values (another program's idea of the schema), the rest to bytes (a cut disk, a wrong
encoding). A failure shows its line: keep it among `HARD`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from random import Random
from typing import Any, NamedTuple

import pytest

from experiments.sample_traffic import generate
from flywheel_ray.records import (
    Record,
    Rejected,
    _parse_slow,
    conversation_of,
    from_hit,
    normal_messages,
    parse_line,
    readable,
    to_hit,
    to_json_line,
)
from flywheel_ray.toolbox import Toolbox
from tests.values import TOOL, hit

CLOSE_LOOK = 5
"""Every how many lines the readers are compared and a record is written and read again."""


# ── seeds ───────────────────────────────────────────────────────────────────


def answered(message: dict[str, Any] | None, request: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """A logged exchange with a given answer, and given fields of the request or of the line besides."""
    line = hit(0, **fields)
    line["request"] = {**line["request"], **(request or {})}
    if message is not None:
        line["response"]["choices"][0]["message"] = message
    return line


def streamed(*deltas: dict[str, Any], **last: Any) -> list[dict[str, Any]]:
    chunks = [{"id": "c", "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    return [*chunks, {"id": "c", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], **last}]


def call(arguments: Any, name: str = "route", **fields: Any) -> dict[str, Any]:
    return {"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}, **fields}


def by_hand() -> Iterator[dict[str, Any]]:
    """One line for each thing that loggers are known to write."""
    ask = {"role": "user", "content": "Where is my card?"}
    function = {"name": "route", "arguments": '{"queue": "card_arrival"}'}
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    yield hit(0)
    yield answered({"role": "assistant", "content": "Hello, where?"}, {"tools": None, "temperature": 0.0})
    yield answered({"role": "assistant", "content": None, "function_call": function}, {"functions": [TOOL["function"]]})
    yield answered(None, {"tools": None, "functions": [TOOL["function"]], "function_call": {"name": "route"}})
    yield answered({"role": "assistant", "tool_calls": [call({"queue": "a"}), call("{}"), call(None), call("")]})
    yield answered({"role": "assistant", "tool_calls": [call('{"queue": ')]}, served_by="student", arm="student")
    yield answered({"role": "assistant", "content": [{"type": "text", "text": "a"}, "b", {"type": "refusal"}]})
    yield answered({"role": "assistant", "content": "4", "reasoning_content": "2 + 2 …", "reasoning": "none"})
    yield answered({"role": "assistant", "content": None, "refusal": "I cannot help with that."})
    yield answered(
        None, {"messages": [{"role": "user", "content": [{"type": "text", "text": "What?"}, image, "text"]}]}
    )
    step = {"role": "assistant", "content": None, "tool_calls": [call("{}"), call({"queue": "b"}, id="d")]}
    results = [{"role": "tool", "tool_call_id": "c", "content": "ok"}, {"role": "tool", "tool_call_id": "d"}]
    yield answered(None, {"messages": [{"role": "system", "content": "Be brief."}, ask, step, *results]})
    older = [{"role": "assistant", "function_call": function}, {"role": "function", "name": "route", "content": "ok"}]
    yield answered(None, {"messages": [ask, *older, {"role": "user", "content": None, "name": "Zoë"}]})
    parts = [{"index": 0, "id": "c", "function": {"name": "route"}}, {"index": 1, "function": {"name": "g"}}]
    arguments = [{"index": 0, "function": {"arguments": '{"queue":'}}, {"index": 0, "function": {"arguments": ' "a"}'}}]
    calls: list[dict[str, Any]] = [{"role": "assistant", "tool_calls": parts}]
    calls += [{"tool_calls": [part]} for part in arguments]
    yield answered(None, response=streamed(*calls, usage={"prompt_tokens": 1, "completion_tokens": 2}))
    yield answered(None, response=streamed({"role": "assistant", "content": ""}, {"content": "Hel"}, {"content": "lo"}))
    yield answered(None, response=streamed({"function_call": {"name": "f"}}, {"function_call": {"arguments": "{}"}}))
    choice = hit(1)["response"]["choices"][0]
    yield hit(1, response={"choices": [choice, {**choice, "index": 1}, {"index": 2, "message": {"content": "x"}}]})
    live: dict[str, Any] = {"exchange_id": "e", "rollout": "r", "arm": "a", "served_by": "student", "shadow": True}
    yield hit(2, **live)
    yield hit(3, **{**live, "response": {}, "error": "timeout"})
    yield hit(4, timestamp="2025-08-12T12:01:14Z", client_id="Zoë 😀", extra={"tools": [TOOL], "request": 0})
    yield answered(
        {"content": "日本語 \ud83d \u2028 \x00 \x7f é"}, {"tool_choice": {"type": "function"}, "seed": 10**30}
    )
    yield answered(None, {"messages": [ask], "n": -0.0, "stop": ["\n"], "metadata": {"tools": 0, "": None}})


class Seed(NamedTuple):
    line: bytes
    values: list[tuple[int, int]]
    """Where each JSON value begins and ends in the line."""
    fields: list[tuple[int, int]]
    """Where each `"key":value` begins and ends in the line."""


def seed_of(data: Any) -> Seed:
    """The line of a logged object, with the places of everything in it."""
    line = bytearray()
    seed = Seed(b"", [], [])

    def write(value: Any) -> None:
        begin = len(line)
        if isinstance(value, dict):
            line.extend(b"{")
            for i, (key, item) in enumerate(value.items()):
                line.extend(b"," if i else b"")
                at = len(line)
                line.extend(json.dumps(key).encode() + b":")
                write(item)
                seed.fields.append((at, len(line)))
            line.extend(b"}")
        elif isinstance(value, list):
            line.extend(b"[")
            for i, item in enumerate(value):
                line.extend(b"," if i else b"")
                write(item)
            line.extend(b"]")
        else:
            # Both ways to write characters, but a lone surrogate has only the one.
            plain = json.dumps(value, ensure_ascii=len(seed.values) % 2 == 0)
            line.extend(plain.encode("utf-8", "backslashreplace"))
        seed.values.append((begin, len(line)))

    write(data)
    return seed._replace(line=bytes(line))


def seeds() -> list[Seed]:
    sample = generate(200, seed=1)
    return [seed_of(data) for data in (*by_hand(), *(line for i, line in enumerate(sample) if i % 16 == 0))]


# ── damage ──────────────────────────────────────────────────────────────────

VALUES: list[bytes] = [
    *rb"""null true false 0 -0 0.0 -0.0 0e5 1 -1 1.0 1e5 1e-400 1e999 -1e999 NaN Infinity -Infinity 01 .5 1. 0x1 +1
    9007199254740993 18446744073709551615 18446744073709551616 -9223372036854775809 1.7976931348623159e308
    253402300800 1755000074000 -62135596801 "2025-08-12T12:01:14Z" "2025-08-12T25:00:00" "9999-12-31T23:59:59-23:59"
    "" "user" "teacher" "tools" "\"tools\":0" "\u0000" "\ud83d" "\ude00\ud83d" "\ud83d\ude00" "\x41" "a\" "1"
    [] {} [null] [{}] [[]] [""] {"":0} {"role":null} {"a":1,"a":2} {"tools":0} {"id":[],"name":{}}
    {"role":"user","content":"hi"} {"role":"function","name":[]} {"role":"tool","tool_call_id":{},"tool_calls":[{}]}
    "{\"queue\":\"a\"}" "{\"n\":1e999}" "{\"n\":NaN}" "{\"a\":\"\\ud83d\"}" "{\"a\":1,\"a\":{}}" "[1]" "{}x"
    """.split(),
    *(b"9" * 40, b"9" * 5000, b"1" + b"0" * 400 + b".5", b'"' + b"x" * 5000 + b'"', b'"a b\n"', b'" {} "'),
    *(b'"%b"' % raw for raw in (b"\x00", b"\x1f\x7f", b"\xff", b"\xed\xa0\x80", b"\xc0\x80", b"\xef\xbb\xbf")),
    '"日本語 \u2028 é 😀"'.encode(),
    # As deep as a record may be (100 levels with what is around the value), and as parsers can go.
    *(b"[" * levels + b"]" * levels for levels in (92, 95, 98, 1100)),
    *(b'{"a":' * levels + b"1" + b"}" * levels for levels in (96, 99)),
    *(b'"' + b'{\\"a\\":' * levels + b"1" + b"}" * levels + b'"' for levels in (99, 100, 101)),
]
"""What a JSON value is replaced by: legal ones, almost legal ones, and the limits of numbers, depth and characters."""

KEYS: list[bytes] = [
    *b"""tools request response messages role content function_call functions tool_calls arguments choices message delta
    index usage error arm served_by shadow latency_s timestamp client_id name id refusal reasoning_content reasoning
    finish_reason tool_choice image_url type url \\ud83d \xff""".split(),
    b"",
]
"""What a key is replaced by."""

BYTES: list[bytes] = [
    *rb"""" \ { } [ ] : , 0 - . e e5 .0 \u \ud83d \" null true NaN "tools" "tools":0 "tools":[ ,"tools":0 }} ]} /* //
    """.split(),
    *(b"\x00", b"\x1f", b"\x7f", b"\x80", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b"\xf0\x9f"),
    *(b" ", b"\t", b"\n", b"\r\n", b"\x0b", b"\xc2\xa0", "\u2028".encode(), "é".encode()),
]
"""What is inserted into a line anywhere."""


def mutants(seeds: Sequence[Seed], seed: int) -> Iterator[bytes]:
    """Damaged lines without end, the same for the same seed."""
    rng = Random(seed)
    while True:
        made = rng.choice(seeds)
        damaged = made.line if rng.random() < 0.2 else with_other_values(rng, made, seeds)
        if damaged is made.line or rng.random() < 0.1:
            for _ in range(rng.choice((1, 1, 1, 3))):
                damaged = with_other_bytes(rng, damaged, seeds)
        yield damaged


def with_other_values(rng: Random, made: Seed, seeds: Sequence[Seed]) -> bytes:
    """Replace, drop, rename or repeat one to three values or fields of a line."""
    line = made.line
    places = [rng.choice(rng.choice((made.values, made.fields))) for _ in range(rng.choice((1, 1, 2, 3)))]
    untouched = len(line)
    # From the back, so that the places before stay where they are; what holds a changed place is left as it is.
    for begin, stop in sorted(places, reverse=True):
        if stop > untouched:
            continue
        untouched = begin
        was = line[begin:stop]
        if (begin, stop) in made.fields:
            new = other_field(rng, was, seeds)
            if not new and line[begin - 1 : begin] == b",":
                begin -= 1
        else:
            new = other_value(rng, was, seeds)
        line = line[:begin] + new + line[stop:]
    return line


def other_value(rng: Random, was: bytes, seeds: Sequence[Seed]) -> bytes:
    kind = rng.random()
    if kind < 0.6:
        return rng.choice(VALUES)
    if kind < 0.8:
        other = rng.choice(seeds)
        begin, stop = rng.choice(other.values)
        return other.line[begin:stop]
    if kind < 0.9:
        return rng.choice((b"[%b]", b'{"a":%b}', b"[%b,null]", b" %b\t")) % was
    if kind < 0.95:
        return was + rng.choice(BYTES)
    return json.dumps(was.decode("utf-8", "replace")).encode()


def other_field(rng: Random, was: bytes, seeds: Sequence[Seed]) -> bytes:
    kind = rng.randrange(7)
    key, _, value = was.partition(b":")
    if kind <= 1:
        return b""
    if kind == 2:
        return b'"%b":%b' % (rng.choice(KEYS), value)
    if kind == 3:
        return b"%b,%b:%b" % (was, key, rng.choice(VALUES))
    if kind == 4:
        return b"%b:%b,%b" % (key, rng.choice(VALUES), was)
    if kind == 5:  # the same key in other letters
        return b'%b,"\\u00%02x%b:%b' % (was, key[1], key[2:], rng.choice(VALUES))
    other = rng.choice(seeds)
    begin, stop = rng.choice(other.fields)
    return b"%b,%b" % (was, other.line[begin:stop])


def with_other_bytes(rng: Random, line: bytes, seeds: Sequence[Seed]) -> bytes:
    """Flip, insert, delete, repeat or splice at a random place."""
    at = rng.randrange(len(line) + 1)
    to = min(len(line), at + rng.choice((1, 1, 2, 8, 64, 1 << 20)))
    kind = rng.randrange(7)
    if kind == 0:
        return line[:at] + bytes(byte ^ (1 << rng.randrange(8)) for byte in line[at : at + 1]) + line[at + 1 :]
    if kind == 1:
        return line[:at] + rng.choice(BYTES) + line[at:]
    if kind == 2:
        return line[:at] + rng.choice(BYTES) + line[to:]
    if kind == 3:
        return line[:at] + line[to:]
    if kind == 4:
        return line[:to] + line[at:]
    if kind == 5:
        return rng.choice(BYTES) + line if rng.random() < 0.5 else line + rng.choice(BYTES)
    other = rng.choice(seeds).line
    return line[:at] + other[rng.randrange(len(other)) :]


# ── what must hold ──────────────────────────────────────────────────────────


def exactly(outcome: Record | Rejected) -> str:
    """Everything a record holds, in its order and with its types (True is no 1), or why there is none."""
    return repr(outcome) if isinstance(outcome, Record) else outcome.kind


def look_closely(line: bytes, outcome: Record | Rejected) -> None:
    assert exactly(_parse_slow(line)) == exactly(outcome)
    try:
        text = line.decode()
    except UnicodeDecodeError:
        text = None
    if text is not None and not text.startswith("\ufeff"):
        assert exactly(parse_line(text)) == exactly(outcome)
    if isinstance(outcome, Rejected):
        outcome.reason.encode("utf-8", "backslashreplace")
        return
    again = from_hit(json.loads(to_json_line(to_hit(outcome))))
    assert again == outcome
    assert isinstance(again, Record) and again.id == outcome.id
    json.dumps(outcome.completion.message(), ensure_ascii=False).encode()
    messages, media = normal_messages(outcome.messages)
    assert len(messages) == len(outcome.messages) and media >= 0
    assert conversation_of(outcome.client_id, outcome.workload_id, messages)
    toolbox = Toolbox(readable(outcome.tools))
    for called in outcome.completion.tool_calls:
        fault = toolbox.fault(called.name, called.arguments)
        assert fault is None or fault.reason
        assert called.name in toolbox.names or fault


@pytest.mark.parametrize(("lines", "seed"), [(3000, 0), pytest.param(200_000, 1, marks=pytest.mark.slow)])
def test_a_damaged_line_is_a_record_or_has_a_reason(lines: int, seed: int) -> None:
    outcomes: Counter[str] = Counter()
    for i, line in enumerate(islice(mutants(seeds(), seed), lines)):
        try:
            outcome = parse_line(line)
            if isinstance(outcome, Rejected):
                assert outcome.reason and outcome.kind
            if i % CLOSE_LOOK == 0:
                look_closely(line, outcome)
        except Exception as error:
            raise AssertionError(f"line {i} of seed {seed}: {line!r}") from error
        outcomes["record" if isinstance(outcome, Record) else outcome.kind] += 1
    # The damage is neither so small that nothing breaks nor so large that nothing is left to look at.
    assert 0.2 * lines < outcomes["record"] < 0.7 * lines
    assert len(outcomes) > 20


LINE = json.dumps(hit(0)).encode()
TOOLS = b'"tools": ' + json.dumps([TOOL]).encode()
HARD = {
    "tools twice, in other letters": LINE.replace(TOOLS, TOOLS + rb', "\u0074ools": 0'),
    "tools twice, false": LINE.replace(TOOLS, TOOLS + rb', "\u0074ools": false'),
    "tools elsewhere": LINE.replace(TOOLS, rb'"\u0074ools": 0').replace(b"{", b"{" + TOOLS + b", ", 1),
    "tools with an exponent": LINE.replace(TOOLS, TOOLS + b"e5"),
    "tools with a fraction": LINE.replace(TOOLS, TOOLS + b".0"),
    "tools in a string": LINE.replace(b"Question 0", json.dumps(TOOLS.decode()).encode()[1:-1]),
    "before year 1": LINE.replace(b"1755000000", b'"0001-01-01T00:00:00+14:00"'),
    "after year 9999": LINE.replace(b"1755000000", b'"9999-12-31T23:59:59-23:59"'),
    "a result of no function": LINE.replace(b'"role": "user"', b'"role": "function", "name": []'),
}


@pytest.mark.parametrize("line", HARD.values(), ids=HARD)
def test_lines_that_once_went_wrong(line: bytes) -> None:
    assert line != LINE and isinstance(parse_line(LINE), Record)  # from here on its tools are known
    look_closely(line, parse_line(line))


def test_seeds_are_records() -> None:
    for seed in seeds():
        outcome = parse_line(seed.line)
        assert isinstance(outcome, Record), (outcome, seed.line)
        look_closely(seed.line, outcome)
        for begin, stop in seed.values:
            json.loads(seed.line[begin:stop])
        for begin, stop in seed.fields:
            json.loads(b"{%b}" % seed.line[begin:stop])
