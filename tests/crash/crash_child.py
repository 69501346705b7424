"""Makes good what its predecessor left, then writes orders of its own until it comes to the crash point it is given.

python crash_child.py FOLDER APP_ID JOURNAL, with the point in STATECAST_CRASH_POINT; without one it ends by itself.

FOLDER has the components twice: those in `strict` have a broker that refuses large messages, those in `mended` one
that takes them.
"""

import asyncio
import json
import logging
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg

from statecast import Component, Concurrency, Duplicate, RelayOptions, Runtime, RuntimeOptions, StateClient
from statecast.components.loader import load
from statecast.components.registry import installed
from statecast.components.state.log import OutboxLog
from statecast.components.state.postgresql.config import read_config
from statecast.components.state.postgresql.migration import find_layout
from statecast.components.state.postgresql.schema import PARTITION_BITS
from statecast.outbox.deferred import RetryOptions
from statecast.outbox.progress import BackOff
from statecast.testing.crash_points import arm_from_environment
from tests.crash.arena import STORE
from tests.crash.ledger import next_value

PATIENCE_SECONDS = 20.0
LARGEST_BYTES = 2_000
TOO_LARGE = "x" * (2 * LARGEST_BYTES)
_LOOK_SECONDS = 0.02
_TRIMS = 100

# Short leases, so that a successor need not wait long; every round of the relay persists, so that each counts.
_RELAY = RelayOptions(
    lease=timedelta(seconds=1),
    publish_timeout=timedelta(seconds=0.4),
    persist_every=timedelta(0),
    trim_every=timedelta(minutes=1),
    look_aside_every=timedelta(milliseconds=10),
    drain=timedelta(seconds=2),
    retry=RetryOptions(max_attempts=2, back_off=BackOff(timedelta(milliseconds=10), timedelta(milliseconds=100))),
)

_REGISTRY = installed().register("pubsub.redis", "tests.crash.limited_broker:LimitedRedisBroker")


@dataclass(frozen=True, slots=True)
class Order:
    """One commit to be: the key's next number. `etag` is that of the value before, None: there was none."""

    token: str
    key: str
    number: int
    is_large: bool
    etag: str | None

    def value(self) -> dict[str, Any]:
        value = next_value(self.key, {"number": self.number - 1}, self.token)
        return {**value, "padding": TOO_LARGE} if self.is_large else value


