"""From what a model wrote to text and tool calls: pure, total, and forgiving about dress, not about content.

    parse('{"name": "route", "arguments": {"queue": "card_arrival"}} Hope it helps!')
    # Parsed(text="Hope it helps!", tool_calls=(ToolCall(name="route", arguments={"queue": "card_arrival"}),))
    parse("I cannot help with that.")            # text, no calls

Accepted dress: bare JSON objects (one after another, or after a line of prose), a JSON list, ```json fences, Hermes
`<tool_call>` blocks, and OpenAI's `{"function": {…}}`. What begins like a call but is no JSON becomes a call with its
arguments as raw text: malformed is wrong, not missing.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from flywheel_ray.records import ToolCall, read_arguments
from flywheel_ray.values import Value

_CALL_KEYS = {"name", "arguments", "parameters", "type", "id", "index"}
_HERMES = re.compile(r"<tool_call>(.*?)(?:</tool_call>|(?=<tool_call>)|\Z)", re.DOTALL)
_FENCE = re.compile(r"```[\w-]*[ \t]*\r?\n?(.*?)(?:```|\Z)", re.DOTALL)
_LINE_START = re.compile(r"^[ \t]*(?=[\[{])", re.MULTILINE)
_BROKEN = re.compile(r'\s*\[?\s*\{\s*"name"\s*:\s*"((?:[^"\\\n]|\\.)+)"\s*(?:,|\}|\Z)')
_BROKEN_ARGUMENTS = re.compile(r'\s*"(?:arguments|parameters)"\s*:\s*(.*)', re.DOTALL)
_BETWEEN = re.compile(r"[\s,;]*")


class Parsed(Value):
    """What a model wrote: its calls in order, and the text around them, stripped."""

    text: str
    tool_calls: tuple[ToolCall, ...] = ()


def parse(output: str) -> Parsed:
    """Read a model's output. Never raises; without a call, `text` is the whole output, stripped."""
    output = output.encode("utf-8", "replace").decode("utf-8")  # lone surrogates are no text
    for blocks in (_HERMES, _FENCE):
        found = _from_blocks(blocks, output)
        if found.tool_calls:
            return found
    for start in _LINE_START.finditer(output):
        before = output[: start.start()]
        calls, rest = _calls(output[start.end() :], after_prose=bool(before.strip()))
        if calls:
            return Parsed(text=_joined(before, rest), tool_calls=tuple(calls))
    return Parsed(text=output.strip())


def _from_blocks(blocks: re.Pattern[str], output: str) -> Parsed:
    """Calls of all blocks of one kind; blocks without a call stay in the text."""
    calls: list[ToolCall] = []
    prose: list[str] = []
    end = 0
    for block in blocks.finditer(output):
        inside, rest = _calls(block[1].strip())
        prose += [output[end : block.start()], rest if inside else block[0]]
        calls += inside
        end = block.end()
    return Parsed(text=_joined(*prose, output[end:]), tool_calls=tuple(calls))


def _calls(text: str, after_prose: bool = False) -> tuple[list[ToolCall], str]:
    """Calls at the beginning of `text`, and what follows them.

    After prose, an object needs arguments to be a call, so that JSON quoted in an explanation stays text.
    """
    calls: list[ToolCall] = []
    position = 0
    while text[position : position + 1] in ("{", "["):
        try:
            value, end = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError):
            broken = None if after_prose and not calls else _broken(text[position:])
            return ([*calls, broken], "") if broken else (calls, text[position:])
        found = _read(value)
        if not found or (after_prose and not _has_arguments(value)):
            break
        calls += found
        between = _BETWEEN.match(text, end)
        position = between.end() if between else end
    return calls, text[position:]


def _read(value: Any) -> list[ToolCall]:
    """The calls a JSON value is; empty where any part of it is none."""
    if isinstance(value, list):
        nested = [_read_one(item) for item in value]
        return [call for call in nested if call] if nested and all(nested) else []
    call = _read_one(value)
    return [call] if call else []


def _read_one(value: Any) -> ToolCall | None:
    if not isinstance(value, dict):
        return None
    if isinstance(value.get("function"), dict):
        value = value["function"]
    name = value.get("name")
    # Other keys mean that this is an answer in JSON that happens to have a name: {"name": "Ada", "age": 36}
    if not isinstance(name, str) or not name.strip() or not _CALL_KEYS.issuperset(value):
        return None
    arguments = value.get("arguments", value.get("parameters"))
    return ToolCall(name=name.strip(), arguments=_arguments(arguments))


def _arguments(value: Any) -> dict[str, Any] | str:
    """As `read_arguments`, except that JSON text with NaN, infinities or lone surrogates stays text."""
    if isinstance(value, str) and value:
        try:
            inner, _ = _DECODER.raw_decode(value.strip())
        except (ValueError, RecursionError):
            return value
        return read_arguments(value) if isinstance(inner, dict) else value
    return read_arguments(value)


def _has_arguments(value: Any) -> bool:
    text = json.dumps(value)
    return '"arguments"' in text or '"parameters"' in text


def _broken(text: str) -> ToolCall | None:
    """A call whose JSON is cut off or malformed, with the text of its arguments; None where no name can be read."""
    head = _BROKEN.match(text)
    if head is None:
        return None
    tail = text[head.end() :]
    arguments = _BROKEN_ARGUMENTS.match(tail)
    raw = (arguments[1] if arguments else tail).strip()
    # Never an empty text or an object's: both would read as well-formed arguments.
    well_formed = not raw or isinstance(read_arguments(raw), dict)
    return ToolCall(name=head[1].strip() or head[1], arguments=text if well_formed else raw)


def _joined(*parts: str) -> str:
    return "\n".join(stripped for part in parts if (stripped := part.strip()))


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits} is not finite")
    return value


class _Decoder(json.JSONDecoder):
    """Strict about numbers and characters: whatever it returns can be written as JSON again."""

    def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
        value, end = super().raw_decode(s, idx)
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # raises for lone surrogates, a ValueError
        return value, end


_DECODER = _Decoder(parse_constant=_no_constant, parse_float=_finite)
