"""A breakdown says where tool calls went wrong: which tool, which argument, called instead of what, called for nothing.

    found = breakdown((example.reference, example.tools, outcome.completion) for … in …)
    found.tools[0]          # ToolAccuracy(tool="route", n=306, right_name=306, right_args=302)
    found.arguments[0]      # ArgumentAccuracy(tool="route", path="queue", n=306, wrong=4, missing=0, …)
    found.confusion         # (Confusion(wanted="route", called="(no tool)", n=3), …)

Calls are matched as `scoring` matches them: equal ones first, then those of one name so that as few arguments as
possible differ. Calls left over are paired in their order; what is left then was not called, or called for nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import compress
from typing import Any, Literal

import numpy as np
from pydantic import Field

from flywheel_ray.datasets import NO_TOOL
from flywheel_ray.records import Completion, ToolCall
from flywheel_ray.scoring import Strictness, is_json_object, normal_calls, parameters_of
from flywheel_ray.values import Value, canonical_bytes

UNKNOWN_TOOL = "(unknown tool)"
"""Stands for the name of a called tool that the request did not offer."""

ArgumentFault = Literal["wrong", "missing", "extra", "wrong_type"]


class ToolAccuracy(Value):
    """One tool: how often the references call it, and how many of those calls were made, and made right."""

    tool: str
    n: int
    right_name: int
    right_args: int


class ArgumentAccuracy(Value):
    """One argument of one tool, over the places in matched calls where either side has it.

    `path` leads into objects by `.` and into arrays by `[]`: "items[].id". What is missing, extra or of another type is
    counted where it happens and not again for what it contains.
    """

    tool: str
    path: str
    n: int
    wrong: int = 0
    """Of the right type and another value; of an array, another length. Sets are compared in sorted order."""
    missing: int = 0
    extra: int = 0
    wrong_type: int = 0

    @property
    def right(self) -> int:
        """How often it was as in the reference, apart from what it contains."""
        return self.n - self.wrong - self.missing - self.extra - self.wrong_type


class Confusion(Value):
    """How often a call of one tool was wanted and another was made; `NO_TOOL` and `UNKNOWN_TOOL` stand for tools."""

    wanted: str
    called: str
    n: int


class Abstention(Value):
    """Completions by whether the reference calls a tool and whether the prediction does, rightly or not."""

    wanted_called: int = 0
    wanted_not_called: int = 0
    not_wanted_called: int = 0
    not_wanted_not_called: int = 0


class Breakdown(Value):
    """Where tool calls of `n` completions went wrong."""

    n: int
    tools: tuple[ToolAccuracy, ...] = ()
    """Most frequent first."""
    arguments: tuple[ArgumentAccuracy, ...] = ()
    """Most faults first; those without are in it too."""
    confusion: tuple[Confusion, ...] = ()
    """Wanted → called, of every wanted or made call, the right ones too; most frequent first."""
    abstention: Abstention = Abstention()
    malformed: int = Field(default=0, ge=0)
    """Predicted calls whose arguments are no JSON object. They count for their tool's name, not for its arguments."""


def breakdown(
    cases: Iterable[tuple[Completion, Sequence[Mapping[str, Any]], Completion]], strictness: Strictness = "exact"
) -> Breakdown:
    """Break tool calls down over completions.

    Args:
        cases: of each, the reference, the request's tools in OpenAI's form, and the prediction.
        strictness: which arguments count as equal, as in `scoring`.

    Raises:
        ValueError: a reference has arguments that are not a JSON object.
    """
    count = _Counts()
    for reference, tools, predicted in cases:
        count.add(reference.tool_calls, tools, predicted.tool_calls, strictness)
    return count.summary()


