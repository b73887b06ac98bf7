"""The language of the sample support traffic: ten tools, their slots, and phrases that work in both directions.

A phrase such as `<can> cancel <order>[ because {reason}]?` is expanded at random to make a customer's message, and is
compiled to a regular expression by which the rule-based teacher reads a message back. `(a|b)` is a choice, `[a]` an
option, `<can>` a shorthand and `{reason}` a slot; a phrase without a required slot makes the teacher ask for it.

    understand("hi, can you cancel order #A1043 because I found it cheaper? thx", list(PARAMETERS))
    # [Request(tool="cancel_order", values={"order_id": "A1043", "reason": "found_cheaper"}, then=None)]
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from random import Random
from typing import Any, NamedTuple

from experiments.sample_phrases import CHAINS, CHAT, MACROS, PHRASES, POOLS, REPLIES, SHORTHAND, SOON, VALUES

# ── slots: how a value is said, found and read ──────────────────────────────────────────────────────────────────────


class Slot(NamedTuple):
    """One kind of value: `say` words it, `pattern` finds the words, `read` turns the words into the argument."""

    pattern: str
    say: Callable[[Random], str]
    read: Callable[[str], Any]


def _any_of(words: Sequence[str]) -> str:
    return "(?:" + "|".join(re.escape(plain(word)) for word in sorted(words, key=len, reverse=True)) + ")"


def _worded(meanings: Mapping[Any, str]) -> Slot:
    """A slot of fixed wordings: {"high": "asap|it's urgent"} reads both as "high"."""
    values = {words: value for value, line in meanings.items() for words in line.split("|")}
    by_plain = {plain(words).casefold(): value for words, value in values.items()}
    said = list(values)
    return Slot(_any_of(said), lambda rng: rng.choice(said), lambda text: by_plain[text.casefold()])


def plain(text: str) -> str:
    """Text without apostrophes and with single spaces, as the patterns see it."""
    return " ".join(text.replace("’", "").replace("'", "").split())


def _product(rng: Random) -> str:
    return f"{rng.choice(POOLS['look'])} {rng.choice(POOLS['thing'])}"


def _items(rng: Random) -> str:
    items = [f"the {_product(rng)}" for _ in range(rng.choice((1, 1, 2, 2, 3)))]
    return " and ".join(filter(None, (", ".join(items[:-1]), items[-1])))


def _address(rng: Random) -> str:
    street = f"{rng.randint(1, 240)} {rng.choice(POOLS['street'])} {rng.choice(POOLS['way'])}"
    return f"{street}, {rng.choice(POOLS['city'])}" if rng.random() < 0.5 else street


def _email(rng: Random) -> str:
    first, last = rng.choice(POOLS["first"]).lower(), rng.choice(POOLS["last"]).lower()
    return f"{first}{rng.choice(('.', '_', ''))}{last}@{rng.choice(POOLS['domain'])}"


def _amount(rng: Random) -> str:
    amount = f"{rng.randint(3, 180)}{rng.choice(('', '', '.99', '.95', '.75', '.25'))}"
    return rng.choice((f"${amount}", f"${amount}", f"{amount} dollars"))


def _day(rng: Random) -> str:
    if rng.random() < 0.5:
        return rng.choice(SOON)
    if rng.random() < 0.5:
        return f"on {rng.choice(POOLS['weekday'])}"
    return f"on {rng.choice(POOLS['month'])} {rng.randint(1, 28)}"


def _read_amount(text: str) -> int | float:
    digits = text.lower().removesuffix("dollars").strip(" $")
    return float(digits) if "." in digits else int(digits)


def _read_day(text: str) -> str:
    day = re.sub(r"^on ", "", text, flags=re.IGNORECASE)
    return day.lower() if day.lower() in SOON else day


_NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
_PRODUCT = f"{_any_of(POOLS['look'])} {_any_of(POOLS['thing'])}"
_DATE = f"on (?:{_any_of(POOLS['weekday'])}|{_any_of(POOLS['month'])} \\d{{1,2}})"

SLOTS: dict[str, Slot] = {
    "order_id": Slot(r"[A-Z]\d{4}", lambda rng: f"{rng.choice('ABCDEFGHKM')}{rng.randint(1000, 9999)}", str.upper),
    "product": Slot(_PRODUCT, _product, str.lower),
    "items": Slot(
        f"the {_PRODUCT}(?:(?:, | and )the {_PRODUCT})*",
        _items,
        lambda text: re.findall(_PRODUCT, text.lower()),
    ),
    "quantity": Slot(
        rf"(?:\d{{1,3}}|{'|'.join(_NUMBERS)})",
        lambda rng: rng.choice([*_NUMBERS, *map(str, range(2, 13))]),
        lambda text: _NUMBERS.get(text.lower()) or int(text),
    ),
    "address": Slot(
        rf"\d{{1,4}} (?:[^\s,]+ ){{1,2}}{_any_of(POOLS['way'])}(?:, (?-i:[A-Z][a-z]+))?",
        _address,
        str,
    ),
    "phone": Slot(r"\d{3}-\d{4}", lambda rng: f"{rng.randint(201, 989)}-{rng.randint(0, 9999):04}", str),
    "email": Slot(r"[\w.+-]+@[\w-]+(?:\.[a-z]{2,})+", _email, str.lower),
    "amount": Slot(r"(?:\$\d+(?:\.\d+)?|\d+(?:\.\d+)? dollars)", _amount, _read_amount),
    "day": Slot(f"(?:{_any_of(SOON)}|{_DATE})", _day, _read_day),
    "name": Slot(
        f"{_any_of(POOLS['first'])} {_any_of(POOLS['last'])}",
        lambda rng: f"{rng.choice(POOLS['first'])} {rng.choice(POOLS['last'])}",
        str,
    ),
    **{name: _worded(meanings) for name, meanings in VALUES.items()},
}


# ── tools ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _tool(name: str, description: str, required: str, optional: str = "") -> dict[str, Any]:
    """A tool of which the arguments are slots; "" where there are none."""
    properties = {slot: _schema(slot) for slot in (required + " " + optional).split()}
    parameters = {"type": "object", "properties": properties, "required": required.split()}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _schema(slot: str) -> dict[str, Any]:
    if slot in VALUES:
        values = list(VALUES[slot])
        return {"type": "boolean"} if values == [True, False] else {"type": "string", "enum": values}
    if slot == "items":
        return {"type": "array", "items": {"type": "string"}}
    return {"type": {"quantity": "integer", "amount": "number"}.get(slot, "string")}


TOOLS: list[dict[str, Any]] = [
    _tool("lookup_order", "Status, contents and total of an order.", "order_id"),
    _tool("track_package", "Where a parcel is and when it arrives.", "order_id", "sms_updates"),
    _tool("cancel_order", "Cancel an order.", "order_id", "reason"),
    _tool("start_return", "Start the return of an order or of some of its items.", "order_id problem", "items"),
    _tool("change_delivery_address", "Send an order to another address.", "order_id address"),
    _tool("get_invoice", "Send the invoice or receipt of an order.", "order_id", "format"),
    _tool("apply_refund", "Pay back an amount in dollars.", "order_id amount", "store_credit"),
    _tool("check_stock", "Whether a product is available.", "product", "quantity"),
    _tool("schedule_callback", "Have an agent phone the customer.", "phone day", "urgency"),
    _tool("reset_password", "Reset the password of an account.", "email", "method"),
]

PARAMETERS: dict[str, dict[str, Any]] = {t["function"]["name"]: t["function"]["parameters"] for t in TOOLS}


def arguments(tool: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are arguments of the tool, in the order of its schema."""
    return {name: values[name] for name in PARAMETERS[tool]["properties"] if name in values}


