"""Our tool-call scorer beside the checker of the Berkeley Function Calling Leaderboard, over all its Python AST cases.

    python -m experiments.benchmarks.bfcl                 # table, timing; fails where a disagreement has no ruling
    python -m experiments.benchmarks.bfcl --write         # writes bfcl_adjudication.md and the slice anew

`bfcl-eval` (Apache-2.0, github.com/ShishirPatil/gorilla) is a test oracle in an environment of its own, `.bfcl/`, which
is made on the first run; its data ships with it. An entry's ground truth lists alternatives for each argument. Each
combination is an accepted answer: all of them where there are at most `CAP`, otherwise the first answer, those that
differ from it in one alternative, and then combinations in order up to `CAP`. Predictions are the accepted answers and,
by class, every single change of the first one. Ours accepts what equals any of the accepted answers.

The checker has no say about which call `live_relevance` wants, so that category has nothing to compare.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import textwrap
import time
import venv
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

from flywheel_ray.records import Completion, ToolCall, read_arguments
from flywheel_ray.scoring import Strictness, score_tool_calls

VERSION = "2026.3.23"
CAP = 64
HERE = Path(__file__).parent
ENVIRONMENT = HERE.parents[1] / ".bfcl"
ADJUDICATION = HERE / "bfcl_adjudication.md"
SLICE = HERE / "bfcl_slice.jsonl"
"""A handful of entries with the checker's verdicts, so that tests need no download. BFCL's, Apache-2.0."""
IN_SLICE = ("simple_python_0", "simple_python_13", "simple_python_120", "simple_python_169", "multiple_109",
            "parallel_44", "parallel_178", "parallel_multiple_26", "irrelevance_0", "live_simple_40-17-0",
            "live_simple_125-81-0", "live_multiple_144-56-0", "live_parallel_multiple_1-1-0")  # fmt: skip
CATEGORIES = ("simple_python", "multiple", "parallel", "parallel_multiple", "irrelevance", "live_simple",
              "live_multiple", "live_parallel", "live_parallel_multiple", "live_irrelevance")  # fmt: skip
POLICIES: tuple[Strictness, ...] = get_args(Strictness)

Call = tuple[str, dict[str, Any]]
Calls = tuple[Call, ...]


class Entry(NamedTuple):
    """One entry of the benchmark: its tools as BFCL has them, its ground truth, and the answers that it accepts."""

    id: str
    category: str
    functions: list[dict[str, Any]]
    ground_truth: list[dict[str, Any]]
    answers: list[Calls]
    combinations: int
    """How many accepted answers there are in all."""

    @property
    def tools(self) -> list[dict[str, Any]]:
        """The tools in OpenAI's form."""
        return [
            {"type": "function", "function": {"name": f["name"], "parameters": json_schema(f["parameters"])}}
            for f in self.functions
        ]


class Case(NamedTuple):
    """One prediction for an entry."""

    entry: Entry
    kind: str
    where: str
    calls: Calls

    @property
    def id(self) -> str:
        """Unique and stable: entry, class, place."""
        return f"{self.entry.id}:{self.where}".rstrip(":").replace(" ", "_")


class Judged(NamedTuple):
    """A case with everybody's verdict."""

    case: Case
    oracle: bool
    why: str
    """The checker's own kind of error; empty where it accepts."""
    ours: dict[Strictness, bool]

    @property
    def signature(self) -> str:
        """The verdicts in words: "checker accepts; exact rejects, schema rejects, case_insensitive accepts"."""
        said = ", ".join(f"{name} {_verb(ours)}" for name, ours in self.ours.items())
        return f"checker {_verb(self.oracle)}; {said}"

    @property
    def disagrees(self) -> bool:
        """Whether any policy says otherwise than the checker."""
        return any(ours != self.oracle for ours in self.ours.values())


def _verb(accepts: bool) -> str:
    return "accepts" if accepts else "rejects"


# ── the benchmark's data ──────────────────────────────────────────────────────────────────────────────────────────────


