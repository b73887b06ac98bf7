"""A judge scores what programs cannot: rubric → messages for a model, its reply → a Score, or unscored and why.

    judge = LlmJudge(ask, name="llama-3.3-70b")        # ask: messages in, reply texts out; any endpoint
    judge = RubricJudge()                              # offline, and plainly no LLM
    judge.judge(examples, completions).judgements[0].score        # Score(metric="similarity", value=0.8)

The rubrics are the text files beside this module. A verdict is picked from a closed set, so "10" is ten and "I cannot
say" is unscored and counted, never 0. Both judges give `tool_calling_correctness` (0 or 1) where the request had tools
and `similarity` (tenths) where it had none.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from pydantic import Field

from flywheel_ray.datasets import Example
from flywheel_ray.records import Completion, ToolCall, content_text
from flywheel_ray.scoring import SIMILARITY, TOOL_CALLING_CORRECTNESS, Score, score_tool_calls
from flywheel_ray.values import Value, canonical_json

Messages = list[dict[str, Any]]
Ask = Callable[[Sequence[Messages]], Sequence[str | None]]
"""Puts each conversation to the judging model; None where it gave no reply."""

SIMILARITY_SCALE = tuple(range(1, 11))
CORRECTNESS_SCALE = (0, 1)


Order = Literal["reference_first", "candidate_first"]


class Verdict(Value):
    """One reply of a judge. `value` is in [0, 1], None where it is unscored and `reason` says why.

    An absolute verdict has no `order`. A pairwise one has 1 where the candidate is better, 0.5 for a tie and 0 where
    the reference is better, whichever of the two was shown first.
    """

    metric: str
    value: float | None
    reason: str | None = None
    order: Order | None = None
    reference_chars: int = Field(ge=0)
    """Length of the reference as the judge saw it, in characters."""
    candidate_chars: int = Field(ge=0)


class Judgement(Value):
    """What a judge says of one completion: the score, and the verdicts it was made of (two for both orders)."""

    score: Score
    verdicts: tuple[Verdict, ...] = ()


class JudgeUsage(Value):
    """What judging took. `asked` counts questions put to the model, `cached` those answered from earlier verdicts."""

    asked: int = 0
    cached: int = 0
    unscored: int = 0
    """Verdicts without a value: unreadable, refused, off the scale, or no reply."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    usd: float | None = None
    """US dollars for the questions asked; None where no price is configured."""


class Judging(Value):
    """The judgements on some completions, in their order, and what they took."""

    judgements: tuple[Judgement, ...]
    usage: JudgeUsage = JudgeUsage()


class RubricJudge:
    """The offline judge: rules, no LLM.

    `tool_calling_correctness` forgives case, surrounding space and numbers written as text; `similarity` is the word
    overlap F1 of SQuAD (Rajpurkar et al. 2016, arXiv:1606.05250), which rewards shared words and not shared meaning.
    """

    name = "rubric (offline rules, no LLM)"

    def judge(self, examples: Sequence[Example], completions: Sequence[Completion]) -> Judging:
        """One judgement for each pair; every pair can be scored."""
        pairs = zip(examples, completions, strict=True)
        return Judging(judgements=tuple(_judgement(e, c, rubric_score(e, c)) for e, c in pairs))


class LlmJudge:
    """A judge behind any model: rubric and both answers in, one rating from a closed set out."""

    def __init__(self, ask: Ask, name: str) -> None:
        self._ask = ask
        self.name = f"{name} (LLM)"

    def judge(self, examples: Sequence[Example], completions: Sequence[Completion]) -> Judging:
        """One judgement for each pair, unscored where the model gave no reply or no readable rating."""
        pairs = list(zip(examples, completions, strict=True))
        replies = self._ask([judge_messages(e, c) for e, c in pairs])
        judgements = tuple(
            _judgement(e, c, read_verdict(metric_of(e), reply)) for (e, c), reply in zip(pairs, replies, strict=True)
        )
        unscored = sum(j.score.value is None for j in judgements)
        return Judging(judgements=judgements, usage=JudgeUsage(asked=len(pairs), unscored=unscored))


def metric_of(example: Example) -> str:
    """The judged metric of an example: tool_calling_correctness where the request had tools, else similarity."""
    return TOOL_CALLING_CORRECTNESS if example.tools else SIMILARITY


