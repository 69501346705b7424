import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis

from statecast.clock import SystemClock
from statecast.components.address import Address
from statecast.components.broker.broker import Broker, Delivery, Message, Published, Refused, Unknown, Unreachable
from statecast.components.broker.redis.broker import RedisBroker
from statecast.components.broker.redis.subscription import Pace, Subscription
from statecast.components.manifest import Component
from statecast.components.redis.connection import Argument, Reply
from statecast.components.redis.pipeline import Pipeline
from statecast.components.redis.settings import RedisSettings
from statecast.components.testing.broker import LONG, BrokerContract, numbered
from statecast.components.testing.deadline import until
from statecast.errors import InvalidRequest
from statecast.runtime.servers import PrivateServer, ServerKind


@pytest.fixture
def server(private_server: Callable[[ServerKind], PrivateServer]) -> PrivateServer:
    return private_server(ServerKind.REDIS)


@pytest.fixture(params=["redis_url", "older_redis_url"])
def each_url(request: pytest.FixtureRequest) -> str:
    url: str = request.getfixturevalue(request.param)
    return url


def redis_broker(url: str, **metadata: str) -> RedisBroker:
    address = {"redisHost": urlsplit(url).netloc, "redisDB": urlsplit(url).path.strip("/")}
    quick = {"redeliverInterval": "100ms", "processingTimeout": "60s"}
    component = Component("pubsub", "pubsub.redis", "v1", {**address, **quick, **metadata})
    return RedisBroker(component, app_id="orders", clock=SystemClock())


class TestRedisBroker(BrokerContract):
    carries_key = False

    @pytest.fixture
    def make_broker(self, redis_url: str) -> Callable[[], Broker]:
        return lambda: redis_broker(redis_url)

    @pytest.fixture
    def unknown_topic(self, redis_url: str) -> str:
        run(redis_url, "SET", "no-stream", "text")
        return "no-stream"


class TestBrokerOnAnOlderServer(BrokerContract):
    carries_key = False

    @pytest.fixture
    def make_broker(self, older_redis_url: str) -> Callable[[], Broker]:
        return lambda: redis_broker(older_redis_url)

    @pytest.fixture
    def unknown_topic(self, older_redis_url: str) -> str:
        run(older_redis_url, "SET", "no-stream", "text")
        return "no-stream"


# On the wire


async def test_an_entry_has_metadata_only_where_the_message_has(redis_url: str) -> None:
    async with redis_broker(redis_url) as broker:
        await broker.publish([Message("t", b"\xff", "key"), Message("t", b"2", metadata={"a": "b"})], LONG)

    assert fields_in(redis_url, "t") == [{b"data": b"\xff"}, {b"data": b"2", b"metadata": b'{"a":"b"}'}]


async def test_what_dapr_publishes_is_received(redis_url: str) -> None:
    run(redis_url, "XADD", "t", "*", "data", "1", "metadata", '{"ttlInSeconds":"10"}')
    run(redis_url, "XADD", "t", "*", "data", "2", "metadata", "{}")
    run(redis_url, "XADD", "t", "*", "text", "of another program")

    async with redis_broker(redis_url) as broker, broker.subscribe("t", "g") as deliveries:
        received = [(await next_of(deliveries)).message for _ in range(3)]

    assert [message.body for message in received] == [b"1", b"2", b""]
    assert [message.metadata for message in received] == [{"ttlInSeconds": "10"}, {}, {}]


async def test_a_stream_is_kept_at_about_its_length(redis_url: str) -> None:
    async with redis_broker(redis_url, maxLenApprox="100") as broker:
        await broker.publish(numbered("t", 1_000), LONG)

    assert 100 <= len(fields_in(redis_url, "t")) <= 300


async def test_old_entries_of_a_stream_are_thrown_away(redis_url: str) -> None:
    for number in range(1, 301):
        run(redis_url, "XADD", "t", f"{number}-0", "data", "old")

    async with redis_broker(redis_url, streamTTL="1h") as broker:
        await broker.publish(numbered("t", 10), LONG)

    bodies = [fields[b"data"] for fields in fields_in(redis_url, "t")]
    assert bodies.count(b"old") <= 100
    assert len(bodies) - bodies.count(b"old") == 10


# What a server refuses


