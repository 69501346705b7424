"""One producer of the driver: used by one publish at a time, and thrown away at the first thing that goes wrong."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.errors import (
    ClusterAuthorizationFailedError,
    KafkaError,
    NodeNotReadyError,
    NoError,
    UnknownTopicOrPartitionError,
    for_code,
)
from aiokafka.protocol.metadata import MetadataRequest

from statecast.components.broker.kafka.answers import ABOUT_MESSAGE, ABOUT_TOPIC, describe
from statecast.components.broker.kafka.config import KafkaConfig
from statecast.components.broker.kafka.connecting import explain, text_of
from statecast.components.broker.kafka.patience import Patience
from statecast.components.broker.kafka.records import Record

logger = logging.getLogger(__name__)


START_SECONDS = 15.0
"""More than the driver gives one address, so that one which does not answer leaves time for the next."""

_NOBODY = -1
_POLL_SECONDS = 0.05
_CLOSE_SECONDS = 2.0


class MessageRefused(Exception):
    """The broker refused a batch for what is in it; the message is the reason."""


class TopicRefused(Exception):
    """The broker takes nothing for this topic; raised by `start`, for any topic."""


class SendFailed(Exception):
    """No answer, or one that says nothing about the message: stored or not, as far as it was sent at all."""


class NoLeader(Exception):
    """Nothing was sent to the partition, for there is nobody to send it to."""


@dataclass(slots=True, eq=False)
class Sending:
    """One batch on its way. `was_sent` turns true when its first byte is handed to a connection.

    `answer` is what the broker said last, in words: the driver goes on sending after much of that.
    """

    topic: str
    partition: int
    builder: Any
    was_sent: bool = False
    answer: str | None = None


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
        self._is_abandoned = False
        self._watch_requests()

    async def start(self) -> None:
        """Connect and take a producer id. Raises SendFailed, TopicRefused; the producer is to be closed then too."""
        try:
            async with asyncio.timeout(START_SECONDS):
                await self._driver.start()
        except TimeoutError as error:
            raise SendFailed(f"no connection, or no producer id, in {START_SECONDS:g} s") from error
        except ClusterAuthorizationFailedError as error:
            # KIP-679: who may write any topic gets a producer id.
            reason = "may write no topic, or lacks IdempotentWrite on a cluster older than Kafka 2.8"
            raise TopicRefused(f"{self._user} {reason}: {text_of(error, self._config)}") from error
        except (KafkaError, OSError) as error:
            raise SendFailed(f"no connection: {await explain(error, self._config)}") from error

    async def partitions(self, topic: str, patience: Patience, *, at_least: int) -> list[int]:
        """Tell the topic's partitions, making it where the server makes topics by use.

        Right after such a topic was asked for, the server calls it unknown just like one that will never be; that is
        believed when the patience is over. Whoever knows fewer than `at_least`, which another producer has seen, asks
        anew. Raises TopicRefused, SendFailed.
        """
        if 0 < len(self._known_partitions(topic)) < at_least:
            await self._driver.client.force_metadata_update()
        while not self._known_partitions(topic):
            try:
                await self._ask_for(topic, patience)
            except (KafkaError, OSError, TimeoutError) as error:
                raise SendFailed(f"no metadata: {text_of(error, self._config)}") from error
        patience.found(topic)
        return self._known_partitions(topic)

    async def find_leader(self, topic: str, partition: int, patience: Patience) -> None:
        """Wait until the leader of the partition is connected. Raises NoLeader when the patience is over."""
        where = TopicPartition(topic, partition)
        while not await self._reaches_leader(where):
            if patience.is_over(where):
                raise NoLeader(f"no leader of partition {partition} of {topic} can be reached")
            await self._driver.client.force_metadata_update()
            await asyncio.sleep(_POLL_SECONDS)
        patience.found(where)

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
        except ABOUT_MESSAGE as error:
            raise MessageRefused(describe(error.errno)) from error
        except ABOUT_TOPIC as error:
            raise self._refusal(sending.topic, error.errno) from error
        # The driver asserts that the partition is there: a topic that was made anew may have fewer.
        except (KafkaError, OSError, TimeoutError, AssertionError) as error:
            raise SendFailed(sending.answer or text_of(error, self._config)) from error
        except asyncio.CancelledError:
            self.abandon()
            raise
        finally:
            del self._sendings[sending.builder]

    def abandon(self) -> None:
        """End all sending now: what is not `was_sent` when this returns will never be."""
        self._is_abandoned = True
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

    def _known_partitions(self, topic: str) -> list[int]:
        return sorted(self._driver.client.cluster.partitions_for_topic(topic) or ())

    async def _reaches_leader(self, where: TopicPartition) -> bool:
        client = self._driver.client
        leader = client.cluster.leader_for_partition(where)
        return leader not in (None, _NOBODY) and await client.ready(leader)

    async def _ask_for(self, topic: str, patience: Patience) -> None:
        client = self._driver.client
        answer = await client.send(client.get_random_node(), MetadataRequest([topic]))
        code = next((code for code, name, *_ in answer.topics if name == topic), UnknownTopicOrPartitionError.errno)
        error = for_code(code)
        if error is NoError:
            await self._driver.partitions_for(topic)
        elif error in ABOUT_TOPIC:
            raise self._refusal(topic, code)
        elif not patience.is_over(topic):
            await asyncio.sleep(_POLL_SECONDS)
        elif error.retriable and error is not UnknownTopicOrPartitionError:
            raise SendFailed(f"no metadata: {describe(code)}")
        else:
            raise self._refusal(topic, code)

    def _refusal(self, topic: str, code: int) -> TopicRefused:
        return TopicRefused(f"{topic}, as {self._user}: {describe(code)}")

    def _watch_requests(self) -> None:
        """Learn which batches were handed to a connection, and what was answered, which the driver does not tell.

        Its sender runs one task per produce request; within it, a request is sent in the same step in which its
        connection is found ready.
        """
        sender, client = self._driver._sender, self._driver.client
        run_request, send = sender._send_produce_req, client.send

        async def run_watched(node_id: Any, batches: Any) -> None:
            # A task that was made and not begun is in nobody's books, and its sender waits for it even when cancelled.
            if self._is_abandoned:
                return
            task = asyncio.current_task()
            sendings = (self._sendings.get(batch._builder) for batch in batches.values())
            self._requests[task] = [sending for sending in sendings if sending is not None]
            try:
                await run_request(node_id, batches)
            finally:
                del self._requests[task]

        async def send_watched(node_id: Any, request: Any, **options: Any) -> Any:
            sendings = self._requests.get(asyncio.current_task(), ())
            if sendings and not await client.ready(node_id):
                raise NodeNotReadyError(f"node {node_id} is not connected")
            for sending in sendings:
                sending.was_sent = True
            answer = await send(node_id, request, **options)
            for sending in sendings:
                sending.answer = _answer_to(sending, answer)
            return answer

        sender._send_produce_req, client.send = run_watched, send_watched


def _answer_to(sending: Sending, answer: Any) -> str | None:
    codes = {(topic, partition): code for topic, parts in answer.topics for partition, code, *_ in parts}
    code = codes.get((sending.topic, sending.partition), NoError.errno)
    return None if code == NoError.errno else describe(code)


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
