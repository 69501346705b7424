"""The time from the call of `transact` to the arrival of its event in a Redis stream, at 200 commits a second.

That is more than the way from the commit to the broker, which begins when the call is half over: an event may arrive
before the commit is acknowledged.

The yardstick is the budget: 5 ms at the median, 25 ms at the 99th percentile; with one process, and with two more that
relay most of the slices.
"""

import asyncio
import json
import multiprocessing
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from redis.asyncio import Redis

from benchmarks.loop import run
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
        alone = await _through_the_outbox(postgresql.address, redis.address, other_relays=0)
        shared = await _through_the_outbox(postgresql.address, redis.address, other_relays=2)
    return [
        *_budgets("transact to broker, one process", alone),
        *_budgets("transact to broker, two more relaying", shared),
    ]


def _budgets(name: str, measured: list[float]) -> list[Ratio]:
    return [
        Ratio(f"{name}: budget for p50", 5.0, _percentile(measured, 0.50), "ms", "p50, measured", 1.0),
        Ratio(f"{name}: budget for p99", 25.0, _percentile(measured, 0.99), "ms", "p99, measured", 1.0),
    ]


async def _through_the_outbox(url: str, redis_url: str, *, other_relays: int) -> list[float]:
    """Commit in this process; its relay shares the slices with those of other processes, which hear by NOTIFY."""
    topic = f"latency-{secrets.token_hex(4)}"
    components = _components(url, redis_url, topic)
    spawning = multiprocessing.get_context("spawn")
    others = [spawning.Process(target=_relay, args=(components,)) for _ in range(other_relays)]
    try:
        for other in others:
            other.start()
        async with Runtime.open(components, app_id="latency") as runtime:
            store = runtime.state("statestore")
            await _shared_among(runtime, 1 + other_relays)

            async def commit(number: int) -> None:
                await store.transact([upsert(f"key-{number % 500}", number)])

            return await _latencies(redis_url, topic, commit)
    finally:
        for other in others:
            other.kill()
            other.join()


def _relay(components: list[Component]) -> None:
    run(_relay_for_ever(components))


async def _relay_for_ever(components: list[Component]) -> None:
    async with Runtime.open(components, app_id="latency"):
        await asyncio.Event().wait()


async def _shared_among(runtime: Runtime, relays: int) -> None:
    owners: set[str | None] = set()
    while len(owners) < relays or None in owners:
        await asyncio.sleep(0.05)
        owners = {each.owner for each in await runtime.outbox_status("statestore")}


def _components(url: str, redis_url: str, topic: str) -> list[Component]:
    return [
        Component(
            "statestore",
            "state.postgresql",
            "v2",
            {"connectionString": url, "outboxPublishPubsub": "bus", "outboxPublishTopic": topic},
        ),
        Component("bus", "pubsub.redis", metadata={"redisHost": urlsplit(redis_url).netloc}),
    ]


async def _latencies(redis_url: str, topic: str, write: Callable[[int], Awaitable[None]]) -> list[float]:
    """Write at the given rate while a reader waits for what arrives; return sorted milliseconds."""
    called: dict[int, float] = {}
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
        called[number] = time.perf_counter()
        await write(number)

    async with asyncio.TaskGroup() as group:
        group.create_task(watch())
        started = time.perf_counter()
        for number in range(COUNT):
            await asyncio.sleep(started + number / PER_SECOND - time.perf_counter())
            group.create_task(write_one(number))
    measured = range(WARM_UP, COUNT)
    return sorted((arrived[number] - called[number]) * 1e3 for number in measured)


def _percentile(values: list[float], share: float) -> float:
    return values[min(int(len(values) * share), len(values) - 1)]


if __name__ == "__main__":
    for each in run(measure()):
        print(f"{each.name}: {each.ours:.2f} {each.unit}, {each.yardstick_name} {each.yardstick:.2f} {each.unit}")
