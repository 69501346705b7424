"""One call of `publish`: what is stored, what is not, and what is to be sent again."""

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache

from aiokafka.partitioner import murmur2

from statecast.components.broker.broker import Message, Outcome, Published, Refused, Unknown, Unreachable
from statecast.components.broker.kafka.pool import ProducerPool
from statecast.components.broker.kafka.producer import MessageRefused, NoLeader, Producer, SendFailed, TopicRefused
from statecast.components.broker.kafka.queue import Batch, PartitionQueue
from statecast.components.broker.kafka.records import PARTITION_NUMBER, Record, encode, key_of
from statecast.components.broker.kafka.topics import TopicMemory

BATCH_BYTES = 1_000_000
"""A little less than the 1,048,588 bytes that a topic takes unless it says otherwise."""

# Kafka's Topic.MAX_NAME_LENGTH
LONGEST_TOPIC_NAME = 249

_HELD_BACK = Unreachable("held back: an earlier message of its key was not published")
_NOT_SENT = Unreachable("not sent in time")


class Publication:
    """Sends in rounds, each with a producer of its own that is thrown away when anything in it went wrong.

    In a round every partition has one batch on its way at a time. Two would not do: when the server refuses the first,
    it may take the second, which overtakes what was before it. What a refusal left unsent goes into the next round.
    """

    def __init__(self, messages: Sequence[Message], max_message_bytes: int, memory: TopicMemory) -> None:
        self._outcomes: list[Outcome | None] = [None] * len(messages)
        self._memory = memory
        self._limit = min(BATCH_BYTES, max_message_bytes)
        self._unrouted: dict[str, list[Record]] = defaultdict(list)
        self._queues: list[PartitionQueue] = []
        self._encode(messages, max_message_bytes)

    def outcomes(self) -> list[Outcome]:
        """Tell the outcomes as they are now; what is undecided was not sent."""
        return [outcome or _NOT_SENT for outcome in self._outcomes]

    async def send(self, pool: ProducerPool) -> None:
        """Send until every message has an outcome. May be cancelled at any time: then `outcomes` holds just as well."""
        while self._unrouted or self._queues:
            try:
                producer = await pool.borrow()
            except SendFailed as error:
                return self._give_up(Unreachable(str(error)))
            except TopicRefused as error:
                return self._give_up(Refused(str(error), is_about_topic=True))
            try:
                is_well = await self._send_round(producer)
            except BaseException:
                pool.throw_away(producer)
                raise
            (pool.give_back if is_well else pool.throw_away)(producer)
        return None

    def _encode(self, messages: Sequence[Message], max_message_bytes: int) -> None:
        broken: set[tuple[str, str | None]] = set()
        for index, message in enumerate(messages):
            record = _encoded(index, message, max_message_bytes)
            if isinstance(record, Refused):
                self._outcomes[index] = record
                if (key := key_of(message)) is not None:
                    broken.add((message.topic, key))
            elif broken and (record.topic, record.key) in broken:
                self._outcomes[index] = _HELD_BACK
            else:
                self._unrouted[message.topic].append(record)

    async def _send_round(self, producer: Producer) -> bool:
        """Send what is to be sent; tell whether the producer can be used again."""
        topics, queues = list(self._unrouted), self._queues
        self._queues = []
        async with asyncio.TaskGroup() as tasks:
            sendings = [tasks.create_task(self._send_queue(producer, queue)) for queue in queues]
            sendings += [tasks.create_task(self._send_topic(producer, topic)) for topic in topics]
        return all(sending.result() for sending in sendings)

    async def _send_topic(self, producer: Producer, topic: str) -> bool:
        try:
            partitions = await producer.partitions(
                topic, self._memory.unknown, at_least=self._memory.partition_count.get(topic, 0)
            )
        except TopicRefused as error:
            self._decide(self._unrouted.pop(topic), Refused(str(error), is_about_topic=True))
            return True
        except SendFailed as error:
            self._decide(self._unrouted.pop(topic), Unreachable(str(error)))
            return False
        self._memory.partition_count[topic] = len(partitions)
        queues = _dealt_out(self._unrouted.pop(topic), topic, producer, partitions)
        if len(queues) == 1:
            return await self._send_queue(producer, queues[0])
        async with asyncio.TaskGroup() as tasks:
            sendings = [tasks.create_task(self._send_queue(producer, queue)) for queue in queues]
        return all(sending.result() for sending in sendings)

    async def _send_queue(self, producer: Producer, queue: PartitionQueue) -> bool:
        try:
            await producer.find_leader(queue.topic, queue.partition, self._memory.leaderless)
        except NoLeader as error:
            self._decide(queue.drop_all(), Unreachable(str(error)))
            return False
        while queue:
            batch = queue.take(
                self._memory.batch_bytes(queue.topic, self._limit),
                limit_count=self._memory.batch_count(queue.topic, queue.partition),
            )
            if not await self._send_batch(producer, queue, batch):
                if queue:
                    self._queues.append(queue)
                return False
        self._learn(queue)
        return True

    async def _send_batch(self, producer: Producer, queue: PartitionQueue, batch: Batch) -> bool:
        sending = producer.prepare(batch, queue.topic, queue.partition)
        try:
            await producer.send(sending)
        except MessageRefused as error:
            self._refuse(queue, batch, str(error))
        except TopicRefused as error:
            self._decide((*batch, *queue.drop_all()), Refused(str(error), is_about_topic=True))
        except SendFailed as error:
            reason = str(error)
            self._decide(batch, Unknown(reason) if sending.was_sent else Unreachable(reason))
            self._hold_back(queue, batch)
        except asyncio.CancelledError:
            if sending.was_sent:
                self._decide(batch, Unknown(f"sent, and not acknowledged in time: {sending.answer or 'no answer'}"))
            raise
        else:
            self._decide(batch, Published())
            self._memory.trust_more(queue.topic, queue.partition)
            return True
        return False

    def _refuse(self, queue: PartitionQueue, batch: Batch, reason: str) -> None:
        if len(batch) > 1:
            queue.split(batch)
            self._memory.suspect(queue.topic, queue.partition, len(batch))
            return
        queue.has_culprit = True
        self._memory.trust_again(queue.topic, queue.partition)
        self._decide(batch, Refused(reason))
        self._hold_back(queue, batch)

    def _hold_back(self, queue: PartitionQueue, batch: Batch) -> None:
        self._decide(queue.drop_keys(record.key for record in batch), _HELD_BACK)

    def _learn(self, queue: PartitionQueue) -> None:
        self._memory.trust_again(queue.topic, queue.partition)
        if queue.was_split and not queue.has_culprit:
            self._memory.halve_bytes(queue.topic, self._limit)

    def _give_up(self, outcome: Outcome) -> None:
        for topic in list(self._unrouted):
            self._decide(self._unrouted.pop(topic), outcome)
        for queue in self._queues:
            self._decide(queue.drop_all(), outcome)
        self._queues = []

    def _decide(self, records: Iterable[Record], outcome: Outcome) -> None:
        for record in records:
            self._outcomes[record.index] = outcome


