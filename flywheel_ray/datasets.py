"""A dataset is a workload's teacher-served records, deduplicated and split once and for all by conversation.

    dataset = build(store.scan(query), DatasetPolicy(), client_id="acme", workload_id="support")    # see `builds`
    dataset.fingerprint        # "3f9a0c2d41b7e655": names the folder; two leaderboards compare only on the same one
    folder = dataset.save(out) # out/3f9a…/{train,validation,eval,tools}.jsonl, manifest.json
    load(folder) == dataset

The folder is whole or not there at all, and every byte of it is covered by a hash. Rows are read on demand, so a
dataset may be larger than memory. What was left out stands in the manifest with its reason, and the counts add up.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import msgspec
from pydantic import Field

from flywheel_ray.errors import DatasetError
from flywheel_ray.near_duplicates import NearDuplicates
from flywheel_ray.records import Completion, conversation_of, to_json_line
from flywheel_ray.redaction import Redaction
from flywheel_ray.splits import SPLITS, Sides, Split, SplitPolicy
from flywheel_ray.toolbox import tools_id
from flywheel_ray.values import Value, canonical_bytes, content_hash

NO_TOOL = "(no tool)"
"""Stands for the tool's name, in counts, where the teacher answered with text."""

_MANIFEST = "manifest.json"
_TOOLS = "tools.jsonl"


class Example(Value):
    """One row of a dataset: what was asked, and the teacher's answer as the reference.

    `id` is a hash of the request (messages, tools, tool_choice); `conversation` groups rows that are not independent.
    """

    id: str
    conversation: str
    timestamp: float
    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()
    tool_choice: Any = None
    faults: tuple[str, ...] = ()
    """What is wrong with the reference's tool calls, where the policy keeps such rows: `Fault.kind` of each."""
    reference: Completion


class DatasetPolicy(Value):
    """What becomes of records: everything about a dataset that is a choice and not content. Part of its fingerprint."""

    split: SplitPolicy = SplitPolicy()
    conflicts: Literal["majority", "latest", "drop"] = "majority"
    """Which answer to a request counts when the teacher gave several: the most frequent (of those the latest), the
    latest, or none."""
    near_duplicates: NearDuplicates | None = NearDuplicates()
    """Which requests are nearly the same, and then one is kept; null keeps them all, and checks leaks of equal ones."""
    invalid_calls: Literal["drop", "keep", "eval_only"] = "drop"
    """Tool calls to a tool that was not offered, or with arguments that break its schema."""
    media: Literal["keep", "drop"] = "keep"
    """Requests with images, sound or files; kept ones hold the content's hash in its place."""
    redaction: Redaction | None = None
    """Replace private data by stand-ins; null leaves the text alone."""


class SplitCounts(Value):
    """Something counted in each split."""

    train: int = 0
    validation: int = 0
    eval: int = 0

    @property
    def total(self) -> int:
        """The sum over the splits."""
        return self.train + self.validation + self.eval


class LeakCheck(Value):
    """What was looked for between the sides; a dataset in which something was found is not made."""

    requests: Literal["none"] = "none"
    conversations: Literal["none"] = "none"
    near_duplicates: Literal["none", "not checked"]
    """Of a similarity as `policy.near_duplicates.leak` says, above that of the deduplication."""


