"""The commit function's arguments made of commits, and its answers read: no I/O here.

Several commits may share a call if none of them has a key, mark or guard in common with another.
"""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from datetime import timedelta
from operator import itemgetter
from typing import TypeVar
from uuid import UUID, uuid4

import msgspec
import orjson

from statecast.components.state.commit import (
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
from statecast.components.state.log import slice_of
from statecast.components.state.postgresql.entry import write_metadata
from statecast.errors import Duplicate, ETagMismatch, Fenced, InvalidRequest, StatecastError

T = TypeVar("T")

# Python's calendar ends with the year 9999, where PostgreSQL's goes on.
_LONGEST_LIFE = timedelta(days=365 * 7_900).total_seconds()

# The function unpacks every array that it is given, also those it does not look at.
_NO_GUARDS = (None,) * 4
_NO_CHANGES = (None,) * 7
_NO_MARKS = (None,) * 4
_NO_RECORDS = (None,) * 9


class Applied(msgspec.Struct, frozen=True, gc=False):
    """The commit was applied; `etags` are the answer to its operations."""

    etags: tuple[ETag | None, ...]


class Refused(msgspec.Struct, frozen=True):
    """Nothing of the commit was applied, for this reason."""

    error: StatecastError


class Busy(msgspec.Struct, frozen=True):
    """Nothing of the commit was applied, for it would have had to wait: it is to run alone."""


Outcome = Applied | Refused | Busy

_BUSY = Busy()
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\""})
_NO_ETAG = str(UUID(int=0))


_ChangeRow = tuple[str, str, bytes, str | None, float | None, str]
_MarkRow = tuple[bytes, float, str]
_KEY = itemgetter(1)
_RecordRow = tuple[int, str, str, int, str, str, str, bytes]


class PreparedCommit:
    """A commit as rows of the function's arguments, made once however often it is tried.

    Its etags are drawn here, so the answer is known before it is applied. Raises ETagMismatch for a commit that
    contradicts itself, InvalidRequest for one that cannot be written.
    """

    __slots__ = ("applied", "changes", "commit", "footprint", "guards", "marks", "records", "weight")

    def __init__(self, commit: Commit, slices: int) -> None:
        self.commit = commit
        self.changes, etags = change_rows(commit.operations)
        self.applied = Applied(etags)
        self.guards: Sequence[Guard] = ()
        self.marks: Sequence[_MarkRow] = ()
        self.records: list[_RecordRow] = []
        self.footprint: list[Hashable] = []
        self.weight = 0
        for row in self.changes:
            self.footprint.append(row[1])
            self.weight += len(row[2])
        try:
            for record in commit.records:
                self.records.append(_record_row(record, slices))
                self.weight += len(record.body)
            if commit.marks:
                self.marks = _mark_rows(commit.marks, etags)
                self.footprint += [row[0] for row in self.marks]
        except (TypeError, UnicodeEncodeError) as error:
            raise InvalidRequest(f"the commit cannot be written: {error}") from error
        if commit.guards:
            self.guards = sorted(set(commit.guards), key=lambda guard: (guard.type, guard.id))
            self.footprint += {(guard.type, guard.id) for guard in self.guards}


class CommitCall:
    """One call of the commit function for `commits`; COMMIT_ARGUMENTS takes the arguments."""

    __slots__ = ("_changes", "_commits", "_guards", "_marks", "_records", "slices")

    def __init__(self, commits: Sequence[PreparedCommit]) -> None:
        self._commits = commits
        self._changes = [row for commit in commits for row in commit.changes]
        self._guards = [guard for commit in commits for guard in commit.guards]
        self._marks = [row for commit in commits for row in commit.marks]
        self._records = [row for commit in commits for row in commit.records]
        self.slices = {row[0] for row in self._records}

    def arguments(self, *, wait: bool) -> list[object]:
        return [
            len(self._commits),
            wait,
            *(self._guard_arguments() if self._guards else _NO_GUARDS),
            *(self._change_arguments() if self._changes else _NO_CHANGES),
            *(self._mark_arguments() if self._marks else _NO_MARKS),
            *(self._record_arguments() if self._records else _NO_RECORDS),
        ]

    def outcomes(self, answers: Sequence[str | None]) -> list[Outcome]:
        """Read the function's answer, one for each commit."""
        return [
            commit.applied if answer is None else self._refused(commit, answer)
            for commit, answer in zip(self._commits, answers, strict=True)
        ]

    def _guard_arguments(self) -> Iterator[object]:
        yield _numbers([len(commit.guards) for commit in self._commits])
        yield _texts([guard.type for guard in self._guards])
        yield _texts([guard.id for guard in self._guards])
        yield _texts([_token(guard.token) for guard in self._guards])

    def _change_arguments(self) -> Iterator[object]:
        kinds, keys, values, expected, ttls, etags = zip(*self._changes, strict=True)
        yield _numbers([len(commit.changes) for commit in self._commits])
        yield f"{{{','.join(kinds)}}}"
        yield _texts(keys)
        yield values
        yield _unless_empty(expected)
        yield _unless_empty(ttls)
        yield f"{{{','.join(etags)}}}"

    def _mark_arguments(self) -> Iterator[object]:
        yield _numbers([len(commit.marks) for commit in self._commits])
        yield from zip(*self._marks, strict=True)

    def _record_arguments(self) -> Iterator[object]:
        slices, order_keys, event_ids, formats, pubsubs, topics, metadata, bodies = zip(*self._records, strict=True)
        yield _numbers([len(commit.records) for commit in self._commits])
        yield _integers(slices)
        yield _texts(order_keys)
        yield _texts(event_ids)
        yield _integers(formats)
        yield _texts(pubsubs)
        yield _texts(topics)
        yield _texts(metadata)
        yield bodies

    def _refused(self, commit: PreparedCommit, answer: str) -> Outcome:
        if answer == "busy":
            return _BUSY
        reason, index, *etags = answer.split(" ", 2)
        return Refused(self._refusal(commit.commit, reason, int(index) - 1, etags))

    def _refusal(self, commit: Commit, reason: str, index: int, etags: list[str]) -> StatecastError:
        match reason:
            case "fenced":
                guard = self._guards[index]
                return Fenced(guard.type, guard.id)
            case "etag":
                key = self._changes[index][1]
                (expected,) = (change.expected for change in collapse(commit.operations) if change.key == key)
                return ETagMismatch(key, None if isinstance(expected, Absent) else expected)
            case "duplicate":
                return Duplicate(self._marks[index][0], orjson.loads(etags[0]) if etags else None)
            case _:
                raise AssertionError(f"the commit function answered {reason!r}")


