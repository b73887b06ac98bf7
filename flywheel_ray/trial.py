"""A trial takes one candidate through its story: choose shots, fine-tune if it asks to, answer, score.

    result = run_trial(candidate, dataset, services, settings)
    # Scored(evaluation 'customized-eval', 200 outcomes, …) or Failed(stage='training', error='…')

It knows Protocols only, so it runs the same in a plain process, under Ray Tune, on the local platform or a real NeMo.
An error of the outside world becomes `Failed` here and nowhere else; errors of our own code are not caught.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence

from pydantic import Field

from flywheel_ray.candidates import Candidate, InContext, Lora
from flywheel_ray.datasets import Dataset, Example
from flywheel_ray.errors import ChatUnavailable, FlywheelError, PlatformError, PlatformUnavailable
from flywheel_ray.judge import JudgeUsage
from flywheel_ray.records import Completion
from flywheel_ray.results import Failed, LossPoint, Outcome, Scored, Stage, TrainingSummary
from flywheel_ray.scoring import SCORER_VERSION, TOOL_METRICS, Score, Strictness, score_tool_calls
from flywheel_ray.services import ChatPrompt, Generation, Platform, Services, Unanswered
from flywheel_ray.shots import choose_shots
from flywheel_ray.text_scoring import Embed, TextMetric, score_texts
from flywheel_ray.values import Value, content_hash


class TrialSettings(Value):
    """What every trial of a sweep shares and what decides its result besides the candidate."""

    generation: Generation = Generation()
    max_eval_records: int | None = Field(default=None, ge=1)
    """Answer at most this many evaluation examples (the first by hash order, the same for all); None means all."""
    repeats: int = Field(default=1, ge=1)
    """Answers to each example, where generation is random; they count as one conversation."""
    judge: str = ""
    """Name of the judge, so that another judge means another key."""
    strictness: Strictness = "exact"
    """Which tool-call arguments count as equal."""
    text_metrics: tuple[TextMetric, ...] = ("exact_text", "token_f1")
    """What is computed for examples without tools, beside the judge's `similarity`."""
    poll_s: float = Field(default=0.5, gt=0)
    """Seconds between looks at a training job; not part of the key."""


class Progress(Value):
    """Where a running trial is; `done` of `total` counts examples while generating."""

    stage: Stage
    done: int = 0
    total: int = 0
    progress: float | None = None
    validation_loss: LossPoint | None = None


OnProgress = Callable[[Progress], None]


def trial_key(candidate: Candidate, dataset: Dataset, settings: TrialSettings) -> str:
    """The name of this trial everywhere: remote job, adapter, ledger folder, serving arm."""
    context = settings.model_dump(mode="json", exclude={"poll_s"})
    return candidate.key(dataset.fingerprint, SCORER_VERSION, context)


def run_trial(
    candidate: Candidate,
    dataset: Dataset,
    services: Services,
    settings: TrialSettings,
    on_progress: OnProgress = lambda progress: None,
    embed: Embed | None = None,
) -> Scored | Failed:
    """Run one trial to its end.

    Args:
        candidate: what to try.
        dataset: the training split feeds shots and fine-tuning, the evaluation split is answered and scored.
        services: the platform and the judge.
        settings: shared by all trials of the sweep.
        on_progress: told about every stage, each new validation loss and each answered batch. An exception it raises
            (Tune stopping the trial) cancels the training job and passes through.
        embed: what `embedding_similarity` is computed with, where the settings ask for it.
    """
    key = trial_key(candidate, dataset, settings)
    stage: Stage = "prompts"

    def enter(name: Stage) -> None:
        nonlocal stage
        stage = name
        on_progress(Progress(stage=name))

    try:
        enter("prompts")
        shots = choose_shots(dataset.train, candidate.adaptation) if isinstance(candidate.adaptation, InContext) else ()
        examples = [e for e in dataset.eval[: settings.max_eval_records] for _ in range(settings.repeats)]
        prompts = [_prompt(candidate, example, shots) for example in examples]
        training = None
        if isinstance(candidate.adaptation, Lora):
            enter("dataset")
            reference = _put_rows(candidate, candidate.adaptation, dataset, services.platform)
            enter("training")
            job_name = training_name(candidate, dataset)
            training = _train(job_name, candidate, reference, services.platform, settings, on_progress)
        enter("hosting")
        adapter = training.adapter if training else None
        with services.platform.chat(candidate.model, adapter, settings.generation) as model:
            enter("generation")
            started = time.perf_counter()
            answers = model.complete(
                prompts, lambda done: on_progress(Progress(stage="generation", done=done, total=len(prompts)))
            )
            evaluation_s = time.perf_counter() - started
        enter("scoring")
        outcomes, judging = score_answers(examples, answers, services, settings, embed)
        return Scored(
            key=key,
            candidate=candidate,
            fingerprint=dataset.fingerprint,
            scorer_version=SCORER_VERSION,
            judge=services.judge.name,
            judging=judging,
            outcomes=outcomes,
            shots=shots,
            training=training,
            evaluation_s=evaluation_s,
        )
    except FlywheelError as error:
        return Failed(
            key=key,
            candidate=candidate,
            fingerprint=dataset.fingerprint,
            stage=stage,
            error=str(error),
            transient=isinstance(error, PlatformUnavailable | ChatUnavailable),
        )


