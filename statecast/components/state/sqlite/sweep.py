"""Expired values and marks, removed in small transactions."""

import asyncio

import apsw

from statecast.components.state.sqlite.database import Database
from statecast.components.state.sqlite.schema import NOW

CHUNK = 500
"""How many rows one transaction removes, so that commits need not wait for it."""


class Sweeper:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def sweep(self, stop: asyncio.Event) -> None:
        """Remove what has expired, chunk by chunk, until nothing is left or `stop` is set."""
        for statement in _statements(self._database.config.table):
            while not stop.is_set() and await self._remove_chunk(statement) == CHUNK:
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
