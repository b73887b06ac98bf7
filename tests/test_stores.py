"""Log stores: the contract on SQLite and on a server that speaks Elasticsearch's API, opening, and ingesting."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from flywheel_ray.errors import ConfigError, StoreError, StoreUnavailable
from flywheel_ray.records import Record, to_hit, to_json_line
from flywheel_ray.services import Appended, LogStore
from flywheel_ray.stores import open_store
from flywheel_ray.stores.ingest import IngestSummary, ingest, read_lines
from flywheel_ray.stores.sqlite import SCHEMA_VERSION, SqliteStore
from tests.contract_store import EVERYTHING, LogStoreContract, TransactionalLogStoreContract, record, scanned
from tests.values import BANKING


@pytest.fixture
def sqlite_store(tmp_path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(tmp_path / "logs.db")
    yield store
    store.close()


class TestSqlite(TransactionalLogStoreContract):
    @pytest.fixture
    def store(self, sqlite_store: SqliteStore) -> SqliteStore:
        return sqlite_store


# ── Elasticsearch ───────────────────────────────────────────────────────────


@pytest.fixture(scope="session")
def elastic_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """FLYWHEEL_TEST_ES_URL, or a noida-db of our own, which speaks the same API."""
    if url := os.environ.get("FLYWHEEL_TEST_ES_URL"):
        yield url.rstrip("/")
        return
    package = importlib.util.find_spec("noida_db")
    if package is None or package.origin is None:
        pytest.skip("needs noida-db (pip install -e '.[dev]') or FLYWHEEL_TEST_ES_URL")
    # The program itself: the `noida-db` command is a wrapper, and would leave it running when ended.
    program = Path(package.origin).with_name("noida-db")
    program.chmod(0o755)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("noida")
    command = [program, "start", "--only", "elasticsearch", "--elasticsearch-port", str(port), "--data-dir", folder]
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen([str(c) for c in command], stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            for _ in range(100):
                try:
                    with urllib.request.urlopen(url, timeout=2) as reply:
                        info = json.load(reply)
                    break
                except OSError:
                    assert server.poll() is None, (folder / "server.log").read_text()
                    time.sleep(0.1)
            else:
                pytest.fail("noida-db did not come up")
            print(f"\nElasticsearch API at {url}: {info['version'].get('build_hash')} as {info['version']['number']}")
            yield url
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


@pytest.mark.slow
class TestElasticsearch(LogStoreContract):
    @pytest.fixture
    def store(self, elastic_server: str) -> Iterator[LogStore]:
        from flywheel_ray.stores.elasticsearch import ElasticsearchStore

        store = open_store(f"{elastic_server}/flywheel-test-{uuid.uuid4().hex[:8]}")
        assert isinstance(store, ElasticsearchStore)
        yield store
        store._client.indices.delete(index=store.index)
        store.close()

    def test_a_reader_does_not_make_the_index(self, elastic_server: str) -> None:
        with pytest.raises(StoreError, match=r"no log store at .*/flywheel-none; run `flywheel ingest` first"):
            open_store(f"{elastic_server}/flywheel-none", create=False)

    def test_it_opens_again(self, store: LogStore, elastic_server: str) -> None:
        store.append([record(1)])
        again = open_store(f"{elastic_server}/{store.index}/", create=False)  # type: ignore[attr-defined]
        assert scanned(again) == [record(1)]
        again.close()

    def test_an_index_of_something_else_is_refused(self, elastic_server: str, store: LogStore) -> None:
        name = f"flywheel-else-{uuid.uuid4().hex[:8]}"
        client = store._client  # type: ignore[attr-defined]
        client.indices.create(index=name, mappings={"properties": {"timestamp": {"type": "date"}}})
        try:
            with pytest.raises(
                StoreError, match=r"is no flywheel log store \(its id, client_id, workload_id, timestamp"
            ):
                open_store(f"{elastic_server}/{name}")
        finally:
            client.indices.delete(index=name)

    def test_refused_items_are_reported(self, store: LogStore) -> None:
        store._client.indices.put_mapping(index=store.index, properties={"n": {"type": "long"}})  # type: ignore[attr-defined]
        good, bad = record(1), record(2).model_copy(update={"timestamp": "soon"})
        with pytest.raises(StoreError, match=rf"refused 1 of 2 records; the first, {bad.id}"):
            store.append([good, bad])


def test_elasticsearch_that_does_not_answer_is_unavailable() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://me:secret@127.0.0.1:{probe.getsockname()[1]}/logs"
    with pytest.raises(StoreUnavailable, match="does not answer") as failure:
        open_store(url)
    assert "secret" not in str(failure.value)


# ── opening ─────────────────────────────────────────────────────────────────


def test_urls_of_sqlite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for url in ("a.db", "sqlite:///b.db", f"sqlite:///{tmp_path}/c.db", str(tmp_path / "d.db")):
        open_store(url).close()
    assert sorted(p.name for p in tmp_path.glob("*.db")) == ["a.db", "b.db", "c.db", "d.db"]


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
    with pytest.raises(StoreError, match=f"record {record(1).id} is damaged: client_id is missing"):
        scanned(sqlite_store)


def test_a_scan_of_a_workload_sorts_nothing(sqlite_store: SqliteStore) -> None:
    from flywheel_ray.services import LogQuery
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
