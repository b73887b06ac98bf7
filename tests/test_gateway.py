"""The gateway over real sockets: quickly in this process, and (slow) as it is deployed, on Ray Serve."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from starlette.requests import Request

from flywheel_ray.candidates import Candidate, Lora, ZeroShot
from flywheel_ray.errors import ChatError, GatewayError, PlatformError, StoreUnavailable
from flywheel_ray.records import TEACHER, Completion, Record
from flywheel_ray.rollout import Rollout, UrlTarget, assign, report, unit_of
from flywheel_ray.services import LogQuery, Unanswered
from flywheel_ray.stores import open_store
from serve import app, student
from serve.gateway import METRICS, Gateway
from serve.log_writer import LogWriter
from serve.student import StudentSpec
from tests.elastic import NoidaDb
from tests.servers import free_port
from tests.upstream import TOOL, Upstream, running

pytestmark = pytest.mark.slow

MESSAGES = [{"role": "user", "content": "route me to cards"}]


def rollout(teacher: str, arms: dict[str, dict[str, Any]], **more: Any) -> Rollout:
    listed = [
        {"name": n, "target": {"type": "url", "url": a.pop("url")}, "timeout_s": 1, **a}
        for n, a in ((n, dict(a)) for n, a in arms.items())
    ]
    basis = {"type": "rollout", "name": "r", "client_id": "acme", "workload_id": "support", "teacher": {"url": teacher}}
    return Rollout.model_validate({**basis, "arms": listed, **more})


class _InProcess:
    """The gateway as an ASGI app, built in the server's event loop."""

    def __init__(self, config: Rollout, store: str, spool: Path) -> None:
        self.config, self.store, self.spool = config, store, spool
        self.gateway: Gateway

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            targets = {arm.name: arm.target for arm in self.config.arms}
            self.gateway = Gateway(self.config, self.store, targets, self.spool)
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await self.gateway.close()
            await send({"type": "lifespan.shutdown.complete"})
            return
        await (await self.gateway(Request(scope, receive)))(scope, receive, send)


class Setup:
    """A teacher, an arm, and how to put a gateway before them."""

    def __init__(self, teacher: tuple[str, Upstream], arm: tuple[str, Upstream], folder: Path) -> None:
        self.store, self.spool = str(folder / "logs.db"), folder / "spool"
        (self.teacher_url, self.teacher), (self.arm_url, self.arm) = teacher, arm

    @contextlib.contextmanager
    def gateway(self, teacher: dict[str, Any] | None = None, **arm: Any) -> Iterator[httpx.Client]:
        config = rollout(self.teacher_url, {"student": {"url": self.arm_url, **arm}})
        if teacher:
            config = Rollout.model_validate({**config.model_dump(), "teacher": {"url": self.teacher_url, **teacher}})
        self.config = config
        with (
            running(_InProcess(config, self.store, self.spool), lifespan="on") as (url, _),
            httpx.Client(base_url=url) as client,
        ):
            self.url = url
            yield client

    def records(self) -> list[Record]:
        with contextlib.closing(open_store(self.store)) as store:
            return list(store.scan(LogQuery()))


@pytest.fixture(scope="module")
def servers() -> Iterator[list[tuple[str, Upstream]]]:
    with running(Upstream()) as teacher, running(Upstream()) as arm:
        yield [teacher, arm]


@pytest.fixture
def setup(servers: list[tuple[str, Upstream]], tmp_path: Path) -> Setup:
    for _, upstream in servers:
        upstream.reset()
    return Setup(*servers, tmp_path)


