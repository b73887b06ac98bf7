"""`flywheel …`: the commands that turn logs into a dataset, a leaderboard, a live rollout and a report.

    flywheel ingest logs.jsonl && flywheel sweep configs/sweeps/demo.yaml && flywheel leaderboard
    flywheel serve configs/rollouts/demo.yaml    # then point an OpenAI client at http://127.0.0.1:8000/v1
    flywheel rollout report configs/rollouts/demo.yaml && flywheel report

Every error raised on purpose ends in one clear line and exit code 1; wrong usage exits with 2, Ctrl-C with 130.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from flywheel_ray import __version__
from flywheel_ray.breakdown import Breakdown, breakdown
from flywheel_ray.cli_data import dataset_app, logs_app, prepared, show_counts
from flywheel_ray.cli_judge import judge_app, label
from flywheel_ray.config import Places, SweepConfig, load
from flywheel_ray.console import (
    RUNS,
    JsonOption,
    RunsOption,
    StoreOption,
    err,
    escaped,
    fingerprint_of,
    opened,
    out,
    places_of,
    print_json,
    wide,
)
from flywheel_ray.datasets import load as load_dataset
from flywheel_ray.errors import ConfigError, DatasetError, FlywheelError, LedgerError
from flywheel_ray.leaderboard import Leaderboard, Row
from flywheel_ray.ledger import Ledger
from flywheel_ray.progress import SweepProgress
from flywheel_ray.records import TEACHER, Record
from flywheel_ray.results import Failed, Scored
from flywheel_ray.rollout import Arm, Rollout, RolloutReport, StudentTarget, decide
from flywheel_ray.rollout import report as rollout_report
from flywheel_ray.services import Generation, LogQuery, LogStore
from flywheel_ray.stats import Interval
from flywheel_ray.stores.ingest import IngestSummary, ingest, read_lines

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Turn a teacher model's production logs into a small student that can replace it, and prove it live.",
)
rollout_app = typer.Typer(no_args_is_help=True, help="Look at live comparisons.")
app.add_typer(dataset_app, name="dataset")
app.add_typer(logs_app, name="logs")
app.add_typer(judge_app, name="judge")
app.command()(label)
app.add_typer(rollout_app, name="rollout")

FingerprintOption = Annotated[
    str | None,
    typer.Option("--dataset", help="Fingerprint (or its beginning) of the dataset. Default: the latest one swept."),
]


@app.command("ingest")
def ingest_command(
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE.jsonl…", help="Log files, a JSON line an exchange; - is stdin."),
    ],
    store: StoreOption = None,
    runs: RunsOption = RUNS,
    rejects: Annotated[
        Path | None,
        typer.Option(help="Where rejected lines go, with line number and reason. Default: RUNS/rejects.jsonl."),
    ] = None,
) -> None:
    """Read prompt/response logs into the log store.

    Running it again adds nothing twice. Lines that are no record are kept in the rejects file; where there are any, the
    command ends with exit code 1 after storing all the good ones.
    """
    places = places_of(runs, store)
    rejects = rejects or places.runs / "rejects.jsonl"
    for name in files:
        if name != "-" and not Path(name).is_file():
            raise ConfigError(f"{name}: no such file; nothing was ingested")
    rejected = 0
    with opened(places, create=True) as log_store:
        for name in files:
            summary = _ingest_one(name, log_store, rejects)
            rejected += summary.rejected
            err.print(
                f"{name}: {summary.lines:,} lines, {summary.added:,} new records, "
                f"{summary.duplicates:,} already there, {summary.rejected:,} rejected",
                highlight=False,
            )
            for reason, count in sorted(summary.reasons.items(), key=lambda item: -item[1])[:5]:
                err.print(f"  {count:,} × {reason}", highlight=False, markup=False)
    if rejected:
        raise DatasetError(
            f"{rejected:,} lines were rejected; each stands in {rejects} with its line number and reason"
        )


def _ingest_one(name: str, store: LogStore, rejects: Path) -> IngestSummary:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    lines = sys.stdin.buffer if name == "-" else read_lines(Path(name))
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(f"{name}: starting")

        def show(summary: IngestSummary) -> None:
            bar.update(task, description=f"{name}: {summary.lines:,} lines, {summary.rejected:,} rejected")

        return ingest(lines, name, store, rejects, on_progress=show)


@app.command()
def workloads(store: StoreOption = None, runs: RunsOption = RUNS, as_json: JsonOption = False) -> None:
    """List the workloads in the log store."""
    with opened(places_of(runs, store)) as log_store:
        found = log_store.workloads()
    if as_json:
        print_json([{"client_id": c, "workload_id": w, "records": n} for c, w, n in found])
        return
    table = Table("client", "workload", "records", title_justify="left")
    for client, workload, count in found:
        table.add_row(client, workload, f"{count:,}")
    out.print(table)


@app.command()
def sweep(
    config_path: Annotated[Path, typer.Argument(metavar="SWEEP.yaml", help="A sweep configuration.")],
    folder: Annotated[
        Path | None, typer.Option("--dataset", help="A built dataset folder. Default: build from the store.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the trials and stop.")] = False,
    store: StoreOption = None,
    runs: RunsOption = RUNS,
) -> None:
    """Run every candidate of a search space as a Ray Tune trial.

    Finished trials are kept in the ledger and are not run again, so that a sweep that was stopped or killed goes on
    where it was. Joins the Ray cluster of RAY_ADDRESS where that is set, otherwise starts Ray on this machine.
    """
    from flywheel_ray.candidates import candidates_of
    from flywheel_ray.sweep import run_sweep, settings_of
    from flywheel_ray.trial import trial_key

    places = places_of(runs, store)
    config = load(config_path, SweepConfig)
    if folder is not None:
        dataset = load_dataset(folder)
    else:
        workload = config.workload
        query = LogQuery(client_id=workload.client_id, workload_id=workload.workload_id)
        dataset = load_dataset(prepared(places, query, config.dataset))
    show_counts(dataset.manifest)
    if not dataset.eval:
        raise DatasetError(
            f"dataset {dataset.fingerprint} has no evaluation records; raise dataset.split.eval_fraction"
        )
    if dry_run:
        settings, ledger = settings_of(config), Ledger(places.ledger)
        for candidate in candidates_of(config.search):
            key = trial_key(candidate, dataset, settings)
            done = isinstance(ledger.get(dataset.fingerprint, key), Scored)
            out.print(f"{key}  {'done   ' if done else 'to run '}  {candidate.label}", highlight=False)
        return
    outcome = run_sweep(config, dataset, places, SweepProgress(err))
    total = len(outcome.results)
    failed = [r for r in outcome.results if isinstance(r, Failed)]
    lost = [r for r in failed if r.stage == "process"]
    err.print(
        f"{total} trials in {outcome.wall_s:.0f} s: {total - len(failed)} scored "
        f"({outcome.reused} of them before), {len(failed)} failed",
        highlight=False,
    )
    if len(lost) < total:
        _print_board(_board(places, dataset.fingerprint))
    if lost:
        raise LedgerError(
            f"{len(lost)} of {total} trials have no result; first: {lost[0].candidate.label}: {lost[0].error}. "
            "Run the same command again to go on"
        )
    if len(failed) == total:
        first = failed[0]
        raise LedgerError(f"every trial failed; first: {first.candidate.label}, {first.stage}: {first.error}")


def _board(places: Places, prefix: str | None) -> Leaderboard:
    ledger = Ledger(places.ledger)
    fingerprint = fingerprint_of(ledger, prefix)
    return ledger.board(fingerprint, load_dataset(places.datasets / fingerprint).eval)


@app.command("leaderboard")
def leaderboard_command(
    fingerprint: FingerprintOption = None,
    runs: RunsOption = RUNS,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Rank the trials of a sweep against the teacher, with 95% intervals, latency, tokens and cost."""
    board = _board(places_of(runs, store), fingerprint)
    if as_json:
        print_json(board.model_dump(mode="json"))
    else:
        _print_board(board)


