"""A real sweep on a real Ray: a real model is fine-tuned, results are kept, and nothing finished runs twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from flywheel_ray.config import Places, SweepConfig, load, parse
from flywheel_ray.ledger import Ledger
from flywheel_ray.results import Scored
from flywheel_ray.sweep import judge_of, platform_of, resources_of, settings_of
from tests.servers import serving
from tests.values import dataset

ROOT = Path(__file__).parent.parent
SWEEP = """
type: sweep
name: smallest
workload: {client_id: acme, workload_id: router}
search:
  models: smollm2-135m
  adaptations:
    - type: zero_shot
    - {type: in_context, shots: 1}
    - {type: lora, prompt: distilled, rank: 4, epochs: 1, max_train_records: 12, batch_size: 6}
generation: {max_tokens: 16}
max_eval_records: 4
max_concurrent: 2
"""


def command(runs: Path, config: Path, folder: Path) -> list[str]:
    return ["experiments/sweep.py", str(config), "--dataset", str(folder), "--runs", str(runs)]


def run(runs: Path, config: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """The sweep to its end, as a person would run it."""
    whole = [sys.executable, *command(runs, config, folder)]
    return subprocess.run(whole, cwd=ROOT, env=environment(), capture_output=True, text=True)


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FLYWHEEL_", "RAY_"))}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def config_of(**changes: Any) -> SweepConfig:
    base: dict[str, Any] = {
        "type": "sweep",
        "name": "n",
        "workload": {"client_id": "c", "workload_id": "w"},
        "search": {"models": "m", "adaptations": [{"type": "zero_shot"}]},
    }
    return parse({**base, **changes}, SweepConfig, "x")


def test_an_llm_judge_behind_an_endpoint() -> None:
    """The configured judge is asked over HTTP, and a reply without a rating is unscored."""
    asked = []

    async def reply(request: Request) -> JSONResponse:
        body = await request.json()
        asked.append(body)
        # The tools are shown too, so only the call itself tells.
        called = '{"queue": "card_arrival"}' in body["messages"][-1]["content"]
        text = "RATING: 1" if called else "I would rather not say."
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        return JSONResponse({"choices": [choice]})

    with serving(Starlette(routes=[Route("/v1/chat/completions", reply, methods=["POST"])])) as url:
        config = config_of(judge={"type": "llm", "url": f"{url}/v1", "model": "j"})
        judge = judge_of(config)
        examples = dataset(30).eval
        found = [j.score for j in judge.judge(examples, [e.reference for e in examples]).judgements]
    queues = [e.reference.tool_calls[0].arguments for e in examples]
    assert [s.value for s in found] == [1.0 if q == {"queue": "card_arrival"} else None for q in queues]
    assert len(asked) == len(examples) and asked[0]["model"] == "j"
    assert settings_of(config).judge == judge.name
    assert judge.name.startswith("j (LLM, absolute, rubric ")
    assert "no LLM" in judge_of(config_of()).name


def test_what_a_gpu_sweep_asks_of_ray_and_of_its_platform(tmp_path: Path) -> None:
    gpu = load(ROOT / "configs/sweeps/gpu.yaml", SweepConfig)
    assert resources_of(gpu) == {"cpu": 4.0, "gpu": 1.0}
    places = Places(runs=tmp_path, store="")
    assert type(platform_of(gpu, places)).__name__ == "LocalPlatform"
    helix = load(ROOT / "configs/sweeps/helix.yaml", SweepConfig)
    assert type(platform_of(helix, places)).__name__ == "HelixPlatform"
    v1 = {"type": "nemo_v1", "nemo_url": "http://a", "datastore_url": "http://b", "nim_url": "http://c"}
    assert type(platform_of(config_of(platform=v1), places)).__name__ == "NemoV1Platform"


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A sweep killed after its first trial and run again: the runs folder, its configuration and its dataset."""
    runs = tmp_path_factory.mktemp("swept")
    config = runs / "smallest.yaml"
    config.write_text(SWEEP)
    folder = dataset(80).save(runs / "datasets")
    with (runs / "first.log").open("wb") as log:
        # A group of its own, so that the kill takes Ray's processes along, as a lost machine would.
        process = subprocess.Popen(
            [sys.executable, *command(runs, config, folder)],
            cwd=ROOT,
            env=environment(),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        deadline = time.monotonic() + 240
        while not list(runs.glob("ledger/*/*/result.json")):
            assert process.poll() is None and time.monotonic() < deadline, (runs / "first.log").read_text()
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return runs, config, folder


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_a_finished_one_does_nothing(swept: tuple[Path, Path, Path]) -> None:
    runs, config, folder = swept
    before = {p: p.stat().st_mtime_ns for p in runs.glob("ledger/*/*/result.json")}
    done = run(runs, config, folder)
    assert done.returncode == 0, done.stderr
    assert f"{len(before)} finished before" in done.stderr
    assert {p: p.stat().st_mtime_ns for p in before} == before
    results = Ledger(Places(runs=runs, store="").ledger).results(folder.name)
    assert sorted(r.candidate.evaluation for r in results) == ["base-eval", "customized-eval", "icl-eval"]
    assert all(isinstance(r, Scored) and len(r.outcomes) == 4 for r in results)
    trained = next(r for r in results if isinstance(r, Scored) and r.training)
    assert trained.training and trained.training.validation_losses
    assert (Path(trained.training.adapter) / "adapter_model.safetensors").is_file()
    again = run(runs, config, folder)
    assert again.returncode == 0 and "3 scored (3 of them before)" in again.stderr
    assert "training" not in again.stderr.replace("sweep", "")


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A cluster as `ray start --head` makes it; the variables a client needs. Only its own process is ended."""
    folder = tmp_path_factory.mktemp("head")
    token = folder / "token"
    token.write_text("t" * 64)
    variables = environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token))
    port, dashboard = 6391, 8271
    with (folder / "head.log").open("wb") as log:
        process = subprocess.Popen(
            [
                str(Path(sys.executable).parent / "ray"), "start", "--head", "--block",
                "--node-ip-address=127.0.0.1", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=2",
            ],
            env=variables, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 90
            while True:
                assert process.poll() is None and time.monotonic() < deadline, (folder / "head.log").read_text()
                try:
                    httpx.get(f"http://127.0.0.1:{dashboard}/api/version", timeout=2)
                    break
                except httpx.HTTPError:
                    time.sleep(0.5)
            yield {**variables, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_the_same_sweep_as_a_ray_job(swept: tuple[Path, Path, Path], head: dict[str, str], tmp_path: Path) -> None:
    """Through `ray job submit`, stopped and submitted again, the scores are the same to the digit."""
    runs, config, folder = swept
    ray = str(Path(sys.executable).parent / "ray")

    def submit(*options: str) -> subprocess.CompletedProcess[str]:
        job = [
            ray,
            "job",
            "submit",
            "--working-dir",
            str(ROOT / "experiments"),
            *options,
            "--",
            sys.executable,
            "sweep.py",
        ]
        return subprocess.run(
            [*job, *command(tmp_path, config, folder)[1:]], env=head, capture_output=True, text=True, timeout=400
        )

    def finished() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in tmp_path.glob("ledger/*/*/result.json")}

    started = submit("--no-wait", "--submission-id", "first")
    assert started.returncode == 0, started.stdout + started.stderr
    deadline = time.monotonic() + 240
    while not finished():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    subprocess.run([ray, "job", "stop", "first"], env=head, capture_output=True, check=True, timeout=60)
    before = finished()

    done = submit()
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(before)} finished before" in done.stdout + done.stderr
    assert {p: t for p, t in finished().items() if p in before} == before
    assert scores(tmp_path) == scores(runs)


def scores(runs: Path) -> dict[str, Any]:
    """Every score with its interval, by key, as `flywheel leaderboard --json` gives them."""
    shown = subprocess.run(
        [sys.executable, "-m", "flywheel_ray.cli", "leaderboard", "--json", "--runs", str(runs)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    return {row["key"]: row["scores"] for row in json.loads(shown.stdout)["rows"]}


@pytest.mark.slow
def test_a_model_that_is_not_there_fails_every_trial_and_the_command(tmp_path: Path) -> None:
    config = tmp_path / "absent.yaml"
    config.write_text(SWEEP.replace("smollm2-135m", "no-such-model"))
    folder = dataset(80).save(tmp_path / "datasets")
    done = run(tmp_path, config, folder)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: every trial failed") and "no-such-model" in last
    assert "Traceback" not in done.stderr