class _Counts:
    def __init__(self) -> None:
        self.n = self.malformed = 0
        self.wanted: Counter[str] = Counter()
        self.right_name: Counter[str] = Counter()
        self.right_args: Counter[str] = Counter()
        self.places: Counter[tuple[str, str]] = Counter()
        self.faults: Counter[tuple[str, str, ArgumentFault]] = Counter()
        self.confusion: Counter[tuple[str, str]] = Counter()
        self.abstention: Counter[tuple[bool, bool]] = Counter()

    def add(
        self,
        wanted: Sequence[ToolCall],
        tools: Sequence[Mapping[str, Any]],
        called: Sequence[ToolCall],
        strictness: Strictness,
    ) -> None:
        self.n += 1
        self.abstention[bool(wanted), bool(called)] += 1
        self.wanted.update(call.name for call in wanted)
        known = {call.name for call in wanted}.union(*map(_names, tools))
        spare_wanted: list[str] = []
        spare_called: list[str] = [call.name for call in called if call.name not in {c.name for c in wanted}]
        for name in dict.fromkeys(call.name for call in wanted):
            parameters = parameters_of(tools, name)
            arguments = [call.arguments for call in (*wanted, *called) if call.name == name]
            n = sum(call.name == name for call in wanted)
            normal = _normal(arguments, parameters, strictness)
            mine, theirs = normal[:n], normal[n:]
            if None in mine:
                raise ValueError("the reference's tool-call arguments are not a JSON object")
            for reference, predicted in self._matched(name, mine, theirs):
                self._compare(name, reference, predicted)
            matched = min(len(mine), len(theirs))
            self.right_name[name] += matched
            self.confusion[name, name] += matched
            spare_wanted += [name] * (len(mine) - matched)
            spare_called += [name] * (len(theirs) - matched)
        for i in range(max(len(spare_wanted), len(spare_called))):
            want = spare_wanted[i] if i < len(spare_wanted) else NO_TOOL
            call = spare_called[i] if i < len(spare_called) else NO_TOOL
            self.confusion[want, call if call == NO_TOOL or call in known else UNKNOWN_TOOL] += 1
        self.malformed += sum(isinstance(call.arguments, str) for call in called)

    def _matched(self, name: str, wanted: Sequence[Any], called: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
        """Calls of one name paired with the fewest differences in all; malformed ones (None) last."""
        if len(wanted) == len(called) == 1:
            yield wanted[0], called[0]
            return
        if not wanted or not called:
            return
        from scipy.optimize import linear_sum_assignment  # slow to load, and rarely needed

        costs = np.array([[_MALFORMED if c is None else _distance(w, c) for c in called] for w in wanted])
        for i, j in zip(*linear_sum_assignment(costs), strict=True):
            yield wanted[i], called[j]

    def _compare(self, name: str, wanted: dict[str, Any], called: dict[str, Any] | None) -> None:
        if called is None:
            return
        right = True
        for path, fault in _places(wanted, called, ""):
            self.places[name, path] += 1
            if fault:
                self.faults[name, path, fault] += 1
                right = False
        self.right_args[name] += right

    def summary(self) -> Breakdown:
        arguments = [
            ArgumentAccuracy(
                tool=tool,
                path=path,
                n=n,
                wrong=self.faults[tool, path, "wrong"],
                missing=self.faults[tool, path, "missing"],
                extra=self.faults[tool, path, "extra"],
                wrong_type=self.faults[tool, path, "wrong_type"],
            )
            for (tool, path), n in self.places.items()
        ]
        return Breakdown(
            n=self.n,
            tools=tuple(
                ToolAccuracy(tool=tool, n=n, right_name=self.right_name[tool], right_args=self.right_args[tool])
                for tool, n in sorted(self.wanted.items(), key=lambda item: (-item[1], item[0]))
            ),
            arguments=tuple(sorted(arguments, key=lambda a: (a.right - a.n, a.tool, a.path))),
            confusion=tuple(
                Confusion(wanted=wanted, called=called, n=n)
                for (wanted, called), n in sorted(self.confusion.items(), key=lambda item: (-item[1], item[0]))
                if n
            ),
            abstention=Abstention(
                wanted_called=self.abstention[True, True],
                wanted_not_called=self.abstention[True, False],
                not_wanted_called=self.abstention[False, True],
                not_wanted_not_called=self.abstention[False, False],
            ),
            malformed=self.malformed,
        )


_MALFORMED = 1e6


def _names(tool: Mapping[str, Any]) -> set[str]:
    """The name of a tool, where it has one."""
    function = tool.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    return {name} if isinstance(name, str) else set()


def _normal(
    arguments: Sequence[Any], parameters: Mapping[str, Any] | None, strictness: Strictness
) -> list[dict[str, Any] | None]:
    """The arguments of each call of one tool in normal form; None where they are no JSON object."""
    sound = [is_json_object(each) for each in arguments]
    normal = iter(normal_calls(list(compress(arguments, sound)), parameters, strictness))
    return [next(normal) if each else None for each in sound]


def _distance(wanted: Any, called: Any) -> int:
    return sum(fault is not None for _, fault in _places(wanted, called, ""))


def _places(wanted: Any, called: Any, path: str) -> Iterator[tuple[str, ArgumentFault | None]]:
    """Every place inside of two values of the same kind, and what is wrong there."""
    if isinstance(wanted, dict):
        for key in dict.fromkeys((*wanted, *called)):
            inside = f"{path}.{key}" if path else key
            if key not in called:
                yield inside, "missing"
            elif key not in wanted:
                yield inside, "extra"
            else:
                yield from _place(wanted[key], called[key], inside)
    elif isinstance(wanted, list) and len(wanted) == len(called):
        for one, other in zip(wanted, called, strict=True):
            yield from _place(one, other, f"{path}[]")


def _place(wanted: Any, called: Any, path: str) -> Iterator[tuple[str, ArgumentFault | None]]:
    if _kind(wanted) != _kind(called):
        yield path, "wrong_type"
    elif isinstance(wanted, dict):
        yield path, None
        yield from _places(wanted, called, path)
    elif isinstance(wanted, list):
        yield path, None if len(wanted) == len(called) else "wrong"
        yield from _places(wanted, called, path)
    else:
        yield path, None if canonical_bytes(wanted) == canonical_bytes(called) else "wrong"


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number"
    return type(value).__name__
