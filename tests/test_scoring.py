"""The tool-call scorer on the cases that decide a leaderboard."""

from __future__ import annotations

import copy
import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flywheel_ray.records import Completion, ToolCall, read_arguments
from flywheel_ray.scoring import Strictness, score_tool_calls

POLICIES: tuple[Strictness, ...] = ("exact", "schema", "case_insensitive")


def answer(*calls: tuple[str, Any], text: str = "") -> Completion:
    return Completion(text=text, tool_calls=tuple(ToolCall(name=n, arguments=a) for n, a in calls))


def scores(reference: Completion, predicted: Completion) -> tuple[float | None, float | None]:
    name, args = score_tool_calls(reference, predicted)
    return name.value, args.value


def tool(properties: dict[str, Any], required: tuple[str, ...] = (), name: str = "f", **more: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(required), **more}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def equal(wanted: Any, called: Any, schema: dict[str, Any], strictness: Strictness = "exact") -> bool:
    return score_tool_calls(answer(("f", wanted)), answer(("f", called)), [schema], strictness)[1].value == 1.0


# ── equal JSON ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("predicted", "expected"),
    [
        (answer(("f", {"a": 1, "b": [1, 2]})), (1, 1)),
        (answer(("f", {"b": [1, 2], "a": 1.0})), (1, 1)),  # objects are unordered, 1 is 1.0
        (answer(("f", {"a": "1", "b": [1, 2]})), (1, 0)),
        (answer(("f", {"a": True, "b": [1, 2]})), (1, 0)),  # true is not 1
        (answer(("f", {"a": 1, "b": [2, 1]})), (1, 0)),
        (answer(("f", {"a": 1})), (1, 0)),
        (answer(("f", {"a": 1, "b": [1, 2], "c": None})), (1, 0)),
        (answer(("f", '{"a": 1, "b": [1, 2]')), (1, 0)),  # malformed is wrong, not missing
        (answer(("g", {"a": 1, "b": [1, 2]})), (0, 0)),
        (answer(("f", {"a": 1, "b": [1, 2]}), ("f", {"a": 1, "b": [1, 2]})), (0, 0)),
        (answer(text="no"), (0, 0)),
    ],
)
def test_one_call(predicted: Completion, expected: tuple[float, float]) -> None:
    assert scores(answer(("f", {"a": 1, "b": [1, 2]})), predicted) == expected


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (2**53, float(2**53), True),
        (2**53 + 1, float(2**53), False),  # as floats they would be equal
        (10**400, 10**400 + 1, False),  # no float at all
        (10**22, 1e22, True),
        (10**23, 1e23, False),  # 1e23 is 99999999999999991611392
        (0, -0.0, True),
        (0.1 + 0.2, 0.3, False),
        (False, 0, False),
        (None, False, False),
        ([], {}, False),
        ("", None, False),
        ({"a": {"b": [1, {"c": 1.0}]}}, {"a": {"b": [1.0, {"c": 1}]}}, True),
        ({"a": {"b": [1, {"c": True}]}}, {"a": {"b": [1, {"c": 1}]}}, False),
        ("é", "e\u0301", False),  # strings are compared as written
        ("\ud83d", "\ud83d", True),  # half an emoji
    ],
)
def test_values_are_compared_typed_and_without_rounding(a: Any, b: Any, same: bool) -> None:
    assert scores(answer(("f", {"x": a})), answer(("f", {"x": b}))) == (1, float(same))


def test_parallel_calls_are_a_multiset() -> None:
    reference = answer(("f", {"a": 1}), ("f", {"a": 2}), ("g", {}))
    assert scores(reference, answer(("g", {}), ("f", {"a": 2}), ("f", {"a": 1}))) == (1, 1)
    assert scores(reference, answer(("g", {}), ("f", {"a": 2}), ("f", {"a": 2}))) == (1, 0)


def test_abstention_is_scored_both_ways() -> None:
    assert scores(answer(text="Hello!"), answer(text="Hi.")) == (1, 1)
    assert scores(answer(text="Hello!"), answer(("f", {}))) == (0, 0)
    assert scores(answer(("f", {})), answer(text="Hello!")) == (0, 0)


@pytest.mark.parametrize("arguments", ["{", '"text"', {"a": float("nan")}, {"a": [float("inf")]}])
def test_a_reference_that_cannot_be_scored_is_refused(arguments: Any) -> None:
    with pytest.raises(ValueError, match="reference"):
        score_tool_calls(answer(("f", arguments)), answer(("f", {})))


