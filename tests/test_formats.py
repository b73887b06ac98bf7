"""Row formats: values survive the way there and back, and rows are what their destinations take."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flywheel_ray.datasets import Example
from flywheel_ray.errors import DatasetError
from flywheel_ray.formats import FORMATS, json_line
from flywheel_ray.records import Completion, ToolCall, read_arguments
from flywheel_ray.splits import SPLITS

NAMES = sorted(FORMATS)
CHAT = sorted(FORMATS.keys() - {"flywheel"})
EVERY_ROW: list[tuple[str, Any]] = [(name, split) for name in NAMES for split in ("train", "eval")]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather now.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME: dict[str, Any] = {"type": "function", "function": {"name": "get_time"}}

# ── examples ──────────────────────────────────────────────────────────────────────────────────────────────────────────

numbers = st.integers() | st.integers(-(2**80), 2**80) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(st.text(max_size=5), values, max_size=4)
malformed = st.text(min_size=1, max_size=12).filter(lambda text: isinstance(read_arguments(text), str))
names = st.from_regex(r"[a-zA-Z0-9_-]{1,12}", fullmatch=True)
words = st.text(max_size=20)
functions = st.builds(
    lambda name, about, parameters: {"type": "function", "function": {"name": name} | about | parameters},
    names,
    st.just({}) | st.builds(lambda text: {"description": text}, words),
    st.just({}) | st.builds(lambda p: {"parameters": {"type": "object", "properties": p, "required": [*p]}}, objects),
)
references = st.builds(
    Completion,
    text=words,
    tool_calls=st.lists(st.builds(ToolCall, name=names, arguments=objects | malformed), max_size=3).map(tuple),
    finish_reason=st.sampled_from([None, "stop", "tool_calls"]),
    latency_s=st.none() | st.floats(0, 100),
)
user_turns = st.builds(
    lambda text, name: [{"role": "user", "content": text} | ({"name": name} if name else {})], words, st.none() | names
)
text_turns = st.builds(lambda text: [{"role": "assistant", "content": text}], words)


@st.composite
def call_turns(draw: st.DrawFn) -> list[dict[str, Any]]:
    """The assistant calls tools, side by side perhaps, and each answers: as datasets hold it."""
    said = draw(words)
    arguments = draw(st.lists(objects.map(lambda a: json.dumps(a, ensure_ascii=False)) | malformed, min_size=1))
    ids = [f"call_1_{n}" for n in range(len(arguments))]
    calls = [
        {"id": id, "type": "function", "function": {"name": draw(names), "arguments": text}}
        for id, text in zip(ids, arguments, strict=True)
    ]
    asked = {"role": "assistant", "content": said or None, "tool_calls": calls}
    return [asked, *({"role": "tool", "tool_call_id": id, "content": draw(words)} for id in ids)]


@st.composite
def examples(draw: st.DrawFn, turns: Any = None) -> Example:
    opening = draw(st.sampled_from([None, "system", "developer"]))
    history = draw(st.lists(user_turns | text_turns | call_turns() if turns is None else turns, min_size=1, max_size=4))
    messages = [{"role": opening, "content": draw(words)}] if opening else []
    return Example(
        id=draw(st.uuids()).hex,
        conversation="c0ffee",
        timestamp=draw(st.floats(1e9, 2e9)),
        messages=(*messages, *(turn for turns in history for turn in turns)),
        tools=tuple(draw(st.lists(functions, max_size=3))),
        reference=draw(references),
    )


def carried(example: Example, name: str) -> dict[str, Any]:
    """What a format has to bring back, said without it: the documented changes, and everything else as it was."""
    if name == "flywheel":
        return example.model_dump()
    messages = []
    for message in example.messages:
        expected = {**message, "role": {"developer": "system"}.get(message["role"], message["role"])}
        if name in ("nemo_customizer", "helix"):
            expected.pop("name", None)
        if "tool_calls" in expected:
            functions = [call["function"] for call in message["tool_calls"]]
            arguments = [read_arguments(f["arguments"]) for f in functions]
            expected["tool_calls"] = [(c["id"], c["function"]["name"]) for c in message["tool_calls"]]
            expected["arguments"] = arguments
        messages.append(expected)
    tools = [dict(tool["function"]) for tool in example.tools]
    if name == "helix":
        tools = [{"description": "", "parameters": {"type": "object", "properties": {}}} | tool for tool in tools]
    return {
        "messages": messages,
        "tools": tools,
        "text": example.reference.text,
        "calls": [(call.name, call.arguments) for call in example.reference.tool_calls],
    }


SILENT = {"role": "assistant", "content": " "}
ASKING = {"role": "user", "content": "And in Rome?"}


def example(*history: dict[str, Any], tools: tuple[dict[str, Any], ...] = (), **reference: Any) -> Example:
    return Example(
        id="e1",
        conversation="c1",
        timestamp=1_755_000_000.0,
        messages=history or ({"role": "user", "content": "Weather in Paris?"},),
        tools=tools,
        reference=Completion(**(reference or {"text": "Sunny."})),
    )


def calling(name: str = "get_weather", arguments: Any = None) -> dict[str, Any]:
    return {"tool_calls": (ToolCall(name=name, arguments={"city": "Paris"} if arguments is None else arguments),)}


AGENT: tuple[dict[str, Any], ...] = (
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": "Weather in Paris?", "name": "kim"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "call_2_0",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city":"Paris"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_2_0", "content": "sunny"},
)


# ── there and back ────────────────────────────────────────────────────────────────────────────────────────────────────


@settings(deadline=None, max_examples=40)
@given(examples())
def test_a_row_comes_back_from_json(before: Example) -> None:
    for name, split in EVERY_ROW:
        line = json_line(FORMATS[name].to_row(before, split))
        after = FORMATS[name].from_row(json.loads(line))
        assert (name, split, carried(after, name)) == (name, split, carried(before, name))


@settings(deadline=None, max_examples=12)
@given(st.lists(examples(), max_size=3))
def test_rows_come_back_from_parquet(before: list[Example]) -> None:
    rows = FORMATS["huggingface"]
    file = io.BytesIO()
    assert rows.write(map(rows.to_row, before), file) == len(before)
    read = list(rows.read(io.BytesIO(file.getvalue())))
    assert read == [json.loads(json_line(rows.to_row(e))) for e in before]
    after = [rows.from_row(row) for row in read]
    assert [carried(e, "huggingface") for e in after] == [carried(e, "huggingface") for e in before]
    assert [(e.id, e.conversation, e.timestamp) for e in after] == [(e.id, e.conversation, e.timestamp) for e in before]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_lost_is_said(name: str) -> None:
    figures: dict[str, Any] = {"finish_reason": "stop", "latency_s": 1.5, "prompt_tokens": 7, "completion_tokens": 3}
    reference = Completion(text="a", **calling(), reasoning="hm", refused=True, **figures)
    whole = {"tool_choice": "auto", "faults": ("no such tool",), "tools": (WEATHER,), "reference": reference}
    before = example().model_copy(update=whole)
    assert all(value is not None and value != () for part in (before, reference) for _, value in part)
    after = FORMATS[name].from_row(FORMATS[name].to_row(before))
    lost = [field for field, value in before if field != "reference" and getattr(after, field) != value]
    lost += [f"reference.{field}" for field, value in reference if getattr(after.reference, field) != value]
    assert tuple(lost) == FORMATS[name].lost


spoken = st.text("ab é\u2028", min_size=1, max_size=9).filter(str.strip)


@settings(deadline=None, max_examples=30)
@given(examples(user_turns | spoken.map(lambda text: [{"role": "assistant", "content": text}])), spoken)
def test_rows_of_sound_examples_pass(asked: Example, text: str) -> None:
    for answer in (calling(), {"text": text}):
        sound = asked.model_copy(update={"reference": Completion(**answer), "tools": (WEATHER,)})
        for name, split in EVERY_ROW:
            assert (name, split, FORMATS[name].check(FORMATS[name].to_row(sound, split))) == (name, split, None)


@settings(deadline=None, max_examples=60)
@given(examples(), st.sampled_from(EVERY_ROW), values, st.data())
def test_a_row_that_passes_can_be_read(whole: Example, which: Any, anything: Any, data: st.DataObject) -> None:
    """Whatever JSON stands anywhere in a row: `check` says so, or it makes no difference to reading it."""
    rows = FORMATS[which[0]]
    row = json.loads(json_line(rows.to_row(whole, which[1])))
    at: Any = row
    while True:
        key = data.draw(st.sampled_from([*at] if isinstance(at, dict) else range(len(at))))
        if not isinstance(at[key], dict | list) or not at[key] or data.draw(st.integers(0, 3)) == 0:
            break
        at = at[key]
    at[key] = anything
    fault = rows.check(row)
    try:
        rows.from_row(row)
    except DatasetError as error:
        assert fault, error


# ── what stands in a row ──────────────────────────────────────────────────────────────────────────────────────────────


def test_openai() -> None:
    """As in OpenAI's guide: arguments are text, and who only calls has no content. The history is not taught again."""
    history = {"id": "call_2_0", "type": "function", "function": AGENT[2]["tool_calls"][0]["function"]}
    answer = {"id": "call_0", "type": "function", "function": {"name": "get_time", "arguments": '{"tz": "CET"}'}}
    row = FORMATS["openai"].to_row(example(*AGENT, tools=(WEATHER, TIME), **calling("get_time", {"tz": "CET"})))
    assert row == {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Weather in Paris?", "name": "kim"},
            {"role": "assistant", "tool_calls": [history], "weight": 0},
            {"role": "tool", "content": "sunny", "tool_call_id": "call_2_0"},
            {"role": "assistant", "tool_calls": [answer]},
        ],
        "tools": [WEATHER, TIME],
    }
    assert FORMATS["openai"].check(row) is None
    assert "tools" not in FORMATS["openai"].to_row(example())
    nothing = {**history, "function": {"name": "get_time", "arguments": ""}}
    asked = {"role": "assistant", "content": None, "tool_calls": [nothing]}
    turn, _ = FORMATS["openai"].to_row(example(asked))["messages"]
    assert turn["tool_calls"][0]["function"]["arguments"] == "{}"


