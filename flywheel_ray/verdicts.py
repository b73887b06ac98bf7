"""Verdicts are asked of an endpoint once and kept: judging the same answers again asks for nothing.

    cache = VerdictCache("runs/verdicts.sqlite")
    ask = JudgeEndpoint(settings, "http://127.0.0.1:8000/v1", cache=cache)
    LlmJudge(settings, ask).judge(examples, completions).usage       # JudgeUsage(asked=0, cached=400, …)

What is kept is the judge's reply, under a hash of the whole request: model, rubric, material, order, form, generation
settings. It is kept where it can be read or is a refusal; what failed on the way, or cannot be read, is asked again,
and so is a kept reply that can no longer be read. Where replies can suddenly no longer be kept, judging goes on.
The URL is no part of it, so a model behind a new address keeps its verdicts: give another model another name.
"""

from __future__ import annotations

import sqlite3
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from flywheel_ray.chat import BadRequest, HttpChat
from flywheel_ray.config import LlmJudgeConfig
from flywheel_ray.errors import ChatError, ChatUnavailable, FlywheelError, JudgeError
from flywheel_ray.judge import Form, JudgeSettings, LlmJudge, Question, Reply
from flywheel_ray.records import Completion
from flywheel_ray.services import ChatPrompt, Unanswered
from flywheel_ray.values import content_hash

APPLICATION_ID = 0x66777664  # "fwvd": tells our files from other programs' databases
BUSY_TIMEOUT_S = 60.0
SAVE_EVERY_S = 1.0

_TABLE = "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL, digest TEXT NOT NULL)"
_CHUNK = 500
_MOST_TRIES = 3


