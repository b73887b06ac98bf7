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
from flywheel_ray.labels import (
    Label,
    LabelFile,
    Sample,
    Skip,
    answer_hash,
    answers_of,
    append,
    parse,
    read,
    sample_gaps,
    sample_order,
)
from flywheel_ray.records import Completion, ToolCall
from flywheel_ray.results import Scored
from tests.values import dataset, scored

LABEL = {"trial": "t", "example_id": "e1", "metric": "similarity", "value": 0.8, "labeler": "ana"}


def trial(key: str, right: float = 1.0) -> Scored:
    return scored(dataset(60), key=key, right=right)


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
    t, u = trial("t"), trial("u")
    assert found.of_trials([t, u]) == {
        "similarity": {("t", "e1"): pytest.approx(0.7), ("t", "e3"): 0.8},
        "preference": {("u", "e1"): 0.5},
    }
    assert found.of(t, "similarity") == {"e1": pytest.approx(0.7), "e3": 0.8}
    assert found.of(t, "preference") == {}
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


def test_a_row_skipped_after_the_last_labelled_one_is_a_gap_too() -> None:
    assert sample_gaps({"a", "b"}, "abcde", {"c", "d"}) == 2
    assert sample_gaps({"a", "b"}, "abcde", {"b"}) == 0  # another labeler gave it a label
    assert sample_gaps(set(), "abcde", {"b"}) == 2


# ── labels outlive the trial ──────────────────────────────────────────────────────────────────────────────────────────


def given_of(result: Scored, ids: list[str], value: float = 1.0, with_answer: bool = True) -> list[dict[str, Any]]:
    answers = answers_of(result) if with_answer else {}
    lines = [LABEL | {"trial": result.key, "example_id": id, "value": value, "answer": answers.get(id)} for id in ids]
    return [{k: v for k, v in line.items() if v is not None} for line in lines]


def test_trials_with_the_same_answers_share_labels() -> None:
    one = trial("t")
    other = one.model_copy(update={"key": "u", "judge": "another rubric"})
    ids = [o.example_id for o in one.outcomes][:3]
    found = file_of(*given_of(one, ids))
    assert found.of(other, "similarity") == found.of(one, "similarity") == dict.fromkeys(ids, 1.0)
    assert found.of(other, "preference") == {}
    assert found.of_trials([other]) == {"similarity": {("u", id): 1.0 for id in ids}}
    corrected = file_of(*given_of(one, ids), *given_of(other, ids[:1], 0.0))
    assert corrected.of(other, "similarity")[ids[0]] == 0.0 and corrected.of(one, "similarity")[ids[0]] == 1.0
    assert file_of(*given_of(one, ids, with_answer=False)).of(other, "similarity") == {}


def test_different_answers_share_none_and_half_a_sample_waits_for_the_rest() -> None:
    one, other = trial("t", right=1.0), trial("u", right=0.5)
    ids = [o.example_id for o in one.outcomes]
    same, different = ids[:4], ids[-2:]
    assert file_of(*given_of(one, different)).of(other, "similarity") == {}
    # Rows on which both agree are no random sample of the other's: they count with the rest of the sample only.
    half = file_of(*given_of(one, same + different))
    assert half.of(other, "similarity") == {} and half.waiting(other, "similarity") == set(different)
    filled = [*given_of(one, same + different), *given_of(other, different, 0.0)]
    assert file_of(*filled).of(other, "similarity") == dict.fromkeys(same, 1.0) | dict.fromkeys(different, 0.0)
    assert file_of(*filled).waiting(other, "similarity") == set()
    # Another trial, of which more was labelled, is no reason to leave out one that fits wholly.
    third = one.model_copy(update={"key": "v"})
    assert file_of(*filled).of(third, "similarity") == dict.fromkeys(same + different, 1.0)
    # What was left aside here, or answered by only one of them, is not waited for.
    skip = {"type": "skip", "trial": "u", "metric": "similarity", "labeler": "ben"}
    passed = [*given_of(one, same + different), *(skip | {"example_id": id} for id in different)]
    assert file_of(*passed).of(other, "similarity") == dict.fromkeys(same, 1.0)
    mute = other.model_copy(
        update={
            "outcomes": tuple(
                o.model_copy(update={"completion": None}) if o.example_id in different else o for o in other.outcomes
            )
        }
    )
    assert half.of(mute, "similarity") == dict.fromkeys(same, 1.0)
    assert file_of(*given_of(one, different, with_answer=False)).fitting(mute, "similarity") == {}


def test_a_sitting_that_was_broken_off_counts_as_far_as_it_came() -> None:
    one, other = trial("t", right=1.0), trial("u", right=0.5)
    order = sample_order(one.fingerprint, [o.example_id for o in one.outcomes])
    answers = answers_of(one)
    differing = [id for id in order if answers[id] != answers_of(other)[id]]
    sample = {"type": "sample", "dataset": one.fingerprint, "trial": "u", "seed": 0, "population": len(order)}
    found = file_of(*given_of(one, order), sample, *given_of(other, differing[:3], 0.0))
    # Three labels of rows that differ are no random sample; with the rows before them that agree they are.
    reached = order[: order.index(differing[2]) + 1]
    assert set(found.of(other, "similarity")) == set(reached) and len(reached) > 3
    assert sample_gaps(found.of(other, "similarity"), order) == 0


def test_a_skip_takes_back_a_label_that_came_from_another_trial() -> None:
    one = trial("t")
    other = one.model_copy(update={"key": "u"})
    ids = [o.example_id for o in one.outcomes][:2]
    skip = {"type": "skip", "trial": "u", "example_id": ids[0], "metric": "similarity", "labeler": "ana"}
    found = file_of(*given_of(one, ids), skip)
    assert found.of(other, "similarity") == {ids[1]: 1.0} and found.of(one, "similarity") == dict.fromkeys(ids, 1.0)


def test_of_repeated_answers_the_first_is_labelled() -> None:
    one, other = trial("t", right=1.0), trial("u", right=0.0)
    again = tuple(o.model_copy(update={"repeat": 1}) for o in other.outcomes)
    assert answers_of(one.model_copy(update={"outcomes": one.outcomes + again})) == answers_of(one)
    id = one.outcomes[0].example_id
    assert answers_of(one, {id}) == {id: answers_of(one)[id]}


def test_the_hash_of_an_answer_is_of_text_and_calls_alone() -> None:
    call = ToolCall(name="f", arguments={"a": 1, "b": 2})
    one = Completion(text="x", tool_calls=(call,), latency_s=1.0, completion_tokens=3)
    assert answer_hash("e", one) == answer_hash("e", Completion(text="x", tool_calls=(call,), reasoning="hm"))
    others = [
        Completion(text="y", tool_calls=(call,)),
        Completion(text="x"),
        Completion(text="x", tool_calls=(call.model_copy(update={"arguments": {"a": 1}}),)),
        Completion(text="x", tool_calls=(call, call)),
    ]
    assert len({answer_hash("e", one), answer_hash("f", one), *(answer_hash("e", o) for o in others)}) == 6
