"""The Elasticsearch log store: the contract on a server that speaks its API, access, and what goes wrong on the way.

Runs on noida-db, or on a real cluster by FLYWHEEL_TEST_ES_URL; the last lines of a run name the server and the client.
"""

from __future__ import annotations

import json
import random
import socket
import traceback
import uuid
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from experiments.benchmarks import store_faults
from flywheel_ray.errors import ConfigError, StoreError, StoreUnavailable
from flywheel_ray.records import to_hit, to_json_line
from flywheel_ray.services import Appended, LogQuery
from flywheel_ray.stores import open_store
from flywheel_ray.stores.ingest import ingest
from tests.contract_store import EVERYTHING, LogStoreContract, keys, read_elsewhere, record, scanned
from tests.elastic import NoidaDb
from tests.fault_proxy import FaultProxy, certificate

elasticsearch = pytest.importorskip("elasticsearch")
from flywheel_ray.stores.elasticsearch import (  # noqa: E402
    API_KEY_VARIABLE,
    CA_CERT_VARIABLE,
    PASSWORD_VARIABLE,
    USERNAME_VARIABLE,
    VERIFY_VARIABLE,
    ElasticsearchStore,
)


def index_name() -> str:
    return f"flywheel-test-{uuid.uuid4().hex[:8]}"


def drop(store: ElasticsearchStore) -> None:
    """Delete a store's indices and template."""
    client = store._client
    for index in list(client.options(ignore_status=404).indices.get(index=f"{store.index}*").body):
        client.options(ignore_status=404).indices.delete(index=index)
    client.options(ignore_status=404).indices.delete_index_template(name=store.index)


@pytest.fixture
def url(elastic_url: str) -> str:
    return f"{elastic_url}/{index_name()}"


@pytest.fixture
def store(url: str, record_property: Callable[[str, Any], None]) -> Iterator[ElasticsearchStore]:
    store = open_store(url)
    assert isinstance(store, ElasticsearchStore)
    told = store._client.info()
    record_property(
        "elasticsearch",
        f"{told['name']} at {store.name.rpartition('/')[0]}, build {told['version'].get('build_hash')}, "
        f"says it is version {told['version']['number']}; client {elasticsearch.__versionstr__}",
    )
    yield store
    drop(store)
    store.close()


