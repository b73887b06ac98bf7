"""A record is one logged exchange: who asked what (an OpenAI chat request), who answered, and what the answer was.

    outcome = parse_line('{"client_id": "acme", "workload_id": "support", "timestamp": 1755000074, '
                         '"request": {"messages": […], "tools": […]}, "response": {"choices": […]}}')
    if isinstance(outcome, Rejected): print(outcome.reason)       # "response.choices is missing or empty"
    else: outcome.completion.tool_calls[0].arguments              # {"queue": "card_arrival"}

Every record says who answered (`served_by`); logs that do not say come from the teacher, the only one there was.
Tool-call arguments arrive as JSON strings (the API) or objects (some loggers) and become objects here. Malformed ones
are a fault of the log where the teacher answered (rejected), and a measurement where an arm did (kept as text).
A stream logged as its list of chunks is put together; `function_call` of the API before tools reads as a tool call.

Lines are read twice as fast as a JSON parser alone would: a workload's tools are most of a line and nearly always the
same text, so equal texts are parsed once and share one list, which nobody may change.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, NamedTuple

import msgspec
from pydantic import ValidationError

from flywheel_ray.values import Value, canonical_bytes, canonical_json, content_hash

TEACHER = "teacher"
"""`served_by` of a completion by the model in production."""

MAX_DEPTH = 100
"""How deep a logged object may nest; deeper ones would exhaust the stack of whoever writes them out again."""

INTERRUPTED = "interrupted"
"""`finish_reason` of an answer whose logged stream has no end."""


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
    reasoning: str | None = None
    """What a reasoning model thought aloud; not part of the answer."""
    refused: bool = False
    """The API's own refusal; its words are the text."""
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

    A live exchange of a rollout also has `exchange_id` (shared by the primary answer and its shadow copies), `rollout`,
    `arm` and, when the arm gave no good answer, `error` ("timeout", "queue_full", "http_500", …) and an empty response.
    """

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

    @cached_property
    def id(self) -> str:
        """A hash of the whole exchange, 32 hexadecimal digits: the same line twice is one record."""
        names = {"exchange_id": self.exchange_id, "rollout": self.rollout, "arm": self.arm}
        who = [self.client_id, self.workload_id, self.timestamp, self.served_by]
        return content_hash([*who, self.request, self.response, names, self.error], 32)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The request's chat messages as logged."""
        return self.request["messages"]

    @property
    def tools(self) -> list[dict[str, Any]]:
        """The request's tools in the `{"type": "function", "function": …}` form; empty where it has none."""
        return tools_of(self.request)

    @property
    def tool_choice(self) -> Any:
        """The request's `tool_choice`, or its `function_call` in today's form; None where neither is given."""
        return tool_choice_of(self.request)

    @property
    def choices(self) -> int:
        """How many choices the response has; the first is the answer."""
        choices = self.response.get("choices")
        return len(choices) if isinstance(choices, list) else 0


def tools_of(request: Mapping[str, Any]) -> list[dict[str, Any]]:
    """As `Record.tools`, of a request."""
    tools = request.get("tools")
    if not tools and (functions := request.get("functions")):
        return [{"type": "function", "function": function} for function in functions]
    return tools or []


def tool_choice_of(request: Mapping[str, Any]) -> Any:
    """As `Record.tool_choice`, of a request."""
    choice = request.get("tool_choice")
    if choice is None and (older := request.get("function_call")) is not None:
        return {"type": "function", "function": older} if isinstance(older, dict) else older
    return choice


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
        return _read(_hit_of(line), clean=True)
    except (*_FAULTS, KeyError):
        # What msgspec refuses may still be JSON (half an emoji), and whoever is at fault gets the better message.
        return _parse_slow(line)


def _parse_slow(line: str | bytes) -> Record | Rejected:
    try:
        data = _loads(line)
    except (ValueError, RecursionError) as error:
        return Rejected(reason=f"not JSON: {error}")
    return from_hit(data)


