"""A commit whose connection is cut, at whatever byte: its caller is told the truth, and it is never applied twice."""

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from enum import Enum
from hashlib import sha256
from typing import Protocol

import asyncpg
import pytest
from redis.asyncio import Redis

from statecast.clock import SystemClock
from statecast.components.state.commit import Commit, Mark, OutboxRecord, Upsert
from statecast.components.state.log import Lease
from statecast.components.state.postgresql.state import PostgresqlStateStore
from statecast.components.state.redis.state import RedisStateStore
from statecast.components.state.store import StateStore
from statecast.errors import Duplicate, OutcomeUnknown, StoreUnavailable
from tests.crash.arena import APP, postgresql_store, redis_store
from tests.crash.cutting_proxy import Cut, CuttingProxy, Ending, Side

HOUR = timedelta(hours=1)


class Told(Enum):
    """What the caller of a commit is told."""

    APPLIED = "applied"
    DUPLICATE = "duplicate"
    UNAVAILABLE = "unavailable"
    UNKNOWN = "unknown"


class Database(Protocol):
    """A real database, seen past the store."""

    def open(self, url: str) -> StateStore:
        """Make a store that is not open yet and reaches the database at `url`."""
        ...

    async def prepare(self, key: str) -> None:
        """Let the writes of a key that is new be counted."""
        ...

    async def writes(self, keys: Sequence[str]) -> list[int]:
        """Tell how often each of these keys was written; more than twice counts as twice."""
        ...


class PostgresqlDatabase:
    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection

    def open(self, url: str) -> StateStore:
        return PostgresqlStateStore(postgresql_store(url), app_id=APP, clock=SystemClock())

    async def prepare(self, key: str) -> None:
        pass

    async def writes(self, keys: Sequence[str]) -> list[int]:
        rows = await self._connection.fetch("select key, updated_at from state where key = any ($1)", keys)
        found = {row["key"]: 1 if row["updated_at"] is None else 2 for row in rows}
        return [found.get(key, 0) for key in keys]


class RedisDatabase:
    def __init__(self, client: Redis) -> None:
        self._client = client

    def open(self, url: str) -> StateStore:
        return RedisStateStore(redis_store(url), app_id=APP, clock=SystemClock())

    async def prepare(self, key: str) -> None:
        await self._client.hset(key, "version", "0")

    async def writes(self, keys: Sequence[str]) -> list[int]:
        versions = [await self._client.hget(key, "version") for key in keys]
        return [int(version or 0) for version in versions]


@asynccontextmanager
async def postgresql_database(url: str) -> AsyncIterator[Database]:
    connection = await asyncpg.connect(url)
    try:
        yield PostgresqlDatabase(connection)
    finally:
        await connection.close(timeout=5)


@asynccontextmanager
async def redis_database(url: str) -> AsyncIterator[Database]:
    async with Redis.from_url(url) as client:
        yield RedisDatabase(client)


@pytest.fixture(params=["postgresql", "redis"])
async def bench(request: pytest.FixtureRequest) -> AsyncIterator["Bench"]:
    url: str = request.getfixturevalue(f"{request.param}_url")
    database_at = postgresql_database if request.param == "postgresql" else redis_database
    async with AsyncExitStack() as stack:
        database = await stack.enter_async_context(database_at(url))
        proxy = await stack.enter_async_context(CuttingProxy(url))
        observer = await stack.enter_async_context(database.open(url))
        store = await stack.enter_async_context(database.open(proxy.url))
        # A store that reads all of its log itself has nobody to wake: no bytes but those of commits pass the proxy.
        leases = await store.log.acquire("observer", store.log.slices, HOUR)
        bench = Bench(database, proxy, observer, store, leases)
        await insist(store, await bench.new_commit())
        yield bench


@dataclass(slots=True)
class Bench:
    """A store behind a proxy, and `observer`, which reaches the same database directly.

    `told` counts what callers were told at first and, when they repeated their commits, at last.
    """

    database: Database
    proxy: CuttingProxy
    observer: StateStore
    store: StateStore
    leases: Sequence[Lease]
    commits: list[Commit] = field(default_factory=list)
    told: Counter[tuple[Told, Told]] = field(default_factory=Counter)

    async def cut_everywhere(self, side: Side, plan: "Plan") -> int:
        """Make new commits for every byte of this side, and cut there; return how many cuts there were."""
        for number in itertools.count():
            if not await self.cut_at(Cut(side, number * plan.step, plan.ending), plan):
                return number
        raise AssertionError

    async def cut_at(self, cut: Cut, plan: "Plan") -> bool:
        """Make new commits at once, and cut; tell whether there were so many bytes that the cut was made.

        Then each is repeated as it is until it is applied, or was before.
        """
        commits = [await self.new_commit() for _ in range(plan.together)]
        if plan.is_cold:
            await self.proxy.sever()
        self.proxy.arm(cut)
        told = await asyncio.gather(*(attempt(self.store, commit) for commit in commits))
        was_made = not self.proxy.disarm()
        await self.assert_true(cut, commits, told)
        at_last = await asyncio.gather(*(insist(self.store, commit) for commit in commits))
        for pair in zip(told, at_last, strict=True):
            assert pair in POSSIBLE, f"{cut}: {pair}"
            self.told[pair] += 1
        return was_made

    async def new_commit(self) -> Commit:
        # All are of one size, and of one slice, so that each byte of one is the same byte of the next.
        key = f"{APP}||order-{len(self.commits):06}"
        await self.database.prepare(key)
        mark = Mark(sha256(key.encode()).digest()[:16], HOUR)
        record = OutboxRecord(f"{APP}||orders", key, "pubsub", "orders", b"{}")
        self.commits.append(Commit((Upsert(key, b'{"total":250}'),), (record,), (mark,)))
        return self.commits[-1]

    async def assert_true(self, cut: Cut, commits: Sequence[Commit], told: Sequence[Told]) -> None:
        """Assert that what the callers were told is so at this moment."""
        for commit, each, writes in zip(commits, told, await self.database.writes(keys_of(commits)), strict=True):
            assert writes <= 1
            match each:
                case Told.APPLIED:
                    assert writes == 1, f"{cut}: {commit} was said to be applied"
                case Told.UNAVAILABLE:
                    assert writes == 0, f"{cut}: {commit} was said not to be applied"
                case Told.DUPLICATE:
                    raise AssertionError(f"{cut}: {commit} was sent twice by the store itself")
                case Told.UNKNOWN:
                    pass

    async def assert_once(self) -> None:
        """Assert that all commits stand, and that each wrote its key once and has one event."""
        keys = keys_of(self.commits)
        assert await self.database.writes(keys) == [1] * len(keys)
        assert sorted(await self._events()) == keys

    async def _events(self) -> list[str]:
        leases, events = self.leases, list[str]()
        while (batch := await self.observer.log.read(leases, 1_000)).entries:
            leases = batch.leases
            events += [entry.record.event_id for entry in batch.entries]
        return events


