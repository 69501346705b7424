"""Writers, three relays and their servers, of which some freeze and some die all the time, held against a model.

`python -m tests.crash.soak --seconds 600 --seed 7` goes round the pairs of a store and a broker, prints one table at
the end, and ends with code 1 if anything was lost, doubled, reordered or made up.
"""

import argparse
import asyncio
import logging
import secrets
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, fields
from enum import Enum
from itertools import cycle
from pathlib import Path
from random import Random
from time import monotonic
from urllib.parse import urlsplit

from aiokafka.errors import KafkaError
from redis.exceptions import RedisError
from rich.console import Console
from rich.table import Table

from statecast import Component, Runtime, RuntimeOptions, StateClient
from statecast.runtime.server_answers import run_redis, run_sql
from statecast.runtime.servers import PrivateServer, ServerKind, Servers
from tests.crash.arena import APP, STORE, Arena, postgresql_store, redis_arena, redis_store, sqlite_store, until
from tests.crash.children import Child, Children
from tests.crash.ledger import Findings, Ledger, Told, compare
from tests.crash.outage_arena import fickle_kafka_arena
from tests.crash.relays import BATCHES, LEASE_SECONDS, PUBLISH_SECONDS, RELAYS
from tests.crash.steady_writer import KEYS, Journal, was_applied

RELAY = Path(__file__).with_name("relay_process.py")
WRITER = Path(__file__).with_name("steady_writer.py")

WRITERS = 2
LONGEST_LAP_SECONDS = 30.0
# What a lap takes besides: its processes start, all that was committed arrives.
OVERHEAD_SECONDS = 5.0
SHORTEST_FIGHT_SECONDS = 4.0
PATIENCE_SECONDS = 60.0


class Store(Enum):
    POSTGRESQL = "PostgreSQL"
    REDIS = "Redis"
    SQLITE = "SQLite"


class Broker(Enum):
    KAFKA = "Kafka"
    REDIS = "Redis Streams"


@dataclass(frozen=True, slots=True)
class Pair:
    store: Store
    broker: Broker

    def __str__(self) -> str:
        return f"{self.store.value} -> {self.broker.value}"


PAIRS = tuple(Pair(store, broker) for broker in Broker for store in Store)


@dataclass(slots=True)
class Tally:
    """What happened on one pair, and what of it must not have: `doubled` in effect, that is; `made_up` are events
    without a commit."""

    committed: int = 0
    relayed: int = 0
    lost: int = 0
    doubled: int = 0
    reordered: int = 0
    made_up: int = 0
    kills: int = 0
    freezes: int = 0
    restarts: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        return not (self.lost or self.doubled or self.reordered or self.made_up or self.problems)

    def add(self, ledger: Ledger, told: Sequence[Told], findings: Findings) -> None:
        self.committed += ledger.count
        self.relayed += len(told)
        self.lost += len(findings.lost)
        self.doubled += len(findings.renamed)
        self.reordered += len(findings.inverted)
        self.made_up += len(findings.uncommitted)
        for what in fields(findings):
            self.problems += [f"{what.name}: {each}" for each in getattr(findings, what.name)]


class Provocation(Enum):
    KILL_RELAYS = "kill two relays"
    KILL_WRITER = "kill a writer"
    FREEZE_RELAY = "freeze a relay"
    FREEZE_WRITER = "freeze a writer"
    FREEZE_STORE = "freeze the store's server"
    RESTART_STORE = "kill the store's server and start it again"
    FREEZE_BROKER = "freeze the broker"
    RESTART_BROKER = "kill the broker and start it again"


OFTEN = (Provocation.KILL_RELAYS, Provocation.KILL_WRITER, Provocation.FREEZE_RELAY, Provocation.FREEZE_WRITER)


def shuffled(random: Random) -> Iterator[Provocation]:
    """Draw for ever: what happens to processes twice as often as what happens to servers."""
    while True:
        yield from random.sample(deck := [*Provocation, *OFTEN], len(deck))