def change_rows(operations: Sequence[Operation]) -> tuple[list[_ChangeRow], tuple[ETag | None, ...]]:
    """Make the rows of operations, sorted by key, and the etags that their keys have when these are applied.

    Most commits have one operation for a key, and are spared the bringing together of several.
    """
    rows: dict[str, _ChangeRow] = {}
    etags: list[ETag | None] = []
    for operation in operations:
        key, etag = operation.key, operation.etag
        if isinstance(operation, Upsert):
            new = new_etag()
            etags.append(new)
            absent = operation.concurrency is Concurrency.FIRST_WRITE
            expected = _expected(etag, absent=absent) if etag or absent else None
            ttl = None if operation.ttl is None else _seconds(operation.ttl)
            rows[key] = ("u", key, operation.value, expected, ttl, new)
        elif isinstance(operation, Delete):
            etags.append(None)
            rows[key] = ("d", key, b"", _expected(etag, absent=False) if etag else None, None, _NO_ETAG)
        else:
            etags.append(etag)
            rows[key] = ("c", key, b"", _expected(etag, absent=etag is None), None, _NO_ETAG)
    if len(rows) < len(operations):
        return collapsed_rows(operations)
    return sorted(rows.values(), key=_KEY) if len(rows) > 1 else list(rows.values()), tuple(etags)


def collapsed_rows(operations: Sequence[Operation]) -> tuple[list[_ChangeRow], tuple[ETag | None, ...]]:
    """Do what `change_rows` does where several operations may be for one key."""
    rows: list[_ChangeRow] = []
    written: dict[str, ETag] = {}
    for change in collapse(operations):
        write, key = change.write, change.key
        absent = isinstance(change.expected, Absent)
        expected = _expected(None if isinstance(change.expected, Absent) else change.expected, absent=absent)
        if isinstance(write, Upsert):
            written[key] = new_etag()
            ttl = None if write.ttl is None else _seconds(write.ttl)
            rows.append(("u", key, write.value, expected, ttl, written[key]))
        else:
            rows.append(("c" if write is None else "d", key, b"", expected, None, _NO_ETAG))
    return rows, etags_after(operations, written)


def _mark_rows(marks: Sequence[Mark], etags: Sequence[ETag | None]) -> list[_MarkRow]:
    remembered = orjson.dumps(etags).decode()
    lives = {mark.digest: mark.ttl for mark in marks}
    return [(digest, _seconds(ttl), remembered) for digest, ttl in lives.items()]


def _record_row(record: OutboxRecord, slices: int) -> _RecordRow:
    return (
        slice_of(record.order_key, slices),
        record.order_key,
        record.event_id,
        record.format,
        record.pubsub,
        record.topic,
        write_metadata(record),
        record.body,
    )


def _numbers(counts: Iterable[int]) -> str:
    """Tell the number of its commit for each of so many parts of each commit: `{1,1,2}`."""
    return f"{{{''.join([f'{number},' * count for number, count in enumerate(counts, start=1)])[:-1]}}}"


def _integers(column: Iterable[int]) -> str:
    return f"{{{','.join(map(str, column))}}}"


def _texts(column: Sequence[str]) -> str:
    """Write an array of texts. JSON has the same form, but for all escapes other than those of `"` and `\\`."""
    try:
        elements = orjson.dumps(column)[1:-1].decode()
    except TypeError as error:
        raise InvalidRequest(f"the commit cannot be written: {error}") from error
    if "\\" in elements.replace(r"\\", "").replace(r"\"", ""):
        elements = ",".join([f'"{text.translate(_ESCAPES)}"' for text in column])
    return f"{{{elements}}}"


def _unless_empty(column: Sequence[T | None]) -> Sequence[T | None] | None:
    return None if column.count(None) == len(column) else column


def _expected(etag: str | None, *, absent: bool) -> str | None:
    if not etag:
        return "" if absent else None
    # PostgreSQL takes no NUL and no lone surrogate in a text; such an etag can be no one's, and neither can this word.
    return etag if etag.isascii() and "\0" not in etag else "malformed"


def _seconds(ttl: timedelta) -> float:
    return min(ttl.total_seconds(), _LONGEST_LIFE)


def _token(token: str) -> str:
    try:
        return str(UUID(token))
    except ValueError:
        return str(uuid4())  # a token of no claim: a new one is no claim's either, and the function says so
