"""One member of a consumer group: it reads new entries, takes over what other members left, and hands back its own.

An entry that was read is pending in the group until it is acknowledged. Where it is pending decides who may have it:
with a member that is gone it is taken over after `processing_timeout`; a member that leaves in order hands it to a
consumer that nobody is, with its idle time set so that the next one who looks takes it over.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Final, Self

import orjson

from statecast.clock import Clock
from statecast.components.broker.broker import Message
from statecast.components.broker.redis.members import FORGET, FORGET_SILENT, HANDED_BACK, PREFIX, name_member
from statecast.components.redis.connection import Argument, ErrorReply, NotSent, Reply, Unanswered
from statecast.components.redis.pipeline import Pipeline
from statecast.components.redis.settings import RedisSettings
from statecast.errors import InvalidRequest

logger = logging.getLogger(__name__)

_BLOCK: Final = timedelta(milliseconds=250)
"""How long the server holds a read for new entries. Leaving waits for such a read, lest what it brings is lost."""

_PAUSE: Final = timedelta(milliseconds=500)
"""How long to wait after a failure before the next attempt."""

_LEAVE_TIMEOUT: Final = timedelta(seconds=3)

_HANDED_BACK_IDLE: Final = timedelta(seconds=1)
"""For how long at least nobody has had what was handed back: what somebody has is not taken from him."""

_LOOK_INTERVAL: Final = timedelta(seconds=15)
"""How often to look for what was handed back, where nothing else is given again."""

_FORGOTTEN_AFTER: Final = timedelta(minutes=1)
"""How long a member has been silent that is gone, where no processing timeout says so."""

_Entry = tuple[bytes, list[bytes] | None]


@dataclass(frozen=True, slots=True)
class Pace:
    """When entries are given again: at zero of either interval, never, but for what a member that leaves hands back.
    `queue_depth` is how many are read at once."""

    processing_timeout: timedelta
    redeliver_interval: timedelta
    queue_depth: int

    @property
    def redelivers(self) -> bool:
        return bool(self.processing_timeout and self.redeliver_interval)

    @property
    def forgotten_after(self) -> timedelta:
        return self.processing_timeout or _FORGOTTEN_AFTER

    @property
    def look_interval(self) -> timedelta:
        return self.redeliver_interval or _LOOK_INTERVAL


class StreamDelivery:
    """One entry in this member's hands."""

    __slots__ = ("_subscription", "attempt", "id", "message")

    def __init__(self, subscription: "Subscription", id: bytes, message: Message, attempt: int) -> None:
        self._subscription = subscription
        self.id = id
        self.message = message
        self.attempt = attempt

    async def ack(self) -> None:
        """It was handled. Acknowledgements of one tick leave in one write; one that is lost lets it come again."""
        await self._subscription.acknowledge(self)

    async def nack(self) -> None:
        """It was not handled: it stays pending, and comes again after the redelivery interval."""
        self._subscription.postpone(self)


