"""The toolbox: the verdict of JSON Schema, in words that can be read, whatever the tools and the arguments are."""

from __future__ import annotations

import json
import pickle
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flywheel_ray.toolbox import MAX_PATTERN_TEXT, MAX_REASON, Fault, Toolbox, tools_id
from tests.values import TOOL

DRAFT_4 = "http://json-schema.org/draft-04/schema#"
DRAFT_7 = "http://json-schema.org/draft-07/schema#"
DRAFT_2019 = "https://json-schema.org/draft/2019-09/schema"


def tool(parameters: Any = None, name: str = "f", **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **function}}


def box(parameters: Any) -> Toolbox:
    return Toolbox([tool(parameters)])


def a_is(**schema: Any) -> dict[str, Any]:
    """Parameters whose property `a` has a schema."""
    return {"type": "object", "properties": {"a": schema}}


def reason(parameters: Any, arguments: Any) -> str:
    found = box(parameters).fault("f", arguments)
    assert found is not None and found.kind == "schema_violation" and len(found.reason) <= MAX_REASON
    return found.reason


def nested(levels: int, leaf: Any = None) -> Any:
    for _ in range(levels):
        leaf = {"a": leaf}
    return leaf


# ── faults and their words ──────────────────────────────────────────────────


def test_a_call_that_fits_has_no_fault() -> None:
    toolbox = Toolbox([TOOL])
    assert toolbox.fault("route", {"queue": "card_arrival"}) is None
    assert toolbox.fault("route", {"queue": "cash"}) == Fault(
        kind="schema_violation",
        reason='route: arguments.queue: "cash" is not one of ["card_arrival", "pin_blocked", "transfer_fee_charged"]',
    )
    assert toolbox.names == ("route",) and toolbox.tools == (TOOL,) and not toolbox.unusable


def test_a_tool_that_was_not_offered() -> None:
    unknown = Toolbox([TOOL, tool(name="pay")]).fault("transfer", {})
    assert unknown == Fault(kind="unknown_tool", reason='"transfer" is not among the request\'s tools ["route", "pay"]')
    many = Toolbox([tool(name=f"t{i}") for i in range(100)]).fault("x", {})
    assert many and many.reason.endswith('["t0", "t1", "t2", "t3", "t4", …]')
    nothing = Toolbox([]).fault("route", {})
    assert nothing and nothing.reason == '"route" is not known: the request has no tools'


@pytest.mark.parametrize("name", ["route", "transfer"])
def test_text_is_malformed_whatever_the_tool(name: str) -> None:
    assert Toolbox([TOOL]).fault(name, '{"queue": ') == Fault(
        kind="malformed_arguments", reason=f'{name}: arguments are not a JSON object: "{{\\"queue\\": "'
    )


@pytest.mark.parametrize(
    ("schema", "value", "expected"),
    [
        ({"type": "string"}, 7, "7 is not of type string"),
        ({"type": ["string", "null"]}, 7, "7 is not of type null or string"),
        ({"enum": list("abcdefg")}, "x", '"x" is not one of ["a", "b", "c", "d", "e", …]'),
        ({"const": "b"}, "x", '"x" is not "b"'),
        ({"maximum": 10**30}, 10**31, f"1{'0' * 31} fails maximum 1{'0' * 30}"),
        ({"pattern": "^[A-Z]+$"}, "abc", '"abc" fails pattern "^[A-Z]+$"'),
        ({"minItems": 2}, [1], "[1] fails minItems 2"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, 3, "3 fails anyOf"),
        ({"not": {}}, None, "null fails not"),
        (False, None, "null is not allowed"),
    ],
)
def test_the_reason_names_the_path_and_what_was_expected(schema: Any, value: Any, expected: str) -> None:
    assert reason({"properties": {"a": schema}}, {"a": value}) == f"f: arguments.a: {expected}"


