"""Killed at any point, on any pair of store and broker, a process leaves nothing behind that its successor cannot mend.

Each point has a process that is killed there; its successor makes good what it left, and is killed at the next point.
"""

import asyncio
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

import pytest

from statecast import Component, Runtime, RuntimeOptions
from statecast.components.loader import load
from statecast.components.registry import installed
from statecast.testing.crash_points import POINTS, VARIABLE
from tests.crash.arena import (
    APP,
    PUBSUB,
    STORE,
    TOPIC,
    Arena,
    kafka_arena,
    postgresql_store,
    redis_arena,
    redis_store,
    sqlite_store,
    write_components,
)
from tests.crash.children import Children
from tests.crash.crash_child import LARGEST_BYTES, Journal, Order
from tests.crash.crash_table import CrashTable, Finding
from tests.crash.ledger import Ledger, Told, compare
from tests.crash.limited_broker import LIMIT

CHILD = Path(__file__).with_name("crash_child.py")

# Most of a successor's time is spent in waiting for its predecessor's leases to end.
LANES = 6

# Commits come by from the first relay on, the first persisting only renews leases, the first trims find nothing.
PASSAGES = {
    "commit.before": 8,
    "commit.sent": 8,
    "commit.after": 8,
    "read.before": 2,
    "publish.sent": 2,
    "publish.after": 2,
    "advance.before": 2,
    "advance.sent": 2,
    "trim.before": 3,
    "trim.after": 3,
}

# On Redis there is nothing left to trim: persisting has done so.
NOT_ON_REDIS = ("trim.sent",)

pytestmark = pytest.mark.timeout(240)


async def test_postgresql_to_kafka(
    postgresql_url: str, kafka_bootstrap: str, crash_table: CrashTable, tmp_path: Path
) -> None:
    async with to_kafka(postgresql_store(postgresql_url), kafka_bootstrap, tmp_path) as matrix:
        await matrix.assert_nothing_is_lost(crash_table, "postgresql-kafka")


async def test_postgresql_to_redis(
    postgresql_url: str, redis_url: str, crash_table: CrashTable, tmp_path: Path
) -> None:
    async with to_redis(postgresql_store(postgresql_url), redis_url, tmp_path) as matrix:
        await matrix.assert_nothing_is_lost(crash_table, "postgresql-redis")


async def test_redis_to_kafka(redis_url: str, kafka_bootstrap: str, crash_table: CrashTable, tmp_path: Path) -> None:
    async with to_kafka(redis_store(redis_url), kafka_bootstrap, tmp_path) as matrix:
        await matrix.assert_nothing_is_lost(crash_table, "redis-kafka", left_out=NOT_ON_REDIS)


async def test_redis_to_redis(redis_url: str, crash_table: CrashTable, tmp_path: Path) -> None:
    async with to_redis(redis_store(redis_url), redis_url, tmp_path) as matrix:
        await matrix.assert_nothing_is_lost(crash_table, "redis-redis", left_out=NOT_ON_REDIS)


async def test_sqlite_to_kafka(kafka_bootstrap: str, crash_table: CrashTable, tmp_path: Path) -> None:
    async with to_kafka(sqlite_store(tmp_path / "state.db"), kafka_bootstrap, tmp_path) as matrix:
        await matrix.assert_nothing_is_lost(crash_table, "sqlite-kafka")


async def test_sqlite_to_redis(redis_url: str, crash_table: CrashTable, tmp_path: Path) -> None:
    async with to_redis(sqlite_store(tmp_path / "state.db"), redis_url, tmp_path) as matrix:
        await matrix.assert_nothing_is_lost(crash_table, "sqlite-redis")


@dataclass(frozen=True, slots=True)
class Lane:
    """One outbox, and the processes that work on it one after the other."""

    app_id: str
    points: Sequence[str]
    journal: Journal
    journal_path: Path


