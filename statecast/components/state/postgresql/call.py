"""The commit function's arguments made of commits, and its answers read: no I/O here.

Several commits may share a call if none of them has a key, mark or guard in common with another.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from operator import attrgetter
from typing import NamedTuple, TypeVar
from uuid import UUID, uuid4

import orjson

from statecast.components.state.commit import (
    Absent,
    Commit,
    Delete,
    ETag,
    Guard,
    KeyChange,
    Mark,
    OutboxRecord,
    Upsert,
    collapse,
    etags_after,
)
from statecast.components.state.log import slice_of
from statecast.errors import Duplicate, ETagMismatch, Fenced, StatecastError

T = TypeVar("T")

# Python's calendar ends with the year 9999, where PostgreSQL's goes on.
_LONGEST_LIFE = timedelta(days=365 * 7_900).total_seconds()


# The function unpacks every array that it is given, also those it does not look at.
_NO_GUARDS = (None,) * 4
_NO_CHANGES = (None,) * 7
_NO_MARKS = (None,) * 3
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


class _Change(NamedTuple):
    key: str
    commit: int
    change: KeyChange
    etag: UUID | None


class CommitCall:
    """One call of the commit function for `commits`; raises ETagMismatch for one that contradicts itself."""

    __slots__ = ("_changes", "_commits", "_guards", "_marks", "_slices", "slices")

    def __init__(self, commits: Sequence[Commit], slices: int) -> None:
        self._commits = commits
        self._slices = slices
        self._changes: list[_Change] = []
        self._guards: list[tuple[int, Guard]] = []
        self._marks: list[tuple[int, Mark]] = []
        self.slices: frozenset[int] = frozenset()
        for number, commit in enumerate(commits, start=1):
            self._add(number, commit)
        if len(commits) > 1:
            self._changes.sort(key=_key)
        self._guards.sort(key=lambda each: (each[1].type, each[1].id))
        self._marks.sort(key=lambda each: each[1].digest)

    def _add(self, number: int, commit: Commit) -> None:
        for change in collapse(commit.operations):
            etag = uuid4() if isinstance(change.write, Upsert) else None
            self._changes.append(_Change(change.key, number, change, etag))
        self._guards.extend((number, guard) for guard in set(commit.guards))
        self._marks.extend((number, mark) for mark in {mark.digest: mark for mark in commit.marks}.values())

    def arguments(self, *, wait: bool) -> list[object]:
        records = [
            (number, record) for number, commit in enumerate(self._commits, start=1) for record in commit.records
        ]
        slices = [slice_of(record.order_key, self._slices) for _, record in records]
        self.slices = frozenset(slices)
        return [
            len(self._commits),
            wait,
            *(self._guard_arguments() if self._guards else _NO_GUARDS),
            *(self._change_arguments() if self._changes else _NO_CHANGES),
            *(self._mark_arguments() if self._marks else _NO_MARKS),
            *(_record_arguments(records, slices) if records else _NO_RECORDS),
        ]

    def outcomes(self, answers: Sequence[str | None]) -> list[Outcome]:
        """Read the function's answer, one for each commit."""
        return [self._outcome(number, answer) for number, answer in enumerate(answers, start=1)]

    def _guard_arguments(self) -> Iterable[object]:
        yield [number for number, _ in self._guards]
        yield [guard.type for _, guard in self._guards]
        yield [guard.id for _, guard in self._guards]
        yield [_token(guard.token) for _, guard in self._guards]

    def _change_arguments(self) -> Iterable[object]:
        changes = self._changes
        yield [each.commit for each in changes]
        yield [_kind(each.change) for each in changes]
        yield [each.key for each in changes]
        yield [each.change.write.value if isinstance(each.change.write, Upsert) else None for each in changes]
        yield _unless_empty([_expected(each.change) for each in changes])
        yield _unless_empty([_seconds_to_live(each.change) for each in changes])
        yield [each.etag for each in changes]

    def _mark_arguments(self) -> Iterable[object]:
        yield [number for number, _ in self._marks]
        yield [mark.digest for _, mark in self._marks]
        yield [_seconds(mark.ttl) for _, mark in self._marks]

    def _outcome(self, number: int, answer: str | None) -> Outcome:
        if answer is None:
            written = {
                each.key: ETag(str(each.etag))
                for each in self._changes
                if each.commit == number and each.etag is not None
            }
            return Applied(etags_after(self._commits[number - 1].operations, written))
        reason, _, index = answer.partition(" ")
        if reason == "busy":
            return Busy()
        return Refused(self._refusal(reason, int(index) - 1))

    def _refusal(self, reason: str, index: int) -> StatecastError:
        match reason:
            case "fenced":
                guard = self._guards[index][1]
                return Fenced(guard.type, guard.id)
            case "etag":
                change = self._changes[index].change
                return ETagMismatch(change.key, None if isinstance(change.expected, Absent) else change.expected)
            case "duplicate":
                return Duplicate(self._marks[index][1].digest)
            case _:
                raise AssertionError(f"the commit function answered {reason!r}")


def _record_arguments(records: Sequence[tuple[int, OutboxRecord]], slices: Sequence[int]) -> Iterable[object]:
    yield [number for number, _ in records]
    yield slices
    yield [record.order_key for _, record in records]
    yield [record.event_id for _, record in records]
    yield [record.format for _, record in records]
    yield [record.pubsub for _, record in records]
    yield [record.topic for _, record in records]
    yield [orjson.dumps(record.metadata).decode() for _, record in records]
    yield [record.body for _, record in records]


_key = attrgetter("key")


def _unless_empty(column: list[T | None]) -> list[T | None] | None:
    return column if any(value is not None for value in column) else None


def _kind(change: KeyChange) -> str:
    match change.write:
        case Upsert():
            return "u"
        case Delete():
            return "d"
        case None:
            return "c"


def _expected(change: KeyChange) -> str | None:
    if isinstance(change.expected, Absent):
        return ""
    # PostgreSQL takes no NUL in a text; such an etag can be no one's, and neither can this word.
    return "malformed" if change.expected and "\0" in change.expected else change.expected


def _seconds_to_live(change: KeyChange) -> float | None:
    return _seconds(change.write.ttl) if isinstance(change.write, Upsert) and change.write.ttl is not None else None


def _seconds(ttl: timedelta) -> float:
    return min(ttl.total_seconds(), _LONGEST_LIFE)


def _token(token: str) -> UUID:
    try:
        return UUID(token)
    except ValueError:
        return uuid4()  # a token of no claim: a new one is no claim's either, and the function says so
