"""The outbox log on SQLite. Writers are serial here, so ids are in commit order and an id is a safe position."""

import asyncio
from collections.abc import Collection, Iterable, Sequence
from contextlib import closing
from datetime import timedelta
from itertools import chain
from typing import Any, cast

import apsw
from msgspec.structs import replace

from statecast.components.state.log import (
    READ_BYTES,
    Batch,
    Deferral,
    DeferredQueue,
    Lease,
    LogEntry,
    QueueProgress,
    QueueStatus,
    SliceStatus,
    Topic,
)
from statecast.components.state.sqlite import deferred
from statecast.components.state.sqlite.database import Database
from statecast.components.state.sqlite.entries import ENTRY_COLUMNS, entry_of
from statecast.components.state.sqlite.rows import utc
from statecast.components.state.sqlite.schema import RegisteredLog

POLL = timedelta(milliseconds=20)
"""How often `wait` looks for commits of other processes."""

TRIM_CHUNK = 1000
"""How many rows one transaction of `trim` looks at, so that commits need not wait for it."""

Positions = dict[int, int]
"""By slice, the id up to which everything was read."""


class SqliteOutboxLog:
    """Leases and trimming go through the writer's thread, reading does not."""

    def __init__(self, database: Database, log: RegisteredLog) -> None:
        self._database = database
        self._log = log
        self._trimmed: Positions = dict.fromkeys(range(log.slices), 0)

    @property
    def slices(self) -> int:
        return self._log.slices

    async def heartbeat(self, owner: str, ttl: timedelta) -> int:
        def beat(cursor: apsw.Cursor) -> int:
            cursor.execute(
                """INSERT INTO statecast_relays (log, owner, expires_at) VALUES (?, ?, unixepoch('subsec') + ?)
                ON CONFLICT DO UPDATE SET expires_at = excluded.expires_at""",
                (self._log.number, owner, ttl.total_seconds()),
            )
            cursor.execute(
                "DELETE FROM statecast_relays WHERE log = ? AND expires_at <= unixepoch('subsec') AND owner <> ?",
                (self._log.number, owner),
            )
            count = "SELECT count(*) FROM statecast_relays WHERE log = ?"
            return _number(cursor.execute(count, (self._log.number,)))

        return await self._database.write(beat)

    async def acquire(self, owner: str, limit: int, ttl: timedelta) -> list[Lease]:
        def lease(cursor: apsw.Cursor) -> list[Lease]:
            rows: list[Any] = cursor.execute(
                """UPDATE statecast_slices
                SET owner = ?1, epoch = epoch + 1, expires_at = unixepoch('subsec') + ?2
                WHERE log = ?3 AND slice IN (
                  SELECT slice FROM statecast_slices
                  WHERE log = ?3 AND (owner IS NULL OR expires_at <= unixepoch('subsec'))
                  ORDER BY slice LIMIT ?4)
                RETURNING slice, epoch, position""",
                (owner, ttl.total_seconds(), self._log.number, max(limit, 0)),
            ).fetchall()
            return [Lease(slice, owner, epoch, str(position)) for slice, epoch, position in sorted(rows)]

        return await self._database.write(lease)

    async def read(self, leases: Sequence[Lease], limit: int) -> Batch:
        positions = _positions(leases)
        if not positions:
            return Batch((), tuple(leases))

        entries, reached = await self._database.read(lambda cursor: self._read_on(cursor, positions, max(limit, 1)))
        moved = (replace(lease, position=str(max(int(lease.position), reached))) for lease in leases)
        return Batch(tuple(entries), tuple(moved))

    def _read_on(self, cursor: apsw.Cursor, positions: Positions, limit: int) -> tuple[list[LogEntry], int]:
        """Read in commit order over all slices; the second value is the id up to which that is everything."""
        # Asked before the rows, which show at least what was committed by then: so empty slices move on too.
        reached = _number(cursor.execute(f'SELECT ifnull(max(id), 0) FROM "{self._log.outbox}"'))
        condition, bindings = _behind(positions)
        statement = f"""SELECT {ENTRY_COLUMNS}
            FROM "{self._log.outbox}" WHERE {condition} ORDER BY id LIMIT ?"""
        entries: list[LogEntry] = []
        room = READ_BYTES
        # A cursor of its own, closed where reading stops: one that is left halfway would keep the log from shrinking.
        with closing(cursor.connection.execute(statement, (*bindings, limit))) as rows:
            for row in rows:
                entries.append(entry := entry_of(row))
                room -= len(entry.record.body)
                if len(entries) == limit or room <= 0:
                    return entries, int(entry.id)
                reached = max(reached, int(entry.id))
        return entries, reached

    async def advance(self, leases: Sequence[Lease], ttl: timedelta, deferrals: Sequence[Deferral] = ()) -> list[Lease]:
        def persist(cursor: apsw.Cursor) -> list[Lease]:
            mine = [lease for lease in leases if self._move(cursor, lease, ttl)]
            slices = {lease.slice for lease in mine}
            deferred.put_aside(cursor, self._log, [each for each in deferrals if each.entries[0].slice in slices])
            return mine

        return await self._database.write(persist) if leases else []

    def _move(self, cursor: apsw.Cursor, lease: Lease, ttl: timedelta) -> bool:
        """Persist the position of a lease that is mine still, and renew it; else tell that it is not."""
        statement = """UPDATE statecast_slices SET position = ?, expires_at = unixepoch('subsec') + ?
            WHERE log = ? AND slice = ? AND epoch = ? AND owner = ?"""
        bindings = (int(lease.position), ttl.total_seconds(), self._log.number, lease.slice, lease.epoch, lease.owner)
        cursor.execute(statement, bindings)
        return cursor.connection.changes() == 1

    def _is_mine(self, cursor: apsw.Cursor, lease: Lease) -> bool:
        select = "SELECT 1 FROM statecast_slices WHERE log = ? AND slice = ? AND epoch = ? AND owner = ?"
        return bool(cursor.execute(select, (self._log.number, lease.slice, lease.epoch, lease.owner)).fetchall())

    async def release(self, leases: Sequence[Lease]) -> None:
        statement = """UPDATE statecast_slices SET position = ?, owner = NULL, expires_at = 0
            WHERE log = ? AND slice = ? AND epoch = ? AND owner = ?"""

        def give_up(cursor: apsw.Cursor) -> None:
            for lease in leases:
                bindings = (int(lease.position), self._log.number, lease.slice, lease.epoch, lease.owner)
                cursor.execute(statement, bindings)

        if leases:
            await self._database.write(give_up)

    async def deferred(self, slices: Collection[int]) -> list[QueueStatus]:
        return await self._database.read(lambda cursor: deferred.list_queues(cursor, self._log, slices))

    async def due_deferred(
        self, slices: Collection[int], limit: int, but_for: Collection[Topic] = ()
    ) -> list[QueueStatus]:
        def list_due(cursor: apsw.Cursor) -> list[QueueStatus]:
            return deferred.list_due(cursor, self._log, slices, max(limit, 0), frozenset(but_for))

        return await self._database.read(list_due)

    async def read_deferred(self, queues: Sequence[DeferredQueue], limit: int) -> list[LogEntry]:
        return await self._database.read(lambda cursor: deferred.read_entries(cursor, self._log, queues, limit))

    async def settle_deferred(self, leases: Sequence[Lease], progress: Sequence[QueueProgress]) -> list[DeferredQueue]:
        def settle(cursor: apsw.Cursor) -> list[DeferredQueue]:
            slices = {lease.slice for lease in leases if self._is_mine(cursor, lease)}
            return deferred.settle(cursor, self._log, [each for each in progress if each.queue.slice in slices])

        return await self._database.write(settle) if progress else []

    async def replay(self, order_key: str | None = None) -> int:
        return await self._database.write(lambda cursor: deferred.replay(cursor, self._log, order_key))

    async def wait(self, leases: Sequence[Lease], timeout: timedelta) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout.total_seconds()
        seen: int | None = None
        while True:
            # Taken before looking, so that a commit after the look rings this one.
            bell = self._database.bell
            version = await self._database.read(_data_version)
            if version != seen and await self._has_news(leases):
                return
            seen = version
            left = deadline - loop.time()
            if left <= 0:
                return
            await _wait_for(bell, min(left, POLL.total_seconds()))

    async def _has_news(self, leases: Sequence[Lease]) -> bool:
        positions = _positions(leases)
        if not positions:
            return False
        condition, bindings = _behind(positions)
        select = f'SELECT EXISTS (SELECT 1 FROM "{self._log.outbox}" WHERE {condition})'
        return bool(await self._database.read(lambda cursor: _number(cursor.execute(select, bindings))))

    async def trim(self) -> None:
        passed = await self._database.read(self._persisted)
        moved = [slice for slice in passed if passed[slice] > self._trimmed.get(slice, 0)]
        if not moved:
            return
        # Below its old position a slice has nothing left, so a slice that stands still costs no second look.
        first, last = min(self._trimmed.get(slice, 0) for slice in moved), max(passed[slice] for slice in moved)
        while (end := await self._chunk_end(first, last)) is not None:
            await self._delete_chunk(first, end, passed)
            first = end
        self._trimmed = passed

    def _persisted(self, cursor: apsw.Cursor) -> Positions:
        select = "SELECT slice, position FROM statecast_slices WHERE log = ?"
        rows: list[Any] = cursor.execute(select, (self._log.number,)).fetchall()
        return dict(rows)

    async def _chunk_end(self, first: int, last: int) -> int | None:
        select = f"""SELECT max(id) FROM
            (SELECT id FROM "{self._log.outbox}" WHERE id > ? AND id <= ? ORDER BY id LIMIT {TRIM_CHUNK})"""

        def query(cursor: apsw.Cursor) -> int | None:
            rows: list[Any] = cursor.execute(select, (first, last)).fetchall()
            return cast(int | None, rows[0][0])

        return await self._database.read(query)

    async def _delete_chunk(self, first: int, end: int, passed: Positions) -> None:
        cases, bindings = _cases(passed)
        statement = f'DELETE FROM "{self._log.outbox}" WHERE id > ? AND id <= ? AND id <= {cases}'
        await self._database.write(lambda cursor: cursor.execute(statement, (first, end, *bindings)).fetchall())

    async def status(self) -> list[SliceStatus]:
        select = f"""SELECT s.slice, iif(s.expires_at > unixepoch('subsec'), s.owner, NULL), s.epoch, s.position,
              count(o.id), min(o.created_at)
            FROM statecast_slices s LEFT JOIN "{self._log.outbox}" o ON o.slice = s.slice AND o.id > s.position
            WHERE s.log = ? GROUP BY s.slice ORDER BY s.slice"""

        def query(cursor: apsw.Cursor) -> list[Any]:
            return cursor.execute(select, (self._log.number,)).fetchall()

        return [
            SliceStatus(slice, owner, epoch, str(position), pending, None if oldest is None else utc(oldest))
            for slice, owner, epoch, position, pending, oldest in await self._database.read(query)
        ]


async def _wait_for(bell: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await bell.wait()
    except TimeoutError:
        pass


def _positions(leases: Iterable[Lease]) -> Positions:
    return {lease.slice: int(lease.position) for lease in leases}


def _behind(positions: Positions) -> tuple[str, tuple[int, ...]]:
    """Say in SQL: in one of these slices, behind its position."""
    cases, bindings = _cases(positions)
    return f"id > ? AND id > {cases}", (min(positions.values()), *bindings)


def _cases(positions: Positions) -> tuple[str, tuple[int, ...]]:
    branches = " ".join(["WHEN ? THEN ?"] * len(positions))
    return f"CASE slice {branches} END", tuple(chain.from_iterable(positions.items()))


def _data_version(cursor: apsw.Cursor) -> int:
    return _number(cursor.execute("PRAGMA data_version"))


def _number(cursor: apsw.Cursor) -> int:
    rows: list[Any] = cursor.fetchall()
    return int(rows[0][0])
