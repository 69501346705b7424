"""The outbox log of a PostgreSQL store: positions are pairs of snapshots, leases are rows."""

import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from datetime import timedelta
from functools import partial
from itertools import groupby
from typing import Any

import asyncpg

from statecast.components.state.log import (
    Batch,
    Deferral,
    DeferredQueue,
    Lease,
    LogEntry,
    QueueProgress,
    QueueStatus,
    SliceStatus,
    Topic,
    share_of,
)
from statecast.components.state.postgresql.deferred import (
    DeferredStatements,
    deferral_columns,
    due_columns,
    queue_of,
    queue_status,
    reading_columns,
    settlement_columns,
)
from statecast.components.state.postgresql.entry import read_entry
from statecast.components.state.postgresql.lanes import Lanes, Session, Work
from statecast.components.state.postgresql.migration import Log
from statecast.components.state.postgresql.position import Position
from statecast.components.state.postgresql.reading import LogReader, unpinned
from statecast.components.state.postgresql.schema import PARTITION_BITS, PARTITIONS, Layout
from statecast.components.state.postgresql.wake import Waker
from statecast.errors import OutcomeUnknown, StoreUnavailable

logger = logging.getLogger(__name__)


_Move = Callable[[Session, list[Lease]], Awaitable[list[Any]]]


