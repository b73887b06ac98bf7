"""A record is one logged exchange: who asked what (an OpenAI chat request), who answered, and what the answer was.

    outcome = parse_line('{"client_id": "acme", "workload_id": "support", "timestamp": 1755000074, '
                         '"request": {"messages": […], "tools": […]}, "response": {"choices": […]}}')
    if isinstance(outcome, Rejected): print(outcome.reason)       # "response.choices is missing or empty"
    else: outcome.completion.tool_calls[0].arguments              # {"queue": "card_arrival"}

Every record says who answered (`served_by`); logs that do not say come from the teacher, the only one there was.
Tool-call arguments arrive as JSON strings (the API) or objects (some loggers) and become objects here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from flywheel_ray.values import Value, content_hash

TEACHER = "teacher"
"""`served_by` of a completion by the model in production."""


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
    """A logged line that is not a record, and why, naming the field."""

    reason: str


def parse_line(line: str | bytes) -> Record | Rejected:
    """Read one JSON line of a log file. Never raises: anything unreadable is `Rejected` with its reason."""
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Rejected(reason=f"not JSON: {error}")
    return from_hit(data)


def from_hit(data: Any) -> Record | Rejected:
    """Read one logged object (a JSONL line or an Elasticsearch `_source`). Never raises.

    Fields: client_id, workload_id, timestamp (epoch seconds or ISO 8601), request, response as required;
    served_by, exchange_id, rollout, arm, shadow, error, latency_s as optional.
    """
    try:
        return _read(data)
    except _Bad as bad:
        return Rejected(reason=str(bad))
    except (ValueError, TypeError, RecursionError, OverflowError) as error:
        return Rejected(reason=f"unreadable: {type(error).__name__}: {error}".splitlines()[0])


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
    """Read an OpenAI ChatCompletion object (first choice) into a Completion. Never raises."""
    try:
        return _completion(response, latency_s)
    except _Bad as bad:
        return Rejected(reason=str(bad))
    except (ValueError, TypeError, RecursionError) as error:
        return Rejected(reason=f"unreadable: {type(error).__name__}: {error}".splitlines()[0])


def content_text(content: Any) -> str:
    """Text of a message's content: a string, null, or a list of parts of which the text ones are joined."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    return str(content)


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
            raise _Bad(f"timestamp {value[:40]!r} is neither epoch seconds nor ISO 8601") from None
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    seconds = float(value)
    if not -62135596800 <= seconds <= 253402300799:  # years 1 … 9999; also false for NaN
        raise _Bad(f"timestamp {value!r} is not a time in epoch seconds")
    return seconds


def _read(data: Any) -> Record | Rejected:
    if not isinstance(data, dict):
        raise _Bad(f"the line is {_kind(data)}, not an object")
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
    tools = request.get("tools")
    if tools is not None:
        if not isinstance(tools, list):
            raise _Bad(f"request.tools is {_kind(tools)}, not a list")
        for i, tool in enumerate(tools):
            function = tool.get("function") if isinstance(tool, dict) else None
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise _Bad(f"request.tools[{i}] is not a function with a name")
    response = _field(data, "response", dict)
    error = data.get("error")
    latency_s = data.get("latency_s")
    if latency_s is not None:
        latency_s = float(_field(data, "latency_s", (int, float)))
    served_by = data.get("served_by") or TEACHER
    optional = {name: data.get(name) for name in ("exchange_id", "rollout", "arm")}
    for name, value in {**optional, "served_by": served_by, "error": error}.items():
        if value is not None and not isinstance(value, str):
            raise _Bad(f"{name} is {_kind(value)}, not a string")
    if error:
        completion = Completion(latency_s=latency_s)
    else:
        completion = _completion(response, latency_s)
    return Record(
        id=content_hash([client_id, workload_id, timestamp, served_by, request, response, optional, error], 32),
        client_id=client_id,
        workload_id=workload_id,
        timestamp=timestamp,
        served_by=served_by,
        request=request,
        response=response,
        completion=completion,
        shadow=bool(data.get("shadow", False)),
        error=error or None,
        **optional,
    )


def _completion(response: Mapping[str, Any], latency_s: float | None) -> Completion:
    choices = response.get("choices")
    if not isinstance(choices, list) or not choices:
        raise _Bad("response.choices is missing or empty")
    choice = choices[0]
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        raise _Bad("response.choices[0].message is missing")
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise _Bad(f"response.choices[0].message.tool_calls is {_kind(calls)}, not a list")
    usage = response.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    return Completion(
        text=content_text(message.get("content")),
        tool_calls=tuple(_call(call, i) for i, call in enumerate(calls)),
        finish_reason=choice.get("finish_reason") if isinstance(choice.get("finish_reason"), str) else None,
        latency_s=latency_s,
        prompt_tokens=_count(usage.get("prompt_tokens")),
        completion_tokens=_count(usage.get("completion_tokens")),
    )


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _call(call: Any, index: int) -> ToolCall:
    where = f"response.choices[0].message.tool_calls[{index}]"
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _Bad(f"{where} has no function name")
    return ToolCall(name=function["name"], arguments=read_arguments(function.get("arguments")))


def read_arguments(arguments: Any) -> dict[str, Any] | str:
    """Tool-call arguments as an object, from an object or its JSON text; null and "" mean no arguments.

    What is no JSON object comes back as text, so that the caller can tell malformed from missing.
    """
    if arguments is None or arguments == "":
        return {}
    if isinstance(arguments, dict):
        return arguments
    if isinstance(arguments, str):
        try:
            value = json.loads(arguments)
        except (ValueError, RecursionError):
            return arguments
        return value if isinstance(value, dict) else arguments
    return json.dumps(arguments, ensure_ascii=False)