def test_nemo_customizer() -> None:
    """The Customizer takes objects and no nulls; the Evaluator asks with texts and compares with objects."""
    calls = [
        {"id": "call_2_0", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
    ]
    answer = {"id": "call_0", "type": "function", "function": {"name": "get_time", "arguments": {}}}
    agent = example(*AGENT, tools=(TIME,), **calling("get_time", {}))
    rows = FORMATS["nemo_customizer"]
    train: dict[str, Any] = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Weather in Paris?"},
            {"role": "assistant", "content": "", "tool_calls": calls},
            {"role": "tool", "content": "sunny", "tool_call_id": "call_2_0"},
            {"role": "assistant", "content": "", "tool_calls": [answer]},
        ],
        "tools": [TIME],
    }
    assert rows.to_row(agent) == rows.to_row(agent, "validation") == train
    asked = [*train["messages"][:2], {"role": "assistant", "content": "", "tool_calls": AGENT[2]["tool_calls"]}]
    assert rows.to_row(agent, "eval") == {
        "id": "e1",
        "request": {"messages": [*asked, train["messages"][3]], "tools": [TIME]},
        "response": {"choices": [{"index": 0, "message": train["messages"][4]}]},
    }
    assert rows.from_row(rows.to_row(agent, "eval")).id == "e1"


