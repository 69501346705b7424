"""While a broker is away commits go on, and while a store is away nobody is stuck; nothing is lost either way."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from time import monotonic
from uuid import uuid4

from aiokafka.errors import KafkaError
from redis.exceptions import RedisError

from statecast import Component, RelayOptions, Runtime, RuntimeOptions, StoreUnavailable
from statecast.runtime.servers import PrivateServer, ServerKind
from tests.crash.arena import (
    APP,
    STORE,
    TOPIC,
    Arena,
    postgresql_store,
    redis_arena,
    redis_store,
    sqlite_store,
    until,
)
from tests.crash.ledger import Findings, Ledger, Told, compare
from tests.crash.outage_arena import fickle_kafka_arena
from tests.crash.steady_writer import KEYS, LedgerNotes, Value, write

StartServer = Callable[[ServerKind], PrivateServer]

SEED = 20_240_919
WRITERS = 5
OUTAGE_SECONDS = 2.0
LONG_OUTAGE_SECONDS = 30.0
PATIENCE_SECONDS = 60.0
NOTHING_WRONG = Findings()

# A store that is frozen shall end some calls while it is.
IMPATIENT = {"timeout": "1s"}
IMPATIENT_REDIS = {"readTimeout": "500ms", "dialTimeout": "1s"}

# A short outage shall outlast these, too.
HASTY = RelayOptions(lease=timedelta(seconds=2), publish_timeout=timedelta(seconds=0.5))


@dataclass(slots=True)
class CountedNotes(LedgerNotes):
    """Notes of one writer; `count` says how many of its commits were acknowledged."""

    count: int = 0

    def end(self, token: str, values: Sequence[Value], *, is_applied: bool) -> None:
        LedgerNotes.end(self, token, values, is_applied=is_applied)
        self.count += is_applied


@dataclass(slots=True)
class Load:
    """Writers at work, and the runtime that relays what they write."""

    arena: Arena
    runtime: Runtime
    ledger: Ledger = field(default_factory=Ledger)
    writers: list[CountedNotes] = field(default_factory=list)

    async def grows(self, commits: int) -> None:
        """Wait until so many more values are committed."""
        goal = self.ledger.count + commits

        async def has_grown() -> bool:
            return self.ledger.count >= goal

        assert await until(has_grown, seconds=PATIENCE_SECONDS), "the writers are stuck"

    async def every_writer_commits(self) -> None:
        """Wait until each of the writers was told of one more commit."""
        before = [writer.count for writer in self.writers]

        async def all_have() -> bool:
            return all(writer.count > count for writer, count in zip(self.writers, before, strict=True))

        assert await until(all_have, seconds=PATIENCE_SECONDS), "a writer is stuck"

    async def is_refused(self) -> bool:
        """Tell whether the store is seen to be away."""
        try:
            await self.runtime.state(STORE).get(KEYS[0])
        except StoreUnavailable:
            return True
        return False

    async def pending(self) -> int:
        return sum(each.pending for each in await self.runtime.outbox_status(STORE))

    async def all_arrives(self) -> None:
        """Wait until all that is committed by now has arrived."""
        by_now = Ledger()
        by_now.committed = {key: dict(tokens) for key, tokens in self.ledger.committed.items()}

        async def has_arrived() -> bool:
            try:
                return not compare(by_now, await self.told()).lost
            except (KafkaError, RedisError):
                return False  # the test's own connection has not come back either

        assert await until(has_arrived, seconds=PATIENCE_SECONDS), "not all has arrived"

    async def told(self) -> list[Told]:
        return [Told.parse(envelope) for envelope in await self.arena.topic.read()]


@asynccontextmanager
async def load(arena: Arena, relay: RelayOptions = HASTY) -> AsyncIterator[Load]:
    """Write until the end of the block; then all has arrived, as it should."""
    stop = asyncio.Event()
    async with Runtime.open(arena.folder, app_id=APP, options=RuntimeOptions(relay=relay)) as runtime:
        under_load, store = Load(arena, runtime), runtime.state(STORE)
        async with asyncio.TaskGroup() as writers:
            for number in range(WRITERS):
                notes, random = CountedNotes(under_load.ledger), Random(SEED + number)
                under_load.writers.append(notes)
                writers.create_task(write(store, notes, f"writer{number}", random, stop))
            await under_load.grows(100)
            yield under_load
            stop.set()
        await under_load.all_arrives()
        items = await store.bulk_get(KEYS)
    assert compare(under_load.ledger, await under_load.told()) == NOTHING_WRONG
    assert [item and item.json()["number"] for item in items] == [
        len(under_load.ledger.committed[key]) if key in under_load.ledger.committed else None for key in KEYS
    ]
    print(f"{under_load.ledger.count} events, {len(await under_load.told()) - under_load.ledger.count} repeats")


async def test_redis_streams_away_from_postgresql(
    postgresql_url: str, private_server: StartServer, tmp_path: Path
) -> None:
    await assert_redis_streams_may_go_away(postgresql_store(postgresql_url), private_server, tmp_path)


async def test_redis_streams_away_from_redis(redis_url: str, private_server: StartServer, tmp_path: Path) -> None:
    await assert_redis_streams_may_go_away(redis_store(redis_url), private_server, tmp_path)


async def test_redis_streams_away_from_sqlite(private_server: StartServer, tmp_path: Path) -> None:
    await assert_redis_streams_may_go_away(sqlite_store(tmp_path / "state.db"), private_server, tmp_path)


async def assert_redis_streams_may_go_away(store: Component, private_server: StartServer, folder: Path) -> None:
    broker = await asyncio.to_thread(private_server, ServerKind.REDIS)
    async with redis_arena(store, broker.address, folder / "components") as arena, load(arena) as under_load:
        await assert_broker_may_go_away(under_load, broker, OUTAGE_SECONDS)


async def test_kafka_away(postgresql_url: str, private_server: StartServer, tmp_path: Path) -> None:
    """Half a minute, which outlasts all that a relay waits for by default."""
    broker = await asyncio.to_thread(private_server, ServerKind.KAFKA)
    store, topic = postgresql_store(postgresql_url), f"{TOPIC}-{uuid4().hex[:12]}"
    async with (
        fickle_kafka_arena(store, broker.address, topic, tmp_path / "components") as arena,
        load(arena, RelayOptions()) as under_load,
    ):
        await assert_broker_may_go_away(under_load, broker, LONG_OUTAGE_SECONDS)


async def assert_broker_may_go_away(under_load: Load, broker: PrivateServer, seconds: float) -> None:
    """Tried with a relay that stops at a broker's first failure: not all arrives."""
    broker.freeze()
    await assert_commits_go_on(under_load, seconds)
    broker.thaw()
    await under_load.all_arrives()

    await asyncio.to_thread(broker.kill)
    await assert_commits_go_on(under_load, OUTAGE_SECONDS)
    await asyncio.to_thread(broker.restart)
    await under_load.all_arrives()


