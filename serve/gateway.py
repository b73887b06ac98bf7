"""The gateway: an OpenAI-compatible server before the teacher that compares arms with it on live traffic.

    app = build(rollout, "sqlite:///runs/logs.db", {"student": UrlTarget(url="http://127.0.0.1:8000/students/student/v1")})
    ray.serve.run(app, name="gateway", route_prefix="/")
    OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="…").chat.completions.create(…)

The teacher's requests and answers pass through unchanged. Where an assigned arm fails, the teacher
answers; a shadow gets its copy after the answer, from a bounded queue. Every completion and every failure is logged.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import httpx
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from flywheel_ray.chat import as_stream, assemble_stream, auth_header, error_body, read_sse, to_sse
from flywheel_ray.records import TEACHER
from flywheel_ray.rollout import CLIENT_CLOSED, DROPS, Arm, Rollout, UrlTarget, assign, shadowed, unit_of, user_of
from serve.arms import Answer, ArmClient, Exchange, ShadowLane, well_formed
from serve.log_writer import LogWriter

CHAT, MODELS = "/v1/chat/completions", "/v1/models"
HEALTH, METRICS = "/healthz", "/metrics.json"
_METHODS = {CHAT: "POST", MODELS: "GET", HEALTH: "GET", METRICS: "GET"}

# Headers that belong to one connection, or that httpx and the server write themselves.
_HOP = frozenset(("connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "proxy-authorization"))
_NOT_SENT = _HOP | frozenset(("host", "content-length", "accept-encoding", "cookie", "expect"))
_CREDENTIALS = frozenset(("authorization", "api-key", "x-api-key"))
_NOT_RETURNED = _HOP | frozenset(("content-length", "content-encoding", "date", "server", "set-cookie"))


class Gateway:
    """One replica. Built inside a running event loop; `__call__` answers one HTTP request."""

    def __init__(
        self, rollout: Rollout, store_url: str, targets: Mapping[str, UrlTarget], spool: Path | None = None
    ) -> None:
        """
        Args:
            rollout: who gets what.
            store_url: where completions are logged.
            targets: where each arm answers, by arm name.
            spool: folder where they wait for the store; None lets them wait in memory, which an outage may overflow.

        Raises:
            StoreError, ChatError: the store cannot be used, or an API key is not in the environment.
        """
        self._rollout = rollout
        self._counts: Counter[tuple[str, str, str]] = Counter()
        self._teacher_key = auth_header(rollout.teacher.api_key_env, rollout.teacher.url)
        self._teacher = httpx.AsyncClient(
            timeout=httpx.Timeout(rollout.teacher.timeout_s, connect=min(10.0, rollout.teacher.timeout_s)),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=100, keepalive_expiry=2.0),
        )
        self._arms = {arm.name: ArmClient(arm, targets[arm.name]) for arm in rollout.arms}
        self._log = LogWriter(store_url, spool=spool)
        self._lanes = {arm.name: self._lane(arm) for arm in rollout.arms if arm.shadow > 0}

    async def __call__(self, request: Request) -> Response:
        path = request.scope["path"]
        if (method := _METHODS.get(path)) is None:
            return _error(404, f"unknown route {path}; the gateway has {', '.join(_METHODS)}", "invalid_request_error")
        if request.method != method:
            return _error(405, f"{path} takes {method}, not {request.method}", "invalid_request_error")
        if path == CHAT:
            return await self._chat(request)
        if path == MODELS:
            return await self._models(request)
        return JSONResponse({"status": "ok"} if path == HEALTH else self.status())

    def status(self) -> dict[str, Any]:
        """This replica's counters: requests and their failures by cause, for the teacher and each arm, and the log."""
        arms = {
            name: {
                "live": self._tally(name, "live"),
                "shadow": self._tally(name, "shadow") | {"waiting": len(self._lanes.get(name, ()))},
            }
            for name in self._arms
        }
        return {
            "rollout": self._rollout.name,
            "requests": self._counts["", "", "requests"],
            "teacher": self._tally(TEACHER, "live"),
            "arms": arms,
            "log": self._log.status(),
        }

    async def close(self) -> None:
        """Let the shadows go (kept as "shutdown"), then flush the log."""
        await asyncio.gather(*(lane.close() for lane in self._lanes.values()))
        await asyncio.to_thread(self._log.close)
        await asyncio.gather(self._teacher.aclose(), *(arm.close() for arm in self._arms.values()))

    # ── one request ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def _chat(self, request: Request) -> Response:
        raw = await request.body()
        try:
            body = json.loads(raw, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            return _error(400, f"the body is not JSON: {error}", "invalid_request_error", "invalid_json")
        if not isinstance(body, dict):
            return _error(400, "the body is not a JSON object", "invalid_request_error", "invalid_json")
        self._counts["", "", "requests"] += 1
        exchange = self._exchange(request.headers, body)
        unit = unit_of(self._rollout, exchange.client_id, exchange.workload_id, exchange.request)
        chosen = assign(self._rollout, unit)
        if chosen != TEACHER:
            answer = await self._ask_live(chosen, exchange)
            if answer.error is None:
                return _arm_response(exchange, chosen, answer)
        return await self._ask_teacher(exchange, chosen, raw, request.headers)

    def _exchange(self, headers: Mapping[str, str], body: dict[str, Any]) -> Exchange:
        given = body.get("metadata")
        metadata = given if isinstance(given, dict) else {}

        def tag(name: str, default: str) -> str:
            value = headers.get("x-" + name.replace("_", "-")) or metadata.get(name)
            return value if isinstance(value, str) and value else default

        logged = body
        if user_of(body) is None and (user := headers.get("x-user-id")):
            logged = {**body, "user": user}  # the log must be enough to see why a unit went where it did
        return Exchange(
            id=uuid.uuid4().hex,
            received=time.time(),
            client_id=tag("client_id", self._rollout.client_id),
            workload_id=tag("workload_id", self._rollout.workload_id),
            request=logged,
        )

    async def _ask_live(self, name: str, exchange: Exchange) -> Answer:
        """The assigned arm's answer. It is asked for whole, so that what a client gets can still be the teacher's."""
        try:
            answer = await self._arms[name].ask(exchange.request)
        except asyncio.CancelledError:
            self._keep(exchange, name, Answer(CLIENT_CLOSED))
            raise
        if answer.error is None and not well_formed(answer):
            answer = replace(answer, error="bad_arguments")
        self._keep(exchange, name, answer)
        return answer

    async def _ask_teacher(self, exchange: Exchange, chosen: str, raw: bytes, headers: Mapping[str, str]) -> Response:
        """`chosen` is the arm the teacher stands in for, or the teacher itself."""
        started = time.perf_counter()
        named = _served(exchange, TEACHER)
        try:
            response = await self._send(CHAT, self._teacher_headers(headers), self._teacher_body(raw))
            if response.status_code == 200 and "text/event-stream" in response.headers.get("content-type", ""):
                relayed = self._relay(exchange, chosen, response, started)
                return StreamingResponse(relayed, 200, {**_returned(response), **named})
            payload = await response.aread()
        except httpx.HTTPError as error:
            cause, refusal = _unreachable(error, self._rollout.teacher.url)
            self._finish(exchange, chosen, Answer(cause, latency_s=time.perf_counter() - started))
            refusal.headers.update(named)
            return refusal
        except asyncio.CancelledError:
            self._finish(exchange, chosen, Answer(CLIENT_CLOSED, latency_s=time.perf_counter() - started))
            raise
        answer = _teacher_answer(response.status_code, payload, time.perf_counter() - started)
        self._finish(exchange, chosen, answer)
        return Response(payload, response.status_code, {**_returned(response), **named})

    async def _relay(
        self, exchange: Exchange, chosen: str, response: httpx.Response, started: float
    ) -> AsyncIterator[bytes]:
        """Pass a stream on piece by piece; when it has ended, log the answer it amounts to."""
        seen = bytearray()
        error: str | None = CLIENT_CLOSED  # until the stream has ended some other way
        try:
            async for piece in response.aiter_bytes():
                seen += piece
                yield piece
            error = None
        except httpx.HTTPError as broken:
            error, _ = _unreachable(broken, self._rollout.teacher.url)
            yield to_sse([error_body("the teacher's stream broke off", "upstream_error", error)], done=False)
        finally:
            whole = assemble_stream(read_sse(bytes(seen)))
            if error is None and not (whole["choices"] and whole["choices"][0]["finish_reason"]):
                error = "incomplete"
            self._finish(exchange, chosen, Answer(error, whole, time.perf_counter() - started))
            with anyio.CancelScope(shield=True):
                await response.aclose()

    async def _models(self, request: Request) -> Response:
        try:
            response = await self._send(MODELS, self._teacher_headers(request.headers), None)
            payload = await response.aread()
        except httpx.HTTPError as error:
            return _unreachable(error, self._rollout.teacher.url)[1]
        return Response(payload, response.status_code, _returned(response))

    # ── the teacher's side ────────────────────────────────────────────────────────────────────────────────────────────

    async def _send(self, route: str, headers: dict[str, str], content: bytes | None) -> httpx.Response:
        """Open the upstream response. Repeats once where a kept-alive connection turns out to be closed."""
        url = self._rollout.teacher.url.rstrip("/") + route.removeprefix("/v1")
        for last in (False, True):
            sent = self._teacher.build_request(
                "GET" if content is None else "POST", url, content=content, headers=headers
            )
            try:
                return await self._teacher.send(sent, stream=True)
            except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
                if last:
                    raise
        raise AssertionError("unreachable")

    def _teacher_headers(self, headers: Mapping[str, str]) -> dict[str, str]:
        skipped = _NOT_SENT | _CREDENTIALS if self._teacher_key else _NOT_SENT
        sent = {k: v for k, v in headers.items() if k.lower() not in skipped}
        return {**sent, "accept-encoding": "identity", **self._teacher_key}

    def _teacher_body(self, raw: bytes) -> bytes:
        model = self._rollout.teacher.model
        return raw if model is None else json.dumps({**json.loads(raw), "model": model}).encode()

    # ── what is kept ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _finish(self, exchange: Exchange, chosen: str, answer: Answer) -> None:
        """Log the teacher's answer and hand copies to the shadows; not to the arm whose failure it stands in for."""
        self._keep(exchange, TEACHER, answer)
        if answer.error is not None:
            return
        for name, lane in self._lanes.items():
            if name != chosen and shadowed(self._rollout, self._rollout.arm(name), exchange.id):
                lane.offer(exchange)

    def _lane(self, arm: Arm) -> ShadowLane:
        def keep(exchange: Exchange, answer: Answer) -> None:
            self._keep(exchange, arm.name, answer, shadow=True)

        return ShadowLane(self._arms[arm.name], keep)

    def _keep(self, exchange: Exchange, who: str, answer: Answer, shadow: bool = False) -> None:
        self._counts[who, "shadow" if shadow else "live", answer.error or "answered"] += 1
        hit: dict[str, Any] = {
            "client_id": exchange.client_id,
            "workload_id": exchange.workload_id,
            "timestamp": exchange.received,
            "request": exchange.request,
            "response": answer.response,
            "served_by": who,
            "exchange_id": exchange.id,
            "rollout": self._rollout.name,
            "arm": None if who == TEACHER else who,
            "shadow": shadow,
            "error": answer.error,
            "latency_s": answer.latency_s,
        }
        self._log.put(hit)

    def _tally(self, who: str, kind: str) -> dict[str, Any]:
        found = {cause: n for (w, k, cause), n in self._counts.items() if (w, k) == (who, kind)}
        answered = found.pop("answered", 0)
        drops = {cause: n for cause, n in found.items() if cause in DROPS}
        failures = {cause: n for cause, n in found.items() if cause not in DROPS}
        total = answered + sum(found.values())
        return {"requests": total, "answered": answered, "dropped": drops, "failed": failures}


class _GatewayReplica(Gateway):
    """The gateway as Ray Serve stops it: Serve awaits `__del__` when a replica retires."""

    async def __del__(self) -> None:
        await self.close()


def build(
    rollout: Rollout,
    store_url: str,
    targets: Mapping[str, UrlTarget] | None = None,
    replicas: int = 1,
    spool: Path | None = None,
) -> serve.Application:
    """The gateway as a Ray Serve application for route prefix "/".

    Args:
        rollout: who gets what.
        store_url: where completions are logged; every replica opens it.
        targets: where the arms that we host answer, by arm name; arms with a URL of their own need none.
        replicas: copies of the gateway. All assign alike; each has queues, connections and counters of its own.
        spool: folder where completions wait for the store, on a disk of each node; None lets them wait in memory.

    Raises:
        KeyError: an arm has neither a URL of its own nor a target.
    """
    given = dict(targets or {})
    where = {a.name: a.target if isinstance(a.target, UrlTarget) else given[a.name] for a in rollout.arms}
    deployment = serve.deployment(
        name="Gateway",
        num_replicas=replicas,
        max_ongoing_requests=256,
        ray_actor_options={"num_cpus": 0.1},
        graceful_shutdown_timeout_s=20,
        graceful_shutdown_wait_loop_s=0.2,
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )(_GatewayReplica)
    return deployment.bind(rollout, store_url, where, spool)


def _teacher_answer(status: int, payload: bytes, latency_s: float) -> Answer:
    try:
        data = json.loads(payload)
    except (ValueError, RecursionError):
        data = None
    body = data if isinstance(data, dict) else {}
    if status != 200:
        return Answer(f"http_{status}", body, latency_s)
    return Answer(None if body.get("choices") else "bad_response", body, latency_s)


def _arm_response(exchange: Exchange, name: str, answer: Answer) -> Response:
    if exchange.request.get("stream") is not True:
        return JSONResponse(answer.response, headers=_served(exchange, name))
    options = exchange.request.get("stream_options")
    usage = isinstance(options, dict) and options.get("include_usage") is True
    content = to_sse(as_stream(answer.response, usage))
    return Response(content, media_type="text/event-stream", headers=_served(exchange, name))


def _served(exchange: Exchange, name: str) -> dict[str, str]:
    return {"x-flywheel-served-by": name, "x-flywheel-exchange-id": exchange.id}


def _returned(response: httpx.Response) -> dict[str, str]:
    return {k: v for k, v in response.headers.items() if k.lower() not in _NOT_RETURNED}


def _unreachable(error: httpx.HTTPError, url: str) -> tuple[str, Response]:
    """Cause for the log, and the answer to the client."""
    if isinstance(error, httpx.TimeoutException):
        return "timeout", _error(504, f"the teacher at {url} did not answer in time", "upstream_error", "timeout")
    return "connection", _error(502, f"the teacher at {url} cannot be reached", "upstream_error", "connection")


def _error(status: int, message: str, kind: str, code: str | None = None) -> Response:
    return JSONResponse(error_body(message, kind, code), status)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
