"""Stand-ins for the two generations of NeMo, written from recorded exchanges and not from what our clients expect.

    with HelixServer() as server: httpx.get(f"{server.url}/apis/customization/v2/healthz")

Each runs in a thread on a free port, keeps a list of the requests it got, can be told to fail, and advances a training
job by one state at every look at its status. Sources: recorded exchanges of Helix 0.8.1 and the v1 contract
(NeMo 25.x); what they leave open is marked "not recorded".
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import threading
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

CONTEXT_WORDS = 10_000
STEPS_PER_EPOCH = 5
LONG_EPOCHS = 100
"""A job of that many epochs does not end by itself."""


class Server:
    """An ASGI application in a thread. `requests` has (method, path, body bytes) of everything that arrived."""

    def __init__(self) -> None:
        self.reset()
        app = Starlette(routes=self.routes())
        self._server = uvicorn.Server(uvicorn.Config(self._guard(app), port=0, log_level="error", lifespan="off"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def reset(self) -> None:
        """Forget everything; the server goes on."""
        self.requests: list[tuple[str, str, bytes]] = []
        self.faults: list[dict[str, Any]] = []
        self.token: str | None = None

    def routes(self) -> list[Any]:
        raise NotImplementedError

    def __enter__(self) -> Any:
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive(), "the stand-in server did not start"
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(10)

    def fail(self, method: str, path: str, status: int, times: int = 1, after: bool = False, **body: Any) -> None:
        """Answer `status` to the next requests whose path contains `path`; `after` does the work first."""
        fault = {"method": method, "path": path, "status": status, "times": times, "after": after}
        self.faults.append(fault | {"body": body or {"detail": "come back later"}})

    def count(self, method: str, ending: str) -> int:
        """How many requests of that method had a path with that ending."""
        return sum(m == method and p.endswith(ending) for m, p, _ in self.requests)

    def bodies(self, method: str, ending: str) -> list[Any]:
        """The JSON bodies of those requests."""
        return [json.loads(b) for m, p, b in self.requests if m == method and p.endswith(ending)]

    def _guard(self, app: Starlette) -> Callable[..., Awaitable[None]]:
        async def guarded(scope: Any, receive: Any, send: Any) -> None:
            request = Request(scope, receive)
            body = await request.body()
            path = scope["path"]
            self.requests.append((request.method, path, body))
            fault = next((f for f in self.faults if f["method"] == request.method and f["path"] in path), None)
            if fault is not None:
                fault["times"] -= 1
                if not fault["times"]:
                    self.faults.remove(fault)

            async def again() -> dict[str, Any]:
                return {"type": "http.request", "body": body, "more_body": False}

            async def nowhere(message: Any) -> None:
                return None

            if self.token and request.headers.get("authorization") != f"Bearer {self.token}":
                said = {"detail": f"bad credentials: {request.headers.get('authorization')}"}
                return await JSONResponse(said, 401)(scope, again, send)
            if fault is not None:
                if fault["after"]:
                    await app(scope, again, nowhere)
                return await JSONResponse(fault["body"], fault["status"])(scope, again, send)
            return await app(scope, again, send)

        return guarded


def detail(status: int, said: Any) -> JSONResponse:
    return JSONResponse({"detail": said}, status)


def bad_row(rows: bytes) -> str | None:
    """What is wrong with a file of training rows, as both generations document them."""
    for line in rows.decode().splitlines():  # as NeMo's trainer splits them
        row = json.loads(line)
        for message in row["messages"]:
            if message["role"] not in ("system", "user", "assistant", "tool") or not isinstance(
                message["content"], str
            ):
                return f"bad message {message}"
            for call in message.get("tool_calls") or []:
                if (
                    not isinstance(call["function"]["arguments"], dict)
                    or None in call["function"]["arguments"].values()
                ):
                    return f"bad arguments {call}"
    return None


def losses(steps: int, start: float) -> list[dict[str, Any]]:
    return [
        {"step": s, "epoch": math.ceil(s / STEPS_PER_EPOCH), "value": start * math.exp(-0.1 * s)}
        for s in range(1, steps + 1)
    ]


async def chat(request: Request, served: Iterable[str], unknown: Callable[[str], Response]) -> Response:
    """An OpenAI-compatible model which answers with its own name and the question."""
    body = await request.json()
    if body["model"] not in served:
        return unknown(body["model"])
    question = body["messages"][-1]["content"]
    if len(question.split()) > CONTEXT_WORDS:
        return JSONResponse({"error": {"message": "This model's maximum context length is 10000 tokens."}}, 400)
    message = {"role": "assistant", "content": f"{body['model']}: {question}"}
    usage = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}
    choices = [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}]
    shared = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1795402585}
    return JSONResponse({**shared, "model": body["model"], "choices": choices, "usage": usage})


# ── Helix ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

NAME = re.compile(r"^[a-z](?!.*--)[a-z0-9\-@.+_]{1,62}(?<!-)$")
_REPORTING = {"min_report_interval_seconds": None, "time_series_metrics": None}
_LORA = {"rank": None, "alpha": None, "dropout": None, "target_modules": None}
UNSLOTH = {
    "model": dict.fromkeys(("name", "max_seq_length", "load_in_4bit", "load_in_8bit", "dtype")),
    "dataset": dict.fromkeys(("path", "text_field", "apply_chat_template", "validation_path", "packing")),
    "training": {"training_type": None, "finetuning_type": None, "lora": {**_LORA, "bias": None, "random_state": None}},
    "schedule": {**dict.fromkeys(("epochs", "max_steps", "warmup_steps", "seed")), "progress_reporting": _REPORTING},
    "batch": dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps")),
    "optimizer": dict.fromkeys(("learning_rate", "weight_decay", "optim")),
    "output": dict.fromkeys(("name", "description", "save_method")),
}
"""The keys of a job's spec, as the service echoed them; others are refused."""
AUTOMODEL = {
    "model": None,
    "dataset": dict.fromkeys(("training", "validation", "prompt_template")),
    "training": {"training_type": None, "finetuning_type": None, "lora": _LORA, "max_seq_length": None},
    "schedule": {
        **dict.fromkeys(("epochs", "max_steps", "val_check_interval", "seed")),
        "progress_reporting": _REPORTING,
    },
    "batch": dict.fromkeys(("global_batch_size", "micro_batch_size", "sequence_packing")),
    "optimizer": dict.fromkeys(("learning_rate", "weight_decay", "warmup_steps")),
    "output": dict.fromkeys(("name", "description")),
}
"""Likewise, from NVIDIA's `AutomodelJobInput`."""


