"""While a broker is away commits go on, and while a store is away nobody is stuck; nothing is lost either way."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from random import Random
from time import monotonic
from uuid import uuid4

from aiokafka.errors import KafkaError
from redis.exceptions import RedisError

from statecast import Component, RelayOptions, Runtime, RuntimeOptions
from statecast.runtime.servers import PrivateServer, ServerKind
from tests.crash.arena import (
    APP,
    STORE,
    TOPIC,
    Arena,
    postgresql_store,
    redis_arena,
    redis_store,
    until,
)
from tests.crash.ledger import Findings, Ledger, Told, compare
from tests.crash.outage_arena import fickle_kafka_arena
from tests.crash.steady_writer import KEYS, LedgerNotes, write

StartServer = Callable[[ServerKind], PrivateServer]

SEED = 20_240_919
WRITERS = 5
OUTAGE_SECONDS = 2.0
PATIENCE_SECONDS = 30.0
NOTHING_WRONG = Findings()

# A store that is frozen shall end some calls while it is.
IMPATIENT = {"timeout": "1s"}
IMPATIENT_REDIS = {"readTimeout": "500ms", "dialTimeout": "1s"}

OPTIONS = RuntimeOptions(relay=RelayOptions(lease=timedelta(seconds=2), publish_timeout=timedelta(seconds=0.5)))


@dataclass(slots=True)
class Load:
    """Writers at work, and the runtime that relays what they write."""

    arena: Arena
    runtime: Runtime
    ledger: Ledger = field(default_factory=Ledger)

    async def grows(self, commits: int) -> None:
        """Wait until so many more values are committed."""
        goal = self.ledger.count + commits

        async def has_grown() -> bool:
            return self.ledger.count >= goal

        assert await until(has_grown, seconds=PATIENCE_SECONDS), "the writers are stuck"

    async def rate_during(self, seconds: float) -> float:
        started, before = monotonic(), self.ledger.count
        await asyncio.sleep(seconds)
        return (self.ledger.count - before) / (monotonic() - started)

    async def pending(self) -> int:
        return sum(each.pending for each in await self.runtime.outbox_status(STORE))

    async def is_told(self) -> bool:
        """Tell whether all that was committed until now has arrived."""
        committed = {key: dict(tokens) for key, tokens in self.ledger.committed.items()}
        until_now = Ledger()
        until_now.committed = committed
        try:
            return not compare(until_now, await self.told()).lost
        except (KafkaError, RedisError):
            return False  # the test's own connection has not come back either

    async def told(self) -> list[Told]:
        return [Told.parse(envelope) for envelope in await self.arena.topic.read()]


@asynccontextmanager
async def load(arena: Arena) -> AsyncIterator[Load]:
    """Write until the end of the block; then all has arrived, as it should."""
    stop = asyncio.Event()
    async with Runtime.open(arena.folder, app_id=APP, options=OPTIONS) as runtime:
        under_load, store = Load(arena, runtime), runtime.state(STORE)
        async with asyncio.TaskGroup() as writers:
            for number in range(WRITERS):
                notes, random = LedgerNotes(under_load.ledger), Random(SEED + number)
                writers.create_task(write(store, notes, f"writer{number}", random, stop))
            await under_load.grows(100)
            yield under_load
            stop.set()
        assert await until(under_load.is_told, seconds=PATIENCE_SECONDS), "not all has arrived"
        items = await store.bulk_get(KEYS)
    assert compare(under_load.ledger, await under_load.told()) == NOTHING_WRONG
    assert [item and item.json()["number"] for item in items] == [
        len(under_load.ledger.committed[key]) if key in under_load.ledger.committed else None for key in KEYS
    ]
    print(f"{under_load.ledger.count} events, {len(await under_load.told()) - under_load.ledger.count} repeats")


async def test_redis_streams_away(postgresql_url: str, private_server: StartServer, tmp_path: Path) -> None:
    broker = await asyncio.to_thread(private_server, ServerKind.REDIS)
    store = postgresql_store(postgresql_url)
    async with redis_arena(store, broker.address, tmp_path / "components") as arena:
        await assert_broker_may_go_away(arena, broker)


async def test_kafka_away(postgresql_url: str, private_server: StartServer, tmp_path: Path) -> None:
    broker = await asyncio.to_thread(private_server, ServerKind.KAFKA)
    store, topic = postgresql_store(postgresql_url), f"{TOPIC}-{uuid4().hex[:12]}"
    async with fickle_kafka_arena(store, broker.address, topic, tmp_path / "components") as arena:
        await assert_broker_may_go_away(arena, broker)


async def assert_broker_may_go_away(arena: Arena, broker: PrivateServer) -> None:
    """Tried with a relay that stops at a broker's first failure: not all arrives."""
    async with load(arena) as under_load:
        usual_rate = await under_load.rate_during(OUTAGE_SECONDS)

        broker.freeze()
        await assert_commits_go_on(under_load, usual_rate)
        broker.thaw()
        assert await until(under_load.is_told, seconds=PATIENCE_SECONDS), "not all has arrived after a freeze"

        await asyncio.to_thread(broker.kill)
        await assert_commits_go_on(under_load, usual_rate)
        await asyncio.to_thread(broker.restart)
        assert await until(under_load.is_told, seconds=PATIENCE_SECONDS), "not all has arrived after a restart"


