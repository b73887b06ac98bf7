"""A client of OpenAI-compatible endpoints (`HttpChat`), and the shape of their streams.

    teacher = HttpChat("http://127.0.0.1:18080/v1", "teacher", concurrency=8)
    teacher.complete([ChatPrompt(messages=({"role": "user", "content": "Hi"},))])   # [Completion(text="Hello!", …)]
    assemble_stream(read_sse(body))              # the ChatCompletion a stream amounts to
    as_stream(completion)                        # and back: the chunks of one already finished

What may pass (429, 5xx, no connection) is repeated with exponential back-off; a prompt the endpoint refuses is
`Unanswered`; an endpoint that cannot be used at all is an error naming its URL and the remedy.
"""

from __future__ import annotations

import json
import os
import random
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any

import httpx

from flywheel_ray.errors import ChatError, ChatUnavailable
from flywheel_ray.records import Completion, Rejected, assemble_stream, read_completion  # noqa: F401
from flywheel_ray.services import ChatPrompt, Generation, Unanswered
from flywheel_ray.values import has_credentials

MAX_BACKOFF_S = 60.0
_REMEDY = {
    401: "check the API key",
    403: "check the API key and what it may use",
    404: "check that the URL ends before /chat/completions (usually in /v1) and that the model exists",
}


