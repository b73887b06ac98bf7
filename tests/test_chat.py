import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flywheel_ray.chat import BadRequest, HttpChat, as_stream, assemble_stream, read_sse, to_sse
from flywheel_ray.errors import ChatError, ChatUnavailable
from flywheel_ray.records import Completion, read_completion
from flywheel_ray.services import ChatPrompt, Generation, Unanswered
from tests.servers import free_port
from tests.upstream import TOOL, Upstream, completion, running


def prompt(text: str = "please route to cards", tools: bool = True) -> ChatPrompt:
    return ChatPrompt(messages=({"role": "user", "content": text},), tools=(TOOL,) if tools else ())


@pytest.fixture(scope="module")
def server():
    with running(Upstream()) as (url, upstream):
        yield url, upstream


@pytest.fixture
def upstream(server):
    url, app = server
    app.reset()
    return url, app


def chat(url: str, **more) -> HttpChat:
    return HttpChat(url, "big", **{"backoff_s": 0.01, "timeout_s": 5, **more})


def test_answers_in_order_with_latency_and_tokens(upstream):
    url, app = upstream
    seen = []
    model = chat(url, generation=Generation(max_tokens=9))
    answers = model.complete([prompt(f"to q{i}") for i in range(20)], seen.append)
    assert [a.tool_calls[0].arguments for a in answers] == [{"queue": f"q{i}"} for i in range(20)]
    assert seen == list(range(1, 21))
    first = answers[0]
    assert (first.prompt_tokens, first.completion_tokens) == (7, 3) and 0 < first.latency_s < 5
    assert app.seen[0]["max_tokens"] == 9 and app.seen[0]["temperature"] == 0 and app.seen[0]["model"] == "big"
    assert chat(url).complete([]) == []


def test_a_url_with_credentials_is_refused_and_not_shown():
    for url in ("http://user:s3cret@127.0.0.1:9/v1", "https://s3cret@host/v1"):
        with pytest.raises(ChatError, match="use api_key_env") as raised:
            chat(url)
        assert "s3cret" not in str(raised.value)
    assert chat("http://host/v1/@team?x=a@b").url == "http://host/v1/@team?x=a@b"


def test_each_answer_is_told_as_soon_as_it_is_there(upstream):
    url, app = upstream
    told = {}
    model = chat(url, concurrency=1, extra_body={"seed": 4})
    answers = model.complete([prompt(), ChatPrompt(messages=()), prompt()], on_answer=told.__setitem__)
    assert [told[i] for i in range(3)] == answers and isinstance(told[1], BadRequest)
    assert all(body["seed"] == 4 for body in app.seen)
    told.clear()
    app.script = [(200, {}), (404, {})]  # the first is no completion, the second says that the rest is of no use
    with pytest.raises(ChatError, match="404"):
        model.complete([prompt()] * 3, on_answer=told.__setitem__)
    assert list(told) == [0]


def test_concurrency_is_bounded(upstream):
    url, app = upstream
    app.delay_s = 0.05
    chat(url, concurrency=3).complete([prompt() for _ in range(12)])
    assert app.most_in_flight == 3


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_may_pass_is_repeated(upstream, status):
    url, app = upstream
    app.script = [(status, {})] * 2
    assert isinstance(chat(url, retries=2).complete([prompt()])[0], Completion)
    assert len(app.seen) == 3


def test_retry_after_is_honoured(upstream):
    url, app = upstream
    app.script = [(429, {"retry-after": "0.3"})]
    started = time.perf_counter()
    chat(url).complete([prompt()])
    assert time.perf_counter() - started >= 0.3


def test_one_refused_prompt_is_unanswered_and_the_others_are_answered(upstream):
    url, _ = upstream
    answers = chat(url).complete([ChatPrompt(messages=()), prompt()])
    assert answers[0] == BadRequest(reason="HTTP 400: too long", status=400)
    assert isinstance(answers[1], Completion)


def test_prompts_all_refused_are_no_error(upstream):
    url, app = upstream
    app.mode = "refuse"
    assert all(isinstance(a, Unanswered) for a in chat(url).complete([prompt(), prompt()]))


def test_malformed_arguments_are_an_answer(upstream):
    url, app = upstream
    app.mode = "arguments"
    assert chat(url).complete([prompt()])[0].tool_calls[0].arguments == '{"queue": '