class PostgresqlOutboxLog:
    """The log of one (app id, component); its rows are written by the commit function.

    A server that crashed gives numbers of transactions again that nothing durable has come of. A position that is
    persisted names none of these, but one that was read since may. So what was leased in another life of the server's
    is not mine any more, and goes on from where it was persisted.
    """

    def __init__(self, lanes: Lanes, layout: Layout, log: Log, waker: Waker) -> None:
        self._lanes = lanes
        self._layout = layout
        self._log = log
        self._waker = waker
        self._sql = _Statements(layout, log.number)
        self._reader = LogReader(layout.outbox(log.number))
        self._aside = DeferredStatements(layout, log.number, self._sql.advance)
        self._lives: dict[int, tuple[int, str]] = {}
        self._places: dict[int, str] = {}
        self._lacks_rights = False

    @property
    def slices(self) -> int:
        return self._log.slices

    async def heartbeat(self, owner: str, ttl: timedelta) -> int:
        rows = await self._change(self._sql.heartbeat, owner, ttl)
        return int(rows[0]["living"])

    async def acquire(self, owner: str, limit: int, ttl: timedelta) -> list[Lease]:
        if limit <= 0:
            return []
        rows = await self._run_change(partial(self._acquire, arguments=(owner, ttl, limit)))
        leases = [Lease(row["slice"], owner, row["epoch"], _position_text(row)) for row in rows]
        self._waker.hold([lease.slice for lease in leases])
        return sorted(leases, key=lambda lease: lease.slice)

    async def read(self, leases: Sequence[Lease], limit: int) -> Batch:
        if not leases:
            return Batch((), ())
        return await self._lanes.run(partial(self._read, leases=list(leases), limit=limit))

    async def advance(self, leases: Sequence[Lease], ttl: timedelta, deferrals: Sequence[Deferral] = ()) -> list[Lease]:
        if not leases:
            return []
        move = partial(self._advance, ttl=ttl)
        if deferrals:
            move = partial(self._write, statement=self._aside.advance, others=[ttl, *deferral_columns(deferrals)])
        rows = await self._run_change(partial(self._move, leases=list(leases), move=move))
        mine = {(row["slice"], row["epoch"]) for row in rows}
        kept = [lease for lease in leases if (lease.slice, lease.epoch) in mine]
        self._waker.let_go({lease.slice for lease in leases} - {lease.slice for lease in kept})
        return kept

    async def release(self, leases: Sequence[Lease]) -> None:
        if leases:
            self._waker.let_go([lease.slice for lease in leases])
            move = partial(self._write, statement=self._sql.release, others=[])
            await self._run_change(partial(self._move, leases=list(leases), move=move))

    async def deferred(self, slices: Collection[int]) -> list[QueueStatus]:
        rows = await self._look(self._aside.queues, list(slices))
        return [queue_status(row) for row in rows]

    async def due_deferred(
        self, slices: Collection[int], limit: int, but_for: Collection[Topic] = ()
    ) -> list[QueueStatus]:
        rows = await self._look(self._aside.due, *due_columns(slices, limit, but_for))
        return [queue_status(row) for row in rows]

    async def read_deferred(self, queues: Sequence[DeferredQueue], limit: int) -> list[LogEntry]:
        rows = await self._look(self._aside.read, *reading_columns(queues, share_of(limit, len(queues))))
        return [read_entry(row) for row in rows]

    async def settle_deferred(self, leases: Sequence[Lease], progress: Sequence[QueueProgress]) -> list[DeferredQueue]:
        rows = await self._change(self._aside.settle, *settlement_columns(leases, progress))
        return [queue_of(row) for row in rows]

    async def replay(self, order_key: str | None = None) -> int:
        return len(await self._change(self._aside.replay, order_key))

    async def wait(self, leases: Sequence[Lease], timeout: timedelta) -> None:
        if any(Position.parse(lease.position).cur is not None for lease in leases):
            return
        await self._waker.wait([lease.slice for lease in leases], timeout)

    async def trim(self) -> None:
        await self._lanes.run(self._trim)

    async def status(self) -> list[SliceStatus]:
        return await self._lanes.run(self._status)

    async def _look(self, statement: str, *arguments: object) -> list[Any]:
        return await self._lanes.run(lambda session: session.read(statement, *arguments))

    async def _change(self, statement: str, *arguments: object) -> list[Any]:
        return await self._run_change(lambda session: session.write(statement, *arguments))

    async def _run_change(self, change: Work[list[Any]]) -> list[Any]:
        try:
            return await self._lanes.run(change)
        except OutcomeUnknown as error:
            # Every change of the log's own rows can be made again, so there is nothing to resolve.
            raise StoreUnavailable(str(error)) from error

    async def _acquire(self, session: Session, *, arguments: Sequence[object]) -> list[Any]:
        async with session.in_one_life() as life:
            rows = await session.write(self._sql.acquire, *arguments)
            self._lives |= {row["slice"]: (row["epoch"], life) for row in rows}
            return rows

    async def _move(self, session: Session, *, leases: list[Lease], move: _Move) -> list[Any]:
        """Persist the positions of leases of this life by `move`, and give the other ones up."""
        async with session.in_one_life() as life:
            valid = [lease for lease in leases if self._is_of(lease, life)]
            if len(valid) < len(leases):
                void = [lease for lease in leases if lease not in valid]
                await session.write(self._sql.give_up, [each.slice for each in void], [each.epoch for each in void])
            return await move(session, valid) if valid else []

    async def _write(
        self, session: Session, leases: list[Lease], *, statement: str, others: Sequence[object]
    ) -> list[Any]:
        return await session.write(statement, *_columns(leases), *others)

    async def _advance(self, session: Session, leases: list[Lease], *, ttl: timedelta) -> list[Any]:
        """Go to the rows where the last advance has left them, and look for those that are not there any more.

        While a transaction is open anywhere, all former versions of a row stay, and the index leads along them.
        """
        settled = [lease for lease in leases if lease.slice in self._places]
        places = [self._places[lease.slice] for lease in settled]
        rows = await session.write(self._sql.advance_there, *_columns(settled), ttl, places) if settled else []
        found = {row["slice"] for row in rows}
        missing = [lease for lease in leases if lease.slice not in found]
        rows += await session.write(self._sql.advance, *_columns(missing), ttl) if missing else []
        self._places = {row["slice"]: row["place"] for row in rows}
        return rows

    def _is_of(self, lease: Lease, life: str) -> bool:
        """Tell whether a lease is of this life of the server's, as one is that was leased by another store."""
        epoch, known_life = self._lives.get(lease.slice, (None, None))
        return epoch != lease.epoch or known_life == life

    async def _read(self, session: Session, *, leases: list[Lease], limit: int) -> Batch:
        async with session.in_one_life() as life:
            valid = [lease for lease in leases if self._is_of(lease, life)]
            batch = await self._reader.read(session, valid, limit) if valid else Batch((), ())
        moved = {lease.slice: lease for lease in batch.leases}
        return Batch(batch.entries, tuple(moved.get(lease.slice) or unpinned(lease) for lease in leases))

    async def _status(self, session: Session) -> list[SliceStatus]:
        rows = await session.read(self._sql.slices)
        pending: dict[int, tuple[int, Any]] = {}
        for text, members in groupby(sorted(rows, key=_position_text), key=_position_text):
            position = Position.parse(text)
            numbers = [row["slice"] for row in members]
            found = await session.read(self._sql.pending, numbers, position.prev, position.cur, position.after)
            pending |= {row["slice"]: (row["pending"], row["oldest_at"]) for row in found}
        return [_slice_status(row, *pending.get(row["slice"], (0, None))) for row in rows]

    async def _trim(self, session: Session) -> None:
        """Empty the partitions that are passed. Without the rights to do so that is an error in the log, once."""
        try:
            await self._reclaim_all(session)
        except asyncpg.InsufficientPrivilegeError as error:
            if not self._lacks_rights:
                self._lacks_rights = True
                outbox = self._layout.outbox(self._log.number)
                logger.error("the outbox %s grows, since this role may not empty its partitions: %s", outbox, error)

    async def _reclaim_all(self, session: Session) -> None:
        (ids,) = await session.read(self._sql.last_id)
        current = (ids["last_value"] >> PARTITION_BITS) % PARTITIONS
        for partition in range(PARTITIONS):
            # The next one too is left alone: writers are about to enter it.
            if partition not in (current, (current + 1) % PARTITIONS):
                await self._reclaim(session, partition)

    async def _reclaim(self, session: Session, partition: int) -> None:
        """Empty one partition if all of it is behind every slice's persisted position."""
        if not await self._is_passed(session, partition):
            return
        try:
            await session.connection.execute(self._sql.reclaim(partition))
        except (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError):
            return

    async def _is_passed(self, session: Session, partition: int) -> bool:
        (row,) = await session.read(self._sql.passed(partition))
        return bool(row["is_passed"])