def test_helix() -> None:
    """Its trainer wants every function described; its evaluator reads through Arrow and gets nothing but texts."""
    rows = FORMATS["helix"]
    row = rows.to_row(example(tools=(WEATHER, TIME), **calling()))
    described = {"name": "get_time", "description": "", "parameters": {"type": "object", "properties": {}}}
    assert row["tools"] == [WEATHER, {"type": "function", "function": described}]
    assert rows.check(row) is None
    row = rows.to_row(example(*AGENT, ASKING, tools=(WEATHER,), text="It is sunny."), "eval")
    assert all(isinstance(text, str) for text in row.values())
    assert rows.check(row) is None
    assert row["question"] == "And in Rome?" and row["expected_text"] == "It is sunny."
    assert json.loads(row["messages_json"])[2]["tool_calls"] == AGENT[2]["tool_calls"]
    assert json.loads(rows.to_row(example(**calling()), "eval")["expected_json"])[0]["function"] == {
        "name": "get_weather",
        "arguments": {"city": "Paris"},
    }


def test_huggingface() -> None:
    row = FORMATS["huggingface"].to_row(example(**calling()))
    assert row["tools"] is None  # an empty list would have some chat templates announce tools
    assert row["messages"][-1]["tool_calls"][0]["function"]["arguments"] == {"city": "Paris"}
    assert (row["id"], row["conversation"], row["timestamp"]) == ("e1", "c1", 1_755_000_000.0)
    widest = FORMATS["huggingface"].to_row(example(**calling("f", {"n": [2**64 - 1, -(2**63)]})))
    assert FORMATS["huggingface"].check(widest) is None


