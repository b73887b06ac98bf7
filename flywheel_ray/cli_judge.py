"""`flywheel judge …` and `flywheel label`: how far the judge can be trusted, and the human labels that say so.

flywheel label d082cc86 --n 50          # asks for 50 labels, a random sample of that trial's answers; go on any time
flywheel judge calibrate                # agreement, κ, biases; each candidate's score with the judge's bias taken out
"""

from __future__ import annotations

import getpass
import hashlib
import json
import sys
import unicodedata
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from flywheel_ray import calibration
from flywheel_ray.calibration import Advice, Calibration, CalibrationReport, judged_metrics
from flywheel_ray.console import RUNS, JsonOption, RunsOption, err, fingerprint_of, places_of, print_json, wide
from flywheel_ray.datasets import Example
from flywheel_ray.datasets import load as load_dataset
from flywheel_ray.errors import ConfigError, DatasetError, LedgerError
from flywheel_ray.judge import PREFERENCE
from flywheel_ray.labels import (
    Label,
    LabelFile,
    Sample,
    Skip,
    answer_hash,
    answers_of,
    append,
    read,
    sample_gaps,
    sample_order,
)
from flywheel_ray.ledger import Ledger
from flywheel_ray.records import Completion, content_text
from flywheel_ray.results import Outcome, Scored
from flywheel_ray.scoring import SIMILARITY
from flywheel_ray.stats import Interval, ScoreMean

judge_app = typer.Typer(no_args_is_help=True, help="Find out how far a judge's scores can be trusted.")

LabelsOption = Annotated[
    Path | None,
    typer.Option("--labels", metavar="FILE.jsonl", help="Label file. Default: RUNS/labels/DATASET.jsonl."),
]

_SHOWN_CHARS = 4000
_HELP = "s skip · back · m TEXT note · f in full · q quit · ? help"
_LONG_HELP = """  s       skip: you saw the row and would not judge it; another one is drawn in its place
  back    the row before this one, to answer it again
  m TEXT  a note, kept with the answer that follows
  f       the row once more, in full
  q       quit; the same command goes on from here (as do Ctrl-D and Ctrl-C)"""


# ── flywheel judge calibrate ──────────────────────────────────────────────────────────────────────────────────────────


@judge_app.callback()
def judge() -> None:
    """Find out how far a judge's scores can be trusted."""


