"""The log store for many machines: an Elasticsearch index, or an alias of one that is rolled over.

    store = ElasticsearchStore("https://elastic:9200/flywheel-logs")
    store.append([record])                                             # Appended(added=1, duplicates=0, refused=())
    for part in store.parts(LogQuery(workload_id="support"), 8): ...   # each to be read by a process of its own

Writing is by bulk `create` with the record's id, so that a record that is there already is left alone. Reading is from
a point in time, page after page by `search_after`, in parallel by slices. What was appended is visible to the next
read. It works with the official client 8.19 on servers 8.x and 9.x, and with the client 9.x on servers 9.x.

Access is by `user:password@` in the URL, else by the environment:

    FLYWHEEL_ES_API_KEY                             an API key in its encoded form
    FLYWHEEL_ES_USERNAME, FLYWHEEL_ES_PASSWORD      basic authentication, where there is no API key
    FLYWHEEL_ES_CA_CERT                             file with the certificate authority of an https server
    FLYWHEEL_ES_VERIFY=false                        take any certificate: for trying out

It needs the index privileges `view_index_metadata`, `read` and `maintenance` (without the last, what was appended a
second ago may not be read yet), `create_doc` as well to append, `delete` as well to purge, and to make the index
`create_index` and the cluster's `manage_index_templates` (without it, indices of a rollover get no mapping of ours).
"""

from __future__ import annotations

import logging
import os
import random
import re
import secrets
import ssl
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import SplitResult, unquote, urlsplit

import msgspec

from flywheel_ray.errors import ConfigError, StoreError, StoreUnavailable
from flywheel_ray.records import Record, Rejected, parse_line, to_hit, to_json_line
from flywheel_ray.services import Appended, LogPart, LogQuery, Refused

API_KEY_VARIABLE = "FLYWHEEL_ES_API_KEY"
USERNAME_VARIABLE = "FLYWHEEL_ES_USERNAME"
PASSWORD_VARIABLE = "FLYWHEEL_ES_PASSWORD"
CA_CERT_VARIABLE = "FLYWHEEL_ES_CA_CERT"
VERIFY_VARIABLE = "FLYWHEEL_ES_VERIFY"

# Requests and responses are stored, not indexed: their fields are any application's, and searching them is not our job.
_MAPPING: dict[str, Any] = {
    "dynamic": False,
    "properties": {
        "id": {"type": "keyword"},
        "client_id": {"type": "keyword"},
        "workload_id": {"type": "keyword"},
        "served_by": {"type": "keyword"},
        "rollout": {"type": "keyword"},
        "arm": {"type": "keyword"},
        "exchange_id": {"type": "keyword"},
        "error": {"type": "keyword", "ignore_above": 1024},
        "shadow": {"type": "boolean"},
        "timestamp": {"type": "double"},  # epoch seconds; a date would round to milliseconds, and with it the order
        "latency_s": {"type": "double"},
        "request": {"type": "object", "enabled": False},
        "response": {"type": "object", "enabled": False},
        "escaped": {"type": "keyword", "index": False, "doc_values": False},
        "bulk": {"type": "keyword", "index": False, "doc_values": False},
    },
}
_ORDER = [{"timestamp": "asc"}, {"id": "asc"}]
_KEEP_ALIVE = "10m"
_FIRST_PAGE, _LAST_PAGE, _PAGE_BYTES = 20, 5000, 8 << 20
_MAX_SLICES = 1024
_BULK_RECORDS, _BULK_BYTES, _SMALLEST_BULK_BYTES = 1000, 8 << 20, 64 << 10
_PURGE_RECORDS = 20_000  # a request's worth, well within its time-out
_OPEN_PATIENCE_S = 5.0
_WORTH_SAYING_S = 0.8  # a pause of this length means more than a hiccup
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # perhaps half an emoji, escaped; or a backslash and text like that

_log = logging.getLogger(__name__)
T = TypeVar("T")


