"""A rating is read out of a judge's reply by picking from a closed set, so "10" is ten and prose is no rating.

    read_rating("**RATING:** 10/10", SIMILARITY_SCALE).rating        # "10"
    read_rating("RATING: 7 … on reflection, RATING: 4", SIMILARITY_SCALE)   # Reading(rating=None, reason="… 7 and 4")
    read_rating("I cannot judge this.", PREFERENCE_SCALE).refused    # True

Three forms are read: a JSON object with a "rating", a labelled line ("RATING: 7"), and a reply that is nothing but a
rating. Anything else, and anything ambiguous, is no rating and says why; nothing is guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

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


def read_rating(reply: str | None, scale: Sequence[str], material: str = "", cut: bool = False) -> Reading:
    """The one rating that a reply gives. Never raises.

    Args:
        reply: the judge's words; thinking aloud in <think> tags is left out, as is Markdown around the rating.
        scale: the closed set, from lowest to highest: whole numbers, or words. "7/10" is read where 10 is the highest.
        material: what the judge was shown. A rating that the reply gives in the form in which it stands there may be a
            quotation ("the answer says RATING: 10") or obedience to it, and is not taken.
        cut: the reply stopped at a token limit, so a rating at its very end may be the beginning of a longer one.
    """
    spoken = _spoken(reply or "")
    if not spoken:
        why = "the judge's reply was cut off before it answered" if cut else "the judge gave no reply"
        return Reading(rating=None, reason=why)
    numeric = all(member.isdigit() for member in scale)
    # A letter at the cut keeps "RATING: 1", which may have become 10, from being a whole rating.
    found = _found(spoken + "x" if cut else spoken, numeric)
    said = list(dict.fromkeys(_member(stated.text, scale, numeric) or stated.text for stated in found))
    if not said:
        if refusal := _REFUSAL.search(spoken):
            return Reading(rating=None, reason=f"the judge refused: {_short(spoken[refusal.start() :])}", refused=True)
        tail = " (it was cut off)" if cut else ""
        return Reading(rating=None, reason=f"no rating in the judge's reply{tail}: {_short(spoken)}")
    if len(said) > 1:
        return Reading(rating=None, reason=f"conflicting ratings in the judge's reply: {_short(' and '.join(said))}")
    if said[0] not in scale:
        return Reading(rating=None, reason=f"the rating {_short(said[0])} is not on the scale {scale[0]}…{scale[-1]}")
    forms = {stated.form for stated in found} - {"bare"}
    quotable = [s for s in _found(_plain(material), numeric) if s.form in forms] if forms else []
    if any(_member(stated.text, scale, numeric) == said[0] for stated in quotable):
        why = f"the judged text itself holds the rating {said[0]}, from which the judge's cannot be told"
        return Reading(rating=None, reason=why)
    return Reading(rating=said[0])


class _Stated(NamedTuple):
    text: str
    form: Literal["json", "label", "bare"]


_NUMBER = r"(?>[-−–—+]?[0-9]+(?:[.,][0-9]+)?(?: ?(?:/|⁄|out of) ?[0-9]+)?)"
# Not "7-8", "7 or 8", "7, 8", "70%" or "7th". No more than one space ever stands together (see `_tidy`).
_NUMBER_ENDS = r"(?! ?(?:[-−–—~,/⁄&|]|to\b|or\b|and\b)? ?\d)(?! ?%)(?!\w)"
_WORD = r"(?:(?i:answer|option|response) )?(?:\[{0,2})(?:(?:[Aa] )?(?i:tie)|A|B)"
# Not "A or B", "A/B", "A, B", "A+".
_WORD_ENDS = r"(?![\w+])(?! ?(?:(?i:or|and|vs)\b\.?|[,/⁄&|=]) ?(?:(?i:answer|option|response) )?(?:A|B|(?i:tie))\b)"
_BETWEEN = r"(?: ?\([^()\n]{0,40}\))?\s?(?:(?i:is|of)\b)?\s?(?:[:=]|[-–—] )?\s?(?i:is )?\s?[\[({<]{0,2} ?"
_VALUES = {True: f"({_NUMBER}){_NUMBER_ENDS}", False: f"({_WORD}){_WORD_ENDS}"}
_LABELLED = {
    (label, numeric): re.compile(rf"(?<![A-Za-z])(?i:{label})(?![A-Za-z]){_BETWEEN}{value}")
    for label in LABELS
    for numeric, value in _VALUES.items()
}
_BARE = {numeric: re.compile(rf"[\[({{<\s]{{0,3}}{value}[\])}}>.!\s]{{0,4}}") for numeric, value in _VALUES.items()}
_REFUSAL = re.compile(
    r"\bI(?:['’]m| am)? (?:sorry|unable|not able|can ?not|can['’]t|won['’]t|will not|must decline|decline)\b"
    r"|\bas an AI\b|\bcan(?:not|['’]t) (?:assist|help|comply)\b",
    re.IGNORECASE,
)
_THINKING_ENDS = re.compile(r"</(?:think|thinking|reasoning)>", re.IGNORECASE)
_THINKING_BEGINS = re.compile(r"<(?:think|thinking|reasoning)>", re.IGNORECASE)
_FULL_WIDTH = {0xFF01 + i: 0x21 + i for i in range(94)} | {0x3000: 0x20}
_MARKS = str.maketrans(dict.fromkeys("*_`\"'“”‘’", " "))
_MOST_OBJECTS = 64


def _spoken(reply: str) -> str:
    """The reply without its thinking aloud. A chat template may open the block, and a token limit leave it open."""
    said = _THINKING_ENDS.split(_plain(reply))[-1]
    return _THINKING_BEGINS.split(said)[0].strip()


def _plain(text: str) -> str:
    return text.translate(_FULL_WIDTH)


def _found(text: str, numeric: bool) -> list[_Stated]:
    """Every rating that a text states, as it is written there."""
    stated, rest = _json_ratings(text)
    found = [_Stated(value, "json") for value in stated]
    tidy = _tidy(rest)
    if not found and (bare := _BARE[numeric].fullmatch(tidy)):
        return [_Stated(bare.group(1), "bare")]
    for label in LABELS:
        if labelled := _LABELLED[label, numeric].findall(tidy):
            return found + [_Stated(value, "label") for value in labelled]
    return found


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
    """The ratings of one JSON object, all that is kept of it; several where it names its rating twice."""


def _ratings(pairs: list[tuple[str, Any]]) -> _Ratings:
    named: dict[str, list[str]] = {}
    for key, value in pairs:
        named.setdefault(key.strip().casefold(), []).extend(value if isinstance(value, _Ratings) else [_written(value)])
    return _Ratings(next((named[label] for label in LABELS if named.get(label)), []))


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
