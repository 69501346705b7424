import asyncio
import json
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from statecast import (
    Check,
    CloudEvent,
    Component,
    ComponentError,
    Concurrency,
    Duplicate,
    ETagMismatch,
    InvalidRequest,
    NotSupported,
    PublishFailed,
    Runtime,
    RuntimeOptions,
    TraceContext,
    delete,
    upsert,
)
from statecast.clock import SystemClock
from statecast.components.registry import BUILT_IN
from statecast.components.state.commit import Delete, Upsert
from statecast.pubsub.subscription import Subscription

OUTBOX = {"outboxPublishPubsub": "bus", "outboxPublishTopic": "orders"}
BUS = Component("bus", "pubsub.in-memory")
PLAIN = Component("statestore", "state.in-memory")
STORE = Component("statestore", "state.in-memory", metadata=OUTBOX)


@pytest.fixture
async def runtime() -> AsyncIterator[Runtime]:
    async with Runtime.open([STORE, BUS], app_id="shop", environment={}) as opened:
        yield opened


class Inbox:
    """Collects the events of a topic."""

    def __init__(self, runtime: Runtime, topic: str = "orders") -> None:
        self.events: list[CloudEvent] = []
        self._arrived = asyncio.Condition()
        runtime.subscribe("bus", topic)(self._take)

    async def _take(self, event: CloudEvent) -> None:
        async with self._arrived:
            self.events.append(event)
            self._arrived.notify_all()

    async def first(self, count: int) -> list[CloudEvent]:
        async with asyncio.timeout(10), self._arrived:
            await self._arrived.wait_for(lambda: len(self.events) >= count)
        return self.events[:count]


async def test_values_are_written_and_read_under_logical_keys(runtime: Runtime) -> None:
    store = runtime.state("statestore")

    etag = await store.set("order-1", {"total": 250})
    item = await store.get("order-1")

    assert item is not None
    assert (item.key, item.json(), item.etag) == ("order-1", {"total": 250}, etag)


async def test_many_values_are_read_in_the_order_asked_for(runtime: Runtime) -> None:
    store = runtime.state("statestore")
    await store.bulk_set([upsert("a", 1), upsert("b", 2)])

    items = await store.bulk_get(["b", "none", "a", "b"])

    assert [item and (item.key, item.json()) for item in items] == [("b", 2), None, ("a", 1), ("b", 2)]


async def test_of_many_values_those_that_fail_are_told_and_the_others_stand(runtime: Runtime) -> None:
    store = runtime.state("statestore")

    with pytest.raises(ExceptionGroup) as caught:
        await store.bulk_set([upsert("a", 1), upsert("b", 2, etag="stale"), upsert("c", 3)])

    (error,) = caught.value.exceptions
    assert isinstance(error, ETagMismatch)
    assert [item and item.json() for item in await store.bulk_get(["a", "b", "c"])] == [1, None, 3]


async def test_a_mismatch_names_the_logical_key(runtime: Runtime) -> None:
    store = runtime.state("statestore")

    with pytest.raises(ETagMismatch, match="'order-1' does not have etag '7'"):
        await store.set("order-1", 1, etag="7")


async def test_a_first_write_of_a_live_key_is_refused(runtime: Runtime) -> None:
    store = runtime.state("statestore")
    await store.set("order-1", 1)

    with pytest.raises(ETagMismatch, match="'order-1' exists already"):
        await store.set("order-1", 2, concurrency=Concurrency.FIRST_WRITE)


async def test_keys_with_the_separator_are_refused(runtime: Runtime) -> None:
    with pytest.raises(InvalidRequest, match="can't contain"):
        await runtime.state("statestore").get("a||b")


async def test_an_event_that_cannot_be_made_refuses_its_whole_transaction(runtime: Runtime) -> None:
    store = runtime.state("statestore")

    with pytest.raises(InvalidRequest, match="actual is 'yesterday'"):
        async with store.transaction() as transaction:
            transaction.upsert("order-1", 1)
            transaction.upsert("order-2", 2, metadata={"cloudevent.time": "yesterday"})

    assert await store.bulk_get(["order-1", "order-2"]) == [None, None]


async def test_a_transaction_commits_state_and_events_together(runtime: Runtime) -> None:
    inbox = Inbox(runtime)
    store = runtime.state("statestore")
    await store.set("cart-1", "full")

    async with store.transaction() as transaction:
        transaction.upsert("order-1", {"total": 300})
        transaction.delete("cart-1")
        transaction.publish({"orderId": 1}, type="OrderPlaced", key="order-1")

    changed, placed = await inbox.first(2)
    assert (changed.data, changed.source) == ({"total": 300}, "shop")
    assert (placed.type, placed.data) == ("OrderPlaced", {"orderId": 1})
    item = await store.get("order-1")
    assert item is not None
    assert transaction.etags == {"order-1": item.etag}
    assert await store.get("cart-1") is None


