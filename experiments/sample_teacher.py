"""The teacher of the sample traffic as an OpenAI-compatible server: rules in place of a 70B model, but a real endpoint.

It reads each request with the grammar of `sample_traffic` and answers as a model would: with tool calls, a question, or
text; whole or streamed. Latency and failures can be added, to see what the flywheel makes of them.

    python -m experiments.sample_teacher --port 18080 --latency-ms 800 --fail-rate 0.01
    OpenAI(base_url="http://127.0.0.1:18080/v1", api_key="none").chat.completions.create(
        model="sample-teacher-70b", messages=[{"role": "user", "content": "where is order A1043?"}], tools=TOOLS)
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from random import Random
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from experiments.sample_traffic import MODEL, TOOLS, answer, completion

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")


class _BadRequest(Exception):
    """A request that OpenAI's API would refuse; `args` are the message and the parameter at fault."""


def app(latency_s: float = 0.0, fail_rate: float = 0.0) -> Starlette:
    """The server as an ASGI application.

    Each answer waits `latency_s` seconds; a share `fail_rate` of the requests gets HTTP 500, in a fixed pseudo-random
    order. Any model name is accepted and repeated in the answer, because the teacher goes by many names in configs.
    """
    failures = Random(0)
    answer([{"role": "user", "content": "hello"}], TOOLS)  # compiles the grammar now (0.2 s), not in the first request

    async def chat_completions(request: Request) -> Response:
        try:
            body = _read(await request.body())
        except _BadRequest as bad:
            return _error(400, str(bad.args[0]), bad.args[1])
        await asyncio.sleep(latency_s)
        if failures.random() < fail_rate:
            return _error(500, "The server had an error while processing your request (--fail-rate).")
        whole = _complete(body)
        if not body.get("stream"):
            return JSONResponse(whole)
        include_usage = bool((body.get("stream_options") or {}).get("include_usage"))
        return StreamingResponse(_events(whole, include_usage), media_type="text/event-stream")

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "acme"}]})

    async def healthz(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def unknown(request: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 404)
        return _error(status, f"Unknown request URL: {request.method} {request.url.path}.", code="unknown_url")

    routes = [
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        Route("/v1/models", models),
        Route("/healthz", healthz),
    ]
    return Starlette(routes=routes, exception_handlers={404: unknown, 405: unknown})


def _error(status: int, message: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": code}}, status)


def _read(raw: bytes) -> dict[str, Any]:
    """The request's body, checked as far as the teacher relies on it."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        raise _BadRequest("We could not parse the JSON body of your request.", None) from None
    if not isinstance(body, dict):
        raise _BadRequest("The body of the request must be a JSON object.", None)
    if not isinstance(body.get("model"), str):
        raise _BadRequest("You must provide a model parameter, a string.", "model")
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _BadRequest("'messages' must be a list with at least one message.", "messages")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise _BadRequest(f"messages[{i}] must be an object with a role, one of {', '.join(_ROLES)}.", "messages")
        if not isinstance(message.get("content"), str | list | None):
            raise _BadRequest(f"messages[{i}].content must be a string, a list of parts or null.", "messages")
        for call in _listed(message, "tool_calls", f"messages[{i}]."):
            function = call.get("function") if isinstance(call, dict) else None
            if not isinstance(function, dict) or not all(
                isinstance(text, str) for text in (call.get("id"), function.get("name"), function.get("arguments"))
            ):
                raise _BadRequest(
                    f"messages[{i}].tool_calls need id, function.name and function.arguments.", "messages"
                )
    for i, tool in enumerate(_listed(body, "tools")):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _BadRequest(f"tools[{i}] must be a function with a name.", "tools")
    if not isinstance(body.get("n"), int | None) or not 1 <= (1 if body.get("n") is None else body["n"]) <= 128:
        raise _BadRequest("'n' must be a whole number from 1 to 128.", "n")
    if not isinstance(body.get("stream_options"), dict | None):
        raise _BadRequest("'stream_options' must be an object.", "stream_options")
    return body


def _listed(holder: dict[str, Any], name: str, where: str = "") -> list[Any]:
    value = holder.get(name)
    if not isinstance(value, list | None):
        raise _BadRequest(f"{where}{name} must be a list.", where.split("[")[0] or name)
    return value or []


def _complete(body: dict[str, Any]) -> dict[str, Any]:
    tools = body.get("tools")
    # With tool_choice "none" it is still the support assistant, not the summariser: one that knows none of the tools.
    offered = [{"function": {"name": ""}}] if tools and body.get("tool_choice") == "none" else tools
    message = answer(body["messages"], offered)
    whole = completion(message, body["messages"], tools, uuid.uuid4().hex[:12], int(time.time()))
    choices = [{**whole["choices"][0], "index": i} for i in range(body.get("n") or 1)]
    return {**whole, "model": body["model"], "choices": choices}


async def _events(whole: dict[str, Any], include_usage: bool) -> AsyncIterator[str]:
    """The completion as server-sent events."""
    frame = {name: whole[name] for name in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
    usage: dict[str, Any] = {"usage": None} if include_usage else {}
    for choice in whole["choices"]:
        for delta in _deltas(choice["message"]):
            part = {"index": choice["index"], "delta": delta, "finish_reason": None}
            yield f"data: {json.dumps({**frame, 'choices': [part], **usage})}\n\n"
        last = {"index": choice["index"], "delta": {}, "finish_reason": choice["finish_reason"]}
        yield f"data: {json.dumps({**frame, 'choices': [last], **usage})}\n\n"
    if include_usage:
        yield f"data: {json.dumps({**frame, 'choices': [], 'usage': whole['usage']})}\n\n"
    yield "data: [DONE]\n\n"


def _deltas(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Pieces of about three tokens that add up to the message."""
    yield {"role": "assistant", "content": None if message.get("tool_calls") else ""}
    for piece in _pieces(message["content"] or ""):
        yield {"content": piece}
    for i, call in enumerate(message.get("tool_calls") or ()):
        name, text = call["function"]["name"], call["function"]["arguments"]
        start = {"index": i, "id": call["id"], "type": "function", "function": {"name": name, "arguments": ""}}
        yield {"tool_calls": [start]}
        for piece in _pieces(text):
            yield {"tool_calls": [{"index": i, "function": {"arguments": piece}}]}


def _pieces(text: str, size: int = 12) -> Iterator[str]:
    return (text[i : i + size] for i in range(0, len(text), size))


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until interrupted; 1 if the address cannot be had."""
    parser = argparse.ArgumentParser(prog="python -m experiments.sample_teacher", description=__doc__.split("\n")[0])
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=18080, help="port, 0 for a free one (default: %(default)s)")
    parser.add_argument("--latency-ms", type=float, default=0.0, help="wait before each answer (default: 0)")
    parser.add_argument("--fail-rate", type=float, default=0.0, help="share of requests that get HTTP 500 (default: 0)")
    options = parser.parse_args(argv)
    if options.latency_ms < 0:
        parser.error("--latency-ms is negative")
    if not 0 <= options.fail_rate <= 1:
        parser.error("--fail-rate is not between 0 and 1")
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((options.host, options.port))
        listener.listen(2048)
    except (OSError, OverflowError) as error:
        print(f"cannot listen on {options.host}:{options.port}: {error}", file=sys.stderr)
        return 1
    print(f"sample teacher on http://{options.host}:{listener.getsockname()[1]}/v1", flush=True)
    application = app(options.latency_ms / 1000, options.fail_rate)
    uvicorn.Server(uvicorn.Config(application, log_level="warning")).run(sockets=[listener])
    return 0


if __name__ == "__main__":
    sys.exit(main())
