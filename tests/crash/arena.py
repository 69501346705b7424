"""Components on real servers, written to a folder that any number of processes open, and the topic as it stands."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast
from urllib.parse import urlsplit

import orjson
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from redis.asyncio import Redis

from statecast import Component

APP, STORE, PUBSUB, TOPIC = "shop", "statestore", "pubsub", "orders"

_OUTBOX = {"outboxPublishPubsub": PUBSUB, "outboxPublishTopic": TOPIC}

_PARTITIONS = 3

Envelope = dict[str, Any]


class Topic(Protocol):
    """What a broker has of a topic."""

    async def read(self) -> list[Envelope]:
        """Give every message from the first one on: those of one key in their order."""
        ...


@dataclass(frozen=True, slots=True)
class Arena:
    folder: Path
    store: Component
    topic: Topic


def postgresql_store(url: str) -> Component:
    return Component(STORE, "state.postgresql", "v2", {"connectionString": url})


def redis_store(url: str) -> Component:
    return Component(STORE, "state.redis", "v1", _redis_metadata(url))


def sqlite_store(path: Path) -> Component:
    return Component(STORE, "state.sqlite", "v1", {"connectionString": str(path)})


@asynccontextmanager
async def redis_arena(
    store: Component, url: str, folder: Path, *, publish_url: str | None = None
) -> AsyncIterator[Arena]:
    """Publish to Redis Streams, by way of `publish_url` if there is one."""
    client = Redis.from_url(url)
    try:
        broker = Component(PUBSUB, "pubsub.redis", "v1", _redis_metadata(publish_url or url))
        yield Arena(write_components(folder, store, broker, TOPIC), store, RedisTopic(client))
    finally:
        await client.aclose()


@asynccontextmanager
async def kafka_arena(store: Component, bootstrap: str, topic: str, folder: Path) -> AsyncIterator[Arena]:
    """Publish to Kafka, to a new topic."""
    await _make_topic(bootstrap, topic)
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, auto_offset_reset="earliest", enable_auto_commit=False)
    await consumer.start()
    try:
        consumer.assign([TopicPartition(topic, number) for number in range(_PARTITIONS)])
        broker = Component(PUBSUB, "pubsub.kafka", "v1", {"brokers": bootstrap, "authType": "none"})
        yield Arena(write_components(folder, store, broker, topic), store, KafkaTopic(consumer))
    finally:
        await consumer.stop()


class RedisTopic:
    def __init__(self, client: Redis) -> None:
        self._client = client
        self._found: list[Envelope] = []
        self._last = b"-"

    async def read(self) -> list[Envelope]:
        behind = self._last if self._last == b"-" else b"(" + self._last
        entries = cast(list[tuple[bytes, dict[bytes, bytes]]], await self._client.xrange(TOPIC, behind.decode(), "+"))
        for entry, fields in entries:
            self._found.append(orjson.loads(fields[b"data"]))
            self._last = entry
        return self._found


class KafkaTopic:
    """Each key is in one partition, so its messages come in their order whatever the partitions' turns are."""

    def __init__(self, consumer: AIOKafkaConsumer) -> None:
        self._consumer = consumer
        self._found: list[Envelope] = []

    async def read(self) -> list[Envelope]:
        ends = await self._consumer.end_offsets(list(self._consumer.assignment()))
        while [partition for partition, end in ends.items() if await self._consumer.position(partition) < end]:
            for messages in (await self._consumer.getmany(timeout_ms=100)).values():
                self._found += [orjson.loads(message.value) for message in messages]
        return self._found


def write_components(folder: Path, store: Component, broker: Component, topic: str) -> Path:
    """Write both as component files; the store has an outbox to the broker."""
    folder.mkdir()
    outbox = {**_OUTBOX, "outboxPublishTopic": topic}
    for component, more in ((store, outbox), (broker, {})):
        (folder / f"{component.name}.yaml").write_text(json.dumps(_document(component, more)))
    return folder


async def _make_topic(bootstrap: str, topic: str) -> None:
    client = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await client.start()
    try:
        await client.create_topics([NewTopic(topic, _PARTITIONS, 1)])
    finally:
        await client.close()


def _document(component: Component, more: Mapping[str, str]) -> dict[str, object]:
    fields = {**component.metadata, **more}
    return {
        "apiVersion": "dapr.io/v1alpha1",
        "kind": "Component",
        "metadata": {"name": component.name},
        "spec": {
            "type": component.type,
            "version": component.version,
            "metadata": [{"name": name, "value": value} for name, value in fields.items()],
        },
    }


def _redis_metadata(url: str) -> dict[str, str]:
    return {"redisHost": urlsplit(url).netloc, "redisDB": urlsplit(url).path.strip("/")}


async def until(fact: Callable[[], Awaitable[bool]], *, seconds: float) -> bool:
    """Tell whether `fact` comes to hold within so many seconds."""
    try:
        async with asyncio.timeout(seconds):
            while not await fact():  # noqa: ASYNC110 - neither a store nor a broker has an event to wait for
                await asyncio.sleep(0.1)
    except TimeoutError:
        return False
    return True
