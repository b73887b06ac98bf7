"""Redaction: personal data and secrets become stand-ins before a record becomes training data.

    redactor = Redactor(Redaction(patterns={"account": r"\\bACC-[0-9]{8}\\b"}))
    messages, reference, counts = redactor.redact(messages, reference)
    # "I'm bob@acme.com, call 415-555-0123"  →  "I'm person1@example.com, call 202-555-0101"
    # {"phone": "+14155550123"}              →  {"phone": "+12025550101"}         Counter(phone=2, email=1)

A stand-in keeps the form of what it replaces and is the same for every form of one value, so that the arguments of a
tool call still match the prompt. Stand-ins are numbered within one request, in order of first appearance (messages,
then reference), not made by keyed hashes: there is no secret to keep, nothing to reverse, the result is equal on every
machine, later turns of a conversation keep their numbers, and two customers' otherwise equal questions become equal.

| kind    | found by                                              | stand-in                                           |
|---------|-------------------------------------------------------|----------------------------------------------------|
| email   | the usual forms of RFC 5322 addresses, `%40` too      | `person1@example.com` (RFC 2606)                   |
| phone   | the clear forms of E.164 and national numbers; others | `202-555-01xx` (555-0100 … 555-0199 are the North  |
|         | next to a word, or under a key, such as "phone"       | American Numbering Plan's for fiction)             |
| card    | 14 to 19 digits of an issuer's range (ISO/IEC 7812-1) | issuer's prefix, zeros, the number, Luhn digit, as |
|         | with a right Luhn digit                               | payment processors' test cards are                 |
| key     | prefixes such as `sk-`, JWT, PEM, `Bearer`, and long  | the same prefix and length: `sk-00…01`             |
|         | random values of names such as `api_key`              |                                                    |
| custom  | a regular expression                                  | `<NAME_1>`                                         |

Phones are found by expressions of our own. On the labelled list in the tests these find 95 of 96 phones and nothing in
88 other texts with numbers. The library `phonenumbers`, which must be told a region to read national numbers, finds 53
to 70 and errs in up to 5 of the others (leniency VALID; no region, US, DE or GB); told to be lenient (POSSIBLE, with a
region) it errs in 35 and more. It also takes three times as long on clean text.
What is not clearly one of these stays: no list of forms finds all personal data. Names need Presidio (`Presidio`).
"""

from __future__ import annotations

import bisect
import itertools
import json
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args

from pydantic import Field, field_validator

from flywheel_ray.errors import ConfigError
from flywheel_ray.values import Value

Kind = Literal["email", "phone", "card", "key"]
KINDS: tuple[Kind, ...] = get_args(Kind)

Finder = Callable[[str], Iterable[tuple[int, int, str]]]
"""Finds entities in a text: (start, end, entity), entity in capitals such as "PERSON"."""


class Presidio(Value):
    """What Microsoft Presidio finds besides the patterns, by a spaCy model: names of people, places, ….

    Source: https://microsoft.github.io/presidio/supported_entities/
    """

    language: str = "en"
    model: str = "en_core_web_lg"
    """The name of an installed spaCy model of that language."""
    entities: tuple[str, ...] = Field(default=("PERSON",), min_length=1)
    """Each becomes `<ENTITY_1>`."""
    min_score: float = Field(default=0.5, ge=0, le=1)

    @field_validator("entities")
    @classmethod
    def _name_in_capitals(cls, entities: tuple[str, ...]) -> tuple[str, ...]:
        for entity in entities:
            if not re.fullmatch("[A-Z][A-Z0-9_]*", entity):
                raise ValueError(f"{entity!r} is no name of a Presidio entity, such as PERSON or US_SSN")
        return tuple(sorted(set(entities)))


class Redaction(Value):
    """What becomes a stand-in. Equal settings are equal values, whatever their order."""

    kinds: tuple[Kind, ...] = KINDS
    patterns: dict[str, str] = Field(default_factory=dict)
    """Name → regular expression (Python's `re`). A group called `value`, where there is one, is what is replaced:
    "customer (?P<value>[A-Z]{2}[0-9]{6})". Keep them linear: one that backtracks without end hangs the build."""
    presidio: Presidio | None = None
    """Find names and the like too; needs the extra `presidio`, and takes milliseconds instead of microseconds."""

    @field_validator("kinds")
    @classmethod
    def _order_kinds(cls, kinds: tuple[Kind, ...]) -> tuple[Kind, ...]:
        return tuple(kind for kind in KINDS if kind in kinds)

    @field_validator("patterns")
    @classmethod
    def _check_patterns(cls, patterns: dict[str, str]) -> dict[str, str]:
        for name, pattern in patterns.items():
            if not re.fullmatch("[a-z][a-z0-9_]*", name):
                raise ValueError(f"pattern {name!r}: a name is lower-case letters, digits and _, such as 'account_id'")
            if name in KINDS:
                raise ValueError(f"pattern {name!r}: that is the name of a built-in kind; choose another")
            try:
                empty = re.compile(pattern).search("")
            except re.error as error:
                raise ValueError(f"pattern {name!r} is no regular expression: {error}") from None
            if empty:
                raise ValueError(f"pattern {name!r} matches the empty text")
        return dict(sorted(patterns.items()))


