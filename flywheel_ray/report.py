"""The report is one HTML page for whoever decides: decision card, leaderboard, plots, live pairs and disagreements.

    write_report("runs/report.html", board, results, dataset)
    write_report(path, board, results, dataset, rollout_report=live, shadow=shadow_frame(records), gates=rollout.gates)

The page stands alone: no script, no network. Whatever came from logs or configuration is text in it, never markup,
because `el` escapes every string that is not `Html`.
"""

from __future__ import annotations

import html
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from flywheel_ray import __version__, plots
from flywheel_ray.datasets import SPLITS, Dataset, Example
from flywheel_ray.errors import LedgerError
from flywheel_ray.judge import JUDGED
from flywheel_ray.leaderboard import Leaderboard, Row, teacher_score
from flywheel_ray.records import Completion, content_text
from flywheel_ray.results import Failed, Scored
from flywheel_ray.rollout import ArmReport, Gates, RolloutReport, decide
from flywheel_ray.scoring import TOOL_CALLING_CORRECTNESS, TOOL_METRICS
from flywheel_ray.stats import Interval

SAMPLES = 10
LONGEST = 600
"""Characters of a prompt or an answer that the page shows."""


class Html(str):
    """Text that is markup already; every other string is escaped where it is put into the page."""


def el(tag: str, *children: str, **attributes: str) -> Html:
    """An element; `class_` gives the attribute `class`."""
    written = "".join(f' {name.rstrip("_")}="{html.escape(value)}"' for name, value in attributes.items())
    return Html(f"<{tag}{written}>{join(children)}</{tag}>")


def join(children: Iterable[str], between: str = "") -> Html:
    """Children one after the other, each escaped unless it is `Html`."""
    return Html(between.join(child if isinstance(child, Html) else html.escape(child) for child in children))


def write_report(
    path: str | Path,
    board: Leaderboard,
    results: Sequence[Scored | Failed],
    dataset: Dataset,
    rollout_report: RolloutReport | None = None,
    shadow: Any = None,
    gates: Gates | None = None,
) -> Path:
    """Write the page, whole or not at all, and return its path.

    Args:
        path: the HTML file; its folder is made.
        board: the ranking to show.
        results: the trials it ranks (learning curves and answers come from them).
        dataset: the dataset of the board's fingerprint.
        rollout_report: what the logs say about a rollout, from `rollout.report`; None shows no live comparison.
        shadow: the same rollout's pairs, from `analysis.shadow_frame`, for the live plots.
        gates: the rollout's gates, for its decisions; None shows figures without one.

    Raises:
        LedgerError: board and dataset have different fingerprints, or the file cannot be written.
    """
    if board.fingerprint != dataset.fingerprint:
        raise LedgerError(f"the leaderboard is of dataset {board.fingerprint}, not of {dataset.fingerprint}")
    path = Path(path)
    best = _best(board, results)
    sections = [
        _card(board, dataset, rollout_report, gates),
        _leaderboard(board),
        _plots(board, results, dataset, best),
        _live(board, rollout_report, shadow, gates),
        _disagreements(board, dataset, best),
        _dataset(dataset),
        _claims(board, results, rollout_report),
        el("footer", f"Written by flywheel-ray {__version__}. Dataset {board.fingerprint}."),
    ]
    template = Template((files("flywheel_ray") / "report.html").read_text(encoding="utf-8"))
    title = html.escape(f"{dataset.manifest.name}: flywheel report")
    _write(path, template.substitute(title=title, body=join(sections, "\n")))
    return path


def answer_text(completion: Completion) -> str:
    """A completion as people read it: its tool calls, one a line, else its text."""
    calls = [
        f"{c.name}({c.arguments if isinstance(c.arguments, str) else json.dumps(c.arguments, ensure_ascii=False)})"
        for c in completion.tool_calls
    ]
    return "\n".join(filter(None, [completion.text, *calls])) or "(empty)"


def prompt_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """What the user said last; the last message of any role where no user spoke."""
    said = [m for m in messages if m.get("role") == "user"] or list(messages)
    return content_text(said[-1].get("content")) if said else ""


