"""The standard figures of a sweep and of its rollout, as matplotlib figures made without pyplot's global state.

    figure = quality(board)                      # a dot and its interval for each candidate, against the teacher
    figure.savefig("quality.png")                # or svg(figure, "quality"), to stand inside a page

Colours are Okabe and Ito's, told apart with any kind of colour blindness; marker shapes say the same again.
Every label from logs or configuration is taken literally, so a `$` in a model's name is no mathematics.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

import numpy as np

from flywheel_ray.candidates import BASE_EVAL, CUSTOMIZED_EVAL, ICL_EVAL
from flywheel_ray.datasets import Example
from flywheel_ray.errors import FlywheelError
from flywheel_ray.leaderboard import Leaderboard, Row, teacher_score
from flywheel_ray.results import Failed, LossPoint, Scored
from flywheel_ray.rollout import Gates
from flywheel_ray.scoring import FUNCTION_NAME_AND_ARGS
from flywheel_ray.sequences import bounds, close
from flywheel_ray.stats import Interval, mean_interval

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
except ModuleNotFoundError as missing:
    raise FlywheelError(
        f"plots need {missing.name}, which is not installed: pip install 'flywheel-ray[analysis]'"
    ) from None

INK, MUTED, GRID = "#1c2024", "#60646c", "#d9d9e0"
BLUE, ORANGE, GREEN, PINK, SKY, VERMILION = "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00"
PAPER = "#ffffff"
THEME = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    PAPER: "paper",
    BLUE: "blue",
    ORANGE: "orange",
    GREEN: "green",
    PINK: "pink",
    SKY: "sky",
    VERMILION: "vermilion",
}
"""Colours a page may restyle: in `svg` each becomes its CSS variable, with the colour itself as the fallback."""

LOOKS = {
    BASE_EVAL: (MUTED, "s", "as it is"),
    ICL_EVAL: (ORANGE, "^", "in-context"),
    CUSTOMIZED_EVAL: (BLUE, "o", "LoRA"),
}
"""Colour, marker and words for each evaluation."""
SERIES = (BLUE, ORANGE, GREEN, PINK, SKY, VERMILION)
MAX_ROWS = 40

WORDS: Mapping[str, str] = {
    "function_name_and_args_accuracy": "same calls and arguments",
    "function_name_accuracy": "same function names",
    "tool_calling_correctness": "judged tool calls correct",
    "similarity": "judged similarity of text",
    "exact_text": "same text",
}
"""Metrics as a reader says them."""


def quality(board: Leaderboard) -> Figure:
    """Each candidate's score and its interval, best first; the teacher's as a line, the margin shaded."""
    rows = [(rank, row) for rank, row in enumerate(board.rows, 1) if row.quality][:MAX_ROWS]
    figure, axes = _figure(13, 1.05 + 0.36 * max(len(rows), 1))
    _margin(axes.axvspan, axes.axvline, board.margin, teacher_score(board.metric))
    for y, (_, row) in enumerate(rows):
        assert row.quality
        colour, marker, _ = LOOKS[row.evaluation]
        axes.plot([row.quality.low, row.quality.high], [y, y], color=colour, lw=2, solid_capstyle="round")
        axes.plot(row.quality.estimate, y, marker=marker, color=colour, ms=7.5, mec=PAPER, mew=0.8)
    names = [f"{short(row.label, 60)} · {rank}" for rank, row in rows]
    axes.set_yticks(range(len(rows)), names, parse_math=False)
    for text, (_, row) in zip(axes.get_yticklabels(), rows, strict=True):
        text.set_fontweight("bold" if row.key == board.winner else "normal")
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(-0.01, 1.015)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel(f"{words(board.metric)}: mean over held-out records, {_confidence(rows)} interval")
    axes.grid(axis="y", visible=False)
    _legend(axes, [row.evaluation for _, row in rows], board.margin)
    return figure


def trade_off(board: Leaderboard) -> Figure | None:
    """Agreement with the teacher against US dollars per 1,000 requests, or median latency where nothing is priced.

    Points carry their rank on the leaderboard; the line joins those that no other beats on both axes. None where no
    candidate has either figure.
    """
    priced = any(row.cost.usd_per_1000 is not None for row in board.rows)

    def cost(row: Row) -> float | None:
        return row.cost.usd_per_1000 if priced else row.cost.latency_p50_s

    points = [(rank, row, x) for rank, row in enumerate(board.rows, 1) if row.quality and (x := cost(row)) is not None]
    if not points:
        return None
    figure, axes = _figure(6.4, 4.0)
    front = sorted((x, row.quality.estimate) for _, row, x in points if row.pareto and row.quality)
    axes.step([x for x, _ in front], [y for _, y in front], where="post", color=MUTED, lw=1, ls=(0, (4, 3)), zorder=1)
    for _, row, x in points:
        assert row.quality
        colour, marker, _ = LOOKS[row.evaluation]
        axes.plot(x, row.quality.estimate, marker=marker, color=colour, ms=8, mec=PAPER, mew=0.8, ls="")
    teacher = cost(board.teacher)
    costs = [x for _, _, x in points] + ([teacher] if teacher is not None else [])
    if teacher is not None:
        axes.plot(teacher, 1.0, marker="*", color=INK, ms=14, mec=PAPER, mew=0.8, ls="")
        side = "right" if teacher >= max(costs) else "left"
        axes.annotate("teacher", (teacher, 1.0), (0, -17), textcoords="offset points", ha=side, color=INK, size=10.5)
    _margin(axes.axhspan, axes.axhline, board.margin, teacher_score(board.metric))
    _cost_scale(axes, costs)
    axes.set_ylim(-0.04, 1.06)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylabel(words(board.metric))
    axes.set_xlabel("US dollars per 1,000 requests" if priced else "median latency of one answer (s)")
    _legend(axes, [row.evaluation for _, row, _ in points], None)
    _ranks(axes, [(x, row.quality.estimate, rank) for rank, row, x in points if row.quality])
    return figure


def losses(results: Sequence[Scored | Failed], winner: str | None = None) -> Figure | None:
    """Validation loss of each LoRA trial by epoch (training loss where none was validated); None without any."""
    curves: list[tuple[Scored, tuple[LossPoint, ...]]] = []
    trained = [r for r in results if isinstance(r, Scored) and r.training]
    validated = any(r.training and r.training.validation_losses for r in trained)
    for result in trained:
        assert result.training
        points = result.training.validation_losses if validated else result.training.train_losses
        if points:
            curves.append((result, points))
    if not curves:
        return None
    curves.sort(key=lambda curve: (curve[0].key != winner, curve[1][-1].value))
    figure, axes = _figure(6.4, 4.0)
    for i, (result, points) in enumerate(curves):
        first = result.key == winner or (winner is None and i == 0)
        axes.plot(
            [p.epoch for p in points],
            [p.value for p in points],
            color=SERIES[i] if i < len(SERIES) else GRID,
            lw=2.4 if first else 1.5,
            marker="o",
            ms=4.5 if first else 3.5,
            zorder=5 - min(i, 4),
            label=short(result.candidate.label, 60) if i < len(SERIES) else None,
        )
    if len(curves) > len(SERIES):
        axes.plot([], [], color=GRID, lw=1.5, label=f"{len(curves) - len(SERIES)} more")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set_xlabel("epochs of the training split")
    axes.set_ylabel(f"{'validation' if validated else 'training'} loss (nats per token)")
    _named(axes)
    return figure


def by_tool(result: Scored, examples: Sequence[Example], metric: str) -> Figure | None:
    """One trial's score for each tool the teacher called, with its interval; None where no scored row has tools."""
    groups = scores_by_tool(result, examples, metric)
    if not groups:
        return None
    figure, axes = _figure(6.4, 1.05 + 0.33 * len(groups))
    for y, interval in enumerate(groups.values()):
        axes.barh(y, interval.estimate, height=0.62, color=BLUE, alpha=0.85)
        axes.plot([interval.low, interval.high], [y, y], color=INK, lw=1.4, solid_capstyle="butt")
        axes.text(1.02, y, f"n={interval.n}", va="center", ha="left", color=MUTED, size=10)
    axes.set_yticks(range(len(groups)), [short(name, 30) for name in groups], parse_math=False)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.set_xlim(0, 1.14)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel(f"{words(metric)}, {next(iter(groups.values())).confidence:.0%} interval")
    axes.grid(axis="y", visible=False)
    return figure


