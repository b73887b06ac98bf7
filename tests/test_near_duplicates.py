"""Near-duplicates against exact Jaccard similarity, a reference LSH, and planted repetitions of realistic messages."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from datasketch import MinHash, MinHashLSH
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError

from experiments.sample_traffic import generate
from flywheel_ray.near_duplicates import (
    NearDuplicates,
    Rows,
    Shingles,
    boilerplate,
    leaks,
    normalised,
    resolve,
    shingles,
    sketch,
)
from tests.values import BANKING

POLICY = NearDuplicates()
BANDS, WIDTH = POLICY.layout


class Corpus:
    """Texts with groups, and how many of them had to be fetched."""

    def __init__(self, texts: Iterable[str], groups: Sequence[str] | None = None):
        self.texts, self.fetched = list(texts), 0
        self.groups = list(groups) if groups is not None else ["text"] * len(self.texts)
        self.without: NDArray[np.uint64] | None = None

    def shingles_of(self, rows: Rows) -> Shingles:
        self.fetched += len(rows)
        texts, groups = [self.texts[i] for i in rows], [self.groups[i] for i in rows]
        return shingles(texts, groups, POLICY, self.without)

    def sketch(self, seed: int = 0) -> NDArray[np.uint32]:
        return sketch(self.texts, self.groups, POLICY, seed, self.without)

    def resolve(self, order: Sequence[int] | None = None) -> list[int]:
        places = np.array(range(len(self.texts)) if order is None else order)
        return resolve(self.sketch(), places, self.shingles_of, POLICY).tolist()

    def leaks(self, sides: Sequence[int]) -> list[list[int]]:
        return leaks(self.sketch(seed=1), np.array(sides), self.shingles_of, POLICY).tolist()

    @cached_property
    def sets(self) -> list[set[int]]:
        hashes, offsets = self.shingles_of(np.arange(len(self.texts)))
        return [set(part.tolist()) for part in np.split(hashes, offsets[1:-1])]

    def near(self, i: int, j: int, policy: NearDuplicates = POLICY) -> bool:
        a, b = self.sets[i], self.sets[j]
        return self.groups[i] == self.groups[j] and policy.near(len(a & b), len(a | b))


def jaccard(a: set[int], b: set[int]) -> float:
    return len(a & b) / len(a | b)


# ── texts ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("  Where is\n my CARD?!", "where is my card"),
        ("I can't, it's ‘closed’", "i cant its closed"),
        ("e-mail: a_b@c.example", "email ab@c.example"),
        ("Ｆｕｌｌ ｗｉｄｔｈ １２", "full width 12"),
        ("STRASSE", "straße"),
        ("٣ items", "3 items"),
        ("zero\u200bwidth", "zerowidth"),
        ("ring 555-0123 about 1,000 euros", "ring 5550123 about 1000 euros"),
    ],
)
def test_texts_that_differ_in_form_alone_are_equal(text: str, same: str) -> None:
    assert normalised(text) == normalised(same)
    assert Corpus([text, same]).resolve() == [0, 0]


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("", "a"),
        ("a", "b"),
        ("ok", "no"),
        ("👍", "👎"),
        ("?", "!"),
        ("3.5", "35"),
        ("你好", "再见"),
        ("5 €", "5 $"),
        ("Send 1000 to Ann.", "Send 10000 to Ann."),
        ("Where is my order 48213?", "Where is my order 48217?"),
    ],
)
def test_other_texts_however_short_stay_apart(text: str, other: str) -> None:
    assert Corpus([text, other, text + " ", other]).resolve() == [0, 1, 0, 1]


@pytest.mark.parametrize("ngram", [1, 3, 8])
@given(texts=st.lists(st.text(), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_any_text_has_a_sorted_set_of_its_own_and_only_of_its_own(ngram: int, texts: list[str]) -> None:
    policy = NearDuplicates(ngram=ngram)
    together = shingles(texts, ["g"] * len(texts), policy)
    for i, text in enumerate(texts):
        alone = shingles([text], ["g"], policy).hashes
        assert alone.size and (np.diff(alone.astype(np.int64)) > 0).all()
        assert (together.hashes[together.offsets[i] : together.offsets[i + 1]] == alone).all()


@given(*[st.text("abc de", min_size=1)] * 2)
@settings(max_examples=50, deadline=None)
def test_similarity_is_that_of_the_sets_of_trigrams(a: str, b: str) -> None:
    def trigrams(text: str) -> set[str]:
        padded = f" {' '.join(text.split())} ".ljust(3)
        return {padded[i : i + 3] for i in range(len(padded) - 2)}

    one, two = Corpus([a, b]).sets
    assert jaccard(one, two) == len(trigrams(a) & trigrams(b)) / len(trigrams(a) | trigrams(b))


def test_rows_of_different_groups_share_nothing() -> None:
    corpus = Corpus(["cancel my order please"] * 3, ["cancel 1001", "cancel 1002", "cancel 1001"])
    one, two, three = corpus.sets
    assert not one & two and one == three
    assert corpus.resolve() == [0, 1, 0]


def test_repeated_instructions_count_for_nothing() -> None:
    instructions = (
        "You are given the message of a customer. Classify its sentiment as positive, negative or neutral. "
        "Answer with this one word alone, and do not explain it. The message: "
    )
    said = [
        "I love it",
        "worst lamp ever",
        "never again, awful",
        "it is okay",
        "Best shop in town",
        "my kettle exploded",
    ]
    corpus = Corpus([instructions + text for text in [*said, "worst lamp ever!!"]])
    assert corpus.resolve() == [0] * 7
    corpus.without = boilerplate(corpus.texts, POLICY)
    assert corpus.resolve() == [0, 1, 2, 3, 4, 5, 1]


def test_messages_without_common_instructions_have_no_boilerplate() -> None:
    texts = [text for text, _ in support(300)]
    assert boilerplate(texts, POLICY).size == 0
    assert boilerplate([], POLICY).size == 0


# ── sketches ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_sketches_are_equal_in_every_process_and_in_any_portions() -> None:
    code = (
        "import sys; from flywheel_ray.near_duplicates import NearDuplicates, sketch\n"
        "texts = ['Where is my card?', '', '你好 👍', ' '.join(str(i * i) for i in range(2000)), 'where is my card']\n"
        "here = sketch(texts, ['text'] * 5, NearDuplicates())"
    )
    names: dict[str, Any] = {}
    exec(code, names)
    parts = [Corpus([text]).sketch() for text in names["texts"]]
    assert (np.concatenate(parts) == names["here"]).all()
    other = subprocess.run(
        [sys.executable, "-c", f"{code}\nsys.stdout.buffer.write(here.tobytes())"],
        capture_output=True,
        env={**os.environ, "PYTHONHASHSEED": "4242"},
        cwd=Path(__file__).parents[1],
    )
    assert other.stdout == names["here"].tobytes(), other.stderr.decode()
    # Which rows a dataset keeps, and so its fingerprint, rests on these bytes: they may not change unnoticed.
    assert hashlib.sha256(other.stdout).hexdigest()[:16] == "bfcfaa40c893802b"


def test_bands_agree_where_the_reference_lsh_does() -> None:
    """datasketch's own MinHashLSH, on the same n-gram sets, finds the pairs that share a band, and no others."""
    rng = Random(2)
    corpus = Corpus(WAYS[rng.choice(sorted(WAYS))](rng, rng.choice(MESSAGES)) + rng.choice(TAILS) for _ in range(60))
    reference = MinHashLSH(num_perm=BANDS * WIDTH, params=(BANDS, WIDTH))
    hashed = []
    for i, own in enumerate(corpus.sets):
        minhash = MinHash(num_perm=BANDS * WIDTH, seed=0, hashfunc=int)
        minhash.update_batch(own)
        hashed.append(minhash)
        reference.insert(i, minhash)
    bands = corpus.sketch()
    shared = (bands[:, None, :] == bands[None, :, :]).any(axis=2)
    assert 500 < shared.sum() < 3000
    for i, minhash in enumerate(hashed):
        assert set(np.flatnonzero(shared[i])) == set(reference.query(minhash))


