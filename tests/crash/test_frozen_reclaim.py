"""A process that freezes while it gives back the log's space must not hold up those that live."""

import asyncio
from datetime import timedelta
from random import Random

import asyncpg

from statecast.clock import SystemClock
from statecast.components.state.commit import Commit, OutboxRecord
from statecast.components.state.postgresql.schema import PARTITION_BITS
from statecast.components.state.postgresql.state import PostgresqlStateStore
from tests.crash.arena import APP, postgresql_store
from tests.crash.detour import LastWords, detour

LEASE = timedelta(seconds=30)


def open_store(url: str) -> PostgresqlStateStore:
    return PostgresqlStateStore(postgresql_store(url), app_id=APP, clock=SystemClock())


def commit_of(event_id: str) -> Commit:
    return Commit((), (OutboxRecord("order-1", event_id, "pubsub", "orders", b"{}"),))


async def test_a_relay_that_freezes_while_it_reclaims_a_partition_blocks_no_reader(postgresql_url: str) -> None:
    """Tried with LOCK and TRUNCATE as statements of their own: the second event is not read."""
    truncate = LastWords(b"truncate")
    async with (
        detour(postgresql_url, Random(1), last_words=truncate) as frozen_url,
        open_store(postgresql_url) as store,
        open_store(frozen_url) as frozen,
    ):
        await store.transact(commit_of("event-1"))
        leases = await store.log.acquire("relay", store.log.slices, LEASE)
        batch = await store.log.read(leases, 10)
        leases = await store.log.advance(batch.leases, LEASE)
        await leave_the_partition(postgresql_url)
        reclaiming = asyncio.create_task(frozen.log.trim())
        async with asyncio.timeout(10):
            await truncate.are_spoken.wait()

        await store.transact(commit_of("event-2"))
        async with asyncio.timeout(10):
            batch = await store.log.read(leases, 10)
        reclaiming.cancel()

    assert [entry.record.event_id for entry in batch.entries] == ["event-2"]


async def leave_the_partition(url: str) -> None:
    """Let the next event's id be in a partition from which the first one is neither this nor the next."""
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(f"select setval('statecast_outbox_1_id', {2 << PARTITION_BITS})")
    finally:
        await connection.close(timeout=5)
