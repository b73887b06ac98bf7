"""Frames, plots and the report, on a small ledger of real results; slow tests open the page and run the notebook."""

from __future__ import annotations

import html
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pytest

from flywheel_ray.analysis import losses_frame, outcomes_frame, shadow_frame, trials_frame, write_report
from flywheel_ray.builds import build
from flywheel_ray.candidates import Candidate, InContext, Lora, ZeroShot
from flywheel_ray.datasets import Dataset, DatasetPolicy
from flywheel_ray.errors import LedgerError
from flywheel_ray.leaderboard import leaderboard
from flywheel_ray.ledger import Ledger
from flywheel_ray.records import Completion, Record, ToolCall, from_hit
from flywheel_ray.report import cost_ratio, dollars
from flywheel_ray.results import Failed, LossPoint, Outcome, Scored, TrainingSummary
from flywheel_ray.rollout import Arm, Endpoint, Gates, Rollout, UrlTarget, report
from flywheel_ray.scoring import (
    FUNCTION_NAME,
    FUNCTION_NAME_AND_ARGS,
    SCORER_VERSION,
    SIMILARITY,
    TOOL_CALLING_CORRECTNESS,
)
from flywheel_ray.scoring import score_tool_calls as score
from flywheel_ray.splits import SplitPolicy
from flywheel_ray.stores import open_store

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "experiments" / "analysis.ipynb"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TOOLS = ("cancel_order", "track_order", "refund", "change_address")
HOSTILE = "<script>alert('x')</script> & \u202eevil $body ${title}"
CONFIG = {
    "leaderboard": {"metric": FUNCTION_NAME_AND_ARGS, "margin": 0.1, "confidence": 0.95},
    "prices": {
        "teacher": {"type": "per_token", "usd_per_1m_prompt_tokens": 2.0, "usd_per_1m_completion_tokens": 6.0},
        "smollm2-135m": {"type": "per_hour", "usd_per_hour": 0.08},
    },
}


def record(i: int, **changes: Any) -> Record:
    """Exchange i of acme/support, as the teacher answered it; the changes are fields of the log line."""
    tool = TOOLS[(i * i) % 7 % len(TOOLS)]
    arguments = f'{{"order_id": "A{i:04d}"}}'
    message = {"role": "assistant", "content": None, "tool_calls": [_call(tool, arguments)]}
    question = f"{HOSTILE} {i}" if i % 2 == 0 else f"Please {tool.replace('_', ' ')} for order A{i:04d}, it is urgent."
    request = {
        "model": "teacher",
        "messages": [{"role": "system", "content": "You are support."}, {"role": "user", "content": question}],
        "tools": [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in TOOLS],
    }
    hit = {
        "timestamp": 1_790_000_000 + 60 * i,
        "client_id": "acme",
        "workload_id": "support",
        "request": request,
        "response": {"choices": [{"message": message}], "usage": {"prompt_tokens": 410, "completion_tokens": 24}},
        "latency_s": 0.9 + 0.6 * Random(i).random(),
    }
    found = from_hit(hit | changes)
    assert isinstance(found, Record), found
    return found