class Manifest(Value):
    """Where a dataset came from, what was left out and why, and the hashes that hold it together.

    `scanned == rows.total + sum(excluded.values())`, always.
    """

    format: Literal[2] = 2
    client_id: str
    workload_id: str
    source: str = ""
    """The log store it was read from, as the command line names it."""
    query: dict[str, Any] = Field(default_factory=dict)
    """The query that selected the records, as JSON."""
    policy: DatasetPolicy
    sides: Sides
    previous: str | None = None
    """Fingerprint of the dataset whose sides this one continues."""
    scanned: int
    excluded: dict[str, int]
    """Reason → number of records left out."""
    rows: SplitCounts
    conversations: SplitCounts
    """Independent groups of rows: the sample size that honest intervals go by."""
    tools: dict[str, SplitCounts]
    """Tool → number of rows whose reference calls it (a row may call several); `NO_TOOL` counts answers in text."""
    faults: dict[str, int] = Field(default_factory=dict)
    """Kind of fault → number of rows kept with it."""
    conflicting_requests: int = 0
    """Requests to which the teacher gave more than one answer."""
    several_choices: int = 0
    """Records whose response had more choices than the first, which is the answer."""
    redacted: dict[str, int] = Field(default_factory=dict)
    """Kind of private data → number of places it was replaced in, over all usable records."""
    leak_check: LeakCheck
    first_timestamp: float
    last_timestamp: float
    """The time of the oldest and the newest row, epoch seconds."""
    files: dict[str, str] = Field(default_factory=dict)
    """File name → SHA-256 of its bytes; empty until the dataset is saved."""
    fingerprint: str

    @property
    def name(self) -> str:
        """The workload, as `client/workload`."""
        return f"{self.client_id}/{self.workload_id}"

    @property
    def uncovered(self) -> dict[str, str]:
        """Tools that one of the sides never sees → "evaluation" or "training": figures say nothing about them."""
        lacking = {name: "evaluation" for name, counts in self.tools.items() if not counts.eval}
        return lacking | {name: "training" for name, counts in self.tools.items() if not counts.train}


Lines = Callable[[Collection[Split]], Iterator[tuple[Split, bytes]]]
"""Reads rows of some splits: (split, JSON line without its end), in each split by `Example.id`."""


class Dataset:
    """A workload's examples in three splits, each ordered by `Example.id`, and the manifest.

    Rows are read when they are asked for: `split` (and `train`, `validation`, `eval`) keeps them, `stream` does not.
    """

    def __init__(self, manifest: Manifest, tools: Mapping[str, Sequence[dict[str, Any]]], lines: Lines) -> None:
        self.manifest = manifest
        self._tools = {id: tuple(listed) for id, listed in tools.items()}
        self.lines = lines

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits over all rows of all splits and the policy: equal for equal content, wherever built."""
        return self.manifest.fingerprint

    @cached_property
    def train(self) -> tuple[Example, ...]:
        """Rows to learn from."""
        return tuple(self.stream("train"))

    @cached_property
    def validation(self) -> tuple[Example, ...]:
        """Rows to watch the loss on."""
        return tuple(self.stream("validation"))

    @cached_property
    def eval(self) -> tuple[Example, ...]:
        """Rows to score on."""
        return tuple(self.stream("eval"))

    def split(self, name: Split) -> tuple[Example, ...]:
        """The rows of a split by its name."""
        rows: tuple[Example, ...] = getattr(self, name)
        return rows

    def stream(self, name: Split) -> Iterator[Example]:
        """The rows of a split, one at a time and not kept.

        Raises:
            DatasetError: a row is unreadable.
        """
        for _, line in self.lines((name,)):
            yield self._example(line)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Dataset):
            return NotImplemented
        return self.fingerprint == other.fingerprint and all(self.split(s) == other.split(s) for s in SPLITS)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        counts = ", ".join(f"{getattr(self.manifest.rows, s)} {s}" for s in SPLITS)
        return f"<Dataset {self.fingerprint} of {self.manifest.name}: {counts}>"

    def save(self, out: Path) -> Path:
        """Write the dataset to `out/<fingerprint>/` and return that folder.

        The folder appears whole or not at all. One that is already there is verified and kept as it is, including the
        manifest of the build that wrote it.

        Raises:
            DatasetError: the folder cannot be written, or one of that name is damaged.
        """
        target = out / self.fingerprint
        if target.exists():
            load(target)
            return target
        try:
            out.mkdir(parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(prefix=f".{self.fingerprint}.", dir=out))
            try:
                part.chmod(0o755)  # mkdtemp makes private folders; a dataset is read by other users' workers too
                self._write(part)
                part.rename(target)
            except BaseException:
                shutil.rmtree(part, ignore_errors=True)
                raise
        except OSError as error:
            if target.is_dir():  # another process wrote the same dataset at the same time
                load(target)
                return target
            raise DatasetError(f"cannot write dataset {target}: {error.strerror or error}") from error
        return target

    def _write(self, folder: Path) -> None:
        files = {name: _HashedFile(folder / f"{name}.jsonl") for name in SPLITS}
        tools = _HashedFile(folder / _TOOLS)
        try:
            for name, line in self.lines(SPLITS):
                files[name].write(line)
            for id in sorted(self._tools):
                tools.write(to_json_line({"id": id, "tools": self._tools[id]}).rstrip())
            digests = {f"{name}.jsonl": files[name].close() for name in SPLITS} | {_TOOLS: tools.close()}
        finally:
            for file in (*files.values(), tools):
                file.file.close()
        manifest = self.manifest.model_copy(update={"files": digests})
        text = json.dumps(manifest.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"
        with (folder / _MANIFEST).open("wb") as written:
            written.write(text.encode("utf-8", "backslashreplace"))
            written.flush()
            os.fsync(written.fileno())

    def _example(self, line: bytes) -> Example:
        try:
            row = _decode(line)
            row["tools"] = self._tools[row["tools"]] if "tools" in row else ()
            return Example.model_validate(row)
        except (ValueError, KeyError) as error:
            raise DatasetError(
                f"dataset {self.fingerprint} has an unreadable row: {str(error).splitlines()[0]}: {line[:80]!r}"
            ) from error


class _HashedFile:
    """A file that is written once, in large pieces, and knows its SHA-256."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")
        self._digest = hashlib.sha256()
        self._pending: list[bytes] = []
        self._size = 0

    def write(self, line: bytes) -> None:
        self._pending.append(line)
        self._size += len(line)
        if self._size > 1 << 20:
            self._flush()

    def close(self) -> str:
        self._flush()
        self.file.flush()
        os.fsync(self.file.fileno())
        return self._digest.hexdigest()

    def _flush(self) -> None:
        if self._pending:
            data = b"\n".join([*self._pending, b""])
            self._digest.update(data)
            self.file.write(data)
            self._pending, self._size = [], 0


