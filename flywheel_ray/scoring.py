"""A score says how good one completion is against the reference; None means unscored, with the reason, and never 0.

    score_tool_calls(reference=teacher_answer, predicted=student_answer, tools=record.tools)
    # (Score(metric="function_name_accuracy", value=1.0), Score(metric="function_name_and_args_accuracy", value=0.0))

Calls are a multiset, matched one to one whatever their order; two calls of one function do not collapse. Arguments are
compared as JSON, typed and all the way down:

- Objects are unordered. Arrays are ordered, but a multiset where the tool's schema says `uniqueItems`.
- 1 equals 1.0; "1" does not equal 1, true does not equal 1, null is a value. Integers are compared exactly. A number
  with a fraction or an exponent is the IEEE double that it was parsed to, so 0.1 equals 0.10000000000000000001.
- Malformed arguments, or a NaN among them, are wrong, not missing, and equal nothing, not even the same text.
- Abstention is an answer: no call where the reference has none is right, any call there is wrong.

What else counts as equal is a named policy, `Strictness`. Equality is decided on a normal form (`normal_arguments`), so
it is transitive and matching calls is counting. Tool and argument names always count as written.

The two names follow NVIDIA's NeMo Evaluator, so that figures can be read side by side; where ours differ on purpose
`tests/test_scoring_nvidia.py` lists each case and why.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal
from urllib.parse import unquote

from flywheel_ray.records import Completion, ToolCall
from flywheel_ray.values import Value, canonical_bytes

SCORER_VERSION = "2"
"""Part of every candidate's key: raise it whenever the same completion may get another score."""

FUNCTION_NAME = "function_name_accuracy"
FUNCTION_NAME_AND_ARGS = "function_name_and_args_accuracy"
TOOL_CALLING_CORRECTNESS = "tool_calling_correctness"
SIMILARITY = "similarity"

TOOL_METRICS = (FUNCTION_NAME_AND_ARGS, FUNCTION_NAME)
"""What a program can say of a row with tools."""

Strictness = Literal["exact", "schema", "case_insensitive"]
"""Which arguments count as equal beside equal JSON.

- `exact`: no others. Of the tool's schema only `uniqueItems` is heeded.
- `schema`: an optional argument that is left out equals its declared `default`, and null for an optional argument that
  does not allow null equals leaving it out; the same for the properties of nested objects. Optional means declared in
  `properties` and not in `required`: whoever leaves out a required argument breaks the schema, whatever its default. A
  default that does not fit its own schema ("false" for a boolean) says nothing.
- `case_insensitive`: `schema`, and strings are compared after Unicode's NFKC (so that a letter and its accent equal the
  accented letter), case-folded, with white space collapsed and stripped; see `folded`.
"""


class Score(Value):
    """One metric of one completion in [0, 1], or None with the reason why there is no value."""

    metric: str
    value: float | None
    reason: str | None = None


def score_tool_calls(
    reference: Completion,
    predicted: Completion,
    tools: Sequence[Mapping[str, Any]] = (),
    strictness: Strictness = "exact",
) -> tuple[Score, Score]:
    """`function_name_accuracy` and `function_name_and_args_accuracy` of one completion, each 0 or 1.

    Args:
        reference: the right answer.
        predicted: the answer to score.
        tools: the request's tools in OpenAI's form; a call of a tool that is not among them is compared without schema.
        strictness: which arguments count as equal.

    Raises:
        ValueError: the reference itself has arguments that are not a JSON object; such an example cannot be scored and
            must have been kept out of the dataset.
    """
    wanted = _wanted(reference.tool_calls)
    if Counter(name for name, _ in wanted) != Counter(call.name for call in predicted.tool_calls):
        return _NEITHER
    called = _called(predicted.tool_calls)
    if called is None:
        return _NAME_ONLY
    if called == wanted or Counter(called) == Counter(wanted):
        return _BOTH
    # Arguments that are equal as they stand are equal under any schema, so schemas are only looked at here.
    for name in dict.fromkeys(name for name, _ in wanted):
        parameters = parameters_of(tools, name)
        mine, theirs = (
            [call.arguments for call in side.tool_calls if call.name == name and not isinstance(call.arguments, str)]
            for side in (reference, predicted)
        )
        forms = [canonical_bytes(form) for form in normal_calls([*mine, *theirs], parameters, strictness)]
        if Counter(forms[: len(mine)]) != Counter(forms[len(mine) :]):
            return _NAME_ONLY
    return _BOTH