def test_flywheel_rows_stand_for_themselves() -> None:
    row = FORMATS["flywheel"].to_row(example(tools=(WEATHER,), **calling()))
    assert row["tools"] == [WEATHER]
    assert row["reference"] == {"tool_calls": [{"name": "get_weather", "arguments": {"city": "Paris"}}]}


def test_a_line_stays_one_line() -> None:
    """Python's `splitlines` knows more ends of lines than JSON does, and NeMo's trainer reads by it."""
    text = "a\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029b é"
    assert json_line({"a": text}).decode().splitlines(keepends=True) == [json_line({"a": text}).decode()]
    assert json.loads(json_line({"a": text})) == {"a": text}
    assert "é".encode() in json_line({"a": text})
    with pytest.raises(ValueError, match="Out of range float"):
        json_line({"a": float("nan")})


def test_files() -> None:
    assert list(FORMATS) == ["flywheel", "openai", "nemo_customizer", "helix", "huggingface"]
    assert FORMATS["openai"].files() == {f"{split}.jsonl": split for split in SPLITS}
    assert FORMATS["nemo_customizer"].files() == {
        "training/train_data.jsonl": "train",
        "validation/val_data.jsonl": "validation",
        "eval_data.jsonl": "eval",
    }
    assert FORMATS["helix"].files({"eval", "train"}) == {"train.jsonl": "train", "eval.jsonl": "eval"}
    assert list(FORMATS["huggingface"].files()) == ["train.parquet", "validation.parquet", "eval.parquet"]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_rows(name: str) -> None:
    rows = FORMATS[name]
    wanted = [rows.to_row(example(text=text)) for text in ("a\nb", "c\u2028d", "日本")]
    file = io.BytesIO()
    assert rows.write(iter(wanted), file) == 3
    assert list(rows.read(io.BytesIO(file.getvalue()))) == wanted
    empty = io.BytesIO()
    assert rows.write([], empty) == 0
    assert list(rows.read(io.BytesIO(empty.getvalue()))) == []
    with pytest.raises(DatasetError, match=rf"^{name}: (line 1 is not JSON|no Parquet file)"):
        list(rows.read(io.BytesIO(b"{broken")))


def test_a_file_by_somebody_else() -> None:
    rows = FORMATS["openai"]
    assert list(rows.read(io.BytesIO(b'\n{"messages": []}\r\n\n'))) == [{"messages": []}]
    with pytest.raises(DatasetError, match=r"^openai: line 2 is a list, not an object\. Export the file again\.$"):
        list(rows.read(io.BytesIO(b"{}\n[]\n")))


def test_parquet_is_written_group_by_group() -> None:
    rows = FORMATS["huggingface"]
    drawn: list[int] = []

    def long() -> Any:
        for i in range(3):
            drawn.append(i)
            yield rows.to_row(example(text=f"{i}" * 9_000_000))

    class File(io.BytesIO):
        def write(self, data: Any) -> int:
            written.append(len(drawn))
            return super().write(data)

    written: list[int] = []
    file = File()
    assert rows.write(long(), file) == 3
    assert pq.ParquetFile(io.BytesIO(file.getvalue())).num_row_groups == 2
    assert 2 in written  # the first group was on its way before the third row was drawn


def test_tools_keep_their_own_arguments() -> None:
    """The trap of Arrow structs: `{"city": …, "tz": null}`."""
    rows = FORMATS["huggingface"]
    mixed = [example(**calling()), example(**calling("get_time", {"tz": "CET"})), example(**calling("stop", {}))]
    file = io.BytesIO()
    rows.write(map(rows.to_row, mixed), file)
    read = [rows.from_row(row).reference.tool_calls[0].arguments for row in rows.read(io.BytesIO(file.getvalue()))]
    assert read == [{"city": "Paris"}, {"tz": "CET"}, {}]


