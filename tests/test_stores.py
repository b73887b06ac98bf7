"""Log stores: the contract on SQLite, opening, and ingesting. Elasticsearch has a file of its own."""

from __future__ import annotations

import gzip
import json
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import ClassVar

import pytest

from flywheel_ray.errors import ConfigError, StoreError, StoreUnavailable
from flywheel_ray.records import Record, to_hit, to_json_line
from flywheel_ray.services import Appended, LogQuery, Refused
from flywheel_ray.stores import open_store
from flywheel_ray.stores.ingest import IngestSummary, ingest, read_lines
from flywheel_ray.stores.sqlite import SCHEMA_VERSION, SqliteStore
from tests.contract_store import EVERYTHING, TransactionalLogStoreContract, read_elsewhere, record, scanned
from tests.values import BANKING


@pytest.fixture
def sqlite_store(tmp_path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(tmp_path / "logs.db")
    yield store
    store.close()


class TestSqlite(TransactionalLogStoreContract):
    numbers: ClassVar = [*TransactionalLogStoreContract.numbers, 2**64 + 1, 123456789.123456789, 5e-324]

    @pytest.fixture
    def store(self, sqlite_store: SqliteStore) -> SqliteStore:
        return sqlite_store

    @pytest.fixture
    def url(self, sqlite_store: SqliteStore) -> str:
        return str(sqlite_store.path)

    def test_parts_are_contiguous_and_even(self, store: SqliteStore) -> None:
        store.append([record(n) for n in range(1203)])
        found = [list(store.read(part)) for part in store.parts(EVERYTHING, 4)]
        assert [r for part in found for r in part] == scanned(store)
        assert [len(part) for part in found] == [301, 301, 301, 300]


# ── opening ─────────────────────────────────────────────────────────────────


def test_urls_of_sqlite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for url in ("a.db", "sqlite:///b.db", f"sqlite:///{tmp_path}/c.db", str(tmp_path / "d.db")):
        open_store(url).close()
    assert sorted(p.name for p in tmp_path.glob("*.db")) == ["a.db", "b.db", "c.db", "d.db"]


def test_a_password_is_not_shown() -> None:
    for url in ("https://me:s3cret@host:9200/", "postgres://me:s3cret@host/x"):
        with pytest.raises(ConfigError, match=r"log store '[a-z]+://host") as failure:
            open_store(url)
        assert "s3cret" not in str(failure.value)


@pytest.mark.parametrize(
    "url", ["", "postgres://x/y", "sqlite://logs.db", "sqlite:///", "http://host:9200", "https://host/"]
)
def test_urls_of_no_known_kind(url: str) -> None:
    with pytest.raises(ConfigError, match="log store"):
        open_store(url)


def test_a_reader_does_not_make_the_file(tmp_path: Path) -> None:
    path = tmp_path / "logs.db"
    with pytest.raises(StoreError) as failure:
        open_store(str(path), create=False)
    assert str(failure.value) == (
        f"no log store at {path}; run `flywheel ingest` first or set --store / FLYWHEEL_STORE"
    )
    assert not path.exists()
    open_store(str(path)).close()
    open_store(str(path), create=False).close()


def test_what_is_no_log_store_is_refused_and_left_alone(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not a database " * 100)
    with pytest.raises(StoreError, match=r"notes\.txt: file is not a database"):
        SqliteStore(text)
    assert text.read_text() == "not a database " * 100
    with pytest.raises(StoreError, match="is a directory"):
        SqliteStore(tmp_path)
    with pytest.raises(StoreError, match="does not exist; create it first"):
        SqliteStore(tmp_path / "missing" / "logs.db")
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE records (x)")
        db.execute("PRAGMA user_version = 1")
    db.close()
    before = other.read_bytes()
    with pytest.raises(StoreError, match="database of something else"):
        SqliteStore(other)
    assert other.read_bytes() == before


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    SqliteStore(tmp_path / "logs.db").close()
    with sqlite3.connect(tmp_path / "logs.db") as db:
        assert db.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(StoreError, match="schema version 99, newer than"):
        SqliteStore(tmp_path / "logs.db")


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "logs.db")
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.append([record(1)])


def test_a_damaged_row_names_the_record(sqlite_store: SqliteStore) -> None:
    sqlite_store.append([record(1)])
    with sqlite3.connect(sqlite_store.path) as db:
        db.execute("UPDATE records SET hit = '{}'")
    db.close()
    with pytest.raises(StoreError, match=f"record {record(1).id} is damaged: .* is missing"):
        scanned(sqlite_store)


def test_a_file_of_the_first_schema_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "logs.db"
    with closing(SqliteStore(path)) as store:
        store.append([record(1), record(2)])
    with sqlite3.connect(path) as db:  # as it was before there was a purge
        db.execute("DROP TABLE purged")
        db.execute("PRAGMA user_version = 1")
    db.close()
    with closing(SqliteStore(path)) as store:
        assert scanned(store) == [record(1), record(2)]
        assert store.append([record(2), record(3)]) == Appended(added=1, duplicates=1)
        assert store.purge(LogQuery(until=2)) == 1
    with closing(SqliteStore(path)) as store:
        assert scanned(store) == [record(2), record(3)]


def test_a_purge_lets_others_write(tmp_path: Path) -> None:
    with closing(SqliteStore(tmp_path / "logs.db")) as store:
        store.append([record(n) for n in range(10_000)])
        done = threading.Event()

        def purge() -> None:
            with closing(SqliteStore(store.path)) as other:
                assert other.purge(LogQuery(until=10_000)) == 10_000
            done.set()

        with ThreadPoolExecutor(1) as pool:
            purging = pool.submit(purge)
            between = 0
            while not done.is_set():
                store.append([record(50_000 + between)])
                between += not done.is_set()
            purging.result()
        assert between > 1
        assert store.count(EVERYTHING) >= between


def test_a_full_disk_is_worth_repeating(sqlite_store: SqliteStore) -> None:
    sqlite_store._db.execute("PRAGMA max_page_count = 40")
    with pytest.raises(StoreUnavailable, match="disk is full; make room"):
        sqlite_store.append([record(n, "long " * 100) for n in range(500)])
    assert sqlite_store.count(EVERYTHING) == 0
    sqlite_store._db.execute("PRAGMA max_page_count = 4000")
    assert sqlite_store.append([record(1)]).added == 1


def test_a_file_locked_for_too_long_is_unavailable(tmp_path: Path) -> None:
    with closing(open_store(str(tmp_path / "logs.db"), patience_s=0.1)) as store:
        with closing(sqlite3.connect(tmp_path / "logs.db")) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(StoreUnavailable, match="locked by another process"):
                store.append([record(1)])
        assert store.append([record(1)]).added == 1


@pytest.mark.slow
def test_parts_are_read_by_other_processes(sqlite_store: SqliteStore) -> None:
    sqlite_store.append([record(n) for n in range(5000)])
    parts = sqlite_store.parts(EVERYTHING, 4)
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        found = list(pool.map(partial(read_elsewhere, str(sqlite_store.path)), parts))
    assert [len(part) for part in found] == [1250] * 4
    assert [r for part in found for r in part] == scanned(sqlite_store)


def test_a_scan_of_a_workload_sorts_nothing(sqlite_store: SqliteStore) -> None:
    from flywheel_ray.stores.sqlite import _index, _where

    for query in (LogQuery(), LogQuery(client_id="a", workload_id="w"), LogQuery(rollout="r"), LogQuery(served_by="s")):
        where, values = _where(query)
        order = "AND (timestamp, id) > (1, 'x') ORDER BY timestamp, id"
        sql = f"SELECT * FROM records INDEXED BY {_index(query)} WHERE {where} {order}"
        plan = str(sqlite_store._db.execute(f"EXPLAIN QUERY PLAN {sql}", values).fetchall())
        assert "TEMP B-TREE" not in plan


WRITER = """
import sys
sys.path.insert(0, sys.argv[3])
from tests.contract_store import record
from flywheel_ray.stores import open_store
store = open_store(sys.argv[1])
for n in range(40):
    store.append([record(n, f"process {sys.argv[2]}"), record(n, "shared")])
"""


def test_processes_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "logs.db"
    root = str(Path(__file__).parent.parent)
    # None has made the file yet, so they also race to make it.
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(n), root]) for n in range(3)]
    while not path.exists():
        time.sleep(0.01)
    store = open_store(str(path))
    while any(w.poll() is None for w in writers):
        found = scanned(store)
        assert [(r.timestamp, r.id) for r in found] == sorted((r.timestamp, r.id) for r in found)
        time.sleep(0.02)
    assert [w.returncode for w in writers] == [0, 0, 0]
    assert store.count(EVERYTHING) == 160
    store.close()