def missing(tool: str, values: Mapping[str, Any]) -> list[str]:
    """The required arguments of the tool that have no value."""
    return [name for name in PARAMETERS[tool]["required"] if name not in values]


# ── phrases, compiled ───────────────────────────────────────────────────────────────────────────────────────────────


class _Ref(NamedTuple):
    slot: str


class _Choice(NamedTuple):
    options: tuple[tuple[str | _Ref | _Choice, ...], ...]


_FLAGS = re.IGNORECASE | re.ASCII

Part = tuple[str | None, str]
"""A piece of a message: (slot name, its words), or (None, text)."""


class Phrase(NamedTuple):
    """One way to say something: what it is about (a tool or a topic), how to say it and how to find it."""

    about: str
    tree: _Choice
    pattern: re.Pattern[str]
    end: str
    slots: frozenset[str]
    then: str | None = None

    def expand(self, rng: Random) -> list[Part]:
        """One random wording."""
        return [*_expand(self.tree, rng), (None, self.end)]


def _compile(about: str, line: str, then: str | None = None) -> Phrase:
    end = "?" if line.endswith("?") else "."
    text = re.sub(r"<(\w+)>", lambda m: MACROS[m[1]], line.strip().removesuffix("?"))
    tree = _grow(re.findall(r"[()\[\]|]|\{\w+\}|[^()\[\]|{}]+", text))
    counter = iter(range(1000))
    pattern = re.compile(rf"(?<![\w@]){_regex(tree, counter)}(?![\w@])", _FLAGS)
    return Phrase(about, tree, pattern, end, frozenset(re.findall(r"\{(\w+)\}", text)), then)