@dataclass(frozen=True, slots=True)
class Plan:
    """How cuts are made: at every so many bytes, with so many commits at once, each over a new connection or not."""

    ending: Ending = Ending.HANGS_UP
    step: int = 1
    together: int = 1
    is_cold: bool = False


POSSIBLE = {
    (Told.APPLIED, Told.DUPLICATE),
    (Told.UNAVAILABLE, Told.APPLIED),
    (Told.UNKNOWN, Told.APPLIED),
    (Told.UNKNOWN, Told.DUPLICATE),
}
"""What the caller of a commit may be told at first, and at last, when it is repeated and nothing is cut."""


def keys_of(commits: Iterable[Commit]) -> list[str]:
    return [commit.operations[0].key for commit in commits]


async def attempt(store: StateStore, commit: Commit) -> Told:
    try:
        await store.transact(commit)
    except Duplicate:
        return Told.DUPLICATE
    except StoreUnavailable:
        return Told.UNAVAILABLE
    except OutcomeUnknown:
        return Told.UNKNOWN
    return Told.APPLIED


async def insist(store: StateStore, commit: Commit) -> Told:
    """Repeat the commit until it is applied or a duplicate, and tell which."""
    async with asyncio.timeout(20):
        while (told := await attempt(store, commit)) in (Told.UNAVAILABLE, Told.UNKNOWN):
            pass
    return told


async def test_cut_at_every_byte_of_the_request_a_commit_is_unknown_and_applied_once_when_repeated(
    bench: Bench,
) -> None:
    """The last cut is behind the whole request, which the server then gets."""
    cuts = await bench.cut_everywhere(Side.REQUEST, Plan())

    assert cuts > 100
    assert bench.told[Told.UNKNOWN, Told.APPLIED] >= cuts - 1
    assert bench.told[Told.APPLIED, Told.DUPLICATE] == 1, "only where no cut was made"
    await bench.assert_once()


async def test_cut_at_every_byte_of_the_reply_a_commit_is_unknown_and_a_duplicate_when_repeated(bench: Bench) -> None:
    """Tried with a store that sends a commit again by itself: its caller is told of a duplicate."""
    cuts = await bench.cut_everywhere(Side.REPLY, Plan())

    whole_reply_and_no_cut = 2
    assert bench.told == {
        (Told.UNKNOWN, Told.DUPLICATE): cuts - 1,
        (Told.APPLIED, Told.DUPLICATE): whole_reply_and_no_cut,
    }
    await bench.assert_once()


@pytest.mark.parametrize("side", list(Side))
async def test_cut_while_it_connects_a_commit_is_unavailable_and_not_applied(bench: Bench, side: Side) -> None:
    """From the first byte of a new connection on, by way of what the driver asks first, to the end of the commit."""
    await bench.cut_everywhere(side, Plan(is_cold=True, step=61 if is_talkative(bench.store) else 1))

    assert bench.told[Told.UNAVAILABLE, Told.APPLIED] > 0
    await bench.assert_once()


@pytest.mark.parametrize("ending", [Ending.HANGS_UP, Ending.RESET])
@pytest.mark.parametrize("side", list(Side))
async def test_cut_with_several_commits_under_way_each_is_told_the_truth_of_its_own(
    bench: Bench, side: Side, ending: Ending
) -> None:
    await bench.cut_everywhere(side, Plan(ending, step=11 if side is Side.REQUEST else 1, together=4))

    assert bench.told[Told.UNKNOWN, Told.DUPLICATE if side is Side.REPLY else Told.APPLIED] > 0
    await bench.assert_once()


async def test_a_commit_that_arrives_after_it_was_repeated_changes_nothing(bench: Bench) -> None:
    """Tried without the commits' marks: they are applied twice."""
    cuts = await bench.cut_everywhere(Side.REQUEST, Plan(Ending.LATE, step=23))

    assert await bench.proxy.deliver_late() > cuts
    assert bench.told[Told.UNKNOWN, Told.APPLIED] >= cuts - 1
    await bench.assert_once()


def is_talkative(store: StateStore) -> bool:
    """Tell whether a new connection has so much to ask first that a cut at each byte would take long."""
    return isinstance(store, PostgresqlStateStore)
