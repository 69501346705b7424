"""Expired values and marks, removed in the background. They are invisible before that: this is about space only."""

import asyncio
import logging

import apsw

from statecast.clock import Clock
from statecast.components.state.sqlite.database import Database
from statecast.components.state.sqlite.schema import NOW
from statecast.errors import StoreUnavailable

logger = logging.getLogger(__name__)

CHUNK = 500
"""How many rows one transaction removes, so that commits need not wait for it."""


class Sweeper:
    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._stop = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        if self._database.config.cleanup_interval is not None:
            self._task = asyncio.create_task(self._run(), name=f"sweeping {self._database.config.location}")

    async def close(self) -> None:
        self._stop.set()
        if self._task is not None:
            await self._task

    async def _run(self) -> None:
        interval = self._database.config.cleanup_interval
        assert interval is not None
        while not await self._clock.wait(self._stop, interval):
            try:
                await self.sweep()
            except StoreUnavailable:
                logger.warning("expired rows were not swept; the next try is in %s", interval, exc_info=True)

    async def sweep(self) -> None:
        """Remove what has expired, chunk by chunk, until nothing is left or the store is closing."""
        for statement in _statements(self._database.config.table):
            while not self._stop.is_set() and await self._remove_chunk(statement) == CHUNK:
                pass

    async def _remove_chunk(self, statement: str) -> int:
        def remove(cursor: apsw.Cursor) -> int:
            cursor.execute(statement)
            return cursor.connection.changes()

        return await self._database.write(remove)


def _statements(table: str) -> tuple[str, str]:
    return (
        f"""DELETE FROM "{table}" WHERE rowid IN
            (SELECT rowid FROM "{table}" WHERE expiration_time <= {NOW} LIMIT {CHUNK})""",
        f"""DELETE FROM statecast_marks WHERE (log, digest) IN
            (SELECT log, digest FROM statecast_marks WHERE expires_at <= unixepoch('subsec') LIMIT {CHUNK})""",
    )