def test_the_reason_names_properties_that_are_missing_or_unexpected() -> None:
    parameters = {**a_is(type="array", items={"required": ["id"], "additionalProperties": {"type": "string"}})}
    assert reason(parameters, {"a": [{"id": "x"}, {}]}) == 'f: arguments.a[1]: "id" is missing'
    assert reason(parameters, {"a": [{"id": 1}]}) == "f: arguments.a[0].id: 1 is not of type string"
    closed = {**a_is(), "additionalProperties": False}
    assert reason(closed, {"a": 1, "b": 2}) == 'f: arguments: "b" is not among the properties'


@pytest.mark.parametrize("schema", [{"type": "integer"}, {"enum": [1]}, {"pattern": "^x"}, {"const": 1}])
def test_reasons_are_short_and_cut_logged_values(schema: dict[str, Any]) -> None:
    private = "call me at " + "1" * 30 + " or SECRET" * 1000
    for found in (
        box(a_is(**schema)).fault("f", {"a": private}),
        box({"additionalProperties": schema}).fault("f", {private: private}),
        box({}).fault("f", private),
        box({}).fault(private, {}),
    ):
        assert found and len(found.reason) <= MAX_REASON and found.reason.count("SECRET") <= 3


def test_reasons_name_no_lone_surrogates() -> None:
    for found in (
        box(a_is(type="integer")).fault("f", {"a": "\ud83d"}),
        box({"properties": {}, "additionalProperties": False}).fault("f", {"\ud83d": 1}),
        box({}).fault("\ud83d", {}),
        box({}).fault("f", "\ud83d"),
    ):
        assert found and "\ufffd" in found.reason
        found.reason.encode()


# ── what the tools may say ──────────────────────────────────────────────────


@pytest.mark.parametrize(
    "function", [{"name": "f"}, {"name": "f", "parameters": None}, {"name": "f", "parameters": {}}]
)
def test_a_tool_without_parameters_takes_any_object(function: dict[str, Any]) -> None:
    toolbox = Toolbox([{"type": "function", "function": function}])
    assert toolbox.fault("f", {}) is None and toolbox.fault("f", {"a": [1]}) is None
    assert not toolbox.unusable


def test_the_last_tool_of_a_name_counts() -> None:
    toolbox = Toolbox([tool(a_is(type="string")), tool(name="g"), tool(a_is(type="integer"))])
    assert toolbox.names == ("f", "g")
    assert toolbox.fault("f", {"a": 1}) is None and toolbox.fault("f", {"a": "x"})


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "integer"}, 1.0),
        ({"enum": [1]}, 1.0),
        ({"format": "email"}, "no address"),
        ({"format": "date", "$schema": DRAFT_7}, "yesterday"),
        ({"contentEncoding": "base64", "contentMediaType": "application/json"}, "no base64"),
        ({"type": ["string", "null"]}, None),
        ({"multipleOf": 0.01}, 19.99),
        ({"maximum": 10**400}, 10**399),
    ],
)
@pytest.mark.parametrize("draft", [DRAFT_7, DRAFT_2019, None])
def test_values_that_fit(schema: dict[str, Any], value: Any, draft: str | None) -> None:
    parameters = {**a_is(**schema), **({"$schema": draft} if draft else {})}
    toolbox = box(parameters)
    assert toolbox.fault("f", {"a": value}) is None and not toolbox.unusable


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "string", "nullable": True}, None),  # OpenAPI's
        ({"type": "integer"}, True),
        ({"enum": [1]}, True),
        ({"type": "number"}, "1"),
        ({"maximum": 2**53}, 2**53 + 1),
        ({"maxLength": 1}, "日本"),
        ({"uniqueItems": True}, [{"a": 1, "b": 2}, {"b": 2, "a": 1}]),
    ],
)
def test_values_that_do_not_fit(schema: dict[str, Any], value: Any) -> None:
    assert reason(a_is(**schema), {"a": value})


def test_strict_adds_nothing_to_the_schema() -> None:
    toolbox = Toolbox([tool(a_is(type="string"), strict=True)])
    assert toolbox.fault("f", {}) is None and toolbox.fault("f", {"b": 1}) is None


