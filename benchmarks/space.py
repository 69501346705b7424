"""The space that an outbox on PostgreSQL takes while millions of events go through it, and how long its reads take.

A steady writer stays a little ahead of the reader. Meanwhile a transaction of another program's is left open for
minutes, and then a dump holds all tables for a while, which are emptied again only when it is done.
"""

import asyncio
import secrets
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from math import inf
from pathlib import Path
from statistics import median

import asyncpg

from benchmarks.ratio import Ratio
from statecast.clock import SystemClock
from statecast.components.manifest import Component
from statecast.components.state.log import OutboxLog
from statecast.components.state.postgresql import PostgresqlStateStore
from statecast.runtime.server import ServerKind, Variant
from statecast.runtime.server_installations import find_installation
from statecast.runtime.servers import Servers

_LEASE = timedelta(hours=1)
_BODY = b"y" * 300
AIM_SECONDS = 120.0

_WRITE = """
insert into {outbox} (slice, order_key, event_id, format, pubsub, topic, metadata, body)
select n % 16, 'bench||' || n % 5000, n::text, 1, 'bus', 'bench', '{{}}', $3
from generate_series($1::int, $2::int) n
"""


@dataclass(frozen=True, slots=True)
class SpacePlan:
    """So many events, the writer never more than `ahead` before the reader; shares of all tell when something is on.

    The writer writes `per_second`, or as fast as it can.
    """

    events: int
    ahead: int
    per_second: float = inf
    per_commit: int = 500
    persist_seconds: float = 0.25
    trim_seconds: float = 1.0
    foreign_transaction: tuple[float, float] = (0.2, 0.6)
    dump: tuple[float, float] = (0.65, 0.75)


@dataclass(frozen=True, slots=True)
class ForeignTransaction:
    """How long it was open, and the reads and advances that were meanwhile."""

    seconds: float
    reads: Sequence[float]
    advances: Sequence[float]


@dataclass(frozen=True, slots=True)
class Measure:
    """What the server tells when `share` of all events was read: the bytes of the outbox, how many of its rows were
    looked at so far, how many positions were persisted, and how many blocks were looked at for that."""

    share: float
    bytes: int
    rows: int
    persisted: int
    blocks: int


@dataclass(slots=True)
class SpaceReport:
    """What was measured in between, and seconds of every read and advance.

    `seen` has a 1 for each event that was read, `count` how many they are. `foreign` is there once it has ended.
    """

    seen: bytearray
    count: int = 0
    foreign: ForeignTransaction | None = None
    measures: list[Measure] = field(default_factory=list)
    reads: list[float] = field(default_factory=list)
    advances: list[float] = field(default_factory=list)

    @property
    def share(self) -> float:
        return self.count / len(self.seen)

    def add(self, event: int) -> None:
        self.count += not self.seen[event]
        self.seen[event] = 1

    def most_bytes(self, first: float, last: float) -> int:
        """Tell how large the outbox was at most, from when `first` of all events was read until `last` of them was."""
        return max(each.bytes for each in self._between(first, last))

    def usual_bytes(self, first: float, last: float) -> float:
        return median(each.bytes for each in self._between(first, last))

    @property
    def looks(self) -> float:
        """How often an event was looked at, in the mean."""
        return self.measures[-1].rows / self.count

    def blocks(self, first: float, last: float) -> float:
        """Tell how many blocks were looked at to persist the position of one slice, in the mean."""
        measures = self._between(first, last)
        return (measures[-1].blocks - measures[0].blocks) / (measures[-1].persisted - measures[0].persisted)

    def _between(self, first: float, last: float) -> list[Measure]:
        return [each for each in self.measures if first <= each.share <= last]


