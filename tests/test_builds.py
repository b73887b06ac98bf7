"""Builds: what is kept and what counts as the same, which side it falls on for good, and what names the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flywheel_ray.builds import assemble, build, example_of, near_leaks
from flywheel_ray.datasets import NO_TOOL, Dataset, DatasetPolicy, Example, SplitCounts, load, validate
from flywheel_ray.errors import DatasetError
from flywheel_ray.intake import Intake, MemoryRows
from flywheel_ray.near_duplicates import NearDuplicates
from flywheel_ray.records import Record, Rejected, from_hit, parse_line
from flywheel_ray.redaction import Redaction
from flywheel_ray.spill import DiskRows, scratch
from flywheel_ray.splits import SPLITS, Split, SplitPolicy
from tests.values import BANKING

TOOL = {
    "type": "function",
    "function": {
        "name": "route",
        "parameters": {"type": "object", "properties": {"queue": {"enum": ["a", "b", 1]}, "a": {}, "b": {}, "n": {}}},
    },
}
EXACT = DatasetPolicy(split=SplitPolicy(eval_fraction=0.5), near_duplicates=None)


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


def policy(**changes: Any) -> DatasetPolicy:
    split = {k: changes.pop(k) for k in list(changes) if k in SplitPolicy.model_fields}
    return EXACT.model_copy(update={"split": EXACT.split.model_copy(update=split), **changes})


def built(records: list[Record], policy: DatasetPolicy = EXACT, **options: Any) -> Dataset:
    return build(records, policy, client_id="acme", workload_id="support", **options)


def rows(dataset: Dataset) -> dict[str, tuple[Split, Example]]:
    return {e.id: (name, e) for name in SPLITS for e in dataset.split(name)}


def sides(dataset: Dataset) -> dict[str, Split]:
    return {e.conversation: name for name in SPLITS for e in dataset.split(name)}


MANY = [record(f"question {n}", at=n, message=called() if n % 3 else None) for n in range(60)]


def test_only_the_teachers_whole_answers_are_kept_and_all_is_counted() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    others = [
        (record("s", shadow=True, served_by="student", arm="student"), "shadow copy"),
        (record("a", served_by="student", arm="student", rollout="r"), "served by an arm"),
        (record("f", error="http_500", response={}), "failed exchange"),
        (record("t", finish_reason="length"), "truncated answer"),
        (record("c", finish_reason="content_filter"), "content filtered"),
        (record("r", message={"content": None, "refusal": "I cannot."}), "refused answer"),
        (record("m", arm="teacher", message=called("{broken")), "tool arguments are not an object"),
        (record("e", message={"content": " \n"}), "empty answer"),
        (
            record("i", request={"messages": [{"role": "user", "content": [image]}]}),
            "request has images or other media",
        ),
        (record("w", workload_id="other"), "another workload"),
        (record("u", message=called(name="teleport")), "invalid tool call"),
        (record("question 0", at=99, message={"content": "re question 0"}), "duplicate request"),
        (record("question 1", at=99, message=called('{"queue": "b"}')), "other answer to the same request"),
        (Rejected(reason="timestamp is missing"), "rejected: timestamp is missing"),
    ]
    gateway = record("live", exchange_id="x", rollout="r", arm="teacher")
    again = record("question 1", at=3, message=called())  # so that `a` is the majority's answer
    dataset = built([*MANY, *(r for r, _ in others), gateway, again], policy(media="drop"))  # type: ignore[list-item]
    manifest = dataset.manifest
    expected = {reason: 1 for _, reason in sorted(others, key=lambda o: o[1])} | {"duplicate request": 2}
    assert manifest.excluded == expected
    assert manifest.scanned == 76 == manifest.rows.total + sum(manifest.excluded.values())
    assert manifest.conflicting_requests == 1
    assert example_of(gateway).id in rows(dataset)
    assert manifest.rows == SplitCounts(**{name: len(dataset.split(name)) for name in SPLITS})
    assert {tool: counts.total for tool, counts in manifest.tools.items()} == {NO_TOOL: 21, "route": 40}
    assert (manifest.first_timestamp, manifest.last_timestamp) == (1.0, 99.0)
    assert manifest.name == "acme/support"


@pytest.mark.parametrize(
    ("conflicts", "queue", "excluded"),
    [
        ("majority", "a", {"duplicate request": 1, "other answer to the same request": 1}),
        ("latest", "b", {"other answer to the same request": 2}),
        ("drop", None, {"other answer to the same request": 3}),
    ],
)
def test_several_answers_to_one_request(conflicts: str, queue: str | None, excluded: dict[str, int]) -> None:
    given = [record("q", at=at, message=called(json.dumps({"queue": queue}))) for at, queue in enumerate("aab")]
    sure = record("sure")
    for order in (given, given[::-1], [given[1], given[2], given[0]]):
        dataset = built([*order, sure], policy(eval_fraction=1, validation_fraction=0, conflicts=conflicts))
        answers = [e.reference.tool_calls[0].arguments["queue"] for e in dataset.eval if e.reference.tool_calls]  # type: ignore[index]
        assert answers == ([queue] if queue else [])
        assert dataset.manifest.excluded == excluded and dataset.manifest.conflicting_requests == 1
        if queue:
            (example,) = (e for e in dataset.eval if e.reference.tool_calls)
            assert example.timestamp == (1 if queue == "a" else 2)  # the latest record with that answer


def test_a_tie_goes_to_the_latest_and_calls_have_no_order() -> None:
    everything = policy(eval_fraction=1, validation_fraction=0)
    for order in (["a", "b"], ["b", "a"]):
        given = [record("q", at=at, message=called(json.dumps({"queue": q}))) for at, q in enumerate(order)]
        (example,) = built(given, everything).eval
        assert example.reference.tool_calls[0].arguments == {"queue": order[1]}
    two = [{"function": {"name": "route", "arguments": {"queue": q}}} for q in "ab"]
    same = [record("q", at=1, message={"tool_calls": two}), record("q", at=2, message={"tool_calls": two[::-1]})]
    same.append(record("q", at=3, message={"tool_calls": two, "content": "Let me see."}))
    assert built(same, everything).manifest.excluded == {"duplicate request": 2}
    one = [record("q", at=1, message={"tool_calls": two[:1]}), record("q", at=2, message={"tool_calls": two[:1] * 2})]
    assert built(one, everything).manifest.conflicting_requests == 1


def test_what_makes_a_request_another_one() -> None:
    plain = example_of(record("q"))
    same = [
        {"temperature": 0.7, "model": "m2", "user": "u", "max_tokens": 5, "stream": True},
        {"tool_choice": None},
        {"tools": [{"function": dict(reversed(TOOL["function"].items())), "type": "function"}]},  # type: ignore[attr-defined]
        {"tools": None, "functions": [TOOL["function"]]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}], "name": None}]},
    ]
    other = [
        {"tool_choice": "required"},
        {"tools": []},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"messages": [{"role": "user", "content": "Q"}]},
    ]
    assert {example_of(record("q", at=9, request=r)).id for r in same} == {plain.id}
    assert len({plain.id, *(example_of(record("q", request=r)).id for r in other)}) == 5


def test_ids_of_calls_that_a_server_drew_tell_nothing_apart() -> None:
    def step(id: str) -> Record:
        messages = [
            {"role": "user", "content": "q"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": id, "type": "function", "function": {"name": "route", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": id, "content": "42"},
        ]
        return record("", request={"messages": messages})

    one, two = example_of(step("call_af31")), example_of(step("call_0022"))
    assert one == two
    assert one.messages[1]["tool_calls"][0]["id"] == one.messages[2]["tool_call_id"] == "call_1_0"


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


@pytest.mark.parametrize(("mode", "train", "excluded"), [
    ("keep", 2, {}),
    ("drop", 0, {"invalid tool call": 4}),
    ("eval_only", 0, {"invalid tool call, on the training side": 2}),
])  # fmt: skip
def test_invalid_calls(mode: str, train: int, excluded: dict[str, int]) -> None:
    bad = []
    for n in range(400):
        message = called(name="teleport") if n % 2 else called('{"queue": "nowhere"}')
        bad.append(record(f"bad {n}", message=message))
    shares = EXACT.split.shares([example_of(r).conversation for r in bad])
    low, high = (
        [r for r, share in zip(bad, shares, strict=True) if share < 0.5],
        [r for r, share in zip(bad, shares, strict=True) if share > 0.6],
    )
    chosen = [*low[:2], *high[:2]]
    dataset = built([*MANY, *chosen], policy(invalid_calls=mode, class_aware=False))
    assert dataset.manifest.excluded == excluded
    marked = {e.id: e.faults for name in SPLITS for e in dataset.split(name) if e.faults}
    assert len([e for e in dataset.train if e.faults]) == train
    assert set(marked) <= {example_of(r).id for r in chosen}
    assert all(set(faults) <= {"unknown_tool", "schema_violation"} for faults in marked.values())
    assert sum(dataset.manifest.faults.values()) == len(marked)


def test_media_stands_in_the_text_by_its_hash() -> None:
    def asked(url: str) -> Record:
        content = [{"type": "text", "text": "What is this? "}, {"type": "image_url", "image_url": {"url": url}}]
        return record("", request={"messages": [{"role": "user", "content": content}]})

    one, same, other = map(
        example_of, map(asked, ["data:image/png;base64,AAAA", "data:image/jpeg;base64,AAAA", "http"])
    )
    assert one == same != other
    assert str(one.messages[0]["content"]).startswith("What is this? [image_url sha256:")


def test_redaction_is_of_the_policy_and_counted() -> None:
    asked = [
        record(f"I am {who}@corp.com, help", message=called(json.dumps({"a": f"{who}@corp.com"}))) for who in ("a", "b")
    ]
    dataset = built(asked, policy(eval_fraction=1, validation_fraction=0, redaction=Redaction()))
    (example,) = dataset.eval  # what tells them apart is gone
    assert dataset.manifest.redacted == {"email": 4} and dataset.manifest.excluded == {"duplicate request": 1}
    text = str(example.messages[0]["content"])
    assert "corp.com" not in text
    assert str(example.reference.tool_calls[0].arguments["a"]) in text  # type: ignore[index]
    assert dataset.fingerprint != built(asked, policy(eval_fraction=1, validation_fraction=0)).fingerprint


def test_redaction_keeps_conversations_whole() -> None:
    """A later turn may show that a number is a phone's, and redact it where the turn before could not."""
    everything = policy(eval_fraction=1, validation_fraction=0, redaction=Redaction())
    phone = {"type": "function", "function": {"name": "call_back"}}

    def turns(number: str, at: float) -> list[Record]:
        asked = {"role": "user", "content": f"The one that ends so: {number}"}
        more = [asked, {"role": "assistant", "content": "Who are you?"}, {"role": "user", "content": "A customer"}]
        first = record("", at, {"content": "Who are you?"}, {"messages": [asked], "tools": [phone]})
        answer = called(json.dumps({"phone": number}), "call_back")
        return [first, record("", at, answer, {"messages": more, "tools": [phone]})]

    one, other = turns("4124745", 1), turns("4184746", 2)
    dataset = built(one, everything)
    assert len(dataset.eval) == 2 and dataset.manifest.conversations.eval == 1
    assert sum("4124745" in json.dumps(e.messages) for e in dataset.eval) == 1
    both = built([*other, *one], everything)  # the second turns are equal now, and belong where the first was
    assert both.manifest.excluded == {"duplicate request": 1}
    (second,) = (e for e in both.eval if len(e.messages) == 3)
    assert second.conversation == dataset.eval[0].conversation
    validate(both)