@judge_app.command("calibrate")
def judge_calibrate(
    fingerprint: Annotated[
        str | None,
        typer.Option("--dataset", help="Fingerprint (or its beginning) of the dataset. Default: the latest one swept."),
    ] = None,
    labels: LabelsOption = None,
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """Compare the judge's verdicts with labels, and correct every candidate's score by them.

    Labels are the programmatic tool-call scores of the same answers, and human ones where there are some (`flywheel
    label`). Writes calibration.json beside the dataset's results in the ledger, where the leaderboard finds it.
    """
    places = places_of(runs, None)
    ledger = Ledger(places.ledger)
    name = fingerprint_of(ledger, fingerprint)
    results = [r for r in ledger.swept(name) if isinstance(r, Scored)]
    if not any(judged_metrics(r) for r in results):
        raise LedgerError(
            f"no trial on dataset {name} has a judged score; name a judge in the sweep's configuration and sweep again"
        )
    path = labels or places.runs / "labels" / f"{name}.jsonl"
    if labels is not None and not labels.is_file():
        raise ConfigError(f"{labels}: no such label file; `flywheel label` writes one")
    file = read(path)
    human = file.of_trials(results)
    _check_trials(file, results, name, path)
    found = calibration.report(results, human)
    ledger.put_calibration(found)
    if as_json:
        agreement = {
            metric: {" and ".join(pair): kappa and kappa.model_dump() for pair, kappa in file.agreement(metric).items()}
            for metric in _metrics(file)
        }
        data = found.model_dump(mode="json")
        for given, estimate in zip(data["estimates"], found.estimates, strict=True):
            given["calibrated_interval"] = estimate.calibrated and estimate.calibrated.interval().model_dump()
        print_json({**data, "labelers": agreement})
        return
    console = wide()
    _print_calibrations(console, found)
    _print_estimates(console, found)
    for line in _remarks(file, results):
        console.print(line, highlight=False, markup=False)
    for advice in found.advice:
        console.print(f"{advice.judge}, {advice.metric}: {advice.sentence}", highlight=False, markup=False)
        if advice.more_labels and (command := _label_more(found, advice, file, results)):
            console.print(f"  {command}", highlight=False, markup=False)
    err.print("kept in the ledger: `flywheel leaderboard` ranks judged metrics by it", highlight=False)


def _check_trials(file: LabelFile, results: Sequence[Scored], fingerprint: str, path: Path) -> None:
    """Labels of other trials and answers are passed over and counted; where there are no others, something is amiss."""
    labels = file.labels().values()
    rows = {(r.key, o.example_id) for r in results for o in r.outcomes}
    examples = {label.example_id for label in labels}
    answers = {answer for r in results for answer in answers_of(r, examples).values()}
    labelled = {(label.trial, label.example_id) for label in labels}
    known = {(label.trial, label.example_id) for label in labels if label.answer in answers} | rows
    strange = labelled - known
    if labelled and strange == labelled:
        others = sorted({s.dataset for s in file.samples().values()} - {fingerprint})
        remedy = (
            f"they were drawn from dataset {', '.join(others)}: name it with --dataset"
            if others
            else ("their `trial` must be a whole key, as `flywheel leaderboard --json` shows it")
        )
        raise LedgerError(
            f"none of the {len(labelled)} labels in {path} is of a trial on dataset {fingerprint}, or of an answer of "
            f"one; {remedy}"
        )
    if strange:
        err.print(
            f"{len(strange)} of {len(labelled)} labels in {path} are of rows and answers that no trial on "
            f"{fingerprint} has",
            highlight=False,
            markup=False,
        )


def _metrics(file: LabelFile) -> list[str]:
    return list(dict.fromkeys(label.metric for label in file.labels().values()))


def _print_calibrations(console: Console, found: CalibrationReport) -> None:
    def column(c: Calibration) -> list[str]:
        weighted = f"{_interval(c.weighted_kappa)}" if c.weighted_kappa else ""
        position = c.position
        return [
            c.metric,
            c.source,
            f"{c.n:,} of {c.rows:,}",
            _interval(c.agreement),
            _interval(c.kappa),
            weighted,
            _interval(c.false_accept),
            _interval(c.false_reject),
            _interval(c.bias),
            _interval(position.first_gain) if position else "not asked in both orders",
            _interval(position.flips) if position else "",
            _interval(c.length),
            f"{c.unscored:,}" + (f", {_interval(c.unscored_rate)}" if c.unscored else ""),
            _interval(c.unscored_gap) if c.unscored else "",
        ]

    names = [
        "metric",
        "labels by",
        "rows labelled and judged",
        "agreement",
        "Cohen's κ",
        "κ, quadratic weights",
        "accepts what the label rejects",
        "rejects what the label accepts",
        "verdict − label",
        "gain of being shown first",
        "verdicts that turn with the order",
        "gain of being longer",
        "unscored",
        "unscored, rejected − accepted",
    ]
    for judge in dict.fromkeys(c.judge for c in found.calibrations):
        mine = [column(c) for c in found.calibrations if c.judge == judge]
        table = Table(title=Text(f"judge: {judge}"), title_justify="left", show_header=False)
        for name, *cells in zip(names, *mine, strict=True):
            if any(cells):
                table.add_row(name, *(Text(cell) for cell in cells))
        console.print(table)


def _print_estimates(console: Console, found: CalibrationReport) -> None:
    table = Table(title=f"candidates on dataset {found.fingerprint}", title_justify="left")
    for name in ("candidate", "metric", "labels by"):
        table.add_column(name)
    for name in ("labels", "answered", "raw", "calibrated", "labels alone", "key"):
        table.add_column(name, justify="right", no_wrap=True)
    for e in found.estimates:
        calibrated = _interval(e.calibrated) or f"{calibration.MIN_LABELS - e.labels} labels missing"
        table.add_row(
            Text(e.candidate),
            e.metric,
            e.source,
            str(e.labels),
            f"{e.answered:.1%}",
            _interval(e.raw),
            calibrated,
            _interval(e.gold),
            e.key[:8],
        )
    console.print(table)
    if any(e.answered < 1 for e in found.estimates):
        console.print(
            "raw, labels alone: of the rows with an answer; calibrated: of all rows, where no answer counts as 0",
            highlight=False,
        )


def _remarks(file: LabelFile, results: Sequence[Scored]) -> list[str]:
    lines = []
    for metric in _metrics(file):
        for (one, two), kappa in file.agreement(metric).items():
            lines.append(f"{metric}: {one} and {two} agree with κ {_interval(kappa) or 'unknown'}")
    samples = file.samples()
    for result in results:
        for metric in _metrics(file):
            given = file.of(result, metric)
            name = f"{result.key[:8]}, {metric}"
            if (waiting := file.waiting(result, metric)) and not given:
                wanted = len(file.fitting(result, metric)) + len(waiting)
                lines.append(
                    f"{name}: of the rows that were labelled in another trial, {len(waiting)} were answered otherwise "
                    f"here; the others count once these are labelled too: flywheel label {result.key[:8]} --n {wanted}"
                )
            if not given:
                continue
            # Rows labelled in another trial on this dataset were drawn there, in the order that all share.
            sample = samples.get(result.key) or next(
                (s for s in samples.values() if s.dataset == result.fingerprint), None
            )
            ids = [o.example_id for o in answered(result) if metric in o.scores]
            if sample is None:
                lines.append(
                    f"{name}: nothing says how the labelled rows were chosen; calibrated intervals hold only if it was "
                    "at random (`flywheel label` draws them so)"
                )
            elif gaps := sample_gaps(
                given, sample_order(result.fingerprint, ids, sample.seed), _skipped(file, result, metric)
            ):
                lines.append(
                    f"{name}: {gaps} drawn rows were skipped or left out; where those are the hard ones, the others "
                    "are no random sample"
                )
    return lines


def _skipped(file: LabelFile, scored: Scored, metric: str) -> set[str]:
    """Examples of a trial that somebody skipped."""
    return {example for name, trial, example, _ in file.skipped() if (name, trial) == (metric, scored.key)}


def _label_more(found: CalibrationReport, advice: Advice, file: LabelFile, results: Sequence[Scored]) -> str:
    """The command that adds missing labels to the candidate with the fewest; empty where none has rows left."""
    trials = {r.key: r for r in results}
    choices = []
    for e in found.estimates:
        if (e.judge, e.metric, e.source) == (advice.judge, advice.metric, advice.source):
            trial = trials[e.key]
            asked = {o.example_id for o in answered(trial) if e.metric in o.scores}
            fitting = set(file.fitting(trial, e.metric)) & asked
            left = len(asked - fitting - _skipped(file, trial, e.metric))
            if left:
                choices.append((e.labels, e.key, len(fitting), left))
    if not choices:
        return ""
    _, key, labelled, left = min(choices)
    more = min(advice.more_labels, left)
    several = f" --metric {advice.metric}" if len(judged_metrics(trials[key])) > 1 else ""
    return f"Label {more} more rows: flywheel label {key[:8]} --n {labelled + more}{several}"


def _interval(estimate: Interval | ScoreMean | None) -> str:
    interval = estimate.interval() if isinstance(estimate, ScoreMean) else estimate
    return f"{interval.estimate:.3f} [{interval.low:.3f}, {interval.high:.3f}]" if interval else ""


# ── flywheel label ────────────────────────────────────────────────────────────────────────────────────────────────────


Kind = Literal["correct", "rating", "preference"]
_QUESTIONS: dict[Kind, str] = {
    "correct": "Do both come to the same? 1 yes, 0 no",
    "rating": "Is the customer served equally well by either? 1 (wrong, unrelated) to 10 (equally well)",
    "preference": "Which is better? a, b, or t for a tie",
}


def label(
    trial: Annotated[
        str | None,
        typer.Argument(
            metavar="[DATASET/]TRIAL",
            help="A trial by the beginning of its key. Default: the only one on the latest dataset.",
        ),
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="How many labels you want to have given in all.")] = 50,
    seed: Annotated[int, typer.Option(help="Decides which rows are drawn.")] = 0,
    metric: Annotated[str | None, typer.Option(help="The judged metric, where a row has several.")] = None,
    labeler: Annotated[str | None, typer.Option(help="Your name in the file. Default: your user name.")] = None,
    labels: LabelsOption = None,
    blind: Annotated[bool, typer.Option("--blind", help="Do not say which answer is the teacher's.")] = False,
    verdict: Annotated[
        bool, typer.Option("--show-verdict", help="Also show what the judge said; it will sway you.")
    ] = False,
    runs: RunsOption = RUNS,
) -> None:
    """Label a random sample of a trial's answers by hand: request, the teacher's answer, the candidate's, your value.

    Every label is written at once, so Ctrl-C loses nothing, and the same command goes on where it was. Rows are drawn
    at random, which is what lets the labelled few speak for the rest; for one you skip another is drawn. What you said
    of the same answers in another trial on this dataset counts here too.
    """
    places = places_of(runs, None)
    scored = _trial(Ledger(places.ledger), trial)
    path = labels or places.runs / "labels" / f"{scored.fingerprint}.jsonl"
    who = labeler or _user()
    rows = {o.example_id: (o, chosen) for o in answered(scored) if (chosen := _metric(scored, o, metric))}
    if not rows:
        has = ", ".join(judged_metrics(scored)) or "none"
        raise LedgerError(
            f"trial {scored.key} has no answer judged by {metric or 'a judge'}; its judged metrics: {has}"
        )
    examples = {e.id: e for e in load_dataset(places.datasets / scored.fingerprint).eval}
    if lost := set(rows) - set(examples):
        raise DatasetError(f"dataset {scored.fingerprint} lacks {len(lost)} examples that trial {scored.key} answered")
    file = read(path)
    earlier = file.samples().get(scored.key)
    if earlier is not None and earlier.seed != seed:
        raise ConfigError(
            f"rows of trial {scored.key} were drawn with seed {earlier.seed} in {path}; "
            f"use --seed {earlier.seed}, or another file with --labels"
        )
    order = sample_order(scored.fingerprint, rows, seed)
    metrics = {chosen for _, chosen in rows.values()}
    labelled = {id for m in metrics for id, by in file.fitting(scored, m).items() if who in by and _of(rows, id, m)}
    skipped = {id for m, trial, id, by in file.skipped() if trial == scored.key and by == who and _of(rows, id, m)}
    if earlier is None:
        append(
            path,
            Sample(type="sample", dataset=scored.fingerprint, trial=scored.key, seed=seed, population=len(rows)),
        )
    session = _Session(wide(), scored, examples, rows, path, who, blind, verdict)
    session.run(order, n, labelled, skipped - labelled)
    wide().print(f"{session.state(n)}; labels are in {path}", highlight=False, markup=False)
    if not session.left(n):
        wide().print("Now: flywheel judge calibrate", highlight=False)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container's user without a name
        raise ConfigError("your user has no name on this system; say who labels with --labeler NAME") from None


