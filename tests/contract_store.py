"""What every LogStore must do: `test_stores*.py` run this suite on each implementation."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flywheel_ray.errors import StoreError
from flywheel_ray.records import Record, Rejected, from_hit, parse_line
from flywheel_ray.services import Appended, LogPart, LogQuery, LogStore
from flywheel_ray.stores import open_store

EVERYTHING = LogQuery()

# A history: append records by number, or purge those of a range of times.
APPEND = st.tuples(st.just("append"), st.lists(st.integers(0, 20), max_size=8))
PURGE = st.tuples(st.just("purge"), st.tuples(st.integers(0, 10), st.integers(0, 10)))
# Examples share a store, which each empties first, and implementations share the test.
SHARED = (HealthCheck.function_scoped_fixture, HealthCheck.differing_executors)


def record(number: int, text: str = "Where is my card?", **fields: Any) -> Record:
    """A record at second `number`, distinct by it."""
    outcome = from_hit(
        {
            "client_id": "acme",
            "workload_id": "support",
            "timestamp": number,
            "request": {"messages": [{"role": "user", "content": text}], "n": number},
            "response": {"choices": [{"message": {"content": f"Answer {number}"}}]},
            **fields,
        }
    )
    assert not isinstance(outcome, Rejected), outcome
    return outcome


def scanned(store: LogStore, **query: Any) -> list[Record]:
    return list(store.scan(LogQuery(**query)))


def keys(records: list[Record]) -> list[tuple[float, str]]:
    """What records are ordered by."""
    return [(r.timestamp, r.id) for r in records]


def read_elsewhere(url: str, part: LogPart) -> list[Record]:
    """A part, sent as JSON and read by whoever opens the same store."""
    sent = LogPart.model_validate(json.loads(json.dumps(part.model_dump())))
    with closing(open_store(url, create=False)) as store:
        return list(store.read(sent))


class LogStoreContract:
    """Subclass it and give it fixtures: `store`, empty and open, and `url`, which opens the same store."""

    def test_an_empty_store_has_nothing(self, store: LogStore) -> None:
        assert scanned(store) == []
        assert store.count(EVERYTHING) == 0
        assert store.workloads() == []
        assert store.append([]) == Appended(added=0, duplicates=0)

    def test_what_goes_in_comes_out_equal(self, store: LogStore) -> None:
        records = [
            record(1),
            record(
                2,
                served_by="student",
                arm="student",
                rollout="r1",
                exchange_id="x",
                shadow=True,
                latency_s=0.25,
            ),
            record(3, served_by="student", arm="student", rollout="r1", error="timeout", response={}),
            record(
                4,
                response={
                    "choices": [
                        {"message": {"tool_calls": [{"function": {"name": "f", "arguments": '{"a": [1, 1.5]}'}}]}}
                    ],
                    "usage": {"prompt_tokens": 3, "completion_tokens": 4},
                },
            ),
        ]
        assert store.append(iter(records)) == Appended(added=4, duplicates=0)
        assert scanned(store) == records
        assert keys(scanned(store)) == keys(records)

    numbers: ClassVar[list[int | float]] = [0, -1, 2**53 + 1, 2**63 - 1, 0.1, 1.0, -0.0, 1e-7, 1.5e300]
    """What must not change its digits. noida-db, unlike Elasticsearch, rounds 17 digits and integers beyond 64 bits."""

    def test_numbers_keep_their_digits(self, store: LogStore) -> None:
        numbers = self.numbers
        one = record(1, request={"messages": [{"role": "user"}], "numbers": numbers})
        store.append([one])
        (found,) = scanned(store)
        assert found.request["numbers"] == numbers
        assert list(map(type, found.request["numbers"])) == list(map(type, numbers))
        assert found.id == one.id

    def test_appending_again_adds_nothing(self, store: LogStore) -> None:
        store.append([record(1), record(2)])
        assert store.append([record(2), record(3), record(3)]) == Appended(added=1, duplicates=2)
        assert store.count(EVERYTHING) == 3

    def test_order_is_by_time_then_id(self, store: LogStore) -> None:
        records = [record(n % 7, f"text {n}", request={"messages": [{"role": "user"}], "n": n}) for n in range(1203)]
        store.append(records)
        found = scanned(store)
        assert [(r.timestamp, r.id) for r in found] == sorted((r.timestamp, r.id) for r in records)

    def test_times_keep_their_fractions(self, store: LogStore) -> None:
        times = [1755000074.000001, 1755000074.000002, 1755000074.9999, -1.5]
        store.append([record(n, timestamp=t) for n, t in enumerate(times)])
        assert [r.timestamp for r in scanned(store)] == sorted(times)

    def test_filters(self, store: LogStore) -> None:
        store.append(
            [
                record(1),
                record(2, client_id="other"),
                record(3, workload_id="Support"),
                record(4, served_by="student", rollout="r1"),
                record(5, rollout="r1"),
            ]
        )

        def times(**query: Any) -> list[int]:
            found = [int(r.timestamp) for r in scanned(store, **query)]
            assert store.count(LogQuery(**query)) == len(found)
            return found

        assert times(client_id="acme") == [1, 3, 4, 5]
        assert times(workload_id="support") == [1, 2, 4, 5]
        assert times(client_id="acme", workload_id="support") == [1, 4, 5]
        assert times(served_by="teacher") == [1, 2, 3, 5]
        assert times(rollout="r1") == [4, 5]
        assert times(rollout="r1", served_by="teacher") == [5]
        assert times(client_id="acme", workload_id="support", served_by="student", since=4, until=5) == [4]
        assert times(client_id="nobody") == []

    def test_since_is_inclusive_and_until_is_not(self, store: LogStore) -> None:
        store.append([record(n) for n in range(5)])
        assert [r.timestamp for r in scanned(store, since=1, until=3)] == [1, 2]
        assert store.count(LogQuery(since=1, until=3)) == 2
        assert scanned(store, since=3, until=3) == []

    def test_workloads(self, store: LogStore) -> None:
        names = [("b", "x"), ("a", "y"), ("a", "x"), ("a", "x"), ("ä/ü", "x y")]
        store.append([record(n, client_id=c, workload_id=w) for n, (c, w) in enumerate(names)])
        assert store.workloads() == [("a", "x", 2), ("a", "y", 1), ("b", "x", 1), ("ä/ü", "x y", 1)]

    @pytest.mark.parametrize(
        "text",
        [
            "Grüße 日本 😀",
            "half an emoji \ud83d and \ude00 alone",
            "nul \x00 and \x1b",
            'quote " \\ \n\r\u2028',
            "\\ud83d",
        ],
    )
    def test_any_text(self, store: LogStore, text: str) -> None:
        one = record(1, text, response={"choices": [{"message": {"content": text}}]})
        store.append([one])
        (found,) = scanned(store)
        assert found == one
        assert found.messages[0]["content"] == text

    def test_a_prompt_of_a_megabyte(self, store: LogStore) -> None:
        records = [record(n, "long ä " * 150_000) for n in range(12)]
        store.append(records)
        assert scanned(store) == records

    def test_a_scan_does_not_see_what_came_later(self, store: LogStore) -> None:
        store.append([record(n) for n in range(1100)])
        scan = store.scan(EVERYTHING)
        first = next(scan)
        store.append([record(n, "later") for n in range(1100)])
        rest = list(scan)
        assert len([first, *rest]) == 1100
        assert all(r.messages[0]["content"] != "later" for r in rest)
        assert store.count(EVERYTHING) == 2200

    def test_a_scan_may_be_left(self, store: LogStore) -> None:
        store.append([record(n) for n in range(3)])
        scan = store.scan(EVERYTHING)
        next(scan)
        scan.close()  # type: ignore[attr-defined]
        assert store.count(EVERYTHING) == 3

    @pytest.mark.parametrize("count", [1, 3, 40])
    def test_parts_are_the_scan(self, store: LogStore, url: str, count: int) -> None:
        records = [record(n % 97, f"text {n}", rollout=f"r{n % 2}") for n in range(1300)]
        store.append(records)
        query = LogQuery(rollout="r1", since=3)
        parts = store.parts(query, count)
        assert 1 <= len(parts) <= count
        store.append([record(n % 97, f"later {n}", rollout="r1") for n in range(300)])
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda part: read_elsewhere(url, part), parts))
        for part in found:
            assert keys(part) == sorted(keys(part))
        expected = [r for r in records if r.rollout == "r1" and r.timestamp >= 3]
        assert sorted(keys([r for part in found for r in part])) == sorted(keys(expected))
        assert len(max(found, key=len)) < 3 * len(expected) / len(parts)
        assert list(store.read(parts[0])) == found[0]
        assert [parse_line(line) for line in store.lines(parts[0])] == found[0]
        store.release(parts)

    def test_parts_of_little(self, store: LogStore) -> None:
        assert [r for part in store.parts(EVERYTHING, 5) for r in store.read(part)] == []
        store.append([record(1), record(2)])
        parts = store.parts(EVERYTHING, 5)
        found = [r for part in parts for r in store.read(part)]
        assert sorted(keys(found)) == keys([record(1), record(2)])
        assert all(len(json.dumps(part.state)) < 10_000 for part in parts)
        store.release(parts)
        with pytest.raises(ValueError, match="at least one part"):
            store.parts(EVERYTHING, 0)

    def test_a_part_of_another_kind_of_store_is_refused(self, store: LogStore) -> None:
        with pytest.raises(StoreError, match="another kind of store"):
            next(store.read(LogPart(state={"bucket": "b"})))

    def test_purging_deletes_what_matches(self, store: LogStore) -> None:
        store.append([record(n, client_id=f"c{n % 2}") for n in range(10)])
        assert store.purge(LogQuery(client_id="c1", until=6)) == 3
        assert [int(r.timestamp) for r in scanned(store)] == [0, 2, 4, 6, 7, 8, 9]
        assert store.purge(LogQuery(client_id="c1", until=6)) == 0
        assert store.workloads() == [("c0", "support", 5), ("c1", "support", 2)]
        assert store.append([record(n, client_id=f"c{n % 2}") for n in range(3)]) == Appended(added=1, duplicates=2)
        assert store.purge(EVERYTHING) == 8
        assert store.count(EVERYTHING) == 0

    def test_a_scan_misses_at_most_what_was_purged_meanwhile(self, store: LogStore) -> None:
        store.append([record(n) for n in range(2000)])
        scan = store.scan(EVERYTHING)
        first = next(scan)
        parts = store.parts(EVERYTHING, 2)
        # The newest go, and others come in their place: a store that counts them by number must not mix them up.
        assert store.purge(LogQuery(since=1500)) == 500
        assert store.purge(LogQuery(since=600, until=700)) == 100
        store.append([record(n, "later") for n in range(800, 2300)])
        scanned_meanwhile = [first, *scan]
        assert keys(scanned_meanwhile) == sorted(keys(scanned_meanwhile))
        read_meanwhile = [r for part in parts for r in store.read(part)]
        store.release(parts)
        kept = [*range(600), *range(700, 1500)]
        for found in (scanned_meanwhile, read_meanwhile):
            times = sorted(int(r.timestamp) for r in found)
            assert [n for n in times if n < 600 or 700 <= n < 1500] == kept
            assert len(set(times)) == len(times)
            assert all(r.messages[0]["content"] != "later" for r in found)

    @settings(max_examples=25, deadline=None, suppress_health_check=SHARED)
    @given(history=st.lists(APPEND | PURGE, max_size=8), span=st.tuples(st.integers(0, 10), st.integers(0, 10)))
    def test_after_any_history_it_holds_what_a_dict_would(self, store: LogStore, history: Any, span: Any) -> None:
        def at(number: int) -> Record:
            return record(number // 2, f"text {number}")  # two at a time

        store.purge(EVERYTHING)
        held: dict[str, Record] = {}
        for what, values in history:
            if what == "append":
                records = [at(n) for n in values]
                new = {r.id: r for r in records if r.id not in held}
                assert store.append(records) == Appended(added=len(new), duplicates=len(records) - len(new))
                held |= new
            else:
                since, until = values
                gone = [id for id, r in held.items() if since <= r.timestamp < until]
                assert store.purge(LogQuery(since=since, until=until)) == len(gone)
                for id in gone:
                    del held[id]
        since, until = span
        expected = sorted(keys([r for r in held.values() if since <= r.timestamp < until]))
        query = LogQuery(since=since, until=until)
        assert keys(list(store.scan(query))) == expected
        assert store.count(query) == len(expected)
        parts = store.parts(query, 3)
        assert sorted(keys([r for part in parts for r in store.read(part)])) == expected
        store.release(parts)

    def test_writers_in_threads_lose_nothing(self, store: LogStore) -> None:
        totals: list[Appended] = []
        failures: list[BaseException] = []

        def write(who: int) -> None:
            try:
                for n in range(10):
                    # Every second record is everybody's, so threads also meet on the same id.
                    totals.append(store.append([record(n, f"writer {who}"), record(n, "shared")]))
                    if n % 5 == 0:
                        scanned(store, client_id="acme")
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=write, args=(who,)) for who in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert store.count(EVERYTHING) == 50
        assert sum(t.added for t in totals) == 50
        assert sum(t.duplicates for t in totals) == 30


class TransactionalLogStoreContract(LogStoreContract):
    """For stores that keep "all of them or none" also when the records themselves fail half-way."""

    def test_an_append_that_fails_stores_nothing(self, store: LogStore) -> None:
        def broken() -> Iterator[Record]:
            yield from (record(n) for n in range(1500))
            raise RuntimeError("the source broke off")

        with pytest.raises(RuntimeError):
            store.append(broken())
        assert store.count(EVERYTHING) == 0
        assert store.append([record(1)]).added == 1
