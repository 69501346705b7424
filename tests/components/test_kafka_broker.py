import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from uuid import uuid4

import pytest
from aiokafka import TopicPartition

from statecast.clock import SystemClock
from statecast.components.broker.broker import Broker, Delivery, Message, Published, Refused, Unknown, Unreachable
from statecast.components.broker.kafka.broker import KafkaBroker
from statecast.components.broker.kafka.config import parse_config
from statecast.components.broker.kafka.patience import Patience
from statecast.components.broker.kafka.producer import Producer
from statecast.components.broker.kafka.records import encode
from statecast.components.manifest import Component
from statecast.components.testing.broker import LONG, BrokerContract, assert_all_in_order, numbered
from statecast.components.testing.deadline import until
from statecast.errors import InvalidRequest
from statecast.runtime.server import PrivateServer, ServerKind
from tests.components.kafka import kafka_broker, make_no_topics_by_use, make_topic

PATIENCE = 30.0
SHORT = timedelta(seconds=1)


@pytest.fixture
def topic() -> str:
    return f"topic-{uuid4().hex[:12]}"


class TestKafkaBroker(BrokerContract):
    @pytest.fixture
    def make_broker(self, kafka_bootstrap: str) -> Callable[[], Broker]:
        return lambda: kafka_broker(kafka_bootstrap)

    @pytest.fixture
    async def unsendable(self, kafka_bootstrap: str, topic: str) -> Message:
        await make_topic(kafka_bootstrap, topic, partitions=3, max_message_bytes="20000")
        return Message(topic, b"x" * 50_000, key="refused")

    @pytest.fixture
    def unknown_topic(self) -> str:
        return "no topic can have blanks"


# Refusals


@pytest.mark.parametrize("partitions", [1, 4])
async def test_each_poison_is_refused_alone_wherever_it_stands(
    kafka_bootstrap: str, topic: str, partitions: int
) -> None:
    """Poison in the middle of a batch, for several keys in several partitions; one key has two."""
    await make_topic(kafka_bootstrap, topic, partitions=partitions, max_message_bytes="100000")
    messages = numbered(topic, 600, keys=12)
    poisoned = {100: "key-4", 301: "key-1", 302: "key-2", 400: "key-4", 599: "key-11"}
    for place, key in poisoned.items():
        messages[place] = Message(topic, b"x" * 150_000, key=key)
    first_poison = {"key-4": 100, "key-1": 301, "key-2": 302, "key-11": 599}

    async with kafka_broker(kafka_bootstrap) as broker, broker.subscribe(topic, "group") as deliveries:
        outcomes = await broker.publish(messages, LONG)
        published = [message for message, outcome in zip(messages, outcomes, strict=True) if outcome == Published()]
        received: list[Message] = []
        async with asyncio.timeout(PATIENCE):
            while len(received) < len(published):
                delivery = await anext(deliveries)
                await delivery.ack()
                received.append(delivery.message)

    for place, (message, outcome) in enumerate(zip(messages, outcomes, strict=True)):
        limit = first_poison.get(message.key or "", 600)
        expected = Published if place < limit else Refused if place == limit else Unreachable
        assert type(outcome) is expected, (place, message.key, outcome)
    assert_all_in_order(received, published)


async def test_a_topic_that_the_server_does_not_make_is_refused_once_it_is_sure(
    private_server: Callable[[ServerKind], PrivateServer], monkeypatch: pytest.MonkeyPatch, topic: str
) -> None:
    """A topic that is being made is unknown at first, too: a hasty publish is only told that it was not sent."""
    make_no_topics_by_use(monkeypatch)
    server = private_server(ServerKind.KAFKA)
    await make_topic(server.address, f"{topic}-known")
    messages = [Message(topic, b"1", "a"), Message(f"{topic}-known", b"2", "a"), Message(topic, b"3", "b")]

    async with kafka_broker(server.address) as broker:
        await broker.publish([Message(f"{topic}-known", b"0")], LONG)
        hasty = await broker.publish(messages, SHORT)
        patient = await broker.publish(messages, LONG)

    assert [type(outcome) for outcome in hasty] == [Unreachable, Published, Unreachable]
    assert [isinstance(outcome, Refused) and outcome.is_about_topic for outcome in patient] == [True, False, True]
    assert patient[1] == Published()


