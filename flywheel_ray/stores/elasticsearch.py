"""The log store for many machines: one Elasticsearch index, a document a record, its `_id` the record's id.

    store = ElasticsearchStore("https://elastic:9200/flywheel-logs")   # API key from FLYWHEEL_ES_API_KEY
    store.append([record])                                             # Appended(added=1, duplicates=0)
    for record in store.scan(LogQuery(workload_id="support")): ...

Writing is by bulk `create`, so that a record that is there already is left alone. Reading is from a point in time, page
after page by `search_after`. What was appended is visible to the next read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast
from urllib.parse import urlsplit

from flywheel_ray.errors import StoreError, StoreUnavailable
from flywheel_ray.records import Record, Rejected, from_hit, to_hit
from flywheel_ray.services import Appended, LogQuery

API_KEY_VARIABLE = "FLYWHEEL_ES_API_KEY"

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
    },
}
_ORDER = [{"timestamp": "asc"}, {"id": "asc"}]
_KEEP_ALIVE = "5m"
_PAGE = 200
_BULK_RECORDS = 500
_BULK_BYTES = 8 << 20


class ElasticsearchStore:
    """A LogStore in an Elasticsearch index named by the URL's path. Safe to use from several threads.

    Elasticsearch has no transactions: an append that raises may have stored some of its records. Appending is
    idempotent, so the remedy is to append again.

    Args:
        url: `http(s)://host:port/index`.
        create: make the index where it is missing.

    Raises:
        StoreError: the client is not installed, the index is missing or of something else, or access is refused.
        StoreUnavailable: the server does not answer.
    """

    def __init__(self, url: str, create: bool = True) -> None:
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
        self.name = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}/{self.index}"  # without any password
        self._es = elasticsearch
        try:
            self._client = elasticsearch.Elasticsearch(
                f"{parts.scheme}://{parts.netloc}",
                api_key=os.environ.get(API_KEY_VARIABLE) or None,
                request_timeout=60,
                max_retries=3,
                retry_on_timeout=True,
            )
        except ValueError as error:
            raise StoreError(f"log store {self.name}: {error}") from error
        try:
            self._prepare(create)
        except BaseException:
            self._client.close()
            raise

    def append(self, records: Iterable[Record]) -> Appended:
        """Store records that are not there yet."""
        added = duplicates = size = 0
        batch: list[str] = []
        for record in records:
            lines = _operation(record)
            batch += lines
            size += len(lines[1])
            if len(batch) >= 2 * _BULK_RECORDS or size >= _BULK_BYTES:
                done = self._bulk(batch)
                added, duplicates = added + done.added, duplicates + done.duplicates
                batch, size = [], 0
        if batch:
            done = self._bulk(batch)
            added, duplicates = added + done.added, duplicates + done.duplicates
        return Appended(added=added, duplicates=duplicates)

    def scan(self, query: LogQuery) -> Iterator[Record]:
        """Records matching the query, ordered by (timestamp, id), as they were when the first one was asked for."""
        with self._errors():
            self._client.indices.refresh(index=self.index)
            pit = self._client.open_point_in_time(index=self.index, keep_alive=_KEEP_ALIVE)["id"]
        try:
            after = None
            while True:
                with self._errors():
                    found = self._client.search(
                        pit={"id": pit, "keep_alive": _KEEP_ALIVE},
                        query=_filter(query),
                        sort=_ORDER,
                        search_after=after,
                        size=_PAGE,
                        track_total_hits=False,
                    )
                pit = found.get("pit_id", pit)
                hits = found["hits"]["hits"]
                for hit in hits:
                    yield self._record(hit)
                if len(hits) < _PAGE:
                    return
                after = hits[-1]["sort"]
        finally:
            # It ends by itself after its keep-alive, so a server that is gone by now is no error.
            with suppress(self._es.ApiError, self._es.TransportError):
                self._client.close_point_in_time(id=pit)

    def count(self, query: LogQuery) -> int:
        """How many records match."""
        with self._errors():
            self._client.indices.refresh(index=self.index)
            return int(self._client.count(index=self.index, query=_filter(query))["count"])

    def workloads(self) -> list[tuple[str, str, int]]:
        """Every (client_id, workload_id, number of records), sorted."""
        with self._errors():
            self._client.indices.refresh(index=self.index)
        found: list[tuple[str, str, int]] = []
        after: list[str] | None = None
        while True:
            # From one workload to the next by its sort key: exact for any number of them, unlike a terms aggregation.
            with self._errors():
                hits = self._client.search(
                    index=self.index,
                    sort=[{"client_id": "asc"}, {"workload_id": "asc"}],
                    search_after=after,
                    size=1,
                    source={"includes": ["client_id", "workload_id"]},
                    track_total_hits=False,
                )["hits"]["hits"]
            if not hits:
                return sorted(found)
            after = hits[0]["sort"]
            client_id, workload_id = hits[0]["_source"]["client_id"], hits[0]["_source"]["workload_id"]
            query = LogQuery(client_id=client_id, workload_id=workload_id)
            with self._errors():
                count = self._client.count(index=self.index, query=_filter(query))["count"]
            found.append((client_id, workload_id, int(count)))

    def close(self) -> None:
        """Close the connections; the store is not used afterwards."""
        self._client.close()

    def _prepare(self, create: bool) -> None:
        with self._errors():
            exists = bool(self._client.indices.exists(index=self.index))
            if not exists:
                if not create:
                    raise StoreError(
                        f"no log store at {self.name}; run `flywheel ingest` first or set --store / FLYWHEEL_STORE"
                    )
                try:
                    self._client.indices.create(index=self.index, mappings=_MAPPING)
                except self._es.BadRequestError as error:
                    if error.error != "resource_already_exists_exception":  # another process was faster
                        raise
            mappings = self._client.indices.get_mapping(index=self.index).body
        for index, mapping in mappings.items():  # several where the name is an alias
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

    def _bulk(self, operations: list[str]) -> Appended:
        with self._errors():
            # Lines are JSON already; the client sends text as it is, though its types do not say so.
            items = self._client.bulk(index=self.index, operations=cast(Any, operations))["items"]
        statuses = [item["create"]["status"] for item in items]
        failed = [item["create"] for item in items if item["create"]["status"] not in (200, 201, 409)]
        if failed:
            error = failed[0].get("error") or {}
            message = (
                f"log store {self.name} refused {len(failed)} of {len(items)} records; the first, "
                f"{failed[0].get('_id')}: {error.get('type')}: {error.get('reason')}"
            )
            if all(item["status"] in (429, 503) for item in failed):
                raise StoreUnavailable(message)
            raise StoreError(message)
        return Appended(added=len(items) - statuses.count(409), duplicates=statuses.count(409))

    def _record(self, hit: dict[str, Any]) -> Record:
        source = hit["_source"]
        if "escaped" in source:
            source = json.loads(source["escaped"])
        record = from_hit(source)
        if isinstance(record, Rejected):
            raise StoreError(f"log store {self.name}: record {hit['_id']} is damaged: {record.reason}")
        return record

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except self._es.ApiError as error:
            status = error.meta.status
            message = f"log store {self.name}: {error.error if isinstance(error.error, str) else error} (HTTP {status})"
            if status in (401, 403):
                raise StoreError(f"{message}; set {API_KEY_VARIABLE} to an API key that may use the index") from error
            if status in (408, 429, 502, 503, 504):
                raise StoreUnavailable(message) from error
            raise StoreError(message) from error
        except (self._es.ConnectionError, self._es.ConnectionTimeout) as error:
            raise StoreUnavailable(
                f"log store {self.name} does not answer: {error.message}; start it or set --store / FLYWHEEL_STORE"
            ) from error
        except self._es.TransportError as error:
            raise StoreError(f"log store {self.name}: {error.message}") from error


def _operation(record: Record) -> list[str]:
    hit = to_hit(record)
    text = _json(hit)
    if not _is_unicode(text):
        # UTF-8 has no lone surrogates, and servers refuse their JSON escapes: keep the whole hit as escaped text.
        del hit["request"], hit["response"]
        hit["escaped"] = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return [_json({"create": {"_id": record.id}}), _json({"id": record.id, **hit})]


def _json(data: Any) -> str:
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


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
