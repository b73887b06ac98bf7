"""Human labels are JSON lines that anyone can write, one label a line, appended as they are given.

    {"trial": "d082cc86…", "example_id": "5f3a…", "metric": "similarity", "value": 0.8, "labeler": "ana", "answer": "…"}
    {"type": "skip", "trial": "d082cc86…", "example_id": "77b0…", "metric": "similarity", "labeler": "ana"}
    {"type": "sample", "dataset": "3f9a…", "trial": "d082cc86…", "seed": 0, "population": 306}

A value is in [0, 1]: 0 or 1 for correctness, a rating of 1 … 10 divided by ten for similarity, as the judge's are. The
last label of a labeler on a row counts; several labelers' values are averaged. A `sample` line says how rows were
drawn, which is what allows them to speak for the rest. Reading is strict: an error names file, line and field.

`answer` says what was labelled (`answer_hash`), so that labels outlive the trial: a sweep with another judge or rubric
gives trials other keys, and the same answers. A label counts for its own trial, and for every trial of the dataset that
gave the same answer to that example; one without `answer` counts for its own trial alone.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from flywheel_ray.calibration import ACCEPT_AT, RowId, cohens_kappa
from flywheel_ray.errors import LedgerError
from flywheel_ray.records import Completion
from flywheel_ray.results import Scored
from flywheel_ray.stats import Interval
from flywheel_ray.values import Value, canonical_json, content_hash


class Label(Value):
    """What one person thinks of one candidate's answer to one example."""

    type: Literal["label"] = "label"
    trial: str = Field(min_length=1)
    """The trial's key in the ledger, in full."""
    example_id: str = Field(min_length=1)
    metric: str = Field(min_length=1)
    value: float = Field(ge=0, le=1)
    labeler: str = Field(min_length=1)
    answer: str | None = Field(default=None, min_length=1)
    """`answer_hash` of what was labelled."""
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

    def of_trials(self, results: Sequence[Scored]) -> dict[str, dict[RowId, float]]:
        """Metric → (trial, example id) → label, as `calibration.report` takes them: `of` for every trial."""
        metrics = dict.fromkeys(metric for metric, *_ in self.labels())
        found: dict[str, dict[RowId, float]] = {metric: {} for metric in metrics}
        for result in results:
            for metric in metrics:
                found[metric] |= {(result.key, example): v for example, v in self.of(result, metric).items()}
        return {metric: rows for metric, rows in found.items() if rows}

    def of(self, scored: Scored, metric: str) -> dict[str, float]:
        """Example id → label of one trial, the mean over labelers, as `calibration.debiased` takes them.

        Labels of another trial count where its answers are the same, and only if none of its labelled rows is left open
        here: the rows on which two candidates agree are no random sample of the rows of either. As far as the trial's
        own labels reach in the order of the sample, none is open, since `flywheel label` asks for the open ones first.
        """
        fitting, open_ = self.fitting(scored, metric), self._open(scored, metric)
        whole = {scored.key} | {trial for trial, examples in open_.items() if not examples}
        counted = {
            label.example_id for label in self.labels().values() if label.metric == metric and label.trial in whole
        }
        if (sample := self.samples().get(scored.key)) is not None:
            own = {example for name, trial, example, _ in self.labels() if (name, trial) == (metric, scored.key)}
            order = sample_order(sample.dataset, fitting, sample.seed)
            counted.update(order[: max((i for i, example in enumerate(order, 1) if example in own), default=0)])
        return {example: sum(by.values()) / len(by) for example, by in fitting.items() if example in counted}

    def fitting(self, scored: Scored, metric: str) -> dict[str, dict[str, float]]:
        """Example id → labeler → label of this trial, or else of the same answer in another one."""
        answers = answers_of(scored, {label.example_id for label in self.labels().values()})
        found: dict[str, dict[str, float]] = defaultdict(dict)
        for label in sorted(self.labels().values(), key=lambda label: label.trial == scored.key):
            same = label.answer is not None and label.answer == answers.get(label.example_id)
            if label.metric == metric and (same or label.trial == scored.key):
                found[label.example_id][label.labeler] = label.value
        for name, trial, example, labeler in self.skipped():
            if (name, trial) == (metric, scored.key) and example in found:
                found[example].pop(labeler, None)
        return {example: by for example, by in found.items() if by}

    def waiting(self, scored: Scored, metric: str) -> set[str]:
        """The fewest examples to label before another trial's labels count here; empty where they do, or none fits."""
        return min(self._open(scored, metric).values(), key=len, default=set())

    def _open(self, scored: Scored, metric: str) -> dict[str, set[str]]:
        """Another trial with a label that fits → its labelled examples that this one answered otherwise, unlabelled."""
        answers = answers_of(scored, {label.example_id for label in self.labels().values()})
        skipped = {example for name, trial, example, _ in self.skipped() if (name, trial) == (metric, scored.key)}
        seen = skipped | set(self.fitting(scored, metric))
        found: dict[str, set[str]] = {}
        others = [one for one in self.labels().values() if one.metric == metric and one.trial != scored.key]
        for trial in {one.trial for one in others if one.answer and one.answer == answers.get(one.example_id)}:
            theirs = {one.example_id for one in others if one.trial == trial}
            found[trial] = (theirs & set(answers)) - seen
        return found

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


def answer_hash(example_id: str, completion: Completion) -> str:
    """What a label speaks of: the example, and the text and tool calls of the answer."""
    calls = [[call.name, call.arguments] for call in completion.tool_calls]
    return content_hash([example_id, completion.text, calls])


def answers_of(scored: Scored, examples: Container[str] | None = None) -> dict[str, str]:
    """Example id → `answer_hash` of what a trial answered (first, where it was asked repeatedly); of some examples."""
    return {
        o.example_id: answer_hash(o.example_id, o.completion)
        for o in scored.outcomes
        if o.completion is not None and not o.repeat and (examples is None or o.example_id in examples)
    }


def sample_order(dataset: str, example_ids: Iterable[str], seed: int = 0) -> list[str]:
    """Example ids in a random order that depends on nothing but seed, dataset and id.

    The first n of them are a simple random sample for every n, so a sample grows without being drawn anew. All trials
    of a dataset share it, so labels of answers that two of them have in common are part of the sample of both.
    """
    return sorted(example_ids, key=lambda id: hashlib.sha256(f"{seed}/{dataset}/{id}".encode()).digest())


def sample_gaps(labelled: Iterable[str], order: Iterable[str], skipped: Iterable[str] = ()) -> int:
    """How many rows that were drawn have no label: 0 for an intact sample.

    Rows are drawn, in a sample's order, up to the last that is labelled or skipped.
    """
    given, passed = set(labelled), set(skipped)
    gaps, pending = 0, 0
    for id in order:
        if id in given or id in passed:
            gaps, pending = gaps + pending + (id not in given), 0
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
