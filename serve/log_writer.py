"""Keeps what the gateway sees: a short queue in memory, then a spool on disk, then the log store.

    log = LogWriter("http://elastic:9200/logs", spool=Path("runs/spool"))
    log.put({"client_id": "acme", …})     # never blocks; a full queue drops and counts
    log.close()                           # flushes

Every hit is written to the spool before it is appended to the store, within milliseconds of `put`: also a process that
is killed while the store is away, or while an append is under way, loses none of them. The next process to use the
folder replays what is left, in order; the store tells what it has already by its id. Without a spool, or where its disk
fails, hits wait in memory. One thread writes to the disk, another to the store; nothing they do reaches the request
path.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flywheel_ray.errors import StoreError, StoreUnavailable
from flywheel_ray.records import Record, Rejected, from_hit, parse_line, to_json_line
from flywheel_ray.services import LogStore
from flywheel_ray.stores import open_store
from serve.spool import Batch, Spool

_log = logging.getLogger(__name__)
_PATIENCE_S = 2.0  # of the store's; beyond it, waiting is done here
_LINGER_S = 0.05  # hits that come meanwhile are one append
REFUSED = "refused.jsonl"
Hit = dict[str, Any]


def spool_of(store_url: str, folder: Path) -> Path:
    """Where in a folder to spool for a store, so that what waits for one never reaches another.

    A user and password in the URL do not count.
    """
    scheme, found, rest = store_url.rpartition("://")
    host, slash, path = rest.partition("/")
    address = f"{scheme}{found}{host.rpartition('@')[2]}{slash}{path}"
    return folder / f"{Path(rest).stem}-{hashlib.sha256(address.encode()).hexdigest()[:8]}"


class LogWriter:
    """A non-blocking sink of log hits (see `records.from_hit`). `put` may be called from any thread."""

    def __init__(
        self,
        store_url: str,
        capacity: int = 10_000,
        batch: int = 256,
        retry_s: float = 1.0,
        open_store: Callable[[str], LogStore] = functools.partial(open_store, patience_s=_PATIENCE_S),
        spool: Path | None = None,
        spool_bytes: int = 1 << 30,
    ) -> None:
        """Check that the store opens, then start the threads.

        Args:
            store_url: as `stores.open_store` reads it.
            capacity: hits that may wait in memory.
            batch: records of one append at most.
            retry_s: pause after the store did not answer.
            spool: folder on a local disk, which several processes may share; None keeps hits in memory only.
            spool_bytes: what this process may leave waiting there; beyond it, hits are dropped and counted.

        Raises:
            StoreError: the store is damaged or the URL is wrong. One that only does not answer yet is no error.
        """
        self._url, self._batch, self._retry_s, self._open_store = store_url, batch, retry_s, open_store
        self._queue: queue.Queue[Hit] = queue.Queue(capacity)
        self._dropped = 0  # counted apart: by `put`, without a lock
        self._counts = dict.fromkeys(
            ("written", "duplicates", "spool_full", "spool_failed", "rejected", "refused", "lost"), 0
        )
        self._counting = threading.Lock()
        self._memory: list[bytes] = []
        self._work = threading.Event()  # there may be something for the store
        self._closing = threading.Event()
        self._collected = threading.Event()
        self._deadline = float("inf")
        self._last_error: str | None = None
        self._said: dict[str, str] = {}  # the last warning about each thing, so that none is repeated all the time
        try:
            self._open_store(store_url).close()
        except StoreUnavailable as error:
            self._trouble(error)
        self._folder, self._spool_bytes = spool, spool_bytes
        self._spool = self._open_spool()
        self._threads = [
            threading.Thread(target=target, name=f"log-{name}", daemon=True)
            for name, target in (("collector", self._collect), ("writer", self._write))
        ]
        for thread in self._threads:
            thread.start()

    def put(self, hit: Hit) -> None:
        """Keep a hit, or drop and count it where the queue is full."""
        try:
            self._queue.put_nowait(hit)
        except queue.Full:
            self._dropped += 1

    def status(self) -> Mapping[str, Any]:
        """Counters since the start, and what waits.

        queued: hits in memory; spooled_bytes: on disk and not in the store yet; written, duplicates: in the store;
        dropped: the queue was full; spool_full: the spool was; spool_failed: times its disk failed and a hit stayed in
        memory; rejected: no record; refused: by the store, kept in the spool's `refused.jsonl` in the form that
        `flywheel ingest` reads; lost: refused or left over with nowhere to keep it.
        """
        queued = self._queue.unfinished_tasks + len(self._memory)  # those in the collector's hands are among them
        spooled = self._spool.waiting_bytes if self._spool else 0
        with self._counting:
            counts = dict(self._counts)
        return {
            "queued": queued,
            "spooled_bytes": spooled,
            "dropped": self._dropped,
            **counts,
            "last_error": self._last_error,
        }

    def close(self, timeout_s: float = 10.0) -> None:
        """Write what is waiting, for at most `timeout_s`. What is in the spool then stays there; the rest is lost."""
        self._deadline = time.monotonic() + timeout_s
        self._closing.set()
        self._work.set()
        for thread in self._threads:
            thread.join(max(0.0, self._deadline - time.monotonic()) + 5)
        if self._spool is not None and not any(thread.is_alive() for thread in self._threads):
            self._spool.close()

    # ── from the queue to the disk ────────────────────────────────────────────────────────────────────────────────────

    def _collect(self) -> None:
        while hits := self._take():
            lines = [line for hit in hits if (line := self._line(hit)) is not None]
            if lines:
                self._keep(lines)
            for _ in hits:
                self._queue.task_done()
            self._work.set()
        self._collected.set()
        self._work.set()

    def _take(self) -> list[Hit]:
        """The next hits; empty when closing and nothing is left."""
        while True:
            try:
                hits = [self._queue.get(timeout=0.1)]
                break
            except queue.Empty:
                if self._closing.is_set():
                    return []
        while len(hits) < self._batch:
            try:
                hits.append(self._queue.get_nowait())
            except queue.Empty:
                break
        return hits

    def _line(self, hit: Hit) -> bytes | None:
        try:
            return to_json_line(hit)
        except (TypeError, ValueError, RecursionError):
            self._count(rejected=1)
            return None

    def _keep(self, lines: list[bytes]) -> None:
        """Put lines where they outlive this process or, while that fails, where the writer takes them from memory."""
        failed = False
        while True:
            if self._spool is not None:
                try:
                    kept = self._spool.write(lines)
                    self._count(spool_full=len(lines) - kept)
                    return
                except OSError as error:
                    if not failed:
                        self._trouble(error, f"the spool {self._folder} cannot be written; hits wait in memory")
                        self._count(spool_failed=1)
                    failed = True
            if not self._memory:
                self._memory = lines
                return
            if not self._time_is_left():
                self._count(lost=len(lines))
                return
            self._work.set()
            time.sleep(0.02)  # the queue fills meanwhile, and `put` drops and counts

    # ── from the disk to the store ────────────────────────────────────────────────────────────────────────────────────

    def _write(self) -> None:
        store: LogStore | None = None
        while (found := self._next()) is not None:
            lines, batch = found
            exchanges = [(record, line) for line in lines if (record := self._record(line)) is not None]
            stored = not exchanges
            while not stored:
                try:
                    store = store or self._open_store(self._url)
                    self._append(store, exchanges)
                    stored = True
                except Exception as error:  # the thread must outlive whatever a store does
                    self._trouble(error)
                    if not self._wait(spooled=batch is not None):
                        break
            if batch is None:
                self._count(lost=0 if stored else len(exchanges))
                self._memory = []
            elif stored and self._spool is not None:
                self._spool.done(batch)
            else:
                break  # closing; they are safe where they are
        if store is not None:
            store.close()

    def _next(self) -> tuple[list[bytes], Batch | None] | None:
        """The next lines, and where in the spool they are; None when closing and nothing is left, or no time for it."""
        while True:
            last = self._collected.is_set()
            if self._memory:
                return self._memory, None
            if self._spool is not None and self._time_is_left():
                try:
                    if (batch := self._spool.read(self._batch)) is not None:
                        return batch.lines, batch
                except OSError as error:
                    self._trouble(error, f"the spool {self._folder} cannot be read")
            if last:
                return None
            if self._work.wait(0.5):
                self._closing.wait(_LINGER_S)
            self._work.clear()

    def _record(self, line: bytes) -> Record | None:
        """A hit whose answer is unreadable is kept as an exchange that failed."""
        record = parse_line(line)
        if isinstance(record, Rejected):
            try:
                hit = json.loads(line)
                record = record if hit.get("error") else from_hit({**hit, "error": "bad_response"})
            except (ValueError, AttributeError, TypeError):
                pass
        if isinstance(record, Rejected):
            self._count(rejected=1)
            return None
        return record

    def _append(self, store: LogStore, exchanges: list[tuple[Record, bytes]]) -> None:
        """Append to the store. A StoreError is the store's trouble, which passes or is repaired: it is raised."""
        try:
            done = store.append([record for record, _ in exchanges])
        except StoreError:
            raise
        except Exception as error:
            if len(exchanges) > 1:  # one record must not take its batch along
                for exchange in exchanges:
                    self._append(store, [exchange])
                return
            self._trouble(error)
            self._set_aside(exchanges[0][1])
            return
        self._count(written=done.added, duplicates=done.duplicates)
        if done.refused:
            lines = {record.id: line for record, line in exchanges}
            for refused in done.refused:
                self._trouble(StoreError(f"record {refused.id} is refused: {refused.reason}"))
                self._set_aside(lines[refused.id])

    def _set_aside(self, line: bytes) -> None:
        """Keep what the store will never take, for someone to look at."""
        try:
            if self._folder is None:
                raise OSError("no folder to keep it in")
            path = self._folder / REFUSED
            with path.open("ab") as file:
                if file.tell() + len(line) > self._spool_bytes:
                    raise OSError(f"{path} is full")
                file.write(line)
            self._count(refused=1)
        except OSError as error:
            self._trouble(error)
            self._count(lost=1)

    # ── both ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _open_spool(self) -> Spool | None:
        if self._folder is None:
            return None
        try:
            return Spool(self._folder, self._spool_bytes)
        except OSError as error:
            self._trouble(error, f"there can be no spool at {self._folder}; hits wait in memory")
            self._count(spool_failed=1)
            return None

    def _wait(self, spooled: bool) -> bool:
        """Pause before another attempt; False where there is no time, or no need, for one."""
        if not self._closing.is_set():
            self._closing.wait(self._retry_s)
        elif spooled:
            return False
        else:
            time.sleep(0.1)
        return self._time_is_left()

    def _time_is_left(self) -> bool:
        return time.monotonic() < self._deadline

    def _count(self, **more: int) -> None:
        with self._counting:
            for name, number in more.items():
                self._counts[name] += number

    def _trouble(self, error: Exception, what: str = "log store") -> None:
        self._last_error = text = f"{type(error).__name__}: {error}"
        if self._said.get(what) != text:
            _log.warning("%s: %s", what, text)
        self._said[what] = text
