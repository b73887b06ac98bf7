"""How alike two texts are, by program: equal, sharing tokens (SQuAD's F1), n-grams (ROUGE), or meaning (embeddings).

    score_texts([("Beyoncé and Bruno Mars", "Beyonce")], ("exact_text", "token_f1"))
    # [(Score(metric="exact_text", value=0.0), Score(metric="token_f1", value=0.0))]

All are in [0, 1] and 1 for the same text, and none knows whether an answer is right: a negation costs one token.
ROUGE needs the package `rouge-score`, which is loaded when it is first asked for; a model that embeds is handed in.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal, get_args

import numpy as np

from flywheel_ray.errors import ConfigError
from flywheel_ray.scoring import Score, folded

EXACT_TEXT = "exact_text"
TOKEN_F1 = "token_f1"
EMBEDDING_SIMILARITY = "embedding_similarity"

TextMetric = Literal["exact_text", "token_f1", "rouge1", "rouge2", "rougeL", "embedding_similarity"]
ROUGE: tuple[TextMetric, ...] = ("rouge1", "rouge2", "rougeL")
TEXT_METRIC_NAMES: tuple[TextMetric, ...] = get_args(TextMetric)

Embed = Callable[[Sequence[str]], np.ndarray]
"""Texts → array of shape (texts, dimensions), a row for each; rows need not be of length 1."""


def require(metrics: Sequence[TextMetric]) -> None:
    """Load the packages that the metrics need.

    Raises:
        ConfigError: one is not installed.
    """
    for metric in metrics:
        if metric in ROUGE:
            _rouge(metric)


def score_texts(
    pairs: Sequence[tuple[str, str]], metrics: Sequence[TextMetric], embed: Embed | None = None
) -> list[tuple[Score, ...]]:
    """Score each (reference, predicted) by each metric, in their order.

    Raises:
        ConfigError: a metric needs a package that is not installed, or `embed`, which is not given.
    """
    if EMBEDDING_SIMILARITY in metrics and embed is None:
        raise ConfigError(f"{EMBEDDING_SIMILARITY} needs a model that embeds; leave it out or hand one in")
    columns = {metric: _values(metric, pairs, embed) for metric in metrics}
    return [tuple(Score(metric=m, value=columns[m][i]) for m in metrics) for i in range(len(pairs))]


def _values(metric: TextMetric, pairs: Sequence[tuple[str, str]], embed: Embed | None) -> Sequence[float]:
    if metric == "exact_text":
        return [exact_text(reference, predicted) for reference, predicted in pairs]
    if metric == "token_f1":
        return [token_f1(reference, predicted) for reference, predicted in pairs]
    if metric == "embedding_similarity":
        assert embed is not None
        return embedding_similarity(pairs, embed)
    return [rouge(reference, predicted, metric) for reference, predicted in pairs]


def exact_text(reference: str, predicted: str) -> float:
    """1 where the texts are the same after Unicode's NFKC, case folding, and white space collapsed and stripped."""
    return float(folded(reference) == folded(predicted))


def token_f1(reference: str, predicted: str) -> float:
    """SQuAD's F1: harmonic mean of precision and recall over tokens, as the official script of version 2.0 computes it.

    Lower case, without ASCII punctuation and without "a", "an", "the"; tokens are what white space separates, so
    languages written without spaces get 1 or 0. Two texts without tokens agree, one without tokens agrees with none.
    (Rajpurkar et al. 2016, arXiv:1606.05250; 2018, arXiv:1806.03822.)
    """
    wanted, given = Counter(_tokens(reference)), Counter(_tokens(predicted))
    if not wanted or not given:
        return float(wanted == given)
    return 2 * (wanted & given).total() / (wanted.total() + given.total())


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _tokens(text: str) -> list[str]:
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_NO_PUNCTUATION)).split()


def rouge(reference: str, predicted: str, metric: TextMetric) -> float:
    """F-measure of ROUGE-1, ROUGE-2 or ROUGE-L (Lin 2004, aclanthology.org/W04-1013), with Porter stemming.

    By Google's `rouge-score`; it knows ASCII letters and digits only, so other scripts get 0. Texts that are the same
    but have no n-gram at all get 1.

    Raises:
        ConfigError: the package is not installed.
    """
    if reference == predicted:
        return 1.0
    return float(_rouge(metric).score(reference, predicted)[metric].fmeasure)


@cache
def _rouge(metric: str) -> Any:
    try:
        from rouge_score import rouge_scorer
    except ImportError:
        raise ConfigError(
            f"{metric} needs the package rouge-score: pip install 'flywheel-ray[text]', or leave {metric} out"
        ) from None
    return rouge_scorer.RougeScorer([metric], use_stemmer=True)


def embedding_similarity(pairs: Sequence[tuple[str, str]], embed: Embed) -> list[float]:
    """Cosine of each pair's embeddings, negative ones as 0. Texts are embedded once each, however often they occur.

    (Reimers & Gurevych 2019, arXiv:1908.10084.) What a value means depends on the model: unrelated texts are seldom 0.
    """
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    if not texts:
        return []
    vectors = np.asarray(embed(texts), dtype=float)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.where(lengths == 0, 1, lengths)
    row = {text: i for i, text in enumerate(texts)}
    return [
        1.0 if reference == predicted else float(np.clip(unit[row[reference]] @ unit[row[predicted]], 0, 1))
        for reference, predicted in pairs
    ]