def normal_calls(
    arguments: Sequence[Mapping[str, Any]], parameters: Mapping[str, Any] | None, strictness: Strictness
) -> list[dict[str, Any]]:
    """`normal_arguments` of calls of one tool, all of them in the same way, so that they can be compared.

    Where the tool's schema is none that can be followed, all are read without it.

    Args:
        arguments: each of them JSON (see `is_json_object`).
        parameters: the tool's JSON schema.
        strictness: which arguments count as equal.
    """
    ways: tuple[tuple[Mapping[str, Any] | None, Strictness], ...] = ((parameters, strictness), (None, strictness))
    for schema, policy in ways:
        try:
            return [normal_arguments(each, schema, policy) for each in arguments]
        except _NOT_JSON:
            continue
    return [normal_arguments(each) for each in arguments]  # nested so deep that only the shortest way reaches its end


def normal_arguments(
    arguments: Mapping[str, Any], parameters: Mapping[str, Any] | None = None, strictness: Strictness = "exact"
) -> dict[str, Any]:
    """A tool call's arguments in normal form: two are equal when the `canonical_bytes` of their normal forms are.

    Whole numbers become integers, sets are sorted, and what equals leaving it out is left out.

    Args:
        arguments: an object, as a JSON parser returns it.
        parameters: the tool's JSON schema. `properties`, `additionalProperties`, `items`, `prefixItems`, `allOf`, local
            `$ref`s, and of `anyOf` and `oneOf` the first branch that the value fits by its type, `const`, `enum` and
            properties, are followed as far as the value reaches; what else a schema says does not count here.
        strictness: which arguments count as equal.

    Raises:
        ValueError: a NaN or an infinity, which are not JSON, or more nesting than Python can follow.
    """
    try:
        if not parameters and strictness == "exact":
            normal = _plain(arguments)
        else:
            root = parameters or {}
            normal = _Reader(root, strictness).read(arguments, [root])
    except RecursionError:
        raise ValueError("arguments nest too deep") from None
    assert isinstance(normal, dict)
    return normal


def is_json_object(arguments: Any) -> bool:
    """Whether a call's arguments are a JSON object: no text that could not be parsed, and no NaN or infinity inside."""
    try:
        return isinstance(arguments, dict) and bool(canonical_bytes(normal_arguments(arguments)))
    except _NOT_JSON:
        return False


def folded(text: str) -> str:
    """A text for comparing without case: after Unicode's NFKC, case-folded, white space collapsed and stripped."""
    return " ".join(unicodedata.normalize("NFKC", text).split()).casefold()


def parameters_of(tools: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any] | None:
    """The JSON schema of a tool's arguments; None where there is no such tool or schema. The last of a name counts."""
    for tool in reversed(tools):
        function = tool.get("function")
        if isinstance(function, dict) and function.get("name") == name:
            parameters = function.get("parameters")
            return parameters if isinstance(parameters, dict) else None
    return None


def _scores(name: float, args: float) -> tuple[Score, Score]:
    return Score(metric=FUNCTION_NAME, value=name), Score(metric=FUNCTION_NAME_AND_ARGS, value=args)


_NEITHER, _NAME_ONLY, _BOTH = _scores(0.0, 0.0), _scores(1.0, 0.0), _scores(1.0, 1.0)

_Form = tuple[str, bytes]
"""A call's name and its normal arguments: equal for equal calls."""

_NOT_JSON = (ValueError, TypeError, RecursionError)


def _wanted(calls: Iterable[ToolCall]) -> list[_Form]:
    try:
        return [_form(call) for call in calls]
    except _NOT_JSON as error:
        raise ValueError(f"the reference's tool-call arguments are not a JSON object: {error}") from None


def _called(calls: Iterable[ToolCall]) -> list[_Form] | None:
    """None where a call is malformed."""
    try:
        return [_form(call) for call in calls]
    except _NOT_JSON:
        return None


def _form(call: ToolCall) -> _Form:
    if isinstance(call.arguments, str):
        raise ValueError(f"{call.arguments[:80]!r}")
    return call.name, canonical_bytes(normal_arguments(call.arguments))


