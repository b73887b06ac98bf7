"""How far a judge can be trusted: its verdicts beside labels, and what its scores are worth once that is known.

    found = calibrate(results, "similarity", labels, source="human")
    found.kappa, found.position, found.length      # Cohen's κ [0.41, 0.68], preference for the first shown, for length
    debiased(scored, "similarity", labels_of_its_rows)    # ScoreMean: all verdicts and a few labels, for any judge

A judge's mean has an interval that shrinks around the wrong number. Prediction-powered inference keeps what verdicts
on all rows tell and takes out their bias by the rows that have a label, whatever the bias is. It needs one thing: the
labelled rows are a simple random sample of the rows (`labels.sample_order` draws one).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
from scipy import special

from flywheel_ray.errors import LedgerError
from flywheel_ray.judge import JUDGED, Verdict
from flywheel_ray.results import Outcome, Scored
from flywheel_ray.scoring import FUNCTION_NAME_AND_ARGS, TOOL_CALLING_CORRECTNESS
from flywheel_ray.stats import (
    Interval,
    ScoreMean,
    cluster_codes,
    mcnemar_exact,
    mean_interval,
    paired_difference,
    score_mean,
    wilson,
)
from flywheel_ray.values import Value

ACCEPT_AT = 0.7
"""A verdict or label accepts from this value on: 7 of 10 for similarity, 1 of 0/1, and "better" in a pairwise one."""

MIN_LABELS = 10
"""With fewer labels nothing is debiased."""

ENOUGH_LABELS = 50
"""From this many labels on it is said whether a judge may rank."""

KAPPA_TO_RANK = 0.6
"""What the interval of κ must lie above before raw scores may rank: "substantial" (Landis and Koch 1977, Biometrics
33:159)."""

BIAS_TO_RANK = 0.02
"""A bias that is surely larger, in points / 100, forbids ranking by raw scores; the leaderboard's usual margin."""

Source = Literal["program", "human"]
RowId = tuple[str, str]
"""A trial's key and an example's id."""

_FLAT = 1e-9


class PositionBias(Value):
    """What changing the order of the two answers does to a pairwise judge. Unbiased: `first_gain` is 0."""

    rows: int
    """Rows with a readable verdict in both orders."""
    flips: Interval
    """Share of rows whose verdict depends on the order."""
    first_gain: Interval
    """Mean verdict on the candidate when shown first, minus when shown second; in [-1, 1]."""
    p_value: float
    """Exact sign test that an order-dependent verdict favours either place equally often."""


class Calibration(Value):
    """One judge and metric beside labels of one source. An interval is None where there is nothing to estimate it by.

    Intervals are clustered by conversation. Values count as accepted from `ACCEPT_AT` on.
    """

    judge: str
    metric: str
    fingerprint: str
    source: Source
    """"program" labels are `function_name_and_args_accuracy` of the same rows, which is stricter than meaning."""
    rows: int
    """Rows the judge was asked about, over all candidates."""
    unscored: int
    """Of these, without a readable verdict."""
    labelled: int
    n: int
    """Rows with both a label and a readable verdict."""
    agreement: Interval | None = None
    """Share of n where verdict and label both accept or both reject."""
    kappa: Interval | None = None
    """Cohen's κ of accepting."""
    weighted_kappa: Interval | None = None
    """κ with quadratic weights over tenths; None where values are only 0 and 1."""
    false_accept: Interval | None = None
    """Share accepted among those whose label rejects."""
    false_reject: Interval | None = None
    """Share rejected among those whose label accepts."""
    bias: Interval | None = None
    """Mean of verdict − label."""
    position: PositionBias | None = None
    """None for a judge that is not asked in both orders."""
    length: Interval | None = None
    """Mean verdict on candidates longer than the reference minus that on shorter ones, at equal label."""
    unscored_rate: Interval | None = None
    unscored_gap: Interval | None = None
    """Rate of unscored rows where the label rejects minus where it accepts: 0 where verdicts go missing at random."""


