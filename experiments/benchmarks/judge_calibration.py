"""Judges with planted biases: what their raw mean claims, and what a few labels make of it.

    python -m experiments.benchmarks.judge_calibration --repetitions 2000

Each repetition draws 1,000 rows of one candidate, the verdicts of a judge with a known fault (10% of them unreadable),
a simple random sample of labels, and three 95% intervals: of the verdicts, of verdicts and labels together
(`calibration.prediction_powered_mean`), of the labels alone. Beside them stands PPI++ as published, which knows no
clusters. The truth is known, so coverage is counted, not claimed. Clusters are conversations of four turns whose
quality and judge go together. First, one repetition of each judge goes through verdict objects and `calibrate`, with
every row labelled, to see its fault named. Last, nearly all rows are labelled: `--rest` are not.

Exits with 1 where raw intervals cover less than 75% and calibrated ones are outside 93–97%, or no narrower than those
of the labels alone; and where few rows are unlabelled and calibrated intervals cover less than 93%. `--quality 0.95`
shows where that is hard.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from flywheel_ray.calibration import calibrate, debiased, prediction_powered_mean
from flywheel_ray.candidates import Candidate, ZeroShot
from flywheel_ray.judge import PREFERENCE, Order, Verdict
from flywheel_ray.records import Completion
from flywheel_ray.results import Outcome, Scored
from flywheel_ray.scoring import SIMILARITY, TOOL_CALLING_CORRECTNESS
from flywheel_ray.stats import Interval, mean_interval

ROWS = 1000
TURNS = 4
ALIKE = 0.3
"""Intraclass correlation of quality within a conversation."""

_GOOD = np.asarray([7, 8, 9, 10]), np.asarray([0.1, 0.2, 0.4, 0.3])
_BAD = np.asarray([1, 2, 3, 4, 5, 6]), np.asarray([0.1, 0.2, 0.2, 0.2, 0.2, 0.1])


class World(NamedTuple):
    """One repetition: for each of N rows its label, what the judge says, and the conversation."""

    label: np.ndarray
    verdict: np.ndarray
    """NaN where unreadable; for both orders the mean of the two."""
    longer: np.ndarray
    """Log of the candidate's length over the reference's."""
    conversation: np.ndarray
    orders: dict[Order, np.ndarray]
    """A pairwise judge's verdicts in the orders that were asked."""


class Judge(NamedTuple):
    """A planted fault: draws one repetition from (generator, quality, turns a conversation)."""

    name: str
    metric: str
    draw: Callable[[np.random.Generator, float, int], World]
    truth: Callable[[float], float]


