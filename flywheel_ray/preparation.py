"""Preparation: from a log store to a dataset folder, in this process or on Ray Data.

    folder = prepare(places, query, policy, previous=latest_like(places.datasets, query, policy))
    load(folder).fingerprint       # the same whether Ray built it or not

On Ray the store is exported in parts, each taken in by a task. What becomes of all records is decided as it is in one
process, by `builds.assemble` on what the tasks found, so the result is the same bit for bit. Rows wait in a folder
beside the datasets, which every node must see.
"""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

from flywheel_ray import presidio
from flywheel_ray.builds import assemble, build
from flywheel_ray.config import Places
from flywheel_ray.datasets import DatasetPolicy, Manifest
from flywheel_ray.errors import ConfigError, DatasetError, FlywheelError, StoreError
from flywheel_ray.intake import REJECTED, Intake, Taken
from flywheel_ray.redaction import Redactor
from flywheel_ray.services import LogPart, LogQuery, LogStore
from flywheel_ray.spill import DiskRows, scratch
from flywheel_ray.stores import open_store

RAY_RECORDS = 5_000_000
"""A workload with more records than this is prepared on Ray without being asked to."""
_PART_RECORDS = 250_000
"""So that a task lasts some ten seconds, and its keys are some tens of megabytes."""
_PROGRESS_RECORDS = 1_000

Engine = Literal["auto", "process", "ray"]
OnProgress = Callable[[int, int], None]


def prepare(
    places: Places,
    query: LogQuery,
    policy: DatasetPolicy,
    *,
    out: Path | None = None,
    previous: Manifest | None = None,
    engine: Engine = "auto",
    on_progress: OnProgress = lambda done, total: None,
) -> Path:
    """Build a workload's dataset from the log store, and return its folder.

    Args:
        places: where the store is.
        query: which records; client and workload must be given.
        policy: what becomes of them.
        out: parent of the dataset's folder; None means `places.datasets`.
        previous: the dataset that this one continues (see `builds.build`).
        engine: "process" is this one, "ray" is Ray Data on the cluster that is connected (or started); "auto" takes Ray
            above `RAY_RECORDS`.
        on_progress: called with the records read so far and the number expected.

    Raises:
        ConfigError: the query names no workload.
        DatasetError: no usable record, a leak, a folder that cannot be written, or a task that failed.
        StoreError: the store cannot be read.
    """
    if query.client_id is None or query.workload_id is None:
        raise ConfigError("a dataset is of one workload: the query needs client_id and workload_id")
    out = out or places.datasets
    with closing(open_store(places.store, create=False)) as store:
        total = store.count(query)
        if not total:
            known = ", ".join(f"{c}/{w}" for c, w, _ in store.workloads()) or "none"
            raise DatasetError(
                f"no records of client {query.client_id!r}, workload {query.workload_id!r} in that time; "
                f"the store has: {known}"
            )
        about: dict[str, Any] = {
            "client_id": query.client_id,
            "workload_id": query.workload_id,
            "source": type(store).__name__,
            "query": query.model_dump(exclude_none=True),
            "previous": previous,
        }
        with scratch(out) as folder:
            if engine == "ray" or (engine == "auto" and total > RAY_RECORDS):
                taken, rows = _take_on_ray(store, places.store, query, policy, folder, total, on_progress)
                dataset = assemble(taken, rows, policy, **about)
            else:
                parts = store.parts(query, 1)
                try:
                    lines = _watched(store.lines(parts[0]), total, on_progress)
                    rows_on_disk = DiskRows(folder / "part-0")
                    dataset = build(lines, policy, rows=rows_on_disk, redactor=_redactor(policy), **about)
                finally:
                    store.release(parts)
            damaged = {
                reason.removeprefix(REJECTED): number
                for reason, number in dataset.manifest.excluded.items()
                if reason.startswith(REJECTED)
            }
            if damaged:  # they were records once
                raise StoreError(f"{sum(damaged.values())} stored records are damaged: {', '.join(damaged)}")
            return dataset.save(out)


