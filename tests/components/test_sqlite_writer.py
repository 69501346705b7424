"""Group commit, neighbours in one group, other processes, and what goes wrong on the way to the disk."""

import asyncio
import os
import signal
import sqlite3
import struct
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path

import apsw
import pytest

from statecast.clock import SystemClock
from statecast.components.manifest import Component
from statecast.components.state.commit import Commit, Delete, ETag, Upsert
from statecast.components.state.sqlite.state import SqliteStateStore
from statecast.components.testing.deadline import PATIENCE
from statecast.components.testing.log import drain, new_record
from statecast.errors import ComponentError, ETagMismatch, InvalidRequest, OutcomeUnknown, StoreUnavailable

# A process of its own that commits state and record in pairs, and tells each number once it is acknowledged.
COMMITTING = textwrap.dedent(
    """
    import asyncio, sys
    from statecast.clock import SystemClock
    from statecast.components.manifest import Component
    from statecast.components.state.commit import Commit, OutboxRecord, Upsert
    from statecast.components.state.sqlite.state import SqliteStateStore

    async def work(store, worker, workers):
        for number in range(worker, 1_000_000, workers):
            name = f"{sys.argv[2]}-{number}"
            writes = Upsert(f"orders||a-{name}", b"1"), Upsert(f"orders||b-{name}", b"1")
            record = OutboxRecord(f"orders||{name}", name, "pubsub", "orders", b"{}")
            await store.transact(Commit(writes, (record,)))
            print(number, flush=True)

    async def main():
        component = Component("statestore", "state.sqlite", metadata={"connectionString": sys.argv[1]})
        async with SqliteStateStore(component, app_id="orders", clock=SystemClock()) as store:
            await asyncio.gather(*(work(store, worker, 8) for worker in range(8)))

    asyncio.run(main())
    """
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.db"


@pytest.fixture
def no_database(path: Path) -> Path:
    path.write_bytes(b"no database at all" * 1000)
    return path


def new_store(connection: Path | str, **metadata: str) -> SqliteStateStore:
    component = Component("statestore", "state.sqlite", metadata={"connectionString": str(connection), **metadata})
    return SqliteStateStore(component, app_id="orders", clock=SystemClock())


def write(number: int, *, etag: str | None = None, size: int = 1) -> Commit:
    upsert = Upsert(f"orders||{number}", b"1" * size, etag=None if etag is None else ETag(etag))
    return Commit((upsert,), (new_record(f"orders||{number}", str(number)),))


@contextmanager
def lock_held(path: Path) -> Iterator[apsw.Connection]:
    """Hold the write lock as another program does that is in the middle of a transaction."""
    with closing(apsw.Connection(str(path))) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield connection


@asynccontextmanager
async def committing(path: Path, name: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", COMMITTING, str(path), name, stdout=asyncio.subprocess.PIPE, cwd=os.getcwd()
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def acknowledged(process: asyncio.subprocess.Process, count: int) -> set[int]:
    assert process.stdout is not None
    async with asyncio.timeout(PATIENCE.total_seconds()):
        return {int(await process.stdout.readline()) for _ in range(count)}


def transactions_in_log(path: Path) -> int:
    """Count the transactions in the write-ahead log: the frames whose header tells the size after a commit."""
    # https://www.sqlite.org/fileformat2.html §4.1
    log = path.with_name(path.name + "-wal").read_bytes()
    (page_size,) = struct.unpack(">I", log[8:12])
    salt_1, salt_2 = struct.unpack(">II", log[16:24])
    frames = (struct.unpack(">IIII", log[at : at + 16]) for at in range(32, len(log) - 24, page_size + 24))
    return sum(1 for _, size, *salts in frames if size and salts == [salt_1, salt_2])


async def test_commits_that_come_together_share_a_transaction(path: Path) -> None:
    async with new_store(path) as store:
        before = transactions_in_log(path)

        await asyncio.gather(*(store.transact(write(number)) for number in range(100)))

        assert 1 <= transactions_in_log(path) - before <= 3
        assert len(await drain(store.log)) == 100


async def test_a_refused_commit_leaves_its_neighbours_in_the_group(path: Path) -> None:
    async with new_store(path) as store:
        before = transactions_in_log(path)

        outcomes = await asyncio.gather(
            *(store.transact(write(number, etag="stale" if number % 3 == 0 else None)) for number in range(60)),
            return_exceptions=True,
        )

        assert transactions_in_log(path) - before <= 3
        refused = {number for number, outcome in enumerate(outcomes) if isinstance(outcome, ETagMismatch)}
        assert refused == set(range(0, 60, 3))
        items = await store.bulk_get([f"orders||{number}" for number in range(60)])
        assert {number for number, item in enumerate(items) if item is None} == refused
        assert {int(record.event_id) for record in await drain(store.log)} == set(range(60)) - refused


async def test_commits_of_a_group_keep_their_order_whether_they_look_first_or_not(path: Path) -> None:
    keys = [f"orders||{number % 3}" for number in range(150)]
    deletes = set(range(0, 150, 7))
    async with new_store(path) as store:
        before = transactions_in_log(path)

        etags = await asyncio.gather(
            *(
                store.transact(
                    Commit(
                        (Delete(key) if number in deletes else Upsert(key, str(number).encode()),),
                        (new_record(key, str(number)),),
                    )
                )
                for number, key in enumerate(keys)
            )
        )

        assert transactions_in_log(path) - before <= 3
        items = await store.bulk_get(keys[-3:])
        assert [(item.value, item.etag) if item else None for item in items] == [
            None if number in deletes else (str(number).encode(), *etags[number]) for number in range(147, 150)
        ]
        assert None in items
        told = [int(record.event_id) for record in await drain(store.log)]
        assert sorted(told) == list(range(150))
        assert all(of_key == sorted(of_key) for of_key in ([n for n in told if n % 3 == key] for key in range(3)))


async def test_a_commit_that_fails_halfway_leaves_nothing_of_it_and_all_of_its_neighbours(path: Path) -> None:
    broken = Commit((Upsert("orders||3", b"1"), Upsert("orders||\ud800", b"1")))
    async with new_store(path) as store:
        outcomes = await asyncio.gather(
            *(store.transact(broken if number == 3 else write(number)) for number in range(10)), return_exceptions=True
        )

        assert [isinstance(outcome, InvalidRequest) for outcome in outcomes] == [number == 3 for number in range(10)]
        items = await store.bulk_get([f"orders||{number}" for number in range(10)])
        assert [item is None for item in items] == [number == 3 for number in range(10)]
        assert len(await drain(store.log)) == 9


async def test_text_that_is_no_utf_8_is_refused(path: Path) -> None:
    async with new_store(path) as store:
        with pytest.raises(InvalidRequest, match="UTF-8"):
            await store.transact(Commit((Upsert("orders||1", b"\xff"),)))


async def test_a_second_process_commits_meanwhile(path: Path) -> None:
    async with new_store(path) as store, committing(path, "other") as other:
        await acknowledged(other, 1)
        stop = asyncio.Event()
        mine = 0

        async def commit_on() -> None:
            nonlocal mine
            while not stop.is_set():
                await store.transact(write(mine))
                mine += 1

        async with asyncio.TaskGroup() as group:
            for _ in range(16):
                group.create_task(commit_on())
            theirs = await acknowledged(other, 200)
            stop.set()

        assert len(theirs) == 200
        assert mine > 0


async def test_a_killed_process_loses_no_acknowledged_commit_and_leaves_no_partial_one(path: Path) -> None:
    told: set[str] = set()
    for attempt in range(3):
        async with committing(path, f"{attempt}") as process:
            numbers = await acknowledged(process, 150 + 37 * attempt)
            process.send_signal(signal.SIGKILL)
            await process.wait()
            told |= {f"{attempt}-{number}" for number in numbers}

    async with new_store(path) as store:
        records = {record.event_id for record in await drain(store.log)}
    with closing(sqlite3.connect(path)) as connection:
        keys = {key for (key,) in connection.execute("SELECT key FROM state")}
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    first = {key.removeprefix("orders||a-") for key in keys if key.startswith("orders||a-")}
    second = {key.removeprefix("orders||b-") for key in keys if key.startswith("orders||b-")}
    assert told <= first
    assert first == second == records


async def test_who_waits_longer_than_the_busy_timeout_for_the_lock_has_written_nothing(path: Path) -> None:
    async with new_store(path, busyTimeout="50ms") as store:
        with lock_held(path):
            outcomes = await asyncio.gather(*(store.transact(write(n)) for n in range(5)), return_exceptions=True)

        assert [type(outcome) for outcome in outcomes] == [StoreUnavailable] * 5
        assert len({id(outcome) for outcome in outcomes}) == 5
        assert await store.get("orders||1") is None
        await store.transact(write(1))
        assert await store.get("orders||1") is not None


async def test_who_waits_longer_than_the_timeout_for_the_lock_is_withdrawn(path: Path) -> None:
    async with new_store(path, busyTimeout="20s", timeout="1s") as store:
        with lock_held(path), pytest.raises(StoreUnavailable):
            await store.transact(write(1))

        await store.transact(write(2))
        assert await store.get("orders||1") is None


async def test_a_lock_that_is_given_back_in_time_is_waited_for(path: Path) -> None:
    async with new_store(path, busyTimeout="20s") as store:
        with lock_held(path) as holder:
            commit = asyncio.create_task(store.transact(write(1)))
            assert await store.get("orders||1") is None
            holder.execute("COMMIT")

        await commit
        assert await store.get("orders||1") is not None


async def test_a_commit_that_is_cancelled_while_it_waits_for_the_lock_is_withdrawn(path: Path) -> None:
    async with new_store(path, busyTimeout="20s") as store:
        with lock_held(path):
            commits = [asyncio.create_task(store.transact(write(number))) for number in range(3)]
            await asyncio.sleep(0)
            commits[1].cancel()
            with pytest.raises(asyncio.CancelledError):
                await commits[1]

        await asyncio.gather(commits[0], commits[2])
        items = await store.bulk_get([f"orders||{number}" for number in range(3)])
        assert [item is None for item in items] == [False, True, False]


async def test_closing_finishes_what_is_queued(path: Path) -> None:
    store = new_store(path)
    async with store:
        commits = [asyncio.create_task(store.transact(write(number))) for number in range(20)]
        await asyncio.sleep(0)

    await asyncio.gather(*commits)
    async with store:
        assert None not in await store.bulk_get([f"orders||{number}" for number in range(20)])


async def test_closing_while_another_program_keeps_the_lock_does_not_hang(path: Path) -> None:
    store = new_store(path, busyTimeout="20s", timeout="1s")
    with closing(apsw.Connection(str(path))) as lock:
        async with asyncio.timeout(PATIENCE.total_seconds()), store:
            lock.execute("BEGIN IMMEDIATE")
            commit = asyncio.create_task(store.transact(write(1)))
            await asyncio.sleep(0)

        with pytest.raises(StoreUnavailable):
            await commit


async def test_a_full_disk_refuses_what_does_not_fit_and_takes_what_does(path: Path) -> None:
    async with new_store(path):
        pass
    async with new_store(f"{path}?_pragma=max_page_count(60)") as store:
        outcomes = await asyncio.gather(
            *(store.transact(write(number, size=500_000 if number == 3 else 10)) for number in range(8)),
            return_exceptions=True,
        )

        assert [isinstance(outcome, StoreUnavailable) for outcome in outcomes] == [n == 3 for n in range(8)]
        items = await store.bulk_get([f"orders||{number}" for number in range(8)])
        assert [item is None for item in items] == [number == 3 for number in range(8)]
        assert {record.event_id for record in await drain(store.log)} == {"0", "1", "2", "4", "5", "6", "7"}


async def test_a_database_opened_read_only_is_read_and_refuses_commits(path: Path) -> None:
    async with new_store(path, disableWAL="true") as store:
        await store.transact(write(1))

    async with new_store(f"file:{path}?mode=ro", disableWAL="true") as store:
        assert await store.get("orders||1") is not None
        with pytest.raises(StoreUnavailable, match="readonly"):
            await store.transact(write(2))
        assert (await store.log.status())[0].slice == 0


async def test_a_commit_whose_sync_failed_is_of_unknown_outcome_and_the_next_one_goes_through(
    path: Path,
) -> None:
    class FailingSync(apsw.VFSFile):
        def xSync(self, flags: int) -> None:  # noqa: N802 - named by SQLite
            if is_failing:
                raise apsw.IOError("the disk does not answer")
            super().xSync(flags)

    class FailingDisk(apsw.VFS):
        def __init__(self) -> None:
            super().__init__("failing", base="")

        def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> FailingSync:  # noqa: N802
            return FailingSync("", name, flags)

    is_failing = False
    disk = FailingDisk()
    try:
        async with new_store(f"file:{path}?vfs=failing") as store:
            await store.transact(write(1))
            is_failing = True
            with pytest.raises(OutcomeUnknown):
                await store.transact(write(2))
            is_failing = False

            await store.transact(write(3))

            assert await store.get("orders||1") is not None
            assert await store.get("orders||3") is not None
    finally:
        disk.unregister()


async def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "state.db"

    with pytest.raises(ComponentError, match="nowhere"):
        await new_store(path).__aenter__()


async def test_a_file_that_is_no_database_is_named(no_database: Path) -> None:
    with pytest.raises(StoreUnavailable, match=r"state\.db"):
        await new_store(no_database).__aenter__()


async def test_a_store_that_could_not_be_opened_leaves_no_thread(no_database: Path) -> None:
    with pytest.raises(StoreUnavailable):
        await new_store(no_database).__aenter__()

    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sqlite writer")]