def _plain(value: Any) -> Any:
    """A value in normal form where there is no schema: 1.0 and 1 are one number, which Python writes in two ways."""
    kind = type(value)
    if kind is str:
        return value
    if kind is float:
        return _number(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _number(value: float) -> float | int:
    if value.is_integer():
        return int(value)
    if value - value != 0:
        raise ValueError(f"{value} is not a JSON number")
    return value


_NO_VALUE = object()
_BRANCHES = ("anyOf", "oneOf")
_MOST_DEFAULTS = 8
_COMPOUND = frozenset(("$ref", "allOf", *_BRANCHES))


class _Reader:
    """Reads values into normal form by one tool's schema. It goes where the value goes, so a recursive schema ends.

    A value stands under several schemas at once: those of `$ref`, `allOf` and the fitting branch hold together.
    """

    def __init__(self, root: Mapping[str, Any], strictness: Strictness) -> None:
        self.root = root
        self.lenient = strictness != "exact"
        self.fold = strictness == "case_insensitive"
        self.defaults: dict[tuple[int, ...], bytes] = {}
        self.depth = 0
        """How many defaults are being read, one inside of another."""

    def read(self, value: Any, schemas: Sequence[Any]) -> Any:
        kind = type(value)
        if kind is str:
            return folded(value) if self.fold else value
        if kind is float:
            return _number(value)
        if isinstance(value, dict):
            return self._object(value, self.facets(schemas, value))
        if isinstance(value, list | tuple):
            return self._array(value, self.facets(schemas, value))
        return value

    def _object(self, value: Mapping[str, Any], facets: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        required = [name for facet in facets for name in _list(facet, "required")] if self.lenient else []
        normal = {}
        for key, item in value.items():
            schemas = [schema for facet in facets if (schema := _property(facet, key)) is not None]
            optional = self.lenient and key not in required and any(key in _dict(f, "properties") for f in facets)
            if item is None and optional and not self.nullable(schemas):
                continue
            read = self.read(item, schemas)
            if not (optional and self._is_default(read, schemas)):
                normal[key] = read
        return normal

    def _array(self, value: Sequence[Any], facets: Sequence[Mapping[str, Any]]) -> list[Any]:
        if not facets:
            return [self.read(item, ()) for item in value]
        normal = [
            self.read(item, [schema for facet in facets if (schema := _item(facet, i)) is not None])
            for i, item in enumerate(value)
        ]
        if any(facet.get("uniqueItems") is True for facet in facets):
            normal.sort(key=canonical_bytes)
        return normal

    def _is_default(self, read: Any, schemas: Sequence[Any]) -> bool:
        for facet in self.facets(schemas):
            if "default" in facet and self.fits(facet["default"], facet):
                return canonical_bytes(read) == self._default(facet, schemas)
        return False

    def _default(self, facet: Mapping[str, Any], schemas: Sequence[Any]) -> bytes:
        """The normal form of a declared default, which may leave out defaults of its own.

        In a recursive schema a default may contain itself, so one that lies too deep in others counts as written. What
        is found is kept by depth, as it may depend on it, and on nothing else: each is read once at each depth.
        """
        default = facet["default"]
        if self.depth == _MOST_DEFAULTS:
            return canonical_bytes(self.read(default, ()))
        key = (self.depth, id(facet), *map(id, schemas))
        if key not in self.defaults:
            self.depth += 1
            self.defaults[key] = canonical_bytes(self.read(default, schemas))
            self.depth -= 1
        return self.defaults[key]

    def facets(self, schemas: Sequence[Any], value: Any = _NO_VALUE) -> Sequence[Mapping[str, Any]]:
        """Every schema object that holds for the value, each once; without a value, those that hold for any."""
        if len(schemas) == 1 and isinstance(schemas[0], dict) and _COMPOUND.isdisjoint(schemas[0]):
            return schemas
        seen: set[int] = set()
        found: list[Mapping[str, Any]] = []
        waiting = list(reversed(schemas))
        while waiting:
            schema = waiting.pop()
            if not isinstance(schema, dict) or id(schema) in seen:
                continue
            seen.add(id(schema))
            found.append(schema)
            if "$ref" in schema:
                waiting.append(self._target(schema["$ref"]))
            waiting.extend(_list(schema, "allOf"))
            for keyword in _BRANCHES if value is not _NO_VALUE else ():
                waiting.extend(next(([b] for b in _list(schema, keyword) if self.fits(value, b)), ()))
        return found

    def fits(self, value: Any, schema: Any, deep: bool = True, known: dict[int, bool] | None = None) -> bool:
        """Whether a branch may be meant: by its type, `const`, `enum`, and those and the names of its properties."""
        if not isinstance(schema, dict):
            return schema is not False
        known = {} if known is None else known  # each schema is tried once, however many references lead to it
        if id(schema) not in known:
            known[id(schema)] = True
            known[id(schema)] = self._fits(value, schema, deep, known)
        return known[id(schema)]

    def _fits(self, value: Any, schema: Mapping[str, Any], deep: bool, known: dict[int, bool]) -> bool:
        if not _is_of_type(value, schema.get("type")):
            return False
        if "const" in schema and not self._equal(value, schema["const"]):
            return False
        if isinstance(schema.get("enum"), list) and not any(self._equal(value, option) for option in schema["enum"]):
            return False
        if deep and isinstance(value, dict):
            properties = _dict(schema, "properties")
            if any(name not in value for name in _list(schema, "required")):
                return False
            if schema.get("additionalProperties") is False and not properties.keys() >= value.keys():
                return False
            if not all(self.fits(value[name], properties[name], False) for name in properties.keys() & value.keys()):
                return False
        if "$ref" in schema and not self.fits(value, self._target(schema["$ref"]), deep, known):
            return False
        if not all(self.fits(value, part, deep, known) for part in _list(schema, "allOf")):
            return False
        for keyword in _BRANCHES:
            branches = _list(schema, keyword)
            if branches and not any(self.fits(value, branch, deep, known) for branch in branches):
                return False
        return True

    def _equal(self, a: Any, b: Any) -> bool:
        a, b = self.read(a, ()), self.read(b, ())
        return bool(a == b) if isinstance(a, str) else canonical_bytes(a) == canonical_bytes(b)

    def nullable(self, schemas: Iterable[Any]) -> bool:
        """Whether null is a value here. OpenAPI's `nullable` counts, though JSON Schema does not know it."""
        return all(
            self.fits(None, schema) or (isinstance(schema, dict) and schema.get("nullable") is True)
            for schema in schemas
        )

    def _target(self, reference: Any) -> Any:
        """Where a local `$ref` leads; None where it leads out of the schema or nowhere: then it says nothing."""
        if not isinstance(reference, str) or (reference != "#" and not reference.startswith("#/")):
            return None
        node: Any = self.root
        for step in unquote(reference).split("/")[1:]:
            key = step.replace("~1", "/").replace("~0", "~")
            try:
                node = node[int(key)] if isinstance(node, list) else node[key]
            except (LookupError, ValueError, TypeError):
                return None
        return node


_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list, tuple),
    "string": (str,),
    "boolean": (bool,),
    "null": (type(None),),
    "number": (int, float),
}


