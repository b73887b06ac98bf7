"""A student behind an OpenAI-compatible route of its own, so that the gateway asks it like any other URL.

    spec = StudentSpec(candidate=candidate, adapter=trial.training.adapter, platform_root="runs/platform")
    ray.serve.run(build("student", spec), name="student-student", route_prefix="/students/student")
    # POST http://127.0.0.1:8000/students/student/v1/chat/completions

Requests that arrive together are answered as one batch, with the prompt the candidate was trained and evaluated with.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from flywheel_ray.candidates import Candidate
from flywheel_ray.chat import as_stream, error_body, to_sse
from flywheel_ray.records import Completion
from flywheel_ray.rollout import Resources
from flywheel_ray.services import ChatModel, ChatPrompt, Generation, Unanswered
from flywheel_ray.values import Value

_log = logging.getLogger(__name__)


class StudentSpec(Value):
    """Everything that decides what a student answers, as its trial had it, and what it may use."""

    candidate: Candidate
    adapter: str | None = None
    """The platform's reference to the trained adapter; None for the base model."""
    shots: tuple[tuple[dict[str, Any], ...], ...] = ()
    platform_root: str
    """Folder of the LocalPlatform, readable where the student runs."""
    generation: Generation = Generation()
    """Limits of every answer; a request's own `max_tokens` and `temperature` are not read."""
    resources: Resources = Resources()
    max_batch_size: int = Field(default=8, ge=1)
    batch_wait_s: float = Field(default=0.02, ge=0)
    """How long a request waits for company."""


OpenModel = Callable[[StudentSpec], AbstractContextManager[ChatModel]]


def open_local(spec: StudentSpec) -> AbstractContextManager[ChatModel]:
    """The student on the local platform, in this process."""
    from flywheel_ray.platforms.local import LocalPlatform

    platform = LocalPlatform(Path(spec.platform_root), threads=_threads(spec))
    return platform.chat(spec.candidate.model, spec.adapter, spec.generation)


class Student:
    """One replica: a loaded model and a batcher. `__call__` answers one HTTP request."""

    def __init__(self, name: str, spec: StudentSpec, open_model: OpenModel = open_local) -> None:
        """Load the model, which takes seconds. Raises PlatformError where it cannot be loaded."""
        self._name, self._spec = name, spec
        self._context = open_model(spec)
        self._model = self._context.__enter__()
        batcher: Any = self._answer  # Ray's type does not show the setters that the decorator adds
        batcher.set_max_batch_size(spec.max_batch_size)
        batcher.set_batch_wait_timeout_s(spec.batch_wait_s)

    async def __call__(self, request: Request) -> Response:
        path = request.scope["path"].removeprefix(request.scope.get("root_path") or "")
        if request.method == "GET" and path.endswith("/v1/models"):
            return JSONResponse(
                {"object": "list", "data": [{"id": self._name, "object": "model", "owned_by": "flywheel"}]}
            )
        if request.method != "POST" or not path.endswith("/v1/chat/completions"):
            message = f"unknown route {request.method} {path}; a student has POST …/v1/chat/completions"
            return JSONResponse(error_body(message, "invalid_request_error"), 404)
        try:
            body = json.loads(await request.body())
            prompt = self._prompt(body)
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            what = "messages or tools are not chat messages" if isinstance(error, ValidationError) else str(error)
            return JSONResponse(error_body(f"the body is no chat request: {what}", "invalid_request_error"), 400)
        try:
            answer = await self._answer(prompt)
        except Exception as error:
            _log.exception("student %s", self._name)
            return JSONResponse(error_body(f"{type(error).__name__}: {error}", "server_error"), 500)
        if isinstance(answer, Unanswered):
            return JSONResponse(error_body(answer.reason, "invalid_request_error"), 400)
        return self._respond(body, answer)

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.02)
    async def _answer(self, prompts: list[ChatPrompt]) -> list[Completion | Unanswered]:
        return await asyncio.to_thread(self._model.complete, prompts)  # the loop stays free for health checks

    def _prompt(self, body: dict[str, Any]) -> ChatPrompt:
        if not body["messages"]:
            raise ValueError("messages is empty")
        messages, tools = self._spec.candidate.prompt(body["messages"], body.get("tools") or (), self._spec.shots)
        return ChatPrompt(messages=tuple(messages), tools=tuple(tools))

    def _respond(self, body: dict[str, Any], answer: Completion) -> Response:
        whole = to_chat_completion(answer, self._name, uuid.uuid4().hex, int(time.time()))
        if body.get("stream") is not True:
            return JSONResponse(whole)
        options = body.get("stream_options")
        usage = isinstance(options, dict) and options.get("include_usage") is True
        return Response(to_sse(as_stream(whole, usage)), media_type="text/event-stream")

    def __del__(self) -> None:
        if hasattr(self, "_model"):
            self._context.__exit__(None, None, None)
            del self._model


def to_chat_completion(answer: Completion, model: str, name: str, created: int) -> dict[str, Any]:
    """A Completion as an OpenAI ChatCompletion object, with usage where it was counted; `created` in epoch seconds."""
    finish = answer.finish_reason or ("tool_calls" if answer.tool_calls else "stop")
    whole: dict[str, Any] = {
        "id": f"chatcmpl-{name}",
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": [{"index": 0, "message": answer.message(), "finish_reason": finish, "logprobs": None}],
    }
    if answer.prompt_tokens is not None and answer.completion_tokens is not None:
        whole["usage"] = {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
            "total_tokens": answer.prompt_tokens + answer.completion_tokens,
        }
    return whole


def build(name: str, spec: StudentSpec, open_model: OpenModel = open_local) -> serve.Application:
    """The student as a Ray Serve application, for route prefix `/students/<name>`."""
    deployment = serve.deployment(
        name=f"Student-{name}",
        max_ongoing_requests=max(64, 4 * spec.max_batch_size),
        ray_actor_options={
            **spec.resources.model_dump(),
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(_threads(spec))}},
        },
        max_constructor_retry_count=2,
        graceful_shutdown_timeout_s=10,
        graceful_shutdown_wait_loop_s=0.2,
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )(Student)
    return deployment.bind(name, spec, open_model)


def _threads(spec: StudentSpec) -> int:
    return max(1, int(spec.resources.num_cpus))