class _Statements:
    """The log's SQL, with its names put in once."""

    def __init__(self, layout: Layout, log: int) -> None:
        self._layout = layout
        self._log = log
        outbox, slices, relays = layout.outbox(log), layout.slices, layout.relays
        self.pending = (
            "select slice, count(*) as pending, min(created_at) as oldest_at"
            f" from {outbox}"
            " where slice = any ($1::smallint[])"
            " and (xid >= pg_snapshot_xmax($2::text::pg_snapshot)"
            "  or xid = any (array(select pg_snapshot_xip($2::text::pg_snapshot))))"
            " and not pg_visible_in_snapshot(xid, $2::text::pg_snapshot)"
            " and ($3::text is null or id > $4 or not pg_visible_in_snapshot(xid, $3::text::pg_snapshot))"
            " group by slice"
        )
        self.heartbeat = (
            f"with dead as (delete from {relays} where log = {log} and owner <> $1"
            " and expires_at < clock_timestamp() - interval '1 hour'),"
            f" beat as (insert into {relays} (log, owner, expires_at) values ({log}, $1, clock_timestamp() + $2)"
            " on conflict (log, owner) do update set expires_at = excluded.expires_at)"
            f" select 1 + count(*) as living from {relays}"
            f" where log = {log} and owner <> $1 and expires_at > clock_timestamp()"
        )
        self.acquire = (
            f"update {slices} set owner = $1, epoch = epoch + 1, expires_at = clock_timestamp() + $2"
            f" where log = {log} and slice = any (array("
            f"  select slice from {slices} where log = {log} and expires_at <= clock_timestamp()"
            "   order by slice limit $3 for update skip locked))"
            " returning slice, epoch, prev::text as prev, cur::text as cur, after"
        )
        prolonged = "expires_at = clock_timestamp() + $6"
        by_key = f"s.log = {log} and s.slice = a.slice"
        # Sums, not the columns, so that there is no index to take instead.
        by_place = f"s.ctid = a.place::tid and s.log + 0 = {log} and s.slice + 0 = a.slice"
        self.advance = _writing_positions(slices, prolonged, by_key)
        self.advance_there = _writing_positions(slices, prolonged, by_place, places="$7::text[]")
        self.release = _writing_positions(slices, "owner = null, expires_at = '-infinity'", by_key)
        self.give_up = (
            f"update {slices} s set owner = null, expires_at = '-infinity'"
            " from unnest($1::smallint[], $2::bigint[]) as a(slice, epoch)"
            f" where s.log = {log} and s.slice = a.slice and s.epoch = a.epoch and s.owner is not null"
        )
        self.slices = (
            "select slice, case when expires_at > clock_timestamp() then owner end as owner, epoch,"
            f" prev::text as prev, cur::text as cur, after from {slices} where log = {log} order by slice"
        )
        self.last_id = f"select last_value from {layout.outbox_ids(log)}"

    def passed(self, partition: int) -> str:
        """Tell whether the partition has rows, and all of them are visible in every slice's snapshot.

        Transactions that are open do not count, as long as they have no rows there: those that do hold its lock.
        """
        table = self._layout.partition(self._log, partition)
        slices = f"{self._layout.slices} where log = {self._log}"
        return (
            f"select coalesce((select xid from {table} order by xid desc limit 1)"
            f" < (select min(pg_snapshot_xmax(prev)) from {slices}), false)"
            f" and not exists (select from {table}"
            f"  where xid = any (array(select pg_snapshot_xip(prev) from {slices}))) as is_passed"
        )

    def reclaim(self, partition: int) -> str:
        """Empty the partition if it is passed, as one message and so one transaction: between two messages this
        process might freeze, with a lock that nobody can read past."""
        table = self._layout.partition(self._log, partition)
        return (
            # A TRUNCATE that waits, for a dump say, makes everybody behind it wait as well.
            "set local lock_timeout = '50ms';"
            # Before the first snapshot is taken, so that the look below sees all that was written until then.
            f" lock table {table} in access exclusive mode;"
            f" do $reclaim$ begin if ({self.passed(partition)}) then truncate {table}; end if; end $reclaim$"
        )


