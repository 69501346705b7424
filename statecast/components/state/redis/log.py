"""The outbox log on Redis: one stream per slice, whose entry ids are the positions, and one lease hash beside each.

What is put aside of a stream is kept in three keys beside it, from the step on that trims it away; keys.py tells all.
"""

import asyncio
from collections.abc import Collection, Sequence
from datetime import timedelta
from itertools import chain
from types import TracebackType
from typing import Final, Self

from msgspec.structs import replace

from statecast.clock import Clock
from statecast.components.redis.connection import Command, ErrorReply, NotSent, Reply, Unanswered, pack
from statecast.components.redis.pipeline import Pipeline
from statecast.components.redis.settings import RedisSettings
from statecast.components.state.log import (
    DEFAULT_SLICES,
    READ_BYTES,
    Batch,
    Deferral,
    DeferredQueue,
    Lease,
    LogEntry,
    QueueProgress,
    QueueStatus,
    SliceStatus,
    Topic,
    share_of,
    slice_of,
)
from statecast.components.state.redis.database import Database
from statecast.components.state.redis.deferred import (
    EncodedDeferral,
    decode_due,
    decode_entries,
    decode_states,
    encode_progress,
    encode_queues,
    pack_portion,
    portions_of,
)
from statecast.components.state.redis.encoding import decode_entry, from_milliseconds
from statecast.components.state.redis.keys import KeyNames, order_key_name, topic_name
from statecast.components.state.redis.scripts import (
    ACQUIRE,
    ADVANCE,
    DEFERRED,
    DUE_DEFERRED,
    HEARTBEAT,
    READ_DEFERRED,
    READ_LOG,
    REPLAY,
    SETTLE_DEFERRED,
    STATUS,
)
from statecast.errors import StoreUnavailable

_BLOCK: Final = timedelta(seconds=1)
"""How long the server holds one read that waits for news; the next one follows."""


