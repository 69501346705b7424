"""Everything of a transaction is committed, its events among it, or nothing, whoever is cancelled or killed."""

import json
from pathlib import Path
from random import Random

from statecast import CloudEvent, Component, Runtime, StateClient
from tests.crash.arena import (
    APP,
    PUBSUB,
    STORE,
    TOPIC,
    Arena,
    Envelope,
    postgresql_store,
    redis_arena,
    redis_store,
    sqlite_store,
    until,
    write_components,
)
from tests.crash.children import Child, Children
from tests.crash.deeds import ACCOUNTS, Ending, Journal, Outcome, note_key, problems
from tests.crash.writing import write

SEED = 20_240_918
DEEDS = 250
PATIENCE_SECONDS = 30.0
_ENDLESS = 100_000
WRITER = Path(__file__).with_name("writer_process.py")


async def test_on_postgresql(postgresql_url: str, redis_url: str, tmp_path: Path) -> None:
    async with redis_arena(postgresql_store(postgresql_url), redis_url, tmp_path / "components") as arena:
        await assert_all_or_nothing(arena, tmp_path)


async def test_on_redis(redis_url: str, tmp_path: Path) -> None:
    async with redis_arena(redis_store(redis_url), redis_url, tmp_path / "components") as arena:
        await assert_all_or_nothing(arena, tmp_path)


async def test_on_sqlite(redis_url: str, tmp_path: Path) -> None:
    async with redis_arena(sqlite_store(tmp_path / "state.db"), redis_url, tmp_path / "components") as arena:
        await assert_all_or_nothing(arena, tmp_path)


async def test_in_memory(tmp_path: Path) -> None:
    """What is in memory is gone with its process: callers are cancelled here, and nothing is killed."""
    store, broker = Component(STORE, "state.in-memory", "v1"), Component(PUBSUB, "pubsub.in-memory", "v1")
    folder = write_components(tmp_path / "components", store, broker, TOPIC)
    events: list[Envelope] = []
    async with Runtime.open(folder, app_id=APP) as runtime:

        @runtime.subscribe(PUBSUB, TOPIC)
        async def receive(event: CloudEvent) -> None:
            events.append({"id": event.id, "data": event.data})

        await runtime.ready()
        with (tmp_path / "journal").open("x") as file:
            await write(runtime.state(STORE), file, "writer", Random(SEED), DEEDS)
        assert await until(lambda: is_relayed(runtime), seconds=PATIENCE_SECONDS)
        journal = read_journal(tmp_path / "journal")
        outcome = Outcome(*await read_state(runtime.state(STORE), journal), events)

    assert problems(journal, outcome) == []
    assert_was_provoked(journal)


async def assert_all_or_nothing(arena: Arena, folder: Path) -> None:
    """Two writing processes are killed in the midst of their commits, a third one comes to its end.

    Tried with events that are written for refused commits too, or before the checks; with marks, and then etags, that
    nobody looks at: each is found.
    """
    random = Random(SEED)
    print(f"seed {SEED}")
    files = [folder / f"journal-{number}" for number in (1, 2, 3)]
    async with Children(folder) as children:
        for number, file in enumerate(files[:-1], start=1):
            await write_and_kill(children, arena, file, f"writer{number}", random)
        child = await start_writer(children, arena, files[-1], "writer3", random, DEEDS)
        assert await child.ended() == 0, children.logs()
        assert "Traceback" not in children.logs(), children.logs()
    journal = read_journal(*files)

    outcome = await outcome_at_rest(arena, journal)

    assert problems(journal, outcome) == []
    assert_was_provoked(journal)
    assert journal.count(Ending.UNTOLD) > 0, "no caller was cancelled"
    assert journal.begun.keys() - journal.ended.keys(), "nothing was under way when a writer was killed"
    print(f"{len(journal.begun)} begun, {len(outcome.committed)} committed, {len(outcome.events)} events")


def assert_was_provoked(journal: Journal) -> None:
    assert journal.count(Ending.APPLIED) > 0, "nothing was committed"
    refused = [token for token, ending in journal.ended.items() if ending is Ending.REFUSED]
    assert any(not journal.begun[token].is_stale for token in refused), "no two writers were in conflict"


async def write_and_kill(children: Children, arena: Arena, journal: Path, name: str, random: Random) -> None:
    child = await start_writer(children, arena, journal, name, random, _ENDLESS)
    enough = random.randint(DEEDS // 10, DEEDS // 3)

    async def has_enough() -> bool:
        return read_journal(journal).count(Ending.APPLIED) >= enough

    assert await until(has_enough, seconds=PATIENCE_SECONDS), children.logs()
    await child.kill()


async def start_writer(children: Children, arena: Arena, journal: Path, name: str, random: Random, deeds: int) -> Child:
    arguments = (arena.folder, APP, name, random.random(), deeds, journal)
    child = await children.start(WRITER, *map(str, arguments))
    await child.is_ready()
    return child


async def outcome_at_rest(arena: Arena, journal: Journal) -> Outcome:
    """Read what there is, once all that was left over is relayed."""
    async with Runtime.open(arena.folder, app_id=APP) as runtime:
        assert await until(lambda: is_relayed(runtime), seconds=PATIENCE_SECONDS)
        histories, notes = await read_state(runtime.state(STORE), journal)
    return Outcome(histories, notes, await arena.topic.read())


async def is_relayed(runtime: Runtime) -> bool:
    return not any(each.pending for each in await runtime.outbox_status(STORE))


async def read_state(store: StateClient, journal: Journal) -> tuple[dict[str, list[str]], frozenset[str]]:
    """Read the history of every account, and whose notes stand."""
    accounts = await store.bulk_get(ACCOUNTS)
    notes = await store.bulk_get([note_key(token) for token in journal.begun])
    histories = {item.key: item.json()["history"] for item in accounts if item is not None}
    return histories, frozenset(item.json()["note"] for item in notes if item is not None)


def read_journal(*files: Path) -> Journal:
    journal = Journal()
    for file in files:
        # A line that has no end yet is being written.
        journal.read(json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n"))
    return journal
