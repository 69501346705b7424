"""Events that a broker refuses, from the component's fields to the replay."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta

import pytest

from statecast import (
    CloudEvent,
    Component,
    ComponentError,
    InvalidRequest,
    RelayOptions,
    Runtime,
    RuntimeOptions,
    upsert,
)
from statecast.clock import Clock
from statecast.components.broker.broker import Message, Outcome, Refused, Settlement, Unreachable
from statecast.components.broker.memory import MemoryBroker
from statecast.components.registry import BUILT_IN
from statecast.components.testing import deadline
from statecast.outbox.deferred import RetryOptions
from statecast.outbox.plan import Outbox, parse_outbox
from statecast.outbox.progress import BackOff

REGISTRY = BUILT_IN.register("pubsub.picky", f"{__name__}:PickyBroker")
BUS = Component("bus", "pubsub.picky")
OUTBOX = {"outboxPublishPubsub": "bus", "outboxPublishTopic": "orders"}
QUICK = RetryOptions(back_off=BackOff(timedelta(milliseconds=2), timedelta(milliseconds=10)))


class PickyBroker(MemoryBroker):
    """Refuses what has the word poison in it, as long as it does; what follows of the same key it holds back."""

    refuses = True

    def __init__(self, component: Component, *, app_id: str, clock: Clock) -> None:
        super().__init__(component, app_id=app_id, clock=clock)
        self.tries: list[bytes] = []

    async def publish(
        self, messages: Sequence[Message], timeout: timedelta, settlement: Settlement = Settlement.STORED
    ) -> list[Outcome]:
        held: set[tuple[str, str | None]] = set()
        outcomes: list[Outcome] = []
        for message in messages:
            lane = (message.topic, message.key)
            if lane in held:
                outcomes.append(Unreachable("held back"))
            elif self.refuses and b"poison" in message.body and message.topic == "orders":
                self.tries.append(message.body)
                held.add(lane)
                outcomes.append(Refused("poison is not taken"))
            else:
                outcomes += await super().publish([message], timeout, settlement)
        return outcomes


class Inbox:
    """The data of the events of a topic, as they came."""

    def __init__(self, runtime: Runtime, topic: str = "orders") -> None:
        self.data: list[object] = []
        runtime.subscribe("bus", topic)(self._take)

    async def _take(self, event: CloudEvent) -> None:
        self.data.append(event.data)


@asynccontextmanager
async def opened(**fields: str) -> AsyncIterator[tuple[Runtime, PickyBroker]]:
    store = Component("statestore", "state.in-memory", metadata={**OUTBOX, **fields})
    options = RuntimeOptions(relay=RelayOptions(look_aside_every=timedelta(milliseconds=2), retry=QUICK))
    async with Runtime.open([store, BUS], app_id="shop", environment={}, registry=REGISTRY, options=options) as runtime:
        broker = runtime._components.brokers["bus"]
        assert isinstance(broker, PickyBroker)
        yield runtime, broker


async def until(fact: Callable[[], bool]) -> None:
    async def holds() -> bool:
        return fact()

    await deadline.until(holds)


async def until_parked(runtime: Runtime, keys: int) -> None:
    async def are_parked() -> bool:
        return sum(key.is_parked for key in await runtime.outbox_deferred("statestore")) == keys

    await deadline.until(are_parked)


async def test_a_refused_key_is_parked_after_as_many_attempts_as_the_component_says() -> None:
    async with opened(outboxMaxAttempts="3") as (runtime, broker):
        inbox = Inbox(runtime)
        store = runtime.state("statestore")

        for value in ("poison", "behind"):
            await store.transact([upsert("order-1", value)])
        await store.transact([upsert("order-2", "fine")])
        await until_parked(runtime, 1)

        (key,) = await runtime.outbox_deferred("statestore")
        assert (key.queue.order_key, key.attempts, key.pending) == ("order-1", 3, 2)
        assert key.reason == "poison is not taken"
        assert len(broker.tries) == 3
        await until(lambda: inbox.data == ["fine"])


async def test_a_parked_key_is_replayed_in_order_under_its_logical_name() -> None:
    async with opened(outboxMaxAttempts="1") as (runtime, broker):
        inbox = Inbox(runtime)
        store = runtime.state("statestore")
        for value in ("poison", "second", "third"):
            await store.transact([upsert("order-1", value)])
        await store.transact([upsert("order-2", "poison too")])
        await until_parked(runtime, 2)
        broker.refuses = False

        replayed = [await runtime.outbox_replay("statestore", key) for key in ("order-1", "order-1", "none")]

        await until(lambda: len(inbox.data) == 3)
        assert replayed == [1, 0, 0]
        assert inbox.data == ["poison", "second", "third"]
        await until_parked(runtime, 1)


async def test_all_parked_keys_are_replayed_at_once_and_new_events_flow_again() -> None:
    async with opened(outboxMaxAttempts="1") as (runtime, broker):
        inbox = Inbox(runtime)
        store = runtime.state("statestore")
        for number in range(5):
            await store.transact([upsert(f"order-{number}", "poison")])
        await until_parked(runtime, 5)
        broker.refuses = False

        assert await runtime.outbox_replay("statestore") == 5

        await until(lambda: inbox.data == ["poison"] * 5)
        await store.transact([upsert("order-0", "after")])
        await until(lambda: inbox.data[-1] == "after")
        assert await runtime.outbox_deferred("statestore") == []


async def test_an_event_without_a_key_is_replayed_by_the_name_it_waits_under() -> None:
    async with opened(outboxMaxAttempts="1") as (runtime, broker):
        inbox = Inbox(runtime)
        async with runtime.state("statestore").transaction() as transaction:
            transaction.publish("poison")
        await until_parked(runtime, 1)
        broker.refuses = False

        (key,) = await runtime.outbox_deferred("statestore")

        assert key.queue.order_key.startswith("outbox-")
        assert await runtime.outbox_replay("statestore", key.queue.order_key) == 1
        await until(lambda: inbox.data == ["poison"])


async def test_a_copy_of_what_is_parked_goes_to_the_components_dead_letter_topic() -> None:
    async with opened(outboxMaxAttempts="2", outboxDeadLetterTopic="graveyard") as (runtime, _):
        graveyard = Inbox(runtime, "graveyard")

        await runtime.state("statestore").transact([upsert("order-1", "poison")])
        await until_parked(runtime, 1)

        await until(lambda: graveyard.data == ["poison"])


async def test_without_an_outbox_there_is_nothing_to_ask_for() -> None:
    async with Runtime.open([Component("plain", "state.in-memory")], app_id="shop", environment={}) as runtime:
        for asking in (
            runtime.outbox_deferred("plain"),
            runtime.outbox_replay("plain"),
            runtime.outbox_status("plain"),
        ):
            with pytest.raises(InvalidRequest, match="'plain' has no outbox"):
                await asking


def test_the_fields_are_read_with_their_defaults() -> None:
    plain = parse_outbox(Component("s", "state.in-memory", metadata=OUTBOX))
    full = parse_outbox(
        Component(
            "s", "state.in-memory", metadata={**OUTBOX, "outboxMaxAttempts": "3", "outboxDeadLetterTopic": "dead"}
        )
    )

    assert plain == Outbox("bus", "orders", publishes_deletes=False, max_attempts=10, dead_letter_topic=None)
    assert full == Outbox("bus", "orders", publishes_deletes=False, max_attempts=3, dead_letter_topic="dead")


@pytest.mark.parametrize(
    ("attempts", "message"), [("0", "outboxMaxAttempts must be 1 or more"), ("many", "takes a whole number")]
)
def test_a_number_of_attempts_that_is_none_is_named(attempts: str, message: str) -> None:
    component = Component("s", "state.in-memory", metadata={**OUTBOX, "outboxMaxAttempts": attempts})

    with pytest.raises(ComponentError, match=message):
        parse_outbox(component)


async def test_a_store_knows_the_fields(caplog: pytest.LogCaptureFixture) -> None:
    async with opened(outboxMaxAttempts="3", outboxDeadLetterTopic="dead"):
        pass

    assert "no metadata field" not in caplog.text
