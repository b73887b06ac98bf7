"""Every experiment end to end on the smallest real model: the demo with its notebook, and the banking benchmark."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from flywheel_ray.records import Record
from flywheel_ray.services import LogQuery
from flywheel_ray.stores import open_store
from tests.servers import free_port
from tests.values import hit

ROOT = Path(__file__).parent.parent
SWEEP = """
type: sweep
name: tiny
workload: {{client_id: {client}, workload_id: {workload}}}
search:
  models: smollm2-135m
  adaptations:
    - type: zero_shot
    - {{type: lora, prompt: distilled, rank: 4, epochs: 1, max_train_records: 8, batch_size: 4}}
generation: {{max_tokens: 12}}
max_eval_records: 4
max_concurrent: 2
"""


def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FLYWHEEL_", "RAY_"))}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={**kept, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's runs folder, made with a sweep of two trials and ten live requests."""
    runs = tmp_path_factory.mktemp("demo")
    teacher, gateway = free_port(), free_port()
    sweep, rollout = runs / "sweep.yaml", runs / "rollout.yaml"
    sweep.write_text(SWEEP.format(client="acme-support", workload="support.assistant"))
    shipped = (ROOT / "configs/rollouts/demo.yaml").read_text()
    assert ":18080" in shipped
    rollout.write_text(shipped.replace(":18080", f":{teacher}").replace("max_tokens: 64", "max_tokens: 12"))
    done = run(
        "experiments.demo", "--runs", str(runs), "--records", "80", "--requests", "10", "--sweep", str(sweep),
        "--rollout", str(rollout), "--port", str(gateway), "--teacher-port", str(teacher),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "decision" in done.stdout and "report.html" in done.stdout
    return runs


@pytest.mark.slow
def test_the_demo_turns_the_whole_wheel(demo: Path) -> None:
    store = open_store(str(demo / "logs.sqlite"))
    live = list(store.scan(LogQuery(rollout="demo-shadow")))
    store.close()
    teacher = {r.exchange_id: r for r in live if r.served_by == "teacher"}
    shadows = {r.exchange_id: r for r in live if r.shadow}
    assert len(teacher) == len(shadows) == 10 and teacher.keys() == shadows.keys()
    assert all(isinstance(r, Record) and r.completion.latency_s for r in live)
    assert {(r.client_id, r.workload_id) for r in live} == {("acme-support", "support.assistant")}
    page = (demo / "report.html").read_text()
    assert "lora r4" in page and page.count("<svg") >= 3


@pytest.mark.slow
def test_the_notebook_runs_on_the_demos_ledger(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLYWHEEL_RUNS", str(demo))
    notebook = nbformat.read(ROOT / "experiments/analysis.ipynb", as_version=4)
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    shown = json.dumps([cell.get("outputs", []) for cell in notebook.cells])
    assert "lora r4" in shown


@pytest.mark.slow
def test_the_banking_benchmark_says_when_a_student_is_not_good_enough(tmp_path: Path) -> None:
    logs, sweep = tmp_path / "logs.jsonl", tmp_path / "sweep.yaml"
    logs.write_text("".join(json.dumps(hit(i)) + "\n" for i in range(80)))
    sweep.write_text(SWEEP.format(client="acme", workload="router"))
    done = run(
        "experiments.benchmarks.banking", "--data", str(logs), "--runs", str(tmp_path / "runs"), "--sweep", str(sweep),
        "--at-least", "1.01",
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.strip().endswith("the best student stays below 1.01")
    assert "customized-eval" in done.stdout
