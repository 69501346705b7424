"""Removing expired values and marks, in small batches."""

import asyncio
from datetime import timedelta

from statecast.components.state.postgresql.lanes import Lanes, Session
from statecast.components.state.postgresql.schema import Layout

_BATCH = 1_000


class Sweeper:
    """Passes by what a commit holds. Rows of the metadata table say when the last sweep was, so that replicas, and
    daprd, share the work."""

    def __init__(self, lanes: Lanes, layout: Layout, interval: timedelta) -> None:
        self._lanes = lanes
        self._layout = layout
        self._interval = interval

    async def sweep(self, stop: asyncio.Event) -> None:
        """Remove what has expired, unless another process has done so within the interval."""
        layout = self._layout
        if await self._is_my_turn(layout.state_cleanup_key):
            await self._empty(layout.state, "key", stop)
        if await self._is_my_turn(layout.own_cleanup_key):
            await self._empty(layout.marks, "digest", stop)

    async def _is_my_turn(self, key: str) -> bool:
        metadata = self._layout.metadata
        statement = (
            f"insert into {metadata} as m (key, value) values ($1, now()::text)"
            " on conflict (key) do update set value = excluded.value"
            " where now() - m.value::timestamptz > $2 returning key"
        )
        # A little less than the interval: the timers of two processes do not tick alike.
        interval = self._interval * 0.9
        return bool(await self._lanes.run(lambda session: session.write(statement, key, interval)))

    async def _empty(self, table: str, key: str, stop: asyncio.Event) -> None:
        # A plain DELETE would wait for rows that commits hold, in another order than theirs.
        statement = (
            f"delete from {table} where {key} = any (array("
            f"select {key} from {table} where expires_at < now() order by expires_at limit {_BATCH}"
            f" for update skip locked)) returning 1"
        )

        async def remove_some(session: Session) -> int:
            return len(await session.write(statement))

        while not stop.is_set() and await self._lanes.run(remove_some) == _BATCH:
            pass