def judge_messages(example: Example, completion: Completion) -> Messages:
    """What the judging model is asked: the rubric as system message, the task and both answers as user message."""
    rubric = "judge_tool_calling.txt" if example.tools else "judge_similarity.txt"
    task = "\n".join(f"{m.get('role')}: {content_text(m.get('content'))}" for m in example.messages)
    body = f"# Request\n{task}\n\n# Reference\n{_answer(example.reference)}\n\n# Candidate\n{_answer(completion)}"
    return [{"role": "system", "content": _rubric(rubric)}, {"role": "user", "content": body}]


def read_verdict(metric: str, reply: str | None) -> Score:
    """A Score from a judge's reply: the rating after the last "RATING:", or the whole reply where it is only a number.

    Anything that is not exactly one member of the scale (1 … 10 for similarity, 0 or 1 for correctness) is unscored.
    """
    scale = SIMILARITY_SCALE if metric == SIMILARITY else CORRECTNESS_SCALE
    if reply is None or not reply.strip():
        return Score(metric=metric, value=None, reason="the judge gave no reply")
    labelled: list[str] = re.findall(r"RATING\W{0,4}?\s*(-?\d+(?:\.\d+)?)", reply, flags=re.IGNORECASE)
    bare = re.fullmatch(r"\W*?(-?\d+(?:\.\d+)?)(?:\s*/\s*10)?\W*", reply.strip())
    text = labelled[-1] if labelled else bare.group(1) if bare else None
    if text is None:
        return Score(metric=metric, value=None, reason=f"no rating in the judge's reply: {reply.strip()[:80]!r}")
    rating = float(text)
    if rating not in scale:
        return Score(metric=metric, value=None, reason=f"rating {text} is not on the scale {scale[0]}…{scale[-1]}")
    return Score(metric=metric, value=rating / scale[-1])


def rubric_score(example: Example, completion: Completion) -> Score:
    """The offline verdict on one pair (see `RubricJudge`)."""
    if not example.tools:
        return Score(metric=SIMILARITY, value=word_f1(example.reference.text, completion.text))
    lenient = score_tool_calls(_lenient(example.reference), _lenient(completion))[1]
    return Score(metric=TOOL_CALLING_CORRECTNESS, value=lenient.value)


def word_f1(reference: str, predicted: str) -> float:
    """Harmonic mean of word precision and recall, in [0, 1]; two empty texts agree."""
    a, b = (Counter(re.findall(r"\w+", text.casefold())) for text in (reference, predicted))
    shared = sum((a & b).values())
    if not a and not b:
        return 1.0
    return 2 * shared / (sum(a.values()) + sum(b.values()))


@cache
def _rubric(name: str) -> str:
    return (files("flywheel_ray") / name).read_text(encoding="utf-8")


def _answer(completion: Completion) -> str:
    if not completion.tool_calls:
        return completion.text or "(no tool call, no text)"
    return "\n".join(
        f"{c.name}({c.arguments if isinstance(c.arguments, str) else json.dumps(c.arguments, ensure_ascii=False)})"
        for c in completion.tool_calls
    )


def _judgement(example: Example, completion: Completion, score: Score) -> Judgement:
    verdict = Verdict(
        metric=score.metric,
        value=score.value,
        reason=score.reason,
        reference_chars=len(_answer(example.reference)),
        candidate_chars=len(_answer(completion)),
    )
    return Judgement(score=score, verdicts=(verdict,))


def _lenient(completion: Completion) -> Completion:
    calls = tuple(
        ToolCall(name=c.name, arguments=c.arguments if isinstance(c.arguments, str) else _relaxed(c.arguments))
        for c in completion.tool_calls
    )
    return Completion(text=completion.text, tool_calls=calls)


def _relaxed(value: Any) -> Any:
    if isinstance(value, str):
        text = " ".join(value.split()).casefold()
        try:
            number = json.loads(text)
        except ValueError:
            return text
        return number if isinstance(number, int | float) and not isinstance(number, bool) else text
    if isinstance(value, dict):
        return {key: _relaxed(item) for key, item in value.items()}
    if isinstance(value, list):
        return sorted((_relaxed(item) for item in value), key=canonical_json)
    return value