@pytest.mark.slow
class TestElasticsearch(LogStoreContract):
    def test_a_reader_does_not_make_the_index(self, elastic_url: str) -> None:
        with pytest.raises(StoreError, match=r"no log store at .*/flywheel-none; run `flywheel ingest` first"):
            open_store(f"{elastic_url}/flywheel-none", create=False)

    def test_it_opens_again(self, store: ElasticsearchStore, url: str) -> None:
        store.append([record(1)])
        with closing(open_store(f"{url}/", create=False)) as again:
            assert scanned(again) == [record(1)]

    def test_an_index_of_something_else_is_refused(self, elastic_url: str, store: ElasticsearchStore) -> None:
        name = index_name()
        store._client.indices.create(index=name, mappings={"properties": {"timestamp": {"type": "date"}}})
        try:
            with pytest.raises(
                StoreError, match=r"is no flywheel log store \(its id, client_id, workload_id, timestamp"
            ):
                open_store(f"{elastic_url}/{name}")
        finally:
            store._client.indices.delete(index=name)

    def test_parts_are_read_by_other_processes(self, store: ElasticsearchStore, url: str) -> None:
        store.append([record(n) for n in range(3000)])
        parts = store.parts(EVERYTHING, 4)
        with ProcessPoolExecutor(2, get_context("spawn")) as pool:
            found = list(pool.map(partial(read_elsewhere, url), parts))
        assert all(found)
        assert sorted(keys([r for part in found for r in part])) == keys(scanned(store))
        store.release(parts)

    def test_what_the_server_refuses_is_returned_and_the_rest_stored(
        self, store: ElasticsearchStore, tmp_path: Path
    ) -> None:
        # A mapping of someone else's: this workload is no whole number.
        name = store.index + "-else"
        properties = store._client.indices.get_mapping(index=store.index)[store.index]["mappings"]["properties"]
        store._client.indices.create(index=name, mappings={"properties": properties | {"rollout": {"type": "long"}}})
        good, bad = [record(1), record(3, rollout="7")], [record(2, rollout="soon"), record(4, rollout="late")]
        with closing(open_store(f"{store.name}-else")) as other:
            done = other.append([good[0], *bad, good[1]])
            assert (done.added, done.duplicates) == (2, 0)
            assert [r.id for r in done.refused] == [r.id for r in bad]
            assert "rollout" in done.refused[0].reason and "soon" in done.refused[0].reason
            assert other.append([*good, *bad]).duplicates == 2
            lines = [to_json_line(to_hit(r)) for r in (record(5), bad[0], record(6))]
            summary = ingest(lines, "a", other, tmp_path / "rejects.jsonl")
            assert (summary.added, summary.rejected) == (2, 1)
            (reject,) = map(json.loads, (tmp_path / "rejects.jsonl").read_bytes().splitlines())
            assert reject["line_number"] == 2 and "refused by the store" in reject["reason"]

    def test_requests_and_responses_are_stored_and_not_indexed(self, store: ElasticsearchStore) -> None:
        # Fields that contradict each other from record to record would be refused if they were looked at.
        odd = [record(n, request={"messages": [{"role": "user"}], "x": x}) for n, x in enumerate([1, "a", {}, [], {}])]
        assert store.append(odd) == Appended(added=5, duplicates=0)
        assert scanned(store) == odd
        mapping = store._client.indices.get_mapping(index=store.index)[store.index]["mappings"]
        assert str(mapping["dynamic"]).lower() == "false"
        assert mapping["properties"]["served_by"]["type"] == "keyword"
        assert "properties" not in mapping["properties"]["request"]

    def test_a_rolled_over_index_gets_the_same_mapping(self, store: ElasticsearchStore) -> None:
        store._client.indices.create(index=f"{store.index}-000002")
        found = store._client.indices.get_mapping(index=f"{store.index},{store.index}-000002")
        first, second = (found[index]["mappings"] for index in (store.index, f"{store.index}-000002"))
        assert second["properties"] == first["properties"]
        assert str(second["dynamic"]).lower() == "false"

    def test_an_alias_of_several_indices(self, store: ElasticsearchStore, elastic_url: str) -> None:
        client, alias, second = store._client, f"{store.index}-all", f"{store.index}-000002"
        if client.info()["name"] == "noida-db":
            pytest.skip("noida-db reads the first index of an alias only")
        store.append([record(1), record(2)])
        client.indices.put_alias(index=store.index, name=alias, is_write_index=False)
        client.indices.create(index=second, aliases={alias: {"is_write_index": True}})
        with closing(open_store(f"{elastic_url}/{alias}", create=False)) as both:
            assert both.append([record(3)]) == Appended(added=1, duplicates=0)
            # Ids are known to one index each.
            assert both.append([record(2), record(3)]) == Appended(added=1, duplicates=1)
            assert [int(r.timestamp) for r in scanned(both)] == [1, 2, 2, 3]
            assert both.purge(LogQuery(since=2, until=3)) == 2
            assert both.workloads() == [("acme", "support", 2)]
        assert client.count(index=second)["count"] == 1

    def test_stores_with_names_in_common_have_templates_of_their_own(
        self, store: ElasticsearchStore, elastic_url: str
    ) -> None:
        with closing(open_store(f"{elastic_url}/{store.index}-more")) as longer:
            assert isinstance(longer, ElasticsearchStore)
            found = {
                name: store._client.indices.get_index_template(name=name)["index_templates"][0]["index_template"]
                for name in (store.index, longer.index)
            }
            drop(longer)
        assert found[store.index]["index_patterns"] == [store.index, f"{store.index}-*"]
        assert found[store.index]["priority"] < found[longer.index]["priority"]

    def test_a_page_is_as_large_as_its_records_are_small(self, store: ElasticsearchStore, elastic_url: str) -> None:
        with FaultProxy(elastic_url) as proxy, closing(open_store(f"{proxy.url}/{store.index}")) as slow:
            slow.append([record(n) for n in range(3000)])
            proxy.requests.clear()
            assert len(scanned(slow)) == 3000
            assert sum("_search" in path for _, path, _, _ in proxy.requests) <= 5
            slow.purge(EVERYTHING)
            slow.append([record(n, "long " * 20_000) for n in range(300)])
            proxy.requests.clear()
            assert len(scanned(slow)) == 300
            assert sum("_search" in path for _, path, _, _ in proxy.requests) >= 5


