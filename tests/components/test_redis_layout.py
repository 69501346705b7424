"""What stands in the database, seen by a client that knows nothing of the store."""

from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import msgpack  # type: ignore[import-untyped]  # has no stubs
import pytest
import redis
from msgspec.structs import replace

from statecast import Runtime
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
from statecast.components.state.log import Deferral, DeferredQueue, Failure, Lease, QueueProgress
from statecast.components.state.redis import log
from statecast.components.state.redis.encoding import encode_record
from statecast.components.state.redis.keys import KeyNames
from statecast.components.state.redis.state import RedisStateStore
from statecast.errors import (
    CorruptState,
    Duplicate,
    ETagMismatch,
    Fenced,
    InvalidRequest,
    OutcomeUnknown,
    StoreUnavailable,
)
from statecast.runtime.servers import ServerKind, component_metadata

STREAMS = "statecast:orders:statestore:outbox"
RECORD = OutboxRecord("orders||1", "outbox-1", "pubsub", "orders", b'{"id": "\xff"}', {"partitionKey": "1"})
MARK = Mark(b"m" * 16, timedelta(hours=1))


@pytest.fixture
def raw(redis_url: str) -> redis.Redis:
    return redis.Redis.from_url(redis_url)


@pytest.fixture
async def store(redis_url: str) -> AsyncIterator[RedisStateStore]:
    async with redis_store(redis_url) as opened:
        yield opened


def redis_store(url: str) -> RedisStateStore:
    metadata = component_metadata(ServerKind.REDIS, url)
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
    (etag,) = await apply(store, Upsert("orders||1", b'{"total": 300}'))

    assert fields_of(raw, "orders||1") == {b"data": b'{"total": 300}', b"version": str(etag).encode()}


async def test_a_version_begins_with_the_servers_time_and_counts_the_writes(
    store: RedisStateStore, raw: redis.Redis
) -> None:
    before = _microseconds(raw)
    (first,) = await apply(store, Upsert("orders||1", b"1"))
    (second,) = await apply(store, Upsert("orders||1", b"2"))

    assert before <= int(str(first)) <= _microseconds(raw)
    assert int(str(second)) == int(str(first)) + 1


def _microseconds(raw: redis.Redis) -> int:
    seconds, microseconds = run(raw, "TIME")
    return int(seconds) * 1_000_000 + int(microseconds)


async def test_dapr_counts_on_from_a_version_of_ours(store: RedisStateStore, raw: redis.Redis) -> None:
    (etag,) = await apply(store, Upsert("orders||1", b"1"))

    # dapr components-contrib state/redis/redis.go setDefaultQuery
    version = run(raw, "HINCRBY", "orders||1", "version", "1")

    assert version == int(str(etag)) + 1
    assert await apply(store, Upsert("orders||1", b"2", etag=ETag(str(version)))) == (str(version + 1),)


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


@pytest.mark.parametrize(
    "command",
    [
        ("SET", "orders||1", "text"),
        ("HSET", "orders||1", "data", "text"),
        ("HSET", "orders||1", "data", "text", "version", ""),
    ],
)
async def test_no_transaction_depends_on_a_value_that_could_change_unseen(
    redis_url: str, raw: redis.Redis, command: tuple[str, ...]
) -> None:
    run(raw, *command)
    address = component_metadata(ServerKind.REDIS, redis_url)
    component = Component("statestore", "state.redis", metadata=address)
    async with (
        Runtime.open([component], app_id="orders", environment={}) as runtime,
        runtime.state("statestore").transaction() as transaction,
    ):
        for _ in range(2):
            with pytest.raises(InvalidRequest, match="no etag"):
                await transaction.get("1")


