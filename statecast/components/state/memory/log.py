"""The outbox log of a memory store: commits are serial here, so the number of a row is a safe position."""

import asyncio
from bisect import bisect_right
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import chain, count, islice
from operator import itemgetter
from typing import Final

from msgspec.structs import replace

from statecast.clock import Clock
from statecast.components.state.commit import OutboxRecord
from statecast.components.state.log import (
    DEFAULT_SLICES,
    Batch,
    Deferral,
    DeferredQueue,
    Failure,
    Lease,
    LogEntry,
    QueueProgress,
    QueueStatus,
    SliceStatus,
    Topic,
    share_of,
    slice_of,
    up_to_read_bytes,
)
from statecast.components.state.memory.expiring import Expiring
from statecast.components.state.memory.lifetime import Lifetime

_Row = tuple[int, LogEntry]
_row_number = itemgetter(0)

_LONG_AGO: Final = datetime.min.replace(tzinfo=UTC)
_FAR_AWAY: Final = datetime.max.replace(tzinfo=UTC)
_NO_FAILURE: Final = Failure(0, timedelta(0), "")


@dataclass(slots=True)
class _Aside:
    """The entries of one queue; `due_at` None: parked."""

    entries: dict[str, LogEntry] = field(default_factory=dict)
    attempts: int = 0
    reason: str = ""
    due_at: datetime | None = None

    def fail(self, failure: Failure, now: datetime) -> None:
        self.attempts, self.reason = failure.attempts, failure.reason
        self.due_at = None if failure.pause is None else now + failure.pause

    def is_due(self, now: datetime) -> bool:
        return self.due_at is not None and self.due_at <= now

    def status(self, queue: DeferredQueue, now: datetime) -> QueueStatus:
        return QueueStatus(
            queue=queue,
            attempts=self.attempts,
            reason=self.reason,
            is_due=self.is_due(now),
            is_parked=self.due_at is None,
            pending=len(self.entries),
            oldest_at=next(iter(self.entries.values())).created_at,
        )


@dataclass(slots=True)
class _Slice:
    number: int
    rows: list[_Row] = field(default_factory=list)
    position: int = 0
    epoch: int = 0
    owner: str | None = None
    ends_at: datetime = _LONG_AGO
    deferred: dict[DeferredQueue, _Aside] = field(default_factory=dict)

    def after(self, position: int, limit: int | None = None) -> list[_Row]:
        start = bisect_right(self.rows, position, key=_row_number)
        return self.rows[start : None if limit is None else start + limit]

    def is_leased(self, now: datetime) -> bool:
        return self.owner is not None and now < self.ends_at

    def acquire(self, owner: str, ends_at: datetime) -> Lease:
        self.epoch += 1
        self.owner, self.ends_at = owner, ends_at
        return Lease(self.number, owner, self.epoch, str(self.position))

    def is_mine(self, lease: Lease) -> bool:
        return self.owner is not None and self.epoch == lease.epoch

    def advance(self, lease: Lease, ends_at: datetime) -> bool:
        if not self.is_mine(lease):
            return False
        self.position, self.ends_at = int(lease.position), ends_at
        return True

    def defer(self, deferral: Deferral, now: datetime) -> None:
        aside = self.deferred.setdefault(DeferredQueue.of(deferral.entries[0]), _Aside())
        if not aside.entries:
            aside.fail(deferral.failure or _NO_FAILURE, now)
        for entry in deferral.entries:
            aside.entries.setdefault(entry.id, entry)

    def settle(self, progress: QueueProgress, now: datetime) -> bool:
        """Tell whether anything is left."""
        aside = self.deferred.get(progress.queue, _Aside())
        for id in progress.published:
            aside.entries.pop(id, None)
        if not aside.entries:
            self.deferred.pop(progress.queue, None)
            return False
        aside.fail(progress.failure or _NO_FAILURE, now)
        return True

    def replay(self, order_key: str | None, now: datetime) -> int:
        parked = [
            aside
            for queue, aside in self.deferred.items()
            if aside.due_at is None and order_key in (None, queue.order_key)
        ]
        for aside in parked:
            aside.fail(Failure(0, timedelta(0), aside.reason), now)
        return len(parked)

    def release(self, lease: Lease) -> None:
        if self.advance(lease, _LONG_AGO):
            self.owner = None

    def status(self, now: datetime) -> SliceStatus:
        pending = self.after(self.position)
        return SliceStatus(
            slice=self.number,
            owner=self.owner if self.is_leased(now) else None,
            epoch=self.epoch,
            position=str(self.position),
            pending=len(pending),
            oldest_at=pending[0][1].created_at if pending else None,
        )