@dataclass(slots=True)
class Lap:
    """One pair for a while, in a folder of its own; a store that is a file has no server."""

    arena: Arena
    folder: Path
    children: Children
    random: Random
    tally: Tally
    broker: PrivateServer
    store: PrivateServer | None
    relays: list[Child] = field(default_factory=list)
    writers: list[Child] = field(default_factory=list)
    journals: list[Path] = field(default_factory=list)

    async def run(self, seconds: float, provocations: Iterator[Provocation]) -> None:
        self.relays = await asyncio.gather(*map(self._start_relay, BATCHES))
        self.writers = await asyncio.gather(*(self._start_writer() for _ in range(WRITERS)))
        await self._fight(monotonic() + seconds, provocations)
        self._expect_good_ends(await asyncio.gather(*(writer.leave() for writer in self.writers)))
        async with Runtime.open(self.arena.folder, app_id=APP, options=RuntimeOptions(relays=False)) as runtime:
            await self._judge(runtime.state(STORE))
        self._expect_good_ends(await asyncio.gather(*(relay.leave() for relay in self.relays)))

    async def _fight(self, end: float, provocations: Iterator[Provocation]) -> None:
        async with asyncio.TaskGroup() as freezes:
            while monotonic() < end:
                await asyncio.sleep(self.random.uniform(0.1, 0.5))
                await self._provoke(next(provocations), freezes)

    async def _provoke(self, provocation: Provocation, freezes: asyncio.TaskGroup) -> None:
        match provocation:
            case Provocation.KILL_RELAYS:
                await self._replace_relays(self.random.sample(range(RELAYS), 2))
            case Provocation.KILL_WRITER:
                await self._replace_writer(self.random.randrange(WRITERS))
            case Provocation.FREEZE_RELAY:
                freezes.create_task(self._freeze(self.random.choice(self.relays)))
            case Provocation.FREEZE_WRITER:
                freezes.create_task(self._freeze(self.random.choice(self.writers)))
            case Provocation.FREEZE_STORE:
                await self._freeze_server(self.store)
            case Provocation.RESTART_STORE:
                await self._restart(self.store)
            case Provocation.FREEZE_BROKER:
                await self._freeze_server(self.broker)
            case Provocation.RESTART_BROKER:
                await self._restart(self.broker)

    async def _replace_relays(self, places: Sequence[int]) -> None:
        for place in places:
            await self._kill(self.relays[place])
        batches = [self.random.choice(BATCHES) for _ in places]
        for place, relay in zip(places, await asyncio.gather(*map(self._start_relay, batches)), strict=True):
            self.relays[place] = relay

    async def _replace_writer(self, place: int) -> None:
        await self._kill(self.writers[place])
        self.writers[place] = await self._start_writer()

    async def _kill(self, child: Child) -> None:
        if not child.was_killed:
            self.tally.kills += 1
            await child.kill()

    async def _freeze(self, child: Child) -> None:
        self.tally.freezes += 1
        child.freeze()
        await asyncio.sleep(self._past_the_lease())
        child.thaw()

    async def _freeze_server(self, server: PrivateServer | None) -> None:
        if server is None:
            return
        self.tally.freezes += 1
        server.freeze()
        try:
            victims = await self._outlast_without_some()
        finally:
            server.thaw()
        await self._replace_relays(victims)

    async def _restart(self, server: PrivateServer | None) -> None:
        if server is None:
            return
        self.tally.restarts += 1
        await asyncio.to_thread(server.kill)
        victims = await self._outlast_without_some()
        await asyncio.to_thread(server.restart)
        await self._replace_relays(victims)

    async def _outlast_without_some(self) -> list[int]:
        """Let the time of an outage go by, in which two relays die with what they hold; tell which."""
        victims = self.random.sample(range(RELAYS), 2)
        await asyncio.sleep(self._past_the_lease() / 2)
        for victim in victims:
            await self._kill(self.relays[victim])
        await asyncio.sleep(self._past_the_lease() / 2)
        return victims

    def _past_the_lease(self) -> float:
        return self.random.uniform(0.5, 1.7) * LEASE_SECONDS

    async def _start_relay(self, batch: int) -> Child:
        return await self._start(RELAY, LEASE_SECONDS, PUBLISH_SECONDS, batch)

    async def _start_writer(self) -> Child:
        name = f"writer{len(self.journals) + 1}"
        self.journals.append(self.folder / f"journal-{name}")
        return await self._start(WRITER, name, self.random.random(), self.journals[-1])

    async def _start(self, script: Path, *arguments: object) -> Child:
        child = await self.children.start(script, *map(str, (self.arena.folder, APP, *arguments)))
        await child.is_ready()
        return child

    def _expect_good_ends(self, codes: Sequence[int]) -> None:
        if any(codes):
            self.tally.problems.append(f"a process ended with {codes}:\n{self.children.logs()[-4000:]}")

    async def _judge(self, store: StateClient) -> None:
        """Compare what is there, once all has arrived, with what was committed."""
        journal = Journal()
        journal.read(self.journals)
        for token in journal.untold:
            journal.is_applied[token] = await was_applied(store, token)
        try:
            ledger = journal.ledger()
        except AssertionError as lost_update:
            self.tally.doubled += 1
            self.tally.problems.append(str(lost_update))
            return
        await until(lambda: self._has_all(ledger), seconds=PATIENCE_SECONDS)
        told = await self._told()
        self.tally.add(ledger, told, compare(ledger, told))
        await self._compare_state(store, ledger)

    async def _compare_state(self, store: StateClient, ledger: Ledger) -> None:
        for key, item in zip(KEYS, await store.bulk_get(KEYS), strict=True):
            tokens = ledger.committed.get(key, {})
            found = (item.json()["number"], item.json()["token"]) if item else (0, None)
            if sorted(tokens) != list(range(1, found[0] + 1)) or tokens.get(found[0]) != found[1]:
                self.tally.problems.append(f"{key} is at {found}, and {len(tokens)} commits to it are known")

    async def _has_all(self, ledger: Ledger) -> bool:
        try:
            return not compare(ledger, await self._told()).lost
        except (KafkaError, RedisError):
            return False

    async def _told(self) -> list[Told]:
        return [Told.parse(envelope) for envelope in await self.arena.topic.read()]


