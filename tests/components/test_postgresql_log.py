"""The log on PostgreSQL under transactions that take their number early and commit late, and its ring of partitions."""

import asyncio
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from urllib.parse import urlsplit
from uuid import uuid4

import asyncpg
import pytest

from statecast.clock import SystemClock
from statecast.components.manifest import Component
from statecast.components.state.commit import Commit, OutboxRecord, Upsert
from statecast.components.state.log import (
    Deferral,
    DeferredQueue,
    Failure,
    Lease,
    LogEntry,
    OutboxLog,
    QueueProgress,
    slice_of,
)
from statecast.components.state.postgresql import PostgresqlStateStore
from statecast.components.state.postgresql.call import CommitCall, PreparedCommit
from statecast.components.state.postgresql.commit_function import COMMIT_ARGUMENTS
from statecast.components.state.postgresql.position import Position
from statecast.components.testing.deadline import until
from tests.components.rows_fetched import blocks_looked_at, rows_fetched

HOUR = timedelta(hours=1)
PATIENCE_SECONDS = 60


@pytest.fixture
def make_store(postgresql_url: str) -> Callable[[], PostgresqlStateStore]:
    component = Component("statestore", "state.postgresql", "v2", {"connectionString": postgresql_url, "maxConns": "8"})
    return lambda: PostgresqlStateStore(component, app_id="orders", clock=SystemClock())


@pytest.fixture
async def store(make_store: Callable[[], PostgresqlStateStore]) -> AsyncIterator[PostgresqlStateStore]:
    async with make_store() as store:
        yield store


