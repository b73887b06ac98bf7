"""Human labels are JSON lines that anyone can write, one label a line, appended as they are given.

    {"trial": "d082cc86…", "example_id": "5f3a…", "metric": "similarity", "value": 0.8, "labeler": "ana"}
    {"type": "skip", "trial": "d082cc86…", "example_id": "77b0…", "metric": "similarity", "labeler": "ana"}
    {"type": "sample", "dataset": "3f9a…", "trial": "d082cc86…", "seed": 0, "population": 306}

A value is in [0, 1]: 0 or 1 for correctness, a rating of 1 … 10 divided by ten for similarity, as the judge's are. The
last label of a labeler on a row counts; several labelers' values are averaged. A `sample` line says how rows were
drawn, which is what allows them to speak for the rest. Reading is strict: an error names file, line and field.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from flywheel_ray.calibration import ACCEPT_AT, RowId, cohens_kappa
from flywheel_ray.errors import LedgerError
from flywheel_ray.stats import Interval
from flywheel_ray.values import Value, canonical_json


class Label(Value):
    """What one person thinks of one candidate's answer to one example."""

    type: Literal["label"] = "label"
    trial: str = Field(min_length=1)
    """The trial's key in the ledger, in full."""
    example_id: str = Field(min_length=1)
    metric: str = Field(min_length=1)
    value: float = Field(ge=0, le=1)
    labeler: str = Field(min_length=1)
    note: str | None = None
    labelled_at: str | None = None
    """ISO 8601, with a zone."""


class Skip(Value):
    """A row that a labeler saw and would not judge. Not missing at random, so it is counted."""

    type: Literal["skip"]
    trial: str = Field(min_length=1)
    example_id: str = Field(min_length=1)
    metric: str = Field(min_length=1)
    labeler: str = Field(min_length=1)
    note: str | None = None
    labelled_at: str | None = None


class Sample(Value):
    """How rows of a trial were drawn: the first by `sample_order` of this seed, out of `population` answered rows."""

    type: Literal["sample"]
    dataset: str
    trial: str = Field(min_length=1)
    seed: int
    population: int = Field(ge=1)


Line = Annotated[Label | Skip | Sample, Field(discriminator="type")]
_LINE: TypeAdapter[Label | Skip | Sample] = TypeAdapter(Line)


class LabelFile(Value):
    """What a label file says, in the order of its lines."""

    lines: tuple[Line, ...] = ()

    def labels(self) -> dict[tuple[str, str, str, str], Label]:
        """(metric, trial, example id, labeler) → the label that counts: the last, and none after a later skip."""
        found: dict[tuple[str, str, str, str], Label] = {}
        for line in self.lines:
            if isinstance(line, Sample):
                continue
            row = (line.metric, line.trial, line.example_id, line.labeler)
            if isinstance(line, Label):
                found[row] = line
            else:
                found.pop(row, None)
        return found

    def by_metric(self) -> dict[str, dict[RowId, float]]:
        """Metric → (trial, example id) → label: the mean over labelers."""
        given: dict[tuple[str, RowId], list[float]] = defaultdict(list)
        for (metric, trial, example, _), label in self.labels().items():
            given[metric, (trial, example)].append(label.value)
        found: dict[str, dict[RowId, float]] = defaultdict(dict)
        for (metric, row), values in given.items():
            found[metric][row] = sum(values) / len(values)
        return dict(found)

    def of(self, trial: str, metric: str) -> dict[str, float]:
        """Example id → label of one trial, as `calibration.debiased` takes them."""
        return {example: v for (key, example), v in self.by_metric().get(metric, {}).items() if key == trial}

    def skipped(self) -> set[tuple[str, str, str, str]]:
        """(metric, trial, example id, labeler) of rows whose last word is a skip."""
        rows = {(s.metric, s.trial, s.example_id, s.labeler) for s in self.lines if isinstance(s, Skip)}
        return rows - set(self.labels())

    def samples(self) -> dict[str, Sample]:
        """Trial → how its rows were drawn, as said last."""
        return {line.trial: line for line in self.lines if isinstance(line, Sample)}

    def agreement(self, metric: str) -> dict[tuple[str, str], Interval | None]:
        """Pair of labelers → Cohen's κ of accepting on the rows that both labelled; without pairs that share none."""
        given: dict[str, dict[RowId, float]] = defaultdict(dict)
        for (name, trial, example, labeler), label in self.labels().items():
            if name == metric:
                given[labeler][trial, example] = label.value
        found = {}
        for one, two in combinations(sorted(given), 2):
            if shared := [row for row in given[one] if row in given[two]]:
                first, second = ([given[who][row] >= ACCEPT_AT for row in shared] for who in (one, two))
                # Rows of one example, answered by several candidates, go together.
                found[one, two] = cohens_kappa(first, second, [example for _, example in shared])
        return found


def parse(lines: Iterable[bytes], name: str) -> LabelFile:
    """Read label lines; blank ones are passed over.

    Args:
        lines: JSON lines.
        name: of the file, for errors.

    Raises:
        LedgerError: a line is no label; says file, line and field. A last line that was cut off is one as well.
    """
    return LabelFile.model_construct(lines=tuple(_parsed(lines, name)))


def read(path: Path) -> LabelFile:
    """Read a label file; one that is not there has no labels.

    Raises:
        LedgerError: as `parse`, or it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return parse(file, str(path))
    except FileNotFoundError:
        return LabelFile()
    except OSError as error:
        raise LedgerError(f"cannot read labels {path}: {error.strerror or error}") from error


def append(path: Path, line: Label | Skip | Sample) -> None:
    """Add one line to a label file in one write, so that a stop loses nothing and leaves no half of a line.

    Raises:
        LedgerError: it cannot be written.
    """
    data = {k: v for k, v in line.model_dump(mode="json").items() if v is not None}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b", buffering=0) as file:
            end = file.seek(0, 2)
            file.seek(max(end - 1, 0))
            unended = b"\n" if file.read(1) not in (b"", b"\n") else b""  # an editor's last line
            file.write(unended + canonical_json(data).encode("utf-8", "surrogatepass") + b"\n")
    except OSError as error:
        raise LedgerError(f"cannot write labels {path}: {error.strerror or error}") from error


def sample_order(trial: str, example_ids: Iterable[str], seed: int = 0) -> list[str]:
    """Example ids in a random order that depends on nothing but seed, trial and id.

    The first n of them are a simple random sample for every n, so a sample grows without being drawn anew.
    """
    return sorted(example_ids, key=lambda id: hashlib.sha256(f"{seed}/{trial}/{id}".encode()).digest())


def sample_gaps(labelled: Mapping[str, float] | Iterable[str], order: Iterable[str]) -> int:
    """How many rows before the last labelled one, in a sample's order, have no label: 0 for an intact sample."""
    given, gaps, pending = set(labelled), 0, 0
    for id in order:
        if id in given:
            gaps, pending = gaps + pending, 0
        else:
            pending += 1
    return gaps


def _parsed(lines: Iterable[bytes], name: str) -> Iterator[Label | Skip | Sample]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield _LINE.validate_python(_typed(line), strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(str(part) for part in first["loc"][1:]) or "type"
            raise LedgerError(f"{name}, line {number}, {field}: {first['msg']}") from None
        except ValueError as error:
            raise LedgerError(f"{name}, line {number}: not JSON ({error}); repair or delete this line") from None


def _typed(line: bytes) -> Any:
    """The line's JSON; a line that does not say what it is is a label."""
    data = json.loads(line)
    return {"type": "label", **data} if isinstance(data, dict) else data
