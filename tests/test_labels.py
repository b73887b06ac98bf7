"""The label file: what is read, what is refused and where it says so, and how rows are drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from flywheel_ray.errors import LedgerError
from flywheel_ray.labels import Label, LabelFile, Sample, Skip, append, parse, read, sample_gaps, sample_order

LABEL = {"trial": "t", "example_id": "e1", "metric": "similarity", "value": 0.8, "labeler": "ana"}


def file_of(*lines: dict[str, Any]) -> LabelFile:
    return parse([json.dumps(line).encode() for line in lines], "labels.jsonl")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({**LABEL, "value": 8}, "line 2, value"),
        ({**LABEL, "value": "0.8"}, "line 2, value"),
        ({**LABEL, "value": None}, "line 2, value"),
        ({**LABEL, "value": float("nan")}, "line 2, value"),
        ({**LABEL, "valeu": 1}, "line 2, valeu"),
        ({k: v for k, v in LABEL.items() if k != "labeler"}, "line 2, labeler"),
        ({**LABEL, "trial": ""}, "line 2, trial"),
        ({**LABEL, "type": "lable"}, "line 2, type"),
        ([1], "line 2, type"),
    ],
)
def test_a_bad_line_is_named_with_file_line_and_field(line: Any, words: str) -> None:
    with pytest.raises(LedgerError, match="labels.jsonl, " + words):
        file_of(LABEL, line)


def test_a_line_that_was_cut_off_is_named() -> None:
    with pytest.raises(LedgerError, match="line 2: not JSON"):
        parse([json.dumps(LABEL).encode(), b'{"trial": "t", "exam'], "labels.jsonl")


def test_the_last_word_of_a_labeler_counts_and_labelers_are_averaged() -> None:
    skip = {k: v for k, v in LABEL.items() if k != "value"} | {"type": "skip"}
    found = file_of(
        LABEL,
        LABEL | {"value": 0.4},
        LABEL | {"labeler": "ben", "value": 1},
        LABEL | {"example_id": "e2"},
        skip | {"example_id": "e2"},
        skip | {"example_id": "e3"},
        LABEL | {"example_id": "e3"},
        LABEL | {"trial": "u", "metric": "preference", "value": 0.5},
    )
    assert found.by_metric() == {
        "similarity": {("t", "e1"): pytest.approx(0.7), ("t", "e3"): 0.8},
        "preference": {("u", "e1"): 0.5},
    }
    assert found.of("t", "similarity") == {"e1": pytest.approx(0.7), "e3": 0.8}
    assert found.of("t", "preference") == {}
    assert found.skipped() == {("similarity", "t", "e2", "ana")}


def test_labelers_are_compared_on_the_rows_they_share() -> None:
    one = [1, 1, 0, 0, 1, 0, 1, 1, 0, 1]
    two = [1, 0, 0, 0, 1, 1, 1, 1, 0, 1]
    lines = [LABEL | {"example_id": str(i), "labeler": "ana", "value": v} for i, v in enumerate(one)]
    lines += [LABEL | {"example_id": str(i), "labeler": "ben", "value": v} for i, v in enumerate(two)]
    lines += [LABEL | {"example_id": "elsewhere", "labeler": "cleo"}]
    found = file_of(*lines).agreement("similarity")
    assert list(found) == [("ana", "ben")]
    kappa = found["ana", "ben"]
    assert kappa is not None and kappa.n == 10
    assert kappa.estimate == pytest.approx(cohen_kappa_score(one, two))


def test_lines_are_appended_whole_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "labels.jsonl"
    assert read(path) == LabelFile()
    lines = (
        Sample(type="sample", dataset="f", trial="t", seed=3, population=306),
        Label.model_validate(LABEL | {"note": "naïve \ud83d", "labelled_at": "2026-11-23T15:00:00+00:00"}),
        Skip(type="skip", trial="t", example_id="e2", metric="similarity", labeler="ana"),
    )
    for line in lines:
        append(path, line)
    assert path.read_bytes().count(b"\n") == 3
    assert read(path).lines[0] == lines[0] and read(path).lines[2] == lines[2]
    assert read(path).samples()["t"].seed == 3
    with path.open("ab") as file:
        file.write(json.dumps(LABEL | {"value": 0.1}).encode())  # an editor left no line end
    append(path, lines[2])
    assert len(read(path).lines) == 5


def test_a_folder_is_no_label_file(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="cannot read labels"):
        read(tmp_path)
    with pytest.raises(LedgerError, match="cannot write labels"):
        append(tmp_path, Sample(type="sample", dataset="f", trial="t", seed=0, population=1))


@settings(max_examples=40, deadline=None)
@given(st.sets(st.text(min_size=1, max_size=8), min_size=1, max_size=40), st.integers(0, 5))
def test_the_order_of_a_sample_depends_on_nothing_but_its_rows(ids: set[str], seed: int) -> None:
    order = sample_order("t", ids, seed)
    assert sorted(order) == sorted(ids)
    assert order == sample_order("t", reversed(order), seed)
    fewer = set(order[::2])
    assert sample_order("t", fewer, seed) == [id for id in order if id in fewer]


def test_every_row_is_drawn_equally_often() -> None:
    ids = [str(i) for i in range(20)]
    drawn = [id for seed in range(2000) for id in sample_order("t", ids, seed)[:5]]
    counts = [drawn.count(id) for id in ids]
    assert min(counts) > 400 and max(counts) < 600  # 500 each; five standard errors are 97
    assert sample_order("t", ids) != sample_order("u", ids) != sample_order("u", ids, 1)


def test_gaps_of_a_sample_are_the_rows_passed_over() -> None:
    assert sample_gaps({"a", "b"}, "abcde") == 0
    assert sample_gaps({"a", "d"}, "abcde") == 2
    assert sample_gaps(set(), "abcde") == 0