def score_answers(
    examples: Sequence[Example],
    answers: Sequence[Completion | Unanswered],
    services: Services,
    settings: TrialSettings,
    embed: Embed | None = None,
) -> tuple[tuple[Outcome, ...], JudgeUsage]:
    """Score each answer by program and by the judge. An unanswered example keeps its row, unscored, with the reason."""
    pairs = {i: (examples[i], answer) for i, answer in enumerate(answers) if isinstance(answer, Completion)}
    judging = services.judge.judge([e for e, _ in pairs.values()], [a for _, a in pairs.values()])
    judged = dict(zip(pairs, judging.judgements, strict=True))
    spoken = {i: (e.reference.text, a.text) for i, (e, a) in pairs.items() if not e.tools}
    texts = dict(zip(spoken, score_texts(list(spoken.values()), settings.text_metrics, embed), strict=True))
    seen: Counter[str] = Counter()
    outcomes = []
    for i, (example, answer) in enumerate(zip(examples, answers, strict=True)):
        by_program = TOOL_METRICS if example.tools else settings.text_metrics
        metrics = (*by_program, services.judge.metric(example))
        if isinstance(answer, Completion):
            scores: tuple[Score, ...] = (
                score_tool_calls(example.reference, answer, example.tools, settings.strictness)
                if example.tools
                else texts[i]
            )
            scores = (*scores, judged[i].score)
            unscored = {s.metric: s.reason or "unscored" for s in scores if s.value is None}
        else:
            scores, unscored = (), dict.fromkeys(metrics, answer.reason)
        outcomes.append(
            Outcome(
                example_id=example.id,
                repeat=seen[example.id],
                conversation=example.conversation,
                completion=answer if isinstance(answer, Completion) else None,
                scores=dict.fromkeys(metrics) | {s.metric: s.value for s in scores},
                unscored=unscored,
                verdicts=judged[i].verdicts if i in judged else (),
            )
        )
        seen[example.id] += 1
    return tuple(outcomes), judging.usage


def _prompt(candidate: Candidate, example: Example, shots: Sequence[Sequence[dict]]) -> ChatPrompt:
    messages, tools = candidate.prompt(example.messages, example.tools, shots)
    return ChatPrompt(messages=tuple(messages), tools=tuple(tools))


def _put_rows(candidate: Candidate, lora: Lora, dataset: Dataset, platform: Platform) -> str:
    """Give the platform the rows as this candidate's model will see them, under a name made from what decides them."""
    train = dataset.train[: lora.max_train_records]
    if not train:
        raise PlatformError(
            f"Lora needs training records; dataset {dataset.fingerprint} has none. Ingest more logs or drop Lora."
        )

    def seen(example: Example) -> Example:
        prompt = _prompt(candidate, example, ())
        return example.model_copy(update={"messages": prompt.messages, "tools": prompt.tools})

    name = f"{dataset.fingerprint}-{content_hash([lora.prompt, len(train)], 8)}"
    return platform.put_dataset(name, [seen(e) for e in train], [seen(e) for e in dataset.validation])


def _train(
    job_name: str,
    candidate: Candidate,
    reference: str,
    platform: Platform,
    settings: TrialSettings,
    on_progress: OnProgress,
) -> TrainingSummary:
    """Submit (or adopt) the job of that name, follow it, and return its adapter; cancel it if we are stopped."""
    assert isinstance(candidate.adaptation, Lora)
    job = platform.submit_training(job_name, candidate.model, candidate.adaptation, reference)
    try:
        while True:
            status = platform.training_status(job)
            latest = status.validation_losses[-1] if status.validation_losses else None
            on_progress(Progress(stage="training", progress=status.progress, validation_loss=latest))
            if status.finished:
                break
            time.sleep(settings.poll_s)
    except BaseException:
        platform.cancel_training(job)
        raise
    if status.state != "completed":
        raise PlatformError(f"training job {job} {status.state}: {status.error or 'no reason given'}")
    return TrainingSummary(
        job=job,
        adapter=platform.adapter(job),
        train_losses=status.train_losses,
        validation_losses=status.validation_losses,
        train_s=status.train_s,
        train_tokens=status.train_tokens,
        train_records=status.train_records,
    )


def training_name(candidate: Candidate, dataset: Dataset) -> str:
    """The name of the fine-tuning job. It leaves out how answers are generated, scored and judged: another judge means
    another trial, and the same adapter.
    """
    return f"flywheel-{candidate.key(dataset.fingerprint, 'training')}"
