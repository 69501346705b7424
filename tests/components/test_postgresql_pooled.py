"""The store on PostgreSQL behind a PgBouncer in transaction mode."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from datetime import timedelta
from urllib.parse import urlsplit

import asyncpg
import pytest

from statecast.clock import SystemClock
from statecast.components.manifest import Component
from statecast.components.state.postgresql import PostgresqlStateStore
from statecast.components.testing.deadline import until
from statecast.components.testing.log import OutboxLogContract, StoreFactory
from statecast.components.testing.state import SharedStateStoreContract
from statecast.errors import ComponentError, StoreUnavailable
from statecast.runtime.server import PrivateServer, ServerMissing
from statecast.runtime.server_processes import LocalServer
from statecast.runtime.servers import ServerKind, Servers
from tests.components.going_without import go_without
from tests.components.pgbouncer import SERVER_CONNECTIONS, start_pgbouncer
from tests.components.relaying import Recorder, deed, relaying


@pytest.fixture(scope="module")
def pooler(servers: Servers) -> Iterator[LocalServer]:
    """One for the shared server."""
    try:
        started = start_pgbouncer(servers.get(ServerKind.POSTGRESQL).address)
    except ServerMissing as missing:
        go_without(missing)
    yield started
    started.close()


@pytest.fixture
def pooled_url(postgresql_url: str, pooler: LocalServer) -> str:
    """This test's own database, through the pooler."""
    return urlsplit(pooler.address)._replace(path=urlsplit(postgresql_url).path).geturl()


def store_on(url: str, **metadata: str) -> PostgresqlStateStore:
    fields = {"connectionString": url, "maxConns": "8", "pooled": "true", **metadata}
    component = Component("statestore", "state.postgresql", "v2", fields)
    return PostgresqlStateStore(component, app_id="orders", clock=SystemClock())


@pytest.fixture
async def admin(postgresql_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(postgresql_url)
    yield connection
    await connection.close()


class TestPooledStateStore(SharedStateStoreContract):
    transactions = 200

    @pytest.fixture
    def make_store(self, pooled_url: str) -> StoreFactory:
        return lambda: store_on(pooled_url)


class TestPooledOutboxLog(OutboxLogContract):
    @pytest.fixture
    def make_store(self, pooled_url: str) -> StoreFactory:
        return lambda: store_on(pooled_url)


async def test_three_stores_leave_nothing_behind_in_the_connections_that_they_share(
    pooled_url: str, admin: asyncpg.Connection
) -> None:
    """It fails when asyncpg looks its types up outside of a transaction (tried): `jit` stays off somewhere."""
    await leftovers(pooled_url)  # so that the pooler has all its connections

    async with store_on(pooled_url) as one, store_on(pooled_url) as two, store_on(pooled_url) as three:
        stores = [one, two, three]
        await asyncio.gather(*(stores[number % 3].transact(deed("orders||1", number)) for number in range(300)))
        leases = await one.log.acquire("relay", 16, timedelta(hours=1))
        batch = await two.log.read(leases, 1_000)
        kept = await three.log.advance(batch.leases, timedelta(hours=1))
        await two.log.trim()

    assert {entry.record.event_id for entry in batch.entries} == {f"orders||1#{number}" for number in range(300)}
    assert len(kept) == 16
    found = [each for each in await leftovers(pooled_url) if each is not None]
    assert len(found) == SERVER_CONNECTIONS
    assert set(found) == {("on", "on", "0", "0", 0, 0)}
    assert await admin.fetchval("select count(*) from pg_stat_activity where query ilike 'listen%'") == 0


async def test_relays_of_several_stores_lose_nothing_and_keep_the_order_of_keys(pooled_url: str) -> None:
    recorder, keys, steps = Recorder(), [f"orders||{number}" for number in range(30)], 20

    async def write(store: PostgresqlStateStore, key: str) -> None:
        for number in range(steps):
            await store.transact(deed(key, number))

    async def is_told() -> bool:
        return len(recorder.seen) == len(keys) * steps

    async with AsyncExitStack() as stack:
        stores = [await stack.enter_async_context(store_on(pooled_url)) for _ in range(3)]
        for number, store in enumerate(stores):
            await stack.enter_async_context(relaying(store, recorder, f"relay-{number}"))
        await asyncio.gather(*(write(stores[number % 3], key) for number, key in enumerate(keys)))
        await until(is_told)

    assert recorder.first == {key: [str(number) for number in range(steps)] for key in keys}


async def leftovers(url: str) -> list[tuple[object, ...] | None]:
    """Ask every connection of the pooler's to the server for its settings and prepared statements."""
    clients = [await asyncpg.connect(url, statement_cache_size=0) for _ in range(SERVER_CONNECTIONS)]
    transactions = [client.transaction() for client in clients]
    for transaction in transactions:
        await transaction.start()
    found = [
        await client.fetchrow(
            "select current_setting('jit'), current_setting('enable_seqscan'), current_setting('lock_timeout'),"
            " current_setting('statement_timeout'),"
            " (select count(*) from pg_prepared_statements where name <> ''),"
            " (select count(*) from pg_listening_channels())"
        )
        for client in clients
    ]
    for transaction in transactions:
        await transaction.rollback()
    for client in clients:
        await client.close()
    return [None if row is None else tuple(row.values()) for row in found]


async def test_a_commit_that_waits_too_long_for_a_lock_was_not_applied(
    pooled_url: str, admin: asyncpg.Connection
) -> None:
    async with store_on(pooled_url, timeout="1s") as store:
        await store.transact(deed("orders||1", 1))
        async with admin.transaction():
            await admin.execute("select from state for update")

            with pytest.raises(StoreUnavailable):
                await store.transact(deed("orders||1", 2))

        assert await admin.fetchval("select value from state") == b"1"
        assert await admin.fetchval("select count(*) from pg_stat_activity where wait_event_type = 'Lock'") == 0


async def test_a_pooler_that_is_started_anew_is_connected_to_again(
    pooled_url: str, private_server: Callable[[ServerKind], PrivateServer]
) -> None:
    server = private_server(ServerKind.POSTGRESQL)
    pooler = await asyncio.to_thread(start_pgbouncer, server.address)
    try:
        async with store_on(pooler.address) as store:
            await store.transact(deed("orders||1", 1))
            await asyncio.to_thread(pooler.kill)
            with pytest.raises(StoreUnavailable):
                await store.get("orders||1")

            await asyncio.to_thread(pooler.restart)

            await store.transact(deed("orders||1", 2))
            assert await store.get("orders||1") is not None
    finally:
        pooler.close()


async def test_without_pooled_the_refusal_says_what_to_give(pooled_url: str) -> None:
    with pytest.raises(ComponentError, match='behind PgBouncer in transaction mode give pooled: "true"'):
        await store_on(pooled_url, pooled="false").__aenter__()


async def test_a_database_that_defaults_to_another_isolation_is_refused(
    pooled_url: str, admin: asyncpg.Connection
) -> None:
    await admin.execute(
        f"alter database {urlsplit(pooled_url).path.strip('/')} set default_transaction_isolation = 'serializable'"
    )

    with pytest.raises(ComponentError, match="default_transaction_isolation 'read committed'; it is 'serializable'"):
        await store_on(pooled_url).__aenter__()
