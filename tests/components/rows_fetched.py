"""How much PostgreSQL reads for what it is asked."""

import asyncio

import asyncpg

from statecast.components.state.postgresql import PostgresqlStateStore
from statecast.components.testing.deadline import until


async def rows_fetched(store: PostgresqlStateStore, admin: asyncpg.Connection, tables: str) -> int:
    """Count what the store has read of these tables so far; a session tells with its next statement, a second after it
    last did."""
    query = (
        "select sum(coalesce(idx_tup_fetch, 0) + seq_tup_read)::bigint from pg_stat_user_tables where relname like $1"
    )
    seen = -1

    async def is_steady() -> bool:
        nonlocal seen
        await asyncio.sleep(1.1)
        await store.get("orders||no such key")
        before, seen = seen, await admin.fetchval(query, tables)
        return bool(before == seen)

    await until(is_steady)
    return seen