@given(st.floats(0.1, 0.99))
@settings(max_examples=50, deadline=None)
def test_layout_keeps_its_promises(threshold: float) -> None:
    policy = NearDuplicates(threshold=threshold, short_threshold=threshold)
    bands, width = policy.layout
    assert bands * width <= 260
    assert (1 - threshold**width) ** bands <= 0.005
    assert (1 - policy.leak.threshold**width) ** bands <= 1e-6


@pytest.mark.parametrize("edits", [2, 5, 8, 11])
def test_pairs_share_a_band_as_often_as_the_s_curve_says(edits: int) -> None:
    """1 − (1 − s^r)^b: Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, 3.4.2."""
    rng, pairs = Random(edits), 300
    texts = []
    for _ in range(pairs):
        letters = rng.choices("abcdefghijklmnopqrstuvwxyz", k=100)
        texts.append("".join(letters))
        for at in rng.sample(range(100), edits):
            letters[at] = rng.choice("abcdefghijklmnopqrstuvwxyz")
        texts.append("".join(letters))
    corpus = Corpus(texts)
    sets, bands = corpus.sets, corpus.sketch()
    expected = np.array([1 - (1 - jaccard(sets[i], sets[i + 1]) ** WIDTH) ** BANDS for i in range(0, 2 * pairs, 2)])
    hits = (bands[::2] == bands[1::2]).any(axis=1)
    error = np.sqrt((expected * (1 - expected)).sum()) / pairs
    assert abs(hits.mean() - expected.mean()) <= 3.5 * error + 1 / pairs