class Estimate(Value):
    """A candidate's mean three ways: by the judge alone, by labels alone, and by both.

    `raw` and `gold` are of the rows that the candidate answered. `calibrated` is of all rows that it was asked: one
    without an answer counts as 0, as in every claim of the leaderboard.
    """

    key: str
    candidate: str
    judge: str
    metric: str
    source: Source
    labels: int
    answered: float
    """Share of the rows that have an answer."""
    raw: Interval | None
    calibrated: ScoreMean | None
    """Of any bar and at any confidence; None with fewer than `MIN_LABELS` labels."""
    gold: Interval | None


class Advice(Value):
    """Whether raw scores of this judge may rank candidates, in plain sentences, and how many labels are missing.

    The first words say whose labels these are.
    """

    judge: str
    metric: str
    source: Source
    may_rank: bool
    sentence: str
    more_labels: int = 0
    """Rows that people have to label before it can be said; 0 where more labels would not change the answer, where no
    row is left, and where the labels are a program's."""


class CalibrationReport(Value):
    """All that is known of the judges on one dataset; kept beside its results."""

    fingerprint: str
    calibrations: tuple[Calibration, ...]
    estimates: tuple[Estimate, ...]
    advice: tuple[Advice, ...]


# ── estimates ───────────────────────────────────────────────────────────────────────────────────────────────────────


def prediction_powered_mean(
    verdicts: Sequence[float | None] | np.ndarray,
    labels: Sequence[float | None] | np.ndarray,
    clusters: Sequence[Hashable] | None = None,
) -> ScoreMean:
    """The mean label over all rows, from verdicts on all and labels on a random few.

    PPI++ (Angelopoulos, Duchi and Zrnic 2023, arXiv:2311.01453; Angelopoulos et al. 2023, Science 382:669): the mean
    label, plus λ times how far the verdicts on unlabelled rows lie from those on labelled ones, with λ in [0, 1] chosen
    for the least variance (least squares, as for the regression estimator of Cochran 1977, ch. 12). It is valid for any
    judge; a better one makes it narrower. Unreadable verdicts are imputed by the mean of the readable ones, which is
    just another judge. How far verdicts are spread is taken from all rows, since a few unlabelled ones do not show it.

    The published normal interval covers too little with 50 labels, most of all near 1 and where the judge seldom errs,
    so three things differ. Each conversation's residuals are summed and corrected for leverage (HC2; Bell and McCaffrey
    2002, Survey Methodology 28:169), with Student's t for the conversations that have a label. For the variance half a
    row is added in each of the four cells of label × verdict (Agresti and Min 2005, Statistics in Medicine 24:729), in
    clusters the labels of half a conversation, and less of it where labels are spread less than 0/1 ones; how much less
    was chosen by simulation. And the interval has Wilson's shape at the effective sample size (Korn and Graubard 1998,
    Survey Methodology 24:193), so it stays in [0, 1] and never has zero width. With a useless judge it is the labels'
    own interval.

    Args:
        verdicts: N values in [0, 1], None (or NaN) where unreadable.
        labels: N values in [0, 1], None (or NaN) where unlabelled; the labelled are a simple random sample of the rows.
        clusters: N names; rows of one conversation are not independent. None: all independent.

    Returns:
        The mean; its `n` counts labels. That of the labels alone (`score_mean`) where there are fewer than
        `MIN_LABELS`, where all rows are labelled, and where labels or verdicts do not vary.

    Raises:
        ValueError: the lengths differ, or there is no label.
    """
    f, y = _numbers(verdicts), _numbers(labels)
    if f.size != y.size:
        raise ValueError(f"{f.size} verdicts and {y.size} labels are not of the same rows")
    known, readable = ~np.isnan(y), ~np.isnan(f)
    n, rest = int(known.sum()), int((~known).sum())
    if n == 0:
        raise ValueError("without a label nothing can be debiased")
    groups = cluster_codes(clusters, y.size)
    gold = score_mean(y[known].tolist(), None if clusters is None else groups[known].tolist())
    with_label = np.unique(groups[known]).size
    if n < MIN_LABELS or not rest or with_label < 2 or not readable.any():
        return gold
    f = np.where(readable, f, f[readable].mean())
    label, verdict, other = y[known], f[known], f[~known]
    a, b = np.zeros(y.size), np.zeros(y.size)  # what each row adds to the mean label, and to the gap between verdicts
    a[known] = (label - label.mean()) / n
    b[known] = (verdict - verdict.mean()) / n
    b[~known] = -(other - f.mean()) / rest  # not from their own mean, around which one or two rows do not vary
    spread = float(f.var()) * (1 / n + 1 / rest)
    weight = min(max(float(a @ b) / spread, 0.0), 1.0) if spread > _FLAT**2 else 0.0
    if weight == 0.0:
        return gold
    estimate = float(label.mean() + weight * (other.mean() - verdict.mean()))
    estimate = min(max(estimate, 0.0), 1.0)

    residuals = np.bincount(groups, weights=a - weight * b)
    gaps = np.bincount(groups, weights=b)
    leverage = gaps**2 / max(float(gaps @ gaps), _FLAT**2) + np.bincount(groups, weights=known) / n
    variance = float(np.sum(residuals**2 / (1 - np.minimum(leverage, 0.9))))
    # Half a conversation in each cell of label × verdict; fewer rows and nearer ones where labels are spread less.
    mean = float(label.mean())
    likeness = min(1.0, float(label.var()) / max(mean * (1 - mean), _FLAT))
    turns = n / with_label
    added = 2 * likeness * turns
    rectifier = mean - weight * float(verdict.mean())
    cells = likeness * sum((one - weight * two - rectifier) ** 2 for one in (0, 1) for two in (0, 1)) / 4
    variance = (variance * n**2 + added * turns * cells) / (n + added) ** 2
    shrunk = (n * estimate + added / 2) / (n + added)
    return ScoreMean(estimate=estimate, n=n, effective=shrunk * (1 - shrunk) / variance, df=with_label - 1)


