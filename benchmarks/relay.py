"""How fast a backlog is relayed from PostgreSQL to Redis Streams, whether a large one is as fast as a small one, and
how much memory a process takes that relays a large one.

The yardstick is the least that any relay must do: page through the rows by id and XADD them in pipelines, with the
plain drivers, without leases, positions or order.
"""

import asyncio

from benchmarks.backlog import filled, relayed, relayed_by_plain_drivers
from benchmarks.ratio import Ratio
from statecast.runtime.servers import ServerKind, Servers

SMALL, LARGE = 100_000, 2_000_000
AIM_PER_SECOND = 20_000.0
AIM_MEGABYTES = 200.0


async def measure() -> list[Ratio]:
    with Servers(durable=True) as servers:
        postgresql = await asyncio.to_thread(servers.get, ServerKind.POSTGRESQL)
        redis = await asyncio.to_thread(servers.get, ServerKind.REDIS)
        async with filled(postgresql.address, redis.address, SMALL) as backlog:
            plain = await relayed_by_plain_drivers(backlog)
            small = await relayed(backlog)
        async with filled(postgresql.address, redis.address, LARGE) as backlog:
            large = await relayed(backlog)
    name = "relay of 2,000,000 events"
    return [
        Ratio("relay of 100,000 events", small.per_second, plain.per_second, "events/s", "plain drivers", 0.5),
        Ratio(name, large.per_second, small.per_second, "events/s", "relay of 100,000", 0.9),
        Ratio(name, large.per_second, AIM_PER_SECOND, "events/s", "20,000 a second", 1.0),
        Ratio(f"{name}: budget", AIM_MEGABYTES, large.peak_bytes / 1e6, "MB resident", "peak, measured", 1.0),
    ]
