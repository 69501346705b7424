import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest

from statecast.clock import SystemClock
from statecast.components.broker.broker import Message, Published, Settlement
from statecast.components.broker.memory import MemoryBroker
from statecast.components.manifest import Component
from statecast.pubsub.cloudevent import CloudEvent
from statecast.pubsub.subscription import Handler, Subscription

SOON = timedelta(seconds=5)


@pytest.fixture
async def broker() -> AsyncIterator[MemoryBroker]:
    async with MemoryBroker(Component("bus", "pubsub.in-memory"), app_id="shop", clock=SystemClock()) as opened:
        yield opened


class PatientClock(SystemClock):
    """A clock whose pauses end at once, and which counts them."""

    def __init__(self) -> None:
        self.pauses: list[timedelta] = []

    async def wait(self, event: asyncio.Event, timeout: timedelta) -> bool:
        self.pauses.append(timeout)
        await asyncio.sleep(0)
        return event.is_set()


async def deliver(broker: MemoryBroker, handler: Handler, count: int, clock: SystemClock | None = None) -> None:
    """Publish `count` numbered events and return when all are settled."""
    subscription = Subscription(broker, "orders", "shop", handler, clock=clock or SystemClock())
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(subscription.run(stop))
        await subscription.is_standing.wait()
        messages = [Message("orders", f'{{"id":"{number}"}}'.encode()) for number in range(count)]
        outcomes = await broker.publish(messages, SOON, Settlement.HANDLED)
        stop.set()
    assert outcomes == [Published()] * count


async def test_events_are_handled_one_by_one_in_order(broker: MemoryBroker) -> None:
    seen: list[str] = []
    running = 0

    async def handle(event: CloudEvent) -> None:
        nonlocal running
        running += 1
        assert running == 1
        await asyncio.sleep(0)
        seen.append(event.id)
        running -= 1

    await deliver(broker, handle, 20)

    assert seen == [str(number) for number in range(20)]


async def test_a_plain_function_may_handle_events(broker: MemoryBroker) -> None:
    seen: list[str] = []

    await deliver(broker, lambda event: seen.append(event.id), 3)

    assert seen == ["0", "1", "2"]


async def test_an_event_whose_handler_raises_comes_again_before_any_later_one(
    broker: MemoryBroker, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[str] = []
    clock = PatientClock()

    def handle(event: CloudEvent) -> None:
        seen.append(event.id)
        if seen.count("1") < 4 and event.id == "1":
            raise ValueError("not yet")

    await deliver(broker, handle, 3, clock)

    assert seen == ["0", "1", "1", "1", "1", "2"]
    assert clock.pauses == [timedelta(milliseconds=100 * 2**step) for step in range(3)]
    assert "failed on event '1'" in caplog.text


async def test_stopping_lets_the_handler_finish_what_it_holds(broker: MemoryBroker) -> None:
    entered, may_go, done = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def handle(event: CloudEvent) -> None:
        entered.set()
        await may_go.wait()
        done.set()

    subscription = Subscription(broker, "orders", "shop", handle, clock=SystemClock())
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(subscription.run(stop))
        await subscription.is_standing.wait()
        publishing = group.create_task(broker.publish([Message("orders", b"{}")], SOON, Settlement.HANDLED))
        await entered.wait()
        stop.set()
        may_go.set()

    assert done.is_set()
    assert publishing.result() == [Published()]


async def test_an_event_that_keeps_failing_is_given_back_on_stopping(broker: MemoryBroker) -> None:
    failed = asyncio.Event()

    def handle(event: CloudEvent) -> None:
        failed.set()
        raise ValueError("never")

    subscription = Subscription(broker, "orders", "shop", handle, clock=SystemClock())
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(subscription.run(stop))
        await subscription.is_standing.wait()
        await broker.publish([Message("orders", b'{"id":"7"}')], SOON)
        await failed.wait()
        stop.set()

    async with broker.subscribe("orders", "shop") as deliveries, asyncio.timeout(5):
        delivery = await anext(deliveries)
    assert delivery.message.body == b'{"id":"7"}'