def debiased(scored: Scored, metric: str, labels: Mapping[str, float]) -> ScoreMean | None:
    """A candidate's mean label: verdicts on all its answers, corrected by the labelled ones, and 0 for no answer.

    The mean over all rows is the share answered, a, times the mean of the answered, q (`prediction_powered_mean`), with
    the variance a²·Var(q) + q²·a(1 − a)/N (the product's, to first order). The effective size is that of this variance
    at the lower 95% limit of q: at q = 1 nothing would be left of what the labels do not know.

    Args:
        scored: the trial.
        metric: a judged metric.
        labels: example id → label in [0, 1], a simple random sample of the trial's answered rows.

    Returns:
        None with fewer than `MIN_LABELS` labels of rows that the candidate answered; its `n` counts labels.
    """
    rows = _rows(scored, metric)
    given = [labels.get(o.example_id) for o in rows]
    if sum(label is not None for label in given) < MIN_LABELS:
        return None
    mean = prediction_powered_mean([o.scores[metric] for o in rows], given, [o.conversation for o in rows])
    asked = _asked(scored, metric)
    if len(rows) == len(asked):
        return mean
    answered = score_mean([float(o.completion is not None) for o in asked], [o.conversation for o in asked])
    return _of_all(mean, answered)


def gold_only(scored: Scored, metric: str, labels: Mapping[str, float], confidence: float = 0.95) -> Interval | None:
    """The mean of the labels alone, over answered rows, clustered by conversation; None without one."""
    rows = [o for o in _rows(scored, metric) if o.example_id in labels]
    return _mean([labels[o.example_id] for o in rows], [o.conversation for o in rows], confidence) if rows else None


def raw(scored: Scored, metric: str, confidence: float = 0.95) -> Interval | None:
    """The mean of the readable verdicts on answered rows, clustered by conversation, with all the judge's bias."""
    rows = [(v, o.conversation) for o in _rows(scored, metric) if (v := o.scores[metric]) is not None]
    return _mean([v for v, _ in rows], [c for _, c in rows], confidence) if rows else None


# ── calibration ─────────────────────────────────────────────────────────────────────────────────────────────────────