def scores_by_tool(result: Scored, examples: Sequence[Example], metric: str, at_most: int = 20) -> dict[str, Interval]:
    """Mean score and interval by the tools of the teacher's answer ("no call" for none), most frequent first."""
    called = {
        e.id: " + ".join(sorted({c.name for c in e.reference.tool_calls})) or "no call" for e in examples if e.tools
    }
    values: dict[str, list[tuple[float, str]]] = {}
    for outcome in result.outcomes:
        value = outcome.scores.get(metric)
        if value is not None and outcome.example_id in called:
            values.setdefault(called[outcome.example_id], []).append((value, outcome.conversation))
    names = sorted(values, key=lambda name: (-len(values[name]), name))[:at_most]
    return {name: mean_interval([v for v, _ in values[name]], [c for _, c in values[name]]) for name in names}


def latency(shadow: Any) -> Figure | None:
    """Cumulative share of answers by latency, teacher against each arm on the same exchanges; None where none has both.

    Args:
        shadow: DataFrame of `analysis.shadow_frame`.
    """
    both = shadow[shadow["error"].isna()].dropna(subset=["teacher_latency_s", "arm_latency_s"])
    if both.empty:
        return None
    figure, axes = _figure(6.4, 4.0)
    # One exchange may have been copied to several arms; the teacher answered it once.
    series = {"teacher": (INK, both.drop_duplicates("exchange_id")["teacher_latency_s"])}
    for i, (arm, rows) in enumerate(both.groupby("arm")):
        series[str(arm)] = (SERIES[i % len(SERIES)], rows["arm_latency_s"])
    for name, (colour, seconds) in series.items():
        x = np.sort(seconds.to_numpy(dtype=float))
        p50, p95 = np.percentile(x, [50, 95])
        label = f"{short(name, 30)}: median {p50:.3g} s, p95 {p95:.3g} s"
        style = "--" if name == "teacher" else "-"
        axes.step(x, np.arange(1, x.size + 1) / x.size, where="post", color=colour, lw=2, ls=style, label=label)
    _cost_scale(axes, [float(v) for _, values in series.values() for v in values])
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylabel("share of answers at most this slow")
    axes.set_xlabel("latency of one answer (s)")
    _named(axes)
    return figure