async def test_a_transaction_whose_block_raises_leaves_nothing(runtime: Runtime) -> None:
    store = runtime.state("statestore")

    with pytest.raises(ZeroDivisionError):
        async with store.transaction() as transaction:
            transaction.upsert("order-1", 1)
            _ = 1 / 0

    assert await store.get("order-1") is None
    assert sum(each.pending for each in await runtime.outbox_status("statestore")) == 0


async def test_a_transaction_depends_on_what_it_has_read(runtime: Runtime) -> None:
    store = runtime.state("statestore")
    await store.set("stock", 5)

    with pytest.raises(ETagMismatch, match="'stock'"):
        async with store.transaction() as transaction:
            stock = await transaction.get("stock")
            assert stock is not None
            await store.set("stock", 0)
            transaction.upsert("order-1", stock.json())

    assert await store.get("order-1") is None


async def test_a_transaction_depends_on_the_absence_it_has_read(runtime: Runtime) -> None:
    store = runtime.state("statestore")

    with pytest.raises(ETagMismatch, match="'order-1' exists already"):
        async with store.transaction() as transaction:
            assert await transaction.get("order-1") is None
            await store.set("order-1", "first")
            transaction.upsert("order-1", "second")


async def test_a_read_key_may_be_written_in_the_same_transaction(runtime: Runtime) -> None:
    store = runtime.state("statestore")
    await store.set("n", 1)

    async with store.transaction() as transaction:
        item = await transaction.get("n")
        assert item is not None
        transaction.upsert("n", item.json() + 1)

    after = await store.get("n")
    assert after is not None
    assert after.json() == 2


async def test_a_repeat_under_the_same_idempotency_key_is_a_duplicate(runtime: Runtime) -> None:
    store = runtime.state("statestore")
    inbox = Inbox(runtime)
    async with store.transaction(idempotency_key="payment-1") as transaction:
        transaction.upsert("order-1", 1)

    with pytest.raises(Duplicate):
        async with store.transaction(idempotency_key="payment-1") as transaction:
            transaction.upsert("order-1", 2)

    await store.transact([upsert("order-1", 3)])
    assert [event.data for event in await inbox.first(2)] == [1, 3]


async def test_a_duplicate_tells_what_the_first_commit_was_answered(runtime: Runtime) -> None:
    store = runtime.state("statestore")
    operations: list[Upsert | Delete] = [
        upsert("a", 1),
        delete("b"),
        upsert("a", 2, metadata={"outbox.projection": "true"}),
    ]
    first = await store.transact(operations, idempotency_key="payment-1")

    with pytest.raises(Duplicate) as caught:
        await store.transact(operations, idempotency_key="payment-1")

    assert caught.value.etags == first
    assert len(first) == 3


async def test_the_list_form_returns_an_etag_for_each_operation(runtime: Runtime) -> None:
    store = runtime.state("statestore")
    etag = await store.set("old", 1)

    etags = await store.transact(
        [
            upsert("new", 1),
            delete("old", etag=etag),
            Check("absent", None),
            upsert("new", 2, metadata={"outbox.projection": "true"}),
        ]
    )

    item = await store.get("new")
    assert item is not None
    assert etags == (item.etag, None, None, item.etag)
    assert item.json() == 1