def calibrate(
    results: Sequence[Scored], metric: str, labels: Mapping[RowId, float], source: Source, confidence: float = 0.95
) -> Calibration:
    """Put one judge's verdicts on a metric beside labels, over all its candidates.

    Args:
        results: trials of one dataset, judged by one judge.
        metric: a judged metric.
        labels: (trial key, example id) → label in [0, 1].
        source: where the labels come from.

    Raises:
        LedgerError: the results are of several datasets or judges.
    """
    if len({(r.judge, r.fingerprint) for r in results}) != 1:
        raise LedgerError("a calibration is of one judge on one dataset; these results are of several, or of none")
    rows = [(r.key, o) for r in results for o in _rows(r, metric)]
    places = [o.conversation for _, o in rows]
    missing = [float(o.scores[metric] is None) for _, o in rows]
    labelled = [(o, y) for key, o in rows if (y := labels.get((key, o.example_id))) is not None]
    both = [(o, v, y) for o, y in labelled if (v := o.scores[metric]) is not None]
    clusters = [o.conversation for o, _, _ in both]
    verdicts, gold = np.asarray([v for _, v, _ in both]), np.asarray([y for _, _, y in both])
    judged, right = verdicts >= ACCEPT_AT, gold >= ACCEPT_AT
    ordinal = bool(((verdicts != np.round(verdicts)) | (gold != np.round(gold))).any())

    def rate(values: np.ndarray, where: np.ndarray) -> Interval | None:
        chosen = np.flatnonzero(where)
        return _mean(values[chosen].astype(float), [clusters[i] for i in chosen], confidence) if chosen.size else None

    return Calibration(
        judge=results[0].judge,
        metric=metric,
        fingerprint=results[0].fingerprint,
        source=source,
        rows=len(rows),
        unscored=int(sum(missing)),
        labelled=len(labelled),
        n=len(both),
        agreement=rate(judged == right, np.ones(len(both), dtype=bool)),
        kappa=cohens_kappa(judged, right, clusters, confidence=confidence),
        weighted_kappa=cohens_kappa(np.round(verdicts, 1), np.round(gold, 1), clusters, True, confidence)
        if ordinal
        else None,
        false_accept=rate(judged, ~right),
        false_reject=rate(~judged, right),
        bias=paired_difference(verdicts.tolist(), gold.tolist(), clusters, confidence) if both else None,
        position=position_bias([o.verdicts for _, o in rows], metric, places, confidence),
        length=_length_bias(both, metric, confidence),
        unscored_rate=_mean(missing, places, confidence) if rows else None,
        unscored_gap=stratified_difference(
            [float(o.scores[metric] is None) for o, _ in labelled],
            [y < ACCEPT_AT for _, y in labelled],
            [0] * len(labelled),
            [o.conversation for o, _ in labelled],
            confidence,
        ),
    )


def program_labels(results: Iterable[Scored]) -> dict[RowId, float]:
    """The labels a program gives: `function_name_and_args_accuracy` of every row that has it."""
    return {
        (r.key, o.example_id): value
        for r in results
        for o in r.outcomes
        if (value := o.scores.get(FUNCTION_NAME_AND_ARGS)) is not None
    }


def judged_metrics(scored: Scored) -> tuple[str, ...]:
    """The metrics of a trial that come from its judge, in first-seen order."""
    return tuple(metric for metric in scored.metrics() if metric in JUDGED)


