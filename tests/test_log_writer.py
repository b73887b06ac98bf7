"""The gateway's log: what is put is stored once, whatever the store, the disk and the process do meanwhile."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from flywheel_ray.errors import StoreError, StoreUnavailable
from flywheel_ray.records import Record, from_hit
from flywheel_ray.services import Appended, LogQuery, Refused
from flywheel_ray.stores import open_store
from flywheel_ray.stores.ingest import ingest, read_lines
from serve.log_writer import REFUSED, LogWriter, spool_of
from serve.spool import Spool
from tests.elastic import NoidaDb
from tests.fault_proxy import FaultProxy

ROOT = Path(__file__).parent.parent


def hit(i: int, **fields: Any) -> dict[str, Any]:
    return {
        "client_id": "a",
        "workload_id": "b",
        "timestamp": float(i),
        "request": {"messages": [{"role": "user", "content": f"Question {i}, ünd"}]},
        "response": {"choices": [{"message": {"role": "assistant", "content": "x" * 200}}]},
        "exchange_id": f"e{i}",
        **fields,
    }


def until(check: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def exchanges(url: str) -> list[str | None]:
    with closing(open_store(url, create=False)) as store:
        return [record.exchange_id for record in store.scan(LogQuery())]


class Fickle:
    """A real store that can be away, refuse records, or break over them; remembers the order of what it got."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.away: StoreError | None = None
        self.refuses: set[str] = set()
        self.breaks: set[str] = set()
        self.seen: list[str | None] = []

    def open(self, url: str) -> Fickle:
        self._check()
        self._store = open_store(url)
        return self

    def _check(self) -> None:
        if self.away is not None:
            raise self.away

    def append(self, records: Iterable[Record]) -> Appended:
        self._check()
        records = list(records)
        if any(r.exchange_id in self.breaks for r in records):
            raise ZeroDivisionError("a record that nobody thought of")
        refused = [Refused(id=r.id, reason="odd") for r in records if r.exchange_id in self.refuses]
        taken = [r for r in records if r.exchange_id not in self.refuses]
        self.seen += [r.exchange_id for r in taken]
        return self._store.append(taken).model_copy(update={"refused": tuple(refused)})

    def close(self) -> None:
        self._store.close()


@pytest.fixture
def fickle(tmp_path: Path) -> Fickle:
    return Fickle(str(tmp_path / "logs.db"))


@pytest.fixture
def make(fickle: Fickle, tmp_path: Path) -> Iterator[Callable[..., LogWriter]]:
    made: list[LogWriter] = []

    def make(**settings: Any) -> LogWriter:
        settings = {"spool": tmp_path / "spool", "retry_s": 0.02, "open_store": fickle.open, **settings}
        made.append(LogWriter(fickle.url, **settings))
        return made[-1]

    yield make
    for log in made:
        log.close(0.1)


def test_an_outage_loses_nothing_and_is_replayed_in_order(make: Any, fickle: Fickle, tmp_path: Path) -> None:
    log = make(capacity=50)
    log.put(hit(0))
    until(lambda: log.status()["written"] == 1)
    for away in (StoreUnavailable("no answer"), StoreError("the key has expired")):
        fickle.away = away
        start = log.status()["written"]
        for i in range(start, start + 300):
            log.put(hit(i))
            until(lambda: log.status()["queued"] < 40)
        until(lambda: log.status()["queued"] == 0)
        status = log.status()
        assert status["written"] == start and status["spooled_bytes"] > 300 * 200
        assert str(away) in status["last_error"]
        fickle.away = None
        until(lambda start=start: log.status()["written"] == start + 300)  # type: ignore[misc]
    log.close()
    assert fickle.seen == [f"e{i}" for i in range(601)]
    assert {k: log.status()[k] for k in ("dropped", "lost", "spooled_bytes", "queued")} == {
        "dropped": 0, "lost": 0, "spooled_bytes": 0, "queued": 0,
    }  # fmt: skip
    assert list((tmp_path / "spool").iterdir()) == []


