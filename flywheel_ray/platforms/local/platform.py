"""The `Platform` that trains and answers in this very process, and keeps its state in a folder.

    platform = LocalPlatform(Path("/shared/flywheel/local"), threads=1)
    job = platform.submit_training("3f9a-lora", "smollm2-135m", Lora(), platform.put_dataset("3f9a", train, validation))
    while not platform.training_status(job).finished: …

Under Ray Tune the process is the trial's worker, placed with the CPUs and GPUs its candidate asked for; training runs
in a thread of it. With `root` on a file system that all nodes see, any worker adopts what another one finished.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from flywheel_ray.candidates import Candidate, Lora
from flywheel_ray.datasets import Example
from flywheel_ray.errors import FlywheelError, PlatformError
from flywheel_ray.platforms.local.jobs import Cancelled, JobFolder, JobSpec, checked_name, write_text
from flywheel_ray.results import LossPoint
from flywheel_ray.services import ChatModel, Generation, TrainingStatus
from flywheel_ray.values import Value

if TYPE_CHECKING:
    from flywheel_ray.platforms.local.models import Base
    from flywheel_ray.platforms.local.training import Progress, Trained

DEFAULT_CACHE = Path("~/.cache/flywheel-ray")
NEEDED = ("torch", "transformers", "peft", "gguf", "safetensors")
STATUS_EVERY_S = 1.0


class LocalPlatform:
    """Datasets, LoRA training and chat on this machine. Implements `services.Platform`.

    Args:
        root: folder for datasets, jobs and adapters.
        cache: folder for converted embedded models; None means ~/.cache/flywheel-ray.
        threads: threads of PyTorch; None leaves what OMP_NUM_THREADS says (Ray sets it to the trial's CPUs).
        device: a torch device; None means CUDA where there is one, else CPU.

    Raises:
        PlatformError: PyTorch and its company are not installed.
    """

    def __init__(
        self, root: Path, cache: Path | None = None, threads: int | None = None, device: str | None = None
    ) -> None:
        missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
        if missing:
            raise PlatformError(
                f"the local platform needs {', '.join(missing)}: pip install 'flywheel-ray[local]', "
                "or use a NeMo platform"
            )
        self.root = Path(root).expanduser().absolute()
        self._cache = (cache or DEFAULT_CACHE).expanduser()
        self._threads = threads
        self._device = device

    def put_dataset(self, name: str, train: Sequence[Example], validation: Sequence[Example]) -> str:
        """Write the rows below `datasets/<name>`; a dataset of that name is left as it is. Returns the name."""
        target = self.root / "datasets" / checked_name(name, "dataset")
        if target.is_dir():
            return name
        scratch = target.with_name(f".{name}-{uuid.uuid4().hex[:8]}")
        scratch.mkdir(parents=True)
        try:
            for side, rows in (("train", train), ("validation", validation)):
                text = "".join(f"{row.model_dump_json()}\n" for row in rows)
                (scratch / f"{side}.jsonl").write_text(text, encoding="utf-8")
            scratch.rename(target)
        except OSError as error:
            if not target.is_dir():  # not lost to a concurrent process: a real failure
                raise PlatformError(f"cannot write dataset '{name}' to {target}: {error}") from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return name

    def submit_training(self, name: str, model: str, lora: Lora, dataset: str) -> str:
        """Start training in a thread, or adopt the job of that name. Returns the name.

        Raises:
            PlatformError: the dataset is missing or has no training rows, or the name belongs to another job.
        """
        folder = self._job(name)
        spec = JobSpec(model=model, lora=lora, dataset=dataset)
        if not self._rows(dataset, "train"):
            raise PlatformError(f"dataset '{dataset}' has no training rows: widen the log query, or drop Lora")
        with _RUNS_LOCK, folder.claim():
            if self._adopted(folder, spec):
                return name
            shutil.rmtree(folder.adapter, ignore_errors=True)
            folder.cancel_request.unlink(missing_ok=True)
            folder.write_spec(spec)
            folder.write_status(TrainingStatus(state="pending", progress=0.0))
            run = _Run(folder)
            run.thread = threading.Thread(target=self._work, args=(run, spec), name=f"train-{name}", daemon=True)
            _RUNS[folder.path] = run
            run.thread.start()
        return name

    def training_status(self, job: str) -> TrainingStatus:
        """The job's state as its folder tells it; see `Platform.training_status`."""
        return self._status(self._job(job))

    def cancel_training(self, job: str) -> None:
        """Stop the job, in whichever process it runs, and wait until it has stopped."""
        folder = self._job(job)
        if self._status(folder).finished:
            return
        folder.cancel_request.touch()
        with _RUNS_LOCK:
            run = _RUNS.get(folder.path)
        if run is not None and run.thread is not None:
            run.cancel.set()
            run.thread.join()
        while not self._status(folder).finished:
            time.sleep(0.2)

    def adapter(self, job: str) -> str:
        """The folder of the completed job's PEFT adapter."""
        folder = self._job(job)
        if (state := self._status(folder).state) != "completed":
            raise PlatformError(f"training job '{job}' is {state}, not completed: it has no adapter")
        return str(folder.adapter)

    @contextmanager
    def chat(self, model: str, adapter: str | None, generation: Generation) -> Iterator[ChatModel]:
        """The model, with the adapter in that folder or without, loaded and ready; see `Platform.chat`."""
        from flywheel_ray.platforms.local.generation import LocalChat, adapted

        base = self._load(model)
        yield LocalChat(base, adapted(base, Path(adapter) if adapter is not None else None), generation)

    def _job(self, name: str) -> JobFolder:
        return JobFolder(self.root / "jobs" / checked_name(name, "job"))

    def _status(self, folder: JobFolder) -> TrainingStatus:
        with _RUNS_LOCK:
            return folder.status(working=folder.path in _RUNS)

    def _adopted(self, folder: JobFolder, spec: JobSpec) -> bool:
        """True where the job of that name is completed or in flight, so that nothing is to be started."""
        known = folder.spec()
        if known is None or not (folder.path / "status.json").is_file():
            return False
        if folder.status(working=folder.path in _RUNS).state in ("failed", "cancelled"):
            return False
        if known != spec:
            raise PlatformError(
                f"training job '{folder.path.name}' exists for {known.model} on dataset '{known.dataset}' with other "
                "settings than asked for: give the new job another name"
            )
        return True

    def _rows(self, dataset: str, side: str) -> list[Example]:
        file = self.root / "datasets" / checked_name(dataset, "dataset") / f"{side}.jsonl"
        try:
            lines = file.read_bytes().splitlines()
        except OSError as error:
            raise PlatformError(f"there is no dataset '{dataset}' in {self.root}: put it first ({error})") from error
        return [_EXAMPLE.validate_json(line) for line in lines]

    def _load(self, model: str) -> Base:
        import torch

        from flywheel_ray.platforms.local.models import load

        if self._threads is not None:
            torch.set_num_threads(self._threads)
        return load(model, self._cache, self._device)

    def _work(self, run: _Run, spec: JobSpec) -> None:
        """The training thread: whatever happens ends in a finished status."""
        try:
            run.write(state="running")
            trained = self._train(run, spec)
            _save_adapter(run.folder, trained, self._load(spec.model).lineage, spec, run.status)
            totals = {n: getattr(trained, n) for n in ("train_s", "train_tokens", "train_records")}
            run.write(state="completed", progress=1.0, **totals)
        except Cancelled:
            run.write(state="cancelled")
        except FlywheelError as error:
            run.write(state="failed", error=str(error))
        except Exception as error:  # the edge of the thread: nobody above could catch it
            run.write(state="failed", error=f"{type(error).__name__}: {error}")
        finally:
            run.folder.cancel_request.unlink(missing_ok=True)
            with _RUNS_LOCK:
                _RUNS.pop(run.folder.path, None)

    def _train(self, run: _Run, spec: JobSpec) -> Trained:
        from flywheel_ray.platforms.local.training import rows_of, train

        base = self._load(spec.model)
        examples = chosen(self._rows(spec.dataset, "train"), spec.lora.max_train_records)
        rows, validation = (
            rows_of(base, [as_prompted(e, spec) for e in part])
            for part in (examples, self._rows(spec.dataset, "validation"))
        )
        return train(base, rows, validation, spec.lora, report=run.report, cancelled=run.cancelled)


_EXAMPLE: TypeAdapter[Example] = TypeAdapter(Example)


@dataclass
class _Run:
    """A job that this process works on."""

    folder: JobFolder
    status: TrainingStatus = field(default_factory=lambda: TrainingStatus(state="pending", progress=0.0))
    cancel: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None
    written: float = 0.0

    def write(self, **changes: Any) -> None:
        self.status = self.status.model_copy(update=changes)
        self.folder.write_status(self.status)
        self.written = time.monotonic()

    def report(self, progress: Progress) -> None:
        train, validation = self.status.train_losses, self.status.validation_losses
        changes = {
            "progress": progress.step / progress.steps,
            "train_tokens": progress.tokens,
            "train_losses": _with_point(train, progress.train),
            "validation_losses": _with_point(validation, progress.validation),
        }
        if progress.validation or time.monotonic() - self.written >= STATUS_EVERY_S:
            self.write(**changes)
        else:
            self.status = self.status.model_copy(update=changes)

    def cancelled(self) -> bool:
        return self.cancel.is_set() or self.folder.cancel_request.exists()


_RUNS: dict[Path, _Run] = {}
_RUNS_LOCK = threading.Lock()
"""Jobs in flight in this process, whichever LocalPlatform started them."""


def chosen(examples: Sequence[Example], most: int | None) -> list[Example]:
    """At most `most` examples, the first by id (a hash): a choice that more logs change little."""
    if most is None or len(examples) <= most:
        return list(examples)
    return sorted(examples, key=lambda e: e.id)[:most]


def as_prompted(example: Example, spec: JobSpec) -> Example:
    """The example with the messages and tools that the candidate's prompt style sends."""
    messages, tools = Candidate(model=spec.model, adaptation=spec.lora).prompt(example.messages, example.tools)
    return example.model_copy(update={"messages": tuple(messages), "tools": tuple(tools)})


def _with_point(series: tuple[LossPoint, ...], point: LossPoint | None) -> tuple[LossPoint, ...]:
    return (*series, point) if point else series


def _save_adapter(
    folder: JobFolder, trained: Trained, weights: dict[str, Any], spec: JobSpec, status: TrainingStatus
) -> None:
    """Write the adapter with its lineage beside and rename it into place."""
    scratch = folder.path / f".adapter-{uuid.uuid4().hex[:8]}"
    # "auto" would ask the Hugging Face hub whether the embeddings grew.
    trained.model.save_pretrained(str(scratch), save_embedding_layers=False)
    lineage = Lineage(
        job=folder.path.name,
        spec=spec,
        weights=weights,
        train_losses=status.train_losses,
        validation_losses=status.validation_losses,
        packages={name: version(name) for name in NEEDED},
    )
    write_text(scratch / "flywheel.json", lineage.model_dump_json(indent=2))
    shutil.rmtree(folder.adapter, ignore_errors=True)
    os.replace(scratch, folder.adapter)


class Lineage(Value):
    """Where an adapter comes from: flywheel.json in its folder."""

    job: str
    spec: JobSpec
    weights: dict[str, Any]
    """The base model's identity, see `models.Base.lineage`."""
    train_losses: tuple[LossPoint, ...]
    validation_losses: tuple[LossPoint, ...]
    packages: dict[str, str]
