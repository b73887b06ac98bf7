"""A sweep runs every candidate as a Ray Tune trial and keeps each result in the ledger the moment it is there.

    outcome = run_sweep(config, dataset, places)      # connects to RAY_ADDRESS or starts Ray here
    outcome.results                                   # [Scored(…), Failed(…), …], finished ones taken from the ledger

Tune places each trial with the CPUs and GPUs the configuration asks for and reuses its processes, so that a base model
is loaded once. What is finished is known from the ledger and not from Tune's state: a killed sweep that is run again
skips finished trials, whoever ran them.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from flywheel_ray import __version__
from flywheel_ray.candidates import Candidate, candidates_of
from flywheel_ray.config import HelixPlatformConfig, LlmJudgeConfig, LocalPlatformConfig, Places, SweepConfig
from flywheel_ray.datasets import Dataset, load
from flywheel_ray.errors import FlywheelError
from flywheel_ray.judge import RubricJudge
from flywheel_ray.ledger import Ledger
from flywheel_ray.progress import Progressed, Quiet, progress_callback
from flywheel_ray.results import Failed, Scored
from flywheel_ray.services import Judge, Platform, Services
from flywheel_ray.text_scoring import EMBEDDING_SIMILARITY, Embed, require
from flywheel_ray.trial import TrialSettings, run_trial, trial_key
from flywheel_ray.values import Value


class SweepOutcome(Value):
    """What a sweep ended as: a result for every candidate, and how many of them had been finished before."""

    results: tuple[Scored | Failed, ...]
    reused: int
    wall_s: float


def judge_of(config: SweepConfig, places: Places | None = None) -> Judge:
    """The judge that the configuration names; connects to nothing until it is asked.

    Args:
        config: the sweep.
        places: where verdicts are kept; None keeps none.
    """
    if not isinstance(config.judge, LlmJudgeConfig):
        return RubricJudge()
    from flywheel_ray.verdicts import llm_judge

    return llm_judge(config.judge, places.runs if places else None)


def platform_of(config: SweepConfig, places: Places) -> Platform:
    """The platform that the configuration names."""
    chosen = config.platform
    if isinstance(chosen, LocalPlatformConfig):
        from flywheel_ray.platforms.local import LocalPlatform

        return LocalPlatform(places.platform, threads=max(1, int(config.resources.cpus)), device=chosen.device)
    settings = chosen.model_dump(exclude={"type"})
    if isinstance(chosen, HelixPlatformConfig):
        from flywheel_ray.platforms.helix import HelixPlatform

        return HelixPlatform(**settings)
    from flywheel_ray.platforms.nemo_v1 import NemoV1Platform

    return NemoV1Platform(**settings)


def resources_of(config: SweepConfig) -> dict[str, float]:
    """What Ray Tune reserves for each trial; GPUs may be fractions."""
    return {"cpu": config.resources.cpus, "gpu": config.resources.gpus}


def settings_of(config: SweepConfig) -> TrialSettings:
    """What all trials of the sweep share."""
    return TrialSettings(
        generation=config.generation,
        max_eval_records=config.max_eval_records,
        repeats=config.repeats,
        judge=judge_of(config).name,
        strictness=config.strictness,
        text_metrics=config.text_metrics,
    )


def embed_of(config: SweepConfig) -> Embed | None:
    """What embeds texts, where a metric needs it. Raises ConfigError where a metric needs what is not installed."""
    require(config.text_metrics)
    if EMBEDDING_SIMILARITY not in config.text_metrics:
        return None
    from flywheel_ray.embeddings import MiniLm

    return MiniLm()


def run_sweep(config: SweepConfig, dataset: Dataset, places: Places, show: Quiet | None = None) -> SweepOutcome:
    """Run every candidate that the ledger has no score for.

    Args:
        config: the sweep.
        dataset: what to train on and evaluate with; its folder is put under `places.datasets` for the trials to read.
        places: shared by all nodes of the cluster (a network folder) where there are several.
        show: where progress goes; None is silent.

    Raises:
        FlywheelError: the platform or the ledger cannot be used, or Ray cannot be started.
    """
    started = time.monotonic()
    settings = settings_of(config)
    ledger = Ledger(places.ledger)
    # What is not installed or cannot be used is said here, before anything starts.
    platform_of(config, places)
    judge_of(config, places)
    embed_of(config)
    dataset.save(places.datasets)
    candidates = {trial_key(c, dataset, settings): c for c in candidates_of(config.search)}
    ledger.put_sweep(dataset.fingerprint, {"config": config.model_dump(mode="json"), "keys": list(candidates)})
    finished = {key for key in candidates if isinstance(ledger.get(dataset.fingerprint, key), Scored)}
    waiting = {key: c for key, c in candidates.items() if key not in finished}
    show = show or Quiet()
    show.start(config.name, candidates, finished)
    crashes: dict[str, str] = {}
    try:
        if waiting:
            crashes = _tune(config, dataset, places, waiting, show)
    finally:
        show.stop()
    results = []
    for key, candidate in candidates.items():
        result = ledger.get(dataset.fingerprint, key)
        if result is None:
            result = Failed(
                key=key,
                candidate=candidate,
                fingerprint=dataset.fingerprint,
                stage="process",
                error=crashes.get(key, "the sweep was stopped before this trial had a result"),
                transient=True,
            )
        results.append(result)
    return SweepOutcome(results=tuple(results), reused=len(finished), wall_s=time.monotonic() - started)


def connect() -> None:
    """Join the cluster named by RAY_ADDRESS (as `ray job submit` sets it), or start Ray on this machine."""
    import ray

    if ray.is_initialized():
        return
    # Ray's coming default; without it every start on a machine without GPUs prints a warning.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        if os.environ.get("RAY_ADDRESS"):
            ray.init(log_to_driver=False, configure_logging=False)
        else:
            # "local": without it Ray would join a cluster that some other user's process has left an address of.
            ray.init("local", include_dashboard=False, log_to_driver=False, configure_logging=False)
    except Exception as error:
        raise FlywheelError(f"Ray cannot be reached or started: {str(error).splitlines()[0]}") from error


def _tune(
    config: SweepConfig, dataset: Dataset, places: Places, waiting: dict[str, Candidate], show: Quiet
) -> dict[str, str]:
    """Run the waiting candidates; returns the last line of the error of each trial that crashed, by key."""
    # Tune's own tables would be written over ours, and so would its advice about disks that are busy for a moment.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_WARN_THRESHOLD_S", "10")
    from ray import tune

    connect()
    task = _Task(config=config, places=places, fingerprint=dataset.fingerprint)

    def trainable(space: dict[str, Any]) -> None:
        task.run(Candidate.model_validate(space["candidate"]))

    tuner = tune.Tuner(
        tune.with_resources(trainable, resources_of(config)),
        param_space={"candidate": tune.grid_search([c.model_dump(mode="json") for c in waiting.values()])},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=config.max_concurrent,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: f"{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name=f"{config.name}-{dataset.fingerprint}-{time.strftime('%Y%m%d-%H%M%S')}",
            storage_path=str((places.runs / "tune").absolute()),
            failure_config=tune.FailureConfig(max_failures=1),
            callbacks=[progress_callback(show)],
            verbose=0,
        ),
    )
    keys = {candidate: key for key, candidate in waiting.items()}
    return {
        keys[Candidate.model_validate(result.config["candidate"])]: str(result.error).strip().splitlines()[-1]
        for result in tuner.fit()
        if result.error is not None and result.config
    }


class _Task(Value):
    """One trial as a worker process runs it: everything it needs, small enough to be sent."""

    config: SweepConfig
    places: Places
    fingerprint: str

    def run(self, candidate: Candidate) -> None:
        from ray import tune

        dataset = _dataset(self.places.datasets / self.fingerprint)
        services = Services(platform=platform_of(self.config, self.places), judge=judge_of(self.config, self.places))
        settings = settings_of(self.config)
        key = trial_key(candidate, dataset, settings)
        report = Progressed(key, tune.report)
        started = time.monotonic()
        result = run_trial(candidate, dataset, services, settings, report, embed_of(self.config))
        wall_s = time.monotonic() - started
        lineage = {"flywheel_ray": __version__, "config": self.config.model_dump(mode="json")}
        Ledger(self.places.ledger).put(result, wall_s=wall_s, lineage=lineage)
        report.finish(result, self.config.leaderboard.metric)


_loaded: dict[Path, Dataset] = {}


def _dataset(folder: Path) -> Dataset:
    """The dataset, read once a worker process: trials of one sweep share it."""
    if folder not in _loaded:
        _loaded.clear()
        _loaded[folder] = load(folder)
    return _loaded[folder]
