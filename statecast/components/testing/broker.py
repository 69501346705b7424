"""What every message broker must do, as tests that anyone who writes one can run on it."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import ClassVar
from uuid import uuid4

import pytest

from statecast.components.broker.broker import (
    Broker,
    Delivery,
    Message,
    Outcome,
    Published,
    Refused,
    Settlement,
    Unknown,
    Unreachable,
)

LONG = timedelta(seconds=20)
"""More than a publish on a working server takes, however busy the machine is."""

LATENESS = timedelta(seconds=2)
"""How much later than its timeout a publish returns at most, however busy the machine is."""


@pytest.mark.asyncio
class BrokerContract:
    """Subclass it in a test file, and override `make_broker`:

        class TestMyBroker(BrokerContract):
            @pytest.fixture
            def make_broker(self, my_server: str) -> Callable[[], Broker]:
                return lambda: MyBroker(Component(...), app_id="orders", clock=SystemClock())

    `make_broker` returns a new, unopened broker each time it is called; all of them are on the same server, and no
    other test's messages reach them. Topics are made up by the `topic` fixture and must come into being by use. Only
    pytest with pytest-asyncio is needed. What brokers may differ in is said by the attributes and the fixtures
    `unsendable` and `unknown_topic`, which a subclass overrides.
    """

    carries_key: ClassVar[bool] = True
    """A delivered message has the key that it was published with."""

    carries_metadata: ClassVar[bool] = True
    """A delivered message has the metadata that it was published with."""

    counts_attempts: ClassVar[bool] = True
    """A message that comes again after a nack says so in `attempt`."""

    stores_messages: ClassVar[bool] = True
    """A message outlives its publisher; a group that was once there gets what is published while it is away."""

    patience: ClassVar[timedelta] = timedelta(seconds=30)
    """How long a test waits for what must happen before it fails."""

    @pytest.fixture
    def make_broker(self) -> Callable[[], Broker]:
        raise NotImplementedError("override make_broker: see BrokerContract")

    @pytest.fixture
    def topic(self) -> str:
        return f"topic-{uuid4().hex[:12]}"

    @pytest.fixture
    def unsendable(self, topic: str) -> Message | None:
        """A message to `topic` with the key `refused` that the broker says no to, for what is in it; None: no such."""
        return None

    @pytest.fixture
    def unknown_topic(self) -> str | None:
        """A topic to which the broker refuses every message; None where there is no such."""
        return None

    # Publishing

    async def test_publishing_nothing_has_no_outcomes(self, make_broker: Callable[[], Broker]) -> None:
        async with make_broker() as broker:
            assert await broker.publish([], LONG) == []

    async def test_there_is_one_outcome_for_each_message(self, make_broker: Callable[[], Broker], topic: str) -> None:
        messages = numbered(topic, 7)

        async with make_broker() as broker:
            outcomes = await broker.publish(messages, LONG)

        assert outcomes == [Published()] * 7

    async def test_a_publish_may_name_several_topics(self, make_broker: Callable[[], Broker], topic: str) -> None:
        messages = [Message(f"{topic}-{n % 3}", b"%d" % n) for n in range(9)]

        async with (
            make_broker() as broker,
            broker.subscribe(f"{topic}-1", "group") as deliveries,
        ):
            outcomes = await broker.publish(messages, LONG)
            received = await self.receive(deliveries, 3)

        assert outcomes == [Published()] * 9
        assert sorted(message.body for message in received) == [b"1", b"4", b"7"]
        assert {message.topic for message in received} == {f"{topic}-1"}

    async def test_five_thousand_messages_go_in_one_publish(
        self, make_broker: Callable[[], Broker], topic: str
    ) -> None:
        messages = numbered(topic, 5_000, keys=50)

        async with make_broker() as broker, broker.subscribe(topic, "group") as deliveries:
            outcomes = await broker.publish(messages, LONG)
            received = await self.receive(deliveries, 5_000)

        assert outcomes == [Published()] * 5_000
        assert_all_in_order(received, messages)

    async def test_concurrent_publishes_do_not_mix_up_their_outcomes_or_lose_messages(
        self, make_broker: Callable[[], Broker], topic: str
    ) -> None:
        calls = [[Message(topic, b"%d/%d" % (call, n), key=f"key-{call}") for n in range(25)] for call in range(20)]

        async with make_broker() as broker, broker.subscribe(topic, "group") as deliveries:
            outcomes = await asyncio.gather(*(broker.publish(messages, LONG) for messages in calls))
            received = await self.receive(deliveries, 500)

        assert outcomes == [[Published()] * 25] * 20
        assert_all_in_order(received, [message for messages in calls for message in messages])

    async def test_a_publish_returns_within_its_time_and_its_outcomes_are_true(
        self, make_broker: Callable[[], Broker], topic: str
    ) -> None:
        """Whatever was cut short: Published is there, Unreachable never is, and no key has a gap."""
        milliseconds = (0, 0.01, 0.1, 0.5, 1, 2, 5, 10, 20, 50)
        last = Message(topic, b"last", key="last")

        async with make_broker() as broker, broker.subscribe(topic, "group") as deliveries:
            published: set[bytes] = set()
            not_published: set[bytes] = set()
            for time in milliseconds:
                messages = [Message(topic, b"%g/%d" % (time, n), key=f"{time}-{n % 5}") for n in range(200)]
                timeout = timedelta(milliseconds=time)
                async with asyncio.timeout((timeout + LATENESS).total_seconds()):
                    outcomes = await broker.publish(messages, timeout)
                assert len(outcomes) == len(messages)
                assert_no_gaps(messages, outcomes)
                published |= bodies(messages, outcomes, Published)
                not_published |= bodies(messages, outcomes, Unreachable) | bodies(messages, outcomes, Refused)
            assert await self.publish_until_published(broker, last) == Published()
            received = await self.receive_until(deliveries, lambda seen: {*published, b"last"} <= seen)

        assert not received & not_published

    async def test_a_publish_that_is_cancelled_leaves_a_broker_that_works(
        self, make_broker: Callable[[], Broker], topic: str
    ) -> None:
        async with make_broker() as broker, broker.subscribe(topic, "group") as deliveries:
            for _ in range(5):
                publishing = asyncio.ensure_future(broker.publish(numbered(topic, 100), LONG))
                await asyncio.sleep(0)
                publishing.cancel()
                await asyncio.wait([publishing])
            outcome = await self.publish_until_published(broker, Message(topic, b"last", key="last"))
            received = await self.receive_until(deliveries, lambda seen: b"last" in seen)

        assert outcome == Published()
        assert b"last" in received

    async def test_what_is_published_before_opening_or_after_closing_is_unreachable(
        self, make_broker: Callable[[], Broker], topic: str
    ) -> None:
        broker = make_broker()
        before = await broker.publish(numbered(topic, 2), LONG)
        async with broker:
            pass

        after = await broker.publish(numbered(topic, 2), LONG)

        assert [type(outcome) for outcome in (*before, *after)] == [Unreachable] * 4

    async def test_a_refused_message_holds_back_its_key_alone(
        self, make_broker: Callable[[], Broker], topic: str, unsendable: Message | None
    ) -> None:
        if unsendable is None:
            pytest.skip("this broker takes every message")
        before, behind, again = (Message(topic, body, key=unsendable.key) for body in (b"before", b"behind", b"again"))
        others = [Message(topic, b"%d" % n, key=f"key-{n % 20}") for n in range(200)]

        async with make_broker() as broker, broker.subscribe(topic, "group") as deliveries:
            outcomes = await broker.publish([*others[:100], before, unsendable, behind, *others[100:]], LONG)
            retried = await broker.publish([behind, again], LONG)
            received = await self.receive(deliveries, 203)

        assert outcomes[:101] == [Published()] * 101
        assert isinstance(refused := outcomes[101], Refused)
        assert not refused.is_about_topic
        assert isinstance(outcomes[102], Unreachable)
        assert outcomes[103:] == [Published()] * 100
        assert retried == [Published()] * 2
        assert_all_in_order(received, [*others, before, behind, again])

    async def test_a_refused_topic_is_refused_as_a_whole_and_no_other(
        self, make_broker: Callable[[], Broker], topic: str, unknown_topic: str | None
    ) -> None:
        if unknown_topic is None:
            pytest.skip("this broker takes every topic")
        messages = [Message(topic if n % 2 else unknown_topic, b"%d" % n, key=f"key-{n}") for n in range(10)]

        async with make_broker() as broker:
            outcomes = await broker.publish(messages, LONG)

        assert outcomes[1::2] == [Published()] * 5
        assert [isinstance(outcome, Refused) and outcome.is_about_topic for outcome in outcomes[0::2]] == [True] * 5

    async def test_a_topic_without_subscribers_takes_messages(
        self, make_broker: Callable[[], Broker], topic: str
    ) -> None:
        async with make_broker() as broker:
            stored = await broker.publish(numbered(topic, 3), LONG, Settlement.STORED)
            handled = await broker.publish(numbered(topic, 3), LONG, Settlement.HANDLED)

        assert stored + handled == [Published()] * 6

    async def test_a_publish_that_waits_for_handling_returns_when_it_should(
        self, make_broker: Callable[[], Broker], topic: str
    ) -> None:
        """A broker that stores returns at once; one that does not returns once the message is settled."""
        async with make_broker() as broker, broker.subscribe(topic, "group") as deliveries:
            publishing = asyncio.ensure_future(broker.publish(numbered(topic, 1), LONG, Settlement.HANDLED))
            delivery = await self.next_delivery(deliveries)
            if self.stores_messages:
                before = await publishing
                await delivery.ack()
            else:
                await asyncio.wait([publishing], timeout=0.05)
                assert not publishing.done()
                await delivery.ack()
                before = await publishing

        assert before == [Published()]

    # Receiving

    async def test_a_message_arrives_as_it_was_sent(self, make_broker: Callable[[], Broker], topic: str) -> None:
        sent = Message(topic, b'{"total": 250}', key="order-1", metadata={"tenant": "north", "note": "æ / ☃"})

        async with make_broker() as broker, broker.subscribe(topic, "group") as deliveries:
            await broker.publish([sent], LONG)
            delivery = await self.next_delivery(deliveries)
            await delivery.ack()

        assert delivery.message.topic == topic
        assert delivery.message.body == sent.body
        assert delivery.attempt == 1
        if self.carries_key:
            assert delivery.message.key == sent.key
        if self.carries_metadata:
            assert {name: delivery.message.metadata.get(name) for name in sent.metadata} == sent.metadata

    @pytest.mark.parametrize(
        "body",
        [b"", b"\x00", bytes(range(256)), b"\xff\xfe", b"null", b"x" * 256 * 1024],
        ids=["empty", "zero byte", "every byte", "not UTF-8", "null", "256 KiB"],
    )
    async def test_a_body_is_any_bytes(self, make_broker: Callable[[], Broker], topic: str, body: bytes) -> None:
        async with make_broker() as broker, broker.subscribe(topic, "group") as deliveries:
            outcomes = await broker.publish([Message(topic, body)], LONG)
            [received] = await self.receive(deliveries, 1)

        assert outcomes == [Published()]
        assert received.body == body

    async def test_messages_of_one_key_arrive_in_order(self, make_broker: Callable[[], Broker], topic: str) -> None:
        messages = numbered(topic, 500, keys=10)

        async with make_broker() as broker, broker.subscribe(topic, "group") as deliveries:
            for start in range(0, 500, 50):
                await broker.publish(messages[start : start + 50], LONG)
            received = await self.receive(deliveries, 500)

        assert_all_in_order(received, messages)

    async def test_what_one_process_publishes_another_receives(
        self, make_broker: Callable[[], Broker], topic: str
    ) -> None:
        if not self.stores_messages:
            pytest.skip("this broker lives in one process")
        messages = numbered(topic, 10)

        async with (
            make_broker() as publisher,
            make_broker() as subscriber,
            subscriber.subscribe(topic, "group") as deliveries,
        ):
            await publisher.publish(messages, LONG)
            received = await self.receive(deliveries, 10)

        assert {message.body for message in received} == {message.body for message in messages}

    async def test_topics_do_not_mix(self, make_broker: Callable[[], Broker], topic: str) -> None:
        async with (
            make_broker() as broker,
            broker.subscribe(f"{topic}-a", "group") as of_a,
            broker.subscribe(f"{topic}-b", "group") as of_b,
        ):
            await broker.publish(
                [Message(f"{topic}-{name[0]}", name.encode()) for name in ("a1", "b1", "a2", "b2")], LONG
            )
            received_a = await self.receive(of_a, 2)
            received_b = await self.receive(of_b, 2)

        assert {message.body for message in received_a} == {b"a1", b"a2"}
        assert {message.body for message in received_b} == {b"b1", b"b2"}

    async def test_each_group_receives_everything(self, make_broker: Callable[[], Broker], topic: str) -> None:
        messages = numbered(topic, 100, keys=10)

        async with (
            make_broker() as broker,
            broker.subscribe(topic, "billing") as billing,
            broker.subscribe(topic, "shipping") as shipping,
        ):
            await broker.publish(messages, LONG)
            billed = await self.receive(billing, 100)
            shipped = await self.receive(shipping, 100)

        assert_all_in_order(billed, messages)
        assert_all_in_order(shipped, messages)

    async def test_members_of_a_group_share_the_messages(self, make_broker: Callable[[], Broker], topic: str) -> None:
        messages = numbered(topic, 200, keys=50)
        wanted = {message.body for message in messages}
        shares: list[set[bytes]] = [set(), set()]

        async with (
            make_broker() as broker,
            broker.subscribe(topic, "group") as one,
            broker.subscribe(topic, "group") as other,
            asyncio.timeout(self.patience.total_seconds()),
            asyncio.TaskGroup() as tasks,
        ):
            readers = [
                tasks.create_task(acknowledge_into(share, deliveries))
                for share, deliveries in zip(shares, (one, other), strict=True)
            ]
            await broker.publish(messages, LONG)
            await until(lambda: shares[0] | shares[1] == wanted)
            for reader in readers:
                reader.cancel()

        assert shares[0] | shares[1] == wanted

    async def test_a_member_that_leaves_gives_back_what_it_has_not_settled(
        self, make_broker: Callable[[], Broker], topic: str
    ) -> None:
        messages = numbered(topic, 40, keys=8)

        async with make_broker() as broker, AsyncExitStack() as one, AsyncExitStack() as other:
            members = [(stack, await stack.enter_async_context(broker.subscribe(topic, "g"))) for stack in (one, other)]
            await broker.publish(messages, LONG)
            async with asyncio.timeout(self.patience.total_seconds()):
                held = await first_deliveries([deliveries for _, deliveries in members])
            (leaving, _), (_, staying) = members if held[0] is not None else reversed(members)
            if held[0] is not None and held[1] is not None:
                await held[1].nack()
            await leaving.aclose()
            handled = await self.receive_until(staying, lambda seen: len(seen) == 40)

        assert handled == {message.body for message in messages}

    async def test_what_was_not_settled_goes_to_the_next_member(
        self, make_broker: Callable[[], Broker], topic: str
    ) -> None:
        messages = numbered(topic, 10, keys=1)

        async with make_broker() as broker:
            async with broker.subscribe(topic, "group") as deliveries:
                await broker.publish(messages, LONG)
                await (await self.next_delivery(deliveries)).ack()
                unsettled = await self.next_delivery(deliveries)
            async with broker.subscribe(topic, "group") as deliveries:
                received = await self.receive(deliveries, 9)

        assert unsettled.message.body == messages[1].body
        assert {message.body for message in received} == {message.body for message in messages[1:]}

    async def test_what_was_acknowledged_does_not_come_again(
        self, make_broker: Callable[[], Broker], topic: str
    ) -> None:
        async with make_broker() as broker:
            async with broker.subscribe(topic, "group") as deliveries:
                await broker.publish(numbered(topic, 50, keys=5), LONG)
                await self.receive(deliveries, 50)
            async with broker.subscribe(topic, "group") as deliveries:
                await broker.publish([Message(topic, b"next", key="key-0")], LONG)
                received = await self.receive_until(deliveries, lambda seen: b"next" in seen)

        assert received == {b"next"}

    async def test_a_nacked_message_comes_again(self, make_broker: Callable[[], Broker], topic: str) -> None:
        async with make_broker() as broker, broker.subscribe(topic, "group") as deliveries:
            await broker.publish([Message(topic, b"one", key="key")], LONG)
            first = await self.next_delivery(deliveries)
            await first.nack()
            second = await self.next_delivery(deliveries)
            await second.ack()

        assert first.message.body == second.message.body == b"one"
        assert first.attempt == 1
        if self.counts_attempts:
            assert second.attempt == 2

    async def test_a_nack_loses_none_of_the_others(self, make_broker: Callable[[], Broker], topic: str) -> None:
        messages = numbered(topic, 30, keys=3)
        refused: set[bytes] = set()
        handled: set[bytes] = set()

        async with make_broker() as broker, broker.subscribe(topic, "group") as deliveries:
            await broker.publish(messages, LONG)
            async with asyncio.timeout(self.patience.total_seconds()):
                while len(handled) < 30:
                    delivery = await anext(deliveries)
                    body = delivery.message.body
                    if body not in refused and body not in handled and int(body) % 7 == 0:
                        refused.add(body)
                        await delivery.nack()
                        continue
                    handled.add(body)
                    await delivery.ack()

        assert handled == {message.body for message in messages}
        assert refused == {b"0", b"7", b"14", b"21", b"28"}

    async def test_a_delivery_is_settled_once(self, make_broker: Callable[[], Broker], topic: str) -> None:
        """Settling again, or after the subscription was left, is no error and changes nothing."""
        async with make_broker() as broker:
            async with broker.subscribe(topic, "group") as deliveries:
                await broker.publish(numbered(topic, 2, keys=1), LONG)
                settled = await self.next_delivery(deliveries)
                await settled.ack()
                await settled.nack()
                unsettled = await self.next_delivery(deliveries)
            await settled.ack()
            await unsettled.ack()
            async with broker.subscribe(topic, "group") as deliveries:
                [received] = await self.receive(deliveries, 1)

        assert received.body == unsettled.message.body

    async def test_a_cancelled_wait_for_the_next_message_loses_nothing(
        self, make_broker: Callable[[], Broker], topic: str
    ) -> None:
        messages = numbered(topic, 100, keys=1)
        received: list[Message] = []

        async with make_broker() as broker, broker.subscribe(topic, "group") as deliveries:
            publishing = asyncio.ensure_future(publish_slowly(broker, messages))
            async with asyncio.timeout(self.patience.total_seconds()):
                while len(received) < 100:
                    waiting = asyncio.ensure_future(anext(deliveries))
                    await asyncio.wait([waiting], timeout=0.001)
                    if waiting.done() or not waiting.cancel():
                        delivery = waiting.result()
                        received.append(delivery.message)
                        await delivery.ack()
                        continue
                    await asyncio.wait([waiting])
                    assert waiting.cancelled()
                await publishing

        assert [message.body for message in received] == [message.body for message in messages]

    async def test_a_group_gets_what_was_published_while_it_was_away(
        self, make_broker: Callable[[], Broker], topic: str
    ) -> None:
        if not self.stores_messages:
            pytest.skip("this broker stores nothing")
        messages = numbered(topic, 20, keys=4)

        async with make_broker() as broker:
            async with broker.subscribe(topic, "group"):
                pass
            await broker.publish(messages, LONG)
        async with make_broker() as broker, broker.subscribe(topic, "group") as deliveries:
            received = await self.receive(deliveries, 20)

        assert_all_in_order(received, messages)

    # Closing

    async def test_closing_the_broker_ends_its_subscriptions(
        self, make_broker: Callable[[], Broker], topic: str
    ) -> None:
        broker = make_broker()
        entered = asyncio.Event()

        async def read_to_the_end() -> int:
            async with broker.subscribe(topic, "group") as deliveries:
                entered.set()
                return len([delivery async for delivery in deliveries])

        async with asyncio.timeout(self.patience.total_seconds()):
            async with broker:
                reading = asyncio.ensure_future(read_to_the_end())
                await entered.wait()
            received = await reading

        assert received == 0

    async def test_closing_while_publishing_gives_outcomes(self, make_broker: Callable[[], Broker], topic: str) -> None:
        async with asyncio.timeout(self.patience.total_seconds()):
            async with make_broker() as broker:
                publishing = asyncio.ensure_future(broker.publish(numbered(topic, 500), timedelta(seconds=5)))
                await asyncio.sleep(0)
            outcomes = await publishing

        assert len(outcomes) == 500
        assert {type(outcome) for outcome in outcomes} <= {Published, Unreachable, Unknown}

    # What the tests are made of

    async def next_delivery(self, deliveries: AsyncIterator[Delivery]) -> Delivery:
        async with asyncio.timeout(self.patience.total_seconds()):
            return await anext(deliveries)

    async def receive(self, deliveries: AsyncIterator[Delivery], count: int) -> list[Message]:
        """Acknowledge deliveries until there were `count` different bodies; return the messages as they came."""
        received: list[Message] = []
        seen: set[bytes] = set()
        async with asyncio.timeout(self.patience.total_seconds()):
            while len(seen) < count:
                delivery = await anext(deliveries)
                await delivery.ack()
                received.append(delivery.message)
                seen.add(delivery.message.body)
        return received

    async def receive_until(
        self, deliveries: AsyncIterator[Delivery], is_enough: Callable[[set[bytes]], bool]
    ) -> set[bytes]:
        """Acknowledge deliveries until the bodies seen so far are enough; return them."""
        seen: set[bytes] = set()
        async with asyncio.timeout(self.patience.total_seconds()):
            while not is_enough(seen):
                delivery = await anext(deliveries)
                await delivery.ack()
                seen.add(delivery.message.body)
        return seen

    async def publish_until_published(self, broker: Broker, message: Message) -> Outcome:
        """Publish again and again, as a relay does: what came before may have cost the broker its connection."""
        async with asyncio.timeout(self.patience.total_seconds()):
            while True:
                [outcome] = await broker.publish([message], LONG)
                if outcome == Published():
                    return outcome


def numbered(topic: str, count: int, keys: int = 5) -> list[Message]:
    """Make messages with the bodies `b"0"`, `b"1"` ..., dealt out to the keys `key-0`, `key-1` ... in turn."""
    return [Message(topic, b"%d" % n, key=f"key-{n % keys}") for n in range(count)]


def assert_all_in_order(received: Iterable[Message], published: Iterable[Message]) -> None:
    """All that was published arrived, and per key the first arrivals are in the order of publishing."""
    published = list(published)
    keys = {message.body: message.key for message in published}
    assert _firsts_by_key(received, keys) == _firsts_by_key(published, keys)


def _firsts_by_key(messages: Iterable[Message], keys: Mapping[bytes, str | None]) -> dict[str | None, list[bytes]]:
    by_key: defaultdict[str | None, dict[bytes, None]] = defaultdict(dict)
    for message in messages:
        by_key[keys.get(message.body)].setdefault(message.body)
    return {key: list(seen) for key, seen in by_key.items()}


def bodies(messages: Sequence[Message], outcomes: Sequence[Outcome], kind: type[Outcome]) -> set[bytes]:
    return {message.body for message, outcome in zip(messages, outcomes, strict=True) if isinstance(outcome, kind)}


def assert_no_gaps(messages: Sequence[Message], outcomes: Sequence[Outcome]) -> None:
    """No message is Published behind one of its topic and key that is not."""
    broken: set[tuple[str, str | None]] = set()
    for message, outcome in zip(messages, outcomes, strict=True):
        if outcome == Published():
            assert (message.topic, message.key) not in broken, f"{message.body!r} overtook one before it"
        else:
            broken.add((message.topic, message.key))


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():  # noqa: ASYNC110  # what is waited for has no event
        await asyncio.sleep(0.005)


async def acknowledge_into(seen: set[bytes], deliveries: AsyncIterator[Delivery]) -> None:
    async for delivery in deliveries:
        await delivery.ack()
        seen.add(delivery.message.body)


async def first_deliveries(subscriptions: Sequence[AsyncIterator[Delivery]]) -> list[Delivery | None]:
    """Wait until one of the subscriptions has a delivery; tell for each what it has, cancelling the other waits."""
    waits = [asyncio.ensure_future(anext(deliveries)) for deliveries in subscriptions]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    await asyncio.wait(waits)
    return [None if wait.cancelled() else wait.result() for wait in waits]


async def publish_slowly(broker: Broker, messages: Sequence[Message]) -> None:
    for message in messages:
        await broker.publish([message], LONG)
