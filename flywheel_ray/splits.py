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
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, Literal, NamedTuple

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

    def share(self, conversation: str) -> float:
        """Where a conversation stands between 0 and 1, from its name alone."""
        digest = hashlib.sha256((self.salt + conversation).encode("utf-8", "surrogatepass")).hexdigest()
        return int(digest[:13], 16) / 16**13  # 52 bits: exact in a float, and below 1


class Conversation(NamedTuple):
    """What the split needs to know of one: its name, its first record's time, its rows, and the tools they call."""

    name: str
    first_seen: float
    rows: int
    tools: frozenset[str]


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
        since = self.policy.holdout_since
        if conversation in self.held_out or (since is not None and first_seen >= since):
            return "eval"
        share = self.policy.share(conversation)
        if share < self.eval_fraction:
            return "eval"
        return "validation" if share < self.eval_fraction + self._validation_fraction else "train"

    @cached_property
    def _validation_fraction(self) -> float:
        # What is asked for in rows may leave less than the policy's fraction.
        return min(self.policy.validation_fraction, 1 - self.eval_fraction)


def settle(policy: SplitPolicy, conversations: Sequence[Conversation], previous: Sides | None = None) -> Sides:
    """Settle what the policy leaves to the data.

    No record ever changes sides from one build to the next that is given its `Sides` as `previous`. Without it the same
    holds while `eval_records` is not used and new conversations begin after the ones known: tools are provided for in
    order of time, so that later conversations change nothing for earlier ones.

    Args:
        policy: the same as that of `previous`.
        conversations: all of them, in any order.
        previous: of the dataset that this one continues.
    """
    if previous is not None:
        fraction = previous.eval_fraction
    elif policy.eval_records is not None:
        fraction = _fraction_of(policy, conversations)
    else:
        fraction = policy.eval_fraction
    settled = previous.settled_until if previous else None
    held_out = dict(previous.held_out) if previous else {}
    sides = Sides(policy=policy, eval_fraction=fraction, held_out=held_out, settled_until=settled)
    if policy.class_aware and fraction > 0:
        held_out = held_out | _held_out(sides, conversations)
    times = [c.first_seen for c in conversations] + ([settled] if settled is not None else [])
    return Sides(policy=policy, eval_fraction=fraction, held_out=held_out, settled_until=max(times, default=None))


def _fraction_of(policy: SplitPolicy, conversations: Sequence[Conversation]) -> float:
    """The threshold below which there are as nearly as possible the wanted rows; conversations are not cut."""
    wanted = policy.eval_records or 0
    since = policy.holdout_since
    rows = 0
    if since is not None:
        rows = sum(c.rows for c in conversations if c.first_seen >= since)
        conversations = [c for c in conversations if c.first_seen < since]
    best, fraction = abs(rows - wanted), 0.0
    shares = sorted((policy.share(c.name), c.rows) for c in conversations)
    for i, (_, count) in enumerate(shares):
        rows += count
        if abs(rows - wanted) < best:
            best, fraction = abs(rows - wanted), shares[i + 1][0] if i + 1 < len(shares) else 1.0
        if rows >= wanted:
            break
    return fraction


def _held_out(sides: Sides, conversations: Sequence[Conversation]) -> dict[str, str]:
    """In order of time: the first conversation after a tool's first one goes to evaluation where none has yet."""
    missing = set().union(*(c.tools for c in conversations)) if conversations else set()
    seen: Counter[str] = Counter()
    found: dict[str, str] = {}
    for conversation in sorted(conversations, key=lambda c: (c.first_seen, c.name)):
        if not missing:
            break
        wanting = sorted(conversation.tools & missing)
        if not wanting:
            continue
        seen.update(wanting)
        repeated = [tool for tool in wanting if seen[tool] > 1]
        new = sides.settled_until is None or conversation.first_seen > sides.settled_until
        if sides.of(conversation.name, conversation.first_seen) == "eval":
            missing.difference_update(wanting)
        elif repeated and new:
            found[conversation.name] = repeated[0]
            missing.difference_update(wanting)
    return found
