"""A dataset is a workload's teacher-served records, deduplicated and split once and for all by conversation.

    dataset = build(store.scan(query), SplitPolicy(eval_fraction=0.2), client_id="acme", workload_id="support")
    dataset.fingerprint        # "3f9a0c2d41b7e655": names the folder; two leaderboards compare only on the same one
    folder = dataset.save(out) # out/3f9a…/{train,validation,eval}.jsonl, manifest.json
    load(folder) == dataset

The side of a record is a threshold on a hash of its conversation: adding logs never moves a record, the turns of one
conversation stay together, and so do duplicates. The evaluation set only ever grows.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from flywheel_ray.errors import DatasetError
from flywheel_ray.records import TEACHER, Completion, Record, conversation_of, readable, to_json_line
from flywheel_ray.values import Value, content_hash

Split = Literal["train", "validation", "eval"]
SPLITS: tuple[Split, ...] = ("train", "validation", "eval")

OTHER_WORKLOAD = "another workload"
SHADOW = "shadow copy"
ARM = "served by an arm"
FAILED = "failed exchange"
TRUNCATED = "truncated answer"
FILTERED = "content filtered"
MALFORMED = "tool arguments are not an object"
EMPTY = "empty answer"
NOT_TEXT = "request is not only text"
DUPLICATE = "duplicate request"

NO_TOOL = "(no tool)"
"""Stands for the tool's name, in counts, where the teacher answered with text."""

_MANIFEST = "manifest.json"


class Example(Value):
    """One row of a dataset: what was asked, and the teacher's answer as the reference.

    `id` is the record's request hash; `conversation` groups rows that are not independent.
    """

    id: str
    conversation: str
    timestamp: float
    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()
    reference: Completion


class SplitPolicy(Value):
    """Which side a conversation falls on: a threshold on a salted hash of its name, so that it never changes sides.

    Lowering or raising a fraction moves only what lies between the old threshold and the new one; another `salt` deals
    all conversations anew. What is neither eval nor validation is for training.
    """

    eval_fraction: float = Field(default=0.2, ge=0, le=1)
    validation_fraction: float = Field(default=0.1, ge=0, le=1)
    salt: str = "flywheel-1"

    @model_validator(mode="after")
    def _leave_no_overlap(self) -> SplitPolicy:
        if self.eval_fraction + self.validation_fraction > 1:
            raise ValueError("eval_fraction + validation_fraction is more than 1")
        return self

    def side(self, conversation: str) -> Split:
        """The split of a conversation, from its name alone."""
        digest = hashlib.sha256((self.salt + conversation).encode("utf-8", "surrogatepass")).hexdigest()
        share = int(digest[:13], 16) / 16**13  # 52 bits: exact in a float, and below 1
        if share < self.eval_fraction:
            return "eval"
        return "validation" if share < self.eval_fraction + self.validation_fraction else "train"


class SplitCounts(Value):
    """Something counted in each split."""

    train: int = 0
    validation: int = 0
    eval: int = 0

    @property
    def total(self) -> int:
        """The sum over the splits."""
        return self.train + self.validation + self.eval


class Manifest(Value):
    """Where a dataset came from, what was left out and why, and the hashes that hold it together.

    `scanned == rows.total + sum(excluded.values())`, always.
    """

    format: Literal[1] = 1
    client_id: str
    workload_id: str
    source: str = ""
    """The log store it was read from, as the command line names it."""
    query: dict[str, Any] = Field(default_factory=dict)
    """The query that selected the records, as JSON."""
    policy: SplitPolicy
    scanned: int
    excluded: dict[str, int]
    """Reason → number of records left out."""
    rows: SplitCounts
    conversations: SplitCounts
    """Independent groups of rows: the sample size that honest intervals go by."""
    tools: dict[str, SplitCounts]
    """Tool → number of rows whose reference calls it (a row may call several); `NO_TOOL` counts answers in text."""
    first_timestamp: float
    last_timestamp: float
    """The time of the oldest and the newest row, epoch seconds."""
    files: dict[str, str]
    """File name → SHA-256 of its bytes."""
    fingerprint: str

    @property
    def name(self) -> str:
        """What people call it: "acme/support"."""
        return f"{self.client_id}/{self.workload_id}"


