"""Near-duplicates: rows of one group whose texts share most of their character n-grams, found by MinHash and LSH.

    policy = NearDuplicates()
    bands = sketch(["Where is my card?", "hi, where is my card"], ["text", "text"], policy)
    resolve(bands, np.arange(2), lambda rows: shingles(texts_of(rows), groups_of(rows), policy), policy)  # [0, 0]

`sketch` looks at each row alone and may run anywhere. `resolve` walks the rows in a given order and drops each that
is near one already kept; `leaks` checks the outcome, by other hash functions, for near-duplicates across sides.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from flywheel_ray.errors import DatasetError
from flywheel_ray.values import Value

_PERMUTATIONS = 260
"""How many MinHash values a row may take: sketching costs time in proportion."""
_SHORT = 100
"""n-grams that two rows have together, below which their texts are short."""
_MISSED, _LEAKS_MISSED = 0.005, 1e-6
"""The share of near pairs, and of leaks, that may share no band."""

_REMEMBERED = 64
"""Kept rows that a bucket remembers: more share a band value only where it comes from boilerplate."""
_COMPARED = 8
"""Remembered rows that a row is compared with, those sharing the most bands first."""
_BLOCK_ROWS = 128
"""Rows whose n-grams, with those of all they are compared with, are fetched at a time."""
_CHUNK_CHARACTERS = 1 << 18
"""Characters hashed at a time, at about 60 bytes each."""
_DIGIT_COPIES = 3

Rows = NDArray[np.int64]


class NearDuplicates(Value):
    """When two rows of a group count as the same question.

    Two rows are near when the Jaccard similarity of their n-gram sets reaches the threshold. Short texts need less: a
    one-letter typo leaves about 0.75 of five words, and 0.94 of twenty. Longer n-grams tell other questions apart a
    little better, but lose more of the typos than they gain.
    """

    threshold: float = Field(default=0.8, lt=1)
    """Similarity from which two rows are near."""
    short_threshold: float = Field(default=0.7, ge=0.1)
    """The same for a pair with fewer than 100 n-grams together, about 16 words."""
    ngram: int = Field(default=3, ge=1, le=32)
    """Characters in an n-gram."""

    @model_validator(mode="after")
    def _ask_no_more_of_short_texts(self) -> NearDuplicates:
        if not self.short_threshold <= self.threshold:
            raise ValueError(
                f"short_threshold {self.short_threshold:g} is above threshold {self.threshold:g}. Lower it as well."
            )
        return self

    def near(self, common: int, union: int) -> bool:
        """Whether two rows are near, from how many n-grams they have in common and together."""
        return common / union >= (self.short_threshold if union < _SHORT else self.threshold)

    @property
    def leak(self) -> NearDuplicates:
        """When two near rows are a leak: halfway from the thresholds to 1.

        LSH misses some pairs just above a threshold. A pair that similar it misses less than once in a million.
        """
        halfway = {"threshold": (1 + self.threshold) / 2, "short_threshold": (1 + self.short_threshold) / 2}
        return self.model_copy(update=halfway)

    @property
    def layout(self) -> tuple[int, int]:
        """How many bands, of how many MinHash values each: (43, 6) by default.

        A pair of similarity s shares one of b bands of r values with probability 1 − (1 − s^r)^b (Leskovec, Rajaraman
        and Ullman, Mining of Massive Datasets, 3.4.2). Long bands compare fewer rows in vain, so r is the longest with
        which 260 values suffice to miss at most 0.5% of the pairs at `short_threshold` and 1e-6 where it is a leak.
        """
        goals = ((self.short_threshold, _MISSED), (self.leak.short_threshold, _LEAKS_MISSED))
        best = (1, 1)
        for width in range(1, _PERMUTATIONS + 1):
            bands = max(math.ceil(math.log(missed) / math.log1p(-(s**width))) for s, missed in goals)
            if bands * width <= _PERMUTATIONS:
                best = (bands, width)
        return best


class Shingles(NamedTuple):
    """The n-gram sets of n rows, one after another: row i's is `hashes[offsets[i]:offsets[i + 1]]`, sorted."""

    hashes: NDArray[np.uint32]
    offsets: NDArray[np.int64]


# ── texts ───────────────────────────────────────────────────────────────────────────────────────────────────────────

