"""A candidate is a model and one way of adapting it to the workload: as it is, with in-context examples, or with LoRA.

    space = SearchSpace(models=("smollm2-135m",), adaptations=(ZeroShot(), LoraSpace(rank=(8, 16))))
    for candidate in candidates_of(space): print(candidate.label, candidate.key(fingerprint))

`Candidate.key` is a hash of everything that decides the result, so it names the remote job, the adapter, the ledger
folder and the serving arm. `prompt: distilled` trains and serves without the tool schemas: they are in the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from flywheel_ray.values import Value, content_hash

BASE_EVAL = "base-eval"
ICL_EVAL = "icl-eval"
CUSTOMIZED_EVAL = "customized-eval"

PromptStyle = Literal["full", "distilled"]


class ZeroShot(Value):
    """The model as it is, with the request's own messages and tools."""

    type: Literal["zero_shot"] = "zero_shot"


class InContext(Value):
    """The model as it is, with `shots` examples from the training split before the conversation."""

    type: Literal["in_context"] = "in_context"
    shots: int = Field(ge=1, le=64)
    max_shot_tokens: int = Field(default=2048, ge=1)
    """Budget for all examples together, in estimated tokens (see `shots.py`)."""
    seed: int = 0


class Lora(Value):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685) by supervised fine-tuning on the training split."""

    type: Literal["lora"] = "lora"
    rank: int = Field(default=16, ge=1)
    alpha: float | None = Field(default=None, gt=0)
    """Scaling numerator; None means 2 × rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    learning_rate: float = Field(default=5e-4, gt=0)
    epochs: int = Field(default=2, ge=1)
    batch_size: int = Field(default=16, ge=1)
    max_train_records: int | None = Field(default=None, ge=1)
    """Train on at most this many records (the first by hash order); None means all."""
    prompt: PromptStyle = "full"
    seed: int = 0

    @property
    def effective_alpha(self) -> float:
        """`alpha`, or its default of 2 × rank."""
        return 2.0 * self.rank if self.alpha is None else self.alpha


Adaptation = Annotated[ZeroShot | InContext | Lora, Field(discriminator="type")]


