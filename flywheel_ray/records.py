"""A record is one logged exchange: who asked what (an OpenAI chat request), who answered, and what the answer was.

    outcome = parse_line('{"client_id": "acme", "workload_id": "support", "timestamp": 1755000074, '
                         '"request": {"messages": […], "tools": […]}, "response": {"choices": […]}}')
    if isinstance(outcome, Rejected): print(outcome.reason)       # "response.choices is missing or empty"
    else: outcome.completion.tool_calls[0].arguments              # {"queue": "card_arrival"}

Every record says who answered (`served_by`); logs that do not say come from the teacher, the only one there was.
Tool-call arguments arrive as JSON strings (the API) or objects (some loggers) and become objects here. Malformed ones
are a fault of the log where the teacher answered (rejected), and a measurement where an arm did (kept as text).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from flywheel_ray.values import Value, canonical_json, content_hash

TEACHER = "teacher"
"""`served_by` of a completion by the model in production."""

MAX_DEPTH = 100
"""How deep a logged object may nest; deeper ones would exhaust the stack of whoever writes them out again."""


class ToolCall(Value):
    """One function call of a completion. `arguments` is an object, or the raw text where that is not a JSON object."""

    name: str
    arguments: dict[str, Any] | str


class Completion(Value):
    """What a model answered: text, tool calls, or both; latency in seconds, tokens as counted by the server.

    Absent is not zero: a figure nobody measured is None.
    """

    text: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: str | None = None
    latency_s: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None

    def message(self) -> dict[str, Any]:
        """The completion as an OpenAI assistant message (arguments as JSON strings)."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text or None}
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": f"call_{i}",
                    "type": "function",
                    "function": {
                        "name": call.name,
                        "arguments": call.arguments
                        if isinstance(call.arguments, str)
                        else json.dumps(call.arguments, ensure_ascii=False),
                    },
                }
                for i, call in enumerate(self.tool_calls)
            ]
        elif message["content"] is None:
            message["content"] = ""
        return message


class Record(Value):
    """One logged exchange. `request` and `response` are kept as logged; the rest is what the flywheel reads.

    `id` is a hash of the whole exchange, so the same line twice is one record. A live exchange of a rollout also has
    `exchange_id` (shared by the primary answer and its shadow copies), `rollout`, `arm` and, when the arm gave no good
    answer, `error` ("timeout", "queue_full", "http_500", …) with an empty response.
    """

    id: str
    client_id: str
    workload_id: str
    timestamp: float
    """Seconds since the epoch, UTC."""
    served_by: str = TEACHER
    request: dict[str, Any]
    response: dict[str, Any]
    completion: Completion
    exchange_id: str | None = None
    rollout: str | None = None
    arm: str | None = None
    shadow: bool = False
    error: str | None = None

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The request's chat messages."""
        return self.request["messages"]

    @property
    def tools(self) -> list[dict[str, Any]]:
        """The request's tools in the `{"type": "function", "function": …}` form; empty where it has none."""
        return self.request.get("tools") or []


class Rejected(Value):
    """A logged line that is not a record, and why, naming the field: "what is wrong" or "what is wrong: details"."""

    reason: str

    @property
    def kind(self) -> str:
        """The reason without positions and details, for counting: "request.messages[] is not an object with a role"."""
        return re.sub(r"\[\d+\]", "[]", self.reason.partition(": ")[0])


def parse_line(line: str | bytes) -> Record | Rejected:
    """Read one JSON line of a log file. Never raises: anything unreadable is `Rejected` with its reason."""
    try:
        data = _loads(line)
    except (ValueError, RecursionError) as error:
        return Rejected(reason=f"not JSON: {error}")
    return from_hit(data)


def from_hit(data: Any) -> Record | Rejected:
    """Read one logged object (a JSONL line or an Elasticsearch `_source`). Never raises.

    Fields: client_id, workload_id, timestamp (epoch seconds or ISO 8601), request, response as required;
    served_by, exchange_id, rollout, arm, shadow, error, latency_s as optional; others are ignored. Tool arguments that
    are no JSON object reject a line of the teacher's (no `arm`, `served_by` teacher); any other keeps them as text.
    """
    try:
        return _read(data)
    except _FAULTS as fault:
        return _rejected(fault)


def to_hit(record: Record) -> dict[str, Any]:
    """The logged object of a record: what `from_hit` reads back to an equal record."""
    hit: dict[str, Any] = {
        "timestamp": record.timestamp,
        "client_id": record.client_id,
        "workload_id": record.workload_id,
        "served_by": record.served_by,
        "request": record.request,
        "response": record.response,
    }
    for field in ("exchange_id", "rollout", "arm", "error"):
        if getattr(record, field) is not None:
            hit[field] = getattr(record, field)
    if record.shadow:
        hit["shadow"] = True
    if record.completion.latency_s is not None:
        hit["latency_s"] = record.completion.latency_s
    return hit