async def test_small_messages_pass_where_the_topic_takes_only_small_batches(kafka_bootstrap: str, topic: str) -> None:
    await make_topic(kafka_bootstrap, topic, max_message_bytes="5000")
    messages = [Message(topic, b"%d" % n + b"x" * 1000, key=f"key-{n % 7}") for n in range(100)]

    async with kafka_broker(kafka_bootstrap) as broker:
        first = await broker.publish(messages, LONG)
        second = await broker.publish(messages, LONG)

    assert first + second == [Published()] * 200


async def test_a_message_over_the_components_limit_is_refused(kafka_bootstrap: str, topic: str) -> None:
    large, behind, other = Message(topic, b"x" * 3000, "a"), Message(topic, b"1", "a"), Message(topic, b"2", "b")

    async with kafka_broker(kafka_bootstrap, maxMessageBytes="2000") as broker:
        outcomes = await broker.publish([large, behind, other], LONG)

    assert [type(outcome) for outcome in outcomes] == [Refused, Unreachable, Published]


@pytest.mark.parametrize(
    ("broken", "is_about_topic"),
    [
        (("", "a", {}), True),
        (("t" * 300, "a", {}), True),
        (("tøpic", "a", {}), True),
        ((None, "\ud800", {}), False),
        ((None, "a", {"note": "\udfff"}), False),
        ((None, None, {"partitionKey": "\ud800"}), False),
        ((None, None, {"partitionNumber": "1"}), False),
    ],
    ids=["no topic", "long topic", "odd topic", "key", "header", "key in metadata", "partition"],
)
async def test_what_cannot_be_done_is_refused_alone(
    kafka_bootstrap: str, topic: str, broken: tuple[str | None, str | None, dict[str, str]], is_about_topic: bool
) -> None:
    named, key, metadata = broken
    message = Message(topic if named is None else named, b"1", key, metadata)

    async with kafka_broker(kafka_bootstrap) as broker:
        outcomes = await broker.publish([message, Message(topic, b"2", "b")], LONG)

    assert [type(outcome) for outcome in outcomes] == [Refused, Published]
    assert isinstance(outcomes[0], Refused)
    assert outcomes[0].is_about_topic is is_about_topic


async def test_a_compacted_topic_refuses_what_has_no_key_and_only_that(kafka_bootstrap: str, topic: str) -> None:
    await make_topic(kafka_bootstrap, topic, cleanup_policy="compact")
    messages = [Message(topic, b"1", "a"), Message(topic, b"2"), Message(topic, b"3", "b"), Message(topic, b"4", "a")]

    async with kafka_broker(kafka_bootstrap) as broker:
        outcomes = await broker.publish(messages, LONG)

    assert [type(outcome) for outcome in outcomes] == [Published, Refused, Published, Published]
    assert isinstance(outcomes[1], Refused)
    assert not outcomes[1].is_about_topic


# What stands in the record


async def test_keys_and_headers_come_back_and_internal_words_are_no_headers(kafka_bootstrap: str, topic: str) -> None:
    metadata = {"partitionKey": "ignored", "__offset": "7", "__key": "ignored", "tenant": "north", "rawPayload": "true"}

    async with kafka_broker(kafka_bootstrap) as broker, broker.subscribe(topic, "group") as deliveries:
        await broker.publish([Message(topic, b"1", "a", metadata)], LONG)
        async with asyncio.timeout(PATIENCE):
            received = (await anext(deliveries)).message

    assert received.key == "a"
    assert received.metadata["__timestamp"].isdigit()
    assert {name: value for name, value in received.metadata.items() if name != "__timestamp"} == {
        "tenant": "north",
        "rawPayload": "true",
        "__topic": topic,
        "__partition": "0",
        "__offset": "0",
        "__key": "a",
    }


async def test_the_metadata_names_the_key_where_the_message_has_none(kafka_bootstrap: str, topic: str) -> None:
    async with kafka_broker(kafka_bootstrap) as broker, broker.subscribe(topic, "group") as deliveries:
        await broker.publish([Message(topic, b"1", None, {"partitionKey": "order-1"}), Message(topic, b"2")], LONG)
        async with asyncio.timeout(PATIENCE):
            keys = [(await anext(deliveries)).message.key for _ in range(2)]

    assert keys == ["order-1", None]


async def test_a_new_group_can_begin_with_the_oldest(kafka_bootstrap: str, topic: str) -> None:
    async with kafka_broker(kafka_bootstrap, initialOffset="oldest") as broker:
        await broker.publish(numbered(topic, 3, keys=1), LONG)
        async with broker.subscribe(topic, "group") as deliveries, asyncio.timeout(PATIENCE):
            bodies = [(await anext(deliveries)).message.body for _ in range(3)]

    assert bodies == [b"0", b"1", b"2"]


