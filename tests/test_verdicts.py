"""The LLM judge over real HTTP: the contract on every kind of endpoint, and a cache that never lies."""

from __future__ import annotations

import multiprocessing
import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.responses import JSONResponse, Response

from flywheel_ray.config import LlmJudgeConfig, SweepConfig, load
from flywheel_ray.errors import ChatUnavailable, ConfigError, JudgeError
from flywheel_ray.judge import LlmJudge, Reply
from flywheel_ray.verdicts import VerdictCache, llm_judge
from tests.contract_judge import JudgeContract, JudgeServer, pairs, text_pair
from tests.servers import free_port
from tests.upstream import running as serve


class Front:
    """One server for all tests, since starting one takes longer than most of them; each puts its own app behind it."""

    app: JudgeServer
    url: str

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)


FRONT = Front()


@pytest.fixture(scope="module", autouse=True)
def front() -> Iterator[None]:
    with serve(FRONT) as (FRONT.url, _):
        yield


@contextmanager
def running(app: JudgeServer) -> Iterator[tuple[str, JudgeServer]]:
    FRONT.app = app
    yield FRONT.url, app


def llm(url: str, runs: Path | None = None, **changes: Any) -> LlmJudge:
    return llm_judge(LlmJudgeConfig(**{"url": url, "model": "j", "retries": 0, "timeout_s": 5, **changes}), runs)


class LlmContract(JudgeContract):
    """The suite on an endpoint of one kind: `server` is how it behaves, `config` how it is asked."""

    server: ClassVar[dict[str, Any]] = {}
    config: ClassVar[dict[str, Any]] = {}

    @pytest.fixture
    def judge(self, tmp_path: Path) -> Iterator[LlmJudge]:
        with running(JudgeServer(**self.server)) as (url, _):
            yield llm(url, tmp_path, **self.config)


class TestSchemas(LlmContract):
    config: ClassVar = {"structured": "json_schema"}


class TestNoSchemas(LlmContract):
    server: ClassVar = {"schema": False}


class TestSchemasPassedOver(LlmContract):
    server: ClassVar = {"schema": "ignored"}


class TestBusyAtFirst(LlmContract):
    server: ClassVar = {"fail": (503, 429, 503)}
    config: ClassVar = {"retries": 3}


class TestGarbage(LlmContract):
    server: ClassVar = {"garbage": 10, "schema": False}
    unreadable = 0.1


class TestBrokenBodies(LlmContract):
    server: ClassVar = {"broken": 10}
    unreadable = 0.1


class TestPairwise(LlmContract):
    config: ClassVar = {"mode": "pairwise"}


class TestPairwiseGarbage(LlmContract):
    server: ClassVar = {"garbage": 10, "schema": False}
    config: ClassVar = {"mode": "pairwise", "cache": None}
    unreadable = 0.1


def test_an_identical_run_asks_for_nothing(tmp_path: Path) -> None:
    with running(JudgeServer()) as (url, app):
        first = llm(url, tmp_path, price={"usd_per_1m_prompt_tokens": 1, "usd_per_1m_completion_tokens": 1})
        before = first.judge(*pairs(24))
        assert (before.usage.asked, before.usage.cached, len(app.seen)) == (24, 0, 24)
        assert before.usage.prompt_tokens == 2400 and before.usage.usd == pytest.approx(0.00264)
        after = llm(url, tmp_path).judge(*pairs(24))
        assert after.judgements == before.judgements and len(app.seen) == 24
        assert (after.usage.asked, after.usage.cached, after.usage.prompt_tokens) == (0, 24, 0)
    assert llm(url, tmp_path).judge(*pairs(24)).judgements == before.judgements  # even with the endpoint gone


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "k"},
        {"mode": "pairwise"},
        {"rubrics": {"similarity": {"text": "Be kind."}, "tool_calling": {"text": "Be strict."}}},
        {"structured": "text"},
        {"temperature": 0.5},
        {"max_tokens": 64},
        {"extra_body": {"seed": 1}},
    ],
)
def test_another_judge_finds_none_of_its_verdicts(tmp_path: Path, changes: dict[str, Any]) -> None:
    with running(JudgeServer()) as (url, app):
        llm(url, tmp_path).judge(*pairs(4))
        usage = llm(url, tmp_path, **changes).judge(*pairs(4)).usage
    assert usage.cached == 0 and len(app.seen) == 4 + usage.asked


