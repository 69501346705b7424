"""One member of a consumer group: deliveries that are settled in any order, committed in the order of offsets."""

import asyncio
import logging
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import KafkaError, TopicAuthorizationFailedError
from aiokafka.structs import OffsetAndMetadata

from statecast.components.broker.broker import Delivery, Message
from statecast.components.broker.kafka.config import InitialOffset, KafkaConfig
from statecast.components.broker.kafka.connecting import explain, text_of
from statecast.components.broker.kafka.producer import cut_off
from statecast.components.broker.kafka.records import decode
from statecast.components.broker.kafka.starts import find_starts

logger = logging.getLogger(__name__)

WAITING_LIMIT = 1_000
"""How many messages wait in memory before no more are fetched."""

COMMIT_SECONDS = 0.1
_LEAVE_SECONDS = 2.0
_RETRY_SECONDS = 0.2
_STAND_SECONDS = 10.0

_NEVER = -1

_EXPECTED = (KafkaError, OSError)

_NOT_JOINED = "no subscription to topic %r of Kafka yet: %s"
_NOT_READ = "topic %r of Kafka is not read, trying again: %s"
_WENT_BACK = "partition %d of topic %r of Kafka ends before offset %d, where it was read; going on at offset %d"
_NOT_COMMITTED = "what is settled of topic %r of Kafka is not committed yet: %s"


@dataclass(slots=True, eq=False)
class _Partition:
    """What this member knows of a partition that it was assigned.

    `birth` is the metadata of each of its commits, `position` the next offset to take in, `unsettled` the offsets
    taken in and not acknowledged, in order.
    """

    where: TopicPartition
    birth: str
    committed: int
    position: int
    unsettled: dict[int, None] = field(default_factory=dict)
    is_ours: bool = True

    @property
    def committable(self) -> int:
        return next(iter(self.unsettled), self.position)


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    partition: _Partition
    offset: int
    message: Message
    attempt: int


