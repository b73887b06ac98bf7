"""Verdicts are picked from a closed set; what cannot be read is unscored, never 0."""

from __future__ import annotations

import pytest

from flywheel_ray.datasets import Example
from flywheel_ray.judge import LlmJudge, RubricJudge, judge_messages, read_verdict, word_f1
from flywheel_ray.records import Completion, ToolCall
from flywheel_ray.scoring import SIMILARITY, TOOL_CALLING_CORRECTNESS

TOOLS = ({"type": "function", "function": {"name": "f", "parameters": {}}},)


def example(text: str = "", tools: tuple = (), calls: tuple[ToolCall, ...] = ()) -> Example:
    return Example(
        id="1",
        conversation="c",
        timestamp=0,
        messages=({"role": "user", "content": "hello"},),
        tools=tools,
        reference=Completion(text=text, tool_calls=calls),
    )


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("RATING: 10", 1.0),
        ("rating: 7", 0.7),
        ("**RATING:** 7", 0.7),
        ("10", 1.0),
        ("8/10", 0.8),
        ("The first has 3 errors.\nRATING: 4", 0.4),
        ("RATING: 4 because it misses 2 facts", 0.4),
        ("RATING: 11", None),
        ("RATING: 0", None),
        ("RATING: 7.5", None),
        ("RATING: -1", None),
        ("I cannot rate this.", None),
        ("It has 2 errors and 3 good points", None),
        ("", None),
        (None, None),
    ],
)
def test_similarity_verdicts(reply: str | None, value: float | None) -> None:
    score = read_verdict(SIMILARITY, reply)
    assert score.value == (None if value is None else pytest.approx(value))
    assert (score.reason is None) == (value is not None)


def test_correctness_verdicts() -> None:
    assert read_verdict(TOOL_CALLING_CORRECTNESS, "RATING: 1").value == 1.0
    assert read_verdict(TOOL_CALLING_CORRECTNESS, "RATING: 0").value == 0.0
    assert read_verdict(TOOL_CALLING_CORRECTNESS, "RATING: 10").value is None


def test_llm_judge_counts_silence_as_unscored() -> None:
    judge = LlmJudge(lambda asked: ["RATING: 9", None], name="m")
    found = [
        j.score
        for j in judge.judge([example("a"), example("b")], [Completion(text="a"), Completion(text="b")]).judgements
    ]
    assert [s.value for s in found] == [0.9, None]
    assert judge.name == "m (LLM)"


def test_messages_carry_the_rubric_and_both_answers() -> None:
    call = ToolCall(name="f", arguments={"a": 1})
    system, user = judge_messages(example(tools=TOOLS, calls=(call,)), Completion(text="no idea"))
    assert "RATING" in system["content"] and "tool calls" in system["content"]
    assert 'f({"a": 1})' in user["content"] and "no idea" in user["content"]


def test_rubric_judge_is_lenient_where_a_person_would_be_and_says_what_it_is() -> None:
    judge = RubricJudge()
    assert "no LLM" in judge.name
    reference = example(tools=TOOLS, calls=(ToolCall(name="f", arguments={"city": "Paris", "n": 2}),))
    close = Completion(tool_calls=(ToolCall(name="f", arguments={"city": " paris", "n": "2"}),))
    wrong = Completion(tool_calls=(ToolCall(name="f", arguments={"city": "Rome", "n": 2}),))
    assert [j.score.value for j in judge.judge([reference, reference], [close, wrong]).judgements] == [1.0, 0.0]


def test_word_overlap() -> None:
    assert word_f1("the cat sat", "the cat sat") == 1.0
    assert word_f1("the cat sat", "a dog ran") == 0.0
    assert word_f1("a b", "b c") == 0.5
    assert word_f1("", "") == 1.0
