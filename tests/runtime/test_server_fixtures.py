"""The fixtures of tests/conftest.py: what they give is real, fresh and of the kind that was asked for."""

import asyncio
import uuid

import asyncpg
import pytest
from aiokafka import AIOKafkaProducer
from redis.asyncio import Redis


@pytest.mark.parametrize("round_", [1, 2])
async def test_every_test_gets_an_empty_postgresql_database(postgresql_url: str, round_: int) -> None:
    connection = await asyncpg.connect(postgresql_url)

    tables = await connection.fetchval("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'")
    await connection.execute("CREATE TABLE leftover (round int)")

    await connection.close()
    assert tables == 0


async def test_the_older_postgresql_is_the_oldest_that_is_supported(older_postgresql_url: str) -> None:
    connection = await asyncpg.connect(older_postgresql_url)

    version = connection.get_server_version()

    await connection.close()
    assert version.major == 15


@pytest.mark.parametrize("round_", range(17))
async def test_every_test_gets_an_empty_redis_database(redis_url: str, round_: int) -> None:
    async with Redis.from_url(redis_url) as redis:
        keys = await redis.dbsize()
        await redis.set("leftover", round_)

    assert keys == 0


async def test_the_older_redis_is_a_redis_7_or_a_valkey_that_says_so(older_redis_url: str) -> None:
    async with Redis.from_url(older_redis_url) as redis:
        facts = await redis.info("server")

    assert str(facts["redis_version"]).startswith("7.")


async def test_the_kafka_broker_takes_a_message(kafka_bootstrap: str) -> None:
    topic = f"taken-{uuid.uuid4()}"

    async with asyncio.timeout(60), AIOKafkaProducer(bootstrap_servers=kafka_bootstrap, acks="all") as producer:
        receipt = await producer.send_and_wait(topic, b"hello")

    assert (receipt.topic, receipt.offset) == (topic, 0)
