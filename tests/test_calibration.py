"""Formulas against reference implementations, planted faults found, and coverage by simulation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.inter_rater import cohens_kappa as reference_kappa

from experiments.benchmarks.judge_calibration import JUDGES, as_trial, published, simulate
from flywheel_ray.calibration import (
    MIN_LABELS,
    Calibration,
    advise,
    calibrate,
    cohens_kappa,
    debiased,
    gold_only,
    position_bias,
    prediction_powered_mean,
    program_labels,
    raw,
    report,
    stratified_difference,
)
from flywheel_ray.errors import LedgerError
from flywheel_ray.judge import Order, Verdict
from flywheel_ray.ledger import Ledger
from flywheel_ray.results import Scored
from flywheel_ray.scoring import TOOL_CALLING_CORRECTNESS
from flywheel_ray.stats import Interval, ScoreMean, mean_interval, score_mean
from tests.values import dataset, scored

FAULT = {judge.name.split(":")[0].split(" (")[0]: judge for judge in JUDGES}


# ── prediction-powered inference ──────────────────────────────────────────────────────────────────────────────────────


def test_large_samples_give_the_reference_implementations_interval() -> None:
    # ppi-python 0.2.3: ppi_mean_pointestimate and ppi_mean_ci(Y, Yhat, Yhat_unlabeled, alpha=0.05) on the same rows.
    i = np.arange(10_000)
    label = ((i * 7919) % 1000) / 999
    verdict = np.clip(0.2 + 0.6 * label + (((i * 104_729) % 1000) / 999 - 0.5) * 0.4, 0, 1)
    known = np.where(i < 2000, label, np.nan)
    found, plain = prediction_powered_mean(verdict, known).interval(), published(verdict, known)
    assert (found.estimate, found.low, found.high) == pytest.approx((0.5, 0.49133421, 0.50866579), abs=5e-5)
    assert (plain.estimate, plain.low, plain.high) == pytest.approx((0.5, 0.49133421, 0.50866579), abs=1e-8)
    label = (label < 0.7).astype(float)
    verdict = np.where((i * 31) % 17 < 14, label, 1 - label)
    known = np.where(i < 2000, label, np.nan)
    found, plain = prediction_powered_mean(verdict, known).interval(), published(verdict, known)
    assert found.estimate == pytest.approx(0.69941844, abs=1e-5)
    assert (found.low, found.high) == pytest.approx((0.68262495, 0.71621193), abs=4e-4)
    # Its λ comes from the sample covariance, n − 1, and ours from n.
    assert (plain.low, plain.high) == pytest.approx((0.68262495, 0.71621193), abs=1e-6)


@pytest.mark.parametrize(("name", "turns"), [("length bias", 4), ("unreadable where wrong", 1)])
def test_a_judge_that_is_wrong_is_corrected_by_50_labels(name: str, turns: int) -> None:
    [found] = simulate(FAULT[name], turns, [50], quality=0.8, repetitions=250, seed=1)
    assert found.raw[0] < 0.3
    assert 0.915 <= found.calibrated[0] <= 0.985  # 250 runs of a 95% interval: two standard errors are 2.8 points
    assert found.calibrated[1] < 0.93 * found.gold[1]


@pytest.mark.slow
@pytest.mark.parametrize("turns", [1, 4])
@pytest.mark.parametrize("name", sorted(set(FAULT) - {"nearly fair"}))
def test_every_fault_is_corrected_by_50_labels(name: str, turns: int) -> None:
    [found] = simulate(FAULT[name], turns, [50], quality=0.8, repetitions=2000)
    assert found.raw[0] < 0.75 and found.holds


def test_the_sampling_correction_holds_for_few_failures() -> None:
    [found] = simulate(FAULT["nearly fair"], 1, [50], quality=0.95, repetitions=250, seed=2)
    assert found.raw[0] < 0.3
    assert 0.915 <= found.calibrated[0] <= 0.985  # the published normal interval: 87%
    assert found.calibrated[1] < found.gold[1]
    assert found.published[0] < 0.9


@pytest.mark.parametrize(("turns", "rest"), [(1, 1), (1, 10), (4, 3)])
def test_few_unlabelled_rows_are_no_certainty(turns: int, rest: int) -> None:
    for found in simulate(FAULT["nearly fair"], turns, [50, 200], quality=0.8, repetitions=200, seed=3, rest=rest):
        assert found.calibrated[0] >= 0.91
        assert found.calibrated[1] < 1.2 * found.gold[1]


def test_a_single_unlabelled_row_moves_nothing() -> None:
    label = np.asarray([1.0, 1.0, 1.0, 0.0] * 50)
    known = np.append(label, np.nan)
    for verdict in (0.0, 1.0):
        found, alone = prediction_powered_mean(np.append(label, verdict), known), score_mean(label.tolist())
        assert abs(found.estimate - alone.estimate) < 0.005
        one, other = found.interval(), alone.interval()
        assert one.high - one.low == pytest.approx(other.high - other.low, rel=0.1)


def test_a_bar_is_tested_by_the_test_that_the_interval_inverts() -> None:
    rng = np.random.default_rng(9)
    label = (rng.random(400) < 0.9).astype(float)
    found = prediction_powered_mean(np.where(rng.random(400) < 0.95, label, 1 - label), [*label[:80], *[None] * 320])
    for confidence in (0.8, 0.95, 0.99):
        low = found.interval(confidence).low
        assert found.p_value(low) == pytest.approx((1 - confidence) / 2)
    assert found.df == 79 and found.n == 80 < found.effective


def test_a_truth_at_the_bar_seldom_looks_above_it() -> None:
    rng = np.random.default_rng(10)
    claims = 0
    for _ in range(400):
        label = (rng.random(1000) < 0.98).astype(float)
        known = np.where(rng.permutation(1000) < 300, label, np.nan)
        claims += (
            prediction_powered_mean(np.where(rng.random(1000) < 0.05, 1 - label, label), known).p_value(0.98) <= 0.025
        )
    assert claims <= 18  # 2.5% would be 10; a symmetric normal around the estimate: 12%


def test_leverage_is_corrected_as_hc2_does() -> None:
    # One conversation holds half of the labels: taken as it is, its residual is too small by as much as it pulls.
    label = np.asarray([1.0, 0.0] * 10 + [1.0] * 10 + [0.0] * 10)
    verdict = 0.5 * label + np.asarray([0.4, 0.1, 0.3, 0.2, 0.5] * 8)
    conversations = [*range(20), *[20] * 20, *range(21, 61)]
    f, n, groups = np.concatenate([verdict, np.asarray([0.9, 0.1] * 20)]), 40, np.asarray(conversations)
    found = prediction_powered_mean(f, np.concatenate([label, np.full(40, np.nan)]), conversations)
    a, b = np.zeros(80), np.zeros(80)
    a[:40], b[:40] = (label - label.mean()) / n, (verdict - verdict.mean()) / n
    b[40:] = -(f[40:] - f.mean()) / 40
    weight = float(a @ b) / (f.var() * (1 / 40 + 1 / 40))
    assert 0.1 < weight < 0.9
    each = [(groups == g) for g in range(61)]
    pull = np.asarray([b[g].sum() for g in each])
    share = pull**2 / (pull @ pull) + np.asarray([g[:40].sum() / n for g in each])
    squares = np.asarray([(a - weight * b)[g].sum() ** 2 for g in each]) / (1 - share)
    # Half a conversation in each of four cells, as 0/1 labels have it; 40 labels are of 21 conversations.
    rectifier = label.mean() - weight * verdict.mean()
    cells = np.mean([(y - weight * v - rectifier) ** 2 for y in (0, 1) for v in (0, 1)])
    added = 2 * 40 / 21
    variance = (squares.sum() * n**2 + added * 40 / 21 * cells) / (n + added) ** 2
    assert found.estimate == pytest.approx(label.mean() + weight * (f[40:].mean() - verdict.mean()))
    shrunk = (n * found.estimate + added / 2) / (n + added)
    assert found.effective == pytest.approx(shrunk * (1 - shrunk) / variance)


def test_the_added_rows_keep_a_sample_near_one_uncertain() -> None:
    # One error in 50 labels, forgiven by the judge: what is seen of the variance is far from all of it.
    label, verdict = np.asarray([1.0] * 49 + [0.0]), np.asarray([1.0] * 48 + [0.0, 0.0])
    rest = np.asarray([1.0] * 440 + [0.0] * 10)
    found = prediction_powered_mean([*verdict, *rest], [*label, *[None] * 450])
    seen = found.estimate * (1 - found.estimate)
    low = found.interval().low
    assert low < mean_interval(label.tolist()).estimate - 0.04
    assert found.effective > seen / (label.var() / 50)


def test_a_judge_that_knows_nothing_leaves_the_labels_own_interval() -> None:
    label = [1.0, 1.0, 1.0, 0.0] * 10 + [None] * 160
    alone = score_mean([v for v in label if v is not None])
    for verdict in ([0.9] * 200, [None] * 200, [0.0, 0.0, 0.0, 1.0] * 50):
        assert prediction_powered_mean(verdict, label) == alone


def test_fully_labelled_rows_need_no_judge() -> None:
    label = [1.0, 0.0, 1.0, 1.0] * 10
    assert prediction_powered_mean([1.0] * 40, label) == score_mean(label)


@given(
    st.lists(
        st.tuples(
            st.sampled_from([None, 0.0, 0.1, 0.5, 0.9, 1.0]),
            st.sampled_from([None, None, 0.0, 0.5, 1.0]),
            st.integers(0, 12),
        ),
        min_size=1,
        max_size=80,
    ).filter(lambda rows: any(label is not None for _, label, _ in rows))
)
@settings(max_examples=80, deadline=None)
def test_an_interval_is_within_bounds_and_never_certain(
    rows: list[tuple[float | None, float | None, int]],
) -> None:
    verdicts, labels, clusters = ([row[i] for row in rows] for i in range(3))
    for names in (None, clusters):
        found = prediction_powered_mean(verdicts, labels, names).interval()
        assert 0 <= found.low <= found.estimate + 1e-12 and found.estimate - 1e-12 <= found.high <= 1
        assert found.high - found.low > 0.005
        assert found.n == sum(label is not None for label in labels)


def test_copies_of_a_row_in_its_conversation_are_no_evidence() -> None:
    rng = np.random.default_rng(4)
    label = (rng.random(300) < 0.7).astype(float)
    verdict = np.where(rng.random(300) < 0.85, label, 1 - label)
    known = np.where(np.arange(300) < 60, label, np.nan)
    once = prediction_powered_mean(verdict, known).interval()
    thrice, three = np.repeat(verdict, 3), np.repeat(known, 3)
    copied = prediction_powered_mean(thrice, three, np.repeat(np.arange(300), 3).tolist()).interval()
    assert copied.estimate == pytest.approx(once.estimate)
    assert copied.high - copied.low >= 0.95 * (once.high - once.low)
    unaware = prediction_powered_mean(thrice, three).interval()
    assert unaware.high - unaware.low < 0.7 * (once.high - once.low)


def test_what_cannot_be_estimated_is_refused() -> None:
    with pytest.raises(ValueError, match="not of the same rows"):
        prediction_powered_mean([1.0], [1.0, None])
    with pytest.raises(ValueError, match="without a label"):
        prediction_powered_mean([1.0], [None])


# ── agreement and bias ────────────────────────────────────────────────────────────────────────────────────────────────


def test_kappa_equals_statsmodels() -> None:
    rng = np.random.default_rng(3)
    a = rng.integers(1, 11, 400)
    b = np.clip(a + rng.integers(-2, 3, 400), 1, 10)
    table = np.zeros((10, 10))
    np.add.at(table, (a - 1, b - 1), 1)
    for quadratic in (False, True):
        reference = reference_kappa(table, wt="quadratic" if quadratic else None)
        found = cohens_kappa(a / 10, b / 10, quadratic=quadratic)
        assert found is not None
        assert (found.estimate, found.low, found.high) == pytest.approx(
            (reference.kappa, reference.kappa_low, reference.kappa_upp), abs=1e-9
        )


def test_kappa_of_clusters_and_of_perfect_agreement() -> None:
    rng = np.random.default_rng(5)
    a = rng.random(200) < 0.6
    b = np.where(rng.random(200) < 0.2, ~a, a)
    plain = cohens_kappa(a, b)
    copied = cohens_kappa(np.repeat(a, 4), np.repeat(b, 4), np.repeat(np.arange(200), 4).tolist())
    assert plain and copied and copied.estimate == pytest.approx(plain.estimate)
    assert copied.high - copied.low == pytest.approx(plain.high - plain.low, rel=0.02)
    perfect = cohens_kappa([1, 0, 1, 0], [1, 0, 1, 0])
    assert perfect and perfect.estimate == 1 and perfect.low < 0.2
    never = cohens_kappa([1, 0] * 10, [0, 1] * 10)
    assert never and (never.estimate, never.low) == (-1, -1) and -0.8 < never.high < -0.5
    conversation = cohens_kappa([1, 0] * 10, [1, 0] * 10, ["c"] * 20)
    assert conversation and (conversation.estimate, conversation.high) == (1, 1) and conversation.low < -0.5
    assert cohens_kappa([1, 1], [1, 1]) is None
    assert cohens_kappa([], []) is None


def test_stratified_difference_is_least_squares_with_clustered_errors() -> None:
    rng = np.random.default_rng(6)
    strata, exposed = rng.integers(0, 3, 300), rng.random(300) < 0.4
    values = 0.2 * strata + 0.3 * exposed + rng.random(300) * 0.3
    clusters = np.repeat(np.arange(60), 5)
    design = np.column_stack([exposed.astype(float), *(strata == s for s in range(3))]).astype(float)
    fitted = sm.OLS(values, design).fit(
        cov_type="cluster", cov_kwds={"groups": clusters, "use_correction": False}, use_t=True
    )
    found = stratified_difference(values.tolist(), exposed.tolist(), strata.tolist(), clusters.tolist())
    assert found is not None and found.estimate == pytest.approx(fitted.params[0])
    error = (found.high - found.low) / 2 / 2.000995378  # Student's t with 59 degrees of freedom
    assert error == pytest.approx(fitted.bse[0] * (60 / 59) ** 0.5)
    assert stratified_difference([1.0, 0.0], [True, True], [0, 0], ["a", "b"]) is None
    flat = stratified_difference([1.0] * 20, [True, False] * 10, [0] * 20, list(range(20)))
    assert flat is not None and flat.low < -0.1 < 0.1 < flat.high


def _pair(first: float | None, second: float | None) -> tuple[Verdict, ...]:
    values: tuple[tuple[Order, float | None], ...] = (("candidate_first", first), ("reference_first", second))
    return tuple(Verdict(metric="m", value=v, order=o, reference_chars=1, candidate_chars=1) for o, v in values)


def test_position_bias_is_counted_over_rows_read_in_both_orders() -> None:
    rows = [_pair(1.0, 0.0)] * 6 + [_pair(0.0, 1.0)] + [_pair(1.0, 1.0)] * 13 + [_pair(1.0, None), ()]
    found = position_bias(rows, "m")
    assert found is not None and found.rows == 20
    assert found.flips.estimate == pytest.approx(7 / 20)
    assert found.first_gain.estimate == pytest.approx(5 / 20)
    assert found.p_value == pytest.approx(2 * 8 / 2**7)  # 0 or 1 of 7 by a fair coin, two-sided
    assert position_bias(rows, "another") is None


@pytest.mark.parametrize(
    ("name", "field", "sign"),
    [
        ("lenient", "bias", 1),
        ("strict", "bias", -1),
        ("length bias", "length", 1),
        ("unreadable where wrong", "unscored_gap", 1),
        ("inflated similarity", "bias", 1),
        ("position bias, both orders", "first_gain", 1),
    ],
)
def test_a_planted_fault_is_named_and_forbids_ranking(name: str, field: str, sign: int) -> None:
    judge = FAULT[name]
    world = judge.draw(np.random.default_rng(7), 0.8, 4)
    trial = as_trial(world, judge.metric, "synthetic (LLM)")
    labels = {("synthetic", str(i)): float(value) for i, value in enumerate(world.label)}
    found = calibrate([trial], judge.metric, labels, "human")
    interval: Interval = getattr(found.position if field == "first_gain" else found, field)
    assert interval.low > 0.02 if sign > 0 else interval.high < -0.02
    assert not advise(found).may_rank and "do not rank" in advise(found).sentence


def test_outcomes_go_the_way_of_the_numbers() -> None:
    judge = FAULT["unreadable where wrong"]
    world = judge.draw(np.random.default_rng(8), 0.8, 4)
    trial = as_trial(world, judge.metric, "synthetic (LLM)")
    known = np.where(np.arange(world.label.size) % 9 == 0, world.label, np.nan)
    labels = {str(i): float(v) for i, v in enumerate(known) if not np.isnan(v)}
    names = world.conversation.tolist()
    assert debiased(trial, judge.metric, labels) == prediction_powered_mean(world.verdict, known, names)
    alone, judged = gold_only(trial, judge.metric, labels), raw(trial, judge.metric)
    assert alone is not None and alone.estimate == pytest.approx(np.nanmean(known))
    assert judged is not None and judged.estimate == pytest.approx(np.nanmean(world.verdict))
    assert debiased(trial, judge.metric, dict(list(labels.items())[: MIN_LABELS - 1])) is None
    assert gold_only(trial, judge.metric, {}) is None


def _answering(trial: Scored, metric: str, share: float) -> Scored:
    cut = round(len(trial.outcomes) * share)
    mute = {"completion": None, "scores": {metric: None}, "verdicts": ()}
    outcomes = tuple(o if i < cut else o.model_copy(update=mute) for i, o in enumerate(trial.outcomes))
    return trial.model_copy(update={"outcomes": outcomes})


def test_rows_without_an_answer_are_wrong() -> None:
    # A judge and labels that find every answer right, and 64% of the rows without one.
    judge = FAULT["nearly fair"]
    world = judge.draw(np.random.default_rng(11), 1.0, 1)
    right = world._replace(verdict=np.ones(1000), label=np.ones(1000))
    trial = _answering(as_trial(right, judge.metric, "j"), judge.metric, 0.36)
    found = debiased(trial, judge.metric, {str(i): 1.0 for i in range(100)})
    assert found is not None and found.estimate == pytest.approx(0.36) and found.n == 100
    interval = found.interval()
    alone = mean_interval([1.0] * 360 + [0.0] * 640)
    assert interval.high < 0.42 and found.p_value(0.5) > 0.99
    assert interval.high - interval.low > alone.high - alone.low  # labels do not know the answered ones for sure
    assert interval.low > mean_interval([1.0] * 100).low * alone.low
    [estimate] = report([trial], {judge.metric: {("synthetic", str(i)): 1.0 for i in range(100)}}).estimates[:1]
    assert estimate.answered == pytest.approx(0.36) and estimate.calibrated == found
    assert estimate.raw and estimate.gold and estimate.raw.estimate == estimate.gold.estimate == 1


@pytest.mark.slow
def test_the_mean_of_all_rows_covers_the_truth() -> None:
    rng, judge, covered = np.random.default_rng(12), FAULT["strict"], 0
    for _ in range(120):
        world = judge.draw(rng, 0.8, 4)
        trial = _answering(as_trial(world, judge.metric, "j"), judge.metric, rng.binomial(250, 0.7) / 250)
        answered = [i for i, o in enumerate(trial.outcomes) if o.completion]
        chosen = rng.permutation(answered)[:100]
        found = debiased(trial, judge.metric, {str(i): float(world.label[i]) for i in chosen})
        assert found is not None
        covered += found.interval().low <= 0.8 * 0.7 <= found.interval().high
    assert covered >= 107  # 114 expected; three standard errors are 7


# ── what it amounts to ────────────────────────────────────────────────────────────────────────────────────────────────


def _calibration(n: int, kappa: tuple[float, float, float] | None, **changes: object) -> Calibration:
    interval = Interval(estimate=kappa[0], low=kappa[1], high=kappa[2], n=n) if kappa else None
    given = {"judge": "j", "metric": "m", "fingerprint": "f", "source": "human", "rows": 500, "unscored": 0}
    return Calibration.model_validate({**given, "labelled": n, "n": n, "kappa": interval, **changes})


def test_advice() -> None:
    fit = advise(_calibration(200, (0.8, 0.7, 0.9)))
    assert fit.may_rank and fit.more_labels == 0
    few = advise(_calibration(12, (0.9, 0.7, 1.0)))
    assert not few.may_rank and few.more_labels == 38 and "too few" in few.sentence
    open_ = advise(_calibration(60, (0.7, 0.5, 0.9)))
    assert not open_.may_rank and open_.more_labels == 180  # the half-width must halve: four times the rows
    assert advise(_calibration(60, (0.7, 0.5, 0.9), rows=100)).more_labels == 40
    assert advise(_calibration(12, (0.9, 0.7, 1.0), rows=30)).more_labels == 18
    none = advise(_calibration(12, (0.9, 0.7, 1.0), rows=12))
    assert none.more_labels == 0 and "no more rows" in none.sentence
    program = advise(_calibration(12, (0.9, 0.7, 1.0), source="program"))
    assert program.more_labels == 0 and program.sentence.startswith("By a program's labels (the leaderboard takes")
    assert few.sentence.startswith("By people's labels: 12 labels are too few")
    unfit = advise(_calibration(200, (0.4, 0.3, 0.5)))
    assert not unfit.may_rank and "agrees too little" in unfit.sentence and unfit.more_labels == 0
    assert "all the same" in advise(_calibration(200, None)).sentence


def _judged(key: str, right: float, judge: str = "llama (LLM)") -> Scored:
    trial = scored(dataset(200), key=key, right=right)
    wrong = [o for o in trial.outcomes if o.scores[TOOL_CALLING_CORRECTNESS] == 0]
    forgiven = {o.example_id for o in wrong[::2]}
    outcomes = tuple(
        o.model_copy(update={"scores": o.scores | {TOOL_CALLING_CORRECTNESS: 1.0}}) if o.example_id in forgiven else o
        for o in trial.outcomes
    )
    return trial.model_copy(update={"outcomes": outcomes, "judge": judge})


def test_a_report_covers_judges_sources_and_candidates_and_is_kept(tmp_path: Path) -> None:
    results = [_judged("k1", 0.9), _judged("k2", 0.5), _judged("k3", 0.5, judge="another (LLM)")]
    human = {row: value for row, value in program_labels(results).items() if row[0] == "k2"}
    found = report(results, {TOOL_CALLING_CORRECTNESS: human})
    assert [(c.judge, c.source) for c in found.calibrations] == [
        ("llama (LLM)", "human"),
        ("llama (LLM)", "program"),
        ("another (LLM)", "program"),
    ]
    by_key = {(e.key, e.source): e for e in found.estimates}
    assert by_key["k1", "human"].calibrated is None and by_key["k1", "human"].labels == 0
    inflated = by_key["k2", "program"]
    assert inflated.raw and inflated.calibrated and inflated.raw.low > inflated.calibrated.estimate
    assert isinstance(inflated.calibrated, ScoreMean) and inflated.answered == 1
    ledger = Ledger(tmp_path)
    assert ledger.calibration(found.fingerprint) is None
    ledger.put_calibration(found)
    assert ledger.calibration(found.fingerprint) == found
    kept = tmp_path / found.fingerprint / "calibration.json"
    assert [p.name for p in kept.parent.iterdir()] == [kept.name]
    kept.write_text("{}")
    with pytest.raises(LedgerError, match="judge calibrate"):
        ledger.calibration(found.fingerprint)


def test_a_report_needs_one_dataset_and_a_label() -> None:
    one = _judged("k1", 0.9)
    with pytest.raises(LedgerError, match="of 2: name one"):
        report([one, one.model_copy(update={"fingerprint": "other"})])
    bare = tuple(o.model_copy(update={"scores": {"similarity": 0.5}}) for o in one.outcomes)
    with pytest.raises(LedgerError, match="flywheel label"):
        report([one.model_copy(update={"outcomes": bare})])
