"""The YAML files: one schema for each `type:`, one `load()`, and errors that name the file, the key and the remedy.

    config = load("configs/sweeps/demo.yaml", SweepConfig)
    # ConfigError: configs/sweeps/demo.yaml: search.modles: unknown key, did you mean 'models'?

Unknown keys fail. Secrets never stand in a file: a file names the environment variable that holds one. Where things
are kept is not configuration but a place on this machine, so it comes from the command line (`Places`).
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from flywheel_ray.candidates import SearchSpace
from flywheel_ray.datasets import DatasetPolicy
from flywheel_ray.errors import ConfigError
from flywheel_ray.judge import JudgeSettings, Rubrics
from flywheel_ray.leaderboard import LeaderboardSettings
from flywheel_ray.prices import Price, TokenPrice
from flywheel_ray.scoring import Strictness
from flywheel_ray.services import Generation
from flywheel_ray.text_scoring import TextMetric
from flywheel_ray.values import SECRET_GIVEN, EndpointUrl, Value

Config = TypeVar("Config", bound=Value)


class Places(Value):
    """Where this machine keeps what the flywheel makes; everything but the logs lies under `runs`."""

    runs: Path
    store: str

    @property
    def ledger(self) -> Path:
        """Results of trials."""
        return self.runs / "ledger"

    @property
    def datasets(self) -> Path:
        """Dataset folders, by fingerprint."""
        return self.runs / "datasets"

    @property
    def platform(self) -> Path:
        """State of the local platform: its datasets, jobs and adapters."""
        return self.runs / "platform"


class WorkloadName(Value):
    """Whose traffic: the two tags every record carries."""

    client_id: str = Field(min_length=1)
    workload_id: str = Field(min_length=1)


class LocalPlatformConfig(Value):
    """Fine-tune and answer in the processes of this Ray cluster."""

    type: Literal["local"] = "local"
    device: str | None = None
    """A torch device such as "cuda"; None takes a GPU where the trial was given one, else the CPU."""


class HelixPlatformConfig(Value):
    """Fine-tune and answer through NeMo Helix (`/apis`); see `platforms/helix.py` for what has been run."""

    type: Literal["helix"] = "helix"
    base_url: EndpointUrl
    workspace: str = "default"
    backend: str = "automodel"
    api_key_env: str | None = None
    max_seq_length: int = Field(default=4096, ge=1)


class NemoV1PlatformConfig(Value):
    """Fine-tune and answer through NeMo Microservices 25.x (`/v1`), which has three origins."""

    type: Literal["nemo_v1"] = "nemo_v1"
    nemo_url: EndpointUrl
    datastore_url: EndpointUrl
    nim_url: EndpointUrl
    namespace: str = "flywheel"
    num_gpus: int = Field(default=1, ge=1)
    api_key_env: str | None = None
    max_seq_length: int = Field(default=4096, ge=1)


PlatformConfig = Annotated[
    LocalPlatformConfig | HelixPlatformConfig | NemoV1PlatformConfig, Field(discriminator="type")
]


class RubricJudgeConfig(Value):
    """Judge by offline rules; the leaderboard says that it is no LLM."""

    type: Literal["rubric"] = "rubric"


class RubricFiles(Rubrics):
    """The user's own rubrics, each a text file; a relative path starts at the current folder.

    The text is read here and travels with the configuration, so that workers need no file and the ledger keeps it.
    """

    @field_validator("similarity", "tool_calling", "preference", mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return {"path": value, "text": Path(value).read_text(encoding="utf-8")}
        except OSError as error:
            raise ValueError(f"the rubric cannot be read: {error.strerror or error}") from None
        except UnicodeDecodeError:
            raise ValueError("the rubric is not UTF-8 text") from None


class LlmJudgeConfig(JudgeSettings):
    """Judge by a model behind an OpenAI-compatible endpoint; what decides its verdicts is in `JudgeSettings`."""

    model_config = ConfigDict(hide_input_in_errors=True)

    type: Literal["llm"] = "llm"
    url: EndpointUrl
    api_key_env: str | None = None
    """Name of the environment variable that holds the key."""
    rubrics: RubricFiles = RubricFiles()
    timeout_s: float = Field(default=60, gt=0)
    concurrency: int = Field(default=8, ge=1)
    retries: int = Field(default=3, ge=0)
    """Repetitions of a request that met 429, 5xx or no connection."""
    cache: str | None = "verdicts.sqlite"
    """File of verdicts, relative to the folder of runs; null keeps none."""
    price: TokenPrice | None = None
    """Of the judge's tokens, to say what judging cost."""


JudgeConfig = Annotated[RubricJudgeConfig | LlmJudgeConfig, Field(discriminator="type")]


class TrialResources(Value):
    """What Ray reserves for each trial; GPUs may be fractions."""

    cpus: float = Field(default=1, gt=0)
    gpus: float = Field(default=0, ge=0)


class DatasetConfig(Value):
    """A dataset: whose traffic, and what becomes of it."""

    type: Literal["dataset"]
    workload: WorkloadName
    dataset: DatasetPolicy = DatasetPolicy()


