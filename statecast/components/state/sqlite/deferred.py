"""Entries that are put aside of the log: one row for each, and one for each key that has any.

The row of a key counts its entries, so that a relay may ask often which keys are due, however many entries wait. All
functions run inside the caller's transaction.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Final

import apsw

from statecast.components.state.log import Deferral, DeferredKey, Failure, LogEntry
from statecast.components.state.sqlite.entries import ENTRY_COLUMNS, entry_of, entry_row
from statecast.components.state.sqlite.rows import utc
from statecast.components.state.sqlite.schema import RegisteredLog

_NO_FAILURE: Final = Failure(0, timedelta(0), "")


def put_aside(cursor: apsw.Cursor, log: RegisteredLog, deferral: Deferral) -> None:
    """Put entries behind what is aside of their key; those that are aside already stay as they are."""
    rows = [(log.number, *entry_row(entry, log.slices)) for entry in deferral.entries]
    before = cursor.connection.total_changes()
    cursor.executemany(
        f"""INSERT INTO statecast_deferred_entries (log, {ENTRY_COLUMNS})
        VALUES ({", ".join("?" * len(rows[0]))}) ON CONFLICT DO NOTHING""",
        rows,
    )
    added = cursor.connection.total_changes() - before
    failure, head = deferral.failure or _NO_FAILURE, deferral.entries[0]
    cursor.execute(
        """INSERT INTO statecast_deferred_keys (log, order_key, slice, attempts, reason, due_at, pending, oldest_at)
        VALUES (?, ?, ?, ?, ?, unixepoch('subsec') + ?, ?, ?)
        ON CONFLICT DO UPDATE SET pending = pending + excluded.pending""",
        (
            log.number,
            head.record.order_key,
            head.slice,
            failure.attempts,
            failure.reason,
            _seconds(failure),
            added,
            rows[0][-1],
        ),
    )


def list_keys(cursor: apsw.Cursor, log: RegisteredLog, slices: Sequence[int]) -> list[DeferredKey]:
    """List the keys of these slices; those due first come first, parked ones last."""
    rows: list[Any] = cursor.execute(
        f"""SELECT slice, order_key, attempts, reason, ifnull(due_at <= unixepoch('subsec'), 0), due_at IS NULL,
          pending, oldest_at
        FROM statecast_deferred_keys WHERE log = ? AND slice IN ({", ".join("?" * len(slices))})
        ORDER BY due_at NULLS LAST, oldest_at, order_key""",
        (log.number, *slices),
    ).fetchall()
    return [
        DeferredKey(slice, order_key, attempts, reason, bool(is_due), bool(is_parked), pending, utc(oldest_at))
        for slice, order_key, attempts, reason, is_due, is_parked, pending, oldest_at in rows
    ]


def read_entries(cursor: apsw.Cursor, log: RegisteredLog, order_key: str, limit: int) -> list[LogEntry]:
    rows: list[Any] = cursor.execute(
        f"SELECT {ENTRY_COLUMNS} FROM statecast_deferred_entries WHERE log = ? AND order_key = ? ORDER BY id LIMIT ?",
        (log.number, order_key, max(limit, 0)),
    ).fetchall()
    return [entry_of(row) for row in rows]


def settle(
    cursor: apsw.Cursor, log: RegisteredLog, order_key: str, published: Sequence[str], failure: Failure | None
) -> bool:
    """Remove what was published of a key and note how the rest failed; tell whether any is left."""
    before = cursor.connection.total_changes()
    cursor.executemany(
        "DELETE FROM statecast_deferred_entries WHERE log = ? AND order_key = ? AND id = ?",
        [(log.number, order_key, int(id)) for id in published],
    )
    removed = cursor.connection.total_changes() - before
    head: list[Any] = cursor.execute(
        "SELECT created_at FROM statecast_deferred_entries WHERE log = ? AND order_key = ? ORDER BY id LIMIT 1",
        (log.number, order_key),
    ).fetchall()
    if not head:
        cursor.execute("DELETE FROM statecast_deferred_keys WHERE log = ? AND order_key = ?", (log.number, order_key))
        return False
    failure = failure or _NO_FAILURE
    cursor.execute(
        """UPDATE statecast_deferred_keys SET attempts = ?, reason = ?, due_at = unixepoch('subsec') + ?,
          pending = pending - ?, oldest_at = ?
        WHERE log = ? AND order_key = ?""",
        (failure.attempts, failure.reason, _seconds(failure), removed, head[0][0], log.number, order_key),
    )
    return True


def replay(cursor: apsw.Cursor, log: RegisteredLog, order_key: str | None) -> int:
    cursor.execute(
        """UPDATE statecast_deferred_keys SET attempts = 0, due_at = unixepoch('subsec')
        WHERE log = ?1 AND due_at IS NULL AND (?2 IS NULL OR order_key = ?2)""",
        (log.number, order_key),
    )
    return cursor.connection.changes()


def _seconds(failure: Failure) -> float | None:
    # A null pause makes the sum null: parked.
    return None if failure.pause is None else failure.pause.total_seconds()