@pytest.mark.parametrize("command", [("SET", "orders||1", "text"), ("RPUSH", "orders||1", "text")])
async def test_an_upsert_replaces_what_is_no_hash(
    store: RedisStateStore, raw: redis.Redis, command: tuple[str, ...]
) -> None:
    run(raw, *command)

    (etag,) = await apply(store, Upsert("orders||1", b"2"))

    assert fields_of(raw, "orders||1") == {b"data": b"2", b"version": str(etag).encode()}


@pytest.mark.parametrize("command", [("RPUSH", "orders||1", "text"), ("HSET", "orders||1", "version", "1")])
async def test_what_no_store_writes_is_corrupt(
    store: RedisStateStore, raw: redis.Redis, command: tuple[str, ...]
) -> None:
    run(raw, *command)

    with pytest.raises(CorruptState, match="orders"):
        await store.get("orders||1")
    with pytest.raises(CorruptState):
        await store.bulk_get(["orders||2", "orders||1"])


@pytest.mark.parametrize("version", ["0", "999999999999999", str(2**53 - 2), str(2**53), "9" * 16, "9" * 400])
async def test_a_version_can_be_written_over_however_large(
    store: RedisStateStore, raw: redis.Redis, version: str
) -> None:
    run(raw, "HSET", "orders||1", "data", "0", "version", version)

    etags = [etag for _ in range(5) for etag in await apply(store, Upsert("orders||1", b"1"))]

    assert len({version, *etags}) == 6


async def test_an_empty_version_is_none(store: RedisStateStore, raw: redis.Redis) -> None:
    run(raw, "HSET", "orders||1", "data", "0", "version", "")

    item = await store.get("orders||1")
    with pytest.raises(ETagMismatch):
        await apply(store, Upsert("orders||1", b"1", concurrency=Concurrency.FIRST_WRITE))
    (etag,) = await apply(store, Upsert("orders||1", b"1"))

    assert item is not None
    assert item.etag == ""
    assert fields_of(raw, "orders||1") == {b"data": b"1", b"version": str(etag).encode()}