def read_completion(response: Mapping[str, Any], latency_s: float | None = None) -> Completion | Rejected:
    """Read an OpenAI ChatCompletion object (first choice) into a Completion. Never raises.

    Tool arguments that are no JSON object are kept as text: they are part of what the model answered.
    """
    try:
        if not isinstance(response, Mapping):
            raise _Bad(f"response is {_kind(response)}, not an object")
        return _completion(response, latency_s, strict=False)
    except _FAULTS as fault:
        return _rejected(fault)


def content_text(content: Any) -> str:
    """Text of a message's content: a string, null, or a list of parts of which the text ones are joined."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = (part.get("text") if isinstance(part, dict) else part for part in content)
        return "".join(text for text in texts if isinstance(text, str))
    return str(content)


def readable(value: Any) -> Any:
    """A JSON value with lone surrogates (half an emoji, cut by a logger) replaced by U+FFFD.

    They are legal in JSON, but UTF-8 and tokenizers have no place for them.
    """
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if _LONE.search(value) else value
    if isinstance(value, list | tuple):
        return [readable(item) for item in value]
    if isinstance(value, dict):
        return {readable(key): readable(item) for key, item in value.items()}
    return value


def to_json_line(data: Any) -> bytes:
    """One line of a JSONL file, with its line end, in UTF-8. Lone surrogates stay `\\uXXXX` escapes.

    Keys keep their order: prompts are made of tools and arguments as they were logged. Raises ValueError for NaN.
    """
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def conversation_of(client_id: str, workload_id: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """Name the conversation a request belongs to: a hash of its first user message within the workload.

    Later turns and the later steps of an agent loop repeat that message, and so do duplicates, so all of them get one
    name; the system prompt is left out because some applications put a clock in it. Case and white space do not count.
    """
    first = next((content_text(m.get("content")) for m in messages if m.get("role") == "user"), "")
    if not first.strip():
        first = content_text(messages[0].get("content")) if messages else ""
    return content_hash([client_id, workload_id, " ".join(first.split()).casefold()])


class _Bad(Exception):
    pass


_FAULTS = (_Bad, ValueError, TypeError, AttributeError, RecursionError, OverflowError)
_LONE = re.compile("[\ud800-\udfff]")


def _rejected(fault: Exception) -> Rejected:
    if isinstance(fault, _Bad):
        return Rejected(reason=str(fault))
    if isinstance(fault, ValidationError):
        first = fault.errors()[0]
        return Rejected(reason=f"unreadable: {'.'.join(map(str, first['loc']))}: {first['msg']}")
    return Rejected(reason=f"unreadable: {type(fault).__name__}: {fault}".splitlines()[0])


def _loads(text: str | bytes) -> Any:
    """`json.loads`, without the NaN and infinities that Python adds to JSON."""
    return json.loads(text, parse_constant=_no_constant, parse_float=_finite)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:40]} is out of range")
    return value


def _deep(value: Any, levels: int = MAX_DEPTH) -> bool:
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        return False
    return levels == 0 or any(_deep(item, levels - 1) for item in value if isinstance(item, dict | list))


def _field(data: Mapping[str, Any], name: str, kind: type | tuple[type, ...], where: str = "") -> Any:
    path = f"{where}{name}"
    if name not in data or data[name] is None:
        raise _Bad(f"{path} is missing")
    if not isinstance(data[name], kind) or (kind is not bool and isinstance(data[name], bool)):
        raise _Bad(f"{path} is {_kind(data[name])}, not {_names(kind)}")
    return data[name]


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _names(kind: type | tuple[type, ...]) -> str:
    names = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number", bool: "a boolean"}
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join(dict.fromkeys(names[k] for k in kinds))


def _timestamp(value: Any) -> float:
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            raise _Bad(f"timestamp is neither epoch seconds nor ISO 8601: {value[:40]!r}") from None
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    # Years 1 … 9999; false for NaN, and for whole numbers too large for a float.
    if not -62135596800 <= value <= 253402300799:
        raise _Bad(f"timestamp is not a time in epoch seconds (milliseconds?): {str(value)[:40]}")
    return float(value)


def _read(data: Any) -> Record:
    if not isinstance(data, dict):
        raise _Bad(f"the line is {_kind(data)}, not an object")
    if _deep(data):
        raise _Bad(f"the line nests deeper than {MAX_DEPTH} levels")
    client_id = _field(data, "client_id", str)
    workload_id = _field(data, "workload_id", str)
    if not client_id or not workload_id:
        raise _Bad("client_id or workload_id is empty")
    timestamp = _timestamp(_field(data, "timestamp", (int, float, str)))
    request = _field(data, "request", dict)
    messages = _field(request, "messages", list, "request.")
    if not messages:
        raise _Bad("request.messages is empty")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _Bad(f"request.messages[{i}] is not an object with a role")
        content = message.get("content")
        if content is not None and not isinstance(content, str | list):
            raise _Bad(f"request.messages[{i}].content is {_kind(content)}, not a string or a list")
    tools = request.get("tools")
    if tools is not None:
        if not isinstance(tools, list):
            raise _Bad(f"request.tools is {_kind(tools)}, not a list")
        for i, tool in enumerate(tools):
            function = tool.get("function") if isinstance(tool, dict) else None
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise _Bad(f"request.tools[{i}] is not a function with a name")
    response = _field(data, "response", dict)
    latency_s = data.get("latency_s")
    if latency_s is not None:
        latency_s = float(_field(data, "latency_s", (int, float)))
        if not 0 <= latency_s < math.inf:
            raise _Bad(f"latency_s is not a length of time: {latency_s}")
    shadow = data.get("shadow")
    if shadow is not None and not isinstance(shadow, bool):
        raise _Bad(f"shadow is {_kind(shadow)}, not a boolean")
    names: dict[str, str | None] = {}
    for field in ("served_by", "exchange_id", "rollout", "arm", "error"):
        value = data.get(field)
        if value is not None and not isinstance(value, str):
            raise _Bad(f"{field} is {_kind(value)}, not a string")
        names[field] = value or None
    served_by = names.pop("served_by") or TEACHER
    error = readable(names.pop("error"))
    for field, value in {"client_id": client_id, "workload_id": workload_id, "served_by": served_by, **names}.items():
        if value and _LONE.search(value):
            raise _Bad(f"{field} is not Unicode text: {value[:40]!r}")
    if error:
        completion = Completion(latency_s=latency_s)
    else:
        strict = served_by == TEACHER and names["arm"] is None
        completion = _completion(response, latency_s, strict)
    return Record(
        id=content_hash([client_id, workload_id, timestamp, served_by, request, response, names, error], 32),
        client_id=client_id,
        workload_id=workload_id,
        timestamp=timestamp,
        served_by=served_by,
        request=request,
        response=response,
        completion=completion,
        shadow=bool(shadow),
        error=error,
        **names,
    )


def _completion(response: Mapping[str, Any], latency_s: float | None, strict: bool) -> Completion:
    choices = response.get("choices")
    if not isinstance(choices, list) or not choices:
        raise _Bad("response.choices is missing or empty")
    choice = choices[0]
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        raise _Bad("response.choices[0].message is missing")
    if message.get("function_call"):
        raise _Bad("response.choices[0].message.function_call is the API before tools; log tool_calls instead")
    content = message.get("content")
    if content is not None and not isinstance(content, str | list):
        raise _Bad(f"response.choices[0].message.content is {_kind(content)}, not a string or a list")
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise _Bad(f"response.choices[0].message.tool_calls is {_kind(calls)}, not a list")
    usage = response.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    return Completion(
        text=readable(content_text(content)),
        tool_calls=tuple(_call(call, i, strict) for i, call in enumerate(calls)),
        finish_reason=choice.get("finish_reason") if isinstance(choice.get("finish_reason"), str) else None,
        latency_s=latency_s,
        prompt_tokens=_count(usage.get("prompt_tokens")),
        completion_tokens=_count(usage.get("completion_tokens")),
    )


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _call(call: Any, index: int, strict: bool) -> ToolCall:
    where = f"response.choices[0].message.tool_calls[{index}]"
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _Bad(f"{where} has no function name")
    arguments = read_arguments(function.get("arguments"))
    if strict and isinstance(arguments, str):
        raise _Bad(f"{where}.function.arguments is not a JSON object: {arguments[:80]!r}")
    return ToolCall(name=readable(function["name"]), arguments=arguments)


def read_arguments(arguments: Any) -> dict[str, Any] | str:
    """Tool-call arguments as an object, from an object or its JSON text; null and "" mean no arguments.

    What is no JSON object comes back as text, so that the caller can tell malformed from missing.
    """
    if arguments is None or arguments == "":
        return {}
    try:
        value = _loads(arguments) if isinstance(arguments, str) else arguments
        if isinstance(value, dict) and not _deep(value):
            canonical_json(value)  # raises for what only Python takes for JSON
            return readable(value)
    except (ValueError, TypeError, RecursionError):
        pass
    return readable(arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False, default=str))
