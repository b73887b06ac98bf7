"""The ledger keeps results whole, and finds them again."""

from __future__ import annotations

from pathlib import Path

import pytest

from flywheel_ray.errors import LedgerError
from flywheel_ray.ledger import Ledger
from tests.values import dataset, failed, scored


def test_results_come_back_equal(tmp_path: Path) -> None:
    examples = dataset()
    ledger = Ledger(tmp_path / "ledger")
    good, bad = scored(examples, key="a1"), failed(examples, key="b2")
    assert ledger.fingerprints() == []
    ledger.put(good, wall_s=3.0, lineage={"x": 1})
    ledger.put(bad)
    assert ledger.results(examples.fingerprint) == [good, bad]
    assert ledger.get(examples.fingerprint, "zz") is None
    assert ledger.fingerprints() == [examples.fingerprint]
    assert ledger.lineage(examples.fingerprint, "a1") == {"wall_s": 3.0, "x": 1}
    assert ledger.find("a") == good
    assert not list(tmp_path.rglob("*.partial"))


def test_the_best_of_a_workload_is_of_its_latest_sweep(tmp_path: Path) -> None:
    examples = dataset()
    ledger = Ledger(tmp_path)
    ledger.put(scored(examples, right=0.5, key="a1"))
    ledger.put(scored(examples, right=0.9, key="b2"))
    ledger.put(scored(examples, right=1.0, key="old"))
    config = {"workload": {"client_id": "acme", "workload_id": "router"}}
    ledger.put_sweep(examples.fingerprint, {"config": config, "keys": ["a1", "b2"]})
    assert ledger.best("acme", "router").key == "b2"
    assert len(ledger.board(examples.fingerprint).rows) == 2
    assert len(ledger.board(examples.fingerprint, every=True).rows) == 3
    with pytest.raises(LedgerError, match="'other'"):
        ledger.best("acme", "other")


def test_a_uri_is_the_same_ledger(tmp_path: Path) -> None:
    examples = dataset()
    Ledger(tmp_path).put(scored(examples))
    assert Ledger(f"file://{tmp_path}").results(examples.fingerprint) == [scored(examples)]


def test_a_half_written_result_is_not_one(tmp_path: Path) -> None:
    examples = dataset()
    ledger = Ledger(tmp_path)
    ledger.put(scored(examples))
    folder = tmp_path / examples.fingerprint / "k1"
    (folder / "result.json").rename(folder / "result.json.partial")
    assert ledger.results(examples.fingerprint) == []
    assert ledger.fingerprints() == []


def test_damage_and_doubt_are_named(tmp_path: Path) -> None:
    examples = dataset()
    ledger = Ledger(tmp_path)
    ledger.put(scored(examples, key="ab"))
    ledger.put(scored(examples, key="ac"))
    ledger.put(failed(examples, key="f"))
    with pytest.raises(LedgerError, match="2 trials"):
        ledger.find("a")
    with pytest.raises(LedgerError, match="no trial"):
        ledger.find("zz")
    with pytest.raises(LedgerError, match="failed"):
        ledger.find("f")
    (tmp_path / examples.fingerprint / "ab" / "result.json").write_text("{")
    with pytest.raises(LedgerError, match=r"ab/result\.json is damaged"):
        ledger.get(examples.fingerprint, "ab")
    with pytest.raises(LedgerError, match="cannot be opened"):
        Ledger("nosuch://x/y")