def _call(name: str, arguments: str) -> dict[str, Any]:
    return {"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}}


def scored(dataset: Dataset, candidate: Candidate, right: float, latency_s: float, unscored: int = 0) -> Scored:
    """A trial that answers each example as the teacher did with probability `right`; the first ones get no answer."""
    rng = Random(candidate.label)
    outcomes = []
    for i, example in enumerate(dataset.eval):
        call = example.reference.tool_calls[0]
        if i < unscored:
            metrics = (FUNCTION_NAME_AND_ARGS, FUNCTION_NAME, TOOL_CALLING_CORRECTNESS)
            why = dict.fromkeys(metrics, "the prompt is too long")
            outcomes.append(
                Outcome(
                    example_id=example.id,
                    conversation=example.conversation,
                    completion=None,
                    scores=dict.fromkeys(metrics),
                    unscored=why,
                )
            )
            continue
        if rng.random() > right:
            call = ToolCall(name=call.name if rng.random() < 0.7 else "refund", arguments={"order_id": "<b>?</b>"})
        answer = Completion(
            tool_calls=(call,), latency_s=latency_s * (0.8 + 0.4 * rng.random()), prompt_tokens=60, completion_tokens=20
        )
        values = {s.metric: s.value for s in score(example.reference, answer)}
        values[TOOL_CALLING_CORRECTNESS] = values[FUNCTION_NAME_AND_ARGS]
        outcomes.append(
            Outcome(example_id=example.id, conversation=example.conversation, completion=answer, scores=values)
        )
    training = None
    if isinstance(candidate.adaptation, Lora):
        floor = 1 - right
        epochs = candidate.adaptation.epochs
        points = tuple(
            LossPoint(step=5 * k, epoch=epochs * k / 8, value=floor + 1.6 * 2.0 ** (-k)) for k in range(1, 9)
        )
        training = TrainingSummary(
            job="j", adapter="a", train_losses=points, validation_losses=points[1::2], train_s=312.0
        )
    return Scored(
        key=candidate.key(dataset.fingerprint, SCORER_VERSION),
        candidate=candidate,
        fingerprint=dataset.fingerprint,
        scorer_version=SCORER_VERSION,
        judge="rubric (offline rules, no LLM)",
        outcomes=tuple(outcomes),
        training=training,
        evaluation_s=latency_s * len(dataset.eval),
    )


def shadow(i: int, right: bool, error: str | None = None) -> Record:
    """The arm's copy of exchange i."""
    teacher = record(i)
    call = teacher.completion.tool_calls[0]
    arguments = f'{{"order_id": "{call.arguments["order_id"] if right else "?"}"}}'  # type: ignore[index]
    message = {"role": "assistant", "content": None, "tool_calls": [_call(call.name, arguments)]}
    usage = {"prompt_tokens": 60, "completion_tokens": 20}
    return record(
        i,
        **live(i),
        served_by="student",
        arm="student",
        shadow=True,
        error=error,
        response={} if error else {"choices": [{"message": message}], "usage": usage},
        latency_s=None if error else 0.2 + 0.3 * Random(-i).random(),
    )


def live(i: int) -> dict[str, Any]:
    return {"rollout": "demo", "exchange_id": f"x{i}"}


class World(NamedTuple):
    """What a user's runs folder holds."""

    runs: Path
    dataset: Dataset
    ledger: Ledger
    results: list[Scored | Failed]
    records: list[Record]
    rollout: Rollout


def world_in(runs: Path) -> World:
    """A dataset of 200 evaluation rows, eight trials (one failed), and 130 shadow copies in the log store."""
    logged = [record(i) for i in range(600)]
    logged += [record(i, timestamp=1_791_000_000 + i) for i in range(9)]
    split = SplitPolicy(eval_fraction=0.33, validation_fraction=0.1, class_aware=False)
    policy = DatasetPolicy(split=split, near_duplicates=None)
    dataset = build(logged, policy, client_id="acme", workload_id="support", source="logs.sqlite")
    dataset.save(runs / "datasets")
    model = "smollm2-135m"
    tried = [
        (ZeroShot(), 0.02, 0.35, 0),
        (InContext(shots=2), 0.22, 0.6, 0),
        (InContext(shots=4), 0.31, 0.9, 3),
        (Lora(rank=8, prompt="distilled", max_train_records=200), 0.86, 0.21, 0),
        (Lora(rank=16, prompt="distilled"), 0.98, 0.22, 2),
        (Lora(rank=16), 0.92, 0.5, 0),
        (Lora(rank=32, learning_rate=1e-3), 0.9, 0.52, 0),
    ]
    results: list[Scored | Failed] = [
        scored(dataset, Candidate(model=model, adaptation=how), right, latency_s, unscored)
        for how, right, latency_s, unscored in tried
    ]
    stopped = Candidate(model=model, adaptation=Lora(rank=64))
    results.append(
        Failed(
            key=stopped.key(dataset.fingerprint, SCORER_VERSION),
            candidate=stopped,
            fingerprint=dataset.fingerprint,
            stage="training",
            error="out of memory <oom>",
        )
    )
    ledger = Ledger(runs / "ledger")
    for result in results:
        ledger.put(result)
    ledger.put_sweep(dataset.fingerprint, {"config": CONFIG, "keys": [r.key for r in results]})
    errors = {7: "timeout", 40: "queue_full", 41: "queue_full"}
    records = [record(i, **live(i)) for i in range(130)]
    records += [shadow(i, right=i % 17 != 3, error=errors.get(i)) for i in range(130)]
    store = open_store(str(runs / "logs.sqlite"))
    store.append(records)
    store.close()
    arm = Arm(name="student", target=UrlTarget(url="http://127.0.0.1:9/v1"), shadow=1.0)
    rollout = Rollout(
        type="rollout",
        name="demo",
        client_id="acme",
        workload_id="support",
        teacher=Endpoint(url="http://127.0.0.1:8/v1"),
        arms=(arm,),
        gates=Gates(margin=0.1),
    )
    return World(runs, dataset, ledger, results, records, rollout)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return world_in(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def page(world: World) -> Path:
    return write_report(
        world.runs / "out" / "report.html",
        world.ledger.board(world.dataset.fingerprint, world.dataset.eval),
        world.results,
        world.dataset,
        rollout_report=report(world.rollout, world.records),
        shadow=shadow_frame(world.records),
        gates=world.rollout.gates,
    )


# ── frames ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_trials_frame_has_the_leaderboards_figures(world: World) -> None:
    frame = trials_frame(world.ledger)
    board = world.ledger.board(world.dataset.fingerprint, world.dataset.eval)
    assert len(frame) == len(world.results)
    assert list(frame["key"][:-1]) == [row.key for row in board.rows]
    best = frame.iloc[0]
    row = board.rows[0]
    assert row.quality is not None
    assert best[FUNCTION_NAME_AND_ARGS] == row.quality.estimate
    assert best[f"{FUNCTION_NAME_AND_ARGS}_low"] == row.quality.low
    assert best[f"{FUNCTION_NAME_AND_ARGS}_n"] == len(world.dataset.eval) - 2
    assert best[f"{FUNCTION_NAME_AND_ARGS}_unscored"] == 2
    assert best["adaptation"] == "lora" and best["rank"] == 16 and best["prompt"] == "distilled"
    assert best["usd_per_1000"] == pytest.approx(0.08 * best["evaluation_s"] / 3600 / row.quality.n * 1000)
    assert best["train_s"] == 312.0
    assert frame["latest_sweep"].all()


def test_a_failed_trial_has_its_stage_and_no_score(world: World) -> None:
    last = trials_frame(world.ledger).iloc[-1]
    assert (last["status"], last["stage"], last["error"]) == ("failed", "training", "out of memory <oom>")
    assert np.isnan(last[FUNCTION_NAME_AND_ARGS])


def test_outcomes_frame_has_a_row_for_each_trial_and_example(world: World) -> None:
    frame = outcomes_frame(world.ledger, world.dataset.fingerprint)
    assert len(frame) == 7 * len(world.dataset.eval)
    means = frame.groupby("key")[FUNCTION_NAME_AND_ARGS].mean()
    for result in world.results:
        if isinstance(result, Scored):
            assert means[result.key] == pytest.approx(result.mean(FUNCTION_NAME_AND_ARGS))
    silent = frame[frame["answer"].isna()]
    assert len(silent) == 5
    assert silent[FUNCTION_NAME_AND_ARGS].isna().all()
    assert silent["unscored"].str.contains("the prompt is too long").all()


def test_losses_frame(world: World) -> None:
    frame = losses_frame(world.ledger)
    assert frame["key"].nunique() == 4
    assert frame.groupby("kind").size().to_dict() == {"train": 32, "validation": 16}


def test_shadow_frame_has_a_row_for_each_pair(world: World) -> None:
    frame = shadow_frame(world.records)
    found = report(world.rollout, world.records).arm("student")
    assert len(frame) == found.pairs == 128
    assert frame[FUNCTION_NAME_AND_ARGS].mean() == pytest.approx(
        found.agreement[FUNCTION_NAME_AND_ARGS].interval.estimate
    )
    assert frame["exact_text"].isna().all()
    timeout = frame[frame["error"].notna()].iloc[0]
    assert (timeout["error"], timeout[FUNCTION_NAME_AND_ARGS]) == ("timeout", 0.0)
    assert np.isnan(timeout["arm_latency_s"])


def test_without_pairs_the_frame_still_has_its_columns() -> None:
    assert shadow_frame([]).empty
    assert "arm_latency_s" in shadow_frame([])


def test_an_empty_ledger_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="flywheel sweep"):
        trials_frame(Ledger(tmp_path))


# ── the page ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_page_has_every_candidate_and_the_decisions(world: World, page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for result in world.results:
        assert result.candidate.label in text
    board = world.ledger.board(world.dataset.fingerprint, world.dataset.eval)
    assert board.winner and html.escape(board.verdict) in text
    assert "failed at training: out of memory &lt;oom&gt;" in text
    assert "rubric (offline rules, no LLM)" in text
    assert "2 unscored" in text
    assert "2 queue_full" in text and "1 timeout" in text
    assert "duplicate request" in text
    assert text.count("<svg ") == 6


def test_the_page_refers_to_nothing_outside(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"https?://|\bsrc=|<link|@import", text)


def test_what_was_logged_is_text_and_never_markup(world: World, page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert html.escape(HOSTILE) in text
    assert "<b>?</b>" not in text
    assert "<oom>" not in text


def test_ids_are_unique(page: Path) -> None:
    ids = re.findall(r'\bid="([^"]+)"', page.read_text(encoding="utf-8"))
    assert len(ids) == len(set(ids))


def test_writing_again_gives_the_same_page_and_leaves_nothing_beside_it(world: World, tmp_path: Path) -> None:
    board = world.ledger.board(world.dataset.fingerprint, world.dataset.eval)
    pages = [write_report(tmp_path / "report.html", board, world.results, world.dataset).read_bytes() for _ in range(2)]
    assert pages[0] == pages[1]
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_a_sweep_of_failures_has_a_page(world: World, tmp_path: Path) -> None:
    failures = [r for r in world.results if isinstance(r, Failed)]
    board = world.ledger.board(world.dataset.fingerprint, world.dataset.eval).model_copy(
        update={"rows": (), "winner": None, "judge": "", "verdict": "No candidate was scored."}
    )
    text = write_report(tmp_path / "r.html", board, failures, world.dataset).read_text(encoding="utf-8")
    assert "No candidate was scored." in text
    assert "failed at training" in text
    assert "<svg" not in text


def test_a_board_of_another_dataset_is_refused(world: World, tmp_path: Path) -> None:
    board = world.ledger.board(world.dataset.fingerprint, world.dataset.eval).model_copy(
        update={"fingerprint": "0" * 16}
    )
    with pytest.raises(LedgerError, match="not of"):
        write_report(tmp_path / "r.html", board, world.results, world.dataset)


def test_odd_names_draw(world: World, tmp_path: Path) -> None:
    """Dollars, lone surrogates, other scripts and long names, as a model or a tool may be called."""
    odd = Candidate(model="a$b$ \\frac 模型 <i> " + "x" * 90, adaptation=Lora())
    result = scored(world.dataset, odd, 0.5, 0.1)
    board = world.ledger.board(world.dataset.fingerprint, world.dataset.eval)
    row = board.rows[0].model_copy(update={"label": odd.label, "key": result.key})
    path = write_report(
        tmp_path / "r.html",
        board.model_copy(update={"rows": (row,), "winner": None}),
        [result],
        world.dataset,
    )
    assert "a$b$" in path.read_text(encoding="utf-8")


def test_a_workload_of_text_without_prices_has_a_page(tmp_path: Path) -> None:
    """No tools, no latency, no price, an arm that nobody answered: every absent figure is said to be absent."""

    def say(text: str) -> dict[str, Any]:
        return {"choices": [{"message": {"role": "assistant", "content": text}}]}

    def ask(i: int, **changes: Any) -> Record:
        request = {"messages": [{"role": "user", "content": f"Hello {i}"}]}
        return record(i, **{"request": request, "response": say(f"Good day {i}"), "latency_s": None} | changes)

    dataset = build([ask(i) for i in range(40)], client_id="acme", workload_id="support")
    candidate = Candidate(model="m", adaptation=ZeroShot())
    result = Scored(
        key="k",
        candidate=candidate,
        fingerprint=dataset.fingerprint,
        scorer_version=SCORER_VERSION,
        judge="llama (LLM)",
        outcomes=tuple(
            Outcome(
                example_id=e.id, conversation=e.conversation, completion=Completion(text="Hi"), scores={SIMILARITY: 0.3}
            )
            for e in dataset.eval
        ),
        evaluation_s=1.0,
    )
    pair = [
        ask(1, **live(1)),
        ask(1, **live(1), served_by="s", arm="s", shadow=True, response=say("good  day 1")),
    ]
    shadow = shadow_frame(pair)
    assert shadow["exact_text"].tolist() == [1.0]
    arms = (Arm(name="s", target=UrlTarget(url="http://h/v1")), Arm(name="idle", target=UrlTarget(url="http://h/v1")))
    rollout = Rollout(
        type="rollout",
        name="demo",
        client_id="acme",
        workload_id="support",
        teacher=Endpoint(url="http://h"),
        arms=arms,
    )
    board = leaderboard([result], dataset.eval)
    path = write_report(tmp_path / "r.html", board, [result], dataset, report(rollout, pair), shadow)
    text = path.read_text(encoding="utf-8")
    assert text.count("<svg ") == 2  # quality, and agreement as pairs arrived
    assert "not priced" in text and "no gates given" in text and "llama (LLM)" in text
    assert not re.search(r"\bnan\b|\bNone\b(?!: the best candidate)", text)


@pytest.mark.parametrize(
    ("student", "teacher", "said"),
    [
        (0.005, 0.96, "192× cheaper"),
        (0.4, 0.9, "2.2× cheaper"),
        (1.5, 1.0, "1.5× dearer"),
        (None, 1.0, "not priced"),
        (0.0, 1.0, "free"),
    ],
)
def test_cost_ratio(student: float | None, teacher: float | None, said: str) -> None:
    assert cost_ratio(student, teacher) == said


@pytest.mark.parametrize(
    ("usd", "said"),
    [(None, "unpriced"), (0.0, "$0.00"), (0.0000512, "$0.0000512"), (0.02, "$0.02"), (1234.5, "$1,234.50")],
)
def test_dollars_are_never_in_scientific_notation(usd: float | None, said: str) -> None:
    assert dollars(usd) == said


@pytest.mark.parametrize("missing", ["pandas", "matplotlib"])
def test_without_the_extra_the_import_names_it(missing: str) -> None:
    code = f"import sys; sys.modules['{missing}'] = None; import flywheel_ray.analysis"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    last = done.stderr.strip().splitlines()[-1]
    assert "FlywheelError" in last and missing in last and "flywheel-ray[analysis]" in last


# ── slow: a browser, a kernel ─────────────────────────────────────────────────────────────────────────────────────────


def chromium(page: Path, profile: Path, *options: str) -> str:
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", f"--user-data-dir={profile}",
        *options, page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="NO BROWSER: install chromium; nobody has looked at the rendered report")
def test_a_browser_renders_the_page(world: World, page: Path, tmp_path: Path) -> None:
    shot = tmp_path / "report.png"
    chromium(page, tmp_path / "p1", f"--screenshot={shot}", "--window-size=1200,2400")
    assert shot.stat().st_size > 50_000
    # The same page with a probe of our own: what the browser laid out, not what we wrote.
    probe = tmp_path / "probe.html"
    script = (
        "<script>addEventListener('load', () => { const seen = q => [...document.querySelectorAll(q)].filter(e => {"
        "const b = e.getBoundingClientRect(); return b.width > 200 && b.height > 20 }).length;"
        "document.body.dataset.rows = seen('#leaderboard tbody tr'); document.body.dataset.plots = seen('figure svg');"
        "document.body.dataset.scripts = document.scripts.length;"
        "document.body.dataset.wide = document.documentElement.scrollWidth > innerWidth })</script>"
    )
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"<meta http-equiv=[^\n]*", "", text).replace("</body>", f"{script}</body>")
    probe.write_text(text, encoding="utf-8")
    for width in ("1200", "420"):
        dom = chromium(probe, tmp_path / f"p{width}", "--dump-dom", f"--window-size={width},2400")
        body = re.search(r"<body [^>]*>", dom)
        assert body, dom[:500]
        assert f'data-rows="{len(world.results) + 1}"' in body[0]
        assert 'data-plots="6"' in body[0]
        assert 'data-scripts="1"' in body[0]
        assert 'data-wide="false"' in body[0]


def run_notebook(runs: Path) -> str:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    environment = {**os.environ, "FLYWHEEL_RUNS": str(runs)}
    environment.pop("FLYWHEEL_STORE", None)
    client = NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    client.execute(env=environment)
    return nbformat.writes(notebook)


@pytest.mark.slow
def test_the_notebook_runs_on_a_ledger(world: World) -> None:
    done = run_notebook(world.runs)
    assert world.dataset.fingerprint in done
    assert done.count("<svg") == 6


@pytest.mark.slow
def test_the_notebook_says_what_to_run_where_there_is_nothing(tmp_path: Path) -> None:
    from nbclient.exceptions import CellExecutionError

    with pytest.raises(CellExecutionError, match="flywheel sweep"):
        run_notebook(tmp_path)


def test_the_notebook_is_kept_without_outputs() -> None:
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs") and not cell.get("execution_count")
