"""What stands in the file, as other programs see it: daprd, a plain `sqlite3`, the next version."""

import sqlite3
from base64 import b64encode
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import apsw
import pytest

from statecast.clock import SystemClock
from statecast.components.manifest import Component
from statecast.components.state.commit import Commit, Concurrency, Upsert
from statecast.components.state.sqlite.state import SqliteStateStore
from statecast.components.testing.deadline import until
from statecast.components.testing.log import acquire_all, append, drain, new_record
from statecast.errors import CorruptState, ETagMismatch

# dapr state/sqlite/sqlite_migrations.go: what a daprd finds or makes, and asks before it makes anything.
DAPR_SCHEMA = """
CREATE TABLE metadata (key text NOT NULL PRIMARY KEY, value text NOT NULL);
CREATE TABLE state (key TEXT NOT NULL PRIMARY KEY, value TEXT NOT NULL, is_binary BOOLEAN NOT NULL,
  etag TEXT NOT NULL, expiration_time TIMESTAMP DEFAULT NULL,
  update_time TIMESTAMP NOT NULL DEFAULT CURRENT_TIMESTAMP);
INSERT INTO metadata VALUES ('migrations', '1');
"""

# dapr state/sqlite/sqlite_dbaccess.go: how a daprd decides that a row is live.
DAPR_LIVE = "expiration_time IS NULL OR expiration_time > CURRENT_TIMESTAMP"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.db"


def new_store(path: Path, **metadata: str) -> SqliteStateStore:
    component = Component("statestore", "state.sqlite", metadata={"connectionString": str(path), **metadata})
    return SqliteStateStore(component, app_id="orders", clock=SystemClock())


def execute(path: Path, statement: str, *bindings: str) -> list[Any]:
    """Run a statement as another program does. Not while a store of this process is open: see `as_neighbour`."""
    with closing(sqlite3.connect(path)) as connection, connection:
        return connection.execute(statement, bindings).fetchall()


@contextmanager
def as_neighbour(path: Path) -> Iterator[apsw.Connection]:
    """Connect beside an open store: by the same library, since two in one process undo each other's file locks."""
    connection = apsw.Connection(str(path))
    connection.set_busy_timeout(5000)
    yield connection
    connection.close()


async def put(path: Path, *upserts: Upsert, **metadata: str) -> None:
    async with new_store(path, **metadata) as store:
        await store.transact(Commit(upserts))


async def test_text_stands_in_the_table_as_it_is(path: Path) -> None:
    await put(path, Upsert("orders||k", '{"größe": 1}'.encode()))

    rows = execute(path, "SELECT value, is_binary, typeof(value) FROM state WHERE key = 'orders||k'")

    assert rows == [('{"größe": 1}', 0, "text")]


async def test_bytes_stand_in_the_table_as_base64(path: Path) -> None:
    await put(path, Upsert("orders||k", b"\x00\xff\xfe", is_binary=True))

    rows = execute(path, "SELECT value, is_binary, typeof(value) FROM state WHERE key = 'orders||k'")

    assert rows == [("AP/+", 1, "text")]


async def test_the_columns_are_those_that_dapr_makes(path: Path) -> None:
    await put(path)
    other = path.with_name("dapr.db")
    with closing(sqlite3.connect(other)) as connection:
        connection.executescript(DAPR_SCHEMA)

    for table in ("state", "metadata"):
        columns = [(name, type.upper(), *rest) for _, name, type, *rest in execute(path, f"PRAGMA table_info({table})")]
        theirs = [(name, type.upper(), *rest) for _, name, type, *rest in execute(other, f"PRAGMA table_info({table})")]
        assert columns == theirs


async def test_daprd_finds_its_migration_done(path: Path) -> None:
    await put(path)

    assert execute(path, "SELECT value FROM metadata WHERE key = 'migrations'") == [("1",)]