async def test_a_topic_without_the_right_is_refused_and_no_other(server: PrivateServer) -> None:
    run(server.address, "ACL", "SETUSER", "clerk", "on", ">s3cret", "~open", "+@all")
    messages = [Message("open" if number % 2 else "shut", b"%d" % number, "key") for number in range(6)]

    async with redis_broker(server.address, redisUsername="clerk", redisPassword="s3cret") as broker:
        outcomes = await broker.publish(messages, LONG)

    assert outcomes[1::2] == [Published()] * 3
    assert all(isinstance(outcome, Refused) and outcome.is_about_topic for outcome in outcomes[0::2])


async def test_a_full_server_can_be_tried_again(server: PrivateServer) -> None:
    async with redis_broker(server.address) as broker:
        run(server.address, "CONFIG", "SET", "maxmemory", "1")
        full = await broker.publish(numbered("t", 4, keys=2), LONG)
        run(server.address, "CONFIG", "SET", "maxmemory", "0")
        roomy = await broker.publish(numbered("t", 4, keys=2), LONG)

    assert [type(outcome) for outcome in full] == [Unreachable] * 4
    assert roomy == [Published()] * 4


async def test_a_message_that_is_too_large_for_the_server_is_refused_alone(server: PrivateServer) -> None:
    run(server.address, "CONFIG", "SET", "proto-max-bulk-len", "1mb")
    messages = [Message("t", b"x" * size, key=f"key-{n}") for n, size in enumerate([900_000, 1_100_000, 100, 900_000])]

    async with redis_broker(server.address) as broker:
        outcomes = await broker.publish(messages, LONG)

    assert isinstance(outcomes[1], Refused)
    assert not outcomes[1].is_about_topic
    assert outcomes[:1] + outcomes[2:] == [Published()] * 3


async def test_a_key_that_was_stopped_stays_stopped_in_the_runs_that_follow(redis_url: str) -> None:
    run(redis_url, "SET", "shut", "text")
    messages = [Message("shut" if number % 3 == 0 else "open", b"%d" % number, "key") for number in range(1_500)]

    async with redis_broker(redis_url) as broker:
        outcomes = await broker.publish(messages, LONG)

    assert isinstance(outcomes[0], Refused)
    assert [type(outcome) for outcome in outcomes[3::3]] == [Unreachable] * 499
    assert outcomes[1::3] + outcomes[2::3] == [Published()] * 1_000


async def test_a_server_that_forgot_its_scripts_is_taught_again(redis_url: str) -> None:
    async with redis_broker(redis_url) as broker:
        await broker.publish(numbered("t", 1), LONG)
        run(redis_url, "SCRIPT", "FLUSH")
        outcomes = await asyncio.gather(*(broker.publish(numbered("t", 5), LONG) for _ in range(5)))

    assert outcomes == [[Published()] * 5] * 5
    assert len(fields_in(redis_url, "t")) == 26


async def test_a_user_who_may_not_load_scripts_publishes(server: PrivateServer) -> None:
    run(server.address, "ACL", "SETUSER", "clerk", "on", ">s3cret", "~*", "+evalsha", "+eval", "+xadd")

    async with redis_broker(server.address, redisUsername="clerk", redisPassword="s3cret") as broker:
        outcomes = await broker.publish(numbered("t", 4), LONG)

    assert outcomes == [Published()] * 4


# A server that is away


async def test_a_broker_opens_without_its_server_and_publishes_once_it_is_there(server: PrivateServer) -> None:
    server.kill()

    async with redis_broker(server.address) as broker:
        [without] = await broker.publish(numbered("t", 1), LONG)
        await asyncio.to_thread(server.restart)
        [with_server] = await broker.publish(numbered("t", 1), LONG)

    assert isinstance(without, Unreachable)
    assert with_server == Published()


async def test_a_broker_opens_in_its_time_where_no_connection_is_taken() -> None:
    async with black_hole() as address:
        component = Component("pubsub", "pubsub.redis", "v1", {"redisHost": address}, init_timeout=timedelta(seconds=1))

        async with asyncio.timeout(1), RedisBroker(component, app_id="orders", clock=SystemClock()):
            pass


@asynccontextmanager
async def black_hole() -> AsyncIterator[str]:
    """Listen, and take nobody in: the queue of those who wait is full."""
    with ExitStack() as stack:
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listening.getsockname())
        yield "{}:{}".format(*listening.getsockname())


