"""The broker on Redis Streams, on Dapr's wire: a topic is a stream, an entry has `data` and perhaps `metadata`."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from types import TracebackType
from typing import Self

from statecast.clock import Clock
from statecast.components.broker.broker import (
    Delivery,
    Message,
    Outcome,
    Refused,
    Settlement,
)
from statecast.components.broker.redis.publishing import (
    HELD_BACK,
    LARGEST_MESSAGE_BYTES,
    PUBLISH,
    Lanes,
    Trim,
    encode_run,
    outcome_of_error,
    outcomes_of,
    runs_of,
)
from statecast.components.broker.redis.subscription import Pace, Subscription
from statecast.components.manifest import Component, describe
from statecast.components.metadata import BROKER_FIELDS, MetadataReader
from statecast.components.redis.connection import ErrorReply, NotSent, Unanswered, UnfitServer
from statecast.components.redis.pipeline import Pipeline
from statecast.components.redis.settings import read_settings
from statecast.errors import ComponentError, InvalidRequest

logger = logging.getLogger(__name__)


class RedisBroker:
    """Publishes a run of messages with one script; every subscription reads on a connection of its own.

    Opening does not insist on a server that answers, since what is published later may find one. A topic keeps all
    of its entries unless `maxLenApprox` or `streamTTL` says otherwise. The key of a message is not stored.
    """

    def __init__(self, component: Component, *, app_id: str, clock: Clock) -> None:
        fields = MetadataReader(component, BROKER_FIELDS)
        self._settings = read_settings(fields)
        self._trim = _read_trim(fields, describe(component))
        self._pace = _read_pace(fields)
        self._consumer_id = fields.trimmed_text("consumerID")
        fields.unsupported("concurrency")
        fields.finish()
        self._described = describe(component)
        # A server that takes no connection must leave opening the time to end.
        self._patience = component.init_timeout.total_seconds() / 2
        self._app_id = app_id
        self._clock = clock
        self._pipeline = Pipeline(self._settings)
        self._subscriptions: set[Subscription] = set()
        self._open = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as opening:
            await opening.enter_async_context(self._pipeline)
            await self._examine_server()
            opening.push_async_callback(self._leave_all)
            self._open = opening.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._open.aclose()

    async def publish(
        self, messages: Sequence[Message], timeout: timedelta, settlement: Settlement = Settlement.STORED
    ) -> list[Outcome]:
        """Publish run by run; what may not be sent in one run may not in the next ones."""
        end = asyncio.get_running_loop().time() + timeout.total_seconds()
        lanes = Lanes()
        outcomes: list[Outcome] = []
        for run in runs_of(messages):
            outcomes += await self._publish_open_lanes(run, lanes, end)
        return outcomes

    async def _publish_open_lanes(self, run: Sequence[Message], lanes: Lanes, end: float) -> list[Outcome]:
        is_open = [lanes.is_open(message) for message in run]
        sent = [message for message, flag in zip(run, is_open, strict=True) if flag]
        told = iter(await self._publish_run(sent, lanes, end))
        outcomes = [next(told) if flag else HELD_BACK for flag in is_open]
        lanes.note(run, outcomes)
        return outcomes

    async def _publish_run(self, run: Sequence[Message], lanes: Lanes, end: float) -> list[Outcome]:
        if not run:
            return []
        if len(run[0].body) > LARGEST_MESSAGE_BYTES:
            return [Refused("the message is larger than a Redis server takes in one command")]
        topics, argument = encode_run(run, self._trim)
        left = end - asyncio.get_running_loop().time()
        try:
            failed = await self._pipeline.run_within(left, PUBLISH, len(topics), *topics, argument)
        except (NotSent, Unanswered, ErrorReply) as error:
            # A right that is missing for one topic fails the script before it begins, for all topics.
            if isinstance(error, ErrorReply) and error.code == "NOPERM" and len(topics) > 1:
                return await self._publish_by_topic(run, topics, lanes, end)
            return [outcome_of_error(error, is_alone=len(run) == 1)] * len(run)
        return outcomes_of(failed, len(run))

    async def _publish_by_topic(
        self, run: Sequence[Message], topics: Sequence[str], lanes: Lanes, end: float
    ) -> list[Outcome]:
        told = {}
        for topic in topics:
            part = [message for message in run if message.topic == topic]
            told[topic] = iter(await self._publish_open_lanes(part, lanes, end))
        return [next(told[message.topic]) for message in run]

    @asynccontextmanager
    async def subscribe(self, topic: str, group: str) -> AsyncIterator[AsyncIterator[Delivery]]:
        """Receive the topic as a member of `group`, which the component's `consumerID` renames for the app itself.

        A new group begins with the oldest entry that the stream has.
        """
        if not self._pipeline.is_open:
            raise InvalidRequest(f"{self._described} is not open")
        if group == self._app_id and self._consumer_id is not None:
            group = self._consumer_id
        subscription = Subscription(
            topic, group, settling=self._pipeline, settings=self._settings, pace=self._pace, clock=self._clock
        )
        self._subscriptions.add(subscription)
        try:
            async with subscription:
                yield subscription
        finally:
            self._subscriptions.discard(subscription)

    async def _leave_all(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for subscription in tuple(self._subscriptions):
                tasks.create_task(subscription.leave())

    async def _examine_server(self) -> None:
        try:
            await self._pipeline.command_within(self._patience, "PING")
        except UnfitServer as error:
            raise ComponentError(str(error)) from error
        except (NotSent, Unanswered, ErrorReply) as error:
            logger.warning("%s: Redis does not answer yet: %s", self._described, error)


def _read_trim(fields: MetadataReader, described: str) -> Trim:
    entries = fields.integer("maxLenApprox", default=0, minimum=0)
    age = fields.duration("streamTTL", default=timedelta(), bare="milliseconds", minimum=timedelta())
    if entries and age:
        logger.warning("%s: maxLenApprox and streamTTL are both given; only maxLenApprox is used", described)
    if entries:
        return Trim.to_length(entries)
    return Trim.to_age(age) if age else Trim()


def _read_pace(fields: MetadataReader) -> Pace:
    return Pace(
        processing_timeout=fields.duration(
            "processingTimeout", default=timedelta(seconds=60), bare="milliseconds", minimum=timedelta()
        ),
        redeliver_interval=fields.duration(
            "redeliverInterval", default=timedelta(seconds=15), bare="milliseconds", minimum=timedelta()
        ),
        queue_depth=fields.integer("queueDepth", default=100, minimum=1),
    )
