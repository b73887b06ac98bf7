"""What every value of the package shares: frozen, closed to unknown fields, and hashed by content.

class Price(Value):
    usd_per_1m_prompt_tokens: float

content_hash({"b": 1, "a": 2}) == content_hash({"a": 2, "b": 1})
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict


class Value(BaseModel):
    """A frozen value that refuses unknown fields. Subclasses are compared by content."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def canonical_json(data: Any) -> str:
    """One text for equal JSON values: sorted keys, no spaces, characters unescaped.

    Raises `ValueError` for NaN and infinities, which are not JSON.
    """
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def content_hash(data: Any, length: int = 16) -> str:
    """First `length` hexadecimal digits of SHA-256 over `canonical_json(data)`."""
    # Lone surrogates are legal in JSON escapes and illegal in UTF-8; they still need a hash.
    return hashlib.sha256(canonical_json(data).encode("utf-8", "surrogatepass")).hexdigest()[:length]
