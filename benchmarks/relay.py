"""How fast a backlog is relayed from PostgreSQL to Redis Streams, whether a large one is as fast as a small one, and
how much memory a process takes that relays a large one.

The yardstick is the least that any relay must do: page through the rows by id and XADD them in pipelines, with the
plain drivers, without leases, positions or order. Of a small backlog, which is over in seconds, the median of some
rounds counts, after one that warms the servers up.
"""

import asyncio
from statistics import median

from benchmarks.backlog import filled, relayed, relayed_by_plain_drivers
from benchmarks.ratio import Ratio
from statecast.runtime.servers import ServerKind, Servers

SMALL, LARGE = 100_000, 2_000_000
ROUNDS = 3
AIM_PER_SECOND = 20_000.0
AIM_MEGABYTES = 200.0


async def measure() -> list[Ratio]:
    with Servers(durable=True) as servers:
        postgresql = (await asyncio.to_thread(servers.get, ServerKind.POSTGRESQL)).address
        redis = (await asyncio.to_thread(servers.get, ServerKind.REDIS)).address
        await _relay_small(postgresql, redis)
        rounds = [await _relay_small(postgresql, redis) for _ in range(ROUNDS)]
        small, plain = map(median, zip(*rounds, strict=True))
        async with filled(postgresql, redis, LARGE) as backlog:
            large = await relayed(backlog)
    name, aim = "relay of 2,000,000 events", "20,000 a second"
    return [
        Ratio("relay of 100,000 events", small, AIM_PER_SECOND, "events/s", aim, 1.0),
        Ratio("relay of 100,000 events", small, plain, "events/s", "plain drivers", 0.5),
        Ratio(name, large.per_second, AIM_PER_SECOND, "events/s", aim, 1.0),
        Ratio(name, large.per_second, small, "events/s", "relay of 100,000", 0.9),
        Ratio(f"{name}: budget", AIM_MEGABYTES, large.peak_bytes / 1e6, "MB resident", "peak, measured", 1.0),
    ]


async def _relay_small(postgresql: str, redis: str) -> tuple[float, float]:
    """Relay a backlog with the plain drivers, then as we do; return our rate and theirs."""
    async with filled(postgresql, redis, SMALL) as backlog:
        plain = await relayed_by_plain_drivers(backlog)
        return (await relayed(backlog)).per_second, plain.per_second
