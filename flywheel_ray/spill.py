"""Rows on disk while a dataset is built, so that memory does not grow with the logs.

    with scratch(places.datasets) as folder:
        rows = DiskRows(folder / "part-0")
        dataset = build(store.lines(part), policy, client_id="acme", workload_id="support", rows=rows)
        dataset.save(places.datasets)

The folder lies beside the datasets, on a disk that every node sees. It goes with the build; what a killed one left
behind goes with the next.
"""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from flywheel_ray.errors import DatasetError
from flywheel_ray.intake import BUCKETS

_BUFFER_BYTES = 32 << 20
_PREFIX = ".build-"


class DiskRows:
    """Rows in one file a bucket. Not safe to write from two threads; a copy that was pickled only reads.

    Args:
        folder: made empty if it is not there yet, and emptied if it is.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pending: list[list[bytes]] = [[] for _ in range(BUCKETS)]
        self._size = 0
        with _errors(folder):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)

    def __getstate__(self) -> dict[str, object]:
        self.flush()
        return {"folder": self.folder, "_pending": [[] for _ in range(BUCKETS)], "_size": 0}

    def add(self, bucket: int, row: bytes) -> None:
        """Append a row to a bucket."""
        self._pending[bucket].append(row)
        self._size += len(row)
        if self._size > _BUFFER_BYTES:
            self.flush()

    def read(self, bucket: int) -> bytes:
        """All rows of a bucket, one after another, in the order they were added."""
        self.flush()
        with _errors(self.folder), suppress(FileNotFoundError):
            return self._path(bucket).read_bytes()
        return b""

    def flush(self) -> None:
        """Write what is in memory."""
        if not self._size:
            return
        with _errors(self.folder):
            for bucket, rows in enumerate(self._pending):
                if rows:
                    with self._path(bucket).open("ab") as file:
                        file.write(b"".join(rows))
                    rows.clear()
        self._size = 0

    def _path(self, bucket: int) -> Path:
        return self.folder / f"{bucket:02}"


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """A folder for the time of a build.

    Raises:
        DatasetError: it cannot be made, or the disk is full.
    """
    with _errors(parent):
        parent.mkdir(parents=True, exist_ok=True)
        _sweep_up(parent)
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        folder.chmod(0o755)
        lock = (folder / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder
    finally:
        lock.close()
        shutil.rmtree(folder, ignore_errors=True)


def _sweep_up(parent: Path) -> None:
    """Remove what builds left behind whose process is gone: their lock can be had."""
    for folder in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError), (folder / "lock").open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DatasetError(f"cannot write {folder} while building: {error.strerror or error}") from error
