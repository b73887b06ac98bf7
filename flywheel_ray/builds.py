"""Builds: what becomes of records that were taken in, decided on all of them together.

    dataset = build(store.lines(part), DatasetPolicy(), client_id="acme", workload_id="support")
    dataset = assemble(parts, rows, policy, client_id="acme", workload_id="support")     # taken in by several processes

Equal requests become one, conversations get their side, near-duplicates go, and leaks are looked for. All of it runs on
arrays of a few dozen bytes a record; rows stay where they are, by id in buckets, until the dataset is written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from flywheel_ray.datasets import (
    Dataset,
    DatasetPolicy,
    Example,
    LeakCheck,
    Manifest,
    SplitCounts,
    fingerprint_of,
)
from flywheel_ray.errors import DatasetError
from flywheel_ray.intake import BUCKET_BITS, BUCKETS, KEYS, Intake, Label, MemoryRows, Rows, Taken, with_conversation
from flywheel_ray.near_duplicates import NearDuplicates, Shingles, boilerplate, leaks, resolve, shingles, sketch
from flywheel_ray.records import Record, Rejected
from flywheel_ray.redaction import Redactor
from flywheel_ray.splits import SPLITS, Conversations, Sides, Split, SplitPolicy, settle
from flywheel_ray.values import canonical_bytes

INVALID_CALL_TRAINING = "invalid tool call, on the training side"
DUPLICATE = "duplicate request"
CONFLICT = "other answer to the same request"
LATER = "after the time hold-out, in an earlier conversation"
NEAR = "near-duplicate"
NEAR_EVAL = "near-duplicate of an evaluation row"


def build(
    records: Iterable[Record | Rejected | bytes],
    policy: DatasetPolicy | None = None,
    *,
    client_id: str,
    workload_id: str,
    source: str = "",
    query: Mapping[str, Any] | None = None,
    previous: Manifest | None = None,
    rows: Rows | None = None,
    redactor: Redactor | None = None,
) -> Dataset:
    """Make a workload's dataset from its records. The order of the records does not matter.

    Kept are whole answers by the teacher, whether from plain logs or recorded by the gateway. Requests are equal when
    messages, tools and tool_choice are (sampling settings, model and user do not count). Later steps of an agent loop
    are other requests, in the same conversation.

    Args:
        records: the workload's records, or their log lines, which is faster; read once. Others, and lines that are no
            record, are counted and left out.
        policy: what becomes of them; None means the default one.
        client_id, workload_id: the workload.
        source, query: for the manifest only: where the records came from.
        previous: the dataset that this one continues: no record changes sides between the two.
        rows: where rows wait; None keeps them in memory. They are read again when the dataset is.
        redactor: as for `Intake`.

    Raises:
        DatasetError: no record is usable, the evaluation split is empty, near-duplicates leak from one side to another,
            or `previous` is of another workload or split.
    """
    policy = policy or DatasetPolicy()
    rows = rows or MemoryRows()
    intake = Intake(policy, client_id, workload_id, rows, redactor)
    for record in records:
        if isinstance(record, bytes):
            intake.add_line(record)
        else:
            intake.add(record)
    return assemble(
        [intake.taken],
        [rows],
        policy,
        client_id=client_id,
        workload_id=workload_id,
        source=source,
        query=query,
        previous=previous,
    )


def assemble(
    parts: Sequence[Taken],
    rows: Sequence[Rows],
    policy: DatasetPolicy,
    *,
    client_id: str,
    workload_id: str,
    source: str = "",
    query: Mapping[str, Any] | None = None,
    previous: Manifest | None = None,
) -> Dataset:
    """Make the dataset of records that were taken in already, in one part or in many: the result is the same.

    Args:
        parts, rows: what each `Intake` found, and where its rows are.
        others: as in `build`, and with its errors.
    """
    scanned = sum(part.scanned for part in parts)
    excluded: Counter[str] = sum((part.excluded for part in parts), Counter())
    if previous is not None:
        _check_previous(previous, client_id, workload_id, policy)
    if not any(part.keys for part in parts):
        raise DatasetError(_nothing(client_id, workload_id, scanned, excluded))
    table = _Table(parts)
    requests, conflicting = _requests(table, policy.conflicts, excluded)
    kept, sides = _deal(table, requests, policy, previous.sides if previous else None, excluded)
    reader = _Reader(table, rows)
    leak_check = LeakCheck(near_duplicates="not checked")
    if policy.near_duplicates is not None and len(kept.at):
        kept, leak_check = _without_near(kept, reader, policy.near_duplicates, excluded)
    if not len(kept.at):
        raise DatasetError(_nothing(client_id, workload_id, scanned, excluded))
    conversations = _count_conversations(table, kept)
    counts = {name: int(np.count_nonzero(kept.side == i)) for i, name in enumerate(SPLITS)}
    if sides.eval_fraction > 0 and not counts["eval"]:
        raise DatasetError(
            f"workload {workload_id!r} of client {client_id!r} has {len(kept.at)} usable records, and none fell on the "
            f"evaluation side (eval_fraction {sides.eval_fraction:g}). Collect more logs, widen `since`, or raise "
            "eval_fraction."
        )
    assert scanned == len(kept.at) + excluded.total()
    tools, faults = _label_counts(table, kept)
    in_use = {id: listed for part in parts for id, listed in part.tools.items()}
    times = table.timestamp[kept.at]
    manifest = Manifest(
        client_id=client_id,
        workload_id=workload_id,
        source=source,
        query=dict(query or {}),
        policy=policy,
        sides=sides,
        previous=previous.fingerprint if previous else None,
        scanned=scanned,
        excluded=dict(sorted(excluded.items())),
        rows=SplitCounts(**counts),
        conversations=conversations,
        tools=tools,
        faults=faults,
        conflicting_requests=conflicting,
        several_choices=sum(part.several_choices for part in parts),
        redacted=dict(sorted(sum((part.redacted for part in parts), Counter()).items())),
        leak_check=leak_check,
        first_timestamp=float(times.min()),
        last_timestamp=float(times.max()),
        fingerprint=fingerprint_of(policy, _digests(table, kept)),
    )

    def lines(names: Collection[Split]) -> Iterator[tuple[Split, bytes]]:
        wanted = np.isin(kept.side, [SPLITS.index(name) for name in names])
        which = [SPLITS[i] for i in kept.side[wanted].tolist()]
        at, conversation = kept.at[wanted], kept.conversation[wanted]
        renamed = dict.fromkeys(np.flatnonzero(table.conversation[at] != conversation).tolist())
        for i, line in enumerate(reader.lines(at)):
            if i in renamed:
                line = with_conversation(line, f"{int(conversation[i]):016x}")
            yield which[i], line

    return Dataset(manifest, in_use, lines)


def example_of(record: Record) -> Example:
    """The dataset row of one usable record, whatever its workload.

    Raises:
        DatasetError: it is not usable; the message says why.
    """
    policy = DatasetPolicy(
        split=SplitPolicy(eval_fraction=1, validation_fraction=0), near_duplicates=None, invalid_calls="keep"
    )
    (example,) = build([record], policy, client_id=record.client_id, workload_id=record.workload_id).eval
    return example


class _Kept(NamedTuple):
    """Rows of the dataset, by id: where each lies, and what is known of it. All arrays of one length."""

    at: NDArray[np.int64]
    """Index into the keys."""
    conversation: NDArray[np.uint64]
    side: NDArray[np.int8]
    """Index into `SPLITS`."""
    first_seen: NDArray[np.float64]


class _Table:
    """The keys of all parts together, and where each one's row is."""

    def __init__(self, parts: Sequence[Taken]) -> None:
        self.labels: list[Label] = []
        numbers: dict[Label, int] = {}
        tables, owners = [], []
        for i, part in enumerate(parts):
            table = np.frombuffer(bytes(part.keys), dtype=KEYS)
            new = np.array([numbers.setdefault(label, len(numbers)) for label in part.labels] or [0], dtype=np.uint32)
            tables.append((table, new[table["label"]]))
            owners.append(np.full(len(table), i, dtype=np.uint16))
        self.labels = list(numbers)
        self.part = np.concatenate(owners) if owners else np.zeros(0, dtype=np.uint16)

        def column(name: str, kind: str) -> NDArray[Any]:
            return np.concatenate([table[name].astype(kind) for table, _ in tables])

        self.id_high, self.id_low = column("id_high", "u8"), column("id_low", "u8")
        self.content_high, self.content_low = column("content_high", "u8"), column("content_low", "u8")
        self.answer, self.conversation = column("answer", "u8"), column("conversation", "u8")
        self.tie, self.timestamp = column("tie", "u4"), column("timestamp", "f8")
        self.length = column("length", "i8")
        self.label = np.concatenate([label for _, label in tables])
        self.bucket = (self.id_high >> np.uint64(64 - BUCKET_BITS)).astype(np.uint8)

    def __len__(self) -> int:
        return len(self.id_high)

    @cached_property
    def offset(self) -> NDArray[np.int64]:
        """Where each row begins in its part's bucket: rows of a bucket follow each other as they were added."""
        place = self.part.astype(np.int64) * BUCKETS + self.bucket
        order = np.argsort(place, kind="stable")
        ends = np.cumsum(self.length[order])
        starts = ends - self.length[order]
        first = np.searchsorted(place[order], place[order])  # of the rows in the same place
        offset = np.empty(len(self), dtype=np.int64)
        offset[order] = starts - starts[first]
        return offset