def test_the_draft_is_the_one_that_the_schema_names() -> None:
    exclusive = a_is(minimum=3, exclusiveMinimum=True)  # a number since draft 6
    assert reason({**exclusive, "$schema": DRAFT_4}, {"a": 3})
    assert "exclusiveMinimum" in box(exclusive).unusable["f"]
    pairs = a_is(items=[{"type": "string"}, {"type": "integer"}])  # prefixItems since 2020-12
    assert reason({**pairs, "$schema": DRAFT_7}, {"a": ["x", "y"]}) == 'f: arguments.a[1]: "y" is not of type integer'
    assert box(pairs).unusable


@pytest.mark.parametrize(
    ("parameters", "why"),
    [
        ("object", 'parameters are not an object: "object"'),
        ([], "parameters are not an object: []"),
        (a_is(type="dict"), 'parameters.properties.a.type: "dict" is not valid under any of the schemas'),
        (a_is(type="string", required=True), 'parameters.properties.a.required: true is not of type "array"'),
        ({"properties": ["a"]}, 'parameters.properties: ["a"] is not of type "object"'),
        (a_is(pattern="("), 'parameters.properties.a.pattern: "(" is not a pattern that is sure to be matched in'),
        (a_is(pattern=r"(a*)*\1b"), r'parameters.properties.a.pattern: "(a*)*\\1b" is not a pattern'),
        (a_is(pattern="^(?=a)(a+)+$"), "parameters.properties.a.pattern: "),
        (a_is(pattern="[a-z]{40000}"), "parameters.properties.a.pattern: "),
        ({"$schema": "http://json-schema.org/draft-03/schema#"}, "parameters: Unknown meta-schema: "),
        (a_is(**{"$ref": "#/$defs/none"}), '$ref leads nowhere: "#/$defs/none"'),
        (a_is(**{"$ref": "#name"}), '$ref leads out of the tool\'s schema: "#name"'),
        (a_is(**{"$id": "b"}), '$id is not supported inside of a tool\'s schema: "b"'),
        ({"$dynamicRef": "#x"}, "$dynamicRef is not supported"),
        ({"default": nested(400)}, "Recursion limit reached"),
        ({"default": nested(900)}, "parameters nest too deep"),
    ],
)
def test_calls_of_a_tool_whose_schema_is_broken_have_no_fault(parameters: Any, why: str) -> None:
    toolbox = Toolbox([tool(parameters), tool(a_is(type="integer"), name="sound")])
    assert toolbox.fault("f", {"a": 1}) is None
    assert toolbox.unusable.keys() == {"f"} and toolbox.unusable["f"].startswith(why)
    assert 0 < len(toolbox.unusable["f"]) <= MAX_REASON
    assert toolbox.fault("sound", {"a": "x"})


@pytest.mark.parametrize("tools", [[None], ["f"], [{}], [{"function": "f"}], [{"function": {"name": 7}}]])
def test_entries_that_are_no_function_are_passed_over(tools: list[Any]) -> None:
    toolbox = Toolbox([*tools, TOOL])
    assert toolbox.names == ("route",) and toolbox.fault("route", {"queue": "card_arrival"}) is None


def test_lone_surrogates_are_compared_as_records_reads_them() -> None:
    toolbox = Toolbox([tool(a_is(enum=["\ud83d", "x"]), name="f\ud83d")])
    for value in ("\ud83d", "\ufffd", "x"):
        assert toolbox.fault("f\ufffd", {"a": value}) is None
    assert toolbox.fault("f\ufffd", {"a": "\ufffd\ufffd"})


def test_arguments_that_are_not_json_are_malformed() -> None:
    calls: list[Any] = [None, [], 7, {1: 2}, {"a": {1, 2}}, {"a": object()}]
    for arguments in calls:
        found = box(a_is(pattern="x", type=["string", "object"])).fault("f", arguments)
        assert found and found.kind == "malformed_arguments"


