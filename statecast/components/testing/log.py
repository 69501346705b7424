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
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest

from statecast.components.state.commit import Commit, Concurrency, ETag, OutboxRecord, Upsert
from statecast.components.state.log import Batch, Lease, LogEntry, OutboxLog, SliceStatus, slice_of
from statecast.components.state.store import StateStore
from statecast.components.testing.deadline import PATIENCE, until
from statecast.errors import ETagMismatch

StoreFactory = Callable[[], StateStore]

HOUR = timedelta(hours=1)


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

    @pytest.mark.parametrize(
        "record",
        [
            OutboxRecord("orders||1", "id-1", "pubsub", "orders", b'{"specversion": "1.0"}'),
            OutboxRecord("orders||é鍵🔑", "id ü", "pub sub", "größe.🚀", b"", {}),
            OutboxRecord("", "id", "pubsub", "orders", bytes(range(256)), {"": "", " ": "\n", "é": "🔑", "a'\"": "\\"}),
            OutboxRecord("orders||" + "k" * 500, "i" * 200, "p", "t" * 249, b"x" * 1_000_000, {"partitionKey": "k"}),
            OutboxRecord("orders||1", "id-1", "pubsub", "orders", b"\x00\xff", {"a": "1", "A": "2"}, format=7),
        ],
        ids=["plain", "unicode", "every byte", "large", "another format"],
    )
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


def new_record(order_key: str, event_id: str | None = None) -> OutboxRecord:
    return OutboxRecord(order_key, event_id or uuid4().hex, "pubsub", "orders", b'{"specversion": "1.0"}')


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
    entries, _ = await _read_to_the_end(log, leases, limit)
    return entries


async def drain(log: OutboxLog) -> list[OutboxRecord]:
    """Read everything that is unread, and move the persisted positions behind it."""
    entries, leases = await _read_to_the_end(log, await acquire_all(log), 1_000)
    await log.release(leases)
    return [entry.record for entry in entries]


async def _read_to_the_end(
    log: OutboxLog, leases: Sequence[Lease], limit: int
) -> tuple[list[LogEntry], Sequence[Lease]]:
    entries: list[LogEntry] = []
    empty_reads = 0
    # One read may find nothing and only move a position on to where more is visible.
    while empty_reads < 3:
        batch = await log.read(leases, limit)
        leases = batch.leases
        entries.extend(batch.entries)
        empty_reads = 0 if batch.entries else empty_reads + 1
    return entries, leases


def by_slice(leases: Iterable[Lease]) -> list[Lease]:
    return sorted(leases, key=lambda lease: lease.slice)


def by_key(records: Iterable[OutboxRecord]) -> dict[str, list[str]]:
    """Sort the event ids by order key; those of one key stay in their order."""
    ids: defaultdict[str, list[str]] = defaultdict(list)
    for record in records:
        ids[record.order_key].append(record.event_id)
    return dict(ids)
