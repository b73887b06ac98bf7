"""What both generations of NeMo share: JSON over HTTP with repetitions, entity names, and rows for fine-tuning.

    http = Http("http://nemo:8080", api_key_env="NEMO_API_KEY")
    http.call("GET", "/v1/customization/jobs", params={"page": 1}).json()
    # PlatformError: POST /v1/customization/jobs at nemo:8080 answered 422: body.config: Field required

Nothing here knows a service's paths. The environment is read when a call is made; a key never stands in an error.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import httpx

from flywheel_ray.candidates import Lora
from flywheel_ray.datasets import Example
from flywheel_ray.errors import PlatformError, PlatformUnavailable
from flywheel_ray.records import content_text, read_arguments, readable
from flywheel_ray.results import LossPoint
from flywheel_ray.services import TrainingStatus
from flywheel_ray.values import content_hash

MAX_BACKOFF_S = 30.0
_SHOWN = 400
NAME_LIMIT = 48
_NAME = re.compile(r"[a-z](?!.*--)[a-z0-9.-]{1,47}(?<!-)")


class Http:
    """One origin. Safe to pickle: the connection pool is made at the first call and is not sent along."""

    def __init__(
        self,
        base_url: str,
        api_key_env: str | None = None,
        timeout_s: float = 30,
        retries: int = 4,
        backoff_s: float = 0.5,
    ) -> None:
        """
        Args:
            base_url: origin with an optional path prefix, without a trailing slash needed.
            api_key_env: name of the environment variable with the bearer token; None sends none.
            timeout_s: for one answer, in seconds (connecting: at most 5).
            retries: repetitions after the first attempt, where a call may be repeated.
            backoff_s: longest first pause; doubles each time up to 30 s. `Retry-After` in seconds overrides it.
        """
        self.base_url = base_url.rstrip("/")
        self.api_key_env = api_key_env
        self.timeout_s = timeout_s
        self.retries = retries
        self.backoff_s = backoff_s
        self._client: httpx.Client | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_client": None}

    def elsewhere(self, url: str) -> Http:
        """The same manners at another URL, without the key."""
        return Http(url, None, self.timeout_s, self.retries, self.backoff_s)

    def call(
        self, method: str, path: str, *, accept: Collection[int] = (), repeatable: bool | None = None, **request: Any
    ) -> httpx.Response:
        """Make one request and return its answer: 2xx, or a status in `accept`.

        Args:
            method: HTTP verb.
            path: path under the base URL, quoted.
            accept: statuses from 400 on that the caller deals with.
            repeatable: whether a failed attempt may be made again; None means GET and PUT only. What is repeated: no
                connection, a time-out, 408, 429 and 5xx.
            request: as httpx takes it: json, content, data, params, headers.

        Raises:
            PlatformUnavailable: no answer, 408, 429 or 5xx, after all repetitions.
            PlatformError: any other status, or a key's environment variable that is unset.
        """
        repeats = self.retries if (method in ("GET", "PUT") if repeatable is None else repeatable) else 0
        where = f"{method} {path} at {self.host}"
        headers = {**self._auth(where), **request.pop("headers", {})}
        for attempt in range(repeats + 1):
            response: httpx.Response | None = None
            try:
                response = self._pool().request(method, self.base_url + path, headers=headers, **request)
            except (httpx.UnsupportedProtocol, httpx.InvalidURL, httpx.LocalProtocolError) as error:
                raise PlatformError(f"{where}: {error}; a base URL such as http://nemo:8080 is needed") from None
            except httpx.HTTPError as error:
                trouble = f"{where}: no answer ({type(error).__name__}: {error})"
            else:
                status = response.status_code
                if response.is_success or status in accept:
                    return response
                if status not in (408, 429) and status < 500:
                    raise self.refused(response)
                trouble = f"{where} answered {status}: {self._detail(response)}"
            if attempt < repeats:
                self.pause(attempt, response)
        tried = f" after {repeats + 1} attempts" if repeats else ""
        raise PlatformUnavailable(f"{trouble}{tried}. Check that the service runs and the URL is right.")

    def json(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        """`call`, and its answer as a JSON object. Raises PlatformError where it is not one."""
        response = self.call(method, path, **request)
        try:
            data = response.json()
        except ValueError:
            data = None
        if not isinstance(data, dict):
            raise PlatformError(
                f"{method} {path} at {self.host} answered {response.status_code} with no JSON object: "
                f"{self._detail(response)}. Check that the URL is this service's."
            )
        return data

    def refused(self, response: httpx.Response) -> PlatformError:
        """The error that a refused request amounts to: method, path, status, the server's words and a remedy."""
        request = response.request
        path = request.url.path.removeprefix(httpx.URL(self.base_url).path.rstrip("/"))
        status = response.status_code
        said = f"{request.method} {path} at {self.host} answered {status}: {self._detail(response)}"
        return PlatformError(said + _REMEDY.get(status, ""))

    def pause(self, attempt: int, response: httpx.Response | None = None) -> None:
        """Sleep before repetition `attempt` (0 = the first): Retry-After, else "equal jitter" back-off.

        Source: Brooker 2015, "Exponential Backoff And Jitter", AWS Architecture Blog.
        """
        asked = response.headers.get("retry-after", "") if response is not None else ""
        longest = min(float(asked) if asked.isdigit() else self.backoff_s * 2**attempt, MAX_BACKOFF_S)
        time.sleep(longest if asked.isdigit() else random.uniform(0.5, 1.0) * longest)

    @property
    def host(self) -> str:
        """Host, port and path prefix, for messages: without user and password."""
        url = httpx.URL(self.base_url)
        return url.netloc.decode() + url.path.rstrip("/")  # netloc leaves user and password out

    def _pool(self) -> httpx.Client:
        if self._client is None:
            self._client = httpx.Client(timeout=httpx.Timeout(self.timeout_s, connect=min(5.0, self.timeout_s)))
        return self._client

    def _key(self) -> str:
        return os.environ.get(self.api_key_env, "").strip() if self.api_key_env else ""

    def _auth(self, where: str) -> dict[str, str]:
        if self.api_key_env is None:
            return {}
        if not (key := self._key()):
            raise PlatformError(f"{where}: the environment variable {self.api_key_env} holds no key; set it or drop it")
        return {"Authorization": f"Bearer {key}"}

    def _detail(self, response: httpx.Response) -> str:
        """The server's `detail` (a text, or FastAPI's list of faults without the inputs), else its text, in a line."""
        try:
            data = response.json()
        except ValueError:
            data = None
        detail = next((data[k] for k in ("detail", "error", "message") if data.get(k)), None) if _is(data) else None
        if isinstance(detail, list):
            detail = "; ".join(
                f"{'.'.join(map(str, d.get('loc', [])))}: {d.get('msg')}" if _is(d) else str(d) for d in detail
            )
        text = " ".join((detail if isinstance(detail, str) else response.text).split())
        if key := self._key():
            text = text.replace(key, "…")
        return text[:_SHOWN] or "(empty)"


