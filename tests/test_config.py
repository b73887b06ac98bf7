"""Every shipped YAML parses as its own type; what is misspelt fails with its path and the likely word."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from flywheel_ray.candidates import Lora, candidates_of
from flywheel_ray.config import DatasetConfig, LlmJudgeConfig, SweepConfig, load
from flywheel_ray.errors import ConfigError
from flywheel_ray.rollout import Rollout
from flywheel_ray.sweep import settings_of

CONFIGS = Path(__file__).parent.parent / "configs"
KINDS = {"datasets": DatasetConfig, "sweeps": SweepConfig, "rollouts": Rollout}


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_file_is_of_its_type(path: Path) -> None:
    load(path, KINDS[path.parent.name])


def test_the_shipped_sweeps_have_the_candidates_their_comments_promise() -> None:
    for name in ("demo", "banking"):
        found = candidates_of(load(CONFIGS / "sweeps" / f"{name}.yaml", SweepConfig).search)
        assert {c.evaluation for c in found} == {"base-eval", "icl-eval", "customized-eval"}
        assert len(found) >= 5 and sum(isinstance(c.adaptation, Lora) for c in found) >= 3


GOOD = """
type: sweep
name: demo
workload: {client_id: acme, workload_id: support}
search:
  models: smollm2-135m
  adaptations:
    - type: zero_shot
    - type: in_context
      shots: [2, 4]
    - type: lora
      rank: [8, 16]
judge: {type: rubric}
resources: {cpus: 1}
"""


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("models: smollm2-135m", "modles: smollm2-135m", "search.modles: unknown key, did you mean 'models'?"),
        ("rank: [8, 16]", "rnak: 8", "search.adaptations.2.rnak: unknown key, did you mean 'rank'?"),
        ("type: lora", "type: lore", "search.adaptations.2"),
        ("shots: [2, 4]", "shots: [two]", "search.adaptations.1.shots.0"),
        (
            "shots: [2, 4]",
            "shots: [0]",
            "search.adaptations.1: shots: input should be greater than or equal to 1 (is 0)",
        ),
        ("shots: [2, 4]", "shots: []", "search.adaptations.1: shots: an empty list leaves no candidate"),
        ("name: demo", "", "name: missing"),
        ("name: demo", "name: a/b", "name: "),
        ("resources: {cpus: 1}", "resources: {cpus: 0}", "resources.cpus: input should be greater than 0 (is 0)"),
        ("judge: {type: rubric}", "judge: {type: llm, url: u}", "judge.model: missing"),
        ("type: sweep", "type: rollout", "type: "),
        ("search:", "search: [", "line"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, before: str, after: str, message: str) -> None:
    path = tmp_path / "sweep.yaml"
    assert before in GOOD
    path.write_text(GOOD.replace(before, after, 1))
    with pytest.raises(ConfigError) as raised:
        config = load(path, SweepConfig)
        candidates_of(config.search)
    assert str(path) in str(raised.value)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("where", "part"),
    [
        ("judge.url", "judge: {type: llm, model: j, url: 'http://user:s3cret@host/v1'}"),
        ("platform.base_url", "platform: {type: helix, base_url: 'http://s3cret@host'}"),
    ],
)
def test_credentials_in_a_url_are_refused_and_not_shown(tmp_path: Path, where: str, part: str) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(GOOD.replace("judge: {type: rubric}\n", "") + part + "\n")
    with pytest.raises(ConfigError) as raised:
        load(path, SweepConfig)
    assert str(raised.value) == f"{path}: {where}: holds a user name or password; leave them out and use api_key_env"
    with pytest.raises(ValidationError, match="use api_key_env") as made:
        LlmJudgeConfig(model="j", url="http://user:s3cret@host/v1")
    assert "s3cret" not in str(made.value)


def test_a_bad_arm_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "rollout.yaml"
    path.write_text(
        "{type: rollout, name: r, client_id: c, workload_id: w, teacher: {url: 'http://t/v1'}, "
        "arms: [{name: a, target: {type: url}}]}"
    )
    with pytest.raises(ConfigError) as raised:
        load(path, Rollout)
    assert str(raised.value) == f"{path}: arms.0.target.url: missing"


def test_what_is_no_mapping_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read: No such file"):
        load(tmp_path / "absent.yaml", SweepConfig)
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ConfigError, match="holds list"):
        load(tmp_path / "list.yaml", SweepConfig)


def test_repeats_of_a_greedy_answer_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(GOOD + "repeats: 3\n")
    with pytest.raises(ConfigError, match="raise the temperature or drop repeats"):
        load(path, SweepConfig)
    path.write_text(GOOD + "repeats: 3\ngeneration: {temperature: 0.7}\n")
    assert settings_of(load(path, SweepConfig)).repeats == 3
