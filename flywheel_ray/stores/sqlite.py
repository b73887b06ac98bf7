"""The embedded log store: one SQLite file in WAL mode, which the gateway writes while the command line reads.

    store = SqliteStore("logs.db")
    store.append([record])                                     # Appended(added=1, duplicates=0, refused=())
    next(store.scan(LogQuery(workload_id="support"))).id

Row numbers only ever grow, so reading is isolated by remembering the highest one at its beginning: it goes page after
page without holding a transaction, however slow its consumer is, and in several processes at once. The file must be on
a local disk (WAL needs shared memory). After a power cut the last appends may be missing; the file stays whole.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

from flywheel_ray.errors import StoreError, StoreUnavailable
from flywheel_ray.records import Record, Rejected, parse_line, to_hit, to_json_line
from flywheel_ray.services import Appended, LogPart, LogQuery

SCHEMA_VERSION = 2
APPLICATION_ID = 0x666C7977  # "flyw": tells our files from other programs' databases
BUSY_TIMEOUT_S = 30.0

# Every index ends with (timestamp, id), the order of a scan.
_RECORDS = """
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
# The highest row number ever purged. SQLite would give it out again, and a scan take the newcomer for an old record.
_PURGED = """
CREATE TABLE purged (highest INTEGER NOT NULL);
INSERT INTO purged VALUES (0);
"""
_UPGRADES = [_RECORDS + _PURGED, _PURGED]  # from schema version 0 (a new file), 1, …

_INSERT = """
INSERT INTO records (seq, id, client_id, workload_id, served_by, rollout, timestamp, hit)
VALUES (?, ?, ?, ?, ?, ?, ?, CAST(? AS TEXT)) ON CONFLICT (id) DO NOTHING
"""
_LAST = "SELECT COALESCE(MAX(seq), 0) FROM records"
_CHUNK = 500
_PAGE_ROWS = 500
_PAGE_BYTES = 8 << 20
_PART_ROWS = 200  # sharing fewer costs more than reading them
_PURGE_ROWS = 2000
_PURGE_PAUSE_S = 0.02


