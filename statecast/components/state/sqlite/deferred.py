"""Entries that are put aside of the log: one row for each, and one for each queue that has any.

The row of a queue counts its entries, so that a relay may ask often which queues are due, however many entries wait.
The functions that write run inside the caller's transaction.
"""

from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import closing
from datetime import timedelta
from itertools import chain
from operator import itemgetter
from typing import Any, Final

import apsw
from msgspec.structs import astuple

from statecast.components.state.log import (
    Deferral,
    DeferredQueue,
    Failure,
    LogEntry,
    QueueProgress,
    QueueStatus,
    Topic,
    share_of,
    slice_of,
    up_to_read_bytes,
)
from statecast.components.state.sqlite.entries import ENTRY_COLUMNS, entry_of, entry_row
from statecast.components.state.sqlite.rows import utc
from statecast.components.state.sqlite.schema import RegisteredLog

_NO_FAILURE: Final = Failure(0, timedelta(0), "")

_OF_QUEUE = "log = ? AND slice = ? AND order_key = ? AND pubsub = ? AND topic = ?"

_STATUS_COLUMNS = """due_at, due_at <= unixepoch('subsec'), attempts, reason, pending, oldest_at,
  slice, order_key, pubsub, topic"""
_due_at = itemgetter(0)


def put_aside(cursor: apsw.Cursor, log: RegisteredLog, deferrals: Sequence[Deferral]) -> None:
    """Put entries behind what is aside of their queues; those that are aside already stay as they are."""
    now = _now(cursor)
    for deferral in deferrals:
        _put_behind(cursor, log, deferral, now)


def list_queues(cursor: apsw.Cursor, log: RegisteredLog, slices: Collection[int]) -> list[QueueStatus]:
    """List the queues of these slices; those due first come first, parked ones last."""
    select = f"""SELECT {_STATUS_COLUMNS} FROM statecast_deferred_queues WHERE log = ? AND slice {_in(slices)}
        ORDER BY due_at NULLS LAST, oldest_at, order_key, pubsub, topic"""
    return [_status_of(row) for row in cursor.execute(select, (log.number, *slices)).fetchall()]


def list_due(
    cursor: apsw.Cursor, log: RegisteredLog, slices: Collection[int], limit: int, but_for: Collection[Topic]
) -> list[QueueStatus]:
    """List the queues that are due, longest due first.

    It is asked topic by topic: whatever waits for one that is left out is not even looked at.
    """
    topics = [topic for topic in _topics(cursor, log) if topic not in but_for]
    rows = chain.from_iterable(_due_rows(cursor, log, slices, limit, topic) for topic in topics)
    return [_status_of(row) for row in sorted(rows, key=_due_at)[:limit]]


def read_entries(
    cursor: apsw.Cursor, log: RegisteredLog, queues: Sequence[DeferredQueue], limit: int
) -> list[LogEntry]:
    # Closed where reading stops: a cursor that is left halfway would keep the write-ahead log from shrinking.
    with closing(_first_entries(cursor, log, queues, share_of(limit, len(queues)))) as entries:
        return up_to_read_bytes(entries)


def settle(cursor: apsw.Cursor, log: RegisteredLog, progress: Sequence[QueueProgress]) -> list[DeferredQueue]:
    """Remove what was published and note how the rest failed; return the queues of which nothing is left."""
    now = _now(cursor)
    return [each.queue for each in progress if not _settle_queue(cursor, log, each, now)]


def replay(cursor: apsw.Cursor, log: RegisteredLog, order_key: str | None) -> int:
    update = """UPDATE statecast_deferred_queues SET attempts = 0, due_at = unixepoch('subsec')
        WHERE log = ? AND due_at IS NULL"""
    if order_key is None:
        cursor.execute(update, (log.number,))
    else:
        slice = slice_of(order_key, log.slices)
        cursor.execute(f"{update} AND slice = ? AND order_key = ?", (log.number, slice, order_key))
    return cursor.connection.changes()


def _put_behind(cursor: apsw.Cursor, log: RegisteredLog, deferral: Deferral, now: float) -> None:
    rows = [(log.number, *entry_row(entry, log.slices)) for entry in deferral.entries]
    added = _add(cursor, rows)
    queue, failure, oldest_at = DeferredQueue.of(deferral.entries[0]), deferral.failure or _NO_FAILURE, rows[0][-1]
    cursor.execute(
        """INSERT INTO statecast_deferred_queues
          (log, slice, order_key, pubsub, topic, attempts, reason, due_at, pending, oldest_at)
        VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
        ON CONFLICT DO UPDATE SET pending = pending + excluded.pending""",
        (*_key(log, queue), failure.attempts, failure.reason, _end_of_pause(failure, now), added, oldest_at),
    )