# ── what goes wrong on the way ──────────────────────────────────────────────


@pytest.fixture
def proxy(elastic_url: str) -> Iterator[FaultProxy]:
    with FaultProxy(elastic_url, stall_s=1.5) as proxy:
        yield proxy


@pytest.fixture
def far(store: ElasticsearchStore, proxy: FaultProxy) -> Iterator[ElasticsearchStore]:
    """The same store, through the proxy."""
    with closing(ElasticsearchStore(f"{proxy.url}/{store.index}", patience_s=10, request_timeout_s=1)) as far:
        yield far


@pytest.mark.slow
class TestFaults:
    @pytest.mark.parametrize(
        "kind", ["429", "503", "502", "reset_before", "reset_after", "stall_before", "stall_after", "truncated"]
    )
    def test_a_bulk_is_sent_again_and_counted_once(
        self, far: ElasticsearchStore, store: ElasticsearchStore, proxy: FaultProxy, kind: str
    ) -> None:
        store.append([record(n) for n in range(10)])
        proxy.fault(kind, "/_bulk", times=2)
        done = far.append([record(n) for n in [*range(30), 29, 28]])
        assert done == Appended(added=20, duplicates=12)
        assert scanned(store) == [record(n) for n in range(30)]

    def test_only_what_was_refused_is_sent_again(
        self, far: ElasticsearchStore, store: ElasticsearchStore, proxy: FaultProxy
    ) -> None:
        store.append([record(n) for n in range(0, 900, 3)])
        proxy.requests.clear()
        proxy.fault("items_429", "/_bulk", times=3)
        assert far.append([record(n) for n in range(900)]) == Appended(added=600, duplicates=300)
        assert sum(documents for _, _, _, documents in proxy.requests) == 900
        assert store.count(EVERYTHING) == 900

    def test_an_overloaded_server_gets_smaller_bulks(self, far: ElasticsearchStore, proxy: FaultProxy) -> None:
        records = [record(n, "long " * 2000) for n in range(400)]
        proxy.fault("429", "/_bulk")
        assert far.append(records).added == 400
        sizes = [size for _, path, size, _ in proxy.requests if "/_bulk" in path and size]
        assert len(sizes) >= 2 and max(sizes) < sum(sizes) * 0.55

    def test_after_its_patience_the_store_is_unavailable(
        self, store: ElasticsearchStore, proxy: FaultProxy, caplog: pytest.LogCaptureFixture
    ) -> None:
        with closing(open_store(f"{proxy.url}/{store.index}", patience_s=2)) as far:
            proxy.fault("503", times=1000)
            with pytest.raises(StoreUnavailable, match=r"HTTP 503"):
                far.append([record(1)])
            assert "trying again for up to" in caplog.text
            proxy.heal()
            proxy.fault("reset_before", times=1000)
            with pytest.raises(StoreUnavailable, match="does not answer"):
                far.count(EVERYTHING)
            proxy.heal()
            assert far.append([record(1)]) == Appended(added=1, duplicates=0)

    def test_patience_is_with_a_server_that_gets_on(self, store: ElasticsearchStore, proxy: FaultProxy) -> None:
        with closing(open_store(f"{proxy.url}/{store.index}", patience_s=0.5)) as far:
            proxy.fault("items_429", "/_bulk", times=6)  # a third is left each time
            assert far.append([record(n) for n in range(900)]).added == 900
            assert proxy.counts["items_429"] == 6

    @pytest.mark.parametrize("max_body", [20_000, 100_000])
    def test_larger_than_the_server_takes(self, far: ElasticsearchStore, proxy: FaultProxy, max_body: int) -> None:
        proxy.max_body = max_body
        small, large = [record(n, "x" * 500) for n in range(300)], record(1, "y" * 200_000)
        done = far.append([*small[:150], large, *small[150:]])
        assert (done.added, [r.id for r in done.refused]) == (300, [large.id])
        assert done.refused[0].reason == "larger than the server takes"
        proxy.requests.clear()
        far.append([record(n, "z" * 500) for n in range(300)])
        assert all(size for _, path, size, _ in proxy.requests if "/_bulk" in path)  # the limit is known by now

    def test_an_answer_for_other_records_is_an_error(self, far: ElasticsearchStore, proxy: FaultProxy) -> None:
        proxy.fault("other_items", "/_bulk")
        with pytest.raises(StoreError, match="for other records than were sent"):
            far.append([record(1), record(2)])

    @pytest.mark.parametrize(
        "kind", ["429", "503", "reset_after", "stall_after", "truncated", "shards_failed", "timed_out"]
    )
    def test_a_page_is_asked_for_again(
        self, far: ElasticsearchStore, store: ElasticsearchStore, proxy: FaultProxy, kind: str
    ) -> None:
        records = [record(n) for n in range(1000)]
        store.append(records)
        scan = far.scan(EVERYTHING)
        found = [next(scan)]
        proxy.fault(kind, "/_search", times=2)
        found += scan
        assert proxy.counts[kind] == 2
        assert keys(found) == keys(records)
        proxy.fault(kind, "/_count")
        assert far.count(EVERYTHING) == 1000
        proxy.fault(kind, "/_search", times=2)
        assert far.workloads() == [("acme", "support", 1000)]

    def test_shards_that_stay_away_are_no_end_of_the_records(
        self, store: ElasticsearchStore, proxy: FaultProxy
    ) -> None:
        store.append([record(n) for n in range(50)])
        with closing(open_store(f"{proxy.url}/{store.index}", patience_s=0.5)) as far:
            proxy.fault("shards_failed", "/_search", times=1000)
            with pytest.raises(StoreUnavailable, match="without 1 shards"):
                scanned(far)

    def test_a_lost_point_in_time_is_said_and_not_glossed_over(
        self, far: ElasticsearchStore, store: ElasticsearchStore
    ) -> None:
        store.append([record(n) for n in range(300)])
        parts = far.parts(EVERYTHING, 2)
        reading = far.read(parts[0])
        next(reading)
        store.release(parts)
        with pytest.raises(StoreUnavailable, match=r"has lost the point in time .* Read again from the beginning"):
            list(reading)
        assert len(scanned(far)) == 300

    @pytest.mark.parametrize("kind", ["503", "reset_before", "reset_after", "stall_after"])
    def test_a_purge_whose_answer_is_lost_still_counts(
        self, far: ElasticsearchStore, store: ElasticsearchStore, proxy: FaultProxy, kind: str
    ) -> None:
        store.append([record(n) for n in range(100)])
        proxy.fault(kind, "/_delete_by_query")
        assert far.purge(LogQuery(until=60)) == 60
        assert [int(r.timestamp) for r in scanned(store)] == list(range(60, 100))

    def test_a_key_that_may_not_refresh_can_read(
        self, far: ElasticsearchStore, store: ElasticsearchStore, proxy: FaultProxy
    ) -> None:
        store.append([record(1)])
        store.count(EVERYTHING)
        proxy.fault("403", "/_refresh", times=10)
        assert scanned(far) == [record(1)]
        assert proxy.counts["403"] == 1

    def test_a_key_that_may_not_make_templates_can_make_the_index(
        self, store: ElasticsearchStore, proxy: FaultProxy, caplog: pytest.LogCaptureFixture
    ) -> None:
        proxy.fault("403", "/_index_template")
        with closing(open_store(f"{proxy.url}/{store.index}-x")) as made:
            assert made.append([record(1)]).added == 1
        assert "no privilege to make an index template" in caplog.text

    def test_opening_outlives_a_hiccup(self, store: ElasticsearchStore, proxy: FaultProxy) -> None:
        for kind in ("503", "reset_after", "429"):
            proxy.fault(kind)
        with closing(open_store(f"{proxy.url}/{store.index}-y")) as made:
            assert made.count(EVERYTHING) == 0

    def test_under_a_hail_of_faults_it_holds_what_was_appended(
        self, store: ElasticsearchStore, elastic_url: str
    ) -> None:
        chance = random.Random(5)
        records = [record(n, f"text {n}") for n in range(1500)]
        with FaultProxy(elastic_url, rate=0.3, seed=5, stall_s=0.6) as hail:
            far = ElasticsearchStore(f"{hail.url}/{store.index}", patience_s=60, request_timeout_s=0.5)
            with closing(far):
                left, seen = list(records), 0
                while left:
                    batch = [left.pop() for _ in range(min(len(left), chance.randint(1, 80)))]
                    done = far.append(batch)
                    seen += done.added + done.duplicates
                    assert not done.refused
                parts = far.parts(EVERYTHING, 3)
                found = [r for part in parts for r in far.read(part)]
            assert sum(hail.counts.values()) > 10
        assert seen == 1500
        assert sorted(keys(found)) == keys(records) == keys(scanned(store))


