"""`pubsub.in-memory`: fan-out inside one process. It stores nothing: what has no subscriber vanishes."""

import asyncio
import heapq
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from enum import Enum
from types import TracebackType
from typing import Self

from statecast.clock import Clock
from statecast.components.broker.broker import Delivery, Message, Outcome, Published, Settlement, Unknown, Unreachable
from statecast.components.manifest import Component
from statecast.components.metadata import BROKER_FIELDS, MetadataReader

CAPACITY = 10_000
"""How many messages may wait in one group before publishing to its topic waits too."""

_CLOSED = Unreachable("the broker is not open")
_NO_ROOM = Unreachable("a group of the topic had no room in time")
_WITHDRAWN = Unreachable("withdrawn: nobody was handed it in time")
_UNSETTLED = Unknown("not every group had settled it in time")


class MemoryBroker:
    """Hands each message to every group that has a member at that moment.

    A group gets the messages of one key strictly one after the other: while one is in a member's hands, the later
    ones of its key wait, and one that is nacked or given back comes again before them. Messages without a key wait
    for nobody.

    A group lives as long as it has members. What was unsettled when the last one left waits for the next one, and
    nothing new is added to it meanwhile; so whoever must not lose events ends its relays before its subscriptions.

    `publish` waits, within its time, while a group has `CAPACITY` messages waiting: a group that stands still holds up
    the publishers of its topic. What found no room by then is Unreachable.
    """

    def __init__(self, component: Component, *, app_id: str, clock: Clock) -> None:
        MetadataReader(component, BROKER_FIELDS).finish()
        self._groups: defaultdict[str, dict[str, _Group]] = defaultdict(dict)
        self._is_open = False

    async def __aenter__(self) -> Self:
        self._is_open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_open = False
        for groups in self._groups.values():
            for group in groups.values():
                group.end()
        self._groups.clear()

    async def publish(
        self, messages: Sequence[Message], timeout: timedelta, settlement: Settlement = Settlement.STORED
    ) -> list[Outcome]:
        """Hand the messages to the groups.

        STORED returns when they are handed over. HANDLED returns when every group has settled them; at the end of
        `timeout` what was settled is Published, what is in somebody's hands (or was handled by some groups only) is
        Unknown, and what nobody holds is withdrawn and Unreachable.
        """
        handed: list[_Publication] = []
        try:
            async with asyncio.timeout(timeout.total_seconds()):
                for message in messages:
                    await self._room(message.topic)
                    if not self._is_open:
                        break
                    handed.append(self._hand_over(message))
                if settlement is Settlement.HANDLED:
                    for publication in handed:
                        await publication.is_over.wait()
        except TimeoutError:
            pass
        finally:
            outcomes = [_conclude(publication, settlement) for publication in handed]
        rest = _NO_ROOM if self._is_open else _CLOSED
        return [*outcomes, *[rest] * (len(messages) - len(handed))]

    @asynccontextmanager
    async def subscribe(self, topic: str, group: str) -> AsyncIterator[AsyncIterator[Delivery]]:
        joined = self._groups[topic].setdefault(group, _Group()) if self._is_open else _Group(is_ended=True)
        member = _Member(topic, joined)
        try:
            yield member
        finally:
            member.leave()
            if joined.is_forgettable and self._groups[topic].get(group) is joined:
                del self._groups[topic][group]

    def _targets(self, topic: str) -> "list[_Group]":
        return [group for group in self._groups.get(topic, {}).values() if group.members]

    async def _room(self, topic: str) -> None:
        while full := next((group for group in self._targets(topic) if not group.room.is_set()), None):
            await full.room.wait()

    def _hand_over(self, message: Message) -> "_Publication":
        publication = _Publication([_Entry(message, group) for group in self._targets(message.topic)])
        for entry in publication.entries:
            entry.group.add(entry, publication)
        publication.check()
        return publication


class _Place(Enum):
    WAITING = "waiting"
    IN_HAND = "in hand"
    SETTLED = "settled"
    WITHDRAWN = "withdrawn"


@dataclass(slots=True, eq=False)
class _Entry:
    """One message in one group."""

    message: Message
    group: "_Group"
    number: int = 0
    attempt: int = 0
    place: _Place = _Place.WAITING
    lane: "_Lane" = field(init=False)
    publication: "_Publication" = field(init=False)


@dataclass(slots=True, eq=False)
class _Publication:
    """One published message: an entry in each of the groups it went to. It is over once nobody will settle more."""

    entries: list[_Entry]
    is_over: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def is_settled(self) -> bool:
        return all(entry.place is _Place.SETTLED for entry in self.entries)

    def check(self) -> None:
        if self.is_settled:
            self.is_over.set()


def _conclude(publication: _Publication, settlement: Settlement) -> Outcome:
    if settlement is Settlement.STORED or publication.is_settled:
        return Published()
    for entry in publication.entries:
        entry.group.withdraw(entry)
    return _WITHDRAWN if all(entry.place is _Place.WITHDRAWN for entry in publication.entries) else _UNSETTLED


