"""Commits a second while the broker is away for 30 s, beside those of the same writers while it is there.

Away means frozen: connections stay open, and nothing answers. The relay has its default options and shares a process
with the writers, so that yardstick is low: with the broker there the relay takes the time that publishing takes. Hence
another one: the same writers where nothing is relayed at all. Afterwards all that was committed must arrive, in order.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from urllib.parse import urlsplit

from benchmarks.ratio import Ratio
from statecast.components.manifest import Component
from statecast.components.state.value import upsert
from statecast.pubsub.cloudevent import CloudEvent
from statecast.runtime.app import Runtime, RuntimeOptions
from statecast.runtime.demo import Tally
from statecast.runtime.servers import PrivateServer, ServerKind, Servers

APP, STORE, BUS = "shop", "statestore", "bus"
WRITERS = 8
KEYS_OF_A_WRITER = 50
WARM_UP_SECONDS, USUAL_SECONDS, AWAY_SECONDS = 1.0, 10.0, 30.0
PATIENCE_SECONDS, QUIET_SECONDS = 120.0, 10.0
AIM = 0.9


@dataclass(frozen=True, slots=True)
class Outage:
    """Commits a second; how many of them while the broker was away, and how many events were pending at the end."""

    not_relayed: float
    usual: float
    away: float
    committed: int
    pending: int


@dataclass(frozen=True, slots=True)
class Writers:
    """They commit as fast as they can, each to keys of its own."""

    tally: Tally = field(default_factory=Tally)
    numbers: Iterator[int] = field(default_factory=lambda: count(1))

    async def write(self, runtime: Runtime, seconds: float) -> float:
        """Write for so long; return the commits a second."""
        started, before = time.monotonic(), len(self.tally.committed)
        async with asyncio.TaskGroup() as group:
            for writer in range(WRITERS):
                group.create_task(self._write(runtime, writer, started + seconds))
        return (len(self.tally.committed) - before) / (time.monotonic() - started)

    async def _write(self, runtime: Runtime, writer: int, end: float) -> None:
        store = runtime.state(STORE)
        while (now := time.monotonic()) < end:
            number = next(self.numbers)
            key = f"order-{writer}-{number % KEYS_OF_A_WRITER}"
            await store.transact([upsert(key, number, metadata={"cloudevent.subject": key})])
            self.tally.committed[number] = now


async def measure() -> list[Ratio]:
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # it logs every try to reach the broker
    return [*await _postgresql_to_kafka(), *await _redis_to_redis_streams()]


async def _postgresql_to_kafka() -> list[Ratio]:
    with Servers(durable=True) as servers:
        postgresql = await asyncio.to_thread(servers.get, ServerKind.POSTGRESQL)
        kafka = await asyncio.to_thread(servers.private, ServerKind.KAFKA)
        store = Component(STORE, "state.postgresql", "v2", {"connectionString": postgresql.address})
        broker = {"brokers": kafka.address, "authType": "none", "initialOffset": "oldest"}
        return await _measure("PostgreSQL, Kafka", store, Component(BUS, "pubsub.kafka", metadata=broker), kafka)


async def _redis_to_redis_streams() -> list[Ratio]:
    with Servers(durable=True) as servers:
        redis = await asyncio.to_thread(servers.get, ServerKind.REDIS)
        streams = await asyncio.to_thread(servers.private, ServerKind.REDIS)
        store = Component(STORE, "state.redis", metadata={"redisHost": urlsplit(redis.address).netloc})
        bus = Component(BUS, "pubsub.redis", metadata={"redisHost": urlsplit(streams.address).netloc})
        return await _measure("Redis, Redis Streams", store, bus, streams)


async def _measure(pair: str, store: Component, bus: Component, broker: PrivateServer) -> list[Ratio]:
    topic, writers = f"orders-{secrets.token_hex(4)}", Writers()
    outbox = {"outboxPublishPubsub": BUS, "outboxPublishTopic": topic}
    components = [replace(store, metadata={**store.metadata, **outbox}), bus]
    outage = await _have_outage(components, broker, writers)
    await _receive(bus, topic, writers.tally)
    name, in_order = f"{pair}: broker away", len(writers.tally.received) - writers.tally.out_of_order
    return [
        Ratio(name, outage.away, outage.usual, "commits/s", "broker there", AIM),
        Ratio(name, outage.away, outage.not_relayed, "commits/s", "nothing relayed", AIM),
        Ratio(f"{pair}: lag at the end", outage.pending, outage.committed, "events", "committed meanwhile", 1.0),
        Ratio(f"{pair}: in order", in_order, len(writers.tally.committed), "events", "committed", 1.0),
    ]


async def _have_outage(components: list[Component], broker: PrivateServer, writers: Writers) -> Outage:
    """Freeze the broker while the writers write; return when it has been thawed and has all events."""
    async with Runtime.open(components, app_id=APP, options=RuntimeOptions(relays=False)) as runtime:
        await writers.write(runtime, WARM_UP_SECONDS)
        not_relayed = await writers.write(runtime, USUAL_SECONDS)
    async with Runtime.open(components, app_id=APP) as runtime:
        await _published(runtime)
        usual = await writers.write(runtime, USUAL_SECONDS)
        before = len(writers.tally.committed)
        broker.freeze()
        away = await writers.write(runtime, AWAY_SECONDS)
        committed, pending = len(writers.tally.committed) - before, await _pending(runtime)
        broker.thaw()
        await _published(runtime)
    return Outage(not_relayed, usual, away, committed, pending)


async def _published(runtime: Runtime) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while await _pending(runtime):  # noqa: ASYNC110 - a log has no event to wait for
            await asyncio.sleep(0.2)


async def _pending(runtime: Runtime) -> int:
    return sum(each.pending for each in await runtime.outbox_status(STORE))


async def _receive(bus: Component, topic: str, tally: Tally) -> None:
    """Read the topic from its beginning until all that was committed has arrived, or nothing more comes."""
    async with Runtime.open([bus], app_id=APP) as runtime:

        @runtime.subscribe(BUS, topic)
        def on_order(event: CloudEvent) -> None:
            tally.note_received(event.subject, event.data, time.monotonic())

        await runtime.ready()
        before = -1
        while before < len(tally.received) < len(tally.committed):
            before = len(tally.received)
            await asyncio.sleep(QUIET_SECONDS)
