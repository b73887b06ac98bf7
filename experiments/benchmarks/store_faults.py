"""Nothing lost, nothing twice: records go into and out of an Elasticsearch store while the network and the server fail.

    python -m experiments.benchmarks.store_faults --records 100000 --seed 0

The server is noida-db, which speaks Elasticsearch's API. Between it and the store stands a proxy that answers a share
of the requests with 429 or 503, breaks connections before or after the server has seen the request, stalls, cuts
answers short, refuses some items of a bulk, or leaves out shards. Meanwhile the server is restarted and paused
(SIGSTOP). It is ended by SIGTERM between two requests: noida-db does not keep what it acknowledges while it goes down,
nor through a SIGKILL. A gateway's log goes the same way, and the gateway is killed (SIGKILL) twice. Exits with 1 where
an acknowledged record is missing or there twice. The figures are in README.md beside this file.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from flywheel_ray.errors import StoreUnavailable
from flywheel_ray.records import Record, Rejected, from_hit
from flywheel_ray.services import LogPart, LogQuery
from flywheel_ray.stores.elasticsearch import ElasticsearchStore
from serve.log_writer import LogWriter
from tests.elastic import NoidaDb
from tests.fault_proxy import FaultProxy

PATIENCE_S = 300.0
BATCH = 200
SENT_AGAIN = 10  # every tenth batch is appended twice
PARTS = 2
WORKLOAD = LogQuery(client_id="acme", workload_id="support")


@dataclass(frozen=True)
class Row:
    """What one phase did."""

    phase: str
    records: int
    seconds: float
    requests: int
    faults: Counter[str]
    restarts: int
    pauses: int
    lost: int
    twice: int
    note: str

    def __str__(self) -> str:
        return (
            f"| {self.phase} | {self.records:,} | {self.seconds:.0f} | {self.requests:,} | {self.faults.total()} | "
            f"{self.restarts} / {self.pauses} | {self.lost} | {self.twice} | {self.note} |"
        )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=100_000, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the proxy's faults (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=0.1, help="share of requests that fail (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = run(Path(folder), options.records, options.seed, options.rate)
    print("| phase | records | s | requests | faults | restarts / pauses | lost | twice | |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        print(row)
    faults = sum((row.faults for row in rows), Counter[str]())
    print(f"\nfaults: {', '.join(f'{number} {kind}' for kind, number in sorted(faults.items()))}")
    if any(row.lost or row.twice for row in rows):
        sys.exit("records were lost or are there twice")


def run(folder: Path, records: int, seed: int = 0, rate: float = 0.1) -> list[Row]:
    """Ingest, export and log through faults; returns a row for each."""
    # The server searches all it has for every page, so reading takes longer the more there is.
    reading_s = 3.0 + records / 3000
    with (
        NoidaDb(folder / "noida") as server,
        FaultProxy(server.url, rate=rate, seed=seed, stall_s=4.0) as proxy,
        closing(ElasticsearchStore(f"{server.url}/logs", request_timeout_s=60.0)) as plain,
    ):
        scene = Scene(server, proxy)
        url = f"{proxy.url}/logs"
        return [
            ingest(scene, url, plain, records),
            export(scene, url, records, reading_s),
            log(scene, url, plain, max(records // 20, 200), folder / "spool"),
        ]


class Scene:
    """The server and the proxy before it, and what happens to them while a phase runs."""

    def __init__(self, server: NoidaDb, proxy: FaultProxy) -> None:
        self.server, self.proxy = server, proxy
        self.restarts = self.pauses = 0

    def restart(self, away_s: float = 1.0) -> None:
        """Stop the server in order, and start it again on the same data."""
        with self.outage():
            time.sleep(away_s)

    @contextmanager
    def outage(self) -> Iterator[None]:
        """The server is stopped in order, and started again on the same data."""
        with self.proxy.down():
            self.server.stop()
            yield
            self.server.start()
        self.restarts += 1

    def pause(self, seconds: float = 4.0) -> None:
        """Let the server hang."""
        self.server.pause()
        time.sleep(seconds)
        self.server.resume()
        self.pauses += 1

    @contextmanager
    def phase(self, name: str, note: Callable[[], str]) -> Iterator[Callable[[int, int, int], Row]]:
        """Measure a phase; yields what makes its row of records, lost and twice."""
        self.restarts = self.pauses = 0
        self.proxy.counts.clear()
        self.proxy.requests.clear()
        started = time.monotonic()

        def row(records: int, lost: int, twice: int) -> Row:
            seconds, requests = time.monotonic() - started, len(self.proxy.requests)
            faults = Counter(self.proxy.counts)
            return Row(name, records, seconds, requests, faults, self.restarts, self.pauses, lost, twice, note())

        yield row


def hit(number: int, **fields: Any) -> dict[str, Any]:
    """A logged exchange, distinct by its number."""
    return {
        "client_id": "acme",
        "workload_id": "support",
        "timestamp": 1_755_000_000 + number // 3,  # three at a time, so that ids decide the order too
        "request": {"messages": [{"role": "user", "content": f"Question {number}: where is my card?"}]},
        "response": {"choices": [{"message": {"role": "assistant", "content": f"Answer {number}"}}]},
        **fields,
    }


def record(number: int) -> Record:
    """The record of `hit(number)`."""
    found = from_hit(hit(number))
    assert not isinstance(found, Rejected)
    return found


def ingest(scene: Scene, url: str, plain: ElasticsearchStore, records: int) -> Row:
    """Append everything, every tenth batch twice, while the server is restarted and paused at set points."""
    planned = [
        (records * share // 10, event)
        for share, event in ((2, scene.restart), (4, scene.pause), (6, scene.restart), (8, scene.pause))
    ]
    added = duplicates = sent = 0
    events: list[threading.Thread] = []
    with (
        scene.phase("ingest", lambda: f"{added:,} counted as added, {duplicates:,} as duplicates") as row,
        closing(ElasticsearchStore(url, patience_s=PATIENCE_S, request_timeout_s=3.0)) as store,
    ):
        for number, start in enumerate(range(0, records, BATCH)):
            while planned and planned[0][0] <= start:
                for event in events:
                    event.join()
                events.append(threading.Thread(target=planned.pop(0)[1]))
                events[-1].start()  # while the next batches are on their way
            batch = [record(n) for n in range(start, min(start + BATCH, records))]
            for _ in range(2 if number % SENT_AGAIN == 0 else 1):
                done = store.append(batch)
                added, duplicates, sent = added + done.added, duplicates + done.duplicates, sent + len(batch)
        for event in events:
            event.join()
        found = plain.count(WORKLOAD)
        miscounted = abs(added - records) + abs(added + duplicates - sent)
        return row(records, max(0, records - found), max(0, found - records) + miscounted)


def export(scene: Scene, url: str, records: int, timeout_s: float) -> Row:
    """Read everything in parallel, in processes of their own; from the beginning where the server lost the snapshot."""
    expected = {record(n).id for n in range(records)}
    begun = 0
    with (
        scene.phase("export", lambda: f"{PARTS} processes; begun {begun} times") as row,
        closing(ElasticsearchStore(url, patience_s=PATIENCE_S, request_timeout_s=timeout_s)) as store,
        ProcessPoolExecutor(PARTS, multiprocessing.get_context("spawn")) as pool,
    ):
        while True:
            begun += 1
            parts = store.parts(WORKLOAD, PARTS)
            reading = [pool.submit(read, url, part.model_dump(), timeout_s) for part in parts]
            if begun == 1:
                _after_pages(scene.proxy, 3)
                scene.pause()
                _after_pages(scene.proxy, 2)
                scene.restart()
            try:
                found = [part.result() for part in reading]
                break
            except StoreUnavailable as error:
                print(f"export: {error}", flush=True)
                for part in reading:
                    part.cancel() or part.exception()
        store.release(parts)
        assert all(part == sorted(part) for part in found), "a part is out of order"
        ids = Counter(id for part in found for _, id in part)
        foreign = len(ids.keys() - expected)
        return row(records, len(expected - ids.keys()), ids.total() - len(ids) + foreign)


def read(url: str, part: dict[str, Any], timeout_s: float) -> list[tuple[float, str]]:
    """A part's keys. A record's id is a hash of what was read, so equal ids mean equal records."""
    with closing(ElasticsearchStore(url, create=False, patience_s=PATIENCE_S, request_timeout_s=timeout_s)) as store:
        return [(record.timestamp, record.id) for record in store.read(LogPart.model_validate(part))]


def log(scene: Scene, url: str, plain: ElasticsearchStore, hits: int, spool: Path) -> Row:
    """Log hits as a gateway does, through an outage; kill the gateway during the outage, and another after it."""
    first, second = hits // 3, 2 * hits // 3
    said = 0
    with (
        scene.phase("gateway log", lambda: f"{said:,} acknowledged; gateway killed twice") as row,
        ExitStack() as outage,
    ):
        with gateway(url, spool, 0, first) as says:
            _hear(says, first // 2)
            outage.enter_context(scene.outage())
            said = _hear(says, first)
        with gateway(url, spool, first, second) as says:
            said = _hear(says, second)
            outage.close()  # the server is back, and the gateway is killed over what it has to send
        with gateway(url, spool, second, hits) as says:
            said = _hear(says, hits)
            _until(lambda: _waiting(spool) == 0)
        ids = Counter(r.exchange_id for r in plain.scan(LogQuery(client_id="gateway")))
        return row(hits, len({f"e{n}" for n in range(said)} - ids.keys()), ids.total() - len(ids))


@contextmanager
def gateway(url: str, spool: Path, start: int, stop: int) -> Iterator[Connection]:
    """A process that logs hits and says up to where they are safe; killed at the end, whatever it is doing."""
    said, say = multiprocessing.get_context("spawn").Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_gateway, args=(url, spool, start, stop, say))
    process.start()
    try:
        yield said
    finally:
        process.kill()
        process.join()


def _gateway(url: str, spool: Path, start: int, stop: int, say: Connection) -> None:
    writer = LogWriter(url, spool=spool)
    for number in range(start, stop):
        writer.put(hit(number, client_id="gateway", exchange_id=f"e{number}"))
        if number % 20 == 19 or number == stop - 1:
            _until(lambda: writer.status()["queued"] == 0)
            say.send(number + 1)
    time.sleep(3600)


def _hear(says: Connection, goal: int) -> int:
    """Wait until a gateway says that so many hits are safe."""
    while (upto := says.recv()) < goal:
        pass
    return int(upto)


def _waiting(spool: Path) -> int:
    return sum(path.stat().st_size for path in spool.glob("*/*.jsonl"))


def _until(check: Callable[[], bool], seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        if time.monotonic() > deadline:
            raise TimeoutError("the log was not stored in time")
        time.sleep(0.002)


def _after_pages(proxy: FaultProxy, pages: int) -> None:
    """Wait until so many more pages have been asked for."""

    def asked() -> int:
        return sum("_search" in path for _, path, _, _ in list(proxy.requests))

    goal = asked() + pages
    _until(lambda: asked() >= goal)


if __name__ == "__main__":
    main()
