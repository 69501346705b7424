"""What is put aside of a log on SQLite: in one transaction with the position, in a file that others share."""

from datetime import timedelta
from pathlib import Path

import apsw
import pytest

from statecast.clock import SystemClock
from statecast.components.manifest import Component
from statecast.components.state.log import Deferral, Failure
from statecast.components.state.sqlite.state import SqliteStateStore
from statecast.components.testing.log import (
    acquire_all,
    append,
    new_record,
    of_key,
    put_each_aside,
    read_aside,
    read_to_the_end,
    settle,
)
from statecast.errors import StoreUnavailable

HOUR = timedelta(hours=1)
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