class MemoryOutboxLog:
    def __init__(self, clock: Clock, lifetime: Lifetime) -> None:
        self._clock = clock
        self._lifetime = lifetime
        self._slices = [_Slice(number) for number in range(DEFAULT_SLICES)]
        self._numbers = count(1)
        self._relays: Expiring[str, None] = Expiring()
        self._appended = asyncio.Event()

    @property
    def slices(self) -> int:
        return len(self._slices)

    def append(self, records: Sequence[OutboxRecord], created_at: datetime) -> None:
        """Append the records of one commit, in their order, and wake who waits for some."""
        for record in records:
            number = slice_of(record.order_key, self.slices)
            # The caller keeps its mapping and may change it.
            row = next(self._numbers)
            entry = LogEntry(number, str(row), replace(record, metadata=dict(record.metadata)), created_at)
            self._slices[number].rows.append((row, entry))
        if records:
            self._appended.set()
            self._appended = asyncio.Event()

    async def heartbeat(self, owner: str, ttl: timedelta) -> int:
        self._lifetime.require_open()
        now = self._clock.now()
        self._relays.put(owner, None, now + ttl)
        self._relays.sweep(now)
        return len(self._relays)

    async def acquire(self, owner: str, limit: int, ttl: timedelta) -> list[Lease]:
        self._lifetime.require_open()
        now = self._clock.now()
        free = [each for each in self._slices if not each.is_leased(now)]
        return [each.acquire(owner, now + ttl) for each in free[:limit]]

    async def read(self, leases: Sequence[Lease], limit: int) -> Batch:
        self._lifetime.require_open()
        unread = chain.from_iterable(self._unread(lease, limit) for lease in leases)
        entries = up_to_read_bytes(entry for _, entry in sorted(unread, key=_row_number)[:limit])
        last = {entry.slice: entry.id for entry in entries}
        return Batch(
            entries=tuple(entries),
            leases=tuple(replace(lease, position=last.get(lease.slice, lease.position)) for lease in leases),
        )

    async def advance(self, leases: Sequence[Lease], ttl: timedelta, deferrals: Sequence[Deferral] = ()) -> list[Lease]:
        self._lifetime.require_open()
        now = self._clock.now()
        kept = [lease for lease in leases if self._slices[lease.slice].advance(lease, now + ttl)]
        mine = {lease.slice for lease in kept}
        for deferral in deferrals:
            if deferral.entries[0].slice in mine:
                self._slices[deferral.entries[0].slice].defer(deferral, now)
        return kept

    async def release(self, leases: Sequence[Lease]) -> None:
        self._lifetime.require_open()
        for lease in leases:
            self._slices[lease.slice].release(lease)

    async def deferred(self, slices: Collection[int]) -> list[QueueStatus]:
        self._lifetime.require_open()
        return self._statuses(self._asides(slices))

    async def due_deferred(
        self, slices: Collection[int], limit: int, but_for: Collection[Topic] = ()
    ) -> list[QueueStatus]:
        self._lifetime.require_open()
        now = self._clock.now()
        due = (
            (queue, aside)
            for queue, aside in self._asides(slices)
            if aside.is_due(now) and (queue.pubsub, queue.topic) not in but_for
        )
        return self._statuses(due)[:limit]

    async def read_deferred(self, queues: Sequence[DeferredQueue], limit: int) -> list[LogEntry]:
        self._lifetime.require_open()
        share = share_of(limit, len(queues))
        asides = (self._slices[queue.slice].deferred.get(queue, _Aside()) for queue in queues)
        return up_to_read_bytes(entry for aside in asides for entry in islice(aside.entries.values(), share))

    async def settle_deferred(self, leases: Sequence[Lease], progress: Sequence[QueueProgress]) -> list[DeferredQueue]:
        self._lifetime.require_open()
        now = self._clock.now()
        mine = {lease.slice for lease in leases if self._slices[lease.slice].is_mine(lease)}
        settled = (each for each in progress if each.queue.slice in mine)
        return [each.queue for each in settled if not self._slices[each.queue.slice].settle(each, now)]

    async def replay(self, order_key: str | None = None) -> int:
        self._lifetime.require_open()
        now = self._clock.now()
        return sum(each.replay(order_key, now) for each in self._slices)

    async def wait(self, leases: Sequence[Lease], timeout: timedelta) -> None:
        self._lifetime.require_open()
        appended = self._appended
        if not any(self._unread(lease, limit=1) for lease in leases):
            await self._clock.wait(appended, timeout)

    async def trim(self) -> None:
        self._lifetime.require_open()
        for each in self._slices:
            each.rows = each.after(each.position)

    async def status(self) -> list[SliceStatus]:
        self._lifetime.require_open()
        now = self._clock.now()
        return [each.status(now) for each in self._slices]

    def _asides(self, slices: Collection[int]) -> Iterable[tuple[DeferredQueue, _Aside]]:
        return chain.from_iterable(self._slices[number].deferred.items() for number in slices)

    def _statuses(self, asides: Iterable[tuple[DeferredQueue, _Aside]]) -> list[QueueStatus]:
        now = self._clock.now()
        due_first = sorted(asides, key=lambda each: each[1].due_at or _FAR_AWAY)
        return [aside.status(queue, now) for queue, aside in due_first]

    def _unread(self, lease: Lease, limit: int) -> list[_Row]:
        return self._slices[lease.slice].after(int(lease.position), limit)