class Dataset(Value):
    """A workload's examples in three splits, each ordered by `Example.id`, and the manifest."""

    manifest: Manifest
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    eval: tuple[Example, ...]

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits over all rows of all splits and the policy: equal for equal content, wherever built."""
        return self.manifest.fingerprint

    def split(self, name: Split) -> tuple[Example, ...]:
        """The rows of a split by its name."""
        return {"train": self.train, "validation": self.validation, "eval": self.eval}[name]

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
                for name in SPLITS:
                    _write(part / f"{name}.jsonl", _lines(self.split(name)))
                manifest = json.dumps(self.manifest.model_dump(), indent=2, ensure_ascii=False) + "\n"
                _write(part / _MANIFEST, [manifest.encode("utf-8", "backslashreplace")])
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


def build(
    records: Iterable[Record],
    policy: SplitPolicy | None = None,
    *,
    client_id: str,
    workload_id: str,
    source: str = "",
    query: Mapping[str, Any] | None = None,
) -> Dataset:
    """Make a workload's dataset from its records. Pure; the order of the records does not matter.

    Kept are whole answers by the teacher, whether from plain logs or recorded by the gateway. Requests are equal when
    messages, tools and tool_choice are (sampling settings, model and user do not count), and then the latest answer
    wins. Later steps of an agent loop are other requests, in the same conversation.

    Args:
        records: the workload's records; others are counted and left out.
        policy: how to split; None means the default one.
        client_id, workload_id: the workload.
        source, query: for the manifest only: where the records came from.

    Raises:
        DatasetError: no record is usable, or the evaluation split is empty.
    """
    policy = policy or SplitPolicy()
    scanned = 0
    excluded: Counter[str] = Counter()
    latest: dict[str, tuple[str, Example]] = {}
    for record in records:
        scanned += 1
        reason = _unusable(record, client_id, workload_id)
        if reason is not None:
            excluded[reason] += 1
            continue
        example = example_of(record)
        known = latest.get(example.id)
        if known is not None:
            excluded[DUPLICATE] += 1
        if known is None or (known[1].timestamp, known[0]) < (example.timestamp, record.id):
            latest[example.id] = (record.id, example)

    sides: dict[Split, list[Example]] = {name: [] for name in SPLITS}
    for _, (_, example) in sorted(latest.items()):
        sides[policy.side(example.conversation)].append(example)
    if not latest:
        raise DatasetError(_nothing(client_id, workload_id, scanned, excluded))
    if policy.eval_fraction > 0 and not sides["eval"]:
        raise DatasetError(
            f"workload {workload_id!r} of client {client_id!r} has {len(latest)} usable records, and none fell on the "
            f"evaluation side (eval_fraction {policy.eval_fraction:g}). Collect more logs, widen `since`, or raise "
            "eval_fraction."
        )

    files = {f"{name}.jsonl": _sha256(_lines(sides[name])) for name in SPLITS}
    times = [example.timestamp for _, example in latest.values()]
    tools: dict[str, Counter[str]] = {}
    for name in SPLITS:
        for example in sides[name]:
            for tool in {call.name for call in example.reference.tool_calls} or {NO_TOOL}:
                tools.setdefault(tool, Counter())[name] += 1
    manifest = Manifest(
        client_id=client_id,
        workload_id=workload_id,
        source=source,
        query=dict(query or {}),
        policy=policy,
        scanned=scanned,
        excluded=dict(sorted(excluded.items())),
        rows=SplitCounts(**{name: len(sides[name]) for name in SPLITS}),
        conversations=SplitCounts(**{name: len({e.conversation for e in sides[name]}) for name in SPLITS}),
        tools={tool: SplitCounts(**counts) for tool, counts in sorted(tools.items())},
        first_timestamp=min(times),
        last_timestamp=max(times),
        files=files,
        fingerprint=_fingerprint(policy, sides),
    )
    return Dataset(
        manifest=manifest,
        train=tuple(sides["train"]),
        validation=tuple(sides["validation"]),
        eval=tuple(sides["eval"]),
    )


def example_of(record: Record) -> Example:
    """The dataset row of a record; its id is a hash of the request (messages, tools, tool_choice)."""
    request = [record.messages, record.tools, record.request.get("tool_choice")]
    return Example(
        id=content_hash(request, 32),
        conversation=conversation_of(record.client_id, record.workload_id, record.messages),
        timestamp=record.timestamp,
        messages=tuple(readable(record.messages)),
        tools=tuple(readable(record.tools)),
        reference=record.completion,
    )


def load(folder: Path) -> Dataset:
    """Read a dataset folder written by `Dataset.save`, and check every hash.

    Raises:
        DatasetError: the folder is missing, incomplete, or was changed since it was written.
    """
    try:
        manifest = Manifest.model_validate(json.loads((folder / _MANIFEST).read_bytes()))
        contents = {name: (folder / f"{name}.jsonl").read_bytes() for name in SPLITS}
    except OSError as error:
        raise DatasetError(f"no dataset in {folder}: {error.strerror} ({error.filename})") from error
    except ValueError as error:
        raise DatasetError(_damaged(folder, f"{_MANIFEST} is unreadable")) from error
    files = {f"{name}.jsonl": _sha256([contents[name]]) for name in SPLITS}
    for name, digest in files.items():
        if manifest.files.get(name) != digest:
            raise DatasetError(_damaged(folder, f"{name} is not the file that was written"))
    rows: dict[Split, tuple[Example, ...]] = {}
    for name in SPLITS:
        try:
            rows[name] = tuple(Example.model_validate(json.loads(line)) for line in contents[name].splitlines())
        except ValueError as error:  # hashes agree, so another version of the package wrote it
            raise DatasetError(_damaged(folder, f"{name}.jsonl is unreadable")) from error
        if len(rows[name]) != getattr(manifest.rows, name):
            raise DatasetError(_damaged(folder, f"{name}.jsonl has {len(rows[name])} rows, not as its manifest says"))
    if manifest.fingerprint != _fingerprint(manifest.policy, rows):
        raise DatasetError(_damaged(folder, "the fingerprint is not that of the files"))
    return Dataset(manifest=manifest, train=rows["train"], validation=rows["validation"], eval=rows["eval"])


def to_openai_row(example: Example) -> dict[str, Any]:
    """The example as a row of OpenAI's fine-tuning JSONL: `messages` ending with the reference, `tools` if any."""
    row: dict[str, Any] = {"messages": [*example.messages, example.reference.message()]}
    if example.tools:
        row["tools"] = list(example.tools)
    return row


