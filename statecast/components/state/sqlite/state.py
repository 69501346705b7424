"""State on SQLite, in Dapr's table, with the outbox log and the actor claims in the same file."""

from collections.abc import Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Self

import apsw

from statecast.clock import Clock
from statecast.components.manifest import Component
from statecast.components.state.commit import Commit, ETag, Item
from statecast.components.state.sqlite.config import parse_config
from statecast.components.state.sqlite.database import Database
from statecast.components.state.sqlite.directory import SqliteDirectory
from statecast.components.state.sqlite.log import SqliteOutboxLog
from statecast.components.state.sqlite.rows import ItemRow, item_of, select_items
from statecast.components.state.sqlite.schema import RegisteredLog, register_log
from statecast.components.state.sqlite.sweep import Sweeper
from statecast.components.state.sqlite.transaction import Statements, apply_blind, plan, statements
from statecast.components.state.sweeping import sweeping
from statecast.errors import StoreUnavailable

# https://www.sqlite.org/limits.html §9: more keys than this are read by several statements.
_VARIABLE_LIMIT = 32766


class SqliteStateStore:
    """`state.sqlite`: any number of processes may share the file; of an in-memory database each store has its own."""

    def __init__(self, component: Component, *, app_id: str, clock: Clock) -> None:
        self._config = parse_config(component)
        self._component = component
        self._app_id = app_id
        self._clock = clock
        self._database = Database(self._config)
        self._directory = SqliteDirectory(self._database, app_id)
        self._select_one = select_items(self._config.table, 1)
        self._opened: tuple[RegisteredLog, Statements, SqliteOutboxLog] | None = None
        self._open = AsyncExitStack()

    @property
    def log(self) -> SqliteOutboxLog:
        return self._require_open()[2]

    @property
    def directory(self) -> SqliteDirectory:
        return self._directory

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as opening:
            await self._database.open()
            opening.push_async_callback(self._database.close)
            log = await self._database.write(self._register)
            sweep, interval = Sweeper(self._database).sweep, self._config.cleanup_interval
            await opening.enter_async_context(sweeping(sweep, interval, self._clock, name=self._config.location))
            self._opened = (log, statements(self._config.table, log), SqliteOutboxLog(self._database, log))
            self._open = opening.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._opened = None
        await self._open.aclose()

    def _register(self, cursor: apsw.Cursor) -> RegisteredLog:
        return register_log(cursor, self._app_id, self._component.name)

    async def get(self, key: str) -> Item | None:
        def query(cursor: apsw.Cursor) -> Item | None:
            rows: list[Any] = cursor.execute(self._select_one, (key,)).fetchall()
            return item_of(rows[0]) if rows else None

        return await self._database.read(query)

    async def bulk_get(self, keys: Sequence[str]) -> list[Item | None]:
        wanted = list(dict.fromkeys(keys))
        if not wanted:
            self._require_open()
            return []
        rows = await self._database.read(lambda cursor: self._select(cursor, wanted))
        found = {row[0]: item_of(row) for row in rows}
        return [found.get(key) for key in keys]

    def _select(self, cursor: apsw.Cursor, keys: list[str]) -> list[ItemRow]:
        rows: list[ItemRow] = []
        # One snapshot for all statements; a savepoint, since the writer reads inside of its transaction.
        cursor.execute("SAVEPOINT reading")
        try:
            for start in range(0, len(keys), _VARIABLE_LIMIT):
                chunk = keys[start : start + _VARIABLE_LIMIT]
                found: list[Any] = cursor.execute(select_items(self._config.table, len(chunk)), chunk).fetchall()
                rows += found
        finally:
            cursor.execute("RELEASE reading")
        return rows

    async def transact(self, commit: Commit) -> tuple[ETag | None, ...]:
        log, statements, _ = self._require_open()
        if not (commit.operations or commit.records or commit.marks or commit.guards):
            return ()
        transaction = plan(commit, statements, self._app_id, log)
        joint = apply_blind if transaction.is_blind else None
        return await self._database.commit(transaction, joint=joint, announces=bool(commit.records))

    def _require_open(self) -> tuple[RegisteredLog, Statements, SqliteOutboxLog]:
        if self._opened is None:
            raise StoreUnavailable(f"state store {self._component.name!r} is not open")
        return self._opened
