"""`flywheel dataset …` and `flywheel logs …`: from logged exchanges to rows that a model can be staked on.

flywheel dataset build --client acme --workload support        # prints the folder, named by its content
flywheel dataset show runs/datasets/3f9a0c2d41b7e655
flywheel dataset diff runs/datasets/3f9a… runs/datasets/b01c…  # what a later build changed
flywheel dataset export runs/datasets/3f9a… --format openai --out openai
flywheel logs purge --before 2026-01-01
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from pydantic import ValidationError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from flywheel_ray.builds import near_leaks
from flywheel_ray.config import DatasetConfig, Places, SweepConfig, WorkloadName, load
from flywheel_ray.console import (
    RUNS,
    JsonOption,
    RunsOption,
    StoreOption,
    err,
    escaped,
    opened,
    out,
    places_of,
    print_json,
    seconds_of,
    wide,
)
from flywheel_ray.datasets import DatasetPolicy, Manifest, diff, validate
from flywheel_ray.datasets import load as load_dataset
from flywheel_ray.errors import ConfigError, DatasetError
from flywheel_ray.formats import FORMATS
from flywheel_ray.near_duplicates import NearDuplicates
from flywheel_ray.preparation import Engine, latest_like, prepare
from flywheel_ray.services import LogQuery
from flywheel_ray.splits import SPLITS

dataset_app = typer.Typer(no_args_is_help=True, help="Build datasets, look at them, and write them for others.")
logs_app = typer.Typer(no_args_is_help=True, help="Look after the log store.")

FolderArgument = Annotated[Path, typer.Argument(metavar="FOLDER", help="A dataset folder.")]
Time = Annotated[str | None, typer.Option(help="Only records from this time on: 2026-11-23, or with a time and zone.")]
Until = Annotated[str | None, typer.Option(help="Only records before this time.")]


@dataset_app.command("build")
def dataset_build(
    client: Annotated[str | None, typer.Option(help="client_id of the records.")] = None,
    workload: Annotated[str | None, typer.Option(help="workload_id of the records.")] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.yaml", help="Take the workload and the policy from a dataset or sweep configuration."
        ),
    ] = None,
    out_dir: Annotated[Path | None, typer.Option("--out", help="Parent folder. Default: RUNS/datasets.")] = None,
    since: Time = None,
    until: Until = None,
    eval_fraction: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Share held out for evaluation. Default: 0.2.")
    ] = None,
    validation_fraction: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Share for validation loss. Default: 0.1.")
    ] = None,
    eval_records: Annotated[
        int | None, typer.Option(min=1, help="A wanted number of evaluation rows, instead of a share.")
    ] = None,
    holdout_since: Annotated[
        str | None, typer.Option(help="Conversations that begin from this time on are all held out for evaluation.")
    ] = None,
    conflicts: Annotated[
        str | None, typer.Option(help="Which of several answers to a request counts: majority (default), latest, drop.")
    ] = None,
    near_threshold: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Similarity from which requests are near-duplicates; 0 keeps them all."),
    ] = None,
    invalid_calls: Annotated[
        str | None, typer.Option(help="Tool calls that break the tools' schemas: drop (default), keep, eval_only.")
    ] = None,
    redact: Annotated[
        bool | None, typer.Option("--redact/--no-redact", help="Replace private data by stand-ins.")
    ] = None,
    previous: Annotated[
        str,
        typer.Option(help="The dataset folder this one continues, so that no record changes sides; or auto, or none."),
    ] = "auto",
    ray: Annotated[
        bool | None, typer.Option("--ray/--no-ray", help="Build on Ray Data. Default: with very many records.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the policy as YAML, and stop.")] = False,
    store: StoreOption = None,
    runs: RunsOption = RUNS,
) -> None:
    """Build a deduplicated, split and leak-checked dataset from a workload's teacher-served records.

    Prints the folder, which is named by the dataset's fingerprint: the same logs and policy give the same one, here or
    on a cluster. Options given here go before those of --config.
    """
    places = places_of(runs, store)
    policy = DatasetPolicy()
    if config is not None:
        policy, named = _configured(config)
        client, workload = client or named.client_id, workload or named.workload_id
    if not client or not workload:
        raise ConfigError("name the workload: --client and --workload, or a --config that has them")
    split = {
        "eval_fraction": eval_fraction,
        "validation_fraction": validation_fraction,
        "eval_records": eval_records,
        "holdout_since": seconds_of("--holdout-since", holdout_since),
    }
    changes: dict[str, Any] = {"conflicts": conflicts, "invalid_calls": invalid_calls}
    if near_threshold is not None:
        short = min(near_threshold, NearDuplicates().short_threshold)
        near = {"threshold": near_threshold, "short_threshold": short}
        changes["near_duplicates"] = near if near_threshold else False
    if redact is not None:
        changes["redaction"] = (policy.redaction or {}) if redact else False
    policy = _changed(policy, split, changes)
    if dry_run:
        print(yaml.safe_dump(policy.model_dump(mode="json"), sort_keys=False), end="")
        return
    query = LogQuery(
        client_id=client,
        workload_id=workload,
        since=seconds_of("--since", since),
        until=seconds_of("--until", until),
    )
    engine: Engine = "auto" if ray is None else "ray" if ray else "process"
    folder = prepared(places, query, policy, out_dir, previous, engine)
    show_counts(load_dataset(folder).manifest)
    print(folder)


def _configured(path: Path) -> tuple[DatasetPolicy, WorkloadName]:
    try:
        data = yaml.safe_load(path.read_bytes())
    except (OSError, yaml.YAMLError):
        data = None  # `load` says what is wrong
    config: DatasetConfig | SweepConfig
    if isinstance(data, dict) and data.get("type") == "sweep":
        config = load(path, SweepConfig)
    else:
        config = load(path, DatasetConfig)
    return config.dataset, config.workload


def _changed(policy: DatasetPolicy, split: dict[str, Any], changes: dict[str, Any]) -> DatasetPolicy:
    data = policy.model_dump()
    data["split"] |= {name: value for name, value in split.items() if value is not None}
    data |= {name: value or None for name, value in changes.items() if value is not None}
    if changes.get("redaction") is not None and changes["redaction"] is not False:
        data["redaction"] = policy.redaction.model_dump() if policy.redaction else {}
    try:
        return DatasetPolicy.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][-1] if first["loc"] else "").replace("_", "-")
        near = "--eval-fraction, --validation-fraction" if first["type"] == "value_error" else f"--{option}"
        raise ConfigError(f"{near}: {first['msg'].removeprefix('Value error, ')}") from None


def prepared(
    places: Places,
    query: LogQuery,
    policy: DatasetPolicy,
    out_dir: Path | None = None,
    previous: str = "auto",
    engine: Engine = "auto",
) -> Path:
    """Build a dataset with a progress bar, continuing an earlier one where there is one, and return its folder."""
    parent = out_dir or places.datasets
    earlier: Manifest | None
    if previous == "none":
        earlier = None
    elif previous == "auto":
        earlier = latest_like(parent, query, policy)
    else:
        earlier = load_dataset(Path(previous)).manifest
    if earlier is not None:
        err.print(f"continues dataset {earlier.fingerprint}: no record changes sides", highlight=False)
    columns = (TextColumn("dataset"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("")
        return prepare(
            places,
            query,
            policy,
            out=parent,
            previous=earlier,
            engine=engine,
            on_progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


def show_counts(manifest: Manifest) -> None:
    """A dataset in a few lines, on standard error."""
    rows = manifest.rows
    err.print(
        f"dataset {manifest.fingerprint}: {rows.train:,} train, {rows.validation:,} validation, {rows.eval:,} eval",
        highlight=False,
    )
    for reason, count in manifest.excluded.items():
        err.print(f"  left out {count:,}: {reason}", highlight=False, markup=False)
    wanted = manifest.policy.split.eval_records
    if wanted is not None and rows.eval != wanted:
        err.print(f"  {wanted:,} evaluation rows were wanted; {rows.eval:,} is as near as it gets", highlight=False)
    for tool, side in manifest.uncovered.items():
        count = manifest.tools[tool].total
        err.print(f"  {tool} has {count:,} rows and none in {side}", highlight=False, markup=False)


@dataset_app.command("show")
def dataset_show(folder: FolderArgument, as_json: JsonOption = False) -> None:
    """Show what is in a dataset: rows by split and tool, what was left out and why, and what was checked."""
    manifest = load_dataset(folder).manifest
    if as_json:
        print_json(manifest.model_dump(mode="json"))
        return
    console = wide()
    console.print(f"[bold]dataset {manifest.fingerprint}[/] of {escaped(manifest.name)}", highlight=False)
    table = Table("", *SPLITS, "total", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    counted = {"rows": manifest.rows, "conversations": manifest.conversations}
    counted |= {f"  {tool}": counts for tool, counts in manifest.tools.items()}
    for name, counts in counted.items():
        table.add_row(escaped(name), *(f"{getattr(counts, split):,}" for split in SPLITS), f"{counts.total:,}")
    console.print(table)
    left_out = Table("left out", "records", title_justify="left")
    left_out.columns[1].justify = "right"
    for reason, count in manifest.excluded.items():
        left_out.add_row(escaped(reason), f"{count:,}")
    left_out.add_row("[dim]of scanned[/]", f"[dim]{manifest.scanned:,}[/]")
    console.print(left_out)
    for line in _remarks(manifest):
        console.print(line, highlight=False, markup=False)


def _remarks(manifest: Manifest) -> list[str]:
    lines = []
    for kinds, what in ((manifest.faults, "rows kept with invalid calls"), (manifest.redacted, "places redacted")):
        if kinds:
            lines.append(f"{what}: " + ", ".join(f"{count:,} {kind}" for kind, count in kinds.items()))
    if manifest.conflicting_requests:
        lines.append(
            f"{manifest.conflicting_requests:,} requests with several answers, resolved by {manifest.policy.conflicts}"
        )
    if manifest.several_choices:
        lines.append(f"{manifest.several_choices:,} responses with several choices, of which the first counts")
    held_out = ", ".join(sorted(set(manifest.sides.held_out.values())))
    if held_out:
        lines.append(f"held out so that evaluation has them: {held_out}")
    lines += [f"no rows in {side}: {tool}" for tool, side in manifest.uncovered.items()]
    check = manifest.leak_check
    near = f"near-duplicates {check.near_duplicates}"
    if check.near_duplicates == "none" and (searched := manifest.policy.near_duplicates):
        near += f" (similarity {searched.leak.threshold:g} or more, of short texts {searched.leak.short_threshold:g})"
    lines.append(f"leaks between sides: requests {check.requests}, conversations {check.conversations}, {near}")
    if manifest.previous:
        lines.append(f"continues dataset {manifest.previous}")
    return lines


@dataset_app.command("diff")
def dataset_diff(
    old: Annotated[Path, typer.Argument(metavar="OLD", help="A dataset folder.")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="A later one.")],
    as_json: JsonOption = False,
) -> None:
    """Say what differs between two datasets: settings, rows that came, went or got another answer, and changed sides.

    Exits with 1 where a row is on another side: two leaderboards on these datasets do not go together.
    """
    found = diff(load_dataset(old), load_dataset(new))
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        console = wide()
        table = Table("", *SPLITS, title=f"{found.old} → {found.new}", title_justify="left")
        for column in table.columns[1:]:
            column.justify = "right"
        for name in ("same", "added", "removed", "answered_otherwise"):
            counts = getattr(found, name)
            table.add_row(name.replace("_", " "), *(f"{getattr(counts, split):,}" for split in SPLITS))
        console.print(table)
        for setting, (before, after) in found.settings.items():
            console.print(f"{setting}: {before} → {after}", highlight=False, markup=False)
    if found.moved:
        first = found.moved[0]
        raise DatasetError(
            f"{found.moved_rows:,} rows changed sides; the first, {first.id}, from {first.old} to {first.new}. "
            "Build the new dataset with --previous"
        )


@dataset_app.command("export")
def dataset_export(
    folder: FolderArgument,
    format_name: Annotated[str, typer.Option("--format", help=f"One of: {', '.join(FORMATS)}.")],
    out_dir: Annotated[Path, typer.Option("--out", help="Folder to make.")],
) -> None:
    """Write a dataset's rows for another trainer or evaluator.

    Every row is checked for what the destination would refuse; where there is such a row, nothing is written.
    """
    if format_name not in FORMATS:
        raise ConfigError(f"--format: {format_name!r} is none of {', '.join(FORMATS)}")
    form = FORMATS[format_name]
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ConfigError(f"--out: {out_dir} exists; name a new folder")
    dataset = load_dataset(folder)
    splits = [split for split in SPLITS if getattr(dataset.manifest.rows, split)]
    total = sum(getattr(dataset.manifest.rows, split) for split in splits)
    columns = (TextColumn(format_name), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
        try:
            part.chmod(0o755)
            with Progress(*columns, console=err, transient=True) as bar:
                task = bar.add_task("", total=total)
                written = {}
                for path, split in form.files(splits).items():

                    def rows(split: Any = split) -> Any:
                        for example in dataset.stream(split):
                            row = form.to_row(example, split)
                            if (fault := form.check(row)) is not None:
                                raise DatasetError(f"row {example.id} of {split}: {fault}. Nothing was written.")
                            bar.advance(task)
                            yield row

                    (part / path).parent.mkdir(parents=True, exist_ok=True)
                    with (part / path).open("wb") as file:
                        written[path] = form.write(rows(), file)
            if out_dir.exists():
                out_dir.rmdir()
            part.rename(out_dir)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    except OSError as error:
        raise DatasetError(f"cannot write {out_dir}: {error.strerror or error}") from error
    for path, count in written.items():
        out.print(f"{out_dir / path}: {count:,} rows", highlight=False, soft_wrap=True)


@dataset_app.command("validate")
def dataset_validate(folder: FolderArgument) -> None:
    """Check a dataset from its rows alone: hashes, ids, sides, counts, fingerprint, and leaks between the sides.

    Exits with 1 and the first thing that is wrong.
    """
    dataset = load_dataset(folder)
    validate(dataset)
    near_leaks(dataset)
    near = dataset.manifest.policy.near_duplicates
    checked = "and near-duplicates" if near else "(near-duplicates are kept by policy, and were not looked for)"
    out.print(
        f"dataset {dataset.fingerprint} is whole: {dataset.manifest.rows.total:,} rows; "
        f"no leak of requests, conversations {checked}",
        highlight=False,
    )


@logs_app.command("purge")
def logs_purge(
    before: Annotated[str, typer.Option(help="Delete records before this time: 2026-01-01, or with a time and zone.")],
    client: Annotated[str | None, typer.Option(help="Only this client_id.")] = None,
    workload: Annotated[str | None, typer.Option(help="Only this workload_id.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say how many there are.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    store: StoreOption = None,
    runs: RunsOption = RUNS,
) -> None:
    """Delete old records from the log store for good. Datasets made of them stay."""
    query = LogQuery(client_id=client, workload_id=workload, until=seconds_of("--before", before))
    with opened(places_of(runs, store)) as log_store:
        count = log_store.count(query)
        if dry_run or not count:
            out.print(f"{count:,} records are older than {before}", highlight=False)
            return
        if not yes and not (sys.stdin.isatty() and typer.confirm(f"Delete {count:,} records for good?", err=True)):
            raise ConfigError(f"nothing was deleted; --yes deletes {count:,} records without being asked")
        out.print(f"{log_store.purge(query):,} records deleted", highlight=False)
