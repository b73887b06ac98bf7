"""Real customer questions: how near a 135M student comes to the labels of BANKING77, and how long the sweep takes.

    python -m experiments.benchmarks.banking --data ../shared/data/banking77_router_12.jsonl

Ingests the file, runs `configs/sweeps/banking.yaml` (zero-shot, 3-shot, three LoRA settings), prints the leaderboard.
Exits with 1 where the best student stays below `--at-least`. The results table is in README.md beside this file.

    python -m experiments.benchmarks.banking --read

scores the kept answers anew by the present scorer, says whose scores changed, and what can be claimed at each margin.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from flywheel_ray.cli import main as flywheel
from flywheel_ray.datasets import Dataset
from flywheel_ray.datasets import load as load_dataset
from flywheel_ray.leaderboard import leaderboard
from flywheel_ray.ledger import Ledger
from flywheel_ray.results import Failed, Scored
from flywheel_ray.scoring import FUNCTION_NAME_AND_ARGS, SCORER_VERSION, score_tool_calls


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="banking77_router_12.jsonl")
    parser.add_argument("--runs", type=Path, default=Path("runs/banking"), help="default: %(default)s")
    parser.add_argument("--sweep", default="configs/sweeps/banking.yaml", help="default: %(default)s")
    parser.add_argument("--at-least", type=float, default=0.93, help="args accuracy to reach (default: %(default)s)")
    parser.add_argument("--read", action="store_true", help="train nothing: read the sweep that is in --runs")
    parser.add_argument("--margins", type=float, nargs="+", default=[0.05, 0.03, 0.02, 0.01], help="for --read")
    options = parser.parse_args()
    if options.read:
        read(options.runs, options.margins)
        return
    if options.data is None:
        parser.error("--data is needed: the file to ingest")
    where = ["--runs", str(options.runs)]
    for command in (["ingest", str(options.data), *where], ["sweep", options.sweep, *where]):
        started = time.monotonic()
        print(f"$ flywheel {' '.join(command)}", flush=True)
        run(command)
        print(f"{command[0]}: {time.monotonic() - started:.0f} s", flush=True)
    ledger = Ledger(options.runs.absolute() / "ledger")
    best = ledger.board(ledger.latest()).rows[0].scores[FUNCTION_NAME_AND_ARGS]
    if best is None or best.estimate < options.at_least:
        sys.exit(f"the best student stays below {options.at_least}")


def read(runs: Path, margins: list[float]) -> None:
    """What the kept sweep allows to be claimed."""
    ledger = Ledger(runs.absolute() / "ledger")
    fingerprint = ledger.latest()
    dataset = load_dataset(runs / "datasets" / fingerprint)
    results = [rescored(result, dataset) for result in ledger.swept(fingerprint)]
    board = leaderboard(results, dataset.eval, FUNCTION_NAME_AND_ARGS)
    print("\n| candidate | exact calls | difference from the teacher | n |\n|---|---|---|---:|")
    for row in board.rows:
        assert row.quality and row.difference
        q, d = row.quality, row.difference
        bounds = f"{100 * d.estimate:.1f} points [{100 * d.low:.1f}, {100 * d.high:.1f}]"
        print(f"| {row.label} | {q.estimate:.3f} [{q.low:.3f}, {q.high:.3f}] | {bounds} | {q.n} |")
    print("\n| margin | adjusted p, best first | verdict |\n|---:|---|---|")
    for margin in margins:
        board = leaderboard(results, dataset.eval, FUNCTION_NAME_AND_ARGS, margin=margin)
        p_values = ", ".join(f"{row.p_value:.2g}" for row in board.rows if row.p_value is not None)
        print(f"| {margin:.0%} | {p_values} | {board.verdict} |")


def rescored(result: Scored | Failed, dataset: Dataset) -> Scored | Failed:
    """The same answers, scored by the present scorer."""
    if isinstance(result, Failed):
        return result
    examples = {example.id: example for example in dataset.eval}
    outcomes, changed = [], 0
    for outcome in result.outcomes:
        example = examples[outcome.example_id]
        if outcome.completion is not None:
            found = {s.metric: s.value for s in score_tool_calls(example.reference, outcome.completion, example.tools)}
            changed += any(outcome.scores[metric] != value for metric, value in found.items())
            outcome = outcome.model_copy(update={"scores": {**outcome.scores, **found}})
        outcomes.append(outcome)
    versions = f"scorer {result.scorer_version} → {SCORER_VERSION}"
    print(f"{result.candidate.label}: {versions}, {changed} of {len(outcomes)} scores changed")
    return result.model_copy(update={"outcomes": tuple(outcomes), "scorer_version": SCORER_VERSION})


def run(command: list[str]) -> None:
    """A flywheel command in this process; a failure ends the benchmark with its exit code."""
    try:
        flywheel(command)
    except SystemExit as ended:
        if ended.code:
            raise


if __name__ == "__main__":
    main()