class _Requests(NamedTuple):
    """Equal requests as one, ordered by id: the record whose answer counts, and the first one's time and conversation.

    Equal requests are in one conversation, but for some that redaction has made equal.
    """

    at: NDArray[np.int64]
    first_seen: NDArray[np.float64]
    conversation: NDArray[np.uint64]


def _requests(table: _Table, conflicts: str, excluded: Counter[str]) -> tuple[_Requests, int]:
    """Resolve equal requests, and count those with several answers."""
    order = np.lexsort((table.tie, table.timestamp, table.id_low, table.id_high))
    high, low = table.id_high[order], table.id_low[order]
    new = np.ones(len(order), dtype=bool)
    new[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    starts = np.flatnonzero(new)
    ends = np.append(starts[1:], len(order))
    first_seen = table.timestamp[order[starts]]
    chosen = order[ends - 1]  # the latest
    answers = table.answer[order]
    group = np.cumsum(new) - 1
    differs = np.zeros(len(starts), dtype=bool)
    differs[group[answers != answers[starts[group]]]] = True
    keep = np.ones(len(starts), dtype=bool)
    losers = 0
    for g in np.flatnonzero(differs):
        members = order[starts[g] : ends[g]]
        if conflicts == "drop":
            keep[g] = False
            losers += len(members)
            continue
        given = table.answer[members]
        if conflicts == "majority":
            counts = Counter(given.tolist())
            most = max(counts.values())
            # Of the most frequent answers the one given last; members are in order of time.
            chosen[g] = next(m for m, a in zip(members[::-1], given[::-1].tolist(), strict=True) if counts[a] == most)
        losers += int(np.count_nonzero(given != table.answer[chosen[g]]))
    duplicates = len(order) - int(np.count_nonzero(keep)) - losers
    _count(excluded, CONFLICT, losers)
    _count(excluded, DUPLICATE, duplicates)
    requests = _Requests(chosen[keep], first_seen[keep], table.conversation[order[starts]][keep])
    return requests, int(np.count_nonzero(differs))


def _count(excluded: Counter[str], reason: str, count: int | np.integer[Any]) -> None:
    if count:
        excluded[reason] += int(count)


def _deal(
    table: _Table, requests: _Requests, policy: DatasetPolicy, previous: Sides | None, excluded: Counter[str]
) -> tuple[_Kept, Sides]:
    """Give every request a side, by its conversation."""
    names, group = np.unique(requests.conversation, return_inverse=True)
    # A conversation begins with its first record, also one that was a duplicate.
    first = np.full(len(names), np.inf)
    np.minimum.at(first, group, requests.first_seen)
    sizes = np.bincount(group, minlength=len(names))
    # Distinct (conversation, label) pairs, in order of conversation.
    pairs = np.unique(group.astype(np.int64) * len(table.labels) + table.label[requests.at])
    begins = np.searchsorted(pairs, np.arange(len(names) + 1) * len(table.labels))
    tools_of = [frozenset(label.tools) for label in table.labels]

    def tools(g: int) -> frozenset[str]:
        labels = pairs[begins[g] : begins[g + 1]] % len(table.labels)
        return frozenset().union(*(tools_of[label] for label in labels.tolist()))

    texts = [f"{name:016x}" for name in names.tolist()]
    all_tools = frozenset().union(*(tools_of[label] for label in np.unique(pairs % len(table.labels)).tolist()))
    sides = settle(policy.split, Conversations(texts, first, sizes, tools, all_tools), previous)
    side = sides.all(texts, first)[group]
    keep = np.ones(len(side), dtype=bool)
    since = policy.split.holdout_since
    if since is not None:
        keep = (table.timestamp[requests.at] < since) | (first[group] >= since)
        _count(excluded, LATER, np.count_nonzero(~keep))
    if policy.invalid_calls == "eval_only":
        faulty = np.array([bool(label.faults) for label in table.labels])[table.label[requests.at]]
        wrong = keep & faulty & (side != SPLITS.index("eval"))
        _count(excluded, INVALID_CALL_TRAINING, np.count_nonzero(wrong))
        keep &= ~wrong
    return _Kept(requests.at[keep], requests.conversation[keep], side[keep], requests.first_seen[keep]), sides


class _Reader:
    """Reads chosen rows out of the parts' buckets."""

    def __init__(self, table: _Table, rows: Sequence[Rows]) -> None:
        self._table, self._rows = table, rows

    def lines(self, at: NDArray[np.int64]) -> Iterator[bytes]:
        """The rows of keys, in the order given, which is best one of buckets."""
        table = self._table
        offsets, lengths = table.offset[at].tolist(), table.length[at].tolist()
        parts, buckets = table.part[at].tolist(), table.bucket[at].tolist()
        held: dict[int, bytes] = {}
        bucket = -1
        for part, in_bucket, offset, length in zip(parts, buckets, offsets, lengths, strict=True):
            if in_bucket != bucket:
                bucket, held = in_bucket, {}
            blob = held.get(part)
            if blob is None:
                blob = held[part] = self._rows[part].read(bucket)
            yield blob[offset : offset + length]


class _NearText(NamedTuple):
    text: str
    group: str


def _near_text(line: bytes) -> _NearText:
    """What of a row is compared with others, and the group it is compared in: equal roles and equal calls."""
    row = _decode_near(line)
    roles = [message.get("role") for message in row.messages]
    texts = [message.get("content") or "" for message in row.messages if message.get("role") not in _SYSTEM]
    calls = sorted(canonical_bytes(call) for call in row.reference.get("tool_calls") or ())
    return _NearText("\n".join(texts), (canonical_bytes(roles) + b"|".join(calls)).decode())


class _Row(msgspec.Struct):
    id: str
    messages: list[dict[str, Any]]
    reference: dict[str, Any]


class _NearRows:
    """Rows as near-duplicates see them.

    Args:
        count: number of rows.
        lines: reads the rows of some indices, ascending, or of all where None is given.
        sample: indices of rows, ascending, that show what all requests repeat.
    """

    def __init__(
        self,
        count: int,
        lines: Callable[[NDArray[np.int64] | None], Iterator[bytes]],
        sample: NDArray[np.int64],
        policy: NearDuplicates,
    ) -> None:
        self.lines, self._count, self._policy = lines, count, policy
        self._common = boilerplate([_near_text(line).text for line in lines(sample)], policy)

    def sketches(self, seed: int) -> NDArray[np.uint32]:
        """The LSH band hashes of all rows, (rows, bands)."""
        bands, _ = self._policy.layout
        sketches = np.empty((self._count, bands), dtype=np.uint32)
        rows, begin = self.lines(None), 0
        while batch := [_near_text(line) for line in islice(rows, _SKETCH_BATCH)]:
            texts, groups = zip(*batch, strict=True)
            sketches[begin : begin + len(batch)] = sketch(texts, groups, self._policy, seed, self._common)
            begin += len(batch)
        return sketches

    def shingles_of(self, rows: NDArray[np.int64]) -> Shingles:
        """The shingles of some rows, in the order asked for."""
        order = np.argsort(rows, kind="stable")
        found = dict(zip(order.tolist(), map(_near_text, self.lines(rows[order])), strict=True))
        near = [found[i] for i in range(len(rows))]
        return shingles([one.text for one in near], [one.group for one in near], self._policy, self._common)


def _without_near(
    kept: _Kept, reader: _Reader, policy: NearDuplicates, excluded: Counter[str]
) -> tuple[_Kept, LeakCheck]:
    """Drop what is nearly the same as a row before it, evaluation rows first, and check by other hash functions."""

    def rows_of(some: _Kept, sample: NDArray[np.int64]) -> _NearRows:
        return _NearRows(len(some.at), lambda i: reader.lines(some.at if i is None else some.at[i]), sample, policy)

    rank = _RANK[kept.side]
    # The first by time, so that what is dropped stays dropped as logs grow.
    rows = rows_of(kept, np.sort(np.lexsort((np.arange(len(rank)), kept.first_seen))[:_SAMPLE]))
    order = np.empty(len(rank), dtype=np.int64)
    order[np.lexsort((np.arange(len(rank)), kept.first_seen, rank))] = np.arange(len(rank))
    of = resolve(rows.sketches(seed=0), order, rows.shingles_of, policy)
    for seed in range(1, _CHECKS + 1):
        own = of == np.arange(len(of))
        _count(excluded, NEAR_EVAL, np.count_nonzero(~own & (rank[of] == 0) & (rank > 0)))
        _count(excluded, NEAR, np.count_nonzero(~own & ~((rank[of] == 0) & (rank > 0))))
        kept, rank = _Kept(*(column[own] for column in kept)), rank[own]
        rows = rows_of(kept, np.arange(min(_SAMPLE, len(rank))))  # the first by id, as `near_leaks` takes them
        found = leaks(rows.sketches(seed), rank, rows.shingles_of, policy)
        if not len(found):
            return kept, LeakCheck(near_duplicates="none")
        # What the search missed by chance goes the same way, and the check begins anew.
        of = np.arange(len(rank))
        of[found[:, 0]] = found[:, 1]
    raise _leak(found, rows, policy)


def near_leaks(dataset: Dataset) -> None:
    """Look for near-duplicates between the sides of a dataset, from its rows alone.

    Raises:
        DatasetError: there are some. Where the policy keeps near-duplicates, nothing is looked for.
    """
    policy = dataset.manifest.policy.near_duplicates
    if policy is None:
        return
    counts = [getattr(dataset.manifest.rows, name) for name in SPLITS]

    def lines(some: NDArray[np.int64] | None) -> Iterator[bytes]:
        wanted = iter(some.tolist() if some is not None else range(sum(counts)))
        at = next(wanted, -1)
        for i, (_, line) in enumerate(dataset.lines(SPLITS)):
            if at < 0:
                return
            if i == at:
                yield line
                at = next(wanted, -1)

    ids = np.array([_decode_near(line).id for line in lines(None)])
    rows = _NearRows(sum(counts), lines, np.sort(np.argsort(ids)[:_SAMPLE]), policy)
    found = leaks(
        rows.sketches(seed=_CHECKS + 1), _RANK[np.repeat(np.arange(len(SPLITS)), counts)], rows.shingles_of, policy
    )
    if len(found):
        raise _leak(found, rows, policy)


def _leak(found: NDArray[np.int64], rows: _NearRows, policy: NearDuplicates) -> DatasetError:
    first, second = (_decode_near(line).id for line in rows.lines(np.unique(found[0])))
    leak = policy.leak
    return DatasetError(
        f"{len(found)} rows nearly repeat one on another side (similarity {leak.threshold:g} or more, for short texts "
        f"{leak.short_threshold:g}), such as {first} and {second}. Build again with a lower near_duplicates.threshold."
    )


def _count_conversations(table: _Table, kept: _Kept) -> SplitCounts:
    """The conversations of each side, having checked that none, and no request, is on two.

    True by construction, and checked on every build all the same.
    """
    counts = np.zeros(len(SPLITS), dtype=np.int64)
    for what, names in (("request", table.id_low[kept.at]), ("conversation", kept.conversation)):
        order = np.argsort(names, kind="stable")
        ordered, side = names[order], kept.side[order]
        again = ordered[1:] == ordered[:-1]
        if (again & (side[1:] != side[:-1])).any():
            raise DatasetError(f"a {what} is on two sides of the split; please report this as a defect")
        counts = np.bincount(side[np.append(True, ~again)], minlength=len(SPLITS))
    return SplitCounts(**dict(zip(SPLITS, counts.tolist(), strict=True)))


def _digests(table: _Table, kept: _Kept) -> dict[Split, bytes]:
    """For each split, 40 bytes a row in order of id: request, answer, conversation."""
    digests: dict[Split, bytes] = {}
    for i, name in enumerate(SPLITS):
        here = kept.side == i
        at = kept.at[here]
        columns = (table.id_high[at], table.id_low[at], table.content_high[at], table.content_low[at])
        digests[name] = np.stack([*columns, kept.conversation[here]], axis=1).astype(">u8").tobytes()
    return digests


def _label_counts(table: _Table, kept: _Kept) -> tuple[dict[str, SplitCounts], dict[str, int]]:
    tools: dict[str, Counter[str]] = {}
    faults: Counter[str] = Counter()
    labels = table.label[kept.at].astype(np.int64)
    for i, name in enumerate(SPLITS):
        counts = np.bincount(labels[kept.side == i], minlength=len(table.labels)).tolist()
        for label, count in zip(table.labels, counts, strict=True):
            if not count:
                continue
            for tool in label.tools:
                tools.setdefault(tool, Counter())[name] += count
            for fault in set(label.faults):
                faults[fault] += count
    return {tool: SplitCounts(**counts) for tool, counts in sorted(tools.items())}, dict(sorted(faults.items()))


def _check_previous(previous: Manifest, client_id: str, workload_id: str, policy: DatasetPolicy) -> None:
    if (previous.client_id, previous.workload_id) != (client_id, workload_id):
        raise DatasetError(
            f"dataset {previous.fingerprint} is of workload {previous.name}, not of {client_id}/{workload_id}; "
            "name another previous dataset, or none"
        )
    if previous.policy.split != policy.split:
        raise DatasetError(
            f"dataset {previous.fingerprint} was split by another policy, so this one cannot continue it. Use the same "
            "split settings, or no previous dataset"
        )


def _nothing(client_id: str, workload_id: str, scanned: int, excluded: Mapping[str, int]) -> str:
    where = f"workload {workload_id!r} of client {client_id!r}"
    if not scanned:
        return f"no records of {where}. Check both names, widen `since`, or run `flywheel ingest` first."
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(excluded.items()))
    return f"{where} has no usable record among {scanned}: {reasons}. Widen `since`, or log whole teacher answers."


_SYSTEM = ("system", "developer")
_SKETCH_BATCH = 10_000
_SAMPLE = 1_000
_CHECKS = 5
_RANK = np.array([SPLITS[::-1].index(name) for name in SPLITS], dtype=np.int8)
"""Index into `SPLITS` → which side goes before the others: evaluation, then validation, then training."""
_decode_near = msgspec.json.Decoder(_Row).decode
