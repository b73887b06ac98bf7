"""The embedded log store: one SQLite file in WAL mode, which the gateway writes while the command line reads.

    store = SqliteStore("logs.db")
    store.append([record])                                     # Appended(added=1, duplicates=0)
    next(store.scan(LogQuery(workload_id="support"))).id

Rows are only ever inserted, so a scan is isolated by remembering the highest row number at its beginning: it reads page
after page without holding a transaction, however slow its consumer is. The file must be on a local disk (WAL needs
shared memory). After a power cut the last appends may be missing; the file stays whole.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

from flywheel_ray.errors import StoreError, StoreUnavailable
from flywheel_ray.records import Record, Rejected, from_hit, to_hit, to_json_line
from flywheel_ray.services import Appended, LogQuery

SCHEMA_VERSION = 1
APPLICATION_ID = 0x666C7977  # "flyw": tells our files from other programs' databases
BUSY_TIMEOUT_S = 30.0

# Every index ends with (timestamp, id), the order of a scan.
_SCHEMA = """
CREATE TABLE records (
    seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    client_id TEXT NOT NULL,
    workload_id TEXT NOT NULL,
    served_by TEXT NOT NULL,
    rollout TEXT,
    timestamp REAL NOT NULL,
    hit TEXT NOT NULL
);
CREATE INDEX records_by_workload ON records (client_id, workload_id, timestamp, id);
CREATE INDEX records_by_rollout ON records (rollout, timestamp, id);
CREATE INDEX records_by_server ON records (served_by, timestamp, id);
CREATE INDEX records_by_time ON records (timestamp, id);
"""
_INSERT = """
INSERT INTO records (id, client_id, workload_id, served_by, rollout, timestamp, hit)
VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING
"""
_CHUNK = 500
_PAGE_ROWS = 500
_PAGE_CHARACTERS = 8 << 20


class SqliteStore:
    """A LogStore in one file. Safe to use from several threads and, each opening its own, from several processes.

    Raises:
        StoreError: the path is a directory, in a folder that does not exist, or a file of something else.
        StoreUnavailable: another process keeps the file locked for longer than `BUSY_TIMEOUT_S`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = threading.RLock()
        if self.path.is_dir():
            raise StoreError(
                f"log store {self.path} is a directory; name a file in it, such as {self.path / 'logs.db'}"
            )
        if not self.path.parent.is_dir():
            raise StoreError(f"log store {self.path}: folder {self.path.parent} does not exist; create it first")
        with self._errors():
            # autocommit: transactions are begun where they are meant, never by the driver.
            self._db = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        try:
            with self._errors():
                self._prepare()
        except BaseException:
            self._db.close()
            raise

    def append(self, records: Iterable[Record]) -> Appended:
        """Store records that are not there yet, in one transaction: all of them or none."""
        chunks = _chunks(map(_row, records))
        first = next(chunks, None)  # the usual call is one chunk: encode it before anyone else has to wait
        if first is None:
            return Appended(added=0, duplicates=0)
        added = seen = 0
        with self._lock, self._errors(), self._transaction():
            for chunk in chain([first], chunks):
                added += self._db.executemany(_INSERT, chunk).rowcount
                seen += len(chunk)
        return Appended(added=added, duplicates=seen - added)

    def scan(self, query: LogQuery) -> Iterator[Record]:
        """Records matching the query, ordered by (timestamp, id), as they were when the first one was asked for."""
        where, values = _where(query)
        index = _index(query)
        with self._lock, self._errors():
            (last,) = self._db.execute("SELECT COALESCE(MAX(seq), 0) FROM records").fetchone()
        key: tuple[float, str] | None = None
        while True:
            after = " AND (timestamp, id) > (?, ?)" if key else ""
            sql = (
                f"SELECT timestamp, id, hit FROM records INDEXED BY {index} WHERE {where}{after} AND seq <= ? "
                f"ORDER BY timestamp, id LIMIT {_PAGE_ROWS}"
            )
            page, size = [], 0
            with self._lock, self._errors():
                cursor = self._db.execute(sql, (*values, *(key or ()), last))
                for row in cursor:
                    page.append(row)
                    size += len(row[2])
                    if size > _PAGE_CHARACTERS:
                        break
                cursor.close()
            for timestamp, id, hit in page:
                key = (timestamp, id)
                yield self._record(id, hit)
            if not page:
                return

    def count(self, query: LogQuery) -> int:
        """How many records match."""
        where, values = _where(query)
        with self._lock, self._errors():
            (count,) = self._db.execute(f"SELECT COUNT(*) FROM records WHERE {where}", values).fetchone()
        return int(count)

    def workloads(self) -> list[tuple[str, str, int]]:
        """Every (client_id, workload_id, number of records), sorted."""
        sql = "SELECT client_id, workload_id, COUNT(*) FROM records GROUP BY 1, 2 ORDER BY 1, 2"
        with self._lock, self._errors():
            return self._db.execute(sql).fetchall()

    def close(self) -> None:
        """Close the file; the store is not used afterwards."""
        with self._lock:
            self._db.close()

    def _prepare(self) -> None:
        if self._version() < SCHEMA_VERSION:
            self._use_wal()
            with self._transaction():
                if self._version() == 0:  # asked again: another process may have been faster
                    for statement in filter(str.strip, _SCHEMA.split(";")):
                        self._db.execute(statement)
                    self._db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                    self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        self._db.execute("PRAGMA synchronous = NORMAL")

    def _version(self) -> int:
        """The file's schema version, 0 for a new file. One statement, so that what it reads belongs together."""
        application, version, tables = self._db.execute(
            "SELECT application_id, user_version, (SELECT COUNT(*) FROM sqlite_master) "
            "FROM pragma_application_id, pragma_user_version"
        ).fetchone()
        if application != APPLICATION_ID and (tables or version):
            raise StoreError(f"log store {self.path} is a SQLite database of something else; name another file")
        if version > SCHEMA_VERSION:
            raise StoreError(
                f"log store {self.path} has schema version {version}, newer than this program's {SCHEMA_VERSION}. "
                "Upgrade flywheel-ray."
            )
        return int(version)

    def _use_wal(self) -> None:
        # Changing the mode needs the file alone, and SQLite does not call its busy handler for that: wait here.
        deadline = time.monotonic() + BUSY_TIMEOUT_S
        while True:
            try:
                self._db.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if not _is_busy(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if _is_busy(error):
                raise StoreUnavailable(f"log store {self.path} is locked by another process; try again") from error
            raise StoreError(f"log store {self.path}: {error}") from error
        except sqlite3.Error as error:
            raise StoreError(f"log store {self.path}: {error}") from error

    def _record(self, id: str, hit: str) -> Record:
        record = from_hit(json.loads(hit))
        if isinstance(record, Rejected):
            raise StoreError(f"log store {self.path}: record {id} is damaged: {record.reason}")
        return record


def _is_busy(error: sqlite3.OperationalError) -> bool:
    # The low byte of the code; extended ones say how the file came to be busy.
    return (getattr(error, "sqlite_errorcode", 0) & 0xFF) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _row(record: Record) -> tuple[str, str, str, str, str | None, float, str]:
    hit = to_json_line(to_hit(record)).decode("utf-8").rstrip()
    return (
        record.id,
        record.client_id,
        record.workload_id,
        record.served_by,
        record.rollout,
        record.timestamp,
        hit,
    )


def _chunks(rows: Iterable[tuple[Any, ...]]) -> Iterator[list[tuple[Any, ...]]]:
    rows = iter(rows)
    while chunk := list(islice(rows, _CHUNK)):
        yield chunk


def _where(query: LogQuery) -> tuple[str, list[Any]]:
    terms, values = ["1"], []
    for field in ("client_id", "workload_id", "served_by", "rollout"):
        if (value := getattr(query, field)) is not None:
            terms.append(f"{field} = ?")
            values.append(value)
    for term, value in (("timestamp >= ?", query.since), ("timestamp < ?", query.until)):
        if value is not None:
            terms.append(term)
            values.append(value)
    return " AND ".join(terms), values


def _index(query: LogQuery) -> str:
    # Chosen here because the planner, without statistics, may pick an index that sorts every page anew.
    if query.client_id is not None and query.workload_id is not None:
        return "records_by_workload"
    if query.rollout is not None:
        return "records_by_rollout"
    return "records_by_server" if query.served_by is not None else "records_by_time"
