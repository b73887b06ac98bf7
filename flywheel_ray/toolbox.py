"""A toolbox is the tools of a request, ready to check calls: a name that is not among them, or arguments that fail the
tool's JSON schema, is a fault, and says where it lies.

    toolbox = Toolbox(record.tools)  # once per distinct list of tools
    toolbox.fault("route", {"queue": "card_arrival"})  # None: the call fits
    toolbox.fault("route", {"queue": "cash"}).reason  # 'route: arguments.queue: "cash" is not one of ["card_arrival"]'

`fault` never raises and reads neither network nor files. What cannot be checked safely is not checked: `unusable` names
the tools whose own schema is broken or out of bounds, and calls of those have no fault.

The verdict is that of JSON Schema, in the draft that `$schema` names, 2020-12 where it names none:

- `format` and `contentEncoding` are annotations, not tests (the standard's default). OpenAPI's `nullable` and OpenAI's
  `strict` are no keywords of JSON Schema; a strict schema already spells out what it demands.
- 1.0 is an integer (but not in draft 4), true is not 1, and a number of any size is compared exactly.
- A tool without `parameters` (absent, null or {}) takes any object: there is no schema to fail.
- Of tools with the same name the last one counts.
- `$ref` leads only to places in the same schema, `#` or `#/…`. `pattern` is an ECMA 262 expression that a finite
  automaton can match: look-around and back references make a tool unusable, because matching them may take forever.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote

import jsonschema_rs

from flywheel_ray.records import readable
from flywheel_ray.values import Value, canonical_bytes

FaultKind = Literal["malformed_arguments", "unknown_tool", "schema_violation"]

MAX_REASON = 300
"""Characters of a fault's reason, at most."""

MAX_SUBSCHEMAS = 10_000
"""Subschemas of a tool with every `$ref` replaced by its target, at most: a few doubling ones make billions."""

MAX_PATTERN_BYTES = 1 << 20
"""Size of one compiled `pattern`, at most: time to match is this times the length of the text."""

MAX_PATTERN_TEXT = 1 << 16
"""Bytes of arguments that are matched against patterns, at most; longer ones of a tool with patterns have no fault."""

MAX_DETAIL = 1_000_000
"""Subschemas × bytes of arguments for which a schema with `anyOf` or `oneOf` is explained, at most.

The validator lists what is wrong with every branch, and with the branches inside it: memory for a worker to die of."""


class Fault(Value):
    """Why a tool call does not fit the tools of its request; `reason` has at most `MAX_REASON` characters.

    The reason names the tool, the path and what was expected. Logged values in it are cut to a few characters.
    """

    kind: FaultKind
    reason: str


class Toolbox:
    """The tools of a request in OpenAI's form: `{"type": "function", "function": {"name": …, "parameters": …}}`.

    Schemas are compiled when a tool is first called. Entries that are not a function with a name are passed over.
    The tools must not be changed afterwards. A toolbox is pickled as its tools.

    Raises:
        ValueError, TypeError, RecursionError: as `tools_id`.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        self.tools = tuple(tools)
        self.id = tools_id(self.tools)
        self._parameters = dict(filter(None, map(_name_and_parameters, self.tools)))
        self._schemas: dict[str, _Schema] = {}

    def __reduce__(self) -> tuple[type[Toolbox], tuple[Any]]:
        return Toolbox, (self.tools,)

    @property
    def names(self) -> tuple[str, ...]:
        """The tools' names, each once, in the order of the request."""
        return tuple(self._parameters)

    @cached_property
    def unusable(self) -> Mapping[str, str]:
        """Tools whose calls cannot be checked, and why. Compiles every schema that is not compiled yet."""
        schemas = {name: self._schema(name) for name in self._parameters}
        return {name: schema.unusable for name, schema in schemas.items() if schema and schema.unusable}

    def fault(self, name: str, arguments: dict[str, Any] | str) -> Fault | None:
        """The first fault of a call, or None: malformed arguments, then an unknown tool, then the schema. Never raises.

        `arguments` is an object as a JSON parser returns it, or the text that is no JSON object, as in `ToolCall`.
        """
        if not isinstance(arguments, dict):
            return _malformed(name, arguments)
        schema = self._schema(name)
        if schema is None:
            return self._unknown(name)
        try:
            return _violation(name, schema, arguments)
        except _FAULTS:
            pass
        # The validator cannot read lone surrogates, nor what is not JSON at all.
        try:
            return _violation(name, schema, readable(arguments))
        except _FAULTS:
            return _malformed(name, arguments)

    def _schema(self, name: str) -> _Schema | None:
        found = self._schemas.get(name)
        if found is None and name in self._parameters:
            found = self._schemas[name] = _Schema(self._parameters[name])
        return found

    def _unknown(self, name: str) -> Fault:
        known = f"among the request's tools {_listed(self.names)}" if self.names else "known: the request has no tools"
        return _fault("unknown_tool", f"{_shown(name)} is not {known}")


