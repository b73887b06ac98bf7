"""An HTTP proxy on 127.0.0.1 that misbehaves as networks and busy Elasticsearch servers do.

    with FaultProxy("http://127.0.0.1:9200", rate=0.1, seed=0) as proxy:        # every tenth request, by chance
        proxy.fault("reset_after", "/_bulk")                                   # and the next bulk request, by plan
        store = open_store(f"{proxy.url}/logs")
        proxy.counts                                                           # Counter({"reset_after": 1, …})

It can also end TLS, ask for credentials and refuse large bodies.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

KINDS = (
    "429",  # a status, answered here; "400:some_exception" names the error as well
    "503",
    "reset_before",  # the connection breaks, and the server never saw the request
    "reset_after",  # the server did what was asked, and its answer is lost
    "stall_before",  # the server sees the request after `stall_s` only
    "stall_after",  # the server's answer takes `stall_s`
    "truncated",  # the answer ends in the middle
    "items_429",  # some of a bulk's items are refused, as a busy server does; other requests get 429
    "shards_failed",  # a search or count of some shards only; other requests get 503
    "timed_out",  # a search that ran out of time; other requests get 503
)
"""What can go wrong. `other_items`, an answer of fewer items than were sent, only by plan: it is no passing fault."""


@dataclass
class _Planned:
    kind: str
    path: str
    times: int


class FaultProxy:
    """See the module. `requests` lists what came in: method, path, bytes of body, documents passed on in a bulk."""

    def __init__(
        self,
        upstream: str,
        rate: float = 0.0,
        kinds: tuple[str, ...] = KINDS,
        seed: int = 0,
        stall_s: float = 1.0,
        tls: Path | None = None,
    ) -> None:
        """
        Args:
            upstream: base URL of the real server.
            rate: share of the requests that something happens to, by chance.
            kinds: what may happen to them.
            seed: of the chance.
            stall_s: how long a stall takes.
            tls: a certificate with its key (see `certificate`), for https.
        """
        self.rate, self.kinds, self.stall_s = rate, kinds, stall_s
        self.credentials: str | None = None
        """What the Authorization header must be, where given; else the answer is 401."""
        self.max_body: int | None = None
        """Bodies with more bytes are answered 413."""
        self.counts: Counter[str] = Counter()
        self.requests: list[tuple[str, str, int, int]] = []
        self._random = random.Random(seed)
        self._planned: list[_Planned] = []
        self._lock = threading.Lock()
        self._idle = threading.Condition()
        self._under_way = 0
        self._is_down = False
        proxy = self

        class Handler(_Handler):
            pass

        Handler.proxy, Handler.upstream = proxy, urlsplit(upstream)
        self._server = _Server(("127.0.0.1", 0), Handler)
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fault(self, kind: str, path: str = "", times: int = 1) -> None:
        """Let this happen to the next `times` requests whose path contains the text."""
        with self._lock:
            self._planned.append(_Planned(kind, path, times))

    def heal(self) -> None:
        """Nothing goes wrong from now on."""
        with self._lock:
            self.rate = 0.0
            self._planned.clear()

    @contextmanager
    def down(self) -> Iterator[None]:
        """Let nothing through; begins when what is under way has been answered.

        For ending a noida-db: it acknowledges bulks while it is going down that it does not keep.
        """
        with self._idle:
            self._is_down = True
            self._idle.wait_for(lambda: self._under_way == 0)
        try:
            yield
        finally:
            self._is_down = False

    @contextmanager
    def passage(self) -> Iterator[bool]:
        """Around a request to the server; gives whether it may be made."""
        with self._idle:
            allowed = not self._is_down
            self._under_way += allowed
        try:
            yield allowed
        finally:
            with self._idle:
                self._under_way -= allowed
                self._idle.notify_all()

    def choose(self, path: str) -> str | None:
        """What happens to a request."""
        with self._lock:
            kind = self._choose(path)
            if kind == "items_429" and "/_bulk" not in path:
                kind = "429"
            elif (kind == "timed_out" and "/_search" not in path) or (
                kind == "shards_failed" and "/_search" not in path and "/_count" not in path
            ):
                kind = "503"
            if kind is not None:
                self.counts[kind] += 1
            return kind

    def _choose(self, path: str) -> str | None:
        for planned in self._planned:
            if planned.times > 0 and planned.path in path:
                planned.times -= 1
                return planned.kind
        if self.rate and self._random.random() < self.rate:
            return self._random.choice(self.kinds)
        return None

    def refused(self, number: int) -> set[int]:
        """Which of a bulk's items are refused: about a third, at least one."""
        with self._lock:
            return set(self._random.sample(range(number), max(1, number // 3)))


_NOTHING_PASSED = (200, {"content-type": "application/json", "x-elastic-product": "Elasticsearch"}, b'{"items":[]}')


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        pass  # whoever asked has gone


class _Handler(BaseHTTPRequestHandler):
    proxy: FaultProxy
    upstream: Any
    protocol_version = "HTTP/1.1"
    _connection: http.client.HTTPConnection | None = None

    def log_message(self, *_: object) -> None:
        pass

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        proxy = self.proxy
        if proxy.credentials is not None and self.headers.get("authorization") != proxy.credentials:
            return self._refuse("401:security_exception", body)
        if proxy.max_body is not None and len(body) > proxy.max_body:
            return self._refuse("413", body)
        kind = proxy.choose(self.path)
        if kind == "reset_before":
            return self._reset(body)
        if kind is not None and kind[:3].isdigit():
            return self._refuse(kind, body)
        if kind == "stall_before":
            time.sleep(proxy.stall_s)
        held: dict[int, bytes] = {}
        passed = body
        if kind == "items_429":
            lines = body.splitlines(keepends=True)
            held = {n: lines[2 * n] for n in proxy.refused(len(lines) // 2)}
            passed = b"".join(line for i, line in enumerate(lines) if i // 2 not in held)
        self._note(passed)
        try:
            with proxy.passage() as allowed:
                if not allowed:
                    raise ConnectionRefusedError
                status, headers, answer = self._forward(passed) if passed or not body else _NOTHING_PASSED
        except (OSError, http.client.HTTPException):  # the server is down
            self._connection = None
            return self._reset(None)
        if kind == "reset_after":
            return self._reset(None)
        if kind == "stall_after":
            time.sleep(proxy.stall_s)
        if held and status == 200:
            answer = _with_refusals(answer, held)
        if status == 200 and kind in ("shards_failed", "timed_out", "other_items"):
            answer = _spoilt(answer, kind)
        return self._answer(status, headers, answer, cut=kind == "truncated")

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = _handle

    def _note(self, body: bytes | None) -> None:
        documents = (body or b"").count(b"\n") // 2 if "/_bulk" in self.path else 0
        self.proxy.requests.append((self.command, self.path, len(body or b""), documents))

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        if self._connection is None:
            host, port = self.upstream.hostname, self.upstream.port
            if self.upstream.scheme == "https":
                context = ssl.create_default_context(cafile=os.environ.get("FLYWHEEL_ES_CA_CERT"))
                self._connection = http.client.HTTPSConnection(host, port, timeout=60, context=context)
            else:
                self._connection = http.client.HTTPConnection(host, port, timeout=60)
        sent = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "content-length", "connection")}
        self._connection.request(self.command, self.path, body or None, sent)
        response = self._connection.getresponse()
        answer = response.read()
        kept = ("content-type", "x-elastic-product", "warning")
        return response.status, {k: v for k, v in response.getheaders() if k.lower() in kept}, answer

    def _refuse(self, kind: str, body: bytes) -> None:
        self._note(b"")
        status, _, name = kind.partition(":")
        error = {"type": name or "es_rejected_execution_exception", "reason": "injected"}
        answer = json.dumps({"error": error, "status": int(status)}).encode()
        self._answer(int(status), {"content-type": "application/json"}, answer)

    def _answer(self, status: int, headers: dict[str, str], answer: bytes, cut: bool = False) -> None:
        try:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if self.command != "HEAD":
                self.send_header("content-length", str(len(answer)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer[: len(answer) // 2] if cut else answer)
        except OSError:  # whoever asked has given up
            self.close_connection = True
        if cut:
            self._reset(None)

    def _reset(self, body: bytes | None) -> None:
        if body is not None:
            self._note(b"")
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())  # close() would wait for the files over it


def _with_refusals(answer: bytes, held: dict[int, bytes]) -> bytes:
    """A bulk's answer as if the held operations had been refused."""
    data = json.loads(answer)
    passed = iter(data["items"])
    error = {"type": "es_rejected_execution_exception", "reason": "injected: queue is full"}
    data["items"] = [
        {"create": {"_id": json.loads(held[n])["create"]["_id"], "status": 429, "error": error}}
        if n in held
        else next(passed)
        for n in range(len(held) + len(data["items"]))
    ]
    return json.dumps({**data, "errors": True}).encode()


def _spoilt(answer: bytes, kind: str) -> bytes:
    try:
        data = json.loads(answer)
    except ValueError:
        return answer
    if kind == "other_items" and data.get("items"):
        data["items"].pop()
    elif "hits" in data or "count" in data:
        if kind == "timed_out" and "hits" in data:
            data["timed_out"] = True
        elif kind == "shards_failed":
            data["_shards"]["failed"] = 1
        else:
            return answer
        hits = data.get("hits", {}).get("hits", [])
        del hits[len(hits) // 2 :]
        data["count"] = data.get("count", 0) // 2
    return json.dumps(data).encode()


def certificate(folder: Path) -> Path | None:
    """Make a certificate for 127.0.0.1 that signs itself, with its key, in one PEM file; None without `openssl`."""
    if shutil.which("openssl") is None:
        return None
    pem, key = folder / "server.pem", folder / "server.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-keyout", str(key), "-out", str(pem), "-days", "2", "-subj", "/CN=127.0.0.1",
         "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True,
        capture_output=True,
    )  # fmt: skip
    pem.write_bytes(pem.read_bytes() + key.read_bytes())
    return pem