@pytest.mark.parametrize("version", ["abc", "-1", "1e3", " 1"])
async def test_a_version_that_is_no_number_refuses_the_whole_commit(
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
    await store.log.advance(leases, timedelta(seconds=10), [Deferral(entries, Failure(1, timedelta(0), "no"))])

    keys = [key.decode() for key in run(raw, "KEYS", "*")]

    # Registry, relays, leases; claim, mark, stream; all of what is deferred.
    assert len(keys) == 1 + 1 + 16 + 3 + 3
    assert all(key.startswith("statecast:orders:statestore:") for key in keys)


async def test_a_record_is_one_entry_of_its_slices_stream(store: RedisStateStore, raw: redis.Redis) -> None:
    await store.transact(Commit((), (RECORD,)))

    (stream,) = [key for key in run(raw, "KEYS", f"{STREAMS}:*")]
    ((_, fields),) = run(raw, "XRANGE", stream, "-", "+")

    head, body = fields[b"head"], fields[b"body"]
    assert list(fields) == [b"head", b"body"]
    assert msgpack.unpackb(head) == [1, "orders||1", "outbox-1", "pubsub", "orders", {"partitionKey": "1"}]
    assert body == b'{"id": "\xff"}'


LONE_SURROGATE = "orders \ud83d"


@pytest.mark.parametrize(
    "record",
    [
        replace(RECORD, order_key=LONE_SURROGATE),
        replace(RECORD, event_id=LONE_SURROGATE),
        replace(RECORD, pubsub=LONE_SURROGATE),
        replace(RECORD, topic=LONE_SURROGATE),
        replace(RECORD, metadata={"name": LONE_SURROGATE}),
        replace(RECORD, metadata={LONE_SURROGATE: "value"}),
    ],
    ids=["order key", "event id", "pubsub", "topic", "value of metadata", "name of metadata"],
)
async def test_an_event_with_text_that_nobody_could_read_again_refuses_the_whole_commit(
    store: RedisStateStore, raw: redis.Redis, record: OutboxRecord
) -> None:
    with pytest.raises(InvalidRequest, match="lone surrogate"):
        await store.transact(Commit((Upsert("orders||1", b"1"),), (RECORD, record)))

    assert run(raw, "KEYS", "*") == [STREAMS.encode()]


async def test_an_etag_with_a_lone_surrogate_does_not_match(store: RedisStateStore) -> None:
    await apply(store, Upsert("orders||1", b"1"))

    with pytest.raises(ETagMismatch):
        await store.transact(Commit((Upsert("orders||1", b"2", etag=ETag("\ud83d")),), (RECORD,)))

    assert sum(status.pending for status in await store.log.status()) == 0


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


async def test_a_position_that_was_lost_with_its_server_passes_nothing(
    store: RedisStateStore, raw: redis.Redis
) -> None:
    """A server that was promoted may lack what was read, and give lower ids where its clock is behind."""
    names, minute = KeyNames("orders", "statestore"), timedelta(minutes=1)
    await store.transact(Commit((), (RECORD, replace(RECORD, order_key="orders||2"))))
    batch = await store.log.read(await store.log.acquire("relay", 16, minute), 10)
    lost, kept = (entry.slice for entry in batch.entries)
    ahead = f"{int(batch.entries[0].id.partition('-')[0]) + 3_600_000}-0"
    run(raw, "XADD", names.stream(lost), ahead, "head", encode_record(RECORD)[0], "body", b"")
    batch = await store.log.read(batch.leases, 10)
    run(raw, "DEL", names.stream(lost))
    await store.transact(Commit((), (replace(RECORD, event_id="after"),)))

    deferral = Deferral(batch.entries, Failure(1, None, "no"))
    mine = await store.log.advance(batch.leases, minute, [deferral])

    assert batch.entries[0].id == ahead
    assert [lease for lease in batch.leases if lease not in mine] == [batch.leases[lost]]
    assert b"position" not in fields_of(raw, names.lease(lost))
    assert fields_of(raw, names.lease(kept))[b"position"] == batch.leases[kept].position.encode()
    assert await store.log.deferred([lost]) == []
    await store.log.release(batch.leases)
    run(raw, "HSET", names.lease(lost), "expires_at", "0")
    leases = await store.log.acquire("next", 16, minute)
    assert [entry.record.event_id for entry in (await store.log.read(leases, 10)).entries] == ["after"]


async def test_a_position_that_is_persisted_already_is_mine_still(store: RedisStateStore) -> None:
    """An advance whose answer was lost is repeated, when its entries have left the stream."""
    minute = timedelta(minutes=1)
    await store.transact(Commit((), (RECORD, RECORD)))
    first = await store.log.read(await store.log.acquire("relay", 16, minute), 1)
    second = await store.log.read(first.leases, 1)

    for batch in (first, second, second, first):
        assert len(await store.log.advance(batch.leases, minute)) == 16

    slice = second.entries[0].slice
    assert (await store.log.status())[slice].position == second.leases[slice].position


async def test_what_is_put_aside_is_a_state_an_entry_that_has_all_its_fields_and_a_due_time(
    store: RedisStateStore, raw: redis.Redis
) -> None:
    await store.transact(Commit((), (RECORD, RECORD, replace(RECORD, topic="audit"))))
    (stream,) = run(raw, "KEYS", f"{STREAMS}:*")
    in_stream = run(raw, "XRANGE", stream, "-", "+")
    batch = await store.log.read(await store.log.acquire("relay", 16, timedelta(minutes=1)), 10)
    parked = Deferral(batch.entries[:2], Failure(10, None, "too big"))
    waiting = Deferral(batch.entries[2:], Failure(1, timedelta(seconds=5), "no"))

    await store.log.advance(batch.leases, timedelta(minutes=1), [parked, waiting])

    first, _, third = map(_padded, (entry.id for entry in batch.entries))
    states, entries, due = KeyNames("orders", "statestore").all_deferred(batch.entries[0].slice)
    state = fields_of(raw, states)
    due_at = state[b"9:orders||1,6:pubsub,5:audit,"].split()[1]
    members = run(raw, "ZRANGE", entries, 0, -1)
    assert run(raw, "XLEN", stream) == 0
    assert state == {
        b"9:orders||1,6:pubsub,6:orders,": f"10 parked 2 {first} too big".encode(),
        b"9:orders||1,6:pubsub,5:audit,": f"1 {due_at.decode()} 1 {third} no".encode(),
    }
    assert members[0].startswith(f"9:orders||1,6:pubsub,5:audit,{third}:".encode())
    assert members[1].startswith(f"9:orders||1,6:pubsub,6:orders,{first}:".encode())
    in_order = [in_stream[2], in_stream[0], in_stream[1]]
    assert [_unpacked_fields(member) for member in members] == [list(fields.values()) for _, fields in in_order]
    assert run(raw, "ZRANGE", due, 0, -1) == [b"6:pubsub,5:audit,%020d9:orders||1," % int(due_at)]


def _padded(id: str) -> str:
    return "-".join(part.zfill(20) for part in id.split("-"))


def _unpacked_fields(member: bytes) -> list[bytes]:
    fields: list[bytes] = msgpack.unpackb(member.split(b",", 3)[3].partition(b":")[2], raw=True)
    return fields


async def test_nothing_is_left_of_what_was_aside_and_is_settled(store: RedisStateStore, raw: redis.Redis) -> None:
    await store.transact(Commit((), (RECORD, RECORD)))
    batch = await store.log.read(await store.log.acquire("relay", 16, timedelta(minutes=1)), 10)
    deferral = Deferral(batch.entries, Failure(1, timedelta(0), "no"))
    await store.log.advance(batch.leases, timedelta(minutes=1), [deferral])
    queue = DeferredQueue.of(batch.entries[0])

    published = tuple(entry.id for entry in batch.entries)
    await store.log.settle_deferred(batch.leases, [QueueProgress(queue, published, None)])

    assert run(raw, "KEYS", "*:deferred:*") == []


@pytest.mark.parametrize("pause", [None, timedelta(0), timedelta(hours=1)], ids=["parked", "due", "waiting"])
async def test_a_queue_has_one_due_time_or_none_whatever_became_of_it(
    store: RedisStateStore, raw: redis.Redis, pause: timedelta | None
) -> None:
    await store.transact(Commit((), (RECORD,)))
    batch = await store.log.read(await store.log.acquire("relay", 16, timedelta(minutes=1)), 10)
    queue = DeferredQueue.of(batch.entries[0])
    deferral = Deferral(batch.entries, Failure(1, timedelta(minutes=1), "no"))
    leases = await store.log.advance(batch.leases, timedelta(minutes=1), [deferral])

    for each in (pause, None, timedelta(minutes=1), pause):
        await store.log.settle_deferred(leases, [QueueProgress(queue, (), Failure(2, each, "no"))])
        await store.log.replay(RECORD.order_key)
        await store.log.settle_deferred(leases, [QueueProgress(queue, (), Failure(2, each, "no"))])
        held = run(raw, "ZCARD", KeyNames("orders", "statestore").deferred_due(queue.slice))

        assert held == (0 if each is None else 1)


async def test_queues_whose_names_begin_or_end_alike_are_put_aside_apart(raw: redis.Redis, redis_url: str) -> None:
    run(raw, "HSET", STREAMS, "slices", "1")
    texts = ["1", "11", "1,0", "", "1:", "2:1", "1,6:pubsub", "é", "1:1,6:pubsub,"]
    records = [replace(RECORD, order_key=text) for text in texts]
    records += [replace(RECORD, topic=f"{text}6:pubsub,6:orders") for text in texts]
    async with redis_store(redis_url) as single:
        await single.transact(Commit((), tuple(records)))
        batch = await single.log.read(await single.log.acquire("relay", 1, timedelta(minutes=1)), 100)
        deferrals = [Deferral((entry,), Failure(1, None, "no")) for entry in batch.entries]
        await single.log.advance(batch.leases, timedelta(minutes=1), deferrals)
        queues = [DeferredQueue.of(entry) for entry in batch.entries]

        read = {queue: await single.log.read_deferred([queue], 10) for queue in queues}
        settled = [QueueProgress(queues[0], (batch.entries[0].id,), None)]
        assert await single.log.settle_deferred(batch.leases, settled) == queues[:1]
        left = await single.log.deferred([0])
        replayed = {text: await single.log.replay(text) for text in texts}
        due = await single.log.due_deferred([0], 100)

    assert read == {queue: [entry] for queue, entry in zip(queues, batch.entries, strict=True)}
    assert {status.queue for status in left} == set(queues[1:])
    assert replayed == {text: 0 if text == "1" else 1 for text in texts}
    assert {status.queue for status in due} == set(queues[1 : len(texts)])


async def test_a_topic_that_ends_like_one_that_is_left_out_is_told(raw: redis.Redis, redis_url: str) -> None:
    run(raw, "HSET", STREAMS, "slices", "1")
    topics = [("pubsub", "orders"), ("6:pubsub", "orders"), ("pubsub", "1,6:pubsub,6:orders"), ("pubsu", "borders")]
    async with redis_store(redis_url) as single:
        await single.transact(
            Commit((), tuple(replace(RECORD, pubsub=pubsub, topic=topic) for pubsub, topic in topics))
        )
        batch = await single.log.read(await single.log.acquire("relay", 1, timedelta(minutes=1)), 100)
        deferrals = [Deferral((entry,), Failure(1, timedelta(0), "no")) for entry in batch.entries]
        await single.log.advance(batch.leases, timedelta(minutes=1), deferrals)

        due = await single.log.due_deferred([0], 100, topics[:1])

    assert {(status.queue.pubsub, status.queue.topic) for status in due} == set(topics[1:])


async def test_neither_what_is_not_due_nor_what_is_left_out_is_looked_at(
    store: RedisStateStore, raw: redis.Redis
) -> None:
    minute = timedelta(minutes=1)
    pauses = {"parked": None, "waiting": timedelta(hours=1), "blocked": timedelta(0)}
    records = [replace(RECORD, order_key=f"{topic}-{n}", topic=topic) for topic in pauses for n in range(1_000)]
    due_record = replace(RECORD, topic="waiting")
    await store.transact(Commit((), (*records, due_record)))
    batch = await store.log.read(await store.log.acquire("relay", 16, minute), 5_000)
    due_pause = {RECORD.order_key: timedelta(0)}
    deferrals = [
        Deferral((entry,), Failure(1, due_pause.get(entry.record.order_key, pauses[entry.record.topic]), "no"))
        for entry in batch.entries
    ]
    await store.log.advance(batch.leases, minute, deferrals)
    before = _calls(raw)

    due = await store.log.due_deferred(range(16), 100, [("pubsub", "blocked")])

    calls = {name: count - before.get(name, 0) for name, count in _calls(raw).items()}
    assert [status.queue for status in due] == [
        DeferredQueue.of(entry) for entry in batch.entries if entry.record == due_record
    ]
    # In each slice: what the first two topics are, what of one is due, and that there is no more.
    assert calls["cmdstat_zrangebylex"] == 16 * 4
    assert calls["cmdstat_hget"] == 1


def _calls(raw: redis.Redis) -> dict[str, int]:
    return {name: each["calls"] for name, each in raw.info("commandstats").items()}


async def test_more_queues_than_the_stack_of_the_servers_lua_holds_are_read_and_settled_at_once(
    store: RedisStateStore,
) -> None:
    minute = timedelta(minutes=1)
    await store.transact(Commit((), tuple(replace(RECORD, order_key=f"orders||{n}") for n in range(9_000))))
    batch = await store.log.read(await store.log.acquire("relay", 16, minute), 20_000)
    deferrals = [Deferral((entry,), Failure(1, timedelta(0), "no")) for entry in batch.entries]
    leases = await store.log.advance(batch.leases, minute, deferrals)

    due = await store.log.due_deferred(range(16), 10_000)
    read = await store.log.read_deferred([status.queue for status in due], 9_000)
    progress = [QueueProgress(DeferredQueue.of(entry), (entry.id,), None) for entry in read]
    emptied = await store.log.settle_deferred(leases, progress)

    assert len(due) == len(emptied) == 9_000
    assert await store.log.deferred(range(16)) == []


async def test_slices_that_are_furthest_behind_are_read_first_where_entries_are_large(
    store: RedisStateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "READ_BYTES", 1)
    keys = ["orders||1", "orders||2", "orders||3"]
    for _ in range(2):
        for key in keys:
            await store.transact(Commit((), (replace(RECORD, order_key=key),)))
    leases: Sequence[Lease] = await store.log.acquire("relay", 16, timedelta(minutes=1))
    read: list[str] = []

    for _ in range(6):
        batch = await store.log.read(leases, 100)
        leases = batch.leases
        read += [entry.record.order_key for entry in batch.entries]

    assert sorted(read[:3]) == sorted(read[3:]) == keys


async def test_many_large_entries_of_one_slice_leave_others_their_turn(store: RedisStateStore) -> None:
    large = replace(RECORD, body=b"x" * 1_000_000)
    for _ in range(20):
        await store.transact(Commit((), (large,)))
    small = replace(RECORD, order_key="orders||2")
    await store.transact(Commit((), (small,) * 10))

    batch = await store.log.read(await store.log.acquire("relay", 16, timedelta(minutes=1)), 1_000)

    assert sum(entry.record == small for entry in batch.entries) == 10
    assert sum(entry.record == large for entry in batch.entries) == 17


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

    await assert_corrupt_without_a_trace(store, raw, guards=guards)


ALL_DEFERRED = [KeyNames.deferred, KeyNames.deferred_entries, KeyNames.deferred_due]


@pytest.mark.parametrize("name_of", [KeyNames.stream, *ALL_DEFERRED])
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


@pytest.mark.parametrize("name_of", ALL_DEFERRED)
async def test_what_is_not_ours_in_the_place_of_what_is_deferred_refuses_a_whole_settlement_and_replay(
    store: RedisStateStore, raw: redis.Redis, name_of: Callable[[KeyNames, int], str]
) -> None:
    minute = timedelta(minutes=1)
    await store.transact(Commit((), (RECORD, replace(RECORD, order_key="orders||2"))))
    batch = await store.log.read(await store.log.acquire("relay", 16, minute), 10)
    deferrals = [Deferral((entry,), Failure(1, None, "no")) for entry in batch.entries]
    leases = await store.log.advance(batch.leases, minute, deferrals)
    good, broken = sorted(entry.slice for entry in batch.entries)
    before = await store.log.deferred([good])
    name = name_of(KeyNames("orders", "statestore"), broken)
    run(raw, "DEL", name)
    run(raw, "SET", name, "text")

    published = [QueueProgress(DeferredQueue.of(entry), (entry.id,), None) for entry in batch.entries]
    with pytest.raises(StoreUnavailable, match="WRONGTYPE"):
        await store.log.settle_deferred(leases, published)
    with pytest.raises(StoreUnavailable, match="WRONGTYPE"):
        await store.log.replay()

    assert await store.log.deferred([good]) == before


@pytest.mark.parametrize("seq", ["", "abc", "-1", "007", "1.5", str(2**63 - 1)])
async def test_a_claim_whose_commits_cannot_be_counted_refuses_the_whole_commit(
    store: RedisStateStore, raw: redis.Redis, seq: str
) -> None:
    guard = await store.directory.claim("Cart", "leroy")
    run(raw, "HSET", KeyNames("orders", "statestore").claim_of(guard), "seq", seq)

    await assert_corrupt_without_a_trace(store, raw, guards=(guard,))


@pytest.mark.parametrize("id", ["18446744073709551615-18446744073709551614", "18446744073709551615-1"])
async def test_a_stream_that_is_at_its_end_refuses_the_whole_commit(
    store: RedisStateStore, raw: redis.Redis, id: str
) -> None:
    for slice in range(16):
        run(raw, "XADD", KeyNames("orders", "statestore").stream(slice), id, "key", "")

    await assert_corrupt_without_a_trace(store, raw)


async def test_a_commit_that_the_server_breaks_off_leaves_no_mark(store: RedisStateStore, raw: redis.Redis) -> None:
    """Nothing is known that does so, but for a stream whose last id was set by hand."""
    last = "18446744073709551615-18446744073709551615"
    for slice in range(16):
        run(raw, "XADD", KeyNames("orders", "statestore").stream(slice), last, "key", "")
        run(raw, "XDEL", KeyNames("orders", "statestore").stream(slice), last)

    for _ in range(2):
        with pytest.raises(OutcomeUnknown):
            await store.transact(Commit((Upsert("orders||1", b"1"),), (RECORD,), (MARK,)))

    assert run(raw, "EXISTS", "orders||1") == 0


async def assert_corrupt_without_a_trace(
    store: RedisStateStore, raw: redis.Redis, *, guards: tuple[Guard, ...] = ()
) -> None:
    """Commit what one of our keys must refuse."""
    run(raw, "HSET", "orders||0", "data", "1", "version", "1")

    with pytest.raises(CorruptState):
        await store.transact(
            Commit((Upsert("orders||1", b"1"), Delete("orders||0")), (RECORD, RECORD), (MARK,), guards)
        )

    assert run(raw, "EXISTS", "orders||1", KeyNames("orders", "statestore").mark(MARK)) == 0
    assert fields_of(raw, "orders||0") == {b"data": b"1", b"version": b"1"}


OWN_KEYS = ["statecast:orders:statestore:outbox:3", "statecast:", "statecast:billing:statestore:mark:00"]


@pytest.mark.parametrize("key", OWN_KEYS)
@pytest.mark.parametrize("operation", [Upsert("", b"1"), Delete(""), Check("", None)])
async def test_no_commit_reaches_our_own_keys(
    store: RedisStateStore, raw: redis.Redis, key: str, operation: Upsert | Delete | Check
) -> None:
    """An app that has no prefix before its keys could name them."""
    with pytest.raises(InvalidRequest, match="statecast:"):
        await apply(store, Upsert("orders||1", b"1"), replace(operation, key=key))

    assert run(raw, "KEYS", "*") == [STREAMS.encode()]


@pytest.mark.parametrize("key", OWN_KEYS)
async def test_no_read_reaches_our_own_keys(store: RedisStateStore, key: str) -> None:
    with pytest.raises(InvalidRequest, match="statecast:"):
        await store.get(key)
    with pytest.raises(InvalidRequest, match="statecast:"):
        await store.bulk_get(["orders||1", key])


def test_no_name_reaches_into_the_keys_of_another() -> None:
    assert KeyNames("a:b", "c").stream(1) != KeyNames("a", "b:c").stream(1)
    assert KeyNames("a", "b").claim("C:d", "e") != KeyNames("a", "b").claim("C", "d:e")


async def test_a_commit_of_many_operations_is_one_commit(store: RedisStateStore) -> None:
    """More than the stack of the server's Lua holds, which `unpack` would need."""
    operations = [Upsert(f"orders||{number}", b"1") for number in range(10_000)]

    etags = await store.transact(Commit(tuple(operations)))

    assert None not in etags
