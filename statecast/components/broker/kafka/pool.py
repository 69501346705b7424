"""The producers of one broker: each lent to one publish at a time, so that no publish spoils another's."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable

from statecast.components.broker.kafka.producer import Producer, SendFailed, TopicRefused

logger = logging.getLogger(__name__)

LIMIT = 8

_CLOSED = "the broker is closed"


class ProducerPool:
    """Opens producers when they are wanted, `LIMIT` at most; a publish beyond that waits for its turn.

    A producer is opened by a task of the pool's, which outlives an impatient publish: the next one finds it ready.
    """

    def __init__(self, make_producer: Callable[[], Producer]) -> None:
        self._make_producer = make_producer
        self._idle: list[Producer] = []
        self._lent = 0
        self._is_closed = False
        self._openings: set[asyncio.Task[None]] = set()
        self._closings: set[asyncio.Task[None]] = set()
        self._waiters: deque[asyncio.Future[Producer]] = deque()

    async def borrow(self) -> Producer:
        """Wait for a producer. Raises SendFailed or TopicRefused when one cannot be opened."""
        if self._is_closed:
            raise SendFailed(_CLOSED)
        if not self._idle:
            return await self._wait_for_one()
        self._lent += 1
        return self._idle.pop()

    def give_back(self, producer: Producer) -> None:
        self._lent -= 1
        self._hand_on(producer)

    def throw_away(self, producer: Producer) -> None:
        """End all sending of the producer now, and close it in the background."""
        self._lent -= 1
        producer.abandon()
        self._close(producer)
        self._open_as_wanted()

    def warm_up(self) -> None:
        """Begin to open the first producer, so that the first publish need not wait for it."""
        self._open()

    async def close(self) -> None:
        """Close what is idle or being opened, and what is lent when it comes back. Goes on when it is cancelled."""
        self._is_closed = True
        for opening in self._openings:
            opening.cancel()
        self._fail_waiters(SendFailed(_CLOSED))
        while self._idle:
            self._close(self._idle.pop())
        while self._openings or self._closings:
            await asyncio.wait(self._openings | self._closings)

    async def _wait_for_one(self) -> Producer:
        waiter: asyncio.Future[Producer] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        self._open_as_wanted()
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self.give_back(waiter.result())
            raise

    def _open_as_wanted(self) -> None:
        self._waiters = deque(waiter for waiter in self._waiters if not waiter.done())
        room = LIMIT - self._lent - len(self._idle)
        while len(self._openings) < min(len(self._waiters), room):
            self._open()

    def _open(self) -> None:
        opening = asyncio.ensure_future(self._open_one())
        self._openings.add(opening)
        opening.add_done_callback(self._openings.discard)

    async def _open_one(self) -> None:
        producer = self._make_producer()
        try:
            await producer.start()
        except asyncio.CancelledError:
            self._close(producer)
            raise
        except (SendFailed, TopicRefused) as error:
            self._close(producer)
            self._fail_waiters(error)
        except Exception as error:
            logger.exception("opening a producer of Kafka failed")
            self._close(producer)
            self._fail_waiters(SendFailed(repr(error)))
        else:
            self._hand_on(producer)

    def _hand_on(self, producer: Producer) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                self._lent += 1
                waiter.set_result(producer)
                return
        if self._is_closed:
            self._close(producer)
        else:
            self._idle.append(producer)

    def _fail_waiters(self, error: SendFailed | TopicRefused) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_exception(type(error)(*error.args))

    def _close(self, producer: Producer) -> None:
        closing = asyncio.ensure_future(producer.close())
        self._closings.add(closing)
        closing.add_done_callback(self._closings.discard)
