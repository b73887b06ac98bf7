"""A rating is read out of a judge's reply by picking from a closed set, so "10" is ten and prose is no rating.

    read_rating("**RATING kfbaodce:** 10/10", SIMILARITY_SCALE, mark="kfbaodce").rating    # "10"
    read_rating("RATING: 7 … on reflection, RATING: 4", SIMILARITY_SCALE)   # Reading(rating=None, reason="… 7 and 4")
    read_rating("I cannot judge this.", PREFERENCE_SCALE).refused    # True

Two forms are the judge's own, and are read whatever it was shown: a reply that is one JSON object with a reason and a
rating, and a line that carries the question's mark, which no judged text can foresee. Other forms (a plain "RATING: 7",
a reply that is nothing but a rating, JSON among prose, "A is better." at the end) are read where what the judge was
shown holds nothing of that form, since it might be quoted. That is decided by the form alone and never by the rating,
so that none is lost more often than another. Anything ambiguous is no rating and says why; nothing is guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flywheel_ray.values import Value

SIMILARITY_SCALE = tuple(str(n) for n in range(1, 11))
CORRECTNESS_SCALE = ("0", "1")
PREFERENCE_SCALE = ("A", "B", "tie")

LABELS = ("rating", "verdict", "score")
"""What a rating may be called, the first one found winning over the others."""


class Reading(Value):
    """What a reply says: one member of the scale, or None and why."""

    rating: str | None
    reason: str | None = None
    refused: bool = False
    """True where the judge declined, rather than answered in a way that cannot be read."""


def read_rating(
    reply: str | None, scale: Sequence[str], material: str = "", cut: bool = False, mark: str = ""
) -> Reading:
    """The one rating that a reply gives. Never raises.

    Args:
        reply: the judge's words; thinking aloud in <think> tags is left out, as is Markdown around the rating.
        scale: the closed set, from lowest to highest: whole numbers, or words. "7/10" is read where 10 is the highest.
        material: what the judge was shown, of which a rating in no form of the judge's own may be a quotation.
        cut: the reply stopped at a token limit, so a rating at its very end may be the beginning of a longer one.
        mark: the letters that the judge was asked to put on its line, "RATING <mark>: 7"; empty for none.
    """
    spoken = _spoken(reply or "")
    if not spoken:
        why = "the judge's reply was cut off before it answered" if cut else "the judge gave no reply"
        return Reading(rating=None, reason=why)
    numeric = all(member.isdigit() for member in scale)
    found = _own_object(spoken, material)
    if not found:
        # A letter at the cut keeps "RATING: 1", which may have become 10, from being a whole rating.
        found = _found(spoken + "x" if cut else spoken, numeric, mark)
    said = list(dict.fromkeys(_member(stated.text, scale, numeric) or stated.text for stated in found))
    if not said:
        if refusal := _REFUSAL.search(spoken):
            return Reading(rating=None, reason=f"the judge refused: {_short(spoken[refusal.start() :])}", refused=True)
        tail = " (it was cut off)" if cut else ""
        return Reading(rating=None, reason=f"no rating in the judge's reply{tail}: {_short(spoken)}")
    if _quotable({stated.form for stated in found}, material, numeric):
        why = "the judged text itself holds a rating in this form, from which the judge's cannot be told"
        return Reading(rating=None, reason=why)
    if len(said) > 1:
        return Reading(rating=None, reason=f"conflicting ratings in the judge's reply: {_short(' and '.join(said))}")
    if said[0] not in scale:
        return Reading(rating=None, reason=f"the rating {_short(said[0])} is not on the scale {scale[0]}…{scale[-1]}")
    return Reading(rating=said[0])


class _Stated(NamedTuple):
    text: str
    form: str
    """"own", "json", "bare", "sentence", or the label that stands before it."""


_NUMBER = r"(?>[-−–—+]?[0-9]+(?:[.,][0-9]+)?(?: ?(?:/|⁄|out of) ?[0-9]+)?)"
# Not "7-8", "7 or 8", "7, 8", "70%", "7th" or "10 would be". No more than one space ever stands together (see `_tidy`).
_NUMBER_ENDS = r"(?! ?(?:[-−–—~,/⁄&|]|to\b|or\b|and\b)? ?\d)(?! ?%)(?!\w)(?! (?:would|could|should|means|if)\b)"
_ANSWER = r"(?:(?i:answer|option|response) )?"
# A small letter only at the end of a line: elsewhere "a" is an article.
_WORD = rf"{_ANSWER}(?:\[{{0,2}})(?:(?:[Aa] )?(?i:tie)|A|B|[ab](?= ?[\])}}>.!]{{0,3}}(?:\n|\Z)))"
# What may follow a word is a closed set: not "A or B", "A < B", "A, B", "A: 7", "A better answer is B", "A is worse".
_OTHER = rf"{_ANSWER}(?:A|B|(?i:tie))\b"
_HOW = r"(?:(?:clearly|slightly|somewhat|much|far|overall|the) ){0,3}(?:better|best|preferred|stronger|winner)\b"
_WORD_ENDS = (
    rf"(?= ?[\])}}>]{{0,2}}(?: ?(?:\n|\Z|</|<\|)|[.!;](?=\s|\Z)|[,:] (?!{_OTHER}|\d)| \((?!{_OTHER}|\d)"
    rf"| [-–—] (?!{_OTHER}|\d)| is {_HOW}| (?:wins|because|since)\b| (?:over|between) {_OTHER}))"
)
# A few letters before the colon are a mark that was not copied well.
_BETWEEN = (
    r"(?: ?\([^()\n]{0,40}\)| [\[(<]?[a-z]{4,12}[\])>]?(?= ?[:=]))?"
    r"\s?(?:(?i:is|of)\b)?\s?(?:[:=]|[-–—] )?\s?(?i:is )?\s?[\[({<]{0,2} ?"
)
_VALUES = {True: f"({_NUMBER}){_NUMBER_ENDS}", False: f"({_WORD}){_WORD_ENDS}"}
_BEGINNINGS = {True: "[0-9]", False: rf"{_WORD}\b"}


def _labelled(values: Mapping[bool, str]) -> dict[tuple[str, bool], re.Pattern[str]]:
    """Patterns by label and by whether the scale has numbers."""
    return {
        (label, numeric): re.compile(rf"(?<![A-Za-z])(?i:{label})(?![A-Za-z]){_BETWEEN}{value}")
        for label in LABELS
        for numeric, value in values.items()
    }


_LABELLED = _labelled(_VALUES)
_QUOTABLE = _labelled(_BEGINNINGS)
"""What a judge may quote less of than there is: "RATING: 10 or 11"."""
_MARKED = {numeric: re.compile(rf"[\])}}>]?{_BETWEEN}{value}") for numeric, value in _VALUES.items()}
_BARE = {numeric: re.compile(rf"[\[({{<\s]{{0,3}}{value}[\])}}>.!\s]{{0,4}}") for numeric, value in _VALUES.items()}
_SENTENCE = (
    rf"(?:(?i:the )?{_ANSWER}(A|B) is {_HOW}(?: (?:answer|one|option|response))?(?: than {_OTHER})?"
    r"|(?i:it(?: is| s)|this is) a tie"
    r"|(?i:both|the two|A and B)(?: answers| options| responses)? are equally (?:good|bad))"
)
"""What a verdict sounds like in prose; ties too, or this form would favour the others."""
_OPENING = r"(?i:(?:so|thus|hence|therefore|overall|in conclusion|in my view|I think|I would say),? (?:that )?)"
_LAST_SENTENCE = re.compile(rf"(?:\A|\n|[.!?][\n ]){_OPENING}{{0,2}}{_SENTENCE}[.!]?\Z")
_ANY_SENTENCE = re.compile(_SENTENCE)
_REFUSAL = re.compile(
    r"\bI(?:['’]m| am)? (?:sorry|unable|not able|can ?not|can['’]t|won['’]t|will not|must decline|decline)\b"
    r"|\bas an AI\b|\bcan(?:not|['’]t) (?:assist|help|comply)\b",
    re.IGNORECASE,
)
_THINKING_ENDS = re.compile(r"</(?:think|thinking|reasoning)>", re.IGNORECASE)
_THINKING_BEGINS = re.compile(r"<(?:think|thinking|reasoning)>", re.IGNORECASE)
_FULL_WIDTH = {0xFF01 + i: 0x21 + i for i in range(94)} | {0x3000: 0x20}
_MARKS = str.maketrans(dict.fromkeys("*_`\"'“”‘’\u200b\u200c\u200d\ufeff", " "))
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|([nrt])|)")
_FENCED = re.compile(r"```\w*\s(.*)```", re.DOTALL)
_MOST_OBJECTS = 64


def _spoken(reply: str) -> str:
    """The reply without its thinking aloud. A chat template may open the block, and a token limit leave it open."""
    said = _THINKING_ENDS.split(_plain(reply))[-1]
    return _THINKING_BEGINS.split(said)[0].strip()


def _plain(text: str) -> str:
    return text.translate(_FULL_WIDTH)


def _own_object(spoken: str, material: str) -> list[_Stated]:
    """The rating of a reply that is one JSON object with a reason, unless the whole object stands in the material."""
    text = fenced.group(1) if (fenced := _FENCED.fullmatch(spoken)) else spoken
    try:
        ratings = _DECODER.decode(text)
    except (ValueError, RecursionError):
        return []
    if not isinstance(ratings, _Ratings) or not ratings.reasoned or _squeezed(text) in _squeezed(material):
        return []
    return [_Stated(rating, "own") for rating in ratings]


def _found(text: str, numeric: bool, mark: str) -> list[_Stated]:
    """Every rating that a text states, as it is written there. What carries the mark silences everything else."""
    in_json, rest = _json_ratings(text)
    tidy = _tidy(rest)
    if marked := _marked(tidy, numeric, mark):
        return [_Stated(value, "own") for value in marked]
    found = [_Stated(value, "json") for value in in_json]
    if not found and (bare := _BARE[numeric].fullmatch(tidy)):
        return [_Stated(bare.group(1), "bare")]
    for label in LABELS:
        if labelled := _LABELLED[label, numeric].findall(tidy):
            return found + [_Stated(value, label) for value in labelled]
    if not found and not numeric and (sentence := _LAST_SENTENCE.search(tidy)):
        return [_Stated(sentence.group(1) or "tie", "sentence")]
    return found


def _marked(tidy: str, numeric: bool, mark: str) -> list[str]:
    """The ratings on lines that carry the mark: "RATING <mark>: 7"."""
    before, *after = tidy.split(mark) if mark else [tidy]
    found = []
    for text in after:
        if before.rstrip(" [(<{").casefold().endswith("rating") and (value := _MARKED[numeric].match(text)):
            found.append(value.group(1))
        before = text
    return found


def _quotable(forms: set[str], material: str, numeric: bool) -> bool:
    """Whether the material holds anything, whatever it says, in one of the forms that a rating has."""
    if not (forms := forms - {"own"}):
        return False
    text = _tidy(_ESCAPE.sub(_unescaped, _plain(material)))
    if "bare" in forms:
        return any(_BARE[numeric].fullmatch(line) for line in text.split("\n"))
    if "sentence" in forms:
        return _ANY_SENTENCE.search(text) is not None
    labels = LABELS if "json" in forms else forms
    return any(_QUOTABLE[label, numeric].search(text) for label in labels)


def _unescaped(escape: re.Match[str]) -> str:
    return chr(int(escape[1], 16)) if escape[1] else "\n" if escape[2] else ""


def _squeezed(text: str) -> str:
    return re.sub(r"[\s\\]+", "", _plain(text)).casefold()


def _tidy(text: str) -> str:
    """Without Markdown and quotation marks, and with single spaces: what the patterns are written for."""
    text = re.sub(r"[^\S\n]+", " ", text.translate(_MARKS))
    return re.sub(r"\s*\n\s*", "\n", text).strip()


def _json_ratings(text: str) -> tuple[list[str], str]:
    """The ratings of the JSON objects in a text, and the text without those objects: a reason may quote anything."""
    found: list[str] = []
    rest: list[str] = []
    at = kept = 0
    for _ in range(_MOST_OBJECTS):
        if (at := text.find("{", at)) < 0:
            break
        try:
            ratings, end = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError):
            ratings, end = None, at
        if isinstance(ratings, _Ratings) and ratings:
            found += ratings
            rest.append(text[kept:at])
            kept = at = end
        else:
            at += 1
    return found, "".join([*rest, text[kept:]])


class _Ratings(list[str]):
    """The ratings of one JSON object; several where it names its rating twice. Whether it gives a reason, too."""

    reasoned = False


def _ratings(pairs: list[tuple[str, Any]]) -> _Ratings:
    named: dict[str, list[str]] = {}
    for key, value in pairs:
        named.setdefault(key.strip().casefold(), []).extend(value if isinstance(value, _Ratings) else [_written(value)])
    found = _Ratings(next((named[label] for label in LABELS if named.get(label)), []))
    found.reasoned = any(key.startswith("reason") for key in named)
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_ratings)


def _written(value: Any) -> str:
    """A JSON value as text: whole numbers without a fraction, whatever their type."""
    if isinstance(value, str):
        return _tidy(value).strip(".!()[]{}<> ")
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e6:
        return str(int(value))
    return str(value)[:80]


def _member(stated: str, scale: Sequence[str], numeric: bool) -> str | None:
    """The member of the scale that a statement means exactly, or None."""
    if not numeric:
        word = re.sub(r"^(?:a (?=tie)|(?:answer|option|response) ?\[{0,2})|^\[{1,2}", "", stated.strip(), flags=re.I)
        return next((member for member in scale if member.casefold() == word.strip().casefold()), None)
    number, _, highest = re.sub(r" ?(?:⁄|out of) ?", "/", stated.strip()).partition("/")
    if highest and highest.strip() != scale[-1]:
        return None
    whole = re.fullmatch(r"\+?0*([0-9]+)(?:\.0+)?", number.strip())
    return whole.group(1) if whole and whole.group(1) in scale else None


def _short(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= 80 else f"{text[:79]}…")