@pytest.mark.parametrize("name", NAMES)
def test_half_an_emoji_is_replaced(name: str) -> None:
    rows = FORMATS[name]
    file = io.BytesIO()
    rows.write([rows.to_row(example(text="\ud83d", **calling("f", {"a": "\ude00"})))], file)
    (row,) = rows.read(io.BytesIO(file.getvalue()))
    assert rows.from_row(row).reference.text == "\ufffd"
    assert rows.from_row(row).reference.tool_calls[0].arguments == {"a": "\ufffd"}


# ── what is refused ───────────────────────────────────────────────────────────────────────────────────────────────────


def changed(name: str, split: Any = "train", *, messages: Any = None, **changes: Any) -> dict[str, Any]:
    row = FORMATS[name].to_row(example(*AGENT, tools=(WEATHER,), **calling()), split)
    if messages is not None:
        row["messages"] = [*row["messages"][:-1], messages] if isinstance(messages, dict) else messages
    return {**row, **changes}


def call(arguments: Any, **changes: Any) -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": arguments}
    one = {"id": "x", "type": "function", "function": function, **changes}
    return {"role": "assistant", "content": "", "tool_calls": [one]}


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **fields}}


@pytest.mark.parametrize("name", CHAT)
@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"messages": []}, "messages is missing or empty"),
        ({"messages": ["hi"]}, "messages[0] is not an object with a role"),
        ({"messages": [ASKING]}, "messages[0].role is 'user': the last message must be the assistant's"),
        ({"messages": [ASKING, {**SILENT, "tool_calls": {}}]}, "messages[1].tool_calls is an object, not a list"),
        (
            {"messages": [ASKING, {**SILENT, "tool_calls": [{"type": "custom"}]}]},
            "messages[1].tool_calls[0] is not the",
        ),
        ({"messages": [ASKING, SILENT], "tools": {}}, "messages[1] is an answer without content and tool calls"),
        ({"messages": [ASKING, SILENT], "tools": [{"name": "f"}]}, "tools[0] is not a function with a name"),
        ({"messages": [{**ASKING, "role": "narrator"}, SILENT]}, "messages[0].role is 'narrator', not one of system"),
        ({"messages": [{"role": "user"}, SILENT]}, "messages[0].content is missing or null, not a string"),
        ({"messages": [{**ASKING, "content": []}, SILENT]}, "messages[0].content is a list, not a string"),
    ],
)
def test_no_trainer_takes(name: str, row: dict[str, Any], fault: str) -> None:
    assert str(FORMATS[name].check(row)).startswith(fault)


@pytest.mark.parametrize(
    ("name", "row", "fault"),
    [
        ("openai", changed("openai", id="e1"), "id is no field of a fine-tuning row"),
        ("openai", changed("openai", tools=[WEATHER] * 129), "tools has 129 functions, more than 128"),
        ("openai", changed("openai", tools=[{**TIME, "type": "x"}]), 'tools[0].type is not "function"'),
        (
            "openai",
            changed("openai", tools=[function(name="über")]),
            "tools[0].function.name is 'über', not 1 to 64 of a-z",
        ),
        ("openai", changed("openai", tools=[function(name="f" * 65)]), "tools[0].function.name is 'fff"),
        (
            "openai",
            changed("openai", messages=call({"a": 1})),
            "messages[4].tool_calls[0].function.arguments is an obj",
        ),
        ("openai", changed("openai", messages=call("[1]")), "messages[4].tool_calls[0].function.arguments is a string"),
        ("openai", changed("openai", messages=call("{}", id=None)), "messages[4].tool_calls[0].id is missing or null"),
        (
            "openai",
            changed("openai", messages=[AGENT[3], {"role": "assistant", "content": "a"}]),
            "messages[0].tool_call_id is 'call_2_0', the id of no call before it",
        ),
        (
            "nemo_customizer",
            changed("nemo_customizer", messages=call("{}")),
            "messages[4].tool_calls[0].function.argum",
        ),
        (
            "nemo_customizer",
            changed("nemo_customizer", messages={**call({}), "content": None}),
            "messages[4].content is missing or null, not a string",
        ),
        (
            "nemo_customizer",
            changed("nemo_customizer", "eval", response={"choices": []}),
            "messages is missing or empty",
        ),
        (
            "nemo_customizer",
            changed("nemo_customizer", "eval", response={"choices": [{"message": call("{}")}]}),
            "messages[4].tool_calls[0].function.arguments is a string, not an object",
        ),
        ("helix", changed("helix"), "messages[3].tool_call_id is forbidden by Helix's schema and demanded by"),
        (
            "helix",
            changed("helix", messages=[{**ASKING, "name": "kim"}, {"role": "assistant", "content": "a"}]),
            "messages[0].name is no field of a message",
        ),
        ("helix", changed("helix", tools=[TIME]), "tools[0].function.description is missing or null, not a string"),
        (
            "helix",
            changed("helix", tools=[function(description="d")]),
            'tools[0].function.parameters is not of the type "object"',
        ),
        (
            "helix",
            changed("helix", tools=[function(description="d", parameters={"type": "string", "properties": {}})]),
            'tools[0].function.parameters is not of the type "object"',
        ),
        (
            "helix",
            changed("helix", tools=[function(description="d", parameters={"type": "object"})]),
            "tools[0].function.parameters.properties is missing or null, not an object",
        ),
        ("helix", changed("helix", "eval", expected_json="nonsense"), "messages is missing or empty"),
        (
            "huggingface",
            changed("huggingface", messages=call({"n": [2**64]})),
            "messages[4].tool_calls[0].function.arguments.n[0] is a whole number of more than 64 bits",
        ),
        (
            "huggingface",
            changed("huggingface", tools=[function(least=-(2**63) - 1)]),
            "tools[0].function.least is a whole number of more than 64 bits",
        ),
        ("flywheel", changed("flywheel", timestamp="noon"), "timestamp: Input should be a valid number"),
        ("flywheel", changed("flywheel", latency=1), "latency: Extra inputs are not permitted"),
    ],
)
def test_a_destination_refuses(name: str, row: dict[str, Any], fault: str) -> None:
    assert str(FORMATS[name].check(row)).startswith(fault)


