"""Both NeMo platforms against stand-in servers: the Platform contract, adoption, faults, and the traps of each API."""

from __future__ import annotations

import json
import pickle
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from flywheel_ray.datasets import Example
from flywheel_ray.errors import PlatformError, PlatformUnavailable
from flywheel_ray.platforms._nemo import NAME_LIMIT, entity_name, jsonl, sft_row
from flywheel_ray.platforms.helix import HelixPlatform
from flywheel_ray.platforms.nemo_v1 import NemoV1Platform
from flywheel_ray.records import Completion, ToolCall
from flywheel_ray.services import ChatPrompt, Generation, Platform
from tests.contract_platform import LORA, PlatformContract, examples, finished
from tests.nemo_servers import LONG_EPOCHS, NAME, HelixServer, NemoV1Server

pytestmark = pytest.mark.slow

FAST: dict[str, Any] = {
    "retries": 2,
    "backoff_s": 0.01,
    "timeout_s": 5,
    "poll_s": 0.01,
    "cancel_timeout_s": 2,
    "hosting_timeout_s": 0.3,
}
LONG = LORA.model_copy(update={"epochs": LONG_EPOCHS})
TINY, LLAMA = "tiny-base", "meta/llama-3.2-1b-instruct"
HI = ChatPrompt(messages=({"role": "user", "content": "hi"},))
JOBS = "/jobs"


def helix(server: HelixServer, **changes: Any) -> HelixPlatform:
    return HelixPlatform(server.url, **FAST | changes)


def nemo_v1(server: NemoV1Server, **changes: Any) -> NemoV1Platform:
    return NemoV1Platform(f"{server.url}/nemo", f"{server.url}/store", f"{server.url}/nim", **FAST | changes)


class NemoContract(PlatformContract):
    """The contract but for one thing: NeMo keeps a cancelled job under its name, so a new start has a new reference."""

    def test_a_cancelled_job_stops_soon_and_can_start_again(self, platform: Platform, model: str, dataset: str) -> None:
        job = platform.submit_training("contract-cancelled", model, LONG, dataset)
        assert platform.submit_training("contract-cancelled", model, LONG, dataset) == job
        with pytest.raises(PlatformError, match="no adapter"):
            platform.adapter(job)
        platform.cancel_training(job)
        assert platform.training_status(job).state == "cancelled"
        platform.cancel_training(job)
        with pytest.raises(PlatformError, match="cancelled"):
            platform.adapter(job)
        again = platform.submit_training("contract-cancelled", model, LONG, dataset)
        assert again != job and not platform.training_status(again).finished
        assert platform.submit_training("contract-cancelled", model, LONG, dataset) == again
        platform.cancel_training(again)


class TestHelix(NemoContract):
    @pytest.fixture(scope="class", params=["automodel", "raycpu"])
    @classmethod
    def platform(cls, request: pytest.FixtureRequest) -> Iterator[HelixPlatform]:
        with HelixServer() as server:
            yield helix(server, backend=request.param)

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls) -> str:
        return TINY


class TestNemoV1(NemoContract):
    @pytest.fixture(scope="class")
    @classmethod
    def platform(cls) -> Iterator[NemoV1Platform]:
        with NemoV1Server() as server:
            yield nemo_v1(server)

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls) -> str:
        return LLAMA


class Rig:
    """A platform, its server and what they call a base model."""

    def __init__(
        self, server: HelixServer | NemoV1Server, platform: HelixPlatform | NemoV1Platform, model: str
    ) -> None:
        self.server, self.platform, self.model = server, platform, model

    def dataset(self) -> str:
        return self.platform.put_dataset("3f9a-rows", examples(12), examples(4))


@pytest.fixture(scope="module")
def running_helix() -> Iterator[HelixServer]:
    with HelixServer() as server:
        yield server


@pytest.fixture(scope="module")
def running_v1() -> Iterator[NemoV1Server]:
    with NemoV1Server() as server:
        yield server


@pytest.fixture
def helix_server(running_helix: HelixServer) -> HelixServer:
    running_helix.reset()
    return running_helix


@pytest.fixture
def v1_server(running_v1: NemoV1Server) -> NemoV1Server:
    running_v1.reset()
    return running_v1


