"""Row formats: examples as rows of the files that trainers and evaluators read, and back.

    rows = FORMATS["nemo_customizer"]
    rows.files({"train", "eval"})    # {"training/train_data.jsonl": "train", "eval_data.jsonl": "eval"}
    row = rows.to_row(example)       # {"messages": [{"role": "user", "content": "Where is my card?"}, …], "tools": […]}
    rows.check(row)                  # None, or "messages[2].content is missing or null, not a string"
    with path.open("wb") as file: rows.write(map(rows.to_row, dataset.stream("train")), file)

Every format carries the messages, the tools, and the reference's text and tool calls with their values exactly; what
an example has besides and a format leaves out is its `lost`. Rows stream: no more than a row group is ever held.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, BinaryIO, ClassVar

from pydantic import ValidationError

from flywheel_ray.datasets import Example
from flywheel_ray.errors import DatasetError
from flywheel_ray.records import Completion, ToolCall, content_text, conversation_of, read_arguments, readable
from flywheel_ray.splits import SPLITS, Split
from flywheel_ray.values import content_hash

ROW_GROUP_BYTES = 16 * 2**20
"""JSON text in a row group of a Parquet file, about: what `HuggingFace.write` holds in memory."""

Row = dict[str, Any]


def json_line(row: Mapping[str, Any]) -> bytes:
    """A row as one line of JSON in UTF-8, with its line end. Lone surrogates become U+FFFD. Raises ValueError for NaN.

    U+0085, U+2028 and U+2029 are escaped: `str.splitlines`, by which NeMo's trainer reads, splits at them.
    """
    line = _json(row).encode()
    for character in ("\u0085", "\u2028", "\u2029"):
        line = line.replace(character.encode(), f"\\u{ord(character):04x}".encode())
    return line + b"\n"


class RowFormat(ABC):
    """How one destination wants its rows, and in which files. Stateless; all of them are in `FORMATS`."""

    name: ClassVar[str]
    paths: ClassVar[Mapping[Split, str]]
    """Split → path of its file in the export's folder."""
    lost: ClassVar[tuple[str, ...]]
    """Fields of an example that its training row does not carry."""

    @abstractmethod
    def to_row(self, example: Example, split: Split = "train") -> Row:
        """The row of an example, as JSON values. NeMo's evaluators want other rows than its trainers: say the split."""

    @abstractmethod
    def from_row(self, row: Mapping[str, Any]) -> Example:
        """The example of a row, of whichever split.

        Messages come back in the form in which datasets hold them: arguments as JSON text, null content beside calls.
        A row without id and conversation gets hashes of what it holds, and time 0.

        Raises:
            DatasetError: the row is not of this format.
        """

    def check(self, row: Mapping[str, Any]) -> str | None:
        """The first thing for which the destination would refuse the row or learn nonsense, by field; None if fine."""
        return next(self._faults(row), None)

    def files(self, splits: Collection[Split] = SPLITS) -> dict[str, Split]:
        """Relative path → split. Give the splits that have rows: trainers refuse a file without any."""
        return {self.paths[split]: split for split in SPLITS if split in splits}

    def write(self, rows: Iterable[Mapping[str, Any]], file: BinaryIO) -> int:
        """Write the rows of one file and return how many they were. The file stays open."""
        count = 0
        for row in rows:
            file.write(json_line(row))
            count += 1
        return count

    def read(self, file: BinaryIO) -> Iterator[Row]:
        """The rows of a file as `write` makes it. Raises DatasetError for what is none."""
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DatasetError(f"{self.name}: line {number} is not JSON: {error}. Export the file again.") from None
            if not isinstance(row, dict):
                raise DatasetError(f"{self.name}: line {number} is {_kind(row)}, not an object. Export the file again.")
            yield row

    @abstractmethod
    def _faults(self, row: Mapping[str, Any]) -> Iterator[str]: ...

    def _no_row(self, fault: str) -> DatasetError:
        return DatasetError(f"no row of the format {self.name}: {fault}. Say which format wrote it.")


