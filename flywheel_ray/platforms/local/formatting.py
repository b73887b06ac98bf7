"""Chat messages, tools and answers as a model's token ids: the same in training, evaluation and serving.

    chat = ChatFormat(tokenizer)
    chat.prompt_ids(messages, tools)                 # … <|im_start|>assistant\\n
    chat.target_ids(Completion(tool_calls=(call,)))  # {"name":"route","arguments":{"queue":"atm_support"}}<|im_end|>

A chat template that knows tools gets them; for one that does not, tools, calls and tool results are written into plain
messages, compactly, because a small student pays for every token. `parsing.py` reads the answers back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from flywheel_ray.errors import PlatformError
from flywheel_ray.records import Completion, content_text, read_arguments

INSTRUCTION = (
    'You can call functions. To call one, reply only with JSON: {"name": …, "arguments": {…}}, one object a line for '
    "several calls. If no function fits, reply with plain text.\nFunctions:\n"
)

Message = dict[str, Any]

_PROBE = "flywheel_probe"
_PROBE_TOOL: Message = {
    "type": "function",
    "function": {"name": _PROBE, "description": "", "parameters": {"type": "object", "properties": {}}},
}


@dataclass(frozen=True)
class ChatFormat:
    """A tokenizer and its chat template, with what was found out about the template."""

    tokenizer: Any

    @cached_property
    def knows_tools(self) -> bool:
        """True when the template renders tools by itself."""
        try:
            return _PROBE in self._apply([{"role": "user", "content": "?"}], [_PROBE_TOOL])
        except Exception:  # a template may raise anything; then it does not know them
            return False

    @cached_property
    def end_of_turn(self) -> int:
        """The token a finished answer ends with: the first special token after an assistant message."""
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
        tail = self._apply(messages, [], prompt=False).rpartition(_PROBE)[2]
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        ids = self.tokenizer(tail, add_special_tokens=False)["input_ids"]
        return next((i for i in ids if i in special), self.tokenizer.eos_token_id)

    def prompt_ids(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Token ids up to where the assistant's answer begins.

        Raises:
            PlatformError: the template refuses the messages in every form.
        """
        return self._ids(self.prompt_text(messages, tools))

    def prompt_text(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The prompt as text with the template's markers; see `prompt_ids`."""
        failure: Exception | None = None
        if self.knows_tools:
            try:
                return self._apply([_native(m) for m in messages], [dict(t) for t in tools])
            except Exception as error:
                failure = error
        plain = plain_messages(messages, tools)
        for form in (plain, _without_system(plain)):
            try:
                return self._apply(form, [])
            except Exception as error:
                failure = error
        raise PlatformError(f"the model's chat template refuses the messages: {failure}") from failure

    def target_ids(self, answer: Completion) -> list[int]:
        """Token ids of the answer as the model shall write it, ending in the end-of-turn token."""
        return [*self._ids(answer_text(answer)), self.end_of_turn]

    def _apply(self, messages: Sequence[Message], tools: Sequence[Message], prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            list(messages),
            tools=list(tools) or None,
            tokenize=False,
            add_generation_prompt=prompt,
            enable_thinking=False,  # templates that do not know it ignore it
        )

    def _ids(self, text: str) -> list[int]:
        # The template has written the special tokens already.
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def answer_text(answer: Completion) -> str:
    """An answer as the student shall write it: one compact JSON object a line for its calls, else its text."""
    if not answer.tool_calls:
        return answer.text
    return "\n".join(_call_text(call.name, call.arguments) for call in answer.tool_calls)


def plain_messages(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> list[Message]:
    """Messages with only `role` (system, user, assistant) and text `content`, for templates that know no tools.

    Tools join the first system message, calls become the JSON the student is asked for, and results of tools become a
    user message.
    """
    plain: list[Message] = []
    for message in messages:
        role, text = _role(message), content_text(message.get("content"))
        if role in ("tool", "function"):
            text = f"<tool_response>\n{text}\n</tool_response>"
            if plain and plain[-1].get("from_tool"):
                plain[-1]["content"] += f"\n{text}"
                continue
            plain.append({"role": "user", "content": text, "from_tool": True})
        elif role == "assistant":
            plain.append({"role": role, "content": "\n".join(filter(None, [text, *_history_calls(message)]))})
        else:
            plain.append({"role": role, "content": text})
    for message in plain:
        message.pop("from_tool", None)
    return _with_tools(plain, tools) if tools else plain


def tools_text(tools: Sequence[Mapping[str, Any]]) -> str:
    """Tools as one line each: `- route(queue: "a"|"b", note?: string): Send the request to a queue.`"""
    return "\n".join(_tool_line(tool["function"]) for tool in tools)


def _with_tools(plain: list[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    text = INSTRUCTION + tools_text(tools)
    if plain and plain[0]["role"] == "system":
        return [{"role": "system", "content": f"{plain[0]['content']}\n\n{text}".strip()}, *plain[1:]]
    return [{"role": "system", "content": text}, *plain]


def _without_system(plain: Sequence[Message]) -> list[Message]:
    """System messages joined into the next other message, for templates without that role."""
    out: list[Message] = []
    pending: list[str] = []
    for message in plain:
        if message["role"] == "system":
            pending.append(message["content"])
        else:
            out.append({**message, "content": "\n\n".join([*pending, message["content"]])})
            pending = []
    return out + ([{"role": "user", "content": "\n\n".join(pending)}] if pending else [])


def _native(message: Mapping[str, Any]) -> Message:
    """A message as templates with tools expect it: text content, arguments as objects."""
    native = {**message, "role": _role(message), "content": content_text(message.get("content"))}
    if calls := message.get("tool_calls"):
        functions = [dict(call.get("function") or {}) for call in calls]
        native["tool_calls"] = [
            {**call, "function": {**function, "arguments": read_arguments(function.get("arguments"))}}
            for call, function in zip(calls, functions, strict=True)
        ]
    else:
        native.pop("tool_calls", None)
    return native


def _role(message: Mapping[str, Any]) -> str:
    role = str(message.get("role"))
    return "system" if role == "developer" else role


def _history_calls(message: Mapping[str, Any]) -> list[str]:
    functions = [call.get("function") or {} for call in message.get("tool_calls") or [] if isinstance(call, dict)]
    return [_call_text(str(f.get("name")), read_arguments(f.get("arguments"))) for f in functions]


def _call_text(name: str, arguments: Mapping[str, Any] | str) -> str:
    return _compact({"name": name, "arguments": arguments})


def _tool_line(function: Mapping[str, Any]) -> str:
    schema = function.get("parameters") or {}
    required = schema.get("required") or []
    parameters = [
        f"{name}{'' if name in required else '?'}: {_type_text(kind)}"
        for name, kind in (schema.get("properties") or {}).items()
    ]
    line = f"- {function['name']}({', '.join(parameters)})"
    description = " ".join(str(function.get("description") or "").split())
    return f"{line}: {description}" if description else line


def _type_text(schema: Any) -> str:
    if not isinstance(schema, dict):
        return "any"
    if isinstance(values := schema.get("enum"), list):
        return "|".join(_compact(value) for value in values)
    kind = schema.get("type")
    if kind == "array":
        return f"[{_type_text(schema.get('items'))}]"
    if kind == "object" and isinstance(properties := schema.get("properties"), dict):
        inner = ", ".join(f"{name}: {_type_text(value)}" for name, value in properties.items())
        text = "{" + inner + "}"
    elif isinstance(kind, list):
        text = "|".join(map(str, kind))
    else:
        text = str(kind) if kind else _compact(schema) if schema else "any"
    description = schema.get("description")
    return f"{text} ({' '.join(description.split())})" if isinstance(description, str) and description else text


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