@pytest.fixture(params=["helix", "nemo_v1"])
def rig(request: pytest.FixtureRequest, helix_server: HelixServer, v1_server: NemoV1Server) -> Rig:
    if request.param == "helix":
        return Rig(helix_server, helix(helix_server), TINY)
    return Rig(v1_server, nemo_v1(v1_server), LLAMA)


# ── both ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_second_submission_posts_nothing(rig: Rig) -> None:
    dataset = rig.dataset()
    job = rig.platform.submit_training("once", rig.model, LONG, dataset)
    other = pickle.loads(pickle.dumps(rig.platform))  # as another process would
    assert other.submit_training("once", rig.model, LONG, dataset) == job
    assert rig.server.count("POST", JOBS) == 1


def test_a_job_that_was_taken_although_the_answer_was_lost_is_adopted(rig: Rig) -> None:
    dataset = rig.dataset()
    rig.server.fail("POST", JOBS, 502, after=True)
    job = rig.platform.submit_training("lost", rig.model, LONG, dataset)
    assert len(rig.server.jobs) == 1
    assert not rig.platform.training_status(job).finished


def test_a_dataset_that_is_there_is_not_sent_again(rig: Rig) -> None:
    rig.dataset()
    before = len(rig.server.requests)
    rig.dataset()
    assert not [r for r in rig.server.requests[before:] if r[0] == "PUT" or r[1].endswith("/commit/main")]


def test_an_upload_that_broke_off_is_finished(rig: Rig) -> None:
    broken = "-/train.jsonl" if isinstance(rig.server, HelixServer) else "/commit/main"
    rig.server.fail("PUT" if isinstance(rig.server, HelixServer) else "POST", broken, 503, times=3)
    with pytest.raises(PlatformUnavailable, match="503"):
        rig.dataset()
    dataset = rig.dataset()
    job = rig.platform.submit_training("after", rig.model, LORA, dataset)
    assert finished(rig.platform, job).state == "completed"


def test_a_service_that_is_away_for_a_moment_is_asked_again(rig: Rig) -> None:
    rig.server.fail("POST", "", 503, times=2)
    dataset = rig.dataset()
    rig.server.fail("GET", "", 429, times=1)
    job = rig.platform.submit_training("moment", rig.model, LORA, dataset)
    rig.server.fail("GET", "/status", 500, times=2)
    assert rig.platform.training_status(job).state in ("pending", "running")


def test_a_service_that_stays_away_is_unavailable(rig: Rig) -> None:
    job = rig.platform.submit_training("away", rig.model, LORA, rig.dataset())
    rig.server.fail("GET", "/status", 503, times=99)
    with pytest.raises(
        PlatformUnavailable, match=r"GET .*/status at .* answered 503: come back later after 3 attempts"
    ):
        rig.platform.training_status(job)


def test_a_refusal_says_what_the_service_said_and_is_not_repeated(rig: Rig) -> None:
    dataset = rig.dataset()
    said = [{"type": "extra_forbidden", "loc": ["body", "spec", "typo"], "msg": "Extra inputs are not permitted"}]
    rig.server.fail("POST", JOBS, 422, times=99, detail=said)
    with pytest.raises(PlatformError) as caught:
        rig.platform.submit_training("refused", rig.model, LORA, dataset)
    assert not isinstance(caught.value, PlatformUnavailable)
    text = str(caught.value)
    assert "POST /" in text and "422" in text and "body.spec.typo: Extra inputs are not permitted" in text
    assert rig.server.count("POST", JOBS) == 1


def test_nobody_listening_is_unavailable() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    started = time.monotonic()
    for platform in (HelixPlatform(url, **FAST), NemoV1Platform(url, url, url, **FAST)):
        with pytest.raises(PlatformUnavailable, match="no answer"):
            platform.put_dataset("d", examples(2), [])
        with pytest.raises(PlatformUnavailable, match="no answer"):
            platform.training_status("job")
    assert time.monotonic() - started < 3


@pytest.mark.parametrize("url", ["nemo:8080", "http://", "ftp://nemo"])
def test_a_url_that_is_none_is_a_platform_error(url: str) -> None:
    with pytest.raises(PlatformError, match="http://nemo:8080"):
        HelixPlatform(url, **FAST).training_status("job")


def test_what_answers_but_is_no_nemo_is_a_platform_error(rig: Rig) -> None:
    rig.server.fail("GET", "/status", 200, times=99)
    rig.server.faults[-1]["body"] = ["hello"]
    with pytest.raises(PlatformError, match="no JSON object"):
        rig.platform.training_status("job")