class Flywheel(RowFormat):
    """Ours: the whole example, with its tools in the row, so that a file stands for itself."""

    name = "flywheel"
    paths: ClassVar[Mapping[Split, str]] = {split: f"{split}.jsonl" for split in SPLITS}
    lost = ()

    def to_row(self, example: Example, split: Split = "train") -> Row:
        return example.model_dump(mode="json", exclude_defaults=True)

    def from_row(self, row: Mapping[str, Any]) -> Example:
        try:
            return Example.model_validate(row)
        except ValidationError as error:
            raise self._no_row(_first(error)) from None

    def _faults(self, row: Mapping[str, Any]) -> Iterator[str]:
        try:
            Example.model_validate(row)
        except ValidationError as error:
            yield _first(error)


class _Chat(RowFormat):
    """What the others share: `{"messages": […, the reference], "tools"?: […]}`.

    Arguments are objects, in the history too, and content is text, never null (a template prints "None"). Of a message
    stay role, content, tool calls and `_keys`. The role developer becomes system, its older name: most chat templates
    skip or refuse developer messages, and OpenAI's schema of fine-tuning rows has none.
    """

    paths: ClassVar[Mapping[Split, str]] = {split: f"{split}.jsonl" for split in SPLITS}
    lost = (
        *(f for f in Example.model_fields if f not in ("messages", "tools", "reference")),
        *(f"reference.{f}" for f in Completion.model_fields if f not in ("text", "tool_calls")),
    )
    _keys: ClassVar[tuple[str, ...]] = ("name", "tool_call_id")

    def to_row(self, example: Example, split: Split = "train") -> Row:
        messages = [*example.messages, example.reference.message()]
        row: Row = {"messages": [self._turn(message) for message in messages]}
        return row | {"tools": self._tools(example)} if example.tools else row

    def from_row(self, row: Mapping[str, Any]) -> Example:
        turns, tools = self._parts(row)
        for fault in _shape_faults(turns, tools):
            raise self._no_row(fault)
        *history, answer = turns
        messages = [_message(turn) for turn in history]
        calls = [call["function"] for call in answer.get("tool_calls") or ()]
        reference = Completion(
            text=content_text(answer.get("content")),
            tool_calls=tuple(ToolCall(name=c["name"], arguments=read_arguments(c.get("arguments"))) for c in calls),
        )
        try:
            return Example(
                id=row.get("id") or content_hash([messages, tools], 32),
                conversation=row.get("conversation") or conversation_of("", "", messages),
                timestamp=row.get("timestamp") or 0.0,
                messages=tuple(messages),
                tools=tuple(tools),
                reference=reference,
            )
        except ValidationError as error:
            raise self._no_row(_first(error)) from None

    def _turn(self, message: Mapping[str, Any], *, as_text: bool = False) -> Row:
        """A message as it stands in a row; its arguments as objects, or as JSON text."""
        role = "system" if message["role"] == "developer" else message["role"]
        turn: Row = {"role": role, "content": content_text(message.get("content"))}
        turn |= {key: message[key] for key in self._keys if message.get(key) is not None}
        if calls := message.get("tool_calls"):
            turn["tool_calls"] = [_call(call, as_text) for call in calls]
        return turn

    def _tools(self, example: Example) -> list[Row]:
        return list(example.tools)

    def _parts(self, row: Mapping[str, Any]) -> tuple[Any, Any]:
        """The messages, of which the last is the reference, and the tools."""
        return row.get("messages"), row.get("tools") or []

    def _faults(self, row: Mapping[str, Any]) -> Iterator[str]:
        turns, tools = self._parts(row)
        if shape := list(_shape_faults(turns, tools)):
            yield from shape
            return
        for key, kind in (("id", str), ("conversation", str), ("timestamp", int | float)):
            if row.get(key) is not None and not isinstance(row[key], kind):
                yield f"{key} is {_kind(row[key])}"
        for i, turn in enumerate(turns):
            yield from self._turn_faults(turn, f"messages[{i}]")
        for i, tool in enumerate(tools):
            if tool.get("type") != "function":
                yield f'tools[{i}].type is not "function"'
            yield from self._function_faults(tool["function"], f"tools[{i}].function")

    def _turn_faults(self, turn: Row, where: str) -> Iterator[str]:
        content, calls = turn.get("content"), turn.get("tool_calls") or []
        if turn["role"] not in _ROLES:
            yield f"{where}.role is {turn['role']!r}, not one of {', '.join(_ROLES)}"
        if not isinstance(content, str):
            yield f"{where}.content is {_kind(content)}, not a string"
        elif turn["role"] == "assistant" and not calls and not content.strip():
            yield f"{where} is an answer without content and tool calls"
        for n, call in enumerate(calls):
            yield from self._call_faults(call, f"{where}.tool_calls[{n}]")

    def _call_faults(self, call: Row, where: str) -> Iterator[str]:
        arguments = call["function"].get("arguments")
        if not isinstance(arguments, dict):
            yield f"{where}.function.arguments is {_kind(arguments)}, not an object"

    def _function_faults(self, function: Row, where: str) -> Iterator[str]:
        yield from ()