class VerdictCache:
    """Replies of judges in one SQLite file. Threads and processes may use it at once; it is opened for each call.

    It keeps a rollback journal rather than WAL, which needs memory that processes share, because the folder of runs may
    be on a network drive. A power cut loses nothing that was put. Every row carries a digest: a row that was damaged is
    not found, and its question is asked again.

    Args:
        path: the file; it and its folder are made when the first reply is put.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def get(self, keys: Iterable[str]) -> dict[str, Reply]:
        """The replies there are, by key.

        Raises:
            JudgeError: the file is damaged or cannot be read.
        """
        wanted = list(dict.fromkeys(keys))
        found: dict[str, Reply] = {}
        if not wanted or not self.path.exists():
            return found
        with self._open() as db:
            for start in range(0, len(wanted), _CHUNK):
                chunk = wanted[start : start + _CHUNK]
                sql = f"SELECT key, reply, digest FROM replies WHERE key IN ({', '.join('?' * len(chunk))})"
                for key, text, digest in db.execute(sql, chunk):
                    if digest == content_hash([key, text]):
                        found[key] = _parse(text, self.path)
        return found

    def put(self, replies: Mapping[str, Reply]) -> None:
        """Keep replies by key, in place of earlier ones; they are on disk when this returns.

        Raises:
            JudgeError: the file is damaged or cannot be written.
        """
        texts = [(key, reply.model_dump_json()) for key, reply in replies.items()]
        with self._open() as db:
            db.execute("BEGIN IMMEDIATE")
            rows = ((key, text, content_hash([key, text])) for key, text in texts)
            db.executemany("INSERT OR REPLACE INTO replies VALUES (?, ?, ?)", rows)
            db.execute("COMMIT")

    def check(self) -> None:
        """Find out now whether the file can be read and written, without a trace. Raises JudgeError where it cannot."""
        with self._open() as db:
            db.execute("BEGIN IMMEDIATE")
            db.execute("INSERT OR REPLACE INTO replies VALUES ('', '', '')")  # a lock alone needs no journal beside it
            db.execute("ROLLBACK")

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_S, isolation_level=None)) as db:
                self._prepare(db)
                yield db
        except sqlite3.OperationalError as error:
            raise JudgeError(
                f"verdict cache {self.path} cannot be used ({error}); make it writable, or set the judge's `cache` to "
                "another file or to null"
            ) from None
        except sqlite3.DatabaseError as error:
            raise JudgeError(
                f"verdict cache {self.path} is damaged ({error}); delete it, and its verdicts are asked for again"
            ) from None
        except OSError as error:
            raise JudgeError(f"verdict cache {self.path} cannot be used: {error}; set another `cache`") from None

    def _prepare(self, db: sqlite3.Connection) -> None:
        (application,) = db.execute("PRAGMA application_id").fetchone()
        if application == APPLICATION_ID:
            return
        db.execute("BEGIN IMMEDIATE")
        (application,) = db.execute("PRAGMA application_id").fetchone()  # another process may have been faster
        if application != APPLICATION_ID and db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]:
            raise JudgeError(f"verdict cache {self.path} is a database of something else; set another `cache`")
        db.execute(_TABLE)
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute("COMMIT")


def _parse(text: str, path: Path) -> Reply:
    try:
        return Reply.model_validate_json(text).model_copy(update={"cached": True})
    except ValidationError:
        raise JudgeError(
            f"verdict cache {path} was written by another version; delete it, or set another `cache`"
        ) from None


class JudgeEndpoint:
    """Puts questions to a model behind an OpenAI-compatible endpoint; earlier replies come from the cache.

    A question that occurs twice is asked once. Replies are kept every second, so that what was paid for before a crash
    is not paid for again. Where `structured` is "auto" the first question is asked with a schema, and if the
    endpoint will not have that (400, 422), in text, as are all that follow.

    Args:
        settings: the judge's.
        url: base URL, to which `/chat/completions` is added.
        api_key_env, timeout_s, concurrency, retries, backoff_s: see `HttpChat`.
        cache: where replies are kept; None keeps none.
    """

    def __init__(
        self,
        settings: JudgeSettings,
        url: str,
        api_key_env: str | None = None,
        timeout_s: float = 60,
        concurrency: int = 8,
        retries: int = 3,
        cache: VerdictCache | None = None,
        backoff_s: float = 0.5,
    ) -> None:
        self.settings = settings
        self.url = url
        self.cache = cache
        self._how: dict[str, Any] = {
            "api_key_env": api_key_env,
            "timeout_s": timeout_s,
            "concurrency": concurrency,
            "retries": retries,
            "backoff_s": backoff_s,
        }
        self._form: Form | None = None if settings.structured == "auto" else settings.structured
        self._keeps = cache is not None

    def __call__(self, questions: Sequence[Question]) -> list[Reply]:
        """One reply for each question, in order.

        Raises:
            JudgeError: the endpoint refuses the key, URL or model, or every question, and none was answered earlier; or
                the cache cannot be read.
            ChatUnavailable: the endpoint cannot be reached, or answers no question in time, and more than one in twenty
                of the call wait for it: the same call may succeed later, so it must not end as rows without a score.
        """
        forms: tuple[Form, ...] = (self._form,) if self._form else ("json_schema", "text")
        keys = {form: [self._key(question, form) for question in questions] for form in forms}
        names = keys[forms[0]]  # what tells the questions of this call apart
        kept = self.cache.get(key for form in forms for key in keys[form]) if self.cache is not None else {}
        replies: dict[str, Reply] = {}
        for i, (name, question) in enumerate(zip(names, questions, strict=True)):
            found = (kept[keys[form][i]] for form in forms if keys[form][i] in kept)
            if reply := next((reply for reply in found if _worth_keeping(question, reply)), None):
                replies[name] = reply
        waiting = {name: q for name, q in zip(names, questions, strict=True) if name not in replies}
        asked = self._ask(list(waiting.values()), len(replies))
        replies |= zip(waiting, asked, strict=True)
        answers = []
        for name in names:
            answers.append(replies[name])
            replies[name] = replies[name].model_copy(update={"cached": True})  # a second such question asked nothing
        return answers

    def _ask(self, questions: Sequence[Question], known: int) -> list[Reply]:
        """Replies to questions that differ; `known` others of the call were answered earlier.

        It is an error where none is answered. Not so where others are known and these are refused, or time out and are
        few: what a judge always fails must not fail the run in which the others are kept, after it has passed in the
        run in which they were asked.
        """
        rounds: list[_Round] = []
        while len(rounds) < min(len(questions), _MOST_TRIES) and self._form is None:
            rounds.append(self._try(questions[len(rounds)]))
        replies = [reply for done in rounds for reply in done.replies]
        rest = questions[len(replies) :]
        later: dict[Question, Reply] = {}
        for metric in dict.fromkeys(question.metric for question in rest):
            same = [question for question in rest if question.metric == metric]
            rounds.append(self._put(same, self._form or "text"))
            later |= zip(same, rounds[-1].replies, strict=True)
        replies += [later[question] for question in rest]
        error = next((done.error for done in rounds if done.error), None)
        few = max(1, (known + len(questions)) // 20)
        away = isinstance(error, ChatUnavailable) and len(questions) > few
        if replies and all(reply.failure is not None for reply in replies) and (away or not known):
            raise error or JudgeError(
                f"the judge {self.settings.model} at {self.url} refuses every question: {replies[0].failure}; if it is "
                "a setting that it refuses, change that or set it to null"
            )
        return replies

    def _try(self, question: Question) -> _Round:
        """Ask one question to learn what the endpoint takes; it is not learnt where the question itself is at fault."""
        form: Form = "json_schema"
        done = self._put([question], form)
        if done.refused:
            form = "text"
            done = self._put([question], form)
        if done.replies[0].failure is None:
            self._form = form
        return done

    def _put(self, questions: Sequence[Question], form: Form) -> _Round:
        """Replies to questions of one metric, kept as they come."""
        chat = HttpChat(self.url, self.settings.model, extra_body=self._body(questions[0], form), **self._how)
        replies: dict[int, Reply] = {}
        unsaved: dict[str, Reply] = {}
        saved_at = time.monotonic()
        refused = False

        def save() -> None:
            nonlocal saved_at
            self._keep(unsaved)
            unsaved.clear()
            saved_at = time.monotonic()

        def keep(i: int, answer: Completion | Unanswered) -> None:
            nonlocal refused
            refused |= isinstance(answer, BadRequest) and answer.status in (400, 422)
            replies[i] = reply = Reply(failure=answer.reason) if isinstance(answer, Unanswered) else Reply.of(answer)
            if self._keeps and _worth_keeping(questions[i], reply):
                unsaved[self._key(questions[i], form)] = reply
            if time.monotonic() - saved_at >= SAVE_EVERY_S:
                save()

        trouble: FlywheelError | None = None
        try:
            try:
                chat.complete([ChatPrompt(messages=tuple(q.messages(form))) for q in questions], on_answer=keep)
            finally:
                save()
        except ChatError as error:
            trouble = error
            if not isinstance(error, ChatUnavailable):
                trouble = JudgeError(f"the judge {self.settings.model} cannot be used: {error}")
            if len(replies) < len(questions):  # not each question failed for itself: the endpoint is of no use
                raise trouble from None
        return _Round([replies[i] for i in range(len(questions))], refused, trouble)

    def _keep(self, replies: Mapping[str, Reply]) -> None:
        """Put replies into the cache; once that fails, say so and keep no more, for those in hand are paid for."""
        if self.cache is None or not self._keeps or not replies:
            return
        try:
            self.cache.put(replies)
        except JudgeError as error:
            self._keeps = False
            warnings.warn(f"from now on the judge's replies are not kept: {error}", RuntimeWarning, stacklevel=2)

    def _body(self, question: Question, form: Form) -> Mapping[str, Any]:
        """The request but for model and messages."""
        chosen = {"temperature": self.settings.temperature, "max_tokens": self.settings.max_tokens}
        body = {name: value for name, value in chosen.items() if value is not None} | self.settings.extra_body
        return body | ({"response_format": question.response_format()} if form == "json_schema" else {})

    def _key(self, question: Question, form: Form) -> str:
        request = {"model": self.settings.model, "messages": question.messages(form), **self._body(question, form)}
        return content_hash([question.metric, question.order, request], 64)


class _Round(NamedTuple):
    """What came of asking some questions; `refused` where the endpoint found fault with the request itself."""

    replies: list[Reply]
    refused: bool
    error: FlywheelError | None


def _worth_keeping(question: Question, reply: Reply) -> bool:
    reading = question.read(reply)
    return reading.rating is not None or reading.refused


def llm_judge(config: LlmJudgeConfig, runs: Path | None = None) -> LlmJudge:
    """The LLM judge that a configuration describes; connects to nothing until it is asked.

    Args:
        config: the `judge` of a sweep.
        runs: the folder in which a relative `cache` lies; None keeps no verdicts.

    Raises:
        JudgeError: the cache cannot be used, which is better known before a sweep than after it.
    """
    cache = VerdictCache(runs / config.cache) if runs is not None and config.cache is not None else None
    if cache is not None:
        cache.check()
    ask = JudgeEndpoint(
        config,
        config.url,
        api_key_env=config.api_key_env,
        timeout_s=config.timeout_s,
        concurrency=config.concurrency,
        retries=config.retries,
        cache=cache,
    )
    return LlmJudge(config, ask, price=config.price)