def cohens_kappa(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable] | None = None,
    quadratic: bool = False,
    confidence: float = 0.95,
) -> Interval | None:
    """Agreement of two raters beyond what their rates alone would give: 0 is chance, 1 is perfect.

    Cohen 1960, Educational and Psychological Measurement 20:37, and with weights 1968, Psychological Bulletin 70:213;
    the large-sample variance is that of Fleiss, Cohen and Everitt 1969, Psychological Bulletin 72:323. In clusters
    their per-row terms are summed by cluster first, with CR1 and Student's t. Where that variance is 0 (the raters
    always agree, or never) or unknown (one cluster), the limits come from Wilson's interval of the observed agreement.

    Args:
        a, b: n ratings each.
        clusters: n names of what is not independent; None: all independent.
        quadratic: weigh a disagreement by the square of its distance, for ordered ratings.

    Returns:
        The interval; None where there is no row, or both raters give one and the same rating throughout.
    """
    x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    n = x.size
    levels, codes = np.unique(np.concatenate([x, y]), return_inverse=True)
    if levels.size < 2:
        return None
    i, j = codes[:n], codes[n:]
    distance = np.abs(levels[:, None] - levels[None, :]) / (levels[-1] - levels[0])
    weights = 1 - distance**2 if quadratic else (distance == 0).astype(float)
    row, column = np.bincount(i, minlength=levels.size) / n, np.bincount(j, minlength=levels.size) / n
    observed, chance = float(weights[i, j].mean()), float(row @ weights @ column)
    if 1 - chance < _FLAT:
        return None
    kappa = (observed - chance) / (1 - chance)
    terms = weights[i, j] * (1 - chance) - ((weights @ column)[i] + (row @ weights)[j]) * (1 - observed)
    terms = (terms - terms.mean()) / (1 - chance) ** 2 / n
    groups = cluster_codes(clusters, n)
    count = int(groups.max()) + 1
    squares = float(np.sum(np.bincount(groups, weights=terms) ** 2))
    if count < 2 or squares < _FLAT**2:
        share = wilson(observed * count, count, confidence)
        low, high = ((end - chance) / (1 - chance) for end in (share.low, share.high))
        return Interval(
            estimate=kappa, low=max(-1.0, min(low, kappa)), high=min(1.0, max(high, kappa)), n=n, confidence=confidence
        )
    if clusters is None:
        half = float(special.ndtri(0.5 + confidence / 2)) * math.sqrt(squares)
    else:
        half = float(special.stdtrit(count - 1, 0.5 + confidence / 2)) * math.sqrt(squares * count / (count - 1))
    return Interval(
        estimate=kappa, low=max(-1.0, kappa - half), high=min(1.0, kappa + half), n=n, confidence=confidence
    )