_REMEDY = {
    401: ". Check the API key.",
    403: ". Check the API key and what it may use.",
    404: ". Check the URL, the workspace or namespace, and the name.",
}


def _is(value: Any) -> bool:
    return isinstance(value, dict)


def segment(name: str) -> str:
    """A name as one segment of a path. `+` is escaped: some servers read it as a space; `@` stands as it is."""
    return quote(name, safe="@")


def entity_name(name: str) -> str:
    """Our name as NeMo takes it: at most 48 of a-z, 0-9, dot and hyphen, from a letter on. Equal only for equal names.

    Helix refuses others with 422 (`^[a-z](?!.*--)[a-z0-9\\-@.+_]{1,62}(?<!-)$`), so a fingerprint needs a prefix;
    what is left of the 63 goes to suffixes.
    """
    if _NAME.fullmatch(name):
        return name
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:28].rstrip("-")
    return f"flywheel-{slug}-{content_hash(name, 8)}" if slug else f"flywheel-{content_hash(name)}"


def whole_alpha(lora: Lora) -> int:
    """LoRA alpha as NeMo takes it, a whole number. Raises PlatformError for others."""
    if not lora.effective_alpha.is_integer():
        raise PlatformError(f"NeMo takes whole numbers for LoRA alpha, not {lora.effective_alpha:g}. Round it.")
    return int(lora.effective_alpha)