def test_a_job_that_failed_says_why_and_can_be_started_again(rig: Rig) -> None:
    dataset = rig.dataset()
    rows = rig.server.filesets if isinstance(rig.server, HelixServer) else rig.server.repositories
    files = next(iter(rows.values()))
    whole, path = dict(files), next(p for p in files if "train" in p)
    files[path] = b'{"messages": [{"role": "user", "content": null}]}\n'
    job = rig.platform.submit_training("fails", rig.model, LORA, dataset)
    status = finished(rig.platform, job)
    assert status.state == "failed" and "bad message" in (status.error or "")
    with pytest.raises(PlatformError, match="failed"):
        rig.platform.adapter(job)
    files.update(whole)
    again = rig.platform.submit_training("fails", rig.model, LORA, dataset)
    assert again != job
    assert finished(rig.platform, again).state == "completed"
    assert rig.platform.adapter(again)


def test_a_state_of_another_version_is_named(rig: Rig) -> None:
    job = rig.platform.submit_training("odd", rig.model, LORA, rig.dataset())
    rig.server.fail("GET", "/status", 200, status_word="x")
    rig.server.faults[-1]["body"] = {"status": "ready-ish", "name": job}
    with pytest.raises(PlatformError, match="ready-ish"):
        rig.platform.training_status(job)


def test_cancelling_a_job_that_does_not_stop_says_so(rig: Rig) -> None:
    job = rig.platform.submit_training("stubborn", rig.model, LONG, rig.dataset())
    rig.platform.cancel_timeout_s = 0.1
    rig.server.fail("POST", "/cancel", 200)
    with pytest.raises(PlatformError, match="still runs"):
        rig.platform.cancel_training(job)


def test_a_whole_alpha_is_asked_for(rig: Rig) -> None:
    with pytest.raises(PlatformError, match=r"12\.5"):
        rig.platform.submit_training("alpha", rig.model, LORA.model_copy(update={"alpha": 12.5}), rig.dataset())


def test_a_key_is_sent_and_never_shown(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.server.token = "s3cret"
    monkeypatch.setenv("NEMO_KEY", "s3cret")
    keys = {"api_key_env": "NEMO_KEY"}
    if isinstance(rig.server, HelixServer):
        platform: Platform = helix(rig.server, **keys)
    else:
        platform = nemo_v1(rig.server, **keys, datastore_token_env="NEMO_KEY", nim_api_key_env="NEMO_KEY")
    platform.put_dataset("d", examples(2), [])
    with platform.chat(rig.model, None, Generation()) as model:
        assert isinstance(model.complete([HI])[0], Completion)
    monkeypatch.setenv("NEMO_KEY", "wr0ng")
    with pytest.raises(PlatformError, match="401") as caught:
        platform.training_status("job")
    assert "wr0ng" not in str(caught.value) and "bad credentials" in str(caught.value)
    monkeypatch.delenv("NEMO_KEY")
    with pytest.raises(PlatformError, match="NEMO_KEY"):
        platform.training_status("job")


# ── rows and names ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_rows_have_objects_as_arguments_and_text_as_content() -> None:
    history: list[dict[str, Any]] = [
        {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": " brief."}]},
        {"role": "user", "content": "weather?\u2028now", "name": None},
        {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    reference = Completion(tool_calls=(ToolCall(name="get_time", arguments={"tz": "UTC"}),))
    example = Example(id="1", conversation="c", timestamp=0, messages=tuple(history), reference=reference)
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}},
        {"id": "call_0", "type": "function", "function": {"name": "get_time", "arguments": {"tz": "UTC"}}},
    ]
    assert sft_row(example) == {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "weather?\u2028now"},
            {"role": "assistant", "content": "", "tool_calls": calls[:1]},
            {"role": "tool", "content": "sunny", "tool_call_id": "c1"},
            {"role": "assistant", "content": "", "tool_calls": calls[1:]},
        ]
    }
    assert [json.loads(line) for line in jsonl([example]).decode().splitlines()] == [sft_row(example)]