class SqliteStore:
    """A LogStore in one file. Safe to use from several threads and, each opening its own, from several processes.

    Args:
        path: the file; made where it does not exist.
        patience_s: how long a call waits for other processes that write.

    Raises:
        StoreError: the path is a directory, in a folder that does not exist, or a file of something else.
        StoreUnavailable: another process keeps the file locked for longer, or the disk is full.
    """

    def __init__(self, path: str | Path, patience_s: float = BUSY_TIMEOUT_S) -> None:
        self.path = Path(path)
        self._patience_s = patience_s
        self._lock = threading.RLock()
        if self.path.is_dir():
            raise StoreError(
                f"log store {self.path} is a directory; name a file in it, such as {self.path / 'logs.db'}"
            )
        if not self.path.parent.is_dir():
            raise StoreError(f"log store {self.path}: folder {self.path.parent} does not exist; create it first")
        with self._errors():
            # autocommit: transactions are begun where they are meant, never by the driver.
            self._db = sqlite3.connect(self.path, timeout=patience_s, isolation_level=None, check_same_thread=False)
        try:
            with self._errors():
                self._prepare()
        except BaseException:
            self._db.close()
            raise

    def append(self, records: Iterable[Record]) -> Appended:
        """Store records that are not there yet, in one transaction: all of them or none. It refuses none."""
        chunks = _chunks(map(_row, records))
        first = next(chunks, None)  # the usual call is one chunk: encode it before anyone else has to wait
        if first is None:
            return Appended(added=0, duplicates=0)
        added = seen = 0
        with self._lock, self._errors(), self._transaction():
            (last,) = self._db.execute(f"SELECT MAX(highest, ({_LAST})) FROM purged").fetchone()
            for chunk in chain([first], chunks):
                rows = ((last + n, *row) for n, row in enumerate(chunk, start=seen + 1))
                added += self._db.executemany(_INSERT, rows).rowcount
                seen += len(chunk)
        return Appended(added=added, duplicates=seen - added)

    def scan(self, query: LogQuery) -> Iterator[Record]:
        """Records matching the query, ordered by (timestamp, id), as they were when the first one was asked for."""
        yield from self.read(self.parts(query, 1)[0])

    def parts(self, query: LogQuery, count: int) -> list[LogPart]:
        """Share a scan: contiguous ranges of (timestamp, id), in order, of equal size, by a walk along the index."""
        if count < 1:
            raise ValueError("a scan has at least one part")
        where, values = _where(query)
        index = _index(query)
        ends: list[tuple[float, str] | None] = [None]
        with self._lock, self._errors():
            (last,) = self._db.execute(_LAST).fetchone()
            if count > 1:
                matching = f"FROM records INDEXED BY {index} WHERE {where} AND seq <= ?"
                (total,) = self._db.execute(f"SELECT COUNT(*) {matching}", (*values, last)).fetchone()
                count = min(count, total // _PART_ROWS + 1)
                for _ in range(count - 1):
                    after, key = _after(ends[-1])
                    sql = f"SELECT timestamp, id {matching}{after} ORDER BY timestamp, id LIMIT 1 OFFSET ?"
                    end = self._db.execute(sql, (*values, last, *key, -(-total // count) - 1)).fetchone()
                    if end is None:  # purged meanwhile
                        break
                    ends.append(end)
        told = query.model_dump(exclude_none=True)
        return [
            LogPart(state={"query": told, "last": last, "after": after, "to": to})
            for after, to in zip(ends, [*ends[1:], None], strict=True)
        ]

    def read(self, part: LogPart) -> Iterator[Record]:
        """The records of a part, ordered by (timestamp, id)."""
        for id, hit in self._stored(part):
            record = parse_line(hit)
            if isinstance(record, Rejected):
                raise StoreError(f"log store {self.path}: record {id} is damaged: {record.reason}")
            yield record

    def lines(self, part: LogPart) -> Iterator[bytes]:
        """The records of a part as they were stored, in the same order."""
        return (hit for _, hit in self._stored(part))

    def _stored(self, part: LogPart) -> Iterator[tuple[str, bytes]]:
        try:
            query = LogQuery.model_validate(part.state["query"])
            last, key, to = (part.state[name] for name in ("last", "after", "to"))
        except KeyError as error:
            raise StoreError(f"log store {self.path}: this part is of another kind of store") from error
        where, values = _where(query)
        if to is not None:
            where, values = f"{where} AND (timestamp, id) <= (?, ?)", [*values, *to]
        sql = f"SELECT timestamp, id, CAST(hit AS BLOB) FROM records INDEXED BY {_index(query)} WHERE {where}"
        while True:
            after, start = _after(key)
            page, size = [], 0
            with self._lock, self._errors():
                cursor = self._db.execute(
                    f"{sql}{after} AND seq <= ? ORDER BY timestamp, id LIMIT {_PAGE_ROWS}", (*values, *start, last)
                )
                for row in cursor:
                    page.append(row)
                    size += len(row[2])
                    if size > _PAGE_BYTES:
                        break
                cursor.close()
            for timestamp, id, hit in page:
                key = (timestamp, id)
                yield id, hit
            if not page:
                return

    def release(self, parts: Iterable[LogPart]) -> None:
        """Nothing to do: parts hold nothing."""

    def purge(self, query: LogQuery) -> int:
        """Delete every record that matches, and say how many were deleted.

        In short transactions with pauses as long, so that writers have their turn; where it raises, some may be
        deleted. The file keeps its size, and its free pages are used again.
        """
        where, values = _where(query)
        chosen = f"SELECT seq FROM records INDEXED BY {_index(query)} WHERE {where} AND seq <= ? LIMIT {_PURGE_ROWS}"
        deleted = 0
        with self._errors():
            with self._lock:
                (last,) = self._db.execute(_LAST).fetchone()
            while True:
                begin = time.monotonic()
                with self._lock, self._transaction():
                    self._db.execute(f"UPDATE purged SET highest = MAX(highest, ({_LAST}))")
                    done = self._db.execute(f"DELETE FROM records WHERE seq IN ({chosen})", (*values, last)).rowcount
                deleted += done
                if done < _PURGE_ROWS:
                    return deleted
                # A writer that waits asks again now and then, and would find the file locked each time.
                time.sleep(max(_PURGE_PAUSE_S, time.monotonic() - begin))

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
                version = self._version()  # asked again: another process may have been faster
                if version < SCHEMA_VERSION:
                    for statement in filter(str.strip, _UPGRADES[version].split(";")):
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
        deadline = time.monotonic() + self._patience_s
        while True:
            try:
                self._db.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if not _is(error, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED) or time.monotonic() > deadline:
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
            if _is(error, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise StoreUnavailable(f"log store {self.path} is locked by another process; try again") from error
            if _is(error, sqlite3.SQLITE_FULL):
                raise StoreUnavailable(f"log store {self.path}: its disk is full; make room") from error
            raise StoreError(f"log store {self.path}: {error}") from error
        except sqlite3.Error as error:
            raise StoreError(f"log store {self.path}: {error}") from error


def _is(error: sqlite3.OperationalError, *codes: int) -> bool:
    # The low byte of the code; extended ones say how it came to be so.
    return (getattr(error, "sqlite_errorcode", 0) & 0xFF) in codes


def _row(record: Record) -> tuple[str, str, str, str, str | None, float, bytes]:
    return (
        record.id,
        record.client_id,
        record.workload_id,
        record.served_by,
        record.rollout,
        record.timestamp,
        to_json_line(to_hit(record)).rstrip(),
    )


def _chunks(rows: Iterable[tuple[Any, ...]]) -> Iterator[list[tuple[Any, ...]]]:
    rows = iter(rows)
    while chunk := list(islice(rows, _CHUNK)):
        yield chunk


def _after(key: tuple[float, str] | None) -> tuple[str, tuple[Any, ...]]:
    """The condition of what comes after a key, and its values."""
    return (" AND (timestamp, id) > (?, ?)", tuple(key)) if key is not None else ("", ())


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
