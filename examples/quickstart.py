"""State and its event in one commit, on SQLite and the in-memory broker: `python examples/quickstart.py`."""

import asyncio
from pathlib import Path

from statecast import CloudEvent, ETagMismatch, Runtime

COMPONENTS = Path(__file__).parent / "components"


async def main() -> None:
    async with Runtime.open(COMPONENTS, app_id="orders") as runtime:
        arrived = asyncio.Event()

        @runtime.subscribe("pubsub", "orders")
        async def on_order(event: CloudEvent) -> None:
            print(event.type, event.data)
            if event.type == "OrderPlaced":
                arrived.set()

        await runtime.ready()
        store = runtime.state("statestore")
        await store.set("cart-1", {"book": 2})

        async with store.transaction() as transaction:
            transaction.upsert("order-1", {"total": 300}, metadata={"cloudevent.type": "OrderChanged"})
            transaction.delete("cart-1")
            transaction.publish({"orderId": 1}, type="OrderPlaced", key="order-1")

        try:
            await store.set("order-1", {"total": 0}, etag="stale")
        except ETagMismatch as error:
            print(f"refused: {error}")
        await arrived.wait()


if __name__ == "__main__":
    asyncio.run(main())