class SweepConfig(Value):
    """A sweep: whose traffic, which candidates, what each trial may use, and how the leaderboard ranks them."""

    type: Literal["sweep"]
    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$")
    workload: WorkloadName
    dataset: DatasetPolicy = DatasetPolicy()
    search: SearchSpace
    platform: PlatformConfig = LocalPlatformConfig()
    judge: JudgeConfig = RubricJudgeConfig()
    strictness: Strictness = "exact"
    """Which tool-call arguments count as equal (see `scoring.Strictness`)."""
    text_metrics: tuple[TextMetric, ...] = ("exact_text", "token_f1")
    """What is computed for examples without tools, beside the judge's `similarity`."""
    generation: Generation = Generation()
    max_eval_records: int | None = Field(default=None, ge=1)
    repeats: int = Field(default=1, ge=1)
    """Answers to each evaluation example; more than one needs a temperature above 0."""
    resources: TrialResources = TrialResources()
    max_concurrent: int | None = Field(default=None, ge=1)
    """Trials at a time; None lets the resources decide."""
    leaderboard: LeaderboardSettings = LeaderboardSettings()
    prices: dict[str, Price] = Field(default_factory=dict)
    """Price by model name; "teacher" is the model in production."""

    @model_validator(mode="after")
    def _check_repeats(self) -> SweepConfig:
        if self.repeats > 1 and self.generation.temperature == 0:
            raise ValueError(
                f"repeats is {self.repeats} and generation.temperature 0, which gives the same answer every time; "
                "raise the temperature or drop repeats"
            )
        return self


def load(path: str | Path, kind: type[Config]) -> Config:
    """Read a YAML file as one kind of configuration.

    Raises:
        ConfigError: one line for each thing wrong: the file, the key or line, and what is expected.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text: {error.reason} at byte {error.start}") from None
    try:
        data = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ConfigError(f"{path}: line {line}: not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: holds {type(data).__name__}, not a mapping of keys")
    return parse(data, kind, str(path))


def parse(data: Any, kind: type[Config], where: str) -> Config:
    """Read plain data (a parsed YAML file) as one kind of configuration; errors as `load`."""
    data = _lists(data)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        lines = [f"{where}: {sentence}" for sentence in _sentences(error.errors(include_url=False), data, kind)]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def _lists(data: Any) -> Any:
    """In a search space a scalar is a list of one: `rank: 16` means `rank: [16]`."""
    search = data.get("search") if isinstance(data, dict) else None
    if not isinstance(search, dict):
        return data
    models = search.get("models")
    parts = search.get("adaptations")
    listed = dict(search)
    if isinstance(models, str):
        listed["models"] = [models]
    if isinstance(parts, list):
        listed["adaptations"] = [
            {k: v if k == "type" or isinstance(v, list) else [v] for k, v in part.items()}
            if isinstance(part, dict)
            else part
            for part in parts
        ]
    return {**data, "search": listed}


def _sentences(errors: Sequence[Any], data: Any, kind: type[BaseModel]) -> list[str]:
    """One sentence for each mistake; a misspelt key is one, though pydantic also misses the right one."""
    paths = [_written_path(error["loc"], data) for error in errors]
    near = {
        (*path[:-1], close[0]): path
        for error, path in zip(errors, paths, strict=True)
        if error["type"] == "extra_forbidden" and (close := difflib.get_close_matches(path[-1], _all_keys(kind), n=1))
    }
    meant = {wrong: right[-1] for right, wrong in near.items()}

    def follows(error: Any, path: tuple[str, ...]) -> bool:
        """Whether a mistake is only another's consequence: a bad item also makes its list too short."""
        inside = any(other[: len(path)] == path and other != path for other in paths)
        return (error["type"] == "missing" and path in near) or (error["type"] == "too_short" and inside)

    return [
        _sentence(error, path, meant.get(path))
        for error, path in zip(errors, paths, strict=True)
        if not follows(error, path)
    ]


def _sentence(error: Any, location: tuple[str, ...], meant: str | None) -> str:
    path = ".".join(location)
    if error["type"] == "extra_forbidden":
        return f"{path}: unknown key" + (f", did you mean {meant!r}?" if meant else "")
    if error["type"] == "missing":
        return f"{path}: missing"
    given = error.get("input") if error["type"] != SECRET_GIVEN else None
    shown = f" (is {given!r})" if isinstance(given, str | int | float | bool) else ""
    message = error["msg"].removeprefix("Value error, ")
    return f"{path or 'file'}: {message[:1].lower()}{message[1:]}{shown}"


def _written_path(location: tuple[Any, ...], data: Any) -> tuple[str, ...]:
    """The location as it stands in the file: pydantic adds the tag of a union, which nobody wrote as a key."""
    path = []
    tagged = False
    for part in location:
        if not tagged and isinstance(data, dict) and part not in data and data.get("type") == part:
            tagged = True
            continue
        tagged = False
        path.append(str(part))
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            data = None
    return tuple(path)


def _all_keys(kind: type[BaseModel]) -> list[str]:
    """Every key that stands anywhere in a configuration of this kind."""
    keys: dict[str, None] = {}
    seen: set[type[BaseModel]] = set()

    def visit(annotation: Any) -> None:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            if annotation in seen:
                return
            seen.add(annotation)
            for name, field in annotation.model_fields.items():
                keys[name] = None
                visit(field.annotation)
            return
        for argument in typing.get_args(annotation):
            visit(argument)

    visit(kind)
    return list(keys)
