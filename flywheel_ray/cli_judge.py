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
from flywheel_ray.labels import Label, LabelFile, Sample, Skip, append, read, sample_gaps, sample_order
from flywheel_ray.ledger import Ledger
from flywheel_ray.records import Completion, content_text
from flywheel_ray.results import Outcome, Scored
from flywheel_ray.scoring import SIMILARITY
from flywheel_ray.stats import Interval

judge_app = typer.Typer(no_args_is_help=True, help="Find out how far a judge's scores can be trusted.")

LabelsOption = Annotated[
    Path | None,
    typer.Option("--labels", metavar="FILE.jsonl", help="Label file. Default: RUNS/labels/DATASET.jsonl."),
]

_SHOWN_CHARS = 4000
_HELP = "s skip · back · m TEXT note · f in full · q quit"


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
    human = file.by_metric()
    _check_trials(human, file, results, name, path)
    found = calibration.report(results, human)
    ledger.put_calibration(found)
    if as_json:
        agreement = {
            metric: {" and ".join(pair): kappa and kappa.model_dump() for pair, kappa in file.agreement(metric).items()}
            for metric in human
        }
        print_json({**found.model_dump(mode="json"), "labelers": agreement})
        return
    console = wide()
    _print_calibrations(console, found)
    _print_estimates(console, found)
    for line in _remarks(file, results, list(human)):
        console.print(line, highlight=False, markup=False)
    for advice in found.advice:
        console.print(f"{advice.judge}, {advice.metric}: {advice.sentence}", highlight=False, markup=False)
        if advice.more_labels and (command := _label_more(found, advice)):
            console.print(f"  {command}", highlight=False, markup=False)
    err.print("kept in the ledger: `flywheel leaderboard` ranks judged metrics by it", highlight=False)


def _check_trials(
    human: dict[str, dict[tuple[str, str], float]],
    file: LabelFile,
    results: Sequence[Scored],
    fingerprint: str,
    path: Path,
) -> None:
    """Labels of other trials are passed over and counted; where there are no others, something is mistaken."""
    labelled = {row for rows in human.values() for row in rows}
    known = {(r.key, o.example_id) for r in results for o in r.outcomes}
    strange = labelled - known
    if labelled and strange == labelled:
        others = sorted({s.dataset for s in file.samples().values()} - {fingerprint})
        remedy = (
            f"they were drawn from dataset {', '.join(others)}: name it with --dataset"
            if others
            else ("their `trial` must be a whole key, as `flywheel leaderboard --json` shows it")
        )
        raise LedgerError(
            f"none of the {len(labelled)} labels in {path} is of a trial on dataset {fingerprint}; {remedy}"
        )
    if strange:
        err.print(
            f"{len(strange)} of {len(labelled)} labels in {path} are of rows that no trial on {fingerprint} has",
            highlight=False,
            markup=False,
        )


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
    for name in ("labels", "raw", "calibrated", "labels alone", "key"):
        table.add_column(name, justify="right", no_wrap=True)
    for e in found.estimates:
        calibrated = _interval(e.calibrated) if e.calibrated else f"{calibration.MIN_LABELS - e.labels} labels missing"
        table.add_row(
            Text(e.candidate),
            e.metric,
            e.source,
            str(e.labels),
            _interval(e.raw),
            calibrated,
            _interval(e.gold),
            e.key[:8],
        )
    console.print(table)


def _remarks(file: LabelFile, results: Sequence[Scored], metrics: Sequence[str]) -> list[str]:
    lines = []
    for metric in metrics:
        for (one, two), kappa in file.agreement(metric).items():
            lines.append(f"{metric}: {one} and {two} agree with κ {_interval(kappa) or 'unknown'}")
    samples = file.samples()
    for result in results:
        for metric in metrics:
            given = file.of(result.key, metric)
            sample = samples.get(result.key)
            ids = [o.example_id for o in answered(result) if metric in o.scores]
            if given and sample is None:
                lines.append(
                    f"{result.key[:8]}, {metric}: nothing says how the labelled rows were chosen; calibrated intervals "
                    "hold only if it was at random (`flywheel label` draws them so)"
                )
            elif given and sample and (gaps := sample_gaps(given, sample_order(result.key, ids, sample.seed))):
                lines.append(
                    f"{result.key[:8]}, {metric}: {gaps} drawn rows were skipped or left out; where those are the hard "
                    "ones, the others are no random sample"
                )
    return lines


def _label_more(found: CalibrationReport, advice: Advice) -> str:
    """The command that adds the missing labels, to the candidate with the fewest; empty where it has no more rows."""
    mine = [e for e in found.estimates if (e.judge, e.metric, e.source) == (advice.judge, advice.metric, advice.source)]
    least = min(mine, key=lambda e: (e.labels, e.key))
    return (
        f"Label {advice.more_labels} more rows: flywheel label {least.key[:8]} --n {least.labels + advice.more_labels}"
    )


def _interval(interval: Interval | None) -> str:
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
    n: Annotated[int, typer.Option("--n", min=1, help="How many rows to label in all.")] = 50,
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
    at random, which is what lets the labelled few speak for the rest.
    """
    places = places_of(runs, None)
    scored = _trial(Ledger(places.ledger), trial)
    path = labels or places.runs / "labels" / f"{scored.fingerprint}.jsonl"
    who = labeler or getpass.getuser()
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
    order = [id for id in sample_order(scored.key, [o.example_id for o in answered(scored)], seed) if id in rows][:n]
    done = {key[2] for key in (*file.labels(), *file.skipped()) if key[1] == scored.key and key[3] == who}
    if earlier is None:
        append(
            path,
            Sample(type="sample", dataset=scored.fingerprint, trial=scored.key, seed=seed, population=len(rows)),
        )
    session = _Session(wide(), scored, examples, rows, path, who, blind, verdict)
    left = session.run(order, done)
    written = f"{len(order) - left} of {len(order)} rows done by {who}, {left} remain; labels are in {path}"
    wide().print(written + ("" if left else "\nNow: flywheel judge calibrate"), highlight=False, markup=False)


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

    def run(self, order: Sequence[str], done: set[str]) -> int:
        """Ask for every row that is not done, and return how many are left."""
        done = done & set(order)
        at = self._next(order, done, 0)
        in_full = False
        while at < len(order):
            id = order[at]
            self._show(id, f"{len(order) - len(done)} of {len(order)} rows remain", in_full)
            answer = self._ask(id)
            in_full = answer == "f"
            if answer is None or answer == "q":
                break
            if answer == "back":
                at = max(at - 1, 0)
            elif answer == "s" or isinstance(answer, float):
                self._write(id, None if answer == "s" else float(answer))
                done.add(id)
                at = self._next(order, done, at + 1)
        return len(order) - len(done)

    @staticmethod
    def _next(order: Sequence[str], done: set[str], start: int) -> int:
        """The next row that is not done, from `start` on and then from the first."""
        places = [*range(start, len(order)), *range(start)]
        return next((i for i in places if order[i] not in done), len(order))

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
            if text in ("s", "q", "f", "back"):
                return text
            if text.startswith("m "):
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
        append(self._path, Skip(type="skip", **given) if value is None else Label(value=value, **given))
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
