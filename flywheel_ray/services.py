"""The seams: what a trial and the command line need from the outside world, as Protocols.

    services = Services(platform=LocalPlatform(…), judge=RubricJudge())
    run_trial(candidate, dataset, services)

Anything with these methods can stand in; one contract suite per Protocol (`tests/contract_*.py`) runs on every
implementation. References to datasets, jobs and adapters are opaque strings that only the platform reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pydantic import Field

from flywheel_ray.candidates import Lora
from flywheel_ray.datasets import Example
from flywheel_ray.judge import Judging
from flywheel_ray.records import Completion, Record
from flywheel_ray.results import LossPoint
from flywheel_ray.values import Value


class LogQuery(Value):
    """Which records: every field given must match; `since` ≤ timestamp < `until`, in epoch seconds."""

    client_id: str | None = None
    workload_id: str | None = None
    served_by: str | None = None
    rollout: str | None = None
    since: float | None = None
    until: float | None = None


class Refused(Value):
    """A record that a store will not take, ever, and why: its index has another type for a field, say."""

    id: str
    reason: str


class Appended(Value):
    """What an append did: records that are new, records that the store already had, and records it refused."""

    added: int
    duplicates: int
    refused: tuple[Refused, ...] = ()


class LogPart(Value):
    """A share of a query's records, for another thread, process or machine that opens the same store URL to read.

    Small and JSON-serialisable; only a store of the kind that made it reads `state`.
    """

    state: dict[str, Any]


class LogStore(Protocol):
    """Where records are kept. Appending is idempotent by `Record.id`; reading streams and never loads everything.

    Every method may raise StoreUnavailable, after trying for a while: the same call may succeed later.
    """

    def append(self, records: Iterable[Record]) -> Appended:
        """Store records that are not there yet; those the store refuses are returned, and the others stored.

        Where it raises, a store with transactions has stored none of this call's records, any other perhaps some:
        append them again.
        """
        ...

    def scan(self, query: LogQuery) -> Iterator[Record]:
        """Records matching the query, ordered by (timestamp, id), as they were when the scan began.

        What is appended meanwhile is not seen; what is purged meanwhile may be missing, and nothing else is. A scan
        that raises is not resumed but begun again.
        """
        ...

    def parts(self, query: LogQuery, count: int) -> list[LogPart]:
        """Share a scan: together the parts are what `scan` would yield now, each record in exactly one of them.

        At most `count` (≥ 1) parts, fewer where there is little to share; a part may be empty. Ends with `release`.
        """
        ...

    def read(self, part: LogPart) -> Iterator[Record]:
        """The records of a part, ordered by (timestamp, id), with the guarantees of `scan`; may be read repeatedly."""
        ...

    def lines(self, part: LogPart) -> Iterator[bytes]:
        """As `read`, the JSON lines that `records.parse_line` reads: for those who need only some of a record."""
        ...

    def release(self, parts: Iterable[LogPart]) -> None:
        """Let go of what the parts of one `parts` call hold in the store; they cannot be read afterwards."""
        ...

    def purge(self, query: LogQuery) -> int:
        """Delete every record that matches, and say how many were deleted. A purged record may be appended anew."""
        ...

    def count(self, query: LogQuery) -> int:
        """How many records match."""
        ...

    def workloads(self) -> list[tuple[str, str, int]]:
        """Every (client_id, workload_id, number of records), sorted."""
        ...

    def close(self) -> None:
        """Release files and connections; the store is not used afterwards."""
        ...


class ChatPrompt(Value):
    """What a model is asked: chat messages and tools, in the OpenAI shape."""

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()


class Unanswered(Value):
    """A prompt the model gave no answer to (refused by the endpoint, too long, timed out), and why."""

    reason: str


class ChatModel(Protocol):
    """A model that answers prompts."""

    def complete(
        self, prompts: Sequence[ChatPrompt], on_done: Callable[[int], None] | None = None
    ) -> list[Completion | Unanswered]:
        """Answer every prompt, in order.

        Args:
            prompts: what to answer.
            on_done: called with the number answered so far, for progress.

        Raises:
            ChatError, ChatUnavailable: the model as a whole cannot be used; one prompt's failure is `Unanswered`.
        """
        ...


class Generation(Value):
    """How to generate. Temperature 0 is greedy."""

    max_tokens: int = Field(default=128, ge=1)
    temperature: float = Field(default=0.0, ge=0)


class TrainingStatus(Value):
    """A fine-tuning job as its platform tells it; `progress` is in [0, 1], None where the platform does not say."""

    state: Literal["pending", "running", "completed", "failed", "cancelled"]
    progress: float | None = None
    train_losses: tuple[LossPoint, ...] = ()
    validation_losses: tuple[LossPoint, ...] = ()
    train_s: float | None = None
    train_tokens: int | None = None
    train_records: int | None = None
    error: str | None = None

    @property
    def finished(self) -> bool:
        """True when the state will not change any more."""
        return self.state in ("completed", "failed", "cancelled")


class Platform(Protocol):
    """Where models are fine-tuned and answer. Names are ours and deterministic, so every call may be repeated."""

    def put_dataset(self, name: str, train: Sequence[Example], validation: Sequence[Example]) -> str:
        """Store training rows under a name and return a reference; the same name again returns the same reference."""
        ...

    def submit_training(self, name: str, model: str, lora: Lora, dataset: str) -> str:
        """Start fine-tuning and return the job's reference at once. A job of that name is adopted: one in flight or
        completed is not started again; one that failed or was cancelled is.
        """
        ...

    def training_status(self, job: str) -> TrainingStatus:
        """The job's state and its loss series so far."""
        ...

    def cancel_training(self, job: str) -> None:
        """Stop the job; returns when it has stopped using its resources. A finished job is left as it is."""
        ...

    def adapter(self, job: str) -> str:
        """Reference to a completed job's adapter. Raises PlatformError where the job has not completed."""
        ...

    def chat(self, model: str, adapter: str | None, generation: Generation) -> AbstractContextManager[ChatModel]:
        """The base model, or the model with an adapter, ready to answer while the context is open."""
        ...


class Judge(Protocol):
    """Scores completions against references where programs cannot."""

    @property
    def name(self) -> str:
        """What the leaderboard calls this judge; an offline judge says that it is no LLM."""
        ...

    def metric(self, example: Example) -> str:
        """What it scores this example by: `preference` where it compares in pairs, else `tool_calling_correctness`
        where the request had tools and `similarity` where it had none.
        """
        ...

    def judge(self, examples: Sequence[Example], completions: Sequence[Completion]) -> Judging:
        """One judgement for each pair, by `metric`.

        An unreadable or refused verdict is a Score of None with its reason. Raises JudgeError where the judge as a
        whole cannot be used, ChatUnavailable where its endpoint does not answer.
        """
        ...


@dataclass(frozen=True)
class Services:
    """What a trial needs from outside."""

    platform: Platform
    judge: Judge