class Move(Value):
    """A row that is on another side than it was."""

    id: str
    old: Split
    new: Split


class Diff(Value):
    """What differs between two datasets; rows are the same request where their ids are."""

    old: str
    new: str
    """Fingerprints."""
    settings: dict[str, tuple[Any, Any]]
    """Setting of the policy, as a path → its old and new value."""
    same: SplitCounts
    added: SplitCounts
    removed: SplitCounts
    answered_otherwise: SplitCounts
    """Rows on the side they were on, with another reference."""
    moved_rows: int
    moved: tuple[Move, ...]
    """The first hundred of them."""


def diff(old: Dataset, new: Dataset) -> Diff:
    """Compare two datasets row by row. Memory grows with the number of rows, not with their size."""
    before = {e.id: (name, _answer_of(e)) for name in SPLITS for e in old.stream(name)}
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in ("same", "added", "removed", "answered_otherwise")}
    moved: list[Move] = []
    for name in SPLITS:
        for example in new.stream(name):
            side, answer = before.pop(example.id, (None, b""))
            if side is None:
                counts["added"][name] += 1
            elif side != name:
                moved.append(Move(id=example.id, old=side, new=name))
            else:
                counts["same" if answer == _answer_of(example) else "answered_otherwise"][name] += 1
    counts["removed"].update(side for side, _ in before.values())
    policies = [_flat(dataset.manifest.policy.model_dump(mode="json")) for dataset in (old, new)]
    names = sorted({*policies[0], *policies[1]})
    return Diff(
        old=old.fingerprint,
        new=new.fingerprint,
        settings={n: (a, b) for n in names if (a := policies[0].get(n)) != (b := policies[1].get(n))},
        moved_rows=len(moved),
        moved=tuple(moved[:100]),
        **{kind: SplitCounts(**count) for kind, count in counts.items()},
    )


