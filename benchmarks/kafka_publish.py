"""Publishing to Kafka with an outcome per message, beside the driver's bare `send_batch`."""

import time
from datetime import timedelta
from typing import Any
from uuid import uuid4

from aiokafka import AIOKafkaProducer

from benchmarks.ratio import Ratio
from statecast.clock import SystemClock
from statecast.components.broker.broker import Message, Published
from statecast.components.broker.kafka.broker import KafkaBroker
from statecast.components.manifest import Component
from statecast.runtime.server import ServerKind
from statecast.runtime.servers import Servers

BODY = b"x" * 1024
BATCH = 1_000
BATCHES = 30
ROUNDS = 5


async def measure() -> list[Ratio]:
    """Publish batches of 1,000 messages of 1 KiB, one call after the other, in turn with the yardstick."""
    with Servers() as servers:
        address = servers.get(ServerKind.KAFKA).address
        ours, theirs = [], []
        for _ in range(ROUNDS):
            ours.append(await _publish_rate(address))
            theirs.append(await _send_batch_rate(address))
    return [
        Ratio("Kafka: publish 1,000 x 1 KiB", max(ours), max(theirs), "messages/s", "aiokafka send_batch", target=0.5)
    ]


async def _publish_rate(address: str) -> float:
    component = Component(name="pubsub", type="pubsub.kafka", metadata={"brokers": address, "authType": "none"})
    topic = f"bench-{uuid4().hex[:12]}"
    async with KafkaBroker(component, app_id="bench", clock=SystemClock()) as broker:
        await broker.publish([Message(topic, b"first")], timedelta(seconds=30))
        calls = [[Message(topic, BODY, key=f"order-{n % 100}") for n in range(BATCH)] for _ in range(BATCHES)]
        start = time.perf_counter()
        for messages in calls:
            assert await broker.publish(messages, timedelta(seconds=30)) == [Published()] * BATCH
        return BATCH * BATCHES / (time.perf_counter() - start)


async def _send_batch_rate(address: str) -> float:
    topic = f"bench-{uuid4().hex[:12]}"
    # The same guarantees and the same size of request, so that what differs is ours.
    producer: Any = AIOKafkaProducer(
        bootstrap_servers=address, acks="all", enable_idempotence=True, max_batch_size=1_000_000
    )
    await producer.start()
    try:
        await producer.send_and_wait(topic, b"first")
        start = time.perf_counter()
        for _ in range(BATCHES):
            await _send_thousand(producer, topic)
        return BATCH * BATCHES / (time.perf_counter() - start)
    finally:
        await producer.stop()


async def _send_thousand(producer: Any, topic: str) -> None:
    sent = 0
    while sent < BATCH:
        batch = producer.create_batch()
        while sent < BATCH and batch.append(timestamp=None, key=b"order-%d" % (sent % 100), value=BODY, headers=[]):
            sent += 1
        await (await producer.send_batch(batch, topic, partition=0))
