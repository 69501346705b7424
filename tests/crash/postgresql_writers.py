"""Writers that use the store's commit function within transactions of their own, which PostgreSQL lets be slow."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from random import Random
from typing import Any, Self
from urllib.parse import urlsplit

import asyncpg
import orjson

from statecast import Check, Component, ETag, TraceContext, upsert
from statecast.components.state.commit import Commit, Operation
from statecast.components.state.postgresql.call import Applied, CommitCall, Outcome, PreparedCommit
from statecast.components.state.postgresql.commit_function import COMMIT_ARGUMENTS
from statecast.components.state.postgresql.config import read_config
from statecast.components.state.postgresql.migration import find_layout
from statecast.components.state.postgresql.schema import PARTITION_BITS, Layout
from statecast.outbox.event import EventIds, EventSource
from statecast.outbox.plan import Outbox, plan_commit
from tests.crash.arena import APP, PUBSUB, STORE
from tests.crash.ledger import Ledger, next_value

_PREFIX = f"{APP}||"
_PASS_TRANSACTIONS = "do $$ begin for number in 1..1000 loop perform pg_current_xact_id(); commit; end loop; end $$"


@dataclass(frozen=True, slots=True)
class CommitFunction:
    """The commit function of the store's log, as anyone with a connection may call it."""

    layout: Layout
    log: int
    slices: int
    topic: str
    ids: EventIds

    @classmethod
    async def find(cls, connection: asyncpg.Connection, store: Component, topic: str) -> Self:
        layout = await find_layout(connection, read_config(store))
        row = await connection.fetchrow(
            f"select log, slices from {layout.logs} where app_id = $1 and component = $2", APP, STORE
        )
        assert row is not None
        return cls(layout, row["log"], row["slices"], topic, EventIds("late"))

    async def read(self, connection: asyncpg.Connection, key: str) -> tuple[dict[str, Any] | None, ETag | None]:
        row = await connection.fetchrow(
            f"select value, etag::text from {self.layout.state} where key = $1", _PREFIX + key
        )
        return (orjson.loads(row["value"]), ETag(row["etag"])) if row else (None, None)

    async def write(
        self, connection: asyncpg.Connection, values: Sequence[Mapping[str, Any]], etags: Sequence[ETag | None]
    ) -> bool:
        """Write the values, each over the state with that etag, and their events; tell whether they were applied."""
        operations: list[Operation] = []
        for value, etag in zip(values, etags, strict=True):
            key = _PREFIX + value["key"]
            operations += [Check(key, etag), upsert(key, value)]
        outcome = await self._call(connection, self._plan(operations))
        return isinstance(outcome, Applied)

    def _plan(self, operations: Sequence[Operation]) -> Commit:
        source = EventSource(APP, datetime.now(UTC), TraceContext(), self.ids)
        return plan_commit(
            operations, Outbox(PUBSUB, self.topic), source, logical_key=lambda key: key.removeprefix(_PREFIX)
        )

    async def _call(self, connection: asyncpg.Connection, commit: Commit) -> Outcome:
        call = CommitCall((PreparedCommit(commit, self.slices),))
        answers = await connection.fetchval(
            f"select {self.layout.commit(self.log)}({COMMIT_ARGUMENTS})", *call.arguments(wait=True)
        )
        (outcome,) = call.outcomes(answers)
        return outcome


async def write_late(
    function: CommitFunction,
    url: str,
    keys: Sequence[str],
    ledger: Ledger,
    name: str,
    random: Random,
    stop: asyncio.Event,
) -> None:
    """Take a transaction id early, write later and commit later still, or take it all back; until `stop` is set."""
    connection = await asyncpg.connect(url)
    try:
        attempt = 0
        while not stop.is_set():
            attempt += 1
            transaction = connection.transaction()
            await transaction.start()
            values: list[dict[str, Any]] = []
            try:
                await connection.fetchval("select pg_current_xact_id()")
                await asyncio.sleep(random.uniform(0, 0.3))
                values = await _write(function, connection, random.sample(keys, 2), f"{name}-{attempt}")
                await asyncio.sleep(random.uniform(0, 0.15))
            except (asyncpg.DeadlockDetectedError, asyncpg.LockNotAvailableError):
                values = []
            if values and random.random() < 0.8:
                await transaction.commit()
                ledger.note(values)
            else:
                await transaction.rollback()
    finally:
        await connection.close(timeout=5)


async def _write(
    function: CommitFunction, connection: asyncpg.Connection, keys: Sequence[str], token: str
) -> list[dict[str, Any]]:
    """Write on in these keys; return what was written, nothing if another writer came between."""
    read = [await function.read(connection, key) for key in keys]
    values = [next_value(key, before, token) for key, (before, _) in zip(keys, read, strict=True)]
    return values if await function.write(connection, values, [etag for _, etag in read]) else []


async def turn_the_ring(function: CommitFunction, url: str, stop: asyncio.Event) -> None:
    """Leave one partition of the log after the other, as so many events would, until `stop` is set.

    Transactions of others pass too: a slice without events moves on only once there were many.
    """
    layout, log = function.layout, function.log
    ids, size = layout.outbox_ids(log), 1 << PARTITION_BITS
    connection = await asyncpg.connect(url)
    try:
        while not stop.is_set():
            await asyncio.sleep(0.4)
            await connection.execute(_PASS_TRANSACTIONS)
            await connection.execute(f"select setval('{ids}', last_value + {size}) from {ids}")
    finally:
        await connection.close(timeout=5)


async def remaining_events(function: CommitFunction, url: str) -> int:
    """Count what the log holds, after more transactions of others."""
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(_PASS_TRANSACTIONS)
        return int(await connection.fetchval(f"select count(*) from {function.layout.outbox(function.log)}"))
    finally:
        await connection.close(timeout=5)


class OpenCommit:
    """A commit of the store whose transaction is left open: its values and events are written, and not yet true."""

    def __init__(self, connection: asyncpg.Connection, values: Sequence[Mapping[str, Any]]) -> None:
        self._connection = connection
        self.values = values

    async def commit(self) -> None:
        await self._connection.execute("commit")


@asynccontextmanager
async def open_commit(function: CommitFunction, url: str, keys: Sequence[str]) -> AsyncIterator[OpenCommit]:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute("begin")
        values = await _write(function, connection, keys, "open")
        assert values, "nobody else writes these keys"
        yield OpenCommit(connection, values)
    finally:
        await connection.close(timeout=5)


@asynccontextmanager
async def open_write(url: str) -> AsyncIterator[None]:
    """Leave a transaction open that has written something of its own, as a long import does."""
    connection = await asyncpg.connect(url)
    try:
        await connection.execute("begin")
        await connection.execute("create table an_import (line text)")
        await connection.execute("insert into an_import values ('1')")
        yield
    finally:
        await connection.close(timeout=5)


def another_database(url: str) -> str:
    """Name another database of the same cluster."""
    return urlsplit(url)._replace(path="/postgres").geturl()
