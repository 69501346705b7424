"""What the store does when the server breaks, hangs, refuses, or forgets its scripts."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis
from msgspec.structs import replace

from statecast.clock import SystemClock
from statecast.components.manifest import Component
from statecast.components.redis.connection import Argument, Reply
from statecast.components.redis.pipeline import Script
from statecast.components.state.commit import Commit, Consistency, Delete, ETag, Mark, OutboxRecord, Upsert
from statecast.components.state.log import Deferral, DeferredQueue, Failure, LogEntry, QueueProgress
from statecast.components.state.redis import deferred
from statecast.components.state.redis.database import Database
from statecast.components.state.redis.state import RedisStateStore
from statecast.components.testing.deadline import until
from statecast.errors import ComponentError, Duplicate, ETagMismatch, OutcomeUnknown, StatecastError, StoreUnavailable
from statecast.runtime.servers import PrivateServer, ServerKind, component_metadata

StartServer = Callable[[ServerKind], PrivateServer]
RECORD = OutboxRecord("orders||1", "outbox-1", "pubsub", "orders", b"{}")
NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def server(private_server: StartServer) -> PrivateServer:
    return private_server(ServerKind.REDIS)


def redis_store(url: str, **metadata: str) -> RedisStateStore:
    address = component_metadata(ServerKind.REDIS, url)
    component = Component("statestore", "state.redis", "v1", {**address, **metadata})
    return RedisStateStore(component, app_id="orders", clock=SystemClock())


def run(url: str, *words: str | int) -> Any:
    return redis.Redis.from_url(url).execute_command(*words)  # type: ignore[no-untyped-call]


def put(key: str, value: bytes = b"1") -> Commit:
    return Commit((Upsert(key, value),))


async def spin(times: int = 10) -> None:
    """Let what is ready run."""
    for _ in range(times):
        await asyncio.sleep(0)


async def error_of(store: RedisStateStore, commit: Commit) -> type[StatecastError] | None:
    try:
        await store.transact(commit)
    except StatecastError as error:
        return type(error)
    return None


async def is_up(store: RedisStateStore) -> bool:
    return await error_of(store, put("orders||probe")) is None


# One write


async def test_what_is_asked_in_one_tick_leaves_in_one_write(redis_url: str) -> None:
    async with redis_store(redis_url) as store:
        await store.get("orders||0")
        before = _reads_processed(redis_url)
        nothing = _reads_processed(redis_url) - before

        before = _reads_processed(redis_url)
        await asyncio.gather(
            *(store.transact(put(f"orders||{number}")) for number in range(20)),
            *(store.get(f"orders||{number}") for number in range(20)),
        )
        reads = _reads_processed(redis_url) - before - nothing

    assert reads == 1


def _reads_processed(url: str) -> int:
    return int(redis.Redis.from_url(url).info("stats")["total_reads_processed"])


async def test_a_refused_commit_does_not_touch_its_neighbours(redis_url: str) -> None:
    stale = Commit((Upsert("orders||1", b"stale", etag=ETag("9")), Upsert("orders||4", b"stale")))
    async with redis_store(redis_url) as store:
        outcomes = await asyncio.gather(
            *(error_of(store, commit) for commit in (put("orders||1"), stale, put("orders||2"), stale))
        )
        items = await store.bulk_get(["orders||1", "orders||2", "orders||4"])

    assert outcomes == [None, ETagMismatch, None, ETagMismatch]
    assert [item and item.value for item in items] == [b"1", b"1", None]


# A server that is gone


async def test_a_commit_whose_answer_never_came_is_unknown_and_the_next_call_connects_again(
    server: PrivateServer,
) -> None:
    async with redis_store(server.address) as store:
        await store.transact(put("orders||0"))
        server.freeze()
        committing = [asyncio.create_task(error_of(store, put(f"orders||{number}"))) for number in range(5)]
        reading = asyncio.create_task(store.get("orders||0"))
        await spin()
        await asyncio.to_thread(server.kill)

        assert [await task for task in committing] == [OutcomeUnknown] * 5
        with pytest.raises(StoreUnavailable):
            await reading
        assert await error_of(store, put("orders||1")) is StoreUnavailable
        await asyncio.to_thread(server.restart)
        await until(lambda: is_up(store))


async def test_a_server_that_is_silent_ends_in_a_timeout_and_wedges_nobody(server: PrivateServer) -> None:
    async with redis_store(server.address, readTimeout="200ms") as store:
        await store.transact(put("orders||0"))
        server.freeze()

        unknown = await error_of(store, put("orders||1"))
        with pytest.raises(StoreUnavailable):
            await store.get("orders||0")
        server.thaw()
        await until(lambda: is_up(store))

        assert unknown is OutcomeUnknown
        assert await store.bulk_get(["orders||0"]) != [None]


async def test_a_repeat_with_the_same_mark_tells_what_became_of_an_unknown_commit(server: PrivateServer) -> None:
    commit = Commit((Upsert("orders||1", b"1"),), (RECORD,), (Mark(b"m" * 16, timedelta(hours=1)),))
    run(server.address, "HSET", "orders||1", "version", "0")
    async with redis_store(server.address, readTimeout="200ms") as store:
        await store.transact(put("orders||0"))
        server.freeze()
        unknown = await error_of(store, commit)
        server.thaw()
        await until(lambda: is_up(store))

        repeated = await error_of(store, commit)
        again = await error_of(store, commit)
        item = await store.get("orders||1")

    assert unknown is OutcomeUnknown
    assert repeated in (None, Duplicate)
    assert again is Duplicate
    assert item is not None
    assert item.etag == "1"


async def test_a_commit_is_not_sent_again_when_its_connection_breaks(redis_url: str) -> None:
    run(redis_url, "HSET", "orders||1", "version", "0")
    async with cutting_proxy(redis_url) as (proxied_url, cut_next_answer), redis_store(proxied_url) as store:
        await store.transact(put("orders||0"))
        cut_next_answer()

        outcome = await error_of(store, Commit((Upsert("orders||1", b"1"),), (RECORD,)))
        item = await store.get("orders||1")
        pending = sum(slice.pending for slice in await store.log.status())

    assert outcome is OutcomeUnknown
    assert item is not None
    assert item.etag == "1"
    assert pending == 1


@asynccontextmanager
async def cutting_proxy(url: str) -> AsyncIterator[tuple[str, Callable[[], None]]]:
    """Stand before a server, and on demand close a connection in the place of handing on the server's answer."""
    cuts = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection(urlsplit(url).hostname, urlsplit(url).port)

        async def pass_on_requests() -> None:
            while data := await reader.read(65536):
                upstream_writer.write(data)
            upstream_writer.close()

        async def pass_on_answers() -> None:
            while data := await upstream_reader.read(65536):
                if cuts.is_set():
                    cuts.clear()
                    break
                writer.write(data)
            writer.close()

        await asyncio.gather(pass_on_requests(), pass_on_answers(), return_exceptions=True)

    proxy = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with proxy:
        port = proxy.sockets[0].getsockname()[1]
        yield f"redis://127.0.0.1:{port}{urlsplit(url).path}", cuts.set


