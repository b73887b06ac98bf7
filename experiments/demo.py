"""The whole wheel on one machine, by the commands a person would type; `make demo` runs it.

    python -m experiments.demo --runs runs/demo

Sample traffic is generated and ingested, a sweep really fine-tunes a small model, the winner is hosted beside the
sample teacher, held-out requests go through the gateway with the `openai` client, and an HTML page says what was found.
Stopped during the sweep and run again, it goes on with the trials that are left. After a whole run the store also holds
the live traffic, so a second run builds another dataset and trains anew: that is the wheel's next turn.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from flywheel_ray.datasets import Dataset
from flywheel_ray.datasets import load as load_dataset


def main() -> None:
    """Run every step; stop at the first that fails, with its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/demo"), help="folder for everything (default: %(default)s)"
    )
    parser.add_argument("--records", type=int, default=600, help="sample records (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample traffic (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=80, help="held-out requests (default: %(default)s)")
    parser.add_argument("--sweep", default="configs/sweeps/demo.yaml", help="sweep (default: %(default)s)")
    parser.add_argument("--rollout", default="configs/rollouts/demo.yaml", help="rollout (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port of the gateway (default: %(default)s)")
    parser.add_argument("--teacher-port", type=int, default=18080, help="as in the rollout (default: %(default)s)")
    options = parser.parse_args()
    runs = options.runs.absolute()
    runs.mkdir(parents=True, exist_ok=True)
    os.environ["FLYWHEEL_RUNS"] = str(runs)
    os.environ.pop("FLYWHEEL_STORE", None)
    started = time.monotonic()

    logs = runs / "logs.jsonl"
    step("1. A teacher's logs", started)
    python(
        "-m",
        "experiments.sample_traffic",
        "--records",
        str(options.records),
        "--seed",
        str(options.seed),
        "--out",
        str(logs),
    )
    flywheel("ingest", str(logs))
    flywheel("workloads")

    step("2. Dataset", started)
    folder = flywheel("dataset", "build", "--config", options.sweep, capture=True).splitlines()[-1]

    step("3. Sweep and leaderboard", started)
    flywheel("sweep", options.sweep, "--dataset", folder)

    step("4. The winner as a shadow of the teacher", started)
    with (
        server([sys.executable, "-m", "experiments.sample_teacher", "--port", str(options.teacher_port),
                "--latency-ms", "300"],
               f"http://127.0.0.1:{options.teacher_port}/healthz", runs / "teacher.log"),
        server([*FLYWHEEL, "serve", options.rollout, "--port", str(options.port)],
               f"http://127.0.0.1:{options.port}/healthz", runs / "serve.log"),
    ):  # fmt: skip
        base_url = f"http://127.0.0.1:{options.port}/v1"
        sent = ask(base_url, load_dataset(Path(folder)), options.requests)
        print(f"{sent} held-out requests answered through {base_url}")
        drain(f"http://127.0.0.1:{options.port}/metrics.json")
    flywheel("rollout", "report", options.rollout)

    step("5. Report", started)
    flywheel("report", "--rollout", options.rollout)
    step("Done", started)


FLYWHEEL = [sys.executable, "-m", "flywheel_ray.cli"]


def step(title: str, started: float) -> None:
    """Print a heading with the time since the start."""
    print(f"\n── {title}  [{time.monotonic() - started:.0f} s]", flush=True)


def flywheel(*arguments: str, capture: bool = False) -> str:
    """Run a flywheel command as a person would, showing it."""
    print("$ flywheel " + shlex.join(arguments), flush=True)
    return _run([*FLYWHEEL, *arguments], capture)


def python(*arguments: str) -> None:
    """Run a Python module, showing it."""
    print("$ python " + shlex.join(arguments), flush=True)
    _run([sys.executable, *arguments], capture=False)


def _run(command: list[str], capture: bool) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE if capture else None, text=True)
    if done.returncode != 0:
        sys.exit(done.returncode)
    if capture:
        print(done.stdout, end="")
    return done.stdout or ""


@contextmanager
def server(command: list[str], health: str, log: Path, wait_s: float = 180) -> Iterator[None]:
    """Keep a server running inside the block; its output goes to a log file."""
    port = int(health.split(":")[2].split("/")[0])
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            sys.exit(f"port {port} is in use; stop what listens there and run the demo again")
    print("$ " + shlex.join(["python", *command[1:]]) + f" &    # log: {log}", flush=True)
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + wait_s
        while not _healthy(health):
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{shlex.join(command)} did not come up; the end of {log}:\n{log.read_text()[-2000:]}")
            time.sleep(0.5)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def _healthy(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def ask(base_url: str, dataset: Dataset, count: int) -> int:
    """Send held-out requests through the gateway with the official client; returns how many were answered."""
    from openai import OpenAI

    client = OpenAI(base_url=base_url, api_key="unused")
    examples = dataset.eval[:count]
    for i, example in enumerate(examples):
        tools = {"tools": list(example.tools)} if example.tools else {}
        client.chat.completions.create(model="teacher", messages=list(example.messages), **tools)
        if (i + 1) % 20 == 0 or i + 1 == len(examples):
            print(f"  {i + 1} of {len(examples)}", flush=True)
    return len(examples)


def drain(status: str, wait_s: float = 240) -> None:
    """Wait until the shadows have answered what is queued for them."""
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        seen = httpx.get(status, timeout=10).json()
        copies = [arm["shadow"] for arm in seen["arms"].values()]
        if not any(copy["waiting"] for copy in copies) and not seen["log"]["queued"]:
            return
        time.sleep(1)


if __name__ == "__main__":
    main()