class Redactor:
    """Redacts requests by one configuration. Holds no state between requests; safe to share between threads."""

    def __init__(self, config: Redaction, finder: Finder | None = None) -> None:
        """Compile the patterns.

        Args:
            config: what to replace.
            finder: what `config.presidio` names, made by `presidio.finder(config.presidio)`.

        Raises:
            ConfigError: the configuration asks for Presidio and no finder was given.
        """
        if config.presidio is not None and finder is None:
            raise ConfigError("redaction.presidio is set, but no engine was given. Use `presidio.redactor(config)`.")
        self.config = config
        self._finder = finder
        self._patterns = [(name, re.compile(pattern)) for name, pattern in config.patterns.items()]
        self._detectors = [d for kind, detectors in _BUILT_IN.items() if kind in config.kinds for d in detectors]
        self._tests = list(dict.fromkeys(detector.suspicious for detector in self._detectors))

    def redact(
        self, messages: list[dict[str, Any]], reference: dict[str, Any]
    ) -> tuple[list[dict[str, Any]], dict[str, Any], Counter[str]]:
        """Replace what the configuration names in a request and its answer. Never raises, whatever the text.

        Args:
            messages: OpenAI chat messages; the arguments of their tool calls are JSON text.
            reference: `text`, `tool_calls` (each `name` and `arguments`, an object or text) and, where there is one,
                `reasoning`.

        Returns:
            Messages and reference, the same objects where nothing was found, and the number of replacements by kind
            (the kinds, names of patterns, and Presidio's entities in lower case). Names of keys and functions, ids
            and roles stay. JSON text stays JSON, and only the values concerned are written anew. A JSON number is
            replaced, by a number, only where its digits are a phone or card found elsewhere in the request, or its key
            says so ("phone", "card_number").
        """
        request = _Request(self)
        _walk(messages, reference, request.find, request.find_number)
        if not request.found:
            return messages, reference, Counter()
        request.name()
        messages, reference = _walk(messages, reference, request.replace, request.replace_number)
        return messages, reference, request.counts

    def spans(self, text: str, key: str = "") -> list[Span]:
        """What stands in a text, in order and without overlaps; `key` is the JSON key that the text is the value of."""
        spans: list[Span] = []
        rest = text
        # In order of precedence: what one has found, the next does not see.
        if self._patterns or self._finder:
            if "<" in text:
                spans += [Span(*match.span(), "", "") for match in _WRITTEN.finditer(text)]
                rest = _blank(rest, spans)
            for name, pattern in self._patterns:
                new = list(_find_pattern(name, pattern, rest))
                spans += new
                rest = _blank(rest, new)
        # A key says what its value is as words before it do: {"phone": "412-4745"} reads as phone=412-4745.
        prefix = _CAMEL.sub("_", key) + "=" if key and _TELLING_KEY.search(key) else ""
        rest = prefix + rest
        suspicious = {test for test in self._tests if test(rest)}
        for test, find in self._detectors:
            if test in suspicious and (new := [span for span in find(rest) if span.start >= len(prefix)]):
                rest = _blank(rest, new)
                spans += [Span(s - len(prefix), e - len(prefix), kind, value) for s, e, kind, value in new]
        if self._finder:
            rest, end = rest[len(prefix) :], 0
            entities = [Span(s, e, entity.lower(), text[s:e]) for s, e, entity in self._finder(text)]
            for span in sorted(entities, key=lambda span: (span.start, -span.end)):
                if span.start >= end and _BLANK not in rest[span.start : span.end]:
                    spans.append(span)
                    end = span.end
        return sorted(span for span in spans if span.kind) if spans else spans

    def suspicious(self, text: str) -> bool:
        """Whether a text may hold anything; false is certain."""
        return bool(self._finder or self._patterns) or any(test(text) for test in self._tests)


class Span(NamedTuple):
    """Part of a text to replace. `value` is one for all forms of a value; an empty kind marks what must stay."""

    start: int
    end: int
    kind: str
    value: str


class _Detector(NamedTuple):
    suspicious: Callable[[str], Any]
    """Cheap: false where `find` certainly finds nothing."""
    find: Callable[[str], Iterator[Span]]


_BLANK = "\uffff"
"""No character, so it stands in no text."""


def _blank(text: str, spans: Iterable[Span]) -> str:
    """The text with spans made unreadable, of the same length."""
    parts, end = [], 0
    for span in sorted(spans):
        if span.end > end:
            start = max(span.start, end)
            parts += [text[end:start], _BLANK * (span.end - start)]
            end = span.end
    return "".join([*parts, text[end:]])


# ── one request ──────────────────────────────────────────────────────────────