def _unusable(record: Record, client_id: str, workload_id: str) -> str | None:
    if (record.client_id, record.workload_id) != (client_id, workload_id):
        return OTHER_WORKLOAD
    if record.shadow:
        return SHADOW
    if record.served_by != TEACHER:
        return ARM
    if record.error:
        return FAILED
    answer = record.completion
    if answer.finish_reason == "length":
        return TRUNCATED
    if answer.finish_reason == "content_filter":
        return FILTERED
    if any(isinstance(call.arguments, str) for call in answer.tool_calls):
        return MALFORMED
    if not answer.tool_calls and not answer.text.strip():
        return EMPTY
    return None if all(_is_text(message) for message in record.messages) else NOT_TEXT


def _is_text(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    if not isinstance(content, list):
        return True
    return all(isinstance(part, str) or (isinstance(part, dict) and "text" in part) for part in content)


def _nothing(client_id: str, workload_id: str, scanned: int, excluded: Mapping[str, int]) -> str:
    where = f"workload {workload_id!r} of client {client_id!r}"
    if not scanned:
        return f"no records of {where}. Check both names, widen `since`, or run `flywheel ingest` first."
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(excluded.items()))
    return f"{where} has no usable record among {scanned}: {reasons}. Widen `since`, or log whole teacher answers."


def _row(example: Example) -> dict[str, Any]:
    reference = {field: value for field, value in example.reference if value is not None}
    reference["tool_calls"] = [{"name": c.name, "arguments": c.arguments} for c in example.reference.tool_calls]
    return {**dict(example), "reference": reference}


def _lines(examples: Iterable[Example]) -> Iterator[bytes]:
    return (to_json_line(_row(example)) for example in examples)


def _sha256(chunks: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def _fingerprint(policy: SplitPolicy, splits: Mapping[Split, Sequence[Example]]) -> str:
    # Over canonical rows, not over the files: a store that reorders the keys of an object must not make a new dataset.
    hashes = {name: content_hash([content_hash(_row(row), 64) for row in splits[name]], 64) for name in SPLITS}
    return content_hash([policy.model_dump(mode="json"), hashes])


def _damaged(folder: Path, what: str) -> str:
    return f"dataset {folder} is damaged: {what}. Delete the folder and build it again."


def _write(path: Path, chunks: Iterable[bytes]) -> None:
    with path.open("wb") as file:
        file.writelines(chunks)
        file.flush()
        os.fsync(file.fileno())
