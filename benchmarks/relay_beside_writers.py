"""How fast a backlog is relayed from PostgreSQL to Redis Streams while 8 writers commit to the same log without pause.

The writers have a process of their own, as the relay has. One yardstick is what the plain drivers relay beside the same
writers, the other one the aim. A relay that is quick since it starves the writers would be none, so what they have left
of their own rate is told too.
"""

import asyncio
import multiprocessing
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import count

from benchmarks.backlog import APP, Backlog, Stopwatch, filled, relayed, relayed_by_plain_drivers
from benchmarks.loop import run
from benchmarks.ratio import Ratio
from statecast.clock import SystemClock
from statecast.components.state.commit import Commit, OutboxRecord, Upsert
from statecast.components.state.postgresql import PostgresqlStateStore
from statecast.runtime.servers import ServerKind, Servers

BACKLOG = 300_000
WRITERS = 8
KEYS = 5_000
ALONE_SECONDS = 5.0
AIM_PER_SECOND = 20_000.0
VALUE = b'{"total": 250, "items": ["%s"]}' % (b"x" * 100)
BODY = b'{"specversion": "1.0", "data": "%s"}' % (b"y" * 300)


async def measure() -> list[Ratio]:
    with Servers(durable=True) as servers:
        postgresql = await asyncio.to_thread(servers.get, ServerKind.POSTGRESQL)
        redis = await asyncio.to_thread(servers.get, ServerKind.REDIS)
        async with filled(postgresql.address, redis.address, BACKLOG) as backlog, _writers(backlog):
            alone = await _written_per_second(backlog)
            plain = await relayed_by_plain_drivers(backlog)
            ours = await relayed(backlog)
    name = f"relay while {WRITERS} writers go on"
    return [
        Ratio(name, ours.per_second, AIM_PER_SECOND, "events/s", "20,000 a second", 1.0),
        Ratio(name, ours.per_second, plain.per_second, "events/s", "plain drivers, paging by id", 0.5),
        Ratio(f"{WRITERS} writers, relayed", ours.written_per_second, alone, "commits/s", "not relayed", 0.3),
    ]


async def _written_per_second(backlog: Backlog) -> float:
    stopwatch = await Stopwatch.start(backlog)
    await asyncio.sleep(ALONE_SECONDS)
    _, written_per_second = await stopwatch.stop()
    return written_per_second


@asynccontextmanager
async def _writers(backlog: Backlog) -> AsyncIterator[None]:
    """Let a process write from the moment that its first commits are made."""
    process = multiprocessing.get_context("spawn").Process(target=_write, args=(backlog,))
    first = await backlog.last_id()
    process.start()
    try:
        while await backlog.last_id() < first + 100 * WRITERS:
            if not process.is_alive():
                raise RuntimeError("the writers ended")
            await asyncio.sleep(0.05)
        yield
    finally:
        process.kill()
        await asyncio.to_thread(process.join)


def _write(backlog: Backlog) -> None:
    run(_write_for_ever(backlog))


async def _write_for_ever(backlog: Backlog) -> None:
    numbers = count()
    async with (
        PostgresqlStateStore(backlog.store, app_id=APP, clock=SystemClock()) as store,
        asyncio.TaskGroup() as group,
    ):
        for _ in range(WRITERS):
            group.create_task(_write_one_by_one(store, backlog.name, numbers))


async def _write_one_by_one(store: PostgresqlStateStore, topic: str, numbers: Iterator[int]) -> None:
    for number in numbers:
        key = f"{APP}||order-{number % KEYS}"
        record = OutboxRecord(order_key=key, event_id=f"written-{number}", pubsub="bus", topic=topic, body=BODY)
        await store.transact(Commit((Upsert(key, VALUE),), (record,)))