async def test_the_trace_travels_with_the_event(runtime: Runtime) -> None:
    inbox = Inbox(runtime)
    trace = TraceContext("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "vendor=1")

    async with runtime.state("statestore").transaction(trace=trace) as transaction:
        transaction.upsert("order-1", 1)

    (event,) = await inbox.first(1)
    assert event.attributes["traceparent"] == event.attributes["traceid"] == trace.traceparent


async def test_a_single_write_has_no_event(runtime: Runtime) -> None:
    inbox = Inbox(runtime)
    store = runtime.state("statestore")

    await store.set("order-1", 1)
    await store.delete("order-1")
    await store.transact([upsert("order-2", 2)])

    assert [event.data for event in await inbox.first(1)] == [2]


async def test_values_expire_by_the_components_default(runtime: Runtime) -> None:
    component = Component("statestore", "state.in-memory", metadata={"ttlInSeconds": "100"})
    async with Runtime.open([component], app_id="shop", environment={}) as opened:
        store = opened.state("statestore")
        await store.set("default", 1)
        await store.set("own", 1, ttl=timedelta(seconds=1_000))
        await store.set("forever", 1, ttl=timedelta(seconds=-1))

        default, own, forever = await store.bulk_get(["default", "own", "forever"])

    assert default is not None
    assert own is not None
    assert forever is not None
    assert default.expires_at is not None
    assert own.expires_at is not None
    assert own.expires_at - default.expires_at > timedelta(seconds=800)
    assert forever.expires_at is None


async def test_an_event_is_published_directly(runtime: Runtime) -> None:
    inbox = Inbox(runtime, "news")
    await runtime.ready()

    await runtime.publish("bus", "news", {"a": 1}, type="News", metadata={"cloudevent.subject": "s"})

    (event,) = await inbox.first(1)
    assert (event.type, event.subject, event.data, event.source) == ("News", "s", {"a": 1}, "shop")


async def test_publishing_that_did_not_happen_is_an_error() -> None:
    async with Runtime.open([STORE, BUS], app_id="shop", environment={}) as closed:
        pass

    with pytest.raises(PublishFailed, match="publishing to topic 'orders' failed"):
        await closed.publish("bus", "orders", 1)


@pytest.mark.parametrize("call", ["state", "subscribe", "publish"])
async def test_a_component_that_is_not_loaded_is_named_with_those_that_are(runtime: Runtime, call: str) -> None:
    with pytest.raises(InvalidRequest, match=r"'gone' is not loaded; loaded are: (statestore|bus)"):
        match call:
            case "state":
                runtime.state("gone")
            case "subscribe":
                runtime.subscribe("gone", "orders")
            case _:
                await runtime.publish("gone", "orders", 1)


async def test_a_subscription_with_a_store_says_that_it_is_not_there(runtime: Runtime) -> None:
    with pytest.raises(NotSupported, match="inbox"):
        runtime.subscribe("bus", "orders", store="statestore")


async def test_leaving_publishes_what_is_committed() -> None:
    received: list[Any] = []
    async with Runtime.open([STORE, BUS], app_id="shop", environment={}) as runtime:
        runtime.subscribe("bus", "orders")(lambda event: received.append(event.data))
        await runtime.ready()
        for number in range(200):
            await runtime.state("statestore").transact([upsert("k", number)])

    assert received == list(range(200))


async def test_a_subscription_that_never_stands_does_not_hold_the_relay(caplog: pytest.LogCaptureFixture) -> None:
    options = RuntimeOptions(subscriptions_within=timedelta(milliseconds=20))
    async with Runtime.open([STORE, BUS], app_id="shop", environment={}, options=options) as runtime:
        subscription = Subscription(runtime._components.brokers["bus"], "t", "g", print, clock=SystemClock())
        runtime._subscriptions["bus"].append(subscription)
        inbox = Inbox(runtime)
        await runtime.state("statestore").transact([upsert("k", 1)])
        await inbox.first(1)

    assert "do not stand yet" in caplog.text


async def test_without_relays_events_stay_for_another_process() -> None:
    options = RuntimeOptions(relays=False)
    async with Runtime.open([STORE, BUS], app_id="shop", environment={}, options=options) as runtime:
        await runtime.state("statestore").transact([upsert("k", 1)])

        status = await runtime.outbox_status("statestore")

    assert sum(each.pending for each in status) == 1
    assert {each.owner for each in status} == {None}


async def test_a_runtime_opens_from_a_folder_of_yaml(tmp_path: Path) -> None:
    (tmp_path / "state.yaml").write_text(
        json.dumps(
            {
                "apiVersion": "dapr.io/v1alpha1",
                "kind": "Component",
                "metadata": {"name": "statestore"},
                "spec": {"type": "state.in-memory", "metadata": [{"name": "keyPrefix", "value": "none"}]},
            }
        )
    )

    async with Runtime.open(tmp_path, app_id="shop", environment={}) as runtime:
        await runtime.state("statestore").set("k", 1)


@pytest.mark.parametrize(
    ("component", "message"),
    [
        (Component("s", "state.in-memory", metadata={"outboxPublishTopic": "t"}), "outboxPublishPubsub is required"),
        (Component("s", "state.in-memory", metadata={"outboxPublishPubsub": "bus"}), "outboxPublishTopic is required"),
        (
            Component("s", "state.in-memory", metadata={"outboxPublishPubsub": "gone", "outboxPublishTopic": "t"}),
            r"outboxPublishPubsub names no pub/sub component that is loaded \(loaded: bus\); it is 'gone'",
        ),
        (Component("s", "state.in-memory", metadata={"primaryEncryptionKey": "ab"}), "encryption is not supported"),
        (Component("s", "state.in-memory", metadata={"SECONDARYEncryptionKey": ""}), "encryption is not supported"),
        (Component("s", "State.In-Memory", metadata={"ttlInSeconds": "-2"}), "ttlInSeconds must be -1 or more"),
        (Component("s", "state.in-memory", metadata={"ttlInSeconds": "9" * 15}), "ttlInSeconds must be 2147483647 or"),
        (Component("s", "state.in-memory", metadata={"ttlInSeconds": "soon"}), "ttlInSeconds takes a whole number"),
        (Component("s", "state.in-memory", metadata={"keyPrefix": "a||b"}), "keyPrefix"),
        (Component("s", "state.inmemory"), "unknown type"),
    ],
)
async def test_a_component_that_cannot_work_stops_the_start(component: Component, message: str) -> None:
    with pytest.raises(ComponentError, match=message):
        async with Runtime.open([component, BUS], app_id="shop", environment={}):
            raise AssertionError("it opened")


async def test_a_component_whose_errors_are_ignored_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    broken = Component(
        "broken", "state.sqlite", metadata={"connectionString": "/nowhere/at/all.db"}, ignore_errors=True
    )

    async with Runtime.open([broken, PLAIN], app_id="shop", environment={}) as runtime:
        await runtime.state("statestore").set("k", 1)

    assert "left out" in caplog.text
    assert "broken" in caplog.text


@pytest.mark.parametrize("metadata", [{"ttlInSeconds": "soon"}, {"keyPrefix": "a||b"}, OUTBOX])
async def test_whatever_is_wrong_with_a_store_whose_errors_are_ignored_it_is_left_out(metadata: dict[str, str]) -> None:
    broken = Component("broken", "state.in-memory", metadata=metadata, ignore_errors=True)
    its_broker = Component("bus", "pubsub.kafka", ignore_errors=True)

    async with Runtime.open([broken, its_broker, PLAIN], app_id="shop", environment={}) as runtime:
        with pytest.raises(InvalidRequest, match="'broken' is not loaded; loaded are: statestore"):
            runtime.state("broken")


async def test_a_type_is_known_in_any_case() -> None:
    components = [Component("statestore", "State.In-Memory", metadata=OUTBOX), Component("bus", "PubSub.In-Memory")]

    async with Runtime.open(components, app_id="shop", environment={}) as runtime:
        await runtime.state("statestore").set("k", 1)


async def test_an_encryption_key_that_its_variable_leaves_empty_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "state.yaml").write_text(
        "apiVersion: dapr.io/v1alpha1\nkind: Component\nmetadata: {name: statestore}\n"
        "spec: {type: state.in-memory, metadata: [{name: primaryEncryptionKey, envRef: NOT_SET}]}\n"
    )

    with pytest.raises(ComponentError, match="primaryEncryptionKey cannot be given"):
        async with Runtime.open(tmp_path, app_id="shop", environment={}):
            raise AssertionError("it opened")


