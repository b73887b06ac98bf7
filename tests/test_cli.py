"""The commands as a person types them: what they print, and one clear line for everything that is wrong."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from flywheel_ray.ledger import Ledger
from tests.values import dataset, failed, hit, scored

ROOT = Path(__file__).parent.parent


def flywheel(runs: Path, *arguments: str, stdin: bytes | None = None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("FLYWHEEL_", "RAY_"))}
    done = subprocess.run(
        [sys.executable, "-m", "flywheel_ray.cli", *arguments],
        input=stdin,
        capture_output=True,
        cwd=ROOT,
        timeout=120,
        env={**environment, "FLYWHEEL_RUNS": str(runs), "OMP_NUM_THREADS": "1"},
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def lines(count: int) -> bytes:
    return b"".join(json.dumps(hit(i)).encode() + b"\n" for i in range(count))


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Non-zero, no traceback, and one line that begins with `error:` and has the words."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error:"), done.stderr
    for word in words:
        assert word in last


def test_ingest_twice_and_build(tmp_path: Path) -> None:
    first = flywheel(tmp_path, "ingest", "-", stdin=lines(40))
    assert first.returncode == 0 and "40 new records" in first.stderr
    again = flywheel(tmp_path, "ingest", "-", stdin=lines(40))
    assert again.returncode == 0 and "0 new records, 40 already there" in again.stderr
    built = flywheel(tmp_path, "dataset", "build", "--client", "acme", "--workload", "router")
    assert built.returncode == 0, built.stderr
    folder = Path(built.stdout.strip())
    assert {p.name for p in folder.iterdir()} == {"train.jsonl", "validation.jsonl", "eval.jsonl", "manifest.json"}
    shown = flywheel(tmp_path, "dataset", "show", str(folder), "--json")
    assert json.loads(shown.stdout)["fingerprint"] == folder.name
    listed = flywheel(tmp_path, "workloads", "--json")
    assert json.loads(listed.stdout) == [{"client_id": "acme", "workload_id": "router", "records": 40}]


def test_rejected_lines_are_kept_with_number_and_reason(tmp_path: Path) -> None:
    no_choices = json.dumps(hit(1, response={"choices": []})).encode()
    bad_call = json.loads(json.dumps(hit(2)))
    bad_call["response"]["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] = "{not json"
    text = lines(1) + b'{"broken": \n' + no_choices + b"\n" + json.dumps(bad_call).encode() + b"\n"
    done = flywheel(tmp_path, "ingest", "-", stdin=text)
    refused(done, "3 lines were rejected", "rejects.jsonl")
    rejects = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert [r["line_number"] for r in rejects] == [2, 3, 4]
    for reject, words in zip(rejects, ("not JSON", "choices", "arguments"), strict=True):
        assert words in reject["reason"]
    assert "1 new record" in done.stderr  # the good line is kept


@pytest.mark.slow
def test_nothing_is_left_of_what_fails(tmp_path: Path) -> None:
    refused(flywheel(tmp_path, "ingest", str(tmp_path / "absent.jsonl")), "absent.jsonl", "no such file")
    refused(
        flywheel(tmp_path, "dataset", "build", "--client", "a", "--workload", "b"), "logs.sqlite", "flywheel ingest"
    )
    flywheel(tmp_path, "ingest", "-", stdin=lines(10))
    refused(flywheel(tmp_path, "dataset", "build", "--client", "acme", "--workload", "typo"), "typo", "acme/router")
    assert not (tmp_path / "datasets").exists()
    refused(flywheel(tmp_path, "leaderboard"), "has no results", "flywheel sweep")
    refused(flywheel(tmp_path, "report"), "has no results")
    refused(flywheel(tmp_path, "rollout", "report", "configs/rollouts/demo.yaml"), "no exchange of rollout")
    assert not (tmp_path / "report.html").exists()


def test_a_misspelt_key_names_itself(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text((ROOT / "configs/sweeps/demo.yaml").read_text().replace("models:", "modles:"))
    refused(flywheel(tmp_path, "sweep", str(path)), "search.modles: unknown key", "'models'")
    path.write_text((ROOT / "configs/rollouts/demo.yaml").read_text().replace("teacher:", "teecher:"))
    done = flywheel(tmp_path, "serve", str(path))
    assert done.returncode == 1 and "teecher: unknown key, did you mean 'teacher'?" in done.stderr


def test_a_port_in_use(tmp_path: Path) -> None:
    rollout = tmp_path / "rollout.yaml"
    rollout.write_text((ROOT / "configs/rollouts/ab.yaml").read_text().replace("api_key_env", "# api_key_env"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused(flywheel(tmp_path, "serve", str(rollout), "--port", str(port)), str(port), "--port")


def test_a_student_that_is_not_there(tmp_path: Path) -> None:
    refused(flywheel(tmp_path, "serve", "configs/rollouts/demo.yaml"), "no scored trial", "flywheel sweep")


@pytest.mark.slow
def test_leaderboard_of_a_ledger(tmp_path: Path) -> None:
    examples = dataset(200)
    examples.save(tmp_path / "datasets")
    ledger = Ledger(tmp_path / "ledger")
    ledger.put(scored(examples, key="abc12345"))
    ledger.put(failed(examples))
    shown = flywheel(tmp_path, "leaderboard")
    assert shown.returncode == 0, shown.stderr
    for words in ("m zero-shot", "base-eval", "teacher (the reference)", "abc12345", "out of memory", "no LLM"):
        assert words in shown.stdout
    board = json.loads(flywheel(tmp_path, "leaderboard", "--json").stdout)
    assert board["rows"][0]["scores"]["function_name_and_args_accuracy"]["n"] == len(examples.eval)
    assert board["teacher"]["quality"]["estimate"] == 1.0
    refused(flywheel(tmp_path, "leaderboard", "--dataset", "zz"), "'zz'", examples.fingerprint)


@pytest.mark.parametrize("arguments", [(), ("ingest",), ("dataset",), ("sweep",), ("serve",), ("rollout", "report")])
def test_help_is_there(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = flywheel(tmp_path, *arguments, "--help")
    assert done.returncode == 0 and "Usage:" in done.stdout
