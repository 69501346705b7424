"""What a process can do as a role that may use the tables, and may not make any."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta

import asyncpg
import pytest

from statecast.clock import SystemClock
from statecast.components.manifest import Component
from statecast.components.state.commit import Commit, Mark, Upsert
from statecast.components.state.log import Deferral, Failure, QueueProgress
from statecast.components.state.postgresql import PostgresqlStateStore
from statecast.components.state.postgresql.config import QualifiedName
from statecast.components.state.postgresql.migration import pending_statements
from statecast.components.state.postgresql.schema import PARTITION_BITS, Layout
from statecast.components.testing.deadline import until
from statecast.errors import ComponentError
from tests.components.plain_role import plain_role
from tests.components.relaying import Recorder, deed, relaying

HOUR = timedelta(hours=1)


def store_on(url: str, **metadata: str) -> PostgresqlStateStore:
    component = Component("statestore", "state.postgresql", "v2", {"connectionString": url} | metadata)
    return PostgresqlStateStore(component, app_id="orders", clock=SystemClock())


@pytest.fixture
async def admin(postgresql_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(postgresql_url)
    yield connection
    await connection.close()


@pytest.fixture
async def plain_url(postgresql_url: str) -> AsyncIterator[str]:
    """The URL of a role without CREATE, on a schema that another one has made."""
    async with store_on(postgresql_url):
        pass
    async with plain_role(postgresql_url) as role:
        await role.grant()
        yield role.url


async def test_it_commits_and_relays(plain_url: str) -> None:
    recorder = Recorder()

    async with store_on(plain_url) as store, relaying(store, recorder, "one"):
        await asyncio.gather(*(store.transact(deed("orders||1", number)) for number in range(20)))
        item = await store.get("orders||1")

    assert item is not None
    assert sorted(recorder.first["orders||1"], key=int) == [str(number) for number in range(20)]


async def test_it_puts_events_aside_settles_them_and_replays_them(plain_url: str) -> None:
    async with store_on(plain_url) as store:
        for number in range(3):
            await store.transact(deed("orders||1", number))
        batch = await store.log.read(await store.log.acquire("relay", 16, HOUR), 100)
        leases = await store.log.advance(batch.leases, HOUR, [Deferral(batch.entries, Failure(1, None, "refused"))])
        replayed = await store.log.replay()
        (status,) = await store.log.due_deferred(range(16), 10)
        entries = await store.log.read_deferred([status.queue], 10)
        published = tuple(entry.id for entry in entries)
        emptied = await store.log.settle_deferred(leases, [QueueProgress(status.queue, published, None)])

    assert [entry.record.event_id for entry in entries] == [f"orders||1#{number}" for number in range(3)]
    assert (replayed, emptied) == (1, [status.queue])


async def test_it_gives_the_space_of_a_passed_partition_back(plain_url: str, admin: asyncpg.Connection) -> None:
    """Without TRUNCATE, or without SELECT on the sequence, the event stays (tried)."""
    async with store_on(plain_url) as store:
        await store.transact(deed("orders||1", 1))
        batch = await store.log.read(await store.log.acquire("relay", 16, HOUR), 100)
        await store.log.advance(batch.leases, HOUR)
        before = await admin.fetchval("select count(*) from statecast_outbox_1")
        await admin.execute(f"select setval('statecast_outbox_1_id', {2 << PARTITION_BITS})")

        async def is_given_back() -> bool:
            await store.log.trim()
            return bool(await admin.fetchval("select count(*) from statecast_outbox_1") == 0)

        await until(is_given_back)

    assert before == 1


async def test_it_sweeps_what_has_expired(plain_url: str, admin: asyncpg.Connection) -> None:
    moment = timedelta(milliseconds=1)
    async with store_on(plain_url, cleanupInterval="20ms") as store:
        await store.transact(Commit((Upsert("orders||1", b"1", ttl=moment),), marks=(Mark(b"m" * 16, moment),)))

        async def is_swept() -> bool:
            count = "select (select count(*) from state) + (select count(*) from statecast_mark)"
            return bool(await admin.fetchval(count) == 0)

        await until(is_swept)


async def test_it_is_told_that_it_may_not_create_and_another_can_run_the_statements_for_it(
    postgresql_url: str, admin: asyncpg.Connection
) -> None:
    async with plain_role(postgresql_url) as role:
        with pytest.raises(ComponentError, match="permission denied"):
            await store_on(role.url).__aenter__()

        layout = Layout("public", "", QualifiedName("public", "dapr_metadata"))
        async with admin.transaction():
            for statement in await pending_statements(admin, layout, "orders", "statestore"):
                await admin.execute(statement)
        await role.grant()

        assert await pending_statements(admin, layout, "orders", "statestore") == []
        async with store_on(role.url) as store:
            await store.transact(deed("orders||1", 1))
