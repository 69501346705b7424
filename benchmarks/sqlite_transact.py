"""Commits of an upsert and its record by 32 tasks, beside aiosqlite that makes the same two inserts.

One yardstick commits every insert by itself, as code does that knows no transactions; the other one both together,
which is as much as statecast does. How much is spared depends on the disk: the quicker it syncs, the less.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Final
from uuid import uuid4

import aiosqlite

from benchmarks.loop import LOOPS, run
from benchmarks.ratio import Ratio
from statecast.clock import SystemClock
from statecast.components.manifest import Component
from statecast.components.state.commit import Commit, OutboxRecord, Upsert
from statecast.components.state.sqlite.state import SqliteStateStore

TASKS: Final = 32
SECONDS: Final = 0.7
ROUNDS: Final = 7
TARGET: Final = 15.0

VALUE: Final = b'{"orderId": "order-1", "total": 250, "currency": "EUR"}'
EVENT: Final = b'{"specversion": "1.0", "id": "outbox-1", "source": "orders", "data": ' + VALUE + b"}"

CommitOne = Callable[[int], Awaitable[object]]

_numbers = count()


async def measure() -> list[Ratio]:
    """Measure on each event loop: aiosqlite, which asks its thread for every statement, gains most by a quick one."""
    return [ratio for loop in LOOPS for ratio in await asyncio.to_thread(_measure_on, loop)]


def _measure_on(loop: str) -> list[Ratio]:
    return LOOPS[loop](_measure(loop))  # type: ignore[no-any-return]


async def _measure(loop: str) -> list[Ratio]:
    """Run both in turns on files in one folder, with a write-ahead log and `synchronous=FULL`.

    The disk's mood changes within seconds; what is compared are the medians of rounds that lie side by side.
    """
    with TemporaryDirectory() as folder:
        async with (
            _statecast(Path(folder, "ours.db")) as ours,
            _aiosqlite(Path(folder, "apart.db"), together=False) as apart,
            _aiosqlite(Path(folder, "together.db"), together=True) as together,
        ):
            rounds = [(await _rate(ours), await _rate(apart), await _rate(together)) for _ in range(ROUNDS)]
    rate, rate_apart, rate_together = (median(rates) for rates in zip(*rounds, strict=True))
    name = f"SQLite transact, 32 tasks, {loop}"
    return [
        Ratio(name, rate, rate_apart, "commits/s", "aiosqlite, a commit per operation", TARGET),
        Ratio(name, rate, rate_together, "commits/s", "aiosqlite, a commit per transaction", TARGET),
    ]


@asynccontextmanager
async def _statecast(path: Path) -> AsyncIterator[CommitOne]:
    component = Component("statestore", "state.sqlite", metadata={"connectionString": str(path)})
    async with SqliteStateStore(component, app_id="orders", clock=SystemClock()) as store:

        async def commit_one(number: int) -> None:
            key = f"orders||order-{number}"
            record = OutboxRecord(key, f"outbox-{number}", "pubsub", "orders", EVENT)
            await store.transact(Commit((Upsert(key, VALUE),), (record,)))

        yield commit_one


@asynccontextmanager
async def _aiosqlite(path: Path, *, together: bool) -> AsyncIterator[CommitOne]:
    async with aiosqlite.connect(path) as database:
        await database.execute("PRAGMA journal_mode = wal")
        await database.execute("PRAGMA synchronous = full")
        await database.execute("CREATE TABLE state (key TEXT PRIMARY KEY, value TEXT, is_binary BOOLEAN, etag TEXT)")
        await database.execute(
            """CREATE TABLE outbox (id INTEGER PRIMARY KEY AUTOINCREMENT, slice INTEGER, order_key TEXT,
            event_id TEXT, pubsub TEXT, topic TEXT, metadata TEXT, body BLOB)"""
        )
        await database.commit()
        # One connection has one transaction: two tasks inside of it would commit each other's halves.
        one_at_a_time = asyncio.Lock()

        async def commit_one(number: int) -> None:
            key = f"orders||order-{number}"
            async with one_at_a_time:
                await database.execute(
                    "INSERT OR REPLACE INTO state VALUES (?, ?, ?, ?)", (key, VALUE.decode(), False, str(uuid4()))
                )
                if not together:
                    await database.commit()
                await database.execute(
                    """INSERT INTO outbox (slice, order_key, event_id, pubsub, topic, metadata, body)
                    VALUES (?, ?, ?, ?, ?, ?, ?)""",
                    (number % 16, key, f"outbox-{number}", "pubsub", "orders", "{}", EVENT),
                )
                await database.commit()

        yield commit_one


async def _rate(commit_one: CommitOne) -> float:
    done = 0
    start = time.perf_counter()

    async def work() -> None:
        nonlocal done
        while time.perf_counter() - start < SECONDS:
            await commit_one(next(_numbers))
            done += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(TASKS):
            group.create_task(work())
    return done / (time.perf_counter() - start)


async def main() -> None:
    for ratio in await measure():
        print(
            f"{ratio.name}: {ratio.ours:,.0f} {ratio.unit}, {ratio.value:.1f}x {ratio.yardstick_name}"
            f" ({ratio.yardstick:,.0f}); target {ratio.target:g}x"
        )


if __name__ == "__main__":
    run(main())
