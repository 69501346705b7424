"""A file that an earlier version made is brought up to date with all that is in it."""

import asyncio
import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from statecast.clock import SystemClock
from statecast.components.manifest import Component
from statecast.components.state.commit import Commit, ETag, Mark, OutboxRecord, Upsert
from statecast.components.state.log import DeferredQueue, Failure, QueueProgress, QueueStatus
from statecast.components.state.sqlite.schema import VERSION
from statecast.components.state.sqlite.state import SqliteStateStore
from statecast.components.testing.log import (
    acquire_all,
    drain,
    ids_of,
    new_record,
    put_each_aside,
    queue,
    read_aside,
)
from statecast.errors import Duplicate

HOUR = timedelta(hours=1)
OLD_MARK = Mark(bytes(16), HOUR)

# The first schema, with a value, a mark, and two events of which one is relayed.
FIRST_SCHEMA = """
CREATE TABLE "metadata" (key TEXT NOT NULL PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE "state" (
  key TEXT NOT NULL PRIMARY KEY,
  value TEXT NOT NULL,
  is_binary BOOLEAN NOT NULL,
  etag TEXT NOT NULL,
  expiration_time TIMESTAMP DEFAULT NULL,
  update_time TIMESTAMP NOT NULL DEFAULT CURRENT_TIMESTAMP
);
CREATE INDEX "statecast_state_expiration" ON "state" (expiration_time) WHERE expiration_time IS NOT NULL;
INSERT INTO "metadata" (key, value) VALUES ('migrations', '1');
CREATE TABLE statecast_schema (version INTEGER NOT NULL PRIMARY KEY);
CREATE TABLE statecast_registry (
  log INTEGER PRIMARY KEY,
  app_id TEXT NOT NULL,
  component TEXT NOT NULL,
  slices INTEGER NOT NULL,
  UNIQUE (app_id, component)
);
CREATE TABLE statecast_slices (
  log INTEGER NOT NULL,
  slice INTEGER NOT NULL,
  owner TEXT,
  epoch INTEGER NOT NULL DEFAULT 0,
  position INTEGER NOT NULL DEFAULT 0,
  expires_at REAL NOT NULL DEFAULT 0,
  PRIMARY KEY (log, slice)
) WITHOUT ROWID;
CREATE TABLE statecast_relays (
  log INTEGER NOT NULL,
  owner TEXT NOT NULL,
  expires_at REAL NOT NULL,
  PRIMARY KEY (log, owner)
) WITHOUT ROWID;
CREATE TABLE statecast_marks (
  log INTEGER NOT NULL,
  digest BLOB NOT NULL,
  expires_at REAL NOT NULL,
  PRIMARY KEY (log, digest)
) WITHOUT ROWID;
CREATE INDEX statecast_marks_expiration ON statecast_marks (expires_at);
CREATE TABLE statecast_claims (
  app_id TEXT NOT NULL,
  type TEXT NOT NULL,
  id TEXT NOT NULL,
  token TEXT NOT NULL,
  claimed_at TEXT NOT NULL,
  PRIMARY KEY (app_id, type, id)
) WITHOUT ROWID;
INSERT INTO statecast_schema (version) VALUES (1);
CREATE TABLE statecast_outbox_1 (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  slice INTEGER NOT NULL,
  order_key TEXT NOT NULL,
  event_id TEXT NOT NULL,
  format INTEGER NOT NULL,
  pubsub TEXT NOT NULL,
  topic TEXT NOT NULL,
  metadata TEXT NOT NULL,
  created_at TEXT NOT NULL,
  body BLOB NOT NULL
);
INSERT INTO statecast_registry (log, app_id, component, slices) VALUES (1, 'orders', 'statestore', 2);
INSERT INTO statecast_slices (log, slice, epoch, position) VALUES (1, 0, 3, 1), (1, 1, 3, 1);
INSERT INTO state (key, value, is_binary, etag) VALUES ('orders||1', '1', 0, 'etag-1');
INSERT INTO statecast_marks (log, digest, expires_at) VALUES (1, zeroblob(16), unixepoch() + 3600);
INSERT INTO statecast_outbox_1 (slice, order_key, event_id, format, pubsub, topic, metadata, created_at, body) VALUES
  (0, 'orders||1', 'relayed', 1, 'pubsub', 'orders', '{}', '2026-01-02 03:04:05.250', x'01'),
  (0, 'orders||1', 'pending', 1, 'pubsub', 'orders', '{}', '2026-01-02 03:04:06.250', x'02');
"""