def _writing_positions(slices: str, what: str, rows: str, *, places: str = "null::text[]") -> str:
    """Make the statement that writes positions, and `what`, into the `rows` of leases that still hold."""
    return (
        f"update {slices} s set prev = a.prev::pg_snapshot, cur = a.cur::pg_snapshot, after = a.after, {what}"
        f" from unnest($1::smallint[], $2::bigint[], $3::text[], $4::text[], $5::bigint[], {places})"
        " as a(slice, epoch, prev, cur, after, place)"
        f" where {rows} and s.epoch = a.epoch and s.owner is not null"
        " returning s.slice, s.epoch, s.ctid::text as place"
    )


def _columns(leases: Sequence[Lease]) -> Iterable[list[object]]:
    positions = [Position.parse(lease.position) for lease in leases]
    yield [lease.slice for lease in leases]
    yield [lease.epoch for lease in leases]
    yield [position.prev for position in positions]
    yield [position.cur for position in positions]
    yield [position.after for position in positions]


def _position_text(row: Any) -> str:
    return str(Position(row["prev"], row["cur"], row["after"]))


def _slice_status(row: Any, pending: int, oldest_at: Any) -> SliceStatus:
    return SliceStatus(row["slice"], row["owner"], row["epoch"], _position_text(row), pending, oldest_at)