NEAR = policy(near_duplicates=NearDuplicates())
QUESTIONS = [
    "where is my new card",
    "why was my transfer declined",
    "how do I unblock my PIN",
    "can I top up by cheque",
]


def test_near_duplicates_go_and_evaluation_rows_stay() -> None:
    asked = [f"{q} please, it has been {n} weeks now" for n, q in enumerate(QUESTIONS * 8)]
    originals = [record(q, at=i, message=called()) for i, q in enumerate(asked)]
    copies = [record(f"{q.upper()}!!", at=100 + i, message=called()) for i, q in enumerate(asked)]
    answered_otherwise = [record(f"{q} ?", at=200 + i, message=called('{"queue": "b"}')) for i, q in enumerate(asked)]
    dataset = built([*originals, *copies, *answered_otherwise], NEAR)
    left_out = dataset.manifest.excluded
    assert set(left_out) == {"near-duplicate", "near-duplicate of an evaluation row"}
    assert sum(left_out.values()) >= len(copies)
    assert dataset.manifest.scanned == dataset.manifest.rows.total + sum(left_out.values())
    exact = rows(built([*originals, *copies, *answered_otherwise]))
    for id, (side, _) in rows(dataset).items():
        assert exact[id][0] == side
    assert dataset.manifest.leak_check.near_duplicates == "none"
    near_leaks(dataset)


