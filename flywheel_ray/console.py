"""What the commands share: the two consoles, the options that many take, and how a time or a store is given."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from flywheel_ray.config import Places
from flywheel_ray.errors import ConfigError, LedgerError
from flywheel_ray.ledger import Ledger
from flywheel_ray.services import LogStore
from flywheel_ray.stores import open_store

out = Console()
err = Console(stderr=True, soft_wrap=True)

RunsOption = Annotated[
    Path,
    typer.Option("--runs", envvar="FLYWHEEL_RUNS", help="Folder of datasets, ledger and adapters."),
]
StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        envvar="FLYWHEEL_STORE",
        help="Log store: a SQLite file, or http(s)://host:port/index for Elasticsearch. Default: RUNS/logs.sqlite.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
RUNS = Path("runs")


def places_of(runs: Path, store: str | None) -> Places:
    """Where things are, from the two options."""
    runs = runs.absolute()
    return Places(runs=runs, store=store or str(runs / "logs.sqlite"))


@contextmanager
def opened(places: Places, create: bool = False) -> Iterator[LogStore]:
    """The log store, open for the time of the context."""
    if create and "://" not in places.store:
        Path(places.store).parent.mkdir(parents=True, exist_ok=True)
    store = open_store(places.store, create=create)
    try:
        yield store
    finally:
        store.close()


def seconds_of(option: str, text: str | None) -> float | None:
    """A time option in epoch seconds: ISO 8601 (UTC where no zone is given), or epoch seconds.

    Raises:
        ConfigError: it is neither.
    """
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"{option}: {text!r} is no time; write 2026-11-23 or 2026-11-23T08:00:00+01:00") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def wide() -> Console:
    """Standard output; a log file has no width of its own, and a table that folds its cells cannot be read there."""
    return out if out.is_terminal else Console(width=200)


def print_json(data: Any) -> None:
    """Print JSON for programs."""
    print(json.dumps(data, ensure_ascii=False, indent=2))


def escaped(text: str) -> str:
    """Text in which brackets are no markup."""
    return escape(text)


def fingerprint_of(ledger: Ledger, prefix: str | None) -> str:
    """The one dataset in the ledger that starts with `prefix`, or without one that of the latest results.

    Raises:
        LedgerError: none or several start with it.
    """
    if prefix is None:
        return ledger.latest()
    known = ledger.fingerprints()
    found = [name for name in known if name.startswith(prefix)]
    if len(found) != 1:
        listed = ", ".join(known) or "none"
        raise LedgerError(f"{len(found)} datasets in ledger {ledger.url} start with {prefix!r}; it has {listed}")
    return found[0]