# ── ingesting ───────────────────────────────────────────────────────────────


def line(number: int) -> bytes:
    return to_json_line(to_hit(record(number)))


def rejects_in(path: Path) -> list[tuple[str, int]]:
    return [(r["source"], r["line_number"]) for r in map(json.loads, path.read_bytes().splitlines())]


def test_ingest_counts_and_keeps_what_it_rejects(sqlite_store: SqliteStore, tmp_path: Path) -> None:
    bad = json.loads(line(9))
    bad["response"]["choices"][0]["message"]["tool_calls"] = [{"function": {"name": "f", "arguments": '{"queue": '}}]
    lines = [line(1), b"\n", line(2), b"{broken\xff\r\n", line(1), b"  \n", json.dumps(bad).encode(), b"[]\n", b"{x\n"]
    rejects = tmp_path / "out" / "rejects.jsonl"
    seen: list[IngestSummary] = []
    summary = ingest(lines, "logs.jsonl", sqlite_store, rejects, seen.append, batch=3)
    assert summary == IngestSummary(
        lines=7,
        added=2,
        duplicates=1,
        rejected=4,
        reasons={
            "not JSON": 2,
            "response.choices[].message.tool_calls[].function.arguments is not a JSON object": 1,
            "the line is a list, not an object": 1,
        },
    )
    assert [s.lines for s in seen] == [3, 6, 7] and seen[-1] == summary
    kept = [json.loads(row) for row in rejects.read_bytes().splitlines()]
    assert [row["line_number"] for row in kept] == [4, 7, 8, 9]
    assert kept[0]["line"] == "{broken\\xff" and kept[0]["source"] == "logs.jsonl"
    assert kept[1]["line"] == json.dumps(bad)
    assert kept[1]["reason"].startswith(
        "response.choices[0].message.tool_calls[0].function.arguments is not a JSON object: "
    )


