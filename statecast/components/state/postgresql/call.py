"""The commit function's arguments made of commits, and its answers read: no I/O here.

Several commits may share a call if none of them has a key, mark or guard in common with another.
"""

import os
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar
from uuid import UUID, uuid4

import orjson

from statecast.components.state.commit import (
    Absent,
    Commit,
    ETag,
    KeyChange,
    Mark,
    Upsert,
    collapse,
    etags_after,
)
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


@dataclass(frozen=True, slots=True)
class Applied:
    """The commit was applied; `etags` are the answer to its operations."""

    etags: tuple[ETag | None, ...]


@dataclass(frozen=True, slots=True)
class Refused:
    """Nothing of the commit was applied, for this reason."""

    error: StatecastError


@dataclass(frozen=True, slots=True)
class Busy:
    """Nothing of the commit was applied, for it would have had to wait: it is to run alone."""


Outcome = Applied | Refused | Busy

_BUSY = Busy()


class PreparedCommit:
    """A commit as rows of the function's arguments, made once however often it is tried.

    Its etags are drawn here, so the answer is known before it is applied. Raises ETagMismatch for a commit that
    contradicts itself, InvalidRequest for one that cannot be written.
    """

    __slots__ = ("applied", "changes", "commit", "footprint", "guards", "marks", "records", "slices", "weight")

    def __init__(self, commit: Commit, slices: int) -> None:
        self.commit = commit
        changes = _changes(commit)
        written = {change.key: _new_etag() for change in changes if isinstance(change.write, Upsert)}
        self.applied = Applied(etags_after(commit.operations, written))
        self.changes = [_change_row(change, written.get(change.key)) for change in changes]
        self.guards = sorted(set(commit.guards), key=lambda guard: (guard.type, guard.id)) if commit.guards else []
        try:
            self.marks = _mark_rows(commit.marks, self.applied.etags) if commit.marks else []
            self.records = [
                (
                    slice_of(record.order_key, slices),
                    record.order_key,
                    record.event_id,
                    record.format,
                    record.pubsub,
                    record.topic,
                    write_metadata(record),
                    record.body,
                )
                for record in commit.records
            ]
        except (TypeError, UnicodeEncodeError) as error:
            raise InvalidRequest(f"the commit cannot be written: {error}") from error
        self.slices = {row[0] for row in self.records}
        self.footprint: list[Hashable] = [change.key for change in changes]
        self.footprint += [row[0] for row in self.marks]
        self.footprint += {(guard.type, guard.id) for guard in self.guards}
        self.weight = sum(len(row[2] or b"") for row in self.changes) + sum(len(row[7]) for row in self.records)


class CommitCall:
    """One call of the commit function for `commits`."""

    __slots__ = ("_changes", "_commits", "_guards", "_marks", "slices")

    def __init__(self, commits: Sequence[PreparedCommit]) -> None:
        self._commits = commits
        self._changes = [row for commit in commits for row in commit.changes]
        self._guards = [guard for commit in commits for guard in commit.guards]
        self._marks = [row for commit in commits for row in commit.marks]
        self.slices: set[int] = set().union(*(commit.slices for commit in commits))

    def arguments(self, *, wait: bool) -> list[object]:
        commits = self._commits
        return [
            len(commits),
            wait,
            *(self._guard_arguments() if self._guards else _NO_GUARDS),
            *(self._change_arguments() if self._changes else _NO_CHANGES),
            *(_arguments(self._marks, _numbers(commit.marks for commit in commits)) if self._marks else _NO_MARKS),
            *(self._record_arguments() if self.slices else _NO_RECORDS),
        ]

    def outcomes(self, answers: Sequence[str | None]) -> list[Outcome]:
        """Read the function's answer, one for each commit."""
        return [
            commit.applied if answer is None else self._refused(commit, answer)
            for commit, answer in zip(self._commits, answers, strict=True)
        ]

    def _guard_arguments(self) -> Iterator[object]:
        yield _numbers(commit.guards for commit in self._commits)
        yield [guard.type for guard in self._guards]
        yield [guard.id for guard in self._guards]
        yield [_token(guard.token) for guard in self._guards]

    def _change_arguments(self) -> Iterator[object]:
        kinds, keys, values, expected, ttls, etags = zip(*self._changes, strict=True)
        yield _numbers(commit.changes for commit in self._commits)
        yield kinds
        yield keys
        yield values
        yield _unless_empty(expected)
        yield _unless_empty(ttls)
        yield etags

    def _record_arguments(self) -> Iterable[object]:
        rows = [row for commit in self._commits for row in commit.records]
        return _arguments(rows, _numbers(commit.records for commit in self._commits))

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


def _changes(commit: Commit) -> list[KeyChange]:
    return collapse(commit.operations) if commit.operations else []


def _change_row(change: KeyChange, etag: ETag | None) -> tuple[str, str, bytes | None, str | None, float | None, Any]:
    write = change.write
    if isinstance(write, Upsert):
        ttl = None if write.ttl is None else _seconds(write.ttl)
        return "u", change.key, write.value, _expected(change), ttl, etag
    return "c" if write is None else "d", change.key, None, _expected(change), None, None


def _mark_rows(marks: Sequence[Mark], etags: Sequence[ETag | None]) -> list[tuple[bytes, float, str]]:
    remembered = orjson.dumps(etags).decode()
    lives = {mark.digest: mark.ttl for mark in marks}
    return [(digest, _seconds(ttl), remembered) for digest, ttl in sorted(lives.items())]


def _arguments(rows: Sequence[tuple[Any, ...]], numbers: list[int]) -> Iterable[object]:
    return [numbers, *zip(*rows, strict=True)]


def _numbers(parts: Iterable[Sequence[object]]) -> list[int]:
    """Tell for each part of each commit the number of its commit."""
    return [number for number, of_commit in enumerate(parts, start=1) for _ in of_commit]


def _unless_empty(column: Sequence[T | None]) -> Sequence[T | None] | None:
    return None if column.count(None) == len(column) else column


def _expected(change: KeyChange) -> str | None:
    if isinstance(change.expected, Absent):
        return ""
    # PostgreSQL takes no NUL in a text; such an etag can be no one's, and neither can this word.
    return "malformed" if change.expected and "\0" in change.expected else change.expected


def _seconds(ttl: timedelta) -> float:
    return min(ttl.total_seconds(), _LONGEST_LIFE)


def _new_etag() -> ETag:
    """Draw a random UUID (RFC 9562 §5.4), as text: that is what is answered, and the driver packs it as quickly."""
    digits = os.urandom(16).hex()
    variant = "89ab"[int(digits[16], 16) & 3]
    return ETag(f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:]}")


def _token(token: str) -> UUID:
    try:
        return UUID(token)
    except ValueError:
        return uuid4()  # a token of no claim: a new one is no claim's either, and the function says so
