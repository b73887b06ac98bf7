"""A trial's story against a platform at the seam: stages, adoption of its job, failures as values, cancelling."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from flywheel_ray.builds import build
from flywheel_ray.candidates import Candidate, InContext, Lora, ZeroShot
from flywheel_ray.datasets import Example
from flywheel_ray.errors import PlatformError, PlatformUnavailable
from flywheel_ray.judge import RubricJudge
from flywheel_ray.records import Completion, Record, ToolCall, from_hit
from flywheel_ray.results import Failed, LossPoint, Scored
from flywheel_ray.services import ChatPrompt, Generation, Services, TrainingStatus, Unanswered
from flywheel_ray.trial import Progress, TrialSettings, run_trial, trial_key
from tests.values import dataset, hit

DATASET = dataset(60)
SETTINGS = TrialSettings(poll_s=0.001)
RIGHT = {e.messages[-1]["content"]: e.reference for e in DATASET.eval}


class Parrot:
    """Answers as the teacher did, but for one question it cannot answer."""

    def complete(
        self, prompts: Sequence[ChatPrompt], on_done: Callable[[int], None] | None = None
    ) -> list[Completion | Unanswered]:
        answers: list[Completion | Unanswered] = [RIGHT[p.messages[-1]["content"]] for p in prompts]
        answers[0] = Unanswered(reason="too long")
        answers[1] = Completion(tool_calls=(ToolCall(name="route", arguments="{"),))
        if on_done:
            on_done(len(prompts))
        return answers


class SeamPlatform:
    """A platform whose training ends as it is told, and which remembers what was asked of it."""

    def __init__(self, ends: TrainingStatus | None = None, hosting: Exception | None = None) -> None:
        self.ends = ends or TrainingStatus(
            state="completed", validation_losses=(LossPoint(step=1, epoch=1.0, value=0.5),), train_s=1.0
        )
        self.hosting = hosting
        self.rows: list[Example] = []
        self.submitted: list[str] = []
        self.cancelled: list[str] = []
        self.prompts: list[ChatPrompt] = []

    def put_dataset(self, name: str, train: Sequence[Example], validation: Sequence[Example]) -> str:
        self.rows = list(train)
        return name

    def submit_training(self, name: str, model: str, lora: Lora, dataset: str) -> str:
        self.submitted.append(name)
        return name

    def training_status(self, job: str) -> TrainingStatus:
        return self.ends

    def cancel_training(self, job: str) -> None:
        self.cancelled.append(job)

    def adapter(self, job: str) -> str:
        return f"adapter of {job}"

    @contextmanager
    def chat(self, model: str, adapter: str | None, generation: Generation) -> Iterator[Parrot]:
        if self.hosting:
            raise self.hosting
        yield Parrot()


def run(candidate: Candidate, platform: SeamPlatform, **settings: Any) -> Scored | Failed:
    return run_trial(
        candidate,
        DATASET,
        Services(platform=platform, judge=RubricJudge()),
        SETTINGS.model_copy(update=settings),
    )


def test_every_example_has_its_outcome_and_unscored_is_not_zero() -> None:
    result = run(Candidate(model="m", adaptation=ZeroShot()), SeamPlatform())
    assert isinstance(result, Scored)
    assert [o.example_id for o in result.outcomes] == [e.id for e in DATASET.eval]
    unanswered, malformed, right = result.outcomes[:3]
    assert set(unanswered.scores.values()) == {None} and unanswered.unscored["function_name_accuracy"] == "too long"
    assert malformed.scores["function_name_and_args_accuracy"] == 0.0
    assert right.scores["function_name_and_args_accuracy"] == 1.0
    n = len(DATASET.eval)
    assert result.mean("function_name_and_args_accuracy") == pytest.approx((n - 2) / (n - 1))


def test_distilled_training_never_sees_the_tools_and_full_does() -> None:
    for prompt, tools in (("distilled", 0), ("full", 1)):
        platform = SeamPlatform()
        result = run(Candidate(model="m", adaptation=Lora(prompt=prompt, max_train_records=5)), platform)
        assert isinstance(result, Scored) and result.training and result.training.validation_losses
        assert len(platform.rows) == 5
        assert {len(row.tools) for row in platform.rows} == {tools}


def test_a_text_workload_is_scored_by_similarity_and_by_program() -> None:
    hits = [hit(i, request={"messages": [{"role": "user", "content": f"Summarise ticket {i}"}]}) for i in range(30)]
    for i, line in enumerate(hits):
        line["response"] = {"choices": [{"message": {"role": "assistant", "content": f"Ticket {i} is about a card"}}]}
    records = [from_hit(line) for line in hits]
    texts = build([r for r in records if isinstance(r, Record)], client_id="acme", workload_id="router")
    answers = {e.messages[-1]["content"]: Completion(text="It is about a card") for e in texts.eval}

    class Terse(Parrot):
        def complete(
            self, prompts: Sequence[ChatPrompt], on_done: Callable[[int], None] | None = None
        ) -> list[Completion | Unanswered]:
            return [answers[p.messages[-1]["content"]] for p in prompts]

    class Platform(SeamPlatform):
        @contextmanager
        def chat(self, model: str, adapter: str | None, generation: Generation) -> Iterator[Parrot]:
            yield Terse()

    services = Services(platform=Platform(), judge=RubricJudge())
    result = run_trial(Candidate(model="m", adaptation=ZeroShot()), texts, services, SETTINGS)
    assert isinstance(result, Scored)
    assert result.metrics() == ("exact_text", "token_f1", "similarity")
    mean = result.mean("similarity")
    assert mean is not None and 0.5 < mean < 1
    assert result.mean("exact_text") == 0.0 and 0.5 < (result.mean("token_f1") or 0) < 1


def test_what_a_trial_scores_by_is_part_of_its_key() -> None:
    candidate = Candidate(model="m", adaptation=ZeroShot())
    settings = (SETTINGS, TrialSettings(strictness="schema"), TrialSettings(text_metrics=("rouge1",)))
    assert len({trial_key(candidate, DATASET, s) for s in settings}) == 3


def test_calls_are_scored_by_the_strictness_that_is_set() -> None:
    class Loud(Parrot):
        def complete(
            self, prompts: Sequence[ChatPrompt], on_done: Callable[[int], None] | None = None
        ) -> list[Completion | Unanswered]:
            calls = (call for p in prompts for call in RIGHT[p.messages[-1]["content"]].tool_calls)
            loud = (ToolCall(name=c.name, arguments={"queue": dict(c.arguments)["queue"].upper()}) for c in calls)
            return [Completion(tool_calls=(call,)) for call in loud]

    class Platform(SeamPlatform):
        @contextmanager
        def chat(self, model: str, adapter: str | None, generation: Generation) -> Iterator[Parrot]:
            yield Loud()

    for strictness, right in (("exact", 0.0), ("case_insensitive", 1.0)):
        result = run(Candidate(model="m", adaptation=ZeroShot()), Platform(), strictness=strictness)
        assert isinstance(result, Scored) and result.mean("function_name_and_args_accuracy") == right


def test_shots_are_kept_with_the_result() -> None:
    result = run(Candidate(model="m", adaptation=InContext(shots=2)), SeamPlatform())
    assert isinstance(result, Scored) and len(result.shots) == 2


@pytest.mark.parametrize(
    ("platform", "stage", "words", "transient"),
    [
        (SeamPlatform(TrainingStatus(state="failed", error="loss is nan")), "training", "loss is nan", False),
        (SeamPlatform(TrainingStatus(state="cancelled")), "training", "cancelled", False),
        (SeamPlatform(hosting=PlatformUnavailable("no answer")), "hosting", "no answer", True),
        (SeamPlatform(hosting=PlatformError("no such model")), "hosting", "no such model", False),
    ],
)
def test_failures_are_values(platform: SeamPlatform, stage: str, words: str, transient: bool) -> None:
    result = run(Candidate(model="m", adaptation=Lora()), platform)
    assert isinstance(result, Failed)
    assert (result.stage, result.transient) == (stage, transient)
    assert words in result.error


def test_errors_of_our_own_are_not_dressed_up() -> None:
    with pytest.raises(ZeroDivisionError):
        run(Candidate(model="m", adaptation=ZeroShot()), SeamPlatform(hosting=ZeroDivisionError()))


def test_a_trial_that_is_stopped_cancels_its_job() -> None:
    class Stop(BaseException):
        pass

    def stop(progress: Progress) -> None:
        if progress.validation_loss:
            raise Stop

    platform = SeamPlatform(TrainingStatus(state="running", validation_losses=(LossPoint(step=1, epoch=1, value=1),)))
    services = Services(platform=platform, judge=RubricJudge())
    with pytest.raises(Stop):
        run_trial(Candidate(model="m", adaptation=Lora()), DATASET, services, SETTINGS, stop)
    assert platform.cancelled == platform.submitted


def test_another_judge_is_another_trial_but_the_same_training_job() -> None:
    candidate = Candidate(model="m", adaptation=Lora())
    other = SETTINGS.model_copy(update={"judge": "another"})
    assert trial_key(candidate, DATASET, SETTINGS) != trial_key(candidate, DATASET, other)
    assert trial_key(candidate, DATASET, SETTINGS) == trial_key(
        candidate, DATASET, SETTINGS.model_copy(update={"poll_s": 9.0})
    )
    first, second = SeamPlatform(), SeamPlatform()
    run(candidate, first)
    run(candidate, second, max_eval_records=5)
    assert first.submitted == second.submitted


def test_repeated_answers_are_one_conversation() -> None:
    """Each example is answered three times, and each answer is scored for itself."""
    three = run_trial(
        Candidate(model="m", adaptation=ZeroShot()),
        DATASET,
        Services(platform=SeamPlatform(), judge=RubricJudge()),
        SETTINGS.model_copy(update={"repeats": 3}),
    )
    assert isinstance(three, Scored)
    assert [o.example_id for o in three.outcomes] == [e.id for e in DATASET.eval for _ in range(3)]
    assert [o.repeat for o in three.outcomes] == [0, 1, 2] * len(DATASET.eval)
    # The first two answers to the first example go wrong, each in its own way; the third does not.
    metric = "function_name_and_args_accuracy"
    assert [o.scores[metric] for o in three.outcomes[:3]] == [None, 0.0, 1.0]
    assert three.outcomes[0].unscored[metric] == "too long"
    assert len({o.conversation for o in three.outcomes[:3]}) == 1