@pytest.mark.parametrize("wanted", [{"a": 1}, {"a": "nan"}, {"a": None}])
def test_not_a_number_equals_nothing(wanted: Any) -> None:
    assert scores(answer(("f", wanted)), answer(("f", {"a": float("nan")}))) == (1, 0)


# ── what a schema changes ─────────────────────────────────────────────────────────────────────────────────────────────

SETS: dict[str, dict[str, Any]] = {
    "plain": tool({"x": {"type": "array", "uniqueItems": True}}),
    "behind a reference": tool(
        {"x": {"$ref": "#/$defs/s"}}, **{"$defs": {"s": {"type": "array", "uniqueItems": True}}}
    ),
    "optional": tool({"x": {"anyOf": [{"type": "null"}, {"type": "array", "uniqueItems": True}]}}),
    "all of": tool({"x": {"allOf": [{"type": "array"}, {"uniqueItems": True}]}}),
    "additional": tool({}, additionalProperties={"type": "array", "uniqueItems": True}),
}


@pytest.mark.parametrize("schema", SETS.values(), ids=SETS.keys())
def test_an_array_is_a_set_where_the_schema_says_so(schema: dict[str, Any]) -> None:
    for strictness in POLICIES:
        assert equal({"x": [1, "b", {"c": 1}]}, {"x": [{"c": 1.0}, 1, "b"]}, schema, strictness)
        assert not equal({"x": [1, 2]}, {"x": [1, 2, 2]}, schema, strictness)  # it counts
        assert not equal({"x": [1, 2]}, {"x": [1, 3]}, schema, strictness)


def test_sets_lie_anywhere_and_only_where_they_are_declared() -> None:
    inner = {"type": "object", "properties": {"tags": {"type": "array", "uniqueItems": True}}}
    schema = tool({"rows": {"type": "array", "items": inner}, "pair": {"prefixItems": [inner, {"type": "array"}]}})
    assert equal({"rows": [{"tags": [1, 2]}, {"tags": [3]}]}, {"rows": [{"tags": [2, 1]}, {"tags": [3]}]}, schema)
    assert not equal({"rows": [{"tags": [1]}, {"tags": [2]}]}, {"rows": [{"tags": [2]}, {"tags": [1]}]}, schema)
    assert equal({"pair": [{"tags": [1, 2]}, [1, 2]]}, {"pair": [{"tags": [2, 1]}, [1, 2]]}, schema)
    assert not equal({"pair": [{"tags": [1, 2]}, [1, 2]]}, {"pair": [{"tags": [1, 2]}, [2, 1]]}, schema)


def test_a_branch_is_chosen_by_what_the_value_is() -> None:
    def shape(kind: str, unique: bool) -> dict[str, Any]:
        points = {"type": "array", "uniqueItems": unique}
        return {"type": "object", "properties": {"kind": {"const": kind}, "points": points}, "required": ["kind"]}

    schema = tool({"shape": {"oneOf": [shape("cloud", True), shape("line", False)]}})
    for kind, same in (("cloud", True), ("line", False), ("other", False)):
        wanted, called = ({"shape": {"kind": kind, "points": points}} for points in ([1, 2], [2, 1]))
        assert equal(wanted, called, schema) is same


DEFAULTS = tool(
    {
        "queue": {"type": "string"},
        "limit": {"type": "integer", "default": 10},
        "note": {"type": "string"},
        "until": {"type": ["string", "null"]},
        "verbose": {"type": "boolean", "default": "false"},
        "page": {
            "type": "object",
            "properties": {"size": {"type": "number", "default": 20}, "sort": {"type": "string"}},
            "default": {"size": 20},
        },
        "open": {},
    },
    required=("queue",),
)


@pytest.mark.parametrize(
    ("wanted", "called", "same"),
    [
        ({"queue": "a"}, {"queue": "a", "limit": 10.0}, True),
        ({"queue": "a"}, {"queue": "a", "limit": 11}, False),
        ({"queue": "a"}, {"queue": "a", "note": None}, True),
        ({"queue": "a", "limit": 10}, {"queue": "a", "limit": None}, True),  # null, left out, default: all the same
        ({"queue": "a"}, {"queue": "a", "until": None}, False),  # here null is a value
        ({"queue": "a"}, {"queue": "a", "open": None}, False),  # and here it is allowed
        ({"queue": "a"}, {"queue": "a", "unknown": None}, False),
        ({"queue": "a"}, {"queue": "a", "verbose": "false"}, False),  # a default that breaks its own schema
        ({"queue": "a"}, {"queue": None}, False),
        ({"queue": "a", "page": {"sort": "x"}}, {"queue": "a", "page": {"sort": "x", "size": 20.0}}, True),
        ({"queue": "a", "page": {"size": 5}}, {"queue": "a", "page": {"size": 5, "sort": None}}, True),
        ({"queue": "a"}, {"queue": "a", "page": {}}, True),  # a default whose parts are defaults
        ({"queue": "a"}, {"queue": "a", "page": {"size": 21}}, False),
        ({"queue": "a"}, {"queue": "A"}, False),
    ],
)
def test_schema_forgives_defaults_and_nulls(wanted: Any, called: Any, same: bool) -> None:
    assert equal(wanted, called, DEFAULTS, "schema") is same
    assert equal(called, wanted, DEFAULTS, "schema") is same
    assert equal(wanted, called, DEFAULTS, "case_insensitive") is (same or called == {"queue": "A"})
    assert not equal(wanted, called, DEFAULTS, "exact")


