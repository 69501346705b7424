"""What Kafka says of users, passwords and rights, and what becomes of it."""

import asyncio
import json
from collections.abc import Callable, Iterator
from datetime import timedelta
from uuid import uuid4

import pytest

from statecast import Component, RelayOptions, Runtime, RuntimeOptions
from statecast.clock import SystemClock
from statecast.components.broker.broker import Message, Published, Refused, Unreachable
from statecast.components.broker.kafka.broker import KafkaBroker
from statecast.components.testing import deadline
from statecast.components.testing.broker import LONG, numbered
from statecast.outbox.deferred import RetryOptions
from statecast.outbox.progress import BackOff
from statecast.runtime.server import ServerKind, ServerMissing, Variant
from statecast.runtime.server_installations import find_installation
from tests.components.going_without import go_without
from tests.components.guarded_kafka import PASSWORDS, GuardedKafka, Resource, Right

PATIENCE = 30.0
MECHANISMS = ["PLAIN", "SHA-256", "SHA-512"]
QUICK = RelayOptions(retry=RetryOptions(back_off=BackOff(timedelta(milliseconds=20), timedelta(milliseconds=200))))


@pytest.fixture(scope="module")
def kafka() -> Iterator[GuardedKafka]:
    try:
        installation = find_installation(ServerKind.KAFKA, Variant.CURRENT)
    except ServerMissing as missing:
        go_without(missing)
    server = GuardedKafka(installation)
    yield server
    server.close()


@pytest.fixture
async def allowed(kafka: GuardedKafka) -> str:
    """A topic that alice may write and read, as any group of the topic's name."""
    topic = f"allowed-{uuid4().hex[:12]}"
    await kafka.make_topic(topic)
    await kafka.grant("alice", Right.WRITE, topic)
    await kafka.grant("alice", Right.READ, topic)
    await kafka.grant("alice", Right.READ, topic, Resource.GROUP)
    return topic


@pytest.fixture(params=["hidden", "visible"])
async def forbidden(kafka: GuardedKafka, request: pytest.FixtureRequest) -> str:
    """A topic that alice may not write. Of a hidden one she gets no metadata either, and nothing is sent to it."""
    topic = f"forbidden-{uuid4().hex[:12]}"
    await kafka.make_topic(topic)
    if request.param == "visible":
        await kafka.grant("alice", Right.DESCRIBE, topic)
    return topic


def component(kafka: GuardedKafka, user: str, **metadata: str) -> Component:
    fields = {"brokers": kafka.users, "authType": "password", "disableTls": "true", "heartbeatInterval": "300ms"}
    fields |= {"saslUsername": user, "saslPassword": PASSWORDS[user], "initialOffset": "oldest"}
    return Component("bus", "pubsub.kafka", metadata=fields | metadata)