class HttpChat:
    """A ChatModel behind an OpenAI-compatible endpoint. Holds no connection between calls; safe to pickle and share."""

    def __init__(
        self,
        url: str,
        model: str | None,
        api_key_env: str | None = None,
        timeout_s: float = 60,
        concurrency: int = 8,
        retries: int = 3,
        generation: Generation | None = None,
        backoff_s: float = 0.5,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            url: base URL, to which `/chat/completions` is added.
            model: the request's `model`; None sends none.
            api_key_env: name of the environment variable with the key, read at each call; None sends no key.
            timeout_s: for one answer, in seconds. A prompt that takes longer is Unanswered and not repeated.
            concurrency: requests in flight at a time.
            retries: repetitions after the first attempt.
            generation: limits sent with every prompt; None leaves them to the server.
            backoff_s: longest first pause; doubles with each repetition. `Retry-After` overrides it.
            extra_body: more fields of every request, e.g. {"response_format": {…}}.

        Raises:
            ChatError: the URL holds a user name or password.
        """
        if has_credentials(url):  # it would stand in every error, and in what is logged of one
            raise ChatError("the endpoint's URL holds a user name or password; leave them out and use api_key_env")
        self.url = url.rstrip("/")
        self.model = model
        self.api_key_env = api_key_env
        self.timeout_s = timeout_s
        self.concurrency = concurrency
        self.retries = retries
        self.generation = generation
        self.backoff_s = backoff_s
        self.extra_body = dict(extra_body or {})

    def complete(
        self,
        prompts: Sequence[ChatPrompt],
        on_done: Callable[[int], None] | None = None,
        on_answer: Callable[[int, Completion | Unanswered], None] | None = None,
    ) -> list[Completion | Unanswered]:
        """Answer every prompt, in order; see `ChatModel.complete`.

        Args:
            prompts: what to answer.
            on_done: called with the number answered so far.
            on_answer: called with a prompt's position and its answer as soon as it is there, in the caller's thread.

        Raises:
            ChatUnavailable: nothing listens at the URL, or no prompt was answered because of 429, 5xx or time-outs.
            ChatError: the key, URL or model is refused (401, 403, 404), or what answers there is no chat endpoint.
        """
        if not prompts:
            return []
        limits = httpx.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
        timeout = httpx.Timeout(self.timeout_s, connect=min(10.0, self.timeout_s))
        headers = auth_header(self.api_key_env, self.url)
        stop = threading.Event()
        answers: list[Completion | _Trouble] = [_Trouble("not asked")] * len(prompts)
        with (
            httpx.Client(limits=limits, timeout=timeout, headers=headers, verify=_certificates()) as client,
            ThreadPoolExecutor(self.concurrency, thread_name_prefix="chat") as pool,
        ):
            futures = {pool.submit(self._ask, client, prompt, stop): i for i, prompt in enumerate(prompts)}
            try:
                for done, future in enumerate(as_completed(futures), start=1):
                    i = futures[future]
                    answers[i] = answer = future.result()
                    if on_answer:
                        on_answer(i, _answer(answer))
                    if on_done:
                        on_done(done)
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        troubles = [a for a in answers if isinstance(a, _Trouble)]
        if len(troubles) == len(answers) and all(t.kind is not None for t in troubles):
            raise (troubles[0].kind or ChatError)(f"{self._where}: {troubles[0].reason} (so for every prompt)")
        return [_answer(a) for a in answers]

    @property
    def _where(self) -> str:
        return f"{self.url}/chat/completions"

    def _ask(self, client: httpx.Client, prompt: ChatPrompt, stop: threading.Event) -> Completion | _Trouble:
        """One prompt, with repetitions. Raises where the endpoint as a whole is of no use."""
        body = self._body(prompt)
        last: httpx.Response | httpx.HTTPError | None = None
        for attempt in range(self.retries + 1):
            if last is not None:
                stop.wait(_pause_s(last, attempt, self.backoff_s))
            if stop.is_set():
                return _Trouble("given up: the endpoint failed for another prompt")
            started = time.perf_counter()
            try:
                last = client.post(self._where, json=body)
            except (httpx.ReadTimeout, httpx.WriteTimeout, httpx.PoolTimeout):
                return _Trouble(f"no answer within {self.timeout_s:g} s", ChatUnavailable)
            except (httpx.UnsupportedProtocol, httpx.InvalidURL, httpx.LocalProtocolError) as error:
                raise ChatError(f"{self._where}: {error}; a URL such as http://host:8000/v1 is needed") from None
            except httpx.HTTPError as error:
                last = error
                continue
            if last.status_code != 429 and last.status_code < 500:
                return self._read(last, time.perf_counter() - started)
        if isinstance(last, httpx.Response):
            return _Trouble(
                f"HTTP {last.status_code} after {self.retries + 1} attempts: {_said(last)}", ChatUnavailable
            )
        if not isinstance(last, httpx.ConnectError | httpx.ConnectTimeout):
            return _Trouble(f"the connection broke {self.retries + 1} times ({type(last).__name__})", ChatUnavailable)
        raise ChatUnavailable(
            f"{self._where}: no connection after {self.retries + 1} attempts ({type(last).__name__}: {last}); "
            "check that the server runs and the URL is right"
        )

    def _body(self, prompt: ChatPrompt) -> dict[str, Any]:
        body: dict[str, Any] = {} if self.model is None else {"model": self.model}
        body["messages"] = list(prompt.messages)
        if prompt.tools:
            body["tools"] = list(prompt.tools)
        if self.generation is not None:
            body |= self.generation.model_dump()
        return body | self.extra_body

    def _read(self, response: httpx.Response, latency_s: float) -> Completion | _Trouble:
        status = response.status_code
        if remedy := _REMEDY.get(status):
            raise ChatError(f"{self._where}: HTTP {status}: {_said(response)}; {remedy}")
        if status != 200:
            return _Trouble(f"HTTP {status}: {_said(response)}", status=status)
        try:
            data = response.json()
        except ValueError:
            data = None
        if not isinstance(data, dict):
            return _Trouble(f"the answer is no chat completion: {_said(response)}", ChatError)
        found = read_completion(data, latency_s)
        return _Trouble(f"the answer is no chat completion: {found.reason}") if isinstance(found, Rejected) else found


@cache
def _certificates() -> ssl.SSLContext:
    """Read once a process: it takes longer than a request."""
    return httpx.create_ssl_context()


class BadRequest(Unanswered):
    """A prompt that the endpoint will not take in this form, and its HTTP status (400, 413, 422, …)."""

    status: int


class _Trouble:
    """Why one prompt has no answer; `kind` is the error it becomes where it befell every prompt."""

    def __init__(self, reason: str, kind: type[ChatError] | None = None, status: int | None = None) -> None:
        self.reason, self.kind, self.status = reason, kind, status


def _answer(found: Completion | _Trouble) -> Completion | Unanswered:
    if isinstance(found, Completion):
        return found
    if found.status is not None:
        return BadRequest(reason=found.reason, status=found.status)
    return Unanswered(reason=found.reason)


def auth_header(api_key_env: str | None, url: str) -> dict[str, str]:
    """`Authorization` from the environment variable of that name; empty for None.

    Raises:
        ChatError: the variable is unset or empty.
    """
    if api_key_env is None:
        return {}
    if not (key := os.environ.get(api_key_env, "").strip()):
        raise ChatError(f"{url}: the environment variable {api_key_env} holds no API key; set it, or drop api_key_env")
    return {"Authorization": f"Bearer {key}"}


def _pause_s(last: httpx.Response | httpx.HTTPError, attempt: int, backoff_s: float) -> float:
    """Seconds before attempt number `attempt` (1 = the first repetition): Retry-After, else "full jitter" back-off.

    Source: Brooker 2015, "Exponential Backoff And Jitter", AWS Architecture Blog.
    """
    if isinstance(last, httpx.Response) and (asked := _retry_after_s(last.headers.get("retry-after"))) is not None:
        return min(asked, MAX_BACKOFF_S)
    return random.uniform(0.5, 1.0) * min(backoff_s * 2 ** (attempt - 1), MAX_BACKOFF_S)


def _retry_after_s(value: str | None) -> float | None:
    """Seconds asked for by a `Retry-After` header, which holds seconds or an HTTP date; None where unreadable."""
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def _said(response: httpx.Response) -> str:
    """What an error answer says, in one short line."""
    try:
        data = response.json()
    except ValueError:
        data = None
    error = data.get("error") if isinstance(data, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    text = message if isinstance(message, str) else response.text
    return " ".join(text.split())[:200] or "(empty)"


# ── streams ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_sse(body: bytes) -> Iterator[dict[str, Any]]:
    """The JSON objects of a server-sent event stream, up to `[DONE]`; other lines and broken JSON are passed over."""
    for line in re.split(r"\r\n|\n|\r", body.decode("utf-8", "replace")):  # splitlines() breaks at U+2028 too
        if not line.startswith("data:"):
            continue
        data = line[5:].strip()
        if data == "[DONE]":
            return
        try:
            chunk = json.loads(data)
        except ValueError:
            continue
        if isinstance(chunk, dict):
            yield chunk


def as_stream(completion: Mapping[str, Any], include_usage: bool = False) -> list[dict[str, Any]]:
    """The chunks of a finished ChatCompletion: one with everything, one with the finish reason, then usage if asked."""
    shared = {k: completion[k] for k in ("id", "created", "model") if k in completion}
    shared["object"] = "chat.completion.chunk"
    deltas, ends = [], []
    for i, choice in enumerate(completion.get("choices") or []):
        message = dict(choice.get("message") or {})
        if message.get("tool_calls"):
            message["tool_calls"] = [{"index": n, **call} for n, call in enumerate(message["tool_calls"])]
        index = choice.get("index", i)
        deltas.append({"index": index, "delta": message, "finish_reason": None})
        ends.append({"index": index, "delta": {}, "finish_reason": choice.get("finish_reason") or "stop"})
    chunks: list[dict[str, Any]] = [{**shared, "choices": deltas}, {**shared, "choices": ends}]
    if include_usage and completion.get("usage"):
        chunks.append({**shared, "choices": [], "usage": completion["usage"]})
    return chunks


def to_sse(chunks: Iterable[Mapping[str, Any]], done: bool = True) -> bytes:
    """Chunks as a server-sent event stream, ended by `[DONE]` if `done`."""
    events = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    return "".join([*events, "data: [DONE]\n\n"] if done else events).encode()


def error_body(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's API words it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
