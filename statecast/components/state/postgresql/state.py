"""State on PostgreSQL, in Dapr's v2 table; a commit is one call of a function."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, timedelta
from hashlib import blake2b
from types import TracebackType
from typing import Any, Self, TypeVar

import asyncpg

from statecast.clock import Clock
from statecast.components.manifest import Component
from statecast.components.state.commit import Commit, ETag, Item
from statecast.components.state.postgresql.commit_function import COMMIT_ARGUMENTS
from statecast.components.state.postgresql.committer import Committer, CommitterOptions
from statecast.components.state.postgresql.config import read_config
from statecast.components.state.postgresql.connecting import (
    OPENING_FAILURES,
    connect,
    failure_at_opening,
    require_files,
    settings_of_statement,
)
from statecast.components.state.postgresql.directory import PostgresqlDirectory
from statecast.components.state.postgresql.lanes import Lanes
from statecast.components.state.postgresql.log import PostgresqlOutboxLog
from statecast.components.state.postgresql.migration import Log, find_layout, migrate, pending_statements
from statecast.components.state.postgresql.residence import Residence
from statecast.components.state.postgresql.schema import Layout
from statecast.components.state.postgresql.sweep import Sweeper
from statecast.components.state.postgresql.wake import Waker
from statecast.components.state.sweeping import sweeping
from statecast.errors import StoreUnavailable

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Open:
    """What an open store has besides its connections."""

    log: PostgresqlOutboxLog
    directory: PostgresqlDirectory
    committer: Committer
    sweeper: Sweeper
    get: str
    bulk_get: str


class PostgresqlStateStore:
    """`state.postgresql`, version v2: any number of processes may share the database, daprd among them."""

    def __init__(self, component: Component, *, app_id: str, clock: Clock) -> None:
        self._config = read_config(component)
        self._component = component
        self._app_id = app_id
        self._clock = clock
        self._residence: Residence | None = None
        self._lanes = Lanes(
            self._connect_lane,
            limit=self._config.connections,
            timeout=self._config.timeout,
            prepares=not self._config.is_pooled,
        )
        self._opened: _Open | None = None
        self._stack = AsyncExitStack()

    @property
    def log(self) -> PostgresqlOutboxLog:
        return self._require_open().log

    @property
    def directory(self) -> PostgresqlDirectory:
        return self._require_open().directory

    async def __aenter__(self) -> Self:
        layout, log = await self._prepare_schema()
        self._residence = residence = Residence(layout, log, self._connect)
        waker = Waker(None if self._config.is_pooled else self._connect, _channel(layout, log), self._clock)
        opened = self._statements(layout, log, waker)
        async with AsyncExitStack() as stack:
            # In reverse: no new commits, no more wake-ups, the connections end what is under way, its tasks end.
            stack.push_async_callback(opened.committer.join)
            stack.push_async_callback(residence.close)
            self._lanes.open()
            stack.push_async_callback(self._lanes.close)
            waker.open()
            stack.push_async_callback(waker.close)
            stack.callback(opened.committer.stop)
            self._opened = opened
            await stack.enter_async_context(
                sweeping(opened.sweeper.sweep, self._config.cleanup_interval, self._clock, name=self._component.name)
            )
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._opened = None
        await self._stack.aclose()

    async def get(self, key: str) -> Item | None:
        statement = self._require_open().get
        rows = await self._lanes.run(lambda session: session.read(statement, key))
        return _item(rows[0]) if rows else None

    async def bulk_get(self, keys: Sequence[str]) -> list[Item | None]:
        statement = self._require_open().bulk_get
        if not keys:
            return []
        wanted = list(dict.fromkeys(keys))
        rows = await self._lanes.run(lambda session: session.read(statement, wanted))
        found = {row["key"]: _item(row) for row in rows}
        return [found.get(key) for key in keys]

    async def transact(self, commit: Commit) -> tuple[ETag | None, ...]:
        opened = self._require_open()
        if not (commit.operations or commit.records or commit.marks or commit.guards):
            return ()
        return await opened.committer.commit(commit)

    async def sweep(self) -> None:
        """Remove what has expired now, unless another process has done so within the cleanup interval."""
        await self._require_open().sweeper.sweep(asyncio.Event())

    async def pending_migrations(self) -> list[str]:
        return await self._ahead(
            lambda connection, layout: pending_statements(connection, layout, self._app_id, self._component.name)
        )

    async def migrate(self) -> None:
        await self._prepare_schema()

    def _require_open(self) -> _Open:
        if self._opened is None:
            raise StoreUnavailable(f"state store {self._component.name!r} is not open")
        return self._opened

    async def _connect(self, timeout: float | None = None) -> asyncpg.Connection:
        return await connect(self._config, application=f"statecast {self._app_id}", timeout=timeout)

    async def _connect_lane(self, timeout: float) -> asyncpg.Connection:
        connection = await self._connect(timeout)
        try:
            if self._residence is not None:
                await self._residence.check(connection, timeout)
        except BaseException:
            connection.terminate()
            raise
        return connection

    async def _prepare_schema(self) -> tuple[Layout, Log]:
        async def prepare(connection: asyncpg.Connection, layout: Layout) -> tuple[Layout, Log]:
            log = await migrate(connection, layout, self._app_id, self._component.name)
            return layout, log

        return await self._ahead(prepare)

    async def _ahead(self, work: Callable[[asyncpg.Connection, Layout], Awaitable[T]]) -> T:
        """Do `work` on a connection of its own, before the store is open."""
        require_files(self._config)
        try:
            connection = await self._connect()
            try:
                return await work(connection, await find_layout(connection, self._config))
            finally:
                await connection.close(timeout=1)
        except OPENING_FAILURES as error:
            raise failure_at_opening(error) from error

    def _statements(self, layout: Layout, log: Log, waker: Waker) -> _Open:
        live = "(expires_at is null or expires_at > clock_timestamp())"
        columns = "key, value, etag::text as etag, expires_at"
        return _Open(
            log=PostgresqlOutboxLog(self._lanes, layout, log, waker),
            directory=PostgresqlDirectory(self._lanes, layout, self._app_id),
            committer=Committer(
                self._lanes,
                waker,
                f"select {layout.commit(log.number)}({COMMIT_ARGUMENTS}){settings_of_statement(self._config)}",
                log.slices,
                CommitterOptions.choose(connections=self._config.connections, groups=self._config.groups_commits),
            ),
            sweeper=Sweeper(self._lanes, layout, self._config.cleanup_interval or timedelta()),
            get=f"select {columns} from {layout.state} where key = $1 and {live}",
            bulk_get=f"select {columns} from {layout.state} where key = any ($1::text[]) and {live}",
        )


def _item(row: Any) -> Item:
    expires_at = row["expires_at"]
    return Item(row["key"], row["value"], ETag(row["etag"]), expires_at and expires_at.astimezone(UTC))


def _channel(layout: Layout, log: Log) -> str:
    # Channels are the database's: one log's name may be long, a channel's is 63 bytes at most.
    return f"statecast_{blake2b(layout.outbox(log.number).encode(), digest_size=16).hexdigest()}"
