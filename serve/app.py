"""Brings a rollout up on Ray Serve: first the students, then the gateway before them and the teacher.

    with deployed(rollout, "runs/logs.db", students={"student": spec}, port=8000) as urls:
        print(urls["gateway"])                       # http://127.0.0.1:8000/v1
    run(rollout, "runs/logs.db")                     # until Ctrl-C or SIGTERM

What can be seen to be wrong (a busy port, a missing adapter, an arm without a student) is said before anything starts.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import ray
from ray import serve

from flywheel_ray.chat import auth_header
from flywheel_ray.errors import GatewayError, StoreUnavailable
from flywheel_ray.rollout import Rollout, StudentTarget, UrlTarget
from flywheel_ray.stores import open_store
from serve import gateway, student
from serve.log_writer import spool_of
from serve.student import StudentSpec

APP = "flywheel-gateway"


def run(
    rollout: Rollout,
    store_url: str,
    students: Mapping[str, StudentSpec] | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    ray_address: str | None = None,
    replicas: int = 1,
    spool: Path | None = None,
) -> None:
    """Deploy, print the URLs, and serve until Ctrl-C or SIGTERM; see `deployed`."""
    stop = threading.Event()
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in signals]
    try:
        with deployed(rollout, store_url, students, host, port, ray_address, replicas, spool) as urls:
            for number in signals:  # only now: Ray installs handlers of its own, and its SIGTERM aborts
                signal.signal(number, lambda *_: stop.set())
            for name, url in urls.items():
                print(f"{name:<12} {url}", flush=True)
            while not stop.wait(1.0):
                pass
            print("shutting down …", flush=True)
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def deployed(
    rollout: Rollout,
    store_url: str,
    students: Mapping[str, StudentSpec] | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    ray_address: str | None = None,
    replicas: int = 1,
    spool: Path | None = None,
) -> Iterator[dict[str, str]]:
    """A rollout that serves while the context is open; yields URLs by name: "gateway", "status" and each student.

    Args:
        rollout: who gets what.
        store_url: where completions are logged, as `stores.open_store` reads it.
        students: what the arms of type `student` host, by arm name.
        host, port: where Ray Serve listens for HTTP; must be its own where it runs in that cluster already.
        ray_address: a Ray cluster; None takes RAY_ADDRESS, else starts one on this machine and stops it at the end.
        replicas: copies of the gateway.
        spool: folder where completions wait while the log store is away, on a disk of each node; None lets them wait in
            memory. Each store has a folder of its own in it.

    Raises:
        GatewayError: the rollout cannot be served as it is; nothing was started, or everything was stopped again.
        StoreError, ChatError: the log store cannot be used, or an API key is not in the environment.
    """
    specs = dict(students or {})
    _check(rollout, store_url, specs)
    address = ray_address or os.environ.get("RAY_ADDRESS") or "local"
    connected = ray.is_initialized()
    if not connected and address == "local":
        _check_port(host, port)
    if not connected:
        ray.init(
            address=address,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
        )
    apps: list[str] = []
    try:
        serve.start(http_options={"host": host, "port": port})
        base = f"http://{'127.0.0.1' if host in ('', '0.0.0.0', '::') else host}:{port}"
        urls = {"gateway": f"{base}/v1", "status": f"{base}{gateway.METRICS}"}
        targets: dict[str, UrlTarget] = {}
        for name, spec in specs.items():
            spec = spec.model_copy(update={"platform_root": str(Path(spec.platform_root).expanduser().absolute())})
            _deploy(student.build(name, spec), f"student-{name}", f"/students/{name}", apps)
            urls[name] = f"{base}/students/{name}/v1"
            targets[name] = UrlTarget(url=urls[name])
        logged_to = _absolute(store_url)
        waiting = spool_of(logged_to, spool.expanduser().absolute()) if spool is not None else None
        _deploy(gateway.build(rollout, logged_to, targets, replicas, waiting), APP, "/", apps)
        _probe(base)
        yield urls
    finally:
        for name in reversed(apps):  # the gateway first: it flushes its log while the students still answer
            serve.delete(name)
        if not connected and address == "local":
            serve.shutdown()
        if not connected:
            ray.shutdown()


def _check(rollout: Rollout, store_url: str, specs: Mapping[str, StudentSpec]) -> None:
    hosted = [arm.name for arm in rollout.arms if isinstance(arm.target, StudentTarget)]
    if missing := [name for name in hosted if name not in specs]:
        raise GatewayError(f"arm {missing[0]!r} is a student, but no trial was found for it; run a sweep first")
    if unknown := [name for name in specs if name not in hosted]:
        raise GatewayError(f"student {unknown[0]!r} is no arm of type student in rollout {rollout.name!r}")
    for name, spec in specs.items():
        if spec.adapter is not None and not Path(spec.adapter).exists():
            raise GatewayError(f"arm {name!r}: there is no adapter at {spec.adapter}; repeat its trial")
    auth_header(rollout.teacher.api_key_env, rollout.teacher.url)
    for arm in rollout.arms:
        if isinstance(arm.target, UrlTarget):
            auth_header(arm.target.api_key_env, arm.target.url)
    try:
        open_store(store_url).close()
    except StoreUnavailable as error:
        raise GatewayError(f"the log store does not answer: {error}") from None


def _check_port(host: str, port: int) -> None:
    with closing(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = error.strerror or error
            raise GatewayError(f"cannot listen on {host}:{port}: {reason}; stop what does, or choose --port") from None


def _deploy(app: Any, name: str, prefix: str, apps: list[str]) -> None:
    apps.append(name)
    try:
        serve.run(app, name=name, route_prefix=prefix)
    except RuntimeError as error:
        told = [d.message for d in serve.status().applications[name].deployments.values()]
        text = "\n".join([str(error), *told])
        raise GatewayError(f"{name} did not start: {_cause(text)}") from None


def _absolute(store_url: str) -> str:
    """A replica may run in another folder, so a path is made absolute; other URLs are left as they are."""
    scheme, found, rest = store_url.partition("://")
    if not found:
        return str(Path(store_url).expanduser().absolute())
    return f"{scheme}:///{Path(rest[1:]).expanduser().absolute()}" if scheme == "sqlite" else store_url


def _probe(base: str, seconds: float = 10) -> None:
    """Wait until the gateway answers. A Serve that ran before keeps the host and port it was started with."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if httpx.get(f"{base}{gateway.HEALTH}", timeout=2).json() == {"status": "ok"}:
                return
        except (httpx.HTTPError, ValueError):
            pass
        if time.monotonic() > deadline:
            raise GatewayError(
                f"the gateway does not answer at {base}. Where Ray Serve ran in this cluster before, it keeps its own "
                "host and port: pass those, or stop it with `serve shutdown`"
            )
        time.sleep(0.1)


def _cause(traceback: str) -> str:
    """What went wrong in a replica: the last line of its traceback that names an error, without the error's module."""
    found = re.findall(r"^(?:\w+\.)*(\w*(?:Error|Exception|Unavailable): .*)$", traceback, re.MULTILINE)
    lines = [line.strip() for line in traceback.splitlines() if line.strip()]
    return (found or lines or ["for no stated reason"])[-1]
