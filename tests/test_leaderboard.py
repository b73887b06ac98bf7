"""The ranking, its intervals and what it dares to recommend."""

from __future__ import annotations

import pytest

from flywheel_ray.candidates import Candidate, Lora, ZeroShot
from flywheel_ray.errors import LedgerError
from flywheel_ray.leaderboard import leaderboard
from flywheel_ray.records import Completion
from flywheel_ray.results import HourPrice, TokenPrice, cost_of
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