# ── never far, never long ───────────────────────────────────────────────────


@pytest.fixture(scope="module")
def requests() -> Iterator[tuple[str, list[str]]]:
    """A server of schemas that refuse everything, and the paths it was asked for."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"not": {}}')

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()
    server.server_close()


def test_references_reach_neither_network_nor_files(requests: tuple[str, list[str]], tmp_path: Path) -> None:
    url, seen = requests
    (tmp_path / "schema.json").write_text('{"not": {}}')
    for base in (url, tmp_path.as_uri(), str(tmp_path)):
        for parameters in (
            {"$ref": f"{base}/schema.json"},
            a_is(**{"$ref": f"{base}/schema.json#/not"}),
            {"$id": f"{base}/a.json", **a_is(**{"$ref": "schema.json"})},
            {"$id": f"{base}/a.json", "properties": {"a": {"$id": "b.json", "$ref": "#/schema.json"}}},
            {"$schema": f"{base}/schema.json"},
            {"$dynamicRef": f"{base}/schema.json"},
            {"$schema": DRAFT_2019, "$recursiveRef": f"{base}/schema.json"},
            {"id": f"{base}/schema.json", "$schema": DRAFT_4, "definitions": {"a": {"$ref": "schema.json"}}},
        ):
            toolbox = box(parameters)
            assert toolbox.fault("f", {"a": 1}) is None
            assert toolbox.unusable, parameters
    assert seen == []


@pytest.mark.parametrize(
    ("pattern", "fits"), [("(a+)+$", False), ("^(a|a)*$", False), ("^(a|b|ab)*$", False), ("(.*)*(.*)*$", True)]
)
def test_patterns_take_linear_time(pattern: str, fits: bool) -> None:
    toolbox = box(a_is(pattern=pattern))
    assert (toolbox.fault("f", {"a": "a" * 50_000 + "!"}) is None) is fits
    assert not toolbox.unusable


def test_very_long_arguments_are_not_matched_against_patterns() -> None:
    toolbox = box({**a_is(pattern="^b"), "required": ["a"]})
    assert toolbox.fault("f", {"a": "a" * (MAX_PATTERN_TEXT // 2)})
    assert toolbox.fault("f", {"a": "a" * MAX_PATTERN_TEXT}) is None


def test_recursive_schemas() -> None:
    tree = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
    toolbox = box({"$id": "tree", "properties": {"a": {"anyOf": [{"type": "null"}, tree]}}, "maxProperties": 1})
    assert toolbox.fault("f", nested(100)) is None and not toolbox.unusable
    assert toolbox.fault("f", {"a": {"a": {"a": None, "b": 1}}})
    assert reason({**a_is(**{"$ref": "#"}), "required": ["b"]}, {"b": 1, "a": {"b": 2, "a": {}}}) == (
        'f: arguments.a.a: "b" is missing'
    )


@pytest.mark.parametrize(
    "parameters", [{"$ref": "#"}, {"allOf": [{"$ref": "#"}, {"$ref": "#"}]}, {"anyOf": [{"$ref": "#/anyOf/0"}]}]
)
def test_references_in_a_circle(parameters: dict[str, Any]) -> None:
    assert box(parameters).fault("f", {"a": 1}) is None


def test_recursive_branches_are_not_listed_level_by_level() -> None:
    """Three branches on 30 levels have 3³⁰ errors, and the validator keeps a list of them."""
    step = {"properties": {"a": {"$ref": "#"}}}
    branches = [{**step, "maxProperties": 0}, {**step, "required": ["z"]}, {**step, "required": ["a"]}]
    assert reason({"anyOf": branches}, nested(30, {"z0": 1})) == "f: arguments do not fit the tool's schema"


def test_many_errors_in_branches_are_not_listed_one_by_one() -> None:
    branches = [{"items": {"anyOf": [{"type": "string"}] * 50}}, {"type": "null"}]
    assert reason(a_is(anyOf=branches), {"a": [1]}) == "f: arguments.a: [1] fails anyOf"
    assert reason(a_is(anyOf=branches), {"a": [1] * 100_000}) == "f: arguments do not fit the tool's schema"


@pytest.mark.parametrize("keyword", ["anyOf", "allOf", "oneOf"])
@pytest.mark.parametrize("inner", [{}, {"unevaluatedProperties": False}])
def test_references_that_double_make_a_tool_unusable(keyword: str, inner: dict[str, Any]) -> None:
    defs: dict[str, Any] = {f"d{i}": {keyword: [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(60)}
    toolbox = box({"$ref": "#/$defs/d0", "$defs": {**defs, "d60": {"required": ["z"]}}, **inner})
    assert toolbox.fault("f", {}) is None
    assert toolbox.unusable == {"f": "its references expand to more than 10000 subschemas"}


def test_deep_arguments_and_chains_of_references() -> None:
    assert box({}).fault("f", nested(900)) is None
    toolbox = box({"additionalProperties": {"$ref": "#"}, "type": ["object", "null"]})
    assert toolbox.fault("f", nested(900)) is None and not toolbox.unusable
    assert reason({"additionalProperties": {"$ref": "#"}, "type": "object"}, nested(900)).startswith(
        "f: arguments.a.a."
    )
    assert reason({"maxProperties": 0}, nested(900)) == "f: arguments do not fit the tool's schema"
    chain = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(5000)}
    assert box({"$ref": "#/$defs/d0", "$defs": {**chain, "d5000": {}}}).fault("f", {}) is None


def test_a_huge_enum() -> None:
    options = [f"option {i}" for i in range(50_000)]
    toolbox = box(a_is(enum=options))
    assert toolbox.fault("f", {"a": options[-1]}) is None
    found = toolbox.fault("f", {"a": "none"})
    assert found and len(found.reason) < 200


# ── identity ────────────────────────────────────────────────────────────────


def test_the_id_is_the_content_of_the_list() -> None:
    turned = json.loads(json.dumps(TOOL, sort_keys=True))
    assert Toolbox([TOOL]).id == Toolbox([turned]).id == tools_id([TOOL])
    assert len(tools_id([])) == 32 and int(tools_id([]), 16) >= 0
    lists = [[], [TOOL], [TOOL, TOOL], [TOOL, tool()], [tool(), TOOL], [tool({"maximum": 1})], [tool({"maximum": 2})]]
    assert len({tools_id(tools) for tools in lists}) == len(lists)


@pytest.mark.parametrize("value", [10**30, -(2**63) - 1, "\ud83d", nested(300)])
def test_the_id_of_unusual_tools(value: Any) -> None:
    first, again, other = ([tool({"default": v}, name=n)] for v, n in ((value, "f"), (value, "f"), (value, "g")))
    assert tools_id(first) == tools_id(again) != tools_id(other)
    assert Toolbox(first).fault("f", {}) is None


def test_a_toolbox_survives_pickling() -> None:
    toolbox = Toolbox([TOOL])
    assert toolbox.fault("route", {})
    again = pickle.loads(pickle.dumps(toolbox))
    assert (again.id, again.tools, again.fault("route", {})) == (toolbox.id, toolbox.tools, toolbox.fault("route", {}))


# ── properties ──────────────────────────────────────────────────────────────

names = st.sampled_from("abc")
numbers = st.integers(-2, 3) | st.sampled_from([0.5, 1.0, 2.0, -1.5, 1e20, 10**20, 2**53 + 1])
values = st.recursive(
    st.none() | st.booleans() | numbers | st.sampled_from(["", "a", "ab", "1", "é", "😀"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=5,
)
types = st.sampled_from(["string", "number", "integer", "boolean", "null", "array", "object"])
counts = st.integers(0, 3)


def schemas_of(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """One or two keywords, with schemas inside them."""
    some = st.lists(inner, min_size=1, max_size=2)
    below = inner | st.just({"$ref": "#"})  # to the root only where it takes a step down: elsewhere it never ends
    keywords: dict[str, st.SearchStrategy[Any]] = {
        "type": types | st.lists(types, min_size=1, max_size=3, unique=True),
        "enum": st.lists(values, min_size=1, max_size=3),
        "const": values,
        "multipleOf": st.sampled_from([1, 2, 0.5]),
        "pattern": st.sampled_from(["a", "^a", "b$", "^.{1,2}$", "[0-9]"]),
        "items": below,
        "prefixItems": some,
        "properties": st.dictionaries(names, below, max_size=3),
        "patternProperties": st.dictionaries(st.sampled_from(["a", "^b", "."]), inner, min_size=1, max_size=2),
        "additionalProperties": below,
        "required": st.lists(names, max_size=2, unique=True),
        "dependentRequired": st.dictionaries(names, st.just(["c"]), max_size=2),
        "uniqueItems": st.booleans(),
        **dict.fromkeys(("contains", "not", "propertyNames", "unevaluatedProperties", "unevaluatedItems"), inner),
        **dict.fromkeys(("allOf", "anyOf", "oneOf"), some),
        **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), numbers),
        **{
            f"{bound}{what}": counts
            for bound in ("min", "max")
            for what in ("Length", "Items", "Properties", "Contains")
        },
        "$ref": st.just("#/$defs/x"),
        "nullable": st.booleans(),
        "format": st.sampled_from(["email", "date"]),
    }
    pairs = st.sampled_from(sorted(keywords)).flatmap(lambda key: st.tuples(st.just(key), keywords[key]))
    return st.lists(pairs, min_size=1, max_size=3).map(dict)


leaf_schemas = st.booleans() | st.fixed_dictionaries({"type": types})
schemas = schemas_of(leaf_schemas | schemas_of(leaf_schemas))


@settings(max_examples=150, deadline=None)
@given(schemas, leaf_schemas, st.lists(st.dictionaries(names, values, max_size=3), min_size=1, max_size=5))
def test_the_verdict_is_that_of_the_reference_implementation(
    schema: dict[str, Any], x: Any, arguments: list[dict[str, Any]]
) -> None:
    """Drafts 2020-12 of `jsonschema` and ours differ only in what these schemas leave out.

    - `multipleOf` with decimals (0.1): the reference divides binary fractions, so 0.3 is no multiple of 0.1.
    - Expressions: the reference has Python's, where $ matches before a last line end and \\d is any digit of Unicode.
    - `dependencies`: ours checks it in every draft, the reference up to draft 7 (`dependentRequired` has its place).
    - `additionalProperties` beside `unevaluatedProperties` in 2019-09: the reference forgets what it has evaluated.
    - A `$ref` that leads nowhere, and one that leads to itself without a step down: ours finds them before any call.
    """
    parameters = {**schema, "$defs": {"x": x}}
    toolbox = box(parameters)
    reference = jsonschema.Draft202012Validator(parameters)
    assert not toolbox.unusable
    for instance in arguments:
        assert (toolbox.fault("f", instance) is None) is reference.is_valid(instance)


any_text = st.text(st.characters(exclude_categories=()), max_size=12)  # with lone surrogates
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text | st.sampled_from(["string", "#", "^a"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "properties", "items", "$ref", "enum", "pattern", "a"]), inner)
    ),
    max_leaves=10,
)


@settings(max_examples=150, deadline=None)
@given(any_json, any_text, st.dictionaries(st.just("a") | any_text, any_json, max_size=3) | any_text)
def test_whatever_the_schema_and_the_call_there_is_an_answer(parameters: Any, name: str, arguments: Any) -> None:
    toolbox = Toolbox([tool(parameters, name=name)])
    for found in (toolbox.fault(toolbox.names[0], arguments), toolbox.fault(name, arguments)):
        assert found is None or 0 < len(found.reason) <= MAX_REASON
        assert found is None or found.reason.encode()
    assert all(0 < len(why) <= MAX_REASON and why.encode() for why in toolbox.unusable.values())