def test_defaults_inside_of_defaults() -> None:
    """Whatever is left out at any depth, it is the same call."""
    c = {"type": "integer", "default": 1}
    b = {"type": "object", "properties": {"c": c}, "default": {"c": 1}}
    schema = tool({"a": {"type": "object", "properties": {"b": b}, "default": {"b": {"c": 1}}}})
    same = [{}, {"a": {}}, {"a": {"b": {}}}, {"a": {"b": {"c": 1}}}]
    assert all(equal(one, other, schema, "schema") for one in same for other in same)
    assert not equal({}, {"a": {"b": {"c": 2}}}, schema, "schema")


def test_null_is_a_value_where_openapi_says_nullable() -> None:
    for nullable in (True, False):
        schema = tool({"note": {"type": "string", "nullable": nullable}})
        assert equal({}, {"note": None}, schema, "schema") is not nullable


def test_the_last_tool_of_a_name_counts() -> None:
    tools = [tool({"x": {"type": "integer", "default": n}}) for n in (1, 2)]
    said = [score_tool_calls(answer(("f", {})), answer(("f", {"x": n})), tools, "schema")[1].value for n in (1, 2)]
    assert said == [0.0, 1.0]


def test_a_required_argument_has_no_default() -> None:
    schema = tool({"limit": {"type": "integer", "default": 10}}, required=("limit",))
    assert not equal({"limit": 10}, {}, schema, "schema")


def test_case_insensitive_folds_strings_but_no_names() -> None:
    schema = tool({"unit": {"type": "string", "default": "Celsius"}, "tags": {"type": "array", "uniqueItems": True}})
    assert equal({"q": "New  York"}, {"q": " new york\n"}, schema, "case_insensitive")
    assert equal({"q": "Straße"}, {"q": "STRASSE"}, schema, "case_insensitive")
    assert equal({}, {"unit": "CELSIUS"}, schema, "case_insensitive")
    assert equal({"tags": ["b", "A"]}, {"tags": ["a", "B"]}, schema, "case_insensitive")
    assert not equal({"Q": "a"}, {"q": "a"}, schema, "case_insensitive")
    assert not equal({"q": "newyork"}, {"q": "new york"}, schema, "case_insensitive")
    no_schema = score_tool_calls(answer(("f", {"q": "A"})), answer(("f", {"q": "a"})), (), "case_insensitive")
    assert no_schema[1].value == 1.0
    other_name = score_tool_calls(answer(("f", {})), answer(("F", {})), (), "case_insensitive")
    assert other_name[0].value == 0.0


def test_parallel_calls_match_under_the_policy_too() -> None:
    reference = answer(("f", {"queue": "a"}), ("f", {"queue": "b"}))
    predicted = answer(("f", {"queue": "b", "limit": 10}), ("f", {"queue": "a", "note": None}))
    assert score_tool_calls(reference, predicted, [DEFAULTS], "schema")[1].value == 1.0
    twice = answer(("f", {"queue": "a", "limit": 10}), ("f", {"queue": "a"}))
    assert score_tool_calls(reference, twice, [DEFAULTS], "schema")[1].value == 0.0


def test_case_insensitive_takes_no_notice_of_how_unicode_is_written() -> None:
    schema = tool({})
    for one, other in (("Café", "CAFE\u0301"), ("ﬁne", "fine"), ("１２", "12")):
        assert equal({"q": one}, {"q": other}, schema, "case_insensitive")
        assert not equal({"q": one}, {"q": other}, schema, "schema")
    assert not equal({"q": "café"}, {"q": "cafe"}, schema, "case_insensitive")


# ── schemas that do harm ──────────────────────────────────────────────────────────────────────────────────────────────

