"""The contract of an outbox log, as a pytest class.

A log is proven through the store whose commits write it, so subclass it with the same fixture as the store's suite:

    class TestMyOutboxLog(OutboxLogContract):
        @pytest.fixture
        def make_store(self, my_server_url: str) -> StoreFactory:
            component = Component(name="statestore", type="state.mine", metadata={"url": my_server_url})
            return lambda: MyStateStore(component, app_id="orders", clock=SystemClock())

`make_store` returns a callable that makes a new store, not opened yet, on a database that holds nothing when the test
starts. What logs of several stores on one database owe each other is in `SharedStateStoreContract`.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import count
from types import MappingProxyType
from uuid import uuid4

import pytest

from statecast.components.state.commit import Commit, Concurrency, ETag, OutboxRecord, Upsert
from statecast.components.state.log import (
    READ_BYTES,
    Batch,
    Deferral,
    DeferredQueue,
    Failure,
    Lease,
    LogEntry,
    OutboxLog,
    QueueProgress,
    QueueStatus,
    SliceStatus,
    slice_of,
)
from statecast.components.state.store import StateStore
from statecast.components.testing.deadline import PATIENCE, until
from statecast.errors import ETagMismatch

StoreFactory = Callable[[], StateStore]

HOUR = timedelta(hours=1)

NO_TIME = timedelta(0)

RECORDS = {
    "plain": OutboxRecord("orders||1", "id-1", "pubsub", "orders", b'{"specversion": "1.0"}'),
    "unicode": OutboxRecord("orders||é鍵🔑", "id ü", "pub sub", "größe.🚀", b"", {}),
    "every byte": OutboxRecord(
        "", "id", "pubsub", "orders", bytes(range(256)), {"": "", " ": "\n", "é": "🔑", "a'\"": "\\"}
    ),
    "large": OutboxRecord("orders||" + "k" * 500, "i" * 200, "p", "t" * 249, b"x" * 1_000_000, {"partitionKey": "k"}),
    "another format": OutboxRecord(
        "orders||1", "id-1", "pubsub", "orders", b"\x00\xff", {"a": "1", "A": "2"}, format=7
    ),
    "metadata that is no dict": OutboxRecord(
        "orders||1", "id", "pubsub", "orders", b"{}", MappingProxyType({"partitionKey": "1"})
    ),
}


class OutboxLogContract:
    """What every outbox log owes the relays. See the head of this module for how to run it."""

    short_ttl = timedelta(milliseconds=200)
    """The time of a lease or a heartbeat that a test lets run out."""

    @pytest.fixture
    def make_store(self) -> StoreFactory:
        raise NotImplementedError(
            f"{type(self).__name__} must override the fixture make_store: a callable that returns a new store, "
            "not opened yet, on a database of this test's own"
        )

    @pytest.fixture
    async def store(self, make_store: StoreFactory) -> AsyncIterator[StateStore]:
        async with make_store() as store:
            yield store

    @pytest.fixture
    def log(self, store: StateStore) -> OutboxLog:
        return store.log

    # Leasing

    async def test_slices_are_leased_up_to_the_limit(self, log: OutboxLog) -> None:
        leases = await log.acquire("relay", 3, HOUR)

        assert len({lease.slice for lease in leases}) == len(leases) == 3
        assert {lease.owner for lease in leases} == {"relay"}

    async def test_a_limit_of_nothing_leases_nothing(self, log: OutboxLog) -> None:
        assert await log.acquire("relay", 0, HOUR) == []

        assert {status.owner for status in await log.status()} == {None}

    async def test_a_leased_slice_is_given_to_nobody_else(self, log: OutboxLog) -> None:
        first = await log.acquire("first", 5, HOUR)

        second = await log.acquire("second", log.slices, HOUR)

        assert sorted(lease.slice for lease in first + second) == list(range(log.slices))
        assert await log.acquire("third", log.slices, HOUR) == []

    async def test_an_owner_does_not_get_its_own_slice_twice(self, log: OutboxLog) -> None:
        await log.acquire("relay", log.slices, HOUR)

        assert await log.acquire("relay", log.slices, HOUR) == []

    async def test_many_relays_that_acquire_at_once_share_the_slices(self, log: OutboxLog) -> None:
        leased = await asyncio.gather(*(log.acquire(f"relay {number}", 3, HOUR) for number in range(10)))

        slices = [lease.slice for leases in leased for lease in leases]
        assert len(set(slices)) == len(slices)
        assert all(len(leases) <= 3 for leases in leased)
        rest = await log.acquire("late", log.slices, HOUR)
        assert sorted(slices + [lease.slice for lease in rest]) == list(range(log.slices))

    async def test_a_lease_that_ran_out_is_given_again_with_a_higher_epoch(self, log: OutboxLog) -> None:
        first = await log.acquire("first", log.slices, self.short_ttl)

        second = await take_over(log, "second")

        before = {lease.slice: lease.epoch for lease in first}
        assert all(lease.epoch > before[lease.slice] for lease in second)
        assert {lease.owner for lease in second} == {"second"}

    async def test_every_acquisition_has_a_higher_epoch(self, log: OutboxLog) -> None:
        epochs = []
        for _ in range(3):
            leases = await acquire_all(log)
            epochs.append([lease.epoch for lease in by_slice(leases)])
            await log.release(leases)

        assert all(first < second < third for first, second, third in zip(*epochs, strict=True))

    async def test_an_owner_that_acquires_again_is_fenced_from_its_earlier_lease(self, log: OutboxLog) -> None:
        before = await log.acquire("relay", log.slices, self.short_ttl)
        again = await take_over(log, "relay")

        assert await log.advance(before, HOUR) == []

        assert by_slice(await log.advance(again, HOUR)) == by_slice(again)

    async def test_a_released_slice_can_be_leased_at_once(self, log: OutboxLog) -> None:
        leases = await acquire_all(log)

        await log.release(leases[:2])

        again = await log.acquire("other", log.slices, HOUR)
        assert {lease.slice for lease in again} == {lease.slice for lease in leases[:2]}

    async def test_releasing_or_advancing_nothing_is_no_error(self, log: OutboxLog) -> None:
        await log.release([])

        assert await log.advance([], HOUR) == []

    # Relays that live

    async def test_heartbeats_count_the_relays_that_live(self, log: OutboxLog) -> None:
        counts = [await log.heartbeat(owner, HOUR) for owner in ("a", "b", "a", "c", "A")]

        assert counts == [1, 2, 2, 3, 4]

    async def test_a_relay_whose_time_ran_out_is_not_counted(self, log: OutboxLog) -> None:
        await log.heartbeat("dead", self.short_ttl)

        assert await log.heartbeat("alive", HOUR) in (1, 2)

        async def is_alone() -> bool:
            return await log.heartbeat("alive", HOUR) == 1

        await until(is_alone)

    async def test_a_heartbeat_renews_the_time_of_its_relay(self, log: OutboxLog) -> None:
        await log.heartbeat("renewed", self.short_ttl)
        await log.heartbeat("dead", self.short_ttl)

        await log.heartbeat("renewed", HOUR)

        async def dead_is_gone() -> bool:
            return await log.heartbeat("alive", HOUR) == 2

        await until(dead_is_gone)

    # Reading

    async def test_an_empty_log_reads_as_nothing_with_a_lease_for_each_given(self, log: OutboxLog) -> None:
        leases = await acquire_all(log)

        batch = await log.read(leases, 100)

        assert batch.entries == ()
        assert [(each.slice, each.owner, each.epoch) for each in batch.leases] == [
            (each.slice, each.owner, each.epoch) for each in leases
        ]

    async def test_reading_without_leases_finds_nothing(self, store: StateStore, log: OutboxLog) -> None:
        await append(store, new_record("orders||1"))

        batch = await log.read([], 100)

        assert (batch.entries, batch.leases) == ((), ())

    @pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS.keys())
    async def test_a_record_is_read_as_it_was_written(
        self, store: StateStore, log: OutboxLog, record: OutboxRecord
    ) -> None:
        asked_at = datetime.now(UTC)

        await append(store, record)

        (entry,) = await read_all(log, await acquire_all(log))
        assert entry.record == record
        assert dict(entry.record.metadata) == dict(record.metadata)
        assert entry.slice == slice_of(record.order_key, log.slices)
        assert entry.created_at.tzinfo is not None
        assert abs(entry.created_at - asked_at) < PATIENCE

    async def test_what_the_caller_does_to_its_metadata_later_is_not_in_the_log(
        self, store: StateStore, log: OutboxLog
    ) -> None:
        metadata = {"partitionKey": "1"}
        await append(store, OutboxRecord("orders||1", "id", "pubsub", "orders", b"", metadata))

        metadata["partitionKey"] = "2"

        (record,) = await drain(log)
        assert record.metadata == {"partitionKey": "1"}

    async def test_records_of_a_key_are_read_in_commit_order(self, store: StateStore, log: OutboxLog) -> None:
        for number in range(30):
            await append(store, *(new_record(f"orders||{key}", f"{key}-{number}") for key in "abcdef"))

        ids = by_key(await drain(log))

        assert ids == {f"orders||{key}": [f"{key}-{number}" for number in range(30)] for key in "abcdef"}

    async def test_records_of_one_commit_are_read_in_their_order(self, store: StateStore, log: OutboxLog) -> None:
        records = [new_record("orders||1", str(number)) for number in range(500)]

        await append(store, *records)

        assert await drain(log) == records

    async def test_reading_on_gives_nothing_twice(self, store: StateStore, log: OutboxLog) -> None:
        leases: Sequence[Lease] = await acquire_all(log)
        ids: list[str] = []
        for number in range(20):
            await append(store, new_record(f"orders||{number % 7}", str(number)))
            batch = await log.read(leases, 2)
            leases = batch.leases
            ids.extend(entry.record.event_id for entry in batch.entries)

        ids.extend(entry.record.event_id for entry in await read_all(log, leases))

        assert sorted(ids, key=int) == [str(number) for number in range(20)]

    async def test_reading_moves_nothing(self, store: StateStore, log: OutboxLog) -> None:
        await append(store, *(new_record(f"orders||{number}") for number in range(20)))
        leases = await acquire_all(log)

        first = await read_all(log, leases)
        second = await read_all(log, leases)

        assert len(first) == 20
        assert by_key(entry.record for entry in first) == by_key(entry.record for entry in second)
        assert sum(status.pending for status in await log.status()) == 20

    async def test_a_lease_reads_its_own_slice_only(self, store: StateStore, log: OutboxLog) -> None:
        records = [new_record(f"orders||{number}") for number in range(100)]
        await append(store, *records)

        for lease in await acquire_all(log):
            found = await read_all(log, [lease])

            expected = [record for record in records if slice_of(record.order_key, log.slices) == lease.slice]
            assert [entry.record for entry in found] == expected
            assert {entry.slice for entry in found} <= {lease.slice}

    @pytest.mark.parametrize("limit", [1, 7, 100, 1_000])
    async def test_a_large_backlog_is_read_completely_in_small_steps(
        self, store: StateStore, log: OutboxLog, limit: int
    ) -> None:
        total = 5_000 if limit >= 100 else 300
        records = [new_record(f"orders||{number % 50}", str(number)) for number in range(total)]
        for start in range(0, total, 250):
            await append(store, *records[start : start + 250])

        found = await read_all(log, await acquire_all(log), limit=limit)

        assert by_key(entry.record for entry in found) == by_key(records)

    async def test_an_entry_has_the_same_id_at_every_read_and_no_other_of_its_slice_has_it(
        self, store: StateStore, log: OutboxLog
    ) -> None:
        await append(store, *(new_record(f"orders||{number % 30}") for number in range(150)))
        await append(store, *(new_record(f"orders||{number % 30}") for number in range(150)))

        first = await read_all(log, await log.acquire("first", log.slices, self.short_ttl), limit=11)
        second = await read_all(log, await take_over(log, "second"), limit=17)

        assert {(entry.slice, entry.id): entry for entry in first} == {
            (entry.slice, entry.id): entry for entry in second
        }
        assert len({(entry.slice, entry.id) for entry in first}) == len(first) == 300

    async def test_a_read_keeps_about_to_its_limit(self, store: StateStore, log: OutboxLog) -> None:
        await append(store, *(new_record(f"orders||{number % 50}") for number in range(2_000)))
        leases = await acquire_all(log)

        batch = await log.read(leases, 100)

        assert 0 < len(batch.entries) <= 200

    async def test_a_read_of_one_crowded_slice_keeps_about_to_its_limit(
        self, store: StateStore, log: OutboxLog
    ) -> None:
        await append(store, *(new_record("orders||1") for _ in range(2_000)))
        leases = await acquire_all(log)

        batch = await log.read(leases, 100)

        assert 0 < len(batch.entries) <= 200

    # Progress

    async def test_the_next_owner_reads_on_behind_what_was_advanced(self, store: StateStore, log: OutboxLog) -> None:
        await append(store, *(new_record("orders||1", str(number)) for number in range(10)))
        batch = await read_some(log, await log.acquire("first", log.slices, self.short_ttl), limit=4)
        assert len(await log.advance(batch.leases, self.short_ttl)) == log.slices

        rest = await read_all(log, await take_over(log, "second"))

        read = [entry.record.event_id for entry in (*batch.entries, *rest)]
        assert read == [str(number) for number in range(10)]

    async def test_the_next_owner_reads_again_what_was_not_advanced(self, store: StateStore, log: OutboxLog) -> None:
        records = [new_record(f"orders||{number % 5}", str(number)) for number in range(50)]
        await append(store, *records)
        first = await read_all(log, await log.acquire("first", log.slices, self.short_ttl), limit=7)

        second = await read_all(log, await take_over(log, "second"), limit=11)

        assert by_key(entry.record for entry in first) == by_key(entry.record for entry in second) == by_key(records)

    async def test_releasing_persists_the_positions(self, store: StateStore, log: OutboxLog) -> None:
        await append(store, *(new_record("orders||1", str(number)) for number in range(10)))
        batch = await read_some(log, await acquire_all(log), limit=4)

        await log.release(batch.leases)

        rest = await read_all(log, await acquire_all(log))
        read = [entry.record.event_id for entry in (*batch.entries, *rest)]
        assert read == [str(number) for number in range(10)]

    async def test_advancing_renews_the_lease(self, log: OutboxLog) -> None:
        first, second, *_ = await log.acquire("first", log.slices, self.short_ttl)

        assert await log.advance([first], HOUR) == [first]

        await until_free(log, second.slice)
        taken = await log.acquire("second", log.slices, HOUR)
        assert first.slice not in {lease.slice for lease in taken}

    async def test_a_lease_that_was_taken_over_cannot_advance(self, store: StateStore, log: OutboxLog) -> None:
        await append(store, *(new_record("orders||1", str(number)) for number in range(5)))
        frozen = await read_some(log, await log.acquire("frozen", log.slices, self.short_ttl), limit=10)
        await take_over(log, "other", ttl=self.short_ttl)

        assert await log.advance(frozen.leases, HOUR) == []

        again = await read_all(log, await take_over(log, "third"))
        assert [entry.record.event_id for entry in again] == ["0", "1", "2", "3", "4"]

    async def test_a_lease_that_was_taken_over_does_not_move_the_new_owners_position_back(
        self, store: StateStore, log: OutboxLog
    ) -> None:
        frozen = await log.acquire("frozen", log.slices, self.short_ttl)
        await append(store, *(new_record("orders||1", str(number)) for number in range(5)))
        owned = await read_some(log, await take_over(log, "owner"), limit=10)
        await log.advance(owned.leases, HOUR)

        await log.advance(frozen, HOUR)
        await log.release(frozen)

        assert sum(status.pending for status in await log.status()) == 0

    async def test_one_lost_lease_does_not_hold_up_the_others(self, log: OutboxLog) -> None:
        first, second, *_ = await log.acquire("first", log.slices, self.short_ttl)
        await log.advance([first], HOUR)
        await until_free(log, second.slice)
        await log.acquire("second", log.slices, HOUR)

        assert await log.advance([second, first], HOUR) == [first]

    async def test_a_lease_that_ran_out_and_that_nobody_took_can_advance(self, log: OutboxLog) -> None:
        leases = await log.acquire("slow", log.slices, self.short_ttl)
        await until_free(log, *(lease.slice for lease in leases))

        assert by_slice(await log.advance(leases, HOUR)) == by_slice(leases)

        assert await log.acquire("other", log.slices, HOUR) == []

    async def test_a_released_lease_cannot_advance(self, log: OutboxLog) -> None:
        leases = await acquire_all(log)
        await log.release(leases)

        assert await log.advance(leases, HOUR) == []

        assert {status.owner for status in await log.status()} == {None}
        assert len(await log.acquire("other", log.slices, HOUR)) == log.slices

    async def test_releasing_a_lease_that_was_taken_over_leaves_the_new_owner_alone(self, log: OutboxLog) -> None:
        lost = await log.acquire("lost", log.slices, self.short_ttl)
        owned = await take_over(log, "owner")

        await log.release(lost)

        assert await log.acquire("third", log.slices, HOUR) == []
        assert len(await log.advance(owned, HOUR)) == log.slices

    # Waiting

    async def test_a_wait_ends_when_something_is_there_already(self, store: StateStore, log: OutboxLog) -> None:
        leases = await acquire_all(log)
        await append(store, new_record("orders||1"))

        async with asyncio.timeout(PATIENCE.total_seconds()):
            await log.wait(leases, HOUR)

    async def test_a_wait_ends_soon_after_a_commit_with_records(self, store: StateStore, log: OutboxLog) -> None:
        follower = Follower(log, await acquire_all(log), timeout=HOUR)

        async with asyncio.timeout(PATIENCE.total_seconds()):
            for number in range(20):
                await asyncio.gather(
                    follower.follow(number + 1), append(store, new_record(f"orders||{number}", str(number)))
                )

        assert follower.ids == [str(number) for number in range(20)]

    async def test_a_wait_for_nothing_ends_at_its_timeout(self, log: OutboxLog) -> None:
        leases = await acquire_all(log)

        async with asyncio.timeout(PATIENCE.total_seconds()):
            await log.wait(leases, timedelta(milliseconds=50))
            await log.wait([], timedelta(milliseconds=50))

    async def test_a_wait_that_is_cancelled_leaves_the_log_usable(self, store: StateStore, log: OutboxLog) -> None:
        leases = await acquire_all(log)
        waits = [asyncio.create_task(log.wait(leases, HOUR)) for _ in range(20)]
        await append(store)
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)

        await append(store, new_record("orders||1", "after"))

        follower = Follower(log, leases, timeout=HOUR)
        async with asyncio.timeout(PATIENCE.total_seconds()):
            await follower.follow(1)
        assert follower.ids == ["after"]

    # Trimming

    async def test_trimming_gives_nothing_unread_away(self, store: StateStore, log: OutboxLog) -> None:
        await append(store, *(new_record("orders||1", str(number)) for number in range(10)))
        batch = await read_some(log, await acquire_all(log), limit=4)
        await log.advance(batch.leases, HOUR)

        await log.trim()

        rest = await read_all(log, batch.leases)
        read = [entry.record.event_id for entry in (*batch.entries, *rest)]
        assert read == [str(number) for number in range(10)]

    async def test_trimming_keeps_what_was_read_and_not_advanced(self, store: StateStore, log: OutboxLog) -> None:
        await append(store, *(new_record(f"orders||{number}") for number in range(20)))
        leases = await log.acquire("first", log.slices, self.short_ttl)
        assert len(await read_all(log, leases)) == 20

        await log.trim()

        assert len(await read_all(log, await take_over(log, "second"))) == 20

    async def test_what_comes_after_a_trim_of_everything_is_read(self, store: StateStore, log: OutboxLog) -> None:
        for number in range(5):
            await append(store, *(new_record(f"orders||{key}", f"{key}-{number}") for key in range(20)))

            assert len(await drain(log)) == 20
            await log.trim()

    # Putting aside

    async def test_a_log_with_nothing_aside_says_so(self, log: OutboxLog) -> None:
        leases = await acquire_all(log)

        assert await log.deferred(range(log.slices)) == await log.due_deferred(range(log.slices), 100) == []
        assert await read_aside(log, "orders||1") == ()
        assert await settle(log, leases, "orders||1", [], None) is False
        assert await log.read_deferred([], 100) == []
        assert await log.settle_deferred(leases, []) == []
        assert await log.replay() == await log.replay("orders||1") == 0

    async def test_entries_are_put_aside_together_with_the_position_behind_them(
        self, store: StateStore, log: OutboxLog
    ) -> None:
        await append(store, *(new_record(f"orders||{key}") for key in (1, 2, 1, 3, 1)))
        batch = await read_to_the_end(log, await log.acquire("first", log.slices, self.short_ttl))
        aside = of_key("orders||1", batch)

        kept = await log.advance(batch.leases, self.short_ttl, [Deferral(aside, failed(attempts=1))])

        assert by_slice(kept) == by_slice(batch.leases)
        assert await read_aside(log, "orders||1") == aside
        assert await read_aside(log, "orders||2") == ()
        assert await read_all(log, await take_over(log, "second")) == []

    @pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS.keys())
    async def test_an_entry_aside_is_read_as_it_was_in_the_log(
        self, store: StateStore, log: OutboxLog, record: OutboxRecord
    ) -> None:
        await append(store, record)

        _, (entry,) = await put_aside(log, record.order_key, failed(attempts=1))

        (read,) = await log.read_deferred([DeferredQueue.of(entry)], 100)
        assert read == entry
        assert read.record == record
        assert dict(read.record.metadata) == dict(record.metadata)

    async def test_entries_aside_are_read_in_commit_order_up_to_the_limit(
        self, store: StateStore, log: OutboxLog
    ) -> None:
        for number in range(0, 2_500, 500):
            await append(store, *(new_record("orders||1", str(number + n)) for n in range(500)))

        _, aside = await put_aside(log, "orders||1", failed(attempts=1))

        assert ids_of(aside) == [str(number) for number in range(2_500)]
        assert await read_aside(log, "orders||1", limit=2_000) == aside[:2_000]
        assert await read_aside(log, "orders||1", limit=1) == aside[:1]
        assert await read_aside(log, "orders||1", limit=10_000) == aside

    async def test_entries_that_follow_queue_up_behind_and_leave_the_failure_as_it_is(
        self, store: StateStore, log: OutboxLog
    ) -> None:
        await append(store, new_record("orders||1", "0"), new_record("orders||1", "1"))
        leases, _ = await put_aside(log, "orders||1", failed(attempts=1, pause=HOUR, reason="first"))
        (before,) = await log.deferred(range(log.slices))
        for number in range(2, 14):
            await append(store, new_record("orders||1", str(number)))
            leases, _ = await put_aside(log, "orders||1", None, leases=leases)

        assert ids_of(await read_aside(log, "orders||1")) == [str(number) for number in range(14)]
        (key,) = await log.deferred(range(log.slices))
        assert (key.attempts, key.reason, key.is_due, key.is_parked) == (1, "first", False, False)
        assert (key.pending, key.oldest_at) == (14, before.oldest_at)

    async def test_putting_aside_what_is_aside_already_changes_nothing(self, store: StateStore, log: OutboxLog) -> None:
        await append(store, *(new_record("orders||1", str(number)) for number in range(5)))
        batch = await read_to_the_end(log, await acquire_all(log))
        entries = of_key("orders||1", batch)
        await log.advance(batch.leases, HOUR, [Deferral(entries[:2], failed(attempts=3, pause=HOUR, reason="first"))])
        deferrals = [Deferral(entries, None), Deferral(entries[:2], failed(attempts=1, pause=NO_TIME, reason="again"))]

        for _ in range(2):
            assert len(await log.advance(batch.leases, HOUR, deferrals)) == log.slices

        assert await read_aside(log, "orders||1") == entries
        (key,) = await log.deferred(range(log.slices))
        assert (key.attempts, key.reason, key.is_due, key.pending) == (3, "first", False, 5)

    async def test_entries_meant_to_queue_up_where_nothing_is_aside_any_more_are_due_at_once(
        self, store: StateStore, log: OutboxLog
    ) -> None:
        """Whoever did not learn that a key was un-deferred must not park it for ever."""
        await append(store, new_record("orders||1"))

        _, aside = await put_aside(log, "orders||1", None)

        (key,) = await log.deferred(range(log.slices))
        assert (key.attempts, key.is_due, key.is_parked) == (0, True, False)
        assert await read_aside(log, "orders||1") == aside

    async def test_one_advance_puts_entries_of_many_keys_and_slices_aside(
        self, store: StateStore, log: OutboxLog
    ) -> None:
        keys = [f"orders||{number}" for number in range(60)]
        for number in range(4):
            await append(store, *(new_record(key, f"{key}#{number}") for key in keys))

        await put_each_aside(log, dict.fromkeys(keys, failed(attempts=1)))

        assert sorted(key.queue.order_key for key in await log.deferred(range(log.slices))) == sorted(keys)
        for key in keys:
            assert ids_of(await read_aside(log, key)) == [f"{key}#{number}" for number in range(4)]

    async def test_a_lease_that_was_taken_over_puts_nothing_aside(self, store: StateStore, log: OutboxLog) -> None:
        await append(store, new_record("orders||1"))
        frozen = await read_to_the_end(log, await log.acquire("frozen", log.slices, self.short_ttl))
        owned = await take_over(log, "owner")

        deferral = Deferral(of_key("orders||1", frozen), failed(attempts=1))
        assert await log.advance(frozen.leases, HOUR, [deferral]) == []

        assert await log.deferred(range(log.slices)) == []
        assert await read_aside(log, "orders||1") == ()
        assert len(await read_all(log, owned)) == 1

    async def test_a_released_lease_puts_nothing_aside(self, store: StateStore, log: OutboxLog) -> None:
        await append(store, new_record("orders||1"))
        leases = await acquire_all(log)
        batch = await read_to_the_end(log, leases)
        await log.release(leases)

        deferral = Deferral(of_key("orders||1", batch), failed(attempts=1))
        assert await log.advance(batch.leases, HOUR, [deferral]) == []

        assert await log.deferred(range(log.slices)) == []
        assert len(await drain(log)) == 1

    async def test_a_lost_lease_does_not_keep_the_others_from_putting_aside(
        self, store: StateStore, log: OutboxLog
    ) -> None:
        keys = ["orders||1", other_slice("orders||1", log.slices)]
        await append(store, *(new_record(key) for key in keys))
        batch = await read_to_the_end(log, await acquire_all(log))
        (lost,) = (lease for lease in batch.leases if lease.slice == slice_of(keys[0], log.slices))
        await log.release([lost])

        deferrals = [Deferral(of_key(key, batch), failed(attempts=1)) for key in keys]
        kept = await log.advance(batch.leases, HOUR, deferrals)

        assert len(kept) == log.slices - 1
        assert [key.queue.order_key for key in await log.deferred(range(log.slices))] == keys[1:]
        assert await read_aside(log, keys[0]) == ()

    async def test_entries_of_a_slice_whose_lease_is_not_given_are_not_put_aside(
        self, store: StateStore, log: OutboxLog
    ) -> None:
        await append(store, new_record("orders||1"))
        batch = await read_to_the_end(log, await acquire_all(log))
        others = [lease for lease in batch.leases if lease.slice != slice_of("orders||1", log.slices)]

        await log.advance(others, HOUR, [Deferral(of_key("orders||1", batch), failed(attempts=1))])

        assert await log.deferred(range(log.slices)) == []

    async def test_a_key_aside_is_told_with_its_failure_and_its_oldest_entry(
        self, store: StateStore, log: OutboxLog
    ) -> None:
        for number in range(3):
            await append(store, new_record("orders||é鍵🔑", str(number)))

        _, aside = await put_aside(
            log, "orders||é鍵🔑", failed(attempts=4, pause=HOUR, reason="größe 🚀: 'too \"big\"'\n")
        )

        assert await log.deferred(range(log.slices)) == [
            QueueStatus(
                queue=queue("orders||é鍵🔑", log),
                attempts=4,
                reason="größe 🚀: 'too \"big\"'\n",
                is_due=False,
                is_parked=False,
                pending=3,
                oldest_at=aside[0].created_at,
            )
        ]

    async def test_keys_aside_are_told_of_the_slices_asked_for(self, store: StateStore, log: OutboxLog) -> None:
        keys = ["orders||1", other_slice("orders||1", log.slices)]
        await append(store, *(new_record(key) for key in keys))
        await put_each_aside(log, dict.fromkeys(keys, failed(attempts=1)))

        told = {key: await log.deferred({slice_of(key, log.slices)}) for key in keys}

        assert {key: [each.queue.order_key for each in found] for key, found in told.items()} == {
            key: [key] for key in keys
        }
        assert await log.deferred([]) == []

    async def test_keys_aside_are_told_in_the_order_in_which_they_are_due(
        self, store: StateStore, log: OutboxLog
    ) -> None:
        pauses = {"a": HOUR, "b": None, "c": NO_TIME, "d": 3 * HOUR, "e": 2 * HOUR, "f": timedelta(minutes=1)}
        await append(store, *(new_record(key) for key in pauses))
        await put_each_aside(log, {key: Failure(1, pause, "refused") for key, pause in pauses.items()})

        keys = await log.deferred(range(log.slices))

        assert [key.queue.order_key for key in keys] == ["c", "f", "a", "e", "d", "b"]
        assert [(key.is_due, key.is_parked) for key in keys] == [(True, False), *[(False, False)] * 4, (False, True)]

    async def test_a_key_aside_is_due_after_its_pause(self, store: StateStore, log: OutboxLog) -> None:
        await append(store, new_record("orders||1"))
        leases, _ = await put_aside(log, "orders||1", failed(attempts=1, pause=timedelta(milliseconds=300)))
        await until_due(log, "orders||1")

        is_left = await settle(log, leases, "orders||1", [], failed(attempts=2, pause=timedelta(milliseconds=300)))

        (key,) = await log.deferred(range(log.slices))
        assert is_left
        assert (key.attempts, key.is_due) == (2, False)
        await until_due(log, "orders||1")

    async def test_what_is_aside_is_not_pending_in_the_log(self, store: StateStore, log: OutboxLog) -> None:
        await append(store, *(new_record("orders||1") for _ in range(5)))

        await put_aside(log, "orders||1", failed(attempts=1))

        statuses = await log.status()
        assert {(status.pending, status.oldest_at) for status in statuses} == {(0, None)}

    async def test_what_is_aside_outlives_trimming(self, store: StateStore, log: OutboxLog) -> None:
        await append(store, *(new_record("orders||1") for _ in range(5)))
        leases, aside = await put_aside(log, "orders||1", failed(attempts=1))
        for _ in range(3):
            await append(store, *(new_record("orders||2") for _ in range(5)))
            leases = await log.advance((await read_to_the_end(log, leases)).leases, HOUR)

            await log.trim()

        assert await read_aside(log, "orders||1") == aside
        assert [key.pending for key in await log.deferred(range(log.slices))] == [5]

    async def test_the_next_owner_finds_what_is_aside(self, store: StateStore, log: OutboxLog) -> None:
        await append(store, new_record("orders||1"), new_record("orders||1"))
        leases, aside = await put_aside(log, "orders||1", failed(attempts=2, reason="too large"))
        await log.release(leases)

        owned = await acquire_all(log)

        (key,) = await log.deferred([lease.slice for lease in owned])
        assert (key.queue.order_key, key.attempts, key.reason, key.pending) == ("orders||1", 2, "too large", 2)
        assert await read_aside(log, "orders||1") == aside
        assert await settle(log, owned, "orders||1", [entry.id for entry in aside], None) is False

    async def test_entries_of_one_key_wait_by_their_topics(self, store: StateStore, log: OutboxLog) -> None:
        topics = ("orders", "audit", "orders", "audit", "orders")
        await append(store, *(new_record("orders||1", topic=topic) for topic in topics))
        batch = await read_to_the_end(log, await acquire_all(log))
        by_topic = {
            topic: tuple(entry for entry in batch.entries if entry.record.topic == topic)
            for topic in ("orders", "audit")
        }

        deferrals = [Deferral(entries, failed(attempts=1)) for entries in by_topic.values()]
        leases = await log.advance(batch.leases, HOUR, deferrals)

        for topic, entries in by_topic.items():
            assert tuple(await log.read_deferred([queue("orders||1", log, topic=topic)], 100)) == entries
        audited = QueueProgress(queue("orders||1", log, topic="audit"), ids(by_topic["audit"]), None)
        assert await log.settle_deferred(leases, [audited]) == [audited.queue]
        (left,) = await log.deferred(range(log.slices))
        assert (left.queue, left.pending) == (queue("orders||1", log), 3)

    async def test_those_due_longest_are_told_first_and_up_to_the_limit(
        self, store: StateStore, log: OutboxLog
    ) -> None:
        pauses = {"a": HOUR, "b": None, "c": timedelta(milliseconds=2), "d": NO_TIME, "e": timedelta(milliseconds=1)}
        await append(store, *(new_record(key) for key in pauses))
        await put_each_aside(log, {key: Failure(1, pause, "refused") for key, pause in pauses.items()})
        await until_due(log, "c")

        due = await log.due_deferred(range(log.slices), 100)

        assert [status.queue.order_key for status in due] == ["d", "e", "c"]
        assert all(status.is_due and not status.is_parked for status in due)
        assert await log.due_deferred(range(log.slices), 2) == due[:2]
        assert await log.due_deferred([queue("e", log).slice], 2) == [due[1]]
        assert await log.due_deferred([], 2) == []

    async def test_those_of_some_topics_can_be_left_out(self, store: StateStore, log: OutboxLog) -> None:
        topics = [f"topic-{number}" for number in range(4)]
        await append(store, *(new_record("orders||1", topic=topic) for topic in topics))
        batch = await read_to_the_end(log, await acquire_all(log))
        await log.advance(
            batch.leases, HOUR, [Deferral((entry,), failed(attempts=1, pause=NO_TIME)) for entry in batch.entries]
        )

        due = await log.due_deferred(range(log.slices), 2, [("pubsub", topic) for topic in topics[:3]])

        assert [status.queue.topic for status in due] == ["topic-3"]
        assert len(await log.due_deferred(range(log.slices), 9, [("other", topics[0])])) == 4

    async def test_several_queues_are_read_at_once_and_each_of_them_in_order(
        self, store: StateStore, log: OutboxLog
    ) -> None:
        keys = [f"orders||{number}" for number in range(40)]
        for number in range(5):
            await append(store, *(new_record(key, f"{key}#{number}") for key in keys))
        await put_each_aside(log, dict.fromkeys(keys, failed(attempts=1)))

        some = await log.read_deferred([queue(key, log) for key in keys], 80)
        few = await log.read_deferred([queue(key, log) for key in keys], 1)

        assert by_key(entry.record for entry in some) == {key: [f"{key}#0", f"{key}#1"] for key in keys}
        assert by_key(entry.record for entry in few) == {key: [f"{key}#0"] for key in keys}

    async def test_of_large_entries_fewer_are_read_at_once(self, store: StateStore, log: OutboxLog) -> None:
        for number in range(40):
            await append(store, new_record("orders||1", str(number), body=b"x" * 1_000_000))
        found: list[LogEntry] = []
        leases: Sequence[Lease] = await acquire_all(log)

        while len(found) < 40:
            batch = await read_some(log, leases, limit=1_000)
            assert len(batch.entries) <= READ_BYTES // 1_000_000 + 1
            found += batch.entries
            leases = batch.leases

        assert ids_of(found) == [str(number) for number in range(40)]
        await log.advance(leases, HOUR, [Deferral(tuple(found), failed(attempts=1))])
        aside = await log.read_deferred([queue("orders||1", log)], 1_000)
        assert tuple(aside) == tuple(found[: len(aside)])
        assert 1 <= len(aside) <= READ_BYTES // 1_000_000 + 1

    # Settling what is aside

    async def test_queues_of_many_slices_are_settled_at_once(self, store: StateStore, log: OutboxLog) -> None:
        keys = [f"orders||{number}" for number in range(40)]
        await append(store, *(new_record(key, f"{key}#{number}") for number in range(3) for key in keys))
        leases = await put_each_aside(log, dict.fromkeys(keys, failed(attempts=3)))
        aside = {key: await read_aside(log, key) for key in keys}
        lost = queue("orders||0", log).slice
        kept = [key for key in keys if queue(key, log).slice != lost]
        emptied = kept[::2]

        told = await log.settle_deferred(
            [lease for lease in leases if lease.slice != lost],
            [
                QueueProgress(
                    queue(key, log),
                    ids(aside[key] if key in emptied else aside[key][:1]),
                    None if key in emptied else failed(attempts=1, reason=key),
                )
                for key in keys
            ],
        )

        assert {each.order_key for each in told} == set(emptied)
        left = {each.queue.order_key: (each.attempts, each.pending) for each in await log.deferred(range(log.slices))}
        assert left == {key: (1, 2) if key in kept else (3, 3) for key in keys if key not in emptied}

    async def test_a_key_of_which_everything_is_published_is_not_aside_any_more(
        self, store: StateStore, log: OutboxLog
    ) -> None:
        await append(store, *(new_record(f"orders||{number % 2}") for number in range(6)))
        leases = await put_each_aside(log, dict.fromkeys(["orders||0", "orders||1"], failed(attempts=1)))
        aside = {key: await read_aside(log, key) for key in ("orders||0", "orders||1")}

        is_left = await settle(log, leases, "orders||0", [entry.id for entry in aside["orders||0"]], None)

        assert is_left is False
        assert [key.queue.order_key for key in await log.deferred(range(log.slices))] == ["orders||1"]
        assert await read_aside(log, "orders||0") == ()
        assert await read_aside(log, "orders||1") == aside["orders||1"]

    async def test_the_failure_of_the_first_entry_left_is_noted(self, store: StateStore, log: OutboxLog) -> None:
        await append(store, *(new_record("orders||1", str(number)) for number in range(5)))
        leases, aside = await put_aside(log, "orders||1", failed(attempts=7, pause=NO_TIME, reason="before"))

        published = [aside[0].id, aside[1].id, aside[3].id]
        is_left = await settle(log, leases, "orders||1", published, failed(attempts=1, pause=HOUR, reason="after"))

        assert is_left is True
        assert await read_aside(log, "orders||1") == (aside[2], aside[4])
        (key,) = await log.deferred(range(log.slices))
        assert (key.attempts, key.reason, key.is_due, key.is_parked) == (1, "after", False, False)
        assert (key.pending, key.oldest_at) == (2, aside[2].created_at)

    async def test_a_key_of_which_nothing_was_published_notes_the_failure(
        self, store: StateStore, log: OutboxLog
    ) -> None:
        await append(store, new_record("orders||1"), new_record("orders||1"))
        leases, aside = await put_aside(log, "orders||1", failed(attempts=9, pause=NO_TIME))

        is_left = await settle(log, leases, "orders||1", [], Failure(10, None, "parked now"))

        assert is_left is True
        assert await read_aside(log, "orders||1") == aside
        (key,) = await log.deferred(range(log.slices))
        assert (key.attempts, key.reason, key.is_due, key.is_parked) == (10, "parked now", False, True)

    async def test_what_is_left_without_a_failure_is_due_at_once_with_no_attempts(
        self, store: StateStore, log: OutboxLog
    ) -> None:
        await append(store, *(new_record("orders||1") for _ in range(3)))
        leases, aside = await put_aside(log, "orders||1", failed(attempts=5, pause=HOUR))

        is_left = await settle(log, leases, "orders||1", [entry.id for entry in aside[:2]], None)

        assert is_left is True
        assert await read_aside(log, "orders||1") == aside[2:]
        (key,) = await log.deferred(range(log.slices))
        assert (key.attempts, key.is_due, key.is_parked) == (0, True, False)

    async def test_settling_twice_is_no_error(self, store: StateStore, log: OutboxLog) -> None:
        await append(store, *(new_record("orders||1") for _ in range(3)))
        leases, aside = await put_aside(log, "orders||1", failed(attempts=1))
        first, rest = [aside[0].id], [entry.id for entry in aside[1:]]

        told = [await settle(log, leases, "orders||1", first, failed(attempts=2)) for _ in range(2)]
        told += [await settle(log, leases, "orders||1", rest, None) for _ in range(2)]

        assert told == [True, True, False, False]
        assert await log.deferred(range(log.slices)) == []

    async def test_ids_of_another_key_are_not_settled(self, store: StateStore, log: OutboxLog) -> None:
        same_slice = other_key_of_the_slice("orders||1", log.slices)
        await append(store, new_record("orders||1"), new_record(same_slice))
        leases = await put_each_aside(log, dict.fromkeys(("orders||1", same_slice), failed(attempts=1)))
        before = await read_aside(log, "orders||1")

        is_left = await settle(log, leases, same_slice, [entry.id for entry in before], failed(attempts=1))

        assert is_left is True
        assert await read_aside(log, "orders||1") == before
        assert len(await read_aside(log, same_slice)) == 1

    async def test_thousands_of_entries_are_settled_at_once(self, store: StateStore, log: OutboxLog) -> None:
        for _ in range(10):
            await append(store, *(new_record("orders||1") for _ in range(300)))
        leases, aside = await put_aside(log, "orders||1", failed(attempts=1))

        is_left = await settle(log, leases, "orders||1", [entry.id for entry in aside[:2_999]], failed(attempts=1))

        assert is_left is True
        assert await read_aside(log, "orders||1") == aside[2_999:]

    async def test_a_key_that_was_settled_can_be_put_aside_again(self, store: StateStore, log: OutboxLog) -> None:
        leases = await acquire_all(log)
        for number in range(3):
            await append(store, new_record("orders||1", str(number)))
            leases, aside = await put_aside(log, "orders||1", failed(attempts=number + 1, pause=HOUR), leases=leases)

            (key,) = await log.deferred(range(log.slices))
            assert (key.attempts, key.pending, key.is_due) == (number + 1, 1, False)
            assert ids_of(aside) == [str(number)]
            assert await settle(log, leases, "orders||1", [entry.id for entry in aside], None) is False

    @pytest.mark.parametrize("lost", ["taken over", "released"])
    async def test_a_lease_that_was_lost_settles_nothing(self, store: StateStore, log: OutboxLog, lost: str) -> None:
        await append(store, new_record("orders||1"), new_record("orders||1"))
        leases, aside = await put_aside(log, "orders||1", failed(attempts=1, pause=HOUR, reason="first"))
        await log.release(leases)
        if lost == "taken over":
            await acquire_all(log)

        told = [
            await settle(log, leases, "orders||1", [aside[0].id], Failure(2, None, "second")),
            await settle(log, leases, "orders||1", [entry.id for entry in aside], None),
        ]

        assert told == [True, True]
        assert await read_aside(log, "orders||1") == aside
        (key,) = await log.deferred(range(log.slices))
        assert (key.attempts, key.reason, key.is_parked, key.is_due) == (1, "first", False, False)

    async def test_a_lease_that_was_lost_is_told_that_there_is_some_left_where_nothing_is(self, log: OutboxLog) -> None:
        lost = await acquire_all(log)
        await log.release(lost)

        assert await settle(log, lost, "orders||1", [], None) is True

    # Replaying

    async def test_replay_makes_every_parked_key_due_with_its_attempts_forgotten(
        self, store: StateStore, log: OutboxLog
    ) -> None:
        keys = [f"orders||{number}" for number in range(20)]
        await append(store, *(new_record(key) for key in keys))
        parked = dict.fromkeys(keys[2:], Failure(10, None, "too large"))
        await put_each_aside(log, {**parked, **dict.fromkeys(keys[:2], failed(attempts=3, pause=HOUR))})

        assert await log.replay() == 18

        found = {key.queue.order_key: key for key in await log.deferred(range(log.slices))}
        states = {name: (key.attempts, key.is_due, key.is_parked) for name, key in found.items()}
        assert states == {
            **dict.fromkeys(keys[2:], (0, True, False)),
            **dict.fromkeys(keys[:2], (3, False, False)),
        }
        assert await log.replay() == 0

    async def test_replay_of_one_key_leaves_the_others_parked(self, store: StateStore, log: OutboxLog) -> None:
        await append(store, *(new_record(f"orders||{number}") for number in range(3)))
        await put_each_aside(
            log, dict.fromkeys(["orders||0", "orders||1", "orders||2"], Failure(10, None, "too large"))
        )

        assert await log.replay("orders||1") == 1

        found = {key.queue.order_key: key for key in await log.deferred(range(log.slices))}
        assert {name: (key.attempts, key.is_due, key.is_parked) for name, key in found.items()} == {
            "orders||0": (10, False, True),
            "orders||1": (0, True, False),
            "orders||2": (10, False, True),
        }
        assert await log.replay("orders||1") == await log.replay("orders||none") == 0

    async def test_a_key_that_is_not_parked_cannot_be_replayed(self, store: StateStore, log: OutboxLog) -> None:
        await append(store, new_record("orders||1"))
        await put_aside(log, "orders||1", failed(attempts=3, pause=HOUR))

        assert await log.replay("orders||1") == await log.replay() == 0

        (key,) = await log.deferred(range(log.slices))
        assert (key.attempts, key.is_due) == (3, False)

    async def test_replay_takes_no_lease_and_fences_nobody(self, store: StateStore, log: OutboxLog) -> None:
        await append(store, new_record("orders||1"), new_record("orders||1"))
        leases, aside = await put_aside(log, "orders||1", Failure(10, None, "too large"))

        await log.replay()

        assert await read_aside(log, "orders||1") == aside
        assert await settle(log, leases, "orders||1", [entry.id for entry in aside], None) is False
        assert len(await log.advance(leases, HOUR)) == log.slices

    # Status

    async def test_the_status_of_an_untouched_log_tells_of_every_slice(self, log: OutboxLog) -> None:
        statuses = await log.status()

        assert [status.slice for status in statuses] == list(range(log.slices))
        assert {(status.owner, status.pending, status.oldest_at) for status in statuses} == {(None, 0, None)}

    async def test_the_status_tells_what_is_behind_the_persisted_position(
        self, store: StateStore, log: OutboxLog
    ) -> None:
        asked_at = datetime.now(UTC)
        await append(store, *(new_record("orders||1") for _ in range(10)))
        crowded = slice_of("orders||1", log.slices)
        before = (await log.status())[crowded]

        batch = await read_some(log, await acquire_all(log), limit=4)
        await log.advance(batch.leases, HOUR)

        after = (await log.status())[crowded]
        assert (before.pending, after.pending) == (10, 10 - len(batch.entries))
        assert before.oldest_at is not None
        assert abs(before.oldest_at - asked_at) < PATIENCE
        assert before.position != after.position

    async def test_the_status_tells_how_old_the_oldest_unread_record_is(
        self, store: StateStore, log: OutboxLog
    ) -> None:
        for number in range(3):
            await append(store, new_record("orders||1", str(number)))
        entries = await read_all(log, await acquire_all(log))

        status = (await log.status())[slice_of("orders||1", log.slices)]

        assert status.oldest_at == entries[0].created_at

    async def test_the_status_tells_owner_and_epoch_of_live_leases(self, log: OutboxLog) -> None:
        (lease,) = await log.acquire("relay", 1, HOUR)

        statuses = await log.status()

        assert (statuses[lease.slice].owner, statuses[lease.slice].epoch) == ("relay", lease.epoch)
        assert [status.slice for status in statuses if status.owner] == [lease.slice]

    async def test_the_status_names_no_owner_whose_lease_ran_out_or_was_released(self, log: OutboxLog) -> None:
        await log.acquire("dead", 2, self.short_ttl)
        await log.release(await log.acquire("gone", 2, HOUR))

        await until_free(log, *range(log.slices))

    # Writers and readers at once

    async def test_readers_along_with_writers_lose_nothing_and_keep_the_order_of_every_key(
        self, store: StateStore, log: OutboxLog
    ) -> None:
        await assert_chains_are_read_in_order([store], log)


async def assert_chains_are_read_in_order(stores: Sequence[StateStore], log: OutboxLog) -> None:
    """Let many writers contend for a dozen keys and a reader follow; nothing may be lost, doubled or out of order.

    Each commit counts its key up under an etag and tells the new count, so the order of the commits is known.
    """
    keys, steps = [f"orders||{number}" for number in range(12)], 20
    writers = 4
    follower = Follower(log, await acquire_all(log), timeout=timedelta(milliseconds=100))

    async with asyncio.timeout(2 * PATIENCE.total_seconds()), asyncio.TaskGroup() as group:
        group.create_task(follower.follow(len(keys) * steps * writers, limit=50))
        for key in keys:
            for writer in range(writers):
                group.create_task(count_up(stores[writer % len(stores)], key, steps))

    for _ in range(3):
        await follower.read(limit=50)
    expected = {key: [f"{key}#{number}" for number in range(1, steps * writers + 1)] for key in keys}
    assert by_key(follower.records) == expected


class Follower:
    """A relay that only reads: it waits, reads on, and remembers what it saw."""

    def __init__(self, log: OutboxLog, leases: Sequence[Lease], *, timeout: timedelta) -> None:
        self.records: list[OutboxRecord] = []
        self._log = log
        self._leases = leases
        self._timeout = timeout

    @property
    def ids(self) -> list[str]:
        return [record.event_id for record in self.records]

    async def follow(self, total: int, *, limit: int = 100) -> None:
        while len(self.records) < total:
            await self._log.wait(self._leases, self._timeout)
            await self.read(limit=limit)

    async def read(self, *, limit: int) -> None:
        batch = await self._log.read(self._leases, limit)
        self._leases = batch.leases
        self.records.extend(entry.record for entry in batch.entries)


def new_record(
    order_key: str, event_id: str | None = None, *, topic: str = "orders", body: bytes = b'{"specversion": "1.0"}'
) -> OutboxRecord:
    return OutboxRecord(order_key, event_id or uuid4().hex, "pubsub", topic, body)


async def append(store: StateStore, *records: OutboxRecord) -> None:
    await store.transact(Commit((), records=records))


async def count_up(store: StateStore, key: str, times: int) -> None:
    """Commit, `times` times, the next count of `key` and the record that tells of it."""
    for _ in range(times):
        while not await _is_counted(store, key):
            pass


async def _is_counted(store: StateStore, key: str) -> bool:
    item = await store.get(key)
    # Let the others read the same value, also where reading does not wait for anything.
    await asyncio.sleep(0)
    number, etag = (int(item.value) + 1, item.etag) if item else (1, ETag(""))
    upsert = Upsert(key, b"%d" % number, etag=etag, concurrency=Concurrency.FIRST_WRITE)
    try:
        await store.transact(Commit((upsert,), records=(new_record(key, f"{key}#{number}"),)))
    except ETagMismatch:
        return False
    return True


async def acquire_all(log: OutboxLog) -> list[Lease]:
    leases = await log.acquire(f"reader {uuid4().hex}", log.slices, HOUR)
    assert len(leases) == log.slices, "a slice is still leased by someone else"
    return leases


async def take_over(log: OutboxLog, owner: str, *, ttl: timedelta = HOUR) -> list[Lease]:
    """Lease every slice as soon as its lease has run out."""
    await until_free(log, *range(log.slices))
    leases = await log.acquire(owner, log.slices, ttl)
    assert len(leases) == log.slices
    return leases


async def until_free(log: OutboxLog, *slices: int) -> None:
    def is_free(status: SliceStatus) -> bool:
        return status.slice not in slices or status.owner is None

    async def are_free() -> bool:
        return all(is_free(status) for status in await log.status())

    await until(are_free)


async def read_some(log: OutboxLog, leases: Sequence[Lease], *, limit: int) -> Batch:
    """Read until something is found: a position may move over nothing first."""
    batch = await log.read(leases, limit)
    async with asyncio.timeout(PATIENCE.total_seconds()):
        while not batch.entries:
            batch = await log.read(batch.leases, limit)
    return batch


async def read_all(log: OutboxLog, leases: Sequence[Lease], *, limit: int = 1_000) -> list[LogEntry]:
    return list((await read_to_the_end(log, leases, limit=limit)).entries)


async def drain(log: OutboxLog) -> list[OutboxRecord]:
    """Read everything that is unread, and move the persisted positions behind it."""
    batch = await read_to_the_end(log, await acquire_all(log))
    await log.release(batch.leases)
    return [entry.record for entry in batch.entries]


async def read_to_the_end(log: OutboxLog, leases: Sequence[Lease], *, limit: int = 1_000) -> Batch:
    """Read everything that is unread, as one batch."""
    entries: list[LogEntry] = []
    empty_reads = 0
    # One read may find nothing and only move a position on to where more is visible.
    while empty_reads < 3:
        batch = await log.read(leases, limit)
        leases = batch.leases
        entries.extend(batch.entries)
        empty_reads = 0 if batch.entries else empty_reads + 1
    return Batch(tuple(entries), tuple(leases))


def failed(*, attempts: int, pause: timedelta = HOUR, reason: str = "refused") -> Failure:
    return Failure(attempts, pause, reason)


async def put_aside(
    log: OutboxLog, order_key: str, failure: Failure | None, *, leases: Sequence[Lease] | None = None
) -> tuple[list[Lease], tuple[LogEntry, ...]]:
    """Put all that is unread of a key aside and pass what is unread of others; return the leases and the entries."""
    batch = await read_to_the_end(log, await acquire_all(log) if leases is None else leases)
    entries = of_key(order_key, batch)
    assert entries, f"nothing of {order_key!r} is unread"
    kept = await log.advance(batch.leases, HOUR, [Deferral(entries, failure)])
    assert len(kept) == log.slices
    return kept, entries


async def put_each_aside(log: OutboxLog, failures: Mapping[str, Failure]) -> list[Lease]:
    """Put all that is unread of each of these keys aside, in one step."""
    batch = await read_to_the_end(log, await acquire_all(log))
    deferrals = [Deferral(of_key(key, batch), failure) for key, failure in failures.items()]
    return await log.advance(batch.leases, HOUR, deferrals)


async def settle(
    log: OutboxLog, leases: Sequence[Lease], order_key: str, published: Sequence[str], failure: Failure | None
) -> bool:
    """Settle one queue; tell whether anything of it is left."""
    progress = QueueProgress(queue(order_key, log), tuple(published), failure)
    return await log.settle_deferred(leases, [progress]) != [progress.queue]


async def read_aside(log: OutboxLog, order_key: str, *, limit: int = 10_000) -> tuple[LogEntry, ...]:
    return tuple(await log.read_deferred([queue(order_key, log)], limit))


def queue(order_key: str, log: OutboxLog, *, topic: str = "orders") -> DeferredQueue:
    return DeferredQueue(slice_of(order_key, log.slices), order_key, "pubsub", topic)


async def until_due(log: OutboxLog, order_key: str) -> None:
    async def is_due() -> bool:
        return any(key.is_due and key.queue.order_key == order_key for key in await log.deferred(range(log.slices)))

    await until(is_due)


def of_key(order_key: str, batch: Batch) -> tuple[LogEntry, ...]:
    return tuple(entry for entry in batch.entries if entry.record.order_key == order_key)


def ids(entries: Iterable[LogEntry]) -> tuple[str, ...]:
    return tuple(entry.id for entry in entries)


def ids_of(entries: Iterable[LogEntry]) -> list[str]:
    return [entry.record.event_id for entry in entries]


def other_slice(order_key: str, slices: int) -> str:
    """Make an order key of another slice."""
    return next(key for key in _more_keys(order_key) if slice_of(key, slices) != slice_of(order_key, slices))


def other_key_of_the_slice(order_key: str, slices: int) -> str:
    return next(key for key in _more_keys(order_key) if slice_of(key, slices) == slice_of(order_key, slices))


def _more_keys(order_key: str) -> Iterable[str]:
    return (f"{order_key}-{number}" for number in count())


def by_slice(leases: Iterable[Lease]) -> list[Lease]:
    return sorted(leases, key=lambda lease: lease.slice)


def by_key(records: Iterable[OutboxRecord]) -> dict[str, list[str]]:
    """Sort the event ids by order key; those of one key stay in their order."""
    ids: defaultdict[str, list[str]] = defaultdict(list)
    for record in records:
        ids[record.order_key].append(record.event_id)
    return dict(ids)