def latest_like(datasets: Path, query: LogQuery, policy: DatasetPolicy) -> Manifest | None:
    """The newest dataset of the workload in a folder that was split by the same policy: the one to continue."""
    found: list[tuple[float, float, Manifest]] = []
    for path in datasets.glob("[0-9a-f]*/manifest.json"):
        try:
            manifest = Manifest.model_validate(json.loads(path.read_bytes()))
            written = path.stat().st_mtime
        except (OSError, ValueError):
            continue  # another version's, or damaged: whoever opens it is told
        same = (manifest.client_id, manifest.workload_id) == (query.client_id, query.workload_id)
        if same and manifest.policy.split == policy.split:
            found.append((manifest.sides.settled_until or 0.0, written, manifest))
    return max(found, key=lambda item: item[:2])[2] if found else None


def _redactor(policy: DatasetPolicy) -> Redactor | None:
    return presidio.redactor(policy.redaction) if policy.redaction else None


def _watched(lines: Iterator[bytes], total: int, on_progress: OnProgress) -> Iterator[bytes]:
    done = 0
    for done, line in enumerate(lines, start=1):
        yield line
        if done % _PROGRESS_RECORDS == 0:
            on_progress(done, total)
    on_progress(done, total)


def _take_on_ray(
    store: LogStore,
    store_url: str,
    query: LogQuery,
    policy: DatasetPolicy,
    folder: Path,
    total: int,
    on_progress: OnProgress,
) -> tuple[list[Taken], list[DiskRows]]:
    import ray
    import ray.data
    from ray.exceptions import RayError

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # its plan and its timings are not the user's
    ray.data.DataContext.get_current().enable_progress_bars = False
    cpus = int(ray.cluster_resources().get("CPU", 1))
    parts = store.parts(query, max(2 * cpus, -(-total // _PART_RECORDS)))
    items = [{"part": i, "state": part.model_dump_json()} for i, part in enumerate(parts)]
    taken: dict[int, tuple[Taken, DiskRows]] = {}
    take = _Take(store_url, query, policy, folder)
    try:
        found = ray.data.from_items(items, override_num_blocks=len(items)).map(take, num_cpus=1)
        for result in found.iter_rows():
            if result["error"]:
                raise DatasetError(f"a task of the build failed: {result['error']}")
            taken[result["part"]] = pickle.loads(result["taken"])
            on_progress(sum(part.scanned for part, _ in taken.values()), total)
    except RayError as error:
        raise DatasetError(f"a task of the build failed: {type(error).__name__}: {error}") from error
    finally:
        store.release(parts)
    order = sorted(taken)
    return [taken[i][0] for i in order], [taken[i][1] for i in order]


class _Take:
    """Takes in one part, in a Ray task; one that is repeated begins anew."""

    def __init__(self, store_url: str, query: LogQuery, policy: DatasetPolicy, folder: Path) -> None:
        self._store_url, self._query, self._policy, self._folder = store_url, query, policy, folder

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"part": item["part"], "taken": pickle.dumps(self._take(item)), "error": ""}
        except FlywheelError as error:  # as a value, because Ray would repeat the task and print its stack
            return {"part": item["part"], "taken": b"", "error": str(error)}

    def _take(self, item: dict[str, Any]) -> tuple[Taken, DiskRows]:
        rows = DiskRows(self._folder / f"part-{item['part']}")
        assert self._query.client_id is not None and self._query.workload_id is not None
        client_id, workload_id = self._query.client_id, self._query.workload_id
        intake = Intake(self._policy, client_id, workload_id, rows, _redactor(self._policy))
        with closing(open_store(self._store_url, create=False)) as store:
            for line in store.lines(LogPart.model_validate_json(item["state"])):
                intake.add_line(line)
        return intake.taken, rows
