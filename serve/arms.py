"""An arm as the gateway sees it: a URL with its own connections and time budget, and a bounded lane of shadow copies.

arm = ArmClient(rollout.arm("student"), UrlTarget(url="http://127.0.0.1:8000/students/student/v1"))
answer = await arm.ask(request)               # Answer(error="timeout", latency_s=30.0, …): never raises
lane = ShadowLane(arm, keep); lane.offer(exchange)        # at once, whatever the arm does
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from flywheel_ray.chat import auth_header
from flywheel_ray.records import Completion, Rejected, read_completion
from flywheel_ray.rollout import QUEUE_FULL, SHUTDOWN, Arm, UrlTarget

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exchange:
    """One request as it came in. `received` (epoch seconds) stamps every record of the exchange."""

    id: str
    received: float
    client_id: str
    workload_id: str
    request: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """What came of asking: a ChatCompletion object, or `error` with whatever was sent instead."""

    error: str | None
    response: dict[str, Any] = field(default_factory=dict)
    latency_s: float | None = None


class ArmClient:
    """Asks one arm. Its pool is its own, so an arm that hangs holds nobody else's connections."""

    def __init__(self, arm: Arm, target: UrlTarget) -> None:
        """Raises ChatError where the target's API key is not in the environment."""
        self.arm, self._target = arm, target
        self._url = target.url.rstrip("/") + "/chat/completions"
        self._client = httpx.AsyncClient(
            headers=auth_header(target.api_key_env, target.url),
            timeout=arm.timeout_s,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=arm.workers, keepalive_expiry=2.0),
        )

    async def ask(self, request: dict[str, Any]) -> Answer:
        """Send a copy, not streamed, and read the answer within the arm's time. Only cancellation is raised."""
        body = {k: v for k, v in request.items() if k not in ("stream", "stream_options")} | {"stream": False}
        if self._target.model is not None:
            body["model"] = self._target.model
        started = time.perf_counter()
        try:
            async with asyncio.timeout(self.arm.timeout_s):
                response = await self._client.post(self._url, json=body)
        except (TimeoutError, httpx.TimeoutException):
            return Answer("timeout", latency_s=time.perf_counter() - started)
        except (httpx.HTTPError, httpx.InvalidURL):
            return Answer("connection", latency_s=time.perf_counter() - started)
        except Exception:
            _log.exception("asking arm %s", self.arm.name)
            return Answer("internal", latency_s=time.perf_counter() - started)
        return _read(response, time.perf_counter() - started)

    async def close(self) -> None:
        """Release the connections."""
        await self._client.aclose()


def well_formed(answer: Answer) -> bool:
    """Whether an answer may go to a client: a completion whose tool-call arguments are JSON objects."""
    found = read_completion(answer.response) if answer.error is None else None
    return isinstance(found, Completion) and not any(isinstance(call.arguments, str) for call in found.tool_calls)


def _read(response: httpx.Response, latency_s: float) -> Answer:
    try:
        data = response.json()
    except (ValueError, RecursionError):
        data = None
    body = data if isinstance(data, dict) else {}
    if response.status_code != 200:
        return Answer(f"http_{response.status_code}", body, latency_s)
    error = "bad_response" if isinstance(read_completion(body), Rejected) else None
    return Answer(error, body, latency_s)


class ShadowLane:
    """Copies for one arm: a bounded queue and a few workers, off the request path. Needs a running event loop."""

    def __init__(self, client: ArmClient, keep: Callable[[Exchange, Answer], None]) -> None:
        """`keep` is called exactly once for every exchange offered: answered, failed or dropped."""
        self._client, self._keep = client, keep
        self._queue: asyncio.Queue[Exchange] = asyncio.Queue(client.arm.queue)
        self._closed = False
        self._in_flight = 0
        self._was_full = False
        self._workers = [asyncio.get_running_loop().create_task(self._work()) for _ in range(client.arm.workers)]

    def __len__(self) -> int:
        """Copies that are waiting or in flight."""
        return self._queue.qsize() + self._in_flight

    def offer(self, exchange: Exchange) -> None:
        """Queue a copy, or drop it where the queue is full. Returns at once."""
        if self._closed:
            return self._keep(exchange, Answer(SHUTDOWN))
        try:
            self._queue.put_nowait(exchange)
            self._was_full = False
        except asyncio.QueueFull:
            if not self._was_full:
                _log.warning(
                    "arm %s: its %d places for waiting shadow copies are taken; further copies are dropped and counted "
                    "as %s. Raise `queue` or `workers`, or lower `shadow`.",
                    self._client.arm.name, self._client.arm.queue, QUEUE_FULL,
                )  # fmt: skip
            self._was_full = True
            self._keep(exchange, Answer(QUEUE_FULL))

    async def close(self) -> None:
        """Stop; copies waiting or in flight are kept as "shutdown"."""
        self._closed = True
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        while not self._queue.empty():
            self._keep(self._queue.get_nowait(), Answer(SHUTDOWN))

    async def _work(self) -> None:
        while True:
            exchange = await self._queue.get()
            self._in_flight += 1
            try:
                answer = await self._client.ask(exchange.request)
            except asyncio.CancelledError:
                self._keep(exchange, Answer(SHUTDOWN))
                raise
            finally:
                self._in_flight -= 1
            self._keep(exchange, answer)
