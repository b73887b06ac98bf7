"""What the statistics promise, simulated: coverage of the intervals, errors under constant peeking, and speed.

    python -m experiments.benchmarks.evidence coverage     # intervals that are read once: 93 to 97% of 95
    python -m experiments.benchmarks.evidence errors       # false promotions and rollbacks, looking at every request
    python -m experiments.benchmarks.evidence speed        # pairs to a decision, beside McNemar and an unpaired A/B
    python -m experiments.benchmarks.evidence candidates   # false winners among many candidates on the same examples
    python -m experiments.benchmarks.evidence sample-ratio # false alarms and delay of the sequential check

Every figure comes from the functions that the leaderboard and the rollout call. Each command prints one table and exits
with 1 where a promise does not hold. The results are in README.md beside this file.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from scipy import special

from flywheel_ray.sequences import Decided, Paired, close, decide, sample_ratio_e_value
from flywheel_ray.stats import Interval, holm, mean_interval, non_inferiority, paired_difference, pairs_needed, wilson

Draw = Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray | None]]
"""Differences (n,) and their conversations (n,), None where each pair is its own."""


# ── traffic with a known truth ────────────────────────────────────────────────────────────────────────────────────────


HEAVY = 0
"""In place of a number of turns: Pareto(1.2), from 1 to 300, a mean of about 5."""


def conversations(rng: np.random.Generator, count: int, turns: float) -> np.ndarray:
    """Labels of `count` conversations of 1 + Poisson(turns − 1) turns each, or of heavy-tailed lengths."""
    sizes = (
        np.minimum(300, 1 + rng.pareto(1.2, count)).astype(int) if turns == HEAVY else 1 + rng.poisson(turns - 1, count)
    )
    return np.repeat(np.arange(count), sizes)


def scores(rng: np.random.Generator, rate: float, labels: np.ndarray, correlation: float) -> np.ndarray:
    """0/1 scores of mean `rate`; turns of a conversation share a rate drawn from a beta distribution."""
    count = int(labels.max()) + 1
    if correlation == 0:
        return (rng.random(labels.size) < rate).astype(float)
    weight = (1 - correlation) / correlation
    return (rng.random(labels.size) < rng.beta(rate * weight, (1 - rate) * weight, count)[labels]).astype(float)


def outcomes(
    rng: np.random.Generator, difference: float, discordance: float, labels: np.ndarray, correlation: float
) -> tuple[np.ndarray, np.ndarray]:
    """Paired 0/1 scores of arm and teacher: mean difference and share of discordant pairs as said."""
    shares = np.array([(discordance + difference) / 2, (discordance - difference) / 2, 1 - discordance])
    if correlation > 0:
        drawn = rng.gamma(np.maximum(shares, 1e-12) * (1 - correlation) / correlation, size=(int(labels.max()) + 1, 3))
        table = (drawn / drawn.sum(axis=1, keepdims=True))[labels]
    else:
        table = np.broadcast_to(shares, (labels.size, 3))
    u = rng.random(labels.size)
    better = u < table[:, 0]
    worse = ~better & (u < table[:, 0] + table[:, 1])
    return 1.0 - worse, 1.0 - better


def traffic(difference: float, discordance: float, pairs: int, turns: float = 1, correlation: float = 0.0) -> Draw:
    """Differences arm − teacher of a stream of pairs."""

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
        labels = np.arange(pairs) if turns == 1 else conversations(rng, round(pairs / (turns or 5)), turns)
        arm, teacher = outcomes(rng, difference, discordance, labels, correlation)
        return arm - teacher, None if turns == 1 else labels

    return draw


def harder_with_length(difference: float, pairs: int) -> Draw:
    """Agreement with the teacher of an arm that errs twice as often in the second turn and three times in the third.

    The mean over conversations is as said, so the mean over requests is worse.
    """

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
        sizes = rng.integers(1, 4, pairs // 2)
        labels = np.repeat(np.arange(sizes.size), sizes)
        turn = np.arange(labels.size) - np.repeat(np.cumsum(sizes) - sizes, sizes) + 1
        # Over conversations of one, two and three turns the mean turn is 1, 1.5 and 2: 1.5 in all.
        return -(rng.random(labels.size) < -difference / 1.5 * turn).astype(float), labels

    return draw


def streams(draw: Draw, runs: int, seed: int) -> Iterator[Paired]:
    """As many independent streams, each as the rollout would see it."""
    for i in range(runs):
        values, labels = draw(np.random.default_rng([seed, i]))
        if labels is None:
            yield Paired(values, np.ones(values.size))  # what `close` makes of pairs without a conversation
        else:
            yield close(values.tolist(), labels.tolist())


# ── coverage ──────────────────────────────────────────────────────────────────────────────────────────────────────────

Measure = Callable[[np.random.Generator, np.ndarray], tuple[Interval, Interval]]
"""From labels of conversations (n,): our interval of a fresh sample, and the one that ignores the conversations."""


def agreement(rate: float, correlation: float) -> Measure:
    """0/1 scores of one candidate."""

    def measure(rng: np.random.Generator, labels: np.ndarray) -> tuple[Interval, Interval]:
        x = scores(rng, rate, labels, correlation)
        return mean_interval(x.tolist(), labels.tolist()), wilson(float(x.sum()), x.size)

    return measure


def pairs(difference: float, discordance: float, correlation: float) -> Measure:
    """0/1 scores of a candidate and the teacher on the same examples."""

    def measure(rng: np.random.Generator, labels: np.ndarray) -> tuple[Interval, Interval]:
        arm, teacher = outcomes(rng, difference, discordance, labels, correlation)
        a, b = arm.tolist(), teacher.tolist()
        return paired_difference(a, b, labels.tolist()), paired_difference(a, b)

    return measure


def graded(values: tuple[float, ...], shares: tuple[float, ...]) -> Measure:
    """Independent scores that take these values in these shares."""

    def measure(rng: np.random.Generator, labels: np.ndarray) -> tuple[Interval, Interval]:
        x = rng.choice(values, p=shares, size=labels.size)
        return mean_interval(x.tolist(), labels.tolist()), mean_interval(x.tolist())

    return measure


def ratings(correlation: float) -> Measure:
    """Ratings from 1 to 10, as tenths: a normal distribution function, rounded up, so each is as likely."""

    def measure(rng: np.random.Generator, labels: np.ndarray) -> tuple[Interval, Interval]:
        shared = rng.normal(0, correlation**0.5, int(labels.max()) + 1)[labels]
        own = rng.normal(0, (1 - correlation) ** 0.5, labels.size)
        x = np.ceil(10 * special.ndtr(shared + own)) / 10
        return mean_interval(x.tolist(), labels.tolist()), mean_interval(x.tolist())

    return measure


def coverage(runs: int, seed: int) -> bool:
    """Intervals that are read once."""
    print(
        f"Coverage of 95% intervals, {runs:,} runs a row. Naive: the interval that takes every value as independent.\n"
    )
    print("| what | conversations | turns | correlation | truth | coverage | width | naive |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    settings = [(200, 1, 0.0), (100, 3, 0.0), (100, 3, 0.2), (100, 3, 0.5), (300, 3, 0.2), (300, 3, 0.5)]
    good = True
    for setting in settings:
        for rate in (0.5, 0.8, 0.9, 0.95):
            good &= _covered("agreement", agreement(rate, setting[2]), rate, setting, runs, seed)
        for difference, discordance in ((0.0, 0.09), (-0.03, 0.09), (0.0, 0.3)):
            what = f"paired, {discordance:.0%} discordant"
            good &= _covered(what, pairs(difference, discordance, setting[2]), difference, setting, runs, seed)
        good &= _covered("ratings 1 to 10", ratings(setting[2]), 0.55, setting, runs, seed)
    # A prompt that is answered four times is a conversation of four.
    good &= _covered("prompt, 4 answers", agreement(0.9, 0.6), 0.9, (150, 4, 0.6), runs, seed, repeats=True)
    top = graded((0.0, 0.9, 1.0), (0.015, 0.05, 0.935))
    good &= _covered("graded, near 1", top, 0.98, (500, 1, 0.0), runs, seed)
    good &= _covered("graded", graded((0.0, 0.4, 0.8, 1.0), (0.1, 0.2, 0.4, 0.3)), 0.7, (100, 1, 0.0), runs, seed)
    print("\nWhere little is seen of what is rare; shown, and promised by nobody:\n")
    print("| what | conversations | turns | correlation | truth | coverage | width | naive |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    hard = [(50, 3, 0.0), (50, 3, 0.5), (100, 3, 0.5), (300, 3, 0.5), (300, 8, 0.5)]
    for setting in hard:
        _covered("agreement", agreement(0.98, setting[2]), 0.98, setting, runs, seed)
    for setting in ((100, HEAVY, 0.2), (300, HEAVY, 0.2), (300, HEAVY, 0.5)):
        _covered("agreement, heavy-tailed", agreement(0.9, setting[2]), 0.9, setting, runs, seed)
    for count in (60, 200):
        _covered("graded, near 1", top, 0.98, (count, 1, 0.0), runs, seed)
    return good


def _covered(
    what: str,
    measure: Measure,
    truth: float,
    setting: tuple[int, int, float],
    runs: int,
    seed: int,
    repeats: bool = False,
) -> bool:
    count, turns, correlation = setting
    hits, width, naive = 0, 0.0, 0
    for i in range(runs):
        rng = np.random.default_rng([seed, i])
        labels = np.repeat(np.arange(count), turns) if repeats or turns == 1 else conversations(rng, count, turns)
        found, flat = measure(rng, labels)
        hits += found.low <= truth <= found.high
        naive += flat.low <= truth <= flat.high
        width += found.high - found.low
    share = hits / runs
    good = 0.93 <= share <= 0.97
    shown = f"{share:.1%}{'' if good else ' !'} | {width / runs:.3f} | {naive / runs:.1%}"
    print(f"| {what} | {count} | {turns or 'heavy'} | {correlation} | {truth:g} | {shown} |", flush=True)
    return good


def _noise(share: float, runs: int) -> float:
    return 3 * float(np.sqrt(share * (1 - share) / runs))


# ── errors ────────────────────────────────────────────────────────────────────────────────────────────────────────────

MARGIN = 0.02


def errors(runs: int, seed: int) -> bool:
    """False decisions when every request is looked at."""
    print(f"Wrong decisions at 95%, margin {MARGIN:.0%}, a look at every request, {runs:,} runs a row.")
    print("At the margin itself either decision is wrong. Peeking: a one-sided 5% z test, read as often.\n")
    print(
        "| scored | truth | differ | pairs | turns | correlation | rollback margin | promoted | rolled back | peeking |"
    )
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    good = True
    rows: list[tuple[float, float, int, float, float, float | None]] = [
        (-0.02, 0.02, 5000, 1, 0.0, None),
        (-0.02, 0.02, 20000, 1, 0.0, None),
        (-0.02, 0.02, 5000, 3, 0.5, None),
        (-0.02, 0.02, 5000, HEAVY, 0.5, None),
        (-0.03, 0.03, 5000, 1, 0.0, None),
        (-0.02, 0.09, 5000, 1, 0.0, None),
        (-0.02, 0.3, 5000, 1, 0.0, None),
        (-0.02, 0.09, 20000, 1, 0.0, None),
        (-0.03, 0.09, 5000, 1, 0.0, None),
        (-0.02, 0.09, 5000, 3, 0.5, None),
        (-0.02, 0.3, 5000, 8, 0.5, None),
        (0.0, 0.09, 5000, 1, 0.0, 0.0),
        (0.0, 0.3, 5000, 1, 0.0, 0.0),
        (0.0, 0.09, 5000, 3, 0.5, 0.0),
    ]
    for difference, discordance, size, turns, correlation, rollback in rows:
        draw = traffic(difference, discordance, size, turns, correlation)
        # Where the teacher is the reference an arm can only lose: what differs is what is lost.
        agreeing = discordance == -difference
        shown = (f"{discordance:.0%}", f"{size:,}", str(turns or "heavy"), str(correlation))
        good &= _errors(draw, difference, rollback, agreeing, shown, runs, seed)
    harder = harder_with_length(-0.02, 5000)
    good &= _errors(harder, -0.02, None, True, ("2%", "5,000", "1 to 3, later ones harder", ""), runs, seed)
    return good


def _errors(
    draw: Draw,
    difference: float,
    rollback: float | None,
    agreeing: bool,
    shown: tuple[str, ...],
    runs: int,
    seed: int,
) -> bool:
    promoted = rolled_back = peeked = 0
    floor = -MARGIN if rollback is None else -rollback
    for paired in streams(draw, runs, seed):
        found = decide(paired, MARGIN, rollback, high=0.0 if agreeing else 1.0)
        promoted += found.decision == "promote"
        rolled_back += found.decision == "roll_back"
        peeked += _peeking(paired, floor)
    wrong = max(promoted if difference <= -MARGIN else 0, rolled_back if difference >= floor else 0)
    fine = wrong / runs <= 0.05
    scored = "agreement with the teacher" if agreeing else "both, by a third"
    truth = f"{100 * difference:+.0f} points" if difference else "equal"
    against = "margin" if rollback is None else f"{rollback:g}"
    figures = f"{promoted / runs:.1%} | {rolled_back / runs:.1%}{'' if fine else ' !'} | {peeked / runs:.1%}"
    print(f"| {scored} | {truth} | {' | '.join(shown)} | {against} | {figures} |", flush=True)
    return fine


def _peeking(paired: Paired, mean: float) -> bool:
    """Whether a one-sided 5% z test on either side of `mean` would have said something at any look from pair 50 on."""
    x = paired.means - mean
    t = np.arange(1, x.size + 1)
    spread = np.sqrt(np.maximum(np.cumsum(x**2) - np.cumsum(x) ** 2 / t, 1e-9))
    return bool((np.abs(np.cumsum(x) / spread)[50:] > special.ndtri(0.95)).any())


# ── speed ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


HORIZON = 20_000


def speed(runs: int, seed: int) -> bool:
    """Pairs to a decision."""
    print(
        f"Requests to a decision at 95%, {runs:,} runs a row, at most {HORIZON:,} pairs; without one it counts as that."
    )
    print(
        "Fixed: the size at which a test of the same hypothesis, one-sided 5%, read once, has the power said: McNemar's"
    )
    print("for margin 0, Tango's for 2 points, of proportions for unpaired arms; chosen before the truth is known.\n")
    print("| question | truth | design | decided | wrong | mean | median | 95th | fixed 80% | fixed 95% |")
    print("|---|---|---|---:|---:|---:|---:|---:|---:|---:|")
    teacher, arm = 0.95, 0.92
    apart = teacher * (1 - arm) + arm * (1 - teacher)

    def unpaired(rng: np.random.Generator) -> tuple[np.ndarray, None]:
        # Of every two requests one goes to each arm: the k-th outcome of one arm beside the k-th of the other.
        return (rng.random(HORIZON) < arm).astype(float) - (rng.random(HORIZON) < teacher), None

    def worse(margin: float) -> Callable[[Paired], Decided]:
        return lambda paired: decide(paired, MARGIN, margin)

    minus_3, minus_10 = traffic(-0.03, 0.09, HORIZON), traffic(-0.1, 0.14, HORIZON)
    row = partial(_speed, runs=runs, seed=seed)
    shadow = row("worse?", "−3 points, 9% discordant", minus_3, worse(0.0), (-0.03, 0.09, 0.0))
    split = row("worse?", "95% against 92%", unpaired, worse(0.0), (-0.03, apart, 0.0), requests=2)
    row("worse by 2 points?", "−3 points, 9% discordant", minus_3, worse(MARGIN), (-0.03, 0.09, MARGIN))
    row("worse by 2 points?", "95% against 92%", unpaired, worse(MARGIN), (-0.03, apart, MARGIN), requests=2)
    row("worse by 2 points?", "−10 points, 14% discordant", minus_10, worse(MARGIN), (-0.1, 0.14, MARGIN))
    promoted = {}
    for share in (0.05, 0.09, 0.12, 0.15):
        equal = traffic(0.0, share, HORIZON)
        within = partial(decide, margin=MARGIN)
        row("within 2 points?", f"equal, {share:.0%} discordant", equal, within, (0.0, share, MARGIN), right="promote")
        first = (decide(p.first(5000), MARGIN).decision for p in streams(equal, runs, seed))
        promoted[share] = sum(decision == "promote" for decision in first) / runs
    turns = traffic(0.0, 0.09, HORIZON, 3, 0.2)
    row("within 2 points?", "equal, 9%, 3 turns, correlation 0.2", turns, within, None, right="promote")
    for rate in (1.0, 0.995, 0.99, 0.97, 0.95, 0.8):
        agreeing = traffic(rate - 1, 1 - rate, HORIZON)
        rule = partial(decide, margin=MARGIN, high=0.0)
        right = "promote" if rate > 1 - MARGIN else "roll_back"
        fixed = (rate - 1, max(1 - rate, 1e-9), MARGIN)
        row("agrees in 98%?", f"agrees in {rate:.1%}", agreeing, rule, fixed, right=right)
    print("\nEqual models promoted at a margin of 2 points within 5,000 pairs: ", end="")
    print(", ".join(f"{value:.1%} at {share:.0%} discordant" for share, value in promoted.items()) + ".")
    print(f"To see −3 points an unpaired A/B needs {split / shadow:.1f} times the requests of shadow pairs.")
    return promoted[0.09] >= 0.95 and split > shadow


def _speed(
    question: str,
    truth: str,
    draw: Draw,
    rule: Callable[[Paired], Decided],
    fixed: tuple[float, float, float] | None,
    runs: int,
    seed: int,
    right: str = "roll_back",
    requests: int = 1,
) -> float:
    """One row: `requests` a pair; `fixed` is difference, discordance and margin of the test read once."""
    found = [rule(paired) for paired in streams(draw, runs, seed)]
    taken = [requests * ((d.at or 0) if d.decision == right else HORIZON) for d in found]
    decided = sum(d.decision == right for d in found) / runs
    wrong = sum(d.decision not in (None, right) for d in found) / runs
    sizes = ["", ""]
    if fixed is not None:
        difference, discordance, margin = fixed
        needed = [pairs_needed(difference, discordance, margin, alpha=0.05, power=power) for power in (0.8, 0.95)]
        sizes = [f"{requests * n:,}" for n in needed if n]
    times = f"{np.mean(taken):,.0f} | {np.median(taken):,.0f} | {np.percentile(taken, 95):,.0f}"
    design = "paired shadow" if requests == 1 else "unpaired A/B"
    print(
        f"| {question} | {truth} | {design} | {decided:.1%} | {wrong:.1%} | {times} | {sizes[0]} | {sizes[1]} |",
        flush=True,
    )
    return float(np.mean(taken))


# ── many candidates ───────────────────────────────────────────────────────────────────────────────────────────────────


def candidates(runs: int, seed: int) -> bool:
    """A winner where there is none: every candidate is worse than the teacher by the margin exactly."""
    examples = 1000
    print(f"A candidate shown within {MARGIN:.0%} where none is, at 95%, {examples:,} examples, {runs:,} runs a row;")
    print("2.5% is promised. Shared: the part of its misses that a candidate has from its base model.\n")
    print("| candidates | shared | any by its own p-value | any by Holm's | power of Holm's, one candidate at 99.5% |")
    print("|---:|---:|---:|---:|---:|")
    good = True
    for count, shared in ((1, 0.0), (5, 0.0), (5, 0.8), (20, 0.0), (20, 0.8)):
        alone = adjusted = shown = 0
        for i in range(runs):
            rng = np.random.default_rng([seed, i])
            common = rng.random(examples) < MARGIN * shared
            own = rng.random((count, examples)) < (MARGIN - MARGIN * shared) / (1 - MARGIN * shared)
            right = 1.0 - (common | own)
            p_values = [_p_value(row) for row in right]
            alone += min(p_values) <= 0.025
            adjusted += min(holm(p_values)) <= 0.025
            p_values[0] = _p_value((rng.random(examples) < 0.995).astype(float))
            shown += holm(p_values)[0] <= 0.025
        fine = adjusted / runs <= 0.025 + _noise(0.025, runs)
        good &= fine
        figures = f"{alone / runs:.1%} | {adjusted / runs:.1%}{'' if fine else ' !'} | {shown / runs:.1%}"
        print(f"| {count} | {shared:.0%} | {figures} |", flush=True)
    return good


def _p_value(right: np.ndarray) -> float:
    return non_inferiority(right.tolist(), [1.0] * right.size, MARGIN).p_value


# ── the split of traffic ──────────────────────────────────────────────────────────────────────────────────────────────


def sample_ratio(runs: int, seed: int) -> bool:
    """The sequential check of the split."""
    units = 20_000
    print(f"Sample-ratio alarms at 99.9% (e ≥ 1,000), looked at every 10 of {units:,} units, {runs:,} runs a row.\n")
    print("| intended | true | alarms | median units to the alarm |")
    print("|---|---|---:|---:|")
    good = True
    for intended, true in ((0.5, 0.5), (0.1, 0.1), (0.5, 0.52), (0.5, 0.55), (0.1, 0.12)):
        alarms = []
        for i in range(runs):
            seen = np.cumsum(np.random.default_rng([seed, i]).random(units) < true)
            found = _first_alarm(seen, intended)
            if found is not None:
                alarms.append(found)
        median = f"{np.median(alarms):,.0f}" if len(alarms) > runs / 2 else ""
        print(f"| {intended:.0%} | {true:.0%} | {len(alarms) / runs:.2%} | {median} |", flush=True)
        good &= intended != true or len(alarms) / runs <= 0.001 + _noise(0.001, runs)
    return good


def _first_alarm(seen: np.ndarray, intended: float) -> int | None:
    for n in range(10, seen.size + 1, 10):
        k = int(seen[n - 1])
        # A shift this small cannot be an alarm, and the exact value costs forty times as much as this line.
        unlikely = abs(k - intended * n) > 2.5 * (n * intended * (1 - intended)) ** 0.5
        if unlikely and sample_ratio_e_value([k, n - k], [intended, 1 - intended]) >= 1000:
            return n
    return None


def main() -> None:
    """Run one of the simulations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = {
        "coverage": coverage,
        "errors": errors,
        "speed": speed,
        "candidates": candidates,
        "sample-ratio": sample_ratio,
    }
    parser.add_argument("what", choices=known, help="which promise to simulate")
    parser.add_argument("--runs", type=int, default=2000, help="runs a row (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    options = parser.parse_args()
    started = time.monotonic()
    good = known[options.what](options.runs, options.seed)
    print(f"\n{time.monotonic() - started:.0f} s")
    if not good:
        sys.exit("a promise does not hold: see the rows marked with !")


if __name__ == "__main__":
    main()