def _grow(tokens: list[str]) -> _Choice:
    options: list[list[str | _Ref | _Choice]] = [[]]
    while tokens and tokens[0] not in ")]":
        token = tokens.pop(0)
        if token == "|":
            options.append([])
        elif token in "([":
            inner = _grow(tokens)
            tokens.pop(0)
            options[-1].append(_Choice((*inner.options, ())) if token == "[" else inner)
        else:
            options[-1].append(_Ref(token[1:-1]) if token[0] == "{" else token)
    return _Choice(tuple(tuple(option) for option in options))


def _regex(tree: _Choice, counter: Iterator[int]) -> str:
    def one(node: str | _Ref | _Choice) -> str:
        if isinstance(node, _Ref):
            return f"(?P<{node.slot}__{next(counter)}>{SLOTS[node.slot].pattern})"
        if isinstance(node, _Choice):
            return _regex(node, counter)
        return re.escape(node.replace("'", ""))

    return "(?:" + "|".join("".join(map(one, option)) for option in tree.options) + ")"


def _expand(tree: _Choice, rng: Random) -> Iterator[Part]:
    for node in tree.options[int(rng.random() * len(tree.options))]:
        if isinstance(node, _Ref):
            yield node.slot, SLOTS[node.slot].say(rng)
        elif isinstance(node, _Choice):
            yield from _expand(node, rng)
        else:
            yield None, node


@cache
def phrases() -> tuple[Phrase, ...]:
    """Every way to ask for a tool, the two-step requests among them."""
    single = [_compile(tool, line) for tool, lines in PHRASES.items() for line in lines.strip().splitlines()]
    chained = [_compile(first, line, then) for first, then, line in CHAINS]
    return (*single, *chained)


@cache
def chat() -> tuple[Phrase, ...]:
    """Every way to say something for which no tool is right; `about` is the topic."""
    return tuple(_compile(topic, line) for topic, (_, lines) in CHAT.items() for line in lines.strip().splitlines())


@cache
def replies(slot: str) -> tuple[Phrase, ...]:
    """Ways to answer the assistant's question about a slot."""
    return tuple(_compile(slot, line.format(slot=f"{{{slot}}}")) for line in REPLIES)


# ── from values to words ────────────────────────────────────────────────────────────────────────────────────────────


def utter(rng: Random, parts: Sequence[Part]) -> str:
    """Write the parts down as customers do: now and then in lower case, abbreviated, or with a slip of the finger."""
    lower, lazy, short, slip = (rng.random() < chance for chance in (0.08, 0.12, 0.05, 0.06))
    written = []
    for slot, text in parts:
        if slot is None:
            text = text.lower() if lower else text
            text = text.replace("'", "") if lazy else text
            text = re.sub(r"[a-z]+(?!['a-z])", lambda m: SHORTHAND.get(m[0], m[0]), text) if short else text
        elif lower and slot == "order_id":
            text = text.lower()
        written.append((slot, text))
    if slip:
        spots = [i for i, (slot, text) in enumerate(written) if slot is None and re.search(r"[a-z]{5}", text)]
        for i in spots and [rng.choice(spots)]:
            written[i] = (None, _slip(rng, written[i][1]))
    text = "".join(text for _, text in written)
    if lazy:
        text = text.rstrip(".?!")
    return text if lower else re.sub(r"(^|[.?!] )([a-z])", lambda m: m[1] + m[2].upper(), text)


