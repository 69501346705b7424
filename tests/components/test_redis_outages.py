"""A relay under load while its broker, or its store, is away: killed and started again, or frozen for a while.

Tried by hand: with marks that are not checked, or that forget their answer, the test of a frozen store fails; with
entries that are dropped when a broker is not reachable, those of an absent broker do.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from statecast.clock import SystemClock
from statecast.components.broker.redis.broker import RedisBroker
from statecast.components.manifest import Component
from statecast.components.state.commit import Commit, Mark, OutboxRecord, Upsert
from statecast.components.state.redis.state import RedisStateStore
from statecast.components.state.sqlite.state import SqliteStateStore
from statecast.components.state.store import StateStore
from statecast.components.testing import deadline
from statecast.errors import Duplicate, OutcomeUnknown, StoreUnavailable
from statecast.outbox.deferred import RetryOptions
from statecast.outbox.progress import BackOff
from statecast.outbox.relay import Relay, RelayOptions
from statecast.runtime.servers import PrivateServer, ServerKind, component_metadata

KEYS = [f"orders||{number}" for number in range(4)]

PACE_SECONDS = 0.002

QUICK = RelayOptions(
    lease=timedelta(seconds=2),
    publish_timeout=timedelta(milliseconds=300),
    persist_every=timedelta(milliseconds=50),
    idle_wait=timedelta(milliseconds=50),
    retry=RetryOptions(back_off=BackOff(timedelta(milliseconds=10), timedelta(milliseconds=200))),
)

Outage = Callable[[PrivateServer], AbstractAsyncContextManager[None]]


@asynccontextmanager
async def killed(server: PrivateServer) -> AsyncIterator[None]:
    await asyncio.to_thread(server.kill)
    yield
    await asyncio.to_thread(server.restart)


@asynccontextmanager
async def frozen(server: PrivateServer) -> AsyncIterator[None]:
    server.freeze()
    yield
    server.thaw()


@pytest.fixture
def server(private_server: Callable[[ServerKind], PrivateServer]) -> PrivateServer:
    return private_server(ServerKind.REDIS)


Answer = tuple[str | None, ...]


@dataclass(slots=True)
class Ledger:
    """What writers were told of their commits: the answer to each one of a key, and how often one failed."""

    answers: dict[str, list[Answer]] = field(default_factory=lambda: {key: [] for key in KEYS})
    failures: int = 0

    def total(self) -> int:
        return sum(map(len, self.answers.values()))

    def numbers(self) -> dict[str, list[int]]:
        return {key: list(range(1, len(answers) + 1)) for key, answers in self.answers.items()}


async def write(store: StateStore, key: str, ledger: Ledger) -> None:
    """Commit the next number of a key, repeated with its mark until it is known to be applied."""
    number = len(ledger.answers[key]) + 1
    name = f"{key}:{number}"
    mark = Mark(sha256(name.encode()).digest()[:16], timedelta(minutes=1))
    record = OutboxRecord(key, name, "bus", "orders", name.encode(), {"partitionKey": key})
    commit = Commit((Upsert(key, b"%d" % number),), (record,), (mark,))
    answer: Answer | None = None
    while answer is None:
        try:
            answer = await store.transact(commit)
        except Duplicate as duplicate:
            answer = duplicate.etags or ("not told",)
        except (StoreUnavailable, OutcomeUnknown):
            ledger.failures += 1
        await asyncio.sleep(PACE_SECONDS)
    ledger.answers[key].append(answer)


@asynccontextmanager
async def writing(store: StateStore) -> AsyncIterator[Ledger]:
    """Write on and on, one writer to a key; at the end every commit that was begun is applied."""
    ledger, stop = Ledger(), asyncio.Event()

    async def write_on(key: str) -> None:
        while not stop.is_set():
            await write(store, key, ledger)

    async with asyncio.TaskGroup() as group:
        for key in KEYS:
            group.create_task(write_on(key))
        try:
            yield ledger
        finally:
            stop.set()


@asynccontextmanager
async def relaying(store: StateStore, broker: RedisBroker) -> AsyncIterator[Relay]:
    relay = Relay(store.log, {"bus": broker}, name="relay", clock=SystemClock(), options=QUICK)
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(relay.run(stop))
        try:
            yield relay
        finally:
            stop.set()


@pytest.mark.parametrize("outage", [killed, frozen])
async def test_a_broker_that_is_away_holds_up_no_commit_and_gets_everything_in_order(
    server: PrivateServer, tmp_path: Path, outage: Outage
) -> None:
    component = Component("statestore", "state.sqlite", "v1", {"connectionString": str(tmp_path / "state.db")})
    async with (
        SqliteStateStore(component, app_id="orders", clock=SystemClock()) as store,
        redis_broker(server.address) as broker,
        relaying(store, broker) as relay,
    ):
        async with writing(store) as ledger:
            await until(lambda: relay.counts.published > 100)
            async with outage(server):
                before, failed_before = ledger.total(), relay.counts.failed
                await until(lambda: ledger.total() > before + 2_500 and relay.counts.failed > failed_before)
                lag = await pending(store)
            await more_is_published(relay, lag)
        await deadline.until(lambda: is_empty(store))

    assert ledger.failures == 0
    assert relay.counts.fenced == relay.counts.deferred == 0
    assert lag > 2_000
    assert await first_deliveries(server.address) == ledger.numbers()


@pytest.mark.parametrize(("outage", "failures"), [(killed, 400), (frozen, 12)])
async def test_a_store_that_is_away_loses_no_commit_and_no_event_and_wedges_nobody(
    server: PrivateServer, redis_url: str, outage: Outage, failures: int
) -> None:
    await let_versions_count_from_one(server.address)
    async with (
        redis_store(server.address) as store,
        redis_broker(redis_url) as broker,
        relaying(store, broker) as relay,
    ):
        async with writing(store) as ledger:
            for turn in range(1, 3):
                await more_is_published(relay)
                async with outage(server):
                    await has_failed(ledger, turn * failures)
            await more_is_published(relay)
        await deadline.until(lambda: is_empty(store))
        items = await store.bulk_get(KEYS)

    numbers = ledger.numbers()
    assert ledger.answers == {key: [(str(number),) for number in numbers[key]] for key in KEYS}
    assert [item and item.etag for item in items] == [str(numbers[key][-1]) for key in KEYS]
    assert await first_deliveries(redis_url) == numbers


def redis_broker(url: str) -> RedisBroker:
    component = Component("bus", "pubsub.redis", "v1", metadata_of(url))
    return RedisBroker(component, app_id="orders", clock=SystemClock())


def redis_store(url: str) -> RedisStateStore:
    component = Component("statestore", "state.redis", "v1", metadata_of(url))
    return RedisStateStore(component, app_id="orders", clock=SystemClock())


def metadata_of(url: str) -> dict[str, str]:
    return component_metadata(ServerKind.REDIS, url) | {"readTimeout": "400ms"}


async def let_versions_count_from_one(url: str) -> None:
    async with Redis.from_url(url) as client:
        for key in KEYS:
            await client.hset(key, "version", "0")


async def first_deliveries(url: str) -> dict[str, list[int]]:
    """List the numbers of each key as the topic has them for the first time."""
    async with Redis.from_url(url) as client:
        entries: Any = await client.xrange("orders")
    numbers: defaultdict[str, list[int]] = defaultdict(list)
    for name in dict.fromkeys(fields[b"data"].decode() for _, fields in entries):
        key, _, number = name.rpartition(":")
        numbers[key].append(int(number))
    return dict(numbers)


async def pending(store: StateStore) -> int:
    return sum(status.pending for status in await store.log.status())


async def has_failed(ledger: Ledger, count: int) -> None:
    await until(lambda: ledger.failures >= count)


async def more_is_published(relay: Relay, count: int = 100) -> None:
    published = relay.counts.published
    await until(lambda: relay.counts.published > published + count)


async def is_empty(store: StateStore) -> bool:
    return await pending(store) == 0


async def until(fact: Callable[[], bool]) -> None:
    async def holds() -> bool:
        return fact()

    await deadline.until(holds)
