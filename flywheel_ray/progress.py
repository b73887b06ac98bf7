"""What a person sees of a running sweep: a live table in a terminal, one line for each change in a log file.

    show = SweepProgress(Console())          # a terminal gets the table; `ray job submit` logs get lines
    show.start("demo", candidates, finished); show.update(key, {"stage": "training", …}); show.stop()

The trial's side, `Progressed`, turns `trial.Progress` into Tune reports, at most about one every two seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from flywheel_ray.candidates import Candidate
from flywheel_ray.results import Failed, Scored
from flywheel_ray.scoring import FUNCTION_NAME_AND_ARGS, SIMILARITY
from flywheel_ray.trial import Progress

PENDING, DONE, FAILED = "pending", "done", "failed"


class Progressed:
    """The trial's side: called with every `Progress`, reports what changed to `report` (tune.report)."""

    def __init__(self, key: str, report: Callable[[dict[str, Any]], None], every_s: float = 2.0) -> None:
        self._key = key
        self._report = report
        self._every_s = every_s
        self._last = 0.0
        self._shown: tuple[Any, ...] = ()

    def __call__(self, progress: Progress) -> None:
        loss = progress.validation_loss
        news = (progress.stage, loss.step if loss else None)
        if news == self._shown and time.monotonic() - self._last < self._every_s:
            return
        self._shown, self._last = news, time.monotonic()
        done = progress.done / progress.total if progress.total else progress.progress
        self._report(
            {
                "key": self._key,
                "stage": progress.stage,
                "progress": -1.0 if done is None else done,
                "validation_loss": loss.value if loss else float("nan"),
                "epoch": loss.epoch if loss else 0.0,
            }
        )

    def finish(self, result: Scored | Failed, metric: str | None) -> None:
        """Report how the trial ended."""
        report: dict[str, Any] = {"key": self._key, "progress": 1.0, "validation_loss": float("nan"), "epoch": 0.0}
        if isinstance(result, Failed):
            self._report({**report, "stage": FAILED, "error": f"{result.stage}: {result.error}"})
            return
        metric = metric or (FUNCTION_NAME_AND_ARGS if FUNCTION_NAME_AND_ARGS in result.metrics() else SIMILARITY)
        if result.training and result.training.validation_losses:
            report["validation_loss"] = result.training.validation_losses[-1].value
        score = result.mean(metric)
        self._report({**report, "stage": DONE, "score": float("nan") if score is None else score})


class Quiet:
    """Shows nothing."""

    def start(self, name: str, candidates: Mapping[str, Candidate], finished: set[str]) -> None:
        """The sweep begins with these candidates, by key; those finished before are not run."""

    def update(self, key: str, report: Mapping[str, Any]) -> None:
        """A trial reported."""

    def lost(self, key: str, error: str) -> None:
        """A trial's process ended without a result."""

    def stop(self) -> None:
        """The sweep is over."""


class SweepProgress(Quiet):
    """Shows a live table on a terminal and lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._name = ""
        self._labels: dict[str, str] = {}
        self._state: dict[str, dict[str, Any]] = {}
        self._started: dict[str, float] = {}
        self._begun = 0.0

    def start(self, name: str, candidates: Mapping[str, Candidate], finished: set[str]) -> None:
        self._name, self._begun = name, time.monotonic()
        self._labels = {key: c.label for key, c in candidates.items()}
        self._state = {key: {"stage": DONE if key in finished else PENDING} for key in candidates}
        again = f", {len(finished)} finished before" if finished else ""
        self._console.print(f"sweep {name}: {len(candidates)} candidates{again}")
        if self._console.is_terminal and len(finished) < len(candidates):
            self._live = Live(self._table(), console=self._console, refresh_per_second=2, get_renderable=self._table)
            self._live.start()

    def update(self, key: str, report: Mapping[str, Any]) -> None:
        if key not in self._state:
            return
        before = self._state[key]
        self._started.setdefault(key, time.monotonic())
        self._state[key] = {**before, **report}
        if report["stage"] in (DONE, FAILED):
            self._state[key]["seconds"] = time.monotonic() - self._started[key]
        news = ("stage", "epoch") if report["stage"] == "training" else ("stage",)
        if self._live is None and any(before.get(n) != report.get(n) for n in news):
            self._console.print(self._line(key))

    def lost(self, key: str, error: str) -> None:
        self.update(key, {"stage": FAILED, "error": error})

    def stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _line(self, key: str) -> str:
        state = self._state[key]
        ended = sum(s["stage"] in (DONE, FAILED) for s in self._state.values())
        parts = [f"[{ended}/{len(self._state)}] {self._labels[key]}: {state['stage']}"]
        if state["stage"] == "training" and state.get("epoch"):
            parts.append(f"epoch {state['epoch']:g}")
        parts += [p for p in (_loss(state), _score(state), state.get("error", "")) if p]
        return "  ".join(parts)

    def _table(self) -> Table:
        ended = sum(s["stage"] in (DONE, FAILED) for s in self._state.values())
        took = time.monotonic() - self._begun
        table = Table(
            title=f"sweep {self._name}: {ended} of {len(self._state)} trials, {took:.0f} s", title_justify="left"
        )
        for column in ("candidate", "stage", "progress", "validation loss", "score", "s"):
            table.add_column(column, justify="left" if column in ("candidate", "stage") else "right")
        for key, state in self._state.items():
            stage = state["stage"]
            style = {DONE: "green", FAILED: "red", PENDING: "dim"}.get(stage, "yellow")
            part = state.get("progress", -1.0)
            shown = f"{part:.0%}" if stage in ("training", "generation") and part >= 0 else ""
            seconds = state.get("seconds") or (time.monotonic() - self._started[key] if key in self._started else None)
            table.add_row(
                self._labels[key],
                f"[{style}]{stage}[/]" + (f" {state.get('error', '')}" if stage == FAILED else ""),
                shown,
                _loss(state, bare=True),
                _score(state, bare=True),
                "" if seconds is None else f"{seconds:.0f}",
            )
        return table


def _loss(state: Mapping[str, Any], bare: bool = False) -> str:
    loss = state.get("validation_loss")
    if loss is None or loss != loss:
        return ""
    return f"{loss:.3f}" if bare else f"validation loss {loss:.3f}"


def _score(state: Mapping[str, Any], bare: bool = False) -> str:
    score = state.get("score")
    if score is None or score != score:
        return ""
    return f"{score:.3f}" if bare else f"score {score:.3f}"


def progress_callback(show: Quiet) -> Any:
    """A Tune callback that passes every report on to `show`."""
    from ray.tune import Callback

    class Shown(Callback):
        show: Quiet = Quiet()

        def __getstate__(self) -> dict[str, Any]:
            return {}  # Tune saves its callbacks with its state; a terminal cannot be saved

        def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
            if "key" in result:
                self.show.update(result["key"], result)

        def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            key = (trial.last_result or {}).get("key")
            if key:
                self.show.lost(key, "the trial's process died; see the logs under the sweep's tune folder")

    callback = Shown()
    callback.show = show
    return callback
