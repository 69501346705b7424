"""What tests on a Kafka are made of: a broker for it, and topics with settings of their own."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from statecast.clock import SystemClock
from statecast.components.broker.kafka.broker import KafkaBroker
from statecast.components.manifest import Component
from statecast.runtime.server_containers import KAFKA_ENVIRONMENT
from statecast.runtime.server_installations import KAFKA_SETTINGS


def kafka_broker(address: str, **metadata: str) -> KafkaBroker:
    fields = {"brokers": address, "authType": "none", "heartbeatInterval": "300ms", **metadata}
    component = Component(name="pubsub", type="pubsub.kafka", metadata=fields)
    return KafkaBroker(component, app_id="orders", clock=SystemClock())


@asynccontextmanager
async def administrator(address: str) -> AsyncIterator[AIOKafkaAdminClient]:
    client = AIOKafkaAdminClient(bootstrap_servers=address)
    await client.start()
    try:
        yield client
    finally:
        await client.close()


async def make_topic(address: str, topic: str, *, partitions: int = 1, **config: str) -> None:
    async with administrator(address) as client:
        settings = {name.replace("_", "."): value for name, value in config.items()}
        await client.create_topics([NewTopic(topic, partitions, 1, topic_configs=settings)])


def make_no_topics_by_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the servers that are started from now on make no topic because somebody asks for it."""
    monkeypatch.setitem(KAFKA_SETTINGS, "auto.create.topics.enable", "false")
    monkeypatch.setitem(KAFKA_ENVIRONMENT, "KAFKA_AUTO_CREATE_TOPICS_ENABLE", "false")