class OpenAI(_Chat):
    """OpenAI's supervised fine-tuning: arguments are JSON text, and a message that only calls tools has no content.

    `weight` is 0 on the answers in the history: they are part of the question, and rows of their own teach them.
    `parallel_tool_calls` is left out, which means true. Source: OpenAI's API reference (fine-tuning, chat input) and
    OpenAPI document 2.3 (`FineTuneChatRequestInput`, `FunctionObject`).
    """

    name = "openai"
    _fields: ClassVar[frozenset[str]] = frozenset({"messages", "tools", "parallel_tool_calls"})
    _max_tools: ClassVar[int] = 128
    _name: ClassVar[re.Pattern[str]] = re.compile(r"[a-zA-Z0-9_-]{1,64}")

    def to_row(self, example: Example, split: Split = "train") -> Row:
        row = super().to_row(example, split)
        for turn in row["messages"][:-1]:
            if turn["role"] == "assistant":
                turn["weight"] = 0
        return row

    def _turn(self, message: Mapping[str, Any], *, as_text: bool = True) -> Row:
        turn = super()._turn(message, as_text=as_text)
        if turn.get("tool_calls") and not turn["content"]:
            del turn["content"]
        return turn

    def _faults(self, row: Mapping[str, Any]) -> Iterator[str]:
        turns, tools = self._parts(row)
        for key in sorted(row.keys() - self._fields):
            yield f"{key} is no field of a fine-tuning row"
        if isinstance(tools, list) and len(tools) > self._max_tools:
            yield f"tools has {len(tools)} functions, more than {self._max_tools}"
        yield from super()._faults(row)
        if any(_shape_faults(turns, tools)):
            return
        asked: list[Any] = []
        for i, turn in enumerate(turns):
            if turn["role"] == "tool" and turn.get("tool_call_id") not in asked:
                yield f"messages[{i}].tool_call_id is {turn.get('tool_call_id')!r}, the id of no call before it"
            asked += [call.get("id") for call in turn.get("tool_calls") or ()]

    def _turn_faults(self, turn: Row, where: str) -> Iterator[str]:
        if turn.get("content") is None and turn.get("tool_calls"):
            turn = {**turn, "content": ""}
        yield from super()._turn_faults(turn, where)

    def _call_faults(self, call: Row, where: str) -> Iterator[str]:
        if not isinstance(call.get("id"), str) or not call["id"]:
            yield f"{where}.id is {_kind(call.get('id'))}, not a string"
        yield from self._function_faults(call["function"], f"{where}.function")
        arguments = call["function"].get("arguments")
        if not isinstance(arguments, str) or not isinstance(read_arguments(arguments), dict):
            yield f"{where}.function.arguments is {_kind(arguments)}, not the text of a JSON object"

    def _function_faults(self, function: Row, where: str) -> Iterator[str]:
        if not self._name.fullmatch(function["name"]):
            yield f"{where}.name is {function['name']!r}, not 1 to 64 of a-z, A-Z, 0-9, _ and -"