def test_a_leak_of_near_duplicates_is_an_error(tmp_path: Path) -> None:
    folder = built([record(f"a question about {n * 7919} apples", message=called()) for n in range(40)], NEAR).save(
        tmp_path
    )
    train, evaluation = ((folder / f"{s}.jsonl").read_bytes().splitlines(True) for s in ("train", "eval"))
    leaked = json.loads(evaluation[0])
    leaked["messages"][0]["content"] += " !"
    dataset = load(folder)
    dataset.lines = lambda names: iter(  # type: ignore[assignment]
        [("train", json.dumps(leaked).encode())] + [("train", r) for r in train[1:]] + [(s, r) for s in ("validation",)
         for r in (folder / "validation.jsonl").read_bytes().splitlines()] + [("eval", r) for r in evaluation]
    )  # fmt: skip
    with pytest.raises(DatasetError, match="1 rows nearly repeat one on another side"):
        near_leaks(dataset)


def test_nothing_usable_names_the_workload_and_the_remedy() -> None:
    with pytest.raises(DatasetError, match=r"no records of workload 'support' of client 'acme'\. Check both names"):
        built([])
    with pytest.raises(
        DatasetError, match=r"no usable record among 2: 1 empty answer, 1 served by an arm\. Widen `since`"
    ):
        built([record("x", message={"content": ""}), record("y", served_by="student", arm="a")])
    with pytest.raises(DatasetError, match=r"has 1 usable records, and none fell on the evaluation side"):
        built([record("x")], policy(eval_fraction=1e-9, validation_fraction=0))
    assert built([record("x")], policy(eval_fraction=0, validation_fraction=0)).manifest.rows.train == 1


