"""Taking records in: is each of use, what was asked, what was answered, and the row that a dataset would have of it.

    intake = Intake(DatasetPolicy(), "acme", "support", rows=MemoryRows())
    for line in store.lines(part):
        intake.add_line(line)
    intake.taken.excluded              # Counter({"truncated answer": 3})

Each record is looked at once, alone, for some ten microseconds. What must be decided on all of them together is
left to `builds`, which gets 68 bytes for each: so the taking in may run in one process or in many.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np

from flywheel_ray.datasets import NO_TOOL, DatasetPolicy, answer_digest
from flywheel_ray.lines import usual_line
from flywheel_ray.records import (
    INTERRUPTED,
    TEACHER,
    Record,
    Rejected,
    conversation_named,
    conversation_of,
    normal_messages,
    parse_line,
    readable,
    tool_choice_of,
    tools_of,
)
from flywheel_ray.redaction import Redactor
from flywheel_ray.toolbox import Toolbox
from flywheel_ray.values import canonical_bytes

REJECTED = "rejected: "
OTHER_WORKLOAD = "another workload"
SHADOW = "shadow copy"
ARM = "served by an arm"
FAILED = "failed exchange"
TRUNCATED = "truncated answer"
BROKEN_OFF = "interrupted stream"
FILTERED = "content filtered"
REFUSED = "refused answer"
MALFORMED = "tool arguments are not an object"
EMPTY = "empty answer"
MEDIA = "request has images or other media"
INVALID_CALL = "invalid tool call"

BUCKETS = 64
"""Rows are kept by the first six bits of their id, so that a bucket of them fits into memory and buckets in order are
rows in order."""
BUCKET_BITS = 6

_KEY = struct.Struct(">16s16s8s8sIdII")
KEYS = np.dtype(
    [
        ("id_high", ">u8"),
        ("id_low", ">u8"),
        ("content_high", ">u8"),
        ("content_low", ">u8"),
        ("answer", ">u8"),
        ("conversation", ">u8"),
        ("tie", ">u4"),
        ("timestamp", ">f8"),
        ("label", ">u4"),
        ("length", ">u4"),
    ]
)
"""One usable record, 68 bytes: its request, the whole of its answer, what of the answer is compared with others, its
conversation, a hash of its row (so that equal times have an order), and where to find the row."""


class Label(NamedTuple):
    """What many records have in common: the tools their answer calls, and what is wrong with the calls."""

    tools: tuple[str, ...]
    faults: tuple[str, ...]


class Rows(Protocol):
    """Where the rows of usable records wait until it is decided which are kept."""

    def add(self, bucket: int, row: bytes) -> None:
        """Append a row to a bucket."""
        ...

    def read(self, bucket: int) -> bytes:
        """All rows of a bucket, one after another, in the order they were added."""
        ...


class MemoryRows:
    """Rows in memory."""

    def __init__(self) -> None:
        self._rows: list[bytearray] = [bytearray() for _ in range(BUCKETS)]

    def add(self, bucket: int, row: bytes) -> None:
        """Append a row to a bucket."""
        self._rows[bucket] += row

    def read(self, bucket: int) -> bytes:
        """All rows of a bucket."""
        return bytes(self._rows[bucket])


@dataclass
class Taken:
    """What an `Intake` has found: a table of keys, and counts. Small enough to be sent between processes."""

    keys: bytearray = field(default_factory=bytearray)
    labels: dict[Label, int] = field(default_factory=dict)
    tools: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    scanned: int = 0
    excluded: Counter[str] = field(default_factory=Counter)
    redacted: Counter[str] = field(default_factory=Counter)
    several_choices: int = 0


class Intake:
    """Takes records one by one: counts those that are of no use, and makes rows of the others.

    Args:
        policy: what is of use.
        client_id, workload_id: the workload; other records are counted and left out.
        rows: where rows go.
        redactor: of the policy's redaction, where that asks for more than patterns; None makes one of patterns.
    """

    def __init__(
        self,
        policy: DatasetPolicy,
        client_id: str,
        workload_id: str,
        rows: Rows,
        redactor: Redactor | None = None,
    ) -> None:
        self.taken = Taken()
        self._policy = policy
        self._client_id, self._workload_id = client_id, workload_id
        self._rows = rows
        self._redactor = redactor or (Redactor(policy.redaction) if policy.redaction else None)
        self._toolboxes: dict[int, tuple[list[dict[str, Any]], Toolbox]] = {}

    def add(self, record: Record | Rejected) -> None:
        """Take a record, or a line that is none."""
        taken = self.taken
        taken.scanned += 1
        if type(record) is Rejected:
            taken.excluded[f"{REJECTED}{record.kind}"] += 1
            return
        assert isinstance(record, Record)
        # Fields by name out of the models' own dictionaries: as attributes, each would cost five times as much.
        logged, answer = vars(record), vars(record.completion)
        reason = self._unusable(logged, answer)
        if reason is not None:
            taken.excluded[reason] += 1
            return
        request = logged["request"]
        messages, media = normal_messages(request["messages"])
        if media and self._policy.media == "drop":
            taken.excluded[MEDIA] += 1
            return
        calls = [vars(call) for call in answer["tool_calls"]]
        toolbox, faults = self._checked(tools_of(request), calls)
        if faults and self._policy.invalid_calls == "drop":
            taken.excluded[INVALID_CALL] += 1
            return
        taken.several_choices += len(logged["response"]["choices"]) > 1
        reference: dict[str, Any] = {"text": answer["text"], "tool_calls": calls}
        if (reasoning := answer["reasoning"]) is not None:
            reference["reasoning"] = reasoning
        opening = messages
        if self._redactor is not None:
            # A later turn may show that a number in an earlier one was a phone's; the conversation's name must not
            # change with that, so it comes of what all turns begin with.
            opening, _, _ = self._redactor.redact(_opening(messages), {"text": "", "tool_calls": []})
            messages, reference, found = self._redactor.redact(messages, reference)
            taken.redacted.update(found)
        choice = tool_choice_of(request)
        try:
            asked, _ = _encode_sorted(messages), _encode_sorted(choice)
        except (TypeError, ValueError, OverflowError):  # half an emoji, or a very large integer
            opening, messages = readable(opening), readable(messages)
            reference, choice = readable(reference), readable(choice)
            asked = canonical_bytes(messages)
        conversation = conversation_of(self._client_id, self._workload_id, opening)
        self._keep(logged["timestamp"], asked, conversation, toolbox, choice, messages, answer, reference, faults)

    def add_line(self, text: bytes) -> None:
        """Take a line of a log: `add(parse_line(text))`, and faster where it is a usual one (see `lines`)."""
        line = usual_line(text) if self._redactor is None else None
        if line is None:
            self.add(parse_line(text))
            return
        taken = self.taken
        taken.scanned += 1
        answer, calls = line.answer, line.calls
        if line.workload_id != self._workload_id or line.client_id != self._client_id:
            taken.excluded[OTHER_WORKLOAD] += 1
            return
        reason = _unfinished(answer, calls)
        if reason is not None:
            taken.excluded[reason] += 1
            return
        toolbox, faults = self._checked(line.tools, calls)
        if faults and self._policy.invalid_calls == "drop":
            taken.excluded[INVALID_CALL] += 1
            return
        taken.several_choices += line.choices > 1
        messages = line.messages
        opening = next((message.content for message in messages if message.role == "user"), None) or ""
        if not opening.strip():
            opening = messages[0].content or ""
        conversation = conversation_named(self._client_id, self._workload_id, opening)
        reference = {"text": answer["text"], "tool_calls": calls}
        asked = _encode_sorted(messages)
        choice = line.tool_choice
        self._keep(line.timestamp, asked, conversation, toolbox, choice, messages, answer, reference, faults)

    def _unusable(self, logged: Mapping[str, Any], answer: Mapping[str, Any]) -> str | None:
        if logged["workload_id"] != self._workload_id or logged["client_id"] != self._client_id:
            return OTHER_WORKLOAD
        if logged["shadow"]:
            return SHADOW
        if logged["served_by"] != TEACHER:
            return ARM
        if logged["error"]:
            return FAILED
        reason = _unfinished(answer, answer["tool_calls"])
        if reason is not None:
            return reason
        if answer["refused"]:
            return REFUSED
        return MALFORMED if any(type(call.arguments) is str for call in answer["tool_calls"]) else None

    def _checked(
        self, tools: list[dict[str, Any]], calls: Sequence[Mapping[str, Any]]
    ) -> tuple[Toolbox | None, tuple[str, ...]]:
        """A request's tools, and what is wrong with calls of them."""
        toolbox = self._toolbox(tools) if tools else None
        faults: tuple[str, ...] = ()
        for call in calls:
            fault = toolbox.fault(call["name"], call["arguments"]) if toolbox else _NOT_OFFERED
            if fault is not None:
                faults = (*faults, fault.kind)
        return toolbox, faults

    def _toolbox(self, tools: list[dict[str, Any]]) -> Toolbox:
        # Lines with the same tools share one list (see `records`), so that its identity is enough nearly always.
        known = self._toolboxes.get(id(tools))
        if known is not None and known[0] is tools:
            return known[1]
        toolbox = Toolbox(readable(tools))
        if toolbox.id in self.taken.tools:
            toolbox = next((box for _, box in self._toolboxes.values() if box.id == toolbox.id), toolbox)
        if len(self._toolboxes) >= _TOOLBOXES:
            self._toolboxes.clear()
        self._toolboxes[id(tools)] = (tools, toolbox)
        self.taken.tools.setdefault(toolbox.id, [dict(tool) for tool in toolbox.tools])
        return toolbox

    def _keep(
        self,
        timestamp: float,
        asked: bytes,
        conversation: str,
        toolbox: Toolbox | None,
        choice: Any,
        messages: Sequence[Any],
        answer: Mapping[str, Any],
        reference: dict[str, Any],
        faults: tuple[str, ...],
    ) -> None:
        """Make the row and the key. `asked` is the messages' canonical JSON."""
        tools_id = None if toolbox is None else toolbox.id
        id = _sha256(b"[%b,%b]" % (asked, canonical_bytes([tools_id, choice])[1:-1])).digest()[:16]
        calls = reference["tool_calls"]
        whole = answer_digest(reference.get("reasoning"), reference["text"], calls)
        if not calls:
            tools, compared = _NO_TOOLS, answer_digest(None, reference["text"].strip(), calls)
        elif len(calls) == 1:
            tools = (calls[0]["name"],)
            plain = not reference["text"] and "reasoning" not in reference
            compared = whole if plain else answer_digest(None, "", calls)
        else:  # in whatever order
            tools = tuple(sorted({call["name"] for call in calls}))
            compared = answer_digest(None, "", sorted(calls, key=canonical_bytes))
        label = (tools, faults)
        labels = self.taken.labels
        number = labels.get(label)  # type: ignore[call-overload]
        if number is None:
            number = labels[Label(tools, faults)] = len(labels)
        for name in _FIGURES:
            if (figure := answer[name]) is not None:
                reference[name] = figure
        row: dict[str, Any] = {
            "id": id.hex(),
            "conversation": conversation,
            "timestamp": timestamp,
            "messages": messages,
        }
        if tools_id is not None:
            row["tools"] = tools_id
        if choice is not None:
            row["tool_choice"] = choice
        if faults:
            row["faults"] = faults
        row["reference"] = reference
        line = _encode(row)
        self._rows.add(id[0] >> (8 - BUCKET_BITS), line)
        self.taken.keys += _KEY.pack(
            id,
            whole,
            compared,  # of which the first 8 bytes
            bytes.fromhex(conversation),
            zlib.crc32(line),
            timestamp,
            number,
            len(line),
        )