class RedisOutboxLog:
    """`XADD` inside the commit's script gives ids in commit order, so nothing can appear behind a position."""

    def __init__(self, database: Database, names: KeyNames, settings: RedisSettings, clock: Clock) -> None:
        self._database = database
        self._names = names
        self._clock = clock
        self._slices: int | None = None
        self._news = _News(Pipeline(settings, read_timeout=(settings.read_timeout + _BLOCK).total_seconds()), names)
        self._waiting: set[_Waiter] = set()

    async def __aenter__(self) -> Self:
        self._slices = int(await self._registered_slices() or await self._register())
        await self._news.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._slices = None
        await self._news.__aexit__(kind, error, traceback)

    async def _registered_slices(self) -> Reply:
        return await self._database.command("HGET", self._names.registry, "slices")

    async def _register(self) -> Reply:
        await self._database.command("HSETNX", self._names.registry, "slices", DEFAULT_SLICES)
        return await self._registered_slices()

    @property
    def slices(self) -> int:
        if self._slices is None:
            raise StoreUnavailable("the store is not open")
        return self._slices

    def announce(self, slices: Collection[int]) -> None:
        """Wake those of this process who wait for one of these slices."""
        for waiter in self._waiting:
            if not waiter.slices.isdisjoint(slices):
                waiter.event.set()

    async def heartbeat(self, owner: str, ttl: timedelta) -> int:
        """Tell that the relay lives; a sorted set of all relays has the end of each one's life."""
        return int(await self._database.ask(HEARTBEAT, 1, self._names.relays, owner, _milliseconds(ttl)))

    async def acquire(self, owner: str, limit: int, ttl: timedelta) -> list[Lease]:
        """Lease up to `limit` slices that nobody holds, judged by the server's clock."""
        keys = [self._names.lease(slice) for slice in range(self.slices)]
        leased = await self._database.ask(ACQUIRE, len(keys), *keys, owner, limit, _milliseconds(ttl))
        return [Lease(slice, owner, epoch, position.decode()) for slice, epoch, position in leased]

    async def read(self, leases: Sequence[Lease], limit: int) -> Batch:
        """Read on in all slices alike; what some leave of the limit goes to those that have more."""
        # Where large entries end a read early, the slices that are furthest behind have had their turn.
        in_turn = sorted(leases, key=lambda lease: _order(lease.position))
        keys = [self._names.stream(lease.slice) for lease in in_turn]
        positions = [lease.position for lease in in_turn]
        found = await self._database.ask(READ_LOG, len(keys), *keys, limit, READ_BYTES, *positions)
        entries = [
            decode_entry(lease.slice, id.decode(), head, body)
            for lease, pieces in zip(in_turn, found, strict=True)
            for id, (_, head, _, body) in chain.from_iterable(pieces)
        ]
        last = {entry.slice: entry.id for entry in entries}
        moved = tuple(replace(lease, position=last.get(lease.slice, lease.position)) for lease in leases)
        return Batch(tuple(entries), moved)

    async def advance(self, leases: Sequence[Lease], ttl: timedelta, deferrals: Sequence[Deferral] = ()) -> list[Lease]:
        """Put entries aside, persist the positions, trim the streams up to them and renew the leases, in one step.

        With very much to put aside the positions are persisted in the last step of several: what is aside is there
        twice until then.
        """
        mine = list(leases)
        *first_portions, last_portion = portions_of(deferrals)
        for portion in first_portions:
            mine = await self._move(mine, _milliseconds(ttl), portion, is_staying=True)
        return await self._move(mine, _milliseconds(ttl), last_portion)

    async def release(self, leases: Sequence[Lease]) -> None:
        """Persist the positions and give the leases up, in one step."""
        await self._move(leases, "", ())

    async def _move(
        self,
        leases: Sequence[Lease],
        milliseconds: str,
        portion: Sequence[EncodedDeferral],
        *,
        is_staying: bool = False,
    ) -> list[Lease]:
        if not leases:
            return []
        keys: list[str] = []
        progress: list[str] = []
        for lease in leases:
            keys += (self._names.lease(lease.slice), self._names.stream(lease.slice))
            keys += self._names.all_deferred(lease.slice)
            position = "" if is_staying else lease.position
            progress += (lease.owner, str(lease.epoch), position, _behind(lease.position))
        packed = pack_portion(leases, portion)
        mine = await self._database.ask(ADVANCE, len(keys), *keys, milliseconds, packed, *progress)
        return [lease for lease, is_mine in zip(leases, mine, strict=True) if is_mine]

    async def deferred(self, slices: Collection[int]) -> list[QueueStatus]:
        """List all queues; whether they are due is judged by the server's clock."""
        slices = list(slices)
        keys = [self._names.deferred(slice) for slice in slices]
        return decode_states(slices, await self._database.ask(DEFERRED, len(keys), *keys))

    async def due_deferred(
        self, slices: Collection[int], limit: int, but_for: Collection[Topic] = ()
    ) -> list[QueueStatus]:
        """List the first queues that are due, by the server's clock."""
        slices = list(slices)
        keys = [key for slice in slices for key in self._names.all_deferred(slice)]
        left_out = map(topic_name, but_for)
        return decode_due(slices, await self._database.ask(DUE_DEFERRED, len(keys), *keys, limit, *left_out))

    async def read_deferred(self, queues: Sequence[DeferredQueue], limit: int) -> list[LogEntry]:
        """Read the first entries of these queues, in one round trip."""
        slices = sorted({queue.slice for queue in queues})
        keys = [self._names.deferred_entries(slice) for slice in slices]
        bounds = (share_of(limit, len(queues)), READ_BYTES)
        packed = encode_queues(slices, queues)
        return decode_entries(queues, await self._database.ask(READ_DEFERRED, len(keys), *keys, *bounds, packed))

    async def settle_deferred(self, leases: Sequence[Lease], progress: Sequence[QueueProgress]) -> list[DeferredQueue]:
        """Remove what is published and note the failures of what is left, in one step, where leases are still mine."""
        told_of = {each.queue.slice for each in progress}
        leases = [lease for lease in leases if lease.slice in told_of]
        progress = [each for each in progress if each.queue.slice in {lease.slice for lease in leases}]
        if not leases:
            return []
        keys = [
            key for lease in leases for key in (self._names.lease(lease.slice), *self._names.all_deferred(lease.slice))
        ]
        fences = [part for lease in leases for part in (lease.owner, lease.epoch)]
        packed = encode_progress(leases, progress)
        is_empty = await self._database.ask(SETTLE_DEFERRED, len(keys), *keys, packed, *fences)
        return [each.queue for each, emptied in zip(progress, is_empty, strict=True) if emptied]

    async def replay(self, order_key: str | None = None) -> int:
        """Make parked queues due now; those of a key are found by the beginning of their names."""
        slices = range(self.slices) if order_key is None else [slice_of(order_key, self.slices)]
        keys = [key for slice in slices for key in self._names.all_deferred(slice)]
        only = () if order_key is None else (order_key_name(order_key),)
        return int(await self._database.ask(REPLAY, len(keys), *keys, *only))

    async def wait(self, leases: Sequence[Lease], timeout: timedelta) -> None:
        """Return on a commit of this process at once, on one of another by a read that the server holds."""
        waiter = _Waiter(frozenset(lease.slice for lease in leases))
        self._waiting.add(waiter)
        try:
            await self._wait(waiter, leases, timeout)
        finally:
            self._waiting.discard(waiter)

    async def _wait(self, waiter: "_Waiter", leases: Sequence[Lease], timeout: timedelta) -> None:
        end = self._clock.monotonic() + timeout.total_seconds()
        is_deaf = not leases
        while (left := end - self._clock.monotonic()) > 0:
            reading = None if is_deaf else self._news.reading(leases)
            if reading is not None:
                reading.add_done_callback(waiter.wake)
            await self._clock.wait(waiter.event, timedelta(seconds=left))
            if reading is None or not reading.done():
                return
            try:
                if self._news.take(leases):
                    return
            except StoreUnavailable:
                # The caller's next read tells what is wrong, if anything still is; until then time ends the waiting.
                is_deaf = True
            waiter.event.clear()

    async def trim(self) -> None:
        """Do nothing: every advance has trimmed what it passed."""

    async def status(self) -> list[SliceStatus]:
        """Tell about every slice; what is left in a stream is what is pending."""
        slices = range(self.slices)
        keys = [key for slice in slices for key in (self._names.lease(slice), self._names.stream(slice))]
        found = await self._database.ask(STATUS, len(keys), *keys)
        return [_status(slice, raw) for slice, raw in zip(slices, found, strict=True)]