def _of(rows: dict[str, tuple[Outcome, str]], id: str, metric: str) -> bool:
    return id in rows and rows[id][1] == metric


def answered(scored: Scored) -> list[Outcome]:
    """The rows of a trial that have an answer and a judged metric: what labels are drawn from."""
    judged = judged_metrics(scored)
    answered = (o for o in scored.outcomes if o.completion is not None and not o.repeat)
    return [o for o in answered if any(m in o.scores for m in judged)]


def _trial(ledger: Ledger, name: str | None) -> Scored:
    dataset, _, prefix = (name or "").rpartition("/")
    if name is not None and not dataset:
        return ledger.find(prefix)
    fingerprint = fingerprint_of(ledger, dataset or None)
    results = [r for r in ledger.results(fingerprint) if isinstance(r, Scored) and r.key.startswith(prefix)]
    if len(results) != 1:
        listed = "; ".join(f"{r.key[:8]} {r.candidate.label}" for r in results) or "none"
        raise ConfigError(f"name one trial on dataset {fingerprint}: {listed}")
    return results[0]


def _metric(scored: Scored, outcome: Outcome, wanted: str | None) -> str | None:
    judged = [m for m in judged_metrics(scored) if m in outcome.scores]
    if wanted is not None:
        return wanted if wanted in judged else None
    return judged[0] if judged else None