async def test_waiting_for_news_goes_on_without_its_server_and_reading_tells(server: PrivateServer) -> None:
    async with redis_store(server.address) as store:
        leases = await store.log.acquire("relay", 16, timedelta(minutes=1))
        waiting = asyncio.create_task(store.log.wait(leases, timedelta(seconds=1)))
        await until(lambda: _is_blocked(server.address))
        await asyncio.to_thread(server.kill)

        await waiting
        with pytest.raises(StoreUnavailable):
            await store.log.read(leases, 1)


async def _is_blocked(url: str) -> bool:
    return int(run(url, "INFO", "clients")["blocked_clients"]) > 0


async def test_a_server_that_is_not_there_is_unavailable_at_opening(server: PrivateServer) -> None:
    server.kill()

    with pytest.raises(StoreUnavailable, match="no connection"):
        async with redis_store(server.address):
            pass


async def test_whatever_connecting_raises_is_told_to_all_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    async def connect(*settings: object, **options: object) -> None:
        raise RuntimeError("a fault of our own")

    monkeypatch.setattr("statecast.components.redis.pipeline.connect", connect)

    async with asyncio.timeout(5):
        with pytest.raises(StoreUnavailable, match="a fault of our own"):
            async with redis_store("redis://localhost"):
                raise AssertionError("it opened")


async def test_closing_does_not_wait_long_for_a_server_that_is_silent(server: PrivateServer) -> None:
    async with asyncio.timeout(8):
        async with redis_store(server.address, readTimeout="60s") as store:
            await store.transact(put("orders||0"))
            server.freeze()
            committing = asyncio.create_task(error_of(store, put("orders||1")))
            await spin()
        assert await committing is OutcomeUnknown


# Callers who are gone


