"""A commit in SQL: planned on the event loop, where it costs the writer nothing, and applied in the writer's thread."""

import time
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any, Final, TypeGuard

import apsw
import msgspec
import orjson

from statecast.components.state.commit import (
    ABSENT,
    Absent,
    Commit,
    Concurrency,
    Delete,
    ETag,
    Guard,
    Mark,
    Operation,
    OutboxRecord,
    Upsert,
    collapse,
    etags_after,
)
from statecast.components.state.etags import new_etag
from statecast.components.state.sqlite.entries import RECORD_COLUMNS, RecordRow, record_row
from statecast.components.state.sqlite.schema import NOW, TIME_FORMAT, RegisteredLog
from statecast.errors import Duplicate, ETagMismatch, Fenced, InvalidRequest

UpsertRow = tuple[str, str, bool, ETag, str | None]
MarkRow = tuple[int, bytes, float, str]

_ROWS_AT_ONCE: Final = 32
"""Each number of rows is a statement of its own, and the connection keeps a hundred statements prepared."""


@dataclass(frozen=True, slots=True)
class Statements:
    """The statements of one store; their text is what the connection finds its prepared statements by."""

    etag: str
    upsert: str
    upsert_all: Sequence[str]
    delete: str
    append_all: Sequence[str]
    claim: str
    find_mark: str
    set_mark: str


def statements(table: str, log: RegisteredLog) -> Statements:
    columns = "key, value, is_binary, etag, expiration_time, update_time"
    upsert = f"""INSERT INTO "{table}" ({columns}) VALUES {{rows}}
        ON CONFLICT (key) DO UPDATE SET value = excluded.value, is_binary = excluded.is_binary,
          etag = excluded.etag, expiration_time = excluded.expiration_time, update_time = excluded.update_time"""
    append = f'INSERT INTO "{log.outbox}" ({RECORD_COLUMNS}, created_at) VALUES {{rows}}'
    return Statements(
        etag=f"""SELECT etag FROM "{table}"
            WHERE key = ? AND (expiration_time IS NULL OR expiration_time > {NOW})""",
        upsert=upsert.format(
            rows=f"(?1, ?2, ?3, ?4, CASE WHEN ?5 IS NULL THEN NULL ELSE strftime('{TIME_FORMAT}', 'now', ?5) END, ?6)"
        ),
        upsert_all=[upsert.format(rows=_placeholders(6, rows)) for rows in range(_ROWS_AT_ONCE + 1)],
        delete=f'DELETE FROM "{table}" WHERE key = ?',
        append_all=[append.format(rows=_placeholders(9, rows)) for rows in range(_ROWS_AT_ONCE + 1)],
        claim="SELECT 1 FROM statecast_claims WHERE app_id = ? AND type = ? AND id = ? AND token = ?",
        find_mark="""SELECT etags FROM statecast_marks
            WHERE log = ? AND digest = ? AND expires_at > unixepoch('subsec')""",
        set_mark="""INSERT OR REPLACE INTO statecast_marks (log, digest, expires_at, etags)
            VALUES (?, ?, unixepoch('subsec') + ?, ?)""",
    )


def _placeholders(columns: int, rows: int) -> str:
    return ", ".join([f"({', '.join('?' * columns)})"] * rows)


class Changes(msgspec.Struct):
    """What the operations of a commit come to. `contradiction`: two of their conditions cannot both hold."""

    conditions: Sequence[tuple[str, ETag | Absent]] = ()
    contradiction: ETagMismatch | None = None
    upserts: Sequence[UpsertRow] = ()
    deletes: Sequence[str] = ()
    etags: tuple[ETag | None, ...] = ()


class Transaction(msgspec.Struct):
    """One planned commit; calling it applies it, inside the caller's transaction."""

    statements: Statements
    app_id: str
    marks: list[MarkRow]
    guards: tuple[Guard, ...]
    changes: Changes
    records: list[RecordRow]

    @property
    def is_blind(self) -> bool:
        """Whether it looks at nothing that is there, removes nothing and sets no value that expires."""
        changes = self.changes
        looks = self.marks or self.guards or changes.conditions or changes.contradiction
        return not (looks or changes.deletes or [row for row in changes.upserts if row[4] is not None])

    def __call__(self, cursor: apsw.Cursor) -> tuple[ETag | None, ...]:
        """Check everything, then write. Raises Duplicate, Fenced, ETagMismatch before the first write."""
        self._check(cursor)
        execute = cursor.execute
        for mark in self.marks:
            execute(self.statements.set_mark, mark)
        second, millisecond = _now()
        for row in self.changes.upserts:
            execute(self.statements.upsert, (*row, second))
        for key in self.changes.deletes:
            execute(self.statements.delete, (key,))
        _insert(cursor, self.statements.append_all, self.records, millisecond)
        return self.changes.etags

    def _check(self, cursor: apsw.Cursor) -> None:
        execute = cursor.execute
        for log, digest, *_ in self.marks:
            if found := execute(self.statements.find_mark, (log, digest)).fetchall():
                raise Duplicate(digest, _answer(found[0][0]))
        for guard in self.guards:
            if not execute(self.statements.claim, (self.app_id, guard.type, guard.id, guard.token)).fetchall():
                raise Fenced(guard.type, guard.id)
        if self.changes.contradiction is not None:
            raise self.changes.contradiction
        for key, expected in self.changes.conditions:
            found = execute(self.statements.etag, (key,)).fetchall()
            if found if expected is ABSENT else found != [(expected,)]:
                raise ETagMismatch(key, None if expected is ABSENT else expected)