class _Waiter:
    """Who waits for news of some slices."""

    def __init__(self, slices: frozenset[int]) -> None:
        self.slices = slices
        self.event = asyncio.Event()

    def wake(self, reading: asyncio.Future[Reply]) -> None:
        self.event.set()


class _News:
    """One blocking read at a time, on a connection of its own: in the shared one it would hold up everybody."""

    def __init__(self, pipeline: Pipeline, names: KeyNames) -> None:
        self._pipeline = pipeline
        self._names = names
        self._slices: frozenset[int] = frozenset()
        self._command: Command | None = None

    async def __aenter__(self) -> Self:
        await self._pipeline.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._command = None
        self._pipeline.abort("nobody waits for news any more")
        await self._pipeline.__aexit__(kind, error, traceback)

    def reading(self, leases: Sequence[Lease]) -> asyncio.Future[Reply]:
        """Give the read that is under way for these slices, or begin one behind the leases' positions."""
        slices = frozenset(lease.slice for lease in leases)
        if self._command is None or slices != self._slices:
            keys = [self._names.stream(lease.slice) for lease in leases]
            positions = [lease.position for lease in leases]
            block = int(_BLOCK.total_seconds() * 1000)
            packed = pack("XREAD", "COUNT", 1, "BLOCK", block, "STREAMS", *keys, *positions)
            try:
                self._command = self._pipeline.submit(packed)
            except NotSent as error:
                raise StoreUnavailable(str(error)) from error
            self._command.reply.add_done_callback(_retrieve)
            self._slices = slices
        return self._command.reply

    def take(self, leases: Sequence[Lease]) -> bool:
        """Take what the read found: is it news behind these positions? A read of before may tell what is known."""
        command, self._command = self._command, None
        if command is None or not command.reply.done() or command.reply.cancelled():
            return True
        try:
            reply = command.reply.result()
        except (NotSent, Unanswered) as error:
            raise StoreUnavailable(str(error)) from error
        if isinstance(reply, ErrorReply):
            raise StoreUnavailable(str(reply)) from reply
        known = {self._names.stream(lease.slice).encode(): _order(lease.position) for lease in leases}
        return any(_order(raw[-1][0].decode()) > known.get(key, (0, 0)) for key, raw in reply or ())


def _retrieve(reply: asyncio.Future[Reply]) -> None:
    """Look at an outcome that nobody else may, so that the event loop does not complain about it."""
    if not reply.cancelled():
        reply.exception()


def _status(slice: int, raw: Reply) -> SliceStatus:
    owner, epoch, position, pending, first = raw
    return SliceStatus(
        slice,
        owner.decode() or None,
        int(epoch),
        position.decode(),
        pending,
        from_milliseconds(_order(first.decode())[0]) if first else None,
    )


def _order(position: str) -> tuple[int, int]:
    """Read an entry id, `1700000000000-0`, as what ids are ordered by."""
    milliseconds, _, counter = position.partition("-")
    return int(milliseconds), int(counter)


def _behind(position: str) -> str:
    """Tell the first id that is behind a position."""
    milliseconds, counter = _order(position)
    return f"{milliseconds}-{counter + 1}"


def _milliseconds(ttl: timedelta) -> str:
    return str(max(0, ttl // timedelta(milliseconds=1)))