async def test_a_silent_server_leaves_the_outcome_unknown_at_the_deadline(server: PrivateServer) -> None:
    async with redis_broker(server.address) as broker, asyncio.timeout(10):
        await broker.publish(numbered("t", 1), LONG)
        server.freeze()

        outcomes = await broker.publish(numbered("t", 600), timedelta(milliseconds=200))
        server.thaw()
        again = await broker.publish(numbered("t", 600), LONG)

    assert {type(outcome) for outcome in outcomes[:500]} == {Unknown}
    assert {type(outcome) for outcome in outcomes[500:]} == {Unreachable}
    assert again == [Published()] * 600


@pytest.mark.parametrize("seconds", [0, -1])
async def test_nothing_is_sent_when_no_time_is_left(redis_url: str, seconds: int) -> None:
    async with redis_broker(redis_url) as broker:
        outcomes = await broker.publish(numbered("t", 600), timedelta(seconds=seconds))
        last = await broker.publish([Message("t", b"last")], LONG)

    assert {type(outcome) for outcome in outcomes} == {Unreachable}
    assert last == [Published()]
    assert [fields[b"data"] for fields in fields_in(redis_url, "t")] == [b"last"]


async def test_behind_a_run_whose_answer_did_not_come_nothing_is_sent(redis_url: str) -> None:
    messages = [Message("t", b"%d" % number, f"key-{number}") for number in range(1_200)]
    async with (
        cutting_proxy(redis_url) as (proxied_url, cut_answers_with),
        redis_broker(proxied_url) as broker,
    ):
        await broker.publish(numbered("t", 1), LONG)
        cut_answers_with(b"*0")
        outcomes = await broker.publish(messages, LONG)

    assert [type(outcome) for outcome in outcomes] == [Unknown] * 500 + [Unreachable] * 700
    assert len(fields_in(redis_url, "t")) == 501


async def test_a_subscription_outlives_its_server(server: PrivateServer) -> None:
    async with redis_broker(server.address) as broker, broker.subscribe("t", "g") as deliveries:
        await broker.publish([Message("t", b"before")], LONG)
        before = await next_of(deliveries)
        await before.ack()
        waiting = asyncio.ensure_future(next_of(deliveries))
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.restart)

        await publish_until_published(broker, Message("t", b"after"))
        after = await waiting

    assert (before.message.body, after.message.body) == (b"before", b"after")


async def test_an_entry_whose_answer_was_lost_on_the_way_is_asked_for_again(redis_url: str) -> None:
    """The server has counted it as read by this member, which never saw it."""
    async with (
        cutting_proxy(redis_url) as (proxied_url, cut_answers_with),
        redis_broker(redis_url) as publisher,
        redis_broker(proxied_url) as broker,
        broker.subscribe("t", "g") as deliveries,
    ):
        cut_answers_with(b"lost on the way")
        waiting = asyncio.ensure_future(next_of(deliveries))
        await publisher.publish([Message("t", b"lost on the way")], LONG)

        delivery = await waiting

    assert (delivery.message.body, delivery.attempt) == (b"lost on the way", 1)


@asynccontextmanager
async def cutting_proxy(url: str) -> AsyncIterator[tuple[str, Callable[[bytes], None]]]:
    """Stand before a server, and once close a connection in the place of handing on the answer that has a text."""
    cuts: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection(urlsplit(url).hostname, urlsplit(url).port)

        async def pass_on_requests() -> None:
            while data := await reader.read(65536):
                upstream_writer.write(data)
            upstream_writer.close()

        async def pass_on_answers() -> None:
            while data := await upstream_reader.read(65536):
                if cuts and cuts[0] in data:
                    cuts.clear()
                    break
                writer.write(data)
            writer.close()

        await asyncio.gather(pass_on_requests(), pass_on_answers(), return_exceptions=True)

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as proxy:
        port = proxy.sockets[0].getsockname()[1]
        yield f"redis://127.0.0.1:{port}{urlsplit(url).path}", cuts.append


# Groups


async def test_what_a_dead_member_had_in_hand_is_taken_over(redis_url: str) -> None:
    run(redis_url, "XGROUP", "CREATE", "t", "g", "0", "MKSTREAM")
    run(redis_url, "XADD", "t", "*", "data", "1")
    run(redis_url, "XREADGROUP", "GROUP", "g", "dead", "STREAMS", "t", ">")

    async with (
        redis_broker(redis_url, processingTimeout="50ms", redeliverInterval="50ms") as broker,
        broker.subscribe("t", "g") as deliveries,
    ):
        delivery = await next_of(deliveries)
        await delivery.ack()

    assert (delivery.message.body, delivery.attempt) == (b"1", 2)
    assert run(redis_url, "XPENDING", "t", "g")["pending"] == 0


