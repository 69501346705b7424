"""How fast a backlog is relayed from PostgreSQL to Redis Streams, and whether a large one is as fast as a small one.

The yardstick is the least that any relay must do: page through the rows by id and XADD them in pipelines, with the
plain drivers, without leases, positions or order.
"""

import asyncio
import secrets
import time
from urllib.parse import urlsplit

import asyncpg
from redis.asyncio import Redis

from benchmarks.ratio import Ratio
from statecast.clock import SystemClock
from statecast.components.broker.redis.broker import RedisBroker
from statecast.components.manifest import Component
from statecast.components.state.postgresql import PostgresqlStateStore
from statecast.outbox.relay import Relay
from statecast.runtime.servers import ServerKind, Servers

SMALL, LARGE = 100_000, 2_000_000
ROWS_PER_COMMIT = 1_000
PAGE = 1_000
AIM_PER_SECOND = 20_000.0
BODY = b'{"specversion": "1.0", "id": "1", "source": "bench", "type": "T", "data": "%s"}' % (b"y" * 250)

_FILL = """
insert into {outbox} (slice, order_key, event_id, format, pubsub, topic, metadata, body)
select n % 16, 'bench||' || n % 5000, 'bench-' || n, 1, 'bus', $3, '{{"partitionKey": "1"}}', $4
from generate_series($1::int, $2::int) n
"""


async def measure() -> list[Ratio]:
    with Servers(durable=True) as servers:
        postgresql = await asyncio.to_thread(servers.get, ServerKind.POSTGRESQL)
        redis = await asyncio.to_thread(servers.get, ServerKind.REDIS)
        yardstick = await _plain_rate(postgresql.address, redis.address, SMALL)
        small = await _relay_rate(postgresql.address, redis.address, SMALL)
        large = await _relay_rate(postgresql.address, redis.address, LARGE)
    return [
        Ratio("relay of 100,000 events", small, yardstick, "events/s", "plain drivers, paging by id", 0.5),
        Ratio("relay of 2,000,000 events", large, small, "events/s", "relay of 100,000", 0.9),
        Ratio("relay of 2,000,000 events", large, AIM_PER_SECOND, "events/s", "20,000 a second", 1.0),
    ]


async def _relay_rate(url: str, redis_url: str, count: int) -> float:
    """Fill a log of its own with `count` events and relay them; return events per second."""
    name, clock = f"bench-{secrets.token_hex(4)}", SystemClock()
    component = Component(name, "state.postgresql", "v2", {"connectionString": url})
    bus = Component("bus", "pubsub.redis", metadata={"redisHost": urlsplit(redis_url).netloc})
    async with (
        PostgresqlStateStore(component, app_id="bench", clock=clock) as store,
        RedisBroker(bus, app_id="bench", clock=clock) as broker,
    ):
        await _fill(url, name, count)
        relay = Relay(store.log, {"bus": broker}, name=name, clock=clock)
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            started = time.perf_counter()
            group.create_task(relay.run(stop))
            while relay.counts.published < count:  # noqa: ASYNC110 - what is measured has no event to set
                await asyncio.sleep(0.02)
            rate = count / (time.perf_counter() - started)
            stop.set()
    await _forget(redis_url, name)
    return rate


async def _plain_rate(url: str, redis_url: str, count: int) -> float:
    name = f"bench-{secrets.token_hex(4)}"
    component = Component(name, "state.postgresql", "v2", {"connectionString": url})
    async with PostgresqlStateStore(component, app_id="bench", clock=SystemClock()):
        await _fill(url, name, count)
    connection = await asyncpg.connect(url)
    redis = Redis.from_url(redis_url)
    statement = await connection.prepare(
        f"select * from {await _outbox(connection, name)} where id > $1 order by id limit {PAGE}"
    )
    started = time.perf_counter()
    last = 0
    while rows := await statement.fetch(last):
        pipeline = redis.pipeline(transaction=False)
        for row in rows:
            pipeline.xadd(row["topic"], {"data": row["body"]})
        await pipeline.execute()
        last = rows[-1]["id"]
    rate = count / (time.perf_counter() - started)
    await connection.close()
    await redis.aclose()
    await _forget(redis_url, name)
    return rate


async def _fill(url: str, name: str, count: int) -> None:
    connection = await asyncpg.connect(url)
    statement = await connection.prepare(_FILL.format(outbox=await _outbox(connection, name)))
    for first in range(0, count, ROWS_PER_COMMIT):
        await statement.fetch(first, min(first + ROWS_PER_COMMIT, count) - 1, name, BODY)
    await connection.execute("vacuum analyze")
    await connection.close()


async def _outbox(connection: asyncpg.Connection, name: str) -> str:
    number = await connection.fetchval("select log from statecast_log where component = $1", name)
    return f"statecast_outbox_{number}"


async def _forget(redis_url: str, stream: str) -> None:
    redis = Redis.from_url(redis_url)
    await redis.unlink(stream)
    await redis.aclose()


if __name__ == "__main__":
    for each in asyncio.run(measure()):
        print(f"{each.name}: {each.ours:.0f} {each.unit}, {each.value:.2f}x {each.yardstick_name}")