def sft_row(example: Example) -> dict[str, Any]:
    """An example as a row for supervised fine-tuning: `{"messages": […, reference], "tools"?: […]}`.

    Tool-call arguments are objects, in the history too; content is text and never null (NeMo's trainer would learn the
    word "None"); no key is null. Source: dataset formats of NeMo Customizer 25.x and Helix 0.8.
    """
    row: dict[str, Any] = {"messages": [_message(m) for m in [*example.messages, example.reference.message()]]}
    if example.tools:
        row["tools"] = list(example.tools)
    return readable(row)


def jsonl(examples: Sequence[Example]) -> bytes:
    """Rows as JSON lines, ASCII only: the trainers split lines at U+2028 as well."""
    return "".join(json.dumps(sft_row(e)) + "\n" for e in examples).encode("ascii")


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    role = "system" if message["role"] == "developer" else message["role"]
    row: dict[str, Any] = {"role": role, "content": content_text(message.get("content"))}
    row |= {k: message[k] for k in ("name", "tool_call_id") if message.get(k) is not None}
    if calls := message.get("tool_calls"):
        row["tool_calls"] = [_call(call) for call in calls]
    return row


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function") or {}
    row = {"function": {"name": function.get("name"), "arguments": read_arguments(function.get("arguments"))}}
    return ({"id": call["id"]} if call.get("id") else {}) | {"type": "function"} | row


def loss_points(series: Any, epoch_of: Callable[[Mapping[str, Any]], float]) -> tuple[LossPoint, ...]:
    """A metric's `[{"step", "value", …}]` by step; points that are unfinished or not finite are left out."""
    points = [p for p in series if _is(p) and _finite(p.get("value"))] if isinstance(series, list) else []
    found = {int(p["step"]): p for p in points if _finite(p.get("step"))}
    return tuple(LossPoint(step=s, epoch=epoch_of(p), value=float(p["value"])) for s, p in sorted(found.items()))


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any) -> float | None:
    """A finite number as a float, or None for anything else."""
    return float(value) if _finite(value) else None


def fraction(percent: Any) -> float | None:
    """A percentage as a fraction in [0, 1], or None where it is no number."""
    value = number(percent)
    return None if value is None else min(max(value / 100, 0.0), 1.0)


def first_text(candidates: Iterable[Any]) -> str | None:
    """The first that is a text with something in it."""
    return next((c.strip() for c in candidates if isinstance(c, str) and c.strip()), None)


def wait_until(done: Callable[[], bool], timeout_s: float, poll_s: float) -> bool:
    """Ask until the answer is yes or the time is up; the last answer. Asks at least once."""
    deadline = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() >= deadline:
            return False
        time.sleep(poll_s)
    return True


def cancel_and_wait(
    status: Callable[[], TrainingStatus], cancel: Callable[[], object], what: str, timeout_s: float, poll_s: float
) -> None:
    """Cancel a job that is not finished and return when it is. Repeats harmlessly.

    Raises:
        PlatformError: the service refused to cancel a job that still runs, or it did not stop in time.
    """
    if status().finished:
        return
    try:
        cancel()
    except PlatformUnavailable:
        raise
    except PlatformError:
        if not status().finished:  # it may have finished between the look and the call
            raise
        return
    if not wait_until(lambda: status().finished, timeout_s, poll_s):
        raise PlatformError(f"{what} was cancelled but still runs after {timeout_s:g} s. Look at it on the platform.")
