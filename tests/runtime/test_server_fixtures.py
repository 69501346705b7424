"""The fixtures of `statecast.testing.fixtures`: what they give is real, fresh and of the kind that was asked for."""

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


@pytest.mark.parametrize(("is_ci", "outcomes"), [("false", {"skipped": 2}), ("true", {"failed": 1, "errors": 1})])
def test_without_a_server_a_test_is_skipped_with_the_reason_and_fails_in_ci(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, is_ci: str, outcomes: dict[str, int]
) -> None:
    monkeypatch.setenv("CI", is_ci)
    monkeypatch.setenv("STATECAST_TEST_SERVERS", "docker")
    monkeypatch.delenv("STATECAST_TEST_REDIS_URL", raising=False)
    monkeypatch.setattr("statecast.runtime.servers.why_no_docker", lambda: "no Docker engine answers")
    pytester.makeconftest("pytest_plugins = ['statecast.testing.fixtures']")
    pytester.makepyfile(
        """
        from statecast.runtime.servers import ServerKind

        def test_on_redis(redis_metadata):
            raise AssertionError("there is no server")
        def test_alone(private_server):
            private_server(ServerKind.REDIS)
        """
    )

    result = pytester.runpytest_inprocess("-rs", "-o", "asyncio_default_fixture_loop_scope=function")

    result.assert_outcomes(**outcomes)
    result.stdout.fnmatch_lines(["*no Docker engine answers*", "redis: none;*no Docker engine answers"])