class Grounds:
    """The servers that all laps are run on, each with a fresh database and topic of its own."""

    def __init__(self, start: Callable[[ServerKind], PrivateServer]) -> None:
        self.postgresql = start(ServerKind.POSTGRESQL)
        self.redis = start(ServerKind.REDIS)
        self.brokers = {Broker.KAFKA: start(ServerKind.KAFKA), Broker.REDIS: start(ServerKind.REDIS)}

    def store_server(self, store: Store) -> PrivateServer | None:
        return {Store.POSTGRESQL: self.postgresql, Store.REDIS: self.redis}.get(store)

    @asynccontextmanager
    async def arena(self, pair: Pair, folder: Path) -> AsyncIterator[Arena]:
        component = await asyncio.to_thread(self._empty_store, pair.store, folder)
        address = self.brokers[pair.broker].address
        async with AsyncExitStack() as stack:
            if pair.broker is Broker.KAFKA:
                topic = f"orders-{secrets.token_hex(6)}"
                arena = fickle_kafka_arena(component, address, topic, folder / "components")
            else:
                await asyncio.to_thread(run_redis, address, "FLUSHDB")
                arena = redis_arena(component, address, folder / "components")
            yield await stack.enter_async_context(arena)

    def _empty_store(self, store: Store, folder: Path) -> Component:
        match store:
            case Store.POSTGRESQL:
                name = f"soak_{secrets.token_hex(6)}"
                run_sql(self.postgresql.address, f"CREATE DATABASE {name} STRATEGY file_copy")
                return postgresql_store(urlsplit(self.postgresql.address)._replace(path=f"/{name}").geturl())
            case Store.REDIS:
                run_redis(self.redis.address, "FLUSHDB")
                return redis_store(self.redis.address)
            case Store.SQLITE:
                return sqlite_store(folder / "state.db")


async def soak(grounds: Grounds, seconds: float, seed: int) -> dict[Pair, Tally]:
    """Go round all pairs until the time is over, once at least."""
    tallies = {pair: Tally() for pair in PAIRS}
    provocations = shuffled(Random(seed))
    end = monotonic() + seconds
    lap = min(seconds / len(PAIRS), LONGEST_LAP_SECONDS)
    fight_seconds = max(lap - OVERHEAD_SECONDS, SHORTEST_FIGHT_SECONDS)
    for number, pair in enumerate(cycle(PAIRS)):
        if number >= len(PAIRS) and monotonic() + lap > end:
            break
        await run_lap(grounds, pair, Random(f"{seed} {number}"), tallies[pair], fight_seconds, provocations)
    return tallies


async def run_lap(
    grounds: Grounds, pair: Pair, random: Random, tally: Tally, seconds: float, provocations: Iterator[Provocation]
) -> None:
    with tempfile.TemporaryDirectory(prefix="statecast-soak-") as name:
        folder = Path(name)
        async with grounds.arena(pair, folder) as arena, Children(folder) as children:
            broker, store = grounds.brokers[pair.broker], grounds.store_server(pair.store)
            await Lap(arena, folder, children, random, tally, broker, store).run(seconds, provocations)
    print(f"{pair}: {tally.committed} committed, {tally.relayed} relayed", file=sys.stderr)


def table_of(tallies: dict[Pair, Tally]) -> Table:
    numbers = [each.name for each in fields(Tally) if each.name != "problems"]
    table = Table("pair", *(name.replace("_", " ") for name in numbers))
    for pair, tally in tallies.items():
        table.add_row(str(pair), *(str(getattr(tally, name)) for name in numbers))
    return table


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.crash.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args(arguments)
    seed = secrets.randbelow(1_000_000) if options.seed is None else options.seed
    print(f"seed {seed}", file=sys.stderr)
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    with Servers() as servers:
        tallies = asyncio.run(soak(Grounds(servers.private), options.seconds, seed))
    console = Console(width=140)
    console.print(table_of(tallies))
    for pair, tally in tallies.items():
        for problem in tally.problems[:20]:
            console.print(f"{pair}: {problem}", markup=False)
    return 0 if all(tally.is_clean for tally in tallies.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
