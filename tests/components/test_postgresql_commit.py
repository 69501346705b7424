"""The commit function through plain SQL, the layout it writes, and what becomes of a commit when things break."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import timedelta
from hashlib import blake2b
from uuid import UUID, uuid4

import asyncpg
import pytest

from statecast.clock import SystemClock
from statecast.components.manifest import Component
from statecast.components.state.commit import (
    Check,
    Commit,
    Concurrency,
    Delete,
    ETag,
    Guard,
    Mark,
    Operation,
    OutboxRecord,
    Upsert,
)
from statecast.components.state.log import Deferral, DeferredQueue, Failure, QueueProgress
from statecast.components.state.postgresql import PostgresqlStateStore
from statecast.components.state.postgresql.call import Applied, Busy, CommitCall, Outcome, PreparedCommit, Refused
from statecast.components.state.postgresql.commit_function import (
    COMMIT_ARGUMENTS,
    COMMIT_PARAMETERS,
    COMMIT_REVISION,
    commit_statement,
)
from statecast.components.state.postgresql.config import QualifiedName
from statecast.components.state.postgresql.schema import Layout
from statecast.components.testing.deadline import until
from statecast.errors import (
    Duplicate,
    ETagMismatch,
    Fenced,
    InvalidRequest,
    OutcomeUnknown,
    StatecastError,
    StoreUnavailable,
)
from statecast.runtime.servers import PrivateServer, ServerKind
from tests.components.rows_fetched import rows_fetched
from tests.components.stalling import stall, stalled, until_stalled

HOUR = timedelta(hours=1)


def store_on(url: str, **metadata: str) -> PostgresqlStateStore:
    component = Component("statestore", "state.postgresql", "v2", {"connectionString": url, "maxConns": "4"} | metadata)
    return PostgresqlStateStore(component, app_id="orders", clock=SystemClock())


@pytest.fixture
async def store(postgresql_url: str) -> AsyncIterator[PostgresqlStateStore]:
    async with store_on(postgresql_url) as store:
        yield store


@pytest.fixture
async def admin(postgresql_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(postgresql_url)
    yield connection
    await connection.close()


def commit(
    *operations: Operation, event: str | None = None, topic: str = "orders", marks: Sequence[Mark] = ()
) -> Commit:
    records = (OutboxRecord("orders||1", event, "pubsub", topic, b"{}"),) if event else ()
    return Commit(operations, records, tuple(marks))


def mark(number: int) -> Mark:
    return Mark(number.to_bytes(16, "big"), HOUR)


async def call(connection: asyncpg.Connection, *commits: Commit, wait: bool = False) -> list[Outcome]:
    """Call the function for several commits at once."""
    batch = CommitCall([PreparedCommit(each, 16) for each in commits])
    arguments = batch.arguments(wait=wait)
    return batch.outcomes(await connection.fetchval(f"select statecast_commit_1_v1({COMMIT_ARGUMENTS})", *arguments))


async def values(connection: asyncpg.Connection) -> dict[str, bytes]:
    return {row["key"]: row["value"] for row in await connection.fetch("select key, value from state")}


async def events(connection: asyncpg.Connection) -> list[str]:
    rows = await connection.fetch("select event_id from statecast_outbox_1 order by id")
    return [row["event_id"] for row in rows]


# The layout


async def test_the_tables_are_daprs_with_ours_beside_them(
    store: PostgresqlStateStore, admin: asyncpg.Connection
) -> None:
    columns = await admin.fetch(
        "select column_name, data_type, is_nullable from information_schema.columns"
        " where table_name = 'state' order by ordinal_position"
    )
    metadata = dict(tuple(row) for row in await admin.fetch("select key, value from dapr_metadata"))

    assert [tuple(column) for column in columns] == [
        ("key", "text", "NO"),
        ("value", "bytea", "NO"),
        ("etag", "uuid", "NO"),
        ("created_at", "timestamp with time zone", "NO"),
        ("updated_at", "timestamp with time zone", "YES"),
        ("expires_at", "timestamp with time zone", "YES"),
        ("row_id", "bigint", "NO"),
    ]
    assert metadata["migrations-state-v2-"] == "2"
    ours = await admin.fetch("select tablename from pg_tables where schemaname = 'public' and tablename like 'state%'")
    assert {row["tablename"] for row in ours if row["tablename"] != "state"} == {
        f"statecast_{name}"
        for name in (
            *("log", "slice", "relay", "mark", "claim", "deferred", "deferred_queue", "outbox_1"),
            *(f"outbox_1_{number}" for number in range(4)),
        )
    }


async def test_a_commit_is_a_row_that_dapr_reads(store: PostgresqlStateStore, admin: asyncpg.Connection) -> None:
    (etag,) = await store.transact(commit(Upsert("orders||1", b'{"total": 1}', ttl=HOUR)))
    (again,) = await store.transact(commit(Upsert("orders||1", b'{"total": 2}', ttl=HOUR)))

    row = await admin.fetchrow(
        "select value, etag::text, updated_at is not null as is_updated,"
        " expires_at between now() + interval '59 minutes' and now() + interval '61 minutes' as expires"
        " from state where key = 'orders||1'"
    )
    assert etag != again
    assert tuple(row or ()) == (b'{"total": 2}', again, True, True)


async def test_a_row_that_dapr_wrote_is_read_and_its_etag_counts(
    store: PostgresqlStateStore, admin: asyncpg.Connection
) -> None:
    etag = await admin.fetchval(
        "insert into state (key, value, etag, expires_at)"
        " values ('orders||1', '{\"a\":1}', gen_random_uuid(), null) returning etag::text"
    )

    item = await store.get("orders||1")
    await store.transact(commit(Upsert("orders||1", b"2", etag=etag)))

    assert item is not None
    assert (item.value, item.etag) == (b'{"a":1}', etag)
    with pytest.raises(ETagMismatch):
        await store.transact(commit(Upsert("orders||1", b"3", etag=etag)))


async def test_an_event_is_a_row_that_can_be_read_by_others(
    store: PostgresqlStateStore, admin: asyncpg.Connection
) -> None:
    record = OutboxRecord("orders||1", "event-1", "pubsub", "orders", b"\x00body", {"partitionKey": "ö"})

    await store.transact(Commit((), (record,)))

    row = await admin.fetchrow(
        "select order_key, event_id, format, pubsub, topic, metadata->>'partitionKey', body from statecast_outbox_1"
    )
    assert tuple(row or ()) == ("orders||1", "event-1", 1, "pubsub", "orders", "ö", b"\x00body")


async def test_a_prefix_with_a_schema_keeps_tables_apart(postgresql_url: str, admin: asyncpg.Connection) -> None:
    await admin.execute("create schema elsewhere")
    prefix = {"tablePrefix": "Elsewhere.App_", "metadataTableName": "elsewhere.dapr_metadata"}

    async with store_on(postgresql_url, **prefix) as there, store_on(postgresql_url) as here:
        await there.transact(commit(Upsert("orders||1", b"there"), event="there"))
        await here.transact(commit(Upsert("orders||1", b"here"), event="here"))

    assert await admin.fetchval("select value from elsewhere.app_state") == b"there"
    assert await admin.fetchval("select event_id from elsewhere.statecast_app_outbox_1") == "there"
    assert await admin.fetchval("select value from public.state") == b"here"
    level = await admin.fetchval("select value from elsewhere.dapr_metadata where key = 'migrations-state-v2-app_'")
    assert level == "2"


async def test_apps_and_components_have_logs_of_their_own(postgresql_url: str, admin: asyncpg.Connection) -> None:
    for number, (app_id, name) in enumerate([("a'b\\c$d", "statestore"), ("orders", "other")], start=1):
        component = Component(name, "state.postgresql", "v2", {"connectionString": postgresql_url})
        async with PostgresqlStateStore(component, app_id=app_id, clock=SystemClock()) as store:
            guard = await store.directory.claim("Cart", "1")
            await store.transact(Commit((), (OutboxRecord("k", app_id, "p", "t", b""),), guards=(guard,)))

        assert await admin.fetchval(f"select event_id from statecast_outbox_{number}") == app_id

    rows = await admin.fetch("select app_id, component, slices from statecast_log order by log")
    assert [tuple(row) for row in rows] == [("a'b\\c$d", "statestore", 16), ("orders", "other", 16)]


# Several commits in one call


async def test_commits_of_one_call_are_applied_together_with_their_events_in_order(
    store: PostgresqlStateStore, admin: asyncpg.Connection
) -> None:
    outcomes = await call(
        admin,
        commit(Upsert("orders||b", b"1"), event="first"),
        commit(Upsert("orders||a", b"2"), Delete("orders||z"), event="second"),
        commit(event="third"),
    )

    assert await values(admin) == {"orders||a": b"2", "orders||b": b"1"}
    assert await events(admin) == ["first", "second", "third"]
    etags = {row["key"]: str(row["etag"]) for row in await admin.fetch("select key, etag from state")}
    assert outcomes == [Applied((ETag(etags["orders||b"]),)), Applied((ETag(etags["orders||a"]), None)), Applied(())]


async def test_a_refused_commit_of_a_call_leaves_nothing_and_its_neighbours_are_applied(
    store: PostgresqlStateStore, admin: asyncpg.Connection
) -> None:
    guard = await store.directory.claim("Cart", "1")
    await store.transact(commit(Upsert("orders||old", b"0"), Upsert("orders||kept", b"0"), marks=[mark(1)]))

    outcomes = await call(
        admin,
        commit(Upsert("orders||1", b"1"), event="good-1"),
        commit(Upsert("orders||2", b"x"), Check("orders||nothing", ETag(str(uuid4()))), event="bad-etag"),
        commit(Upsert("orders||3", b"x"), event="bad-mark", marks=[mark(0), mark(1), mark(2)]),
        commit(Upsert("orders||4", b"x"), Upsert("orders||old", b"x", concurrency=Concurrency.FIRST_WRITE)),
        commit(Delete("orders||kept"), Check("orders||nothing else", ETag(str(uuid4())))),
        Commit((Upsert("orders||5", b"5"),), guards=(guard,), marks=(mark(3),)),
        Commit((Upsert("orders||6", b"x"),), guards=(Guard("Cart", "2", str(uuid4())),)),
    )

    assert [type(outcome) for outcome in outcomes] == [Applied, *[Refused] * 4, Applied, Refused]
    errors = [outcome.error for outcome in outcomes if isinstance(outcome, Refused)]
    assert [type(error) for error in errors] == [ETagMismatch, Duplicate, ETagMismatch, ETagMismatch, Fenced]
    assert await values(admin) == {
        "orders||old": b"0",
        "orders||kept": b"0",
        "orders||1": b"1",
        "orders||5": b"5",
    }
    assert await events(admin) == ["good-1"]
    digests = {row["digest"] for row in await admin.fetch("select digest from statecast_mark")}
    assert digests == {mark(1).digest, mark(3).digest}
    assert await admin.fetchval("select commit_seq from statecast_claim") == 1


@pytest.mark.parametrize("wait", [True, False])
async def test_of_several_rules_that_are_broken_the_first_is_told(
    store: PostgresqlStateStore, admin: asyncpg.Connection, wait: bool
) -> None:
    """Marks before guards before conditions; marks as the commit has them, the other two as they are sorted."""
    await store.transact(commit(marks=[mark(1), mark(2)]))
    guards = tuple([await store.directory.claim("Cart", name) for name in "abc"])
    for guard in guards[1:]:
        await store.directory.claim("Cart", guard.id)
    conditions = tuple(Upsert(f"orders||{name}", b"x", etag=ETag("stale")) for name in "dcba")

    async def refusal(change: Commit) -> StatecastError:
        (outcome,) = await call(admin, change, wait=wait)
        assert isinstance(outcome, Refused)
        return outcome.error

    broken_condition = await refusal(Commit((Upsert("orders||0", b"x"), *conditions)))
    lost_claim = await refusal(Commit(conditions, guards=guards[::-1]))
    set_mark = await refusal(Commit(conditions, marks=(mark(3), mark(2), mark(1)), guards=guards))

    assert isinstance(broken_condition, ETagMismatch)
    assert broken_condition.key == "orders||a"
    assert isinstance(lost_claim, Fenced)
    assert lost_claim.id == "b"
    assert isinstance(set_mark, Duplicate)
    assert set_mark.digest == mark(2).digest


async def test_a_call_without_waiting_tells_a_mark_that_is_set_although_all_else_is_held(
    store: PostgresqlStateStore, admin: asyncpg.Connection, postgresql_url: str
) -> None:
    guard = await store.directory.claim("Cart", "1")
    once = Commit((Upsert("orders||1", b"1"),), marks=(mark(1),), guards=(guard,))
    await store.transact(once)
    holder = await asyncpg.connect(postgresql_url)
    async with holder.transaction():
        await call(holder, Commit((Upsert("orders||1", b"held"),), guards=(guard,)), wait=True)

        (outcome,) = await call(admin, once)

    assert isinstance(outcome, Refused)
    assert isinstance(outcome.error, Duplicate)
    await holder.close()


@pytest.mark.parametrize("held", ["present key", "absent key", "mark", "claim"])
async def test_a_call_without_waiting_passes_by_what_another_transaction_holds(
    store: PostgresqlStateStore, admin: asyncpg.Connection, postgresql_url: str, held: str
) -> None:
    guard = await store.directory.claim("Cart", "1")
    await store.transact(commit(Upsert("orders||present", b"0")))
    holding = {
        "present key": commit(Upsert("orders||present", b"1")),
        "absent key": commit(Upsert("orders||absent", b"1")),
        "mark": commit(marks=[mark(1)]),
        "claim": Commit((), guards=(guard,)),
    }[held]
    holder = await asyncpg.connect(postgresql_url)
    transaction = holder.transaction()
    await transaction.start()
    await call(holder, holding, wait=True)

    async with asyncio.timeout(10):
        outcomes = await call(admin, holding, commit(Upsert("orders||free", b"1"), event="free"))

    assert [type(outcome) for outcome in outcomes] == [Busy, Applied]
    await transaction.rollback()
    assert [type(outcome) for outcome in await call(admin, holding)] == [Applied]
    await holder.close()


async def test_a_call_without_waiting_passes_by_a_row_that_another_program_holds(
    store: PostgresqlStateStore, admin: asyncpg.Connection, postgresql_url: str
) -> None:
    await store.transact(commit(Upsert("orders||1", b"0")))
    holder = await asyncpg.connect(postgresql_url)
    async with holder.transaction():
        await holder.execute("update state set value = 'dapr' where key = 'orders||1'")

        async with asyncio.timeout(10):
            outcomes = await call(admin, commit(Upsert("orders||1", b"x")), commit(Upsert("orders||2", b"2")))

    assert [type(outcome) for outcome in outcomes] == [Busy, Applied]
    assert await values(admin) == {"orders||1": b"dapr", "orders||2": b"2"}
    await holder.close()


async def test_a_call_without_waiting_is_to_come_again_when_a_key_came_into_being_under_its_hands(
    store: PostgresqlStateStore, admin: asyncpg.Connection
) -> None:
    await admin.execute("""
        create function come_before() returns trigger language plpgsql as $$ begin
          if new.value = 'ours' then insert into state (key, value) values (new.key, 'another'); end if;
          return new;
        end $$;
        create trigger come_before before insert on state for each row execute function come_before()""")

    with pytest.raises(asyncpg.PostgresError) as caught:
        await call(admin, commit(Upsert("orders||1", b"ours")), commit(Upsert("orders||2", b"2"), event="never"))

    assert caught.value.sqlstate == "SC001"
    assert (await values(admin), await events(admin)) == ({}, [])


async def test_a_commit_that_waits_judges_what_it_finds_after_the_wait(
    store: PostgresqlStateStore, admin: asyncpg.Connection, postgresql_url: str
) -> None:
    (etag,) = await store.transact(commit(Upsert("orders||1", b"0")))
    holder = await asyncpg.connect(postgresql_url)
    transaction = holder.transaction()
    await transaction.start()
    await holder.execute("update state set value = 'dapr', etag = gen_random_uuid() where key = 'orders||1'")
    waiting = asyncio.create_task(store.transact(commit(Upsert("orders||1", b"1", etag=etag))))
    await until(lambda: is_waiting_for_a_lock(admin))

    await transaction.commit()

    with pytest.raises(ETagMismatch):
        await waiting
    await holder.close()


async def test_a_first_write_that_another_program_came_before_is_refused(
    store: PostgresqlStateStore, admin: asyncpg.Connection, postgresql_url: str
) -> None:
    holder = await asyncpg.connect(postgresql_url)
    transaction = holder.transaction()
    await transaction.start()
    await holder.execute("insert into state (key, value) values ('orders||1', 'dapr')")
    first = Upsert("orders||1", b"1", concurrency=Concurrency.FIRST_WRITE)
    waiting = asyncio.create_task(store.transact(commit(first, event="never")))
    await until(lambda: is_waiting_for_a_lock(admin))

    await transaction.commit()

    with pytest.raises(ETagMismatch):
        await waiting
    assert await values(holder) == {"orders||1": b"dapr"}
    assert await events(holder) == []
    await holder.close()


async def is_waiting_for_a_lock(connection: asyncpg.Connection) -> bool:
    """To be asked outside of a transaction: inside of one the answer stays what it was."""
    query = (
        "select exists (select from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database())"
    )
    return bool(await connection.fetchval(query))


async def test_of_two_commits_that_each_need_absent_what_the_other_writes_one_is_refused(
    store: PostgresqlStateStore,
) -> None:
    """It fails when absent keys are not locked (tried): there is no row that one could wait for."""
    applied: list[object] = []
    for number in range(100):
        here, there = f"orders||{number}-a", f"orders||{number}-b"
        applied += await asyncio.gather(
            store.transact(commit(Check(here, None), Upsert(there, b"1"))),
            store.transact(commit(Check(there, None), Upsert(here, b"1"))),
            return_exceptions=True,
        )

    assert sum(isinstance(answer, ETagMismatch) for answer in applied) == 100


async def test_an_expired_mark_counts_as_unset_and_a_value_expires_by_the_databases_clock(
    store: PostgresqlStateStore, admin: asyncpg.Connection
) -> None:
    await store.transact(commit(Upsert("orders||1", b"0", ttl=HOUR), marks=[mark(1)]))
    await admin.execute("update statecast_mark set expires_at = now() - interval '1 second'")
    await admin.execute("update state set expires_at = now() - interval '1 second'")

    assert await store.get("orders||1") is None
    await store.transact(
        commit(Upsert("orders||1", b"1", concurrency=Concurrency.FIRST_WRITE, ttl=timedelta.max), marks=[mark(1)])
    )
    with pytest.raises(Duplicate):
        await store.transact(commit(marks=[mark(1)]))
    item = await store.get("orders||1")
    assert item is not None
    assert item.expires_at is not None


async def test_commits_are_durable_although_the_role_says_otherwise(
    postgresql_url: str, admin: asyncpg.Connection
) -> None:
    async with store_on(postgresql_url):
        pass
    async with admin.transaction():
        await admin.execute("set local synchronous_commit = off")

        await call(admin, commit(Upsert("orders||1", b"1")), wait=True)

        assert await admin.fetchval("show synchronous_commit") == "on"


@pytest.mark.parametrize("wait", [True, False])
async def test_a_call_leaves_the_patience_of_its_transaction_as_it_was(
    store: PostgresqlStateStore, admin: asyncpg.Connection, wait: bool
) -> None:
    async with admin.transaction():
        await admin.execute("set local lock_timeout = '7s'")

        await call(admin, commit(Upsert("orders||1", b"1")), wait=wait)

        assert await admin.fetchval("show lock_timeout") == "7s"


async def test_what_postgresql_cannot_keep_is_an_invalid_request(store: PostgresqlStateStore) -> None:
    for operation in (Upsert("orders||\0", b"1"), Upsert("k" * 500_000, b"1"), Upsert("orders||\ud800", b"1")):
        with pytest.raises(InvalidRequest):
            await store.transact(commit(operation))
    with pytest.raises(ETagMismatch):
        await store.transact(commit(Upsert("orders||1", b"1", etag=ETag("\0"))))
    with pytest.raises(Fenced):
        await store.transact(Commit((), guards=(Guard("Cart", "1", "no token"),)))

    assert await store.get("orders||1") is None


# Deadlocks


async def test_keys_are_locked_in_the_order_of_their_hashes_so_that_those_that_share_some_do_not_cross(
    store: PostgresqlStateStore, admin: asyncpg.Connection, postgresql_url: str
) -> None:
    """Of two pairs of keys with crossed hashes the order of the keys makes a deadlock."""
    first, last = "orders||2", "orders||1"
    assert await admin.fetchval("select hashtext($1) < hashtext($2)", first, last)
    holder = await asyncpg.connect(postgresql_url)
    transaction = holder.transaction()
    await transaction.start()
    await call(holder, commit(Upsert(first, b"held")), wait=True)

    waiting = asyncio.create_task(store.transact(commit(Upsert(first, b"1"), Upsert(last, b"1"))))
    await until(lambda: is_waiting_for_a_lock(admin))
    (outcome,) = await call(admin, commit(Upsert(last, b"free")))

    assert isinstance(outcome, Applied)
    await transaction.rollback()
    await waiting
    await holder.close()


async def test_commits_sweeps_and_expiring_keys_do_not_lock_each_other_out(
    postgresql_url: str, admin: asyncpg.Connection
) -> None:
    chance = random.Random(3)
    keys = [f"orders||{number}" for number in range(12)]

    async def churn(store: PostgresqlStateStore) -> None:
        for number in range(60):
            chosen = chance.sample(keys, 5)
            ttl = timedelta(milliseconds=chance.choice([1, 5, 20]))
            items = await store.bulk_get(chosen[:2])
            checks: list[Operation] = [
                Check(key, item.etag if item else None) for key, item in zip(chosen, items, strict=False)
            ]
            writes: list[Operation] = [
                Upsert(chosen[2], b"1", ttl=ttl),
                Upsert(chosen[3], b"2", ttl=ttl),
                Delete(chosen[4]),
            ]
            changes = chance.sample([*checks, *writes], 5)
            try:
                await store.transact(commit(*changes, event=str(number), marks=[Mark(chance.randbytes(16), ttl)]))
            except ETagMismatch:
                continue

    before = await deadlocks(admin)
    async with (
        store_on(postgresql_url, cleanupInterval="1ms") as one,
        store_on(postgresql_url) as two,
        asyncio.timeout(60),
        asyncio.TaskGroup() as group,
    ):
        for store in (one, two) * 4:
            group.create_task(churn(store))

    assert await deadlocks(admin) == before


async def deadlocks(admin: asyncpg.Connection) -> int:
    """Count what the server has broken up so far; a session tells at its end at the latest."""
    return int(await admin.fetchval("select deadlocks from pg_stat_database where datname = current_database()"))


async def test_expired_rows_and_marks_are_swept(postgresql_url: str, admin: asyncpg.Connection) -> None:
    async with store_on(postgresql_url, cleanupInterval="50ms") as store:
        ttl = timedelta(milliseconds=1)
        await store.transact(commit(*(Upsert(f"k{number}", b"", ttl=ttl) for number in range(2_500))))
        await store.transact(commit(Upsert("kept", b"", ttl=HOUR), Upsert("stays", b""), marks=[mark(9)]))
        await store.transact(commit(marks=[Mark(b"m" * 16, ttl)]))

        async def is_swept() -> bool:
            count = "select (select count(*) from state), (select count(*) from statecast_mark)"
            return tuple(await admin.fetchrow(count) or ()) == (2, 1)

        await until(is_swept)


async def test_one_sweep_serves_all_replicas(postgresql_url: str, admin: asyncpg.Connection) -> None:
    async with store_on(postgresql_url):
        await admin.execute("insert into dapr_metadata values ('last-cleanup-state-v2-', now()::text)")
    await admin.execute("insert into state (key, value, expires_at) values ('gone', '', now() - interval '1 hour')")
    await admin.execute("insert into statecast_mark values ('gone', now() - interval '1 hour')")

    async with store_on(postgresql_url, cleanupInterval="15m") as store:
        await store.sweep()

    # Someone has swept the values a moment ago, but no one the marks.
    assert await admin.fetchval("select count(*) from state") == 1
    assert await admin.fetchval("select count(*) from statecast_mark") == 0


# Migrations


async def test_ten_processes_that_start_at_once_migrate_once(postgresql_url: str, admin: asyncpg.Connection) -> None:
    stores = [store_on(postgresql_url) for _ in range(10)]

    opened = await asyncio.gather(*(store.__aenter__() for store in stores))
    await asyncio.gather(*(store.transact(commit(Upsert(str(id(store)), b"1"))) for store in opened))
    await asyncio.gather(*(store.__aexit__(None, None, None) for store in opened))

    assert await admin.fetchval("select count(*) from state") == 10
    assert await admin.fetchval("select count(*) from statecast_log") == 1


async def test_a_database_that_defaults_to_serializable_changes_nothing(
    postgresql_url: str, admin: asyncpg.Connection
) -> None:
    await admin.execute(
        "do $$ begin execute format("
        "'alter database %I set default_transaction_isolation = serializable', current_database()); end $$"
    )

    async with store_on(postgresql_url) as store:
        first = Upsert("orders||1", b"1", concurrency=Concurrency.FIRST_WRITE)
        answers = await asyncio.gather(
            *(store.transact(commit(first, event=str(number))) for number in range(8)), return_exceptions=True
        )

    assert sum(isinstance(answer, ETagMismatch) for answer in answers) == 7
    assert len(await events(admin)) == 1


async def test_a_table_of_an_older_daprd_is_brought_up_to_date_with_its_rows(
    postgresql_url: str, admin: asyncpg.Connection
) -> None:
    await admin.execute(
        "create table dapr_metadata (key text not null primary key, value text not null);"
        "insert into dapr_metadata values ('migrations-state-v2-', '1');"
        "create table state (key text not null primary key, value bytea not null,"
        " etag uuid not null default gen_random_uuid(), created_at timestamptz not null default now(),"
        " updated_at timestamptz, expires_at timestamptz);"
        "insert into state (key, value) values ('orders||1', 'kept'), ('orders||2', 'kept')"
    )

    async with store_on(postgresql_url) as store:
        item = await store.get("orders||1")

    assert item is not None
    assert item.value == b"kept"
    assert {row["row_id"] for row in await admin.fetch("select row_id from state")} == {1, 2}
    assert await admin.fetchval("select value from dapr_metadata where key = 'migrations-state-v2-'") == "2"


async def test_a_database_of_the_first_level_is_brought_up_to_date_with_what_is_in_it(
    postgresql_url: str, admin: asyncpg.Connection
) -> None:
    """Its marks remember no answers, its log puts nothing aside, and its function takes a parameter fewer."""
    async with store_on(postgresql_url) as store:
        await store.transact(commit(Upsert("orders||1", b"kept"), event="kept", marks=[mark(1)]))
    first_parameters = ", ".join(parameter for parameter in COMMIT_PARAMETERS if parameter != "m_etags text[]")
    await admin.execute(
        "drop function statecast_commit_1_v1;"
        f"create function statecast_commit_1_v1({first_parameters}) returns text[] language sql"
        " as $$ select array['of the first level'] $$;"
        "drop table statecast_deferred, statecast_deferred_queue;"
        "alter table statecast_mark drop column etags;"
        "update dapr_metadata set value = '1' where key = 'migrations-statecast-'"
    )

    async with store_on(postgresql_url) as store:
        with pytest.raises(Duplicate) as duplicate:
            await store.transact(commit(marks=[mark(1)]))
        answer = await store.transact(commit(Upsert("orders||2", b"2"), event="2", marks=[mark(2)]))
        with pytest.raises(Duplicate) as another:
            await store.transact(commit(marks=[mark(2)]))
        batch = await store.log.read(await store.log.acquire("relay", 16, HOUR), 100)
        failure = Failure(1, None, "refused")
        await store.log.advance(batch.leases, HOUR, [Deferral(batch.entries, failure)])
        (key,) = await store.log.deferred(range(16))

    assert (duplicate.value.etags, another.value.etags) == (None, answer)
    assert [entry.record.event_id for entry in batch.entries] == ["kept", "2"]
    assert (key.pending, key.is_parked) == (2, True)
    assert await admin.fetchval("select value from dapr_metadata where key = 'migrations-statecast-'") == "3"
    async with store_on(postgresql_url) as store:
        assert (await store.log.deferred(range(16))) == [key]


async def test_what_a_database_of_the_second_level_has_aside_waits_by_topic_afterwards(
    postgresql_url: str, admin: asyncpg.Connection
) -> None:
    """There it waits by key alone."""
    async with store_on(postgresql_url) as store:
        for number in range(3):
            await store.transact(commit(event=str(number), topic="audit" if number == 1 else "orders"))
        batch = await store.log.read(await store.log.acquire("relay", 16, HOUR), 100)
        deferrals = [Deferral((entry,), Failure(4, None, "too large")) for entry in batch.entries]
        leases = await store.log.advance(batch.leases, HOUR, deferrals)
        expected = await store.log.deferred(range(16))
    await admin.execute(
        "create table statecast_deferred_key as select log, slice, order_key, max(attempts) as attempts,"
        " max(due_at) as due_at, max(reason) as reason, sum(pending) as pending"
        " from statecast_deferred_queue group by log, slice, order_key;"
        "drop table statecast_deferred_queue;"
        "alter table statecast_deferred drop constraint statecast_deferred_pkey,"
        " add primary key (log, slice, order_key, id);"
        "update dapr_metadata set value = '2' where key = 'migrations-statecast-'"
    )

    async with store_on(postgresql_url) as store:
        found = await store.log.deferred(range(16))
        entries = await store.log.read_deferred([status.queue for status in found], 100)
        done = [
            QueueProgress(queue, tuple(entry.id for entry in entries if DeferredQueue.of(entry) == queue), None)
            for queue in (status.queue for status in found)
        ]
        emptied = await store.log.settle_deferred(leases, done)

    assert sorted(found, key=str) == sorted(expected, key=str)
    assert len(entries) == 3
    assert emptied == [status.queue for status in found]


@pytest.mark.parametrize(("comment", "is_kept"), [("", False), ("-- revision 0", False), ("-- revision 99", True)])
async def test_the_function_is_replaced_by_a_newer_one_and_by_no_older_one(
    postgresql_url: str, admin: asyncpg.Connection, comment: str, is_kept: bool
) -> None:
    async with store_on(postgresql_url):
        pass
    await admin.execute(
        f"create or replace function statecast_commit_1_v1({', '.join(COMMIT_PARAMETERS)})"
        f" returns text[] language plpgsql as $$ {comment}\n begin return array['fenced 1']; end $$"
    )

    async with store_on(postgresql_url):
        pass

    source = await admin.fetchval("select prosrc from pg_proc where proname = 'statecast_commit_1_v1'")
    assert ("array['fenced 1']" in source) is is_kept


def test_a_function_that_was_changed_has_a_new_revision() -> None:
    """Else it would not come to databases that have the one before: count COMMIT_REVISION up, and note the digest."""
    statement = commit_statement(Layout("public", "", QualifiedName("public", "dapr_metadata")), 1, "orders")

    assert (COMMIT_REVISION, blake2b(statement.encode(), digest_size=8).hexdigest()) == (3, "c2b7edbcc29e7f9a")


# When things break


async def test_a_server_that_is_not_there_is_unavailable() -> None:
    with pytest.raises(StoreUnavailable):
        async with store_on("postgresql://postgres@127.0.0.1:1/none"):
            pass


async def test_a_connection_that_breaks_before_the_answer_leaves_the_outcome_unknown_and_the_next_call_works(
    store: PostgresqlStateStore, admin: asyncpg.Connection
) -> None:
    async with stalled(admin):
        waiting = asyncio.create_task(store.transact(commit(Upsert("orders||1", b"1"))))
        await until_stalled(admin)

        await terminate(admin, "wait_event = 'PgSleep'")

        with pytest.raises(OutcomeUnknown):
            await waiting
    await store.transact(commit(Upsert("orders||1", b"2")))
    assert await values(admin) == {"orders||1": b"2"}


async def test_connections_that_were_cut_while_idle_are_opened_again_without_a_word(
    store: PostgresqlStateStore, admin: asyncpg.Connection
) -> None:
    await asyncio.gather(*(store.get("orders||1") for _ in range(20)))

    await terminate(admin, "application_name = 'statecast orders'")

    await asyncio.gather(*(store.transact(commit(Upsert(str(number), b"1"))) for number in range(20)))
    assert len(await values(admin)) == 20


async def terminate(admin: asyncpg.Connection, which: str) -> None:
    """End backends; when it returns their processes, and so their ends of the connections, are gone."""
    await admin.execute(
        "select pg_terminate_backend(pid, 5000) from pg_stat_activity"
        f" where {which} and datname = current_database() and pid <> pg_backend_pid()"
    )


async def test_a_cancelled_commit_that_was_sent_waits_for_its_outcome_and_keeps_the_connection(
    store: PostgresqlStateStore, admin: asyncpg.Connection
) -> None:
    async with stalled(admin):
        waiting = asyncio.create_task(store.transact(commit(Upsert("orders||1", b"1"))))
        await until_stalled(admin)
        backends = await pids(admin)

        waiting.cancel()
        done, _ = await asyncio.wait({waiting}, timeout=0.1)

    assert not done
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await values(admin) == {"orders||1": b"1"}
    await store.get("orders||1")
    assert await pids(admin) == backends


async def pids(admin: asyncpg.Connection) -> set[int]:
    query = (
        "select pid from pg_stat_activity where application_name = 'statecast orders' and datname = current_database()"
    )
    return {row["pid"] for row in await admin.fetch(query)}


async def test_cancelled_waiters_leak_no_connection(store: PostgresqlStateStore, admin: asyncpg.Connection) -> None:
    for turn in range(20):
        tasks = [asyncio.create_task(store.transact(commit(Upsert(str(number), b"1")))) for number in range(30)]
        for _ in range(turn % 5):
            await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async with asyncio.timeout(10):
        await asyncio.gather(*(store.get("1") for _ in range(50)))
    assert len(await pids(admin)) <= 5  # four lanes, and one for the wake-ups of the log


@pytest.mark.parametrize("way", ["killed", "frozen"])
async def test_a_commit_to_a_server_that_stops_answering_is_unknown_and_a_new_start_is_noticed(
    private_server: Callable[[ServerKind], PrivateServer], way: str
) -> None:
    server = private_server(ServerKind.POSTGRESQL)
    async with store_on(server.address, timeout="1s") as store:
        await store.transact(commit(Upsert("orders||1", b"0")))
        admin = await asyncpg.connect(server.address)
        await stall(admin)
        waiting = asyncio.create_task(store.transact(commit(Upsert("orders||1", b"1"))))
        await until_stalled(admin)

        await asyncio.to_thread(server.kill if way == "killed" else server.freeze)
        with pytest.raises(OutcomeUnknown):
            await waiting
        with pytest.raises(StoreUnavailable):
            await store.get("orders||1")
        await asyncio.to_thread(server.restart if way == "killed" else server.thaw)
        admin.terminate()

        async def is_back() -> bool:
            try:
                return await store.get("orders||1") is not None
            except StoreUnavailable:
                return False

        await until(is_back)


async def test_a_commit_that_waits_too_long_for_a_lock_is_given_up_and_was_not_applied(
    postgresql_url: str, admin: asyncpg.Connection
) -> None:
    async with store_on(postgresql_url, timeout="1s") as store:
        async with admin.transaction():
            await call(admin, commit(Upsert("orders||1", b"held")), wait=True)

            with pytest.raises(StoreUnavailable):
                await store.transact(commit(Upsert("orders||1", b"1")))

        assert await values(admin) == {"orders||1": b"held"}


async def test_a_commit_larger_than_the_lock_table_is_applied_beside_small_ones(
    store: PostgresqlStateStore, admin: asyncpg.Connection
) -> None:
    many = commit(*(Upsert(f"orders||{number}", b"many") for number in range(5_000)))
    few = [commit(Upsert(f"orders||{number}", b"few")) for number in range(200)]

    await asyncio.gather(store.transact(many), *(store.transact(each) for each in few), store.transact(many))

    assert len(await values(admin)) == 5_000


async def test_a_commit_for_whose_locks_the_server_has_no_room_is_applied_when_there_is_some(
    private_server: Callable[[ServerKind], PrivateServer],
) -> None:
    server = private_server(ServerKind.POSTGRESQL)
    user = await asyncpg.connect(server.address)
    async with store_on(server.address) as store:
        await store.transact(commit(Upsert("orders||1", b"0")))
        transaction = user.transaction()
        await transaction.start()
        await fill_lock_table(user)
        waiting = asyncio.create_task(store.transact(commit(*(Upsert(f"orders||{n}", b"1") for n in range(100)))))
        done, _ = await asyncio.wait({waiting}, timeout=0.2)

        await transaction.rollback()

        assert not done
        await waiting
    await user.close()


async def fill_lock_table(user: asyncpg.Connection) -> None:
    await user.execute("create temporary sequence number")
    for count in (1_000, 30, 1):
        with contextlib.suppress(asyncpg.OutOfMemoryError):
            while True:
                async with user.transaction():
                    await user.execute(
                        "select pg_advisory_xact_lock(nextval('number')) from generate_series(1, $1)", count
                    )


def test_etags_are_uuids_as_dapr_writes_them() -> None:
    batch = CommitCall((PreparedCommit(commit(Upsert("orders||1", b"1")), 16),))
    batch.arguments(wait=True)

    (outcome,) = batch.outcomes([None])

    assert isinstance(outcome, Applied)
    assert str(UUID(outcome.etags[0] or "")) == outcome.etags[0]


async def test_commits_read_what_they_touch_also_by_plans_that_were_made_while_tables_were_small(
    postgresql_url: str, admin: asyncpg.Connection
) -> None:
    """It fails where the function joins its arguments to a table in a way that allows the planner to read all of it."""

    async def commit_some(store: PostgresqlStateStore, round: int) -> None:
        await asyncio.gather(
            *(
                store.transact(
                    Commit((Upsert(f"orders||{n}", b"1"), Delete(f"carts||{n}")), (), (mark(round * 4 + n),))
                )
                for n in range(4)
            )
        )

    async with store_on(postgresql_url, maxConns="1") as store:
        await commit_some(store, 0)
        await admin.execute("analyze state, statecast_mark")
        await commit_some(store, 1)
        await admin.execute(
            "insert into state (key, value) select n || '||more', '' from generate_series(1, 5000) n;"
            "insert into statecast_mark (digest, expires_at)"
            " select decode(md5(n::text), 'hex'), now() + '1 hour' from generate_series(1, 5000) n"
        )
        before = await rows_fetched(store, admin, "state%")

        for round in range(2, 12):
            await commit_some(store, round)

        assert 0 < await rows_fetched(store, admin, "state%") - before < 1_000


@pytest.mark.parametrize("wait", [False, True])
async def test_texts_are_written_as_they_are(
    store: PostgresqlStateStore, admin: asyncpg.Connection, wait: bool
) -> None:
    texts = ["", "null", 'a "quoted"', "\\", "\\n", "a\\", '\\"', "\n\t\r\x07\x1f\x7f", "{a,b}", " \u00e9\U0001f642 "]
    records = [OutboxRecord(text, text, text, text, b"{}", {"topic": text}) for text in texts]
    commits = [Commit((Upsert(text, text.encode()),), (record,)) for text, record in zip(texts, records, strict=True)]

    if wait:
        outcomes = [outcome for each in commits for outcome in await call(admin, each, wait=True)]
    else:
        outcomes = await call(admin, *commits)

    leases = await store.log.acquire("relay", 16, HOUR)
    batch = await store.log.read(leases, 100)
    assert all(isinstance(outcome, Applied) for outcome in outcomes)
    assert await values(admin) == {text: text.encode() for text in texts}
    assert {entry.record.order_key: entry.record for entry in batch.entries} == {
        record.order_key: record for record in records
    }