def test_what_a_closed_writer_leaves_is_for_the_next(make: Any, fickle: Fickle) -> None:
    fickle.away = StoreUnavailable("no answer")
    log = make()
    for i in range(20):
        log.put(hit(i))
    started = time.monotonic()
    log.close(timeout_s=20)
    assert time.monotonic() - started < 5  # the disk has them: no need to wait for the store
    assert log.status()["lost"] == 0 and log.status()["spooled_bytes"] > 0
    fickle.away = None
    log = make()
    log.put(hit(20))
    until(lambda: log.status()["written"] == 21)
    assert fickle.seen == [f"e{i}" for i in range(21)]


def test_a_spool_is_bounded_and_says_what_it_had_no_room_for(make: Any, fickle: Fickle) -> None:
    log = make(spool_bytes=20_000)
    fickle.away = StoreUnavailable("no answer")
    for i in range(100):
        log.put(hit(i))
    until(lambda: log.status()["queued"] == 0)
    full = log.status()["spool_full"]
    assert 0 < full < 100 and log.status()["spooled_bytes"] <= 20_000
    fickle.away = None
    until(lambda: log.status()["written"] == 100 - full)
    assert fickle.seen == [f"e{i}" for i in range(100 - full)]
    log.put(hit(100))
    until(lambda: log.status()["written"] == 101 - full)


def test_refused_records_are_set_aside_for_ingesting(make: Any, fickle: Fickle, tmp_path: Path) -> None:
    fickle.refuses, fickle.breaks = {"e3"}, {"e5"}
    log = make()
    for i in range(8):
        log.put(hit(i))
    log.put({"nonsense": True})
    log.put(hit(8) | {"response": {"odd": 1}})
    log.put(hit(9) | {"request": {1, 2}})
    log.close()
    status = log.status()
    assert (status["written"], status["refused"], status["rejected"], status["lost"]) == (7, 2, 2, 0)
    with closing(open_store(fickle.url)) as store:
        path = tmp_path / "spool" / REFUSED
        assert ingest(read_lines(path), "refused", store, tmp_path / "rejects.jsonl").added == 2
        errors = {record.exchange_id: record.error for record in store.scan(LogQuery())}
    assert sorted(errors) == [f"e{i}" for i in range(9)] and errors["e8"] == "bad_response"


def test_without_a_folder_what_is_refused_is_lost_and_counted(make: Any, fickle: Fickle) -> None:
    fickle.refuses = {"e1"}
    log = make(spool=None)
    for i in range(3):
        log.put(hit(i))
    log.close()
    assert (log.status()["written"], log.status()["lost"]) == (2, 1)


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_hits_wait_in_memory_where_the_disk_fails(
    make: Any, fickle: Fickle, tmp_path: Path, when: str, caplog: pytest.LogCaptureFixture
) -> None:
    spool = tmp_path / "spool"
    if when == "before":
        spool.write_text("a file, no folder")
    log = make()
    if when == "meanwhile":
        (folder,) = spool.iterdir()
        folder.rmdir()
    fickle.away = StoreUnavailable("no answer")
    for i in range(50):
        log.put(hit(i))
    time.sleep(0.1)
    assert log.status()["spool_failed"] > 0
    assert sum("hits wait in memory" in message for message in caplog.messages) == 1
    fickle.away = None
    log.close()
    assert log.status()["written"] == 50 and log.status()["lost"] == 0


FULL_DISK = """
import resource, sys, threading, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from flywheel_ray.errors import StoreUnavailable
from flywheel_ray.services import Appended
from serve.log_writer import LogWriter
from tests.test_log_writer import hit

away, got = threading.Event(), []
class Store:
    def append(self, records):
        if away.is_set():
            raise StoreUnavailable("no answer")
        got.extend(r.exchange_id for r in records)
        return Appended(added=len(records), duplicates=0)
    def close(self): pass

away.set()
log = LogWriter("x", retry_s=0.05, open_store=lambda url: Store(), spool=Path(sys.argv[2]))
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # as a disk that is full
for i in range(200):
    log.put(hit(i))
    time.sleep(0.001)
time.sleep(0.3)
assert log.status()["spool_failed"] >= 1 and 0 < log.status()["spooled_bytes"] <= 20_000, log.status()
away.clear()
log.close()
assert log.status()["lost"] == log.status()["dropped"] == 0, log.status()
assert sorted(got, key=lambda e: int(e[1:])) == [f"e{i}" for i in range(200)]
"""