@pytest.mark.parametrize("name", CHAT)
def test_malformed_arguments_are_kept_and_refused(name: str) -> None:
    """A row can hold them, so that nothing is made up; whether it may leave is for `check` to say."""
    broken = example(**calling(arguments='{"city": "Par'))
    for split in SPLITS:
        row = FORMATS[name].to_row(broken, split)
        assert FORMATS[name].from_row(row).reference == broken.reference
        assert "messages[1].tool_calls[0].function.arguments is a string" in str(FORMATS[name].check(row))


def test_no_row_of_the_format() -> None:
    with pytest.raises(DatasetError, match=r"no row of the format openai: messages is missing or empty\. Say which"):
        FORMATS["openai"].from_row(FORMATS["helix"].to_row(example(), "eval"))
    with pytest.raises(DatasetError, match=r"no row of the format flywheel: conversation: Field required\."):
        FORMATS["flywheel"].from_row({"id": "1"})


# ── the Hugging Face library ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_datasets_hands_out_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets", minversion="4.7")
    rows = FORMATS["huggingface"]
    floats = [
        -0.0,
        1e-7,
        2.5e20,
        48.856613,
        -122.419416,
        *(i / 100 for i in range(100)),
        *(i / 1000 for i in range(1000)),
    ]
    written = [
        rows.to_row(example(*AGENT, tools=(WEATHER, TIME), **calling())),
        rows.to_row(example(**calling("set", {"levels": floats, "deep": {"a": [None, {}, []], "": True}}))),
        rows.to_row(example(**calling("count", {"n": [2**63, -(2**63), 2**64 - 1]}))),
        rows.to_row(example(text="\x00 \u2028 日本 😀")),
    ]
    for path in rows.files():
        with (tmp_path / path).open("wb") as file:
            rows.write(written, file)
    cache = str(tmp_path / "cache")
    files = {split: str(tmp_path / path) for path, split in rows.files().items()}
    loaded = datasets.load_dataset("parquet", data_files=files, cache_dir=cache)
    assert {split: list(loaded[split]) for split in SPLITS} == dict.fromkeys(SPLITS, written)
    assert [rows.from_row(row) for row in loaded["train"]] == [rows.from_row(row) for row in written]
    assert list(datasets.load_dataset("parquet", data_files=files, streaming=True)["eval"]) == written
    loaded.save_to_disk(str(tmp_path / "disk"))
    assert list(datasets.load_from_disk(str(tmp_path / "disk"))["validation"]) == written
    assert loaded["train"].features["messages"] == datasets.List(datasets.Json())