async def test_what_a_member_holds_is_not_given_to_it_twice(redis_url: str) -> None:
    async with (
        redis_broker(redis_url, processingTimeout="20ms", redeliverInterval="20ms") as broker,
        broker.subscribe("t", "g") as deliveries,
    ):
        await broker.publish([Message("t", b"slow")], LONG)
        slow = await next_of(deliveries)
        waiting = asyncio.ensure_future(next_of(deliveries))

        async def was_looked_at() -> bool:
            client: Any = redis.Redis.from_url(redis_url)
            (pending,) = client.xpending_range("t", "g", "-", "+", 10)
            return int(pending["times_delivered"]) > 2

        await until(was_looked_at)
        is_waiting = not waiting.done()
        await broker.publish([Message("t", b"next")], LONG)

        assert is_waiting
        assert (await waiting).message.body == b"next"
        assert slow.message.body == b"slow"


async def test_a_member_that_leaves_is_forgotten_and_what_it_never_handed_out_counts_as_new(redis_url: str) -> None:
    async with redis_broker(redis_url) as broker:
        async with broker.subscribe("t", "g") as deliveries:
            await broker.publish(numbered("t", 3), LONG)
            held = await next_of(deliveries)
        consumers = consumers_in(redis_url, "t", "g")
        async with broker.subscribe("t", "g") as deliveries:
            received = [await next_of(deliveries) for _ in range(3)]

    assert held.attempt == 1
    assert consumers == {b"statecast-handed-back"}
    assert {delivery.message.body: delivery.attempt for delivery in received} == {b"0": 2, b"1": 1, b"2": 1}


@pytest.mark.parametrize("never", ["processingTimeout", "redeliverInterval"])
async def test_what_is_handed_back_is_given_again_where_nothing_else_is(redis_url: str, never: str) -> None:
    async with redis_broker(redis_url, **{never: "0"}) as broker:
        async with broker.subscribe("t", "g") as deliveries:
            await broker.publish(numbered("t", 3), LONG)
            held = await next_of(deliveries)
        async with broker.subscribe("t", "g") as deliveries:
            received = [await next_of(deliveries) for _ in range(3)]

    assert held.attempt == 1
    assert {delivery.message.body: delivery.attempt for delivery in received} == {b"0": 2, b"1": 1, b"2": 1}


async def test_members_that_died_are_forgotten_once_they_are_long_silent_and_have_nothing_pending(
    each_url: str,
) -> None:
    run(each_url, "XGROUP", "CREATE", "t", "g", "0", "MKSTREAM")
    run(each_url, "XADD", "t", "*", "data", "1")
    run(each_url, "XREADGROUP", "GROUP", "g", "statecast-with-one-in-hand", "STREAMS", "t", ">")
    for name in ("statecast-silent", "of-another-program"):
        run(each_url, "XGROUP", "CREATECONSUMER", "t", "g", name)

    async with redis_broker(each_url) as patient, patient.subscribe("t", "g"):
        at_first = consumers_in(each_url, "t", "g")
    async with redis_broker(each_url, processingTimeout="20ms") as broker:

        async def is_forgotten() -> bool:
            async with broker.subscribe("t", "g"):
                return b"statecast-silent" not in consumers_in(each_url, "t", "g")

        await until(is_forgotten)

    assert at_first == {b"statecast-with-one-in-hand", b"statecast-silent", b"of-another-program"}
    assert consumers_in(each_url, "t", "g") == {b"statecast-with-one-in-hand", b"of-another-program"}
    assert run(each_url, "XPENDING", "t", "g")["pending"] == 1


class OlderPipeline(Pipeline):
    """Lets XAUTOCLAIM tell as that of Redis 6.2 of an entry that it claims and that is deleted: nil, time and again."""

    is_claimed = False

    async def command(self, *arguments: Argument) -> Reply:
        if arguments[0] != "XAUTOCLAIM":
            return await super().command(*arguments)
        while not self.is_claimed:
            for id, _ in (await super().command(*arguments))[1]:
                await super().command("XDEL", arguments[1], id)
                self.is_claimed = True
        return [b"0-0", [None]]