def extra(given: Any, known: Any, where: tuple[str, ...]) -> list[dict[str, Any]]:
    """FastAPI's words for keys that a schema forbids."""
    if not isinstance(given, dict) or not isinstance(known, dict):
        return []
    said = "Extra inputs are not permitted"
    wrong = [
        {"type": "extra_forbidden", "loc": [*where, key], "msg": said, "input": given[key]}
        for key in given
        if key not in known
    ]
    return wrong + [w for key in given for w in extra(given[key], known.get(key), (*where, key))]


class HelixServer(Server):
    """Helix 0.8.1 with one workspace, "default", and one base model, "tiny-base", that a provider serves.

    Of the adapters, only those in `virtual_models` have a route of their own (the gateway makes none by itself); all
    are served by the provider "stub" as `default--name`. `details_at` says where the training step's details are shown:
    "job" (0.8.1 without containers) or "task" (NVIDIA's documentation).
    """

    def reset(self) -> None:
        super().reset()
        self.filesets: dict[str, dict[str, bytes]] = {}
        self.jobs: dict[str, dict[str, Any]] = {}
        self.adapters: dict[str, dict[str, Any]] = {}
        self.virtual_models = {"default/tiny-base"}
        self.details_at = "job"

    def routes(self) -> list[Any]:
        files, jobs = "/apis/files/v2/workspaces/default", "/apis/customization/v2/workspaces/default/{backend}/jobs"
        gateway = "/apis/inference-gateway/v2/workspaces/default"
        return [
            Route(f"{files}/filesets", self.create_fileset, methods=["POST"]),
            Route(f"{files}/filesets/{{name}}", self.get_fileset),
            Route(f"{files}/filesets/{{name}}/files", self.list_files),
            Route(f"{files}/filesets/{{name}}/-/{{path:path}}", self.put_file, methods=["PUT"]),
            Route(jobs, self.create_job, methods=["POST"]),
            Route(f"{jobs}/{{name}}/status", self.job_status),
            Route(f"{jobs}/{{name}}/cancel", self.cancel_job, methods=["POST"]),
            Route("/apis/models/v2/workspaces/default/adapters/{name}", self.get_adapter),
            Route("/apis/models/v2/workspaces/default/providers", self.list_providers),
            Route(f"{gateway}/openai/-/v1/chat/completions", self.chat_openai, methods=["POST"]),
            Route(f"{gateway}/provider/stub/-/v1/chat/completions", self.chat_provider, methods=["POST"]),
        ]

    async def create_fileset(self, request: Request) -> Response:
        body = await request.json()
        name = body["name"]
        if not NAME.match(name):
            said = f"String should match pattern '{NAME.pattern}'"
            return detail(
                422, [{"type": "string_pattern_mismatch", "loc": ["body", "name"], "msg": said, "input": name}]
            )
        if name in self.filesets:
            return detail(409, f"Fileset 'default/{name}' already exists")  # words not recorded
        self.filesets[name] = {}
        return JSONResponse(self._fileset(name))

    def _fileset(self, name: str) -> dict[str, Any]:
        storage = {"type": "local", "path": f"DATA_DIR/files/filesets/default/{name}"}
        return {"id": f"fileset-{name}", "name": name, "workspace": "default", "purpose": "dataset", "storage": storage}

    async def get_fileset(self, request: Request) -> Response:
        name = request.path_params["name"]
        return (
            JSONResponse(self._fileset(name)) if name in self.filesets else detail(404, f"Fileset '{name}' not found")
        )

    async def list_files(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self.filesets:
            return detail(404, f"Fileset 'default/{name}' not found")
        return JSONResponse({"data": [self._file(name, path) for path in self.filesets[name]]})

    def _file(self, name: str, path: str) -> dict[str, Any]:
        url = f"/apis/files/v2/workspaces/default/filesets/{name}/-/{path}"
        size = len(self.filesets[name][path])
        return {"file_ref": f"default/{name}#{path}", "file_url": url, "path": path, "size": size, "cache_status": None}

    async def put_file(self, request: Request) -> Response:
        name, path = request.path_params["name"], request.path_params["path"]
        self.filesets[name][path] = await request.body()
        return JSONResponse(self._file(name, path))

    async def create_job(self, request: Request) -> Response:
        body = await request.json()
        name, spec, backend = body.get("name"), body["spec"], request.path_params["backend"]
        if wrong := extra(spec, AUTOMODEL if backend == "automodel" else UNSLOTH, ("body", "spec")):
            return detail(422, wrong)
        output = spec["output"]["name"]
        transform = "Failed to transform customization job input to output: "
        model = spec["model"] if backend == "automodel" else spec["model"]["name"]
        if model not in ("tiny-base", "default/tiny-base"):
            said = f"Model entity not found: 'default/{model}'. Verify the model entity exists."
            return detail(422, transform + said)
        dataset = spec["dataset"]["training" if backend == "automodel" else "path"]
        fileset = dataset.removeprefix("default/")
        if "#" in dataset or fileset not in self.filesets:
            path = dataset.partition("#")[2]
            return detail(422, f"{transform}Dataset path '{path}/' not found in fileset '{dataset.partition('#')[0]}'.")
        for other in self.jobs.values():
            if other["spec"]["output"]["name"] == output and other["status"] in ("created", "pending", "active"):
                said = f"Job '{other['name']}' ({other['status']}) is already producing output 'default/{output}'. "
                remedy = "Wait for it to finish, or choose a different output.name."
                return detail(422, f"Failed to compile customization job spec: {said}{remedy}")
        if name in self.jobs:
            return detail(409, f"Job 'default/{name}' already exists")  # words not recorded
        spec["output"] |= {"type": "adapter", "fileset": output}
        rows = self.filesets[fileset]
        self.jobs[name] = {"name": name, "spec": spec, "status": "created", "steps": 0, "rows": dict(rows)}
        return JSONResponse(self._job(name), 201)

    def _job(self, name: str) -> dict[str, Any]:
        job = self.jobs[name]
        shared = {"id": f"platform-job-{name}", "name": name, "workspace": "default", "spec": job["spec"]}
        return {**shared, "status": job["status"], "status_details": {}, "error_details": None}

    async def job_status(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self.jobs:
            return detail(404, f"Job '{name}' not found")
        job = self.jobs[name]
        answer = self._status(job)
        self._advance(job)
        return JSONResponse(answer)

    def _advance(self, job: dict[str, Any]) -> None:
        epochs = job["spec"]["schedule"]["epochs"]
        follows = {"created": "pending", "pending": "active", "cancelling": "cancelled"}
        job["status"] = follows.get(job["status"], job["status"])
        if job["status"] == "active":
            job["bad"] = next((w for rows in job["rows"].values() if (w := bad_row(rows))), None)
            if job["bad"]:
                job["status"] = "error"
            elif job["steps"] >= epochs * STEPS_PER_EPOCH:
                job["status"] = "completed"
                self._register(job)
            elif epochs < LONG_EPOCHS or job["steps"] < STEPS_PER_EPOCH:
                job["steps"] += STEPS_PER_EPOCH

    def _register(self, job: dict[str, Any]) -> None:
        name, lora = job["spec"]["output"]["name"], job["spec"]["training"]["lora"]
        entity = {"name": name, "workspace": "default", "fileset": f"default/{name}", "finetuning_type": "lora"}
        config = {"alpha": lora["alpha"], "rank": lora["rank"]}
        self.adapters[name] = {**entity, "enabled": True, "lora_config": config, "model": "default/tiny-base"}

    def _status(self, job: dict[str, Any]) -> dict[str, Any]:
        epochs, steps, status = job["spec"]["schedule"]["epochs"], job["steps"], job["status"]
        details: dict[str, Any] = {"message": f"Job is {status}"}
        if steps:
            train = losses(steps, 2.0)
            details |= {"max_steps": epochs * STEPS_PER_EPOCH, "num_epochs": epochs, "step": steps, "phase": "training"}
            details["metrics"] = {
                "train_loss": train,
                "val_loss": [p for p in losses(steps, 2.1) if p["step"] % STEPS_PER_EPOCH == 0],
                "train_lr": [{**p, "value": 1e-4} for p in train],
            }
            details["percentage_done"] = math.floor(100 * steps / (epochs * STEPS_PER_EPOCH))
        if status == "completed":
            details |= {"message": "Job completed successfully with exit code 0", "training_duration_seconds": 14.3}
        error = {"message": f"DatasetFormatError: {job['bad']}"} if status == "error" else {}
        task = {
            "name": "task-1",
            "status": status,
            "status_details": details,
            "error_details": error,
            "error_stack": None,
        }
        step = {"name": "training", "status": status, "status_details": {}, "error_details": {}, "tasks": [task]}
        whole = details if self.details_at == "job" else {}
        shared = {"id": f"platform-job-{job['name']}", "name": job["name"], "status": status}
        return {**shared, "status_details": whole, "error_details": None, "steps": [step] if steps or error else []}

    async def cancel_job(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self.jobs:
            return detail(404, f"Job '{name}' not found")
        if self.jobs[name]["status"] in ("created", "pending", "active"):
            self.jobs[name]["status"] = "cancelling"
        return JSONResponse(self._job(name))

    async def get_adapter(self, request: Request) -> Response:
        name = request.path_params["name"]
        found = self.adapters.get(name)
        return JSONResponse(found) if found else detail(404, f"Adapter 'default/{name}' not found")

    async def list_providers(self, request: Request) -> Response:
        served = [{"model_entity_id": "default/tiny-base", "served_model_name": "tiny-base"}]
        for name in self.adapters:
            entity = f"default/tiny-base&adapters/default/{name}"
            served.append({"model_entity_id": entity, "served_model_name": f"default--{name}"})
        provider = {"name": "stub", "workspace": "default", "status": "READY", "served_models": served}
        return JSONResponse({"data": [provider], "sort": "created_at"})

    async def chat_openai(self, request: Request) -> Response:
        def unknown(model: str) -> Response:
            return detail(404, f"No VirtualModel named '{model}' was found.")

        return await chat(request, self.virtual_models, unknown)

    async def chat_provider(self, request: Request) -> Response:
        served = {"tiny-base", *(f"default--{name}" for name in self.adapters)}
        return await chat(request, served, lambda model: detail(404, f"The model `{model}` does not exist."))


# ── NeMo 25.x ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class NemoV1Server(Server):
    """NeMo 25.x: its three origins under /nemo, /store and /nim, for each has its own `GET /v1/models`.

    `upload_mode` is what preupload says; `counts_pages` is whether lists say how many pages there are (only `data` is
    required); asking past the end is 404 or an empty page by `past_end`. The NIM lists a finished adapter from the
    second look on.
    """

    PAGE = 3

    def reset(self) -> None:
        super().reset()
        self.namespaces: set[str] = set()
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.datasets: dict[str, dict[str, Any]] = {}
        self.configs: dict[str, dict[str, Any]] = {}
        self.jobs: list[dict[str, Any]] = []
        self.nim_looks: dict[str, int] = {}
        self.upload_mode = "regular"
        self.counts_pages = True
        self.past_end = 404

    def routes(self) -> list[Any]:
        jobs = "/v1/customization/jobs"
        nemo = [
            Route("/v1/namespaces", self.create_namespace, methods=["POST"]),
            Route("/v1/datasets", self.create_dataset, methods=["POST"]),
            Route("/v1/datasets/{ns}/{name}", self.get_dataset),
            Route("/v1/customization/configs", self.create_config, methods=["POST"]),
            Route(jobs, self.create_job, methods=["POST"]),
            Route(jobs, self.list_jobs),
            Route(f"{jobs}/{{id}}", self.get_job),
            Route(f"{jobs}/{{id}}/status", self.job_status),
            Route(f"{jobs}/{{id}}/cancel", self.cancel_job, methods=["POST"]),
        ]
        repository, lfs = "/v1/hf/api/datasets/{ns}/{name}", "/v1/hf/datasets/{ns}/{name}.git/info/lfs"
        store = [
            Route("/v1/datastore/namespaces", self.create_store_namespace, methods=["POST"]),
            Route("/v1/hf/api/repos/create", self.create_repository, methods=["POST"]),
            Route(f"{repository}/preupload/main", self.preupload, methods=["POST"]),
            Route(f"{repository}/commit/main", self.commit, methods=["POST"]),
            Route(f"{lfs}/objects/batch", self.lfs_batch, methods=["POST"]),
            Route("/lfs/{oid}", self.lfs_put, methods=["PUT"]),
            Route("/lfs/{oid}/verify", self.lfs_verify, methods=["POST"]),
        ]
        nim = [
            Route("/v1/models", self.nim_models),
            Route("/v1/chat/completions", self.nim_chat, methods=["POST"]),
        ]
        return [Mount("/nemo", routes=nemo), Mount("/store", routes=store), Mount("/nim", routes=nim)]

    async def create_namespace(self, request: Request) -> Response:
        name = (await request.json())["id"]
        if name in self.namespaces:
            return detail(409, f"Namespace {name} already exists")
        self.namespaces.add(name)
        return JSONResponse({"id": name, "created_at": "2025-04-18T02:59:14.378917", "ownership": None})

    async def create_store_namespace(self, request: Request) -> Response:
        if not request.headers["content-type"].startswith("application/x-www-form-urlencoded"):
            return detail(422, "form expected")
        name = (await request.body()).decode().removeprefix("namespace=")
        if f"store:{name}" in self.namespaces:
            return detail(409, f"Namespace {name} already exists")
        self.namespaces.add(f"store:{name}")
        return JSONResponse({"namespace": name, "created_at": "2025-04-18T02:59:14Z"}, 201)

    async def create_repository(self, request: Request) -> Response:
        body = await request.json()
        name = f"datasets/{body['organization']}/{body['name']}"
        if f"store:{body['organization']}" not in self.namespaces or body["type"] != "dataset":
            return detail(404, "no such namespace")
        if name in self.repositories:
            return JSONResponse({"error": "already exists", "url": name}, 409)
        self.repositories[name] = {}
        return JSONResponse({"url": name})

    def _repository(self, request: Request) -> dict[str, bytes]:
        return self.repositories[f"datasets/{request.path_params['ns']}/{request.path_params['name']}"]

    async def preupload(self, request: Request) -> Response:
        files = (await request.json())["files"]
        assert all(len(base64.b64decode(f["sample"])) == min(512, f["size"]) for f in files)
        mode = {"uploadMode": self.upload_mode, "shouldIgnore": False, "oid": None}
        return JSONResponse({"files": [{"path": f["path"], **mode} for f in files]})

    async def commit(self, request: Request) -> Response:
        if request.headers["content-type"] != "application/x-ndjson":
            return detail(400, "NDJSON expected")
        header, *entries = [json.loads(line) for line in (await request.body()).splitlines()]
        if header["key"] != "header" or not header["value"]["summary"]:
            return detail(400, "a header comes first")
        files = self._repository(request)
        for entry in entries:
            value = entry["value"]
            if entry["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif self.upload_mode == "lfs":
                return detail(400, "this file belongs in LFS")
            else:
                assert value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
        return JSONResponse({"success": True, "commitOid": "0" * 40, "commitUrl": ""})  # "" as the real store

    async def lfs_batch(self, request: Request) -> Response:
        kind = "application/vnd.git-lfs+json"
        if request.headers["content-type"] != kind or request.headers["accept"] != kind:
            return detail(406, "git-lfs media type expected")
        body = await request.json()
        assert body["operation"] == "upload" and body["hash_algo"] == "sha256" and "basic" in body["transfers"]
        objects = []
        for item in body["objects"]:
            href = f"{self.url}/store/lfs/{item['oid']}"
            actions = {"upload": {"href": href, "header": {}}, "verify": {"href": f"{href}/verify", "header": {}}}
            held = {} if item["oid"] in self.objects else {"actions": actions}
            objects.append({**item, "authenticated": True, **held})
        return JSONResponse({"transfer": "basic", "objects": objects})

    async def lfs_put(self, request: Request) -> Response:
        content = await request.body()
        if "authorization" in request.headers or hashlib.sha256(content).hexdigest() != request.path_params["oid"]:
            return detail(400, "bad object, or a token where none belongs")
        self.objects[request.path_params["oid"]] = content
        return Response()

    async def lfs_verify(self, request: Request) -> Response:
        held = self.objects.get(request.path_params["oid"], b"")
        return Response() if len(held) == (await request.json())["size"] else detail(404, "no such object")

    async def create_dataset(self, request: Request) -> Response:
        body = await request.json()
        if "files_url" not in body:
            return detail(422, [{"loc": ["body", "files_url"], "msg": "Field required", "type": "missing"}])
        name = f"{body['namespace']}/{body['name']}"
        if name in self.datasets:
            return detail(409, f"Dataset {name} already exists")
        self.datasets[name] = body
        return JSONResponse({"id": "dataset-1", **body})

    async def get_dataset(self, request: Request) -> Response:
        name = f"{request.path_params['ns']}/{request.path_params['name']}"
        return JSONResponse(self.datasets[name]) if name in self.datasets else detail(404, f"Dataset {name} not found")

    async def create_config(self, request: Request) -> Response:
        body = await request.json()
        missing = [k for k in ("max_seq_length", "training_options") if k not in body]
        if missing:
            return detail(422, [{"loc": ["body", k], "msg": "Field required", "type": "missing"} for k in missing])
        name = f"{body['namespace']}/{body['name']}"
        if name in self.configs:
            return detail(409, f"Config {name} already exists")
        self.configs[name] = body
        return JSONResponse(body)

    async def create_job(self, request: Request) -> Response:
        body = await request.json()
        missing = [k for k in ("config", "dataset", "hyperparameters") if k not in body]
        if missing:
            return detail(422, [{"loc": ["body", k], "msg": "Field required", "type": "missing"} for k in missing])
        config = self.configs.get(body["config"])
        if config is None:
            return detail(404, f"Config {body['config']} not found")
        if config["target"] != "meta/llama-3.2-1b-instruct@2.0":
            return detail(404, f"Target {config['target']} not found")  # not recorded
        name = f"{body['dataset']['namespace']}/{body['dataset']['name']}"
        number = len(self.jobs) + 1
        job = {
            **body,
            "id": f"cust-{number}",
            "created_at": f"2025-04-18T02:59:{number:02d}.378917",
            "namespace": "default",
            "dataset": name,
            "output_model": f"{body['output_model']}@cust-{number}",
            "status": "created",
            "steps": 0,
        }
        self.jobs.append(job)
        return JSONResponse(self._shown(job))

    def _shown(self, job: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in job.items() if k != "steps"} | {"status_details": {"status": job["status"]}}

    async def list_jobs(self, request: Request) -> Response:
        page = int(request.query_params.get("page", 1))
        size = min(int(request.query_params.get("page_size", 10)), self.PAGE)
        newest = sorted(
            self.jobs, key=lambda j: j["created_at"], reverse=request.query_params.get("sort", "")[:1] == "-"
        )
        data = [self._shown(j) for j in newest[(page - 1) * size : page * size]]
        if not data and page > 1 and self.past_end != 200:
            return detail(self.past_end, "Page not found")
        pages = max(1, math.ceil(len(newest) / size))
        counted = {"pagination": {"page": page, "page_size": size, "total_pages": pages}} if self.counts_pages else {}
        return JSONResponse({"object": "list", "data": data, **counted})

    def _found(self, request: Request) -> dict[str, Any] | None:
        return next((j for j in self.jobs if j["id"] == request.path_params["id"]), None)

    async def get_job(self, request: Request) -> Response:
        job = self._found(request)
        return JSONResponse(self._shown(job)) if job else detail(404, "Job not found")

    async def job_status(self, request: Request) -> Response:
        job = self._found(request)
        if job is None:
            return detail(404, "Job not found")
        steps, epochs = job["steps"], job["hyperparameters"]["epochs"]
        stamp = "2025-04-18T03:01:02.000001"
        answer: dict[str, Any] = {"created_at": job["created_at"], "updated_at": stamp, "status": job["status"]}
        # 100 may show before the job is completed.
        answer |= {"percentage_done": min(100, 100 * steps / (epochs * STEPS_PER_EPOCH)), "steps_completed": steps}
        answer |= {
            "steps_per_epoch": STEPS_PER_EPOCH,
            "epochs_completed": steps // STEPS_PER_EPOCH,
            "elapsed_time": 9.5,
        }
        series = {
            "train_loss": [{"step": p["step"], "value": p["value"], "timestamp": stamp} for p in losses(steps, 2.0)],
            "val_loss": [
                {"step": p["step"], "value": p["value"], "timestamp": stamp}
                for p in losses(steps, 2.1)
                if p["step"] % STEPS_PER_EPOCH == 0
            ],
        }
        answer["metrics"] = {"keys": list(series), "metrics": series}
        logs = [{"updated_at": stamp, "message": m} for m in ("created", "PVCCreated", "TrainingJobRunning")]
        if job["status"] == "failed":
            logs += [{"updated_at": stamp, "message": "TrainingJobFailed", "detail": job["bad"]}]
            logs += [{"updated_at": stamp, "message": "EntityHandler_1_Completed", "detail": ""}]
        answer["status_logs"] = logs
        self._advance(job)
        return JSONResponse(answer)

    def _advance(self, job: dict[str, Any]) -> None:
        epochs = job["hyperparameters"]["epochs"]
        follows = {"created": "pending", "pending": "running", "cancelling": "cancelled"}
        job["status"] = follows.get(job["status"], job["status"])
        if job["status"] == "running":
            rows = self.repositories[f"datasets/{job['dataset']}"]
            job["bad"] = next((w for content in rows.values() if (w := bad_row(content))), None)
            if job["bad"]:
                job["status"] = "failed"
            elif job["steps"] >= epochs * STEPS_PER_EPOCH:
                job["status"] = "completed"
            elif epochs < LONG_EPOCHS or job["steps"] < STEPS_PER_EPOCH:
                job["steps"] += STEPS_PER_EPOCH

    async def cancel_job(self, request: Request) -> Response:
        job = self._found(request)
        if job is None:
            return detail(404, "Job not found")
        if job["status"] in ("completed", "failed", "cancelled"):
            return detail(409, f"Job is already {job['status']}")  # not recorded
        job["status"] = "cancelling"
        return JSONResponse(self._shown(job))

    def _served(self) -> list[str]:
        return ["meta/llama-3.2-1b-instruct"] + [j["output_model"] for j in self.jobs if j["status"] == "completed"]

    async def nim_models(self, request: Request) -> Response:
        listed = []
        for name in self._served():
            self.nim_looks[name] = self.nim_looks.get(name, 0) + 1
            if "@" not in name or self.nim_looks[name] > 1:
                listed.append({"id": name, "object": "model", "created": 1745000000, "owned_by": "vllm"})
        return JSONResponse({"object": "list", "data": listed})

    async def nim_chat(self, request: Request) -> Response:
        return await chat(request, self._served(), lambda model: detail(404, f"The model `{model}` does not exist."))
