"""Text metrics on published examples: SQuAD's own answers, Lin's ROUGE sentences, the rouge-score package's texts."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flywheel_ray.errors import ConfigError
from flywheel_ray.text_scoring import (
    TEXT_METRIC_NAMES,
    TextMetric,
    embedding_similarity,
    exact_text,
    rouge,
    score_texts,
    token_f1,
)


def letters(texts: list[str]) -> np.ndarray:
    """Counts of a, b and c, which is an embedding of a kind."""
    return np.array([[text.count(letter) for letter in "abc"] for text in texts], dtype=float).reshape(-1, 3)


@pytest.mark.parametrize(
    ("reference", "predicted", "expected"),
    [
        ("Beyoncé  and\nBruno Mars", "beyoncé and bruno mars ", 1.0),
        ("Beyonce\u0301", "BEYONCÉ", 1.0),  # combining accent, and case
        ("ﬁne", "fine", 1.0),  # a ligature: compatibility forms are one
        ("Straße", "STRASSE", 1.0),
        ("Yes.", "Yes", 0.0),
        ("", "", 1.0),
        ("", "x", 0.0),
    ],
)
def test_exact_text(reference: str, predicted: str, expected: float) -> None:
    assert exact_text(reference, predicted) == expected


@pytest.mark.parametrize(
    ("reference", "predicted", "expected"),
    [
        # Worked by the official evaluation script of SQuAD 2.0 (compute_f1), articles and punctuation apart.
        ("Denver Broncos", "The Denver Broncos", 1.0),
        ("Santa Clara, California", "Levi's Stadium in Santa Clara, California", 2 * (3 / 6 * 1) / (3 / 6 + 1)),
        ("gold", "the golden anniversary", 0.0),
        ("February 7, 2016", "February 7 2016.", 1.0),
        ("to be or not to be", "to be", 2 * 1 * (2 / 6) / (1 + 2 / 6)),  # tokens count as often as they occur
        ("", "", 1.0),
        ("the", "a", 1.0),  # nothing is left of either
        ("", "something", 0.0),
    ],
)
def test_token_f1_is_squads(reference: str, predicted: str, expected: float) -> None:
    assert token_f1(reference, predicted) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("reference", "predicted", "metric", "expected"),
    [
        # Lin 2004, section 3: S1 as reference; β = 1. S2 shares the sequence "police the gunman", S3 "the gunman".
        ("police killed the gunman", "police kill the gunman", "rougeL", 1.0),  # with stemming: killed and kill
        ("police killed the gunman", "the gunman kill police", "rougeL", 2 / 4),
        ("police killed the gunman", "the gunman police killed", "rougeL", 2 / 4),
        # The README of rouge-score.
        ("The quick brown fox jumps over the lazy dog", "The quick brown dog jumps on the log.", "rouge1", 12 / 17),
        ("The quick brown fox jumps over the lazy dog", "The quick brown dog jumps on the log.", "rougeL", 10 / 17),
        ("The quick brown fox jumps over the lazy dog", "The quick brown dog jumps on the log.", "rouge2", 4 / 15),
        ("卡在哪里", "卡在哪里", "rouge1", 1.0),
    ],
)
def test_rouge_is_googles(reference: str, predicted: str, metric: TextMetric, expected: float) -> None:
    pytest.importorskip("rouge_score")
    assert rouge(reference, predicted, metric) == pytest.approx(expected)


def test_embedding_similarity_is_the_cosine() -> None:
    pairs = [("aab", "aab"), ("a", "b"), ("ab", "a"), ("aaa", "a"), ("x", "a"), ("", "")]
    assert embedding_similarity(pairs, letters) == pytest.approx([1, 0, 2**-0.5, 1, 0, 1])
    assert embedding_similarity([("a", "b")], lambda t: np.array([[1.0], [-1.0]])) == [0.0]  # never below 0


def test_each_text_is_embedded_once() -> None:
    asked: list[str] = []

    def embed(texts: list[str]) -> np.ndarray:
        asked.extend(texts)
        return letters(texts)

    embedding_similarity([("a", "b"), ("b", "a"), ("a", "c")], embed)
    assert sorted(asked) == ["a", "b", "c"]


def test_scores_come_in_the_order_asked_for() -> None:
    rows = score_texts([("ab", "ab"), ("ab", "c")], ("token_f1", "embedding_similarity", "exact_text"), letters)
    assert [[(s.metric, s.value) for s in row] for row in rows] == [
        [("token_f1", 1), ("embedding_similarity", pytest.approx(1)), ("exact_text", 1)],
        [("token_f1", 0), ("embedding_similarity", 0), ("exact_text", 0)],
    ]
    assert score_texts([], TEXT_METRIC_NAMES, letters) == []


def test_what_is_missing_is_said() -> None:
    with pytest.raises(ConfigError, match="needs a model"):
        score_texts([("a", "b")], ("embedding_similarity",))
    # Python's own way of hiding a package, in a process of its own.
    code = (
        "import sys; sys.modules['rouge_score'] = None\n"
        "from flywheel_ray.text_scoring import require; require(('exact_text',)); require(('rougeL',))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ConfigError: rougeL needs the package rouge-score: pip install 'flywheel-ray[text]'" in done.stderr


@settings(deadline=None, max_examples=60)
@given(st.text(), st.text())
def test_every_metric_is_a_share_and_symmetric(a: str, b: str) -> None:
    for metric in ("exact_text", "token_f1"):
        (one,), (other,) = score_texts([(a, b), (b, a)], (metric,))
        assert one.value == other.value and one.value is not None and 0 <= one.value <= 1
        assert score_texts([(a, a)], (metric,))[0][0].value == 1
