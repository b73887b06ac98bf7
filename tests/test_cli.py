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
    names = {"train.jsonl", "validation.jsonl", "eval.jsonl", "tools.jsonl", "manifest.json"}
    assert {p.name for p in folder.iterdir()} == names
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
def test_a_dataset_is_built_looked_at_compared_and_exported(tmp_path: Path) -> None:
    config = tmp_path / "dataset.yaml"
    config.write_text(
        "type: dataset\nworkload: {client_id: acme, workload_id: router}\n"
        "dataset: {split: {eval_fraction: 0.3}, near_duplicates: null, redaction: {}}\n"
    )
    flywheel(tmp_path, "ingest", "-", stdin=lines(60))

    def build(*options: str) -> Path:
        done = flywheel(tmp_path, "dataset", "build", "--config", str(config), *options)
        assert done.returncode == 0, done.stderr
        return Path(done.stdout.strip())

    old = build("--until", "2025-08-12T12:00:40")
    new = build()
    assert json.loads((new / "manifest.json").read_text())["previous"] == old.name
    assert build() == new
    shown = flywheel(tmp_path, "dataset", "show", str(new))
    for words in ("route", "left out", "conversations none", f"continues dataset {old.name}"):
        assert words in shown.stdout
    compared = flywheel(tmp_path, "dataset", "diff", str(old), str(new), "--json")
    assert compared.returncode == 0 and json.loads(compared.stdout)["moved_rows"] == 0
    assert sum(json.loads(compared.stdout)["added"].values()) == 20
    dealt_anew = build("--eval-fraction", "0.6", "--previous", "none")
    refused(flywheel(tmp_path, "dataset", "diff", str(new), str(dealt_anew)), "changed sides", "--previous")
    whole = flywheel(tmp_path, "dataset", "validate", str(new))
    assert whole.returncode == 0 and "is whole: 60 rows; no leak" in whole.stdout
    for name, path in (("openai", "train.jsonl"), ("nemo_customizer", "training/train_data.jsonl")):
        exported = flywheel(tmp_path, "dataset", "export", str(new), "--format", name, "--out", str(tmp_path / name))
        assert exported.returncode == 0, exported.stderr
        rows = [json.loads(line) for line in (tmp_path / name / path).read_text().splitlines()]
        assert rows[0]["messages"][-1]["tool_calls"][0]["function"]["name"] == "route"
    refused(flywheel(tmp_path, "dataset", "export", str(new), "--format", "openai", "--out", str(tmp_path / "openai")),
            "exists; name a new folder")  # fmt: skip
    refused(flywheel(tmp_path, "dataset", "export", str(new), "--format", "csv", "--out", str(tmp_path / "x")), "csv")
    policy = flywheel(tmp_path, "dataset", "build", "--config", str(config), "--near-threshold", "0.8", "--dry-run")
    assert "threshold: 0.8" in policy.stdout and "kinds:" in policy.stdout
    for option, value, words in [
        ("--conflicts", "first", "--conflicts"),
        ("--eval-fraction", "0.95", "more than 1"),
        ("--since", "yesterday", "--since: 'yesterday' is no time"),
        ("--previous", str(tmp_path / "nowhere"), "no dataset in"),
    ]:
        refused(flywheel(tmp_path, "dataset", "build", "--config", str(config), option, value), words)


@pytest.mark.slow
def test_old_logs_are_purged(tmp_path: Path) -> None:
    flywheel(tmp_path, "ingest", "-", stdin=lines(60))
    before = ("logs", "purge", "--before", "2025-08-12T12:00:40Z")
    assert "40 records are older" in flywheel(tmp_path, *before, "--dry-run").stdout
    refused(flywheel(tmp_path, *before, stdin=b"y\n"), "nothing was deleted; --yes deletes 40 records")
    assert "40 records deleted" in flywheel(tmp_path, *before, "--yes").stdout
    assert "0 records are older" in flywheel(tmp_path, *before, "--yes").stdout
    listed = json.loads(flywheel(tmp_path, "workloads", "--json").stdout)
    assert listed[0]["records"] == 20


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
def test_a_trial_is_broken_down(tmp_path: Path) -> None:
    examples = dataset(200)
    examples.save(tmp_path / "datasets")
    ledger = Ledger(tmp_path / "ledger")
    ledger.put(scored(examples, right=0.8, key="abc12345"))
    ledger.put(scored(examples, right=0.5, key="def67890"))
    n, right = len(examples.eval), round(len(examples.eval) * 0.8)
    best = json.loads(flywheel(tmp_path, "breakdown", "--json").stdout)
    assert best["tools"] == [{"tool": "route", "n": n, "right_name": n, "right_args": right}]
    assert [(a["path"], a["wrong"]) for a in best["arguments"]] == [("queue", n - right)]
    shown = flywheel(tmp_path, "breakdown", "def")
    assert shown.returncode == 0, shown.stderr
    for words in ("def67890", f"{n} answers", "queue", "called instead: none", f"a call was wanted: {n} called"):
        assert words in shown.stdout
    refused(flywheel(tmp_path, "breakdown", "zzz"), "zzz", "flywheel leaderboard")


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
