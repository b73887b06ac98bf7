"""Shots: the same ones for the same rows, spread over the tools, within the budget."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flywheel_ray.candidates import Candidate, InContext
from flywheel_ray.datasets import Example
from flywheel_ray.errors import DatasetError
from flywheel_ray.records import Completion, ToolCall
from flywheel_ray.shots import choose_shots, estimate_tokens, shot_of, shot_tokens


def example(number: int, tool: str | None = None, text: str = "Where is my card?", value: int = 0) -> Example:
    reference = (
        Completion(tool_calls=(ToolCall(name=tool, arguments={"v": value}),))
        if tool
        else Completion(text=f"re {number}")
    )
    return Example(
        id=f"{number:032x}",
        conversation=str(number),
        timestamp=number,
        messages=({"role": "system", "content": "Be brief."}, {"role": "user", "content": f"{number} {text}"}),
        reference=reference,
    )


TRAIN = [
    *(example(n, "a", value=n % 3) for n in range(10)),
    *(example(n, "b") for n in range(10, 15)),
    *(example(n) for n in range(15, 17)),
]


def tools_of(shots: tuple[tuple[dict, ...], ...]) -> list[str]:
    return [s[-1]["tool_calls"][0]["function"]["name"] if "tool_calls" in s[-1] else "-" for s in shots]


def test_tools_take_turns_the_most_frequent_first() -> None:
    shots = choose_shots(TRAIN, InContext(shots=7, max_shot_tokens=4096))
    assert tools_of(shots) == ["a", "b", "-", "a", "b", "-", "a"]
    arguments = [s[-1]["tool_calls"][0]["function"]["arguments"] for s in shots if s[-1].get("tool_calls")]
    assert len({arguments[0], arguments[2], arguments[4]}) == 3  # answers of one tool differ


def test_a_shot_is_the_exchange_without_instructions() -> None:
    shot = shot_of(example(1, "a"))
    assert [m["role"] for m in shot] == ["user", "assistant"]
    assert shot[-1] == example(1, "a").reference.message()


def test_shots_go_after_the_system_message() -> None:
    adaptation = InContext(shots=2)
    messages, _ = Candidate(model="m", adaptation=adaptation).prompt(
        TRAIN[0].messages, (), choose_shots(TRAIN, adaptation)
    )
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant", "user"]


def test_order_does_not_matter_and_the_seed_does() -> None:
    mixed = TRAIN[:]
    random.Random(3).shuffle(mixed)
    assert choose_shots(mixed, InContext(shots=4)) == choose_shots(TRAIN, InContext(shots=4))
    assert len({str(choose_shots(TRAIN, InContext(shots=4, seed=seed))) for seed in range(5)}) > 1


def test_fewer_shots_are_the_first_of_more() -> None:
    assert choose_shots(TRAIN, InContext(shots=2)) == choose_shots(TRAIN, InContext(shots=5))[:2]


def test_long_examples_wait_behind_short_ones() -> None:
    train = [example(n, "a", text="word " * (200 if n % 2 else 1)) for n in range(10)]
    shots = choose_shots(train, InContext(shots=4, max_shot_tokens=4096))
    assert all(shot_tokens(s) < 100 for s in shots)


def test_no_training_example_fits() -> None:
    with pytest.raises(DatasetError, match=r"fits into max_shot_tokens=5: the shortest takes about \d+\. Raise"):
        choose_shots(TRAIN, InContext(shots=1, max_shot_tokens=5))
    with pytest.raises(DatasetError, match="need training records; there are none"):
        choose_shots([], InContext(shots=1))
    only_system = example(1).model_copy(update={"messages": ({"role": "system", "content": "x"},)})
    with pytest.raises(DatasetError, match="there are none"):
        choose_shots([only_system], InContext(shots=1))


def test_more_than_there_are() -> None:
    assert len(choose_shots(TRAIN, InContext(shots=64, max_shot_tokens=100_000))) == len(TRAIN)


def test_estimates() -> None:
    assert [estimate_tokens(t) for t in ("", "a", "abcd", "abcde", "日本語", "\ud83d")] == [0, 1, 1, 2, 3, 1]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["a", "b", None]), st.text(max_size=300)), min_size=1, max_size=20),
    st.integers(1, 10),
    st.integers(1, 400),
    st.integers(0, 3),
)
def test_shots_stay_within_number_and_budget(
    rows: list[tuple[str | None, str]], shots: int, budget: int, seed: int
) -> None:
    train = [example(n, tool, text) for n, (tool, text) in enumerate(rows)]
    adaptation = InContext(shots=shots, max_shot_tokens=budget, seed=seed)
    try:
        chosen = choose_shots(train, adaptation)
    except DatasetError:
        assert all(shot_tokens(shot_of(e)) > budget for e in train)
        return
    assert 1 <= len(chosen) <= shots
    assert sum(map(shot_tokens, chosen)) <= budget
    assert len({str(s) for s in chosen}) == len(chosen)