def test_a_full_disk_loses_nothing_that_fits_in_memory(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(ROOT), str(tmp_path / "spool")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# ── killed ──────────────────────────────────────────────────────────────────

GATEWAY = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from serve.log_writer import LogWriter
from tests.test_log_writer import hit

url, spool, start, stop = sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
log = LogWriter(url, retry_s=0.05, spool=spool)
for i in range(start, stop):
    log.put(hit(i))
    if i % 10 == 9:
        while log.status()["queued"]:  # what is not in memory any more is safe
            time.sleep(0.001)
        print(i + 1, flush=True)
time.sleep(60)
"""


def gateway(url: str, spool: Path, start: int, stop: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", GATEWAY, str(ROOT), url, str(spool), str(start), str(stop)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def killed(process: subprocess.Popen[str], at_least: int) -> int:
    """Kill a gateway as soon as it says that so many hits are safe; returns how many it has said by then."""
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= at_least:
            break
    process.send_signal(signal.SIGKILL)
    rest = process.stdout.read().split()
    process.wait()
    return max([int(line), *map(int, rest)])


def waiting(spool: Path) -> int:
    """Bytes in all segments of a folder, those of living processes too."""
    return sum(path.stat().st_size for path in spool.glob("*/*.jsonl"))


@pytest.mark.slow
def test_a_killed_gateway_loses_nothing(tmp_path: Path) -> None:
    """Killed at any moment while it writes to a store that answers: what it said is safe is there, once."""
    url, spool = str(tmp_path / "logs.db"), tmp_path / "spool"
    chance = random.Random(3)
    safe: set[str] = set()
    for life in range(4):
        start = life * 1000
        said = killed(gateway(url, spool, start, start + 1000), start + chance.randrange(10, 800))
        safe |= {f"e{i}" for i in range(start, said)}
    log = LogWriter(url, spool=spool)
    until(lambda: log.status()["spooled_bytes"] == 0)
    log.close()
    found = exchanges(url)
    assert len(found) == len(set(found))
    assert safe <= set(found)
    assert list(spool.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(NoidaDb.program() is None, reason="needs noida-db")
def test_an_outage_of_elasticsearch_and_a_kill_lose_nothing(tmp_path: Path) -> None:
    """The server goes away while a gateway logs; the gateway is killed, another logs on; the server comes back."""
    spool = tmp_path / "spool"
    with NoidaDb(tmp_path / "noida") as server, FaultProxy(server.url) as proxy:
        url = f"{proxy.url}/logs"
        first = gateway(url, spool, 0, 400)
        assert first.stdout is not None and first.stdout.readline() == "10\n"
        with proxy.down():
            server.stop()
            assert killed(first, 400) == 400
            second = gateway(url, spool, 400, 600)
            assert second.stdout is not None
            assert [int(second.stdout.readline()) for _ in range(20)][-1] == 600
            assert waiting(spool) > 0
            server.start()
        try:
            until(lambda: waiting(spool) == 0, 30)
        finally:
            second.kill()
            second.wait()
        assert exchanges(url) == [f"e{i}" for i in range(600)]


# ── the spool ───────────────────────────────────────────────────────────────


def drained(spool: Spool) -> list[bytes]:
    found: list[bytes] = []
    while batch := spool.read(7):
        found += batch.lines
        spool.done(batch)
    return found


def test_a_spool_gives_back_what_was_written_in_order(tmp_path: Path) -> None:
    spool = Spool(tmp_path, segment_bytes=200)
    lines = [f"line {i}\n".encode() for i in range(300)]
    for i in range(0, 300, 10):
        assert spool.write(lines[i : i + 10]) == 10
    assert len(list(tmp_path.rglob("*.jsonl"))) > 10
    batch = spool.read(5)
    assert batch is not None and batch.lines == lines[:5]
    again = spool.read(5)
    assert again is not None and again.lines == lines[:5]  # not done yet
    assert drained(spool) == lines
    assert spool.waiting_bytes == 0
    assert spool.write([b"one more\n"]) == 1
    assert drained(spool) == [b"one more\n"]
    spool.close()
    assert list(tmp_path.iterdir()) == []


def test_the_living_keep_their_segments_and_the_dead_leave_theirs(tmp_path: Path) -> None:
    first, second = Spool(tmp_path), Spool(tmp_path)
    first.write([b"first\n"])
    assert second.read(10) is None
    first.write([b"torn"])  # as a process leaves it that dies over a line
    first.close()
    third = Spool(tmp_path)
    assert third.waiting_bytes == 0
    third.write([b"third\n"])
    assert drained(third) == [b"first\n", b"third\n"]
    assert len(list(tmp_path.iterdir())) == 2  # the second's and the third's own
    second._adopt_at = 0.0
    assert second.read(10) is None
    for spool in (second, third):
        spool.close()
    assert list(tmp_path.iterdir()) == []


def test_a_spool_under_two_threads_loses_and_repeats_nothing(tmp_path: Path) -> None:
    spool = Spool(tmp_path, segment_bytes=500)
    lines = [f"{i}\n".encode() for i in range(3000)]
    found: list[bytes] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set() or spool.waiting_bytes:
            found.extend(drained(spool))

    reader = threading.Thread(target=read)
    reader.start()
    chance = random.Random(1)
    at = 0
    while at < len(lines):
        step = chance.randint(1, 20)
        assert spool.write(lines[at : at + step]) == len(lines[at : at + step])
        at += step
    done.set()
    reader.join()
    assert found == lines
    spool.close()


TORN_WRITE = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from serve.spool import Spool

spool = Spool(Path(sys.argv[2]))
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 100_000))
kept, failed = [], 0
for i in range(50):
    line = b"line %d of some length\\n" % i
    try:
        assert spool.write([line]) == 1
        kept.append(line)
    except OSError:
        failed += 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # room again
assert failed == 1
found = spool.read(100)
assert found.lines == kept, found.lines
"""


def test_a_line_that_a_full_disk_cuts_off_is_not_kept(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", TORN_WRITE, str(ROOT), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_segments_that_someone_deletes_are_forgotten(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.write([b"gone\n"])
    for path in tmp_path.rglob("*.jsonl"):
        path.unlink()
    with pytest.raises(FileNotFoundError):
        spool.read(1)
    spool.write([b"new\n"])
    assert drained(spool) == [b"new\n"]
    spool.close()


def test_each_store_has_a_spool_of_its_own(tmp_path: Path) -> None:
    urls = ["/data/logs.db", "/old/logs.db", "https://elastic:9200/logs", "https://elastic:9200/logs-2"]
    folders = [spool_of(url, tmp_path) for url in urls]
    assert len(set(folders)) == 4 and {folder.parent for folder in folders} == {tmp_path}
    assert folders[0].name.startswith("logs-")
    assert spool_of("https://me:secret@elastic:9200/logs", tmp_path) == folders[2]


def test_a_hit_on_disk_is_the_record_it_was() -> None:
    """Through JSON and back, an id does not change: else a replayed record would be stored twice."""
    from flywheel_ray.records import parse_line, to_json_line

    for given in (hit(1), hit(2, latency_s=0.1 + 0.2), hit(3, timestamp=1755000074.1234567)):
        record, read = from_hit(given), parse_line(to_json_line(given))
        assert isinstance(record, Record) and isinstance(read, Record)
        assert read == record and read.id == record.id