class Subscription:
    """Reads ahead into memory, and commits in the background what is acknowledged.

    A nacked message comes again before everything that was not yet handed out. When the group is reassembled, what is
    waiting rests; partitions that come back to this member go on where they were.
    """

    def __init__(self, config: KafkaConfig, topic: str, group: str) -> None:
        self._config = config
        self._topic = topic
        self._group = group
        self._initial_offset = config.initial_offset
        self._consumer: Any = None
        self._partitions: dict[TopicPartition, _Partition] = {}
        self._waiting: deque[_Waiting] = deque()
        self._resting: deque[_Waiting] = deque()
        self._has_changed = asyncio.Event()
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._is_dirty = asyncio.Event()
        self._stands = asyncio.Event()
        self._is_assembled = asyncio.Event()
        self._failure: Exception | None = None
        self._complaints: dict[str, str] = {}
        self._closed = asyncio.Event()
        self._opening: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self) -> None:
        """Join, as often as it takes, and return once this member's partitions have a committed position."""
        self._opening = asyncio.ensure_future(self._join())
        await asyncio.wait([self._opening])
        if self._opening.cancelled() or self._closed.is_set():
            return
        self._opening.result()
        self._tasks = [asyncio.ensure_future(self._read()), asyncio.ensure_future(self._commit_regularly())]

    async def close(self) -> None:
        """Commit what is acknowledged and leave the group, within seconds whatever Kafka does.

        It goes on when it is cancelled: a member that is left behind would hold its partitions, and read for nobody.
        """
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self._closed.set()
        self._has_changed.set()
        # Nobody stops a consumer while it starts: the driver would go on starting, and never be stopped.
        tasks = [*self._tasks, *([self._opening] if self._opening else [])]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if self._consumer is not None:
            await self._leave(self._consumer)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delivery:
        while not self._closed.is_set():
            if self._waiting:
                return self._hand_out(self._waiting.popleft())
            self._has_changed.clear()
            await self._has_changed.wait()
        raise StopAsyncIteration

    def settle(self, waiting: _Waiting, *, handled: bool) -> None:
        partition = waiting.partition
        if self._closed.is_set() or not partition.is_ours or waiting.offset not in partition.unsettled:
            return
        if handled:
            del partition.unsettled[waiting.offset]
            self._is_dirty.set()
            return
        again = _Waiting(partition, waiting.offset, waiting.message, waiting.attempt + 1)
        (self._waiting if self._stands.is_set() else self._resting).appendleft(again)
        self._has_changed.set()

    # The group is reassembled: called by the driver, one after the other

    async def give_up(self) -> None:
        """Rest: the partitions are going to be dealt out anew."""
        self._stands.clear()
        self._resting.extend(self._waiting)
        self._waiting.clear()
        self._update_room()
        await self._commit()

    async def take_over(self, assigned: Iterable[TopicPartition]) -> None:
        """Go on with the partitions that came back, begin with the new ones, forget the others."""
        try:
            async with asyncio.timeout(_STAND_SECONDS):
                self._stand(await find_starts(self._consumer, set(assigned), self._initial_offset))
        except Exception as error:
            # The driver would only log it. Without positions there is no member: a new one shall take its place.
            self._failure = error
        self._is_assembled.set()

    def _stand(self, starts: Mapping[TopicPartition, OffsetAndMetadata]) -> None:
        before = self._partitions
        self._partitions = {where: _continued(where, before.get(where), start) for where, start in starts.items()}
        for where, partition in before.items():
            partition.is_ours = self._partitions.get(where) is partition
        for where, partition in self._partitions.items():
            # The driver has read since the moment of the assignment. What it gave was left, and is read again.
            self._consumer.seek(where, partition.position)
        self._waiting.extend(waiting for waiting in self._resting if waiting.partition.is_ours)
        self._resting.clear()
        # A partition that is without an offset later was added, or the topic was made anew, while this member stood.
        self._initial_offset = InitialOffset.OLDEST
        self._stands.set()
        self._has_changed.set()
        self._update_room()

    # Reading and committing

    async def _join(self) -> None:
        while True:
            consumer = self._new_consumer()
            try:
                async with asyncio.timeout(_STAND_SECONDS + self._config.session_timeout.total_seconds()):
                    await consumer.start()
                    await self._is_assembled.wait()
                if self._failure is not None:
                    raise self._failure
            except asyncio.CancelledError:
                await _stop(consumer)
                raise
            except Exception as error:
                await _stop(consumer)
                self._complain(_NOT_JOINED, error, await explain(error, self._config))
                await asyncio.sleep(_RETRY_SECONDS)
            else:
                self._complaints.pop(_NOT_JOINED, None)
                return

    def _new_consumer(self) -> Any:
        config = self._config
        self._stands.clear()
        self._is_assembled.clear()
        self._failure = None
        self._partitions = {}
        self._waiting.clear()
        self._resting.clear()
        self._consumer = AIOKafkaConsumer(
            **config.connection_options(),
            group_id=self._group,
            # Only for an offset that is not there any more: where a group begins is found when it is assembled.
            auto_offset_reset=InitialOffset.OLDEST.value,
            enable_auto_commit=False,
            session_timeout_ms=int(config.session_timeout.total_seconds() * 1000),
            heartbeat_interval_ms=int(config.heartbeat_interval.total_seconds() * 1000),
            # A handler that takes its time keeps its partitions: only a member that is gone loses them.
            max_poll_interval_ms=2**31 - 1,
            fetch_min_bytes=config.fetch_min_bytes,
            max_partition_fetch_bytes=config.fetch_bytes,
        )
        self._consumer.subscribe([self._topic], listener=_Listener(self))
        return self._consumer

    async def _read(self) -> None:
        while True:
            try:
                await self._read_some()
                self._complaints.pop(_NOT_READ, None)
            except Exception as error:
                self._complain(_NOT_READ, error)
                # Without a right to the topic one is a member all the same. After anything else, as a right to the
                # group that was missing for a moment, the driver may be none any more, and say nothing of it; or it has
                # given what was not taken in, and would not give it again.
                if not isinstance(error, TopicAuthorizationFailedError):
                    self._failure = error
                await asyncio.sleep(_RETRY_SECONDS)

    async def _read_some(self) -> None:
        await self._has_room.wait()
        if self._failure is not None:
            self._complain(_NOT_READ, self._failure)
            await self._start_anew()
        fetched = await self._consumer.getmany(timeout_ms=1_000, max_records=WAITING_LIMIT)
        for where, records in fetched.items():
            self._take_in(where, records)

    async def _start_anew(self) -> None:
        self._stands.clear()
        for partition in self._partitions.values():
            partition.is_ours = False
        await _stop(self._consumer)
        await self._join()

    def _take_in(self, where: TopicPartition, records: Sequence[Any]) -> None:
        if not self._stands.is_set():
            return
        partition = self._partitions[where]
        if records[0].offset < partition.position:
            partition = self._go_back(partition, records[0].offset)
        for record in records:
            partition.position = record.offset + 1
            partition.unsettled[record.offset] = None
            message = decode(
                *(record.topic, record.partition, record.offset, record.timestamp),
                *(record.key, record.value, record.headers),
            )
            self._waiting.append(_Waiting(partition, record.offset, message, 1))
        self._update_room()
        self._has_changed.set()

    def _go_back(self, before: _Partition, offset: int) -> _Partition:
        """Begin the partition anew: its log was cut off before our position, or the topic was made anew.

        What was taken in of it before is handed out all the same, but nobody can settle it any more. The new position
        is committed without waiting for a delivery: once the log has grown past the old one, nobody sees it is wrong.
        """
        logger.warning(_WENT_BACK, before.where.partition, self._topic, before.position, offset)
        before.is_ours = False
        partition = _Partition(before.where, before.birth, committed=_NEVER, position=offset)
        self._partitions[before.where] = partition
        self._is_dirty.set()
        return partition

    def _hand_out(self, waiting: _Waiting) -> Delivery:
        self._update_room()
        return _KafkaDelivery(waiting, self)

    def _update_room(self) -> None:
        (self._has_room.set if len(self._waiting) < WAITING_LIMIT else self._has_room.clear)()

    async def _commit_regularly(self) -> None:
        while True:
            await self._is_dirty.wait()
            await asyncio.sleep(COMMIT_SECONDS)
            if self._stands.is_set():
                await self._commit()

    async def _commit(self) -> None:
        self._is_dirty.clear()
        moved = [partition for partition in self._partitions.values() if partition.committable != partition.committed]
        offsets = {partition.where: OffsetAndMetadata(partition.committable, partition.birth) for partition in moved}
        if not offsets:
            return
        try:
            async with asyncio.timeout(_LEAVE_SECONDS):
                await self._consumer.commit(offsets)
        except Exception as error:
            self._complain(_NOT_COMMITTED, error)
            self._is_dirty.set()
            return
        self._complaints.pop(_NOT_COMMITTED, None)
        for partition in moved:
            partition.committed = offsets[partition.where].offset

    def _complain(self, message: str, error: Exception, reason: str | None = None) -> None:
        """Log what fails when it begins to, and when the reason changes: a right that is missing may be so for days."""
        reason = text_of(error, self._config) if reason is None else reason
        if self._complaints.get(message) != reason:
            self._complaints[message] = reason
            logger.warning(message, self._topic, reason, exc_info=None if isinstance(error, _EXPECTED) else error)

    async def _leave(self, consumer: Any) -> None:
        if self._stands.is_set():
            await self._commit()
        self._stands.clear()
        await _stop(consumer)


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc]  # the driver has no types
    def __init__(self, subscription: Subscription) -> None:
        self._subscription = subscription

    async def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        await self._subscription.give_up()

    async def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        await self._subscription.take_over(assigned)


