"""The memory backend, held to the contracts; and what only it promises.

Each check of the backend was taken out once by hand, and the suite failed every time.
"""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from statecast.clock import SystemClock
from statecast.components.manifest import Component
from statecast.components.state.commit import Commit, Mark, Upsert
from statecast.components.state.memory import MemoryStateStore
from statecast.components.state.memory.expiring import Expiring
from statecast.components.testing import OutboxLogContract, StateStoreContract
from statecast.components.testing.deadline import until
from statecast.components.testing.log import StoreFactory, new_record

HOUR = timedelta(hours=1)
NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)


def make_memory_store() -> MemoryStateStore:
    return MemoryStateStore(Component("statestore", "state.in-memory"), app_id="orders", clock=SystemClock())


class TestMemoryStateStore(StateStoreContract):
    @pytest.fixture
    def make_store(self) -> StoreFactory:
        return make_memory_store


class TestMemoryOutboxLog(OutboxLogContract):
    @pytest.fixture
    def make_store(self) -> StoreFactory:
        return make_memory_store


class MovedClock:
    """A clock that stands still until the test moves it; a wait ends when it is moved or the event is set."""

    def __init__(self) -> None:
        self._now = NOON
        self._moved = asyncio.Event()

    def move(self, by: timedelta) -> None:
        self._now += by
        self._moved.set()
        self._moved = asyncio.Event()

    def now(self) -> datetime:
        return self._now

    def monotonic(self) -> float:
        return self._now.timestamp()

    async def wait(self, event: asyncio.Event, timeout: timedelta) -> bool:
        ends_at = self._now + timeout
        while self._now < ends_at and not event.is_set():
            ends = [asyncio.ensure_future(each.wait()) for each in (event, self._moved)]
            try:
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for end in ends:
                    end.cancel()
        return event.is_set()


def make_store_with(clock: MovedClock) -> MemoryStateStore:
    return MemoryStateStore(Component("statestore", "state.in-memory"), app_id="orders", clock=clock)


async def test_a_value_is_there_until_its_time_and_not_at_it() -> None:
    clock = MovedClock()
    async with make_store_with(clock) as store:
        await store.transact(Commit((Upsert("orders||1", b"1", ttl=HOUR),)))

        clock.move(HOUR - timedelta(microseconds=1))
        item = await store.get("orders||1")
        clock.move(timedelta(microseconds=1))

        assert item is not None
        assert item.expires_at == NOON + HOUR
        assert await store.get("orders||1") is None


async def test_a_time_to_live_beyond_the_calendar_ends_with_it() -> None:
    async with make_memory_store() as store:
        await store.transact(Commit((Upsert("orders||1", b"1", ttl=timedelta.max),)))

        item = await store.get("orders||1")

    assert item is not None
    assert item.expires_at == datetime.max.replace(tzinfo=UTC)


async def test_expired_values_and_marks_are_swept_without_being_asked_for() -> None:
    clock = MovedClock()
    async with make_store_with(clock) as store:
        expiring = [Upsert(f"orders||{number}", b"1", ttl=HOUR) for number in range(10)]
        await store.transact(Commit((*expiring, Upsert("orders||kept", b"1")), marks=(Mark(bytes(16), HOUR),)))

        async def are_swept() -> bool:
            clock.move(HOUR)
            return (len(store._items), len(store._marks)) == (1, 0)

        await until(are_swept)

        assert await store.get("orders||kept") is not None


async def test_a_store_keeps_what_it_holds_over_closing_and_opening() -> None:
    store = make_memory_store()
    async with store:
        await store.transact(Commit((Upsert("orders||1", b"1"),)))

    async with store:
        item = await store.get("orders||1")

    assert item is not None


async def test_what_was_relayed_and_trimmed_takes_no_space() -> None:
    async with make_memory_store() as store:
        for number in range(50):
            await store.transact(Commit((), records=(new_record(f"orders||{number}"),)))
        leases = await store.log.acquire("relay", store.log.slices, HOUR)
        await store.log.advance((await store.log.read(leases, 1_000)).leases, HOUR)

        await store.log.trim()

        assert sum(len(each.rows) for each in store.log._slices) == 0


def test_an_entry_put_again_has_its_new_end_only() -> None:
    entries: Expiring[str, int] = Expiring()
    entries.put("a", 1, NOON)
    entries.put("a", 2, None)

    entries.sweep(NOON)

    assert entries.get("a", NOON) == 2
