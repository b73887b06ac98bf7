"""Sample traffic in the flywheel's log schema: a customer-support assistant with ten tools, and a ticket summariser.

Deterministic and endless: the same seed gives the same records, and more of them begin with the fewer. The recorded
answer is what the customer's words were made to mean; `answer`, the rule-based teacher, reads it out of the words.

    python -m experiments.sample_traffic --records 1000 --seed 0 --out traffic.jsonl
    # {"timestamp": 1788220805.3, "client_id": "acme-support", "workload_id": "support.assistant", "request": {…}, …}
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from experiments.sample_grammar import (
    SLOTS,
    TOOLS,
    Part,
    Phrase,
    Request,
    arguments,
    chat,
    find,
    missing,
    normalise,
    phrases,
    replies,
    topic,
    understand,
    utter,
    values_of,
)
from experiments.sample_phrases import (
    ASKS,
    CHAT,
    CLOSERS,
    DONE,
    FOLLOWERS,
    FRAMES,
    JOINERS,
    OPENERS,
    PHRASES,
    POOLS,
    REPORTS,
    TICKET,
    UNSURE,
)

__all__ = ["CLIENT_ID", "MODEL", "TOOLS", "answer", "generate"]

CLIENT_ID = "acme-support"
SUPPORT, SUMMARY = "support.assistant", "tickets.summary"
MODEL = "sample-teacher-70b"
START = datetime(2026, 9, 1, tzinfo=UTC)
SYSTEM = {
    SUPPORT: "You are the support assistant of the Acme shop. Call a tool when one fits, otherwise reply briefly.",
    SUMMARY: "Summarize the support ticket in one sentence.",
}

Message = dict[str, Any]

# ── the teacher ─────────────────────────────────────────────────────────────────────────────────────────────────────


def answer(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None) -> Message:
    """The teacher's assistant message for a conversation, in OpenAI's form; calls only tools that are offered.

    After a user message: the tool calls it asks for, a question for what is missing, or a short polite text. After tool
    results: the second step of a two-step request, or a sentence about the results. Without tools: a ticket's summary.
    """
    offered = [tool["function"]["name"] for tool in tools or ()]
    at = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
    if at is None:
        return _text(UNSURE)
    said = _text_of(messages[at])
    if not tools:
        about = topic(said)
        return _text(_summary(said) or (CHAT[about][0] if about else _first_sentence(said)))
    requests = understand(_with_question(messages, at), offered)
    if messages[-1]["role"] == "tool":
        done = [message for message in messages[at:] if message["role"] == "assistant"]
        return _after(requests, messages, len(done), offered)
    if not requests:
        about = topic(said)
        return _text(CHAT[about][0] if about else UNSURE)
    earlier = _earlier_values(messages[:at])
    calls = []
    for request in requests:
        values = {name: earlier[name] for name in ("order_id", "email", "phone") if name in earlier} | request.values
        if lacking := missing(request.tool, values):
            return _text(ASKS[lacking[0]])
        calls.append((request.tool, arguments(request.tool, values)))
    return _calls(calls, len(messages))


def _text(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _calls(calls: Sequence[tuple[str, Mapping[str, Any]]], position: int) -> Message:
    """The message that calls tools; ids follow from the position in the conversation and the content."""
    written = []
    for i, (tool, values) in enumerate(calls):
        text = json.dumps(values, ensure_ascii=False)
        call_id = "call_" + hashlib.sha256(f"{position}.{i} {tool} {text}".encode()).hexdigest()[:12]
        written.append({"id": call_id, "type": "function", "function": {"name": tool, "arguments": text}})
    return {"role": "assistant", "content": None, "tool_calls": written}


def _text_of(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return " ".join(part.get("text") or "" for part in content if isinstance(part, dict))


def _with_question(messages: Sequence[Mapping[str, Any]], at: int) -> str:
    """The user's message, together with the request before it when it replies to a question of the assistant."""
    said = _text_of(messages[at])
    if at >= 2 and messages[at - 1]["role"] == "assistant" and _text_of(messages[at - 1]) in ASKS.values():
        return f"{_with_question(messages, at - 2)} ; {said}"
    return said


