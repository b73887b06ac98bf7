"""Training jobs on disk: what was asked, how it stands, and which process works on it.

    folder = JobFolder(root / "jobs" / "3f9a-lora")
    folder.write_status(TrainingStatus(state="running", progress=0.5))
    folder.status()                # "failed" where it says running and the process that ran it is gone

    jobs/<name>/job.json           model, LoRA, dataset
    jobs/<name>/status.json        TrainingStatus, owner, time of writing
    jobs/<name>/adapter/           PEFT adapter and flywheel.json, its lineage; there once the job has completed

Every file is written beside and renamed, so that readers see a whole one.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flywheel_ray.candidates import Lora
from flywheel_ray.errors import PlatformError
from flywheel_ray.services import TrainingStatus
from flywheel_ray.values import Value

SILENT_AFTER_S = 300.0
"""A job of another host whose status was not written for so long counts as abandoned."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class Cancelled(Exception):
    """Training stopped because it was asked to."""


class JobSpec(Value):
    """What a job was asked to do."""

    model: str
    lora: Lora
    dataset: str


class Owner(Value):
    """The process that works on a job. Process ids are reused, so its start (kernel ticks since boot) is part of it."""

    host: str
    pid: int
    started: int | None

    @classmethod
    def here(cls) -> Owner:
        """This process."""
        return cls(host=socket.gethostname(), pid=os.getpid(), started=process_start(os.getpid()))

    def alive(self, silent_s: float) -> bool:
        """True while the process runs; of another host's process, while it wrote within SILENT_AFTER_S seconds."""
        if self.host != socket.gethostname():
            return silent_s < SILENT_AFTER_S
        if self.started is not None:
            return process_start(self.pid) == self.started
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True


class StatusFile(Value):
    """The content of status.json."""

    status: TrainingStatus
    owner: Owner
    written_at: float
    """Seconds since the epoch."""


@dataclass(frozen=True)
class JobFolder:
    """One job's folder."""

    path: Path

    @property
    def adapter(self) -> Path:
        """Where the finished adapter is."""
        return self.path / "adapter"

    @property
    def cancel_request(self) -> Path:
        """A file whose presence asks the process that owns the job to stop."""
        return self.path / "cancel"

    def spec(self) -> JobSpec | None:
        """What the job was asked to do; None where there is no such job."""
        file = self.path / "job.json"
        return JobSpec.model_validate_json(file.read_bytes()) if file.is_file() else None

    def write_spec(self, spec: JobSpec) -> None:
        """Create the folder, if need be, and write job.json."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / "job.json", spec.model_dump_json(indent=2))

    def status(self, working: bool = True) -> TrainingStatus:
        """How the job stands; a running one that nobody works on any more reads as failed.

        Args:
            working: whether this process works on the job, which decides where the job is this process's own.

        Raises:
            PlatformError: there is no such job.
        """
        file = self.path / "status.json"
        if not file.is_file():
            raise PlatformError(f"there is no training job '{self.path.name}' in {self.path.parent}: submit it first")
        found = StatusFile.model_validate_json(file.read_bytes())
        alive = working if found.owner == Owner.here() else found.owner.alive(time.time() - found.written_at)
        if found.status.finished or alive:
            return found.status
        error = f"process {found.owner.pid} on {found.owner.host}, which ran this job, is gone: submit it again"
        return found.status.model_copy(update={"state": "failed", "error": error})

    def write_status(self, status: TrainingStatus) -> None:
        """Replace status.json; this process becomes the owner."""
        content = StatusFile(status=status, owner=Owner.here(), written_at=time.time())
        write_text(self.path / "status.json", content.model_dump_json(indent=2))

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Hold the folder against other processes that submit the same job, for as long as deciding takes."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def checked_name(name: str, what: str) -> str:
    """The name, if it can be a folder everywhere; PlatformError otherwise."""
    if not _NAME.fullmatch(name):
        raise PlatformError(
            f"{what} name {name[:140]!r} is not usable: give 1 to 128 letters, digits, '.', '_' or '-', beginning with "
            "a letter or digit"
        )
    return name


def write_text(path: Path, text: str) -> None:
    """Write a file beside and rename it into place."""
    scratch = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def process_start(pid: int) -> int | None:
    """When a process started, in kernel ticks since boot; None where it does not run or there is no /proc."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the command name before it may hold anything
    return None if fields[0] in ("Z", "X") else int(fields[19])