def test_rejects_are_of_the_last_run_of_each_source(sqlite_store: SqliteStore, tmp_path: Path) -> None:
    rejects = tmp_path / "rejects.jsonl"
    ingest([line(1)], "a", sqlite_store, rejects)
    assert not rejects.exists()
    for _ in range(2):
        ingest([b"x", line(1), b"y"], "a", sqlite_store, rejects)
        ingest([b"z"], "b", sqlite_store, rejects)
    assert rejects_in(rejects) == [("a", 1), ("a", 3), ("b", 1)]
    ingest([line(5)], "a", sqlite_store, rejects)
    assert rejects_in(rejects) == [("b", 1)]
    ingest([line(6)], "b", sqlite_store, rejects)
    assert not rejects.exists()
    assert sorted(p.name for p in tmp_path.iterdir() if "logs.db" not in p.name) == []


def test_an_interrupted_run_keeps_its_rejects_and_those_it_did_not_reach(
    sqlite_store: SqliteStore, tmp_path: Path
) -> None:
    def interrupted() -> Iterator[bytes]:
        yield from (b"new 1", line(2), b"new 3")
        raise KeyboardInterrupt

    rejects = tmp_path / "rejects.jsonl"
    ingest([b"x", b"x", b"x", b"x"], "a", sqlite_store, rejects)
    with pytest.raises(KeyboardInterrupt):
        ingest(interrupted(), "a", sqlite_store, rejects)
    assert rejects_in(rejects) == [("a", 4), ("a", 1), ("a", 3)]


