"""What a member of a group reads when the group is reassembled, or the topic is not what it was."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from functools import partial
from typing import Any
from uuid import uuid4

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import NewPartitions
from aiokafka.consumer.fetcher import Fetcher
from aiokafka.consumer.group_coordinator import GroupCoordinator
from aiokafka.structs import OffsetAndMetadata

from statecast.components.broker.broker import Delivery, Message, Published
from statecast.components.broker.kafka import subscription
from statecast.components.broker.kafka.config import InitialOffset
from statecast.components.broker.kafka.records import decode
from statecast.components.broker.kafka.starts import find_starts
from statecast.components.testing import deadline
from statecast.components.testing.broker import LONG, numbered
from statecast.runtime.server import PrivateServer, ServerKind
from tests.components.kafka import administrator, kafka_broker, make_no_topics_by_use, make_topic

PATIENCE = 30.0
OLDEST, NEWEST = 10, 200


class FakeConsumer:
    """A member of a group in its `generation`, which has committed `offsets` of topic `t` with its four partitions."""

    def __init__(self, offsets: dict[TopicPartition, OffsetAndMetadata], generation: int) -> None:
        self.generation = generation
        self.committed: dict[TopicPartition, OffsetAndMetadata] = {}
        self._coordinator = self
        self._offsets = offsets

    def subscription(self) -> set[str]:
        return {"t"}

    def partitions_for_topic(self, topic: str) -> set[int]:
        return {0, 1, 2, 3}

    async def fetch_committed_offsets(self, asked: list[TopicPartition]) -> dict[TopicPartition, OffsetAndMetadata]:
        return {where: offset for where, offset in self._offsets.items() if where in asked}

    async def beginning_offsets(self, asked: list[TopicPartition]) -> dict[TopicPartition, int]:
        return dict.fromkeys(asked, OLDEST)

    async def end_offsets(self, asked: list[TopicPartition]) -> dict[TopicPartition, int]:
        return dict.fromkeys(asked, NEWEST)

    async def commit(self, offsets: dict[TopicPartition, OffsetAndMetadata]) -> None:
        self.committed |= offsets


@pytest.fixture
def topic() -> str:
    return f"topic-{uuid4().hex[:12]}"


async def bodies_of(deliveries: AsyncIterator[Delivery], wanted: set[bytes]) -> set[bytes]:
    """Acknowledge deliveries until all that is wanted was there; tell what is missing when it does not come."""
    missing = set(wanted)
    try:
        async with asyncio.timeout(PATIENCE):
            while missing:
                delivery = await anext(deliveries)
                await delivery.ack()
                missing.discard(delivery.message.body)
    except TimeoutError:
        pass
    return wanted - missing


async def commit_as(address: str, group: str, offsets: dict[TopicPartition, int]) -> None:
    consumer = AIOKafkaConsumer(bootstrap_servers=address, group_id=group, enable_auto_commit=False)
    async with consumer:
        consumer.assign(list(offsets))
        await consumer.commit(offsets)


def be_slow_to_tell_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tell a member what its group has committed once the driver has read ahead for it; or after a second."""
    has_read = asyncio.Event()
    give, tell = Fetcher.fetched_records, GroupCoordinator.fetch_committed_offsets

    async def give_and_note(fetcher: Any, *args: Any, **options: Any) -> Any:
        records = await give(fetcher, *args, **options)
        if records:
            has_read.set()
        return records

    async def tell_late(coordinator: Any, partitions: Any) -> Any:
        has_read.clear()
        with suppress(TimeoutError):
            await asyncio.wait_for(has_read.wait(), 1)
        return await tell(coordinator, partitions)

    monkeypatch.setattr(Fetcher, "fetched_records", give_and_note)
    monkeypatch.setattr(GroupCoordinator, "fetch_committed_offsets", tell_late)


# The group is reassembled