async def assert_commits_go_on(under_load: Load, seconds: float) -> None:
    """Assert that for the time of a broker's absence nobody waits for it, and that the log's status shows it.

    Tried with commits that wait until less is pending: a writer is stuck.
    """
    before, end = under_load.ledger.count, monotonic() + seconds
    await under_load.every_writer_commits()
    began = datetime.now(UTC)
    while monotonic() < end:
        await under_load.every_writer_commits()

    committed, pending = under_load.ledger.count - before, await under_load.pending()
    print(f"{committed} committed in {seconds:.0f} s without a broker, {pending} pending")
    assert pending >= committed
    oldest = [each.oldest_at for each in await under_load.runtime.outbox_status(STORE) if each.pending]
    assert min(each for each in oldest if each is not None) < began


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
        await under_load.all_arrives()

        await asyncio.to_thread(server.kill)
        await assert_nothing_is_committed(under_load)
        await asyncio.to_thread(server.restart)
        await under_load.grows(100)
        await under_load.all_arrives()

        # It dies while commits are under way, and is back at once.
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.restart)
        await under_load.grows(100)


async def assert_nothing_is_committed(under_load: Load) -> None:
    """Assert that for the time of an outage nobody is told of a commit."""
    # Until a read is refused, what the server answered before may still be read.
    assert await until(under_load.is_refused, seconds=PATIENCE_SECONDS), "the store is not away"
    before, end = under_load.ledger.count, monotonic() + OUTAGE_SECONDS

    async def is_over() -> bool:
        return await under_load.is_refused() and monotonic() >= end

    assert await until(is_over, seconds=PATIENCE_SECONDS), "the store is not away any more"
    assert under_load.ledger.count == before


def with_metadata(component: Component, more: dict[str, str]) -> Component:
    return replace(component, metadata={**component.metadata, **more})
