"""Datasets: what is kept, which side it falls on for good, what names it, and that a folder on disk is whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from flywheel_ray.datasets import (
    NO_TOOL,
    SPLITS,
    Dataset,
    Example,
    SplitCounts,
    SplitPolicy,
    build,
    example_of,
    load,
    to_openai_row,
)
from flywheel_ray.errors import DatasetError
from flywheel_ray.records import Completion, Record, Rejected, from_hit, parse_line, to_json_line
from tests.values import BANKING

TOOL = {"type": "function", "function": {"name": "route", "parameters": {"type": "object", "properties": {}}}}


def called(arguments: Any = '{"queue": "a"}', name: str = "route") -> dict[str, Any]:
    return {"tool_calls": [{"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}}]}


def record(
    text: str,
    at: float = 1.0,
    message: dict[str, Any] | None = None,
    request: dict[str, Any] | None = None,
    **fields: Any,
) -> Record:
    finish = fields.pop("finish_reason", "stop")
    outcome = from_hit(
        {
            "client_id": "acme",
            "workload_id": "support",
            "timestamp": at,
            "request": {"messages": [{"role": "user", "content": text}], "tools": [TOOL], **(request or {})},
            "response": {"choices": [{"message": message or {"content": f"re {text}"}, "finish_reason": finish}]},
            **fields,
        }
    )
    assert not isinstance(outcome, Rejected), outcome
    return outcome


def built(records: list[Record], policy: SplitPolicy | None = None) -> Dataset:
    return build(records, policy or SplitPolicy(eval_fraction=0.5), client_id="acme", workload_id="support")


def rows(dataset: Dataset) -> dict[str, tuple[str, Example]]:
    return {e.id: (name, e) for name in SPLITS for e in dataset.split(name)}


PINNED = ["eval", "train", "train", "train", "train", "train", "train", "eval"]
MANY = [record(f"question {n}", at=n, message=called() if n % 3 else None) for n in range(60)]


def test_only_the_teachers_whole_answers_are_kept_and_all_is_counted() -> None:
    others = [
        (record("s", shadow=True, served_by="student", arm="student"), "shadow copy"),
        (record("a", served_by="student", arm="student", rollout="r"), "served by an arm"),
        (record("f", error="http_500", response={}), "failed exchange"),
        (record("t", finish_reason="length"), "truncated answer"),
        (record("c", finish_reason="content_filter"), "content filtered"),
        (record("m", arm="teacher", message=called("{broken")), "tool arguments are not an object"),
        (record("e", message={"content": " \n"}), "empty answer"),
        (
            record("i", request={"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}),
            "request is not only text",
        ),
        (record("w", workload_id="other"), "another workload"),
        (record("question 0", at=99), "duplicate request"),
    ]
    gateway = record("live", exchange_id="x", rollout="r", arm="teacher")
    dataset = built([*MANY, *(r for r, _ in others), gateway])
    manifest = dataset.manifest
    assert manifest.excluded == {reason: 1 for _, reason in sorted(others, key=lambda o: o[1])}
    assert manifest.scanned == 71 == manifest.rows.total + sum(manifest.excluded.values())
    assert example_of(gateway).id in rows(dataset)
    assert manifest.rows == SplitCounts(**{name: len(dataset.split(name)) for name in SPLITS})
    assert {tool: counts.total for tool, counts in manifest.tools.items()} == {NO_TOOL: 21, "route": 40}
    assert (manifest.first_timestamp, manifest.last_timestamp) == (1.0, 99.0)
    assert manifest.name == "acme/support"


def test_the_latest_answer_to_a_request_wins() -> None:
    old, new = record("q", at=1, message=called('{"a": 1}')), record("q", at=2, message=called('{"a": 2}'))
    for order in ([old, new], [new, old]):
        ((_, example),) = rows(built([*order], SplitPolicy(eval_fraction=1, validation_fraction=0))).values()
        assert example.reference.tool_calls[0].arguments == {"a": 2}


def test_what_makes_a_request_another_one() -> None:
    plain = example_of(record("q"))
    same = [
        {"temperature": 0.7, "model": "m2", "user": "u", "max_tokens": 5, "stream": True},
        {"tool_choice": None},
        {
            "tools": [
                {"function": {"parameters": {"properties": {}, "type": "object"}, "name": "route"}, "type": "function"}
            ]
        },
    ]
    other = [
        {"tool_choice": "required"},
        {"tools": []},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"messages": [{"role": "user", "content": "Q"}]},
    ]
    assert {example_of(record("q", at=9, request=r)).id for r in same} == {plain.id}
    assert len({plain.id, *(example_of(record("q", request=r)).id for r in other)}) == 5


def test_steps_of_an_agent_loop_stay_together() -> None:
    records = []
    for n in range(40):
        first = [{"role": "system", "content": f"clock {n}"}, {"role": "user", "content": f"task {n}"}]
        later = [
            {"role": "system", "content": "clock"},
            *first[1:],
            {"role": "tool", "tool_call_id": "c", "content": "42"},
        ]
        records += [record("", request={"messages": m}, message=called()) for m in (first, later)]
    dataset = built(records)
    assert dataset.manifest.rows.total == 80 and dataset.manifest.conversations.total == 40
    groups = [{e.conversation for e in dataset.split(name)} for name in SPLITS]
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]


def test_the_policy_is_a_threshold() -> None:
    names = [str(n) for n in range(20_000)]
    sides = [SplitPolicy(eval_fraction=0.2, validation_fraction=0.1).side(n) for n in names]
    assert abs(sides.count("eval") / 20_000 - 0.2) < 0.01 and abs(sides.count("validation") / 20_000 - 0.1) < 0.01
    wider = SplitPolicy(eval_fraction=0.3, validation_fraction=0.1)
    assert all(wider.side(n) == "eval" for n, side in zip(names, sides, strict=True) if side == "eval")
    assert SplitPolicy(eval_fraction=1, validation_fraction=0).side("x") == "eval"
    assert SplitPolicy(eval_fraction=0, validation_fraction=0).side("x") == "train"
    assert sides != [SplitPolicy(salt="other").side(n) for n in names]
    # Pinned: another answer here would move records between the sides of every dataset that exists.
    assert [SplitPolicy().side(n) for n in "abcdefgh"] == PINNED
    with pytest.raises(ValidationError, match="more than 1"):
        SplitPolicy(eval_fraction=0.8, validation_fraction=0.3)


def test_nothing_usable_names_the_workload_and_the_remedy() -> None:
    with pytest.raises(DatasetError, match=r"no records of workload 'support' of client 'acme'\. Check both names"):
        built([])
    with pytest.raises(
        DatasetError, match=r"no usable record among 2: 1 empty answer, 1 served by an arm\. Widen `since`"
    ):
        built([record("x", message={"content": ""}), record("y", served_by="student", arm="a")])
    with pytest.raises(DatasetError, match=r"has 1 usable records, and none fell on the evaluation side"):
        built([record("x")], SplitPolicy(eval_fraction=1e-9, validation_fraction=0))
    assert built([record("x")], SplitPolicy(eval_fraction=0, validation_fraction=0)).manifest.rows.train == 1


def test_the_fingerprint_is_of_content_and_policy() -> None:
    dataset = built(MANY)
    same = build(
        iter(MANY[::-1]),
        SplitPolicy(eval_fraction=0.5),
        client_id="acme",
        workload_id="support",
        source="elsewhere",
        query={"since": 0},
    )
    assert same.fingerprint == dataset.fingerprint and len(dataset.fingerprint) == 16
    changed = [record("question 0", at=0, message={"content": "other"}), *MANY[1:]]
    different = {
        built(changed).fingerprint,
        built(MANY[1:]).fingerprint,
        built(MANY, SplitPolicy(eval_fraction=0.5, salt="s")).fingerprint,
    }
    assert len(different | {dataset.fingerprint}) == 4


def test_keys_keep_their_order_and_do_not_change_the_fingerprint(tmp_path: Path) -> None:
    one = [record("q", message=called('{"b": 1, "a": 2}'))]
    other = [record("q", message=called('{"a": 2, "b": 1}'))]
    policy = SplitPolicy(eval_fraction=1, validation_fraction=0)
    dataset = built(one, policy)
    assert dataset.fingerprint == built(other, policy).fingerprint
    (example,) = load(dataset.save(tmp_path)).eval
    assert example.reference.message()["tool_calls"][0]["function"]["arguments"] == '{"b": 1, "a": 2}'
    assert json.dumps(example.tools[0]) == json.dumps(TOOL)


def test_a_folder_is_written_whole_and_kept(tmp_path: Path) -> None:
    dataset = built(MANY)
    folder = dataset.save(tmp_path / "new" / "datasets")
    assert folder == tmp_path / "new" / "datasets" / dataset.fingerprint
    assert sorted(p.name for p in folder.iterdir()) == [
        "eval.jsonl",
        "manifest.json",
        "train.jsonl",
        "validation.jsonl",
    ]
    assert load(folder) == dataset
    stamps = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert built(MANY[::-1]).save(folder.parent) == folder
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == stamps
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    folder.rename(tmp_path / "elsewhere")
    assert load(tmp_path / "elsewhere") == dataset


def test_a_damaged_folder_is_an_error(tmp_path: Path) -> None:
    dataset = built(MANY)
    folder = dataset.save(tmp_path)
    whole = {p: p.read_bytes() for p in folder.iterdir()}
    train, manifest = folder / "train.jsonl", folder / "manifest.json"
    other = json.dumps({**json.loads(whole[manifest]), "fingerprint": "0" * 16}).encode()
    for path, data, message in [
        (train, whole[train][:-5], "train.jsonl is not the file that was written"),
        (train, whole[train].replace(b"re question", b"RE question", 1), "train.jsonl is not the file"),
        (manifest, b"{}", "manifest.json is unreadable"),
        (manifest, b"\xff", "manifest.json is unreadable"),
        (manifest, other, "the fingerprint is not that of the files"),
    ]:
        path.write_bytes(data)
        with pytest.raises(DatasetError, match=f"dataset .* is damaged: {message}.* Delete the folder"):
            load(folder)
        if path != manifest:
            with pytest.raises(DatasetError, match="damaged"):
                dataset.save(tmp_path)
        path.write_bytes(whole[path])
    assert load(folder) == dataset
    train.unlink()
    with pytest.raises(DatasetError, match=r"no dataset in .*No such file.*train\.jsonl"):
        load(folder)
    with pytest.raises(DatasetError, match="no dataset in"):
        load(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError, match="cannot write dataset"):
        dataset.save(tmp_path / "file")


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    dataset = built(MANY)
    unwritable = dataset.eval[0].model_copy(update={"timestamp": float("nan")})
    with pytest.raises(ValueError, match="not JSON compliant"):
        dataset.model_copy(update={"eval": (*dataset.eval, unwritable)}).save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_lone_surrogates_do_not_crash(tmp_path: Path) -> None:
    dataset = built([*MANY, record("half \ud83d", message=called({"q\ude00": "\ud83d"}))])
    assert load(dataset.save(tmp_path)) == dataset
    broken = Example(
        id="1",
        conversation="c",
        timestamp=0,
        messages=({"role": "user", "content": "\ud83d"},),
        reference=Completion(text="ok"),
    )
    assert b'"\\ud83d"' in to_json_line(broken.model_dump())


def test_rows_for_openai_end_with_the_reference() -> None:
    text, call = example_of(record("q", request={"tools": []})), example_of(record("q", message=called()))
    assert to_openai_row(text) == {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "re q"}]
    }
    row = to_openai_row(call)
    assert row["tools"] == [TOOL]
    assert row["messages"][-1]["tool_calls"][0]["function"] == {"name": "route", "arguments": '{"queue": "a"}'}


# ── properties ──────────────────────────────────────────────────────────────

some_records = st.lists(
    st.builds(
        record,
        st.sampled_from([f"question {n}" for n in range(12)]) | st.text(max_size=6),
        at=st.integers(0, 5).map(float),
        message=st.sampled_from([None, called(), called({"n": 1}), {"content": ""}, {"content": "é😀"}]),
        request=st.sampled_from([None, {"tool_choice": "auto"}, {"tools": []}]),
    ),
    min_size=1,
    max_size=25,
)
ALWAYS = [record(f"always {n}") for n in range(8)]


@settings(max_examples=150, deadline=None)
@given(some_records, some_records, st.randoms(use_true_random=False))
def test_growth_and_order_move_nothing(old: list[Record], new: list[Record], random: Any) -> None:
    before = built([*ALWAYS, *old])
    mixed = [*ALWAYS, *old]
    random.shuffle(mixed)
    assert built(mixed) == before
    after = rows(built([*mixed, *new]))
    for id, (side, example) in rows(before).items():
        assert after[id][0] == side
        assert after[id][1].conversation == example.conversation
    for name in SPLITS:
        ids = [e.id for e in before.split(name)]
        assert ids == sorted(ids)
        assert ids == [e.id for e in built([*mixed, *new]).split(name) if e.id in set(ids)]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(some_records)
def test_a_dataset_survives_its_folder(tmp_path: Path, records: list[Record]) -> None:
    dataset = built([*ALWAYS, *records])
    loaded = load(dataset.save(tmp_path))
    for name in SPLITS:
        assert loaded.split(name) == dataset.split(name)
    assert loaded.fingerprint == dataset.fingerprint


@pytest.mark.skipif(not BANKING.exists(), reason="no shared/data beside the checkout")
def test_real_traffic(tmp_path: Path) -> None:
    records = [r for r in map(parse_line, BANKING.read_bytes().splitlines()) if isinstance(r, Record)]
    dataset = build(records, client_id="banking-app", workload_id="banking.router")
    assert dataset.manifest.rows == SplitCounts(train=1134, validation=187, eval=306)
    assert dataset.manifest.excluded == {"duplicate request": 2}
    assert load(dataset.save(tmp_path)) == dataset
