"""The seam of a message broker. A backend is written from these docstrings and proven by `components.testing`."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum
from types import TracebackType
from typing import Protocol, Self


@dataclass(frozen=True, slots=True)
class Message:
    """One message, out or in.

    `key`: messages of one topic with the same key stay in order where the broker can keep it (Kafka: the record
    key); None promises no order. `metadata` travels with the message as far as the broker has a place for it.
    """

    topic: str
    body: bytes
    key: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Published:
    """The broker has it, as durably as it is configured to."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The broker said no; the same message again would be refused again.

    `is_about_topic`: every message to this topic would be (unknown topic, not authorised), not this one alone.
    """

    reason: str
    is_about_topic: bool = False


@dataclass(frozen=True, slots=True)
class Unreachable:
    """It is proven that the broker does not have it: no connection, or not sent because an earlier one failed."""

    reason: str


@dataclass(frozen=True, slots=True)
class Unknown:
    """It was sent and no answer came: the broker may have it."""

    reason: str


Outcome = Published | Refused | Unreachable | Unknown


class Settlement(StrEnum):
    """What a publisher waits for. Brokers that store messages know only STORED."""

    STORED = "stored"
    """The broker has taken the message over."""

    HANDLED = "handled"
    """A broker that stores nothing answers only once every group has settled the message: the publisher still
    holds it, so that a crash in between loses nothing."""


class Delivery(Protocol):
    """One message in one consumer's hands, settled once."""

    @property
    def message(self) -> Message: ...

    @property
    def attempt(self) -> int:
        """The number of this delivery, as far as the broker knows: 1 for the first."""
        ...

    async def ack(self) -> None:
        """It was handled: it is not delivered to this group again."""
        ...

    async def nack(self) -> None:
        """It was not handled: it is delivered to this group again, later."""
        ...


class Broker(Protocol):
    """`async with` connects; leaving ends subscriptions and closes within seconds, whatever the broker does."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    async def publish(
        self, messages: Sequence[Message], timeout: timedelta, settlement: Settlement = Settlement.STORED
    ) -> list[Outcome]:
        """Publish the messages in this order and return one outcome for each, in the same order.

        Returns within `timeout`; what has no answer by then is Unknown. When a message is not Published, no later
        message of the same topic and key in this call is: those were held back (Unreachable), so the caller can
        publish them again behind it and the order stands. Raises nothing for what a broker can do.
        """
        ...

    def subscribe(self, topic: str, group: str) -> AbstractAsyncContextManager[AsyncIterator[Delivery]]:
        """Receive the topic as a member of `group`: each message goes to one member of each group, at least once.

        Entering returns when the subscription stands: what is published from then on is delivered. Iterating waits
        for the next message. Leaving gives back what is not settled, for another member of the group.
        """
        ...