def test_names_are_kept_where_they_can_be_and_never_collide() -> None:
    assert entity_name("flywheel-5a1f.2") == "flywheel-5a1f.2"
    odd = [
        "3f9a0c2d41b7e655-0b12",
        "Support",
        "support!",
        "a--b",
        "a",
        "é",
        "x-",
        "meta/llama",
        "n" * 90,
        "n" * 91,
        "-",
    ]
    names = [entity_name(name) for name in odd]
    assert len(set(names)) == len(odd)
    assert all(NAME.match(name) and len(name) <= NAME_LIMIT for name in names)


# ── Helix ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_helix_gets_the_candidate_in_each_backends_own_words(helix_server: HelixServer) -> None:
    lora = LORA.model_copy(update={"dropout": 0.1, "seed": 7, "batch_size": 16})
    for backend in ("automodel", "unsloth"):
        platform = helix(helix_server, backend=backend, micro_batch_size=2)
        dataset = platform.put_dataset("rows", examples(12), examples(4))
        platform.submit_training(f"words-{backend}", TINY, lora, dataset)
    automodel, unsloth = (body["spec"] for body in helix_server.bodies("POST", JOBS))
    assert automodel["dataset"] == {"training": "default/rows"}
    assert automodel["training"]["lora"] == {"rank": 4, "alpha": 8, "dropout": 0.1}
    assert automodel["batch"] == {"global_batch_size": 16, "micro_batch_size": 2}
    assert automodel["schedule"]["seed"] == 7 and automodel["optimizer"] == {"learning_rate": 1e-3}
    assert unsloth["dataset"]["validation_path"] == "default/rows" and unsloth["dataset"]["apply_chat_template"]
    assert unsloth["batch"] == {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8}
    with pytest.raises(PlatformError, match="does not divide"):
        helix(helix_server, micro_batch_size=3).submit_training("odd", TINY, lora, dataset)


def test_helix_without_validation_rows_names_none(helix_server: HelixServer) -> None:
    platform = helix(helix_server, backend="unsloth")
    dataset = platform.put_dataset("rows", examples(4), [])
    assert list(helix_server.filesets["rows"]) == ["train.jsonl"]
    platform.submit_training("job", TINY, LORA, dataset)
    assert "validation_path" not in helix_server.bodies("POST", JOBS)[0]["spec"]["dataset"]


def test_helix_shows_losses_of_the_training_step_where_the_job_has_none(helix_server: HelixServer) -> None:
    helix_server.details_at = "task"
    platform = helix(helix_server)
    job = platform.submit_training("job", TINY, LORA, platform.put_dataset("rows", examples(4), examples(2)))
    seen = [platform.training_status(job) for _ in range(4)]
    assert [s.state for s in seen] == ["pending", "pending", "running", "running"]
    assert [s.progress for s in seen] == [None, None, 0.5, 1.0]
    assert [(p.step, p.epoch) for p in seen[-1].validation_losses] == [(5, 1.0), (10, 2.0)]


def test_helix_reaches_an_adapter_by_its_own_route_or_by_its_provider(helix_server: HelixServer) -> None:
    platform = helix(helix_server)
    job = platform.submit_training("job", TINY, LORA, platform.put_dataset("job", examples(4), examples(2)))
    finished(platform, job)
    adapter = platform.adapter(job)
    assert adapter == "default/job-lora"
    with platform.chat(TINY, adapter, Generation(max_tokens=5)) as model:
        answer = model.complete([HI])[0]
    assert isinstance(answer, Completion) and answer.text == "default--job-lora: hi"
    helix_server.virtual_models.add(adapter)
    with platform.chat(TINY, adapter, Generation(max_tokens=5)) as model:
        answer = model.complete([HI])[0]
    assert isinstance(answer, Completion) and answer.text == "default/job-lora: hi"
    assert helix_server.bodies("POST", "/chat/completions")[-1]["max_tokens"] == 5


def test_helix_gives_up_on_a_name_that_always_fails(helix_server: HelixServer) -> None:
    platform = helix(helix_server)
    dataset = platform.put_dataset("rows", examples(4), [])
    jobs = [platform.submit_training("bad", TINY, LORA, dataset)]
    for _ in range(19):
        helix_server.jobs[jobs[-1]]["status"] = "cancelled"
        jobs.append(platform.submit_training("bad", TINY, LORA, dataset))
    assert jobs[:2] == ["bad", "bad-2"] and len(set(jobs)) == 20
    helix_server.jobs[jobs[-1]]["status"] = "cancelled"
    with pytest.raises(PlatformError, match="20 times"):
        platform.submit_training("bad", TINY, LORA, dataset)


