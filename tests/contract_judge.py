"""What every `Judge` must do, and a real endpoint for those that ask a model. A module subclasses the suite.

    class TestRubric(JudgeContract):
        @pytest.fixture
        def judge(self): return RubricJudge()

`JudgeServer` is a small OpenAI-compatible server that rates by rules and misbehaves as it is told to.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from flywheel_ray.datasets import Example
from flywheel_ray.judge import LlmJudge, RubricJudge
from flywheel_ray.records import Completion, ToolCall
from flywheel_ray.scoring import SIMILARITY, TOOL_CALLING_CORRECTNESS
from flywheel_ray.services import Judge

TOOL = {
    "type": "function",
    "function": {"name": "route", "parameters": {"type": "object", "properties": {"queue": {"type": "string"}}}},
}


def text_pair(i: int, right: bool) -> tuple[Example, Completion]:
    """A request without tools, and an answer that is the reference or nothing like it."""
    reference = Completion(text=f"Your card number {i} arrives on Monday.")
    example = Example(
        id=f"t{i}",
        conversation=f"t{i}",
        timestamp=0,
        messages=({"role": "user", "content": f"Where is card {i}?"},),
        tools=(),
        reference=reference,
    )
    return example, reference if right else Completion(text="No idea whatsoever, sorry!")


def tool_pair(i: int, right: bool) -> tuple[Example, Completion]:
    """A request with a tool, and a call that is the reference or routes elsewhere."""
    reference = Completion(tool_calls=(ToolCall(name="route", arguments={"queue": f"cards-{i}"}),))
    example = Example(
        id=f"c{i}",
        conversation=f"c{i}",
        timestamp=0,
        messages=({"role": "user", "content": f"Route request {i}"},),
        tools=(TOOL,),
        reference=reference,
    )
    wrong = Completion(tool_calls=(ToolCall(name="route", arguments={"queue": "nowhere"}),))
    return example, reference if right else wrong


def pairs(count: int) -> tuple[list[Example], list[Completion]]:
    """Texts and tool calls in turn, two right ones after two wrong ones."""
    made = [(text_pair if i % 2 else tool_pair)(i, right=i % 4 > 1) for i in range(count)]
    return [e for e, _ in made], [c for _, c in made]


class JudgeContract:
    """The suite. `judge` is the judge; `unreadable` is the share of its verdicts that may be unscored."""

    unreadable = 0.0

    def test_each_pair_has_its_judgement_in_order(self, judge: Judge) -> None:
        examples, completions = pairs(40)
        judging = judge.judge(examples, completions)
        assert len(judging.judgements) == 40
        right = [i % 4 > 1 for i in range(40)]
        scored = [
            (j.score.value, r) for j, r in zip(judging.judgements, right, strict=True) if j.score.value is not None
        ]
        assert len(scored) >= 40 * (1 - 2 * self.unreadable) and len({r for _, r in scored}) == 2
        assert min(v for v, r in scored if r) > max(v for v, r in scored if not r)

    def test_scores_are_made_of_their_verdicts(self, judge: Judge) -> None:
        examples, completions = pairs(12)
        for example, judgement in zip(examples, judge.judge(examples, completions).judgements, strict=True):
            score, verdicts = judgement.score, judgement.verdicts
            assert verdicts and {v.metric for v in verdicts} == {score.metric}
            if score.metric != "preference":
                assert score.metric == (TOOL_CALLING_CORRECTNESS if example.tools else SIMILARITY)
                assert [v.order for v in verdicts] == [None]
            else:
                assert {v.order for v in verdicts} == {"reference_first", "candidate_first"}
            values = [v.value for v in verdicts]
            if None in values:
                assert score.value is None and score.reason
            else:
                assert score.value == sum(values) / len(values) and 0 <= score.value <= 1 and score.reason is None
            for verdict in verdicts:
                assert (verdict.value is None) == (verdict.reason is not None)
                assert verdict.reference_chars > 0 and verdict.candidate_chars > 0

    def test_what_is_unscored_is_counted(self, judge: Judge) -> None:
        judging = judge.judge(*pairs(40))
        verdicts = [v for j in judging.judgements for v in j.verdicts]
        assert judging.usage.unscored == sum(v.value is None for v in verdicts)
        if isinstance(judge, LlmJudge):
            assert judging.usage.asked + judging.usage.cached == len(verdicts)
        else:
            assert judging.usage.asked == judging.usage.cached == 0

    def test_nothing_to_judge(self, judge: Judge) -> None:
        judging = judge.judge([], [])
        assert judging.judgements == () and judging.usage.asked == judging.usage.unscored == 0

    def test_the_name_says_what_it_is(self, judge: Judge) -> None:
        assert ("no LLM" in judge.name) == isinstance(judge, RubricJudge)
        assert judge.name == judge.name and "\n" not in judge.name


Rule = Callable[[str], Any]


class JudgeServer:
    """An ASGI app that rates a candidate by whether it equals the reference, or as `rule` says of the user message.

    Args:
        schema: whether it takes `response_format`; True answers in JSON, False with a 400, "ignores" in text.
        rule: the rating for the material, in place of the usual one.
        fail: statuses of the first requests, before any is answered.
        garbage: every nth reply is unreadable; 0 never.
        broken: every nth body is not even JSON; 0 never.
    """

    def __init__(
        self,
        schema: bool | str = True,
        rule: Rule | None = None,
        fail: tuple[int, ...] = (),
        garbage: int = 0,
        broken: int = 0,
        usage: bool = True,
    ) -> None:
        self.schema, self.rule, self.garbage, self.broken, self.usage = schema, rule or fair, garbage, broken, usage
        self.fail = list(fail)
        self.seen: list[dict[str, Any]] = []
        self.answered = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = await Request(scope, receive).json()
        await self._response(body)(scope, receive, send)

    def _response(self, body: dict[str, Any]) -> Response:
        self.seen.append(body)
        if self.fail:
            return JSONResponse({"error": {"message": "later"}}, self.fail.pop(0), {"retry-after": "0.01"})
        wanted = body.get("response_format")
        if wanted and self.schema is False:
            return JSONResponse({"error": {"message": "response_format json_schema is not supported"}}, 400)
        self.answered += 1
        if self.broken and self.answered % self.broken == 0:
            return Response("<html>hello</html>")
        rating = self.rule(body["messages"][-1]["content"])
        if isinstance(rating, tuple):  # the whole reply
            text = rating[0]
        elif self.garbage and self.answered % self.garbage == 0:
            text = "Both have their merits, 3 of them to be exact."
        elif wanted and self.schema is True:
            text = json.dumps({"reason": "the candidate says RATING: 5", "rating": rating})
            allowed = wanted["json_schema"]["schema"]["properties"]["rating"]["enum"]
            assert rating in allowed, (rating, allowed)
        else:
            line = re.search(r"RATING [a-p]{8}:", body["messages"][-1]["content"])  # as it was asked, if it was
            text = f"{line.group() if line else 'RATING:'} {rating}"
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 100, "completion_tokens": 10} if self.usage else None
        return JSONResponse({"choices": [choice], "usage": usage})


def parts_of(material: str) -> dict[str, str]:
    """The parts between marker lines, by title."""
    found = re.findall(r"=== ([a-zA-Z ]+) ([a-p]{8}) ===\n(.*?)\n=== end of \1 \2 ===", material, re.S)
    return {title: text for title, _, text in found}


def fair(material: str) -> int | str:
    """10 or 1, 1 or 0, tie or the right one: what an answer deserves that equals the reference or does not."""
    parts = parts_of(material)
    if "answer A" in parts:
        wrong = [t for t in ("answer A", "answer B") if "No idea" in parts[t] or "nowhere" in parts[t]]
        return "tie" if not wrong else "A" if wrong == ["answer B"] else "B"
    right = parts["reference"] == parts["candidate"]
    return int(right) if "tools" in parts else 10 if right else 1