class NemoCustomizer(_Chat):
    """NeMo Microservices 25.x: rows for the Customizer, and whole exchanges as rows for the Evaluator.

    A row for evaluation is `{"id", "request": {messages, tools}, "response": {choices}}`, whose parts its templates
    name (`{{ item.request.messages | tojson }}`): arguments are text in the request, which is sent to a model, and
    objects in the response, which the metric compares. Names of messages are left out. Source: NVIDIA's Data Flywheel
    Blueprint and the Customizer's dataset formats.
    """

    name = "nemo_customizer"
    paths: ClassVar[Mapping[Split, str]] = {
        "train": "training/train_data.jsonl",
        "validation": "validation/val_data.jsonl",
        "eval": "eval_data.jsonl",
    }
    _keys = ("tool_call_id",)

    def to_row(self, example: Example, split: Split = "train") -> Row:
        row = super().to_row(example, split)
        return self._evaluation_row(example, row) if split == "eval" else row

    def _evaluation_row(self, example: Example, row: Row) -> Row:
        request = {**row, "messages": [self._turn(message, as_text=True) for message in example.messages]}
        answer = {"index": 0, "message": row["messages"][-1]}
        return {"id": example.id, "request": request, "response": {"choices": [answer]}}

    def _parts(self, row: Mapping[str, Any]) -> tuple[Any, Any]:
        if "request" not in row:
            return super()._parts(row)
        try:
            messages, tools = super()._parts(row["request"])
            return [*map(self._turn, messages), row["response"]["choices"][0]["message"]], tools
        except (AttributeError, IndexError, KeyError, TypeError):
            return None, None


class Helix(NemoCustomizer):
    """NeMo Helix 0.8: rows for its automodel trainer, and rows of JSON texts for its evaluator.

    The trainer's schema wants a description and an object of parameters of every function: "" and no properties stand
    in for missing ones. It forbids the `tool_call_id` that the trainer itself asks for, so no conversation with tool
    results can be trained on there, and `check` says so. The evaluator reads through Arrow, which pads objects with
    nulls: a row for it has only texts, `messages_json`, `tools_json`, `expected_json` (the reference's calls, their
    arguments as objects), `expected_text` and, for judges, `question`. A template reads JSON text by
    `{{ item.messages_json }}{# tojson #}`. Source: nemo-helix 0.8.1, `datasets/schemas.py` of its automodel service.
    """

    name = "helix"
    paths = _Chat.paths
    _turn_fields: ClassVar[frozenset[str]] = frozenset({"role", "content", "thinking", "tool_calls", "tool_call_id"})

    def _tools(self, example: Example) -> list[Row]:
        return [_described(tool) for tool in example.tools]

    def _evaluation_row(self, example: Example, row: Row) -> Row:
        messages = [self._turn(message, as_text=True) for message in example.messages]
        answer = row["messages"][-1]
        return {
            "id": example.id,
            "question": next((m["content"] for m in reversed(messages) if m["role"] == "user"), ""),
            "messages_json": _json(messages),
            "tools_json": _json(row.get("tools", [])),
            "expected_json": _json(answer.get("tool_calls", [])),
            "expected_text": answer["content"],
        }

    def _parts(self, row: Mapping[str, Any]) -> tuple[Any, Any]:
        if "messages_json" not in row:
            return super()._parts(row)
        try:
            messages, tools, calls = (json.loads(row[f"{key}_json"]) for key in ("messages", "tools", "expected"))
            answer = {"role": "assistant", "content": row["expected_text"], "tool_calls": calls}
            return [*map(self._turn, messages), answer], tools
        except (AttributeError, KeyError, TypeError, ValueError):
            return None, None

    def _faults(self, row: Mapping[str, Any]) -> Iterator[str]:
        yield from super()._faults(row)
        turns, tools = self._parts(row)
        if "messages" not in row or any(_shape_faults(turns, tools)):
            return
        for i, turn in enumerate(turns):
            for key in sorted(turn.keys() - self._turn_fields):
                yield f"messages[{i}].{key} is no field of a message"
            if turn["role"] == "tool":
                yield f"messages[{i}].tool_call_id is forbidden by Helix's schema and demanded by its trainer"

    def _function_faults(self, function: Row, where: str) -> Iterator[str]:
        parameters = function.get("parameters")
        if not isinstance(function.get("description"), str):
            yield f"{where}.description is {_kind(function.get('description'))}, not a string"
        if not isinstance(parameters, dict) or parameters.get("type") != "object":
            yield f'{where}.parameters is not of the type "object"'
        elif not isinstance(parameters.get("properties"), dict):
            yield f"{where}.parameters.properties is {_kind(parameters.get('properties'))}, not an object"