async def test_what_the_driver_reads_while_partitions_are_taken_over_is_not_lost(
    kafka_bootstrap: str, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver reads from the moment of the assignment on, long before a member knows where it is to go on."""
    await make_topic(kafka_bootstrap, topic, partitions=6)
    messages = numbered(topic, 120, keys=40)
    wanted = {message.body for message in messages}

    async with kafka_broker(kafka_bootstrap) as broker, broker.subscribe(topic, "group") as staying:
        async with broker.subscribe(topic, "group"):
            await broker.publish(messages[:60], LONG)
            be_slow_to_tell_offsets(monkeypatch)
        await broker.publish(messages[60:], LONG)
        received = await bodies_of(staying, wanted)

    assert received == wanted


async def test_a_member_that_fails_to_take_its_partitions_over_joins_anew(
    kafka_bootstrap: str, topic: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The driver would log it, and read on for a member that knows of no partition."""
    tell = GroupCoordinator.fetch_committed_offsets

    async def fail_once(coordinator: Any, partitions: Any) -> Any:
        monkeypatch.setattr(GroupCoordinator, "fetch_committed_offsets", tell)
        raise ValueError("an answer that nobody expected")

    await make_topic(kafka_bootstrap, topic, partitions=2)
    async with kafka_broker(kafka_bootstrap) as broker, broker.subscribe(topic, "group") as one:
        monkeypatch.setattr(GroupCoordinator, "fetch_committed_offsets", fail_once)
        async with broker.subscribe(topic, "group") as other:
            await broker.publish(numbered(topic, 20), LONG)
            async with asyncio.timeout(PATIENCE):
                received = [(await anext(deliveries)).message.topic for deliveries in (one, other)]

    assert received == [topic, topic]
    assert "an answer that nobody expected" in caplog.text


async def test_what_a_member_failed_to_take_in_is_read_again(
    kafka_bootstrap: str, topic: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The driver gives each record once, until the member joins anew."""

    def fail_once(*record: Any) -> Message:
        monkeypatch.setattr(subscription, "decode", decode)
        raise ValueError("a record that nobody expected")

    messages = numbered(topic, 10, keys=1)
    async with kafka_broker(kafka_bootstrap) as broker, broker.subscribe(topic, "group") as deliveries:
        monkeypatch.setattr(subscription, "decode", fail_once)
        await broker.publish(messages, LONG)
        received = await bodies_of(deliveries, {message.body for message in messages})

    assert received == {message.body for message in messages}
    assert "a record that nobody expected" in caplog.text


async def test_a_member_leaves_its_group_even_when_the_closing_of_its_broker_is_cancelled(
    kafka_bootstrap: str, topic: str
) -> None:
    await make_topic(kafka_bootstrap, topic, partitions=2)
    messages = numbered(topic, 20, keys=20)
    wanted = {message.body for message in messages}
    broker = kafka_broker(kafka_bootstrap)
    await broker.__aenter__()

    async with broker.subscribe(topic, "group"):
        closing = asyncio.ensure_future(broker.__aexit__(None, None, None))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        closing.cancel()
        await asyncio.wait([closing])
    async with kafka_broker(kafka_bootstrap) as other, other.subscribe(topic, "group") as deliveries:
        await other.publish(messages, LONG)
        received = await bodies_of(deliveries, wanted)

    assert closing.cancelled()
    assert received == wanted


# The topic is not what it was


async def test_a_partition_that_was_added_is_read_from_its_beginning(kafka_bootstrap: str, topic: str) -> None:
    """A group begins with the newest, and has begun: what was published to the new partition is all new to it."""
    await make_topic(kafka_bootstrap, topic)
    messages = numbered(topic, 40, keys=40)
    async with kafka_broker(kafka_bootstrap) as broker, broker.subscribe(topic, "group"):
        pass

    async with administrator(kafka_bootstrap) as client:
        await client.create_partitions({topic: NewPartitions(4)})
    async with kafka_broker(kafka_bootstrap) as broker:
        await broker.publish(messages, LONG)
        async with broker.subscribe(topic, "group") as deliveries:
            received = await bodies_of(deliveries, {message.body for message in messages})

    assert received == {message.body for message in messages}


@pytest.mark.parametrize(
    ("committed", "begins_with_the_oldest"),
    [
        ([], False),
        ([(100, "begun in generation 5")], False),
        ([(100, "begun in generation 4")], True),
        ([(9, "")], True),
    ],
    ids=["a new group", "another first member was quicker", "a group that went on", "another program's group"],
)
async def test_only_a_group_that_was_there_before_begins_a_partition_with_the_oldest(
    committed: list[tuple[int, str]], begins_with_the_oldest: bool
) -> None:
    offsets = {TopicPartition("t", number): OffsetAndMetadata(*each) for number, each in enumerate(committed)}
    consumer = FakeConsumer(offsets, generation=5)
    mine = TopicPartition("t", 3)

    starts = await find_starts(consumer, [mine], InitialOffset.NEWEST)

    expected = OffsetAndMetadata(OLDEST if begins_with_the_oldest else NEWEST, "begun in generation 5")
    assert starts == {mine: expected}
    assert consumer.committed == {mine: expected}


async def test_a_group_that_is_ahead_of_the_log_goes_back_and_says_so(
    kafka_bootstrap: str, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As after a truncation: the group has committed more than there is."""
    await make_topic(kafka_bootstrap, topic)
    await commit_as(kafka_bootstrap, "group", {TopicPartition(topic, 0): 1_000})

    async with kafka_broker(kafka_bootstrap) as broker:
        async with broker.subscribe(topic, "group") as deliveries:
            await broker.publish(numbered(topic, 5), LONG)
            received = await bodies_of(deliveries, {b"0", b"1", b"2", b"3", b"4"})
        async with broker.subscribe(topic, "group") as deliveries:
            await broker.publish([Message(topic, b"next")], LONG)
            async with asyncio.timeout(PATIENCE):
                then = (await anext(deliveries)).message.body

    assert received == {b"0", b"1", b"2", b"3", b"4"}
    assert then == b"next"
    assert "before offset 1000" in caplog.text


async def test_a_member_goes_on_with_a_topic_that_is_made_anew(
    private_server: Callable[[ServerKind], PrivateServer], topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server forgets what the group has committed, and the driver asks late for what there is: it is behind."""

    async def has_no_partitions() -> bool:
        return not deliveries._partitions  # type: ignore[attr-defined]  # what the group dealt out shows nowhere else

    make_no_topics_by_use(monkeypatch)
    monkeypatch.setattr(subscription, "AIOKafkaConsumer", partial(AIOKafkaConsumer, metadata_max_age_ms=3_000))
    server = private_server(ServerKind.KAFKA)
    await make_topic(server.address, topic)
    messages = numbered(topic, 5)
    async with kafka_broker(server.address) as broker, broker.subscribe(topic, "group") as deliveries:
        await broker.publish([Message(topic, b"old")], LONG)
        await bodies_of(deliveries, {b"old"})

        async with administrator(server.address) as client:
            await client.delete_topics([topic])
        await deadline.until(has_no_partitions)
        await make_topic(server.address, topic)
        async with kafka_broker(server.address) as other:
            outcomes = await other.publish(messages, LONG)
        received = await bodies_of(deliveries, {message.body for message in messages})

    assert outcomes == [Published()] * 5
    assert received == {message.body for message in messages}