def test_only_what_was_read_or_refused_is_kept(tmp_path: Path) -> None:
    replies = ["RATING: 10", "hm", "I cannot rate this.", "RATING: 11"]

    def rule(material: str) -> tuple[str]:
        return (next(reply for i, reply in enumerate(replies) if f"card {i}?" in material),)

    examples, completions = (list(column) for column in zip(*(text_pair(i, True) for i in range(4)), strict=True))
    with running(JudgeServer(schema=False, rule=rule)) as (url, _):
        judge = llm(url, tmp_path, structured="text")
        first, second = judge.judge(examples, completions), judge.judge(examples, completions)
    assert first.judgements == second.judgements
    assert (second.usage.cached, second.usage.asked, second.usage.unscored) == (2, 2, 3)


def test_failures_on_the_way_are_not_kept(tmp_path: Path) -> None:
    with running(JudgeServer(fail=(500, 500), schema=False)) as (url, _):
        judge = llm(url, tmp_path, structured="text", concurrency=1)
        first = judge.judge(*pairs(8))
        assert first.usage.unscored == 2 and "HTTP 500" in str(first.judgements[0].score.reason)
        again = judge.judge(*pairs(8)).usage
    assert (again.asked, again.cached, again.unscored) == (2, 6, 0)


def test_a_schema_is_tried_once_and_the_answer_remembered() -> None:
    with running(JudgeServer(schema=False)) as (url, app):
        judge = llm(url)
        judge.judge(*pairs(8))
        judge.judge(*pairs(8))
        assert ["response_format" in body for body in app.seen].count(True) == 1 and len(app.seen) == 17
        with pytest.raises(JudgeError, match="refuses every question: HTTP 400: response_format"):
            llm(url, structured="json_schema").judge(*pairs(8))


def test_settings_reach_the_endpoint() -> None:
    with running(JudgeServer(schema=False)) as (url, app):
        llm(url, structured="text", temperature=None, max_tokens=None, extra_body={"seed": 3}).judge(*pairs(1))
        llm(url, structured="text").judge(*pairs(1))
    bare, usual = app.seen
    assert set(bare) == {"model", "messages", "seed"} and bare["seed"] == 3
    assert (usual["temperature"], usual["max_tokens"]) == (0, 512)


def test_equal_pairs_are_asked_about_once() -> None:
    example, completion = text_pair(1, True)
    with running(JudgeServer()) as (url, app):
        judging = llm(url).judge([example] * 5, [completion] * 5)
    assert [j.score.value for j in judging.judgements] == [1.0] * 5 and len(app.seen) == 1
    assert (judging.usage.asked, judging.usage.cached, judging.usage.prompt_tokens) == (1, 4, 100)


def test_an_endpoint_of_no_use_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ChatUnavailable, match="check that the server runs"):
        llm(f"http://127.0.0.1:{free_port()}/v1").judge(*pairs(4))
    with running(JudgeServer(fail=(401,) * 9)) as (url, _), pytest.raises(JudgeError, match="check the API key"):
        llm(url).judge(*pairs(4))
    with running(JudgeServer(fail=(500,) * 99)) as (url, _), pytest.raises(ChatUnavailable, match="HTTP 500"):
        llm(url).judge(*pairs(4))
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(JudgeError, match="NO_SUCH_KEY"):
        llm("http://127.0.0.1:9/v1", api_key_env="NO_SUCH_KEY").judge(*pairs(4))


@pytest.mark.parametrize(("status", "failing"), [(400, 30), (500, 2)])
def test_a_second_run_fares_as_the_first_with_questions_that_always_fail(
    tmp_path: Path, status: int, failing: int
) -> None:
    """However many are refused, and a few that time out: the second asks only them, since the others are kept."""

    class Filter(JudgeServer):
        def _response(self, body: dict[str, Any]) -> Response:
            if any(f"card {i}?" in body["messages"][-1]["content"] for i in range(failing)):
                return JSONResponse({"error": {"message": "content filter"}}, status)
            return super()._response(body)

    examples, completions = (list(column) for column in zip(*(text_pair(i, True) for i in range(40)), strict=True))
    price = {"usd_per_1m_prompt_tokens": 1, "usd_per_1m_completion_tokens": 1}
    with running(Filter()) as (url, _):
        for asked, cached in ((40, 0), (failing, 40 - failing)):
            judging = llm(url, tmp_path, price=price).judge(examples, completions)
            usage = judging.usage
            assert (usage.asked, usage.cached, usage.failed, usage.unscored) == (asked, cached, failing, failing)
            assert (usage.usd is None) == (cached > 0)  # nobody says what a request cost that was not answered
            assert "HTTP" in str(judging.judgements[1].score.reason)
        with pytest.raises((JudgeError, ChatUnavailable)):  # where nothing else is known, it is an error
            llm(url).judge(examples[:failing], completions[:failing])
    with running(JudgeServer(fail=(503,) * 999)) as (url, _), pytest.raises(ChatUnavailable):
        # An outage is no verdict: the trial is to be repeated, not to end with rows unscored.
        new, others = zip(*(text_pair(i, True) for i in range(40, 60)), strict=True)
        llm(url, tmp_path).judge([*examples, *new], [*completions, *others])
    with pytest.raises(ChatUnavailable):  # and so is an endpoint that is not there, whatever is kept
        llm(f"http://127.0.0.1:{free_port()}/v1", tmp_path).judge(examples, completions)