# ── the decision ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _card(board: Leaderboard, dataset: Dataset, live: RolloutReport | None, gates: Gates | None) -> Html:
    row = _shown(board)
    status, headline = {
        "winner": (
            el("span", "✓ within the margin offline", class_="pill good"),
            f"Winner: {row.label if row else ''}",
        ),
        "not_enough_evidence": (el("span", "? not enough evidence", class_="pill unsure"), "No winner yet"),
        "uncalibrated_judge": (el("span", "? the judge is not calibrated", class_="pill unsure"), "No winner yet"),
        "none": (el("span", "✕ below the margin", class_="pill bad"), "No candidate can replace the teacher"),
    }[board.status]
    if row is None or row.quality is None:
        status = el("span", "✕ nothing scored", class_="pill bad")
    kinds = Counter(plots.LOOKS[r.evaluation][2] for r in board.rows)
    tried = ", ".join(f"{n} {name}" for name, n in kinds.items()) or "none scored"
    failed = f", {len(board.failed)} failed" if board.failed else ""
    n = max((r.quality.n for r in board.rows if r.quality), default=0)
    return el(
        "header",
        el("div", f"Decision card · {dataset.manifest.name} · dataset ", el("code", board.fingerprint), class_="quiet"),
        el("h1", headline),
        status,
        el("p", board.verdict, style="margin-top:10px"),
        el(
            "p",
            f"Compared: {_many(len(board.rows) + len(board.failed), 'candidate')} ({tried}{failed}) with the teacher's "
            f"logged answers to {_many(n, 'held-out record')}, by {board.metric}; margin {board.margin:.3g}.",
            class_="quiet",
        ),
        el("div", *_tiles(board, row, live, gates), class_="tiles"),
        id="decision",
    )


def _tiles(board: Leaderboard, row: Row | None, live: RolloutReport | None, gates: Gates | None) -> list[Html]:
    tiles = []
    if row and row.quality:
        whose = "winner" if board.winner else "best candidate"
        q, teacher, reference = row.quality, board.teacher.cost, _percent(teacher_score(board.metric))
        tiles.append(
            _tile(
                f"agreement with the teacher, {whose}",
                _percent(q.estimate),
                f"{q.confidence:.0%} interval {_range(q)}, n = {q.n}; the teacher is {reference} by definition",
            )
        )
        mine, theirs = row.cost.usd_per_1000, teacher.usd_per_1000
        figures = f"{dollars(mine)} against {dollars(theirs)} per 1,000 requests"
        if row.usd_per_1000_successes is not None:
            figures += f"; {dollars(row.usd_per_1000_successes)} per 1,000 right answers"
        if mine is None or theirs is None:
            figures = "put the student's and the teacher's price under `prices` of the sweep"
        tiles.append(_tile("cost against the teacher", cost_ratio(mine, theirs), figures))
        measured = f"p95 {_seconds(row.cost.latency_p95_s)}; the teacher {_seconds(teacher.latency_p50_s)} by its logs"
        tiles.append(_tile("median latency, offline", _seconds(row.cost.latency_p50_s), measured))
    judged = {m: i for m, i in row.scores.items() if i and m in JUDGED} if row else {}
    said = "; ".join(f"{plots.words(m)} {_percent(i.estimate)}" for m, i in judged.items())
    tiles.append(_tile("judge", board.judge or "none", said or "no judged score", words=True))
    if live is None:
        tiles.append(_tile("live comparison", "none yet", "start one with `flywheel serve`", words=True))
    for arm in live.arms if live else ():
        if gates:
            decision = decide(arm, gates)
            tiles.append(_tile(f"live, arm {arm.arm}", decision.action.replace("_", " "), decision.reason, words=True))
        else:
            tiles.append(
                _tile(f"live, arm {arm.arm}", _many(arm.pairs, "pair"), "no gates given, so no decision", words=True)
            )
    return tiles


def _tile(name: str, figure: str, more: str, words: bool = False) -> Html:
    kind = {"class_": "words"} if words else {}
    breakable = Html(html.escape(more).replace("_", "_<wbr>"))  # metrics have long names and tiles are narrow
    return el("div", el("span", name), el("b", figure, **kind), el("span", breakable), class_="tile")


# ── the leaderboard ───────────────────────────────────────────────────────────────────────────────────────────────────