_OTHER_DIGITS = re.compile(r"[^\D0-9]")
_WITHIN_NUMBER = re.compile(r"[-,](?<=[0-9].)(?=[0-9]{3})")
_MARK = "\0"
# The mark comes first, so that the search skips to it; the look-behind reaches over it.
_MARK_IN_WORD = re.compile(rf"{_MARK}(?<=[^\W\d]{_MARK})(?=[^\W\d])")


def _replacement(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Cf":
        return ""  # zero-width characters and the like: nobody sees them
    return _MARK if category[0] == "P" or character == "`" else character


_ASCII = {code: _replacement(chr(code)) for code in range(128)}


def normalised(text: str) -> str:
    """The text as it is compared: case and compatibility forms folded, no punctuation, single spaces, ASCII digits.

    A punctuation mark between two letters goes ("can't" is "cant"), and so does a hyphen or comma that groups the
    digits of a number ("1,000", "555-0123"); any other becomes a space ("1.5" is "1 5", "3-4" is "3 4"). Symbols
    (currency, mathematics, emoji) stay, and so does punctuation where there is nothing else.
    """
    if text.isascii():
        folded = _WITHIN_NUMBER.sub("", text.lower())
        marked = folded.translate(_ASCII)
    else:
        folded = unicodedata.normalize("NFKC", text).casefold()
        folded = _OTHER_DIGITS.sub(lambda digit: str(unicodedata.decimal(digit[0])), folded)
        marked = folded = _WITHIN_NUMBER.sub("", folded)
        for character in set(folded):
            marked = marked.replace(character, _replacement(character))
    bare = _MARK_IN_WORD.sub("", marked).replace(_MARK, " ")
    return " ".join(bare.split()) or " ".join(folded.split())


def shingles(
    texts: Sequence[str],
    groups: Sequence[str],
    policy: NearDuplicates,
    without: NDArray[np.uint64] | None = None,
) -> Shingles:
    """The hashed n-gram set of each text, for the exact Jaccard similarity of two rows.

    The group is part of every hash, so rows of different groups share nothing. An n-gram with a digit counts three
    times and stands for the whole number, so that "order 1001" and "order 1002" differ by more than a typo. A text
    shorter than an n-gram is one n-gram.

    Args:
        texts: n texts.
        groups: n names; only rows of the same group are ever near.
        policy: the length of an n-gram.
        without: n-grams to leave out, from `boilerplate`; a text of nothing else keeps them.
    """
    digests = (hashlib.blake2b(group.encode("utf-8", "surrogatepass"), digest_size=8).digest() for group in groups)
    keys = np.frombuffer(b"".join(digests), dtype="<u8")
    hashes, sizes = [np.empty(0, dtype=np.uint32)], [np.zeros(1, dtype=np.int64)]
    for part in _chunks(texts):
        of_part, size = _sets(*_ngrams(texts[part], policy.ngram), keys[part], without)
        hashes.append(of_part)
        sizes.append(size)
    return Shingles(np.concatenate(hashes), np.cumsum(np.concatenate(sizes)))


def _sets(
    hashes: NDArray[np.uint64], row: Rows, keys: NDArray[np.uint64], without: NDArray[np.uint64] | None
) -> tuple[NDArray[np.uint32], Rows]:
    """The sets of some rows' n-grams, one after another, and how large each is."""
    if without is not None and without.size:
        telling = ~np.isin(hashes, without)
        telling |= np.bincount(row[telling], minlength=len(keys))[row] == 0
        hashes, row = hashes[telling], row[telling]
    mixed = _mix(hashes ^ keys[row]) >> np.uint64(32)
    # One sort for all rows: the row in the upper half, the hash in the lower.
    ordered = np.sort(row.astype(np.uint64) << np.uint64(32) | mixed)
    ordered = ordered[np.diff(ordered, prepend=~ordered[:1]) != 0]
    sizes = np.bincount((ordered >> np.uint64(32)).astype(np.int64), minlength=len(keys))
    return ordered.astype(np.uint32), sizes


def boilerplate(texts: Sequence[str], policy: NearDuplicates) -> NDArray[np.uint64]:
    """The n-grams that more than half of a sample of texts hold, if they make up most of those texts; else none.

    Where every request repeats its instructions ("Classify the following message into …"), the instructions alone
    would make all rows near. Taking the first rows by time as the sample keeps the outcome stable as logs grow.

    Args:
        texts: a sample of a workload's texts; 1,000 are plenty.
        policy: the length of an n-gram.
    """
    found = []
    for part in _chunks(texts):
        hashes, row = _ngrams(texts[part], policy.ngram)
        by_text = np.lexsort((hashes, row))
        hashes, row = hashes[by_text], row[by_text]
        found.append(hashes[(np.diff(hashes, prepend=~hashes[:1]) != 0) | (np.diff(row, prepend=-1) != 0)])
    values, held_by = np.unique(np.concatenate(found or [np.empty(0, dtype=np.uint64)]), return_counts=True)
    common = held_by > len(texts) / 2
    return values[common] if 2 * held_by[common].sum() > held_by.sum() else values[:0]


def _ngrams(texts: Sequence[str], n: int) -> tuple[NDArray[np.uint64], Rows]:
    """Hash and text number of every n-gram of at least one text, repeats included."""
    # Spaces around it let the first and last letters count as much as the others.
    padded = [f" {normalised(text)} ".ljust(n) for text in texts]
    lengths = np.array([len(text) for text in padded], dtype=np.int64)
    codes = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    row = np.repeat(np.arange(len(texts)), lengths)
    digit = (codes >= ord("0")) & (codes <= ord("9"))
    codes[digit] = _numbers(codes[digit], digit)
    last = codes.size - n + 1
    hashes = np.zeros(last, dtype=np.uint64)
    numeric = np.zeros(last, dtype=bool)
    for i in range(n):
        hashes = _mix(hashes ^ codes[i : i + last])
        numeric |= digit[i : i + last]
    within = row[:last] == row[n - 1 :]
    hashes, numeric, row = hashes[within], numeric[within], row[:last][within]
    copies = [_mix(hashes[numeric] + np.uint64(copy)) for copy in range(1, _DIGIT_COPIES)]
    return np.concatenate([hashes, *copies]), np.concatenate([row, *[row[numeric]] * len(copies)])


def _numbers(digits: NDArray[np.uint64], digit: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """A code for each digit that depends on its whole number, given where the digits are."""
    edges = np.flatnonzero(np.diff(digit, prepend=False, append=False))
    lengths = edges[1::2] - edges[::2]
    begins = np.cumsum(lengths) - lengths
    position = np.arange(digits.size) - np.repeat(begins, lengths)
    placed = _mix(digits | position.astype(np.uint64) << np.uint64(21))
    return placed + np.repeat(np.add.reduceat(placed, begins), lengths) if digits.size else digits


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection of 64 bits that spreads every bit: splitmix64 (Steele, Lea and Flood 2014, OOPSLA:453)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)


# ── sketches ────────────────────────────────────────────────────────────────────────────────────────────────────────


def sketch(
    texts: Sequence[str],
    groups: Sequence[str],
    policy: NearDuplicates,
    seed: int = 0,
    without: NDArray[np.uint64] | None = None,
) -> NDArray[np.uint32]:
    """The LSH bands of each row: rows that agree in one of them may be near.

    Equal on every machine and in every process. Rows can be sketched in any portions and the parts concatenated.

    Args:
        texts, groups, without: as for `shingles`.
        policy: how many bands.
        seed: another one gives independent bands, for `leaks`.

    Returns:
        (n, bands) hashes; 172 bytes a row by default.
    """
    # Imported here because it loads scipy.integrate: half a second that a command without a build need not wait.
    from datasketch import MinHash

    bands, width = policy.layout
    minhash = MinHash(num_perm=bands * width, seed=seed, hashfunc=int, scheme="affine32")
    out = np.empty((len(texts), bands), dtype=np.uint32)
    for part in _chunks(texts):
        hashes, offsets = shingles(texts[part], groups[part], policy, without)
        signatures = np.empty((offsets.size - 1, bands * width), dtype=np.uint32)
        for i in range(offsets.size - 1):
            minhash.clear()
            # In pieces: a row of 100 kB would take 100 MB at once.
            for begin in range(offsets[i], offsets[i + 1], 1024):
                minhash.update_batch(hashes[begin : min(begin + 1024, offsets[i + 1])].tolist())
            signatures[i] = minhash.hashvalues
        folded = np.zeros((len(signatures), bands), dtype=np.uint64)
        for column in range(width):
            folded = _mix(folded ^ signatures[:, column::width])
        out[part] = folded >> np.uint64(32)
    return out


def _chunks(texts: Sequence[str]) -> Iterator[slice]:
    begin, characters = 0, 0
    for i, text in enumerate(texts):
        if i > begin and characters + len(text) > _CHUNK_CHARACTERS:
            yield slice(begin, i)
            begin, characters = i, 0
        characters += len(text)
    if len(texts):
        yield slice(begin, len(texts))


# ── pairs ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def resolve(
    bands: NDArray[np.uint32],
    order: NDArray[np.integer],
    shingles_of: Callable[[Rows], Shingles],
    policy: NearDuplicates,
) -> Rows:
    """Which kept row each row repeats: walk the rows in order, drop each that is near one already kept.

    Every dropped row is near the kept row it is said to repeat, which is of the same group and earlier in the order;
    nothing is dropped for being near a dropped row. What becomes of a row does not depend on the rows after it, nor
    on how the input is arranged.

    A row that is near an earlier kept row is dropped, unless LSH misses that row: when they share no band (see
    `NearDuplicates.layout`), when each bucket they share (all rows with one value of a band) had more than 64 kept
    rows and has forgotten it, or when 8 other kept rows share more bands. The last two take thousands of rows made
    from one template; they bound the work to 8 comparisons a row.

    Args:
        bands: (n, bands) from `sketch`. Overwritten: at a million rows a copy would cost 172 MB.
        order: (n,) distinct numbers; the row with the lowest comes first.
        shingles_of: the n-gram sets of some distinct rows, given their numbers; at most 1,152 at once.
        policy: when rows are near.

    Returns:
        (n,) row numbers: its own for a kept row, otherwise the kept row that it repeats.

    Raises:
        ValueError: `order` is not one distinct number a row.
        DatasetError: more than some 60 million rows.
    """
    rows = np.argsort(order)
    if len(order) != len(bands) or (np.diff(order[rows]) == 0).any():
        raise ValueError(f"order must hold a distinct number for each of {len(bands)} rows")
    buckets = _Buckets(bands, rows)
    repeats = np.arange(len(rows))
    for block in _blocks(buckets.crowded):
        sets = _fetch([block, *map(buckets.candidates, block)], rows, shingles_of)
        for place in block:
            others = buckets.candidates(place)
            if not sets.keys() >= set(others.tolist()):  # rarely: full buckets have forgotten what outranked them
                sets |= _fetch([others], rows, shingles_of)
            near = _first_near(place, others, sets, policy)
            if near is None:
                buckets.remember(place)
            else:
                repeats[rows[place]] = rows[near]
    return repeats


