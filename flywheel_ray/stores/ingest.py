"""Ingesting reads log lines into a store and keeps every line it cannot read, with its number and the reason.

    summary = ingest(read_lines(Path("logs.jsonl.gz")), "logs.jsonl.gz", store, rejects=Path("rejects.jsonl"))
    summary.added, summary.duplicates, summary.rejected    # 1629, 0, 2
    summary.reasons                                        # {"not JSON": 1, "response.choices is missing or empty": 1}

Lines stream through in batches, so memory does not grow with the file. Running it again changes nothing: records are
known by their content, and the rejects of a source replace those of its earlier runs. What the store refuses is among
the rejects too.
"""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from flywheel_ray.errors import ConfigError, StoreError
from flywheel_ray.records import Record, Rejected, parse_line, to_json_line
from flywheel_ray.services import LogStore
from flywheel_ray.values import Value

_BATCH_BYTES = 16 << 20
_REJECTS_IN_MEMORY = 1 << 20


class IngestSummary(Value):
    """What became of the lines so far: `lines == added + duplicates + rejected`, blank lines not among them."""

    lines: int
    added: int
    duplicates: int
    rejected: int
    reasons: dict[str, int]
    """Kind of reason (`Rejected.kind`) → number of lines, the most frequent first."""


def read_lines(path: Path) -> Iterator[bytes]:
    """The lines of a log file, plain or gzip (told by its first bytes).

    Raises:
        ConfigError: the file cannot be read to its end.
    """
    try:
        with path.open("rb", buffering=1 << 20) as plain:
            magic = plain.read(2)
            plain.seek(0)
            yield from cast(IO[bytes], gzip.GzipFile(fileobj=plain)) if magic == b"\x1f\x8b" else plain
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"cannot read log file {path}: {getattr(error, 'strerror', None) or error}") from error


def ingest(
    lines: Iterable[bytes],
    source: str,
    store: LogStore,
    rejects: Path,
    on_progress: Callable[[IngestSummary], None] | None = None,
    batch: int = 500,
) -> IngestSummary:
    """Read JSONL lines into the store.

    Args:
        lines: one JSON object each (see `records.from_hit`), with or without line ends; blank ones are skipped.
        source: where they come from, in the rejects file; running the same source again replaces its rejects there.
        store: where records go, `batch` at a time.
        rejects: JSONL file of {source, line_number, reason, line}, line numbers from 1; made when there is something to
            reject, and shared by all sources. Bytes that are no UTF-8 are written as `\\xNN`.
        on_progress: called after every batch with the summary so far, the last time with the final one.
        batch: lines a batch.

    Raises:
        StoreError: the store refused a batch, or the rejects file cannot be written. Batches before it are stored, and
            rejects found so far are kept; ingest the same source again.
    """
    found: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    pending: list[Record] = []
    sources: list[tuple[int, bytes]] = []  # their lines, in case the store refuses them
    size = waiting = 0

    def turn_down(number: int, outcome: Rejected, line: bytes) -> None:
        reject(number, outcome.reason, line)
        reasons[outcome.kind] += 1

    def flush() -> None:
        nonlocal size, waiting
        if pending:
            done = store.append(pending)
            found.update(added=done.added, duplicates=done.duplicates)
            if done.refused:
                lines_by_id = {record.id: source for record, source in zip(pending, sources, strict=True)}
                for refused in done.refused:
                    number, line = lines_by_id[refused.id]
                    turn_down(number, Rejected(reason=f"refused by the store: {refused.reason}"), line)
        found["lines"] += waiting
        pending.clear()
        sources.clear()
        size = waiting = 0
        if on_progress:
            on_progress(_summary(found, reasons))

    with _rejects_of(source, rejects) as (reject, read_to):
        for number, line in enumerate(lines, start=1):
            if line.strip():
                outcome = parse_line(line)
                if isinstance(outcome, Rejected):
                    turn_down(number, outcome, line)
                else:
                    pending.append(outcome)
                    sources.append((number, line))
                    size += len(line)
                waiting += 1
            read_to(number)
            if waiting >= batch or size >= _BATCH_BYTES:
                flush()
        if waiting or not found["lines"]:
            flush()
    return _summary(found, reasons)


def _summary(found: Counter[str], reasons: Counter[str]) -> IngestSummary:
    return IngestSummary(
        lines=found["lines"],
        added=found["added"],
        duplicates=found["duplicates"],
        rejected=reasons.total(),
        reasons=dict(reasons.most_common()),
    )


@contextmanager
def _rejects_of(source: str, path: Path) -> Iterator[tuple[Callable[[int, str, bytes], None], Callable[[int], None]]]:
    """Collect a source's rejects aside, and merge them into the file at the end, also at an untimely one."""
    last = 0

    def read_to(number: int) -> None:
        nonlocal last
        last = number

    def reject(number: int, reason: str, line: bytes) -> None:
        text = line.rstrip(b"\r\n").decode("utf-8", "backslashreplace")
        fresh.write(to_json_line({"source": source, "line_number": number, "reason": reason, "line": text}))

    with tempfile.SpooledTemporaryFile(max_size=_REJECTS_IN_MEMORY) as fresh:
        complete = False
        try:
            yield reject, read_to
            complete = True
        finally:
            try:
                # A run that broke off knows nothing of the lines it did not reach: their old rejects stay.
                _merge(path, source, cast(IO[bytes], fresh), None if complete else last)
            except OSError as error:
                raise StoreError(f"cannot write rejects file {path}: {error.strerror or error}") from error


def _merge(path: Path, source: str, fresh: IO[bytes], last: int | None) -> None:
    if not fresh.tell() and not path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    part = path.with_name(f".{path.name}.part")
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # ingests of other sources may share the file
        with part.open("wb") as merged:
            if path.exists():
                with path.open("rb") as old:
                    merged.writelines(line for line in old if not _replaced(line, source, last))
            fresh.seek(0)
            merged.writelines(fresh)
            merged.flush()
            os.fsync(merged.fileno())
            empty = not merged.tell()
        if empty:
            part.unlink()
            path.unlink(missing_ok=True)
        else:
            part.replace(path)
    finally:
        os.close(folder)  # and with it the lock


def _replaced(line: bytes, source: str, last: int | None) -> bool:
    try:
        reject = json.loads(line)
        return reject["source"] == source and (last is None or reject["line_number"] <= last)
    except (ValueError, TypeError, KeyError):
        return False
