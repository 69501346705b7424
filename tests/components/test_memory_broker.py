import asyncio
from collections.abc import Callable
from datetime import timedelta

import pytest

from statecast.clock import SystemClock
from statecast.components.broker import memory
from statecast.components.broker.broker import Broker, Message, Published, Settlement, Unknown, Unreachable
from statecast.components.broker.memory import MemoryBroker
from statecast.components.manifest import Component
from statecast.components.testing.broker import LONG, BrokerContract, numbered

SHORT = timedelta(milliseconds=30)


def memory_broker() -> MemoryBroker:
    return MemoryBroker(Component(name="pubsub", type="pubsub.in-memory"), app_id="orders", clock=SystemClock())


class TestMemoryBroker(BrokerContract):
    stores_messages = False

    @pytest.fixture
    def make_broker(self) -> Callable[[], Broker]:
        return memory_broker


async def test_the_later_messages_of_a_key_wait_for_the_one_in_hand() -> None:
    async with memory_broker() as broker, broker.subscribe("t", "g") as one, broker.subscribe("t", "g") as other:
        await broker.publish([Message("t", b"a1", "a"), Message("t", b"a2", "a"), Message("t", b"b1", "b")], LONG)

        first = await anext(one)
        second = await anext(other)
        waiting = asyncio.ensure_future(anext(other))
        await asyncio.sleep(0)
        was_done = waiting.done()
        await first.ack()
        third = await waiting

    assert [first.message.body, second.message.body, third.message.body] == [b"a1", b"b1", b"a2"]
    assert not was_done


async def test_a_nacked_message_comes_before_the_later_ones_of_its_key_and_all_others() -> None:
    async with memory_broker() as broker, broker.subscribe("t", "g") as deliveries:
        await broker.publish([Message("t", b"a1", "a"), Message("t", b"a2", "a"), Message("t", b"b1", "b")], LONG)

        await (await anext(deliveries)).nack()
        order = []
        for _ in range(3):
            delivery = await anext(deliveries)
            order.append((delivery.message.body, delivery.attempt))
            await delivery.ack()

    assert order == [(b"a1", 2), (b"a2", 1), (b"b1", 1)]


async def test_an_old_delivery_does_not_settle_the_new_one_of_the_same_message() -> None:
    async with memory_broker() as broker, broker.subscribe("t", "g") as deliveries:
        await broker.publish([Message("t", b"1", "a"), Message("t", b"2", "a")], LONG)
        first = await anext(deliveries)
        await first.nack()
        again = await anext(deliveries)

        await first.ack()
        await again.nack()

        assert (await anext(deliveries)).message.body == b"1"


async def test_messages_without_a_key_wait_for_nobody() -> None:
    async with memory_broker() as broker, broker.subscribe("t", "g") as deliveries:
        await broker.publish([Message("t", b"1"), Message("t", b"2")], LONG)

        held = [await anext(deliveries), await anext(deliveries)]

    assert [delivery.message.body for delivery in held] == [b"1", b"2"]


async def test_handled_is_published_only_when_every_group_has_settled_it() -> None:
    async with (
        memory_broker() as broker,
        broker.subscribe("t", "billing") as billing,
        broker.subscribe("t", "shipping") as shipping,
    ):
        publishing = asyncio.ensure_future(broker.publish([Message("t", b"1")], LONG, Settlement.HANDLED))
        await (await anext(billing)).ack()
        await asyncio.wait([publishing], timeout=SHORT.total_seconds())
        was_done = publishing.done()
        await (await anext(shipping)).ack()
        outcomes = await publishing

    assert not was_done
    assert outcomes == [Published()]


async def test_at_the_deadline_each_message_is_told_by_where_it_is() -> None:
    """Settled, in somebody's hands, handed to nobody: only the last is withdrawn, and never delivered."""
    async with memory_broker() as broker, broker.subscribe("t", "g") as deliveries:
        messages = [Message("t", b"1", "a"), Message("t", b"2", "a"), Message("t", b"3", "a")]

        publishing = asyncio.ensure_future(broker.publish(messages, SHORT, Settlement.HANDLED))
        await (await anext(deliveries)).ack()
        held = await anext(deliveries)
        outcomes = await publishing
        await held.ack()
        await broker.publish([Message("t", b"4", "a")], LONG)
        after = await anext(deliveries)

    assert [type(outcome) for outcome in outcomes] == [Published, Unknown, Unreachable]
    assert after.message.body == b"4"


async def test_what_one_group_has_handled_and_another_was_not_handed_is_unknown() -> None:
    async with (
        memory_broker() as broker,
        broker.subscribe("t", "billing") as billing,
        broker.subscribe("t", "shipping"),
    ):
        publishing = asyncio.ensure_future(broker.publish([Message("t", b"1")], SHORT, Settlement.HANDLED))
        await (await anext(billing)).ack()

        assert [type(outcome) for outcome in await publishing] == [Unknown]


async def test_a_cancelled_handled_publish_withdraws_what_nobody_holds() -> None:
    async with memory_broker() as broker, broker.subscribe("t", "g") as deliveries:
        publishing = asyncio.ensure_future(broker.publish(numbered("t", 10), LONG, Settlement.HANDLED))
        await asyncio.sleep(0)
        publishing.cancel()
        await asyncio.wait([publishing])

        await broker.publish([Message("t", b"next")], LONG)

        assert (await anext(deliveries)).message.body == b"next"


async def test_closing_ends_a_publish_that_waits_for_handling() -> None:
    broker = memory_broker()
    async with broker, broker.subscribe("t", "g") as deliveries:
        publishing = asyncio.ensure_future(broker.publish(numbered("t", 2, keys=1), LONG, Settlement.HANDLED))
        await anext(deliveries)
        await broker.__aexit__(None, None, None)

        assert [type(outcome) for outcome in await publishing] == [Unknown, Unreachable]


async def test_a_full_group_holds_up_its_publishers_until_it_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CAPACITY", 3)
    async with memory_broker() as broker, broker.subscribe("t", "g") as deliveries:
        outcomes = await broker.publish(numbered("t", 5, keys=1), SHORT)
        publishing = asyncio.ensure_future(broker.publish([Message("t", b"later", "key-0")], LONG))
        await asyncio.sleep(0)
        was_done = publishing.done()
        received = []
        for _ in range(4):
            delivery = await anext(deliveries)
            received.append(delivery.message.body)
            await delivery.ack()

        assert [type(outcome) for outcome in outcomes] == [Published] * 3 + [Unreachable] * 2
        assert not was_done
        assert await publishing == [Published()]
        assert received == [b"0", b"1", b"2", b"later"]


async def test_a_group_without_members_takes_nothing_new_and_keeps_what_was_given_back() -> None:
    async with memory_broker() as broker:
        async with broker.subscribe("t", "g") as deliveries:
            await broker.publish([Message("t", b"1", "a"), Message("t", b"2", "a")], LONG)
            await anext(deliveries)

        while_away = await broker.publish([Message("t", b"3", "a")], SHORT, Settlement.HANDLED)
        async with broker.subscribe("t", "g") as deliveries:
            await broker.publish([Message("t", b"4", "a")], LONG)
            received = []
            for _ in range(3):
                delivery = await anext(deliveries)
                received.append(delivery.message.body)
                await delivery.ack()

    assert while_away == [Published()]
    assert received == [b"1", b"2", b"4"]