def _flat(data: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in data.items():
        flat |= _flat(value, f"{path}{name}.") if isinstance(value, dict) and value else {f"{path}{name}": value}
    return flat


def load(folder: Path) -> Dataset:
    """Open a dataset folder written by `Dataset.save`, and check the hashes of its files. Rows are read on demand.

    Raises:
        DatasetError: the folder is missing, incomplete, or was changed since it was written.
    """
    try:
        data = json.loads((folder / _MANIFEST).read_bytes())
        if isinstance(data, dict) and data.get("format") == 1:
            raise DatasetError(f"dataset {folder} was written by flywheel-ray 0.1. Build it again.")
        manifest = Manifest.model_validate(data)
        digests = {name: _digest_of(folder / name) for name in (*(f"{s}.jsonl" for s in SPLITS), _TOOLS)}
    except OSError as error:
        raise DatasetError(f"no dataset in {folder}: {error.strerror} ({error.filename})") from error
    except ValueError as error:
        raise DatasetError(_damaged(folder, f"{_MANIFEST} is unreadable")) from error
    for name, digest in digests.items():
        if manifest.files.get(name) != digest:
            raise DatasetError(_damaged(folder, f"{name} is not the file that was written"))
    try:
        listed = [_decode(line) for line in (folder / _TOOLS).read_bytes().splitlines()]
        tools = {row["id"]: row["tools"] for row in listed}
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(_damaged(folder, f"{_TOOLS} is unreadable")) from error

    def lines(names: Collection[Split]) -> Iterator[tuple[Split, bytes]]:
        for name in names:
            with (folder / f"{name}.jsonl").open("rb") as file:
                for line in file:
                    yield name, line.rstrip(b"\n")

    return Dataset(manifest, tools, lines)


def validate(dataset: Dataset) -> None:
    """Check a dataset from its rows alone: ids, conversations, sides, counts, fingerprint, and that nothing leaks.

    Raises:
        DatasetError: something is not as the manifest says.
    """
    manifest = dataset.manifest
    keys: dict[Split, list[bytes]] = {name: [] for name in SPLITS}
    side_of: dict[str, Split] = {}
    for name in SPLITS:
        for example in dataset.stream(name):
            where = f"row {example.id} of {name}"
            if example.id != request_id(example):
                raise DatasetError(f"{where}: the id is not that of its request")
            conversation = example.conversation
            named = conversation_of(manifest.client_id, manifest.workload_id, example.messages)
            if conversation != named and manifest.policy.redaction is None:  # which may hide what the name came of
                raise DatasetError(f"{where}: the conversation is not that of its messages")
            for key in (example.id, conversation):
                if side_of.setdefault(key, name) != name:
                    raise DatasetError(f"{where} leaks: it or its conversation is on the side {side_of[key]} too")
            keys[name].append(bytes.fromhex(example.id) + _answer_of(example) + bytes.fromhex(conversation))
        if len(keys[name]) != getattr(manifest.rows, name):
            raise DatasetError(f"{name} has {len(keys[name])} rows, not as the manifest says")
    if manifest.fingerprint != fingerprint_of(manifest.policy, {s: b"".join(keys[s]) for s in SPLITS}):
        raise DatasetError(f"the fingerprint {manifest.fingerprint} is not that of the rows")


def request_id(example: Example) -> str:
    """The name of an example's request, as a build gives it: 32 hexadecimal digits."""
    tools = tools_id(list(example.tools)) if example.tools else None
    return hashlib.sha256(canonical_bytes([list(example.messages), tools, example.tool_choice])).hexdigest()[:32]


def answer_digest(reasoning: str | None, text: str, calls: Sequence[Mapping[str, Any]]) -> bytes:
    """16 bytes over an answer: its reasoning, its text, and its calls as {name, arguments}."""
    return hashlib.sha256(canonical_bytes([reasoning, text, calls])).digest()[:16]


def _answer_of(example: Example) -> bytes:
    answer = example.reference
    calls = [{"name": call.name, "arguments": call.arguments} for call in answer.tool_calls]
    return answer_digest(answer.reasoning, answer.text, calls)


def fingerprint_of(policy: DatasetPolicy, rows: Mapping[Split, bytes]) -> str:
    """The name of a dataset.

    Args:
        policy: how it was made.
        rows: for each split, 40 bytes a row in order of id: id (16), `answer_digest` (16), conversation (8).
    """
    # What was measured (times, tokens) is left out: replaying old traffic must not make a new dataset. So are settings
    # at their defaults: a setting that a later version adds must not rename what exists.
    hashes = {name: hashlib.sha256(rows[name]).hexdigest() for name in SPLITS}
    return content_hash([policy.model_dump(mode="json", exclude_defaults=True), hashes])


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damaged(folder: Path, what: str) -> str:
    return f"dataset {folder} is damaged: {what}. Delete the folder and build it again."


_decode = msgspec.json.Decoder().decode