class HuggingFace(_Chat):
    """Parquet for `datasets` and for what stands on it: TRL's SFTTrainer, Axolotl, NeMo Automodel.

    Columns: `id`, `conversation`, `timestamp`, and `messages` and `tools` (null where there are none) as lists of
    Arrow's JSON type. `datasets` knows that from 4.7 on as `List(Json())` and hands out the objects that were written;
    columns of structs would pad every tool's arguments with those of the others, as nulls.

    `datasets` (5.2) reads JSON by pandas' ujson, which misreads up to a third of the floats below 1 (0.7 becomes
    0.7000000000000001) and fails at whole numbers of more than 64 bits. So a float is written with as many zeros at its
    end as make it right (0.700000): what stays wrong, in the last digit, is under 1 in 100 of those with up to 14
    digits, and most with 16 and more. `check` refuses the wide whole numbers. Source: TRL's "Dataset formats".
    """

    name = "huggingface"
    paths: ClassVar[Mapping[Split, str]] = {split: f"{split}.parquet" for split in SPLITS}
    lost = tuple(f for f in _Chat.lost if f not in ("id", "conversation", "timestamp"))

    def to_row(self, example: Example, split: Split = "train") -> Row:
        about = {"id": example.id, "conversation": example.conversation, "timestamp": example.timestamp}
        return {**about, "tools": None, **super().to_row(example, split)}

    def write(self, rows: Iterable[Mapping[str, Any]], file: BinaryIO) -> int:
        import pyarrow as pa
        import pyarrow.parquet as pq

        plain = [("id", pa.string()), ("conversation", pa.string()), ("timestamp", pa.float64())]
        texts = pa.schema([*plain, *((column, pa.list_(pa.string())) for column in _JSON_COLUMNS)])
        schema = pa.schema([*plain, *((column, pa.list_(pa.json_())) for column in _JSON_COLUMNS)])
        count = 0
        with pq.ParquetWriter(file, schema, compression="zstd") as writer:
            for group in _row_groups(rows):
                writer.write_table(pa.Table.from_pylist(group, schema=texts).cast(schema))
                count += len(group)
        return count

    def read(self, file: BinaryIO) -> Iterator[Row]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            for batch in pq.ParquetFile(file).iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    yield {**row, **{c: row[c] and [json.loads(text) for text in row[c]] for c in _JSON_COLUMNS}}
        except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise DatasetError(f"{self.name}: no Parquet file of its rows: {error}. Export the file again.") from None

    def _faults(self, row: Mapping[str, Any]) -> Iterator[str]:
        yield from super()._faults(row)
        for column in _JSON_COLUMNS:
            yield from _wide_integers(row.get(column), column)


FORMATS: dict[str, RowFormat] = {f.name: f for f in (Flywheel(), OpenAI(), NemoCustomizer(), Helix(), HuggingFace())}
"""Every format by its name on the command line."""

_ROLES = ("system", "user", "assistant", "tool")
_JSON_COLUMNS = ("messages", "tools")
_DECIMAL = re.compile(r"\d\.\d")
_UJSON_DECIMALS = 15