def running_agreement(shadow: Any, gates: Gates, checkpoints: int = 40) -> Figure | None:
    """Agreement as pairs arrived, with the anytime-valid confidence sequence; None without scored pairs.

    Args:
        shadow: DataFrame of `analysis.shadow_frame`, in order of arrival.
        gates: which metric, at what confidence, and the margin that a promotion needs.
        checkpoints: at how many numbers of pairs the sequence is computed.
    """
    scored = shadow.dropna(subset=[gates.metric])
    if scored.empty:
        return None
    figure, axes = _figure(6.4, 4.0)
    _margin(axes.axhspan, axes.axhline, gates.margin)
    for i, (arm, rows) in enumerate(scored.groupby("arm")):
        times = [moment.timestamp() for moment in rows["timestamp"]]
        paired = close([float(v) - 1 for v in rows[gates.metric]], list(rows["conversation"]), times, gates.idle_s)
        ended = len(paired.means)
        ends = np.unique(np.linspace(1, ended, min(checkpoints, ended)).astype(int))
        looks = [paired.first(n) for n in ends]
        band = [bounds(look, gates.confidence, high=0.0) for look in looks]
        at = [look.n for look in looks]
        means = [1 + float(look.means.mean()) for look in looks]
        colour = SERIES[i % len(SERIES)]
        axes.fill_between(
            at, [1 + low for low, _ in band], [1 + high for _, high in band], color=colour, alpha=0.18, lw=0
        )
        label = f"{short(str(arm), 30)}: {means[-1]:.1%}, at least {1 + band[-1][0]:.1%}"
        axes.plot(
            at,
            means,
            color=colour,
            lw=2,
            label=label,
            marker="o",
            ms=3 if len(at) > 1 else 6,
            markevery=[-1],
        )
    axes.set_ylim(0, 1.04)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("pairs so far, as their conversations ended")
    axes.set_ylabel(f"{words(gates.metric)}, {gates.confidence:.0%} bounds")
    _named(axes)
    return figure


