"""The scorer beside BFCL's checker: a recorded slice every time, and slowly whole categories with the checker itself.

What is checked is that no disagreement is without a ruling in `experiments/benchmarks/bfcl_adjudication.md`.
"""

from __future__ import annotations

import json
import subprocess

import pytest

from experiments.benchmarks import bfcl

ADJUDICATED = bfcl.read(bfcl.ADJUDICATION.read_text(encoding="utf-8"))
SLICE = [json.loads(line) for line in bfcl.SLICE.read_text(encoding="utf-8").splitlines()]


def _recorded() -> list[bfcl.Judged]:
    found = [bfcl.entry_of(r["id"], r["category"], r["functions"], r["ground_truth"]) for r in SLICE]
    for row, entry in zip(SLICE, found, strict=True):
        recorded = [(kind, id) for kind, id, _, _ in row["verdicts"]]
        assert recorded == [(case.kind, case.id) for case in bfcl.cases(entry)], "record the slice anew: --write"
    return bfcl.beside(found, {r["id"]: [v[2:] for v in r["verdicts"]] for r in SLICE})


def _check(judged: list[bfcl.Judged]) -> None:
    ruled, unruled = bfcl.rule(judged)
    assert not [(j.case.kind, j.case.id, j.signature) for j in unruled]
    assert bfcl.listed(ruled) <= ADJUDICATED
    asked = {j.case.id for j in judged}
    assert {row for row in ADJUDICATED if row[3] in asked} <= bfcl.listed(ruled)  # and nothing is ruled for nothing


def test_every_disagreement_in_the_slice_has_its_ruling() -> None:
    judged = _recorded()
    _check(judged)
    assert len({j.case.kind for j in judged}) > 20 and sum(j.oracle for j in judged) > 100
    sound = {j.case.entry.id for j in judged if j.case.kind == bfcl.ACCEPTED and not j.case.where and j.oracle}
    accepted = [j for j in judged if j.case.kind == bfcl.ACCEPTED and j.case.entry.id in sound]
    assert all(ours for j in accepted for ours in j.ours.values())


def test_a_disagreement_without_a_ruling_is_seen() -> None:
    judged = _recorded()
    j = next(j for j in judged if j.case.kind == "extra argument")
    turned = j._replace(ours=dict.fromkeys(j.ours, True))
    assert bfcl.rule([turned if other is j else other for other in judged])[1] == [turned]


def test_an_adjudication_file_reads_back() -> None:
    ruled, _ = bfcl.rule(_recorded())
    assert bfcl.read(bfcl.written(ruled, 1)) == bfcl.listed(ruled) != set()


def test_schemas_become_json_schema() -> None:
    pair = {"type": "tuple", "items": {"type": "float"}, "default": {"type": "dict"}}
    theirs = {"type": "dict", "properties": {"type": pair, "default": {"type": "any"}}}
    assert bfcl.json_schema(theirs) == {
        "type": "object",
        "properties": {
            "type": {"type": "array", "items": {"type": "number"}, "default": {"type": "dict"}},
            "default": {"type": "string"},
        },
    }


@pytest.mark.slow
def test_whole_categories_with_the_checker_itself() -> None:
    try:
        bfcl.environment()
    except (subprocess.CalledProcessError, OSError) as error:
        pytest.skip(f"bfcl-eval {bfcl.VERSION} cannot be installed, so only the recorded slice was checked: {error}")
    judged = bfcl.judge(bfcl.entries(("simple_python", "irrelevance", "live_simple", "live_parallel_multiple")))
    _check(judged)
    accepted = [j for j in judged if j.case.kind == bfcl.ACCEPTED]
    assert len(accepted) > 2000
    assert sum(j.oracle == j.ours["exact"] for j in accepted) / len(accepted) >= 0.995