async def test_a_commit_that_is_cancelled_in_the_queue_is_withdrawn(redis_url: str) -> None:
    async with redis_store(redis_url) as store:
        await store.get("orders||1")
        committing = asyncio.create_task(store.transact(put("orders||1")))
        await asyncio.sleep(0)
        committing.cancel()
        await asyncio.wait([committing])

        assert committing.cancelled()
        assert await store.get("orders||1") is None


async def test_a_commit_that_is_cancelled_when_sent_waits_for_its_outcome(server: PrivateServer) -> None:
    async with redis_store(server.address) as store:
        await store.get("orders||1")
        server.freeze()
        committing = asyncio.create_task(store.transact(put("orders||1")))
        await spin()

        committing.cancel()
        await spin()
        was_done = committing.done()
        server.thaw()
        await asyncio.wait([committing])

        assert not was_done
        assert committing.cancelled()
        assert await store.get("orders||1") is not None


async def test_a_cancelled_commit_does_not_wait_for_ever(server: PrivateServer) -> None:
    async with redis_store(server.address, readTimeout="60s") as store:
        await store.get("orders||1")
        server.freeze()
        committing = asyncio.create_task(store.transact(put("orders||1")))
        await spin()

        committing.cancel()
        async with asyncio.timeout(10):
            await asyncio.wait([committing])

        assert committing.cancelled()


async def test_replies_stay_in_step_when_callers_are_cancelled(redis_url: str) -> None:
    keys = [f"orders||{number}" for number in range(50)]
    async with redis_store(redis_url) as store:
        await store.transact(Commit(tuple(Upsert(key, key.encode()) for key in keys)))
        for turn in range(50):
            reading = [asyncio.create_task(store.get(key)) for key in keys]
            await spin(turn % 5)
            for task in reading[turn % 3 :: 3]:
                task.cancel()
            answers = await asyncio.gather(*reading, return_exceptions=True)

            assert _answers_of_others(keys, answers) == []


def _answers_of_others(keys: Sequence[str], answers: Sequence[Any]) -> list[Any]:
    return [
        answer
        for key, answer in zip(keys, answers, strict=True)
        if not isinstance(answer, asyncio.CancelledError) and answer.value != key.encode()
    ]


# What a server may forget, and what it may refuse


async def test_a_server_that_forgot_its_scripts_is_taught_again(redis_url: str) -> None:
    async with redis_store(redis_url) as store:
        run(redis_url, "HSET", "orders||1", "version", "0")
        run(redis_url, "SCRIPT", "FLUSH")

        etags = await asyncio.gather(*(store.transact(put("orders||1")) for _ in range(10)))
        run(redis_url, "SCRIPT", "FLUSH")
        item = await store.get("orders||1")

    assert sorted(etags, key=lambda etag: int(str(etag[0]))) == [(str(number),) for number in range(1, 11)]
    assert item is not None
    assert item.etag == "10"


async def test_a_full_server_refuses_a_commit_as_a_whole(server: PrivateServer) -> None:
    mark = Mark(b"m" * 16, timedelta(hours=1))
    commit = Commit((Delete("orders||0"), Upsert("orders||1", b"1")), (RECORD,), (mark,))
    async with redis_store(server.address) as store:
        await store.transact(put("orders||0"))
        run(server.address, "CONFIG", "SET", "maxmemory", "1")

        refused = await error_of(store, commit)
        untouched = await store.bulk_get(["orders||0", "orders||1"])
        run(server.address, "CONFIG", "SET", "maxmemory", "0")
        repeated = await error_of(store, commit)

        assert refused is StoreUnavailable
        assert [item and item.value for item in untouched] == [b"1", None]
        assert repeated is None


async def test_a_commit_that_frees_memory_first_is_applied_as_a_whole_or_not_at_all(server: PrivateServer) -> None:
    commit = Commit((Delete("orders||0"), Upsert("orders||1", b"1")), (RECORD,))
    async with redis_store(server.address) as store:
        await store.transact(put("orders||0"))
        run(server.address, "CONFIG", "SET", "maxmemory", "1")

        is_applied = await error_of(store, commit) is None
        items = await store.bulk_get(["orders||0", "orders||1"])
        pending = sum(slice.pending for slice in await store.log.status())

        assert [item is None for item in items] == ([True, False] if is_applied else [False, True])
        assert pending == is_applied


