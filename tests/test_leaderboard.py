"""The ranking, its intervals and what it dares to recommend."""

from __future__ import annotations

import pytest

from flywheel_ray.candidates import Candidate, Lora, ZeroShot
from flywheel_ray.errors import LedgerError
from flywheel_ray.leaderboard import leaderboard
from flywheel_ray.records import Completion
from flywheel_ray.results import HourPrice, TokenPrice, cost_of
from flywheel_ray.stats import ScoreMean
from tests.values import dataset, failed, scored

METRIC = "function_name_and_args_accuracy"
BIG = dataset(1500, eval_fraction=0.3)
LORA = Candidate(model="m", adaptation=Lora())


def test_ranks_by_the_metric_and_lists_the_failed_without_a_score() -> None:
    good, poor = scored(BIG, LORA, 0.9, key="good"), scored(BIG, right=0.1, key="poor")
    board = leaderboard([poor, failed(BIG), good], BIG.eval)
    assert [row.key for row in board.rows] == ["good", "poor"]
    assert board.metric == METRIC
    assert [f.key for f in board.failed] == ["k9"]
    quality = board.rows[0].quality
    assert quality and quality.low < quality.estimate < quality.high
    assert quality.estimate == pytest.approx(0.9, abs=0.01)
    assert board.teacher.quality and board.teacher.quality.estimate == 1.0
    assert board.teacher.cost.latency_p50_s and board.teacher.cost.prompt_tokens == 100


@pytest.mark.parametrize(
    ("right", "winner", "words"), [(1.0, "k1", "is within"), (0.5, None, "No candidate is good enough")]
)
def test_recommends_only_what_is_shown(right: float, winner: str | None, words: str) -> None:
    board = leaderboard([scored(BIG, right=right)], BIG.eval, margin=0.02)
    assert board.winner == winner
    assert words in board.verdict


def test_a_small_evaluation_is_not_enough() -> None:
    small = dataset(60)
    board = leaderboard([scored(small, right=1.0)], small.eval, margin=0.02)
    assert board.winner is None
    assert "Not enough evidence" in board.verdict


def test_it_says_how_many_more_records_would_settle_it() -> None:
    small = dataset(400)
    board = leaderboard([scored(small, right=0.995)], small.eval, margin=0.02)
    assert board.winner is None and board.records_needed
    assert f"about {board.records_needed:,} more held-out records would show it" in board.verdict
    # So many more, at the same score, are enough.
    enough = dataset(round((len(small.eval) + board.records_needed) / 0.3) + 60)
    assert leaderboard([scored(enough, right=0.995)], enough.eval, margin=0.02).winner == "k1"
    below = leaderboard([scored(small, right=0.97)], small.eval, margin=0.02)
    assert below.winner is None and below.records_needed
    assert "stands below 0.980" in below.verdict


def test_every_candidate_tried_makes_a_claim_harder() -> None:
    near = scored(BIG, LORA, 0.9935, key="near")
    alone = leaderboard([near], BIG.eval, margin=0.02)
    crowd = leaderboard([near, *[scored(BIG, right=0.98, key=f"k{i}") for i in range(20)]], BIG.eval, margin=0.02)
    assert alone.winner == "near" and crowd.winner is None
    assert alone.rows[0].p_value and crowd.rows[0].p_value
    assert crowd.rows[0].p_value == pytest.approx(21 * alone.rows[0].p_value)


def test_an_example_without_an_answer_is_wrong_for_a_claim() -> None:
    """Otherwise a model that answers only what is easy would win."""
    trial = scored(BIG, right=1.0)
    silent = [
        o.model_copy(update={"completion": None, "scores": {METRIC: None}, "unscored": {METRIC: "too long"}})
        for o in trial.outcomes[:45]
    ]
    board = leaderboard([trial.model_copy(update={"outcomes": (*silent, *trial.outcomes[45:])})], BIG.eval)
    row = board.rows[0]
    assert row.quality and row.quality.estimate == 1.0 and row.unscored[METRIC] == 45
    assert row.difference and row.difference.estimate == pytest.approx(-45 / len(BIG.eval))
    assert board.winner is None and f"scores {1 - 45 / len(BIG.eval):.3f} [" in board.verdict