def ask(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post("/chat/completions", json={"model": "m", "messages": MESSAGES, "tools": [TOOL], **body})


def logged(setup: Setup) -> dict[str, Any]:
    return httpx.get(setup.url.removesuffix("/v1") + METRICS).json()["log"]


def until(condition: Any, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


# ── in this process ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_body_reaches_the_teacher_byte_by_byte_and_the_answer_comes_back(setup):
    raw = b'{ "messages": [{"role":"user","content":"Hi \\u00e9"}],   "model":"m", "x_unknown": [1.0, {"a": null}] }'
    with setup.gateway() as client:
        answer = client.post(
            "/chat/completions", content=raw, headers={"authorization": "Bearer mine", "cookie": "c=1"}
        )
    assert setup.teacher.raw == [raw]
    assert setup.teacher.headers[0]["authorization"] == "Bearer mine" and "cookie" not in setup.teacher.headers[0]
    assert answer.json()["choices"][0]["message"]["content"] == "Hello there!"
    assert answer.headers["x-flywheel-served-by"] == TEACHER and answer.headers["content-type"] == "application/json"
    (record,) = setup.records()
    assert record.exchange_id == answer.headers["x-flywheel-exchange-id"]
    assert (record.served_by, record.rollout, record.arm, record.shadow) == (TEACHER, "r", None, False)
    assert record.request["x_unknown"] == [1.0, {"a": None}]
    assert record.completion.latency_s > 0 and record.completion.completion_tokens == 3


@pytest.mark.skipif(NoidaDb.program() is None, reason="needs noida-db")
def test_an_outage_of_elasticsearch_delays_nobody_and_loses_nothing(setup, tmp_path):
    """The server goes while requests are answered, one gateway shuts down meanwhile, and the next one replays."""
    with NoidaDb(tmp_path / "noida") as server:
        setup.store = f"{server.url}/logs"
        with setup.gateway() as client:
            served = [ask(client).headers["x-flywheel-exchange-id"] for _ in range(5)]
            until(lambda: logged(setup)["written"] == 5)
            server.stop()
            started = time.monotonic()
            served += [ask(client).headers["x-flywheel-exchange-id"] for _ in range(40)]
            assert time.monotonic() - started < 5
            until(lambda: logged(setup)["queued"] == 0)
            assert logged(setup)["spooled_bytes"] > 0
        with setup.gateway() as client:
            served += [ask(client).headers["x-flywheel-exchange-id"] for _ in range(5)]
            server.start()
            until(lambda: logged(setup)["spooled_bytes"] == 0)
        assert sorted(r.exchange_id for r in setup.records()) == sorted(served)


def test_the_configured_model_and_key_replace_the_clients(setup, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", "ours")
    with setup.gateway(teacher={"model": "big-2", "api_key_env": "TEACHER_KEY"}, shadow=1.0) as client:
        client.headers["authorization"] = "Bearer mine"
        ask(client)
        until(lambda: setup.arm.headers)
    assert setup.teacher.seen[0]["model"] == "big-2" and setup.teacher.seen[0]["tools"] == [TOOL]
    assert setup.teacher.headers[0]["authorization"] == "Bearer ours"
    assert "authorization" not in setup.arm.headers[0]
    assert setup.records()[0].request["model"] == "m"


def test_tags_come_from_headers_then_metadata_then_the_rollout(setup):
    with setup.gateway() as client:
        ask(client)
        ask(client, metadata={"client_id": "m-client", "workload_id": 7})
        client.post("/chat/completions", json={"messages": MESSAGES, "metadata": {"client_id": "m"}},
                    headers={"x-client-id": "h-client", "x-workload-id": "h-load", "x-user-id": "ann"})  # fmt: skip
    found = [(r.client_id, r.workload_id, r.request.get("user")) for r in setup.records()]
    assert found == [("acme", "support", None), ("m-client", "support", None), ("h-client", "h-load", "ann")]


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("POST", "/chat/completions", b"{nope", 400),
        ("POST", "/chat/completions", b"[1]", 400),
        ("POST", "/chat/completions", b'{"a": NaN}', 400),
        ("POST", "/chat/completions", b"\xff", 400),
        ("POST", "/chat/completions", b"[" * 100_000, 400),
        ("POST", "/completions", b"{}", 404),
        ("GET", "/chat/completions", b"", 405),
    ],
)
def test_wrong_requests_are_answered_in_openais_shape(setup, method, path, content, status):
    with setup.gateway() as client:
        answer = client.request(method, path, content=content)
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert setup.teacher.seen == []


def test_other_routes(setup):
    with setup.gateway() as client:
        root = setup.url.removesuffix("/v1")
        assert client.get("/models").json()["data"][0]["id"] == "big"
        assert client.get(f"{root}/healthz").json() == {"status": "ok"}
        ask(client)
        status = client.get(f"{root}/metrics.json").json()
    assert status["requests"] == 1
    assert status["teacher"] == {"requests": 1, "answered": 1, "dropped": {}, "failed": {}}


def test_the_teachers_refusal_passes_through_and_is_no_training_data(setup):
    with setup.gateway(shadow=1.0) as client:
        refused = ask(client, messages=[])
        setup.teacher.script = [(429, {"retry-after": "7"})]
        limited = ask(client)
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "context_length_exceeded"
    assert limited.status_code == 429 and limited.headers["retry-after"] == "7"
    assert [r.error for r in setup.records()] == ["http_429"]  # a request without messages is no record
    assert setup.arm.seen == []


def test_a_teacher_that_is_away_is_502_and_one_that_hangs_is_504(setup):
    setup.teacher.mode = "hang"
    with setup.gateway(teacher={"timeout_s": 0.3}) as client:
        hanging = ask(client)
    with setup.gateway(teacher={"url": f"http://127.0.0.1:{free_port()}/v1"}) as client:
        away = ask(client)
        assert client.get("/models").status_code == 502
    assert (hanging.status_code, away.status_code) == (504, 502)
    assert hanging.json()["error"]["code"] == "timeout" and away.json()["error"]["code"] == "connection"
    assert [r.error for r in setup.records()] == ["timeout", "connection"]


def test_streams_pass_piece_by_piece_and_are_logged_whole(setup):
    setup.teacher.mode = "slow_stream"
    with setup.gateway(shadow=1.0) as client:
        arrived = []
        body = {"messages": MESSAGES, "tools": [TOOL], "stream": True}
        with client.stream("POST", "/chat/completions", json=body) as answer:
            for piece in answer.iter_raw():
                arrived.append((time.perf_counter(), piece))
        until(lambda: setup.arm.seen)
    assert len(arrived) >= 3 and arrived[-1][0] - arrived[0][0] > 0.25
    with httpx.stream("POST", f"{setup.teacher_url}/chat/completions", json=body) as direct:
        assert b"".join(p for _, p in arrived) == direct.read()
    assert answer.headers["content-type"].startswith("text/event-stream")
    teacher, shadow = sorted(setup.records(), key=lambda r: r.shadow)
    assert teacher.completion.tool_calls[0].arguments == {"queue": "cards"} == shadow.completion.tool_calls[0].arguments
    assert teacher.completion.finish_reason == "tool_calls"
    assert setup.arm.seen[0]["stream"] is False


@pytest.mark.parametrize(("mode", "error"), [("cut_stream", "incomplete"), ("broken_stream", "connection")])
def test_a_stream_that_ends_early_is_no_training_data(setup, mode, error):
    setup.teacher.mode = mode
    with setup.gateway(shadow=1.0) as client:
        answer = ask(client, stream=True)
    assert answer.status_code == 200
    assert ("stream broke off" in answer.text) == (mode == "broken_stream")
    (record,) = setup.records()
    assert (record.error, record.completion.text) == (error, "")


def test_a_client_that_leaves_a_stream_is_noted(setup):
    setup.teacher.mode = "slow_stream"
    with setup.gateway(shadow=1.0) as client:
        with client.stream("POST", "/chat/completions", json={"messages": MESSAGES, "stream": True}) as answer:
            next(answer.iter_raw())
        time.sleep(0.5)
    assert [r.error for r in setup.records()] == ["client_closed"]


def test_shadows_pair_with_the_teacher(setup):
    setup.arm.mode = "other"
    with setup.gateway(shadow=1.0) as client:
        for i in range(10):
            ask(client, messages=[{"role": "user", "content": f"to q{i}"}])
        until(lambda: len(setup.arm.seen) == 10)
    arm = report(setup.config, setup.records()).arm("student")
    assert (arm.copies, arm.pairs, arm.answered) == (10, 10, 10)
    assert arm.agreement["function_name_accuracy"].sequence.estimate == 1
    assert arm.agreement["function_name_and_args_accuracy"].sequence.estimate == 0
    assert arm.latency.n == 10 and (arm.tokens.teacher, arm.tokens.arm) == (3, 3)


@pytest.mark.parametrize(
    ("mode", "error"), [("500", "http_500"), ("garbage", "bad_response"), ("hang", "timeout"), ("refuse", "http_400")]
)
def test_a_bad_shadow_is_logged_and_nobody_notices(setup, mode, error):
    setup.arm.mode = mode
    with setup.gateway(shadow=1.0, timeout_s=0.3) as client:
        assert ask(client).status_code == 200
        until(lambda: client.get(setup.url.removesuffix("/v1") + "/metrics.json").json()["log"]["written"] == 2)
    teacher, shadow = sorted(setup.records(), key=lambda r: r.shadow)
    assert (teacher.error, shadow.error, shadow.served_by) == (None, error, "student")


def test_malformed_arguments_of_a_shadow_are_kept(setup):
    setup.arm.mode = "arguments"
    with setup.gateway(shadow=1.0) as client:
        ask(client)
        until(lambda: setup.arm.seen)
        time.sleep(0.1)
    shadow = next(r for r in setup.records() if r.shadow)
    assert shadow.error is None and shadow.completion.tool_calls[0].arguments == '{"queue": '


def test_a_full_queue_drops_and_what_waits_at_the_end_is_shut_down(setup):
    setup.arm.mode = "hang"
    with setup.gateway(shadow=1.0, timeout_s=30, queue=3, workers=2) as client:
        for _ in range(10):
            assert ask(client).status_code == 200
    arm = report(setup.config, setup.records()).arm("student")
    assert arm.drops == {"queue_full": 5, "shutdown": 5} and arm.copies == 10


def test_the_assigned_arm_answers_and_stays(setup):
    with setup.gateway(weight=0.5, shadow=1.0) as client:
        for i in range(40):
            messages = [{"role": "user", "content": f"to q{i % 20}"}]
            served = ask(client, messages=messages, stream=i % 2 == 0).headers["x-flywheel-served-by"]
            assert served == assign(setup.config, unit_of(setup.config, "acme", "support", {"messages": messages}))
    found = report(setup.config, setup.records())
    arm = found.arm("student")
    assert found.exchanges == 40 and found.teacher_requests + arm.live_requests == 40
    assert arm.copies == found.teacher_requests  # only the teacher's requests are copied
    assert set(found.units) == {"student", TEACHER}


def test_an_arm_answers_streams_in_openais_shape(setup):
    with setup.gateway(weight=1.0):
        client = openai.OpenAI(base_url=setup.url, api_key="k", max_retries=0)
        asked = {"model": "m", "messages": MESSAGES, "tools": [TOOL], "stream_options": {"include_usage": True}}
        chunks = list(client.chat.completions.create(stream=True, **asked))
    assert chunks[0].choices[0].delta.tool_calls[0].function.arguments == '{"queue": "cards"}'
    assert chunks[1].choices[0].finish_reason == "tool_calls" and chunks[-1].usage.completion_tokens == 3
    assert "stream_options" not in setup.arm.seen[0]


@pytest.mark.parametrize(
    ("mode", "error"),
    [("500", "http_500"), ("garbage", "bad_response"), ("hang", "timeout"), ("arguments", "bad_arguments")],
)
def test_the_teacher_stands_in_for_an_arm_that_fails(setup, mode, error):
    setup.arm.mode = mode
    with setup.gateway(weight=1.0, shadow=1.0, timeout_s=0.3) as client:
        answer = ask(client)
    assert (answer.status_code, answer.headers["x-flywheel-served-by"]) == (200, TEACHER)
    found = sorted((r.served_by, r.error) for r in setup.records())
    assert found == [("student", error), (TEACHER, None)]
    summary = report(setup.config, setup.records())
    assert summary.arm("student").live_failures == {error: 1} and summary.teacher_requests == 0


def test_a_missing_key_is_said_at_once(setup, tmp_path):
    target = UrlTarget(url=setup.arm_url, api_key_env="NO_SUCH_KEY")
    config = rollout(setup.teacher_url, {"student": {"url": setup.arm_url}})
    with pytest.raises(ChatError, match="NO_SUCH_KEY"):
        Gateway(config, str(tmp_path / "x.db"), {"student": target})


# ── the log ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def hit(i: int) -> dict[str, Any]:
    message = {"role": "assistant", "content": "x"}
    return {"client_id": "a", "workload_id": "b", "timestamp": float(i), "request": {"messages": MESSAGES},
            "response": {"choices": [{"message": message}]}, "exchange_id": f"e{i}"}  # fmt: skip


class Moody:
    """A real store that does not answer its first calls."""

    def __init__(self, url: str, failures: list[int]) -> None:
        self._store, self._failures = open_store(url), failures

    def append(self, records: Any) -> Any:
        if self._failures[0] > 0:
            self._failures[0] -= 1
            raise StoreUnavailable("away for a moment")
        return self._store.append(records)

    def close(self) -> None:
        self._store.close()


def test_a_store_that_is_away_for_a_moment_loses_nothing(tmp_path):
    failures = [3]
    log = LogWriter(str(tmp_path / "l.db"), retry_s=0.02, open_store=lambda url: Moody(url, failures))
    for i in range(600):
        log.put(hit(i))
    log.close()
    assert failures == [0]
    assert (log.status()["written"], log.status()["lost"], log.status()["queued"]) == (600, 0, 0)


def test_what_cannot_be_kept_is_counted_and_never_blocks(tmp_path):
    log = LogWriter(str(tmp_path / "l.db"), capacity=10, retry_s=0.02, open_store=lambda url: Moody(url, [10**9]))
    started = time.perf_counter()
    for i in range(100):
        log.put(hit(i))
    assert time.perf_counter() - started < 0.5
    log.close(timeout_s=0.3)
    status = log.status()
    assert status["dropped"] + status["lost"] == 100 and status["written"] == 0
    assert "away for a moment" in status["last_error"]


def test_an_idle_log_is_written_within_half_a_second(tmp_path):
    log = LogWriter(str(tmp_path / "l.db"))
    log.put(hit(1))
    until(lambda: log.status()["written"] == 1, 0.5)
    log.put({"nonsense": True})
    log.put(hit(2) | {"response": {"odd": 1}})
    log.close()
    assert (log.status()["rejected"], log.status()["written"]) == (1, 2)
    with contextlib.closing(open_store(str(tmp_path / "l.db"))) as store:
        assert [r.error for r in store.scan(LogQuery())] == [None, "bad_response"]


# ── what is wrong before anything starts ──────────────────────────────────────────────────────────────────────────────


SPEC = StudentSpec(candidate=Candidate(model="smollm2-135m", adaptation=ZeroShot()), platform_root="/nowhere")


@pytest.mark.parametrize(
    ("students", "said"),
    [
        ({}, "no trial was found"),
        ({"student": SPEC.model_copy(update={"adapter": "/no/such/adapter"})}, "no adapter at /no/such/adapter"),
        ({"student": SPEC, "other": SPEC}, "'other' is no arm"),
    ],
)
def test_students_that_cannot_be_hosted(tmp_path, students, said):
    config = rollout("http://127.0.0.1:1/v1", {"student": {"url": "http://x"}})
    arm = config.arms[0].model_dump() | {"target": {"type": "student"}}
    config = Rollout.model_validate({**config.model_dump(), "arms": [arm]})
    with pytest.raises(GatewayError, match=said), app.deployed(config, str(tmp_path / "l.db"), students):
        pass


def test_a_busy_port_is_one_clear_line(setup, tmp_path):
    port = int(setup.arm_url.split(":")[2].split("/")[0])
    config = rollout(setup.teacher_url, {"student": {"url": setup.arm_url}})
    with (
        pytest.raises(GatewayError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"),
        app.deployed(config, str(tmp_path / "l.db"), port=port),
    ):
        pass


# ── on Ray Serve ──────────────────────────────────────────────────────────────────────────────────────────────────────


class EchoModel:
    """Routes by the last word, and tells what it was shown."""

    def complete(self, prompts: Any, on_done: Any = None) -> list[Completion | Unanswered]:
        time.sleep(0.05)
        answers: list[Completion | Unanswered] = []
        for prompt in prompts:
            text = f"{len(prompts)} prompts, {len(prompt.tools)} tools, {len(prompt.messages)} messages, "
            text += os.environ["OMP_NUM_THREADS"] + " threads"
            refused = "refuse" in prompt.messages[-1]["content"]
            answers.append(
                Unanswered(reason="too long")
                if refused
                else Completion(text=text, prompt_tokens=5, completion_tokens=2)
            )
        return answers


@contextlib.contextmanager
def open_echo(spec: StudentSpec) -> Iterator[EchoModel]:
    yield EchoModel()


def open_broken(spec: StudentSpec) -> Any:
    raise PlatformError("there is no such model")


@pytest.fixture(scope="module")
def serve_port() -> Iterator[int]:
    """Ray with Serve in it, listening on this port."""
    import ray
    from ray import serve as ray_serve

    port = free_port()
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield port
    finally:
        ray_serve.shutdown()
        ray.shutdown()


def test_a_hanging_arm_disturbs_nobody_and_every_copy_is_accounted_for(setup, serve_port):
    setup.arm.mode = "hang"
    arm = {"url": setup.arm_url, "shadow": 1.0, "timeout_s": 1, "queue": 16, "workers": 4}
    config = rollout(setup.teacher_url, {"student": arm})
    with app.deployed(config, setup.store, port=serve_port, spool=setup.spool) as urls:
        client = openai.OpenAI(base_url=urls["gateway"], api_key="k", max_retries=0)

        def one(i: int) -> float:
            started = time.perf_counter()
            messages = [{"role": "user", "content": f"to q{i}"}]
            if i % 4 == 0:
                chunks = client.chat.completions.create(model="m", messages=messages, tools=[TOOL], stream=True)
                assert "".join(
                    c.choices[0].delta.tool_calls[0].function.arguments
                    for c in chunks
                    if c.choices and c.choices[0].delta.tool_calls
                ) == json.dumps({"queue": f"q{i}"})
            else:
                answer = client.chat.completions.create(model="m", messages=messages, tools=[TOOL])
                assert json.loads(answer.choices[0].message.tool_calls[0].function.arguments) == {"queue": f"q{i}"}
            return time.perf_counter() - started

        with ThreadPoolExecutor(8) as pool:
            latencies = list(pool.map(one, range(200)))
        assert sorted(latencies)[190] < 1.0
        assert httpx.get(urls["gateway"] + "/nope").status_code == 404
        assert httpx.post(urls["gateway"] + "/chat/completions", content=b"{").status_code == 400
        assert httpx.get(urls["status"]).json()["requests"] == 200
    found = report(config, setup.records())
    arm_report = found.arm("student")
    assert found.exchanges == found.teacher_requests == 200 and found.teacher_errors == {}
    assert arm_report.copies == 200 and arm_report.answered == 0
    assert sum(arm_report.drops.values()) + arm_report.failures["timeout"] == 200
    assert arm_report.drops["queue_full"] > 0 and arm_report.failures["timeout"] >= 4


def test_an_ab_with_a_hosted_student(setup, serve_port, tmp_path):
    """The student answers its users, its refusals fall back, and what it is shown is what it was trained on."""
    import ray.serve

    from serve import gateway

    distilled = Candidate(model="echo", adaptation=Lora(prompt="distilled"))
    spec = StudentSpec(candidate=distilled, platform_root=str(tmp_path), max_batch_size=4, batch_wait_s=0.1)
    ray.serve.run(student.build("s", spec, open_echo), name="student-s", route_prefix="/students/s")
    url = f"http://127.0.0.1:{serve_port}/students/s/v1"
    config = rollout(setup.teacher_url, {"s": {"url": url, "weight": 0.5, "shadow": 1.0, "timeout_s": 5}}, unit="user")
    ray.serve.run(gateway.build(config, setup.store), name="gateway", route_prefix="/")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{serve_port}/v1", api_key="k", max_retries=0)

    def served(i: int, text: str = "hi") -> tuple[str, str, str]:
        messages = [{"role": "user", "content": text}]
        raw = client.chat.completions.with_raw_response.create(
            model="m", messages=messages, tools=[TOOL], user=f"u{i % 20}"
        )
        by = raw.headers["x-flywheel-served-by"]
        return f"u{i % 20}", by, raw.parse().choices[0].message.content

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(served, range(80)))
    by_user = {user: {by for u, by, _ in answers if u == user} for user, _, _ in answers}
    assert all(len(by) == 1 for by in by_user.values())
    assert {by for bys in by_user.values() for by in bys} == {"s", TEACHER}
    said = Counter(text for _, by, text in answers if by == "s")
    assert all("0 tools, 1 messages, 1 threads" in text for text in said)
    assert max(int(text.split()[0]) for text in said) > 1  # requests that came together were one batch
    mine = next(user for user, by in by_user.items() if by == {"s"})
    assert served(int(mine[1:]), "refuse this")[1] == TEACHER
    chunks = httpx.post(f"{url}/chat/completions", json={"messages": MESSAGES, "stream": True}).text
    assert chunks.count("data: ") == 3 and chunks.endswith("data: [DONE]\n\n")
    assert httpx.post(f"{url}/chat/completions", json={"messages": []}).status_code == 400
    assert httpx.post(f"{url}/chat/completions", json={"messages": 3}).status_code == 400
    assert httpx.get(f"{url}/models").json()["data"][0]["id"] == "s"
    ray.serve.delete("gateway")
    ray.serve.delete("student-s")
    found = report(config, setup.records())
    arm = found.arm("s")
    assert arm.live_failures == {"http_400": 1}
    assert found.exchanges == 81 and arm.copies == found.teacher_requests
    assert arm.live_requests == 1 + sum(by == "s" for _, by, _ in answers)


def test_sigterm_flushes_the_log(setup, tmp_path):
    setup.arm.mode = "hang"
    config = rollout(setup.teacher_url, {"student": {"url": setup.arm_url, "shadow": 1.0, "timeout_s": 60}})
    (tmp_path / "rollout.json").write_text(config.model_dump_json())
    port = free_port()
    code = (
        "import pathlib, sys; from serve.app import run; from flywheel_ray.rollout import Rollout; "
        "run(Rollout.model_validate_json(pathlib.Path(sys.argv[1]).read_text()), sys.argv[2], port=int(sys.argv[3]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "rollout.json"), setup.store, str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        lines = iter(process.stdout.readline, "")
        assert any(f"http://127.0.0.1:{port}/v1" in line for line in lines)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}/v1") as client:
            for _ in range(20):
                assert ask(client).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    arm = report(config, setup.records()).arm("student")
    assert arm.copies == 20 and arm.drops == {"shutdown": 20}


def test_what_keeps_a_student_from_starting_is_said_in_one_line(serve_port):
    said = "^student-broken did not start: PlatformError: there is no such model$"
    with pytest.raises(GatewayError, match=said):
        app._deploy(student.build("broken", SPEC, open_broken), "student-broken", "/students/broken", [])


def test_a_store_is_the_same_file_in_every_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert app._absolute("runs/l.db") == f"{tmp_path}/runs/l.db"
    assert app._absolute("sqlite:///runs/l.db") == f"sqlite:///{tmp_path}/runs/l.db"
    assert app._absolute("sqlite:////runs/l.db") == "sqlite:////runs/l.db"
    assert app._absolute("http://es:9200/logs") == "http://es:9200/logs"


def test_a_replicas_traceback_becomes_one_line():
    text = (
        "The replica failed\n  File x\nOSError: below\n\nflywheel_ray.errors.StoreUnavailable: it is away: try later\n"
    )
    assert app._cause(text) == "StoreUnavailable: it is away: try later"
    assert app._cause("Deploying failed\n") == "Deploying failed"
