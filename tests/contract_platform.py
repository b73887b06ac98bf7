"""What every `Platform` must do. A module runs the suite by subclassing it and giving the fixtures it asks for.

    class TestLocal(PlatformContract):
        @pytest.fixture(scope="class")
        @classmethod
        def platform(cls, tmp_path_factory): return LocalPlatform(tmp_path_factory.mktemp("platform"))
        @pytest.fixture(scope="class")
        @classmethod
        def model(cls): return "smollm2-135m"

`trained` fine-tunes once a class on twelve rows; the tests that only look share it.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from flywheel_ray.candidates import Lora
from flywheel_ray.datasets import Example
from flywheel_ray.errors import PlatformError
from flywheel_ray.records import Completion, ToolCall
from flywheel_ray.services import ChatPrompt, Generation, Platform, TrainingStatus, Unanswered

LORA = Lora(rank=4, learning_rate=1e-3, epochs=2, batch_size=4, prompt="distilled")
QUESTIONS = (
    ("Where is my new card?", "card_arrival"),
    ("My card has not come yet", "card_arrival"),
    ("The machine swallowed my card", "card_swallowed"),
    ("An ATM kept my card", "card_swallowed"),
    ("Please cancel my transfer", "cancel_transfer"),
    ("I sent money by mistake, stop it", "cancel_transfer"),
)
TOOL = {
    "type": "function",
    "function": {
        "name": "route",
        "description": "Send the request to a queue.",
        "parameters": {
            "type": "object",
            "properties": {"queue": {"type": "string", "enum": ["card_arrival", "card_swallowed", "cancel_transfer"]}},
            "required": ["queue"],
        },
    },
}


def messages_of(question: str) -> tuple[dict[str, str], ...]:
    return ({"role": "system", "content": "Route the message."}, {"role": "user", "content": question})


def examples(count: int) -> list[Example]:
    """`count` rows of a tool-calling workload, all different."""
    found = []
    for i in range(count):
        question, queue = QUESTIONS[i % len(QUESTIONS)]
        text = question if i < len(QUESTIONS) else f"{question} ({i})"
        answer = Completion(tool_calls=(ToolCall(name="route", arguments={"queue": queue}),))
        found.append(
            Example(
                id=f"{i:032x}",
                conversation=f"c{i}",
                timestamp=float(i),
                messages=messages_of(text),
                tools=(TOOL,),
                reference=answer,
            )
        )
    return found


def finished(platform: Platform, job: str, timeout_s: float = 300) -> TrainingStatus:
    """The job's final status; fails the test when it takes longer than `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not (status := platform.training_status(job)).finished:
        assert time.monotonic() < deadline, f"{job} still {status}"
        time.sleep(0.1)
    return status


