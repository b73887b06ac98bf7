"""NeMo Microservices 25.x (`/v1/…`) as a Platform: Data Store and Entity Store, Customizer, and a NIM that answers.

    platform = NemoV1Platform("http://nemo.test", "http://data-store.test", "http://nim.test")
    data = platform.put_dataset("3f9a0c2d41b7e655-0b12", train, validation)   # "flywheel/flywheel-3f9a…"
    job = platform.submit_training("flywheel-5a1f", "meta/llama-3.2-1b-instruct", Lora(rank=16), data)  # "cust-BhMu…"
    platform.adapter(job)                                                     # "flywheel/flywheel-5a1f@cust-BhMu…"

Written from recorded exchanges of 25.x (its SDK, NVIDIA's Blueprint and notebooks); tested against a stand-in server,
not yet run against the real service. Jobs have no unique names here, so a job is adopted by looking through the list.
Not here: deploying NIMs. The API was sunset in October 2026; its successor is in `helix.py`.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from flywheel_ray.candidates import Lora
from flywheel_ray.chat import HttpChat
from flywheel_ray.datasets import Example
from flywheel_ray.errors import PlatformError, PlatformUnavailable
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
from flywheel_ray.values import content_hash

THERE = (409, 422)
_JOBS = "/v1/customization/jobs"
_LFS = "application/vnd.git-lfs+json"
_STATES: dict[str, Any] = {
    "created": "pending",
    "pending": "pending",
    "unknown": "pending",  # the service lost sight of it; it has a state again later
    "running": "running",
    "cancelling": "running",  # it still uses its resources
    "completed": "completed",
    "failed": "failed",
    "cancelled": "cancelled",
}
_DEAD = ("failed", "cancelling", "cancelled")


class NemoV1Platform:
    """A Platform on the three origins of NeMo 25.x. Safe to pickle; holds no state of its own."""

    def __init__(
        self,
        nemo_url: str,
        datastore_url: str,
        nim_url: str,
        namespace: str = "flywheel",
        config_suffix: str = "v1.0.0+flywheel",
        target_version: str | None = "2.0",
        max_seq_length: int = 4096,
        precision: str = "bf16-mixed",
        num_gpus: int = 1,
        micro_batch_size: int = 1,
        api_key_env: str | None = None,
        datastore_token_env: str | None = None,
        nim_api_key_env: str | None = None,
        timeout_s: float = 30,
        retries: int = 4,
        backoff_s: float = 0.5,
        poll_s: float = 2,
        cancel_timeout_s: float = 120,
        hosting_timeout_s: float = 600,
        chat_timeout_s: float = 60,
        chat_concurrency: int = 8,
    ) -> None:
        """
        Args:
            nemo_url: Entity Store and Customizer. `GET /v1/models` means another thing here than at `nim_url`.
            datastore_url: Data Store, which has the Hugging Face dialect under `/v1/hf`.
            nim_url: the NIM proxy, which has `/v1/chat/completions`.
            namespace: owns datasets, configurations and models.
            config_suffix: names our customization configurations: `<model>@<suffix>-<hash of its settings>`.
            target_version: version of the customization target, `<model>@<version>`; None names it without.
            max_seq_length: tokens a training row is cut at.
            precision, num_gpus, micro_batch_size: of the customization configuration.
            api_key_env, datastore_token_env, nim_api_key_env: names of the environment variables with bearer tokens,
                one for each origin; None sends none.
            timeout_s: for one answer, in seconds.
            retries: repetitions of what may be repeated; the first pause is `backoff_s` seconds at most.
            poll_s: seconds between looks at what we wait for.
            cancel_timeout_s: how long cancelling may take.
            hosting_timeout_s: how long a model may take until the NIM lists it.
            chat_timeout_s, chat_concurrency: for one answer, and how many at a time.
        """
        self.nim_url = nim_url.rstrip("/")
        self.namespace = namespace
        self.config_suffix = config_suffix
        self.target_version = target_version
        self.max_seq_length = max_seq_length
        self.precision = precision
        self.num_gpus = num_gpus
        self.micro_batch_size = micro_batch_size
        self.poll_s = poll_s
        self.cancel_timeout_s = cancel_timeout_s
        self.hosting_timeout_s = hosting_timeout_s
        self.chat_timeout_s = chat_timeout_s
        self.chat_concurrency = chat_concurrency
        self._nemo = Http(nemo_url, api_key_env, timeout_s, retries, backoff_s)
        self._store = Http(datastore_url, datastore_token_env, timeout_s, retries, backoff_s)
        self._nim = Http(nim_url, nim_api_key_env, timeout_s, retries, backoff_s)

    def put_dataset(self, name: str, train: Sequence[Example], validation: Sequence[Example]) -> str:
        """Store rows as `training/train_data.jsonl` and `validation/val_data.jsonl`; returns `namespace/name`.

        The Entity Store learns of a dataset when its files are complete, so one it knows is not sent again.
        """
        dataset = entity_name(name)
        repository = f"datasets/{self.namespace}/{dataset}"
        entity = {"name": dataset, "namespace": self.namespace, "description": "", "project": "flywheel"}
        entity["files_url"] = f"hf://{repository}"
        path = f"/v1/datasets/{segment(self.namespace)}/{segment(dataset)}"
        if self._nemo.call("GET", path, accept=(404,)).is_success:
            return f"{self.namespace}/{dataset}"
        self._put_namespace()
        body = {"name": dataset, "organization": self.namespace, "type": "dataset"}
        self._store.call("POST", "/v1/hf/api/repos/create", json=body, accept=(409,), repeatable=True)
        files = {"training/train_data.jsonl": jsonl(train), "validation/val_data.jsonl": jsonl(validation)}
        self._commit(repository, {path: content for path, content in files.items() if content})
        posted = self._nemo.call("POST", "/v1/datasets", json=entity, accept=THERE, repeatable=True)
        if not posted.is_success and not self._nemo.call("GET", path, accept=(404,)).is_success:
            raise self._nemo.refused(posted)
        return f"{self.namespace}/{dataset}"

    def submit_training(self, name: str, model: str, lora: Lora, dataset: str) -> str:
        """Start or adopt a job of that name; the reference is the job's id. Only our own datasets are taken."""
        if model.partition("@")[0].count("/") != 1:
            raise PlatformError(f"Customizer names models like meta/llama-3.2-1b-instruct, not {model}. Add the owner.")
        owner, _, rows = dataset.partition("/")
        self._nemo.call("GET", f"/v1/datasets/{segment(owner)}/{segment(rows)}")
        job_name = entity_name(name)
        config = self._put_config(model)
        body = {
            "name": job_name,
            "output_model": f"{self.namespace}/{job_name}",
            "config": config,
            "dataset": {"name": rows, "namespace": owner},
            "hyperparameters": {
                "training_type": "sft",
                "finetuning_type": "lora",
                "epochs": lora.epochs,
                "batch_size": lora.batch_size,
                "learning_rate": lora.learning_rate,
                "seed": lora.seed,
                # The service's own alpha is 16 whatever the rank, so ours is always said.
                "lora": {"adapter_dim": lora.rank, "alpha": whole_alpha(lora), "adapter_dropout": lora.dropout},
            },
        }
        for attempt in range(self._nemo.retries + 1):
            if (found := self._live_job(job_name)) is not None:
                return found
            try:
                return str(self._nemo.json("POST", _JOBS, json=body, repeatable=False)["id"])
            except PlatformUnavailable:
                # It may have been taken all the same, and a second POST would train twice: look again first.
                if attempt == self._nemo.retries:
                    raise
                self._nemo.pause(attempt)
        raise AssertionError("unreachable")

    def training_status(self, job: str) -> TrainingStatus:
        """The job's state and losses. `progress` may be 1.0 before the job has completed."""
        status = self._nemo.json("GET", f"{_JOBS}/{segment(job)}/status")
        if status.get("status") not in _STATES:
            raise PlatformError(f"Customizer says training {job} is {status.get('status')!r}: no state known here.")
        state = _STATES[status["status"]]
        series = (status.get("metrics") or {}).get("metrics") or {}
        per_epoch = number(status.get("steps_per_epoch")) or 0.0

        def epoch_of(point: Mapping[str, Any]) -> float:
            return float(point["step"]) / per_epoch if per_epoch else 0.0

        return TrainingStatus(
            state=state,
            progress=1.0 if state == "completed" else fraction(status.get("percentage_done")),
            train_losses=loss_points(series.get("train_loss"), epoch_of),
            validation_losses=loss_points(series.get("val_loss"), epoch_of),
            train_s=number(status.get("elapsed_time")),
            error=_error(status) if state == "failed" else None,
        )

    def cancel_training(self, job: str) -> None:
        """Stop the job and wait until it has stopped."""
        cancel_and_wait(
            status=lambda: self.training_status(job),
            # Not `/v1/customizations/{id}/cancel`, which the Blueprint calls and which leaves the job running.
            cancel=lambda: self._nemo.call("POST", f"{_JOBS}/{segment(job)}/cancel", repeatable=True),
            what=f"Training {job}",
            timeout_s=self.cancel_timeout_s,
            poll_s=self.poll_s,
        )

    def adapter(self, job: str) -> str:
        """The output model of a completed job, `namespace/name@job`: the very string the NIM knows it by."""
        state = self.training_status(job).state
        if state != "completed":
            raise PlatformError(f"Training {job} is {state}, so it has no adapter. Wait until it has completed.")
        model = self._nemo.json("GET", f"{_JOBS}/{segment(job)}").get("output_model")
        if not isinstance(model, str) or "/" not in model:
            raise PlatformError(f"Training {job} has completed, but its output_model is {model!r}. Look at the job.")
        return model if "@" in model else f"{model}@{job}"

    @contextmanager
    def chat(self, model: str, adapter: str | None, generation: Generation) -> Iterator[ChatModel]:
        """Answers of the NIM, once it lists the model: adapters are loaded some time after their job completed.

        Raises:
            PlatformError: the NIM does not list it within `hosting_timeout_s`.
        """
        wanted = adapter or model

        def served() -> bool:
            listed = self._nim.json("GET", "/v1/models").get("data") or []
            return any(isinstance(m, dict) and m.get("id") == wanted for m in listed)

        if not wait_until(served, self.hosting_timeout_s, self.poll_s):
            raise PlatformError(f"The NIM at {self._nim.host} does not list {wanted}. Deploy its base model there.")
        yield HttpChat(
            f"{self.nim_url}/v1",
            wanted,
            api_key_env=self._nim.api_key_env,
            timeout_s=self.chat_timeout_s,
            concurrency=self.chat_concurrency,
            generation=generation,
        )

    # ── requests ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _put_namespace(self) -> None:
        """The Entity Store takes JSON, the Data Store a form; both say 409 or 422 for one that is there."""
        self._nemo.call("POST", "/v1/namespaces", json={"id": self.namespace}, accept=THERE, repeatable=True)
        form = {"namespace": self.namespace}
        self._store.call("POST", "/v1/datastore/namespaces", data=form, accept=THERE, repeatable=True)

    def _commit(self, repository: str, files: Mapping[str, bytes]) -> None:
        """Upload files in one commit of the Hugging Face dialect: inline, or through LFS where the store asks for it.

        `commitUrl` is not read: the real store returns "", others a relative path or a URL.
        """
        about = [
            {"path": path, "sample": base64.b64encode(content[:512]).decode(), "size": len(content)}
            for path, content in files.items()
        ]
        api = f"/v1/hf/api/{repository}"
        asked = self._store.json("POST", f"{api}/preupload/main", json={"files": about}, repeatable=True)
        modes = {f.get("path"): f.get("uploadMode") for f in asked.get("files") or []}
        large = {path: content for path, content in files.items() if modes.get(path) == "lfs"}
        if large:
            self._put_objects(repository, list(large.values()))
        lines: list[dict[str, Any]] = [{"key": "header", "value": {"summary": "Training rows", "description": ""}}]
        for path, content in files.items():
            if path in large:
                value = {"path": path, "algo": "sha256", "oid": _sha256(content), "size": len(content)}
                lines.append({"key": "lfsFile", "value": value})
            else:
                value = {"path": path, "encoding": "base64", "content": base64.b64encode(content).decode()}
                lines.append({"key": "file", "value": value})
        body = "".join(json.dumps(line) + "\n" for line in lines).encode()
        headers = {"Content-Type": "application/x-ndjson"}
        self._store.call("POST", f"{api}/commit/main", content=body, headers=headers, repeatable=True)

    def _put_objects(self, repository: str, contents: Sequence[bytes]) -> None:
        """Git LFS, basic transfer: ask where, PUT the bytes there (without our token), say that they are there."""
        held = {_sha256(content): content for content in contents}
        objects = [{"oid": oid, "size": len(content)} for oid, content in held.items()]
        body = {"operation": "upload", "transfers": ["basic"], "objects": objects, "hash_algo": "sha256"}
        path = f"/v1/hf/{repository}.git/info/lfs/objects/batch"
        headers = {"Content-Type": _LFS, "Accept": _LFS}
        batch = {**body, "ref": {"name": "main"}}
        for found in self._store.json("POST", path, json=batch, headers=headers, repeatable=True).get("objects") or []:
            actions = found.get("actions") or {}  # none where the store holds the object already
            if upload := actions.get("upload"):
                there = self._store.elsewhere(upload["href"])
                there.call("PUT", "", content=held[found["oid"]], headers=upload.get("header") or {})
            if verify := actions.get("verify"):
                there = self._store.elsewhere(verify["href"])
                size = {"oid": found["oid"], "size": found["size"]}
                there.call("POST", "", json=size, headers=verify.get("header") or {}, repeatable=True)

    def _put_config(self, model: str) -> str:
        """Reference to our customization configuration for a model. 409 means that it is there.

        An existing one is never changed by a POST, so its name carries a hash of its settings.
        """
        target = model if "@" in model or self.target_version is None else f"{model}@{self.target_version}"
        settings: dict[str, Any] = {
            "target": target,
            "training_options": [
                {
                    "training_type": "sft",
                    "finetuning_type": "lora",
                    "num_gpus": self.num_gpus,
                    "num_nodes": 1,
                    "tensor_parallel_size": 1,
                    "data_parallel_size": self.num_gpus,
                    "use_sequence_parallel": False,
                    "micro_batch_size": self.micro_batch_size,
                }
            ],
            "training_precision": self.precision,
            "max_seq_length": self.max_seq_length,
        }
        base = model.partition("@")[0].rpartition("/")[2]
        name = f"{base}@{self.config_suffix}-{content_hash(settings, 8)}"
        body = {"name": name, "namespace": self.namespace, **settings}
        self._nemo.call("POST", "/v1/customization/configs", json=body, accept=(409,), repeatable=True)
        return f"{self.namespace}/{name}"

    def _live_job(self, name: str) -> str | None:
        """Id of our job of that name: a completed one, else one in flight, newest first; None where there is none."""
        output = f"{self.namespace}/{name}"
        ours = [j for j in self._jobs() if str(j.get("output_model", "")).partition("@")[0] == output]
        live = [j for j in ours if j.get("status") not in _DEAD]
        live.sort(key=lambda j: (j.get("status") == "completed", str(j.get("created_at"))))
        return str(live[-1]["id"]) if live else None

    def _jobs(self) -> Iterator[dict[str, Any]]:
        """Every job, page by page. Pages end with an empty one, with 404 or 422, or where the service counts them."""
        seen: set[str] = set()
        page = 1
        while True:
            params = {"page": page, "page_size": 100, "sort": "-created_at"}
            answer = self._nemo.call("GET", _JOBS, params=params, accept=(404, 422) if page > 1 else ())
            data = answer.json() if answer.is_success else {}
            fresh = [j for j in data.get("data") or [] if isinstance(j, dict) and str(j.get("id")) not in seen]
            yield from fresh
            seen |= {str(j.get("id")) for j in fresh}
            pages = (data.get("pagination") or {}).get("total_pages")
            if not fresh or (isinstance(pages, int) and page >= pages):
                return
            page += 1


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _error(status: Mapping[str, Any]) -> str | None:
    """Why a job failed: the newest log entry with a detail, else the newest message."""
    logs = [entry for entry in reversed(status.get("status_logs") or []) if isinstance(entry, dict)]
    return first_text([*(e.get("detail") for e in logs), *(e.get("message") for e in logs)])