def test_a_judge_names_no_winner_until_labels_correct_it() -> None:
    judged = "tool_calling_correctness"
    trial = scored(BIG, right=1.0)
    board = leaderboard([trial], BIG.eval, metric=judged)
    assert board.winner is None and "flywheel label" in board.verdict
    assert leaderboard([trial], BIG.eval, metric=judged, trust_judge=True).winner == "k1"
    good = ScoreMean(estimate=0.995, n=450, effective=900)
    board = leaderboard([trial], BIG.eval, metric=judged, corrected={judged: {"k1": good}})
    assert board.winner == "k1" and board.rows[0].calibrated and board.rows[0].quality == good.interval()
    assert "corrected by labels" in board.verdict
    poor = leaderboard(
        [trial], BIG.eval, metric=judged, corrected={judged: {"k1": ScoreMean(estimate=0.9, n=9, effective=900)}}
    )
    assert poor.winner is None
    # A clean sheet of 100 labels holds 0.98 in its interval: no winner, by the very same test, at any confidence.
    clean = {judged: {"k1": ScoreMean(estimate=1.0, n=100, effective=100)}}
    for confidence in (0.9, 0.95, 0.99):
        board = leaderboard([trial], BIG.eval, metric=judged, corrected=clean, confidence=confidence)
        [row] = board.rows
        assert board.winner is None and row.difference and row.difference.low < -0.02
        assert "more labels are needed" in board.verdict and board.records_needed is None
    # Labels correct one of the two: the other cannot win, and the verdict says so.
    two = [trial, scored(BIG, right=1.0, key="k2")]
    both = leaderboard(two, BIG.eval, metric=judged, corrected={judged: {"k1": good}})
    assert both.winner == "k1" and "1 more without enough labels were not considered" in both.verdict
    assert {row.key: row.p_value is None for row in both.rows} == {"k1": False, "k2": True}
    # A metric that no judge gave needs no labels.
    assert not leaderboard([trial], BIG.eval, corrected={judged: {"k1": good}}).rows[0].calibrated


def test_answers_to_one_prompt_count_as_one_cluster() -> None:
    once = scored(BIG, right=0.9)
    thrice = once.model_copy(update={"outcomes": tuple(o for o in once.outcomes for _ in range(3))})
    one, three = (leaderboard([r], BIG.eval).rows[0].quality for r in (once, thrice))
    assert one and three and three.n == 3 * one.n
    assert three.high - three.low == pytest.approx(one.high - one.low, rel=0.02)
    # And what is asked for is records, not answers.
    small = dataset(400)
    few = scored(small, right=0.995)
    repeated = few.model_copy(update={"outcomes": tuple(o for o in few.outcomes for _ in range(3))})
    needed = [leaderboard([r], small.eval, margin=0.02).records_needed for r in (few, repeated)]
    assert needed[0] and needed[1] == pytest.approx(needed[0], rel=0.3)  # it was 3.5 times as many


def test_what_a_success_costs() -> None:
    board = leaderboard([scored(BIG, right=0.5)], BIG.eval, prices={"m": HourPrice(usd_per_hour=1)})
    row = board.rows[0]
    assert row.cost.usd_per_1000 and row.usd_per_1000_successes == pytest.approx(2 * row.cost.usd_per_1000, rel=0.01)
    nothing = leaderboard([scored(BIG, right=0.0)], BIG.eval, prices={"m": HourPrice(usd_per_hour=1)}).rows[0]
    assert nothing.usd_per_1000_successes is None


def test_domination_is_sure() -> None:
    """A cheaper candidate dominates one that is surely no better than the margin, and noise dominates nobody."""
    prices = {"dear": HourPrice(usd_per_hour=10), "cheap": HourPrice(usd_per_hour=1)}
    dear, cheap = (Candidate(model=m, adaptation=ZeroShot()) for m in ("dear", "cheap"))

    def dominated(dear_right: float, cheap_right: float) -> dict[str, str | None]:
        results = [scored(BIG, dear, dear_right, key="d"), scored(BIG, cheap, cheap_right, key="c")]
        return {row.key: row.dominated_by for row in leaderboard(results, BIG.eval, prices=prices).rows}

    assert dominated(0.9, 0.9) == {"d": "c", "c": None}
    assert dominated(0.9, 0.95) == {"d": "c", "c": None}
    assert dominated(0.95, 0.9) == {"d": None, "c": None}
    assert dominated(0.912, 0.9) == {"d": None, "c": None}