async def test_tables_are_named_as_configured(path: Path) -> None:
    await put(path, Upsert("orders||k", b"1"), tableName="my_state", metadataTableName="my_meta")

    assert execute(path, "SELECT value FROM my_state") == [("1",)]
    assert execute(path, "SELECT value FROM my_meta") == [("1",)]
    names = {name for (name,) in execute(path, "SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert not names & {"state", "metadata"}
    assert all(name.startswith(("statecast_", "sqlite_", "my_")) for name in names)


async def test_a_database_of_daprd_is_taken_over_with_its_rows(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(DAPR_SCHEMA)
    execute(path, "INSERT INTO state (key, value, is_binary, etag) VALUES ('orders||t', '\"text\"', 0, 'etag-1')")
    execute(
        path,
        "INSERT INTO state (key, value, is_binary, etag) VALUES ('orders||b', ?, 1, 'etag-2')",
        b64encode(b"\x00\xff").decode(),
    )
    execute(
        path,
        """INSERT INTO state (key, value, is_binary, etag, expiration_time)
        VALUES ('orders||e', '1', 0, 'etag-3', DATETIME(CURRENT_TIMESTAMP, '+60 seconds'))""",
    )
    asked_at = datetime.now(UTC)

    async with new_store(path) as store:
        text, binary, expiring = await store.bulk_get(["orders||t", "orders||b", "orders||e"])
        assert text is not None
        with pytest.raises(ETagMismatch):
            await store.transact(Commit((Upsert("orders||t", b"2", concurrency=Concurrency.FIRST_WRITE),)))
        await store.transact(Commit((Upsert("orders||t", b"2", etag=text.etag),)))

    assert (text.value, text.etag, text.expires_at) == (b'"text"', "etag-1", None)
    assert binary is not None
    assert (binary.value, binary.etag) == (b"\x00\xff", "etag-2")
    assert expiring is not None
    assert expiring.expires_at is not None
    assert abs(expiring.expires_at - asked_at - timedelta(seconds=60)) < timedelta(seconds=20)
    assert execute(path, "SELECT value FROM state WHERE key = 'orders||t'") == [("2",)]


async def test_a_row_that_expired_by_daprds_writing_is_not_visible(path: Path) -> None:
    await put(path)
    execute(
        path,
        """INSERT INTO state (key, value, is_binary, etag, expiration_time)
        VALUES ('orders||k', '1', 0, 'etag', CURRENT_TIMESTAMP)""",
    )

    async with new_store(path) as store:
        assert await store.get("orders||k") is None


@pytest.mark.parametrize(
    ("now", "is_live"),
    [
        ("2026-01-02 03:04:04", True),
        ("2026-01-02 03:04:05", True),
        ("2026-01-02 03:04:06", False),
        ("2026-01-02 03:05:00", False),
    ],
)
def test_daprd_compares_our_expiry_by_whole_seconds(now: str, is_live: bool) -> None:
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(DAPR_SCHEMA)
        connection.execute(
            "INSERT INTO state (key, value, is_binary, etag, expiration_time) VALUES ('k', '1', 0, 'e', ?)",
            ("2026-01-02 03:04:05.250",),
        )

        rows = connection.execute(f"SELECT 1 FROM state WHERE {DAPR_LIVE.replace('CURRENT_TIMESTAMP', '?')}", (now,))

        assert bool(rows.fetchall()) == is_live


async def test_an_expiry_is_text_in_utc_that_daprd_compares_as_live(path: Path) -> None:
    await put(path, Upsert("orders||k", b"1", ttl=timedelta(seconds=90, milliseconds=250)))

    ((text, is_live),) = execute(path, f"SELECT expiration_time, {DAPR_LIVE} FROM state")

    assert is_live
    left = datetime.strptime(text, "%Y-%m-%d %H:%M:%S.%f").replace(tzinfo=UTC) - datetime.now(UTC)
    assert timedelta(seconds=60) < left <= timedelta(seconds=91)


async def test_an_expiry_beyond_what_a_date_can_hold_is_none(path: Path) -> None:
    async with new_store(path) as store:
        await store.transact(Commit((Upsert("orders||k", b"1", ttl=timedelta.max),)))

        item = await store.get("orders||k")

    assert item is not None
    assert item.expires_at is None


@pytest.mark.parametrize(
    "row",
    ["'no base64!', 1, 'etag', NULL", "'1', 0, 'etag', 'tomorrow'"],
    ids=["value", "expiry"],
)
async def test_a_row_that_no_state_store_writes_is_corrupt(path: Path, row: str) -> None:
    await put(path)
    execute(path, f"INSERT INTO state (key, value, is_binary, etag, expiration_time) VALUES ('orders||k', {row})")

    async with new_store(path) as store:
        with pytest.raises(CorruptState, match=r"orders\|\|k"):
            await store.get("orders||k")


async def test_the_outbox_is_a_table_that_others_can_read(path: Path) -> None:
    async with new_store(path) as store:
        await append(store, new_record("orders||1", "id-1"))

    rows = execute(path, "SELECT order_key, event_id, format, pubsub, topic, metadata, body FROM statecast_outbox_1")

    assert rows == [("orders||1", "id-1", 1, "pubsub", "orders", "{}", b'{"specversion": "1.0"}')]


async def test_each_app_and_component_has_a_log_of_its_own(path: Path) -> None:
    async with new_store(path) as store:
        await append(store, new_record("orders||1", "id-1"))

    component = Component("statestore", "state.sqlite", metadata={"connectionString": str(path)})
    async with SqliteStateStore(component, app_id="billing", clock=SystemClock()) as other:
        assert await drain(other.log) == []
        await other.directory.claim("Cart", "leroy")

    async with new_store(path) as store:
        assert [record.event_id for record in await drain(store.log)] == ["id-1"]


async def test_the_ids_of_a_log_that_was_trimmed_empty_are_not_given_again(path: Path) -> None:
    async with new_store(path) as store:
        await append(store, *(new_record("orders||1", str(number)) for number in range(5)))
        await drain(store.log)
        await store.log.trim()
    assert execute(path, "SELECT count(*) FROM statecast_outbox_1") == [(0,)]

    async with new_store(path) as store:
        await append(store, new_record("orders||1", "5"))

        assert [record.event_id for record in await drain(store.log)] == ["5"]


async def test_trimming_takes_what_each_slice_has_passed_and_leaves_what_one_is_behind_with(path: Path) -> None:
    async with new_store(path) as store:
        for number in range(30):
            await append(store, *(new_record(f"orders||{key}", f"{key}-{number}") for key in range(100)))
        behind, *ahead = await acquire_all(store.log)
        batch = await store.log.read(ahead, 10_000)
        await store.log.advance(batch.leases, timedelta(hours=1))

        await store.log.trim()

        unread = await store.log.read([behind], 10_000)
    assert {entry.slice for entry in unread.entries} == {behind.slice}
    assert execute(path, "SELECT count(*) FROM statecast_outbox_1") == [(len(unread.entries),)]


async def test_a_slice_that_was_behind_is_trimmed_once_it_has_caught_up(path: Path) -> None:
    async with new_store(path) as store:
        await append(store, *(new_record(f"orders||{key}") for key in range(100)))
        behind, *ahead = await acquire_all(store.log)
        await store.log.release((await store.log.read(ahead, 10_000)).leases)
        await store.log.trim()

        await store.log.release((await store.log.read([behind], 10_000)).leases)
        await store.log.trim()

    assert execute(path, "SELECT count(*) FROM statecast_outbox_1") == [(0,)]


async def test_the_file_stops_growing_once_the_log_is_trimmed_as_fast_as_it_is_written(path: Path) -> None:
    pages: list[int] = []
    async with new_store(path) as store:
        with as_neighbour(path) as neighbour:
            for _ in range(30):
                await append(store, *(new_record(f"orders||{key}") for key in range(200)))
                await drain(store.log)
                await store.log.trim()
                pages.append(neighbour.pragma("page_count"))

    assert max(pages[10:]) == pages[10]


async def test_expired_rows_and_marks_are_swept_in_the_background(path: Path) -> None:
    async with new_store(path, cleanupInterval="10ms") as store:
        upserts = [Upsert(f"orders||{n}", b"1", ttl=timedelta(milliseconds=1)) for n in range(1200)]
        await store.transact(Commit((*upserts, Upsert("orders||stays", b"1"))))

        with as_neighbour(path) as neighbour:

            async def is_swept() -> bool:
                return neighbour.execute("SELECT count(*) FROM state").fetchall() == [(1,)]

            await until(is_swept)
        assert await store.get("orders||stays") is not None


async def test_a_store_can_be_opened_again(path: Path) -> None:
    store = new_store(path)
    for number in range(3):
        async with store:
            await store.transact(Commit((Upsert(f"orders||{number}", b"1"),)))

    async with store:
        assert None not in await store.bulk_get([f"orders||{number}" for number in range(3)])


async def test_more_keys_than_one_statement_takes_are_read_together(path: Path) -> None:
    keys = [f"orders||{number}" for number in range(40_000)]
    async with new_store(path) as store:
        await store.transact(Commit((Upsert(keys[0], b"first"), Upsert(keys[-1], b"last"))))

        items = await store.bulk_get(keys)

    assert [item.value for item in items if item] == [b"first", b"last"]
    assert len(items) == len(keys)