def leaks(
    bands: NDArray[np.uint32],
    sides: NDArray[np.integer],
    shingles_of: Callable[[Rows], Shingles],
    policy: NearDuplicates,
) -> Rows:
    """Rows that repeat a row of a lower side: the check of a dataset before it is used.

    Two rows leak when they are of the same group and near by `policy.leak`, so equal texts always do. Give it a sketch
    by another seed than the one that was resolved: what LSH missed then, it does not miss again. A pair is missed for
    the reasons given in `resolve`, and for no other.

    Args:
        bands: (n, bands) from `sketch`. Overwritten, as by `resolve`.
        sides: (n,) numbers, such as 0 for evaluation, 1 for validation and 2 for train.
        shingles_of: as for `resolve`.
        policy: its `leak` says how near.

    Returns:
        (k, 2) row numbers: each row that leaks, once, and a row of a lower side that it repeats.
    """
    rows = np.argsort(sides, kind="stable")
    buckets = _Buckets(bands, rows)
    strict = policy.leak
    side_of = sides[rows[buckets.crowded]]
    found = []
    for side in np.unique(side_of):
        places = buckets.crowded[side_of == side]
        for block in _blocks(places):
            candidates = {place: others for place in block if (others := buckets.candidates(place)).size}
            sets = _fetch([np.array(list(candidates), dtype=np.int64), *candidates.values()], rows, shingles_of)
            for place, others in candidates.items():
                near = _first_near(place, others, sets, strict)
                if near is not None:
                    found.append((rows[place], rows[near]))
        if side < side_of[-1]:
            for place in places:
                buckets.remember(place)
    return np.array(found, dtype=np.int64).reshape(-1, 2)


