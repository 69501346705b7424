"""`state.in-memory`: a state store that lives in one process and ends with it.

One event loop runs one method at a time, and no await stands between a commit's checks and its writes: that is all
the locking there is.
"""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from itertools import count
from types import TracebackType
from typing import Final, Self

from statecast.clock import Clock
from statecast.components.manifest import Component
from statecast.components.metadata import STATE_FIELDS, MetadataReader
from statecast.components.state.commit import (
    ABSENT,
    Commit,
    Delete,
    ETag,
    Item,
    KeyChange,
    Upsert,
    collapse,
    etags_after,
)
from statecast.components.state.keys import check_unicode
from statecast.components.state.memory.directory import MemoryDirectory
from statecast.components.state.memory.expiring import Expiring
from statecast.components.state.memory.lifetime import Lifetime
from statecast.components.state.memory.log import MemoryOutboxLog
from statecast.components.state.sweeping import sweeping
from statecast.errors import Duplicate, ETagMismatch, Fenced

SWEEP_INTERVAL: Final = timedelta(seconds=1)


class MemoryStateStore:
    """A StateStore of this process alone. What it holds stays with the instance, also when it is opened again."""

    def __init__(self, component: Component, *, app_id: str, clock: Clock) -> None:
        MetadataReader(component, STATE_FIELDS).finish()
        self._clock = clock
        self._lifetime = Lifetime(component.name)
        self._items: Expiring[str, Item] = Expiring()
        self._marks: Expiring[bytes, tuple[ETag | None, ...]] = Expiring()
        self._versions = count(1)
        self._log = MemoryOutboxLog(clock, self._lifetime)
        self._directory = MemoryDirectory(self._lifetime)
        self._open = AsyncExitStack()

    @property
    def log(self) -> MemoryOutboxLog:
        return self._log

    @property
    def directory(self) -> MemoryDirectory:
        return self._directory

    async def __aenter__(self) -> Self:
        self._lifetime.is_open = True
        await self._open.enter_async_context(sweeping(self._sweep, SWEEP_INTERVAL, self._clock, name="state.in-memory"))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lifetime.is_open = False
        await self._open.aclose()

    async def get(self, key: str) -> Item | None:
        self._lifetime.require_open()
        check_unicode("key", key)
        return self._items.get(key, self._clock.now())

    async def bulk_get(self, keys: Sequence[str]) -> list[Item | None]:
        self._lifetime.require_open()
        for key in keys:
            check_unicode("key", key)
        now = self._clock.now()
        return [self._items.get(key, now) for key in keys]

    async def transact(self, commit: Commit) -> tuple[ETag | None, ...]:
        self._lifetime.require_open()
        for operation in commit.operations:
            check_unicode("key", operation.key)
        now = self._clock.now()
        self._check_marks(commit, now)
        self._check_guards(commit)
        changes = collapse(commit.operations)
        self._check_conditions(changes, now)
        return self._apply(commit, changes, now)

    def _check_marks(self, commit: Commit, now: datetime) -> None:
        for mark in commit.marks:
            answer = self._marks.get(mark.digest, now)
            if answer is not None:
                raise Duplicate(mark.digest, answer)

    def _check_guards(self, commit: Commit) -> None:
        for guard in commit.guards:
            if not self._directory.holds(guard):
                raise Fenced(guard.type, guard.id)

    def _check_conditions(self, changes: Sequence[KeyChange], now: datetime) -> None:
        for change in changes:
            item = self._items.get(change.key, now)
            if change.expected is ABSENT:
                if item is not None:
                    raise ETagMismatch(change.key, None)
            elif change.expected is not None and (item is None or item.etag != change.expected):
                raise ETagMismatch(change.key, change.expected)

    def _apply(self, commit: Commit, changes: Sequence[KeyChange], now: datetime) -> tuple[ETag | None, ...]:
        # All that could still fail is made before the first write.
        items = {write.key: self._item(write, now) for change in changes if isinstance(write := change.write, Upsert)}
        marks = {mark.digest: _after(now, mark.ttl) for mark in commit.marks}
        answer = etags_after(commit.operations, _etags(items))
        rows = self._log.rows_of(commit.records, now)

        for change in changes:
            if isinstance(change.write, Delete):
                self._items.discard(change.key)
        for item in items.values():
            self._items.put(item.key, item, item.expires_at)
        for digest, ends_at in marks.items():
            self._marks.put(digest, answer, ends_at)
        self._log.append(rows)
        return answer

    def _item(self, upsert: Upsert, now: datetime) -> Item:
        expires_at = None if upsert.ttl is None else _after(now, upsert.ttl)
        return Item(upsert.key, upsert.value, ETag(str(next(self._versions))), expires_at)

    async def _sweep(self, stop: asyncio.Event) -> None:
        now = self._clock.now()
        self._items.sweep(now)
        self._marks.sweep(now)


def _etags(items: Mapping[str, Item]) -> dict[str, ETag]:
    return {key: item.etag for key, item in items.items()}


def _after(now: datetime, ttl: timedelta) -> datetime:
    try:
        return now + ttl
    except OverflowError:
        return datetime.max.replace(tzinfo=UTC)