class _Session:
    """One sitting: shows rows one after another, and writes what is said of each."""

    def __init__(
        self,
        console: Console,
        scored: Scored,
        examples: dict[str, Example],
        rows: dict[str, tuple[Outcome, str]],
        path: Path,
        who: str,
        blind: bool,
        verdict: bool,
    ) -> None:
        self._console = console
        self._scored = scored
        self._examples = examples
        self._rows = rows
        self._path = path
        self._who = who
        self._blind = blind
        self._verdict = verdict
        self._note: str | None = None
        self._order: list[str] = []
        self._labelled: set[str] = set()
        self._skipped: set[str] = set()

    def run(self, order: Sequence[str], n: int, labelled: set[str], skipped: set[str]) -> None:
        """Ask for rows in this order until n have a label, or the person or the rows are at an end.

        Args:
            order: example ids.
            n: labels wanted, with those there are.
            labelled: rows with a label of this person.
            skipped: rows this person would not judge.
        """
        self._order, self._labelled, self._skipped = list(order), set(labelled), set(skipped)
        at = self._next(0, n)
        shown: int | None = None
        in_full = False
        try:
            while True:
                if at is None:
                    if shown is None or not self._back_from_the_end(n):
                        break
                    at = shown
                id, shown = order[at], at
                self._show(id, self._remaining(n), in_full)
                answer = self._ask(id)
                in_full = answer == "f"
                if answer is None or answer == "q":
                    self._drop_note("no answer followed")
                    break
                if answer == "back":
                    self._drop_note("it is not of the row before")
                    at = max(at - 1, 0)
                elif answer == "s" or isinstance(answer, float):
                    self._write(id, None if answer == "s" else float(answer))
                    at = self._next(at + 1, n)
        except KeyboardInterrupt:
            self._console.print()
            self._drop_note("no answer followed")

    def left(self, n: int) -> int:
        """How many labels are still to be given: of those wanted, as far as there are rows."""
        unseen = len(self._order) - len(self._labelled) - len(self._skipped)
        return max(min(n - len(self._labelled), unseen), 0)

    def state(self, n: int) -> str:
        """What is done, in words."""
        skipped = f" ({len(self._skipped)} skipped)" if self._skipped else ""
        done = f"{len(self._labelled)} of {n} rows labelled by {self._who}{skipped}"
        if not self.left(n) and len(self._labelled) < n:
            return f"{done}, and the trial has no more rows"
        return f"{done}, {self.left(n)} remain"

    def _remaining(self, n: int) -> str:
        return f"{len(self._labelled)} of {n} labelled, {self.left(n)} remain"

    def _next(self, start: int, n: int) -> int | None:
        """The next row to label, from `start` on and then from the first; None where nothing is left to do."""
        if not self.left(n):
            return None
        places = [*range(start, len(self._order)), *range(start)]
        done = self._labelled | self._skipped
        return next(i for i in places if self._order[i] not in done)

    def _back_from_the_end(self, n: int) -> bool:
        """After the last row: whether to see it again."""
        while True:
            self._console.print(
                f"{self.state(n)}. Enter to finish, b to go back\n> ", end="", highlight=False, markup=False
            )
            line = sys.stdin.readline()
            text = line.strip().lower()
            if not line:
                self._console.print()
            if text in ("", "q"):
                return False
            if text in ("b", "back"):
                return True
            self._console.print(f"{text!r} is no answer", highlight=False, markup=False)

    def _drop_note(self, why: str) -> None:
        if self._note is not None:
            self._console.print(f"the note is dropped: {why}", highlight=False, markup=False)
        self._note = None

    def _ask(self, id: str) -> str | float | None:
        """A command, a value in [0, 1] of the candidate, or None at the end of input."""
        kind = self._kind(id)
        while True:
            self._console.print(f"{_QUESTIONS[kind]}  ({_HELP})\n> ", end="", highlight=False, markup=False)
            line = sys.stdin.readline()
            if not line:
                self._console.print()
                return None
            text = line.strip()
            command = text.lower()
            if command in ("s", "q", "f", "back"):
                return command
            if command == "?":
                self._console.print(_LONG_HELP, highlight=False, markup=False)
                continue
            if command.startswith("m "):
                self._note = text[2:].strip()
                self._console.print("noted", highlight=False)
                continue
            value = _value(kind, text)
            if value is not None:
                return 1 - value if kind == "preference" and self._candidate_is_a(id) else value
            self._console.print(f"{text!r} is no answer", highlight=False, markup=False)

    def _write(self, id: str, value: float | None) -> None:
        given: dict[str, Any] = {
            "trial": self._scored.key,
            "example_id": id,
            "metric": self._rows[id][1],
            "labeler": self._who,
            "note": self._note,
            "labelled_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        if value is None:
            append(self._path, Skip(type="skip", **given))
            self._labelled.discard(id)
            self._skipped.add(id)
        else:
            completion = self._rows[id][0].completion
            assert completion is not None
            append(self._path, Label(value=value, answer=answer_hash(id, completion), **given))
            self._skipped.discard(id)
            self._labelled.add(id)
        self._note = None

    def _kind(self, id: str) -> Kind:
        kinds: dict[str, Kind] = {SIMILARITY: "rating", PREFERENCE: "preference"}
        return kinds.get(self._rows[id][1], "correct")

    def _candidate_is_a(self, id: str) -> bool:
        return self._blind and hashlib.sha256(f"{self._scored.key}/{id}".encode()).digest()[0] % 2 == 0

    def _show(self, id: str, state: str, in_full: bool) -> None:
        outcome, metric = self._rows[id]
        example = self._examples[id]
        assert outcome.completion is not None
        console = self._console
        console.rule(Text(f"{metric} · {state}"))
        console.print(Panel(_request(example, in_full), title="request", title_align="left"))
        answers = [("teacher", example.reference), ("candidate", outcome.completion)]
        if self._candidate_is_a(id):
            answers.reverse()
        for letter, (name, completion) in zip("AB", answers, strict=True):
            title = letter if self._blind else f"{letter}: {name}"
            console.print(Panel(_answer(completion, in_full), title=title, title_align="left"))
        if self._verdict:
            console.print(Text(f"the judge says {_said(outcome, metric)}"))


def _value(kind: Kind, text: str) -> float | None:
    """What was typed as a value in [0, 1], from a closed set; None where it is none of it. Preferences are for B."""
    closed: dict[str, float]
    if kind == "rating":
        closed = {str(i): i / 10 for i in range(1, 11)}
    elif kind == "preference":
        closed = {"a": 0.0, "b": 1.0, "t": 0.5}
    else:
        closed = {"1": 1.0, "0": 0.0, "y": 1.0, "n": 0.0}
    return closed.get(text.lower())


def _said(outcome: Outcome, metric: str) -> str:
    value = outcome.scores.get(metric)
    return f"{value:g}" if value is not None else f"nothing: {outcome.unscored.get(metric, 'unscored')}"


def _request(example: Example, in_full: bool) -> Group:
    parts = []
    for message in example.messages:
        text = content_text(message.get("content"))
        calls = message.get("tool_calls") or ()
        text += "".join(f"\n→ {json.dumps(call.get('function', call), ensure_ascii=False)}" for call in calls)
        parts.append(Text.assemble((f"{_plain(str(message.get('role')))}: ", "bold"), _cut(text.strip(), in_full)))
    names = [str(tool.get("function", tool).get("name")) for tool in example.tools]
    if names:
        parts.append(Text(_plain(f"tools: {', '.join(names)}"), style="dim"))
    return Group(*parts)


def _answer(completion: Completion, in_full: bool) -> Group:
    parts = [Text(_cut(completion.text, in_full))] if completion.text else []
    for call in completion.tool_calls:
        raw = (
            call.arguments
            if isinstance(call.arguments, str)
            else json.dumps(call.arguments, ensure_ascii=False, indent=2)
        )
        broken = " (not JSON)" if isinstance(call.arguments, str) else ""
        parts.append(Text.assemble((_plain(call.name) + broken, "bold"), f" {_cut(raw, in_full)}"))
    return Group(*(parts or [Text("(no text, no tool call)", style="dim")]))


def _cut(text: str, in_full: bool) -> str:
    plain = _plain(text)
    if in_full or len(plain) <= _SHOWN_CHARS:
        return plain
    half = _SHOWN_CHARS // 2
    return f"{plain[:half]}\n… {len(plain) - _SHOWN_CHARS:,} characters left out, f shows them …\n{plain[-half:]}"


def _plain(text: str) -> str:
    """Text without control characters: a logged answer must not move the cursor or colour the terminal."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else "�" for c in text)
