"""What every LogStore must do. `test_stores.py` runs this suite on each implementation, with a fixture `store`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from flywheel_ray.records import Record, Rejected, from_hit
from flywheel_ray.services import Appended, LogQuery, LogStore

EVERYTHING = LogQuery()


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


class LogStoreContract:
    """Subclass it and give it a fixture `store`, empty and open."""

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
