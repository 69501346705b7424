"""Publishing log entries through the brokers they name."""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta

from statecast.components.broker.broker import (
    Broker,
    Message,
    Outcome,
    Published,
    Refused,
    Settlement,
    Unreachable,
)
from statecast.components.state.log import LogEntry
from statecast.outbox.progress import message_of

logger = logging.getLogger(__name__)


class Publisher:
    def __init__(self, brokers: Mapping[str, Broker], timeout: timedelta) -> None:
        self._brokers = brokers
        self._timeout = timeout

    async def publish(self, entries: Sequence[LogEntry]) -> list[Outcome]:
        """Publish through the broker each entry names; entries of one broker go in one call, in order.

        Brokers are called at the same time, so that one that is slow holds the others' entries no longer than itself.
        """
        by_pubsub: dict[str, list[int]] = {}
        for index, entry in enumerate(entries):
            by_pubsub.setdefault(entry.record.pubsub, []).append(index)
        async with asyncio.TaskGroup() as calls:
            publishing = {
                pubsub: calls.create_task(
                    self._publish(pubsub, [message_of(entries[index].record) for index in indexes])
                )
                for pubsub, indexes in by_pubsub.items()
            }
        outcomes: list[Outcome] = [Unreachable("not sent")] * len(entries)
        for pubsub, indexes in by_pubsub.items():
            for index, outcome in zip(indexes, publishing[pubsub].result(), strict=True):
                outcomes[index] = outcome
        return outcomes

    async def publish_copy(self, entry: LogEntry, topic: str, reason: str) -> None:
        """Publish a copy of an event that was refused for good to a dead-letter topic; that this fails is logged."""
        message = message_of(entry.record)
        headers = {**message.metadata, "deadLetterReason": reason, "deadLetterTopic": message.topic}
        (outcome,) = await self._publish(entry.record.pubsub, [replace(message, topic=topic, metadata=headers)])
        if not isinstance(outcome, Published):
            logger.error("dead-letter topic %r did not take event %s: %s", topic, entry.record.event_id, outcome)

    async def _publish(self, pubsub: str, messages: list[Message]) -> list[Outcome]:
        broker = self._brokers.get(pubsub)
        if broker is None:
            reason = f"no pub/sub component named {pubsub!r} is loaded"
            return [Refused(reason, is_about_topic=True)] * len(messages)
        return await broker.publish(messages, self._timeout, Settlement.HANDLED)