def _leaderboard(board: Leaderboard) -> Html:
    metrics = sorted(board.teacher.scores, key=lambda name: name != board.metric)
    head = ["#", "candidate", *metrics, "p", "latency", "tokens", "$ per 1,000", "training", "Pareto"]
    ranked = {name: f"{plots.words(name)}" + (" ▼" if name == board.metric else "") for name in metrics}
    titles = [el("th", ranked.get(name, name), class_="n" if i > 1 else "", title=name) for i, name in enumerate(head)]
    rows = [_row("", board.teacher, metrics, board)]
    rows += [_row(str(rank), row, metrics, board) for rank, row in enumerate(board.rows, 1)]
    for failed in board.failed:
        again = "; the same trial may succeed when it is run again" if failed.transient else ""
        reason = el("td", f"failed at {failed.stage}: {cut(failed.error)}{again}", colspan=str(len(head) - 2))
        rows.append(el("tr", el("td", "✕"), _name(failed.candidate.label, failed.key), reason, class_="failed"))
    return el(
        "section",
        el("h2", "Leaderboard"),
        el(
            "p",
            "▼ ranks. Each score has its interval and the n rows behind it; unscored rows are in no mean. p: of being "
            "worse than the teacher by the margin or more, adjusted for the number of candidates; unanswered counts as "
            "wrong. ● nothing is both better and cheaper; ○ a cheaper one is shown to be no worse by the margin.",
            class_="quiet",
        ),
        el("div", el("table", el("thead", el("tr", *titles)), el("tbody", *rows)), class_="scroll"),
        id="leaderboard",
    )


def _row(rank: str, row: Row, metrics: Sequence[str], board: Leaderboard) -> Html:
    reference = row.key == board.teacher.key
    cost = row.cost
    cells = [el("td", rank or "·"), _name(row.label, row.evaluation if reference else f"{row.evaluation} · {row.key}")]
    for metric in metrics:
        interval, unscored = row.scores.get(metric), row.unscored.get(metric, 0)
        if reference:
            cells.append(el("td", _percent(teacher_score(metric)), el("small", "by definition"), class_="n"))
            continue
        if row.calibrated and metric == board.metric:
            interval = row.quality
        counts = f"n {interval.n if interval else 0}" + (f" · {unscored} unscored" if unscored else "")
        counts += " · corrected by labels" * (row.calibrated and metric == board.metric)
        figures = [_percent(interval.estimate), el("small", _range(interval))] if interval else ["unscored"]
        cells.append(el("td", *figures, el("small", counts), class_="n"))
    cells += [
        el("td", "" if row.p_value is None else f"{row.p_value:.2g}", class_="n"),
        el("td", _seconds(cost.latency_p50_s), el("small", f"p95 {_seconds(cost.latency_p95_s)}"), class_="n"),
        el("td", f"{_whole(cost.prompt_tokens)} in", el("small", f"{_whole(cost.completion_tokens)} out"), class_="n"),
        el("td", dollars(cost.usd_per_1000), el("small", _per_success(row)), class_="n"),
        el("td", _seconds(row.train_s), class_="n"),
        el("td", "●" if row.pareto else "○" if row.dominated_by else "", class_="n"),
    ]
    kind = "winner" if row.key == board.winner else "teacher" if reference else "candidate"
    return el("tr", *cells, class_=kind)


def _per_success(row: Row) -> str:
    return "" if row.usd_per_1000_successes is None else f"{dollars(row.usd_per_1000_successes)} right"


def _name(label: str, small: str) -> Html:
    return el("td", label, el("small", small), class_="name", dir="auto")


# ── plots ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _plots(board: Leaderboard, results: Sequence[Scored | Failed], dataset: Dataset, best: Scored | None) -> Html:
    if not any(row.quality for row in board.rows):
        return el(
            "section", el("h2", "Plots"), el("p", "No candidate was scored, so there is nothing to draw."), id="plots"
        )
    figures = [
        _figure(
            plots.quality(board), "quality", "Quality of each candidate", "Numbers are ranks on the leaderboard.", True
        ),
    ]
    if (trade_off := plots.trade_off(board)) is not None:
        figures.append(_figure(trade_off, "trade-off", "Quality against cost", _TRADE_OFF))
    if (curves := plots.losses(results, board.winner)) is not None:
        figures.append(
            _figure(curves, "losses", "Learning curves", "A curve that turns up again is learning by heart.")
        )
    metric = board.metric
    by_tool = best and metric in (*TOOL_METRICS, TOOL_CALLING_CORRECTNESS)
    if best and by_tool and (tools := plots.by_tool(best, dataset.eval, metric)) is not None:
        figures.append(_figure(tools, "by-tool", "By the tool the teacher called", f"Trial {best.candidate.label}."))
    return el("section", el("h2", "Plots"), el("div", *figures, class_="plots"), id="plots")


