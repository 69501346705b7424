"""Reading the ring: what became visible since a position, in the order of ids.

How long a read takes depends on what it finds, not on what has passed and is not trimmed yet. What is new is found by
its transactions, all of it at once; where that is more than may be read at a time, it is read in steps along its ids,
from the first of them on, or from the first row on where it is very much. Each statement can only walk along the index
that suits it, so that no plan is the wrong one.
"""

from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace

from statecast.components.state.log import READ_BYTES, Batch, Lease, LogEntry, share_of
from statecast.components.state.postgresql.entry import ENTRY_COLUMNS, read_entry, up_to_read_bytes
from statecast.components.state.postgresql.lanes import Session
from statecast.components.state.postgresql.position import Position, group

# $1 slices, $2 and $3 the snapshots between which to read; without the later one it is read up to now.
_SNAPSHOTS = (
    "snapshots as materialized ("
    "select $2::text::pg_snapshot as prev, coalesce($3::text::pg_snapshot, pg_current_snapshot()) as cur)"
)
_CUR = "(select cur from snapshots)"

# For so many entries it matters little that all those which have passed, a partition or two of them, are walked along.
_WORTH_WALKING = 50_000


class LogReader:
    """The statements run on their own, under READ COMMITTED: a snapshot that is pinned by one is read by a later one,
    which sees at least what it names."""

    def __init__(self, outbox: str) -> None:
        self._new = (
            f"with {_SNAPSHOTS},"
            f" new as materialized ({_new_rows(outbox, ENTRY_COLUMNS)}),"
            " total as materialized (select count(*) as total from new)"
            # The text of a snapshot may be long; it comes with the first row.
            " select case when bytes_ahead > 0 then null else cur::text end as cur, total, e.*"
            " from snapshots cross join total left join ("
            f"{up_to_read_bytes('select * from new where (select total from total) <= $4', order='id')}"
            ") e on true order by e.id"
        )
        self._first = (
            f"with {_SNAPSHOTS} select count(*) as total, coalesce(min(id), 0) as id"
            f" from ({_new_rows(outbox, 'id')}) new"
        )
        self._steps = up_to_read_bytes(
            f"select {ENTRY_COLUMNS} from {outbox} where slice = any ($1::smallint[]) and id > $4"
            " and pg_visible_in_snapshot(xid, (select $3::text::pg_snapshot))"
            " and not pg_visible_in_snapshot(xid, (select $2::text::pg_snapshot))"
            " order by id limit $5",
            order="id",
        )

    async def read(self, session: Session, leases: Sequence[Lease], limit: int) -> Batch:
        """Read up to `limit` entries behind the positions of these leases, which come back moved on.

        Where nothing is found at all they stay where they were for a while: to persist a position, and every relay's
        heartbeat, is a transaction, so an idle log would move and be persisted for ever.
        """
        groups = group(leases)
        share = share_of(limit, len(groups))
        entries: list[LogEntry] = []
        moved = {lease.slice: lease for lease in leases}
        snapshot: str | None = None
        is_idle = True
        room = READ_BYTES
        for position, members in groups.items():
            # The snapshot is the same for all that have none yet, so that they are one group from then on.
            start = position if snapshot is None else position.pin(snapshot)
            rows, end = await self._read_group(session, start, [lease.slice for lease in members], share)
            if position.cur is None:
                snapshot = end.cur or end.prev
            entries.extend(map(read_entry, rows))
            moved |= {lease.slice: replace(lease, position=str(end)) for lease in members}
            is_idle = is_idle and not rows and end.is_near(position)
            room -= sum(len(row["body"]) for row in rows)
            if room <= 0:
                break
        if is_idle:
            return Batch((), tuple(map(unpinned, leases)))
        return Batch(tuple(entries), tuple(moved[lease.slice] for lease in leases))

    async def _read_group(
        self, session: Session, position: Position, slices: list[int], limit: int
    ) -> tuple[list[Any], Position]:
        """Read what is new to these slices, and tell where they stand then."""
        if not position.after:
            rows = await session.read(self._new, slices, position.prev, position.cur, limit)
            position = position.pin(rows[0]["cur"])
            if rows[0]["total"] <= limit:
                rows = [row for row in rows if row["id"] is not None]
                return rows, _behind(position, rows, is_all=not rows or rows[0]["found"] == len(rows))
            (first,) = await session.read(self._first, slices, position.prev, position.cur, _WORTH_WALKING)
            position = position.behind(first["id"] - 1 if first["total"] <= _WORTH_WALKING else 0)
        rows = await session.read(self._steps, slices, position.prev, position.cur, position.after, limit)
        return rows, _behind(position, rows, is_all=not rows or rows[0]["found"] == len(rows) < limit)


def unpinned(lease: Lease) -> Lease:
    """Let a lease from which nothing more is read wait for its end, not ask to be read on."""
    return replace(lease, position=str(Position(Position.parse(lease.position).prev)))


def _behind(position: Position, rows: Sequence[Any], *, is_all: bool) -> Position:
    return position.end if is_all else position.behind(rows[-1]["id"])


def _new_rows(outbox: str, columns: str) -> str:
    """Select what is visible in the later snapshot and was not in the earlier one: it is of a transaction that began
    after that, or was under way then. Each half walks along the index on `xid`, and ends with one more than $4."""
    first = "order by xid limit $4 + 1"
    which = f"from {outbox} where slice = any ($1::smallint[]) and pg_visible_in_snapshot(xid, {_CUR})"
    return (
        f"(select {columns} {which} and xid >= (select pg_snapshot_xmax(prev) from snapshots)"
        f" and xid < (select pg_snapshot_xmax(cur) from snapshots) {first})"
        f" union all (select {columns} {which}"
        f" and xid = any (array(select pg_snapshot_xip(prev) from snapshots)) {first})"
    )