def apply_blind(cursor: apsw.Cursor, transactions: Sequence[Transaction]) -> list[tuple[ETag | None, ...]]:
    """Apply transactions that are blind, in their order: a statement for many rows takes half as long as many for one.

    Not the whole of one and then of the next, but the values of all and then their records: within one transaction of
    the database nobody can tell.
    """
    statements = transactions[0].statements
    second, millisecond = _now()
    # What stands for the time to live is null in all of them, as is the expiration time of what does not expire.
    _insert(cursor, statements.upsert_all, [row for each in transactions for row in each.changes.upserts], second)
    _insert(cursor, statements.append_all, [row for each in transactions for row in each.records], millisecond)
    return [each.changes.etags for each in transactions]


def _insert(cursor: apsw.Cursor, statements: Sequence[str], rows: Sequence[tuple[Any, ...]], last: str) -> None:
    """Insert rows with `last` as their last column; `statements` has one for each number of rows."""
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        chunk = rows[start : start + _ROWS_AT_ONCE]
        bindings: list[Any] = []
        for row in chunk:
            bindings += row
            bindings.append(last)
        cursor.execute(statements[len(chunk)], bindings)


def plan(commit: Commit, statements: Statements, app_id: str, log: RegisteredLog) -> Transaction:
    """Turn a commit into rows. Raises InvalidRequest."""
    changes = _changes(commit.operations)
    return Transaction(
        statements,
        app_id,
        _mark_rows(commit.marks, changes.etags, log) if commit.marks else [],
        commit.guards,
        changes,
        _record_rows(commit.records, log),
    )


def _answer(etags: Any) -> list[str | None] | None:
    """Read what a mark remembers; a schema before it did left None."""
    answer: list[str | None] | None = None if etags is None else orjson.loads(etags)
    return answer


def _mark_rows(marks: Sequence[Mark], etags: tuple[ETag | None, ...], log: RegisteredLog) -> list[MarkRow]:
    answer = orjson.dumps(etags).decode()
    return [(log.number, mark.digest, mark.ttl.total_seconds(), answer) for mark in marks]


def _record_rows(records: Sequence[OutboxRecord], log: RegisteredLog) -> list[RecordRow]:
    try:
        return [record_row(record, log.slices) for record in records]
    except (TypeError, UnicodeEncodeError) as error:
        raise InvalidRequest(f"an event cannot be written: {error}") from error


def _changes(operations: tuple[Operation, ...]) -> Changes:
    if len(operations) == 1 and _is_plain(operations[0]):
        # By far the most frequent commit; the general way below comes to the same and takes 8 µs more.
        row = _upsert_row(operations[0])
        return Changes(upserts=[row], etags=(row[3],))
    try:
        changes = collapse(operations)
    except ETagMismatch as mismatch:
        # It is raised in its turn: a mark that is set already, or a guard, goes before it.
        return Changes(contradiction=mismatch)
    upserts = [_upsert_row(change.write) for change in changes if isinstance(change.write, Upsert)]
    return Changes(
        conditions=[(change.key, change.expected) for change in changes if change.expected is not None],
        upserts=upserts,
        deletes=[change.key for change in changes if isinstance(change.write, Delete)],
        etags=etags_after(operations, {row[0]: row[3] for row in upserts}),
    )


def _is_plain(operation: Operation) -> TypeGuard[Upsert]:
    return isinstance(operation, Upsert) and not operation.etag and operation.concurrency is not Concurrency.FIRST_WRITE


def _upsert_row(upsert: Upsert) -> UpsertRow:
    modifier = None if upsert.ttl is None else _modifier(upsert.ttl)
    return upsert.key, _text(upsert), upsert.is_binary, new_etag(), modifier


def _text(upsert: Upsert) -> str:
    if upsert.is_binary:
        return b64encode(upsert.value).decode("ascii")
    try:
        return upsert.value.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the value of {upsert.key!r} is given as text and is no UTF-8: {error}") from None


def _modifier(ttl: timedelta) -> str:
    # https://www.sqlite.org/lang_datefunc.html: what would be after the year 9999 is null, which never expires.
    return f"{ttl.total_seconds():+.3f} seconds"


def _now() -> tuple[str, str]:
    """Tell the time as CURRENT_TIMESTAMP and as NOW write it; much cheaper than to let the database do so by row."""
    seconds, milliseconds = divmod(time.time_ns() // 1_000_000, 1_000)
    text = _text_of_time(seconds)
    return text, f"{text}.{milliseconds:03d}"


@lru_cache(maxsize=1)
def _text_of_time(seconds: int) -> str:
    """Write a time since 1970; most commits ask for the same as the one before."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