def test_the_fingerprint_is_of_content_and_policy() -> None:
    dataset = built(MANY)
    same = built(list(reversed(MANY)), source="elsewhere", query={"since": 0})
    slower = [r.model_copy(update={"timestamp": r.timestamp + 0.5}) for r in MANY]
    assert same.fingerprint == dataset.fingerprint == built(slower).fingerprint and len(dataset.fingerprint) == 16
    changed = [record("question 0", at=0, message={"content": "other"}), *MANY[1:]]
    different = {
        built(changed).fingerprint,
        built(MANY[1:]).fingerprint,
        built(MANY, policy(salt="s")).fingerprint,
    }
    assert len(different | {dataset.fingerprint}) == 4
    # Pinned: another name here would orphan every ledger. It holds on any machine, and through either parser.
    assert dataset.fingerprint == PINNED


PINNED = "a7af5c26cac330b4"


def test_keys_keep_their_order_and_do_not_change_the_fingerprint(tmp_path: Path) -> None:
    one = [record("q", message=called('{"b": 1, "a": 2}'))]
    other = [record("q", message=called('{"a": 2, "b": 1}'))]
    everything = policy(eval_fraction=1, validation_fraction=0)
    dataset = built(one, everything)
    assert dataset.fingerprint == built(other, everything).fingerprint
    (example,) = load(dataset.save(tmp_path)).eval
    assert example.reference.message()["tool_calls"][0]["function"]["arguments"] == '{"b": 1, "a": 2}'
    assert json.dumps(example.tools[0]) == json.dumps(TOOL)


def test_the_previous_dataset_must_be_of_the_same_kind() -> None:
    manifest = built(MANY).manifest
    with pytest.raises(DatasetError, match="was split by another policy"):
        built(MANY, policy(salt="s"), previous=manifest)
    with pytest.raises(DatasetError, match="is of workload acme/support, not of acme/other"):
        build([record("x", workload_id="other")], EXACT, client_id="acme", workload_id="other", previous=manifest)
    again = built(MANY, previous=manifest)
    assert again == built(MANY) and again.manifest.previous == manifest.fingerprint


# ── properties ──────────────────────────────────────────────────────────────

