"""Preparation: a dataset from a store in this process and on Ray, the same to the byte, and nothing left behind."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from flywheel_ray.config import Places
from flywheel_ray.datasets import DatasetPolicy, load, validate
from flywheel_ray.errors import ConfigError, DatasetError, StoreError
from flywheel_ray.intake import BUCKETS
from flywheel_ray.preparation import latest_like, prepare
from flywheel_ray.services import LogQuery
from flywheel_ray.spill import DiskRows, scratch
from flywheel_ray.splits import SplitPolicy
from flywheel_ray.stores import open_store
from tests.values import record

QUERY = LogQuery(client_id="acme", workload_id="router")


@pytest.fixture
def places(tmp_path: Path) -> Places:
    places = Places(runs=tmp_path, store=str(tmp_path / "logs.db"))
    store = open_store(places.store)
    store.append(record(i) for i in range(2_000))
    store.append(record(i, timestamp=5_000 + i) for i in range(300))  # said again, at other times
    store.append(record(i, timestamp=0, served_by="student", arm="student") for i in range(50))
    store.close()
    return places


@pytest.fixture
def ray_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_a_dataset_comes_from_the_store_and_leaves_nothing_else(places: Places) -> None:
    seen: list[tuple[int, int]] = []
    folder = prepare(places, QUERY, DatasetPolicy(), on_progress=lambda done, total: seen.append((done, total)))
    dataset = load(folder)
    manifest = dataset.manifest
    assert manifest.scanned == 2_350 and manifest.excluded["served by an arm"] == 50
    assert manifest.excluded["duplicate request"] == 300
    assert manifest.query == {"client_id": "acme", "workload_id": "router"} and manifest.source == "SqliteStore"
    assert seen[-1] == (2_350, 2_350) and len(seen) == 3
    validate(dataset)
    assert [p.name for p in places.datasets.iterdir()] == [folder.name]
    since = QUERY.model_copy(update={"since": 1_755_000_000.0})
    some = prepare(places, since, DatasetPolicy(), out=places.runs / "since")
    assert some.name == folder.name  # the same rows by another way
    assert load(some).manifest.scanned == 2_000


@pytest.mark.slow
def test_ray_gives_the_same_bytes(places: Places, ray_cluster: None, tmp_path: Path) -> None:
    one = prepare(places, QUERY, DatasetPolicy(), out=tmp_path / "process", engine="process")
    seen: list[tuple[int, int]] = []
    many = prepare(
        places,
        QUERY,
        DatasetPolicy(),
        out=tmp_path / "ray",
        engine="ray",
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in many.iterdir()}
    assert len(seen) > 1 and seen[-1] == (2_350, 2_350)
    assert [p.name for p in many.parent.iterdir()] == [many.name]
    with sqlite3.connect(places.store) as db:
        db.execute("UPDATE records SET hit = '{}' WHERE seq = 77")
    db.close()
    with pytest.raises(StoreError, match=r"1 stored records are damaged: client_id is missing"):
        prepare(places, QUERY, DatasetPolicy(), out=tmp_path / "broken", engine="ray")
    assert list((tmp_path / "broken").iterdir()) == []


def test_what_is_not_there_is_named(places: Places, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs client_id and workload_id"):
        prepare(places, LogQuery(client_id="acme"), DatasetPolicy())
    with pytest.raises(DatasetError, match=r"no records of client 'acme', workload 'x'.* the store has: acme/router"):
        prepare(places, LogQuery(client_id="acme", workload_id="x"), DatasetPolicy())
    with pytest.raises(StoreError, match="no log store"):
        prepare(Places(runs=tmp_path, store=str(tmp_path / "no.db")), QUERY, DatasetPolicy())
    assert not places.datasets.exists()


def test_the_dataset_to_continue_is_the_newest_of_its_kind(places: Places) -> None:
    policy = DatasetPolicy()
    assert latest_like(places.datasets, QUERY, policy) is None
    early = prepare(places, QUERY.model_copy(update={"until": 1_755_001_000.0}), policy)
    late = prepare(places, QUERY, policy)
    prepare(places, QUERY, DatasetPolicy(split=SplitPolicy(salt="other")))
    (places.datasets / "0bad").mkdir()
    (places.datasets / "0bad" / "manifest.json").write_text("{}")
    found = latest_like(places.datasets, QUERY, policy)
    assert found is not None and found.fingerprint == late.name != early.name
    assert latest_like(places.datasets, LogQuery(client_id="acme", workload_id="y"), policy) is None


def test_rows_on_disk_are_read_as_they_were_added(tmp_path: Path) -> None:
    rows = DiskRows(tmp_path / "rows")
    for i in range(1_000):
        rows.add(i % 3, b"%d " % i)
    rows.flush()
    rows.add(2, b"last")
    assert rows.read(0).split() == [b"%d" % i for i in range(0, 1_000, 3)]
    assert rows.read(2).endswith(b"998 last") and rows.read(BUCKETS - 1) == b""
    assert DiskRows(tmp_path / "rows").read(0) == b""  # begun anew


def test_what_a_killed_build_left_is_swept_up(tmp_path: Path) -> None:
    with scratch(tmp_path) as living:
        pid = os.fork()
        if pid == 0:
            with scratch(tmp_path):
                os._exit(9)
        assert os.waitpid(pid, 0)[1] >> 8 == 9
        assert len(list(tmp_path.iterdir())) == 2
        with scratch(tmp_path) as other:
            assert sorted(tmp_path.iterdir()) == sorted([living, other])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError, match=r"cannot write .*file while building"), scratch(tmp_path / "file"):
        pass