class _Buckets:
    """For each band value that several rows share, its bucket: the kept ones among those rows, as far as remembered.

    Rows go by their place in the order. A bucket is a piece of one array: how many were kept, then which.
    """

    def __init__(self, bands: NDArray[np.uint32], rows: Rows) -> None:
        place = np.empty(len(rows), dtype=np.int64)
        place[rows] = np.arange(len(rows))
        self._buckets = bands  # overwritten, column by column, by where the row's bucket begins; 0: alone in it
        end = 1
        for column in range(bands.shape[1]):
            by_value = np.argsort(bands[:, column])
            values = bands[by_value, column]
            starts = np.flatnonzero(np.concatenate(([True], values[1:] != values[:-1])))
            sizes = np.diff(starts, append=len(values))
            room = np.where(sizes > 1, np.minimum(sizes, _REMEMBERED) + 1, 0)
            begins = np.where(room, end + np.cumsum(room) - room, 0)
            end += int(room.sum())
            if end > np.iinfo(np.uint32).max:
                raise DatasetError(f"{len(rows):,} rows are too many to compare with each other. Narrow the query.")
            bands[place[by_value], column] = np.repeat(begins, sizes)
        self._kept = np.zeros(end + _REMEMBERED, dtype=np.uint32)
        self.crowded = np.flatnonzero(bands.any(axis=1))

    def candidates(self, place: int) -> Rows:
        """Remembered rows that share a band with this one: those that share the most first, then the earliest."""
        _, buckets = self._of(place)
        kept = self._kept[buckets]
        if not kept.any():
            return np.empty(0, dtype=np.int64)
        window = np.arange(_REMEMBERED)
        places = self._kept[buckets[:, None] + 1 + window][window < kept[:, None]]
        distinct, shared = np.unique(places, return_counts=True)
        return distinct[np.argsort(-shared, kind="stable")[:_COMPARED]].astype(np.int64)

    def remember(self, place: int) -> None:
        """Tell the row's buckets that it was kept."""
        columns, buckets = self._of(place)
        kept = self._kept[buckets].astype(np.int64)
        self._kept[buckets] += 1
        # A full bucket holds a sample (reservoir sampling: Vitter 1985, ACM TOMS 11:37), and each its own: of the many
        # buckets that two near rows share, some still know the first. Nothing that comes later changes the draw.
        drawn = _mix(columns.astype(np.uint64) + np.uint64(place << 16)) >> np.uint64(1)
        slot = np.where(kept < _REMEMBERED, kept, drawn.astype(np.int64) % (kept + 1))
        taken = slot < _REMEMBERED
        self._kept[buckets[taken] + 1 + slot[taken]] = place

    def _of(self, place: int) -> tuple[Rows, Rows]:
        columns = np.flatnonzero(self._buckets[place])
        return columns, self._buckets[place, columns].astype(np.int64)


def _blocks(places: Rows) -> Iterator[Rows]:
    for begin in range(0, len(places), _BLOCK_ROWS):
        yield places[begin : begin + _BLOCK_ROWS]


def _fetch(
    places: Sequence[Rows], rows: Rows, shingles_of: Callable[[Rows], Shingles]
) -> dict[int, NDArray[np.uint32]]:
    """The n-gram sets of some places."""
    wanted = np.unique(np.concatenate(places))
    if not wanted.size:
        return {}
    hashes, offsets = shingles_of(rows[wanted])
    return dict(zip(wanted.tolist(), np.split(hashes, offsets[1:-1]), strict=True))


def _first_near(place: int, others: Rows, sets: dict[int, NDArray[np.uint32]], policy: NearDuplicates) -> int | None:
    own = sets[place] if others.size else np.empty(0)
    for other in others.tolist():
        theirs = sets[other]
        at = np.searchsorted(own, theirs)
        common = int(np.count_nonzero(own[np.minimum(at, own.size - 1)] == theirs))
        if policy.near(common, own.size + theirs.size - common):
            return other
    return None