# The second schema, with one key parked and one to be tried again; each has entries of two queues in turns.
SECOND_SCHEMA = f"""
{FIRST_SCHEMA}
ALTER TABLE statecast_marks ADD COLUMN etags TEXT;
INSERT INTO statecast_schema (version) VALUES (2);
CREATE TABLE statecast_deferred_keys (
  log INTEGER NOT NULL,
  order_key TEXT NOT NULL,
  slice INTEGER NOT NULL,
  attempts INTEGER NOT NULL,
  reason TEXT NOT NULL,
  due_at REAL,
  pending INTEGER NOT NULL,
  oldest_at TEXT NOT NULL,
  PRIMARY KEY (log, order_key)
) WITHOUT ROWID;
CREATE TABLE statecast_deferred_entries (
  log INTEGER NOT NULL,
  id INTEGER NOT NULL,
  slice INTEGER NOT NULL,
  order_key TEXT NOT NULL,
  event_id TEXT NOT NULL,
  format INTEGER NOT NULL,
  pubsub TEXT NOT NULL,
  topic TEXT NOT NULL,
  metadata TEXT NOT NULL,
  created_at TEXT NOT NULL,
  body BLOB NOT NULL,
  PRIMARY KEY (log, order_key, id)
);
INSERT INTO statecast_deferred_keys (log, order_key, slice, attempts, reason, due_at, pending, oldest_at) VALUES
  (1, 'orders||3', 0, 10, 'too large', NULL, 3, '2026-01-02 03:04:07.250'),
  (1, 'orders||4', 1, 2, 'refused', unixepoch() + 3600, 3, '2026-01-02 03:04:07.250');
INSERT INTO statecast_deferred_entries
  (log, id, slice, order_key, event_id, format, pubsub, topic, metadata, created_at, body) VALUES
  (1, 9, 0, 'orders||3', '9', 1, 'pubsub', 'orders', '{{}}', '2026-01-02 03:04:07.250', x'01'),
  (1, 10, 0, 'orders||3', '10', 1, 'pubsub', 'audit', '{{"a": "b"}}', '2026-01-02 03:04:08.250', x'02ff'),
  (1, 11, 0, 'orders||3', '11', 1, 'pubsub', 'orders', '{{}}', '2026-01-02 03:04:09.250', x'03'),
  (1, 12, 1, 'orders||4', '12', 1, 'pubsub', 'orders', '{{}}', '2026-01-02 03:04:07.250', x'04'),
  (1, 13, 1, 'orders||4', '13', 1, 'other', 'orders', '{{}}', '2026-01-02 03:04:08.250', x'05'),
  (1, 14, 1, 'orders||4', '14', 1, 'pubsub', 'orders', '{{}}', '2026-01-02 03:04:09.250', x'06');
"""


@pytest.fixture
def old_file(tmp_path: Path) -> Path:
    return new_file(tmp_path / "first.db", FIRST_SCHEMA)


@pytest.fixture
def second_file(tmp_path: Path) -> Path:
    return new_file(tmp_path / "second.db", SECOND_SCHEMA)


def new_file(path: Path, script: str) -> Path:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(script)
    return path


def new_store(path: Path) -> SqliteStateStore:
    component = Component("statestore", "state.sqlite", metadata={"connectionString": str(path)})
    return SqliteStateStore(component, app_id="orders", clock=SystemClock())