@pytest.mark.slow
@pytest.mark.skipif(NoidaDb.program() is None, reason="needs noida-db")
def test_a_server_that_is_restarted_keeps_records_and_loses_points_in_time(tmp_path: Path) -> None:
    with (
        NoidaDb(tmp_path / "noida") as server,
        closing(ElasticsearchStore(f"{server.url}/logs", request_timeout_s=2)) as store,
    ):
        store.append([record(n) for n in range(500)])
        scan = store.scan(EVERYTHING)
        next(scan)
        server.stop()
        server.start()
        with pytest.raises(StoreUnavailable, match="Read again from the beginning"):
            list(scan)
        assert store.append([record(n) for n in range(600)]) == Appended(added=100, duplicates=500)
        assert len(scanned(store)) == 600


@pytest.mark.slow
@pytest.mark.skipif(NoidaDb.program() is None, reason="needs noida-db")
def test_the_fault_benchmark_loses_nothing(tmp_path: Path) -> None:
    rows = {row.phase: row for row in store_faults.run(tmp_path, 2000, seed=4, rate=0.2)}
    assert list(rows) == ["ingest", "export", "gateway log"]
    for row in rows.values():
        assert (row.lost, row.twice) == (0, 0), row
        assert row.faults and row.restarts >= 1
    assert rows["ingest"].pauses == 2 and rows["export"].pauses == 1


