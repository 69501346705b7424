"""How much PostgreSQL looks at for what it is asked, by its own statistics."""

import asyncio

import asyncpg

from statecast.components.state.postgresql import PostgresqlStateStore
from statecast.components.testing.deadline import until


async def rows_fetched(store: PostgresqlStateStore, admin: asyncpg.Connection, tables: str) -> int:
    """Count the rows that the store has read of these tables so far."""
    query = "select sum(coalesce(idx_tup_fetch, 0) + seq_tup_read)::bigint from pg_stat_user_tables"
    return await _counted(store, admin, query, tables)


async def blocks_looked_at(store: PostgresqlStateStore, admin: asyncpg.Connection, tables: str) -> int:
    """Count the blocks of these tables and their indexes that the store has looked at so far."""
    query = (
        "select sum(heap_blks_hit + heap_blks_read + idx_blks_hit + idx_blks_read)::bigint from pg_statio_user_tables"
    )
    return await _counted(store, admin, query, tables)


async def _counted(store: PostgresqlStateStore, admin: asyncpg.Connection, query: str, tables: str) -> int:
    """A session tells with its next statement, a second after it last did."""
    seen = -1

    async def is_steady() -> bool:
        nonlocal seen
        await asyncio.sleep(1.1)
        await store.get("orders||no such key")
        before, seen = seen, await admin.fetchval(f"{query} where relname like $1", tables)
        return bool(before == seen)

    await until(is_steady)
    return seen