def broker_of(kafka: GuardedKafka, user: str, **metadata: str) -> KafkaBroker:
    return KafkaBroker(component(kafka, user, **metadata), app_id="orders", clock=SystemClock())


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """List what statecast logged, without the driver's own words."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("statecast.")]


# Who it is


@pytest.mark.parametrize("mechanism", MECHANISMS)
async def test_who_has_the_password_publishes_and_receives(kafka: GuardedKafka, allowed: str, mechanism: str) -> None:
    async with asyncio.timeout(PATIENCE), broker_of(kafka, "alice", saslMechanism=mechanism) as broker:
        outcomes = await broker.publish(numbered(allowed, 3, keys=1), LONG)
        async with broker.subscribe(allowed, allowed) as deliveries:
            bodies = [(await anext(deliveries)).message.body for _ in range(3)]

    assert outcomes == [Published()] * 3
    assert bodies == [b"0", b"1", b"2"]


@pytest.mark.parametrize("mechanism", MECHANISMS)
async def test_a_wrong_password_is_told_at_once(kafka: GuardedKafka, allowed: str, mechanism: str) -> None:
    async with broker_of(kafka, "alice", saslMechanism=mechanism, saslPassword="wrong") as broker:
        async with asyncio.timeout(LONG.total_seconds() / 4):
            (outcome,) = await broker.publish([Message(allowed, b"1")], LONG)

    assert isinstance(outcome, Unreachable)
    assert "Authentication failed" in outcome.reason
    assert "'alice'" in outcome.reason
    assert "wrong" not in outcome.reason


async def test_a_user_whom_the_server_knows_by_another_mechanism_is_told_by_which(
    kafka: GuardedKafka, allowed: str
) -> None:
    async with broker_of(kafka, "stranger", saslMechanism="SHA-512") as broker:
        (outcome,) = await broker.publish([Message(allowed, b"1")], LONG)

    assert isinstance(outcome, Unreachable)
    assert "'stranger'" in outcome.reason
    assert "SCRAM-SHA-512" in outcome.reason


async def test_a_subscription_with_a_wrong_password_tells_why_it_does_not_stand(
    kafka: GuardedKafka, allowed: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def is_told() -> bool:
        return any("Authentication failed" in text and allowed in text for text in told(caplog))

    async def subscribe(broker: KafkaBroker) -> None:
        async with broker.subscribe(allowed, allowed):
            raise AssertionError("the subscription stands")

    async with broker_of(kafka, "alice", saslPassword="wrong") as broker:
        subscribing = asyncio.ensure_future(subscribe(broker))
        await deadline.until(is_told)
        subscribing.cancel()
        await asyncio.wait([subscribing])

    assert subscribing.cancelled()


# What they may


async def test_a_topic_that_may_not_be_written_is_refused_and_no_other(
    kafka: GuardedKafka, allowed: str, forbidden: str
) -> None:
    messages = [Message(topic, b"%d" % n, f"key-{n % 3}") for n in range(10) for topic in (allowed, forbidden)]

    async with broker_of(kafka, "alice") as broker:
        outcomes = await broker.publish(messages, LONG) + await broker.publish(messages, LONG)

    assert outcomes[0::2] == [Published()] * 20
    for refused in outcomes[1::2]:
        assert isinstance(refused, Refused)
        assert refused.is_about_topic
        assert forbidden in refused.reason
        assert "'alice'" in refused.reason
        assert "TOPIC_AUTHORIZATION_FAILED" in refused.reason


async def test_who_may_write_no_topic_at_all_is_refused_until_the_right_is_there(kafka: GuardedKafka) -> None:
    """Kafka gives such a user not even a producer id."""
    topic = f"later-{uuid4().hex[:12]}"
    await kafka.make_topic(topic)

    async with broker_of(kafka, "stranger") as broker:
        (refused,) = await broker.publish([Message(topic, b"1")], LONG)
        await kafka.grant("stranger", Right.WRITE, topic)
        (published,) = await broker.publish([Message(topic, b"1")], LONG)
    await kafka.withdraw("stranger", Right.WRITE, topic)

    assert isinstance(refused, Refused)
    assert refused.is_about_topic
    assert "'stranger'" in refused.reason
    assert published == Published()


@pytest.mark.parametrize("missing", Resource)
async def test_a_subscription_without_a_right_stands_once_it_is_there(
    kafka: GuardedKafka, allowed: str, missing: Resource, caplog: pytest.LogCaptureFixture
) -> None:
    async def is_told() -> bool:
        return any("AuthorizationFailed" in text for text in told(caplog))

    async def first(broker: KafkaBroker) -> Message:
        async with broker.subscribe(allowed, allowed) as deliveries:
            return (await anext(deliveries)).message

    async with broker_of(kafka, "alice") as broker:
        await broker.publish([Message(allowed, b"1")], LONG)
        await kafka.withdraw("alice", Right.READ, allowed, missing)
        receiving = asyncio.ensure_future(first(broker))
        await deadline.until(is_told)
        await kafka.grant("alice", Right.READ, allowed, missing)
        message = await asyncio.wait_for(receiving, PATIENCE)

    assert message.body == b"1"
    assert len(told(caplog)) == 1


@pytest.mark.parametrize("missing", Resource)
async def test_a_subscription_goes_on_when_a_right_is_withdrawn_and_given_again(
    kafka: GuardedKafka, allowed: str, missing: Resource, caplog: pytest.LogCaptureFixture
) -> None:
    async def is_told() -> bool:
        return all(any(words in text for text in told(caplog)) for words in ("is not read", "is not committed"))

    async with (
        asyncio.timeout(PATIENCE),
        broker_of(kafka, "alice") as broker,
        broker.subscribe(allowed, allowed) as deliveries,
    ):
        await broker.publish([Message(allowed, b"1")], LONG)
        delivery = await anext(deliveries)
        await kafka.withdraw("alice", Right.READ, allowed, missing)
        await delivery.ack()
        await deadline.until(is_told)
        await broker.publish([Message(allowed, b"2")], LONG)
        await kafka.grant("alice", Right.READ, allowed, missing)
        body = b""
        while body != b"2":
            body = (await anext(deliveries)).message.body

    assert len(told(caplog)) == len(set(told(caplog)))
    assert all("AuthorizationFailed" in text for text in told(caplog))


async def test_a_right_that_is_withdrawn_and_given_again_is_noticed(kafka: GuardedKafka, allowed: str) -> None:
    async with broker_of(kafka, "alice") as broker:
        before = await broker.publish([Message(allowed, b"1")], LONG)
        await kafka.withdraw("alice", Right.WRITE, allowed)
        without = await broker.publish([Message(allowed, b"2")], LONG)
        await kafka.grant("alice", Right.WRITE, allowed)
        after = await broker.publish([Message(allowed, b"3")], LONG)

    assert before + after == [Published()] * 2
    assert isinstance(without[0], Refused)
    assert without[0].is_about_topic


# The relay


async def test_events_for_a_topic_without_the_right_wait_for_it_and_arrive_in_order(
    kafka: GuardedKafka, allowed: str, forbidden: str, caplog: pytest.LogCaptureFixture
) -> None:
    outbox = {"outboxPublishPubsub": "bus", "outboxPublishTopic": forbidden, "outboxMaxAttempts": "1"}
    components = [Component("store", "state.in-memory", metadata=outbox), component(kafka, "alice")]
    options = RuntimeOptions(relay=QUICK)
    async with Runtime.open(components, app_id="shop", environment={}, options=options) as runtime:
        counts = runtime.relay_counts("store")
        assert counts is not None

        async def is_aside() -> bool:
            return bool(await runtime.outbox_deferred("store"))

        await commit_orders(runtime, range(40), also=allowed)
        await until(lambda: counts.published == 40)
        await commit_orders(runtime, range(40, 60), also=allowed)
        await until(lambda: counts.published == 60)
        await deadline.until(is_aside)
        aside = await runtime.outbox_deferred("store")
        await kafka.grant("alice", Right.WRITE, forbidden)
        await until(lambda: counts.published == 120)
        await commit_orders(runtime, range(60, 64), also=allowed)
        await until(lambda: counts.published == 128)

    alarms = [text for text in told(caplog) if "takes nothing" in text]
    arrived = [json.loads(body)["data"] for body in await kafka.read(forbidden, 64)]
    assert len(alarms) == 1
    assert repr(forbidden) in alarms[0]
    assert (counts.deferred, counts.parked) == (0, 0)
    assert {(status.queue.topic, status.attempts, status.is_parked) for status in aside} == {(forbidden, 0, False)}
    for key in range(4):
        assert [number for number in arrived if number % 4 == key] == list(range(key, 64, 4))


async def until(fact: Callable[[], bool]) -> None:
    async def holds() -> bool:
        return fact()

    await deadline.until(holds)


async def commit_orders(runtime: Runtime, numbers: range, *, also: str) -> None:
    """Write each number to one of four keys, which is an event; with it goes an event for the topic `also`."""
    for number in numbers:
        async with runtime.state("store").transaction() as transaction:
            transaction.upsert(f"{number % 4}", number)
            transaction.publish(number, topic=also)