def test_another_seed_gives_independent_bands() -> None:
    corpus = Corpus(["where is my card"])
    assert not (corpus.sketch(seed=0) == corpus.sketch(seed=1)).any()


# ── resolving ───────────────────────────────────────────────────────────────────────────────────────────────────────

MESSAGES = ["where is my new card", "i cannot log in to my account", "how do i change the address of my order"]
TAILS = ["", "", " please", " today", " as soon as possible"]
edited = st.builds(
    lambda text, at, letter, tail: text[: at % len(text)] + letter + text[at % len(text) + 1 :] + tail,
    st.sampled_from(MESSAGES),
    st.integers(0, 99),
    st.sampled_from("aeiou x"),
    st.sampled_from(TAILS),
)


@given(st.lists(st.tuples(edited, st.sampled_from("gh")), max_size=14), st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_resolve_is_the_greedy_walk_whatever_the_input_order_and_whatever_follows(
    rows: list[tuple[str, str]], rng: Random
) -> None:
    corpus = Corpus([text for text, _ in rows], [group for _, group in rows])
    order = rng.sample(range(1000), len(rows))
    repeats = corpus.resolve(order)
    walk = sorted(range(len(rows)), key=order.__getitem__)
    for i, row in enumerate(walk):
        kept = repeats[row]
        if kept != row:
            assert repeats[kept] == kept and order[kept] < order[row] and corpus.near(row, kept)
        else:
            # A near pair may be missed, but hardly one as near as a leak.
            assert not [r for r in walk[:i] if repeats[r] == r and corpus.near(row, r, POLICY.leak)]

    first = walk[: len(rows) // 2]  # what comes later changes nothing
    alone = Corpus([rows[i][0] for i in first], [rows[i][1] for i in first])
    assert [first[kept] for kept in alone.resolve()] == [repeats[row] for row in first]

    shuffled = rng.sample(range(len(rows)), len(rows))
    again = Corpus([rows[i][0] for i in shuffled], [rows[i][1] for i in shuffled])
    found = again.resolve([order[i] for i in shuffled])
    assert {shuffled[i]: shuffled[kept] for i, kept in enumerate(found)} == dict(enumerate(repeats))


def test_nothing_is_dropped_for_being_near_a_dropped_row() -> None:
    polite = "could you please tell me where my new card is"
    corpus = Corpus([polite, polite.removeprefix("could you "), polite.removeprefix("could you please ")])
    assert corpus.near(0, 1) and corpus.near(1, 2) and not corpus.near(0, 2)
    assert corpus.resolve() == [0, 0, 2]
    assert corpus.resolve(order=[2, 1, 3]) == [1, 1, 1]


def test_many_rows_near_each_other_are_compared_once_each() -> None:
    corpus = Corpus(f"Hello{'!' * (i % 7)} where is my {'new ' * (i % 2)}card" for i in range(2000))
    assert set(corpus.resolve()) == {0}
    assert corpus.fetched <= 2100


def test_many_different_rows_in_one_bucket_take_few_comparisons_and_hide_no_pair() -> None:
    """Three buckets that hold all rows stand for boilerplate; the pairs are found by their other bands."""
    rng, n = Random(3), 1500
    texts = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz ", k=60)) for _ in range(n)]
    texts += [text + " please" for text in texts[-50:]]
    corpus = Corpus(texts)
    bands = corpus.sketch()
    bands[:, :3] = 7
    repeats = resolve(bands, np.arange(n + 50), corpus.shingles_of, POLICY)
    assert repeats.tolist() == [*range(n), *range(n - 50, n)]
    assert corpus.fetched <= 9 * (n + 50)


def test_full_buckets_hold_a_sample_that_does_not_depend_on_what_follows() -> None:
    rng = Random(4)
    corpus = Corpus(["".join(rng.choices("abcdefghijklmnopqrstuvwxyz ", k=40)) for _ in range(400)] * 2)
    bands = np.full((800, 3), 7, dtype=np.uint32)
    bands[:, 0] = [*range(600), *[600] * 200]
    repeats = resolve(bands.copy(), np.arange(800), corpus.shingles_of, POLICY)
    first = resolve(bands[:600].copy(), np.arange(600), corpus.shingles_of, POLICY)
    assert (repeats[:600] == first).all()
    found = first[first != np.arange(600)]
    assert 0 < len(found) < 100 and found.max() > 100  # of 200 copies, those whose original was in the sample


@pytest.mark.parametrize(("others", "kept"), [(7, 0), (8, 9)])
def test_a_row_is_compared_with_the_eight_that_share_most_bands(others: int, kept: int) -> None:
    """The last row repeats the first, shares one band with it, and two with others that are nothing like it."""
    corpus = Corpus(["where is my card", *("abcdefgh"[i] * 40 + str(i) for i in range(others)), "where is my card?"])
    bands = np.arange(3 * (others + 2), dtype=np.uint32).reshape(-1, 3)
    bands[[0, -1], 0] = 99
    bands[1:, 1:] = 99
    assert resolve(bands, np.arange(others + 2), corpus.shingles_of, POLICY)[-1] == kept


def test_an_order_with_ties_is_refused() -> None:
    corpus = Corpus(["a", "b"])
    with pytest.raises(ValueError, match="distinct number for each of 2 rows"):
        corpus.resolve([1, 1])
    with pytest.raises(ValueError, match="distinct number"):
        corpus.resolve([1])


# ── leaks ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_leaks_name_the_row_and_what_it_repeats() -> None:
    text = "I would like to know when my new card will arrive in the mail"
    corpus = Corpus(
        [text, "Something else entirely, about fees", text + "!", text.upper(), text, "Which fees do you charge?"],
        ["text", "text", "text", "text", "other group", "text"],
    )
    assert corpus.leaks([0, 0, 2, 1, 2, 2]) == [[3, 0], [2, 0]]
    assert corpus.leaks([2, 0, 0, 1, 0, 1]) == [[3, 2], [0, 2]]
    assert corpus.leaks([1] * 6) == []


def test_a_near_pair_is_a_leak_only_from_the_higher_threshold() -> None:
    corpus = Corpus(["where is my new card please", "where is my new card"])
    assert corpus.near(0, 1) and not corpus.near(0, 1, POLICY.leak)
    assert corpus.resolve() == [0, 0]
    assert corpus.leaks([0, 1]) == []


# ── planted near-duplicates ─────────────────────────────────────────────────────────────────────────────────────────

Labelled = list[tuple[str, str]]
"""Distinct messages, each with the answer that it was given."""


def labelled(records: list[dict]) -> Labelled:
    found: dict[str, tuple[str, str]] = {}
    for record in records:
        messages = [m for m in record["request"]["messages"] if m["role"] != "system"]
        answer = record["response"]["choices"][0]["message"]
        if len(messages) == 1:
            text = messages[0]["content"]
            label = [call["function"] for call in answer.get("tool_calls") or ()] or answer["content"]
            found.setdefault(normalised(text), (text, json.dumps(label)))
    return list(found.values())


def support(n: int) -> Labelled:
    return labelled(list(generate(2 * n, seed=5, workload="support")))[:n]


def tickets(n: int) -> Labelled:
    return labelled(list(generate(n, seed=5, workload="summaries")))


def banking(n: int) -> Labelled:
    if not BANKING.is_file():
        pytest.skip(f"no {BANKING.name} beside the checkout")
    return labelled([json.loads(line) for line in BANKING.read_text(encoding="utf-8").splitlines()])[:n]


def _typo(rng: Random, text: str) -> str:
    at = rng.choice([i for i, character in enumerate(text[:-1]) if character.isalpha()])
    letter = rng.choice("abcdefghijklmnopqrstuvwxyz")
    ways = (letter + text[at + 1 :], text[at + 1 :], letter + text[at:], text[at + 1] + text[at] + text[at + 2 :])
    return text[:at] + rng.choice(ways)


SHORTER = [
    *[("i am", "I'm"), ("i have", "I've"), ("i would", "I'd"), ("i will", "I'll"), ("it is", "it's")],
    *[("do not", "don't"), ("does not", "doesn't"), ("did not", "didn't"), ("cannot", "can't"), ("what is", "what's")],
]


def _contraction(rng: Random, text: str) -> str:
    for long, short in rng.sample(SHORTER, len(SHORTER)):
        for old, new in ((long, short), (short, long)):
            changed = re.sub(rf"\b{old}\b", new, text, count=1, flags=re.IGNORECASE)
            if changed != text:
                return changed
    return text


def _word(rng: Random, text: str) -> str:
    words = text.split(" ")
    plain = [i for i, word in enumerate(words) if word.isalpha()]
    if len(words) < 12 or not plain:
        return text
    words[rng.choice(plain)] = rng.choice(["really", "today", "parcel", "because", "maybe"])
    return " ".join(words)


WAYS: dict[str, Callable[[Random, str], str]] = {
    "case": lambda rng, text: rng.choice([text.upper(), text.lower(), text.title()]),
    "punctuation": lambda rng, text: rng.choice(
        [text.rstrip(".?!") + "!!!", text + "...", text.rstrip(".?!") + " ?", re.sub(r"[,.?!](?=\s|$)|'", "", text)]
    ),
    "white space": lambda rng, text: rng.choice([f"  {text}\n", text.replace(" ", "  "), text.replace(" ", "\u00a0")]),
    "typo": _typo,
    "please": lambda rng, text: rng.choice(["Please ", "please, "]) + text if rng.random() < 0.5 else text + " please",
    "greeting": lambda rng, text: rng.choice(["Hi, ", "hello ", "Hey! "]) + text,
    "contraction": _contraction,
    "one word": _word,
}


@pytest.mark.parametrize("corpus_of", [support, tickets, banking])
def test_planted_near_duplicates_are_found_and_other_questions_are_not_merged(
    corpus_of: Callable[[int], Labelled],
) -> None:
    """At least 95% found, at most 1% of rows merged with a row of another answer, all rows in one group."""
    messages = [(text, label) for text, label in corpus_of(1000) if len(text.split()) >= 4]
    rng = Random(8)
    planted = [
        (i, way, changed)
        for i, (text, _) in enumerate(messages)
        for way in [rng.choice(sorted(WAYS))]
        if (changed := WAYS[way](rng, text)) != text
    ]
    corpus = Corpus([text for text, _ in messages] + [changed for *_, changed in planted])
    labels = [label for _, label in messages] + [messages[i][1] for i, *_ in planted]
    order = rng.sample(range(len(labels)), len(labels))
    repeats = corpus.resolve(order)

    found: Counter[str] = Counter()
    for row, (i, way, _) in enumerate(planted, len(messages)):
        # Of a pair, at most one is kept; the kept row may also be a third that both are near.
        found[way] += repeats[row] != row or repeats[i] != i
    total = Counter(way for _, way, _ in planted)
    table = {way: f"{found[way]} of {total[way]}" for way in total}
    assert found.total() >= 0.95 * total.total(), table
    assert all(found[way] >= 0.9 * total[way] for way in total), table
    false = [(row, kept) for row, kept in enumerate(repeats) if labels[row] != labels[kept]]
    assert len(false) <= 0.01 * len(labels), [(corpus.texts[a], corpus.texts[b]) for a, b in false[:10]]

    kept = [row for row, other in enumerate(repeats) if row == other]
    sides = [order[row] % 3 for row in kept]
    assert Corpus([corpus.texts[row] for row in kept]).leaks(sides) == []
    # The check does find what is planted: the first message again, on another side.
    sides.append(sides[0] + 1)
    assert Corpus([*(corpus.texts[row] for row in kept), corpus.texts[kept[0]] + "!"]).leaks(sides) == [[len(kept), 0]]


# ── the policy ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_policy_is_json_and_refuses_what_makes_no_sense() -> None:
    assert NearDuplicates.model_validate_json(POLICY.model_dump_json()) == POLICY
    for wrong in ({"threshold": 1}, {"threshold": 0.5}, {"short_threshold": 0}, {"ngram": 0}, {"bands": 3}):
        with pytest.raises(ValidationError):
            NearDuplicates(**wrong)


def test_short_texts_need_less() -> None:
    assert POLICY.near(72, 99) and not POLICY.near(69, 99)
    assert POLICY.near(80, 100) and not POLICY.near(79, 100)