TOOLS = [{"type": "function", "function": {"name": name}} for name in "abcde"]
some_records = st.lists(
    st.builds(
        record,
        st.sampled_from([f"question {n}" for n in range(12)]) | st.text(max_size=6),
        at=st.integers(0, 5).map(float),
        message=st.sampled_from([None, *(called("{}", name) for name in "abcde"), {"content": ""}, {"content": "é😀"}]),
        request=st.sampled_from([{"tools": TOOLS}, {"tools": TOOLS, "tool_choice": "auto"}, {"tools": []}]),
    ),
    min_size=1,
    max_size=25,
)
ALWAYS = [record(f"always {n}") for n in range(8)]
policies = st.sampled_from(
    [
        EXACT,
        policy(near_duplicates=NearDuplicates()),
        policy(eval_records=3, class_aware=True),
        policy(conflicts="drop", invalid_calls="eval_only"),
        policy(redaction=Redaction(), conflicts="latest", validation_fraction=0.3),
    ]
)


@settings(max_examples=120, deadline=None)
@given(some_records, some_records, policies, st.randoms(use_true_random=False))
def test_growth_and_order_move_nothing(
    old: list[Record], new: list[Record], policy: DatasetPolicy, random: Any
) -> None:
    before = built([*ALWAYS, *old], policy)
    mixed = [*ALWAYS, *old]
    random.shuffle(mixed)
    assert built(mixed, policy) == before
    grown = built([*mixed, *new], policy, previous=before.manifest)
    known, now = sides(before), sides(grown)
    assert all(now[c] == side for c, side in known.items() if c in now)
    validate(before)
    validate(grown)
    for dataset in (before, grown):
        for name in SPLITS:
            ids = [e.id for e in dataset.split(name)]
            assert ids == sorted(ids)


@settings(max_examples=80, deadline=None)
@given(some_records, some_records)
def test_later_logs_move_nothing_even_without_the_earlier_dataset(old: list[Record], new: list[Record]) -> None:
    first = [*ALWAYS, *old]
    later = [r.model_copy(update={"timestamp": r.timestamp + 100}) for r in new]
    known = sides(built(first))
    # A conversation that goes on may call other tools than before; `previous` is for that.
    later = [r for r in later if r.completion.text.strip() or r.completion.tool_calls]
    later = [r for r in later if example_of(r).conversation not in known]
    now = sides(built([*first, *later]))
    assert all(now[c] == side for c, side in known.items())


@settings(max_examples=60, deadline=None)
@given(some_records, policies, st.integers(1, 4), st.randoms(use_true_random=False))
def test_parts_give_what_one_process_gives(
    tmp_path_factory: pytest.TempPathFactory, records: list[Record], policy: DatasetPolicy, count: int, random: Any
) -> None:
    records = [*ALWAYS, *records]
    parent = tmp_path_factory.mktemp("parts")
    whole = built(records, policy).save(parent / "whole")
    dealt: list[list[Record]] = [[] for _ in range(count)]
    for one in records:
        random.choice(dealt).append(one)
    with scratch(parent) as folder:
        waiting = [DiskRows(folder / str(i)) if i else MemoryRows() for i in range(count)]
        intakes = [Intake(policy, "acme", "support", rows) for rows in waiting]
        for intake, part in zip(intakes, dealt, strict=True):
            for one in part:
                intake.add(one)
        taken = [intake.taken for intake in intakes]
        parts = assemble(taken, waiting, policy, client_id="acme", workload_id="support").save(parent / "parts")
    assert {p.name: p.read_bytes() for p in parts.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}
    assert not list(parent.glob(".build-*"))


@pytest.mark.skipif(not BANKING.exists(), reason="no shared/data beside the checkout")
def test_real_traffic(tmp_path: Path) -> None:
    records = [r for r in map(parse_line, BANKING.read_bytes().splitlines()) if isinstance(r, Record)]
    exact = DatasetPolicy(split=SplitPolicy(class_aware=False), near_duplicates=None)
    dataset = build(records, exact, client_id="banking-app", workload_id="banking.router")
    assert dataset.manifest.rows == SplitCounts(train=1134, validation=187, eval=306)
    assert dataset.manifest.excluded == {"duplicate request": 2}
    assert load(dataset.save(tmp_path)) == dataset
    validate(dataset)