@dataclass(slots=True, eq=False)
class _Lane:
    """The waiting messages of one key, in order. It is busy while one of them is in a member's hands."""

    key: str | None
    entries: deque[_Entry] = field(default_factory=deque)
    is_busy: bool = False


class _Group:
    """One group's messages. A lane that has entries and is not busy stands in `_ready`, by its first entry's number."""

    def __init__(self, *, is_ended: bool = False) -> None:
        self.is_ended = is_ended
        self.members = 0
        self.room = asyncio.Event()
        self.room.set()
        self._lanes: dict[str, _Lane] = {}
        self._ready: list[tuple[int, _Lane]] = []
        self._held: set[_Entry] = set()
        self._waiting: set[_Entry] = set()
        self._added = 0
        self._waiters: deque[asyncio.Future[None]] = deque()

    @property
    def is_forgettable(self) -> bool:
        return not self.members and not self._waiting

    def add(self, entry: _Entry, publication: _Publication) -> None:
        entry.number = self._added = self._added + 1
        entry.publication = publication
        key = entry.message.key
        entry.lane = lane = _Lane(None) if key is None else self._lanes.setdefault(key, _Lane(key))
        lane.entries.append(entry)
        self._count(entry, _Place.WAITING)
        if not lane.is_busy and len(lane.entries) == 1:
            self._make_ready(lane)

    def take(self) -> _Entry | None:
        while self._ready:
            _, lane = heapq.heappop(self._ready)
            while lane.entries and lane.entries[0].place is _Place.WITHDRAWN:
                lane.entries.popleft()
            if not lane.entries:
                self._forget(lane)
                continue
            lane.is_busy = True
            entry = lane.entries.popleft()
            entry.attempt += 1
            self._count(entry, _Place.IN_HAND)
            return entry
        return None

    def settle(self, entry: _Entry) -> None:
        self._count(entry, _Place.SETTLED)
        entry.publication.check()
        self._free(entry.lane)

    def give_back(self, entry: _Entry) -> None:
        entry.lane.entries.appendleft(entry)
        self._count(entry, _Place.WAITING)
        self._free(entry.lane)

    def withdraw(self, entry: _Entry) -> None:
        """Take the entry back if nobody holds it; its lane drops it when its turn comes."""
        if entry.place is _Place.WAITING:
            self._count(entry, _Place.WITHDRAWN)

    def end(self) -> None:
        self.is_ended = True
        self.room.set()
        for entry in (*self._waiting, *self._held):
            entry.publication.is_over.set()
        self.wake_all()

    async def wait(self) -> None:
        """Wait until there may be something to take, or the group has ended."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            # Woken and cancelled in the same moment: the entry is still there, and another member may be asleep.
            if waiter.done() and not waiter.cancelled():
                self._wake_one()
            raise

    def wake_all(self) -> None:
        while self._waiters:
            self._wake_one()

    def _wake_one(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    def _make_ready(self, lane: _Lane) -> None:
        heapq.heappush(self._ready, (lane.entries[0].number, lane))
        self._wake_one()

    def _free(self, lane: _Lane) -> None:
        lane.is_busy = False
        if lane.entries:
            self._make_ready(lane)
        else:
            self._forget(lane)

    def _forget(self, lane: _Lane) -> None:
        if lane.key is not None and self._lanes.get(lane.key) is lane:
            del self._lanes[lane.key]

    def _count(self, entry: _Entry, place: _Place) -> None:
        entry.place = place
        (self._waiting.add if place is _Place.WAITING else self._waiting.discard)(entry)
        (self._held.add if place is _Place.IN_HAND else self._held.discard)(entry)
        (self.room.clear if len(self._waiting) >= CAPACITY and not self.is_ended else self.room.set)()


class _Member:
    """One subscription: a member of its group, and the iterator over what it is handed."""

    def __init__(self, topic: str, group: _Group) -> None:
        self.topic = topic
        self._group = group
        self._group.members += 1
        self._held: set[_Entry] = set()
        self._has_left = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delivery:
        while not (self._has_left or self._group.is_ended):
            if entry := self._group.take():
                self._held.add(entry)
                return _MemoryDelivery(entry, entry.attempt, self)
            await self._group.wait()
        raise StopAsyncIteration

    def settle(self, entry: _Entry, *, handled: bool) -> None:
        if entry in self._held:
            self._held.remove(entry)
            (self._group.settle if handled else self._group.give_back)(entry)

    def leave(self) -> None:
        self._has_left = True
        self._group.members -= 1
        for entry in self._held:
            self._group.give_back(entry)
        self._held.clear()
        # A wait of this member's own ends here; the other members look and go back to sleep.
        self._group.wake_all()


class _MemoryDelivery:
    def __init__(self, entry: _Entry, attempt: int, member: _Member) -> None:
        self.message = entry.message
        self.attempt = attempt
        self._entry = entry
        self._member = member
        self._is_settled = False

    async def ack(self) -> None:
        self._settle(handled=True)

    async def nack(self) -> None:
        self._settle(handled=False)

    def _settle(self, *, handled: bool) -> None:
        # The same entry may be in the same member's hands again after a nack: only its newest delivery may settle it.
        if not self._is_settled:
            self._is_settled = True
            self._member.settle(self._entry, handled=handled)