class _Request:
    """Two walks over a request: `find` collects values, `name` gives them stand-ins, `replace` puts these in place."""

    def __init__(self, redactor: Redactor) -> None:
        self.redactor = redactor
        self.found: dict[tuple[str, str], None] = {}
        """(kind, value) in order of first appearance."""
        self.counts: Counter[str] = Counter()
        self._spans: dict[tuple[str, str], list[Span]] = {}
        self._json: dict[str, bool] = {}
        self._texts: list[str] = []
        self._stand_ins: dict[tuple[str, str], str] = {}
        self._digits: dict[str, str] = {}
        """Digits of a phone or card → kind."""
        self._lengths: list[int] = []
        self._literals: dict[str, str] = {}
        """Value that is found wherever it stands → kind."""
        self._literal: re.Pattern[str] | None = None

    def find(self, text: str, key: str) -> str:
        if text[:1] in _JSON_START and ("\\" in text or self.redactor.suspicious(text)) and self._is_json(text):
            return _map_json(text, self.find, self.find_number)
        self._texts.append(text)
        spans = self.redactor.spans(text, key)
        if spans:
            self._spans[text, key] = spans
            self.found.update(((span.kind, span.value), None) for span in spans)
        return text

    def find_number(self, number: int, key: str) -> int:
        digits = str(number)
        self._texts.append(digits)
        if _TELLING_KEY.search(key):
            for span in self.redactor.spans(digits, key):
                if span.kind == "phone" or (span.kind == "card" and _CARD_KEY.search(key)):
                    self.found[span.kind, span.value] = None
        return number

    def name(self) -> None:
        """Give every value found its stand-in: the next number of its kind that stands nowhere in the request."""
        self._digits = {value: kind for kind, value in self.found if kind in ("phone", "card")}
        self._lengths = sorted({len(digits) for digits in self._digits}, reverse=True)
        taken: set[str] = set()
        for text in self._texts:
            squeezed = _NOT_DIGITS.sub("", text) if self._lengths else ""
            if "555" in squeezed or "0000" in squeezed:  # as all stand-ins of digits have
                taken.update(digits for _, _, digits in _digit_windows(text, self._lengths))
        written = (match.group() for text in self._texts for match in _WRITTEN.finditer(text))
        taken.update(stand_in.lower().replace("%40", "@") for stand_in in written)
        for text in self._texts:
            if "00000000" in text:
                taken.update(token.lower() for token in _TOKEN.findall(text) if "00000000" in token)
        numbers: Counter[str] = Counter()
        for kind, value in self.found:
            while True:
                numbers[kind] += 1
                stand_in = _stand_in(kind, value, numbers[kind])
                if stand_in.lower() not in taken or numbers[kind] > _ENOUGH:
                    break
            self._stand_ins[kind, value] = stand_in
        # What was found by the words around it may stand elsewhere without them. A request has a handful of these.
        alone = [(k, v) for k, v in self.found if k not in ("email", "phone", "card") and 4 <= len(v) <= 200][:100]
        if alone:
            self._literals = {value: kind for kind, value in alone}
            longest_first = sorted(map(re.escape, self._literals), key=len, reverse=True)
            self._literal = re.compile(rf"(?<!\w)(?:{'|'.join(longest_first)})(?!\w)")

    def replace(self, text: str, key: str) -> str:
        if text[:1] in _JSON_START and self._is_json(text):
            return _map_json(text, self.replace, self.replace_number)
        spans = self._spans.get((text, key), [])
        rest = _blank(text, spans) if spans else text
        if self._literal:
            more = [Span(*m.span(), self._literals[m.group()], m.group()) for m in self._literal.finditer(rest)]
            spans, rest = spans + more, _blank(rest, more)
        spans = sorted(spans + list(self._known_digits(rest)))
        if not spans:
            return text
        parts, end = [], 0
        for span in spans:
            parts += [text[end : span.start], self._write(text[span.start : span.end], span)]
            end = span.end
        return "".join([*parts, text[end:]])

    def replace_number(self, number: int, key: str) -> int:
        text = str(number)
        span = next(self._known_digits(text), None)
        return int(text[: span.start] + self._write(text[span.start :], span)) if span else number

    def _is_json(self, text: str) -> bool:
        if text not in self._json:
            try:
                json.loads(text)
                self._json[text] = True
            except (ValueError, RecursionError):
                self._json[text] = False
        return self._json[text]

    def _known_digits(self, text: str) -> Iterator[Span]:
        last = 0
        for start, end, digits in _digit_windows(text, self._lengths):
            if digits in self._digits and start >= last:
                yield Span(start, end, self._digits[digits], digits)
                last = end

    def _write(self, original: str, span: Span) -> str:
        """The stand-in of a span, in the form of what it replaces."""
        self.counts[span.kind] += 1
        stand_in = self._stand_ins[span.kind, span.value]
        if span.kind in ("phone", "card"):
            digits = iter(stand_in)
            return "".join(next(digits) if "0" <= char <= "9" else char for char in original)
        return stand_in.replace("@", "%40") if span.kind == "email" and "@" not in original else stand_in


_ENOUGH = 10**6
"""Past this many numbers two values may share a stand-in."""

_RECOGNISED = 1000
"""Phones and cards with stand-ins below this number are left alone when met again."""

_WRITTEN = re.compile(r"person[0-9]+(?:@|%40)example\.com|<[A-Z][A-Z0-9_]*_[0-9]+>", re.IGNORECASE)
"""Stand-ins with words."""

_TOKEN = re.compile(r"[\w./+~-]+")


def _stand_in(kind: str, value: str, number: int) -> str:
    """What replaces the `number`-th value of its kind."""
    match kind:
        case "email":
            return f"person{number}@example.com"
        case "phone":
            return _phone_stand_in(number, len(value))
        case "card":
            return _card_stand_in(number, value)
        case "key":
            return _key_stand_in(number, value)
    return f"<{kind.upper()}_{number}>"


# ── walking over messages and JSON ───────────────────────────────────────────

_OfText = Callable[[str, str], str]
_OfNumber = Callable[[int, str], int]