def from_hit(data: Any) -> Record | Rejected:
    """Read one logged object (a JSONL line or an Elasticsearch `_source`). Never raises.

    Fields: client_id, workload_id, timestamp (epoch seconds or ISO 8601), request, response (a ChatCompletion, or the
    list of chunks of a stream) as required; served_by, exchange_id, rollout, arm, shadow, error, latency_s as optional;
    others are ignored. Tool arguments that are no JSON object reject a line of the teacher's (no `arm`, `served_by`
    teacher); any other keeps them as text.
    """
    try:
        if not isinstance(data, dict):
            raise _Bad(f"the line is {_kind(data)}, not an object")
        if _deep(data):
            raise _Bad(_TOO_DEEP)
        record = _read(data, clean=False)
        _ = record.id  # raises for what only Python takes for JSON
        return record
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
        return _completion(response, latency_s, strict=False, clean=False)
    except _FAULTS as fault:
        return _rejected(fault)


def assemble_stream(chunks: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The ChatCompletion object that a stream of chunks amounts to.

    Texts and tool-call arguments are joined; usage comes from the chunk that has it, so it may be missing. A stream
    that broke off has `finish_reason` None; one without choices gives `"choices": []`, which is no completion. What is
    not of a chunk's form is passed over.
    """
    whole: dict[str, Any] = {"object": "chat.completion", "choices": []}
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for field in ("id", "created", "model", "system_fingerprint", "service_tier", "usage"):
            if chunk.get(field) is not None:
                whole[field] = chunk[field]
        parts = chunk.get("choices")
        for part in parts if isinstance(parts, list) else ():
            if isinstance(part, dict):
                _add(choices, part)
    for choice in choices.values():
        if "tool_calls" in choice["message"]:
            choice["message"]["tool_calls"] = [call for _, call in sorted(choice["message"]["tool_calls"].items())]
    whole["choices"] = [choices[index] for index in sorted(choices)]
    return whole


def _add(choices: dict[int, dict[str, Any]], part: Mapping[str, Any]) -> None:
    index = _index(part, 0)
    empty = {"index": index, "message": {"role": "assistant", "content": None}, "finish_reason": None}
    choice = choices.setdefault(index, empty)
    if part.get("finish_reason") is not None:
        choice["finish_reason"] = part["finish_reason"]
    delta = part.get("delta")
    message = choice["message"]
    for field, value in (delta if isinstance(delta, dict) else {}).items():
        if field == "tool_calls":
            for i, call in enumerate(value if isinstance(value, list) else ()):
                if isinstance(call, dict):
                    _add_call(message.setdefault("tool_calls", {}), i, call)
        elif field == "function_call":
            _add_texts(message.setdefault("function_call", {"name": "", "arguments": ""}), value)
        elif field == "role":
            message["role"] = value or message["role"]
        elif isinstance(value, str):
            known = message.get(field)
            message[field] = known + value if isinstance(known, str) else value
        elif value is not None:
            message[field] = value


def _add_call(calls: dict[int, dict[str, Any]], position: int, part: Mapping[str, Any]) -> None:
    empty = {"id": None, "type": "function", "function": {"name": "", "arguments": ""}}
    call = calls.setdefault(_index(part, position), empty)
    call["id"] = part.get("id") or call["id"]
    _add_texts(call["function"], part.get("function"))


def _add_texts(whole: dict[str, Any], part: Any) -> None:
    for field, value in (part if isinstance(part, dict) else {}).items():
        if isinstance(value, str):
            whole[field] = whole.get(field, "") + value


def _index(part: Mapping[str, Any], position: int) -> int:
    index = part.get("index")
    return index if isinstance(index, int) else position


def normal_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """Chat messages in one form, whatever a logger or an older API made of them, and how many media parts they had.

    Content becomes text: parts are joined, and an image, sound or file stands in it as `[image_url sha256:…]`, its
    content's hash. `function_call` and the role `function` become tool calls and `tool`. Ids of tool calls, which
    servers draw at random, become `call_<message>_<call>`, so that they neither tell equal requests apart nor fill a
    prompt with noise. Absent and null fields are the same, and fields stand in the usual order.
    """
    normal: list[dict[str, Any]] = []
    media = 0
    ids: dict[str, str] = {}
    for i, message in enumerate(messages):
        if len(message) == 2 and type(message.get("content")) is str:
            normal.append({"role": message["role"], "content": message["content"]})
            continue
        content = message.get("content")
        if isinstance(content, list):
            texts = [_part_text(part) for part in content]
            media += sum(is_media for _, is_media in texts)
            content = "".join(text for text, _ in texts)
        fields = {k: v for k, v in message.items() if v is not None and k not in ("function_call", "tool_calls")}
        calls = message.get("tool_calls") or []
        if not calls and isinstance(older := message.get("function_call"), dict):
            calls = [{"id": older.get("name"), "type": "function", "function": older}]
        fields["content"] = content or (None if calls else "")
        if calls:
            fields["tool_calls"] = [_normal_call(call, f"call_{i}_{n}", ids) for n, call in enumerate(calls)]
        if message["role"] == "function":
            fields["role"] = "tool"
            fields["tool_call_id"] = ids.get(str(message.get("name")), "")
        elif "tool_call_id" in fields:
            fields["tool_call_id"] = ids.get(str(fields["tool_call_id"]), fields["tool_call_id"])
        normal.append({**{key: fields[key] for key in _MESSAGE if key in fields}, **fields})
    return normal, media


def _normal_call(call: Mapping[str, Any], id: str, ids: dict[str, str]) -> dict[str, Any]:
    ids[str(call.get("id"))] = id
    function = call.get("function")
    if not isinstance(function, dict):
        return {**call, "id": id}
    arguments = function.get("arguments")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
    return {"id": id, "type": "function", "function": {"name": function.get("name"), "arguments": text}}


def _part_text(part: Any) -> tuple[str, bool]:
    """A content part's text, and whether it is media: then the text holds its hash."""
    if isinstance(part, str):
        return part, False
    kind = part.get("type")
    if isinstance(text := part.get("refusal" if kind == "refusal" else "text"), str):
        return text, False
    content = part.get(kind) if isinstance(kind, str) else None
    url = content.get("url") if isinstance(content, dict) else content
    data = url.rpartition(",")[2] if isinstance(url, str) and url.startswith("data:") else url
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else canonical_bytes(part)
    return f"[{kind if isinstance(kind, str) else 'part'} sha256:{hashlib.sha256(raw).hexdigest()[:32]}]", True


def content_text(content: Any) -> str:
    """Text of a message's content: a string, null, or a list of parts of which the text ones are joined."""
    if type(content) is str:
        return content
    if content is None:
        return ""
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
    asked = next((message.get("content") for message in messages if message["role"] == "user"), None)
    text = content_text(asked)
    if messages and not text.strip():
        text = content_text(messages[0].get("content"))
    return conversation_named(client_id, workload_id, text)


def conversation_named(client_id: str, workload_id: str, text: str) -> str:
    """As `conversation_of`, from the text itself."""
    name = canonical_bytes([client_id, workload_id, " ".join(text.split()).casefold()])
    return hashlib.sha256(name).hexdigest()[:16]


FIRST_S, LAST_S = -62135596800, 253402300799
"""The years 1 and 9999: the timestamps that a record may have."""


class _Bad(Exception):
    pass


_FAULTS = (_Bad, ValueError, TypeError, AttributeError, RecursionError, OverflowError)
_MESSAGE = ("role", "content", "name", "tool_call_id", "tool_calls")
_USUAL = frozenset(("role", "content", "tool_calls"))
_GATEWAYS = frozenset(("served_by", "exchange_id", "rollout", "arm", "shadow", "error"))
_LONE = re.compile("[\ud800-\udfff]")
_TOO_DEEP = f"the line nests deeper than {MAX_DEPTH} levels"


class _Hit(msgspec.Struct):
    """A line taken apart as far as is cheap: what is not looked into stays text."""

    request: dict[str, msgspec.Raw]


class _KnownTools(NamedTuple):
    text: bytes
    """The key and its value as a line has them: `"tools": […]`."""
    tools: list[Any]


_take_apart = msgspec.json.Decoder(_Hit).decode
_decode = msgspec.json.Decoder().decode
_KNOWN_TOOLS = 16
_known_tools: list[_KnownTools] = []
TOOLS_CUT = "flywheel-ray: tools as in an earlier line"
"""What stands for tools that were cut out of a line."""
_TOOLS_CUT_JSON = f'"tools":"{TOOLS_CUT}"'.encode()


def cut_tools(text: bytes) -> tuple[bytes, list[Any] | None]:
    """A line without its tools, and those, where an earlier line had the same text of them; else the line and None.

    `request.tools` of what is left must be `TOOLS_CUT`: then that is where the known text stood. If it is not, the text
    was part of something else.
    """
    at = text.find(b'"tools"')
    for known in _known_tools if at >= 0 else ():
        if text.startswith(known.text, at):
            rest = b"%b%b%b" % (text[:at], _TOOLS_CUT_JSON, text[at + len(known.text) :])
            # With no other key or text "tools" left, it can be taken for no other.
            return (rest, known.tools) if rest.find(b'"tools"', at + 7) < 0 else (text, None)
    return text, None


def may_be_deep(text: bytes) -> bool:
    """Whether JSON may nest deeper than `MAX_DEPTH`: each level has an opening bracket."""
    return text.count(b"{") + text.count(b"[") > MAX_DEPTH


def _hit_of(line: str | bytes) -> dict[str, Any]:
    """A parsed line, its tools taken from an earlier line where they are the same text."""
    text = line if isinstance(line, bytes) else line.encode()
    rest, known = cut_tools(text)
    if known is not None:
        hit = _checked(rest)
        request = hit.get("request")
        if type(request) is dict and request.get("tools") == TOOLS_CUT:
            request["tools"] = known
            return hit
    hit = _checked(text)
    if isinstance(tools := hit["request"].get("tools"), list):
        _check_tools(tools)
        _remember(text, tools)
    return hit


def _checked(text: bytes) -> dict[str, Any]:
    data = _decode(text)
    if type(data) is not dict:
        raise _Bad("not an object")
    if may_be_deep(text) and _deep(data):
        raise _Bad(_TOO_DEEP)
    return data


def _remember(text: bytes, tools: list[Any]) -> None:
    raw = bytes(_take_apart(text).request["tools"])
    end = text.find(raw) + len(raw)
    begin = text.rfind(b'"tools"', 0, end - len(raw))
    if begin >= 0 and text[begin + 7 : end - len(raw)].strip() == b":":
        _known_tools.insert(0, _KnownTools(text[begin:end], tools))
        del _known_tools[_KNOWN_TOOLS:]


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
        value = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    # False for NaN, and for whole numbers too large for a float.
    if not FIRST_S <= value <= LAST_S:
        raise _Bad(f"timestamp is not a time in epoch seconds (milliseconds?): {str(value)[:40]}")
    return float(value)


def _read(data: Mapping[str, Any], clean: bool) -> Record:
    """The record of a logged object. `clean` means from `_hit_of`: no lone surrogates, depth and tools are checked."""
    client_id, workload_id, timestamp = data.get("client_id"), data.get("workload_id"), data.get("timestamp")
    if type(client_id) is not str or type(workload_id) is not str:
        client_id, workload_id = _field(data, "client_id", str), _field(data, "workload_id", str)
    if not client_id or not workload_id:
        raise _Bad("client_id or workload_id is empty")
    if type(timestamp) is not float or not FIRST_S <= timestamp <= LAST_S:
        timestamp = _timestamp(_field(data, "timestamp", (int, float, str)))
    request = data.get("request")
    if type(request) is not dict:
        request = _field(data, "request", dict)
    messages = request.get("messages")
    if type(messages) is not list:
        _field(request, "messages", list, "request.")
    if not messages:
        raise _Bad("request.messages is empty")
    for i, message in enumerate(messages):
        if type(message) is not dict or type(message.get("role")) is not str:
            raise _Bad(f"request.messages[{i}] is not an object with a role")
        if type(message.get("content")) is not str or len(message) > 2:
            _check_message(message, f"request.messages[{i}]")
    tools = request.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise _Bad(f"request.tools is {_kind(tools)}, not a list")
    if tools and not clean:
        _check_tools(tools)
    if not tools and request.get("functions") is not None:
        _check_functions(_field(request, "functions", list, "request."))
    response = _response(data)
    latency_s = data.get("latency_s")
    if latency_s is not None:
        if type(latency_s) is not float:
            latency_s = float(_field(data, "latency_s", (int, float)))
        if not 0 <= latency_s < math.inf:
            raise _Bad(f"latency_s is not a length of time: {latency_s}")
    served_by: str = TEACHER
    shadow: Any = False
    exchange_id = rollout = arm = error = None
    if not _GATEWAYS.isdisjoint(data):
        shadow = data.get("shadow")
        if shadow is not None and not isinstance(shadow, bool):
            raise _Bad(f"shadow is {_kind(shadow)}, not a boolean")
        served_by, arm, error = _text(data, "served_by") or TEACHER, _text(data, "arm"), _text(data, "error")
        exchange_id, rollout = _text(data, "exchange_id"), _text(data, "rollout")
    if not clean:
        error = error and readable(error)
        tags = {"client_id": client_id, "workload_id": workload_id, "served_by": served_by, "exchange_id": exchange_id}
        for field, value in {**tags, "rollout": rollout, "arm": arm}.items():
            if value and _LONE.search(value):
                raise _Bad(f"{field} is not Unicode text: {value[:40]!r}")
    if error:
        completion = Completion(latency_s=latency_s)
    else:
        strict = served_by == TEACHER and arm is None
        completion = _completion(response, latency_s, strict, clean)
    return Record.trusted(
        {
            "client_id": client_id,
            "workload_id": workload_id,
            "timestamp": timestamp,
            "served_by": served_by,
            "request": request,
            "response": response,
            "completion": completion,
            "exchange_id": exchange_id,
            "rollout": rollout,
            "arm": arm,
            "shadow": bool(shadow),
            "error": error,
        }
    )


def _text(data: Mapping[str, Any], field: str) -> str | None:
    value = data.get(field)
    if value is None:
        return None
    if not isinstance(value, str):
        raise _Bad(f"{field} is {_kind(value)}, not a string")
    return value or None


def _check_message(message: Mapping[str, Any], where: str) -> None:
    content = message.get("content")
    if isinstance(content, list):
        for i, part in enumerate(content):
            if not isinstance(part, str | dict):
                raise _Bad(f"{where}.content[{i}] is {_kind(part)}, not a string or an object")
    elif content is not None and not isinstance(content, str):
        raise _Bad(f"{where}.content is {_kind(content)}, not a string or a list")
    calls = message.get("tool_calls")
    if calls is not None:
        if not isinstance(calls, list):
            raise _Bad(f"{where}.tool_calls is {_kind(calls)}, not a list")
        for i, call in enumerate(calls):
            if not isinstance(call, dict):
                raise _Bad(f"{where}.tool_calls[{i}] is {_kind(call)}, not an object")


def _check_tools(tools: Sequence[Any]) -> None:
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _Bad(f"request.tools[{i}] is not a function with a name")


def _check_functions(functions: Sequence[Any]) -> None:
    for i, function in enumerate(functions):
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _Bad(f"request.functions[{i}] is not a function with a name")


def _response(data: Mapping[str, Any]) -> dict[str, Any]:
    response = data.get("response")
    if type(response) is dict:
        return response
    _field(data, "response", (dict, list))
    assert isinstance(response, list)
    for i, chunk in enumerate(response):
        if not isinstance(chunk, dict):
            raise _Bad(f"response[{i}] is {_kind(chunk)}, not a chunk of a stream")
    whole = assemble_stream(response)
    for choice in whole["choices"]:
        choice["finish_reason"] = choice["finish_reason"] or INTERRUPTED
    return whole


def _completion(response: Mapping[str, Any], latency_s: float | None, strict: bool, clean: bool) -> Completion:
    choices = response.get("choices")
    if type(choices) is not list or not choices:
        raise _Bad("response.choices is missing or empty")
    choice = choices[0]
    message = choice.get("message") if type(choice) is dict else None
    if type(message) is not dict:
        raise _Bad("response.choices[0].message is missing")
    text = message.get("content")
    if type(text) is not str:
        if text is not None and type(text) is not list:
            raise _Bad(f"response.choices[0].message.content is {_kind(text)}, not a string or a list")
        text = content_text(text)
    calls = message.get("tool_calls")
    if not calls:
        tool_calls: tuple[ToolCall, ...] = ()
    elif type(calls) is list:
        tool_calls = tuple([_call(call, i, strict, clean) for i, call in enumerate(calls)])
    else:
        raise _Bad(f"response.choices[0].message.tool_calls is {_kind(calls)}, not a list")
    refused, reasoning = False, None
    if not _USUAL.issuperset(message):
        if not calls and (older := message.get("function_call")):
            tool_calls = (_call({"function": older}, None, strict, clean),)
        refusal = message.get("refusal")
        refused = isinstance(refusal, str) and bool(refusal) and not text and not tool_calls
        if refused:
            text = str(refusal)
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        reasoning = reasoning if isinstance(reasoning, str) else None
    usage = response.get("usage")
    prompt_tokens = completion_tokens = None
    if type(usage) is dict:
        prompt_tokens, completion_tokens = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
    finish = choice.get("finish_reason")
    return Completion.trusted(
        {
            "text": text if clean else readable(text),
            "tool_calls": tool_calls,
            "reasoning": reasoning if clean or reasoning is None else readable(reasoning),
            "refused": refused,
            "finish_reason": (finish if clean else readable(finish)) if type(finish) is str else None,
            "latency_s": latency_s,
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
        }
    )


def _count(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _call(call: Any, place: int | None, strict: bool, clean: bool) -> ToolCall:
    """The call at a place of `tool_calls`, or of `function_call`."""
    function: Any = call.get("function") if type(call) is dict else None
    name = function.get("name") if type(function) is dict else None
    where = "response.choices[0].message."
    if type(name) is not str:
        raise _Bad(f"{where}{'function_call' if place is None else f'tool_calls[{place}]'} has no function name")
    arguments = read_arguments(function.get("arguments"))
    if strict and type(arguments) is str:
        within = "function_call" if place is None else f"tool_calls[{place}].function"
        raise _Bad(f"{where}{within}.arguments is not a JSON object: {arguments[:80]!r}")
    return ToolCall.trusted({"name": name if clean else readable(name), "arguments": arguments})


def read_arguments(arguments: Any) -> dict[str, Any] | str:
    """Tool-call arguments as an object, from an object or its JSON text; null and "" mean no arguments.

    What is no JSON object comes back as text, so that the caller can tell malformed from missing.
    """
    if arguments is None or arguments == "":
        return {}
    if isinstance(arguments, str):
        try:
            value = _decode(arguments)
            # Text that nests deeper is longer, and has more opening brackets.
            if type(value) is dict and (
                len(arguments) <= 2 * MAX_DEPTH or arguments.count("{") + arguments.count("[") <= MAX_DEPTH
            ):
                return value
        except (ValueError, RecursionError):
            pass
    try:
        value = _loads(arguments) if isinstance(arguments, str) else arguments
        if isinstance(value, dict) and not _deep(value):
            canonical_json(value)  # raises for what only Python takes for JSON
            return readable(value)
    except (ValueError, TypeError, RecursionError):
        pass
    return readable(arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False, default=str))