class Journal:
    """Every order before it is committed, and its token again once that was acknowledged; it outlives SIGKILL."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def begin(self, order: Order) -> None:
        self._append(asdict(order))

    def end(self, order: Order) -> None:
        self._append({"acknowledged": order.token})

    def orders(self) -> list[Order]:
        return [Order(**line) for line in self._lines() if "acknowledged" not in line]

    def acknowledged(self) -> set[str]:
        return {line["acknowledged"] for line in self._lines() if "acknowledged" in line}

    def _append(self, line: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._path.read_text().splitlines()] if self._path.exists() else []


class Writer:
    def __init__(self, folder: Path, app_id: str, journal: Journal) -> None:
        self._folder = folder
        self._app_id = app_id
        self._journal = journal

    async def make_good(self) -> None:
        """Go on where the predecessor was killed: settle what it does not know, write on in its keys, relay all."""
        async with self._open("mended") as runtime:
            await self._resolve(runtime.state(STORE))
            for key in self._last_keys():
                await self._write(runtime.state(STORE), key)
            await self._relay_all(runtime)

    async def work(self, name: str) -> None:
        """Come by every point: commit, relay, be refused, park, replay, release, trim."""
        keys = [f"{name}/{letter}" for letter in "abcde"]
        async with self._open("strict", relays=False) as runtime:
            await self._write_all(runtime, keys)
        async with self._open("strict") as runtime:
            await self._write_all(runtime, keys, too_large=keys[1])
            await _hold(lambda: _has_parked(runtime))
            await self._write_all(runtime, keys)
            await _hold(lambda: _is_relayed(runtime))
        await self._turn_the_ring()
        async with self._open("mended") as runtime:
            await self._relay_all(runtime)
            await self._write_all(runtime, keys)
            await self._relay_all(runtime)
        async with self._open("mended", relays=False) as runtime:
            await self._write_all(runtime, keys)
            await _trim_for_a_while(runtime._components.states[STORE].store.log)

    @asynccontextmanager
    async def _open(self, name: str, *, relays: bool = True) -> AsyncIterator[Runtime]:
        options = RuntimeOptions(relays=relays, relay=_RELAY)
        folder = self._folder / name
        async with Runtime.open(folder, app_id=self._app_id, options=options, registry=_REGISTRY) as runtime:
            yield runtime

    async def _resolve(self, store: StateClient) -> None:
        """Repeat what was not acknowledged. Without its etag: only the mark is to keep it from happening twice."""
        acknowledged = self._journal.acknowledged()
        for order in self._journal.orders():
            if order.token not in acknowledged:
                try:
                    async with store.transaction(idempotency_key=order.token) as transaction:
                        transaction.upsert(order.key, order.value())
                except Duplicate:
                    logging.info("%s had been applied", order.token)
                self._journal.end(order)

    def _last_keys(self) -> list[str]:
        orders = self._journal.orders()
        last = orders[-1].key.partition("/")[0] if orders else ""
        return sorted({order.key for order in orders if order.key.partition("/")[0] == last})

    async def _write_all(self, runtime: Runtime, keys: list[str], *, too_large: str | None = None) -> None:
        for key in keys:
            await self._write(runtime.state(STORE), key, is_large=key == too_large)

    async def _write(self, store: StateClient, key: str, *, is_large: bool = False) -> None:
        before = await store.get(key)
        number = before.json()["number"] + 1 if before else 1
        order = Order(f"{key}#{number}", key, number, is_large, before.etag if before else None)
        self._journal.begin(order)
        async with store.transaction(idempotency_key=order.token) as transaction:
            concurrency = None if order.etag else Concurrency.FIRST_WRITE
            transaction.upsert(key, order.value(), etag=order.etag, concurrency=concurrency)
        self._journal.end(order)

    async def _relay_all(self, runtime: Runtime) -> None:
        await _hold(lambda: _is_relayed_replaying(runtime))

    async def _turn_the_ring(self) -> None:
        """On PostgreSQL, leave the log's partition, so that there is one to reclaim; elsewhere there are none."""
        store = self._store()
        if store.type != "state.postgresql":
            return
        connection = await asyncpg.connect(store.metadata["connectionString"])
        try:
            layout = await find_layout(connection, read_config(store))
            select = f"select log from {layout.logs} where app_id = $1 and component = $2"
            log = await connection.fetchval(select, self._app_id, STORE)
            ids = layout.outbox_ids(log)
            await connection.execute(f"select setval('{ids}', last_value + {1 << PARTITION_BITS}) from {ids}")
            # A slice without events moves on only once many transactions have passed.
            await connection.execute(
                "do $$ begin for number in 1..1000 loop perform pg_current_xact_id(); commit; end loop; end $$"
            )
        finally:
            await connection.close(timeout=5)

    def _store(self) -> Component:
        components = load(self._folder / "mended", self._app_id, {}, registry=_REGISTRY)
        return next(component for component in components if component.name == STORE)


async def _has_parked(runtime: Runtime) -> bool:
    return any(key.is_parked for key in await runtime.outbox_deferred(STORE))


async def _is_relayed(runtime: Runtime) -> bool:
    return not any(each.pending for each in await runtime.outbox_status(STORE))


async def _is_relayed_replaying(runtime: Runtime) -> bool:
    """Replay what is parked; tell whether all is relayed, and nothing aside."""
    if await _has_parked(runtime):
        await runtime.outbox_replay(STORE)
    return await _is_relayed(runtime) and not await runtime.outbox_deferred(STORE)


async def _trim_for_a_while(log: OutboxLog) -> None:
    """Trim more than once: as long as others have transactions open, PostgreSQL's partitions are not passed."""
    for _ in range(_TRIMS):
        await log.trim()
        await asyncio.sleep(_LOOK_SECONDS)


async def _hold(fact: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not await fact():  # noqa: ASYNC110 - an outbox has no event to wait for
            await asyncio.sleep(_LOOK_SECONDS)


async def main(folder: Path, app_id: str, journal: Path) -> None:
    writer = Writer(folder, app_id, Journal(journal))
    await writer.make_good()
    print("ready", flush=True)
    if point := arm_from_environment():
        await writer.work(point.partition(":")[0])


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(levelname)s %(name)s %(message)s")
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])))