_FIXED = {"role", "content", "tool_calls", "tool_call_id", "id", "type"}


def _walk(
    messages: list[dict[str, Any]], reference: dict[str, Any], text: _OfText, number: _OfNumber
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Map every text and number that may be redacted; what does not change stays the same object."""
    new = [
        _map_fields(m, ["content", "tool_calls", *(f for f in m if f not in _FIXED)], text, number) for m in messages
    ]
    unchanged = all(a is b for a, b in zip(messages, new, strict=True))
    # Reasoning is last: later turns do not repeat it, and shall number what they do repeat alike.
    reference = _map_fields(reference, ["text", "tool_calls", "reasoning"], text, number)
    return messages if unchanged else new, reference


def _map_fields(data: dict[str, Any], fields: list[str], text: _OfText, number: _OfNumber) -> dict[str, Any]:
    changed = {}
    for field in fields:
        old = data.get(field)
        new = _map_calls(old, text, number) if field == "tool_calls" else _map_value(old, "", text, number)
        if new is not old:
            changed[field] = new
    return {**data, **changed} if changed else data


def _map_calls(calls: Any, text: _OfText, number: _OfNumber) -> Any:
    """Tool calls of a message (`function.arguments`) or a reference (`arguments`)."""
    if not isinstance(calls, list | tuple):
        return calls
    new = []
    for call in calls:
        if isinstance(call, dict) and isinstance(call.get("function"), dict):
            function = _map_fields(call["function"], ["arguments"], text, number)
            new.append(call if function is call["function"] else {**call, "function": function})
        else:
            new.append(_map_fields(call, ["arguments"], text, number) if isinstance(call, dict) else call)
    return calls if all(a is b for a, b in zip(calls, new, strict=True)) else new


def _map_value(value: Any, key: str, text: _OfText, number: _OfNumber) -> Any:
    if isinstance(value, str):
        return text(value, key)
    if isinstance(value, dict):
        changed = {k: new for k, v in value.items() if (new := _map_value(v, k, text, number)) is not v}
        return {**value, **changed} if changed else value
    if isinstance(value, list | tuple):
        items = [_map_value(item, key, text, number) for item in value]
        return value if all(a is b for a, b in zip(value, items, strict=True)) else items
    if isinstance(value, int) and not isinstance(value, bool) and 10**6 <= value < 10**19:
        return number(value, key)
    return value


_JSON_START = ("{", "[")
_JSON_TOKEN = re.compile(r"""("[^"\\]*(?:\\.[^"\\]*)*")(\s*:)?|[{}\[\]]|-?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?""")


def _map_json(source: str, text: _OfText, number: _OfNumber) -> str:
    """Map the values of a JSON text as `_map_value` does. All but the values that change stays as it was written."""
    parts, end = [], 0
    key, outer = "", []  # the key that the next value belongs to, and those around it
    for match in _JSON_TOKEN.finditer(source):
        token, new = match.group(), None
        if token in "{[":
            outer.append(key)
        elif token in "}]":
            key = outer.pop()
        elif string := match[1]:
            string = json.loads(string) if "\\" in string else string[1:-1]
            if match[2]:
                key = string
            elif (mapped := text(string, key)) is not string:
                new = json.dumps(mapped, ensure_ascii=token.isascii())
        elif token.isdigit() and 7 <= len(token) <= 19:
            value = int(token)
            if (other := number(value, key)) != value:
                new = str(other)
        if new is not None:
            parts += [source[end : match.start()], new]
            end = match.end()
    return "".join([*parts, source[end:]]) if parts else source


# ── digits ───────────────────────────────────────────────────────────────────

_GAP = r"[ \u00a0\u2009\u202f.\-\u2010-\u2013/]"
_HYPHEN = r"[ \u00a0\u202f\-\u2010\u2011]"

# What a number begins and ends at: not within a word, another number or a price. An escape such as \n, in JSON that
# is quoted in a text, is no word.
_LEFT = r"(?:(?<=\\[nrt])|(?<![0-9A-Za-z_$€£¥])(?<![0-9A-Za-z_]-)(?<![0-9][./]))"
_RIGHT = r"(?![0-9_])(?!(?!x[0-9]|ext)[A-Za-z])(?![.,\-/][0-9])"

_SEVEN_DIGITS = re.compile(rf"[0-9](?:(?:{_GAP}|[()]){{0,3}}[0-9]){{6,}}")
_CLUSTER = re.compile(rf"[0-9](?:(?:{_GAP}|[()]){{0,3}}[0-9]){{5,}}")
_NOT_DIGITS = re.compile("[^0-9]+")
_RUN = re.compile("[0-9]+")
_BEFORE_KNOWN = re.compile(r"(?:00)?[1-9]?[0-9]{0,2}")


def _digit_windows(text: str, lengths: list[int]) -> Iterator[tuple[int, int, str]]:
    """(start, end, digits) of everything with so many digits that ends, and begins, where a run of digits does.

    Separators do not count. Before the beginning, a country code or trunk prefix may stand in the same run. Longer
    windows come before shorter ones of the same end.
    """
    if not lengths:
        return
    for cluster in _CLUSTER.finditer(text):
        digits = _NOT_DIGITS.sub("", cluster.group())
        begins: list[int] = []  # of the runs so far, in the text
        before: list[int] = []  # digits before each of them
        last = 0
        for run in _RUN.finditer(text, *cluster.span()):
            begins.append(run.start())
            before.append(last)
            last += run.end() - run.start()
            if _is_letter(text[run.end() : run.end() + 1]):
                continue
            for length in lengths:
                first = last - length
                if first < 0:
                    continue
                n = bisect.bisect_right(before, first) - 1
                if first > before[n] and not _BEFORE_KNOWN.fullmatch(digits, before[n], first):
                    continue
                begin = begins[n]
                if begin and _is_letter(text[begin - 1]) and text[begin - 2 : begin] not in ("\\n", "\\r", "\\t"):
                    continue
                yield begin + first - before[n], run.end(), digits[first:last]


def _is_letter(char: str) -> bool:
    return char.isalpha() or char == "_"


# ── phones ───────────────────────────────────────────────────────────────────

_COUNTRY = re.compile(r"1|7|2[07]|3[0-469]|4[013-9]|5[1-8]|6[0-6]|8[1246]|9[0-58]|[2-9][0-9]{2}")
_NATIONAL_DIGITS = {
    code: digits
    for digits, codes in {
        8: "45 47 65 216 356 370 371 373 374 502 503 504 505 506 507 852 853 965 968 973 974",
        9: "27 31 32 33 34 41 48 51 56 61 66 84 93 94 212 213 251 254 255 256 351 353 380 420 421 886 966 971 972 998",
        10: "1 7 20 30 44 52 57 58 60 63 64 81 82 90 91 92 98 234",
    }.items()
    for code in codes.split()
}
"""Country code → most digits of a national number there; 11 for others (ITU-T E.164 and the national plans)."""

_N = "[2-9][0-9]{2}"
_MARK = r"[.\-\u2010-\u2013/]"
_AREA = r"\(?0[1-9][0-9]{0,4}\)?"
_PHONE = re.compile(
    rf"""{_LEFT}(?:
      \+{_GAP}?\(?[1-9](?:(?:{_GAP}|[()]){{0,3}}[0-9]){{6,15}}              # +49 30 901820
    | (?P<zeros>(?<![0-9]{_GAP})00{_GAP}?[1-9][0-9]{{0,2}}{_GAP}[0-9]       # 0049 30 901820
        (?:(?:{_GAP}|[()]){{0,3}}[0-9]){{6,12}})
    | (?:1{_GAP}?)?(?:\(?{_N}\){_GAP}?{_N}{_GAP}?[0-9]{{4}}                 # (415) 555-0123
        |{_N}{_GAP}{_N}{_MARK}[0-9]{{4}}|{_N}{_MARK}{_N}{_GAP}[0-9]{{4}}    # 415-555-0123
        |(?<![0-9]{{3}}[ ])(?!256[ ]512[ ]1024)                             # 415 555 0123, but no row of numbers
         {_N}[ ]{_N}[ ][0-9]{{4}}(?![ ][0-9]{{3}}))
    | {_AREA}{_GAP}?[0-9]{{3,4}}{_GAP}[0-9]{{2,3}}{_GAP}[0-9]{{2}}          # 044 668 18 00
    | (?<![0-9][ ])0[1-9](?:{_GAP}[0-9]{{2}}){{4}}(?![ ][0-9]{{2}}(?![0-9]))    # 01 23 45 67 89
    | {_AREA}{_GAP}[0-9]{{3,5}}{_GAP}[0-9]{{3,4}}                           # 020 7946 0958
    | {_AREA}{_GAP}[0-9]{{5,8}}(?:-[0-9]{{1,4}})?                           # 030 901820-0
    | \([1-9][0-9]{{1,3}}\){_GAP}?[0-9]{{3,5}}{_GAP}[0-9]{{3,4}}            # (11) 91234-5678
    | 8{_GAP}?\([0-9]{{3}}\){_GAP}?[0-9]{{3}}{_GAP}[0-9]{{2}}{_GAP}[0-9]{{2}}    # 8 (495) 123-45-67
    | 1[3-9][0-9](?P<gap>{_GAP})[0-9]{{4}}(?P=gap)[0-9]{{4}}                # 138 1234 5678
    ){_RIGHT}""",
    re.VERBOSE,
)
_DATE = re.compile(
    r"(?:19|20)[0-9]{2}[-./ ]?[01]?[0-9][-./ ]?[0-3]?[0-9](?![0-9])"
    r"|[0-3]?[0-9][-./ ][01]?[0-9][-./ ](?:(?:19|20)[0-9]{2}(?![0-9])|[0-9]{2}(?![0-9]|[-./ ][0-9]))"
    r"|[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?![0-9.])"
)
"""Dates, and IP addresses."""


_LINK = r"[\s_:=#\"'`*.()\[\\+-]"
_WHEN = "(?:back|on|at|today|tomorrow|tonight|now)"
_PHONE_WORD = re.compile(
    rf"""(?<![a-z])(?:
      (?P<noun>(?:(?:tele)?phones?|tel|mobiles?|mob|cell(?:phone|ular)?s?|fax|whats[ ]?app|msisdn|sms|hotline|landline
        |(?:contact|callback|call[ _-]back)[ _-](?:number|no|nr)
        |telefon(?:o|e|nummer)?|tel[ée]fono|t[ée]l[ée]phone|handynummer|rufnummer|m[óo]vil|celular)
        (?:{_LINK}{{1,4}}(?:numbers?|n[úu]mero|nummer|num|no|nr|is|ist|est|es|at|on|to)){{0,4}})
    | (?P<asked>(?:call|ring|reach|text|contact)[ ](?:me|us|him|her|them)(?:[ ]{_WHEN}){{0,4}})
    | (?:call|ring|reach|text|contact|dial)(?:[ ]{_WHEN}){{0,4}}
    ){_LINK}{{1,6}}$""",
    re.VERBOSE,
)
"""The words before a number that make a phone of it; a verb alone does so only for the form 555-0123."""
_LONE_PHONE = re.compile(rf"(?:\+?[0-9]{{7,15}}|\(?[0-9]{{1,5}}\)?(?:{_GAP}{{1,2}}[0-9]{{2,8}}){{1,5}}){_RIGHT}")
_LOCAL_PHONE = re.compile(rf"[2-9][0-9]{{2}}[-. ][0-9]{{4}}{_RIGHT}")


def _find_phones(text: str) -> Iterator[Span]:
    last = 0
    for cluster in _SEVEN_DIGITS.finditer(text):
        start, stop = cluster.span()
        spans = list(_clear_phones(text, max(last, start - 2), stop))
        if not spans or spans[0].start > start:
            before = text[max(last, start - 60) : start].lower()
            if word := _PHONE_WORD.search(before):
                lone = _LONE_PHONE if word["noun"] or word["asked"] else _LOCAL_PHONE
                match = lone.match(text, start - (text[start - 1] in "+("), spans[0].start if spans else stop + 4)
                if match and (span := _phone(match)):
                    yield span
        yield from spans
        last = stop


def _clear_phones(text: str, start: int, stop: int) -> Iterator[Span]:
    # Lookbehinds see what is before `start`; lookaheads see no further than the second bound.
    while match := _PHONE.search(text, start, stop + 4):
        if span := _phone(match):
            yield span
            start = span.end
        else:  # what is no phone as a whole may begin with another number
            run = _RUN.search(text, match.start())
            assert run
            start = run.end()


def _phone(match: re.Match[str]) -> Span | None:
    """The national digits of a number as a span, without country code and trunk prefix; None where it is no phone."""
    written = match.group()
    at = [match.start() + i for i, char in enumerate(written) if "0" <= char <= "9"]
    digits = "".join([match.string[i] for i in at])
    if written.startswith("+") or match.lastgroup == "zeros":
        cut = _international(digits, at, bare=written[1:] == digits)
        if cut is None:
            return None
        prefix, last = cut
    else:
        if _DATE.match(written) or (match.re is _PHONE and not 9 <= len(digits) <= 12):
            return None
        prefix, last = 0, len(digits)
    national = _national(digits[prefix:last])
    if len(national) < 6:
        return None
    kind = "" if _is_phone_stand_in(national) else "phone"
    return Span(at[last - len(national)], at[last - 1] + 1, kind, national)


def _international(digits: str, at: list[int], bare: bool) -> tuple[int, int] | None:
    """Number of digits before the national ones, and where these end: numbers that follow may look like a part."""
    zeros = 2 if digits.startswith("00") else 0
    country = _COUNTRY.match(digits, zeros)
    if country is None or (bare and len(digits) < 10):
        return None
    prefix, code = country.end(), country.group()
    trunk = 1 if digits[prefix : prefix + 1] == "0" else 0
    most = _NATIONAL_DIGITS.get(code, 11) + trunk
    for last in range(min(len(digits), prefix + most), prefix + 6 + trunk, -1):
        if last == len(digits) or at[last] != at[last - 1] + 1:
            if code == "1" and not re.fullmatch("(?:[2-9][0-9]{2}){2}[0-9]{4}", digits[prefix:last]):
                return None
            return prefix, last
    return None


def _national(digits: str) -> str:
    """What all forms of one number share: no trunk prefix (0; 1 in North America, 8 in Russia)."""
    digits = digits.lstrip("0")
    return digits[1:] if len(digits) == 11 and digits[0] in "18" else digits


def _phone_stand_in(number: int, length: int) -> str:
    if length == 10:
        number %= 79_800
        return f"{202 + number // 100}5550{100 + number % 100}"
    if length == 7:
        return str(5550100 + number % 4_449_900)
    return "555" + str(number % 10 ** (length - 3)).rjust(length - 3, "0")


def _is_phone_stand_in(digits: str) -> bool:
    if len(digits) == 10:
        number = (int(digits[:3]) - 202) * 100 + int(digits[8:])
    else:
        number = int(digits) - 5550100 if len(digits) == 7 else int(digits[3:])
    return 0 < number < _RECOGNISED and _phone_stand_in(number, len(digits)) == digits


# ── cards ────────────────────────────────────────────────────────────────────

_ISSUERS = [
    (re.compile(digits), stand_in)
    for digits, stand_in in [
        (r"4(?:[0-9]{15}|[0-9]{18})", "4000"),  # Visa; 13 digits are issued no more, and are what EAN-13 codes have
        (r"(?:5[1-5][0-9]{2}|222[1-9]|22[3-9][0-9]|2[3-6][0-9]{2}|27[01][0-9]|2720)[0-9]{12}", "5500"),  # Mastercard
        (r"3[47][0-9]{13}", "3400"),  # American Express
        (r"3(?:0[0-59]|[689][0-9])[0-9]{11}", "3600"),  # Diners Club
        (r"35(?:2[89]|[3-8][0-9])[0-9]{12,15}", "3530"),  # JCB
        (r"6(?:011|4[4-9][0-9]|5[0-9]{2})[0-9]{12,15}", "6011"),  # Discover
        (r"62[0-9]{14,17}", "6200"),  # UnionPay
        (r"220[0-4][0-9]{12,15}", "2200"),  # Mir
        (r"(?:5018|5020|5038|5893|6304|6759|676[1-3])[0-9]{12,15}", "5018"),  # Maestro
    ]
]
"""Issuers' ranges (https://en.wikipedia.org/wiki/Payment_card_number) → the first digits of their stand-ins."""

_CARD = re.compile(
    rf"{_LEFT}(?<!/)(?:[0-9]{{14,19}}"
    rf"|[0-9]{{4}}({_HYPHEN})[0-9]{{4}}\1[0-9]{{4}}\1[0-9]{{2,4}}(?:\1[0-9]{{1,3}})?"
    rf"|[0-9]{{4}}({_HYPHEN})[0-9]{{6}}\2[0-9]{{4,5}}){_RIGHT}"
)


_TABLE = re.compile(rf"[0-9]{{4}}(?:{_HYPHEN}[0-9]{{4}}(?![0-9])){{8,}}")
"""More than two cards in a row are no cards."""


def _find_cards(text: str) -> Iterator[Span]:
    text = _TABLE.sub(lambda table: _BLANK * len(table.group()), text)
    for cluster in _SEVEN_DIGITS.finditer(text):
        position = cluster.start()
        while match := _CARD.search(text, position, cluster.end() + 4):
            start, end = match.span()
            groups = re.split(_HYPHEN, match.group())
            if len(groups) == 5 and _issuer("".join(groups[:4])):  # a security code follows
                end -= len(groups.pop()) + 1
            digits = "".join(groups)
            if issuer := _issuer(digits):
                known = digits.startswith(issuer) and 0 < int(digits[4:-1]) < _RECOGNISED
                yield Span(start, end, "" if known else "card", digits)
                position = end
            else:
                position = start + len(groups[0])


def _issuer(digits: str) -> str | None:
    """First digits of the stand-in of a card number; None for any other number."""
    if _luhn_digit(digits[:-1]) != digits[-1]:
        return None
    return next((stand_in for pattern, stand_in in _ISSUERS if pattern.fullmatch(digits)), None)


def _luhn_digit(digits: str) -> str:
    """The check digit of ISO/IEC 7812-1, annex B."""
    total = sum(map(int, digits[-2::-2])) + sum(sum(divmod(2 * int(d), 10)) for d in digits[::-2])
    return str(-total % 10)


def _card_stand_in(number: int, value: str) -> str:
    digits = (_issuer(value) or "4000") + str(number).rjust(len(value) - 5, "0")
    return digits + _luhn_digit(digits)


# ── keys ─────────────────────────────────────────────────────────────────────

_PREFIX_HINTS = {
    "": ("AKIA", "ASIA", "AIza", "eyJ"),
    "-": ("sk-", "glpat-", "xox", "nvapi-", "PRIVATE KEY-----"),
    "_": ("_live_", "_test_", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "hf_", "npm_"),
}
"""A character that most texts lack → what may begin a key with it."""
_NAME_HINTS = ("key", "secret", "token", "passw", "pwd", "bearer")
_JWT = r"eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\."
_KEY_PREFIX = (
    r"sk-(?:proj-|svcacct-|admin-|ant-[a-z]{3,5}[0-9]{2}-|or-v1-)?|[srp]k_(?:live|test)_"  # OpenAI, Anthropic, Stripe
    r"|A[KS]IA(?=[A-Z0-9]{16}(?![A-Za-z0-9]))|gh[pousr]_|github_pat_|glpat-|xox[abeoprs]-|AIza"  # AWS, GitHub, Slack, …
    rf"|hf_|nvapi-|npm_|{_JWT}"
)
_KEY = re.compile(rf"(?<![A-Za-z0-9_])(?P<prefix>{_KEY_PREFIX})(?P<body>[A-Za-z0-9_-]{{16,}}+)(?!@)")
_PEM = re.compile(
    r"(-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----)((?:\s|\\[nr])*)"
    r"(?:(?:Proc-Type|DEK-Info):[^\n\\]{0,100}(?:\s|\\[nr])*){0,2}"
    r"[A-Za-z0-9+/=\s\\]{64,}(-----END [A-Z ]{0,30}PRIVATE KEY-----)?"
)
_NAME = re.compile("key|secret|token|passw(?:or)?d|pwd|bearer")
_KEY_NAME = re.compile(
    r"(?<![a-z])(?:bearer|(?:api|access|private|(?:client|app)?[ _-]?secret(?:[_-]?access)?)[ _-]?key"
    r"|(?:(?:client|app)[_-]?)?secret|(?:access|auth|api|bot|refresh|session|id)[_-]?token|passw(?:or)?d|pwd)$"
)
_ASSIGNED = re.compile(
    r"(?:[\"'`\\]{0,2}\s{0,2}(?::=|=>|[:=]|\bis\b)|(?<=[Rr])\s)\s{0,3}[\"'`\\]{0,2}"
    r"(?P<body>[A-Za-z0-9_~+/-]{16,200}+={0,2})(?![A-Za-z0-9@])"
)
"""What follows a name: a sign and a value; after "Bearer", white space is enough."""


def _has_prefix(text: str) -> bool:
    return any(hint in text for char, hints in _PREFIX_HINTS.items() if char in text for hint in hints)


def _has_name(text: str) -> bool:
    text = text.lower()
    return any(hint in text for hint in _NAME_HINTS)


def _find_prefixed_keys(text: str) -> Iterator[Span]:
    spans = [Span(*match.span(), "key", match.group()) for match in _PEM.finditer(text)]
    yield from spans
    for match in _KEY.finditer(_blank(text, spans) if spans else text):
        if _is_random(match["body"], turns=2) or (match["prefix"][:1] == "A" and not match["body"].isdigit()):
            yield Span(*match.span(), "key", match.group())


def _find_named_keys(text: str) -> Iterator[Span]:
    lower = text.lower()
    if len(lower) != len(text):  # a few letters are longer in lower case
        lower = text
    for name in _NAME.finditer(lower):
        match = _ASSIGNED.match(text, name.end())
        if (
            match
            and _is_random(match["body"], turns=3)
            and _KEY_NAME.search(lower, max(0, name.start() - 20), name.end())
        ):
            yield Span(*match.span("body"), "key", match["body"])


def _is_random(body: str, turns: int) -> bool:
    """At least two digits, and so many changes between lower case, upper case and digits: words have few."""
    classes = body.translate(_CLASSES)
    return classes.count("d") >= 2 and sum(a != b for a, b in itertools.pairwise(classes)) >= turns


_CLASSES: dict[int, str | None] = {
    **dict.fromkeys(map(ord, string.digits), "d"),
    **dict.fromkeys(map(ord, string.ascii_lowercase), "l"),
    **dict.fromkeys(map(ord, string.ascii_uppercase), "u"),
    **dict.fromkeys(map(ord, string.punctuation), None),
}


def _key_stand_in(number: int, value: str) -> str:
    """Prefix and separators stay; letters and digits become zeros that end in the number."""
    if pem := _PEM.fullmatch(value):
        return f"{pem[1]}{pem[2]}KEY{number}{pem[2]}{pem[3] or ''}"
    prefix = match["prefix"] if (match := _KEY.fullmatch(value)) else ""
    body = value[len(prefix) :]
    if value.startswith("eyJ"):
        prefix = "eyJhbGciOiJub25lIn0.e30."  # {"alg": "none"}, {}
    size = sum(char.isalnum() for char in body)
    digits = iter(str(number).rjust(size, "0"))
    return prefix + "".join(next(digits) if char.isalnum() else char for char in body)


# ── e-mails and own patterns ─────────────────────────────────────────────────

_LATIN = "A-Za-z0-9\u00c0-\u024f"
_ADDRESS = (
    rf"[{_LATIN}_.+-]{{1,64}}(?:@(?![0-9]x\.)|%40)"
    rf"(?:[{_LATIN}](?:[{_LATIN}-]{{0,61}}[{_LATIN}])?\.){{1,8}}[A-Za-z]{{2,24}}(?![A-Za-z0-9_])"
)
_EMAIL = re.compile(rf"(?:(?<=\\[nrt])|(?<![{_LATIN}_.+-])(?!(?<=\\)[nrt]))({_ADDRESS})")
_NEXT_EMAIL = re.compile(rf"[\u00c0-\u024f]*({_ADDRESS})")
"""One that follows another without a space."""


def _find_emails(text: str) -> Iterator[Span]:
    match = _EMAIL.search(text)
    while match:
        written = match[1].lstrip(".+-")
        value = written.lower().replace("%40", "@")
        if not value.startswith(("@", "git@")):  # git@github.com:owner/name is no person
            kind = "" if _WRITTEN.fullmatch(value) else "email"
            yield Span(match.end() - len(written), match.end(), kind, value)
        match = _NEXT_EMAIL.match(text, match.end()) or _EMAIL.search(text, match.end())


def _find_pattern(name: str, pattern: re.Pattern[str], text: str) -> Iterator[Span]:
    group = "value" if "value" in pattern.groupindex else 0
    for match in pattern.finditer(text):
        start, end = match.span(group)
        if start < end and _BLANK not in text[start:end]:
            yield Span(start, end, name, text[start:end])


def _has_at(text: str) -> bool:
    return "@" in text or "%40" in text


_BUILT_IN: Mapping[Kind, list[_Detector]] = {
    "key": [_Detector(_has_prefix, _find_prefixed_keys), _Detector(_has_name, _find_named_keys)],
    "email": [_Detector(_has_at, _find_emails)],
    "card": [_Detector(_SEVEN_DIGITS.search, _find_cards)],
    "phone": [_Detector(_SEVEN_DIGITS.search, _find_phones)],
}
"""In order of precedence."""

_CAMEL = re.compile("(?<=[a-z0-9])(?=[A-Z])")
_TELLING_KEY = re.compile(
    "phone|tel|mob|cel|fax|whats|sms|msisdn|line|ruf|call|contact|card|key|secret|token|passw|pwd", re.I
)
_CARD_KEY = re.compile("card|(?:^|_)(?:pan|cc)(?:_|$)", re.I)