def _quality(rng: np.random.Generator, quality: float, turns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """0/1 labels with that mean, a mood of the judge that a conversation shares, and conversations."""
    groups = np.repeat(np.arange(ROWS // turns), turns)
    if turns == 1:
        return (rng.random(ROWS) < quality).astype(float), np.zeros(ROWS), groups
    spread = (1 - ALIKE) / ALIKE
    rates = rng.beta(quality * spread, (1 - quality) * spread, ROWS // turns)
    return (rng.random(ROWS) < rates[groups]).astype(float), rng.normal(0, 0.6, ROWS // turns)[groups], groups


def _unreadable(rng: np.random.Generator, verdict: np.ndarray, rate: np.ndarray | float = 0.1) -> np.ndarray:
    return np.where(rng.random(ROWS) < rate, np.nan, verdict)


def _binary(
    accepts_good: float, accepts_bad: float, per_length: float = 0.0, lost_good: float = 0.1, lost_bad: float = 0.1
) -> Callable[[np.random.Generator, float, int], World]:
    """A 0/1 judge: how often it accepts good and bad answers, how length moves that, and what goes unreadable."""

    def draw(rng: np.random.Generator, quality: float, turns: int) -> World:
        label, mood, groups = _quality(rng, quality, turns)
        longer = rng.normal(0.4, 0.6, ROWS)
        leaning = special.logit(np.where(label == 1, accepts_good, accepts_bad)) + per_length * longer + mood
        verdict = (rng.random(ROWS) < special.expit(leaning)).astype(float)
        lost = np.where(label == 1, lost_good, lost_bad)
        return World(label, _unreadable(rng, verdict, lost), longer, groups, {})

    return draw


def _similarity(base: float, slope: float, noise: float) -> Callable[[np.random.Generator, float, int], World]:
    """A judge that gives base + slope × rating, with noise, rounded to 1 … 10."""

    def draw(rng: np.random.Generator, quality: float, turns: int) -> World:
        good, mood, groups = _quality(rng, quality, turns)
        rating = np.where(good == 1, rng.choice(_GOOD[0], ROWS, p=_GOOD[1]), rng.choice(_BAD[0], ROWS, p=_BAD[1]))
        said = np.clip(np.round(base + slope * rating + mood + rng.normal(0, noise, ROWS)), 1, 10) / 10
        return World(rating / 10, _unreadable(rng, said), rng.normal(0.4, 0.6, ROWS), groups, {})

    return draw


def _pairwise(orders: Sequence[Order], pull: float = 0.35) -> Callable[[np.random.Generator, float, int], World]:
    """A judge that names the first answer shown in a share `pull` of the rows, whatever it is.

    The candidate is better in 0.8 × quality of the rows, a fifth of the others are ties.
    """

    def draw(rng: np.random.Generator, quality: float, turns: int) -> World:
        good, _, groups = _quality(rng, 0.8 * quality, turns)
        label = np.where(good == 1, 1.0, np.where(rng.random(ROWS) < 0.2, 0.5, 0.0))
        noisy = np.where(rng.random(ROWS) < 0.1, 1 - label, label)
        given: dict[Order, np.ndarray] = {}
        for order in orders:
            named = 1.0 if order == "candidate_first" else 0.0
            given[order] = np.where(rng.random(ROWS) < pull, named, noisy)
        verdict = _unreadable(rng, np.mean(list(given.values()), axis=0))
        given = {order: np.where(np.isnan(verdict), np.nan, values) for order, values in given.items()}
        return World(label, verdict, rng.normal(0.4, 0.6, ROWS), groups, given)

    return draw


def _share(quality: float) -> float:
    return quality


def _mean_rating(quality: float) -> float:
    return float(quality * (_GOOD[0] @ _GOOD[1]) + (1 - quality) * (_BAD[0] @ _BAD[1])) / 10


def _mean_preference(quality: float) -> float:
    return 0.8 * quality + (1 - 0.8 * quality) * 0.2 * 0.5


JUDGES = (
    Judge("nearly fair", TOOL_CALLING_CORRECTNESS, _binary(0.96, 0.12), _share),
    Judge("lenient: accepts half the bad", TOOL_CALLING_CORRECTNESS, _binary(0.97, 0.5), _share),
    Judge("strict: rejects a quarter of the good", TOOL_CALLING_CORRECTNESS, _binary(0.75, 0.03), _share),
    Judge("one-sided: errs on the bad alone (30%)", TOOL_CALLING_CORRECTNESS, _binary(0.9999, 0.3), _share),
    Judge("length bias", TOOL_CALLING_CORRECTNESS, _binary(0.83, 0.14, per_length=1.6), _share),
    Judge("unreadable where wrong (30%, else 5%)", TOOL_CALLING_CORRECTNESS, _binary(0.97, 0.3, 0, 0.05, 0.3), _share),
    Judge("inflated similarity", SIMILARITY, _similarity(4, 0.6, 0.8), _mean_rating),
    Judge("compressed similarity", SIMILARITY, _similarity(4.4, 0.3, 0.5), _mean_rating),
    Judge("position bias, one order", PREFERENCE, _pairwise(["reference_first"]), _mean_preference),
    Judge(
        "position bias, both orders", PREFERENCE, _pairwise(["reference_first", "candidate_first"]), _mean_preference
    ),
)


# ── through verdicts and outcomes ───────────────────────────────────────────────────────────────────────────────────


def as_trial(world: World, metric: str, judge: str) -> Scored:
    """The repetition as a scored trial, with a verdict object for everything the judge said."""
    outcomes = []
    for i in range(world.label.size):
        chars = max(1, round(200 * float(np.exp(world.longer[i]))))
        said: list[tuple[Order | None, np.ndarray]] = [*world.orders.items()] or [(None, world.verdict)]
        verdicts = tuple(
            Verdict(
                metric=metric,
                value=None if np.isnan(v[i]) else float(v[i]),
                order=order,
                reference_chars=200,
                candidate_chars=chars,
            )
            for order, v in said
        )
        value = None if np.isnan(world.verdict[i]) else float(world.verdict[i])
        outcomes.append(
            Outcome(
                example_id=str(i),
                conversation=str(world.conversation[i]),
                completion=Completion(text="answer"),
                scores={metric: value},
                unscored={} if value is not None else {metric: "unreadable"},
                verdicts=verdicts,
            )
        )
    return Scored(
        key="synthetic",
        candidate=Candidate(model="synthetic", adaptation=ZeroShot()),
        fingerprint="synthetic",
        scorer_version="",
        judge=judge,
        outcomes=tuple(outcomes),
        evaluation_s=1.0,
    )


def show_faults(quality: float, seed: int) -> None:
    """One repetition of each judge through `calibrate`, every row labelled, and with 200 labels through `debiased`."""
    print("| judge | κ | bias | longer | first shown | unreadable: where wrong − where right |")
    print("| --- | --- | --- | --- | --- | --- |")
    for judge in JUDGES:
        rng = np.random.default_rng(seed)
        world = judge.draw(rng, quality, TURNS)
        trial = as_trial(world, judge.metric, judge.name)
        every = {("synthetic", str(i)): float(label) for i, label in enumerate(world.label)}
        found = calibrate([trial], judge.metric, every, "human")
        first = found.position.first_gain if found.position else None
        cells = [found.kappa, found.bias, found.length, first, found.unscored_gap]
        print(f"| {judge.name} | {' | '.join(_shown(cell) for cell in cells)} |")
        chosen = rng.permutation(ROWS)[:200]
        known = np.full(ROWS, np.nan)
        known[chosen] = world.label[chosen]
        labels = {str(i): float(world.label[i]) for i in chosen}
        if debiased(trial, judge.metric, labels) != prediction_powered_mean(
            world.verdict, known, world.conversation.tolist()
        ):
            sys.exit(f"{judge.name}: outcomes and arrays give different intervals")


def _shown(interval: Interval | None) -> str:
    return f"{interval.estimate:.2f} [{interval.low:.2f}, {interval.high:.2f}]" if interval else ""


# ── coverage ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Setting(NamedTuple):
    """Coverage and mean width of the intervals over all repetitions."""

    judge: str
    turns: int
    labels: int
    raw: tuple[float, float]
    calibrated: tuple[float, float]
    gold: tuple[float, float]
    published: tuple[float, float]

    @property
    def holds(self) -> bool:
        """What is asked for, where the raw interval fails."""
        covered, width = self.calibrated
        return self.raw[0] >= 0.75 or (0.93 <= covered <= 0.97 and width < self.gold[1])


def published(verdict: np.ndarray, label: np.ndarray) -> Interval:
    """PPI++ of a mean as published: rows independent, normal distribution, no correction for a small sample.

    Args:
        verdict: N values, NaN where unreadable, which is imputed by the mean.
        label: N values, NaN where unlabelled.

    Source: Angelopoulos, Duchi and Zrnic 2023, arXiv:2311.01453, as `ppi_mean_ci` of ppi-python 0.2.3 computes it.
    """
    f, known = np.where(np.isnan(verdict), np.nanmean(verdict), verdict), ~np.isnan(label)
    y, judged, other = label[known], f[known], f[~known]
    spread = float(f.var(ddof=1)) * (1 + y.size / other.size)
    weight = min(max(float(np.cov(y, judged)[0, 1]) / spread, 0.0), 1.0) if spread > 0 else 0.0
    mean = float(np.mean(y - weight * judged) + weight * other.mean())
    half = 1.959964 * float(np.sqrt(np.var(y - weight * judged) / y.size + weight**2 * other.var() / other.size))
    return Interval(estimate=mean, low=mean - half, high=mean + half, n=y.size)


def simulate(
    judge: Judge,
    turns: int,
    labels: Sequence[int],
    quality: float,
    repetitions: int,
    seed: int = 0,
    rest: int | None = None,
) -> list[Setting]:
    """Count how often each interval has the truth, for each number of labels on the same repetitions.

    Args:
        rest: rows without a label, of as many rows as that takes; None labels some of 1,000 rows.
    """
    rng = np.random.default_rng([seed, turns, *judge.name.encode()])
    truth = judge.truth(quality)
    tally = {n: np.zeros((4, 2)) for n in labels}
    for _ in range(repetitions):
        world = judge.draw(rng, quality, turns)
        order = rng.permutation(ROWS)
        for n in labels:
            rows = ROWS if rest is None else n + rest
            names = world.conversation[:rows].tolist() if turns > 1 else None
            verdict, known = world.verdict[:rows], np.full(rows, np.nan)
            chosen = order[order < rows][:n]
            known[chosen] = world.label[chosen]
            readable = np.flatnonzero(~np.isnan(verdict))
            intervals = (
                mean_interval(verdict[readable].tolist(), [names[i] for i in readable] if names else None),
                prediction_powered_mean(verdict, known, names).interval(),
                mean_interval(world.label[chosen].tolist(), [names[i] for i in chosen] if names else None),
                published(verdict, known),
            )
            for row, found in enumerate(intervals):
                tally[n][row] += found.low <= truth <= found.high, found.high - found.low
    return [Setting(judge.name, turns, n, *((float(c), float(w)) for c, w in tally[n] / repetitions)) for n in labels]


def show_few_unlabelled(
    rest: int, labels: Sequence[int], quality: float, repetitions: int, seed: int, floor: float = 0.93
) -> int:
    """A line for each number of turns and labels, over all judges; returns how many settings cover less than asked."""
    failed = 0
    for turns in (1, TURNS):
        found = [simulate(judge, turns, labels, quality, repetitions, seed, rest) for judge in JUDGES]
        for of_judges in zip(*found, strict=True):
            least, most = (end(of_judges, key=lambda s: s.calibrated[0]) for end in (min, max))
            alone = min(s.gold[0] for s in of_judges)
            ratios = [s.calibrated[1] / s.gold[1] for s in of_judges]
            name = least.judge.split(":")[0].split(" (")[0]
            failed += sum(s.calibrated[0] < floor for s in of_judges)
            print(
                f"| {rest} | {turns} | {least.labels} | {least.calibrated[0]:.1%} ({name}) "
                f"| {most.calibrated[0]:.1%} | {alone:.1%} | {min(ratios):.2f} to {max(ratios):.2f} |",
                flush=True,
            )
    return failed


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=2000, help="default: %(default)s")
    parser.add_argument("--labels", type=int, nargs="+", default=[50, 100, 200], help="default: 50 100 200")
    parser.add_argument("--rest", type=int, nargs="*", default=[1, 3, 10, 50], help="default: 1 3 10 50")
    parser.add_argument("--quality", type=float, default=0.8, help="share of good answers (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    options = parser.parse_args()
    if min(options.labels) < 2 or max(options.labels) + max([1, *options.rest]) > ROWS:
        parser.error(f"labels and rows without one are {ROWS} at most; there are 2 labels at least")
    show_faults(options.quality, options.seed)
    print(
        f"\n{options.repetitions:,} repetitions of {ROWS:,} rows, quality {options.quality}; coverage and mean width\n"
    )
    print(
        "| judge | turns | labels | raw | width | calibrated | width | labels alone | width | calibrated / labels "
        "| PPI++ as published |  |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    failed = 0
    for judge in JUDGES:
        for turns in (1, TURNS):
            for s in simulate(judge, turns, options.labels, options.quality, options.repetitions, options.seed):
                failed += not s.holds
                cells = " | ".join(f"{covered:.1%} | {width:.3f}" for covered, width in (s.raw, s.calibrated, s.gold))
                ratio = s.calibrated[1] / s.gold[1]
                mark = "" if s.raw[0] >= 0.75 else "holds" if s.holds else "FAILS"
                plain = f"{s.published[0]:.1%}" if turns == 1 else ""
                print(f"| {judge.name} | {turns} | {s.labels} | {cells} | {ratio:.2f} | {plain} | {mark} |", flush=True)
    print("\nfew rows without a label; coverage of the calibrated interval over all judges\n")
    print("| unlabelled | turns | labels | least (judge) | most | labels alone, least | calibrated / labels |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for rest in options.rest:
        failed += show_few_unlabelled(rest, options.labels, options.quality, options.repetitions, options.seed)
    if failed:
        sys.exit(f"{failed} settings are outside what is asked for")


if __name__ == "__main__":
    main()
