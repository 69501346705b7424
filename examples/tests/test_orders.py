"""An app's test on real servers: `pytest examples/tests`."""

import asyncio

import pytest

from statecast import CloudEvent, Component, Runtime

OUTBOX = {"outboxPublishPubsub": "pubsub", "outboxPublishTopic": "orders"}


@pytest.mark.asyncio
async def test_who_places_an_order_is_told_of_it(
    postgresql_metadata: dict[str, str], redis_metadata: dict[str, str]
) -> None:
    components = [
        Component("statestore", "state.postgresql", "v2", postgresql_metadata | OUTBOX),
        Component("pubsub", "pubsub.redis", "v1", redis_metadata),
    ]
    events: asyncio.Queue[CloudEvent] = asyncio.Queue()

    async with asyncio.timeout(20), Runtime.open(components, app_id="orders") as runtime:
        runtime.subscribe("pubsub", "orders")(events.put)
        await runtime.ready()
        store = runtime.state("statestore")

        async with store.transaction() as transaction:
            transaction.upsert("order-1", {"total": 300})

        event = await events.get()
        order = await store.get("order-1")
        assert event.data == {"total": 300}
        assert order is not None
        assert order.value == b'{"total":300}'
