"""A file that an earlier version made is brought up to date with all that is in it."""

import asyncio
import sqlite3
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest

from statecast.clock import SystemClock
from statecast.components.manifest import Component
from statecast.components.state.commit import Commit, ETag, Mark, Upsert
from statecast.components.state.log import Failure
from statecast.components.state.sqlite.schema import VERSION
from statecast.components.state.sqlite.state import SqliteStateStore
from statecast.components.testing.log import drain, new_record, put_each_aside, read_aside
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


@pytest.fixture
def old_file(tmp_path: Path) -> Path:
    path = tmp_path / "state.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(FIRST_SCHEMA)
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
