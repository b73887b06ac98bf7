"""The sample traffic: what it promises to those fed with it, and its teacher and server."""

from __future__ import annotations

import itertools
import json
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest
from starlette.testclient import TestClient

from experiments import sample_teacher, sample_traffic
from experiments.sample_grammar import PARAMETERS, missing, phrases
from experiments.sample_phrases import ASKS, CHAT, UNSURE
from experiments.sample_traffic import TOOLS, answer, generate
from flywheel_ray.records import Record, parse_line
from tests.servers import serving

Message = dict[str, Any]


@pytest.fixture(scope="module")
def support() -> list[dict[str, Any]]:
    return list(generate(2000, seed=5, workload="support"))


def message_of(record: dict[str, Any]) -> Message:
    return record["response"]["choices"][0]["message"]


def ask(*said: str, tools: Any = TOOLS) -> Message:
    """The teacher's answer; `said` alternates between user and assistant."""
    roles = itertools.cycle(("user", "assistant"))
    return answer([{"role": role, "content": text} for role, text in zip(roles, said, strict=False)], tools)


def calls_of(message: Message) -> list[tuple[str, dict[str, Any]]]:
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    return [(function["name"], json.loads(function["arguments"])) for function in functions]


# ── the records ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("workload", ["support", "summaries", "both"])
def test_same_seed_same_records_and_a_longer_run_begins_with_the_shorter(workload: str) -> None:
    def lines(records: int, seed: int) -> list[str]:
        return [json.dumps(record) for record in generate(records, seed, workload)]

    assert lines(150, 7) == lines(150, 7) == lines(400, 7)[:150]
    assert lines(150, 7) != lines(150, 8)


def test_every_line_is_a_record_of_the_teacher_in_order_of_time() -> None:
    records = [parse_line(json.dumps(record)) for record in generate(1000, seed=1)]
    assert all(isinstance(record, Record) and record.served_by == "teacher" for record in records)
    parsed = [record for record in records if isinstance(record, Record)]
    assert Counter(r.workload_id for r in parsed).keys() == {"support.assistant", "tickets.summary"}
    assert all(one.timestamp < two.timestamp for one, two in itertools.pairwise(parsed))
    assert all(0.6 <= (r.completion.latency_s or 0) <= 2.5 for r in parsed)
    assert all((r.completion.prompt_tokens or 0) > 0 and (r.completion.completion_tokens or 0) > 0 for r in parsed)
    assert len({r.id for r in parsed}) == 1000


def test_arguments_fit_the_schemas(support: list[dict[str, Any]]) -> None:
    used: Counter[str] = Counter()
    for record in support:
        for name, values in calls_of(message_of(record)):
            jsonschema.validate(values, PARAMETERS[name])
            assert values.keys() <= PARAMETERS[name]["properties"].keys()
            used.update([name])
    assert used.keys() == {tool["function"]["name"] for tool in TOOLS}
    assert min(used.values()) > 50
    kinds = {kind["type"] for schema in PARAMETERS.values() for kind in schema["properties"].values()}
    assert kinds == {"string", "integer", "number", "boolean", "array"}


def test_shares_of_turns_and_abstentions(support: list[dict[str, Any]]) -> None:
    canned = {reply for reply, _ in CHAT.values()}
    share = Counter[str]()
    for record in support:
        messages, message = record["request"]["messages"], message_of(record)
        share["single turn"] += len(messages) == 2
        share["abstention"] += message["content"] in canned
        share["question"] += message["content"] in ASKS.values()
        share["parallel"] += len(calls_of(message)) > 1
        share["after a tool"] += messages[-1]["role"] == "tool"
    assert 0.70 <= share["single turn"] / 2000 <= 0.76
    assert 0.12 <= share["abstention"] / 2000 <= 0.16
    assert 0.03 <= share["question"] / 2000 <= 0.08
    assert 0.02 <= share["parallel"] / 2000 <= 0.05
    assert share["after a tool"] > 100


def test_customers_differ() -> None:
    texts = [record["request"]["messages"][1]["content"] for record in generate(1000, seed=2, workload="support")]
    assert len(set(texts)) > 650  # a conversation repeats its first message; small talk repeats itself
    ways = Counter(p.about for p in phrases() if not p.then and not missing(p.about, dict.fromkeys(p.slots)))
    assert len(ways) == 10 and min(ways.values()) >= 12


# ── the teacher ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", [0, 1])
def test_the_teacher_reads_out_of_the_words_what_was_meant(seed: int) -> None:
    for record in generate(3000, seed):
        request = record["request"]
        assert answer(request["messages"], request.get("tools")) == message_of(record), request["messages"][1:]


def test_the_teacher_understands_words_nobody_generated() -> None:
    text = "Good morning! First of all, great shop. Sadly I have to tell you: i wnat to cancel order b7712, pls. OK?"
    assert calls_of(ask(text)) == [("cancel_order", {"order_id": "B7712"})]
    split = "It's about B7712, the one from last week. Where is my order? I look forward to your reply."
    assert calls_of(ask(split)) == [("track_package", {"order_id": "B7712"})]