async def test_what_redis_6_2_claims_and_finds_deleted_is_settled(redis_url: str) -> None:
    run(redis_url, "XGROUP", "CREATE", "t", "g", "0", "MKSTREAM")
    run(redis_url, "XADD", "t", "*", "data", "1")
    run(redis_url, "XREADGROUP", "GROUP", "g", "dead", "STREAMS", "t", ">")
    server = urlsplit(redis_url)
    settings = RedisSettings(Address("127.0.0.1", server.port or 0), database=int(server.path.strip("/")))
    pace = Pace(timedelta(milliseconds=1), timedelta(milliseconds=1), queue_depth=10)

    async def is_settled() -> bool:
        return bool(run(redis_url, "XPENDING", "t", "g")["pending"] == 0)

    async with (
        OlderPipeline(settings) as pipeline,
        Subscription("t", "g", settling=pipeline, settings=settings, pace=pace, clock=SystemClock()) as deliveries,
    ):
        waiting = asyncio.ensure_future(next_of(deliveries))
        await until(is_settled)
        run(redis_url, "XADD", "t", "*", "data", "2")

        assert (await waiting).message.body == b"2"


async def test_a_group_that_was_destroyed_is_made_again(redis_url: str) -> None:
    async with redis_broker(redis_url) as broker, broker.subscribe("t", "g") as deliveries:
        await broker.publish([Message("t", b"1")], LONG)
        await (await next_of(deliveries)).ack()
        run(redis_url, "XGROUP", "DESTROY", "t", "g")
        run(redis_url, "DEL", "t")
        await broker.publish([Message("t", b"2")], LONG)

        assert (await next_of(deliveries)).message.body == b"2"


async def test_the_consumer_id_renames_the_group_of_the_app(redis_url: str) -> None:
    async with redis_broker(redis_url, consumerID="other") as broker:
        async with broker.subscribe("t", "orders"):
            pass
        async with broker.subscribe("t", "billing"):
            pass

    assert {group[b"name"] for group in run(redis_url, "XINFO", "GROUPS", "t")} == {b"other", b"billing"}


async def test_blanks_around_a_consumer_id_are_no_part_of_it(redis_url: str) -> None:
    for consumer_id in (" other ", "  "):
        async with redis_broker(redis_url, consumerID=consumer_id) as broker, broker.subscribe("t", "orders"):
            pass

    assert {group[b"name"] for group in run(redis_url, "XINFO", "GROUPS", "t")} == {b"other", b"orders"}


async def test_no_more_is_read_at_once_than_the_queue_depth(redis_url: str) -> None:
    async with redis_broker(redis_url, queueDepth="2") as broker, broker.subscribe("t", "g") as deliveries:
        await broker.publish(numbered("t", 5), LONG)
        await next_of(deliveries)

        assert run(redis_url, "XPENDING", "t", "g")["pending"] == 2


async def test_a_key_that_is_no_stream_cannot_be_subscribed_to(redis_url: str) -> None:
    run(redis_url, "SET", "t", "text")

    async with redis_broker(redis_url) as broker:
        with pytest.raises(InvalidRequest, match="WRONGTYPE"):
            async with broker.subscribe("t", "g"):
                pass


async def test_a_broker_that_is_not_open_has_no_subscriptions(redis_url: str) -> None:
    with pytest.raises(InvalidRequest, match="not open"):
        async with redis_broker(redis_url).subscribe("t", "g"):
            pass


def run(url: str, *words: str | int) -> Any:
    return redis.Redis.from_url(url).execute_command(*words)  # type: ignore[no-untyped-call]


def consumers_in(url: str, topic: str, group: str) -> set[bytes]:
    return {consumer[b"name"] for consumer in run(url, "XINFO", "CONSUMERS", topic, group)}


def fields_in(url: str, topic: str) -> list[dict[bytes, bytes]]:
    return [fields for _, fields in run(url, "XRANGE", topic, "-", "+")]


async def next_of(deliveries: AsyncIterator[Delivery]) -> Delivery:
    async with asyncio.timeout(20):
        return await anext(deliveries)


async def publish_until_published(broker: Broker, message: Message) -> None:
    async def is_published() -> bool:
        return await broker.publish([message], LONG) == [Published()]

    await until(is_published)