TREE = {"type": "object", "properties": {"child": {"$ref": "#/$defs/n"}, "tags": {"uniqueItems": True}}}
DOUBLING: dict[str, Any] = {f"n{i}": {"anyOf": [{"$ref": f"#/$defs/n{i + 1}"}] * 2} for i in range(60)}
RECURSIVE: dict[str, dict[str, Any]] = {
    "tree": tool({"x": {"$ref": "#/$defs/n"}}, **{"$defs": {"n": TREE}}),
    "default of itself": tool(
        {"child": {"$ref": "#", "default": {"child": {}}}, "tags": {"uniqueItems": True}},
    ),
    "reference to itself": tool({"x": {"$ref": "#/$defs/a"}}, **{"$defs": {"a": {"$ref": "#/$defs/a"}}}),
    "branch to itself": tool({"x": {"$ref": "#/$defs/a"}}, **{"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}}}),
    "doubling": tool({"x": {"$ref": "#/$defs/n0"}}, **{"$defs": {**DOUBLING, "n60": {"type": "integer"}}}),
    "nowhere": tool({"x": {"$ref": "#/$defs/none"}, "y": {"$ref": "http://a/b"}, "z": {"$ref": 3}}),
    "no schema": tool({"x": 7, "y": {"type": {"a": 1}}}, required=(["x"],)),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("schema", RECURSIVE.values(), ids=RECURSIVE.keys())
@pytest.mark.parametrize("strictness", POLICIES)
def test_no_schema_runs_away_or_raises(schema: dict[str, Any], strictness: Strictness) -> None:
    nested: Any = {"tags": [1, 2]}
    other: Any = {"tags": [2, 1]}
    for _ in range(40):
        nested, other = {"child": nested}, {"child": other}
    started = time.process_time()
    for wanted, called in (({"x": nested}, {"x": other}), (nested, other), ({"x": "a"}, {"x": "b", "y": None})):
        equal(wanted, called, schema, strictness)
    assert time.process_time() - started < 1


def test_a_recursive_schema_reaches_as_deep_as_the_value() -> None:
    wanted, called = ({"x": {"child": {"child": {"tags": tags}}}} for tags in ([1, 2], [2, 1]))
    assert equal(wanted, called, RECURSIVE["tree"])
    assert not equal(wanted, {"x": {"child": {"tags": [2, 1]}}}, RECURSIVE["tree"])


def test_a_default_of_itself_leaves_the_rest_of_the_schema_in_force() -> None:
    """It must end, and not by giving the schema up: the tags are a set still."""
    schema = RECURSIVE["default of itself"]
    assert equal({"child": {}, "tags": [1, 2]}, {"child": {}, "tags": [2, 1]}, schema, "schema")
    assert equal({"tags": [1, 2]}, {"child": {"child": {}}, "tags": [2, 1]}, schema, "schema")


def test_defaults_inside_of_defaults_are_read_once() -> None:
    """A default with ten properties of its own kind, each with the same default: read anew each time, it never ends."""
    names = [f"p{i}" for i in range(10)]
    node = {"properties": {name: {"$ref": "#", "default": {key: {} for key in names}} for name in names}}
    schema = tool({**node["properties"], "tags": {"uniqueItems": True}})
    started = time.process_time()
    assert equal({"p0": {}, "tags": [1, 2]}, {"p0": {}, "tags": [2, 1]}, schema, "schema")
    assert time.process_time() - started < 1


def test_what_was_read_before_does_not_count() -> None:
    """A default of itself reaches the others as they are written, and they are not taken for that afterwards."""
    own = {"$ref": "#"}
    x, y = {**own, "default": {"y": {}}}, {**own, "default": {"n": 1}}
    schema = tool({"z": {**own, "default": {"z": {}, "x": {}}}, "x": x, "y": y, "n": {"default": 1}})
    assert equal({}, {"x": {}}, schema, "schema")
    assert equal({"z": {"n": 5}}, {"z": {"n": 5}, "x": {}}, schema, "schema")


def test_a_reference_back_to_where_it_came_from_does_not_rule_a_branch_out() -> None:
    unique = {"type": "array", "uniqueItems": True, "allOf": [{"$ref": "#/$defs/a"}]}
    schema = tool({"x": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/a"}]}}, **{"$defs": {"a": unique}})
    assert equal({"x": [1, 2]}, {"x": [2, 1]}, schema)


def test_calls_are_compared_without_a_schema_that_is_none() -> None:
    """It costs the tool what its schema would have forgiven, and neither its strictness nor another tool's schema."""
    broken = tool({"q": {"anyOf": [{"type": {}}]}, "n": {"default": 1}}, name="broken")
    good = tool({"n": {"default": 1}}, name="good")
    wanted = answer(("broken", {"q": ["a"]}), ("good", {}))
    cases: list[tuple[Strictness, Any, float]] = [
        ("schema", {"q": ["a"]}, 1.0),
        ("schema", {"q": ["A"]}, 0.0),
        ("schema", {"q": ["a"], "n": 1}, 0.0),
        ("case_insensitive", {"q": ["A"]}, 1.0),
    ]
    for strictness, arguments, right in cases:
        called = answer(("broken", arguments), ("good", {"n": 1}))
        assert score_tool_calls(wanted, called, [broken, good], strictness)[1].value == right


def test_a_tool_that_is_none_is_passed_over() -> None:
    reference = answer(("f", {"a": [1, 2]}))
    for tools in (
        [{}],
        [{"function": None}],
        [{"function": {"name": "f"}}],
        [{"function": {"name": "f", "parameters": 1}}],
    ):
        assert score_tool_calls(reference, answer(("f", {"a": [2, 1]})), tools)[1].value == 0.0
        assert score_tool_calls(reference, reference, tools)[1].value == 1.0


# ── properties ────────────────────────────────────────────────────────────────────────────────────────────────────────

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([1.0, 0.5, 2.0**60]),
    st.sampled_from(["a", "A", "", "1"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["x", "y", "z"]), inner, max_size=3)
    ),
    max_leaves=8,
)
ARGUMENTS = st.dictionaries(st.sampled_from(["x", "y", "z"]), VALUES, max_size=3)
SCHEMAS = st.recursive(
    st.sampled_from([{}, True, {"type": "string"}, {"type": "integer", "default": 1}, {"type": "null"}, {"$ref": "#"}]),
    lambda inner: st.one_of(
        st.fixed_dictionaries({"type": st.just("array"), "items": inner, "uniqueItems": st.booleans()}),
        st.fixed_dictionaries({"anyOf": st.lists(inner, min_size=1, max_size=2)}),
        st.fixed_dictionaries(
            {
                "properties": st.dictionaries(st.sampled_from(["x", "y"]), inner),
                "default": st.sampled_from([{}, 1, None]),
            }
        ),
    ),
    max_leaves=5,
)
TOOLS = st.dictionaries(st.sampled_from(["x", "y"]), SCHEMAS).map(tool)


def _independent(a: Any, b: Any) -> bool:
    """Equal JSON, said another way than by a normal form."""
    if isinstance(a, bool) or isinstance(b, bool) or a is None or b is None:
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_independent(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_independent, a, b))
    return bool(a == b)


@settings(deadline=None, max_examples=60)
@given(ARGUMENTS, ARGUMENTS)
def test_exact_without_a_schema_is_equality_of_json(a: Any, b: Any) -> None:
    assert scores(answer(("f", a)), answer(("f", b))) == (1, float(_independent(a, b)))


@settings(deadline=None, max_examples=60)
@given(ARGUMENTS, TOOLS, st.randoms())
def test_writing_it_otherwise_changes_nothing(arguments: Any, schema: dict[str, Any], random: Any) -> None:
    def otherwise(value: Any) -> Any:
        if isinstance(value, dict):
            keys = list(value)
            random.shuffle(keys)
            return {key: otherwise(value[key]) for key in keys}
        if isinstance(value, list):
            return [otherwise(item) for item in value]
        return float(value) if type(value) is int else value

    before = copy.deepcopy(schema)
    for strictness in POLICIES:
        assert equal(arguments, read_arguments(json.dumps(otherwise(arguments))), schema, strictness)
    assert schema == before


@settings(deadline=None, max_examples=60)
@given(ARGUMENTS, ARGUMENTS, ARGUMENTS, TOOLS)
def test_each_policy_is_an_equivalence_and_forgives_more(a: Any, b: Any, c: Any, schema: dict[str, Any]) -> None:
    said = [equal(a, b, schema, strictness) for strictness in POLICIES]
    assert said == sorted(said)  # whatever a stricter policy accepts, a looser one does
    for strictness in POLICIES:
        assert equal(a, b, schema, strictness) is equal(b, a, schema, strictness)
        if equal(a, b, schema, strictness) and equal(b, c, schema, strictness):
            assert equal(a, c, schema, strictness)


@settings(deadline=None, max_examples=60)
@given(st.lists(ARGUMENTS, max_size=4), st.randoms())
def test_the_order_of_calls_does_not_count(calls: list[Any], random: Any) -> None:
    shuffled = [*calls]
    random.shuffle(shuffled)
    assert scores(answer(*(("f", c) for c in calls)), answer(*(("f", c) for c in shuffled))) == (1, 1)
    if calls:
        assert scores(answer(*(("f", c) for c in calls)), answer(*(("f", c) for c in calls[1:]))) == (0, 0)