def test_a_store_that_refuses_ends_the_run_and_keeps_the_rejects(tmp_path: Path) -> None:
    class Full(SqliteStore):
        def append(self, records: Iterable[Record]) -> Appended:
            raise StoreError("disk full")

    store = Full(tmp_path / "full.db")
    with pytest.raises(StoreError, match="disk full"):
        ingest([b"x", line(1)], "a", store, tmp_path / "rejects.jsonl")
    assert rejects_in(tmp_path / "rejects.jsonl") == [("a", 1)]
    store.close()


def test_what_the_store_refuses_is_among_the_rejects(tmp_path: Path) -> None:
    class Choosy(SqliteStore):
        def append(self, records: Iterable[Record]) -> Appended:
            chosen, others = [], []
            for r in records:
                (others if int(r.timestamp) % 2 else chosen).append(r)
            refused = tuple(Refused(id=r.id, reason="mapper_parsing_exception: odd") for r in others)
            return super().append(chosen).model_copy(update={"refused": refused})

    with closing(Choosy(tmp_path / "choosy.db")) as store:
        lines = [line(1), b"x", line(2), line(3), line(4)]
        summary = ingest(lines, "a", store, tmp_path / "rejects.jsonl", batch=2)
    assert (summary.lines, summary.added, summary.rejected) == (5, 2, 3)
    assert summary.reasons == {"refused by the store": 2, "not JSON": 1}
    assert rejects_in(tmp_path / "rejects.jsonl") == [("a", 2), ("a", 1), ("a", 4)]
    (_, first, _) = map(json.loads, (tmp_path / "rejects.jsonl").read_bytes().splitlines())
    assert first["reason"] == "refused by the store: mapper_parsing_exception: odd"
    assert first["line"].encode() == line(1).rstrip()


def test_an_empty_source_reports_once(sqlite_store: SqliteStore, tmp_path: Path) -> None:
    seen: list[IngestSummary] = []
    summary = ingest([b"\n"], "a", sqlite_store, tmp_path / "rejects.jsonl", seen.append)
    assert seen == [summary] and summary.lines == 0


def test_gzip_is_told_by_its_first_bytes(tmp_path: Path) -> None:
    packed = tmp_path / "logs.jsonl"
    packed.write_bytes(gzip.compress(line(1) + line(2)))
    assert list(read_lines(packed)) == [line(1), line(2)]
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(ConfigError, match="cannot read log file"):
        list(read_lines(packed))
    with pytest.raises(ConfigError, match="No such file"):
        list(read_lines(tmp_path / "missing"))


@pytest.mark.skipif(not BANKING.exists(), reason="no shared/data beside the checkout")
def test_real_traffic(sqlite_store: SqliteStore, tmp_path: Path) -> None:
    first = ingest(read_lines(BANKING), BANKING.name, sqlite_store, tmp_path / "rejects.jsonl")
    assert (first.lines, first.added, first.rejected) == (1629, 1629, 0)
    again = ingest(read_lines(BANKING), BANKING.name, sqlite_store, tmp_path / "rejects.jsonl")
    assert (again.added, again.duplicates) == (0, 1629)
    assert sqlite_store.workloads() == [("banking-app", "banking.router", 1629)]
    assert len(scanned(sqlite_store, workload_id="banking.router")) == 1629