@app.command("breakdown")
def breakdown_command(
    trial: Annotated[
        str | None,
        typer.Argument(help="A trial by the beginning of its key. Default: the leaderboard's winner or first."),
    ] = None,
    fingerprint: FingerprintOption = None,
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """Say where a trial's tool calls go wrong: by tool, by argument, what was called instead, and calling at all."""
    places = places_of(runs, None)
    ledger = Ledger(places.ledger)
    if trial is None:
        board = _board(places, fingerprint)
        trial = board.winner or (board.rows[0].key if board.rows else "")
    scored = ledger.find(trial)
    examples = {e.id: e for e in load_dataset(places.datasets / scored.fingerprint).eval}
    answered = [(examples[o.example_id], o.completion) for o in scored.outcomes if o.completion is not None]
    strictness = (ledger.sweep(scored.fingerprint) or {}).get("config", {}).get("strictness", "exact")
    found = breakdown(((e.reference, e.tools, completion) for e, completion in answered), strictness)
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        _print_breakdown(scored, found)


def _print_breakdown(scored: Scored, found: Breakdown) -> None:
    console = wide()
    console.print(f"{scored.candidate.label} ({scored.key[:8]}), {found.n} answers", highlight=False)
    tools = [(t.tool, t.n, t.right_name, t.right_args) for t in found.tools]
    console.print(_table("calls wanted", ("tool", "n", "called", "with right arguments"), tools))
    wrong = [(a.tool, a.path, a.n, a.wrong, a.missing, a.extra, a.wrong_type) for a in found.arguments if a.right < a.n]
    console.print(_table("arguments", ("tool", "argument", "n", "wrong", "missing", "extra", "wrong type"), wrong))
    confused = [(c.wanted, c.called, c.n) for c in found.confusion if c.wanted != c.called]
    console.print(_table("called instead", ("wanted", "called", "n"), confused))
    a = found.abstention
    console.print(
        f"a call was wanted: {a.wanted_called} called, {a.wanted_not_called} did not; none was wanted: "
        f"{a.not_wanted_not_called} abstained, {a.not_wanted_called} called; {found.malformed} calls were malformed",
        highlight=False,
    )


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> Table | str:
    if not rows:
        return f"{title}: none"
    table = Table(title=title, title_justify="left")
    for name, value in zip(head, rows[0], strict=True):
        table.add_column(name, justify="right" if isinstance(value, int) else "left")
    for row in rows:
        table.add_row(*(escaped(str(value)) for value in row))
    return table


def _print_board(board: Leaderboard) -> None:
    console = wide()
    table = Table(title=f"dataset {board.fingerprint}, ranked by {board.metric}", title_justify="left")
    metrics = list(board.teacher.scores)
    unscored = any(any(row.unscored.values()) for row in board.rows)
    for column in ("candidate", "evaluation"):
        table.add_column(column)
    numbers = [*(m.replace("_accuracy", "\n_accuracy").replace("_correctness", "\n_correctness") for m in metrics), "n"]
    calibrated = any(row.calibrated for row in board.rows)
    numbers += ["corrected\nby labels"] * calibrated + ["unscored"] * unscored
    numbers += ["p", "latency s\np50 / p95", "tokens\nin / out", "$ per\n1,000", "$ per\n1,000 right", "key"]
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    for row in (board.teacher, *board.rows):
        table.add_row(*_cells(row, metrics, unscored, calibrated), style="dim" if row.key == TEACHER else None)
    console.print(table)
    for failed in board.failed:
        console.print(
            f"[red]failed[/] {failed.candidate.label} at {failed.stage}: {escaped(failed.error)}", highlight=False
        )
    console.print(
        f"{board.verdict}\njudge: {board.judge or 'none'}\np: of being worse than the teacher by {board.margin:.0%} or "
        "more, adjusted for the number of candidates\n* nothing is both better and cheaper, "
        "† a cheaper one is shown to be no worse by the margin",
        highlight=False,
    )


def _cells(row: Row, metrics: Sequence[str], unscored: bool, calibrated: bool) -> list[str]:
    cost = row.cost
    latency = "" if cost.latency_p50_s is None else f"{cost.latency_p50_s:.2f} / {cost.latency_p95_s or 0:.2f}"
    tokens = "" if cost.prompt_tokens is None else f"{cost.prompt_tokens:.0f} / {cost.completion_tokens or 0:.0f}"
    return [
        row.label + (" *" if row.pareto else " †" if row.dominated_by else ""),
        row.evaluation,
        *(_interval(row.scores[m], reference=row.key == TEACHER) for m in metrics),
        str(row.quality.n) if row.quality else "0",
        *[_interval(row.quality) if row.calibrated else ""] * calibrated,
        *[str(max(row.unscored.values(), default=0))] * unscored,
        "" if row.p_value is None else f"{row.p_value:.2g}",
        latency,
        tokens,
        "" if cost.usd_per_1000 is None else f"{cost.usd_per_1000:.4f}",
        "" if row.usd_per_1000_successes is None else f"{row.usd_per_1000_successes:.4f}",
        "" if row.key == TEACHER else row.key[:8],
    ]


def _interval(interval: Interval | None, reference: bool = False) -> str:
    if interval is None:
        return "unscored"
    if reference:
        return f"{interval.estimate:g} (reference)"
    return f"{interval.estimate:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


@app.command()
def serve(
    config: Annotated[Path, typer.Argument(metavar="ROLLOUT.yaml", help="A rollout configuration.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    spool: Annotated[
        Path | None,
        typer.Option(
            help="Folder on a local disk where exchanges wait while the log store is away.", show_default="RUNS/spool"
        ),
    ] = None,
    store: StoreOption = None,
    runs: RunsOption = RUNS,
) -> None:
    """Start the gateway: an OpenAI-compatible endpoint before the teacher, with shadows and A/B arms beside it.

    Students named `best` or by a trial's key are taken from the ledger. Ctrl-C stops it after writing the last logs.
    What the log store has not taken by then waits in the spool for the next gateway.
    """
    places = places_of(runs, store)
    rollout = load(config, Rollout)
    students = {arm.name: spec for arm in rollout.arms if (spec := _student(rollout, arm, places)) is not None}
    with opened(places, create=True):
        pass  # a store that cannot be opened is said here, before anything starts
    # Ray Serve apps are named by import path, so that nothing in the package depends on one.
    importlib.import_module("serve.app").run(
        rollout, places.store, students, host=host, port=port, spool=spool or places.runs / "spool"
    )


def _student(rollout: Rollout, arm: Arm, places: Places) -> Any:
    """What the serving deployment of a student arm needs, from the ledger; None for an arm that is a URL."""
    if not isinstance(arm.target, StudentTarget):
        return None
    target = arm.target
    ledger = Ledger(target.ledger or places.ledger)
    best = target.trial == "best"
    trial = ledger.best(rollout.client_id, rollout.workload_id) if best else ledger.find(target.trial)
    spec = importlib.import_module("serve.student").StudentSpec
    return spec(
        candidate=trial.candidate,
        adapter=trial.training.adapter if trial.training else None,
        shots=trial.shots,
        platform_root=str(places.platform),
        generation=Generation(max_tokens=target.max_tokens),
        resources=target.resources,
        max_batch_size=target.max_batch_size,
    )


@rollout_app.command("report")
def rollout_report_command(
    config: Annotated[Path, typer.Argument(metavar="ROLLOUT.yaml", help="The rollout configuration.")],
    store: StoreOption = None,
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """Compare the arms with the teacher on paired requests, and say what the evidence allows."""
    rollout = load(config, Rollout)
    found = rollout_report(rollout, _rollout_records(places_of(runs, store), rollout), time.time())
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    _print_rollout(rollout, found)


def _rollout_records(places: Places, rollout: Rollout) -> list[Record]:
    """What a rollout logged; there is some, or LedgerError."""
    with opened(places) as log_store:
        records = list(log_store.scan(LogQuery(rollout=rollout.name)))
    if not records:
        raise LedgerError(
            f"the store has no exchange of rollout {rollout.name!r}; start it with `flywheel serve` and send requests"
        )
    return records


def _print_rollout(rollout: Rollout, found: RolloutReport) -> None:
    errors = f", {sum(found.teacher_errors.values())} of them failed" if found.teacher_errors else ""
    console = wide()
    console.print(
        f"rollout {rollout.name}: {found.exchanges} exchanges, {found.teacher_requests} asked of the teacher{errors}",
        highlight=False,
    )
    for arm in found.arms:
        table = Table(title=f"arm {arm.arm}", title_justify="left", show_header=False)
        table.add_row(
            "shadow copies", f"{arm.copies}: {arm.answered} answered{_counts(arm.failures)}{_counts(arm.drops)}"
        )
        if arm.live_requests or rollout.arm(arm.arm).weight:
            table.add_row("live requests", f"{arm.live_requests}{_counts(arm.live_failures)}")
        table.add_row("pairs", f"{arm.pairs} ({arm.unscored} not scorable by {rollout.gates.metric})")
        for metric, found_metric in arm.agreement.items():
            always = found_metric.sequence
            table.add_row(
                metric,
                f"{_interval(found_metric.interval)}, at any time [{always.low:.3f}, {always.high:.3f}], n {always.n}"
                f" of {found_metric.interval.n}",
            )
        if arm.latency:
            speed = arm.latency
            table.add_row(
                "latency p50 / p95",
                f"{speed.arm_p50_s:.2f} / {speed.arm_p95_s:.2f} s, "
                f"teacher {speed.teacher_p50_s:.2f} / {speed.teacher_p95_s:.2f} s",
            )
        if arm.tokens:
            table.add_row("completion tokens", f"{arm.tokens.arm:.0f}, teacher {arm.tokens.teacher:.0f}")
        decision = decide(arm, rollout.gates)
        table.add_row("decision", f"[bold]{decision.action}[/]: {decision.reason}")
        console.print(table)
    if found.sample_ratio_p_value is not None:
        shown = ", ".join(f"{name} {count}" for name, count in found.units.items())
        console.print(f"units: {shown}; sample ratio p-value {found.sample_ratio_p_value:.3g}", highlight=False)


def _counts(causes: dict[str, int]) -> str:
    return "".join(f", {count} {cause}" for cause, count in sorted(causes.items()))


@app.command()
def report(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: RUNS/report.html.")] = None,
    rollout_config: Annotated[
        Path | None, typer.Option("--rollout", metavar="ROLLOUT.yaml", help="Also show this rollout's live pairs.")
    ] = None,
    fingerprint: FingerprintOption = None,
    store: StoreOption = None,
    runs: RunsOption = RUNS,
) -> None:
    """Write one self-contained HTML page: decision card, leaderboard, plots, live pairs, disagreements."""
    from flywheel_ray.analysis import shadow_frame, write_report

    places = places_of(runs, store)
    board = _board(places, fingerprint)
    dataset = load_dataset(places.datasets / board.fingerprint)
    live, shadow, gates = None, None, None
    if rollout_config is not None:
        rollout = load(rollout_config, Rollout)
        records = _rollout_records(places, rollout)
        live, gates, shadow = rollout_report(rollout, records, time.time()), rollout.gates, shadow_frame(records)
    results = Ledger(places.ledger).swept(board.fingerprint)
    path = write_report(
        output or places.runs / "report.html", board, results, dataset, rollout_report=live, shadow=shadow, gates=gates
    )
    print(path)


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `flywheel` command."""
    try:
        app(args=list(arguments) if arguments is not None else None, standalone_mode=True)
    except FlywheelError as error:
        err.print(f"[bold red]error:[/] {escaped(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        err.print("stopped", highlight=False)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output went away (`| head`): not an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


if __name__ == "__main__":
    main()