async def test_a_nacked_message_comes_before_what_was_not_handed_out(kafka_bootstrap: str, topic: str) -> None:
    async with kafka_broker(kafka_bootstrap) as broker, broker.subscribe(topic, "group") as deliveries:
        await broker.publish(numbered(topic, 5, keys=1), LONG)
        async with asyncio.timeout(PATIENCE):
            await (await anext(deliveries)).nack()
            received = [
                (delivery.message.body, delivery.attempt) for delivery in [await anext(deliveries) for _ in "12"]
            ]

    assert received == [(b"0", 2), (b"1", 1)]


async def test_offsets_are_committed_up_to_the_first_that_is_unsettled(kafka_bootstrap: str, topic: str) -> None:
    async with kafka_broker(kafka_bootstrap) as broker:
        async with broker.subscribe(topic, "group") as deliveries, asyncio.timeout(PATIENCE):
            await broker.publish(numbered(topic, 6, keys=1), LONG)
            held = [await anext(deliveries) for _ in range(5)]
            for place in (0, 1, 3, 4):
                await held[place].ack()
        async with broker.subscribe(topic, "group") as deliveries, asyncio.timeout(PATIENCE):
            again = [(await anext(deliveries)).message.body for _ in range(4)]

    assert again == [b"2", b"3", b"4", b"5"]


async def test_members_take_over_from_each_other_and_lose_nothing(kafka_bootstrap: str, topic: str) -> None:
    """The group is reassembled twice while messages go through it, with one that nobody has settled meanwhile."""
    await make_topic(kafka_bootstrap, topic, partitions=4)
    messages = numbered(topic, 300, keys=30)
    seen: set[bytes] = set()

    async def read(deliveries: AsyncIterator[Delivery]) -> None:
        async for delivery in deliveries:
            seen.add(delivery.message.body)
            await delivery.ack()

    async with kafka_broker(kafka_bootstrap) as broker, broker.subscribe(topic, "group") as first:
        reading = asyncio.ensure_future(read(first))
        await broker.publish(messages[:100], LONG)
        async with broker.subscribe(topic, "group") as second:
            await broker.publish(messages[100:200], LONG)
            also_reading = asyncio.ensure_future(read(second))
            await asyncio.sleep(0)
        await broker.publish(messages[200:], LONG)
        async with asyncio.timeout(PATIENCE):
            while len(seen) < 300:  # noqa: ASYNC110  # a set has no event
                await asyncio.sleep(0.01)
        reading.cancel()
        await asyncio.wait([reading, also_reading])

    assert seen == {message.body for message in messages}


# A broker that is away


async def test_without_kafka_a_publish_is_unreachable_and_closing_is_quick() -> None:
    async with kafka_broker("127.0.0.1:1") as broker:
        outcomes = await broker.publish(numbered("t", 3), LONG)

    assert [type(outcome) for outcome in outcomes] == [Unreachable] * 3


async def test_a_broker_that_is_closed_takes_no_subscription() -> None:
    async with kafka_broker("127.0.0.1:1") as broker:
        pass

    with pytest.raises(InvalidRequest, match="is not open"):
        async with broker.subscribe("t", "group"):
            pass


async def test_leaving_while_a_subscription_waits_for_kafka_ends_it() -> None:
    async def subscribe(broker: KafkaBroker) -> list[object]:
        async with broker.subscribe("t", "group") as deliveries:
            return [delivery async for delivery in deliveries]

    async with asyncio.timeout(PATIENCE):
        async with kafka_broker("127.0.0.1:1") as broker:
            subscribing = asyncio.ensure_future(subscribe(broker))
            await asyncio.sleep(0)
        assert await subscribing == []


async def test_a_frozen_broker_gives_outcomes_in_time_and_does_not_hold_up_closing(
    private_server: Callable[[ServerKind], PrivateServer], topic: str
) -> None:
    server = private_server(ServerKind.KAFKA)
    async with asyncio.timeout(PATIENCE + 30):
        async with kafka_broker(server.address) as broker, broker.subscribe(topic, "group"):
            assert await broker.publish(numbered(topic, 10), LONG) == [Published()] * 10
            server.freeze()
            sent = await asyncio.wait_for(broker.publish(numbered(topic, 10), SHORT), 5)
            not_sent = await asyncio.wait_for(broker.publish(numbered(topic, 10), SHORT), 5)
            leaving = asyncio.get_running_loop().time()
        left_after = asyncio.get_running_loop().time() - leaving
        server.thaw()

    assert [type(outcome) for outcome in sent] == [Unknown] * 10
    assert [type(outcome) for outcome in not_sent] == [Unreachable] * 10
    assert left_after < 15