# ── access ──────────────────────────────────────────────────────────────────


def basic(user: str, password: str) -> str:
    return "Basic " + b64encode(f"{user}:{password}".encode()).decode()


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (API_KEY_VARIABLE, USERNAME_VARIABLE, PASSWORD_VARIABLE, CA_CERT_VARIABLE, VERIFY_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


SECRET = "s3cret/p@ss"
ACCESS = {
    "an API key": ({API_KEY_VARIABLE: SECRET}, "", f"ApiKey {SECRET}"),
    "a user": ({USERNAME_VARIABLE: "me", PASSWORD_VARIABLE: SECRET}, "", basic("me", SECRET)),
    "the API key before the user": (
        {API_KEY_VARIABLE: SECRET, USERNAME_VARIABLE: "me", PASSWORD_VARIABLE: "other"},
        "",
        f"ApiKey {SECRET}",
    ),
    "the URL before all": ({API_KEY_VARIABLE: "other"}, "me:s3cret%2Fp%40ss@", basic("me", SECRET)),
}


@pytest.mark.slow
@pytest.mark.parametrize(("variables", "in_url", "header"), ACCESS.values(), ids=ACCESS.keys())
def test_credentials_are_sent_and_never_shown(
    store: ElasticsearchStore, proxy: FaultProxy, clean: pytest.MonkeyPatch, variables: Any, in_url: str, header: str
) -> None:
    for name, value in variables.items():
        clean.setenv(name, value)
    url = proxy.url.replace("://", f"://{in_url}") + f"/{store.index}"
    proxy.credentials = header
    with closing(open_store(url)) as allowed:
        assert allowed.append([record(1)]).added == 1
        assert "s3cret" not in f"{allowed!r} {vars(allowed)}"
        proxy.credentials = "something else"
        with pytest.raises(StoreError, match=r"HTTP 401\); set FLYWHEEL_ES_API_KEY, or") as failure:
            allowed.append([record(2)])
    with pytest.raises(StoreError) as other:
        open_store(url)
    for error in (failure.value, other.value):
        assert not isinstance(error, StoreUnavailable)
        assert "s3cret" not in "".join(traceback.format_exception(error))


@pytest.mark.slow
def test_tls_with_an_authority_of_ones_own(
    store: ElasticsearchStore, elastic_url: str, clean: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pem = certificate(tmp_path)
    if pem is None:
        pytest.skip("needs openssl")
    with FaultProxy(elastic_url, tls=pem) as proxy:
        url = f"{proxy.url}/{store.index}"
        assert url.startswith("https://")
        with pytest.raises(StoreError, match=r"certificate.*; set FLYWHEEL_ES_CA_CERT to"):
            open_store(url)
        clean.setenv(CA_CERT_VARIABLE, str(pem))
        with closing(open_store(url)) as found:
            assert found.append([record(1)]).added == 1
        clean.setenv(CA_CERT_VARIABLE, str(tmp_path / "none.pem"))
        with pytest.raises(ConfigError, match=r"FLYWHEEL_ES_CA_CERT names .*none.pem, no certificates: No such file"):
            open_store(url)
        clean.setenv(VERIFY_VARIABLE, "false")
        with closing(open_store(url)) as found:
            assert scanned(found) == [record(1)]


def test_half_a_user_and_an_unclear_choice_are_refused(clean: pytest.MonkeyPatch) -> None:
    clean.setenv(USERNAME_VARIABLE, "me")
    with pytest.raises(ConfigError, match="set both FLYWHEEL_ES_USERNAME and FLYWHEEL_ES_PASSWORD"):
        open_store("http://127.0.0.1:1/logs")
    clean.delenv(USERNAME_VARIABLE)
    clean.setenv(VERIFY_VARIABLE, "perhaps")
    with pytest.raises(ConfigError, match="FLYWHEEL_ES_VERIFY is 'perhaps'; set it to true or false"):
        open_store("https://127.0.0.1:1/logs")


def test_a_client_newer_than_the_server_is_told_the_remedy() -> None:
    with FaultProxy("http://127.0.0.1:1") as proxy:
        proxy.fault("400:media_type_header_exception", times=10)
        with pytest.raises(StoreError, match=r"is older than the Elasticsearch client .*<9'") as failure:
            open_store(f"{proxy.url}/logs")
        assert not isinstance(failure.value, StoreUnavailable)


def test_a_server_that_does_not_answer_is_unavailable() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://me:secret@127.0.0.1:{probe.getsockname()[1]}/logs"
    with pytest.raises(StoreUnavailable, match="does not answer") as failure:
        open_store(url, patience_s=0.2)
    assert "secret" not in str(failure.value)


def test_a_url_without_a_port_says_so() -> None:
    with pytest.raises(StoreError, match="'port'"):
        open_store("http://me:secret@elastic/logs")


def test_what_is_no_elasticsearch_is_refused() -> None:
    with FaultProxy("http://127.0.0.1:1") as proxy:
        proxy.fault("200", times=10)
        with pytest.raises(StoreError, match="is no Elasticsearch server"):
            open_store(f"{proxy.url}/logs")