def query(path: Path, select: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(select).fetchall()


async def test_a_file_of_the_first_schema_keeps_what_is_in_it(old_file: Path) -> None:
    async with new_store(old_file) as store:
        item = await store.get("orders||1")

        assert item is not None
        assert (item.value, item.etag) == (b"1", ETag("etag-1"))
        assert store.log.slices == 2
        assert [record.event_id for record in await drain(store.log)] == ["pending"]


async def test_a_mark_of_the_first_schema_still_refuses_and_knows_no_etags(old_file: Path) -> None:
    async with new_store(old_file) as store:
        with pytest.raises(Duplicate) as raised:
            await store.transact(Commit((Upsert("orders||1", b"2"),), marks=(OLD_MARK,)))

    assert raised.value.etags is None


async def test_a_file_of_the_first_schema_learns_what_is_new(old_file: Path) -> None:
    once = Commit((Upsert("orders||2", b"1"),), (new_record("orders||2"),), (Mark(b"\x01" * 16, HOUR),))
    async with new_store(old_file) as store:
        answer = await store.transact(once)
        await put_each_aside(store.log, {"orders||2": Failure(10, None, "too large")})

    async with new_store(old_file) as store:
        with pytest.raises(Duplicate) as raised:
            await store.transact(once)
        assert raised.value.etags == answer
        assert [entry.record for entry in await read_aside(store.log, "orders||2")] == list(once.records)
    assert query(old_file, "SELECT max(version) FROM statecast_schema") == [(VERSION,)]


async def test_stores_that_open_an_old_file_at_once_bring_it_up_to_date_once(old_file: Path) -> None:
    everyone_is_open = asyncio.Barrier(5)

    async def open_and_write(number: int) -> None:
        async with new_store(old_file) as store:
            await everyone_is_open.wait()
            await store.transact(
                Commit((Upsert(f"orders||{number}", b"1"),), marks=(Mark(bytes([number] * 16), HOUR),))
            )

    async with asyncio.TaskGroup() as group:
        for number in range(1, 6):
            group.create_task(open_and_write(number))

    assert query(old_file, "SELECT count(*) FROM statecast_marks WHERE etags IS NOT NULL") == [(5,)]


async def test_a_process_of_the_first_schema_goes_on_beside(old_file: Path) -> None:
    """Its statements name their columns, and leave out what they do not know."""
    async with new_store(old_file):
        pass
    with closing(sqlite3.connect(old_file)) as connection, connection:
        connection.execute(
            "INSERT OR REPLACE INTO statecast_marks (log, digest, expires_at) VALUES (1, ?, unixepoch() + 3600)",
            (b"\x02" * 16,),
        )

    async with new_store(old_file) as store:
        with pytest.raises(Duplicate) as raised:
            await store.transact(Commit((), marks=(Mark(b"\x02" * 16, HOUR),)))
    assert raised.value.etags is None


async def test_what_a_file_of_the_second_schema_has_aside_goes_on_queue_by_queue(second_file: Path) -> None:
    async with new_store(second_file) as store:
        statuses = await store.log.deferred(range(2))
        entries = {status.queue: await store.log.read_deferred([status.queue], 100) for status in statuses}

    assert {name_of(status.queue): state_of(status) for status in statuses} == {
        ("orders||3", "pubsub", "orders"): (10, "too large", True, 2, "03:04:07.250"),
        ("orders||3", "pubsub", "audit"): (10, "too large", True, 1, "03:04:08.250"),
        ("orders||4", "pubsub", "orders"): (2, "refused", False, 2, "03:04:07.250"),
        ("orders||4", "other", "orders"): (2, "refused", False, 1, "03:04:08.250"),
    }
    assert {name_of(queue): ids_of(found) for queue, found in entries.items()} == {
        ("orders||3", "pubsub", "orders"): ["9", "11"],
        ("orders||3", "pubsub", "audit"): ["10"],
        ("orders||4", "pubsub", "orders"): ["12", "14"],
        ("orders||4", "other", "orders"): ["13"],
    }


async def test_an_entry_aside_in_a_file_of_the_second_schema_stays_as_it_is(second_file: Path) -> None:
    async with new_store(second_file) as store:
        (entry,) = await store.log.read_deferred([queue("orders||3", store.log, topic="audit")], 100)

    assert entry.record == OutboxRecord("orders||3", "10", "pubsub", "audit", b"\x02\xff", {"a": "b"})
    assert (entry.id, entry.created_at) == ("10", datetime(2026, 1, 2, 3, 4, 8, 250_000, UTC))


async def test_what_a_file_of_the_second_schema_has_aside_can_be_replayed_and_settled(second_file: Path) -> None:
    async with new_store(second_file) as store:
        assert await store.log.replay("orders||3") == 2
        due = [status.queue for status in await store.log.due_deferred(range(2), 100)]
        progress = [
            QueueProgress(queue, tuple(entry.id for entry in await store.log.read_deferred([queue], 100)), None)
            for queue in due
        ]

        assert set(await store.log.settle_deferred(await acquire_all(store.log), progress)) == set(due)

        assert {status.queue.order_key for status in await store.log.deferred(range(2))} == {"orders||4"}


async def test_stores_that_open_a_file_of_the_second_schema_at_once_bring_it_up_to_date_once(
    second_file: Path,
) -> None:
    everyone_is_open = asyncio.Barrier(5)

    async def count_aside() -> int:
        async with new_store(second_file) as store:
            await everyone_is_open.wait()
            return sum(status.pending for status in await store.log.deferred(range(2)))

    counts = await asyncio.gather(*(count_aside() for _ in range(5)))

    assert counts == [6] * 5
    tables = {name for (name,) in query(second_file, "SELECT name FROM sqlite_master WHERE name LIKE '%deferred%'")}
    assert tables >= {"statecast_deferred_queues", "statecast_deferred_entries"}
    assert not tables & {"statecast_deferred_keys", "statecast_deferred_entries_2"}


async def test_a_process_of_the_second_schema_can_put_nothing_aside_any_more(second_file: Path) -> None:
    """It would stand where nobody looks for it; so its position stays in front of it."""
    async with new_store(second_file):
        pass

    with pytest.raises(sqlite3.OperationalError, match="statecast_deferred_keys"):
        query(second_file, "UPDATE statecast_deferred_keys SET pending = pending + 1")


def name_of(queue: DeferredQueue) -> tuple[str, str, str]:
    return queue.order_key, queue.pubsub, queue.topic


def state_of(status: QueueStatus) -> tuple[int, str, bool, int, str]:
    oldest_at = status.oldest_at.time().isoformat("milliseconds")
    return status.attempts, status.reason, status.is_parked, status.pending, oldest_at