@pytest.mark.parametrize(
    "metadata", [{"keyPrefix": "s3cr3t||"}, {"outboxPublishPubsub": "s3cr3t", "outboxPublishTopic": "t"}]
)
async def test_a_value_from_a_secret_is_in_no_error_of_opening(metadata: dict[str, str]) -> None:
    component = Component(
        "s", "state.in-memory", metadata=metadata, secret_fields=frozenset(name.lower() for name in metadata)
    )

    with pytest.raises(ComponentError) as failure:
        async with Runtime.open(component, app_id="shop", environment={}):
            raise AssertionError("it opened")

    assert "s3cr3t" not in str(failure.value)


async def test_an_error_of_opening_names_the_component_once() -> None:
    component = Component("s", "state.postgresql", "v2", {"host": "127.0.0.1", "port": "1"}, origin="c/a.yaml")

    with pytest.raises(ComponentError) as failure:
        async with Runtime.open(component, app_id="shop", environment={}):
            raise AssertionError("it opened")

    assert str(failure.value).count("c/a.yaml: component 's'") == 1


class SlowStore:
    """A store that never finishes opening."""

    def __init__(self, component: Component, *, app_id: str, clock: object) -> None:
        pass

    async def __aenter__(self) -> None:
        await asyncio.Event().wait()

    async def __aexit__(self, *error: object) -> None:
        pass


async def test_a_component_that_does_not_open_in_its_time_stops_the_start() -> None:
    registry = BUILT_IN.register("state.slow", f"{__name__}:SlowStore")
    component = Component("slow", "state.slow", init_timeout=timedelta(milliseconds=10))

    with pytest.raises(ComponentError, match=r"'slow'.*did not open within 0.01 s"):
        async with Runtime.open([component], app_id="shop", environment={}, registry=registry):
            raise AssertionError("it opened")
