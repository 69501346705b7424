"""Redis Streams with a limit of its own: a Redis server refuses no message for what is in it, as Kafka does."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from datetime import timedelta
from types import TracebackType
from typing import Self

from statecast import Component
from statecast.clock import Clock
from statecast.components.broker.broker import (
    Delivery,
    Message,
    Outcome,
    Published,
    Refused,
    Settlement,
    Unreachable,
)
from statecast.components.broker.redis.broker import RedisBroker

LIMIT = "maxMessageBytes"


class LimitedRedisBroker:
    """Refuses what is larger than the component's `maxMessageBytes`, and holds back what is behind it of its key."""

    def __init__(self, component: Component, *, app_id: str, clock: Clock) -> None:
        metadata = dict(component.metadata)
        self._limit = int(metadata.pop(LIMIT, 1 << 30))
        self._broker = RedisBroker(replace(component, metadata=metadata), app_id=app_id, clock=clock)

    async def __aenter__(self) -> Self:
        await self._broker.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._broker.__aexit__(kind, error, traceback)

    async def publish(
        self, messages: Sequence[Message], timeout: timedelta, settlement: Settlement = Settlement.STORED
    ) -> list[Outcome]:
        outcomes = self._refusals(messages)
        allowed = [message for message, outcome in zip(messages, outcomes, strict=True) if outcome == Published()]
        told = iter(await self._broker.publish(allowed, timeout, settlement))
        return [next(told) if outcome == Published() else outcome for outcome in outcomes]

    def subscribe(self, topic: str, group: str) -> AbstractAsyncContextManager[AsyncIterator[Delivery]]:
        return self._broker.subscribe(topic, group)

    def _refusals(self, messages: Sequence[Message]) -> list[Outcome]:
        stopped: set[str | None] = set()
        outcomes: list[Outcome] = []
        for message in messages:
            if message.key in stopped:
                outcomes.append(Unreachable("held back"))
            elif len(message.body) > self._limit:
                stopped.add(message.key)
                outcomes.append(Refused(f"the message has {len(message.body)} bytes, of {self._limit}"))
            else:
                outcomes.append(Published())
        return outcomes