# ── the cache ─────────────────────────────────────────────────────────────────────────────────────────────────────────


TEXTS = st.text(st.characters(codec="utf-8"), max_size=30)


@given(st.dictionaries(TEXTS, st.builds(Reply, text=TEXTS, refused=st.booleans(), cut=st.booleans()), max_size=5))
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_put_is_found(tmp_path: Path, replies: dict[str, Reply]) -> None:
    cache = VerdictCache(tmp_path / "c.sqlite")
    cache.put(replies)
    kept = VerdictCache(tmp_path / "c.sqlite").get(replies)
    assert kept == {key: reply.model_copy(update={"cached": True}) for key, reply in replies.items()}


def test_many_keys_and_unknown_ones(tmp_path: Path) -> None:
    cache = VerdictCache(tmp_path / "new" / "c.sqlite")
    assert cache.get(["a"]) == {} and not cache.path.exists()
    cache.put({"k7": Reply(text="old")})
    cache.put({"k7": Reply(text="x")})
    assert list(cache.get(f"k{i}" for i in range(2000))) == ["k7"] and cache.get(["k7"])["k7"].text == "x"


def fill(path: Path, writer: int) -> None:
    cache = VerdictCache(path)
    for i in range(10):
        cache.put({key: Reply(text=key) for key in (f"{i}", f"{writer}-{i}")})  # one key is the same in every process


def test_several_processes_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=fill, args=(path, n)) for n in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    keys = [f"{i}" for i in range(10)] + [f"{n}-{i}" for n in range(3) for i in range(10)]
    kept = VerdictCache(path).get(keys)
    assert {key: reply.text for key, reply in kept.items()} == {key: key for key in keys}


