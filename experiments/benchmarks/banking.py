"""Real customer questions: how near a 135M student comes to the labels of BANKING77, and how long the sweep takes.

    python -m experiments.benchmarks.banking --data ../shared/data/banking77_router_12.jsonl

Ingests the file, runs `configs/sweeps/banking.yaml` (zero-shot, 3-shot, three LoRA settings), prints the leaderboard.
Exits with 1 where the best student stays below `--at-least`. The results table is in README.md beside this file.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from flywheel_ray.cli import main as flywheel
from flywheel_ray.ledger import Ledger
from flywheel_ray.scoring import FUNCTION_NAME_AND_ARGS


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="banking77_router_12.jsonl")
    parser.add_argument("--runs", type=Path, default=Path("runs/banking"), help="default: %(default)s")
    parser.add_argument("--sweep", default="configs/sweeps/banking.yaml", help="default: %(default)s")
    parser.add_argument("--at-least", type=float, default=0.93, help="args accuracy to reach (default: %(default)s)")
    options = parser.parse_args()
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


def run(command: list[str]) -> None:
    """A flywheel command in this process; a failure ends the benchmark with its exit code."""
    try:
        flywheel(command)
    except SystemExit as ended:
        if ended.code:
            raise


if __name__ == "__main__":
    main()