def environment() -> Path:
    """The Python of the oracle's environment, made where it is not there yet.

    Raises:
        subprocess.CalledProcessError: it cannot be installed.
    """
    python = ENVIRONMENT / "bin" / "python"
    if not (ENVIRONMENT / ".installed").exists():
        venv.create(ENVIRONMENT, with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, f"bfcl-eval=={VERSION}"], check=True)
        (ENVIRONMENT / ".installed").touch()
    return python


def entries(categories: Sequence[str] = CATEGORIES) -> list[Entry]:
    """Every entry of the categories."""
    data = next(ENVIRONMENT.glob("lib/python*/site-packages/bfcl_eval/data"))
    found = []
    for category in categories:
        name = f"BFCL_v4_{category}.json"
        truths = data / "possible_answer" / name
        by_id = {row["id"]: row["ground_truth"] for row in _rows(truths)} if truths.exists() else {}
        for row in _rows(data / name):
            found.append(entry_of(row["id"], category, row["function"], by_id.get(row["id"], [])))
    return found


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def entry_of(id: str, category: str, functions: list[dict[str, Any]], truth: list[dict[str, Any]]) -> Entry:
    """An entry with its accepted answers."""
    schemas = {f["name"]: f["parameters"] for f in functions}
    axes: list[tuple[int, str, list[Any]]] = []
    for i, call in enumerate(truth):
        ((name, arguments),) = call.items()
        for key, options in arguments.items():
            required = key in schemas.get(name, {}).get("required", ())
            kind = schemas.get(name, {}).get("properties", {}).get(key, {}).get("type")
            axes.append((i, key, list(_choices(options, required, kind)) or [_OMITTED]))
    names = [next(iter(call)) for call in truth]
    combinations = 1
    for _, _, values in axes:
        combinations *= len(values)

    def answer(chosen: Sequence[Any]) -> Calls:
        calls: list[Call] = [(name, {}) for name in names]
        for (i, key, _), value in zip(axes, chosen, strict=True):
            if value is not _OMITTED:
                calls[i][1][key] = value
        return tuple(calls)

    first = [values[0] for _, _, values in axes]
    near = [first] + [[*first[:i], v, *first[i + 1 :]] for i, (_, _, vs) in enumerate(axes) for v in vs[1:]]
    every = itertools.islice(itertools.product(*(values for _, _, values in axes)), CAP)
    answers = list({repr(a): a for a in map(answer, [*near, *every])}.values())
    return Entry(id, category, functions, truth, answers[: max(CAP, len(near))], combinations)


_OMITTED = object()


def _choices(options: Sequence[Any], required: bool, kind: Any) -> Iterator[Any]:
    """What the ground truth allows for an argument.

    "" stands for leaving it out; for a required text it is the empty text, for any other required argument nothing. No
    option at all stands for an empty list.
    """
    if not options:
        yield []
    for option in options:
        if option == "" and not required:
            yield _OMITTED
        elif option == "" and kind not in ("string", "any"):
            continue
        elif isinstance(option, dict):
            yield from _objects(option)
        elif isinstance(option, list) and any(isinstance(item, dict) for item in option):
            yield from map(list, itertools.product(*(list(_objects(item)) for item in option)))
        else:
            yield option


def _objects(alternatives: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
    for chosen in itertools.product(*alternatives.values()):
        yield {k: v for k, v in zip(alternatives, chosen, strict=True) if v != ""}


_JSON_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}


