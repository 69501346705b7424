"""`pubsub.kafka`: publishing with an outcome per message, and consumer groups."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from types import TracebackType
from typing import Self

from statecast.clock import Clock
from statecast.components.broker.broker import Delivery, Message, Outcome, Settlement, Unreachable
from statecast.components.broker.kafka.config import parse_config
from statecast.components.broker.kafka.pool import ProducerPool
from statecast.components.broker.kafka.producer import Producer
from statecast.components.broker.kafka.publication import Publication
from statecast.components.broker.kafka.subscription import Subscription
from statecast.components.broker.kafka.topics import TopicMemory
from statecast.components.manifest import Component, describe
from statecast.errors import InvalidRequest

logger = logging.getLogger(__name__)

DRAIN_SECONDS = 1.0
"""How long closing lets a publish that is on its way come to its end."""

_NOT_OPEN = Unreachable("the broker is not open")


class KafkaBroker:
    """Opening does not wait for Kafka, nor fail without it: a publish meanwhile is Unreachable.

    Kafka keeps what it takes, so HANDLED means STORED.
    """

    def __init__(self, component: Component, *, app_id: str, clock: Clock) -> None:
        self._config = parse_config(component, app_id)
        self._described = describe(component)
        self._pool: ProducerPool | None = None
        self._memory = TopicMemory(clock)
        self._publishing: set[asyncio.Timeout] = set()
        self._nothing_publishing = asyncio.Event()
        self._nothing_publishing.set()
        self._subscriptions: set[Subscription] = set()

    async def __aenter__(self) -> Self:
        self._pool = ProducerPool(lambda: Producer(self._config))
        self._pool.warm_up()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pool, self._pool = self._pool, None
        if pool is None:
            return
        self._hurry()
        try:
            await asyncio.gather(*(subscription.close() for subscription in self._subscriptions))
            await self._nothing_publishing.wait()
        finally:
            await pool.close()

    async def publish(
        self, messages: Sequence[Message], timeout: timedelta, settlement: Settlement = Settlement.STORED
    ) -> list[Outcome]:
        if self._pool is None:
            return [_NOT_OPEN] * len(messages)
        publication = Publication(messages, self._config.max_message_bytes, self._memory)
        try:
            async with asyncio.timeout(timeout.total_seconds()) as time:
                self._begin(time)
                try:
                    await publication.send(self._pool)
                finally:
                    self._end(time)
        except TimeoutError:
            pass
        return publication.outcomes()

    @asynccontextmanager
    async def subscribe(self, topic: str, group: str) -> AsyncIterator[AsyncIterator[Delivery]]:
        """Join the group; the component's `consumerGroup` or `consumerID`, where it is given, goes before `group`.

        Entering waits for Kafka as long as it takes, and until the group is assembled and has committed where it
        starts; raises InvalidRequest when the broker is not open. While the subscription stands, Kafka may hand its
        partitions to another member: what is unsettled of them comes again there, and settling it here has no effect
        any more.
        """
        if self._pool is None:
            raise InvalidRequest(f"{self._described} is not open")
        subscription = Subscription(self._config, topic, self._config.group or group)
        self._subscriptions.add(subscription)
        try:
            await subscription.open()
            yield subscription
        finally:
            await subscription.close()
            self._subscriptions.discard(subscription)

    def _begin(self, time: asyncio.Timeout) -> None:
        self._publishing.add(time)
        self._nothing_publishing.clear()

    def _end(self, time: asyncio.Timeout) -> None:
        self._publishing.discard(time)
        if not self._publishing:
            self._nothing_publishing.set()

    def _hurry(self) -> None:
        latest = asyncio.get_running_loop().time() + DRAIN_SECONDS
        for time in self._publishing:
            if not time.expired():
                time.reschedule(min(time.when() or latest, latest))