class ElasticsearchStore:
    """A LogStore in the Elasticsearch index named by the URL's path. Safe to use from several threads.

    Elasticsearch has no transactions: an append that raises may have stored some of its records, and a purge deleted
    some. Both may simply be repeated. Answers that say "later" (429, 5xx) and requests without an answer are repeated
    here already, with growing pauses, until nothing has succeeded for `patience_s`.

    The name may be an alias with a write index. Ids are known to one index each: a record that is appended again after
    a rollover is stored again, and read twice (a dataset drops duplicates). A data stream will not do, as it needs a
    date field of milliseconds.

    Args:
        url: `http(s)://host:port/index`.
        create: make the index where it is missing, and a template of that name for it and for `<index>-*`.
        patience_s: how long a call goes on trying; opening gives up after 5 s at the latest.
        request_timeout_s: how long one request may take.

    Raises:
        ConfigError: an environment variable is wrong.
        StoreError: the client is not installed or of another version than the server, the index is missing or of
            something else, or access is refused.
        StoreUnavailable: the server does not answer.
    """

    def __init__(
        self, url: str, create: bool = True, patience_s: float = 120.0, request_timeout_s: float = 60.0
    ) -> None:
        try:
            import elasticsearch
        except ImportError as error:
            raise StoreError(
                "an Elasticsearch log store needs its client: pip install 'flywheel-ray[elasticsearch]'"
            ) from error
        parts = urlsplit(url)
        self.index = parts.path.strip("/")
        if not self.index or "/" in self.index:
            raise StoreError("the URL of an Elasticsearch log store is http(s)://host:port/index")
        host = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"  # without any password
        self.name = f"{host}/{self.index}"
        self._es = elasticsearch
        self._patience_s = patience_s
        self._most_bytes = _BULK_BYTES  # of a request, as far as the server is known to take it
        self._bulk_bytes = _BULK_BYTES  # of the next one: less while the server is overloaded
        try:
            self._client = elasticsearch.Elasticsearch(
                host,
                serializer=_Json(),
                request_timeout=request_timeout_s,
                max_retries=0,  # they are repeated here: the client's own way knows neither pauses nor single items
                **_access(parts),
            )
        except ValueError as error:
            raise StoreError(f"log store {self.name}: {error}") from error
        try:
            self._prepare(create, min(patience_s, _OPEN_PATIENCE_S))
        except BaseException:
            self._client.close()
            raise

    def append(self, records: Iterable[Record]) -> Appended:
        """Store records that are not there yet, in bulk requests that get smaller where the server is overloaded.

        A record whose request was repeated because its answer got lost counts as added where the first one had stored
        it: documents say which bulk they came with.
        """
        tally = _Tally()
        bulk: dict[str, bytes] = {}
        size = 0
        for record in records:
            if record.id in bulk:
                tally.duplicates += 1
                continue
            bulk[record.id] = document = _document(record)
            size += len(document)
            if len(bulk) >= _BULK_RECORDS or size >= self._bulk_bytes:
                self._store(bulk, tally)
                bulk, size = {}, 0
        if bulk:
            self._store(bulk, tally)
        return Appended(added=tally.added, duplicates=tally.duplicates, refused=tuple(tally.refused))

    def scan(self, query: LogQuery) -> Iterator[Record]:
        """Records matching the query, ordered by (timestamp, id), as they were when the first one was asked for."""
        parts = self.parts(query, 1)
        try:
            yield from self.read(parts[0])
        finally:
            self.release(parts)

    def parts(self, query: LogQuery, count: int) -> list[LogPart]:
        """Share a scan: slices of one point in time. It ends with `release`, or after 10 minutes without a read."""
        if count < 1:
            raise ValueError("a scan has at least one part")
        self._refresh()
        opened = self._call(lambda: self._client.open_point_in_time(index=self.index, keep_alive=_KEEP_ALIVE))
        count = min(count, _MAX_SLICES)
        told = query.model_dump(exclude_none=True)
        # A slice of one is no slice to Elasticsearch.
        slices = [None] if count == 1 else [{"id": n, "max": count} for n in range(count)]
        return [LogPart(state={"query": told, "pit": opened["id"], "slice": s}) for s in slices]

    def read(self, part: LogPart) -> Iterator[Record]:
        """The records of a part, ordered by (timestamp, id); raises as `lines` does."""
        for hit in self._hits(part):
            record = parse_line(_line(hit))
            if isinstance(record, Rejected):
                raise StoreError(f"log store {self.name}: record {hit.id} is damaged: {record.reason}")
            yield record

    def lines(self, part: LogPart) -> Iterator[bytes]:
        """The records of a part as they were stored, in the same order.

        Raises:
            StoreUnavailable: also where the server has lost the point in time, because it was restarted or the reader
                paused for longer than 10 minutes. What was read is then right but not whole: ask for new parts.
        """
        return map(_line, self._hits(part))

    def _hits(self, part: LogPart) -> Iterator[_Hit]:
        try:
            query = LogQuery.model_validate(part.state["query"])
            pit, cut = part.state["pit"], part.state["slice"]
        except KeyError as error:
            raise StoreError(f"log store {self.name}: this part is of another kind of store") from error
        after = None
        size = _FIRST_PAGE
        while True:
            try:
                page = self._call(lambda: self._page(query, pit, cut, after, size))  # noqa: B023 - called at once
            except StoreError as error:
                if not isinstance(error.__cause__, self._es.NotFoundError):
                    raise
                raise StoreUnavailable(
                    f"log store {self.name} has lost the point in time that was being read: it was restarted, or the "
                    "reader paused for over 10 minutes. Read again from the beginning"
                ) from error
            hits = page.hits.hits
            yield from hits
            if len(hits) < size:
                return
            after, pit = hits[-1].sort, page.pit_id or pit
            mean = sum(len(bytes(hit.source)) for hit in hits) // len(hits)
            size = max(10, min(4 * size, _PAGE_BYTES // mean, _LAST_PAGE))

    def release(self, parts: Iterable[LogPart]) -> None:
        """Close the points in time of the parts; a server that is gone by now is no error."""
        for pit in {part.state["pit"] for part in parts}:
            with suppress(*self._faults):
                self._client.close_point_in_time(id=pit)

    def purge(self, query: LogQuery) -> int:
        """Delete every record that matches, and say how many were deleted.

        By repeated requests for a limited number. Where the answer to one is lost, what it deleted is told from counts
        before and after. To drop whole months, roll over by month and delete the old index: that costs nothing.
        """
        deleted = 0
        pauses = _Pauses(self._patience_s)
        while left := self.count(query):
            trouble = StoreUnavailable(f"log store {self.name} does not delete what it should")
            try:
                answer = self._client.delete_by_query(
                    index=self.index, query=_filter(query), max_docs=_PURGE_RECORDS, conflicts="proceed"
                )
                done = int(answer["deleted"])
            except self._faults as fault:
                error = self._translated(fault)
                if not isinstance(error, StoreUnavailable):
                    raise error from fault
                done, trouble = max(0, left - self.count(query)), error
            deleted += done
            if done:
                pauses = _Pauses(self._patience_s)
            elif not pauses.take(trouble):
                raise trouble
        return deleted

    def count(self, query: LogQuery) -> int:
        """How many records match."""
        self._refresh()
        return self._count(query)

    def workloads(self) -> list[tuple[str, str, int]]:
        """Every (client_id, workload_id, number of records), sorted."""
        self._refresh()
        found: list[tuple[str, str, int]] = []
        after: list[Any] | None = None
        while True:
            # From one workload to the next by its sort key: exact for any number of them, unlike a terms aggregation.
            hits = self._call(lambda: self._next_workload(after)).hits.hits  # noqa: B023 - called at once
            if not hits:
                return sorted(found)
            after = hits[0].sort
            client_id, workload_id = after[:2]
            found.append((client_id, workload_id, self._count(LogQuery(client_id=client_id, workload_id=workload_id))))

    def close(self) -> None:
        """Close the connections; the store is not used afterwards."""
        self._client.close()

    # ── opening ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _prepare(self, create: bool, patience_s: float) -> None:
        found = self._call(self._mapping, patience_s)
        if found is None and not create:
            raise StoreError(
                f"no log store at {self.name}; run `flywheel ingest` first or set --store / FLYWHEEL_STORE"
            )
        if found is None:
            self._call(self._make_template, patience_s)
            self._call(self._make_index, patience_s)
            found = self._call(self._mapping, patience_s) or {}
        for index, mapping in found.items():  # several where the name is an alias
            known = mapping.get("mappings", {}).get("properties", {})
            wrong = [
                field
                for field in ("id", "client_id", "workload_id", "timestamp")
                if known.get(field, {}).get("type") != _MAPPING["properties"][field]["type"]
            ]
            if wrong:
                raise StoreError(
                    f"index {index} at {self.name} is no flywheel log store (its {', '.join(wrong)} differ); "
                    "name another index"
                )

    def _mapping(self) -> dict[str, Any] | None:
        # By GET: the answer to a refused HEAD would not say why.
        with suppress(self._es.NotFoundError):
            return self._client.indices.get_mapping(index=self.index).body
        return None

    def _make_template(self) -> None:
        try:
            self._client.indices.put_index_template(
                name=self.index,
                index_patterns=[self.index, f"{self.index}-*"],
                # Templates with common names must differ in priority. "logs" and "logs-test" have, the longer first,
                # and both come before the templates that Elasticsearch itself brings along.
                priority=200 + len(self.index),
                template={"mappings": _MAPPING},
            )
        except self._es.AuthorizationException:
            _log.warning("log store %s: no privilege to make an index template; do not roll the index over", self.name)

    def _make_index(self) -> None:
        try:
            self._client.indices.create(index=self.index, mappings=_MAPPING)
        except self._es.BadRequestError as error:
            if error.error != "resource_already_exists_exception":  # another process was faster, or this one before
                raise

    # ── writing ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _store(self, documents: Mapping[str, bytes], tally: _Tally) -> None:
        """Store documents by id, resending what the server had no room for until it is in or refused."""
        stamp = secrets.token_hex(8)
        waiting = deque(documents.items())
        sent: set[str] = set()  # by a request that may have stored it, for all we know
        doubtful: list[tuple[str, str]] = []  # (index, id) found there when sent again
        pauses = _Pauses(self._patience_s)
        while waiting:
            bulk = _first(waiting, self._bulk_bytes)
            outcomes, trouble = self._send(bulk, stamp)
            again = []
            for item, outcome in zip(bulk, outcomes, strict=True):
                id = item[0]
                if outcome.status in (200, 201):
                    tally.added += 1
                elif outcome.status == 409 and id not in sent:
                    tally.duplicates += 1
                elif outcome.status == 409:
                    doubtful.append((outcome.index, id))
                elif _is_passing(outcome.status) or (outcome.status == 413 and len(bulk) > 1):
                    again.append(item)
                    sent.add(id)
                else:
                    tally.refused.append(Refused(id=id, reason=outcome.reason))
            waiting.extendleft(reversed(again))
            statuses = {outcome.status for outcome in outcomes}
            if 413 in statuses and again:
                self._most_bytes = self._bulk_bytes = _size(bulk) // 2
            elif 429 in statuses:
                self._bulk_bytes = max(min(self._bulk_bytes, _size(bulk)) // 2, _SMALLEST_BULK_BYTES)
            elif not again:
                self._bulk_bytes = min(self._bulk_bytes + self._bulk_bytes // 4, self._most_bytes)
            if len(again) < len(bulk):
                pauses = _Pauses(self._patience_s)
            if again and trouble is not None and not pauses.take(trouble):
                raise trouble
        if doubtful:
            ours = self._call(lambda: self._stored_by(stamp, doubtful))
            tally.added += ours
            tally.duplicates += len(doubtful) - ours

    def _send(self, bulk: list[tuple[str, bytes]], stamp: str) -> tuple[list[_Outcome], StoreUnavailable | None]:
        """One request: what became of each document, and what is wrong where some should be sent again."""
        lines: list[Any] = []
        for id, document in bulk:
            lines += (b'{"create":{"_id":"%b"}}' % id.encode(), b'{"bulk":"%b",' % stamp.encode() + document[1:])
        try:
            items = self._client.bulk(index=self.index, operations=lines).get("items") or []
        except self._faults as fault:
            error = self._translated(fault)
            status = fault.meta.status if isinstance(fault, self._es.ApiError) else 0
            if status == 413:
                return [_Outcome(413, reason="larger than the server takes")] * len(bulk), None
            if not isinstance(error, StoreUnavailable):
                raise error from fault
            return [_Outcome(status, reason=str(error))] * len(bulk), error
        found = [item.get("create") or {} for item in items]
        if [item.get("_id") for item in found] != [id for id, _ in bulk]:
            raise StoreError(f"log store {self.name} answered a bulk request for other records than were sent")
        outcomes = [_Outcome(item["status"], item.get("_index", ""), _reason(item)) for item in found]
        busy = next((o for o in outcomes if _is_passing(o.status)), None)
        message = f"log store {self.name} is overloaded: {busy.reason} (HTTP {busy.status})" if busy else ""
        return outcomes, StoreUnavailable(message) if busy else None

    def _stored_by(self, stamp: str, found: list[tuple[str, str]]) -> int:
        """How many of the documents came with our bulk, though the answer said that they were there."""
        wanted = [{"_index": index, "_id": id, "_source": ["bulk"]} for index, id in found]
        documents = self._client.mget(docs=wanted)["docs"]
        if failed := [d for d in documents if "error" in d]:
            raise StoreUnavailable(f"log store {self.name}: {failed[0]['error'].get('reason')}")
        return sum(d.get("_source", {}).get("bulk") == stamp for d in documents)

    # ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _page(self, query: LogQuery, pit: str, cut: Any, after: list[Any] | None, size: int) -> _Page:
        # No `filter_path`: it would make the server parse and write anew every document that it else copies.
        page = self._client.search(
            pit={"id": pit, "keep_alive": _KEEP_ALIVE},
            slice=cut,
            query=_filter(query),
            sort=_ORDER,
            search_after=after,
            size=size,
            track_total_hits=False,
            allow_partial_search_results=False,
        ).body
        return self._whole(page)

    def _next_workload(self, after: list[Any] | None) -> _Page:
        return self._whole(
            self._client.search(
                index=self.index,
                sort=[{"client_id": "asc"}, {"workload_id": "asc"}],
                search_after=after,
                size=1,
                source=False,
                track_total_hits=False,
                allow_partial_search_results=False,
            ).body
        )

    def _whole(self, page: Any) -> _Page:
        """The page, where every shard had its say: what some shards found looks like everything there is."""
        if not isinstance(page, _Page):
            raise StoreError(f"log store {self.name} answered a search with something else")
        if page.timed_out or page.shards.failed:
            raise StoreUnavailable(f"log store {self.name} answered a search without {page.shards.failed} shards")
        return page

    def _count(self, query: LogQuery) -> int:
        def send() -> int:
            answer = self._client.count(index=self.index, query=_filter(query))
            if answer["_shards"]["failed"]:
                raise StoreUnavailable(f"log store {self.name} counted without {answer['_shards']['failed']} shards")
            return int(answer["count"])

        return self._call(send)

    def _refresh(self) -> None:
        def send() -> None:
            with suppress(self._es.AuthorizationException):  # a reader's key; Elasticsearch refreshes every second
                answer = self._client.indices.refresh(index=self.index)
                if answer["_shards"]["failed"]:
                    raise StoreUnavailable(f"log store {self.name} has shards that cannot be read yet")

        self._call(send)

    # ── faults ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _call(self, send: Callable[[], T], patience_s: float | None = None) -> T:
        """Send a request that may be repeated, until it is answered."""
        pauses = _Pauses(self._patience_s if patience_s is None else patience_s)
        while True:
            try:
                return send()
            except StoreUnavailable as trouble:
                if not pauses.take(trouble):
                    raise
            except self._faults as fault:
                error = self._translated(fault)
                if not isinstance(error, StoreUnavailable) or not pauses.take(error):
                    raise error from fault

    @property
    def _faults(self) -> tuple[type[Exception], ...]:
        return (self._es.ApiError, self._es.TransportError, msgspec.DecodeError)

    def _translated(self, fault: Any) -> StoreError:
        """The client's error as ours. Its own texts may quote whole documents, so only short ones are passed on."""
        where = f"log store {self.name}"
        if isinstance(fault, self._es.UnsupportedProductError):
            return StoreError(f"{where} is no Elasticsearch server")
        if isinstance(fault, self._es.ApiError):
            return self._refusal(fault.meta.status, fault.body)
        if isinstance(fault, self._es.SSLError):
            return StoreError(f"{where}: {fault.message}; set {CA_CERT_VARIABLE} to the file with its authority")
        if isinstance(fault, self._es.ConnectionError | self._es.ConnectionTimeout):
            return StoreUnavailable(
                f"{where} does not answer: {fault.message}; start it or set --store / FLYWHEEL_STORE"
            )
        return StoreUnavailable(f"{where} answered something that is no JSON")

    def _refusal(self, status: int, body: Any) -> StoreError:
        cause = body.get("error") if isinstance(body, dict) else None
        kind = cause.get("type") if isinstance(cause, dict) else None
        reason = _reason({"error": cause}) if cause else str(body or "no reason given")
        message = f"log store {self.name}: {reason[:500]} (HTTP {status})"
        if kind == "media_type_header_exception":
            return StoreError(
                f"log store {self.name} is older than the Elasticsearch client {self._es.__versionstr__}, which does "
                "not talk to it: pip install 'elasticsearch>=8.19,<9'"
            )
        if status == 401:
            return StoreError(f"{message}; set {API_KEY_VARIABLE}, or {USERNAME_VARIABLE} and {PASSWORD_VARIABLE}")
        if status == 403:
            return StoreError(f"{message}; grant the key or user what it lacks on the index")
        return StoreUnavailable(message) if _is_passing(status) else StoreError(message)


class _Hit(msgspec.Struct):
    id: str = msgspec.field(name="_id")
    sort: list[Any]
    source: msgspec.Raw = msgspec.field(name="_source", default=msgspec.Raw(b"{}"))


class _Hits(msgspec.Struct):
    hits: list[_Hit]


class _Shards(msgspec.Struct):
    failed: int


class _Page(msgspec.Struct):
    """A search's answer, its documents left as the JSON that they are."""

    hits: _Hits
    timed_out: bool
    shards: _Shards = msgspec.field(name="_shards")
    pit_id: str | None = None


class _Json:
    """The client's serializer: pages of documents become `_Page`, any other answer plain objects."""

    mimetype = "application/json"

    def __init__(self) -> None:
        self._page = msgspec.json.Decoder(_Page).decode

    def loads(self, data: bytes) -> Any:
        """What a JSON answer holds; None where it is empty."""
        if not data:
            return None
        try:
            return self._page(data)
        except msgspec.ValidationError:
            return msgspec.json.decode(data)

    def dumps(self, data: Any) -> bytes:
        """A request's body."""
        return data if isinstance(data, bytes) else msgspec.json.encode(data)


@dataclass
class _Tally:
    added: int = 0
    duplicates: int = 0
    refused: list[Refused] = field(default_factory=list)


@dataclass(frozen=True)
class _Outcome:
    """What became of one document: an HTTP status, 0 where there was no answer."""

    status: int
    index: str = ""
    reason: str = ""


class _Pauses:
    """Pauses between attempts that double from 0.1 s to 10 s, each cut short at random, within a time budget."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s, self._pause_s = patience_s, 0.1
        self._deadline: float | None = None  # counted from the first failure: a request itself may take long

    def take(self, trouble: StoreUnavailable) -> bool:
        """Pause; False, at once, where the next attempt would come too late."""
        now = time.monotonic()
        if self._deadline is None:
            self._deadline = now + self._patience_s
        pause_s = self._pause_s * random.uniform(0.5, 1.0)
        if now + pause_s > self._deadline:
            return False
        if self._pause_s == _WORTH_SAYING_S:
            _log.warning("%s; trying again for up to %.0f s", trouble, self._deadline - now)
        self._pause_s = min(2 * self._pause_s, 10.0)
        time.sleep(pause_s)
        return True


def _access(url: SplitResult) -> dict[str, Any]:
    """The client's settings for credentials and certificates, from the URL and the environment."""
    settings: dict[str, Any] = {}
    username, password = os.environ.get(USERNAME_VARIABLE), os.environ.get(PASSWORD_VARIABLE)
    if url.username is not None:
        settings["basic_auth"] = (unquote(url.username), unquote(url.password or ""))
    elif api_key := os.environ.get(API_KEY_VARIABLE):
        settings["api_key"] = api_key
    elif username or password:
        if not (username and password):
            raise ConfigError(f"set both {USERNAME_VARIABLE} and {PASSWORD_VARIABLE}, or neither")
        settings["basic_auth"] = (username, password)
    if url.scheme != "https":
        return settings
    verify = os.environ.get(VERIFY_VARIABLE, "").lower()
    if verify not in ("", "true", "false"):
        raise ConfigError(f"{VERIFY_VARIABLE} is {verify!r}; set it to true or false")
    if verify == "false":
        return settings | {"verify_certs": False, "ssl_show_warn": False}
    if authority := os.environ.get(CA_CERT_VARIABLE):
        try:
            settings["ssl_context"] = ssl.create_default_context(cafile=authority)
        except OSError as error:  # an SSLError is one
            reason = error.strerror or error
            raise ConfigError(f"{CA_CERT_VARIABLE} names {authority}, no certificates: {reason}") from error
    return settings


def _is_passing(status: int) -> bool:
    return status in (0, 408, 429) or status >= 500


def _reason(item: Mapping[str, Any]) -> str:
    error = item.get("error") or {}
    return f"{error.get('type')}: {error.get('reason')}" if isinstance(error, dict) else str(error)


def _first(waiting: deque[tuple[str, bytes]], limit: int) -> list[tuple[str, bytes]]:
    """Take from the left, one at least, up to a number of bytes."""
    taken = [waiting.popleft()]
    size = len(taken[0][1])
    while waiting and size + len(waiting[0][1]) <= limit:
        taken.append(waiting.popleft())
        size += len(taken[-1][1])
    return taken


def _size(bulk: Iterable[tuple[str, bytes]]) -> int:
    return sum(len(document) for _, document in bulk)


def _line(hit: _Hit) -> bytes:
    line = bytes(hit.source)
    if b'"escaped"' in line and (escaped := msgspec.json.decode(line).get("escaped")) is not None:
        return str(escaped).encode()
    return line


def _document(record: Record) -> bytes:
    hit = to_hit(record)
    line = to_json_line(hit).rstrip()
    if _HALF.search(line):
        # UTF-8 has no lone surrogates, and servers refuse their JSON escapes: keep the whole hit as escaped text.
        del hit["request"], hit["response"]
        line = to_json_line(hit | {"escaped": line.decode("utf-8")}).rstrip()
    return b'{"id":"%b",' % record.id.encode() + line[1:]


def _filter(query: LogQuery) -> dict[str, Any]:
    terms: list[dict[str, Any]] = [
        {"term": {field: value}}
        for field in ("client_id", "workload_id", "served_by", "rollout")
        if (value := getattr(query, field)) is not None
    ]
    span = {name: value for name, value in (("gte", query.since), ("lt", query.until)) if value is not None}
    if span:
        terms.append({"range": {"timestamp": span}})
    return {"bool": {"filter": terms}}
