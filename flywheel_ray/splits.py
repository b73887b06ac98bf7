"""Splits: which side of a dataset a conversation is on, once and for all.

    policy = SplitPolicy(eval_fraction=0.2)
    sides = settle(policy, conversations, previous=None)     # the rule, settled on what the data needs
    sides.of("9f2c41d07a55e310", first_seen=1755000074.0)    # "train"

The side is a threshold on a salted hash of the conversation, so it needs no memory. Two things do depend on the data:
a wanted number of evaluation rows sets the threshold, and a tool that evaluation would miss brings one of its
conversations along. Both are settled at the first build, stand in the manifest, and are inherited by the next one.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from flywheel_ray.values import Value

Split = Literal["train", "validation", "eval"]
SPLITS: tuple[Split, ...] = ("train", "validation", "eval")


class SplitPolicy(Value):
    """How conversations are dealt to the sides.

    Lowering or raising a fraction moves only what lies between the old threshold and the new one; another `salt` deals
    all conversations anew. What is neither eval nor validation is for training.
    """

    eval_fraction: float = Field(default=0.2, ge=0, le=1)
    validation_fraction: float = Field(default=0.1, ge=0, le=1)
    eval_records: int | None = Field(default=None, ge=1)
    """A wanted number of evaluation rows, instead of `eval_fraction`. The manifest says how many there are."""
    class_aware: bool = True
    """Whether every tool with two conversations or more gets one in evaluation."""
    holdout_since: float | None = None
    """Conversations that begin at this time or later (epoch seconds, or ISO 8601 in YAML) are all for evaluation, and
    nothing from then on is trained on. Have the logs before it complete: one that comes late may show that a
    conversation began earlier."""
    salt: str = "flywheel-1"

    @field_validator("holdout_since", mode="before")
    @classmethod
    def _read_time(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = datetime.fromisoformat(value)
        if isinstance(value, datetime):  # YAML makes one of an unquoted date and time
            return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
        return value

    @model_validator(mode="after")
    def _leave_no_overlap(self) -> SplitPolicy:
        if self.eval_fraction + self.validation_fraction > 1:
            raise ValueError("eval_fraction + validation_fraction is more than 1")
        return self

    def shares(self, conversations: Sequence[str]) -> NDArray[np.float64]:
        """Where each conversation stands between 0 and 1, from its name alone."""
        salt = self.salt.encode("utf-8", "surrogatepass")
        digests = (hashlib.sha256(salt + name.encode("utf-8", "surrogatepass")).digest() for name in conversations)
        first = np.frombuffer(b"".join([digest[:8] for digest in digests]), dtype=">u8")
        return (first >> np.uint64(12)) / 2.0**52  # 52 bits: exact in a float, and below 1


class Conversations(NamedTuple):
    """What the split needs to know of n of them."""

    names: Sequence[str]
    """In ascending order."""
    first_seen: NDArray[np.float64]
    """(n,) time of the first record."""
    rows: NDArray[np.int64]
    """(n,) number of rows."""
    tools: Callable[[int], frozenset[str]]
    """The tools that the rows of one call, by its index: few are asked for."""
    all_tools: frozenset[str]


class Sides(Value):
    """A split policy settled on its data: the whole rule that puts a conversation on a side."""

    policy: SplitPolicy
    eval_fraction: float
    """The threshold in force; another than the policy's where that asks for a number of rows."""
    held_out: dict[str, str] = Field(default_factory=dict)
    """Conversations that are for evaluation because of a tool it would have missed → that tool."""
    settled_until: float | None = None
    """Conversations that began at this time or earlier have their side and keep it."""

    def of(self, conversation: str, first_seen: float) -> Split:
        """The side of a conversation."""
        (side,) = self.all([conversation], np.array([first_seen]))
        return SPLITS[side]

    def all(self, names: Sequence[str], first_seen: NDArray[np.float64]) -> NDArray[np.int8]:
        """The sides of n conversations, as indices into `SPLITS`."""
        share = self.policy.shares(names)
        below = np.array([self.eval_fraction + self._validation_fraction, self.eval_fraction])
        side = (share[:, None] < below).sum(axis=1, dtype=np.int8)
        if self.policy.holdout_since is not None:
            side[first_seen >= self.policy.holdout_since] = _EVAL
        if self.held_out:
            side[[i for i, name in enumerate(names) if name in self.held_out]] = _EVAL
        return side

    @cached_property
    def _validation_fraction(self) -> float:
        # What is asked for in rows may leave less than the policy's fraction.
        return min(self.policy.validation_fraction, 1 - self.eval_fraction)


def settle(policy: SplitPolicy, conversations: Conversations, previous: Sides | None = None) -> Sides:
    """Settle what the policy leaves to the data.

    No record ever changes sides from one build to the next that is given its `Sides` as `previous`. Without it the same
    holds while `eval_records` is not used and new conversations begin after the ones known: tools are provided for in
    order of time, so that later conversations change nothing for earlier ones.

    Args:
        policy: the same as that of `previous`.
        conversations: all of them.
        previous: of the dataset that this one continues.
    """
    if previous is not None:
        fraction = previous.eval_fraction
    elif policy.eval_records is not None:
        fraction = _fraction_of(policy, policy.eval_records, conversations)
    else:
        fraction = policy.eval_fraction
    settled = previous.settled_until if previous else None
    held_out = dict(previous.held_out) if previous else {}
    sides = Sides(policy=policy, eval_fraction=fraction, held_out=held_out, settled_until=settled)
    if policy.class_aware and fraction > 0:
        held_out = held_out | _held_out(sides, conversations)
    until = float(conversations.first_seen.max(initial=-np.inf if settled is None else settled))
    return Sides(
        policy=policy,
        eval_fraction=fraction,
        held_out=held_out,
        settled_until=until if conversations.names else settled,
    )


def _fraction_of(policy: SplitPolicy, wanted: int, conversations: Conversations) -> float:
    """The threshold below which there are as nearly as possible the wanted rows; conversations are not cut."""
    share, rows, before = policy.shares(conversations.names), conversations.rows, 0
    if policy.holdout_since is not None:
        late = conversations.first_seen >= policy.holdout_since
        share, rows, before = share[~late], rows[~late], int(rows[late].sum())
    order = np.lexsort((rows, share))
    # Evaluation rows with the first 0, 1, 2, … conversations, and the thresholds that take so many.
    counts = np.cumsum(np.append(before, rows[order]))
    thresholds = np.append(share[order], 1.0)
    best = int(np.argmin(np.abs(counts - wanted)))
    return float(thresholds[best]) if best else 0.0


def _held_out(sides: Sides, conversations: Conversations) -> dict[str, str]:
    """In order of time: the first conversation after a tool's first one goes to evaluation where none has yet."""
    missing = set(conversations.all_tools)
    seen: Counter[str] = Counter()
    found: dict[str, str] = {}
    for i in np.argsort(conversations.first_seen, kind="stable").tolist():
        if not missing:
            break
        wanting = sorted(conversations.tools(i) & missing)
        if not wanting:
            continue
        seen.update(wanting)
        name, first_seen = conversations.names[i], float(conversations.first_seen[i])
        repeated = [tool for tool in wanting if seen[tool] > 1]
        new = sides.settled_until is None or first_seen > sides.settled_until
        if sides.of(name, first_seen) == "eval":
            missing.difference_update(wanting)
        elif repeated and new:
            found[name] = repeated[0]
            missing.difference_update(wanting)
    return found


_EVAL = SPLITS.index("eval")