def json_schema(schema: Any) -> Any:
    """BFCL's schema language as JSON Schema: its types are Python's."""
    if isinstance(schema, list):
        return [json_schema(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    converted = {
        key: value if key in ("default", "enum", "properties") else json_schema(value) for key, value in schema.items()
    }
    if isinstance(schema.get("type"), str):
        converted["type"] = _JSON_TYPES.get(schema["type"], schema["type"])
    if isinstance(schema.get("properties"), dict):
        converted["properties"] = {name: json_schema(value) for name, value in schema["properties"].items()}
    return converted


# ── predictions ───────────────────────────────────────────────────────────────────────────────────────────────────────

ACCEPTED = "accepted answer"


def cases(entry: Entry) -> Iterator[Case]:
    """Every accepted answer as it is, and every change of the first."""
    for i, answer in enumerate(entry.answers):
        yield Case(entry, ACCEPTED, f"#{i}" if i else "", answer)
    if not entry.ground_truth:
        if "irrelevance" in entry.category:
            yield Case(entry, ACCEPTED, "", ())
            name = entry.functions[0]["name"] if entry.functions else "search"
            yield Case(entry, "false call", "", ((name, {}),))
        return
    for kind, where, calls in _changes(entry, entry.answers[0]):
        yield Case(entry, kind, where, calls)


Change = tuple[str, str, Calls]
_SAMPLED = ("number written otherwise",)
"""Classes of which one place an entry is enough, as with null, case, white space and punctuation."""


def _changes(entry: Entry, calls: Calls) -> Iterator[Change]:
    yield "no call", "", ()
    if len(calls) > 1:
        yield "calls reordered", "", calls[::-1]
        yield "call dropped", "", calls[:-1]
    yield "call duplicated", "", (*calls, calls[-1])
    sampled: set[str] = set()
    others = [f["name"] for f in entry.functions if f["name"] not in dict(calls)]
    for i, (name, arguments) in enumerate(calls):

        def put(changed: dict[str, Any], name: str = name, i: int = i) -> Calls:
            return (*calls[:i], (name, changed), *calls[i + 1 :])

        at = f"{i}." if len(calls) > 1 else ""
        yield "wrong function", at, put(arguments, others[0] if others else f"{name}_")
        if len(arguments) > 1:
            yield "keys reordered", at, put(dict(reversed(arguments.items())))
        yield "extra argument", at, put({**arguments, "flywheel_extra": 1})
        schema: dict[str, Any] = next((f["parameters"] for f in entry.functions if f["name"] == name), {})
        for key in schema.get("properties", {}):
            if key not in arguments and key not in schema.get("required", ()) and "null" not in sampled:
                sampled.add("null")
                yield "null for left out", f"{at}{key}", put({**arguments, key: None})
        for key in arguments:
            yield "missing argument", f"{at}{key}", put({k: v for k, v in arguments.items() if k != key})
            yield "renamed argument", f"{at}{key}", put({f"{k}_" if k == key else k: v for k, v in arguments.items()})
        for path, value in _places(arguments):
            where = at + ".".join(map(str, path))
            for kind, changed in _changed(value, len(path)):
                if kind in _SAMPLED and kind in sampled:
                    continue
                sampled.add(kind)
                yield kind, where, put(_replaced(arguments, path, changed))
    texts = [(i, p, v) for i, (_, a) in enumerate(calls) for p, v in _places(a) if isinstance(v, str) and v.strip()]
    for i, path, value in texts[:1]:
        for kind, changed in _respelt(value):
            name, arguments = calls[i]
            where = ".".join(map(str, path))
            yield kind, where, (*calls[:i], (name, _replaced(arguments, path, changed)), *calls[i + 1 :])


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every value inside of a value, with its path."""
    if path:
        yield path, value
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield from _places(item, (*path, key))


def _replaced(value: Any, path: Sequence[Any], new: Any) -> Any:
    if not path:
        return new
    changed = dict(value) if isinstance(value, dict) else list(value)
    changed[path[0]] = _replaced(value[path[0]], path[1:], new)
    return changed


def _changed(value: Any, depth: int) -> Iterator[tuple[str, Any]]:
    wrong = "wrong scalar" if depth == 1 else "nested deep change"
    if isinstance(value, bool):
        yield wrong, not value
        yield "type changed", str(value).lower()
        yield "boolean as number", int(value)
    elif isinstance(value, int | float):
        yield wrong, value + 1
        yield "type changed", str(value)
        if value == int(value):
            yield "number written otherwise", int(value) if isinstance(value, float) else float(value)
    elif isinstance(value, str):
        yield wrong, f"{value} otherwise"
        yield "type changed", [value]
    elif isinstance(value, list):
        yield "type changed", json.dumps(value)
        if value != value[::-1]:
            yield "items reordered", value[::-1]
        if value:
            yield "item dropped", value[:-1]
        yield "item added", [*value, value[-1] if value else 1]
    elif isinstance(value, dict):
        yield "type changed", json.dumps(value)
        yield "nested deep change", {**value, "flywheel_extra": 1}


def _respelt(text: str) -> Iterator[tuple[str, str]]:
    for changed in (text.upper(), text.lower()):
        if changed != text:
            yield "case change", changed
            break
    yield "white space", f" {text} "
    found = re.search(r"[,./\-_*^]", text)
    yield "punctuation", text.replace(found.group(), "", 1) if found else f"{text}."


# ── verdicts ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def completion(calls: Calls) -> Completion:
    """Calls as they arrive from an API: arguments as JSON text."""
    return Completion(
        tool_calls=tuple(ToolCall(name=name, arguments=read_arguments(json.dumps(a))) for name, a in calls)
    )


def oracle(found: Sequence[Entry], of: Mapping[str, Sequence[Case]]) -> dict[str, list[list[Any]]]:
    """The checker's verdicts on the cases of each entry, by its id: [accepts, why not]."""
    lines = [
        json.dumps(
            {
                "category": entry.category,
                "functions": entry.functions,
                "ground_truth": entry.ground_truth,
                "predictions": [[{name: arguments} for name, arguments in case.calls] for case in of[entry.id]],
            }
        )
        for entry in found
    ]
    command = [str(environment()), str(HERE / "bfcl_oracle.py")]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, check=True)
    return {e.id: json.loads(line) for e, line in zip(found, done.stdout.splitlines(), strict=True)}


class Meter:
    """How often the scorer was asked, and the CPU seconds that took."""

    def __init__(self) -> None:
        self.scored = 0
        self.cpu_s = 0.0


def ours(entry: Entry, calls: Sequence[Calls], strictness: Strictness, meter: Meter | None = None) -> list[bool]:
    """Whether each prediction equals one of the entry's accepted answers (none at all where it wants no call)."""
    references = [completion(answer) for answer in entry.answers or [()]]
    predictions, tools = [completion(c) for c in calls], entry.tools
    started, scored, verdicts = time.process_time(), 0, []
    for predicted in predictions:
        accepted = False
        for reference in references:
            scored += 1
            if score_tool_calls(reference, predicted, tools, strictness)[1].value == 1.0:
                accepted = True
                break
        verdicts.append(accepted)
    if meter:
        meter.cpu_s += time.process_time() - started
        meter.scored += scored
    return verdicts


def judge(found: Sequence[Entry], meters: Mapping[Strictness, Meter] | None = None) -> list[Judged]:
    """Every case of the entries with the verdict of the checker and of each policy."""
    return beside(found, oracle(found, {entry.id: list(cases(entry)) for entry in found}), meters)


def beside(
    found: Sequence[Entry], theirs: Mapping[str, list[list[Any]]], meters: Mapping[Strictness, Meter] | None = None
) -> list[Judged]:
    """The verdicts of each policy beside the checker's."""
    of = {entry.id: list(cases(entry)) for entry in found}
    judged = []
    for entry in found:
        calls = [case.calls for case in of[entry.id]]
        by_policy = {s: ours(entry, calls, s, (meters or {}).get(s)) for s in POLICIES}
        for i, (case, (valid, why)) in enumerate(zip(of[entry.id], theirs[entry.id], strict=True)):
            judged.append(Judged(case, valid, why, {s: by_policy[s][i] for s in POLICIES}))
    return judged


# ── rulings ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Ruling(NamedTuple):
    """Who is right about a kind of disagreement, and why; `covers` says which disagreements are of that kind."""

    cause: str
    right: str
    reason: str
    covers: Callable[[Judged, bool], bool]
    """Of a disagreement, and whether the checker accepts the entry's first answer at all."""


def _kinds(*kinds: str, oracle: bool | None = None) -> Callable[[Judged, bool], bool]:
    return lambda j, sound: j.case.kind in kinds and (oracle is None or j.oracle == oracle)


RULINGS = (
    Ruling(
        "The ground truth contradicts the tool",
        "ours, as far as anybody can be",
        "The checker rejects what its own ground truth lists: an argument that the tool does not declare "
        "(parallel_multiple_12, parallel_multiple_26, live_multiple_862-181-3, and live_multiple_964-207-0, which also "
        "lacks the required one), or a required list with no option, where the empty list is meant "
        "(live_simple_106-63-0, live_simple_112-68-0). No prediction could pass with it. Ours has the listed answer as "
        "its reference and finds it again, by each policy in each form that the policy calls equal. The fault is in "
        "the data.",
        lambda j, sound: not j.oracle and (j.case.kind == ACCEPTED or not sound),
    ),
    Ruling(
        "1 and 1.0",
        "ours",
        "JSON has one kind of number, and JSON Schema calls 1.0 an integer (2020-12, 4.2.3 and 6.1.1); a caller that "
        "writes 1.0 means 1. The checker compares Python types and takes an int for a float, but no float for an int, "
        "and neither inside of arrays.",
        _kinds("number written otherwise", oracle=False),
    ),
    Ruling(
        "Case of letters",
        "ours, by policy",
        'The checker folds the case of every string. Strings of JSON Schema are case-sensitive: "INCHES" is not among '
        'the enum\'s "inches", and names, paths and codes differ by case. `exact` and `schema` reject; where only the '
        "words count, `case_insensitive` accepts.",
        _kinds("case change", oracle=True),
    ),
    Ruling(
        "White space around strings",
        "ours, by policy",
        "The checker takes all spaces out of strings, inside of words as well. A stray space is another string by the "
        "schema, so `exact` and `schema` reject; `case_insensitive` collapses white space, and accepts.",
        _kinds("white space", oracle=True),
    ),
    Ruling(
        "Punctuation",
        "ours by the schema; the checker where the text is free prose",
        'The checker takes ",./-_*^" out of strings, so that "April 1, 2024" equals "April 1 2024". With it "1.5" '
        'equals "15", "a/b" equals "ab" and "x^2" equals "x2". The schema says string and no more, so no policy of '
        "ours guesses; an LLM judge beside the figure is what tells prose from codes.",
        _kinds("punctuation", oracle=True),
    ),
    Ruling(
        "null for an optional argument",
        "ours, by policy",
        "The argument is optional and its type has no null. By the schema null is a violation, so `exact` rejects as "
        "the checker does. What receives the call treats null as not given, which is what `schema` and "
        "`case_insensitive` are for.",
        _kinds("null for left out", oracle=False),
    ),
    Ruling(
        "Default left out",
        "ours, by policy",
        "The argument left out is optional and the accepted value is its declared default, so the tool runs with the "
        "same value. The ground truth does not mark it as optional. `exact` rejects as the checker does; `schema` and "
        "`case_insensitive` accept.",
        lambda j, sound: (
            _kinds("missing argument", oracle=False)(j, sound) and not j.ours["exact"] and j.ours["schema"]
        ),
    ),
    Ruling(
        "A value of nothing but white space",
        "the checker",
        "The argument left out is a separator whose accepted value is one space and whose default is the empty text. "
        "`case_insensitive` does not tell white space from none: a price of that policy, and one reason why it is not "
        "the default.",
        lambda j, sound: _kinds("missing argument", oracle=False)(j, sound) and not j.ours["schema"],
    ),
    Ruling(
        "true and 1 inside of an object",
        "ours",
        "The schema says boolean. Inside of objects the checker compares by Python's `in`, for which True is 1.",
        _kinds("boolean as number", oracle=True),
    ),
    Ruling(
        "An empty list for a list left out",
        "ours",
        'The checker turns its own mark for "may be left out" into an empty list and then accepts one. By the schema '
        "an empty list is a value, and not the default of these arguments.",
        _kinds("item dropped", oracle=True),
    ),
    Ruling(
        "The checker's greedy matching",
        "ours",
        "The checker gives each wanted call the first predicted one that fits, and never takes it back, so that the "
        "same calls in another order fail: a call with fewer demands took the only one that fits another. Ours matches "
        "equal forms, where the order cannot count.",
        _kinds("calls reordered", oracle=False),
    ),
)


def rule(judged: Sequence[Judged]) -> tuple[dict[str, list[Judged]], list[Judged]]:
    """Disagreements by the cause of the ruling that covers them, and those that none covers."""
    sound = {j.case.entry.id: j.oracle for j in judged if j.case.kind == ACCEPTED and not j.case.where}
    ruled: dict[str, list[Judged]] = defaultdict(list)
    unruled: list[Judged] = []
    for j in judged:
        if j.disagrees:
            ruling = next((r for r in RULINGS if r.covers(j, sound[j.case.entry.id])), None)
            (ruled[ruling.cause] if ruling else unruled).append(j)
    return ruled, unruled


Listed = set[tuple[str, str, str, str]]
"""(cause, class, verdicts, case id) of every adjudicated disagreement."""


def listed(ruled: Mapping[str, Sequence[Judged]]) -> Listed:
    """What an adjudication file has to list."""
    return {(cause, j.case.kind, j.signature, j.case.id) for cause, found in ruled.items() for j in found}


def written(ruled: Mapping[str, Sequence[Judged]], cases: int) -> str:
    """The adjudication file: rulings, and under each the ids of its cases by class, verdicts and category."""
    count = sum(map(len, ruled.values()))
    lines = [
        "# BFCL: every disagreement, and who is right",
        "",
        f"Written by `python -m experiments.benchmarks.bfcl --write`: {count:,} of {cases:,} cases on which a policy",
        f"of ours says otherwise than the AST checker of bfcl-eval {VERSION} (Apache-2.0,",
        "github.com/ShishirPatil/gorilla). An id is the entry's, without its category, then the number of the accepted",
        "answer or the place that was changed.",
    ]
    for ruling in RULINGS:
        found = ruled.get(ruling.cause, ())
        if not found:
            continue
        head = f"{len(found):,} {'case' if len(found) == 1 else 'cases'}. Right: {ruling.right}. {ruling.reason}"
        lines += ["", f"## {ruling.cause}", "", *textwrap.wrap(head, 120)]
        groups: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for j in found:
            category = j.case.entry.category
            groups[j.case.kind, j.signature][category].append(j.case.id.removeprefix(f"{category}_"))
        for (kind, signature), categories in groups.items():
            lines += ["", f"**{kind}**: {signature}", ""]
            lines += [f"- {category}: {' '.join(ids)}" for category, ids in categories.items()]
    return "\n".join(lines) + "\n"


def read(text: str) -> Listed:
    """The cases that an adjudication file lists."""
    found: Listed = set()
    cause = kind = signature = ""
    for line in text.splitlines():
        if line.startswith("## "):
            cause = line[3:]
        elif line.startswith("**"):
            kind, _, signature = line[2:].partition("**: ")
        elif line.startswith("- "):
            category, _, ids = line[2:].partition(": ")
            found |= {(cause, kind, signature, f"{category}_{id}") for id in ids.split(" ")}
    return found


# ── figures ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def table(judged: Sequence[Judged], strictness: Strictness) -> list[str]:
    """By class: cases, both accept, both reject, false accepts, false rejects, agreement. Markdown."""
    kinds = dict.fromkeys(j.case.kind for j in judged)
    counts = Counter((j.case.kind, j.oracle, j.ours[strictness]) for j in judged)
    lines = [
        f"| class ({strictness}) | cases | both accept | both reject | false accepts | false rejects | agreement |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for kind in (*kinds, None):
        cells = [
            sum(n for (k, theirs, mine), n in counts.items() if kind in (k, None) and (theirs, mine) == pair)
            for pair in ((True, True), (False, False), (False, True), (True, False))
        ]
        agreement = (cells[0] + cells[1]) / sum(cells)
        lines.append(f"| {kind or 'all'} | {sum(cells):,} | {' | '.join(f'{c:,}' for c in cells)} | {agreement:.2%} |")
    return lines


def single_reference(found: Sequence[Entry]) -> list[str]:
    """How many other accepted answers equal the first one: what a log with one answer to each request can know."""
    rows = ["| policy | other accepted answers | equal to the first |", "| --- | ---: | ---: |"]
    for strictness in POLICIES:
        verdicts = [
            equal
            for entry in found
            if len(entry.answers) > 1
            for equal in ours(entry._replace(answers=entry.answers[:1]), entry.answers[1:], strictness)
        ]
        rows.append(f"| {strictness} | {len(verdicts):,} | {sum(verdicts) / max(1, len(verdicts)):.1%} |")
    return rows


def sliced(judged: Sequence[Judged]) -> str:
    """The entries of the slice, a JSON line each: entry, and the checker's verdict on each case by its class and id."""
    lines = []
    for id in IN_SLICE:
        mine = [j for j in judged if j.case.entry.id == id]
        entry = mine[0].case.entry
        row = {"id": id, "category": entry.category, "functions": entry.functions, "ground_truth": entry.ground_truth}
        verdicts = [[j.case.kind, j.case.id, j.oracle, j.why] for j in mine]
        lines.append(json.dumps({**row, "verdicts": verdicts}, ensure_ascii=False))
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; 1 where a disagreement is not adjudicated or the file lists what is none."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true", help=f"write {ADJUDICATION.name} and {SLICE.name} anew")
    options = parser.parse_args(arguments)
    environment()
    found = entries()
    meters = {strictness: Meter() for strictness in POLICIES}
    judged = judge(found, meters)
    capped = sum(entry.combinations > len(entry.answers) for entry in found)
    print(
        f"{len(found):,} entries, {sum(len(e.answers) for e in found):,} accepted answers ({capped} entries capped)\n"
    )
    for strictness in POLICIES:
        print("\n".join(table(judged, strictness)), end="\n\n")
    print("\n".join(single_reference(found)), end="\n\n")
    for strictness, meter in meters.items():
        rate = meter.scored / meter.cpu_s
        print(f"{strictness}: {meter.scored:,} cases scored in {meter.cpu_s:.1f} CPU s, {rate:,.0f} a second")
    ruled, unruled = rule(judged)
    for j in unruled:
        print(f"no ruling: {j.case.kind} {j.case.id}: {j.signature} ({j.why})", file=sys.stderr)
    if options.write:
        ADJUDICATION.write_text(written(ruled, len(judged)), encoding="utf-8")
        SLICE.write_text(sliced(judged), encoding="utf-8")
    difference = listed(ruled) ^ read(ADJUDICATION.read_text(encoding="utf-8"))
    for _, kind, signature, id in sorted(difference)[:20]:
        print(f"{ADJUDICATION.name} is out of date: {kind} {id}: {signature}", file=sys.stderr)
    accepted = [j for j in judged if j.case.kind == ACCEPTED]
    agreement = sum(j.oracle == j.ours["exact"] for j in accepted) / len(accepted)
    print(f"\naccepted answers: {agreement:.2%} agreement; {sum(map(len, ruled.values())):,} disagreements adjudicated")
    return int(bool(unruled or difference) or agreement < 0.995)


if __name__ == "__main__":
    sys.exit(main())