def test_a_file_that_is_no_cache_is_an_error_with_its_name_and_remedy(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.sqlite"
    path.write_bytes(b"something else altogether" * 100)
    with pytest.raises(JudgeError, match=r"verdicts\.sqlite is damaged .* delete it"):
        llm("http://127.0.0.1:9/v1", tmp_path)
    path.unlink()
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE mine (a)")
    with pytest.raises(JudgeError, match=r"a database of something else; set another `cache`"):
        VerdictCache(path).put({"k": Reply(text="x")})
    with pytest.raises(JudgeError, match="cannot be used"):
        VerdictCache(path / "below" / "c.sqlite").put({"k": Reply(text="x")})
    with pytest.raises(JudgeError, match="cannot be used"):
        VerdictCache(tmp_path).check()


def as_nobody(path: Path, found: Any) -> None:
    if os.getuid() == 0:  # whom no permission binds
        os.setgid(65534)
        os.setuid(65534)
    for use in (lambda cache: cache.get(["k"]), lambda cache: cache.check()):
        try:
            found.put(str(use(VerdictCache(path))))
        except JudgeError as error:
            found.put(str(error))


@pytest.mark.parametrize(("file", "folder"), [(0o444, 0o755), (0o666, 0o555)])
def test_a_cache_that_cannot_be_written_is_found_before_it_is_needed(file: int, folder: int) -> None:
    with tempfile.TemporaryDirectory() as there:
        path = Path(there) / "c.sqlite"
        VerdictCache(path).put({"k": Reply(text="RATING: 1")})
        path.chmod(file)
        Path(there).chmod(folder)
        context = multiprocessing.get_context("fork")
        found = context.Queue()
        process = context.Process(target=as_nobody, args=(path, found))
        process.start()
        read, checked = found.get(timeout=60), found.get(timeout=60)
        process.join(60)
        Path(there).chmod(0o755)
    assert "RATING: 1" in read and "make it writable" in checked


def test_a_check_leaves_no_trace(tmp_path: Path) -> None:
    cache = VerdictCache(tmp_path / "c.sqlite")
    cache.check()
    with closing(sqlite3.connect(cache.path)) as db:
        assert db.execute("SELECT COUNT(*) FROM replies").fetchone() == (0,)
    assert [path.name for path in tmp_path.iterdir()] == ["c.sqlite"]


def test_replies_in_hand_outlive_the_cache(tmp_path: Path) -> None:
    """The file goes bad while the judge answers: the verdicts are given all the same, and it is said once."""
    path = tmp_path / "verdicts.sqlite"

    def rule(material: str) -> int:
        path.write_bytes(b"something else altogether" * 100)
        return 10

    examples, completions = (list(column) for column in zip(*(text_pair(i, True) for i in range(8)), strict=True))
    with running(JudgeServer(rule=rule)) as (url, _):
        judge = llm(url, tmp_path)
        with pytest.warns(RuntimeWarning, match="not kept") as said:
            judging = judge.judge(examples, completions)
    assert [j.score.value for j in judging.judgements] == [1.0] * 8 and len(said) == 1
    assert "delete it" in str(said[0].message)


def test_a_kept_reply_that_can_no_longer_be_read_is_asked_again(tmp_path: Path) -> None:
    with running(JudgeServer()) as (url, _):
        llm(url, tmp_path).judge(*pairs(8))
        cache = VerdictCache(tmp_path / "verdicts.sqlite")
        with closing(sqlite3.connect(cache.path)) as db:
            keys = [key for (key,) in db.execute("SELECT key FROM replies")]
        cache.put(dict.fromkeys(keys[:3], Reply(text="rating ~ seven")))  # as an earlier version may have read it
        for asked, cached in ((3, 5), (0, 8)):
            usage = llm(url, tmp_path).judge(*pairs(8)).usage
            assert (usage.asked, usage.cached, usage.unscored) == (asked, cached, 0)


def test_damage_never_becomes_a_verdict(tmp_path: Path) -> None:
    """Every kept row is changed by a byte somewhere, or the file is: each is an error, or asked again."""
    cache = VerdictCache(tmp_path / "c.sqlite")
    texts = {f"key-{i}": f"RATING: {i % 10 + 1}" for i in range(200)}
    cache.put({key: Reply(text=text) for key, text in texts.items()})
    whole = cache.path.read_bytes()
    lost = errors = 0
    for at in range(50, len(whole), len(whole) // 150):
        cache.path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x15]) + whole[at + 1 :])
        try:
            kept = cache.get(texts)
        except JudgeError as error:
            assert "c.sqlite" in str(error)
            errors += 1
            continue
        assert all(reply.text == texts[key] for key, reply in kept.items())
        lost += len(kept) < len(texts)
    assert lost and errors
    cache.path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(JudgeError, match=r"delete it|cannot be used"):
        cache.get(texts)


# ── configuration ─────────────────────────────────────────────────────────────────────────────────────────────────────

SWEEP = """
type: sweep
name: n
workload: {client_id: c, workload_id: w}
search: {models: m, adaptations: [{type: zero_shot}]}
judge:
  type: llm
  url: http://127.0.0.1:9/v1
  model: j
  mode: pairwise
  rubrics: {preference: RUBRIC}
  price: {usd_per_1m_prompt_tokens: 1, usd_per_1m_completion_tokens: 2}
"""


def test_a_rubric_file_is_read_with_the_configuration(tmp_path: Path) -> None:
    rubric, file = tmp_path / "mine.txt", tmp_path / "sweep.yaml"
    rubric.write_text("Prefer the shorter answer.\n")
    file.write_text(SWEEP.replace("RUBRIC", str(rubric)))
    config = load(file, SweepConfig)
    assert isinstance(config.judge, LlmJudgeConfig)
    name = llm_judge(config.judge).name
    assert config.judge.rubric("preference") == "Prefer the shorter answer."
    assert SweepConfig.model_validate(config.model_dump(mode="json")) == config  # as the ledger keeps it
    rubric.write_text("Prefer the longer answer.\n")
    again = load(file, SweepConfig)
    assert isinstance(again.judge, LlmJudgeConfig) and llm_judge(again.judge).name != name


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "judge.rubrics.preference: the rubric cannot be read: No such file"),
        ("{answer_a}", "nothing in a rubric"),
    ],
)
def test_a_rubric_file_that_cannot_be_used_is_a_config_error(tmp_path: Path, content: str | None, why: str) -> None:
    rubric, file = tmp_path / "mine.txt", tmp_path / "sweep.yaml"
    if content is not None:
        rubric.write_text(content)
    file.write_text(SWEEP.replace("RUBRIC", str(rubric)))
    with pytest.raises(ConfigError, match=why):
        load(file, SweepConfig)
