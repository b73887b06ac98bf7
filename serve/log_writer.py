"""Keeps what the gateway sees: a bounded queue in memory, drained into the log store by one background thread.

    log = LogWriter("sqlite:///runs/logs.db")
    log.put({"client_id": "acme", …})     # never blocks; a full queue drops and counts
    log.close()                           # flushes

A store that does not answer is tried again; nothing it does reaches the request path.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from flywheel_ray.errors import StoreError, StoreUnavailable
from flywheel_ray.records import Record, Rejected, from_hit
from flywheel_ray.services import LogStore
from flywheel_ray.stores import open_store

_log = logging.getLogger(__name__)
Hit = dict[str, Any]


class LogWriter:
    """A non-blocking sink of log hits (see `records.from_hit`). `put` may be called from any thread."""

    def __init__(
        self,
        store_url: str,
        capacity: int = 10_000,
        batch: int = 256,
        retry_s: float = 1.0,
        open_store: Callable[[str], LogStore] = open_store,
    ) -> None:
        """Check that the store opens, then start the thread.

        Args:
            store_url: as `stores.open_store` reads it.
            capacity: hits that may wait in memory.
            batch: records of one append at most.
            retry_s: pause after the store did not answer.

        Raises:
            StoreError: the store is damaged or the URL is wrong. One that only does not answer yet is no error.
        """
        self._url, self._batch, self._retry_s, self._open_store = store_url, batch, retry_s, open_store
        self._queue: queue.Queue[Hit] = queue.Queue(capacity)
        self._closing = threading.Event()
        self._deadline = float("inf")
        self._counts = {"written": 0, "duplicates": 0, "dropped": 0, "rejected": 0, "lost": 0}
        self._in_hand = 0
        self._last_error: str | None = None
        try:
            self._open_store(store_url).close()
        except StoreUnavailable as error:
            self._trouble(error)
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()

    def put(self, hit: Hit) -> None:
        """Keep a hit, or drop and count it where the queue is full."""
        try:
            self._queue.put_nowait(hit)
        except queue.Full:
            self._counts["dropped"] += 1

    def status(self) -> Mapping[str, Any]:
        """Counters: written, duplicates, dropped (queue full), rejected (no record), lost (refused by the store)."""
        return {"queued": self._queue.qsize() + self._in_hand, **self._counts, "last_error": self._last_error}

    def close(self, timeout_s: float = 10.0) -> None:
        """Write what is waiting, for at most `timeout_s`; what is left then is counted as lost."""
        self._deadline = time.monotonic() + timeout_s
        self._closing.set()
        self._thread.join(timeout_s + 5)

    def _run(self) -> None:
        store: LogStore | None = None
        while batch := self._take():
            self._in_hand = len(batch)
            records = [r for hit in batch if (r := self._record(hit)) is not None]
            while records:
                try:
                    store = store or self._open_store(self._url)
                    self._append(store, records)
                    break
                except StoreUnavailable as error:
                    self._trouble(error)
                    if self._wait():
                        continue
                except Exception as error:  # the thread must outlive whatever a store does
                    self._trouble(error)
                self._counts["lost"] += len(records)
                break
            self._in_hand = 0
        if store is not None:
            store.close()

    def _take(self) -> list[Hit]:
        """The next hits; empty when closing and nothing is left."""
        while True:
            try:
                batch = [self._queue.get(timeout=0.1)]
                break
            except queue.Empty:
                if self._closing.is_set():
                    return []
        while len(batch) < self._batch:
            try:
                batch.append(self._queue.get_nowait())
            except queue.Empty:
                break
        return batch

    def _record(self, hit: Hit) -> Record | None:
        """A hit whose answer is unreadable is kept as an exchange that failed."""
        record = from_hit(hit)
        if isinstance(record, Rejected) and not hit.get("error"):
            record = from_hit({**hit, "error": "bad_response"})
        if isinstance(record, Rejected):
            self._counts["rejected"] += 1
            return None
        return record

    def _append(self, store: LogStore, records: list[Record]) -> None:
        try:
            self._count(store.append(records))
        except StoreUnavailable:
            raise
        except StoreError:
            if len(records) == 1:
                raise
            for record in records:  # one refused record must not take its batch along
                try:
                    self._count(store.append([record]))
                except StoreUnavailable:
                    raise
                except StoreError as error:
                    self._counts["lost"] += 1
                    self._trouble(error)

    def _count(self, appended: Any) -> None:
        self._counts["written"] += appended.added
        self._counts["duplicates"] += appended.duplicates

    def _wait(self) -> bool:
        """Pause before another attempt; False where there is no time for one."""
        pause = 0.1 if self._closing.is_set() else self._retry_s
        if self._closing.is_set():
            time.sleep(pause)
        else:
            self._closing.wait(pause)
        return time.monotonic() < self._deadline

    def _trouble(self, error: Exception) -> None:
        text = f"{type(error).__name__}: {error}"
        if text != self._last_error:
            _log.warning("log store: %s", text)
        self._last_error = text