def tools_id(tools: Sequence[Mapping[str, Any]]) -> str:
    """32 hexadecimal digits of SHA-256 over the tools' `canonical_bytes`: the key to cache toolboxes by.

    The order of keys does not count, the order of tools does.

    Raises:
        ValueError, TypeError, RecursionError: the tools are not JSON, or nest deeper than Python's stack.
    """
    return hashlib.sha256(canonical_bytes(tools)).hexdigest()[:32]


class _Bad(Exception):
    pass


_FAULTS = (_Bad, ValueError, TypeError, RecursionError)


class _Schema:
    """The compiled `parameters` of one tool; where they cannot be checked safely, `unusable` and everything fits."""

    unusable: str | None = None
    fits: Callable[[Any], bool]

    def __init__(self, parameters: Any) -> None:
        try:
            self._compile({} if parameters is None else readable(parameters))
        except jsonschema_rs.ValidationError as error:
            self._refuse(f"{_path('parameters', error.instance_path)}: {_complaint(error)}")
        except RecursionError:
            self._refuse("parameters nest too deep")
        except _FAULTS as fault:
            self._refuse(str(fault))

    def _compile(self, parameters: Any) -> None:
        if not isinstance(parameters, dict):
            raise _Bad(f"parameters are not an object: {_shown(parameters)}")
        self._extent = extent = _extent(parameters)
        if extent.subschemas > MAX_SUBSCHEMAS:
            raise _Bad(f"its references expand to more than {MAX_SUBSCHEMAS} subschemas")
        self._validator = validator = jsonschema_rs.validator_for(
            parameters,
            offline=True,
            validate_formats=False,
            pattern_options=jsonschema_rs.RegexOptions(size_limit=MAX_PATTERN_BYTES),
            keywords=_ANNOTATIONS,
        )
        if extent.patterns:
            self.fits = lambda arguments: (
                len(canonical_bytes(arguments)) > MAX_PATTERN_TEXT or validator.is_valid(arguments)
            )
        else:
            self.fits = validator.is_valid

    def _refuse(self, why: str) -> None:
        self.unusable = _cut(readable(why), MAX_REASON)
        self.fits = lambda arguments: True

    def why_not(self, arguments: dict[str, Any]) -> str:
        """What is wrong with arguments that do not fit."""
        extent = self._extent
        if extent.branches and (extent.recursive or extent.subschemas * len(canonical_bytes(arguments)) > MAX_DETAIL):
            return "arguments do not fit the tool's schema"
        try:
            self._validator.validate(arguments)
        except jsonschema_rs.ValidationError as error:
            return f"{_path('arguments', error.instance_path)}: {_what(error)}"
        except UnicodeError:  # a lone surrogate, which `fault` takes out
            raise
        except ValueError:  # too deep to be reported, not too deep to be checked
            pass
        return "arguments do not fit the tool's schema"


class _Annotation:
    """A keyword that the validator would test in drafts 6 and 7, and that has no say in the others."""

    def __init__(self, parent_schema: dict[str, Any], value: Any, schema_path: list[str | int]) -> None:
        pass

    def validate(self, instance: Any) -> None:
        pass


_ANNOTATIONS: dict[str, type[Any]] = {"contentEncoding": _Annotation, "contentMediaType": _Annotation}


# ── how far a schema reaches ────────────────────────────────────────────────


class _Extent(NamedTuple):
    subschemas: int
    """JSON objects in the schema, once every `$ref` is replaced by its target (a recursive one once)."""
    recursive: bool
    patterns: bool
    branches: bool


def _extent(root: dict[str, Any]) -> _Extent:
    """Measure a schema before it is compiled: a small one may take forever to compile or to check.

    Raises `_Bad` for references that leave the schema or change what a reference means.
    """
    targets: dict[str, int | None] = {}  # None while the target is being measured
    keywords: set[str] = set()
    recursive = False

    def size(node: Any) -> int:
        nonlocal recursive
        if isinstance(node, list):
            return sum(size(item) for item in node)
        if not isinstance(node, dict):
            return 0
        keywords.update(node)
        total = 1
        for key, value in node.items():
            if key == "$ref" and isinstance(value, str):
                if value not in targets:
                    targets[value] = None
                    targets[value] = size(_target(root, value))
                found = targets[value]
                recursive = recursive or found is None
                total += found or 0
            elif isinstance(value, dict | list):
                total += size(value)
            elif key in _MOVING and isinstance(value, str) and not (key == "$id" and node is root):
                raise _Bad(f"{key} is not supported inside of a tool's schema: {_shown(value)}")
        return total

    subschemas = size(root)
    return _Extent(subschemas, recursive, bool(keywords & _PATTERNS), bool(keywords & _BRANCHES))


