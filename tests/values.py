"""Small real values that several tests build on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flywheel_ray.builds import build
from flywheel_ray.candidates import Candidate, Lora, ZeroShot
from flywheel_ray.datasets import Dataset, DatasetPolicy, Example
from flywheel_ray.records import Completion, Record, Rejected, ToolCall, from_hit
from flywheel_ray.results import Failed, LossPoint, Outcome, Scored, TrainingSummary
from flywheel_ray.scoring import SCORER_VERSION
from flywheel_ray.splits import SplitPolicy

BANKING = Path(__file__).parents[2] / "shared" / "data" / "banking77_router_12.jsonl"
"""Real traffic, in a folder beside the checkout where there is one; tests that need it say so where there is not."""

QUEUES = ("card_arrival", "pin_blocked", "transfer_fee_charged")
TOOL = {
    "type": "function",
    "function": {
        "name": "route",
        "description": "Send the customer's request to the right queue.",
        "parameters": {
            "type": "object",
            "properties": {"queue": {"type": "string", "enum": list(QUEUES)}},
            "required": ["queue"],
        },
    },
}


def hit(i: int, text: str | None = None, **changes: Any) -> dict[str, Any]:
    """A logged exchange of the workload acme/router: question i, routed by the teacher."""
    queue = QUEUES[i % len(QUEUES)]
    question = text or f"Question {i}: what about {queue.replace('_', ' ')}?"
    message = {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "route", "arguments": f'{{"queue": "{queue}"}}'}}
        ],
    }
    return {
        "timestamp": 1_755_000_000 + i,
        "client_id": "acme",
        "workload_id": "router",
        "request": {"model": "teacher", "messages": [{"role": "user", "content": question}], "tools": [TOOL]},
        "response": {
            "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 20},
        },
        "latency_s": 1.0 + i / 100,
        **changes,
    }


def record(i: int, **changes: Any) -> Record:
    """The record of `hit(i)`."""
    found = from_hit(hit(i, **changes))
    assert not isinstance(found, Rejected), found
    return found


def dataset(records: int = 60, eval_fraction: float = 0.3) -> Dataset:
    """A dataset of the router workload."""
    split = SplitPolicy(eval_fraction=eval_fraction, validation_fraction=0.1, class_aware=False)
    policy = DatasetPolicy(split=split, near_duplicates=None)
    return build([record(i) for i in range(records)], policy, client_id="acme", workload_id="router")


def scored(
    examples: Dataset, candidate: Candidate | None = None, right: float = 0.9, key: str = "k1", latency_s: float = 0.1
) -> Scored:
    """A finished trial that answered the first `right` share of the evaluation split as the teacher did."""
    candidate = candidate or Candidate(model="m", adaptation=ZeroShot())
    cut = round(len(examples.eval) * right)
    training = None
    if isinstance(candidate.adaptation, Lora):
        losses = tuple(LossPoint(step=s, epoch=s / 10, value=1 / (s + 1)) for s in (0, 10, 20))
        training = TrainingSummary(job="j", adapter="a", validation_losses=losses, train_s=12.0)
    return Scored(
        key=key,
        candidate=candidate,
        fingerprint=examples.fingerprint,
        scorer_version=SCORER_VERSION,
        judge="rubric (offline rules, no LLM)",
        outcomes=tuple(_outcome(e, i < cut, latency_s) for i, e in enumerate(examples.eval)),
        training=training,
        evaluation_s=len(examples.eval) * latency_s,
    )


def _outcome(example: Example, right: bool, latency_s: float) -> Outcome:
    call = example.reference.tool_calls[0] if right else ToolCall(name="route", arguments={"queue": "elsewhere"})
    return Outcome(
        example_id=example.id,
        conversation=example.conversation,
        completion=Completion(tool_calls=(call,), latency_s=latency_s, prompt_tokens=30, completion_tokens=10),
        scores={
            "function_name_accuracy": 1.0,
            "function_name_and_args_accuracy": float(right),
            "tool_calling_correctness": float(right),
        },
    )


def failed(examples: Dataset, key: str = "k9") -> Failed:
    """A trial whose training stopped."""
    return Failed(
        key=key,
        candidate=Candidate(model="m", adaptation=Lora()),
        fingerprint=examples.fingerprint,
        stage="training",
        error="out of memory",
    )