def _is_of_type(value: Any, types: Any) -> bool:
    if types is None:
        return True
    for name in types if isinstance(types, list) else [types]:
        if name == "integer":
            if type(value) is int or (type(value) is float and value.is_integer()):
                return True
        elif name not in _TYPES or type(value) in _TYPES[name]:
            return True
    return False


def _property(facet: Mapping[str, Any], key: str) -> Any:
    """What a schema says of an object's property; None where it says nothing, or may say it by a pattern."""
    properties = _dict(facet, "properties")
    if key in properties:
        return properties[key]
    return None if "patternProperties" in facet else facet.get("additionalProperties")


def _item(facet: Mapping[str, Any], i: int) -> Any:
    """What a schema says of an array's item i: `prefixItems` and `items`, which before 2020-12 could be a list."""
    items = facet.get("items")
    if isinstance(items, list):
        return items[i] if i < len(items) else facet.get("additionalItems")
    first = _list(facet, "prefixItems")
    return first[i] if i < len(first) else items


def _dict(schema: Mapping[str, Any], keyword: str) -> Mapping[str, Any]:
    found = schema.get(keyword)
    return found if isinstance(found, dict) else {}


def _list(schema: Mapping[str, Any], keyword: str) -> Sequence[Any]:
    found = schema.get(keyword)
    return found if isinstance(found, list) else []