def test_dollars_are_not_compared_with_seconds() -> None:
    """Where one row has no price all are compared by latency, and the verdict says so."""
    fast, slow = (Candidate(model=m, adaptation=ZeroShot()) for m in ("fast", "slow"))
    results = [scored(BIG, fast, 1.0, key="f", latency_s=0.1), scored(BIG, slow, 1.0, key="s", latency_s=0.5)]
    board = leaderboard(results, BIG.eval, prices={"fast": HourPrice(usd_per_hour=9000)}, margin=0.02)
    assert board.winner == "f" and "the fastest of 2" in board.verdict
    assert {row.key: row.dominated_by for row in board.rows} == {"f": None, "s": "f"}


def test_a_preference_is_measured_against_a_half() -> None:
    trial = scored(BIG, right=1.0)
    outcomes = [
        o.model_copy(update={"scores": {"preference": (0.0, 0.5, 0.5, 1.0)[i % 4]}})
        for i, o in enumerate(trial.outcomes)
    ]
    board = leaderboard(
        [trial.model_copy(update={"outcomes": tuple(outcomes)})], BIG.eval, "preference", trust_judge=True
    )
    row = board.rows[0]
    assert row.difference and abs(row.difference.estimate) < 0.01 and row.difference.low < -0.02
    assert board.teacher.quality and board.teacher.quality.estimate == 0.5
    assert row.usd_per_1000_successes is None
    assert leaderboard([trial], BIG.eval, METRIC).teacher.quality == board.teacher.quality.shifted(0.5)


def test_the_cheapest_good_one_wins() -> None:
    prices = {
        "dear": HourPrice(usd_per_hour=10),
        "cheap": HourPrice(usd_per_hour=1),
    }
    dear = scored(BIG, Candidate(model="dear", adaptation=ZeroShot()), 1.0, key="dear")
    cheap = scored(BIG, Candidate(model="cheap", adaptation=ZeroShot()), 0.998, key="cheap")
    board = leaderboard([dear, cheap], BIG.eval, prices=prices, margin=0.02)
    assert board.winner == "cheap"
    assert all(row.pareto for row in board.rows)


def test_refuses_to_compare_datasets() -> None:
    small = dataset(60)
    with pytest.raises(LedgerError, match="one dataset"):
        leaderboard([scored(BIG), scored(small)], BIG.eval)
    with pytest.raises(LedgerError, match="no trial carries"):
        leaderboard([scored(BIG)], BIG.eval, metric="nonsense")


def test_unscored_rows_are_counted_and_kept_out_of_the_mean() -> None:
    trial = scored(BIG, right=1.0)
    first = trial.outcomes[0].model_copy(update={"scores": {METRIC: None}, "unscored": {METRIC: "no reply"}})
    row = leaderboard([trial.model_copy(update={"outcomes": (first, *trial.outcomes[1:])})], BIG.eval).rows[0]
    assert row.unscored[METRIC] == 1
    assert row.quality and row.quality.n == len(BIG.eval) - 1 and row.quality.estimate == 1.0


def test_cost() -> None:
    answers = [Completion(latency_s=s, prompt_tokens=1000, completion_tokens=100) for s in (1.0, 2.0, 3.0)]
    by_token = cost_of(answers, TokenPrice(usd_per_1m_prompt_tokens=1, usd_per_1m_completion_tokens=2))
    assert by_token.usd_per_1000 == pytest.approx(1.2)
    assert by_token.latency_p50_s == 2.0
    assert cost_of(answers, HourPrice(usd_per_hour=3.6), requests_per_hour=3600).usd_per_1000 == pytest.approx(1.0)
    assert cost_of(answers, HourPrice(usd_per_hour=3.6)).usd_per_1000 is None
    unknown = cost_of([Completion()], None)
    assert unknown.latency_p50_s is None and unknown.prompt_tokens is None and unknown.usd_per_1000 is None