def _shape_faults(turns: Any, tools: Any) -> Iterator[str]:
    """What keeps a row from being read at all."""
    if not isinstance(turns, list) or not turns:
        yield "messages is missing or empty"
        return
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            yield f"messages[{i}] is not an object with a role"
            continue
        calls = turn.get("tool_calls")
        if not isinstance(calls, list | None):
            yield f"messages[{i}].tool_calls is {_kind(calls)}, not a list"
            continue
        for n, call in enumerate(calls or ()):
            if not _is_function(call):
                yield f"messages[{i}].tool_calls[{n}] is not the call of a function with a name"
    if isinstance(turns[-1], dict) and turns[-1].get("role") != "assistant":
        yield f"messages[{len(turns) - 1}].role is {turns[-1].get('role')!r}: the last message must be the assistant's"
    if not isinstance(tools, list):
        yield f"tools is {_kind(tools)}, not a list"
        return
    for i, tool in enumerate(tools):
        if not _is_function(tool):
            yield f"tools[{i}] is not a function with a name"


def _is_function(value: Any) -> bool:
    function = value.get("function") if isinstance(value, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _message(turn: Mapping[str, Any]) -> Row:
    """A row's message in the form in which datasets hold it."""
    calls = turn.get("tool_calls")
    message: Row = {"role": turn["role"], "content": turn.get("content") or (None if calls else "")}
    message |= {key: turn[key] for key in ("name", "tool_call_id") if turn.get(key) is not None}
    if calls:
        message["tool_calls"] = [_call(call, as_text=True) for call in calls]
    return message


def _call(call: Mapping[str, Any], as_text: bool) -> Row:
    if not _is_function(call):
        return dict(call)  # of no function: rows have no form for it, and `check` says so
    arguments = call["function"].get("arguments")
    if not as_text:
        arguments = read_arguments(arguments)
    elif not arguments or not isinstance(arguments, str):
        arguments = json.dumps(arguments or {}, ensure_ascii=False)
    row: Row = {"id": call["id"]} if call.get("id") else {}
    return row | {"type": "function", "function": {"name": call["function"]["name"], "arguments": arguments}}


def _described(tool: Row) -> Row:
    function = tool["function"]
    description = function.get("description") or ""
    parameters = {"type": "object", "properties": {}, **(function.get("parameters") or {})}
    return {**tool, "function": {**function, "description": description, "parameters": parameters}}


def _row_groups(rows: Iterable[Mapping[str, Any]]) -> Iterator[list[Row]]:
    """Rows with their messages and tools as JSON texts, in groups of about `ROW_GROUP_BYTES`."""
    group: list[Row] = []
    size = 0
    for row in rows:
        texts = {column: row.get(column) and [*map(_ujson_proof, row[column])] for column in _JSON_COLUMNS}
        group.append({**row, **texts})
        size += sum(len(text) for column in texts.values() for text in column or ())
        if size >= ROW_GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _ujson_proof(value: Any) -> str:
    """JSON text from which pandas' ujson, too, reads the floats that were meant."""
    text = _json(value)
    return _with_padded_floats(value) if _DECIMAL.search(text) else text


def _with_padded_floats(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{_json(key)}:{_with_padded_floats(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_with_padded_floats, value)) + "]"
    return _padded(value) if isinstance(value, float) else _json(value)


def _padded(number: float) -> str:
    """A float with zeros at its end until ujson's arithmetic, `whole + decimals * 10^-n`, gives that very float."""
    text = _json(number)
    whole, _, decimals = text.lstrip("-").partition(".")
    if decimals.isdigit():  # not 1e-07
        for n in range(len(decimals), _UJSON_DECIMALS + 1):
            if float(whole) + int(decimals.ljust(n, "0")) * float(f"1e-{n}") == abs(number):
                return text.ljust(len(text) - len(decimals) + n, "0")
    return text


def _wide_integers(value: Any, where: str) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _wide_integers(item, f"{where}.{key}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _wide_integers(item, f"{where}[{i}]")
    elif isinstance(value, int) and not -(2**63) <= value < 2**64:
        yield f"{where} is a whole number of more than 64 bits"


def _json(value: Any) -> str:
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return _json(readable(value))
    return text


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "missing or null"}
    return kinds.get(type(value), "a number")
