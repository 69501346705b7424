"""A log of its own that is filled ahead, and what relays it to Redis Streams in a process of its own.

A process of its own has its own interpreter lock, and memory that tells what relaying takes and nothing else.
"""

import asyncio
import multiprocessing
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

import asyncpg
from redis.asyncio import Redis

from benchmarks.loop import run
from statecast.clock import SystemClock
from statecast.components.broker.redis.broker import RedisBroker
from statecast.components.manifest import Component
from statecast.components.state.postgresql import PostgresqlStateStore
from statecast.outbox.relay import Relay

APP = "bench"
ROWS_PER_COMMIT = 1_000
PAGE = 1_000
BODY = b'{"specversion": "1.0", "id": "1", "source": "bench", "type": "T", "data": "%s"}' % (b"y" * 250)

_FILL = """
insert into {outbox} (slice, order_key, event_id, format, pubsub, topic, metadata, body)
select n % 16, 'bench||' || n % 5000, 'bench-' || n, 1, 'bus', $3, '{{"partitionKey": "1"}}', $4
from generate_series($1::int, $2::int) n
"""


@dataclass(frozen=True, slots=True)
class Backlog:
    """`name` is that of the store, and so of the log, and of the stream; `keep` entries at least stay in the stream,
    or all of them if it is 0."""

    postgresql_url: str
    redis_url: str
    count: int
    keep: int
    name: str

    @property
    def store(self) -> Component:
        return Component(self.name, "state.postgresql", "v2", {"connectionString": self.postgresql_url})

    @property
    def bus(self) -> Component:
        metadata = {"redisHost": urlsplit(self.redis_url).netloc}
        return Component(
            "bus", "pubsub.redis", metadata=metadata | ({"maxLenApprox": str(self.keep)} if self.keep else {})
        )

    async def last_id(self) -> int:
        """Tell the id that was drawn last: how many events there are, those of writers too."""
        async with _connected(self.postgresql_url) as connection:
            last: int = await connection.fetchval(f"select last_value from {await outbox_of(connection, self.name)}_id")
            return last


@dataclass(frozen=True, slots=True)
class Stopwatch:
    """Measures the rate at which a backlog is relayed, and that at which others write."""

    backlog: Backlog
    started: float
    last_id: int

    @classmethod
    async def start(cls, backlog: Backlog) -> Self:
        last_id = await backlog.last_id()
        return cls(backlog, time.perf_counter(), last_id)

    async def stop(self) -> tuple[float, float]:
        seconds = time.perf_counter() - self.started
        return self.backlog.count / seconds, (await self.backlog.last_id() - self.last_id) / seconds


@dataclass(frozen=True, slots=True)
class Relayed:
    """How many events a second were relayed, and how many others written meanwhile; the most memory that the process
    ever had resident."""

    per_second: float
    written_per_second: float
    peak_bytes: int


@asynccontextmanager
async def filled(postgresql_url: str, redis_url: str, count: int, *, keep: int = 0) -> AsyncIterator[Backlog]:
    """Fill a log; at the end its tables are emptied, and its stream is gone."""
    backlog = Backlog(postgresql_url, redis_url, count, keep, f"bench-{secrets.token_hex(4)}")
    async with PostgresqlStateStore(backlog.store, app_id=APP, clock=SystemClock()):
        pass
    async with _connected(postgresql_url) as connection:
        outbox = await outbox_of(connection, backlog.name)
        statement = await connection.prepare(_FILL.format(outbox=outbox))
        for first in range(0, count, ROWS_PER_COMMIT):
            await statement.fetch(first, min(first + ROWS_PER_COMMIT, count) - 1, backlog.name, BODY)
        await connection.execute("vacuum analyze")
        # What the filling left to be written back would otherwise be written while others are measured.
        await connection.execute("checkpoint")
        yield backlog
        await connection.execute(f"truncate {outbox}")
    async with Redis.from_url(redis_url) as redis:
        await redis.unlink(backlog.name)


async def relayed(backlog: Backlog) -> Relayed:
    return await _in_a_process(_relay_here, backlog)


async def relayed_by_plain_drivers(backlog: Backlog) -> Relayed:
    """Do the least that any relay must: page through the rows by id and XADD them in pipelines, without leases,
    positions or order."""
    return await _in_a_process(_copy_here, backlog)


async def outbox_of(connection: asyncpg.Connection, name: str) -> str:
    number = await connection.fetchval("select log from statecast_log where component = $1", name)
    return f"statecast_outbox_{number}"


async def _in_a_process(work: Callable[[Backlog], Relayed], backlog: Backlog) -> Relayed:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return await asyncio.get_running_loop().run_in_executor(pool, work, backlog)


def _relay_here(backlog: Backlog) -> Relayed:
    return run(_relay(backlog))


def _copy_here(backlog: Backlog) -> Relayed:
    return run(_copy(backlog))


async def _relay(backlog: Backlog) -> Relayed:
    clock = SystemClock()
    async with (
        PostgresqlStateStore(backlog.store, app_id=APP, clock=clock) as store,
        RedisBroker(backlog.bus, app_id=APP, clock=clock) as broker,
        asyncio.TaskGroup() as group,
    ):
        relay = Relay(store.log, {"bus": broker}, name=backlog.name, clock=clock)
        stop = asyncio.Event()
        stopwatch = await Stopwatch.start(backlog)
        group.create_task(relay.run(stop))
        while relay.counts.published < backlog.count:  # noqa: ASYNC110 - what is measured has no event to set
            await asyncio.sleep(0.02)
        measured = await stopwatch.stop()
        stop.set()
    return Relayed(*measured, _peak_bytes())


async def _copy(backlog: Backlog) -> Relayed:
    async with _connected(backlog.postgresql_url) as connection, Redis.from_url(backlog.redis_url) as redis:
        statement = await connection.prepare(
            f"select * from {await outbox_of(connection, backlog.name)} where id > $1 order by id limit {PAGE}"
        )
        stopwatch = await Stopwatch.start(backlog)
        last = done = 0
        while done < backlog.count:
            rows = await statement.fetch(last)
            pipeline = redis.pipeline(transaction=False)
            for row in rows:
                pipeline.xadd(backlog.name, {"data": row["body"]}, maxlen=backlog.keep or None)
            await pipeline.execute()
            last, done = rows[-1]["id"], done + len(rows)
        measured = await stopwatch.stop()
    return Relayed(*measured, _peak_bytes())


def _peak_bytes() -> int:
    # Not ru_maxrss, which begins with what the process had that this one was forked from.
    (kibibytes,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kibibytes) * 1024


@asynccontextmanager
async def _connected(url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(url)
    try:
        yield connection
    finally:
        await connection.close()