def _cut_to(board: Leaderboard) -> str:
    hidden = len(board.rows) - plots.MAX_ROWS
    more = f" The best {plots.MAX_ROWS} are drawn, {hidden} more stand in the table." if hidden > 0 else ""
    return f"Numbers are ranks on the leaderboard.{more}"


_TRADE_OFF = "Numbers are ranks; the dashed line joins the candidates that no other beats on both axes."


def _figure(figure: Any, name: str, title: str, caption: str, wide: bool = False) -> Html:
    drawn = el("div", Html(plots.svg(figure, name, title)), class_="drawn")
    return el("figure", el("h3", title), drawn, el("figcaption", caption), class_="wide" if wide else "half")


# ── live ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _live(board: Leaderboard, live: RolloutReport | None, shadow: Any, gates: Gates | None) -> Html:
    parts = [el("h2", "Live comparison")]
    if live is None:
        words = (
            "No rollout was given: nothing here has been shown on live traffic yet. Start one with `flywheel serve`."
        )
        return el("section", *parts, el("p", words), id="live")
    errors = f"; it failed {_causes(live.teacher_errors)}." if live.teacher_errors else "."
    asked = f"{_many(live.exchanges, 'exchange')}, {live.teacher_requests:,} asked of the teacher{errors}"
    parts.append(
        el(
            "p",
            f"Rollout {live.rollout}: {asked}",
        )
    )
    parts += [_arm(arm, gates) for arm in live.arms]
    if live.sample_ratio_p_value is not None:
        units = ", ".join(f"{name} {count}" for name, count in live.units.items())
        broken = " The split of traffic is broken: trust no live figure." if live.sample_ratio_p_value < 0.001 else ""
        parts.append(el("p", f"Units: {units}; sample-ratio p-value {live.sample_ratio_p_value:.3g}.{broken}"))
    if shadow is not None and len(shadow):
        figures = []
        running = plots.running_agreement(shadow, gates or plots.gates_for(shadow, board.margin))
        if running is not None:
            words = "The band is an anytime-valid confidence sequence: it may be looked at after every request."
            figures.append(_figure(running, "running", "Agreement as pairs arrived", words))
        if (speed := plots.latency(shadow)) is not None:
            figures.append(_figure(speed, "latency", "Latency on the same requests", "Pairs that both answered."))
        parts.append(el("div", *figures, class_="plots"))
    return el("section", *parts, id="live")


def _arm(arm: ArmReport, gates: Gates | None) -> Html:
    lines: list[tuple[str, str]] = [
        ("shadow copies", f"{arm.copies:,}: {arm.answered:,} answered"),
        ("dropped before the arm", _causes(arm.drops) or "none"),
        ("failed by the arm", _causes(arm.failures) or "none"),
        (
            "pairs",
            f"{arm.pairs:,}, {arm.unscored:,} of them without the gate's metric; {arm.unpaired:,} unpaired copies",
        ),
    ]
    if arm.live_requests:
        lines.append(("live requests", f"{arm.live_requests:,}; failed: {_causes(arm.live_failures) or 'none'}"))
    for metric, found in arm.agreement.items():
        once, always = found.interval, found.sequence
        lines.append(
            (
                plots.words(metric),
                f"{_percent(once.estimate)}, read once {_range(once)}, at any time {_range(always)}, n {once.n}",
            )
        )
    if arm.error_rate:
        lines.append(
            ("error rate", f"{_percent(arm.error_rate.estimate)} {_range(arm.error_rate)}, n {arm.error_rate.n}")
        )
    if speed := arm.latency:
        lines.append(
            (
                "latency p50 / p95",
                f"{_seconds(speed.arm_p50_s)} / {_seconds(speed.arm_p95_s)}; teacher {_seconds(speed.teacher_p50_s)} / "
                f"{_seconds(speed.teacher_p95_s)} on the same {speed.n} exchanges",
            )
        )
    if arm.tokens:
        lines.append(("completion tokens", f"{arm.tokens.arm:.1f}; teacher {arm.tokens.teacher:.1f}"))
    title: list[str] = [f"Arm {arm.arm} "]
    why: list[Html] = []
    if gates:
        decision = decide(arm, gates)
        kind = {"promote": "good", "hold": "unsure", "roll_back": "bad"}[decision.action]
        mark = {"promote": "✓ promote", "hold": "? hold", "roll_back": "✕ roll back"}[decision.action]
        title.append(el("span", mark, class_=f"pill {kind}"))
        why.append(el("p", decision.reason))
    rows = [el("tr", el("th", name, scope="row"), el("td", words)) for name, words in lines]
    return join([el("h3", *title), *why, el("div", el("table", el("tbody", *rows)), class_="scroll")])