def _unfinished(answer: Mapping[str, Any], calls: Sequence[Any]) -> str | None:
    """Why an answer is of no use, or None."""
    finish_reason = answer["finish_reason"]
    if finish_reason in _UNFINISHED:
        return _UNFINISHED[finish_reason]
    return EMPTY if not calls and not answer["text"].strip() else None


def with_conversation(row: bytes, conversation: str) -> bytes:
    """A row with another conversation's name in it."""
    begin = row.index(_CONVERSATION) + len(_CONVERSATION)  # the second of its fields, before anything logged
    return row[:begin] + conversation.encode() + row[begin + len(conversation) :]


def _opening(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages up to the first of a user."""
    for i, message in enumerate(messages, start=1):
        if message["role"] == "user":
            return messages[:i]
    return messages


class _Fault(NamedTuple):
    kind: str


_NOT_OFFERED = _Fault("unknown_tool")
_NO_TOOLS = (NO_TOOL,)
_CONVERSATION = b'"conversation":"'
_UNFINISHED = {"length": TRUNCATED, "content_filter": FILTERED, INTERRUPTED: BROKEN_OFF}
_FIGURES = ("finish_reason", "latency_s", "prompt_tokens", "completion_tokens")
_TOOLBOXES = 4096
_encode = msgspec.json.Encoder().encode
_encode_sorted = msgspec.json.Encoder(order="sorted").encode
_sha256 = hashlib.sha256