def slowdown(timings: Sequence[float]) -> float:
    """Divide the median of the last tenth by that of the first."""
    tenth = max(len(timings) // 10, 1)
    return median(timings[-tenth:]) / median(timings[:tenth])


async def measure() -> list[Ratio]:
    plan = SpacePlan(
        events=5_000_000, ahead=100_000, per_second=25_000, foreign_transaction=(0.1, 0.75), dump=(0.8, 0.88)
    )
    with Servers(durable=True) as servers:
        server = await asyncio.to_thread(servers.get, ServerKind.POSTGRESQL)
        report = await run_through(server.address, plan)
    assert report.foreign is not None
    begin, end = plan.foreign_transaction
    before, during = report.usual_bytes(0, begin), report.most_bytes(begin, end)
    after = report.usual_bytes(0.95, 1)
    foreign = report.foreign
    return [
        Ratio("foreign transaction, open", foreign.seconds, AIM_SECONDS, "s", "two minutes", 1.0),
        Ratio("outbox, usual before it", before, during, "bytes", "most while it is open", 0.3),
        Ratio("outbox, usual before it", before, after, "bytes", "usual at the end of 5M", 0.5),
        Ratio("read, first tenth of it", 1.0, slowdown(foreign.reads), "of its time", "last tenth of it", 0.5),
        Ratio("advance, first tenth of it", 1.0, slowdown(foreign.advances), "of its time", "last tenth of it", 0.5),
        Ratio("read, first tenth of 5M", 1.0, slowdown(report.reads), "of its time", "last tenth", 0.5),
        Ratio("advance, first tenth of 5M", 1.0, slowdown(report.advances), "of its time", "last tenth", 0.5),
    ]


async def run_through(url: str, plan: SpacePlan) -> SpaceReport:
    """Write and read all events of the plan, in a log of their own."""
    name, report = f"space-{secrets.token_hex(4)}", SpaceReport(bytearray(plan.events))
    component = Component(name, "state.postgresql", "v2", {"connectionString": url})
    async with (
        PostgresqlStateStore(component, app_id="bench", clock=SystemClock()) as store,
        asyncio.TaskGroup() as group,
    ):
        admin = await asyncpg.connect(url)
        outbox = f"statecast_outbox_{await admin.fetchval('select log from statecast_log where component = $1', name)}"
        group.create_task(_write(url, outbox, plan, report))
        group.create_task(_during(plan.foreign_transaction, report, lambda: _foreign_transaction(url, report)))
        group.create_task(_during(plan.dump, report, lambda: _dump(url)))
        await _read(store.log, plan, report, lambda: _measure(admin, outbox, report.share))
    while await admin.fetchval(_SESSIONS):  # noqa: ASYNC110 - they tell the last of what they did when they end
        await asyncio.sleep(0.01)
    report.measures.append(await _measure(admin, outbox, report.share))
    await admin.close()
    return report


async def _write(url: str, outbox: str, plan: SpacePlan, report: SpaceReport) -> None:
    connection = await asyncpg.connect(url)
    statement = await connection.prepare(_WRITE.format(outbox=outbox))
    started = time.perf_counter()
    for first in range(0, plan.events, plan.per_commit):
        await asyncio.sleep(started + first / plan.per_second - time.perf_counter())
        while first - report.count >= plan.ahead:  # noqa: ASYNC110 - what is measured has no event to wait for
            await asyncio.sleep(0.002)
        await statement.fetch(first, min(first + plan.per_commit, plan.events) - 1, _BODY)
    await connection.close()


async def _read(
    log: OutboxLog, plan: SpacePlan, report: SpaceReport, measure: Callable[[], Awaitable[Measure]]
) -> None:
    """Read like a relay whose broker takes no time: persist now and then, trim now and then."""
    leases = await log.acquire("reader", log.slices, _LEASE)
    persist_at = trim_at = 0.0
    while report.count < plan.events:
        began = time.perf_counter()
        batch = await log.read(leases, 1_000)
        leases = list(batch.leases)
        if batch.entries:
            report.reads.append(time.perf_counter() - began)
        for entry in batch.entries:
            report.add(int(entry.record.event_id))
        if time.perf_counter() >= persist_at:
            began = time.perf_counter()
            leases = await log.advance(leases, _LEASE)
            report.advances.append(time.perf_counter() - began)
            persist_at = time.perf_counter() + plan.persist_seconds
        if time.perf_counter() >= trim_at:
            await log.trim()
            report.measures.append(await measure())
            trim_at = time.perf_counter() + plan.trim_seconds
        if not batch.entries:
            await log.wait(leases, timedelta(milliseconds=20))


_MEASURE = """
select
  (select sum(pg_total_relation_size(oid))::bigint from pg_class where relkind = 'r' and relname like $1) as bytes,
  (select sum(seq_tup_read + idx_tup_fetch)::bigint from pg_stat_user_tables where relname like $1) as rows,
  (select n_tup_upd from pg_stat_user_tables where relname = 'statecast_slice') as persisted,
  (select heap_blks_hit + heap_blks_read + idx_blks_hit + idx_blks_read
    from pg_statio_user_tables where relname = 'statecast_slice') as blocks
"""

_SESSIONS = "select count(*) from pg_stat_activity where application_name = 'statecast bench'"


async def _measure(admin: asyncpg.Connection, outbox: str, share: float) -> Measure:
    """Ask the server, whose sessions tell what they looked at once a second."""
    row = await admin.fetchrow(_MEASURE, f"{outbox}\\_%")
    assert row is not None
    return Measure(share, *row)


async def _during(
    part: tuple[float, float], report: SpaceReport, open_it: Callable[[], AbstractAsyncContextManager[None]]
) -> None:
    """Have something on while that part of the events is read."""
    begin, end = part
    await _until(lambda: report.share >= begin)
    async with open_it():
        await _until(lambda: report.share >= end)


@asynccontextmanager
async def _foreign_transaction(url: str, report: SpaceReport) -> AsyncIterator[None]:
    """Leave a transaction open that has a number, so it has written, and a snapshot that keeps dead rows alive."""
    connection = await asyncpg.connect(url)
    async with connection.transaction(isolation="repeatable_read"):
        await connection.execute("select pg_current_xact_id()")
        started, reads, advances = time.perf_counter(), len(report.reads), len(report.advances)
        yield
    seconds = time.perf_counter() - started
    report.foreign = ForeignTransaction(seconds, report.reads[reads:], report.advances[advances:])
    await connection.close()


@asynccontextmanager
async def _dump(url: str) -> AsyncIterator[None]:
    """Let a dump run that nobody takes the output of, so that it holds all tables, half done."""
    place = find_installation(ServerKind.POSTGRESQL, Variant.CURRENT).place
    dump = await asyncio.create_subprocess_exec(
        Path(place, "pg_dump"), url, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        yield
    finally:
        if dump.returncode is not None:
            raise RuntimeError(f"the dump was done too early, with exit code {dump.returncode}")
        dump.kill()
        await dump.communicate()


async def _until(fact: Callable[[], bool]) -> None:
    while not fact():  # noqa: ASYNC110 - what is measured has no event to wait for
        await asyncio.sleep(0.005)


if __name__ == "__main__":
    for each in asyncio.run(measure()):
        print(f"{each.name}: {each.ours:.4g} {each.unit}, {each.value:.2f}x {each.yardstick_name}")