# ── what went wrong, what it rests on ─────────────────────────────────────────────────────────────────────────────────


def _disagreements(board: Leaderboard, dataset: Dataset, best: Scored | None) -> Html:
    parts = [el("h2", "Sample disagreements")]
    if best is None:
        return el("section", *parts, el("p", "No candidate was scored."), id="disagreements")
    examples: dict[str, Example] = {example.id: example for example in dataset.eval}
    scored = [(v, o) for o in best.outcomes if (v := o.scores.get(board.metric)) is not None]
    below = sorted(((v, o) for v, o in scored if v < 1), key=lambda pair: pair[0])
    # Rows are in the order of a hash of the request, so the first of equal scores are as good as a random sample.
    shown = [(v, o, examples[o.example_id]) for v, o in below[:SAMPLES] if o.example_id in examples]
    unanswered = sum(o.completion is None for o in best.outcomes)
    parts.append(
        el(
            "p",
            f"{best.candidate.label}: {len(below)} of {len(scored)} scored answers are below 1 by {board.metric}"
            f"{f', {unanswered} prompts got no answer' if unanswered else ''}; {len(shown)} shown.",
            class_="quiet",
        )
    )
    if not shown:
        return el("section", *parts, id="disagreements")
    head = el("tr", *(el("th", name) for name in ("prompt, last turn", "teacher", "student")))
    rows = [
        el(
            "tr",
            el("td", _said(prompt_text(example.messages))),
            el("td", _said(answer_text(example.reference))),
            el(
                "td",
                _said(answer_text(outcome.completion) if outcome.completion else "(no answer)"),
                _why(outcome.scores),
            ),
        )
        for _, outcome, example in shown
    ]
    table = el("table", el("thead", head), el("tbody", *rows), class_="compare")
    return el("section", *parts, el("div", table, class_="scroll"), id="disagreements")


def _why(scores: Mapping[str, float | None]) -> Html:
    figures = [f"{plots.words(m)} {'unscored' if v is None else f'{v:.2g}'}" for m, v in scores.items()]
    return join(el("small", figure) for figure in figures)


def _said(text: str) -> Html:
    return el("pre", cut(text), dir="auto")


def _dataset(dataset: Dataset) -> Html:
    manifest = dataset.manifest
    first, last = (_day(t) for t in (manifest.first_timestamp, manifest.last_timestamp))
    origin = f" from {manifest.source}" if manifest.source else ""
    splits = [
        el("tr", el("td", name), el("td", f"{getattr(manifest.rows, name):,}", class_="n"),
           el("td", f"{getattr(manifest.conversations, name):,}", class_="n"))
        for name in SPLITS
    ]  # fmt: skip
    left_out = [el("tr", el("td", why), el("td", f"{n:,}", class_="n")) for why, n in manifest.excluded.items()]
    tools = [
        el("tr", el("td", tool), *(el("td", f"{getattr(count, name):,}", class_="n") for name in SPLITS))
        for tool, count in sorted(manifest.tools.items(), key=lambda item: -item[1].total)[:20]
    ]
    hidden = len(manifest.tools) - len(tools)
    return el(
        "section",
        el("h2", "Dataset"),
        el(
            "p",
            f"{manifest.name}{origin}, {first} to {last}. {manifest.scanned:,} records scanned, "
            f"{manifest.rows.total:,} kept; split by conversation, so no conversation is on two sides. Fingerprint ",
            el("code", dataset.fingerprint),
            ".",
        ),
        el(
            "div",
            el("div", el("h3", "Rows"), _table(["split", "rows", "conversations"], splits)),
            el(
                "div",
                el("h3", "Left out"),
                _table(["reason", "records"], left_out) if left_out else el("p", "Nothing."),
            ),
            class_="columns",
        ),
        el("h3", "Teacher's tools" + (f" (20 of {len(manifest.tools)})" if hidden > 0 else "")),
        el("div", _table(["tool", *SPLITS], tools), class_="scroll"),
        id="dataset",
    )