def gates_for(shadow: Any, margin: float) -> Gates:
    """Gates to draw by where the rollout's own are not at hand: by tool calls, or by text where no pair has tools."""
    if shadow[FUNCTION_NAME_AND_ARGS].isna().all():
        return Gates(metric="exact_text", margin=margin)
    return Gates(metric="function_name_and_args_accuracy", margin=margin)


def svg(figure: Figure, name: str, title: str = "") -> str:
    """The figure as an `<svg>` element for a page: no namespaces, its ids prefixed by `name`, colours as CSS variables.

    Args:
        figure: what to draw.
        name: unique within the page; letters and hyphens.
        title: what a screen reader says.
    """
    out = StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the reader's browser has the fonts, not matplotlib
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    head, rest = text.split(">", 1)
    box = re.search(r'viewBox="([^"]*)"', head)
    label = re.sub(r'[<>&"]', " ", title or name)
    text = f'<svg viewBox="{box[1] if box else ""}" role="img" aria-label="{label}">{rest}'
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    for colour, variable in THEME.items():
        text = text.replace(colour, f"var(--{variable}, {colour})")
    return text


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of that size in inches with one pair of axes in the house style."""
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.set_axisbelow(True)
    axes.grid(color=GRID, lw=0.7)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(colors=INK, labelsize=10.5, length=0)
    axes.xaxis.label.set(color=MUTED, size=10.5)
    axes.yaxis.label.set(color=MUTED, size=10.5)
    return figure, axes


def _margin(span: Any, line: Any, margin: float, teacher: float = 1.0) -> None:
    """The teacher's line, and the band from the margin below it up, in which a candidate may replace the teacher."""
    if margin > 0:
        span(teacher - margin, 1, color=GREEN, alpha=0.22, lw=0, zorder=0)
    line(teacher, color=INK, lw=1.2, zorder=1)


def _legend(axes: Axes, evaluations: Sequence[str], margin: float | None) -> None:
    for evaluation, (colour, marker, name) in LOOKS.items():
        if evaluation in evaluations:
            axes.plot([], [], marker=marker, color=colour, ls="", ms=7, mec=PAPER, label=name)
    if margin is not None:
        axes.plot([], [], color=INK, lw=1.2, label="teacher")
        if margin > 0:
            axes.fill_between([], [], color=GREEN, alpha=0.22, lw=0, label=f"within the margin of {margin:.3g}")
    _named(axes)


def _named(axes: Axes) -> None:
    """The legend, above the axes so that it never covers a point."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    long = max(len(label) for label in labels) > 28
    figure = axes.get_figure()
    assert figure is not None
    legend = figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=1 if long else len(labels),
        frameon=False,
        fontsize=10.5,
        labelcolor=INK,
        borderpad=0,
        handletextpad=0.5,
        columnspacing=1.6,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _ranks(axes: Axes, points: Sequence[tuple[float, float, int]]) -> None:
    """Write each point's rank beside it; points too near each other to tell apart share one label, "2, 3"."""
    shared: list[tuple[float, float, list[int]]] = []
    for x, y, rank in points:
        here = axes.transData.transform((x, y))
        near = next((s for s in shared if np.abs(axes.transData.transform(s[:2]) - here).max() < 14), None)
        if near:
            near[2].append(rank)
        else:
            shared.append((x, y, [rank]))
    for x, y, ranks in shared:
        words = ", ".join(map(str, ranks))
        axes.annotate(words, (x, y), (8, -4), textcoords="offset points", color=INK, size=10.5)


def _cost_scale(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic x axis with plain numbers where the values span more than one order of magnitude."""
    if values and min(values) > 0 and max(values) / min(values) > 10:
        axes.set_xscale("log")
        axes.set_xlim(min(values) / 1.6, max(values) * 1.6)
    else:
        axes.set_xlim(0, max([*values, 0.0]) * 1.12 or 1)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))


def _confidence(rows: Sequence[tuple[int, Row]]) -> str:
    return next((f"{row.quality.confidence:.0%}" for _, row in rows if row.quality), "95%")


def short(text: str, length: int) -> str:
    """The text on one line, cut to a length with an ellipsis."""
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 1]}…"


def words(metric: str) -> str:
    """A metric's name for an axis."""
    return WORDS.get(metric, metric.replace("_", " "))