async def test_a_thawed_broker_goes_on_and_repeats_only_what_was_unknown(
    private_server: Callable[[ServerKind], PrivateServer], topic: str
) -> None:
    server = private_server(ServerKind.KAFKA)
    unknown, unreachable = Message(topic, b"unknown", "a"), Message(topic, b"unreachable", "a")
    last = Message(topic, b"last", "a")
    async with kafka_broker(server.address) as broker, broker.subscribe(topic, "group") as deliveries:
        await broker.publish([Message(topic, b"first", "a")], LONG)
        server.freeze()
        outcomes = await broker.publish([unknown], SHORT) + await broker.publish([unreachable], SHORT)
        server.thaw()
        bodies = []
        async with asyncio.timeout(PATIENCE):
            while await broker.publish([last], LONG) != [Published()]:
                pass
            while b"last" not in bodies:
                delivery = await anext(deliveries)
                await delivery.ack()
                bodies.append(delivery.message.body)

    assert [type(outcome) for outcome in outcomes] == [Unknown, Unreachable]
    assert [body for body in bodies if body != b"unknown"] == [b"first", b"last"]


async def test_what_waited_behind_a_request_is_never_sent_once_it_was_given_up(
    private_server: Callable[[ServerKind], PrivateServer], topic: str
) -> None:
    """Unreachable is a proof: the driver's own sender would go on by itself when the broker answers again."""
    server = private_server(ServerKind.KAFKA)
    await make_topic(server.address, topic, partitions=2)
    config = parse_config(Component(name="pubsub", type="pubsub.kafka", metadata={"brokers": server.address}), "orders")
    producer = Producer(config)
    await producer.start()
    await producer.partitions(topic, Patience(PATIENCE, SystemClock()), at_least=0)
    async with kafka_broker(server.address, initialOffset="oldest") as broker:
        server.freeze()
        sendings = [producer.prepare([encode(0, Message(topic, b"%d" % n))], topic, n) for n in range(2)]

        async def the_first_is_sent() -> bool:
            return sendings[0].was_sent

        async def the_second_waits() -> bool:
            return TopicPartition(topic, 1) in producer._driver._message_accumulator._batches

        tasks = [asyncio.ensure_future(producer.send(sendings[0]))]
        await until(the_first_is_sent)
        tasks.append(asyncio.ensure_future(producer.send(sendings[1])))
        await until(the_second_waits)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        server.thaw()
        async with broker.subscribe(topic, "group") as deliveries, asyncio.timeout(PATIENCE):
            bodies = [(await anext(deliveries)).message.body]
            await broker.publish([Message(topic, b"last %d" % n, f"key-{n}") for n in range(10)], LONG)
            while len(bodies) < 11:
                bodies.append((await anext(deliveries)).message.body)
    await producer.close()

    assert [sending.was_sent for sending in sendings] == [True, False]
    assert bodies[0] == b"0"
    assert b"1" not in bodies


async def test_a_killed_broker_that_comes_back_has_all_that_was_published(
    private_server: Callable[[ServerKind], PrivateServer], topic: str
) -> None:
    """Publishing goes on as a relay would: what is not Published is published again, behind it the later ones."""
    server = private_server(ServerKind.KAFKA)
    pending = numbered(topic, 300, keys=3)
    published: list[Message] = []
    received: list[Message] = []
    async with asyncio.timeout(PATIENCE + 60):
        async with kafka_broker(server.address) as broker, broker.subscribe(topic, "group") as deliveries:
            while pending:
                outcomes = await broker.publish(pending[:20], SHORT)
                taken = {id(m) for m, outcome in zip(pending[:20], outcomes, strict=True) if outcome == Published()}
                published += [message for message in pending if id(message) in taken]
                pending = [message for message in pending if id(message) not in taken]
                if len(published) == 100:
                    server.kill()
                    assert Published() not in await broker.publish(pending[:20], SHORT)
                    await asyncio.to_thread(server.restart)
            while len({message.body for message in received}) < 300:
                delivery = await anext(deliveries)
                await delivery.ack()
                received.append(delivery.message)

    assert_all_in_order(received, numbered(topic, 300, keys=3))
