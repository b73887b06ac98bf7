"""The usual line of a log, read by type: what a dataset needs of it, in a fraction of the time that a `Record` takes.

    line = usual_line(b'{"client_id": "acme", …}')
    line.messages[-1].content, line.calls        # or line is None: anything else, to be read by `parse_line`

Usual is a whole exchange with the teacher in today's chat shape: text messages, tool calls with arguments in text.
Older shapes, media, streams, reasoning, other arms and faults give None, so that `records` alone says what is right and
what is wrong; `tests/test_lines.py` holds that both read the same. Only damage in fields that no dataset needs (such as
an `id` that is no UTF-8) goes unnoticed here; a store's lines have none, as they were records before.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import msgspec

from flywheel_ray.records import FIRST_S, LAST_S, TEACHER, TOOLS_CUT, cut_tools, may_be_deep, read_arguments


class Function(msgspec.Struct, forbid_unknown_fields=True):
    """What a message's call calls."""

    name: str
    arguments: str


class Call(msgspec.Struct, forbid_unknown_fields=True):
    """A tool call in a message."""

    id: str
    type: Literal["function"]
    function: Function


class Message(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """A message, encoded as what `records.normal_messages` makes of it is: the fields stand in that order."""

    role: str
    content: str | None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[Call] | None = None
    refusal: None = None


class Line(NamedTuple):
    """What a dataset needs of a line."""

    client_id: str
    workload_id: str
    timestamp: float
    messages: list[Message]
    """In their normal form."""
    tools: list[dict[str, Any]]
    """Shared with other lines: nobody may change them."""
    tool_choice: Any
    choices: int
    answer: dict[str, Any]
    """text, finish_reason, latency_s, prompt_tokens, completion_tokens."""
    calls: list[dict[str, Any]]
    """The answer's, each with name and arguments, an object."""


class _Called(msgspec.Struct):
    name: str
    arguments: str


class _AnswerCall(msgspec.Struct):
    function: _Called


class _Answer(msgspec.Struct):
    content: str | None = None
    tool_calls: list[_AnswerCall] | None = None
    function_call: None = None
    refusal: None = None
    reasoning: None = None
    reasoning_content: None = None


class _Choice(msgspec.Struct):
    message: _Answer
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Response(msgspec.Struct):
    choices: list[_Choice]
    usage: _Usage | None = None


class _Request(msgspec.Struct):
    messages: list[Message]
    tools: str | None = None
    tool_choice: Any = None
    functions: None = None
    function_call: None = None


class _Hit(msgspec.Struct):
    client_id: str
    workload_id: str
    timestamp: float
    request: _Request
    response: _Response
    latency_s: float | None = None
    served_by: str | None = None
    exchange_id: str | None = None
    rollout: str | None = None
    arm: None = None
    error: None = None
    shadow: bool | None = None


_decode = msgspec.json.Decoder(_Hit).decode
_INFINITE = float("inf")


def usual_line(text: bytes) -> Line | None:
    """Read a line, or leave it to `records.parse_line`. Never raises."""
    rest, tools = cut_tools(text)
    try:
        hit = _decode(rest)
    except (ValueError, RecursionError):
        return None
    request, response = hit.request, hit.response
    messages, choices, usage = request.messages, response.choices, response.usage
    latency_s = hit.latency_s
    if (
        not hit.client_id
        or not hit.workload_id
        or not FIRST_S <= hit.timestamp <= LAST_S
        or (hit.served_by or TEACHER) != TEACHER
        or hit.shadow
        or not messages
        or not choices
        or request.tools != (None if tools is None else TOOLS_CUT)
        or not (latency_s is None or 0 <= latency_s < _INFINITE)
        or (type(request.tool_choice) is dict and may_be_deep(rest))
    ):
        return None
    message = choices[0].message
    calls = []
    for call in message.tool_calls or ():
        arguments = read_arguments(call.function.arguments)
        if type(arguments) is str:
            return None
        calls.append({"name": call.function.name, "arguments": arguments})
    prompt_tokens = completion_tokens = None
    if usage is not None:
        prompt_tokens, completion_tokens = usage.prompt_tokens, usage.completion_tokens
        if (prompt_tokens or 0) < 0 or (completion_tokens or 0) < 0:
            return None
    if not _normalise(messages):
        return None
    answer = {
        "text": message.content or "",
        "finish_reason": choices[0].finish_reason,
        "latency_s": latency_s,
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
    }
    return Line(
        hit.client_id,
        hit.workload_id,
        hit.timestamp,
        messages,
        tools or [],
        request.tool_choice,
        len(choices),
        answer,
        calls,
    )


def _normalise(messages: list[Message]) -> bool:
    """As `records.normal_messages`, in place; False where that has more to do."""
    ids: dict[str, str] = {}
    for i, message in enumerate(messages):
        if message.role == "function":
            return False
        if message.tool_calls:
            for n, call in enumerate(message.tool_calls):
                ids[call.id] = call.id = f"call_{i}_{n}"
            message.content = message.content or None
        else:
            message.tool_calls = None
            if message.content is None:
                message.content = ""
        if message.tool_call_id is not None:
            message.tool_call_id = ids.get(message.tool_call_id, message.tool_call_id)
    return True
