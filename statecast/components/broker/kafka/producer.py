"""One producer of the driver: used by one publish at a time, and thrown away at the first thing that goes wrong."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aiokafka import AIOKafkaProducer
from aiokafka.errors import (
    BrokerResponseError,
    ClusterAuthorizationFailedError,
    InvalidTimestampError,
    InvalidTopicError,
    KafkaError,
    MessageSizeTooLargeError,
    NodeNotReadyError,
    NoError,
    PolicyViolationError,
    RecordListTooLargeError,
    TopicAuthorizationFailedError,
    UnknownTopicOrPartitionError,
    UnsupportedForMessageFormatError,
    for_code,
    kafka_errors,
)
from aiokafka.protocol.metadata import MetadataRequest

from statecast.components.broker.kafka.config import KafkaConfig
from statecast.components.broker.kafka.connecting import explain, text_of
from statecast.components.broker.kafka.records import Record

logger = logging.getLogger(__name__)


class InvalidRecordError(BrokerResponseError):  # type: ignore[misc]  # the driver has no types
    """A code that the driver takes for an unexpected server error: a compacted topic refuses a record without key."""

    errno = 87
    message = "INVALID_RECORD"
    description = "The record failed the validation on the broker."


kafka_errors.setdefault(InvalidRecordError.errno, InvalidRecordError)

_ABOUT_MESSAGE = (
    *(MessageSizeTooLargeError, RecordListTooLargeError, InvalidTimestampError, PolicyViolationError),
    *(UnsupportedForMessageFormatError, InvalidRecordError),
)
_ABOUT_TOPIC = (TopicAuthorizationFailedError, ClusterAuthorizationFailedError, InvalidTopicError)

_POLL_SECONDS = 0.05
_CLOSE_SECONDS = 2.0


class MessageRefused(Exception):
    """The broker refused a batch for what is in it; the message is the reason."""


class TopicRefused(Exception):
    """The broker takes nothing for this topic; raised by `start`, for any topic."""


class SendFailed(Exception):
    """No answer, or one that says nothing about the message: stored or not, as far as it was sent at all."""


@dataclass(slots=True, eq=False)
class Sending:
    """One batch on its way. `was_sent` turns true when its first byte is handed to a connection."""

    topic: str
    partition: int
    builder: Any
    was_sent: bool = False


class Producer:
    """An idempotent producer with acknowledgement by all replicas.

    The driver's own has three habits that this one is here for. After the broker has refused a batch, the sequence
    numbers of its partition have a gap and every later batch is refused too; it keeps trying to send what nobody waits
    for any more; and its `stop` waits for a broker that does not answer. So it is never stopped: `abandon` ends all
    sending at once, and `close` cuts the connections.
    """

    def __init__(self, config: KafkaConfig) -> None:
        self._config = config
        self._driver: Any = AIOKafkaProducer(
            **config.connection_options(),
            acks="all",
            enable_idempotence=True,
            linger_ms=0,
            compression_type=config.compression,
            # Batches are cut to size by their queue; the driver's builder shall not cut them a second time.
            max_batch_size=2**30,
            max_request_size=2**30,
        )
        self._sendings: dict[Any, Sending] = {}
        self._requests: dict[asyncio.Task[Any] | None, list[Sending]] = {}
        self._watch_requests()

    async def start(self) -> None:
        """Connect and take a producer id. Raises SendFailed, TopicRefused; the producer is to be closed then too."""
        try:
            await self._driver.start()
        except ClusterAuthorizationFailedError as error:
            # KIP-679: who may write any topic gets a producer id.
            reason = "may write no topic, or lacks IdempotentWrite on a cluster older than Kafka 2.8"
            raise TopicRefused(f"{self._user} {reason}: {text_of(error, self._config)}") from error
        except (KafkaError, OSError, TimeoutError) as error:
            raise SendFailed(f"no connection: {await explain(error, self._config)}") from error

    async def partitions(self, topic: str, patience: float) -> list[int]:
        """Tell the topic's partitions, making it where the server makes topics by use.

        Right after such a topic was asked for, the server calls it unknown just like one that will never be; that is
        believed after `patience` seconds. Raises TopicRefused, SendFailed.
        """
        client = self._driver.client
        deadline = asyncio.get_running_loop().time() + patience
        while not client.cluster.partitions_for_topic(topic):
            try:
                await self._ask_for(topic, is_last_time=asyncio.get_running_loop().time() >= deadline)
            except (KafkaError, OSError, TimeoutError) as error:
                raise SendFailed(f"no metadata: {text_of(error, self._config)}") from error
        return sorted(client.cluster.partitions_for_topic(topic))

    def any_partition(self, topic: str) -> int:
        """Choose a partition by chance, of those that have a leader."""
        return int(self._driver._partition(topic, None, None, None, None, None))

    def prepare(self, records: Sequence[Record], topic: str, partition: int) -> Sending:
        builder = self._driver.create_batch()
        for record in records:
            builder.append(timestamp=None, key=record.key_bytes, value=record.value, headers=record.headers)
        builder.close()
        return Sending(topic, partition, builder)

    async def send(self, sending: Sending) -> None:
        """Send one batch and wait until it is stored. Raises MessageRefused, TopicRefused, SendFailed.

        Cancelled, it abandons the producer, so that `was_sent` is final.
        """
        self._sendings[sending.builder] = sending
        try:
            stored = await self._driver.send_batch(sending.builder, sending.topic, partition=sending.partition)
            await stored
        except _ABOUT_MESSAGE as error:
            raise MessageRefused(text_of(error, self._config)) from error
        except _ABOUT_TOPIC as error:
            raise self._refusal(sending.topic, type(error)) from error
        # The driver asserts that the partition is there: a topic that was made anew may have fewer.
        except (KafkaError, OSError, TimeoutError, AssertionError) as error:
            raise SendFailed(text_of(error, self._config)) from error
        except asyncio.CancelledError:
            self.abandon()
            raise
        finally:
            del self._sendings[sending.builder]

    def abandon(self) -> None:
        """End all sending now: what is not `was_sent` when this returns will never be."""
        # The driver warns about producers that are dropped without `stop`.
        self._driver._closed = True
        for task in self._tasks():
            task.cancel()

    async def close(self) -> None:
        """Abandon, and cut the connections without waiting for anybody; takes two seconds at most."""
        self.abandon()
        if tasks := self._tasks():
            await asyncio.wait(tasks, timeout=_CLOSE_SECONDS)
        await cut_off(self._driver.client)

    @property
    def _user(self) -> str:
        login = self._config.credentials
        return f"user {'ANONYMOUS' if login is None else login.shown_username}"

    def _tasks(self) -> list[asyncio.Task[Any]]:
        return [task for task in (self._driver._sender.sender_task, *self._requests) if task is not None]

    async def _ask_for(self, topic: str, *, is_last_time: bool) -> None:
        client = self._driver.client
        answer = await client.send(client.get_random_node(), MetadataRequest([topic]))
        error = next((for_code(each[0]) for each in answer.topics if each[1] == topic), UnknownTopicOrPartitionError)
        if error is NoError:
            await self._driver.partitions_for(topic)
        elif error in _ABOUT_TOPIC or (error is UnknownTopicOrPartitionError and is_last_time):
            raise self._refusal(topic, error)
        else:
            await asyncio.sleep(_POLL_SECONDS)

    def _refusal(self, topic: str, error: type[BrokerResponseError]) -> TopicRefused:
        return TopicRefused(f"{topic}, as {self._user}: {error.message}: {error.description}")

    def _watch_requests(self) -> None:
        """Learn which batches were handed to a connection, which the driver does not tell.

        Its sender runs one task per produce request; within it, a request is sent in the same step in which its
        connection is found ready.
        """
        sender, client = self._driver._sender, self._driver.client
        run_request, send = sender._send_produce_req, client.send

        async def run_watched(node_id: Any, batches: Any) -> None:
            task = asyncio.current_task()
            sendings = (self._sendings.get(batch._builder) for batch in batches.values())
            self._requests[task] = [sending for sending in sendings if sending is not None]
            try:
                await run_request(node_id, batches)
            finally:
                del self._requests[task]

        async def send_watched(node_id: Any, request: Any, **options: Any) -> Any:
            if sendings := self._requests.get(asyncio.current_task()):
                if not await client.ready(node_id):
                    raise NodeNotReadyError(f"node {node_id} is not connected")
                for sending in sendings:
                    sending.was_sent = True
            return await send(node_id, request, **options)

        sender._send_produce_req, client.send = run_watched, send_watched


async def cut_off(client: Any) -> None:
    """Close a driver's client at once; its own `close` waits until what is still to be written is taken."""
    for connection in list(client._conns.values()):
        if connection._writer is not None:
            connection._writer.transport.abort()
    closing = asyncio.ensure_future(client.close())
    await asyncio.wait([closing], timeout=_CLOSE_SECONDS)
    if not closing.done():
        closing.cancel()
        await asyncio.wait([closing])
