"""Commits that share a call: what they have in common, what keeps them apart, and what becomes of each.

Commits of one call share a transaction, so the transaction ids of their events tell how many calls there were.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta

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
from statecast.components.state.postgresql import PostgresqlStateStore
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
from tests.components.stalling import stalled, until_stalled

HOUR = timedelta(hours=1)
CALLS_AT_ONCE = 2
PATIENCE_SECONDS = 60

Answer = tuple[ETag | None, ...] | BaseException


def store_on(url: str, **metadata: str) -> PostgresqlStateStore:
    component = Component("statestore", "state.postgresql", "v2", {"connectionString": url, "maxConns": "8"} | metadata)
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


@pytest.fixture
async def user(postgresql_url: str) -> AsyncIterator[asyncpg.Connection]:
    """The connection of a user who has transactions of their own."""
    connection = await asyncpg.connect(postgresql_url)
    yield connection
    await connection.close()


@asynccontextmanager
async def held(user: asyncpg.Connection, keys: Sequence[str]) -> AsyncIterator[None]:
    """Hold rows in a transaction that is rolled back at the end."""
    transaction = user.transaction()
    await transaction.start()
    await user.execute(
        "insert into state (key, value) select key, 'user' from unnest($1::text[]) key"
        " on conflict (key) do update set value = excluded.value",
        sorted(keys),
    )
    yield
    await transaction.rollback()


def event(key: str, number: int) -> OutboxRecord:
    return OutboxRecord(key, f"{key}#{number}", "pubsub", "orders", b"{}")


def write(key: str, number: int = 0, etag: ETag | None = None) -> Commit:
    return Commit((Upsert(key, b"%d" % number, etag),), (event(key, number),))


def start(store: PostgresqlStateStore, commits: Sequence[Commit]) -> list[asyncio.Task[tuple[ETag | None, ...]]]:
    return [asyncio.create_task(store.transact(commit)) for commit in commits]


async def answers(store: PostgresqlStateStore, commits: Sequence[Commit]) -> list[Answer]:
    async with asyncio.timeout(PATIENCE_SECONDS):
        return await asyncio.gather(*(store.transact(commit) for commit in commits), return_exceptions=True)


async def calls(admin: asyncpg.Connection) -> int:
    return int(await admin.fetchval("select count(distinct xid) from statecast_outbox_1"))


async def event_ids(admin: asyncpg.Connection, order_key: str | None = None) -> list[str]:
    rows = await admin.fetch(
        "select event_id from statecast_outbox_1 where $1::text is null or order_key = $1 order by id", order_key
    )
    return [row["event_id"] for row in rows]


async def keys(admin: asyncpg.Connection) -> set[str]:
    return {row["key"] for row in await admin.fetch("select key from state")}


async def waiting_for_locks(admin: asyncpg.Connection) -> int:
    """To be asked outside of a transaction: inside of one the answer stays what it was."""
    return int(
        await admin.fetchval(
            "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
        )
    )


async def deadlocks(admin: asyncpg.Connection) -> int:
    await admin.execute("select pg_stat_force_next_flush()")
    return int(await admin.fetchval("select deadlocks from pg_stat_database where datname = current_database()"))


# Together


async def test_commits_that_wait_together_share_a_few_calls(
    store: PostgresqlStateStore, admin: asyncpg.Connection
) -> None:
    commits = [write(f"orders||{number}") for number in range(100)]

    applied = await answers(store, commits)

    assert await calls(admin) == CALLS_AT_ONCE
    found = {row["key"]: str(row["etag"]) for row in await admin.fetch("select key, etag from state")}
    assert applied == [(found[f"orders||{number}"],) for number in range(100)]
    assert sorted(await event_ids(admin)) == sorted(f"orders||{number}#0" for number in range(100))


async def test_where_commits_are_not_to_be_grouped_each_has_its_call(
    postgresql_url: str, admin: asyncpg.Connection
) -> None:
    async with store_on(postgresql_url, statecastGroupCommit="false") as store:
        await answers(store, [write(f"orders||{number}") for number in range(100)])

    assert await calls(admin) == 100


async def test_commits_of_one_key_keep_the_order_in_which_they_were_submitted(
    store: PostgresqlStateStore, admin: asyncpg.Connection
) -> None:
    """It fails when commits that may go are taken although one before them of the same key may not (tried)."""
    chance = random.Random(11)
    names = [f"orders||{number}" for number in range(5)]
    commits = []
    for number in range(600):
        chosen = chance.sample(names, chance.choice([1, 1, 2, 3]))
        commits.append(
            Commit(tuple(Upsert(key, b"%d" % number) for key in chosen), tuple(event(key, number) for key in chosen))
        )

    assert not [answer for answer in await answers(store, commits) if isinstance(answer, BaseException)]

    for key in names:
        numbers = [number for number, each in enumerate(commits) if key in {one.key for one in each.operations}]
        assert await event_ids(admin, key) == [f"{key}#{number}" for number in numbers]
        assert await admin.fetchval("select value from state where key = $1", key) == b"%d" % numbers[-1]


@pytest.mark.parametrize("connections", ["1", "2", "3"])
async def test_those_behind_a_commit_go_on_although_it_has_nothing_left_to_give_back_at_its_end(
    postgresql_url: str, admin: asyncpg.Connection, connections: str
) -> None:
    """A call that takes long frees its slot meanwhile, and where there is one connection it has no place."""
    long = timedelta(milliseconds=100)
    async with store_on(postgresql_url, maxConns=connections, timeout="5s") as store:
        async with stalled(admin):
            tasks = start(store, [write("orders||slow", number) for number in range(3)])
            await until_stalled(admin, age=long)
        await asyncio.gather(*tasks)

    assert await event_ids(admin) == [f"orders||slow#{number}" for number in range(3)]


async def test_large_commits_go_with_as_few_others_as_the_locks_allow(
    store: PostgresqlStateStore, admin: asyncpg.Connection
) -> None:
    """A call with more than 256 keys would be alone, in all processes."""
    commits = [
        Commit(tuple(Upsert(f"orders||{number}-{part}", b"1") for part in range(90)), (event(f"{number}", 0),))
        for number in range(41)
    ]

    assert not [answer for answer in await answers(store, commits) if isinstance(answer, BaseException)]

    # Of an even number the last two go together, or in a call each where both calls before theirs have ended.
    assert await calls(admin) == 21


# Each its own outcome


async def test_a_commit_that_is_refused_leaves_its_neighbours(
    store: PostgresqlStateStore, admin: asyncpg.Connection
) -> None:
    (etag,) = await store.transact(Commit((Upsert("orders||old", b"0"),), marks=(Mark(b"m" * 16, HOUR),)))
    commits = [write(f"orders||{number}") for number in range(40)]
    bad = {
        3: Commit((Upsert("orders||a", b"x"), Check("orders||old", None)), (event("orders||a", 0),)),
        17: Commit((Upsert("orders||b", b"x"),), (event("orders||b", 0),), marks=(Mark(b"m" * 16, HOUR),)),
        18: write("orders||c", etag=ETag("stale")),
        31: Commit((Upsert("orders||d", b"x"),), (event("orders||d", 0),), guards=(Guard("Cart", "1", "none"),)),
    }
    for at, commit in bad.items():
        commits[at] = commit

    outcomes = await answers(store, commits)

    assert {at: type(outcome) for at, outcome in enumerate(outcomes) if isinstance(outcome, BaseException)} == {
        3: ETagMismatch,
        17: Duplicate,
        18: ETagMismatch,
        31: Fenced,
    }
    assert isinstance(outcomes[17], Duplicate)
    assert outcomes[17].etags == (etag,)
    good = [f"orders||{number}" for number in range(40) if number not in bad]
    assert await keys(admin) == {"orders||old", *good}
    assert sorted(await event_ids(admin)) == sorted(f"{key}#0" for key in good)
    assert await calls(admin) == CALLS_AT_ONCE


@pytest.mark.parametrize("connections", ["1", "2", "3"])
async def test_a_lost_claim_and_a_set_mark_are_told_at_once_however_few_connections_there_are(
    postgresql_url: str, admin: asyncpg.Connection, connections: str
) -> None:
    async with store_on(postgresql_url, maxConns=connections) as store:
        guard = await store.directory.claim("Cart", "1")
        guarded = Commit((Upsert("orders||1", b"1"),), (event("orders||1", 1),), guards=(guard,))
        once = Commit((Upsert("orders||2", b"1"),), (event("orders||2", 1),), (Mark(b"m" * 16, HOUR),), (guard,))
        await store.transact(once)
        await store.directory.claim("Cart", "1")

        alone = [*await answers(store, [guarded]), *await answers(store, [once])]
        together = await answers(store, [guarded, write("orders||3"), once])

    assert [type(answer) for answer in alone] == [Fenced, Duplicate]
    assert [type(answer) for answer in together] == [Fenced, tuple, Duplicate]
    assert await event_ids(admin) == ["orders||2#1", "orders||3#0"]


async def test_a_batch_that_was_rolled_back_for_one_commit_is_run_one_by_one_and_each_once(
    store: PostgresqlStateStore, admin: asyncpg.Connection
) -> None:
    commits = [write(f"orders||{number}") for number in range(40)]
    commits[20] = write("orders||nul \0")
    commits[30] = write("orders||7", 1)

    outcomes = await answers(store, commits)

    assert [at for at, outcome in enumerate(outcomes) if isinstance(outcome, BaseException)] == [20]
    assert isinstance(outcomes[20], InvalidRequest)
    good = [f"orders||{number}#0" for number in range(40) if number not in (20, 30)]
    assert sorted(await event_ids(admin)) == sorted([*good, "orders||7#1"])
    # Of 20 and 19 commits, and one that waited for its key, the second call was rolled back.
    assert await calls(admin) == 1 + 18 + 1
    assert await event_ids(admin, "orders||7") == ["orders||7#0", "orders||7#1"]


async def test_a_commit_that_a_users_constraint_refuses_leaves_its_neighbours(
    store: PostgresqlStateStore, admin: asyncpg.Connection
) -> None:
    await admin.execute("alter table state add check (length(value) < 10)")
    commits = [write(f"orders||{number}") for number in range(20)]
    commits[5] = write("orders||5", 10**10)

    outcomes = await answers(store, commits)

    assert [type(outcome) for at, outcome in enumerate(outcomes) if at != 5] == [tuple] * 19
    assert isinstance(outcomes[5], InvalidRequest)
    assert len(await event_ids(admin)) == 19


async def test_a_first_write_that_another_program_came_before_is_refused_alone(
    store: PostgresqlStateStore, admin: asyncpg.Connection, user: asyncpg.Connection
) -> None:
    first = Upsert("orders||first", b"1", concurrency=Concurrency.FIRST_WRITE)
    commits = [*(write(f"orders||{number}") for number in range(20)), Commit((first,), (event("orders||first", 0),))]
    transaction = user.transaction()
    await transaction.start()
    await user.execute("insert into state (key, value) values ('orders||first', 'user')")
    tasks = start(store, commits)
    await until_waiting(admin, 1)

    await transaction.commit()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)

    assert [type(outcome) for outcome in outcomes] == [tuple] * 20 + [ETagMismatch]
    assert sorted(await event_ids(admin)) == sorted(f"orders||{number}#0" for number in range(20))


async def until_waiting(admin: asyncpg.Connection, number: int) -> None:
    async def is_so() -> bool:
        return await waiting_for_locks(admin) >= number

    await until(is_so)


# Held keys


@pytest.mark.parametrize(("connections", "groups"), [("1", "true"), ("3", "true"), ("8", "true"), ("8", "false")])
async def test_keys_that_another_transaction_holds_hold_up_their_own_commits_alone(
    postgresql_url: str, admin: asyncpg.Connection, user: asyncpg.Connection, connections: str, groups: str
) -> None:
    """There are more held keys than connections, and two commits for each."""
    taken = [f"orders||held-{number}" for number in range(20)]
    async with store_on(postgresql_url, maxConns=connections, statecastGroupCommit=groups) as store:
        await answers(store, [write(key) for key in taken])
        async with held(user, taken):
            waiting = start(store, [write(key, number) for number in (1, 2) for key in taken])
            await store.transact(write("orders||first"))

            done = await answers(store, [write(f"orders||{number % 100}", number) for number in range(300)])

            assert not [answer for answer in done if isinstance(answer, BaseException)]
            assert not [task for task in waiting if task.done()]
        async with asyncio.timeout(PATIENCE_SECONDS):
            await asyncio.gather(*waiting)

    for key in taken:
        assert await event_ids(admin, key) == [f"{key}#0", f"{key}#1", f"{key}#2"]


async def test_a_commit_of_thousands_of_keys_is_applied_although_the_only_connection_waits_for_nobody(
    postgresql_url: str, admin: asyncpg.Connection
) -> None:
    many = Commit(tuple(Upsert(f"orders||{number}", b"1") for number in range(1_500)))
    async with store_on(postgresql_url, maxConns="1") as store:
        done = await answers(store, [write("orders||a"), many, write("orders||b"), many])

    assert not [answer for answer in done if isinstance(answer, BaseException)]
    assert len(await keys(admin)) == 1_502


async def test_thousands_of_commits_behind_a_held_key_hold_nobody_up(
    store: PostgresqlStateStore, admin: asyncpg.Connection, user: asyncpg.Connection
) -> None:
    await store.transact(write("orders||held"))
    async with held(user, ["orders||held"]):
        waiting = start(store, [write("orders||held", number) for number in range(1, 3_001)])
        await until_waiting(admin, 1)

        done = await answers(store, [write(f"orders||{number}") for number in range(100)])

        assert not [answer for answer in done if isinstance(answer, BaseException)]
        for task in waiting[1:]:
            task.cancel()
    await waiting[0]

    assert await event_ids(admin, "orders||held") == ["orders||held#0", "orders||held#1"]


async def test_a_commit_that_had_no_turn_in_its_time_is_unavailable_and_not_applied(
    postgresql_url: str, admin: asyncpg.Connection, user: asyncpg.Connection
) -> None:
    taken = [f"orders||{number}" for number in range(20)]
    async with store_on(postgresql_url, timeout="1s") as store:
        await answers(store, [write(key) for key in taken])
        async with held(user, taken):
            outcomes = await answers(store, [write(key, number) for number in range(1, 4) for key in taken])

            assert all(isinstance(outcome, StoreUnavailable) for outcome in outcomes)
        done = await answers(store, [write(key, 9) for key in taken])

    assert not [answer for answer in done if isinstance(answer, BaseException)]
    for key in taken:
        assert await event_ids(admin, key) == [f"{key}#0", f"{key}#9"]


@pytest.mark.parametrize("connections", ["1", "3", "8"])
async def test_keys_that_another_transaction_has_made_and_not_committed_hold_up_their_own_commits_alone(
    postgresql_url: str, admin: asyncpg.Connection, user: asyncpg.Connection, connections: str
) -> None:
    """There is no row yet that a call could pass by: it finds out by waiting, and its neighbours with it."""
    taken = [f"orders||held-{number}" for number in range(5)]
    async with store_on(postgresql_url, maxConns=connections) as store:
        async with held(user, taken):
            waiting = start(store, [write(key, number) for key in taken for number in (0, 1)])

            done = await answers(store, [write(f"orders||{number % 30}", number) for number in range(90)])

            assert not [answer for answer in done if isinstance(answer, BaseException)]
            assert not [task for task in waiting if task.done()]
        async with asyncio.timeout(PATIENCE_SECONDS):
            await asyncio.gather(*waiting)

    for key in taken:
        assert await event_ids(admin, key) == [f"{key}#0", f"{key}#1"]


async def test_a_large_commit_is_applied_beside_a_held_key_and_holds_nobody_up(
    postgresql_url: str, admin: asyncpg.Connection, user: asyncpg.Connection
) -> None:
    """It has to be alone, and whoever waits for the held key is in its way."""
    many = Commit(tuple(Upsert(f"orders||{number}", b"1") for number in range(1_500)))
    async with store_on(postgresql_url) as store, store_on(postgresql_url) as other:
        await store.transact(write("orders||held"))
        async with held(user, ["orders||held"]):
            waiting = start(store, [write("orders||held", 1)])
            await until_waiting(admin, 1)

            done = await answers(store, [many]) + await answers(other, [write(f"orders||{n}") for n in range(10)])

            assert not [answer for answer in done if isinstance(answer, BaseException)]
            assert not waiting[0].done()
        await waiting[0]


async def test_a_large_commit_whose_key_is_held_lets_others_go_on_until_it_is_free(
    store: PostgresqlStateStore, admin: asyncpg.Connection, user: asyncpg.Connection
) -> None:
    many = Commit(tuple(Upsert(f"orders||many-{number}", b"1") for number in range(1_000)))
    await store.transact(write("orders||many-500"))
    async with held(user, ["orders||many-500"]):
        waiting = start(store, [many])
        for number in range(50):
            await store.transact(write(f"orders||{number}"))

        assert not waiting[0].done()
    await waiting[0]

    assert len(await keys(admin)) == 1_050


@pytest.mark.parametrize("connections", ["1", "2", "3"])
async def test_every_caller_is_answered_in_time_though_a_key_is_held_for_ever(
    postgresql_url: str, user: asyncpg.Connection, connections: str
) -> None:
    """Alone, a busy commit is mostly under way when one looks at the clock."""
    async with store_on(postgresql_url, maxConns=connections, timeout="1s") as store:
        await store.transact(write("orders||held"))
        async with held(user, ["orders||held"]):
            for number in range(3):
                (alone,) = await answers(store, [write("orders||held", number)])
                assert isinstance(alone, StoreUnavailable)
            together = await answers(store, [write("orders||held", number) for number in range(3)])

    assert [type(answer) for answer in together] == [StoreUnavailable] * 3


async def test_a_commit_that_stood_aside_has_no_more_time_than_others(
    postgresql_url: str, user: asyncpg.Connection
) -> None:
    """It fails when a last call may take as long as a first one (tried): the answers come after twice the time."""
    taken = [f"orders||{number}" for number in range(30)]
    async with store_on(postgresql_url, timeout="2s") as store:
        await answers(store, [write(key) for key in taken])
        async with held(user, taken), asyncio.timeout(3):
            outcomes = await answers(store, [write(key, 1) for key in taken])

    assert {type(outcome) for outcome in outcomes} == {StoreUnavailable}


# Connections that break, callers that go


async def test_a_connection_that_breaks_leaves_the_outcome_of_all_it_carried_unknown_and_that_of_no_other(
    postgresql_url: str, admin: asyncpg.Connection
) -> None:
    async with store_on(postgresql_url, maxConns="3") as store:
        async with stalled(admin):
            sent = start(store, [write(f"orders||{number}") for number in range(30)])
            await until_stalled(admin)
            queued = start(store, [write(f"orders||{number}", 1) for number in range(30)])
            await asyncio.sleep(0)

            await admin.execute(
                "select pg_terminate_backend(pid, 5000) from pg_stat_activity"
                " where wait_event = 'PgSleep' and datname = current_database()"
            )
            outcomes = await asyncio.gather(*sent, return_exceptions=True)

            assert {type(outcome) for outcome in outcomes} == {OutcomeUnknown}
        await asyncio.gather(*queued)

    assert await event_ids(admin) == [f"orders||{number}#1" for number in range(30)]


async def test_a_cancelled_commit_of_a_batch_waits_for_its_outcome_and_a_queued_one_is_withdrawn(
    postgresql_url: str, admin: asyncpg.Connection
) -> None:
    async with store_on(postgresql_url, maxConns="3") as store:
        async with stalled(admin):
            sent = start(store, [write(f"orders||{number}") for number in range(5)])
            await until_stalled(admin)
            queued = start(store, [write(f"orders||{number}", 1) for number in range(5)])
            await asyncio.sleep(0)

            sent[2].cancel()
            queued[3].cancel()
            done, _ = await asyncio.wait([sent[2], queued[3]], timeout=0.1)

            assert done == {queued[3]}
        outcomes = await asyncio.gather(*sent, *queued, return_exceptions=True)

    gone = [at for at, outcome in enumerate(outcomes) if isinstance(outcome, asyncio.CancelledError)]
    assert gone == [2, 8]
    assert sorted(await event_ids(admin)) == sorted(
        [f"orders||{number}#0" for number in range(5)] + [f"orders||{number}#1" for number in (0, 1, 2, 4)]
    )


async def test_a_cancelled_commit_that_is_busy_is_withdrawn_and_those_behind_it_go_on(
    store: PostgresqlStateStore, admin: asyncpg.Connection, user: asyncpg.Connection
) -> None:
    """Of many held keys most have no place to wait at: nothing of theirs is under way."""
    taken = [f"orders||held-{number}" for number in range(30)]
    await answers(store, [write(key) for key in taken])
    async with held(user, taken):
        waiting = start(store, [write(key, 1) for key in taken])
        behind = start(store, [write(key, 2) for key in taken])
        await until_waiting(admin, 1)
        for task in waiting:
            task.cancel()
        done, _ = await asyncio.wait(waiting, timeout=1)
        assert len(done) > 20
    await asyncio.gather(*behind)
    await asyncio.wait(waiting)

    withdrawn = [key for key in taken if await event_ids(admin, key) == [f"{key}#0", f"{key}#2"]]
    assert len(withdrawn) > 20
    for key in set(taken) - set(withdrawn):
        assert await event_ids(admin, key) == [f"{key}#0", f"{key}#1", f"{key}#2"]


@pytest.mark.parametrize("connections", ["1", "2", "3"])
async def test_a_cancelled_commit_that_waits_for_a_held_key_lets_those_behind_it_go_on(
    postgresql_url: str, admin: asyncpg.Connection, user: asyncpg.Connection, connections: str
) -> None:
    async with store_on(postgresql_url, maxConns=connections) as store:
        await store.transact(write("orders||held"))
        async with held(user, ["orders||held"]):
            gone, *behind = start(store, [write("orders||held", number) for number in (1, 2, 3)])
            await store.transact(write("orders||other"))
            gone.cancel()
            with pytest.raises(asyncio.CancelledError):
                await gone
        await asyncio.gather(*behind)

    assert await event_ids(admin, "orders||held") == [f"orders||held#{number}" for number in (0, 2, 3)]


async def test_callers_that_come_and_go_leave_what_was_applied_once_and_the_queue_empty(
    store: PostgresqlStateStore, admin: asyncpg.Connection
) -> None:
    chance = random.Random(5)
    acknowledged: set[str] = set()

    async def caller(number: int) -> None:
        key = f"orders||{number % 7}"
        await store.transact(write(key, number))
        acknowledged.add(f"{key}#{number}")

    tasks = []
    for number in range(1_000):
        tasks.append(asyncio.create_task(caller(number)))
        if chance.random() < 0.4:
            chance.choice(tasks).cancel()
        if chance.random() < 0.1:
            await asyncio.sleep(0)
    async with asyncio.timeout(PATIENCE_SECONDS):
        await asyncio.gather(*tasks, return_exceptions=True)
        await answers(store, [write(f"orders||{number}", 1_000) for number in range(7)])

    applied = await event_ids(admin)
    assert len(applied) == len(set(applied))
    assert acknowledged <= set(applied)
    for key in (f"orders||{number}" for number in range(7)):
        numbers = [int(each.split("#")[1]) for each in await event_ids(admin, key)]
        assert numbers == sorted(numbers)


@pytest.mark.parametrize("connections", ["1", "2", "3", "8"])
async def test_closing_answers_everyone_and_says_of_nothing_applied_that_it_was_not(
    postgresql_url: str, admin: asyncpg.Connection, user: asyncpg.Connection, connections: str
) -> None:
    async with store_on(postgresql_url, maxConns=connections) as store:
        await store.transact(write("orders||held"))
        holding = held(user, ["orders||held"])
        await holding.__aenter__()
        commits = [write(f"orders||{number % 50}", number) for number in range(300)]
        tasks = start(store, [write("orders||held", 1), write("orders||held", 2), *commits])
        await tasks[2]
        tasks += start(store, [write(f"orders||late-{number}") for number in range(200)])
        await asyncio.sleep(0)
    await holding.__aexit__(None, None, None)

    assert all(task.done() for task in tasks)
    applied = set(await event_ids(admin))
    wanted = [
        *("orders||held#1", "orders||held#2"),
        *(f"orders||{number % 50}#{number}" for number in range(300)),
        *(f"orders||late-{number}#0" for number in range(200)),
    ]
    for name, task in zip(wanted, tasks, strict=True):
        error = task.exception()
        if error is None:
            assert name in applied
        elif not isinstance(error, OutcomeUnknown):
            assert isinstance(error, StoreUnavailable)
            assert name not in applied


# Deadlocks


async def test_batches_sweeps_expiring_keys_and_a_users_transactions_do_not_lock_each_other_out(
    postgresql_url: str, admin: asyncpg.Connection, user: asyncpg.Connection
) -> None:
    """The user takes rows in the order of their keys, as everybody must who takes several."""
    chance = random.Random(13)
    names = [f"orders||{number}" for number in range(30)]
    failures: list[StatecastError] = []

    def change() -> Commit:
        chosen = chance.sample(names, 4)
        ttl = timedelta(milliseconds=chance.choice([1, 5, 20]))
        conditions: list[Operation] = [
            Check(chosen[3], None),
            Upsert(chosen[3], b"3", concurrency=Concurrency.FIRST_WRITE),
        ]
        operations: list[Operation] = [
            Upsert(chosen[0], b"1", ttl=ttl),
            Upsert(chosen[1], b"2"),
            Delete(chosen[2]),
            chance.choice(conditions),
        ]
        chance.shuffle(operations)
        marks = (Mark(chance.randbytes(1) * 16, ttl),)
        return Commit(tuple(operations), (event(chosen[0], 0),), marks=marks)

    async def churn(store: PostgresqlStateStore) -> None:
        for _ in range(25):
            try:
                await store.transact(change())
            except (ETagMismatch, Duplicate):
                continue
            except StatecastError as error:
                failures.append(error)

    async def interfere() -> None:
        for _ in range(60):
            async with user.transaction():
                for key in sorted(chance.sample(names, 3)):
                    await user.execute("update state set value = 'user' where key = $1", key)
                    await asyncio.sleep(chance.uniform(0, 0.003))

    before = await deadlocks(admin)
    async with (
        store_on(postgresql_url, cleanupInterval="1ms") as one,
        store_on(postgresql_url) as two,
        asyncio.timeout(PATIENCE_SECONDS),
        asyncio.TaskGroup() as group,
    ):
        group.create_task(interfere())
        for number in range(40):
            group.create_task(churn(one if number % 2 else two))

    assert failures == []
    assert await deadlocks(admin) == before