@pytest.fixture
async def admin(postgresql_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(postgresql_url)
    yield connection
    await connection.close()


def record(order_key: str, event_id: str) -> OutboxRecord:
    return OutboxRecord(order_key, event_id, "pubsub", "orders", b"{}")


async def append(store: PostgresqlStateStore, *event_ids: str, order_key: str = "orders||1") -> None:
    await store.transact(Commit((), tuple(record(order_key, event_id) for event_id in event_ids)))


async def read_all(log: OutboxLog, leases: list[Lease]) -> tuple[list[str], list[Lease]]:
    batch = await log.read(leases, 1_000)
    return [entry.record.event_id for entry in batch.entries], list(batch.leases)


async def commit_inside(connection: asyncpg.Connection, commit: Commit) -> None:
    """Call the commit function in a transaction that is open on `connection`."""
    arguments = CommitCall((PreparedCommit(commit, 16),)).arguments(wait=True)
    refusal = await connection.fetchval(f"select statecast_commit_1_v1({COMMIT_ARGUMENTS})", *arguments)
    assert refusal == [None]


# Late commits


async def test_what_commits_late_with_an_early_id_is_read_behind_what_came_in_between(
    store: PostgresqlStateStore, admin: asyncpg.Connection
) -> None:
    leases = await store.log.acquire("relay", 16, HOUR)
    transaction = admin.transaction()
    await transaction.start()
    await commit_inside(admin, Commit((), (record("orders||late", "late"),)))
    await append(store, "early")

    before, leases = await read_all(store.log, leases)
    await transaction.commit()
    after, leases = await read_all(store.log, leases)

    assert (before, after) == (["early"], ["late"])
    assert await read_all(store.log, leases) == ([], leases)


async def test_a_read_in_small_steps_keeps_its_snapshot_until_all_of_it_is_given(
    store: PostgresqlStateStore, admin: asyncpg.Connection
) -> None:
    """It fails when every step takes a snapshot of its own (tried): the late event is then behind `after` for ever."""
    leases = await store.log.acquire("relay", 16, HOUR)
    transaction = admin.transaction()
    await transaction.start()
    await commit_inside(admin, Commit((), (record("orders||late", "late"),)))
    await append(store, *(f"early-{number}" for number in range(5)))
    first = await store.log.read(leases, 2)

    await transaction.commit()
    seen = [entry.record.event_id for entry in first.entries]
    leases = list(first.leases)
    for _ in range(5):
        batch = await store.log.read(leases, 2)
        seen += [entry.record.event_id for entry in batch.entries]
        leases = list(batch.leases)

    assert seen == [f"early-{number}" for number in range(5)] + ["late"]


async def test_a_transaction_left_open_in_this_and_in_another_database_holds_nothing_up(
    store: PostgresqlStateStore, admin: asyncpg.Connection, postgresql_url: str
) -> None:
    leases = await store.log.acquire("relay", 16, HOUR)
    elsewhere = await asyncpg.connect(urlsplit(postgresql_url)._replace(path="/postgres").geturl())
    async with admin.transaction(), elsewhere.transaction():
        await admin.execute("select pg_current_xact_id()")
        await elsewhere.execute("select pg_current_xact_id()")

        seen = []
        for number in range(20):
            await append(store, str(number))
            found, leases = await read_all(store.log, leases)
            seen += found

        assert seen == [str(number) for number in range(20)]
    await elsewhere.close()


async def test_a_rolled_back_transaction_leaves_no_event(
    store: PostgresqlStateStore, admin: asyncpg.Connection
) -> None:
    leases = await store.log.acquire("relay", 16, HOUR)
    transaction = admin.transaction()
    await transaction.start()
    await commit_inside(admin, Commit((), (record("orders||1", "never"),)))
    _, leases = await read_all(store.log, leases)

    await transaction.rollback()
    await append(store, "after")

    assert (await read_all(store.log, leases))[0] == ["after"]


class Deliveries:
    """What relays have published, as a broker would see it."""

    def __init__(self) -> None:
        self._first: defaultdict[str, list[str]] = defaultdict(list)
        self._seen: set[str] = set()

    def add(self, entries: list[LogEntry]) -> None:
        for entry in entries:
            if entry.record.event_id not in self._seen:
                self._seen.add(entry.record.event_id)
                self._first[entry.record.order_key].append(entry.record.event_id)

    @property
    def first(self) -> dict[str, list[str]]:
        return dict(self._first)

    def __len__(self) -> int:
        return len(self._seen)


async def test_provoking_writers_and_relays_that_freeze_and_die_lose_nothing_and_keep_the_order_of_keys(
    store: PostgresqlStateStore,
    make_store: Callable[[], PostgresqlStateStore],
    admin: asyncpg.Connection,
    postgresql_url: str,
) -> None:
    """It fails when a position is an id instead of two snapshots (tried)."""
    keys, writers, steps = [f"orders||{number}" for number in range(24)], 6, 60
    total = writers * steps
    chance = random.Random(7)
    deliveries = Deliveries()
    await admin.execute("create table counter (key text primary key, n int not null)")

    async def write(connection: asyncpg.Connection) -> None:
        for _ in range(steps):
            key = chance.choice(keys)
            async with connection.transaction():
                # The transaction's number is old by the time that it gets the key.
                await connection.execute("select pg_current_xact_id()")
                await asyncio.sleep(chance.uniform(0, 0.01))
                number = await connection.fetchval(
                    "insert into counter values ($1, 1) on conflict (key) do update set n = counter.n + 1 returning n",
                    key,
                )
                event = record(key, f"{key}#{number}")
                await commit_inside(connection, Commit((Upsert(key, b"%d" % number),), (event,)))
                await asyncio.sleep(chance.uniform(0, 0.02))

    async def relay(name: str) -> None:
        """Take slices, read, deliver, persist; now and then sleep through the lease, or die and come back."""
        ttl = timedelta(milliseconds=200)
        leases: list[Lease] = []
        while len(deliveries) < total:
            leases += await store.log.acquire(name, 6 - len(leases), ttl)
            batch = await store.log.read(leases, 7)
            if chance.random() < 0.03:
                await asyncio.sleep(0.3)
            if chance.random() < 0.03:
                leases = []
                continue
            # A relay renews before it publishes, and leaves out what is another's now.
            mine = {lease.slice for lease in await store.log.advance(leases, ttl)}
            deliveries.add([entry for entry in batch.entries if entry.slice in mine])
            leases = await store.log.advance([lease for lease in batch.leases if lease.slice in mine], ttl)
            await store.log.wait(leases, timedelta(milliseconds=10))

    connections = [await asyncpg.connect(postgresql_url) for _ in range(writers)]
    async with asyncio.timeout(PATIENCE_SECONDS), asyncio.TaskGroup() as group:
        for connection in connections:
            group.create_task(write(connection))
        for name in ("a", "b", "c"):
            group.create_task(relay(name))

    counts = {row["key"]: row["n"] for row in await admin.fetch("select key, n from counter")}
    assert sum(counts.values()) == total
    assert deliveries.first == {key: [f"{key}#{number}" for number in range(1, n + 1)] for key, n in counts.items()}
    for connection in connections:
        await connection.close()


# Positions


async def test_an_idle_logs_positions_do_not_move_although_leases_are_renewed(store: PostgresqlStateStore) -> None:
    leases = await store.log.acquire("relay", 16, HOUR)
    batch = await store.log.read(leases, 100)

    for _ in range(10):
        await store.log.heartbeat("relay", HOUR)
        kept = await store.log.advance(batch.leases, HOUR)
        batch = await store.log.read(kept, 100)

    assert [lease.position for lease in batch.leases] == [lease.position for lease in leases]


async def test_positions_of_quiet_slices_follow_when_many_transactions_have_passed(
    store: PostgresqlStateStore, admin: asyncpg.Connection
) -> None:
    leases = await store.log.acquire("relay", 16, HOUR)
    for _ in range(1_100):
        await admin.execute("select pg_current_xact_id()")

    batch = await store.log.read(leases, 100)

    assert {lease.position for lease in batch.leases}.isdisjoint(lease.position for lease in leases)


def test_a_position_is_the_same_after_writing_and_reading_its_text() -> None:
    for position in (Position("7:9:7,8"), Position("7:9:7,8", "10:10:", 17)):
        assert Position.parse(str(position)) == position


async def test_slices_at_the_same_position_are_read_by_one_statement(
    store: PostgresqlStateStore, admin: asyncpg.Connection
) -> None:
    leases = await store.log.acquire("relay", 16, HOUR)
    await append(store, "1")
    batch = await store.log.read(leases, 100)

    assert len({lease.position for lease in batch.leases}) == 1


async def test_slices_that_were_read_apart_are_at_the_same_position_after_the_next_find(
    store: PostgresqlStateStore,
) -> None:
    leases = await store.log.acquire("relay", 16, HOUR)
    apart: list[Lease] = []
    for lease in leases:
        await append(store, f"news-{lease.slice}", order_key=f"orders||{lease.slice}")
        apart += (await store.log.read([lease], 100)).leases
    await append(store, "news")

    batch = await store.log.read(apart, 100)

    assert len({lease.position for lease in apart}) > 1
    assert len({lease.position for lease in batch.leases}) == 1


async def test_a_slice_that_is_read_beside_one_in_the_middle_of_older_news_does_not_go_back(
    store: PostgresqlStateStore,
) -> None:
    """It fails where the snapshot that one is pinned to is taken over for the other (tried)."""
    leases = {lease.slice: lease for lease in await store.log.acquire("relay", 16, HOUR)}
    slow, quick = slice_of("orders||1", 16), slice_of("orders||2", 16)
    assert slow != quick
    await append(store, *(f"slow-{number}" for number in range(4)))
    (leases[slow],) = (await store.log.read([leases[slow]], 1)).leases
    await append(store, "quick", order_key="orders||2")
    (leases[quick],) = (await store.log.read([leases[quick]], 1)).leases

    seen: list[str] = []
    both = [leases[slow], leases[quick]]
    for _ in range(6):
        batch = await store.log.read(both, 2)
        seen += [entry.record.event_id for entry in batch.entries]
        both = list(batch.leases)

    assert seen == ["slow-1", "slow-2", "slow-3"]


async def test_a_read_takes_no_longer_for_what_has_passed(
    store: PostgresqlStateStore, admin: asyncpg.Connection
) -> None:
    """Most of a partition has passed when it is trimmed; the server must not walk along that at every read."""
    leases = await store.log.acquire("relay", 16, HOUR)
    await append(store, *(f"passed-{number}" for number in range(3_000)))
    passed = await store.log.read(leases, 10_000)
    before = await rows_fetched(store, admin, "statecast_outbox_1_%")

    seen: list[str] = []
    leases = list(passed.leases)
    for number in range(20):
        await append(store, f"new-{number}")
        found, leases = await read_all(store.log, leases)
        seen += found
    await append(store, *(f"new-{number}" for number in range(20, 50)))
    for _ in range(4):
        batch = await store.log.read(leases, 10)
        seen += [entry.record.event_id for entry in batch.entries]
        leases = list(batch.leases)

    assert seen == [f"new-{number}" for number in range(50)]
    assert await rows_fetched(store, admin, "statecast_outbox_1_%") - before < 300


async def test_an_advance_takes_no_longer_while_a_transaction_is_left_open(
    store: PostgresqlStateStore, admin: asyncpg.Connection, postgresql_url: str
) -> None:
    """All versions of the slices' rows stay then; an advance must not walk along those of all before it."""
    leases = await store.log.acquire("relay", 16, HOUR)
    async with asyncpg.create_pool(postgresql_url, min_size=1, max_size=1) as pool, pool.acquire() as foreign:
        await foreign.execute("begin isolation level repeatable read; select pg_current_snapshot()")
        for _ in range(300):
            assert len(await store.log.advance(leases, HOUR)) == 16
        before = await blocks_looked_at(store, admin, "statecast_slice")

        for _ in range(20):
            await store.log.advance(leases, HOUR)

        assert 0 < await blocks_looked_at(store, admin, "statecast_slice") - before < 20 * 16 * 25


async def test_an_advance_finds_rows_that_were_moved_by_others(
    store: PostgresqlStateStore, make_store: Callable[[], PostgresqlStateStore], admin: asyncpg.Connection
) -> None:
    leases = await store.log.acquire("relay", 16, HOUR)
    await store.log.advance(leases, HOUR)

    await admin.execute("update statecast_slice set expires_at = expires_at where slice < 4")
    assert await store.log.advance(leases, HOUR) == leases

    async with make_store() as other:
        await admin.execute("update statecast_slice set expires_at = '-infinity' where slice < 4")
        taken = await other.log.acquire("other", 4, HOUR)
        assert await other.log.advance(taken, HOUR) == taken

        assert await store.log.advance(leases, HOUR) == leases[4:]
        assert await other.log.advance(taken, HOUR) == taken


# What is put aside


async def test_what_is_aside_of_one_key_does_not_make_looking_at_the_keys_slow(
    store: PostgresqlStateStore, admin: asyncpg.Connection
) -> None:
    """Relays look often; how many entries wait is counted when they are put aside."""
    leases = await store.log.acquire("relay", 16, HOUR)
    await append(store, *(str(number) for number in range(300)), order_key="orders||1")
    batch = await store.log.read(leases, 1_000)
    kept = await store.log.advance(batch.leases, HOUR, [Deferral(batch.entries, Failure(1, None, "refused"))])
    await admin.execute(
        "insert into statecast_deferred (log, slice, order_key, id, event_id, format, pubsub, topic, metadata, body,"
        " created_at) select log, slice, order_key, id + 1000 * n, event_id, format, pubsub, topic, metadata, body,"
        " created_at from statecast_deferred, generate_series(1, 100) n"
    )
    await admin.execute("analyze statecast_deferred; select pg_stat_force_next_flush()")
    before = await rows_fetched(store, admin, "statecast_deferred")

    (status,) = await store.log.deferred(range(16))
    entries = await store.log.read_deferred([status.queue], 10)
    emptied = await store.log.settle_deferred(kept, [QueueProgress(status.queue, (entries[0].id,), None)])

    assert (status.pending, len(entries), emptied) == (300, 10, [])
    assert await rows_fetched(store, admin, "statecast_deferred") - before < 100


@pytest.mark.parametrize("holder", ["another statement", "nobody"])
async def test_a_settlement_beside_another_statement_for_its_slice_does_nothing_and_is_made_again(
    store: PostgresqlStateStore, admin: asyncpg.Connection, holder: str
) -> None:
    """It could not see what the other one, its own relay's whose answer was lost, has put aside of the key."""
    await append(store, "1")
    batch = await store.log.read(await store.log.acquire("relay", 16, HOUR), 100)
    (entry,) = batch.entries
    kept = await store.log.advance(batch.leases, HOUR, [Deferral(batch.entries, Failure(1, HOUR, "refused"))])
    transaction = admin.transaction()
    await transaction.start()
    if holder == "another statement":
        await admin.execute("select from statecast_slice where slice = $1 for update", entry.slice)

    settled = QueueProgress(DeferredQueue.of(entry), (entry.id,), None)

    async with asyncio.timeout(10):
        emptied = await store.log.settle_deferred(kept, [settled])

    await transaction.rollback()
    assert emptied == ([] if holder == "another statement" else [settled.queue])
    assert [status.queue for status in await store.log.deferred(range(16))] == [
        queue for queue in [settled.queue] if queue not in emptied
    ]
    assert await store.log.settle_deferred(kept, [settled]) == [settled.queue]


async def test_a_brokers_words_are_kept_whatever_they_are(store: PostgresqlStateStore) -> None:
    await append(store, "1")
    batch = await store.log.read(await store.log.acquire("relay", 16, HOUR), 100)

    kept = await store.log.advance(batch.leases, HOUR, [Deferral(batch.entries, Failure(1, None, "nul \0, \ud800"))])

    assert len(kept) == 16
    assert [key.reason for key in await store.log.deferred(range(16))] == ["nul \N{REPLACEMENT CHARACTER}, ?"]


# Words from other processes


async def test_a_commit_elsewhere_wakes_a_wait_by_a_notification(
    store: PostgresqlStateStore, make_store: Callable[[], PostgresqlStateStore], admin: asyncpg.Connection
) -> None:
    heard: list[str] = []

    async def has_heard() -> bool:
        return bool(heard)

    await store.log.wait([], timedelta(milliseconds=1))
    channel = await listened_channel(admin)
    await admin.add_listener(channel, lambda *told: heard.append(str(told[3])))

    async with make_store() as other:
        await append(other, "1", order_key="orders||1")

        await until(has_heard)

    assert heard == [str(slice_of("orders||1", 16))]


async def test_a_process_that_reads_its_own_commits_tells_nobody(
    store: PostgresqlStateStore, admin: asyncpg.Connection
) -> None:
    heard: list[str] = []

    async def has_heard() -> bool:
        return bool(heard)

    leases = await store.log.acquire("relay", 16, HOUR)
    await store.log.wait(leases, timedelta(milliseconds=1))
    await admin.add_listener(await listened_channel(admin), lambda *told: heard.append(str(told[3])))

    await append(store, "1")
    await store.log.release(leases)
    await append(store, "2", order_key="orders||2")
    await until(has_heard)

    assert heard == [str(slice_of("orders||2", 16))]


class LaggingClock(SystemClock):
    """By this clock whatever is timed takes `lag`. It notes how long it is waited for."""

    def __init__(self, lag: timedelta) -> None:
        self.waits: list[timedelta] = []
        self._lag = lag
        self._reading = timedelta()

    def monotonic(self) -> float:
        self._reading += self._lag
        return self._reading.total_seconds()

    async def wait(self, event: asyncio.Event, timeout: timedelta) -> bool:
        self.waits.append(timeout)
        return await super().wait(event, timeout)


@pytest.mark.parametrize(("lag", "pause"), [(0, 5), (1, 10), (1000, 20)])
async def test_a_word_is_followed_by_a_pause_that_is_the_longer_the_longer_the_server_took_for_it(
    postgresql_url: str, lag: int, pause: int
) -> None:
    clock = LaggingClock(timedelta(milliseconds=lag))
    component = Component("statestore", "state.postgresql", "v2", {"connectionString": postgresql_url})

    async def has_paused() -> bool:
        return any(wait < timedelta(seconds=1) for wait in clock.waits)

    async with PostgresqlStateStore(component, app_id="orders", clock=clock) as store:
        await append(store, "1")
        await until(has_paused)

    assert [wait for wait in clock.waits if wait < timedelta(seconds=1)] == [timedelta(milliseconds=pause)]


async def listened_channel(admin: asyncpg.Connection) -> str:
    """Find the channel that the store listens on: by the last statement of its side connection."""
    found: list[str] = []

    async def is_listening() -> bool:
        found.extend(
            row["query"] for row in await admin.fetch("select query from pg_stat_activity where query ilike 'listen %'")
        )
        return bool(found)

    await until(is_listening)
    return found[0].split('"')[1]


# The ring


async def fill_partitions(store: PostgresqlStateStore, admin: asyncpg.Connection) -> None:
    """Put ten events each into partitions 0, 1 and 2, by moving the sequence on."""
    for partition in range(3):
        await admin.execute("select setval('statecast_outbox_1_id', $1)", (partition << 17) + 1)
        await append(store, *(f"{partition}-{number}" for number in range(10)))


async def counts(admin: asyncpg.Connection) -> list[int]:
    return [await admin.fetchval(f"select count(*) from statecast_outbox_1_{number}") for number in range(4)]


async def test_what_every_slice_has_passed_is_truncated(store: PostgresqlStateStore, admin: asyncpg.Connection) -> None:
    await fill_partitions(store, admin)
    files = await admin.fetchval("select pg_relation_filenode('statecast_outbox_1_0')")
    _, leases = await read_all(store.log, await store.log.acquire("relay", 16, HOUR))
    await store.log.advance(leases, HOUR)

    await store.log.trim()

    # Partition 2 is being written; 3 would be next.
    assert await counts(admin) == [0, 0, 10, 0]
    assert await admin.fetchval("select pg_relation_filenode('statecast_outbox_1_0')") != files


async def test_what_one_slice_has_not_passed_is_kept(store: PostgresqlStateStore, admin: asyncpg.Connection) -> None:
    await fill_partitions(store, admin)
    _, leases = await read_all(store.log, await store.log.acquire("relay", 16, HOUR))
    await store.log.advance(leases[1:], HOUR)

    await store.log.trim()

    assert await counts(admin) == [10, 10, 10, 0]


async def test_a_partition_that_an_open_transaction_has_written_to_is_kept_and_read(
    store: PostgresqlStateStore, admin: asyncpg.Connection, postgresql_url: str
) -> None:
    writer = await asyncpg.connect(postgresql_url)
    transaction = writer.transaction()
    await transaction.start()
    await commit_inside(writer, Commit((), (record("orders||late", "late"),)))
    await fill_partitions(store, admin)
    _, leases = await read_all(store.log, await store.log.acquire("relay", 16, HOUR))
    await store.log.advance(leases, HOUR)

    await store.log.trim()
    await transaction.commit()

    assert (await counts(admin))[0] == 11
    assert (await read_all(store.log, leases))[0] == ["late"]
    await writer.close()


async def test_what_was_committed_late_is_kept_until_it_is_read(
    store: PostgresqlStateStore, admin: asyncpg.Connection, postgresql_url: str
) -> None:
    """It fails when only the end of the snapshots is looked at, not what was open in them (tried)."""
    writer = await asyncpg.connect(postgresql_url)
    transaction = writer.transaction()
    await transaction.start()
    await commit_inside(writer, Commit((), (record("orders||late", "late"),)))
    await fill_partitions(store, admin)
    _, leases = await read_all(store.log, await store.log.acquire("relay", 16, HOUR))
    leases = await store.log.advance(leases, HOUR)
    await transaction.commit()

    await store.log.trim()
    late, leases = await read_all(store.log, leases)
    await store.log.advance(leases, HOUR)
    await store.log.trim()

    assert late == ["late"]
    assert await counts(admin) == [0, 0, 10, 0]
    await writer.close()


async def test_a_transaction_left_open_elsewhere_does_not_keep_what_is_passed(
    store: PostgresqlStateStore, admin: asyncpg.Connection, postgresql_url: str
) -> None:
    foreign = await asyncpg.connect(postgresql_url)
    async with foreign.transaction():
        await foreign.execute("select pg_current_xact_id()")
        await fill_partitions(store, admin)
        _, leases = await read_all(store.log, await store.log.acquire("relay", 16, HOUR))
        await store.log.advance(leases, HOUR)

        await store.log.trim()

        assert await counts(admin) == [0, 0, 10, 0]
    await foreign.close()


async def test_a_trim_gives_up_while_a_dump_holds_the_table(
    store: PostgresqlStateStore, admin: asyncpg.Connection
) -> None:
    await fill_partitions(store, admin)
    _, leases = await read_all(store.log, await store.log.acquire("relay", 16, HOUR))
    await store.log.advance(leases, HOUR)

    async with admin.transaction():
        await admin.execute("lock table statecast_outbox_1_0 in access share mode")
        await store.log.trim()
        kept = await admin.fetchval("select count(*) from statecast_outbox_1_0")

    assert kept == 10


async def test_a_role_that_may_not_truncate_relays_on_and_is_told_once(
    store: PostgresqlStateStore, admin: asyncpg.Connection, postgresql_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    role = f"plain_{uuid4().hex}"
    await admin.execute(f"create role {role} login")
    await admin.execute(f"grant select, insert, update, delete on all tables in schema public to {role}")
    await admin.execute(f"grant usage, select on all sequences in schema public to {role}")
    await fill_partitions(store, admin)

    url = urlsplit(postgresql_url)
    as_role = url._replace(netloc=f"{role}@{url.hostname}:{url.port}").geturl()
    component = Component("statestore", "state.postgresql", "v2", {"connectionString": as_role})
    async with PostgresqlStateStore(component, app_id="orders", clock=SystemClock()) as plain:
        seen, leases = await read_all(plain.log, await plain.log.acquire("relay", 16, HOUR))
        await plain.log.advance(leases, HOUR)
        await plain.log.trim()
        await plain.log.trim()

    assert len(seen) == 30
    assert await counts(admin) == [10, 10, 10, 0]
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "permission denied for table statecast_outbox_1_0" in caplog.text
    await admin.execute(f"drop owned by {role}")
    await admin.execute(f"drop role {role}")


async def test_a_ring_that_comes_round_goes_on(store: PostgresqlStateStore, admin: asyncpg.Connection) -> None:
    seen: list[str] = []
    leases = await store.log.acquire("relay", 16, HOUR)
    for turn in range(9):
        await admin.execute("select setval('statecast_outbox_1_id', $1)", (turn << 17) + 1)
        await append(store, str(turn))
        found, leases = await read_all(store.log, leases)
        seen += found
        await store.log.advance(leases, HOUR)
        await store.log.trim()

    assert seen == [str(turn) for turn in range(9)]
    assert sum(await counts(admin)) <= 3
