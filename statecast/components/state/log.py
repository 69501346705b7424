"""The seam of the outbox log: what commits appended, read slice by slice by whoever holds the slice's lease."""

from binascii import crc32
from collections.abc import Collection, Iterable, Sequence
from datetime import datetime, timedelta
from typing import Protocol, Self

import msgspec

from statecast.components.state.commit import OutboxRecord

DEFAULT_SLICES = 16

READ_BYTES = 16 * 1024 * 1024
"""How many bytes of bodies one read gives at the most, but for its last entry: a relay holds them in memory."""

Topic = tuple[str, str]
"""A pub/sub component's name and a topic of it."""


def slice_of(order_key: str, slices: int) -> int:
    """Tell the slice of an order key: crc32 of its UTF-8 bytes, modulo the number of slices of the log."""
    return crc32(order_key.encode()) % slices


def share_of(limit: int, readers: int) -> int:
    """Tell how many entries each of so many may have of a limit: one at least."""
    return max(1, -(-limit // max(readers, 1)))


class Lease(msgspec.Struct, frozen=True):
    """The fenced right to relay one slice.

    `epoch` grows with every acquisition: progress that is reported under an older one is refused. `position` is
    where reading goes on; only the log that made it can read it.
    """

    slice: int
    owner: str
    epoch: int
    position: str


class LogEntry(msgspec.Struct, frozen=True):
    """One record as read from the log, with the moment its commit was made (by the database's clock).

    `id` names the entry within its slice, the same at every read; only the log that made it can read it.
    """

    slice: int
    id: str
    record: OutboxRecord
    created_at: datetime


def up_to_read_bytes(entries: Iterable[LogEntry]) -> list[LogEntry]:
    """Take entries until their bodies come to READ_BYTES: the first one in any case."""
    taken: list[LogEntry] = []
    room = READ_BYTES
    for entry in entries:
        taken.append(entry)
        room -= len(entry.record.body)
        if room <= 0:
            break
    return taken


class Batch(msgspec.Struct, frozen=True):
    """What one read found: the entries, those of one order key in commit order, and each lease moved behind them."""

    entries: tuple[LogEntry, ...]
    leases: tuple[Lease, ...]


class SliceStatus(msgspec.Struct, frozen=True):
    """How far the relaying of one slice is; `owner` is None where no lease is live.

    `pending` counts the records behind the persisted position, `oldest_at` is when the first of them was committed.
    """

    slice: int
    owner: str | None
    epoch: int
    position: str
    pending: int
    oldest_at: datetime | None


class Failure(msgspec.Struct, frozen=True):
    """Why the first entry of a key is not published: tried so often, to be tried again after `pause`.

    A `pause` of None parks the key: it is not tried again before `replay`.
    """

    attempts: int
    pause: timedelta | None
    reason: str


class DeferredQueue(msgspec.Struct, frozen=True):
    """What waits beside the log together, in commit order: a slice's entries of one order key for one topic."""

    slice: int
    order_key: str
    pubsub: str
    topic: str

    @classmethod
    def of(cls, entry: LogEntry) -> Self:
        record = entry.record
        return cls(entry.slice, record.order_key, record.pubsub, record.topic)


class Deferral(msgspec.Struct, frozen=True):
    """Entries of one queue, in their order, that are taken out of the log's order, so that all else can go on.

    `failure` is about the first of them; None: the queue is there already, and they go behind. If it is not any more
    by then (its settling was done and not answered), they are due at once, with no attempt counted.
    """

    entries: tuple[LogEntry, ...]
    failure: Failure | None


class QueueStatus(msgspec.Struct, frozen=True):
    """A queue that has entries, of which `oldest_at` is the first one's commit; `is_due` by the database's clock, never
    when parked."""

    queue: DeferredQueue
    attempts: int
    reason: str
    is_due: bool
    is_parked: bool
    pending: int
    oldest_at: datetime


class QueueProgress(msgspec.Struct, frozen=True):
    """What became of a queue's first entries: the ids of those that are published, and why the next one is not.

    Without `failure` the first entry that is left is due at once.
    """

    queue: DeferredQueue
    published: tuple[str, ...]
    failure: Failure | None


class OutboxLog(Protocol):
    """An append-only log in N slices; N is fixed when the log is made, and read from the database afterwards.

    Nothing committed is ever skipped, however late its transaction ends, and the records of one order key are read
    in the order of their commits. Leases are judged by the database's clock. All methods raise StoreUnavailable.
    """

    @property
    def slices(self) -> int: ...

    async def heartbeat(self, owner: str, ttl: timedelta) -> int:
        """Tell that relay `owner` lives for `ttl` from now on; return how many relays live, this one included.

        A `ttl` of zero tells that it has gone: no other one counts it any more.
        """
        ...

    async def acquire(self, owner: str, limit: int, ttl: timedelta) -> list[Lease]:
        """Lease up to `limit` slices that nobody holds, for the time of `ttl` by the database's clock.

        Each lease carries a new epoch and the position its last owner persisted: what that owner published after
        it comes again, with the same event ids. Raises StoreUnavailable; then nothing was leased, or what was
        leases out.
        """
        ...

    async def read(self, leases: Sequence[Lease], limit: int) -> Batch:
        """Read on from the leases' positions, about `limit` entries in all; several may be read in one go.

        Where entries are large it is fewer: READ_BYTES in all, and a little more.
        Reading moves nothing in the database: the batch's leases, one for each lease given and in that order, are
        the positions to read on from, and to persist with `advance` once the entries are published. A position may
        move although there was no entry. Reading does not check that a lease still holds.
        """
        ...

    async def advance(self, leases: Sequence[Lease], ttl: timedelta, deferrals: Sequence[Deferral] = ()) -> list[Lease]:
        """Persist the leases' positions and renew them for `ttl`; return those that are still mine.

        A lease whose epoch is not the current one, or that was released, is left out and nothing of it is
        persisted: stop relaying it. One that has run out and that nobody took since is mine still.

        The deferrals' entries, which these positions pass, are put aside in the same step, each under its own
        slice's lease and behind what is in their queue; an entry that is aside already is left as it is, so that the
        call can be repeated.
        """
        ...

    async def release(self, leases: Sequence[Lease]) -> None:
        """Persist the leases' positions and give them up, so that another relay need not wait for their end.

        To be called once no publish of these slices is in flight. Leases that are no longer mine are left alone.
        """
        ...

    async def deferred(self, slices: Collection[int]) -> list[QueueStatus]:
        """List all queues of these slices, in the order in which they are due, parked ones last."""
        ...

    async def due_deferred(
        self, slices: Collection[int], limit: int, but_for: Collection[Topic] = ()
    ) -> list[QueueStatus]:
        """List the first `limit` queues of these slices that are due, longest due first, without those of the topics
        `but_for`. It is as quick with many queues that are not due."""
        ...

    async def read_deferred(self, queues: Sequence[DeferredQueue], limit: int) -> list[LogEntry]:
        """Read the first entries of these queues, those of one queue in commit order.

        It is about `limit` in all and one of each at least; of large ones fewer, as for `read`, and perhaps none of
        some queues.
        """
        ...

    async def settle_deferred(self, leases: Sequence[Lease], progress: Sequence[QueueProgress]) -> list[DeferredQueue]:
        """Remove what is published and note the failures of what is left; return the queues of which nothing is left.

        Those are not there any more: what the log has of their key and topic flows again. A queue of a slice whose
        lease is no longer mine, or not given, is left alone and not returned.
        """
        ...

    async def replay(self, order_key: str | None = None) -> int:
        """Make parked queues (all, or those of a key) due now, with their attempts forgotten; return how many.

        It takes no lease: whoever holds their slices publishes them.
        """
        ...

    async def wait(self, leases: Sequence[Lease], timeout: timedelta) -> None:
        """Return when something may be there to read in these slices, after `timeout` at the latest.

        What is there already when it is called counts too. Returning early for no reason is allowed: the truth is
        what `read` finds.
        """
        ...

    async def trim(self) -> None:
        """Give back the space of what every slice's persisted position has passed; skips what is in use."""
        ...

    async def status(self) -> list[SliceStatus]:
        """Tell about every slice, in their order, without taking part."""
        ...