def _earlier_values(messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The arguments of the tool calls so far; the latest of a name wins."""
    values: dict[str, Any] = {}
    for message in messages:
        for call in message.get("tool_calls") or ():
            values.update(_object(call["function"]["arguments"]))
    return values


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _after(
    requests: Sequence[Request],
    messages: Sequence[Mapping[str, Any]],
    steps: int,
    offered: Collection[str] = tuple(PHRASES),
) -> Message:
    """What follows tool results: the second call of a two-step request, or a report."""
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    calls = {call["id"]: call["function"] for call in messages[last].get("tool_calls") or ()}
    results = [(calls.get(m.get("tool_call_id")), _object(_text_of(m))) for m in messages[last + 1 :]]
    request = requests[0] if requests else None
    if (
        request
        and request.then
        and request.then in offered
        and steps == 1
        and results
        and _allows(request.tool, results[0][1])
    ):
        return _calls([(request.then, arguments(request.then, request.values))], len(messages))
    return _text(
        " ".join(_report(call["name"], _object(call["arguments"]), result) for call, result in results if call)
    )


def _allows(tool: str, result: Mapping[str, Any]) -> bool:
    """Whether the first tool's result lets a two-step request go on."""
    if tool == "lookup_order":
        return result.get("status") == "processing"
    if tool == "track_package":
        return result.get("state") == "delayed"
    return bool(result.get("available"))


def _report(tool: str, values: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    if "error" in result:
        return f"Sorry, that did not work: {result['error']}."
    try:
        return REPORTS[tool].format(**values, **result)
    except (KeyError, TypeError):
        return DONE


def _summary(ticket: str) -> str | None:
    """One sentence about a ticket, None when the text is no ticket we can read."""
    text = normalise(ticket)
    facts = {slot: find(slot, text) for slot in ("name", "product", "issue", "wish", "order_id")}
    if facts["product"] is None or facts["issue"] is None:
        return None
    order = f" (order {facts['order_id']})" if facts["order_id"] else ""
    wish = f", and wants {facts['wish']}" if facts["wish"] else ""
    return f"{facts['name'] or 'The customer'} reports that the {facts['product']}{order} {facts['issue']}{wish}."


def _first_sentence(text: str) -> str:
    return " ".join(text.split(". ")[0].split()[:25]).rstrip(".") + "."


# ── conversations ───────────────────────────────────────────────────────────────────────────────────────────────────

Exchange = tuple[list[Message], Message]
"""The messages of a request and the answer."""

KINDS = {"call": 50, "parallel": 4, "chat": 17, "clarify": 7, "report": 4, "follow_up": 8, "two_step": 7}
"""Relative share of each kind of conversation."""


@cache
def _table() -> tuple[dict[str, list[Phrase]], dict[str, list[Phrase]], list[Phrase]]:
    """Complete phrases by tool, incomplete ones by tool, and two-step phrases."""
    complete: dict[str, list[Phrase]] = {tool: [] for tool in PHRASES}
    incomplete: dict[str, list[Phrase]] = {tool: [] for tool in PHRASES}
    for phrase in phrases():
        if not phrase.then:
            lacking = missing(phrase.about, dict.fromkeys(phrase.slots))
            (incomplete if lacking else complete)[phrase.about].append(phrase)
    return complete, incomplete, [phrase for phrase in phrases() if phrase.then]


def _framed(rng: Random, parts: Sequence[Part]) -> str:
    """A request as a message, half of the time with a greeting, an aside or a farewell around it."""
    opener = [(None, rng.choice(OPENERS))] if rng.random() < 0.3 else []
    closer: list[Part] = []
    if rng.random() < 0.3:
        before, named, after = rng.choice(CLOSERS).partition("{name}")
        closer = [(None, before + (SLOTS["name"].say(rng) if named else "") + after)]
    return utter(rng, [*opener, *parts, *closer])


def _ask(rng: Random, tool: str | None = None) -> tuple[str, Request]:
    """A complete request: the message, and what it means."""
    complete, incomplete, _ = _table()
    tool = tool or rng.choice(list(complete))
    if rng.random() < 0.08:
        vague = [p for p in incomplete[tool] if missing(tool, dict.fromkeys(p.slots)) == ["order_id"]]
        if vague:
            before, _, after = rng.choice(FRAMES).partition("{order_id}")
            order: list[Part] = [(None, before), ("order_id", SLOTS["order_id"].say(rng)), (None, after)]
            parts = [*order, *rng.choice(vague).expand(rng)]
            return utter(rng, parts), Request(tool, values_of(parts))
    parts = rng.choice(complete[tool]).expand(rng)
    return _framed(rng, parts), Request(tool, values_of(parts))


def _result(rng: Random, tool: str) -> Message:
    """A tool's result, about one in twenty an error."""
    if rng.random() < 0.05:
        return {"error": rng.choice(("not found", "the service is busy", "not allowed"))}
    if tool == "lookup_order":
        status = rng.choice(("processing", "processing", "shipped", "delivered"))
        return {"status": status, "contents": SLOTS["product"].say(rng), "total": rng.randint(9, 250)}
    if tool == "track_package":
        place = rng.choice(POOLS["city"])
        state = rng.choice(("delayed", "on time"))
        return {
            "location": f"the {place} depot",
            "state": state,
            "eta": rng.choice(("today", "on Friday", "on Monday")),
        }
    if tool == "check_stock":
        return {"available": rng.choice((0, 3, 8, 25))}
    return {"ok": True, "reference": f"R{rng.randint(100, 999)}"}


def _tool_message(rng: Random, called: Message) -> Message:
    call = called["tool_calls"][0]
    content = json.dumps(_result(rng, call["function"]["name"]))
    return {"role": "tool", "tool_call_id": call["id"], "content": content}


def _call(request: Request, messages: Sequence[Message]) -> Message:
    return _calls([(request.tool, arguments(request.tool, request.values))], len(messages))


def _conversation(rng: Random) -> Iterator[Exchange]:
    """One support conversation as the exchanges it logs, each a step further."""
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    messages: list[Message] = [{"role": "system", "content": SYSTEM[SUPPORT]}]

    def user(text: str) -> None:
        messages.append({"role": "user", "content": text})

    if kind == "chat":
        reply, parts = _small_talk(rng)
        user(utter(rng, parts))
        yield messages, _text(reply)
    elif kind == "parallel":
        yield from _parallel(rng, messages)
    elif kind == "clarify":
        yield from _clarify(rng, messages)
    elif kind == "two_step":
        yield from _two_step(rng, messages)
    else:
        follow_ups = ("lookup_order", "track_package", "cancel_order", "get_invoice", "change_delivery_address")
        text, request = _ask(rng, rng.choice(follow_ups) if kind == "follow_up" else None)
        user(text)
        called = _call(request, messages)
        yield messages, called
        if kind == "call":
            return
        messages = [*messages, called, _tool_message(rng, called)]
        report = _after([request], messages, steps=1)
        yield messages, report
        if kind == "follow_up":
            messages = [*messages, report]
            yield _follow_up(rng, messages, request)


def _small_talk(rng: Random, about: str | None = None) -> tuple[str, list[Part]]:
    phrase = rng.choice([p for p in chat() if about in (None, p.about)])
    return CHAT[phrase.about][0], phrase.expand(rng)


def _parallel(rng: Random, messages: list[Message]) -> Iterator[Exchange]:
    complete, _, _ = _table()
    one, two = rng.sample(list(complete), 2)
    first, second = rng.choice(complete[one]).expand(rng)[:-1], rng.choice(complete[two]).expand(rng)
    text = utter(rng, [*first, (None, rng.choice(JOINERS)), *second])
    messages.append({"role": "user", "content": text})
    calls = [(tool, arguments(tool, values_of(parts))) for tool, parts in ((one, first), (two, second))]
    yield messages, _calls(calls, len(messages))


def _clarify(rng: Random, messages: list[Message]) -> Iterator[Exchange]:
    """The first message lacks arguments; the assistant asks for each, then calls the tool."""
    _, incomplete, _ = _table()
    tool = rng.choice(list(incomplete))
    parts = rng.choice(incomplete[tool]).expand(rng)
    messages.append({"role": "user", "content": _framed(rng, parts)})
    while lacking := missing(tool, values_of(parts)):
        question = _text(ASKS[lacking[0]])
        yield messages, question
        reply = rng.choice(replies(lacking[0])).expand(rng)[: rng.choice((-1, None))]
        messages = [*messages, question, {"role": "user", "content": utter(rng, reply)}]
        parts += reply
    yield messages, _call(Request(tool, values_of(parts)), messages)


def _two_step(rng: Random, messages: list[Message]) -> Iterator[Exchange]:
    phrase = rng.choice(_table()[2])
    parts = phrase.expand(rng)
    request = Request(phrase.about, values_of(parts), phrase.then)
    messages.append({"role": "user", "content": _framed(rng, parts)})
    called = _call(request, messages)
    yield messages, called
    messages = [*messages, called, _tool_message(rng, called)]
    second = _after([request], messages, steps=1)
    yield messages, second
    if second.get("tool_calls"):
        messages = [*messages, second, _tool_message(rng, second)]
        yield messages, _after([request], messages, steps=2)


def _follow_up(rng: Random, messages: list[Message], request: Request) -> Exchange:
    """The customer goes on about the same order, or says thanks."""
    if rng.random() < 0.3:
        reply, parts = _small_talk(rng, "thanks")
        return [*messages, {"role": "user", "content": utter(rng, parts)}], _text(reply)
    usable = [p for tool, lines in _table()[1].items() if tool != request.tool for p in lines]
    phrase = rng.choice([p for p in usable if missing(p.about, dict.fromkeys(p.slots)) == ["order_id"]])
    parts = phrase.expand(rng)
    messages = [*messages, {"role": "user", "content": utter(rng, [(None, rng.choice(FOLLOWERS)), *parts])}]
    values = {"order_id": request.values["order_id"], **values_of(parts)}
    return messages, _call(Request(phrase.about, values), messages)


def _ticket(rng: Random) -> Exchange:
    said = {slot: SLOTS[slot].say(rng) for slot in ("name", "product", "order_id", "issue", "wish")}
    said["Wish"] = said["wish"][0].upper() + said["wish"][1:]
    lines = [rng.choice(ways) for ways in TICKET]
    text = " ".join(line.format(**said) for line in lines if line).replace("?.", "?")
    facts = {slot: SLOTS[slot].read(said[slot].replace("'", "")) for slot in SLOTS if slot in said}
    order = f" (order {facts['order_id']})" if "{order_id}" in lines[1] else ""
    head = f"{facts['name']} reports that the {facts['product']}{order}"
    messages = [{"role": "system", "content": SYSTEM[SUMMARY]}, {"role": "user", "content": text}]
    return messages, _text(f"{head} {facts['issue']}, and wants {facts['wish']}.")


# ── records ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def tokens(value: Any) -> int:
    """An estimate: one token for four characters of JSON."""
    return len(json.dumps(value)) // 4 + 1


def completion(message: Message, messages: Sequence[Mapping[str, Any]], tools: Any, name: str, created: int) -> Message:
    """An OpenAI ChatCompletion around an assistant message."""
    prompt = tokens(messages) + (_TOOL_TOKENS if tools is TOOLS else tokens(tools or ""))
    answered = tokens(message.get("tool_calls") or message["content"])
    finish = "tool_calls" if message.get("tool_calls") else "stop"
    return {
        "id": f"chatcmpl-{name}",
        "object": "chat.completion",
        "created": created,
        "model": MODEL,
        "choices": [{"index": 0, "message": message, "finish_reason": finish, "logprobs": None}],
        "usage": {"prompt_tokens": prompt, "completion_tokens": answered, "total_tokens": prompt + answered},
    }


_TOOL_TOKENS = tokens(TOOLS)


def _record(rng: Random, workload_id: str, exchange: Exchange, timestamp: float) -> dict[str, Any]:
    messages, message = exchange
    request = {"model": MODEL, "messages": list(messages), "temperature": 0.0, "max_tokens": 256}
    tools = TOOLS if workload_id == SUPPORT else None
    if tools:
        request["tools"] = tools
    response = completion(message, messages, tools, f"{rng.getrandbits(48):012x}", int(timestamp))
    used = response["usage"]
    latency_s = 0.45 + 0.012 * used["completion_tokens"] + 0.0001 * used["prompt_tokens"] + rng.expovariate(4)
    return {
        "timestamp": round(timestamp, 3),
        "client_id": CLIENT_ID,
        "workload_id": workload_id,
        "request": request,
        "response": response,
        "latency_s": round(min(max(latency_s, 0.6), 2.5), 3),
    }


def generate(records: int, seed: int = 0, workload: str = "both", start: datetime = START) -> Iterator[dict[str, Any]]:
    """`records` log records of one workload ("support", "summaries") or of "both", three to one, in order of time.

    A conversation logs one record a model call, one after another; the last one may be cut short by the count.
    """
    if workload not in ("support", "summaries", "both"):
        raise ValueError(f"workload {workload!r} is none of support, summaries, both")
    rng = Random(seed)
    clock, left = start.timestamp(), records
    share = {"support": 0.0, "summaries": 1.0, "both": 0.3}[workload]
    while left > 0:
        clock += rng.expovariate(1 / 40)
        summary = rng.random() < share
        for exchange in iter([_ticket(rng)]) if summary else _conversation(rng):
            if left > 0:
                record = _record(rng, SUMMARY if summary else SUPPORT, exchange, clock)
                yield record
                clock += record["latency_s"] + rng.uniform(1, 20)
                left -= 1


def main(argv: Sequence[str] | None = None) -> int:
    """Write sample traffic as JSON lines."""
    parser = argparse.ArgumentParser(prog="python -m experiments.sample_traffic", description=__doc__.split("\n")[0])
    parser.add_argument("--records", type=int, default=1000, help="how many records to write (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same records (default: 0)")
    parser.add_argument("--out", default="-", help="JSONL file to write, - for standard output (default: -)")
    parser.add_argument("--workload", choices=("support", "summaries", "both"), default="both", help="default: both")
    parser.add_argument(
        "--start", default=START.isoformat(), help="ISO time of the first record (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    if options.records < 0:
        parser.error("--records is negative")
    try:
        start = datetime.fromisoformat(options.start)
    except ValueError:
        parser.error(f"--start {options.start!r} is not an ISO 8601 time such as 2026-09-01T08:00:00Z")
    start = start if start.tzinfo else start.replace(tzinfo=UTC)
    lines = (
        json.dumps(record, ensure_ascii=False) + "\n"
        for record in generate(options.records, options.seed, options.workload, start)
    )
    try:
        if options.out == "-":
            sys.stdout.writelines(lines)
            sys.stdout.flush()
        else:
            with Path(options.out).open("w", encoding="utf-8") as file:
                file.writelines(lines)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"cannot write {options.out}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
