"""Kafka for tests in which it goes away: a consumer that stays would ask for it all the time, and log that."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import orjson
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from statecast import Component
from tests.crash.arena import PUBSUB, Arena, Envelope, write_components

PARTITIONS = 3


@asynccontextmanager
async def fickle_kafka_arena(
    store: Component, bootstrap: str, topic: str, folder: Path, *, replicas: int = 1
) -> AsyncIterator[Arena]:
    """Publish to Kafka, to a new topic that is connected to only while it is read."""
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(topic, PARTITIONS, replicas)])
    finally:
        await admin.close()
    broker = Component(PUBSUB, "pubsub.kafka", "v1", {"brokers": bootstrap, "authType": "none"})
    yield Arena(write_components(folder, store, broker, topic), store, FickleTopic(bootstrap, topic))


class FickleTopic:
    def __init__(self, bootstrap: str, topic: str) -> None:
        self._bootstrap = bootstrap
        self._positions = {TopicPartition(topic, number): 0 for number in range(PARTITIONS)}
        self._found: list[Envelope] = []

    async def read(self) -> list[Envelope]:
        """Read what is new behind what was read before. Raises KafkaError; then the next read goes on."""
        consumer = AIOKafkaConsumer(bootstrap_servers=self._bootstrap, enable_auto_commit=False)
        await consumer.start()
        try:
            consumer.assign(list(self._positions))
            for partition, position in self._positions.items():
                consumer.seek(partition, position)
            await self._read_on(consumer)
        finally:
            await consumer.stop()
        return self._found

    async def _read_on(self, consumer: AIOKafkaConsumer) -> None:
        ends = await consumer.end_offsets(list(self._positions))
        while [partition for partition, end in ends.items() if self._positions[partition] < end]:
            for partition, messages in (await consumer.getmany(timeout_ms=100)).items():
                self._found += [orjson.loads(message.value) for message in messages]
                self._positions[partition] = await consumer.position(partition)