def _continued(where: TopicPartition, before: _Partition | None, start: OffsetAndMetadata) -> _Partition:
    """Keep what this member knew of the partition, unless another one has committed meanwhile."""
    if before is not None and before.committed == start.offset:
        return before
    return _Partition(where, start.metadata, committed=start.offset, position=start.offset)


class _KafkaDelivery:
    def __init__(self, waiting: _Waiting, subscription: Subscription) -> None:
        self.message = waiting.message
        self.attempt = waiting.attempt
        self._waiting = waiting
        self._subscription = subscription
        self._is_settled = False

    async def ack(self) -> None:
        self._settle(handled=True)

    async def nack(self) -> None:
        self._settle(handled=False)

    def _settle(self, *, handled: bool) -> None:
        if not self._is_settled:
            self._is_settled = True
            self._subscription.settle(self._waiting, handled=handled)


async def _stop(consumer: Any) -> None:
    """Leave the group; cut the connections, at the latest when leaving takes longer than it may."""
    stopping = asyncio.ensure_future(consumer.stop())
    await asyncio.wait([stopping], timeout=_LEAVE_SECONDS)
    # Also when it is done: an error on the way out leaves the driver's client open.
    await cut_off(consumer._client)
    await asyncio.wait([stopping], timeout=_LEAVE_SECONDS)
    if not stopping.done():
        stopping.cancel()
        await asyncio.wait([stopping])
    if not stopping.cancelled() and (error := stopping.exception()):
        logger.debug("leaving a group of Kafka: %r", error)
