"""A queue of JSON lines on disk that outlives the process: what the gateway logged and the store does not have yet.

    spool = Spool(Path("runs/logs.sqlite.spool"))
    spool.write([b'{"client_id": …}\\n'])
    while batch := spool.read(256):
        store.append(...); spool.done(batch)

Each process writes segment files in a folder of its own, which it keeps locked while it lives. Folders of processes
that have died are taken over and read first. A line that was read and not done when the process died is read again:
whoever takes it must bear that. Lines survive the death of the process, not of the machine: nothing waits for the disk.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

_READ_BYTES = 8 << 20
_ADOPT_EVERY_S = 15.0


@dataclass
class _Segment:
    path: Path
    size: int = 0
    done: int = 0


@dataclass
class _Folder:
    """A process's segments, in order, and the lock that says whose they are."""

    path: Path
    lock: int
    segments: deque[_Segment] = field(default_factory=deque)


@dataclass(frozen=True)
class Batch:
    """Lines that were read, in order, and where from."""

    lines: list[bytes]
    folder: _Folder
    segment: _Segment
    size: int


class Spool:
    """One process's end of a spool folder. One thread writes, one reads; any number of processes share the folder."""

    def __init__(self, folder: Path, max_bytes: int = 1 << 30, segment_bytes: int = 8 << 20) -> None:
        """
        Args:
            folder: made where it does not exist; on a local disk (other processes' locks must be seen).
            max_bytes: what may wait, in this process's segments and those it took over.
            segment_bytes: when to begin a new file.

        Raises:
            OSError: the folder cannot be made, written or locked.
        """
        self._root, self._max_bytes, self._segment_bytes = folder, max_bytes, segment_bytes
        self._guard = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        self._own = _new_folder(folder)
        self._adopted: deque[_Folder] = deque()
        self._adopt_at = 0.0
        self._active: int | None = None  # file descriptor of the last of our own segments, while it is written
        self._number = 0
        self._closed = False

    @property
    def waiting_bytes(self) -> int:
        """What is written and not done, as far as this process is to read it."""
        with self._guard:
            return self._waiting()

    def write(self, lines: Sequence[bytes]) -> int:
        """Keep lines, each with its line end; returns how many there was room for, from the first.

        Raises:
            OSError: the disk is full or fails; none of the lines is kept.
        """
        with self._guard:
            room = self._max_bytes - self._waiting()
            kept = 0
            for line in lines:
                room -= len(line)
                if room < 0:
                    break
                kept += 1
            if not kept:
                return 0
            data = b"".join(lines[:kept])
            if self._active is not None and self._own.segments[-1].size + len(data) > self._segment_bytes:
                self._end_segment()
            if self._active is None:
                path = self._own.path / f"{self._number:08d}.jsonl"
                self._active = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                self._own.segments.append(_Segment(path))
                self._number += 1
            segment = self._own.segments[-1]
            try:
                left = memoryview(data)
                while left:
                    left = left[os.write(self._active, left) :]
            except OSError:
                with suppress(OSError):
                    os.ftruncate(self._active, segment.size)
                raise
            segment.size += len(data)
            return kept

    def read(self, max_lines: int) -> Batch | None:
        """The first lines that are not done; None where there are none. Call `done` before reading on.

        Raises:
            OSError: a segment cannot be read. One that someone has deleted is forgotten.
        """
        if time.monotonic() >= self._adopt_at:
            self._adopt_at = time.monotonic() + _ADOPT_EVERY_S
            self._adopt()
        while True:
            with self._guard:
                found = next(self._unread(), None)
                if found is None:
                    return None
                folder, segment = found
                start, end = segment.done, segment.size
            lines: list[bytes] = []
            position = start
            try:
                with segment.path.open("rb") as file:
                    file.seek(start)
                    while position < end and len(lines) < max_lines and position - start < _READ_BYTES:
                        line = file.readline()
                        if not line.endswith(b"\n"):  # its writer died over it: it was never kept
                            with self._guard:
                                segment.size = position
                            break
                        lines.append(line)
                        position += len(line)
            except FileNotFoundError:
                with self._guard:
                    if self._active is not None and segment is self._own.segments[-1]:
                        self._end_segment()
                    folder.segments.remove(segment)
                raise
            batch = Batch(lines, folder, segment, position - start)
            if lines:
                return batch
            self.done(batch)  # an empty or torn segment

    def done(self, batch: Batch) -> None:
        """Forget the lines of a batch."""
        folder, segment = batch.folder, batch.segment
        with self._guard, suppress(OSError):  # what cannot be deleted is read again some day
            segment.done += batch.size
            if segment.done < segment.size:
                return
            if self._active is not None and segment is self._own.segments[-1]:
                os.ftruncate(self._active, 0)
                segment.size = segment.done = 0
                return
            folder.segments.remove(segment)
            segment.path.unlink()
            if folder is not self._own and not folder.segments:
                self._adopted.remove(folder)
                _leave(folder)

    def close(self) -> None:
        """Let go of the folder; lines that are left are for whoever comes next."""
        with self._guard:
            if self._closed:
                return
            self._closed = True
            if self._active is not None:
                self._end_segment()
            for folder in (self._own, *self._adopted):
                for segment in folder.segments:
                    if segment.done >= segment.size:
                        segment.path.unlink(missing_ok=True)
                _leave(folder)

    def _waiting(self) -> int:
        return sum(s.size - s.done for folder in (self._own, *self._adopted) for s in folder.segments)

    def _unread(self) -> Iterator[tuple[_Folder, _Segment]]:
        for folder in (*self._adopted, self._own):
            for segment in folder.segments:
                if segment.size > segment.done or folder is not self._own:
                    yield folder, segment

    def _end_segment(self) -> None:
        assert self._active is not None
        os.close(self._active)
        self._active = None

    def _adopt(self) -> None:
        """Take over the folders of processes that have died, the oldest first."""
        for path in sorted(p for p in self._root.iterdir() if p.is_dir()):
            lock = _locked(path)  # ours and those of the living are locked already
            if lock is None:
                continue
            folder = _Folder(path, lock)
            folder.segments.extend(_Segment(p, p.stat().st_size) for p in sorted(path.glob("*.jsonl")))
            if folder.segments:
                with self._guard:
                    self._adopted.append(folder)
            else:
                _leave(folder)


def _new_folder(root: Path) -> _Folder:
    for _ in range(10):
        path = root / f"{time.time_ns():020d}-{os.getpid()}-{secrets.token_hex(3)}"
        path.mkdir()
        if (lock := _locked(path)) is not None:  # else another process took it for a dead one's
            return _Folder(path, lock)
    raise OSError(f"{root} cannot be locked")


def _locked(path: Path) -> int | None:
    """A lock on a folder, or None where a living process has it or it is gone."""
    try:
        lock = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.stat().st_ino == os.fstat(lock).st_ino:
            return lock
    except OSError:
        pass
    os.close(lock)
    return None


def _leave(folder: _Folder) -> None:
    with suppress(OSError):
        folder.path.rmdir()  # while it is locked; where lines are left, it stays
    os.close(folder.lock)