def position_bias(
    verdicts: Sequence[Sequence[Verdict]],
    metric: str,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> PositionBias | None:
    """What the order of the answers does, from rows that were judged in both (Zheng et al. 2023, arXiv:2306.05685).

    Args:
        verdicts: the verdicts on each row; rows without a readable one in each order are left out.
        metric: whose verdicts count.
        clusters: a name for each row; None: all independent.

    Returns:
        None where no row has both orders.
    """
    first, second, names = [], [], []
    for i, given in enumerate(verdicts):
        by_order = {v.order: v.value for v in given if v.metric == metric and v.value is not None}
        shown_first, shown_second = by_order.get("candidate_first"), by_order.get("reference_first")
        if shown_first is not None and shown_second is not None:
            first.append(shown_first)
            second.append(shown_second)
            names.append(i if clusters is None else clusters[i])
    if not first:
        return None
    return PositionBias(
        rows=len(first),
        flips=_mean([float(x != y) for x, y in zip(first, second, strict=True)], names, confidence),
        first_gain=paired_difference(first, second, names, confidence),
        p_value=mcnemar_exact(
            sum(x > y for x, y in zip(first, second, strict=True)),
            sum(x < y for x, y in zip(first, second, strict=True)),
        ),
    )


def stratified_difference(
    values: Sequence[float],
    exposed: Sequence[bool],
    strata: Sequence[Hashable],
    clusters: Sequence[Hashable],
    confidence: float = 0.95,
) -> Interval | None:
    """Mean value of exposed minus unexposed rows of the same stratum, averaged over strata.

    The weights are those of Mantel and Haenszel 1959 (J. National Cancer Institute 22:719; for differences Greenland
    and Robins 1985, Biometrics 41:55), which is least squares with a constant for each stratum; cluster-robust (CR1)
    variance and Student's t. Where no variance is to be seen it is bounded as a proportion of clusters (Wilson).

    Returns:
        None where no stratum has rows of both kinds.
    """
    v, x = np.asarray(values, dtype=float), np.asarray(exposed, dtype=float)
    if not v.size:
        return None
    layer = cluster_codes(strata, v.size)
    size = np.bincount(layer)
    within = x - (np.bincount(layer, weights=x) / size)[layer]
    total = float(within @ within)
    if total < _FLAT:
        return None
    difference = float(within @ v) / total
    residuals = v - (np.bincount(layer, weights=v) / size)[layer] - difference * within
    groups = cluster_codes(clusters, v.size)
    count = int(groups.max()) + 1
    squares = float(np.sum(np.bincount(groups, weights=within * residuals) ** 2)) / total**2
    if count < 2 or squares < _FLAT**2:
        half = wilson(0, count, confidence).high
    else:
        half = float(special.stdtrit(count - 1, 0.5 + confidence / 2)) * math.sqrt(squares * count / (count - 1))
    return Interval(
        estimate=difference,
        low=max(-1.0, difference - half),
        high=min(1.0, difference + half),
        n=v.size,
        confidence=confidence,
    )


def advise(found: Calibration) -> Advice:
    """Whether a judge's raw scores may rank: κ surely above `KAPPA_TO_RANK`, and no bias surely above `BIAS_TO_RANK`.

    Bias means by scale (`bias`), by length, and verdicts that go missing where the label rejects. Position bias is not
    held against a judge asked in both orders: the mean of the two takes it out, and what it leaves is in `bias`.
    The leaderboard corrects a judge by people's labels only, which advice by a program's labels says.
    """
    by_program = found.source == "program"
    whose = "By a program's labels (the leaderboard takes people's only)" if by_program else "By people's labels"

    def said(sentence: str, may_rank: bool = False, more: int = 0) -> Advice:
        return Advice(
            judge=found.judge,
            metric=found.metric,
            source=found.source,
            may_rank=may_rank,
            sentence=f"{whose}: {sentence}",
            more_labels=0 if by_program else more,
        )

    gaps = {
        "it scores {:+.2f} beside the labels": found.bias,
        "it gives {:+.2f} to longer answers": found.length,
        "verdicts are missing {:+.0%} more often where the label rejects": found.unscored_gap,
    }
    faults = [
        words.format(gap.estimate)
        for words, gap in gaps.items()
        if gap and (gap.low > BIAS_TO_RANK or gap.high < -BIAS_TO_RANK)
    ]
    kappa = found.kappa
    shown = f"κ {kappa.estimate:.2f} [{kappa.low:.2f}, {kappa.high:.2f}]" if kappa else "κ unknown"
    if kappa and kappa.high < KAPPA_TO_RANK:
        faults.insert(0, f"it agrees too little, {shown}")
    if faults:
        strict = " A program forgives nothing: people's labels say which side is right." * by_program
        return said(
            f"do not rank candidates by this judge: {'; '.join(faults)}. Rank by the calibrated intervals.{strict}"
        )
    if found.n < ENOUGH_LABELS:
        more = min(ENOUGH_LABELS - found.n, found.rows - found.labelled)
        short = "" if more else " The dataset has no more rows: build one with more evaluation records."
        return said(f"{found.n} labels are too few to say whether this judge may rank candidates.{short}", more=more)
    if kappa is None:
        return said(
            "labels and verdicts are all the same, so nothing shows whether this judge tells good from bad: label rows "
            "of a weaker candidate too."
        )
    if kappa.low < KAPPA_TO_RANK:
        more = 0
        if kappa.estimate > KAPPA_TO_RANK:
            times = ((kappa.estimate - kappa.low) / (kappa.estimate - KAPPA_TO_RANK)) ** 2
            more = min(math.ceil(found.n * (times - 1) / 10) * 10, found.rows - found.labelled)
        return said(
            f"it is not shown that this judge agrees with the labels well enough to rank, {shown} where "
            f"{KAPPA_TO_RANK} is asked for. Rank by the calibrated intervals.",
            more=more,
        )
    return said(f"this judge may rank candidates: {shown}, and no bias above {BIAS_TO_RANK:.0%} is shown.", True)


def report(
    results: Sequence[Scored], human: Mapping[str, Mapping[RowId, float]] | None = None, confidence: float = 0.95
) -> CalibrationReport:
    """Calibrate every judge and judged metric of one dataset's trials, by programmatic labels and by human ones.

    Args:
        results: scored trials of one dataset.
        human: metric → (trial key, example id) → label in [0, 1], as `labels.LabelFile.of_trials` gives them.

    Raises:
        LedgerError: the results are of several datasets, or nothing was judged and labelled.
    """
    fingerprints = {r.fingerprint for r in results}
    if len(fingerprints) != 1:
        raise LedgerError(f"a calibration is of one dataset; these results are of {len(fingerprints)}: name one")
    calibrations, estimates = [], []
    for judge in dict.fromkeys(r.judge for r in results):
        mine = [r for r in results if r.judge == judge]
        for metric in dict.fromkeys(m for r in mine for m in judged_metrics(r)):
            sources: dict[Source, Mapping[RowId, float]] = {"human": (human or {}).get(metric, {})}
            if metric == TOOL_CALLING_CORRECTNESS:
                sources["program"] = program_labels(mine)
            for source, labels in sources.items():
                found = calibrate(mine, metric, labels, source, confidence)
                if not found.labelled:
                    continue
                calibrations.append(found)
                estimates += [_estimate(r, metric, labels, source, confidence) for r in mine if _rows(r, metric)]
    if not calibrations:
        raise LedgerError(
            f"no judged row on dataset {fingerprints.pop()} has a label; label some with `flywheel label`"
        )
    return CalibrationReport(
        fingerprint=fingerprints.pop(),
        calibrations=tuple(calibrations),
        estimates=tuple(estimates),
        advice=tuple(advise(found) for found in calibrations),
    )


def _estimate(
    scored: Scored, metric: str, labels: Mapping[RowId, float], source: Source, confidence: float
) -> Estimate:
    own = {example: value for (key, example), value in labels.items() if key == scored.key}
    rows = _rows(scored, metric)
    return Estimate(
        key=scored.key,
        candidate=scored.candidate.label,
        judge=scored.judge,
        metric=metric,
        source=source,
        labels=sum(o.example_id in own for o in rows),
        answered=len(rows) / len(_asked(scored, metric)),
        raw=raw(scored, metric, confidence),
        calibrated=debiased(scored, metric, own),
        gold=gold_only(scored, metric, own, confidence),
    )


def _of_all(mean: ScoreMean, answered: ScoreMean) -> ScoreMean:
    """The mean over all rows, of the mean over the answered ones and their share; see `debiased`."""
    a, q = answered.estimate, mean.interval().low
    if not q:
        return mean.model_copy(update={"estimate": a * mean.estimate})
    variance = a**2 * q * (1 - q) / mean.effective + q**2 * a * (1 - a) / answered.effective
    return ScoreMean(
        estimate=a * mean.estimate,
        n=mean.n,
        effective=a * q * (1 - a * q) / variance,
        df=min((df for df in (mean.df, answered.df) if df is not None), default=None),
    )


def _asked(scored: Scored, metric: str) -> list[Outcome]:
    """The rows of a metric, answered or not; of a row asked repeatedly, the first."""
    return [o for o in scored.outcomes if not o.repeat and metric in o.scores]


def _rows(scored: Scored, metric: str) -> list[Outcome]:
    """The rows a judge was asked about: answered ones that carry the metric, scored or not."""
    return [o for o in _asked(scored, metric) if o.completion is not None]


def _length_bias(rows: Sequence[tuple[Outcome, float, float]], metric: str, confidence: float) -> Interval | None:
    """The verdict's partial association with length at equal label; Dubois et al. 2024, arXiv:2404.04475, on why."""
    values, longer, strata, clusters = [], [], [], []
    for outcome, verdict, label in rows:
        seen = next((v for v in outcome.verdicts if v.metric == metric), None)
        if seen and seen.candidate_chars != seen.reference_chars:
            values.append(verdict)
            longer.append(seen.candidate_chars > seen.reference_chars)
            strata.append(round(label, 1))
            clusters.append(outcome.conversation)
    return stratified_difference(values, longer, strata, clusters, confidence)


def _mean(
    values: Sequence[float] | np.ndarray, clusters: Sequence[Hashable] | np.ndarray | None, confidence: float
) -> Interval:
    names = clusters.tolist() if isinstance(clusters, np.ndarray) else clusters
    return mean_interval([float(v) for v in values], names, confidence)


def _numbers(values: Sequence[float | None] | np.ndarray) -> np.ndarray:
    """Values as floats, NaN where there is none; shape (n,)."""
    if isinstance(values, np.ndarray):
        return values.astype(float)
    return np.asarray([np.nan if v is None else v for v in values], dtype=float)
