"""What is put aside of a log on SQLite: in one transaction with the position, in a file that others share."""

from datetime import timedelta
from itertools import count
from pathlib import Path

import apsw
import pytest

from statecast.clock import SystemClock
from statecast.components.manifest import Component
from statecast.components.state.log import READ_BYTES, Deferral, Failure
from statecast.components.state.sqlite.state import SqliteStateStore
from statecast.components.testing.log import (
    acquire_all,
    append,
    new_record,
    of_key,
    put_each_aside,
    queue,
    read_aside,
    read_to_the_end,
    settle,
)
from statecast.errors import StoreUnavailable

HOUR = timedelta(hours=1)
NO_TIME = timedelta(0)
REFUSED = Failure(1, HOUR, "refused")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.db"


def new_store(path: Path, *, app_id: str = "orders") -> SqliteStateStore:
    component = Component("statestore", "state.sqlite", metadata={"connectionString": str(path)})
    return SqliteStateStore(component, app_id=app_id, clock=SystemClock())


async def test_the_file_stops_growing_when_what_is_put_aside_is_published_in_the_end(path: Path) -> None:
    pages: list[int] = []
    async with new_store(path) as store:
        neighbour = apsw.Connection(str(path))
        for _ in range(30):
            await append(store, *(new_record("orders||1") for _ in range(200)))
            leases = await put_each_aside(store.log, {"orders||1": REFUSED})
            ids = [entry.id for entry in await read_aside(store.log, "orders||1")]
            assert await settle(store.log, leases, "orders||1", ids, None) is False
            await store.log.release(leases)
            await store.log.trim()
            pages.append(neighbour.pragma("page_count"))
        neighbour.close()

    assert max(pages[10:]) == pages[10]


async def test_a_disk_too_full_for_what_is_to_be_put_aside_keeps_the_position_where_it_was(path: Path) -> None:
    async with new_store(path) as store:
        await append(store, *(new_record("orders||1") for _ in range(2_000)))
        batch = await read_to_the_end(store.log, await acquire_all(store.log))
        deferral = Deferral(of_key("orders||1", batch), REFUSED)
        pages = await store._database.read(lambda cursor: cursor.connection.pragma("page_count"))
        await store._database.write(lambda cursor: cursor.connection.pragma("max_page_count", pages))

        with pytest.raises(StoreUnavailable):
            await store.log.advance(batch.leases, HOUR, [deferral])

        assert await store.log.deferred(range(store.log.slices)) == []
        assert sum(status.pending for status in await store.log.status()) == 2_000

        await store._database.write(lambda cursor: cursor.connection.pragma("max_page_count", 1_000_000))
        assert len(await store.log.advance(batch.leases, HOUR, [deferral])) == store.log.slices
        assert await read_aside(store.log, "orders||1") == batch.entries


async def test_what_one_app_has_aside_is_no_other_apps(path: Path) -> None:
    async with new_store(path) as orders, new_store(path, app_id="billing") as billing:
        for store, number in ((orders, 2), (billing, 3)):
            await append(store, *(new_record("shared||1") for _ in range(number)))
            await put_each_aside(store.log, {"shared||1": Failure(10, None, "too large")})

        assert await orders.log.replay() == 1

        told = [(await store.log.deferred(range(store.log.slices)))[0] for store in (orders, billing)]
        assert [(key.pending, key.is_parked) for key in told] == [(2, False), (3, True)]
        assert [len(await read_aside(store.log, "shared||1")) for store in (orders, billing)] == [2, 3]


async def test_asking_what_is_due_takes_no_more_steps_where_many_queues_are_not(path: Path) -> None:
    """Parked, to be tried later, or of a topic that is left out, as most are while that takes nothing."""
    pauses = {"parked": None, "later": HOUR, "closed": NO_TIME}
    async with new_store(path) as store:
        steps: list[int] = []
        for number in (1, 1_000):
            await append(store, *(new_record(f"{topic}||{n}", topic=topic) for topic in pauses for n in range(number)))
            batch = await read_to_the_end(store.log, await acquire_all(store.log))
            deferrals = [
                Deferral((entry,), Failure(1, pauses[entry.record.topic], "refused")) for entry in batch.entries
            ]
            await store.log.release(await store.log.advance(batch.leases, HOUR, deferrals))
            steps.append(await count_steps_to_list_due(store))

    assert steps[1] < 2 * steps[0]


async def test_a_read_of_queues_that_stops_halfway_holds_no_snapshot(path: Path) -> None:
    """One that was held would keep the write-ahead log from being emptied."""
    keys = [f"orders||{number}" for number in range(5)]
    async with new_store(path) as store:
        for key in keys:
            await append(store, *(new_record(key, body=b"x" * (READ_BYTES // 8)) for _ in range(5)))
            leases = await put_each_aside(store.log, {key: REFUSED})
            await store.log.release(leases)

        entries = await store.log.read_deferred([queue(key, store.log) for key in keys], 1_000)

        assert [entry.record.order_key for entry in entries] == [keys[0]] * 5 + [keys[1]] * 3
        neighbour = apsw.Connection(str(path))
        assert neighbour.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall() == [(0, 0, 0)]
        neighbour.close()


async def count_steps_to_list_due(store: SqliteStateStore) -> int:
    """Count the steps of SQLite's virtual machine."""
    steps = count()
    reader = await store._database.read(lambda cursor: cursor.connection)
    reader.set_progress_handler(lambda: next(steps) < 0, 1)
    assert await store.log.due_deferred(range(store.log.slices), 100, [("pubsub", "closed")]) == []
    reader.set_progress_handler(None)
    return next(steps)
