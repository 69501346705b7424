"""The time from a commit's acknowledgement to its event's arrival in a Redis stream, at 200 commits a second.

The yardstick is the budget: 5 ms at the median, 25 ms at the 99th percentile. Beside it stands what the broker alone
takes: an XADD by the plain driver, seen by the same blocking reader.
"""

import asyncio
import json
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from redis.asyncio import Redis

from benchmarks.ratio import Ratio
from statecast.components.manifest import Component
from statecast.components.state.value import upsert
from statecast.runtime.app import Runtime
from statecast.runtime.servers import ServerKind, Servers

PER_SECOND = 200
COUNT = 2_000
WARM_UP = 200


async def measure() -> list[Ratio]:
    with Servers(durable=True) as servers:
        postgresql = await asyncio.to_thread(servers.get, ServerKind.POSTGRESQL)
        redis = await asyncio.to_thread(servers.get, ServerKind.REDIS)
        ours = await _through_the_outbox(postgresql.address, redis.address)
        plain = await _straight_to_the_broker(redis.address)
    return [
        Ratio("commit to broker, p50 within its budget", 5.0, _percentile(ours, 0.50), "ms", "p50, measured", 1.0),
        Ratio("commit to broker, p99 within its budget", 25.0, _percentile(ours, 0.99), "ms", "p99, measured", 1.0),
        Ratio("XADD alone, p50", _percentile(plain, 0.50), _percentile(ours, 0.50), "ms", "commit to broker", 0.0),
    ]


async def _through_the_outbox(url: str, redis_url: str) -> list[float]:
    topic = f"latency-{secrets.token_hex(4)}"
    components = [
        Component(
            "statestore",
            "state.postgresql",
            "v2",
            {"connectionString": url, "outboxPublishPubsub": "bus", "outboxPublishTopic": topic},
        ),
        Component("bus", "pubsub.redis", metadata={"redisHost": urlsplit(redis_url).netloc}),
    ]
    async with Runtime.open(components, app_id="latency") as runtime:
        store = runtime.state("statestore")

        async def commit(number: int) -> None:
            await store.transact([upsert(f"key-{number % 500}", number)])

        return await _latencies(redis_url, topic, commit)


async def _straight_to_the_broker(redis_url: str) -> list[float]:
    topic = f"latency-{secrets.token_hex(4)}"
    async with Redis.from_url(redis_url) as redis:

        async def add(number: int) -> None:
            await redis.xadd(topic, {"data": json.dumps({"data": number})})

        return await _latencies(redis_url, topic, add)


async def _latencies(redis_url: str, topic: str, write: Callable[[int], Awaitable[None]]) -> list[float]:
    """Write at the given rate while a reader waits for what arrives; return sorted milliseconds."""
    written: dict[int, float] = {}
    arrived: dict[int, float] = {}

    async def watch() -> None:
        nonlocal arrived
        async with Redis.from_url(redis_url) as redis:
            last = b"0"
            while len(arrived) < COUNT:
                answer: Any = await redis.xread({topic: last}, count=100, block=1_000)
                now = time.perf_counter()
                for _, entries in answer:
                    arrived |= {json.loads(fields[b"data"])["data"]: now for _, fields in entries}
                    last = entries[-1][0]

    async def write_one(number: int) -> None:
        await write(number)
        written[number] = time.perf_counter()

    async with asyncio.TaskGroup() as group:
        group.create_task(watch())
        started = time.perf_counter()
        for number in range(COUNT):
            await asyncio.sleep(started + number / PER_SECOND - time.perf_counter())
            group.create_task(write_one(number))
    measured = range(WARM_UP, COUNT)
    return sorted(max(arrived[number] - written[number], 0.0) * 1e3 for number in measured)


def _percentile(values: list[float], share: float) -> float:
    return values[min(int(len(values) * share), len(values) - 1)]


if __name__ == "__main__":
    for each in asyncio.run(measure()):
        print(f"{each.name}: {each.ours:.2f} {each.unit}, {each.yardstick_name} {each.yardstick:.2f} {each.unit}")
