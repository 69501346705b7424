"""Relays that come and go in good order share the slices fairly, and hand them over without a loss."""

import asyncio
from collections import Counter
from math import ceil
from pathlib import Path
from random import Random

from statecast import Runtime, RuntimeOptions
from tests.crash.arena import APP, STORE, Arena, postgresql_store, redis_arena, redis_store, until
from tests.crash.children import Child, Children
from tests.crash.ledger import Findings, Ledger, Told, compare
from tests.crash.steady_writer import LedgerNotes, write

RELAY = Path(__file__).with_name("relay_process.py")

SEED = 20_240_920
WRITERS = 3
RELAYS = 3
# Long beside what an end and a start take: a lease that is not given back is seen to be held.
LEASE_SECONDS = 3.0
PUBLISH_SECONDS = 1.0
BATCH = 100
PATIENCE_SECONDS = 30.0
NOTHING_WRONG = Findings()


async def test_on_postgresql(postgresql_url: str, redis_url: str, tmp_path: Path) -> None:
    async with redis_arena(postgresql_store(postgresql_url), redis_url, tmp_path / "components") as arena:
        await assert_relays_share_and_hand_over(arena, tmp_path)


async def test_on_redis(redis_url: str, tmp_path: Path) -> None:
    async with redis_arena(redis_store(redis_url), redis_url, tmp_path / "components") as arena:
        await assert_relays_share_and_hand_over(arena, tmp_path)


async def assert_relays_share_and_hand_over(arena: Arena, logs: Path) -> None:
    """Restart each of three relays in turn, under load.

    Tried with relays that take all they can get, with ones that do not give their leases back, and with leases that
    begin at what is committed by then, so that events are lost.
    """
    ledger, stop = Ledger(), asyncio.Event()
    async with (
        Runtime.open(arena.folder, app_id=APP, options=RuntimeOptions(relays=False)) as runtime,
        Children(logs) as children,
    ):
        async with asyncio.TaskGroup() as writers:
            for number in range(WRITERS):
                notes, random = LedgerNotes(ledger), Random(SEED + number)
                writers.create_task(write(runtime.state(STORE), notes, f"writer{number}", random, stop))
            relays = [await start_relay(children, arena) for _ in range(RELAYS)]
            await assert_shared_by(RELAYS, runtime)
            for _ in range(RELAYS):
                assert await relays.pop(0).leave() == 0, children.logs()
                assert len({*await owners(runtime)} - {None}) == RELAYS - 1, "leases are not given back"
                await assert_shared_by(RELAYS - 1, runtime)
                relays.append(await start_relay(children, arena))
                await assert_shared_by(RELAYS, runtime)
            stop.set()

        async def has_all() -> bool:
            return not compare(ledger, await told(arena)).lost

        assert await until(has_all, seconds=PATIENCE_SECONDS), "not all has arrived"
        assert [await relay.leave() for relay in relays] == [0] * RELAYS, children.logs()
    assert compare(ledger, await told(arena)) == NOTHING_WRONG
    assert "Traceback" not in children.logs(), children.logs()
    print(f"{ledger.count} events, {len(await told(arena)) - ledger.count} repeats")


async def assert_shared_by(relays: int, runtime: Runtime) -> None:
    """Assert that so many relays come to hold all slices, none more than its share."""

    async def are_shared() -> bool:
        found = await owners(runtime)
        return None not in found and len(found) == relays and max(found.values()) <= ceil(found.total() / relays)

    assert await until(are_shared, seconds=PATIENCE_SECONDS), await owners(runtime)


async def owners(runtime: Runtime) -> Counter[str | None]:
    return Counter(each.owner for each in await runtime.outbox_status(STORE))


async def start_relay(children: Children, arena: Arena) -> Child:
    arguments = (arena.folder, APP, LEASE_SECONDS, PUBLISH_SECONDS, BATCH)
    child = await children.start(RELAY, *map(str, arguments))
    await child.is_ready()
    return child


async def told(arena: Arena) -> list[Told]:
    return [Told.parse(envelope) for envelope in await arena.topic.read()]