async def assert_commits_go_on(under_load: Load, usual_rate: float) -> None:
    """Assert that the broker's absence is seen in the log's status, and hardly in the writers' pace."""
    before = under_load.ledger.count
    rate = await under_load.rate_during(OUTAGE_SECONDS)
    committed, pending = under_load.ledger.count - before, await under_load.pending()
    print(f"{usual_rate:.0f}/s usually, {rate:.0f}/s without a broker, {pending} pending")
    assert rate > usual_rate / 10
    assert pending >= committed
    oldest = [each.oldest_at for each in await under_load.runtime.outbox_status(STORE) if each.pending]
    assert oldest
    assert None not in oldest


async def test_postgresql_away(private_server: StartServer, redis_url: str, tmp_path: Path) -> None:
    server = await asyncio.to_thread(private_server, ServerKind.POSTGRESQL)
    store = with_metadata(postgresql_store(server.address), IMPATIENT)
    async with redis_arena(store, redis_url, tmp_path / "components") as arena:
        await assert_store_may_go_away(arena, server)


async def test_redis_away(private_server: StartServer, redis_url: str, tmp_path: Path) -> None:
    server = await asyncio.to_thread(private_server, ServerKind.REDIS)
    store = with_metadata(redis_store(server.address), IMPATIENT_REDIS)
    async with redis_arena(store, redis_url, tmp_path / "components") as arena:
        await assert_store_may_go_away(arena, server)


async def assert_store_may_go_away(arena: Arena, server: PrivateServer) -> None:
    """Tried with a Redis that keeps no append-only file: commits are found to have been overwritten."""
    async with load(arena) as under_load:
        server.freeze()
        await assert_nothing_is_committed(under_load)
        server.thaw()
        await under_load.grows(100)
        assert await until(under_load.is_told, seconds=PATIENCE_SECONDS), "not all has arrived after a freeze"

        await asyncio.to_thread(server.kill)
        await assert_nothing_is_committed(under_load)
        await asyncio.to_thread(server.restart)
        await under_load.grows(100)
        assert await until(under_load.is_told, seconds=PATIENCE_SECONDS), "not all has arrived after a restart"

        # It dies while commits are under way, and is back at once.
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.restart)
        await under_load.grows(100)


async def assert_nothing_is_committed(under_load: Load) -> None:
    """Assert that for the time of an outage nobody is told of a commit."""
    # What the server answered before is still being read.
    await asyncio.sleep(0.1)
    assert await under_load.rate_during(OUTAGE_SECONDS) == 0


def with_metadata(component: Component, more: dict[str, str]) -> Component:
    return replace(component, metadata={**component.metadata, **more})