def _add(cursor: apsw.Cursor, rows: Sequence[tuple[Any, ...]]) -> int:
    """Add entries; return how many were not there already."""
    insert = f"""INSERT INTO statecast_deferred_entries (log, {ENTRY_COLUMNS})
        VALUES ({", ".join("?" * len(rows[0]))}) ON CONFLICT DO NOTHING"""
    return _execute_each(cursor, insert, rows)


def _topics(cursor: apsw.Cursor, log: RegisteredLog) -> Iterator[Topic]:
    """Go from topic to topic, by one look into the index for each, however many queues it has."""
    select = """SELECT pubsub, topic FROM statecast_deferred_queues
        WHERE log = ? AND (pubsub, topic) >= (?, ?) AND due_at IS NOT NULL ORDER BY pubsub, topic LIMIT 1"""
    start = ("", "")
    while found := _first_row(cursor.execute(select, (log.number, *start))):
        pubsub, topic = found
        yield pubsub, topic
        # No text comes between one and the same with a zero behind it.
        start = (pubsub, topic + "\0")


def _due_rows(
    cursor: apsw.Cursor, log: RegisteredLog, slices: Collection[int], limit: int, topic: Topic
) -> list[tuple[Any, ...]]:
    select = f"""SELECT {_STATUS_COLUMNS} FROM statecast_deferred_queues
        WHERE log = ? AND pubsub = ? AND topic = ? AND due_at <= unixepoch('subsec') AND slice {_in(slices)}
        ORDER BY due_at LIMIT ?"""
    return cursor.execute(select, (log.number, *topic, *slices, limit)).fetchall()


def _status_of(row: tuple[Any, ...]) -> QueueStatus:
    due_at, is_due, attempts, reason, pending, oldest_at, *queue = row
    return QueueStatus(
        queue=DeferredQueue(*queue),
        attempts=attempts,
        reason=reason,
        is_due=bool(is_due),
        is_parked=due_at is None,
        pending=pending,
        oldest_at=utc(oldest_at),
    )


def _first_entries(
    cursor: apsw.Cursor, log: RegisteredLog, queues: Sequence[DeferredQueue], limit: int
) -> Generator[LogEntry]:
    select = f"SELECT {ENTRY_COLUMNS} FROM statecast_deferred_entries WHERE {_OF_QUEUE} ORDER BY id LIMIT ?"
    for queue in queues:
        with closing(cursor.connection.execute(select, (*_key(log, queue), limit))) as rows:
            yield from map(entry_of, rows)


def _settle_queue(cursor: apsw.Cursor, log: RegisteredLog, progress: QueueProgress, now: float) -> bool:
    """Tell whether anything of the queue is left."""
    key = _key(log, progress.queue)
    removed = _remove(cursor, key, progress.published)
    oldest_at = _oldest_at(cursor, key)
    if oldest_at is None:
        cursor.execute(f"DELETE FROM statecast_deferred_queues WHERE {_OF_QUEUE}", key)
        return False
    failure = progress.failure or _NO_FAILURE
    cursor.execute(
        f"""UPDATE statecast_deferred_queues
        SET attempts = ?, reason = ?, due_at = ?, pending = pending - ?, oldest_at = ? WHERE {_OF_QUEUE}""",
        (failure.attempts, failure.reason, _end_of_pause(failure, now), removed, oldest_at, *key),
    )
    return True


def _remove(cursor: apsw.Cursor, key: tuple[Any, ...], ids: Sequence[str]) -> int:
    """Remove entries; return how many were still there."""
    delete = f"DELETE FROM statecast_deferred_entries WHERE {_OF_QUEUE} AND id = ?"
    return _execute_each(cursor, delete, [(*key, int(id)) for id in ids])


def _oldest_at(cursor: apsw.Cursor, key: tuple[Any, ...]) -> str | None:
    select = f"SELECT created_at FROM statecast_deferred_entries WHERE {_OF_QUEUE} ORDER BY id LIMIT 1"
    found = _first_row(cursor.execute(select, key))
    return found[0] if found else None


def _execute_each(cursor: apsw.Cursor, statement: str, rows: Sequence[tuple[Any, ...]]) -> int:
    """Return how many rows were changed."""
    before = cursor.connection.total_changes()
    cursor.executemany(statement, rows)
    return cursor.connection.total_changes() - before


def _first_row(cursor: apsw.Cursor) -> tuple[Any, ...] | None:
    rows: list[Any] = cursor.fetchall()
    return rows[0] if rows else None


def _key(log: RegisteredLog, queue: DeferredQueue) -> tuple[Any, ...]:
    return log.number, *astuple(queue)


def _in(slices: Collection[int]) -> str:
    return f"IN ({', '.join('?' * len(slices))})"


def _now(cursor: apsw.Cursor) -> float:
    """Read the clock once for all queues of a step: those with the shorter pause must be due first."""
    rows: list[Any] = cursor.execute("SELECT unixepoch('subsec')").fetchall()
    return float(rows[0][0])


def _end_of_pause(failure: Failure, now: float) -> float | None:
    return None if failure.pause is None else now + failure.pause.total_seconds()