def test_the_teacher_asks_for_what_is_missing_until_it_has_it() -> None:
    said = ["How do I return my order?"]
    for slot, reply in (("order_id", "A1043, I think"), ("problem", "it's too small")):
        assert ask(*said)["content"] == ASKS[slot]
        said += [ASKS[slot], reply]
    assert calls_of(ask(*said)) == [("start_return", {"order_id": "A1043", "problem": "wrong_size"})]
    assert calls_of(ask(*said[:2], "Actually, track B2222")) == [("track_package", {"order_id": "B2222"})]


@pytest.mark.parametrize(
    "text", ["", "my hovercraft is full of eels", "42", "{order_id}", "İ" * 50, "$" * 5000, "A1043"]
)
def test_the_teacher_does_not_guess(text: str) -> None:
    assert ask(text) == {"role": "assistant", "content": UNSURE}


def test_the_teacher_calls_only_offered_tools() -> None:
    offered = [tool for tool in TOOLS if tool["function"]["name"] != "cancel_order"]
    assert not calls_of(ask("cancel order A1043", tools=offered))


# ── the server ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with serving(sample_teacher.app()) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def streamed(client: openai.OpenAI, request: dict[str, Any]) -> tuple[Message, str | None, Any]:
    """The message put together from a stream, its finish reason and usage."""
    text, calls, finish, usage = "", dict[int, dict[str, Any]](), None, None
    for chunk in client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            finish = choice.finish_reason or finish
            text += choice.delta.content or ""
            for delta in choice.delta.tool_calls or ():
                call = calls.setdefault(delta.index, {"type": "function", "function": {"name": "", "arguments": ""}})
                call["id"] = delta.id or call["id"]
                call["function"]["name"] += delta.function.name or ""
                call["function"]["arguments"] += delta.function.arguments or ""
    message: Message = {"role": "assistant", "content": text or None}
    return message | ({"tool_calls": list(calls.values())} if calls else {}), finish, usage


def test_the_openai_client_gets_the_recorded_answers_whole_and_streamed(client: openai.OpenAI) -> None:
    for record in generate(60, seed=3):
        request, recorded = record["request"], record["response"]
        whole = client.chat.completions.create(**request)
        assert whole.choices[0].message.model_dump(exclude_none=True) == {
            name: value for name, value in message_of(record).items() if value is not None
        }
        assert whole.usage is not None and whole.usage.model_dump(exclude_none=True) == recorded["usage"]
        message, finish, usage = streamed(client, request)
        assert message == message_of(record)
        assert finish == whole.choices[0].finish_reason == recorded["choices"][0]["finish_reason"]
        assert usage.total_tokens == whole.usage.total_tokens


def test_models_choices_and_errors_have_openais_shape(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [sample_traffic.MODEL]
    hello: list[Any] = [{"role": "user", "content": "hello"}]
    assert len(client.chat.completions.create(model="any", messages=hello, n=3).choices) == 3
    bad: list[Any] = [{"role": "wizard", "content": "hello"}]
    with pytest.raises(openai.BadRequestError, match="role") as caught:
        client.chat.completions.create(model="any", messages=bad)
    assert caught.value.param == "messages" and caught.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="any", input="hello")


def test_tool_choice_none_gives_text(client: openai.OpenAI) -> None:
    where: list[Any] = [{"role": "user", "content": "where is order A1043?"}]
    reply = client.chat.completions.create(model="any", messages=where, tools=TOOLS, tool_choice="none")  # type: ignore[arg-type]
    assert reply.choices[0].message.content and not reply.choices[0].message.tool_calls


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b'{"model": "m"}',
        b'{"model": "m", "messages": []}',
        b'{"model": "m", "messages": [{"role": "user", "content": 3}]}',
        b'{"model": "m", "messages": [{"role": "assistant", "tool_calls": [{}]}]}',
        b'{"model": "m", "messages": [{"role": "user", "content": "hi"}], "tools": [{}]}',
        b'{"model": "m", "messages": [{"role": "user", "content": "hi"}], "n": 0}',
    ],
)
def test_bad_requests_are_refused(body: bytes) -> None:
    reply = TestClient(sample_teacher.app()).post("/v1/chat/completions", content=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == "invalid_request_error"


def test_latency_and_failures_can_be_added() -> None:
    client = TestClient(sample_teacher.app(latency_s=0.05, fail_rate=0.5))
    body = {"model": "any", "messages": [{"role": "user", "content": "hello"}]}
    started = time.monotonic()
    statuses = Counter(client.post("/v1/chat/completions", json=body).status_code for _ in range(20))
    assert time.monotonic() - started >= 20 * 0.05
    assert statuses.keys() == {200, 500}
    assert client.get("/healthz").json() == {"status": "ok"}


# ── the commands ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_command_writes_what_generate_gives(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "traffic.jsonl"
    assert sample_traffic.main(["--records", "25", "--seed", "4", "--out", str(path)]) == 0
    assert sample_traffic.main(["--records", "25", "--seed", "4"]) == 0
    written = path.read_text(encoding="utf-8")
    assert written == capsys.readouterr().out
    assert [json.loads(line) for line in written.splitlines()] == list(generate(25, 4))
    assert sample_traffic.main(["--out", str(tmp_path / "no" / "folder.jsonl")]) == 1


def test_a_busy_port_is_one_line_and_exit_code_1() -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        command = [sys.executable, "-m", "experiments.sample_teacher", "--port", str(busy.getsockname()[1])]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert len(ended.stderr.splitlines()) == 1 and "cannot listen on 127.0.0.1" in ended.stderr
