"""The current NeMo, Helix (`/apis/<service>/v2/workspaces/<ws>/…`), as a Platform: filesets, customization, gateway.

    platform = HelixPlatform("http://nemo:8080", backend="automodel", api_key_env="NEMO_API_KEY")
    data = platform.put_dataset("3f9a0c2d41b7e655-0b12", train, validation)             # "default/flywheel-3f9a…"
    job = platform.submit_training("flywheel-5a1f", "qwen3-0.6b", Lora(rank=16), data)  # "flywheel-5a1f"
    with platform.chat("qwen3-0.6b", platform.adapter(job), Generation()) as model: model.complete(prompts)

Written from exchanges recorded with Helix 0.8.1 and NVIDIA's published job schemas; tested against a stand-in server,
not yet run against the real service. Jobs, adapters and filesets are found again by name: every call may be repeated.
Not here: importing base models (a model is an entity that exists) and deploying them (something must serve it).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from flywheel_ray.candidates import Lora
from flywheel_ray.chat import HttpChat
from flywheel_ray.datasets import Example
from flywheel_ray.errors import PlatformError
from flywheel_ray.platforms._nemo import (
    Http,
    cancel_and_wait,
    entity_name,
    first_text,
    fraction,
    jsonl,
    loss_points,
    number,
    segment,
    wait_until,
    whole_alpha,
)
from flywheel_ray.services import ChatModel, Generation, TrainingStatus

MAX_RESTARTS = 20
_STATES: dict[str, Any] = {
    "creation_pending": "pending",
    "created": "pending",
    "pending": "pending",
    "paused": "pending",
    "active": "running",
    "pausing": "running",
    "resuming": "running",
    "cancelling": "running",  # it still uses its resources
    "completed": "completed",
    "error": "failed",
    "cancelled": "cancelled",
}
_DEAD = ("error", "cancelling", "cancelled")


class HelixPlatform:
    """A Platform on one Helix workspace. Safe to pickle; holds no state of its own."""

    def __init__(
        self,
        base_url: str,
        workspace: str = "default",
        backend: str = "automodel",
        api_key_env: str | None = None,
        timeout_s: float = 30,
        retries: int = 4,
        backoff_s: float = 0.5,
        max_seq_length: int = 4096,
        micro_batch_size: int = 1,
        report_interval_s: float = 0,
        poll_s: float = 2,
        cancel_timeout_s: float = 120,
        hosting_timeout_s: float = 120,
        chat_timeout_s: float = 60,
        chat_concurrency: int = 8,
    ) -> None:
        """
        Args:
            base_url: where `/apis` is.
            workspace: owns datasets, jobs and adapters, and the models named without one.
            backend: customization backend: automodel, or one that takes unsloth's job spec (unsloth, a plugin of it).
            api_key_env: name of the environment variable with the bearer token; None sends none.
            timeout_s: for one answer, in seconds.
            retries: repetitions of what may be repeated; the first pause is `backoff_s` seconds at most.
            max_seq_length: tokens a training row is cut at.
            micro_batch_size: rows a GPU takes at once; must divide the candidate's batch size.
            report_interval_s: least seconds between two progress reports; 0 so that early stopping sees every loss.
            poll_s: seconds between looks at what we wait for.
            cancel_timeout_s: how long cancelling may take.
            hosting_timeout_s: how long a model may take until the gateway knows it.
            chat_timeout_s, chat_concurrency: for one answer, and how many at a time.
        """
        self.base_url = base_url.rstrip("/")
        self.workspace = workspace
        self.backend = backend
        self.max_seq_length = max_seq_length
        self.micro_batch_size = micro_batch_size
        self.report_interval_s = report_interval_s
        self.poll_s = poll_s
        self.cancel_timeout_s = cancel_timeout_s
        self.hosting_timeout_s = hosting_timeout_s
        self.chat_timeout_s = chat_timeout_s
        self.chat_concurrency = chat_concurrency
        self._http = Http(base_url, api_key_env, timeout_s, retries, backoff_s)

    def put_dataset(self, name: str, train: Sequence[Example], validation: Sequence[Example]) -> str:
        """Store rows as `train.jsonl` and `validation.jsonl` of a fileset; returns `workspace/fileset`.

        Files that are there in full are not sent again. Without validation rows automodel takes a tenth of the training
        rows for it. unsloth reads rows through Arrow, which pads tool arguments with nulls, and renders them without
        tools: for tool calling train with automodel, which does neither. Source: the backends' dataset readers.
        """
        fileset = entity_name(name)
        filesets = self._path("files", "filesets")
        body = {"name": fileset, "purpose": "dataset"}
        fresh = self._create(filesets, body, f"{filesets}/{segment(fileset)}")
        held = {} if fresh else self._files(fileset)
        files = {"validation.jsonl": jsonl(validation), "train.jsonl": jsonl(train)}
        for path, content in files.items():
            if content and held.get(path) != len(content):
                self._http.call("PUT", f"{filesets}/{segment(fileset)}/-/{path}", content=content)
        return f"{self.workspace}/{fileset}"

    def submit_training(self, name: str, model: str, lora: Lora, dataset: str) -> str:
        """Start or adopt the job of that name; the reference is the job's name on the platform.

        Names are used once: a job that failed or was cancelled is followed by `name-2`, `name-3`, ….
        """
        jobs = self._path("customization", f"{segment(self.backend)}/jobs")
        first = entity_name(name)
        for attempt in range(1, MAX_RESTARTS + 1):
            job = first if attempt == 1 else f"{first}-{attempt}"
            word = self._word(job)
            if word is None and self._create(
                jobs, {"name": job, "spec": self._spec(job, model, lora, dataset)}, f"{jobs}/{segment(job)}/status"
            ):
                return job
            if word is None:  # somebody created it between our look and our call
                word = self._word(job)
            if word not in _DEAD:
                return job
        raise PlatformError(
            f"Training {first} failed or was cancelled {MAX_RESTARTS} times in workspace {self.workspace}. "
            "Look at its logs on the platform, then delete those jobs."
        )

    def training_status(self, job: str) -> TrainingStatus:
        """The job's state; losses are what the training step reported, at most one report in `report_interval_s`."""
        status = self._http.json("GET", f"{self._job(job)}/status")
        state = self._state(status)
        details = _training_details(status)
        series = details.get("metrics") or {}
        progress = 1.0 if state == "completed" else fraction(details.get("percentage_done"))
        return TrainingStatus(
            state=state,
            progress=progress,
            train_losses=loss_points(series.get("train_loss"), _epoch),
            validation_losses=loss_points(series.get("val_loss"), _epoch),
            train_s=number(details.get("training_duration_seconds")),
            error=_error(status) if state == "failed" else None,
        )

    def cancel_training(self, job: str) -> None:
        """Stop the job and wait until its process is gone; losses so far stay readable."""
        cancel_and_wait(
            status=lambda: self.training_status(job),
            cancel=lambda: self._http.call("POST", f"{self._job(job)}/cancel", repeatable=True),
            what=f"Training {job}",
            timeout_s=self.cancel_timeout_s,
            poll_s=self.poll_s,
        )

    def adapter(self, job: str) -> str:
        """`workspace/adapter` of a completed job, once its entity exists."""
        word = self._state(self._http.json("GET", f"{self._job(job)}/status"))
        if word != "completed":
            raise PlatformError(f"Training {job} is {word}, so it has no adapter. Wait until it has completed.")
        found = self._http.json("GET", self._path("models", f"adapters/{segment(_adapter_of(job))}"))
        return f"{found.get('workspace') or self.workspace}/{found.get('name') or _adapter_of(job)}"

    @contextmanager
    def chat(self, model: str, adapter: str | None, generation: Generation) -> Iterator[ChatModel]:
        """Answers through the inference gateway.

        A model is asked for as `workspace/name` at the OpenAI route. The gateway makes no such route for adapters by
        itself, so one that has none is asked for at the provider that serves it.

        Raises:
            PlatformError: nothing serves it within `hosting_timeout_s`.
        """
        wanted = adapter or (model if "/" in model else f"{self.workspace}/{model}")
        route: list[tuple[str, str]] = []

        def served() -> bool:
            found = self._openai_route(wanted) or (self._provider_route(wanted) if adapter else None)
            route.extend([found] if found else [])
            return found is not None

        if not wait_until(served, self.hosting_timeout_s, self.poll_s):
            raise PlatformError(
                f"Nothing serves {wanted} in workspace {self.workspace}: deploy its base model "
                f"{'with LoRA enabled ' if adapter else ''}or register a provider that serves it."
            )
        path, served_name = route[0]
        yield HttpChat(
            f"{self.base_url}{path}",
            served_name,
            api_key_env=self._http.api_key_env,
            timeout_s=self.chat_timeout_s,
            concurrency=self.chat_concurrency,
            generation=generation,
        )

    # ── paths and requests ────────────────────────────────────────────────────────────────────────────────────────────

    def _path(self, service: str, rest: str) -> str:
        return f"/apis/{service}/v2/workspaces/{segment(self.workspace)}/{rest}"

    def _job(self, job: str) -> str:
        return self._path("customization", f"{segment(self.backend)}/jobs/{segment(job)}")

    def _files(self, fileset: str) -> dict[str, int]:
        """Sizes in bytes of the files of a fileset, by path."""
        listing = self._http.json("GET", self._path("files", f"filesets/{segment(fileset)}/files"))
        return {f["path"]: f["size"] for f in listing.get("data") or []}

    def _create(self, path: str, body: Mapping[str, Any], existing: str) -> bool:
        """POST an entity; False where it was there already.

        409 and 422 both say "already there", and 422 says "wrong" too: what is at `existing` decides. The name makes
        repeating safe: where an answer was lost, the repetition finds the entity.
        """
        answer = self._http.call("POST", path, json=body, accept=(409, 422), repeatable=True)
        if answer.is_success:
            return True
        if self._http.call("GET", existing, accept=(404,)).is_success:
            return False
        raise self._http.refused(answer)

    def _word(self, job: str) -> str | None:
        """Helix's own word for the job's state, None where there is no such job."""
        answer = self._http.call("GET", f"{self._job(job)}/status", accept=(404,))
        return None if answer.status_code == 404 else str(answer.json().get("status"))

    def _state(self, status: Mapping[str, Any]) -> Any:
        word = status.get("status")
        if word not in _STATES:
            raise PlatformError(
                f"Helix calls training {status.get('name')} {word!r}, a state this version cannot read."
            )
        return _STATES[word]

    def _spec(self, job: str, model: str, lora: Lora, dataset: str) -> dict[str, Any]:
        """The job's spec. Unknown keys are refused with 422, so each backend gets its own names."""
        alpha = whole_alpha(lora)
        if lora.batch_size % self.micro_batch_size:
            raise PlatformError(
                f"micro_batch_size {self.micro_batch_size} does not divide batch size {lora.batch_size}. Change one."
            )
        adapter = {"rank": lora.rank, "alpha": alpha, "dropout": lora.dropout}
        schedule = {
            "epochs": lora.epochs,
            "seed": lora.seed,
            "progress_reporting": {"min_report_interval_seconds": self.report_interval_s},
        }
        shared = {"schedule": schedule, "output": {"name": _adapter_of(job)}}
        training: dict[str, Any] = {"training_type": "sft", "finetuning_type": "lora", "lora": adapter}
        optimizer = {"learning_rate": lora.learning_rate}
        if self.backend == "automodel":
            return shared | {
                "model": model,
                "dataset": {"training": dataset},  # it finds train.jsonl and validation.jsonl by their names
                "training": training | {"max_seq_length": self.max_seq_length},
                "batch": {"global_batch_size": lora.batch_size, "micro_batch_size": self.micro_batch_size},
                "optimizer": optimizer,
            }
        adapter["random_state"] = lora.seed
        # Named without validation rows, it would take the training rows for them.
        validated = "validation.jsonl" in self._files(dataset.rpartition("/")[2])
        rows = {"path": dataset, "apply_chat_template": True} | ({"validation_path": dataset} if validated else {})
        return shared | {
            "model": {"name": model, "max_seq_length": self.max_seq_length, "load_in_4bit": False},
            "dataset": rows,
            "training": training,
            "batch": {
                "per_device_train_batch_size": self.micro_batch_size,
                "gradient_accumulation_steps": lora.batch_size // self.micro_batch_size,
            },
            "optimizer": optimizer,
        }

    def _openai_route(self, wanted: str) -> tuple[str, str] | None:
        """The OpenAI route, where it knows the model: asked for one token, since 404 is its only sure sign."""
        path = self._path("inference-gateway", "openai/-/v1")
        body = {"model": wanted, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
        answer = self._http.call("POST", f"{path}/chat/completions", json=body, accept=(400, 404, 422), repeatable=True)
        return None if answer.status_code == 404 else (path, wanted)

    def _provider_route(self, adapter: str) -> tuple[str, str] | None:
        """The route of a provider that serves the adapter (`…&adapters/workspace/name`), and its name there."""
        for provider in self._http.json("GET", self._path("models", "providers")).get("data") or []:
            for served in provider.get("served_models") or []:
                if str(served.get("model_entity_id", "")).endswith(f"&adapters/{adapter}"):
                    path = self._path("inference-gateway", f"provider/{segment(str(provider.get('name')))}/-/v1")
                    return path, str(served.get("served_model_name"))
        return None


def _adapter_of(job: str) -> str:
    """What a job's adapter is called: not like the job, whose name a fileset may bear."""
    return f"{job}-lora"


def _epoch(point: Mapping[str, Any]) -> float:
    return number(point.get("epoch")) or 0.0


def _training_details(status: Mapping[str, Any]) -> dict[str, Any]:
    """Status details of the whole job, completed by those of its steps and tasks: where they stand differs."""
    steps = [s for s in status.get("steps") or [] if isinstance(s, dict) and s.get("name") == "training"]
    tasks = [t for s in steps for t in s.get("tasks") or [] if isinstance(t, dict)]
    found: dict[str, Any] = {}
    for part in (*tasks, *steps, status):
        found |= part.get("status_details") or {}
    return found


def _error(status: Mapping[str, Any]) -> str | None:
    """Why a job failed: the innermost words there are, from the step that failed first."""
    steps = [s for s in status.get("steps") or [] if isinstance(s, dict) and s.get("status") == "error"]
    tasks = [t for s in steps for t in s.get("tasks") or [] if isinstance(t, dict)]
    stacks = [(str(t["error_stack"]).strip().splitlines() or [""])[-1] for t in tasks if t.get("error_stack")]
    parts = [*tasks, *steps, status]
    details = [p.get("error_details") for p in parts]
    said = [d if isinstance(d, str) else d.get("message") or d.get("detail") for d in details if d]
    return first_text([*said, *stacks, *((p.get("status_details") or {}).get("message") for p in parts)])
