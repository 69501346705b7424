"""Where the log lives: noticing that it came to another cluster, whose transactions have numbers of their own.

Positions of the log are told in numbers of transactions, and rows carry that of theirs. A dump brings both along to a
cluster where they mean nothing: what is pending might never be read, or new rows be taken for read.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

import asyncpg

from statecast.components.state.postgresql.lanes import SERVER_LIFE
from statecast.components.state.postgresql.migration import MIGRATION_LOCK, Log
from statecast.components.state.postgresql.schema import Layout
from statecast.errors import StoreUnavailable

logger = logging.getLogger(__name__)

# Of a transaction before all others: visible in every snapshot.
_LONG_PAST = "'3'::xid8"


class Residence:
    """Compares the server of each new connection with what the log knows of it."""

    def __init__(self, layout: Layout, log: Log, connect: Callable[[], Awaitable[asyncpg.Connection]]) -> None:
        self._layout = layout
        self._log = log
        self._connect = connect
        self._life: str | None = None
        self._moving: asyncio.Task[None] | None = None

    async def check(self, connection: asyncpg.Connection, timeout: float) -> None:
        """Make the log at home in the cluster that `connection` leads to, before anything else is done on it.

        That goes over all rows, and goes on where it takes longer than `timeout` seconds. Raises StoreUnavailable until
        it is done.
        """
        life = await connection.fetchval(f"select {SERVER_LIFE}", timeout=timeout)
        if life == self._life:
            return
        if self._moving is None or self._moving.done():
            self._moving = asyncio.create_task(self._move(life), name="postgresql outbox moves in")
        await asyncio.wait({self._moving}, timeout=timeout)
        if not self._moving.done():
            raise StoreUnavailable(f"the outbox {self._outbox} is being brought to another cluster, all rows of it")
        self._moving.result()

    async def close(self) -> None:
        """Break off what is not done; the next one to open the store begins again."""
        if self._moving is not None:
            self._moving.cancel()
            await asyncio.wait({self._moving})

    @property
    def _outbox(self) -> str:
        return self._layout.outbox(self._log.number)

    async def _move(self, life: str) -> None:
        connection = await self._connect()
        try:
            await adopt(connection, self._layout, self._log.number)
            self._life = life
        finally:
            connection.terminate()


async def adopt(connection: asyncpg.Connection, layout: Layout, log: int) -> None:
    """Restate rows and positions in numbers of this cluster's where they are another's, else do nothing.

    What was pending is pending, in its order; who held a lease has lost it. Where a role may not ask for the
    identity of the cluster, none is ever noticed to be another.
    """
    try:
        cluster = await connection.fetchval("select system_identifier::text from pg_control_system()")
    except asyncpg.InsufficientPrivilegeError:
        return
    if await _recorded(connection, layout, log) == cluster:
        return
    async with connection.transaction():
        await connection.execute("set local statement_timeout = 0")
        await connection.execute("select pg_advisory_xact_lock($1)", MIGRATION_LOCK)
        recorded = await _recorded(connection, layout, log)
        if recorded == cluster:
            return
        if recorded is not None:
            logger.warning("the outbox %s came from another cluster, its positions begin anew", layout.outbox(log))
            await _restate(connection, layout, log)
        await connection.execute(
            f"insert into {layout.metadata} (key, value) values ($1, $2)"
            " on conflict (key) do update set value = excluded.value",
            layout.cluster_key(log),
            cluster,
        )


async def _recorded(connection: asyncpg.Connection, layout: Layout, log: int) -> str | None:
    recorded: str | None = await connection.fetchval(
        f"select value from {layout.metadata} where key = $1", layout.cluster_key(log)
    )
    return recorded


async def _restate(connection: asyncpg.Connection, layout: Layout, log: int) -> None:
    outbox, slices = layout.outbox(log), layout.slices
    await connection.execute(f"lock table {outbox} in share row exclusive mode")
    await connection.execute("set local enable_seqscan = on")
    # Taken before the rows get the number of this transaction, so that they are behind it.
    beginning = await connection.fetchval("select pg_snapshot_xmin(pg_current_snapshot())::text")
    await connection.execute(
        f"update {outbox} o set xid = case"
        " when pg_visible_in_snapshot(o.xid, s.prev)"
        "  or o.id <= s.after and pg_visible_in_snapshot(o.xid, s.cur)"
        f" then {_LONG_PAST} else pg_current_xact_id() end"
        f" from {slices} s where s.log = {log} and s.slice = o.slice"
    )
    await connection.execute(
        f"update {slices} set owner = null, epoch = epoch + 1, expires_at = '-infinity',"
        f" prev = $1::text::pg_snapshot, cur = null, after = 0 where log = {log}",
        f"{beginning}:{beginning}:",
    )
