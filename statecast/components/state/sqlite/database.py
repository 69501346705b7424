"""One open database: the connection that reads, the thread that writes, and the bell that rings after commits."""

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import timedelta
from typing import TypeVar

import apsw

from statecast.components.state.sqlite.config import SqliteConfig
from statecast.components.state.sqlite.errors import BREAKING, refused
from statecast.components.state.sqlite.schema import migrate
from statecast.components.state.sqlite.writer import Job, Joint, Writer
from statecast.errors import ComponentError, OutcomeUnknown, StoreUnavailable

T = TypeVar("T")

_WAL_SIZE_LIMIT = 64 * 1024 * 1024
_CACHE_KIB = 16 * 1024


class Database:
    def __init__(self, config: SqliteConfig) -> None:
        self._config = config
        self._writer: Writer | None = None
        self._reader: apsw.Cursor | None = None
        self._bell = asyncio.Event()

    @property
    def config(self) -> SqliteConfig:
        return self._config

    @property
    def bell(self) -> asyncio.Event:
        """The event that is set after the next commit with records in this process, and at closing."""
        return self._bell

    async def open(self) -> None:
        """Start the writer; it connects and migrates at the first job. Raises ComponentError for a missing folder."""
        _require_folder(self._config)
        self._writer = Writer(self._connect_writer, self._config.location, self._config.timeout, self._ring)
        self._writer.start()

    async def close(self) -> None:
        writer, self._writer = self._writer, None
        self._drop_reader()
        self._ring()
        if writer is not None:
            await writer.close()

    def commit(self, job: Job[T], *, joint: Joint[T] | None = None, announces: bool = False) -> Awaitable[T]:
        """Run `job` in a transaction, as `Writer.run` says."""
        return self._require_open().run(job, joint=joint, announces=announces)

    async def write(self, job: Job[T]) -> T:
        """Run `job` in a transaction; for what may be repeated, so that an unknown outcome is StoreUnavailable too."""
        try:
            return await self._require_open().run(job)
        except OutcomeUnknown as error:
            raise StoreUnavailable(str(error)) from error

    async def read(self, query: Job[T]) -> T:
        """Run `query` on what is committed: at once and in this thread where nothing can block it."""
        self._require_open()
        # Without a write-ahead log a reader waits for the writer: then it is better done between two commits.
        if self._config.uses_wal:
            try:
                return query(self._reading())
            except apsw.BusyError:
                # Another process recovers the log after a crash; the writer has the patience for that.
                self._drop_reader()
            except BREAKING as error:
                self._drop_reader()
                raise refused(error, self._config.location) from error
            except (apsw.Error, UnicodeEncodeError) as error:
                raise refused(error, self._config.location) from error
        return await self.write(query)

    def _require_open(self) -> Writer:
        if self._writer is None:
            raise StoreUnavailable(f"{self._config.location} is not open")
        return self._writer

    def _ring(self) -> None:
        bell, self._bell = self._bell, asyncio.Event()
        bell.set()

    def _reading(self) -> apsw.Cursor:
        if self._reader is None:
            reader = apsw.Connection(self._config.uri, flags=_flags())
            self._set_pragmas(reader)
            reader.execute("PRAGMA query_only = 1")
            self._reader = reader.cursor()
        return self._reader

    def _drop_reader(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            with suppress(apsw.Error):
                reader.connection.close(True)

    def _connect_writer(self) -> apsw.Connection:
        connection = apsw.Connection(self._config.uri, flags=_flags())
        try:
            # Opening is allowed the whole timeout: when many processes start at once each switches and migrates.
            connection.set_busy_handler(_patience(self._config.timeout))
            self._set_journal_mode(connection)
            self._set_pragmas(connection)
            migrate(connection, self._config)
            connection.set_busy_handler(_patience(min(self._config.busy_timeout, self._config.timeout)))
        except BaseException:
            connection.close(True)
            raise
        return connection

    def _set_journal_mode(self, connection: apsw.Connection) -> None:
        if self._config.is_in_memory or connection.readonly("main"):
            return
        mode = "wal" if self._config.uses_wal else "delete"
        deadline = time.monotonic() + self._config.timeout.total_seconds()
        while True:
            # SQLite does not ask the busy handler when two connections both want to switch.
            try:
                got = connection.execute(f"PRAGMA journal_mode = {mode}").fetchall()
                break
            except apsw.BusyError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(random.uniform(0.001, 0.005))
        if got != [(mode,)]:
            raise StoreUnavailable(f"{self._config.location}: no write-ahead log can be kept here; set disableWAL")
        connection.execute(f"PRAGMA journal_size_limit = {_WAL_SIZE_LIMIT}").fetchall()

    def _set_pragmas(self, connection: apsw.Connection) -> None:
        connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        # FULL: an acknowledged commit has been synced. NORMAL would lose the last ones with the power.
        connection.execute("PRAGMA synchronous = FULL")
        for name, value in self._config.pragmas:
            connection.execute(f"PRAGMA {name}" if value is None else f"PRAGMA {name} = {value}").fetchall()


def _require_folder(config: SqliteConfig) -> None:
    if config.path is not None and not os.path.isdir(os.path.dirname(config.path)):
        raise ComponentError(f"{config.location}: there is no folder to hold this file")


def _flags() -> int:
    return apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE | apsw.SQLITE_OPEN_URI


def _patience(limit: timedelta) -> Callable[[int], bool]:
    """Make a busy handler that asks again at short intervals until `limit` has passed.

    SQLite's own sleeps up to 100 ms at a time, which misses the pauses that a busy writer leaves for others.
    """
    deadline = 0.0

    def is_to_wait(attempt: int) -> bool:
        nonlocal deadline
        now = time.monotonic()
        if attempt == 0:
            deadline = now + limit.total_seconds()
        if now >= deadline:
            return False
        time.sleep(random.uniform(0.0002, 0.0008))
        return True

    return is_to_wait