_MOVING = {"$id", "$anchor", "$dynamicRef", "$dynamicAnchor", "$recursiveRef"}
_PATTERNS = {"pattern", "patternProperties"}
_BRANCHES = {"anyOf", "oneOf"}


def _target(root: Any, reference: str) -> Any:
    if reference != "#" and not reference.startswith("#/"):
        raise _Bad(f"$ref leads out of the tool's schema: {_shown(reference)}")
    node = root
    for step in unquote(reference).split("/")[1:]:
        key = step.replace("~1", "/").replace("~0", "~")
        try:
            node = node[int(key)] if isinstance(node, list) else node[key]
        except (LookupError, ValueError, TypeError):
            raise _Bad(f"$ref leads nowhere: {_shown(reference)}") from None
    return node


# ── words ───────────────────────────────────────────────────────────────────


def _name_and_parameters(tool: Any) -> tuple[str, Any] | None:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return None
    # Names are compared with those of completions, which are made readable too.
    return readable(function["name"]), function.get("parameters")


def _violation(name: str, schema: _Schema, arguments: dict[str, Any]) -> Fault | None:
    if schema.fits(arguments):
        return None
    return _fault("schema_violation", f"{_name(name)}: {schema.why_not(arguments)}")


def _malformed(name: str, arguments: Any) -> Fault:
    return _fault("malformed_arguments", f"{_name(name)}: arguments are not a JSON object: {_shown(arguments, 80)}")


def _fault(kind: FaultKind, reason: str) -> Fault:
    return Fault(kind=kind, reason=_cut(readable(reason), MAX_REASON))


def _what(error: jsonschema_rs.ValidationError) -> str:
    match error.kind:
        case jsonschema_rs.ValidationErrorKind.Required(property=missing):
            return f"{_shown(missing)} is missing"
        case jsonschema_rs.ValidationErrorKind.AdditionalProperties(unexpected=unexpected):
            return f"{_shown(unexpected[0])} is not among the properties"
        case jsonschema_rs.ValidationErrorKind.Enum(options=options):
            return f"{_shown(error.instance)} is not one of {_listed(options)}"
        case jsonschema_rs.ValidationErrorKind.Constant(expected_value=expected):
            return f"{_shown(error.instance)} is not {_shown(expected)}"
        case jsonschema_rs.ValidationErrorKind.Type(types=types):
            return f"{_shown(error.instance)} is not of type {' or '.join(types)}"
        case jsonschema_rs.ValidationErrorKind.FalseSchema():
            return f"{_shown(error.instance)} is not allowed"
    limit = error.kind.value
    bound = f" {_shown(limit)}" if isinstance(limit, str | int | float) else ""
    return f"{_shown(error.instance)} fails {error.kind.name}{bound}"


def _complaint(error: jsonschema_rs.ValidationError) -> str:
    """What the validator says of a schema that it refuses."""
    if isinstance(error.kind, jsonschema_rs.ValidationErrorKind.Format) and error.kind.format == "regex":
        return f"{_shown(error.instance)} is not a pattern that is sure to be matched in linear time"
    return error.message


def _path(root: str, steps: Sequence[str | int]) -> str:
    """`arguments.items[2].id`"""
    return root + "".join(f"[{step}]" if isinstance(step, int) else f".{_cut(step, 40)}" for step in steps)


def _name(name: Any) -> str:
    return _cut(name, 64) if isinstance(name, str) else _shown(name)


def _listed(values: Sequence[Any], items: int = 5) -> str:
    texts = [_shown(value) for value in islice(values, items)]
    return f"[{', '.join(texts)}{', …' if len(values) > items else ''}]"


def _shown(value: Any, length: int = 40) -> str:
    """A value as JSON, cut."""
    try:
        text = json.dumps(value[:length] if isinstance(value, str) else value, ensure_ascii=False, default=str)
    except (ValueError, TypeError, RecursionError):
        text = type(value).__name__
    return text + "…" if isinstance(value, str) and len(value) > length else _cut(text, length + 2)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