def _encoded(index: int, message: Message, max_message_bytes: int) -> Record | Refused:
    """Encode the message, or refuse what the driver cannot write down, and what is not allowed or not supported."""
    if not (message.topic.isascii() and 0 < len(message.topic) <= LONGEST_TOPIC_NAME):
        return Refused(f"{message.topic!r} is no name of a topic", is_about_topic=True)
    if PARTITION_NUMBER in message.metadata:
        return Refused(
            f"{PARTITION_NUMBER} is not supported: messages of one key stay in order by going to one partition"
        )
    try:
        record = encode(index, message)
    except UnicodeEncodeError as error:
        return Refused(f"its key or metadata is not UTF-8: {error.reason}")
    if record.size > max_message_bytes:
        return Refused(f"the message takes {record.size} bytes; maxMessageBytes is {max_message_bytes}")
    return record


def _dealt_out(
    records: Iterable[Record], topic: str, producer: Producer, partitions: Sequence[int]
) -> list[PartitionQueue]:
    """Deal the records out to their partitions. Those without a key go to one together, which makes larger batches."""
    by_partition: dict[int, list[Record]] = defaultdict(list)
    keyless: int | None = None
    for record in records:
        if record.key_bytes is not None:
            partition = partitions[_hash(record.key_bytes) % len(partitions)]
        elif keyless is None:
            partition = keyless = producer.any_partition(topic)
        else:
            partition = keyless
        by_partition[partition].append(record)
    return [PartitionQueue(topic, partition, dealt) for partition, dealt in by_partition.items()]


@lru_cache(maxsize=16_384)
def _hash(key: bytes) -> int:
    """Hash a key as Kafka's Java clients do, so that it has one partition whoever publishes it."""
    return int(murmur2(key)) & 0x7FFFFFFF