# ── NeMo 25.x ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", ["regular", "lfs"])
def test_v1_uploads_the_way_the_store_asks_for(v1_server: NemoV1Server, mode: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("STORE_TOKEN", "nothing")
    v1_server.upload_mode = mode
    platform = nemo_v1(v1_server, datastore_token_env="STORE_TOKEN")
    dataset = platform.put_dataset("3f9a-rows", examples(12), examples(4))
    files = v1_server.repositories[f"datasets/{dataset}"]
    assert files == {
        "training/train_data.jsonl": jsonl(examples(12)),
        "validation/val_data.jsonl": jsonl(examples(4)),
    }
    assert v1_server.datasets[dataset]["files_url"] == f"hf://datasets/{dataset}"


@pytest.mark.parametrize(("counts", "past_end"), [(True, 404), (False, 404), (False, 422), (False, 200)])
@pytest.mark.parametrize("others", [0, 2, 8])
def test_v1_finds_its_job_on_any_page(v1_server: NemoV1Server, counts: bool, past_end: int, others: int) -> None:
    v1_server.counts_pages, v1_server.past_end = counts, past_end
    platform = nemo_v1(v1_server)
    dataset = platform.put_dataset("rows", examples(4), [])
    job = platform.submit_training("mine", LLAMA, LONG, dataset)
    for i in range(others):
        newer = {
            "id": f"cust-x{i}",
            "created_at": f"2025-05-{i + 1:02d}",
            "output_model": f"flywheel/mine-{i}@cust-x{i}",
        }
        v1_server.jobs.append(v1_server.jobs[0] | newer)
    assert platform.submit_training("mine", LLAMA, LONG, dataset) == job
    assert len(v1_server.jobs) == 1 + others


def test_v1_adopts_the_completed_one_of_several(v1_server: NemoV1Server) -> None:
    platform = nemo_v1(v1_server)
    dataset = platform.put_dataset("rows", examples(4), [])
    job = platform.submit_training("mine", LLAMA, LORA, dataset)
    finished(platform, job)
    for i, status in enumerate(["failed", "running", "cancelled"]):
        other = {"id": f"cust-x{i}", "status": status, "created_at": f"2025-05-0{i + 1}T00:00:00"}
        v1_server.jobs.append(v1_server.jobs[0] | other)
    assert platform.submit_training("mine", LLAMA, LORA, dataset) == job
    assert platform.adapter(job) == f"flywheel/mine@{job}"


def test_v1_configuration_is_named_by_its_settings(v1_server: NemoV1Server) -> None:
    dataset = nemo_v1(v1_server).put_dataset("rows", examples(4), [])
    for name, length in (("a", 2048), ("b", 2048), ("c", 8192)):
        nemo_v1(v1_server, max_seq_length=length).submit_training(name, LLAMA, LORA, dataset)
    used = [body["config"] for body in v1_server.bodies("POST", JOBS)]
    assert used[0] == used[1] != used[2]
    assert v1_server.configs[used[2]]["max_seq_length"] == 8192
    assert used[0].startswith("flywheel/llama-3.2-1b-instruct@v1.0.0+flywheel-")
    assert v1_server.bodies("POST", JOBS)[0]["hyperparameters"]["lora"] == {
        "adapter_dim": 4,
        "alpha": 8,
        "adapter_dropout": 0.0,
    }


def test_v1_cancels_where_the_service_listens(v1_server: NemoV1Server) -> None:
    platform = nemo_v1(v1_server)
    job = platform.submit_training("mine", LLAMA, LONG, platform.put_dataset("rows", examples(4), []))
    platform.cancel_training(job)
    assert v1_server.count("POST", f"/v1/customization/jobs/{job}/cancel") == 1
    assert v1_server.jobs[0]["status"] == "cancelled"


def test_v1_waits_until_the_nim_lists_the_adapter(v1_server: NemoV1Server) -> None:
    platform = nemo_v1(v1_server)
    job = platform.submit_training("mine", LLAMA, LORA, platform.put_dataset("rows", examples(4), []))
    finished(platform, job)
    with platform.chat(LLAMA, platform.adapter(job), Generation()) as model:
        answer = model.complete([HI])[0]
    assert isinstance(answer, Completion) and answer.text == f"flywheel/mine@{job}: hi"
    assert v1_server.count("GET", "/nim/v1/models") == 2