class Subscription:
    """Iterate over it for the deliveries; it goes on after lost connections, and ends when it is left."""

    def __init__(
        self,
        topic: str,
        group: str,
        *,
        settling: Pipeline,
        settings: RedisSettings,
        pace: Pace,
        clock: Clock,
    ) -> None:
        self._topic = topic
        self._group = group
        self._consumer = name_member()
        self._settling = settling
        self._reading = Pipeline(settings, read_timeout=(settings.read_timeout + _BLOCK).total_seconds())
        self._pace = pace
        self._clock = clock
        self._fresh: deque[StreamDelivery] = deque()
        self._held: dict[bytes, StreamDelivery] = {}
        self._postponed: dict[bytes, tuple[float, StreamDelivery]] = {}
        self._filling: asyncio.Task[None] | None = None
        self._own_from: str | None = None
        self._others_from = "0-0"
        self._others_due = clock.monotonic()
        self._left = asyncio.Event()
        self._leaving: asyncio.Future[None] | None = None

    async def __aenter__(self) -> Self:
        await self._reading.__aenter__()
        try:
            await self._stand()
            await self._forget_silent_members()
        except BaseException:
            await self._reading.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.leave()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> StreamDelivery:
        while not self._fresh and not self._left.is_set():
            await self._filled()
        if self._left.is_set():
            raise StopAsyncIteration
        delivery = self._fresh.popleft()
        self._held[delivery.id] = delivery
        return delivery

    async def acknowledge(self, delivery: StreamDelivery) -> None:
        """Settle a delivery for good; one that is not in hand any more is left alone."""
        if self._held.get(delivery.id) is not delivery:
            return
        del self._held[delivery.id]
        try:
            await self._settling.command("XACK", self._topic, self._group, delivery.id)
        except (NotSent, Unanswered, ErrorReply) as error:
            logger.warning(
                "entry %r of %r was not acknowledged and will come again: %s", delivery.id, self._topic, error
            )

    def postpone(self, delivery: StreamDelivery) -> None:
        """Keep a delivery for later; one that is not in hand any more is left alone."""
        if self._held.get(delivery.id) is not delivery:
            return
        del self._held[delivery.id]
        if self._pace.redelivers:
            due = self._clock.monotonic() + self._pace.redeliver_interval.total_seconds()
            self._postponed[delivery.id] = (due, delivery)

    async def leave(self) -> None:
        """End the iteration, and hand back what is not settled. Others who leave meanwhile wait for the first."""
        if self._leaving is not None:
            await asyncio.wait([self._leaving])
            return
        self._leaving = asyncio.get_running_loop().create_future()
        self._left.set()
        try:
            async with asyncio.timeout(_LEAVE_TIMEOUT.total_seconds()):
                if self._filling is not None:
                    await asyncio.wait([self._filling])
                await self._hand_back()
        except (TimeoutError, NotSent, Unanswered, ErrorReply) as error:
            logger.warning("a member of group %r left %r without handing back: %s", self._group, self._topic, error)
        finally:
            try:
                await self._close()
            finally:
                self._leaving.set_result(None)

    async def _close(self) -> None:
        self._fresh.clear()
        self._held.clear()
        self._postponed.clear()
        self._reading.abort("the subscription was left")
        try:
            if self._filling is not None:
                self._filling.cancel()
                await asyncio.gather(self._filling, return_exceptions=True)
        finally:
            await self._reading.__aexit__(None, None, None)

    async def _filled(self) -> None:
        """Wait for something to deliver. The work is a task's, so that a caller who is cancelled leaves it to the
        next one: an entry that the server has counted as read must not be lost on the way."""
        if self._filling is None:
            self._filling = asyncio.get_running_loop().create_task(self._fill_or_pause())
        filling = self._filling
        await asyncio.wait([filling])
        if filling is self._filling:
            self._filling = None
            filling.result()

    async def _stand(self) -> None:
        """Make the group, from the oldest entry on; wait for a server that does not answer."""
        while not self._left.is_set():
            try:
                await self._make_group()
                return
            except (NotSent, Unanswered) as error:
                await self._pause(error)
            except ErrorReply as error:
                if error.code in ("WRONGTYPE", "NOPERM"):
                    raise InvalidRequest(f"topic {self._topic!r} cannot be subscribed to: {error}") from error
                await self._pause(error)

    async def _make_group(self) -> None:
        try:
            await self._reading.command("XGROUP", "CREATE", self._topic, self._group, "0", "MKSTREAM")
        except ErrorReply as error:
            if error.code != "BUSYGROUP":
                raise

    async def _forget_silent_members(self) -> None:
        """Delete who ended without leaving; what such a one had in hand must have been taken over before."""
        silence = self._pace.forgotten_after // timedelta(milliseconds=1)
        try:
            await self._settling.run(FORGET_SILENT, 1, self._topic, self._group, PREFIX, silence)
        except (NotSent, Unanswered, ErrorReply) as error:
            logger.warning("members of group %r that are gone stay listed on %r: %s", self._group, self._topic, error)

    async def _fill_or_pause(self) -> None:
        try:
            await self._fill()
        except ErrorReply as error:
            if error.code == "NOGROUP":
                await self._stand()
            else:
                await self._pause(error)
        except (NotSent, Unanswered) as error:
            # The server may have given us entries that did not arrive: they are pending with us, to be asked for.
            self._own_from = "0-0"
            await self._pause(error)

    async def _pause(self, error: Exception) -> None:
        logger.warning("reading topic %r for group %r: %s", self._topic, self._group, error)
        await self._clock.wait(self._left, _PAUSE)

    async def _fill(self) -> None:
        """Find something to deliver: what is postponed and due, what others left, what a broken connection may have
        brought us unseen, what is new."""
        if self._pace.redelivers:
            await self._fill_with_postponed()
        if not self._fresh and self._others_due <= self._clock.monotonic():
            await self._fill_from_others()
        if not self._fresh and self._own_from is not None:
            await self._fill_from_own(self._own_from)
        if not self._fresh:
            await self._fill_with_new()

    async def _fill_with_postponed(self) -> None:
        now = self._clock.monotonic()
        due = [delivery for time, delivery in self._postponed.values() if time <= now]
        if not due:
            return
        for delivery in due:
            self._postponed.pop(delivery.id, None)
        # Who took an entry over meanwhile has it for less time than it was postponed, and keeps it.
        idle = self._pace.redeliver_interval / 2 // timedelta(milliseconds=1)
        ids = [delivery.id for delivery in due]
        claimed = await self._settle("XCLAIM", self._topic, self._group, self._consumer, idle, *ids)
        attempts = {delivery.id: delivery.attempt + 1 for delivery in due}
        await self._deliver(self._without_deleted(claimed), attempts)

    async def _fill_from_others(self) -> None:
        if not self._pace.redelivers:
            await self._fill_with_handed_back()
            return
        idle = self._pace.processing_timeout // timedelta(milliseconds=1)
        reply = await self._settle(
            "XAUTOCLAIM",
            *(self._topic, self._group, self._consumer, idle, self._others_from, "COUNT", self._pace.queue_depth),
        )
        self._others_from = reply[0].decode()
        if self._others_from == "0-0":
            self._look_later()
        claimed = self._without_deleted(reply[1])
        await self._deliver(claimed, await self._attempts(claimed))

    async def _fill_with_handed_back(self) -> None:
        pending = await self._settle(
            "XPENDING", self._topic, self._group, "-", "+", self._pace.queue_depth, HANDED_BACK
        )
        if not pending:
            self._look_later()
            return
        # Of two who look at once, the second finds what the first has claimed no longer idle.
        idle = _HANDED_BACK_IDLE // timedelta(milliseconds=1)
        ids = [id for id, _, _, _ in pending]
        claimed = await self._settle("XCLAIM", self._topic, self._group, self._consumer, idle, *ids)
        await self._deliver(self._without_deleted(claimed), {id: count + 1 for id, _, _, count in pending})

    def _look_later(self) -> None:
        self._others_due = self._clock.monotonic() + self._pace.look_interval.total_seconds()

    async def _fill_from_own(self, start: str) -> None:
        reply = await self._settle(
            *("XREADGROUP", "GROUP", self._group, self._consumer, "COUNT", self._pace.queue_depth),
            *("STREAMS", self._topic, start),
        )
        entries = _entries(reply)
        # The server has counted this reading, and the one whose answer did not arrive.
        attempts = {id: count - 1 for id, count in (await self._attempts(entries)).items()}
        await self._deliver(entries, attempts)
        self._own_from = entries[-1][0].decode() if entries else None

    async def _fill_with_new(self) -> None:
        reply = await self._reading.command(
            *("XREADGROUP", "GROUP", self._group, self._consumer, "COUNT", self._pace.queue_depth),
            *("BLOCK", _BLOCK // timedelta(milliseconds=1), "STREAMS", self._topic, ">"),
        )
        self._fresh.extend(self._known(_entries(reply), {}))

    def _without_deleted(self, claimed: Sequence[_Entry | None]) -> list[_Entry]:
        """Leave out what Redis 6.2 claimed for us and found deleted: it gives nil for it. What is pending with us has
        the id, and lets it be settled."""
        if None in claimed:
            self._own_from = "0-0"
        return [entry for entry in claimed if entry is not None]

    async def _attempts(self, entries: Sequence[_Entry]) -> dict[bytes, int]:
        if not entries:
            return {}
        first, last = entries[0][0], entries[-1][0]
        count = len(entries) + len(self._held) + len(self._postponed) + len(self._fresh)
        pending = await self._settle("XPENDING", self._topic, self._group, first, last, count, self._consumer)
        return {id: count for id, _, _, count in pending}

    async def _deliver(self, entries: Iterable[_Entry], attempts: dict[bytes, int]) -> None:
        """Queue entries for delivery; those that were trimmed away meanwhile are settled."""
        entries = list(entries)
        self._fresh.extend(self._known(entries, attempts))
        if vanished := [id for id, fields in entries if fields is None]:
            await self._settle("XACK", self._topic, self._group, *vanished)

    def _known(self, entries: Iterable[_Entry], attempts: dict[bytes, int]) -> list[StreamDelivery]:
        in_hand = {*self._held, *self._postponed, *(delivery.id for delivery in self._fresh)}
        return [
            StreamDelivery(self, id, _message(self._topic, fields), attempts.get(id, 1))
            for id, fields in entries
            if fields is not None and id not in in_hand
        ]

    async def _hand_back(self) -> None:
        idle = max(self._pace.processing_timeout, _HANDED_BACK_IDLE)
        as_idle = ("IDLE", idle // timedelta(milliseconds=1), "JUSTID")
        to = (self._topic, self._group, HANDED_BACK, 0)
        by_attempt: dict[int, list[bytes]] = {}
        for delivery in self._fresh:
            by_attempt.setdefault(delivery.attempt - 1, []).append(delivery.id)
        for attempts, ids in by_attempt.items():
            # Nobody had these in hand: it does not count.
            await self._settle("XCLAIM", *to, *ids, "RETRYCOUNT", attempts, *as_idle)
        if ids := [*self._held, *self._postponed]:
            await self._settle("XCLAIM", *to, *ids, *as_idle)
        await self._settling.run(FORGET, 1, self._topic, self._group, self._consumer)

    async def _settle(self, *arguments: Argument) -> Reply:
        return await self._settling.command(*arguments)


def _entries(reply: Reply) -> list[_Entry]:
    """Read the answer of XREADGROUP for one stream; a wait for nothing answers none."""
    return [(id, fields) for id, fields in reply[0][1]] if reply else []


def _message(topic: str, fields: list[bytes]) -> Message:
    entry = dict(zip(fields[::2], fields[1::2], strict=True))
    return Message(topic, entry.get(b"data", b""), metadata=_metadata(entry.get(b"metadata", b"{}")))


def _metadata(text: bytes) -> dict[str, str]:
    try:
        values = orjson.loads(text)
    except orjson.JSONDecodeError:
        return {}
    return {name: str(value) for name, value in values.items()} if isinstance(values, dict) else {}