def _table(head: Sequence[str], rows: Sequence[Html]) -> Html:
    titles = [el("th", name, class_="n" if i else "") for i, name in enumerate(head)]
    return el("table", el("thead", el("tr", *titles)), el("tbody", *rows))


def _claims(board: Leaderboard, results: Sequence[Scored | Failed], live: RolloutReport | None) -> Html:
    judges = sorted({result.judge for result in results if isinstance(result, Scored)})
    if len(judges) > 1:
        judge = f"Judges differ between trials ({'; '.join(judges)}): their judged scores do not compare."
    elif "no LLM" in board.judge:
        judge = f"The judge was {board.judge}: judged scores come from rules, which see shared words and not meaning."
    else:
        compared = any(row.calibrated for row in board.rows)
        known = (
            "its ratings are corrected by labels." if compared else "nobody compared its ratings with people's here."
        )
        judge = f"The judge was {board.judge or 'absent'}; {known}"
    claims = [
        "Quality is agreement with the teacher, not correctness: where the teacher is wrong, agreeing counts as right.",
        judge,
        "Intervals are clustered by conversation, and each holds for its own candidate. The best of "
        f"{len(board.rows)} was chosen on these same records, so its figure leans upwards; whether there is a winner "
        "is decided by p-values adjusted for that, and live pairs are the check.",
        "Offline latency is that of batched evaluation where the trials ran, the teacher's is what its logs say: "
        "compare them on live pairs. Dollars follow the sweep's price table and mean tokens or throughput, not a bill.",
    ]
    if live is None or not any(arm.pairs for arm in live.arms):
        claims.append("Nothing here has been shown on live traffic.")
    else:
        claims.append(
            "A live decision rests on the anytime-valid bound; failures of the arm count as disagreement in it."
        )
    return el(
        "section", el("h2", "What can and cannot be claimed"), el("ul", *(el("li", c) for c in claims)), id="claims"
    )


# ── small things ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _shown(board: Leaderboard) -> Row | None:
    """The row that the page is about: the winner, else the best."""
    return next((row for row in board.rows if row.key == board.winner), board.rows[0] if board.rows else None)


def _best(board: Leaderboard, results: Sequence[Scored | Failed]) -> Scored | None:
    row = _shown(board)
    return next((r for r in results if isinstance(r, Scored) and row and r.key == row.key), None)


def cut(text: str) -> str:
    """The text, ended with how much of it is missing where it is longer than a page should show."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text) - LONGEST:,} more characters)"


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _range(interval: Interval) -> str:
    return f"[{interval.low:.1%}, {interval.high:.1%}]"


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3g} s" if value < 100 else f"{value:,.0f} s"


def dollars(value: float | None) -> str:
    """US dollars with cents, or three significant digits below one dollar."""
    if value is None:
        return "unpriced"
    if value >= 1 or value == 0:
        return f"${value:,.2f}"
    return "$" + f"{float(f'{value:.3g}'):.10f}".rstrip("0")


def _whole(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def cost_ratio(mine: float | None, theirs: float | None) -> str:
    """How the student's cost compares with the teacher's, in words."""
    if mine is None or theirs is None:
        return "not priced"
    if not mine or not theirs:
        return "free" if not mine else "the teacher is free"
    times, word = (theirs / mine, "cheaper") if mine <= theirs else (mine / theirs, "dearer")
    return f"{times:,.0f}× {word}" if times >= 10 else f"{times:.1f}× {word}"


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _causes(causes: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {cause}" for cause, count in causes.items())


def _day(timestamp: float) -> str:
    return datetime.fromtimestamp(timestamp, UTC).strftime("%Y-%m-%d")


def _write(path: Path, text: str) -> None:
    # Lone surrogates are legal in logged JSON and illegal in UTF-8.
    data = text.encode("utf-8", "replace")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as out:
                out.write(data)
            os.chmod(partial, 0o644)
            os.replace(partial, path)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise LedgerError(f"report {path} cannot be written: {error.strerror or error}") from None
