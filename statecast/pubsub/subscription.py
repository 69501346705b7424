"""One subscription: takes deliveries one by one, hands each to the handler until it succeeds, then acknowledges."""

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from typing import Any

from statecast.clock import Clock
from statecast.components.broker.broker import Broker, Delivery
from statecast.pubsub.cloudevent import CloudEvent, parse_event

logger = logging.getLogger(__name__)

Handler = Callable[[CloudEvent], Awaitable[None] | None]

_FIRST_PAUSE = timedelta(milliseconds=100)
_LONGEST_PAUSE = timedelta(seconds=30)


class Subscription:
    """At least once and in the order of arrival: an event whose handler raises holds the later ones back and is
    handed over again after a pause that doubles from 0.1 to 30 seconds."""

    def __init__(self, broker: Broker, topic: str, group: str, handler: Handler, *, clock: Clock) -> None:
        self.is_standing = asyncio.Event()
        """Set once what is published will be delivered."""
        self._broker = broker
        self._topic = topic
        self._group = group
        self._handler = handler
        self._clock = clock

    async def run(self, stop: asyncio.Event) -> None:
        """Deliver until `stop` is set; an event in the handler's hands is finished, unless it keeps failing."""
        async with self._broker.subscribe(self._topic, self._group) as deliveries:
            self.is_standing.set()
            stopping = asyncio.ensure_future(stop.wait())
            try:
                while (delivery := await _next(deliveries, stopping)) is not None:
                    await self._deliver(delivery, stop)
            finally:
                stopping.cancel()

    async def _deliver(self, delivery: Delivery, stop: asyncio.Event) -> None:
        event = parse_event(delivery.message.body, delivery.message.metadata)
        pause = _FIRST_PAUSE
        while not await self._is_handled(event):
            if await self._clock.wait(stop, pause):
                await delivery.nack()
                return
            pause = min(pause * 2, _LONGEST_PAUSE)
        await delivery.ack()

    async def _is_handled(self, event: CloudEvent) -> bool:
        try:
            result = self._handler(event)
            if inspect.isawaitable(result):
                await result
        except Exception:
            logger.exception("the handler of topic %r failed on event %r; it gets it again", self._topic, event.id)
            return False
        return True


async def _next(deliveries: AsyncIterator[Delivery], stopping: "asyncio.Future[Any]") -> Delivery | None:
    """Wait for the next delivery; None once `stopping` is done."""
    if stopping.done():
        return None
    arriving = asyncio.ensure_future(anext(deliveries))
    try:
        await asyncio.wait((arriving, stopping), return_when=asyncio.FIRST_COMPLETED)
        return arriving.result() if arriving.done() else None
    finally:
        if not arriving.done():
            arriving.cancel()
            await asyncio.gather(arriving, return_exceptions=True)
