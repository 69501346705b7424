"""The outbox log on Redis: one stream per slice, whose entry ids are the positions, and one lease hash beside each.

What is put aside of a stream is kept in a sorted set beside it, from the step on that trims it away.
"""

import asyncio
from collections.abc import Collection, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Final, Self

from msgspec.structs import replace

from statecast.clock import Clock
from statecast.components.redis.connection import Command, ErrorReply, NotSent, Reply, Unanswered, pack
from statecast.components.redis.pipeline import Pipeline
from statecast.components.redis.settings import RedisSettings
from statecast.components.state.log import (
    DEFAULT_SLICES,
    Batch,
    Deferral,
    DeferredKey,
    Failure,
    Lease,
    LogEntry,
    SliceStatus,
    slice_of,
)
from statecast.components.state.redis.database import Database
from statecast.components.state.redis.deferred import decode_entries, decode_keys, encode_deferrals, encode_failure
from statecast.components.state.redis.encoding import decode_entry, from_milliseconds
from statecast.components.state.redis.keys import KeyNames
from statecast.components.state.redis.scripts import (
    ACQUIRE,
    ADVANCE,
    DEFERRED,
    HEARTBEAT,
    READ_DEFERRED,
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
        moved = {lease.slice: lease for lease in leases}
        entries: list[LogEntry] = []
        hungry = list(moved)
        while hungry and len(entries) < limit:
            share = max(1, (limit - len(entries)) // len(hungry))
            found = await self._read([moved[slice] for slice in hungry], share)
            for slice, raw in found.items():
                entries += [decode_entry(slice, id.decode(), fields) for id, fields in raw]
                moved[slice] = replace(moved[slice], position=raw[-1][0].decode())
            hungry = [slice for slice, raw in found.items() if len(raw) == share]
        return Batch(tuple(entries), tuple(moved[lease.slice] for lease in leases))

    async def _read(self, leases: Sequence[Lease], count: int) -> dict[int, list[tuple[bytes, list[bytes]]]]:
        keys = [self._names.stream(lease.slice) for lease in leases]
        positions = [lease.position for lease in leases]
        reply = await self._database.command("XREAD", "COUNT", count, "STREAMS", *keys, *positions)
        slices = {key.encode(): lease.slice for key, lease in zip(keys, leases, strict=True)}
        return {slices[key]: raw for key, raw in reply or ()}

    async def advance(self, leases: Sequence[Lease], ttl: timedelta, deferrals: Sequence[Deferral] = ()) -> list[Lease]:
        """Put entries aside, persist the positions, trim the streams up to them and renew the leases, in one step."""
        return await self._move(leases, _milliseconds(ttl), deferrals)

    async def release(self, leases: Sequence[Lease]) -> None:
        """Persist the positions and give the leases up, in one step."""
        await self._move(leases, "", ())

    async def _move(self, leases: Sequence[Lease], milliseconds: str, deferrals: Sequence[Deferral]) -> list[Lease]:
        if not leases:
            return []
        keys: list[str] = []
        progress: list[str] = []
        for lease in leases:
            keys += (self._names.lease(lease.slice), self._names.stream(lease.slice))
            progress += (lease.owner, str(lease.epoch), lease.position, _behind(lease.position))
        more_keys, packed = encode_deferrals(leases, deferrals, self._names)
        keys += more_keys
        mine = await self._database.ask(ADVANCE, len(keys), *keys, milliseconds, packed, *progress)
        return [lease for lease, is_mine in zip(leases, mine, strict=True) if is_mine]

    async def deferred(self, slices: Collection[int]) -> list[DeferredKey]:
        """List the keys that have entries aside; whether they are due is judged by the server's clock."""
        slices = list(slices)
        keys = [self._names.deferred(slice) for slice in slices]
        return decode_keys(slices, await self._database.ask(DEFERRED, len(keys), *keys))

    async def read_deferred(self, slice: int, order_key: str, limit: int) -> list[LogEntry]:
        """Read the first entries that are aside of a key."""
        entries = self._names.deferred_entries(slice)
        return decode_entries(slice, await self._database.ask(READ_DEFERRED, 1, entries, order_key, limit))

    async def settle_deferred(
        self, lease: Lease, order_key: str, published: Sequence[str], failure: Failure | None
    ) -> bool:
        """Remove what is published and note the failure of what is left, in one step, if the lease is still mine."""
        keys = (self._names.lease(lease.slice), self._names.deferred(lease.slice))
        entries = self._names.deferred_entries(lease.slice)
        fence = (lease.owner, lease.epoch)
        return bool(
            await self._database.ask(
                SETTLE_DEFERRED, 3, *keys, entries, *fence, order_key, encode_failure(failure), *published
            )
        )

    async def replay(self, order_key: str | None = None) -> int:
        """Make parked keys due now."""
        slices = range(self.slices) if order_key is None else [slice_of(order_key, self.slices)]
        keys = [self._names.deferred(slice) for slice in slices]
        only = () if order_key is None else (order_key,)
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
