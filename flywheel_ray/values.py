"""What every value of the package shares: frozen, closed to unknown fields, and hashed by content.

class Price(Value):
    usd_per_1m_prompt_tokens: float

content_hash({"b": 1, "a": 2}) == content_hash({"a": 2, "b": 1})
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any, Self

import msgspec
from pydantic import AfterValidator, BaseModel, ConfigDict
from pydantic_core import PydanticCustomError


class Value(BaseModel):
    """A frozen value that refuses unknown fields. Subclasses are compared by content."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def trusted(cls, fields: dict[str, Any]) -> Self:
        """Make one of every field, checked by the caller already: pydantic's `model_construct`, several times faster.

        For the few types of which a dataset build makes millions. `fields` becomes the value's own.
        """
        value = _new(cls)
        _set_fields(value, fields)
        _set_names(value, _names.get(cls) or _names.setdefault(cls, set(cls.model_fields)))
        _set_extra(value, None)
        _set_private(value, None)
        return value


def canonical_json(data: Any) -> str:
    """One text for equal JSON values: sorted keys, no spaces, characters unescaped.

    Raises `ValueError` for NaN and infinities, which are not JSON.
    """
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def canonical_bytes(data: Any) -> bytes:
    """As `canonical_json`, in UTF-8 and ten times faster; floats may be written otherwise, so the two never mix.

    For JSON values as parsers make them: a NaN would become null. Whole numbers of any size are exact.
    """
    try:
        return _encode(data)
    except (TypeError, ValueError, OverflowError):  # a lone surrogate, which has no UTF-8, or a very large integer
        return canonical_json(data).encode("utf-8", "surrogatepass")


def content_hash(data: Any, length: int = 16) -> str:
    """First `length` hexadecimal digits of SHA-256 over `canonical_json(data)`."""
    # Lone surrogates are legal in JSON escapes and illegal in UTF-8; they still need a hash.
    return hashlib.sha256(canonical_json(data).encode("utf-8", "surrogatepass")).hexdigest()[:length]


SECRET_GIVEN = "secret_given"
"""Type of the error that a URL with credentials is: it is shown without what was given."""


def has_credentials(url: str) -> bool:
    """Whether a URL holds a user name or password, which would stand in every error and log that names it."""
    return re.match(r"[^/]*//[^/?#]*@", url) is not None


def _without_credentials(url: str) -> str:
    if has_credentials(url):
        raise PydanticCustomError(SECRET_GIVEN, "holds a user name or password; leave them out and use api_key_env")
    return url


EndpointUrl = Annotated[str, AfterValidator(_without_credentials)]
"""A URL without credentials, since it is written to logs and to the ledger."""


# The slots of a pydantic model, set without looking each up by name.
_new: Any = object.__new__
_set_fields: Any = vars(BaseModel)["__dict__"].__set__
_set_names: Any = vars(BaseModel)["__pydantic_fields_set__"].__set__
_set_extra: Any = vars(BaseModel)["__pydantic_extra__"].__set__
_set_private: Any = vars(BaseModel)["__pydantic_private__"].__set__
_names: dict[type, set[str]] = {}
_encode = msgspec.json.Encoder(order="deterministic").encode