def _slip(rng: Random, text: str) -> str:
    word = rng.choice(re.findall(r"[A-Za-z]*[a-z]{5}", text))
    i = rng.randint(1, len(word) - 3)
    slipped = word[:i] + word[i + 1] + word[i] + word[i + 2 :]
    return text.replace(word, slipped, 1) if _mend(slipped).lower() == word.lower() else text


def values_of(parts: Sequence[Part]) -> dict[str, Any]:
    """The meant value of every slot that was said."""
    return {slot: SLOTS[slot].read(plain(text)) for slot, text in parts if slot is not None}


# ── from words to values ────────────────────────────────────────────────────────────────────────────────────────────


class Request(NamedTuple):
    """What a customer asks for: a tool, the slot values that were said, and a second tool if all is well."""

    tool: str
    values: dict[str, Any]
    then: str | None = None


@cache
def _vocabulary() -> dict[str, str]:
    """Each known word under itself, and under its scrambled form where only one long word has that form."""
    text = " ".join(p.pattern.pattern for p in (*phrases(), *chat()))
    words = set(re.findall(r"[a-z]+", re.sub(r"\\.|\?P<\w+>", " ", text.lower())))
    forms: dict[str, str] = {}
    for word in sorted(words):
        if len(word) >= 5:
            forms[_form(word)] = "" if _form(word) in forms else word
    return {**{form: word for form, word in forms.items() if word}, **{word: word for word in words}}


def _form(word: str) -> str:
    return f"{word[0]}{''.join(sorted(word[1:-1]))}{word[-1]}~"


def _mend(word: str) -> str:
    known, lower = _vocabulary(), word.lower()
    return word if lower in known or len(word) < 5 else known.get(_form(lower), word)


_LONGHAND = {short: word for word, short in SHORTHAND.items()}


@cache
def _pattern_of(slot: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![\w@]){SLOTS[slot].pattern}(?![\w@])", _FLAGS)


def normalise(text: str) -> str:
    """The first 4,000 characters of a message without apostrophes, shorthand and slips."""
    return re.sub(r"[A-Za-z]+", lambda m: _LONGHAND.get(m[0].lower()) or _mend(m[0]), plain(text[:4000]))


def find(slot: str, text: str) -> Any | None:
    """The first value of a slot anywhere in a normalised text, None where there is none."""
    match = _pattern_of(slot).search(text)
    return SLOTS[slot].read(match[0]) if match else None


def _said(match: re.Match[str]) -> dict[str, Any]:
    groups = ((name.split("__")[0], text) for name, text in match.groupdict().items() if text is not None)
    return {slot: SLOTS[slot].read(text) for slot, text in groups}


def understand(message: str, offered: Sequence[str]) -> list[Request]:
    """What a message asks for, among the offered tools, in the order of the text.

    The longest wording wins and every other complete one beside it is a parallel request. An incomplete wording counts
    only alone, and takes what it lacks from anywhere in the text.
    """
    text = normalise(message)
    found = [(p, m) for p in phrases() if p.about in offered and (m := p.pattern.search(text))]
    found.sort(key=lambda hit: hit[1].start() - hit[1].end())
    requests = [(Request(p.about, _said(m), p.then), m) for p, m in found]
    complete: list[tuple[Request, re.Match[str]]] = []
    for request, match in requests:
        apart = all(match.end() <= other.start() or match.start() >= other.end() for _, other in complete)
        if apart and not missing(request.tool, request.values):
            complete.append((request, match))
    if complete:
        return [request for request, _ in sorted(complete, key=lambda hit: hit[1].start())]
    for request, _ in requests[:1]:
        elsewhere = {slot: find(slot, text) for slot in missing(request.tool, request.values)}
        known = {slot: value for slot, value in elsewhere.items() if value is not None}
        return [request._replace(values={**request.values, **known})]
    return []


def topic(message: str) -> str | None:
    """What a message without a request is about: the longest wording found that makes up half of it, or None."""
    text = normalise(message)
    found = [(m.end() - m.start(), p.about) for p in chat() if (m := p.pattern.search(text))]
    length, about = max(found, default=(0, None))
    return about if 2 * length >= len(text) else None