class Candidate(Value):
    """A model by name (an embedded student, a Hugging Face name, a path, or a NeMo model) and its adaptation."""

    model: str = Field(min_length=1)
    adaptation: Adaptation

    @property
    def evaluation(self) -> str:
        """The name of its evaluation: base-eval, icl-eval or customized-eval."""
        return {"zero_shot": BASE_EVAL, "in_context": ICL_EVAL, "lora": CUSTOMIZED_EVAL}[self.adaptation.type]

    @property
    def label(self) -> str:
        """A short name for people: 'smollm2-135m lora r16 lr0.0005 e2 distilled'."""
        a = self.adaptation
        if isinstance(a, ZeroShot):
            return f"{self.model} zero-shot"
        if isinstance(a, InContext):
            return f"{self.model} {a.shots}-shot" + (f" seed{a.seed}" if a.seed else "")
        parts = [self.model, "lora", f"r{a.rank}", f"lr{a.learning_rate:g}", f"e{a.epochs}"]
        if a.alpha is not None:
            parts.append(f"alpha{a.alpha:g}")
        if a.dropout:
            parts.append(f"do{a.dropout:g}")
        if a.batch_size != Lora.model_fields["batch_size"].default:
            parts.append(f"b{a.batch_size}")
        if a.max_train_records is not None:
            parts.append(f"n{a.max_train_records}")
        if a.prompt != "full":
            parts.append(a.prompt)
        if a.seed:
            parts.append(f"seed{a.seed}")
        return " ".join(parts)

    def key(self, fingerprint: str, scorer_version: str, context: Mapping[str, Any] | None = None) -> str:
        """16 hex digits naming this candidate on this dataset under this scorer.

        `context` holds whatever else decides the result and is not the candidate's own: generation limits, the judge.
        """
        return content_hash([self.model_dump(mode="json"), fingerprint, scorer_version, dict(context or {})])

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        shots: Sequence[Sequence[Mapping[str, Any]]] = (),
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The messages and tools the model sees for a request: the same in training, evaluation and serving.

        Args:
            messages: the request's chat messages.
            tools: the request's tools.
            shots: in-context examples, each a list of messages ending with the assistant's; placed after the leading
                system messages.
        """
        sent = [dict(m) for m in messages]
        if isinstance(self.adaptation, Lora) and self.adaptation.prompt == "distilled":
            return sent, []
        if shots:
            head = next((i for i, m in enumerate(sent) if m.get("role") not in ("system", "developer")), len(sent))
            sent = sent[:head] + [dict(m) for shot in shots for m in shot] + sent[head:]
        return sent, [dict(t) for t in tools]


class Space(Value):
    """A grid over an adaptation's parameters; every point is checked when the space is read, before anything runs."""

    def expand(self) -> Iterator[Any]:
        """Every point of the grid."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _check_every_point(self) -> Self:
        if empty := [name for name in type(self).model_fields if getattr(self, name) == ()]:
            raise ValueError(f"{empty[0]}: an empty list leaves no candidate")
        try:
            list(self.expand())
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = first["loc"][0] if first["loc"] else "point"
            raise ValueError(f"{name}: {first['msg'][:1].lower()}{first['msg'][1:]} (is {first['input']!r})") from None
        return self


class ZeroShotSpace(Space):
    """One candidate a model."""

    type: Literal["zero_shot"] = "zero_shot"

    def expand(self) -> Iterator[ZeroShot]:
        yield ZeroShot()


class InContextSpace(Space):
    """The grid of in-context settings; a scalar in YAML means a list of one."""

    type: Literal["in_context"] = "in_context"
    shots: tuple[int, ...] = (3,)
    max_shot_tokens: tuple[int, ...] = (2048,)
    seed: tuple[int, ...] = (0,)

    def expand(self) -> Iterator[InContext]:
        for shots, budget, seed in product(self.shots, self.max_shot_tokens, self.seed):
            yield InContext(shots=shots, max_shot_tokens=budget, seed=seed)


class LoraSpace(Space):
    """The grid of LoRA settings: every combination of the listed values."""

    type: Literal["lora"] = "lora"
    rank: tuple[int, ...] = (16,)
    alpha: tuple[float | None, ...] = (None,)
    dropout: tuple[float, ...] = (0.0,)
    learning_rate: tuple[float, ...] = (5e-4,)
    epochs: tuple[int, ...] = (2,)
    batch_size: tuple[int, ...] = (16,)
    max_train_records: tuple[int | None, ...] = (None,)
    prompt: tuple[PromptStyle, ...] = ("full",)
    seed: tuple[int, ...] = (0,)

    def expand(self) -> Iterator[Lora]:
        axes = {name: getattr(self, name) for name in type(self).model_fields if name != "type"}
        for values in product(*axes.values()):
            yield Lora(**dict(zip(axes, values, strict=True)))


AdaptationSpace = Annotated[ZeroShotSpace | InContextSpace | LoraSpace, Field(discriminator="type")]


class SearchSpace(Value):
    """Models × adaptations; each adaptation is a grid over its own parameters."""

    models: tuple[str, ...] = Field(min_length=1)
    adaptations: tuple[AdaptationSpace, ...] = Field(min_length=1)


def candidates_of(space: SearchSpace) -> list[Candidate]:
    """Every candidate of the space once, cheapest adaptations first (zero-shot, in-context, LoRA)."""
    order = {"zero_shot": 0, "in_context": 1, "lora": 2}
    found = [
        Candidate(model=model, adaptation=adaptation)
        for model in space.models
        for part in space.adaptations
        for adaptation in part.expand()
    ]
    return sorted(dict.fromkeys(found), key=lambda c: order[c.adaptation.type])