@dataclass(frozen=True, slots=True)
class Matrix:
    """All points on one pair of store and broker. `mended` has the components of that pair; the broker in `strict`
    refuses large messages."""

    arena: Arena
    folder: Path

    async def assert_nothing_is_lost(self, table: CrashTable, pair: str, *, left_out: Sequence[str] = ()) -> None:
        found: dict[str, Finding | None] = dict.fromkeys(left_out)
        table.pairs[pair] = found
        lanes = self._lanes([point for point in POINTS if point not in left_out])
        async with Children(self.folder) as children:
            async with asyncio.TaskGroup() as group:
                for lane in lanes:
                    group.create_task(self._kill_at_every_point(lane, children))
            assert "Traceback" not in children.logs(), children.logs()
        for lane in lanes:
            found |= await self._findings(lane)

        bad = {point: finding for point, finding in found.items() if finding is not None and not finding.is_good}
        assert not bad, bad

    def _lanes(self, points: Sequence[str]) -> list[Lane]:
        lanes = []
        for number in range(LANES):
            path = self.folder / f"journal-{number}"
            lanes.append(Lane(f"{APP}{number}", points[number::LANES], Journal(path), path))
        return lanes

    async def _kill_at_every_point(self, lane: Lane, children: Children) -> None:
        for point in lane.points:
            code = await self._run_child(lane, children, {VARIABLE: f"{point}:{PASSAGES.get(point, 1)}"})
            assert code == -signal.SIGKILL, f"{point} was not reached, {code}: {children.logs()}"
        code = await self._run_child(lane, children, {})
        assert code == 0, children.logs()

    async def _run_child(self, lane: Lane, children: Children, environment: Mapping[str, str]) -> int:
        arguments = (str(self.folder), lane.app_id, str(lane.journal_path))
        child = await children.start(CHILD, *arguments, environment=environment)
        await child.is_ready()
        return await child.ended()

    async def _findings(self, lane: Lane) -> dict[str, Finding]:
        events = [Told.parse(envelope) for envelope in await self.arena.topic.read()]
        orders = lane.journal.orders()
        state = await self._state(lane, {order.key for order in orders})
        return {
            point: finding_of(
                [order for order in orders if point_of(order.key) == point],
                [event for event in events if point_of(event.key) == point],
                state,
            )
            for point in lane.points
        }

    async def _state(self, lane: Lane, keys: set[str]) -> dict[str, int]:
        """Give the number of the value that each key has."""
        options = RuntimeOptions(relays=False)
        async with Runtime.open(self.folder / "mended", app_id=lane.app_id, options=options) as runtime:
            items = await runtime.state(STORE).bulk_get(sorted(keys))
        return {item.key: item.json()["number"] for item in items if item is not None}


def finding_of(orders: Sequence[Order], events: Sequence[Told], state: Mapping[str, int]) -> Finding:
    """Compare what was committed with what arrived. In the end all was: what was not acknowledged was repeated."""
    ledger = Ledger()
    ledger.note(order.value() for order in orders)
    findings = compare(ledger, events)
    numbers = {key: len(tokens) for key, tokens in ledger.committed.items()}
    gone = [
        f"{key} is at {state.get(key)}, not {number}" for key, number in numbers.items() if state.get(key) != number
    ]
    return Finding(
        lost=(*findings.lost, *gone),
        doubled=tuple(findings.renamed),
        reordered=tuple(findings.inverted),
        made_up=tuple(findings.uncommitted),
        repeats=len(events) - ledger.count + len(findings.lost),
    )


def point_of(key: str) -> str:
    return key.partition("/")[0]


@asynccontextmanager
async def to_kafka(store: Component, bootstrap: str, folder: Path) -> AsyncIterator[Matrix]:
    topic = f"{TOPIC}-{uuid4().hex[:12]}"
    async with kafka_arena(store, bootstrap, topic, folder / "mended") as arena:
        yield matrix_in(folder, arena, topic)


@asynccontextmanager
async def to_redis(store: Component, url: str, folder: Path) -> AsyncIterator[Matrix]:
    async with redis_arena(store, url, folder / "mended") as arena:
        yield matrix_in(folder, arena, TOPIC)


def matrix_in(folder: Path, arena: Arena, topic: str) -> Matrix:
    broker = next(each for each in load(arena.folder, APP, {}, registry=installed()) if each.name == PUBSUB)
    strict = replace(broker, metadata={**broker.metadata, LIMIT: str(LARGEST_BYTES)})
    write_components(folder / "strict", arena.store, strict, topic)
    return Matrix(arena, folder)