async def test_events_leave_a_full_server_and_make_room(server: PrivateServer) -> None:
    """Else nobody but its operator could bring a server back that an absent broker has filled."""
    minute = timedelta(minutes=1)
    async with redis_store(server.address) as store:
        keys = ["orders||1", "orders||2"]
        await store.transact(Commit((), tuple(replace(RECORD, order_key=key) for key in keys)))
        run(server.address, "CONFIG", "SET", "maxmemory", "1")

    async with redis_store(server.address) as store:
        log = store.log
        relays = await log.heartbeat("relay", minute)
        leases = await log.acquire("relay", 16, minute)
        batch = await log.read(leases, 10)
        refused = {entry.record.order_key: entry for entry in batch.entries}["orders||1"]
        kept = await log.advance(batch.leases, minute, [Deferral((refused,), Failure(10, None, "too large"))])
        pending = sum(status.pending for status in await log.status())
        replayed = await log.replay()
        queue = DeferredQueue.of(refused)
        due = await log.due_deferred(range(16), 10)
        still = QueueProgress(queue, (), Failure(1, minute, "still too large"))
        emptied = await log.settle_deferred(kept, [still])
        waits = await log.deferred(range(16))
        emptied_then = await log.settle_deferred(kept, [QueueProgress(queue, (refused.id,), None)])
        await log.release(kept)

        assert await error_of(store, put("orders||1")) is StoreUnavailable
        assert (relays, len(kept), pending, replayed) == (1, 16, 0, 1)
        assert (emptied, emptied_then) == ([], [queue])
        assert [(status.queue, status.attempts) for status in due] == [(queue, 0)]
        assert [(status.attempts, status.is_parked) for status in waits] == [(1, False)]


async def test_what_is_aside_outlives_its_server(server: PrivateServer) -> None:
    minute = timedelta(minutes=1)
    async with redis_store(server.address) as store:
        await store.transact(Commit((), (RECORD, RECORD)))
        batch = await store.log.read(await store.log.acquire("relay", 16, minute), 10)
        deferral = Deferral(batch.entries, Failure(3, timedelta(hours=1), "no"))
        kept = await store.log.advance(batch.leases, minute, [deferral])
        before = await store.log.deferred(range(16))
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.restart)
        await until(lambda: is_up(store))

        assert await store.log.deferred(range(16)) == before
        assert await store.log.read_deferred([before[0].queue], 10) == list(batch.entries)
        assert await store.log.advance(kept, minute, [deferral]) == kept
        assert await store.log.deferred(range(16)) == before