class PlatformContract:
    """The suite; subclasses give `platform` and `model` fixtures of class scope."""

    @pytest.fixture(scope="class")
    @classmethod
    def dataset(cls, platform: Platform) -> str:
        return platform.put_dataset("contract", examples(12), examples(4))

    @pytest.fixture(scope="class")
    @classmethod
    def trained(cls, platform: Platform, model: str, dataset: str) -> str:
        job = platform.submit_training("contract-trained", model, LORA, dataset)
        status = finished(platform, job)
        assert status.state == "completed", status.error
        return job

    def test_the_same_dataset_twice_is_one(self, platform: Platform, dataset: str) -> None:
        assert platform.put_dataset("contract", examples(12), examples(4)) == dataset

    def test_training_reports_losses_of_every_epoch(self, platform: Platform, trained: str) -> None:
        status = platform.training_status(trained)
        assert status.progress == 1.0
        assert status.train_s is not None and status.train_s > 0
        assert status.train_records in (12, None)
        assert len(status.validation_losses) >= LORA.epochs
        epochs = [point.epoch for point in status.validation_losses]
        assert epochs == sorted(epochs) and epochs[-1] == pytest.approx(LORA.epochs)
        assert status.validation_losses[-1].value < status.validation_losses[0].value

    def test_a_completed_job_is_adopted(self, platform: Platform, model: str, dataset: str, trained: str) -> None:
        before = platform.training_status(trained)
        assert platform.submit_training("contract-trained", model, LORA, dataset) == trained
        assert platform.training_status(trained) == before

    def test_a_cancelled_job_stops_soon_and_can_start_again(self, platform: Platform, model: str, dataset: str) -> None:
        long = LORA.model_copy(update={"epochs": 500})
        job = platform.submit_training("contract-cancelled", model, long, dataset)
        assert platform.submit_training("contract-cancelled", model, long, dataset) == job
        with pytest.raises(PlatformError):
            platform.adapter(job)
        started = time.monotonic()
        platform.cancel_training(job)
        assert time.monotonic() - started < 10
        assert platform.training_status(job).state == "cancelled"
        platform.cancel_training(job)
        with pytest.raises(PlatformError):
            platform.adapter(job)
        assert platform.submit_training("contract-cancelled", model, long, dataset) == job
        assert not platform.training_status(job).finished
        platform.cancel_training(job)

    def test_cancelling_a_completed_job_leaves_it(self, platform: Platform, trained: str) -> None:
        platform.cancel_training(trained)
        assert platform.training_status(trained).state == "completed"

    @pytest.mark.parametrize("with_adapter", [False, True])
    def test_chat_answers_everything_in_order(
        self, platform: Platform, model: str, trained: str, with_adapter: bool
    ) -> None:
        adapter = platform.adapter(trained) if with_adapter else None
        prompts = [ChatPrompt(messages=messages_of(q + " please" * (i % 3))) for i, (q, _) in enumerate(QUESTIONS)]
        seen: list[int] = []
        with platform.chat(model, adapter, Generation(max_tokens=24)) as chat:
            answers = chat.complete(prompts, on_done=seen.append)
            alone = chat.complete([prompts[3]])[0]
        assert len(answers) == len(prompts)
        assert seen[-1] == len(prompts) and seen == sorted(seen)
        assert all(isinstance(a, Completion) and a.latency_s and a.latency_s > 0 for a in answers)
        same = answers[3]
        assert isinstance(alone, Completion) and isinstance(same, Completion)
        assert (alone.text, alone.tool_calls) == (same.text, same.tool_calls)

    def test_a_prompt_that_cannot_be_answered_stands_alone(self, platform: Platform, model: str) -> None:
        long = ChatPrompt(messages=({"role": "user", "content": "word " * 200_000},))
        short = ChatPrompt(messages=messages_of("Where is my card?"))
        with platform.chat(model, None, Generation(max_tokens=2)) as chat:
            answers = chat.complete([long, short])
        assert isinstance(answers[0], Unanswered) and answers[0].reason
        assert isinstance(answers[1], Completion)

    def test_an_unknown_model_is_a_platform_error(self, platform: Platform, tmp_path: Path) -> None:
        with (
            pytest.raises(PlatformError, match="no-such-model"),
            platform.chat("no-such-model", None, Generation()) as chat,
        ):
            chat.complete([ChatPrompt(messages=messages_of("hello"))])

    def test_training_an_unknown_model_fails(self, platform: Platform, dataset: str) -> None:
        try:
            job = platform.submit_training("contract-unknown", "no-such-model", LORA, dataset)
        except PlatformError as error:
            assert "no-such-model" in str(error)
        else:
            status = finished(platform, job)
            assert status.state == "failed" and "no-such-model" in (status.error or "")

    def test_an_unknown_dataset_is_a_platform_error(self, platform: Platform, model: str) -> None:
        with pytest.raises(PlatformError):
            platform.submit_training("contract-no-data", model, LORA, "no-such-dataset")

    def test_an_unknown_job_is_a_platform_error(self, platform: Platform) -> None:
        with pytest.raises(PlatformError):
            platform.training_status("no-such-job")