def test_a_server_error_for_every_prompt_is_unavailable(upstream):
    url, app = upstream
    app.mode = "500"
    with pytest.raises(ChatUnavailable, match=r"chat/completions: HTTP 500 after 2 attempts: boom"):
        chat(url, retries=1).complete([prompt(), prompt()])


def test_a_time_out_is_unanswered_beside_answers(upstream):
    url, app = upstream
    app.mode = "hang"
    with pytest.raises(ChatUnavailable, match=r"no answer within 0\.2 s"):
        chat(url, timeout_s=0.2).complete([prompt()])
    app.script = [(400, {})]
    answers = chat(url, timeout_s=0.2, concurrency=1).complete([prompt(), prompt()])
    assert answers[1] == Unanswered(reason="no answer within 0.2 s")


@pytest.mark.parametrize(("status", "remedy"), [(401, "API key"), (403, "API key"), (404, "/v1")])
def test_a_refused_endpoint_is_an_error_with_its_remedy(upstream, status, remedy):
    url, app = upstream
    app.script = [(status, {})] * 8
    with pytest.raises(ChatError, match=remedy):
        chat(url).complete([prompt()] * 8)


def test_what_is_no_chat_endpoint_is_an_error(upstream):
    url, app = upstream
    app.mode = "garbage"
    with pytest.raises(ChatError, match="no chat completion: <html>"):
        chat(url).complete([prompt()])


def test_nothing_listening_names_the_url_and_the_remedy():
    url = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(ChatUnavailable, match=f"{url}.*check that the server runs"):
        chat(url, retries=1).complete([prompt()] * 3)
    with pytest.raises(ChatError, match="http://host"):
        chat("localhost:8000").complete([prompt()])


def test_the_key_comes_from_the_environment_by_name(upstream, monkeypatch):
    url, app = upstream
    monkeypatch.setenv("SOME_KEY", "s3cret")
    chat(url, api_key_env="SOME_KEY").complete([prompt()])
    assert app.headers[0]["authorization"] == "Bearer s3cret"
    monkeypatch.delenv("SOME_KEY")
    with pytest.raises(ChatError, match="SOME_KEY"):
        chat(url, api_key_env="SOME_KEY").complete([prompt()])


TEXTS = st.text(st.characters(codec="utf-8"), max_size=20)


@given(TEXTS, st.lists(st.tuples(TEXTS, st.dictionaries(TEXTS, TEXTS, max_size=2)), max_size=3))
def test_streaming_a_completion_and_assembling_it_gives_it_back(text, calls):
    tool_calls = [
        {"id": f"c{i}", "type": "function", "function": {"name": n, "arguments": json.dumps(a)}}
        for i, (n, a) in enumerate(calls)
    ]
    whole = completion({"messages": [{"role": "user", "content": "x"}]})
    whole["choices"][0]["message"] = {"role": "assistant", "content": text}
    if tool_calls:
        whole["choices"][0]["message"]["tool_calls"] = tool_calls
    again = assemble_stream(read_sse(to_sse(as_stream(whole, include_usage=True))))
    assert read_completion(again) == read_completion(whole)
    assert again["usage"] == whole["usage"]


def test_argument_fragments_of_interleaved_calls_are_joined():
    def part(index, arguments, **more):
        call = {"index": index, "function": {"arguments": arguments, **more}}
        return {"choices": [{"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": None}]}

    chunks = [part(0, "", name="a"), part(1, "", name="b"), part(0, '{"x"'), part(1, '{"y":2}'), part(0, ":1}")]
    found = read_completion(assemble_stream(chunks))
    assert [(c.name, c.arguments) for c in found.tool_calls] == [("a", {"x": 1}), ("b", {"y": 2})]
    assert found.finish_reason is None


def test_broken_streams_assemble_to_what_was_there():
    assert assemble_stream([])["choices"] == []
    assert assemble_stream([{"error": {"message": "x"}}])["choices"] == []
    broken = b'data: {"choices": [{"delta": {"content": "a"}}]}\r\n\r\n: comment\ndata: {"cho'
    assert assemble_stream(read_sse(broken))["choices"][0]["message"]["content"] == "a"