async def test_much_is_put_aside_in_portions_before_the_positions_pass_it(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    minute = timedelta(minutes=1)
    monkeypatch.setattr(deferred, "_PORTION_BYTES", 2_500)
    async with redis_store(redis_url) as store:
        await store.transact(Commit((), tuple(replace(RECORD, body=b"x" * 1_000) for _ in range(7))))
        batch = await store.log.read(await store.log.acquire("relay", 16, minute), 10)
        deferral = Deferral(batch.entries, Failure(3, timedelta(hours=1), "no"))
        asked = _fail_the_third_time(monkeypatch)
        with pytest.raises(StoreUnavailable, match="the third"):
            await store.log.advance(batch.leases, minute, [deferral])
        monkeypatch.undo()
        queue = DeferredQueue.of(batch.entries[0])
        aside_first = await store.log.read_deferred([queue], 10)
        pending_first = sum(status.pending for status in await store.log.status())

        kept = await store.log.advance(batch.leases, minute, [deferral])

        assert len(asked) == 3
        assert (aside_first, pending_first) == (list(batch.entries[:6]), 7)
        assert kept == list(batch.leases)
        assert await store.log.read_deferred([queue], 10) == list(batch.entries)
        assert [(status.attempts, status.pending) for status in await store.log.deferred(range(16))] == [(3, 7)]
        assert sum(status.pending for status in await store.log.status()) == 0


def _fail_the_third_time(monkeypatch: pytest.MonkeyPatch) -> list[Script]:
    asked: list[Script] = []
    ask = Database.ask

    async def ask_or_fail(database: Database, script: Script, *arguments: Argument) -> Reply:
        asked.append(script)
        if len(asked) == 3:
            raise StoreUnavailable("the third time")
        return await ask(database, script, *arguments)

    monkeypatch.setattr(Database, "ask", ask_or_fail)
    return asked


def test_what_is_put_aside_is_divided_by_its_bytes_in_its_order() -> None:
    entries = tuple(
        LogEntry(0, f"1-{number}", replace(RECORD, body=b"x" * 3_000_000, metadata={"m": "y" * 1_000_000}), NOW)
        for number in range(20)
    )
    few = Deferral(entries[:2], None)
    many = Deferral(entries[2:], Failure(1, None, "no"))

    portions = deferred.portions_of([few, many])

    sizes = [sum(len(packed) for each in portion for _, packed in each.entries) for portion in portions]
    ids = [id for portion in portions for each in portion for id, _ in each.entries]
    assert all(size <= 20 * 1024 * 1024 for size in sizes)
    assert ids == [entry.id for entry in entries]
    assert [each.failure for portion in portions for each in portion] == [False, *[(1, False, "no")] * len(portions)]
    assert deferred.portions_of([]) == [[]]


async def test_a_replica_refuses_a_commit(server: PrivateServer) -> None:
    async with redis_store(server.address) as store:
        await store.transact(put("orders||0"))
        run(server.address, "REPLICAOF", "127.0.0.1", "1")

        assert await error_of(store, put("orders||0")) is StoreUnavailable


@pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-random"])
async def test_a_server_that_evicts_is_refused(server: PrivateServer, policy: str) -> None:
    run(server.address, "CONFIG", "SET", "maxmemory-policy", policy)

    with pytest.raises(ComponentError, match=f"maxmemory-policy is {policy}"):
        async with redis_store(server.address):
            pass


async def test_a_server_that_evicts_what_expires_is_warned_about(
    server: PrivateServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Tried: a full server with volatile-lru throws a mark away, and the repeated commit is applied again."""
    async with redis_store(server.address):
        without = caplog.text
    run(server.address, "CONFIG", "SET", "maxmemory-policy", "volatile-lru")
    async with redis_store(server.address):
        pass

    assert "maxmemory-policy" not in without
    assert "maxmemory-policy is volatile-lru" in caplog.text
    assert "a commit that is repeated with its idempotency key may be applied again" in caplog.text


async def test_a_server_without_an_append_only_file_is_warned_about(
    server: PrivateServer, caplog: pytest.LogCaptureFixture
) -> None:
    run(server.address, "CONFIG", "SET", "appendonly", "no")
    async with redis_store(server.address):
        without = caplog.text
    caplog.clear()
    run(server.address, "CONFIG", "SET", "appendonly", "yes")
    async with redis_store(server.address):
        pass

    assert "no append-only file" in without
    assert "append-only" not in caplog.text


async def test_a_user_without_a_right_that_commits_need_is_refused_at_opening(server: PrivateServer) -> None:
    run(server.address, "ACL", "SETUSER", "clerk", "on", ">s3cret", "~*", "+@all", "-xadd")

    with pytest.raises(ComponentError, match="lacks a right"):
        async with redis_store(server.address, redisUsername="clerk", redisPassword="s3cret"):
            pass


async def test_a_user_is_authenticated(server: PrivateServer) -> None:
    run(server.address, "ACL", "SETUSER", "clerk", "on", ">s3cret", "~*", "+@all")

    async with redis_store(server.address, redisUsername="clerk", redisPassword="s3cret") as store:
        assert await error_of(store, put("orders||1")) is None
    with pytest.raises(StoreUnavailable, match="WRONGPASS") as wrong:
        async with redis_store(server.address, redisUsername="clerk", redisPassword="wr0ng"):
            pass

    assert "wr0ng" not in str(wrong.value)


# Strong consistency


@asynccontextmanager
async def replicated_store(primary: PrivateServer, replica: PrivateServer) -> AsyncIterator[RedisStateStore]:
    run(primary.address, "CONFIG", "SET", "repl-diskless-sync-delay", "0")
    run(replica.address, "REPLICAOF", "127.0.0.1", urlsplit(primary.address).port or 0)

    async def is_replicated() -> bool:
        return "'state': 'online'" in str(run(primary.address, "INFO", "replication"))

    await until(is_replicated)
    async with redis_store(primary.address) as store:
        yield store


@pytest.fixture
def replica(private_server: StartServer) -> PrivateServer:
    return private_server(ServerKind.REDIS)


def put_strongly(key: str, etag: ETag | None = None) -> Commit:
    return Commit((Upsert(key, b"1", etag=etag, consistency=Consistency.STRONG),))


async def test_a_strong_commit_waits_for_the_replicas_and_holds_up_nobody(
    server: PrivateServer, replica: PrivateServer
) -> None:
    async with replicated_store(server, replica) as store:
        reached = await error_of(store, put_strongly("orders||1"))
        copy = run(replica.address, "HGET", "orders||1", "data")
        replica.freeze()
        committing = asyncio.create_task(error_of(store, put_strongly("orders||1")))
        await spin()

        item = await store.get("orders||1")
        plain = await error_of(store, put("orders||2"))
        was_done = committing.done()

        assert reached is None
        assert copy == b"1"
        assert item is not None
        assert plain is None
        assert not was_done
        assert await committing is OutcomeUnknown


async def test_strong_commits_wait_for_the_replicas_together(server: PrivateServer, replica: PrivateServer) -> None:
    """One that waited for each other's patience would be answered after all of them."""
    async with replicated_store(server, replica) as store:
        replica.freeze()
        first = [asyncio.create_task(error_of(store, put_strongly(f"orders||{n}"))) for n in range(5)]
        await until(lambda: _is_blocked(server.address))
        then = [asyncio.create_task(error_of(store, put_strongly(f"orders||{n}"))) for n in range(5, 10)]

        outcomes = await asyncio.gather(*first, *then)
        waits = run(server.address, "INFO", "commandstats")["cmdstat_wait"]["calls"]
        items = await store.bulk_get([f"orders||{number}" for number in range(10)])

    assert outcomes == [OutcomeUnknown] * 10
    assert waits == 2
    assert None not in items


async def test_a_strong_commit_that_is_refused_waits_for_no_replica(
    server: PrivateServer, replica: PrivateServer
) -> None:
    async with replicated_store(server, replica) as store:
        replica.freeze()
        committing = asyncio.create_task(error_of(store, put_strongly("orders||1")))
        refused = asyncio.create_task(error_of(store, put_strongly("orders||2", ETag("stale"))))

        assert await refused is ETagMismatch
        was_done = committing.done()
        assert not was_done
        assert await committing is OutcomeUnknown


async def test_a_strong_commit_that_is_cancelled_behind_others_is_withdrawn(
    server: PrivateServer, replica: PrivateServer
) -> None:
    async with replicated_store(server, replica) as store:
        replica.freeze()
        first = asyncio.create_task(error_of(store, put_strongly("orders||1")))
        await until(lambda: _is_blocked(server.address))
        behind = [asyncio.create_task(store.transact(put_strongly(f"orders||{number}"))) for number in (2, 3)]
        await spin()

        behind[0].cancel()
        outcomes = await asyncio.gather(first, *behind, return_exceptions=True)
        items = await store.bulk_get(["orders||1", "orders||2", "orders||3"])

    assert [type(outcome) for outcome in outcomes[1:]] == [asyncio.CancelledError, OutcomeUnknown]
    assert [item is None for item in items] == [False, True, False]


async def test_a_caller_who_leaves_a_group_takes_nobody_along(server: PrivateServer, replica: PrivateServer) -> None:
    async with replicated_store(server, replica) as store:
        replica.freeze()
        commits = [asyncio.create_task(error_of(store, put_strongly(f"orders||{number}"))) for number in range(3)]
        await until(lambda: _is_blocked(server.address))

        commits[0].cancel()
        outcomes = await asyncio.gather(*commits, return_exceptions=True)

    assert outcomes[1:] == [OutcomeUnknown] * 2


async def test_closing_tells_strong_commits_that_wait_their_turn(server: PrivateServer, replica: PrivateServer) -> None:
    async with replicated_store(server, replica) as store:
        replica.freeze()
        first = asyncio.create_task(error_of(store, put_strongly("orders||1")))
        await until(lambda: _is_blocked(server.address))
        behind = asyncio.create_task(error_of(store, put_strongly("orders||2")))
        await spin()

    assert (await first, await behind) == (OutcomeUnknown, StoreUnavailable)
    assert run(server.address, "EXISTS", "orders||2") == 0


async def test_strong_commits_go_on_when_their_connection_was_lost(
    server: PrivateServer, replica: PrivateServer
) -> None:
    async with replicated_store(server, replica) as store:
        replica.freeze()
        first = asyncio.create_task(error_of(store, put_strongly("orders||1")))
        await until(lambda: _is_blocked(server.address))
        behind = asyncio.create_task(error_of(store, put_strongly("orders||2")))
        await spin()
        replica.thaw()
        run(server.address, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

        assert await first in (OutcomeUnknown, None)
        await behind
        await until(lambda: _is_strongly_up(store))


async def _is_strongly_up(store: RedisStateStore) -> bool:
    return await error_of(store, put_strongly("orders||probe")) is None
