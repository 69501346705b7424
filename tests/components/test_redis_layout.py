"""What stands in the database, seen by a client that knows nothing of the store."""

from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import msgpack  # type: ignore[import-untyped]  # has no stubs
import pytest
import redis
from msgspec.structs import replace

from statecast.clock import SystemClock
from statecast.components.manifest import Component
from statecast.components.state.commit import (
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
from statecast.components.state.log import Deferral, Failure
from statecast.components.state.redis.keys import KeyNames
from statecast.components.state.redis.state import RedisStateStore
from statecast.errors import CorruptState, Duplicate, ETagMismatch, Fenced, StoreUnavailable

STREAMS = "statecast:orders:statestore:outbox"
RECORD = OutboxRecord("orders||1", "outbox-1", "pubsub", "orders", b'{"id": "\xff"}', {"partitionKey": "1"})


@pytest.fixture
def raw(redis_url: str) -> redis.Redis:
    return redis.Redis.from_url(redis_url)


@pytest.fixture
async def store(redis_url: str) -> AsyncIterator[RedisStateStore]:
    async with redis_store(redis_url) as opened:
        yield opened


def redis_store(url: str) -> RedisStateStore:
    metadata = {"redisHost": urlsplit(url).netloc, "redisDB": urlsplit(url).path.strip("/")}
    return RedisStateStore(Component("statestore", "state.redis", "v1", metadata), app_id="orders", clock=SystemClock())


def run(raw: redis.Redis, *words: str | bytes | int) -> Any:
    return raw.execute_command(*words)  # type: ignore[no-untyped-call]


def fields_of(raw: redis.Redis, key: str) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = run(raw, "HGETALL", key)
    return found


async def apply(store: RedisStateStore, *operations: Operation) -> tuple[ETag | None, ...]:
    return await store.transact(Commit(operations))


# State


async def test_a_value_stands_in_the_hash_that_dapr_reads(store: RedisStateStore, raw: redis.Redis) -> None:
    await apply(store, Upsert("orders||1", b'{"total": 250}'))
    await apply(store, Upsert("orders||1", b'{"total": 300}'))

    assert fields_of(raw, "orders||1") == {b"data": b'{"total": 300}', b"version": b"2"}


async def test_a_hash_that_dapr_wrote_is_read(store: RedisStateStore, raw: redis.Redis) -> None:
    run(raw, "HSET", "orders||1", "data", '"x"', "version", "41")

    item = await store.get("orders||1")

    assert item is not None
    assert (item.value, item.etag, item.expires_at) == (b'"x"', "41", None)
    assert await apply(store, Upsert("orders||1", b'"y"', etag=item.etag)) == ("42",)


@pytest.mark.parametrize("concurrency", [None, Concurrency.LAST_WRITE])
async def test_the_first_write_marker_of_dapr_blocks_no_write_and_goes(
    store: RedisStateStore, raw: redis.Redis, concurrency: Concurrency | None
) -> None:
    run(raw, "HSET", "orders||1", "data", '"x"', "version", "1", "first-write", "0")

    await apply(store, Upsert("orders||1", b'"y"', concurrency=concurrency))

    assert fields_of(raw, "orders||1") == {b"data": b'"y"', b"version": b"2"}


@pytest.mark.parametrize("etag", ["01", "+1", "1.0", " 1", "1 ", "0", "one"])
async def test_an_etag_is_text_and_equal_or_not(store: RedisStateStore, etag: str) -> None:
    await apply(store, Upsert("orders||1", b"1"))

    with pytest.raises(ETagMismatch):
        await apply(store, Upsert("orders||1", b"2", etag=ETag(etag)))


async def test_a_time_to_live_is_the_keys_own(store: RedisStateStore, raw: redis.Redis) -> None:
    await apply(store, Upsert("orders||1", b"1", ttl=timedelta(seconds=90, milliseconds=500)))

    left = run(raw, "PTTL", "orders||1")
    item = await store.get("orders||1")

    assert 60_000 < left <= 90_500
    assert item is not None
    assert item.expires_at is not None
    assert abs(item.expires_at - datetime.now(UTC) - timedelta(milliseconds=left)) < timedelta(seconds=5)


async def test_an_upsert_without_a_time_to_live_takes_the_old_one_away(
    store: RedisStateStore, raw: redis.Redis
) -> None:
    run(raw, "HSET", "orders||1", "data", "1", "version", "1")
    run(raw, "EXPIRE", "orders||1", "100")

    await apply(store, Upsert("orders||1", b"2"))

    assert run(raw, "PTTL", "orders||1") == -1


async def test_a_plain_string_is_read_without_an_etag(store: RedisStateStore, raw: redis.Redis) -> None:
    run(raw, "SET", "orders||1", "text", "EX", "100")

    item = await store.get("orders||1")

    assert item is not None
    assert (item.value, item.etag) == (b"text", "")
    assert item.expires_at is not None


@pytest.mark.parametrize("command", [("SET", "orders||1", "text"), ("RPUSH", "orders||1", "text")])
async def test_an_upsert_replaces_what_is_no_hash(
    store: RedisStateStore, raw: redis.Redis, command: tuple[str, ...]
) -> None:
    run(raw, *command)

    etags = await apply(store, Upsert("orders||1", b"2"))

    assert etags == ("1",)
    assert fields_of(raw, "orders||1") == {b"data": b"2", b"version": b"1"}


@pytest.mark.parametrize("command", [("RPUSH", "orders||1", "text"), ("HSET", "orders||1", "version", "1")])
async def test_what_no_store_writes_is_corrupt(
    store: RedisStateStore, raw: redis.Redis, command: tuple[str, ...]
) -> None:
    run(raw, *command)

    with pytest.raises(CorruptState, match="orders"):
        await store.get("orders||1")
    with pytest.raises(CorruptState):
        await store.bulk_get(["orders||2", "orders||1"])


@pytest.mark.parametrize("version", ["", "abc", "-1", "1e3", "9" * 16])
async def test_a_version_that_cannot_be_counted_on_refuses_the_whole_commit(
    store: RedisStateStore, raw: redis.Redis, version: str
) -> None:
    run(raw, "HSET", "orders||2", "data", "1", "version", version)

    with pytest.raises(CorruptState):
        await store.transact(Commit((Upsert("orders||1", b"1"), Upsert("orders||2", b"1")), (RECORD,)))

    assert set(run(raw, "KEYS", "*")) == {b"orders||2", STREAMS.encode()}
    assert fields_of(raw, "orders||2")[b"version"] == version.encode()


# Our own keys


async def test_all_our_own_keys_have_the_prefix(store: RedisStateStore, raw: redis.Redis) -> None:
    guard = await store.directory.claim("Cart", "leroy")
    await store.log.heartbeat("relay", timedelta(seconds=10))
    leases = await store.log.acquire("relay", 16, timedelta(seconds=10))
    await store.transact(Commit((), (RECORD,), (Mark(b"m" * 16, timedelta(seconds=10)),), (guard,)))
    entries = (await store.log.read(leases, 10)).entries
    await store.log.advance(leases, timedelta(seconds=10), [Deferral(entries, Failure(1, None, "no"))])

    keys = [key.decode() for key in run(raw, "KEYS", "*")]

    # Registry, relays, leases; claim, mark, stream; both of what is deferred.
    assert len(keys) == 1 + 1 + 16 + 3 + 2
    assert all(key.startswith("statecast:orders:statestore:") for key in keys)


async def test_a_record_is_one_entry_of_its_slices_stream(store: RedisStateStore, raw: redis.Redis) -> None:
    await store.transact(Commit((), (RECORD,)))

    (stream,) = [key for key in run(raw, "KEYS", f"{STREAMS}:*")]
    ((_, fields),) = run(raw, "XRANGE", stream, "-", "+")

    assert fields == {
        b"key": b"orders||1",
        b"id": b"outbox-1",
        b"pubsub": b"pubsub",
        b"topic": b"orders",
        b"metadata": b'{"partitionKey":"1"}',
        b"format": b"1",
        b"body": b'{"id": "\xff"}',
    }


async def test_what_is_advanced_over_leaves_the_stream(store: RedisStateStore, raw: redis.Redis) -> None:
    await store.transact(Commit((), (RECORD, RECORD)))
    (stream,) = run(raw, "KEYS", f"{STREAMS}:*")
    leases = await store.log.acquire("relay", 16, timedelta(minutes=1))

    batch = await store.log.read(leases, 1)
    await store.log.advance(batch.leases, timedelta(minutes=1))
    after_one = run(raw, "XLEN", stream)
    batch = await store.log.read(batch.leases, 1)
    await store.log.advance(batch.leases, timedelta(minutes=1))

    assert after_one == 1
    assert run(raw, "XLEN", stream) == 0


async def test_what_is_put_aside_is_a_state_by_order_key_and_an_entry_that_has_all_its_fields(
    store: RedisStateStore, raw: redis.Redis
) -> None:
    await store.transact(Commit((), (RECORD, RECORD)))
    (stream,) = run(raw, "KEYS", f"{STREAMS}:*")
    in_stream = run(raw, "XRANGE", stream, "-", "+")
    batch = await store.log.read(await store.log.acquire("relay", 16, timedelta(minutes=1)), 10)

    await store.log.advance(batch.leases, timedelta(minutes=1), [Deferral(batch.entries, Failure(10, None, "too big"))])

    slice = batch.entries[0].slice
    first = f"{in_stream[0][0].partition(b'-')[0].decode():0>20}-{'0' * 20}"
    state = fields_of(raw, f"statecast:orders:statestore:deferred:{slice}")
    members = run(raw, "ZRANGE", f"statecast:orders:statestore:deferred:{slice}:entries", 0, -1)
    assert run(raw, "XLEN", stream) == 0
    assert state == {b"orders||1": f"10 parked 2 {first} too big".encode()}
    assert members[0].startswith(f"9:orders||1,{first}:".encode())
    assert [_unpacked_fields(member) for member in members] == [fields for _, fields in in_stream]


def _unpacked_fields(member: bytes) -> dict[bytes, bytes]:
    flat = msgpack.unpackb(member.partition(b",")[2].partition(b":")[2], raw=True)
    return dict(zip(flat[::2], flat[1::2], strict=True))


async def test_nothing_is_left_of_what_was_aside_and_is_settled(store: RedisStateStore, raw: redis.Redis) -> None:
    await store.transact(Commit((), (RECORD, RECORD)))
    batch = await store.log.read(await store.log.acquire("relay", 16, timedelta(minutes=1)), 10)
    (lease,) = [lease for lease in batch.leases if lease.slice == batch.entries[0].slice]
    await store.log.advance(batch.leases, timedelta(minutes=1), [Deferral(batch.entries, Failure(1, None, "no"))])

    await store.log.settle_deferred(lease, "orders||1", [entry.id for entry in batch.entries], None)

    assert run(raw, "KEYS", "*:deferred:*") == []


async def test_keys_that_begin_alike_are_put_aside_apart(raw: redis.Redis, redis_url: str) -> None:
    run(raw, "HSET", STREAMS, "slices", "1")
    keys = ["1", "11", "1,0", "", "1:", "2:1"]
    async with redis_store(redis_url) as single:
        for key in keys:
            await single.transact(Commit((), (replace(RECORD, order_key=key),)))
        batch = await single.log.read(await single.log.acquire("relay", 1, timedelta(minutes=1)), 10)
        deferrals = [Deferral((entry,), Failure(1, None, "no")) for entry in batch.entries]
        await single.log.advance(batch.leases, timedelta(minutes=1), deferrals)

        read = {key: await single.log.read_deferred(0, key, 10) for key in keys}
        assert not await single.log.settle_deferred(batch.leases[0], "1", [read["1"][0].id], None)
        left = await single.log.deferred([0])

    assert {key: [entry.record.order_key for entry in entries] for key, entries in read.items()} == {
        key: [key] for key in keys
    }
    assert sorted(key.order_key for key in left) == sorted(set(keys) - {"1"})


async def test_a_log_keeps_the_number_of_slices_that_it_was_made_with(
    store: RedisStateStore, raw: redis.Redis, redis_url: str
) -> None:
    run(raw, "HSET", STREAMS, "slices", "5")

    async with redis_store(redis_url) as other:
        assert other.log.slices == 5
        assert len(await other.log.status()) == 5


async def test_a_mark_is_a_key_that_expires(store: RedisStateStore, raw: redis.Redis) -> None:
    await store.transact(Commit((), marks=(Mark(bytes(range(16)), timedelta(seconds=100)),)))

    left = run(raw, "PTTL", "statecast:orders:statestore:mark:000102030405060708090a0b0c0d0e0f")

    assert 60_000 < left <= 100_000


async def test_a_mark_holds_what_each_operation_was_answered(store: RedisStateStore, raw: redis.Redis) -> None:
    mark = Mark(bytes(16), timedelta(seconds=100))
    run(raw, "HSET", "orders||2", "data", "1", "version", "41")

    await store.transact(
        Commit((Upsert("orders||2", b"1"), Delete("orders||1"), Upsert("orders||2", b"2")), (), (mark,))
    )

    assert msgpack.unpackb(run(raw, "GET", f"statecast:orders:statestore:mark:{'0' * 32}")) == ["42", False, "42"]


async def test_a_mark_without_an_answer_refuses_and_tells_none(store: RedisStateStore, raw: redis.Redis) -> None:
    """An earlier version wrote such marks; they hold for days."""
    run(raw, "SET", f"statecast:orders:statestore:mark:{'0' * 32}", "", "PX", "60000")

    with pytest.raises(Duplicate) as duplicate:
        await store.transact(Commit((Upsert("orders||1", b"1"),), (), (Mark(bytes(16), timedelta(seconds=100)),)))

    assert duplicate.value.etags is None
    assert run(raw, "EXISTS", "orders||1") == 0


async def test_a_claim_counts_the_commits_made_under_it(store: RedisStateStore, raw: redis.Redis) -> None:
    guard = await store.directory.claim("Cart", "leroy")
    await store.transact(Commit((Upsert("orders||1", b"1"),), guards=(guard,)))
    await store.transact(Commit((), guards=(guard,)))
    with pytest.raises(Fenced):
        await store.transact(Commit((), guards=(Guard("Cart", "leroy", "other"),)))

    assert fields_of(raw, "statecast:orders:statestore:claim:Cart:leroy") == {
        b"token": guard.token.encode(),
        b"seq": b"2",
    }


@pytest.mark.parametrize(
    "kind",
    ["stream", "claim"],
)
async def test_what_is_not_ours_in_the_place_of_our_keys_refuses_the_whole_commit(
    store: RedisStateStore, raw: redis.Redis, kind: str
) -> None:
    names = KeyNames("orders", "statestore")
    guards: tuple[Guard, ...] = ()
    if kind == "stream":
        for slice in range(16):
            run(raw, "SET", names.stream(slice), "text")
    else:
        run(raw, "SET", names.claim("Cart", "leroy"), "text")
        guards = (Guard("Cart", "leroy", "token"),)
    run(raw, "HSET", "orders||0", "data", "1", "version", "1")
    mark = Mark(b"m" * 16, timedelta(seconds=10))

    with pytest.raises(CorruptState):
        await store.transact(Commit((Upsert("orders||1", b"1"), Delete("orders||0")), (RECORD,), (mark,), guards))

    assert run(raw, "EXISTS", "orders||1", names.mark(mark)) == 0
    assert fields_of(raw, "orders||0") == {b"data": b"1", b"version": b"1"}


@pytest.mark.parametrize("name_of", [KeyNames.stream, KeyNames.deferred, KeyNames.deferred_entries])
async def test_what_is_not_ours_in_the_place_of_the_logs_keys_refuses_a_whole_advance(
    store: RedisStateStore, raw: redis.Redis, name_of: Callable[[KeyNames, int], str]
) -> None:
    names = KeyNames("orders", "statestore")
    await store.transact(Commit((), (RECORD, replace(RECORD, order_key="orders||2"))))
    batch = await store.log.read(await store.log.acquire("relay", 16, timedelta(minutes=1)), 10)
    deferrals = [Deferral((entry,), Failure(1, None, "no")) for entry in batch.entries]
    good, broken = (entry.slice for entry in batch.entries)
    run(raw, "SET", name_of(names, broken), "text")

    with pytest.raises(StoreUnavailable, match="WRONGTYPE"):
        await store.log.advance(batch.leases, timedelta(minutes=1), deferrals)

    assert good != broken
    assert await store.log.deferred([good]) == []
    assert run(raw, "XLEN", names.stream(good)) == 1
    assert [fields_of(raw, names.lease(slice)).get(b"position") for slice in range(16)] == [None] * 16


def test_no_name_reaches_into_the_keys_of_another() -> None:
    assert KeyNames("a:b", "c").stream(1) != KeyNames("a", "b:c").stream(1)
    assert KeyNames("a", "b").claim("C:d", "e") != KeyNames("a", "b").claim("C", "d:e")


async def test_a_commit_of_many_operations_is_one_commit(store: RedisStateStore) -> None:
    """More than the stack of the server's Lua holds, which `unpack` would need."""
    operations = [Upsert(f"orders||{number}", b"1") for number in range(10_000)]

    etags = await store.transact(Commit(tuple(operations)))

    assert etags == ("1",) * 10_000
