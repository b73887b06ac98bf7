"""A tiny real OpenAI-compatible server for tests: it answers, streams, hangs, fails and lies, as its mode says.

with running(Upstream(mode="normal")) as (url, upstream): httpx.post(url + "/chat/completions", json=…)
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from tests.servers import serving


class Upstream:
    """An ASGI app. `mode`: normal, other, hang, 500, garbage, arguments, refuse, slow_stream, …

    `script` holds statuses for the next requests, before the mode applies; `seen` holds what came in.
    """

    def __init__(self, mode: str = "normal", delay_s: float = 0.0) -> None:
        self.reset(mode, delay_s)

    def reset(self, mode: str = "normal", delay_s: float = 0.0) -> None:
        """Begin anew."""
        self.mode, self.delay_s = mode, delay_s
        self.script: list[tuple[int, dict[str, str]]] = []
        self.seen: list[dict[str, Any]] = []
        self.raw: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self.in_flight = self.most_in_flight = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        response = await self._answer(Request(scope, receive))
        await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        if request.url.path == "/v1/models":
            return JSONResponse({"object": "list", "data": [{"id": "big", "object": "model"}]})
        if request.url.path != "/v1/chat/completions":
            return JSONResponse({"error": {"message": "no such route"}}, 404)
        raw = await request.body()
        body = json.loads(raw)
        self.raw.append(raw)
        self.seen.append(body)
        self.headers.append(dict(request.headers))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self._by_mode(body)
        finally:
            self.in_flight -= 1

    async def _by_mode(self, body: dict[str, Any]) -> Response:
        if self.script:
            status, headers = self.script.pop(0)
            return JSONResponse({"error": {"message": f"scripted {status}"}}, status, headers)
        await asyncio.sleep(self.delay_s)
        if self.mode == "hang":
            await asyncio.sleep(60)
        if self.mode == "500":
            return JSONResponse({"error": {"message": "boom", "type": "server_error"}}, 500)
        if self.mode == "garbage":
            return PlainTextResponse("<html>hello</html>")
        if self.mode == "refuse" or body.get("messages") in (None, []):
            return JSONResponse({"error": {"message": "too long", "code": "context_length_exceeded"}}, 400)
        if body.get("stream"):
            return StreamingResponse(self._stream(body), media_type="text/event-stream")
        return JSONResponse(completion(body, self.mode))

    async def _stream(self, body: dict[str, Any]) -> Any:
        if self.mode == "cut_stream":
            yield event({"choices": [{"index": 0, "delta": {"content": "half an"}, "finish_reason": None}]})
            return
        pause = 0.15 if self.mode == "slow_stream" else 0.0
        if body.get("tools"):
            call = completion(body, self.mode)["choices"][0]["message"]["tool_calls"][0]
            start = {"index": 0, "id": call["id"], "type": "function", "function": {"name": "route", "arguments": ""}}
            deltas: list[dict[str, Any]] = [{"role": "assistant", "tool_calls": [start]}]
            text = call["function"]["arguments"]
            deltas += [{"tool_calls": [{"index": 0, "function": {"arguments": c}}]} for c in (text[:5], text[5:])]
            finish = "tool_calls"
        else:
            deltas = [{"role": "assistant", "content": ""}, {"content": "Hello "}, {"content": "there\u2028!"}]
            finish = "stop"
        for i, delta in enumerate(deltas):
            await asyncio.sleep(pause)
            if self.mode == "broken_stream" and i == 2:
                raise RuntimeError("the stream breaks on purpose")
            yield event({"id": "c1", "choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
        yield event({"id": "c1", "choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
        yield b"data: [DONE]\n\n"


def event(chunk: dict[str, Any]) -> bytes:
    return f"data: {json.dumps({'object': 'chat.completion.chunk', **chunk}, ensure_ascii=False)}\n\n".encode()


def completion(body: dict[str, Any], mode: str = "normal") -> dict[str, Any]:
    """Routes by the last word of the last message where there are tools, else says hello."""
    message: dict[str, Any] = {"role": "assistant", "content": "Hello there!"}
    if body.get("tools"):
        word = str(body["messages"][-1]["content"]).split()[-1]
        arguments = json.dumps({"queue": "other" if mode == "other" else word})
        if mode == "arguments":
            arguments = '{"queue": '
        call = {"id": "call_0", "type": "function", "function": {"name": "route", "arguments": arguments}}
        message = {"role": "assistant", "content": None, "tool_calls": [call]}
    finish = "tool_calls" if body.get("tools") else "stop"
    return {
        "id": "c1",
        "object": "chat.completion",
        "created": 1,
        "model": body.get("model") or "big",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
    }


TOOL = {
    "type": "function",
    "function": {"name": "route", "parameters": {"type": "object", "properties": {"queue": {"type": "string"}}}},
}


@contextlib.contextmanager
def running(app: Any, lifespan: str = "off") -> Iterator[tuple[str, Any]]:
    """The app behind a real socket on a free port; yields (base URL ending in /v1, app)."""
    with serving(app, log_level="critical", lifespan=lifespan, timeout_graceful_shutdown=0) as url:
        yield f"{url}/v1", app
