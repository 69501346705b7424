"""A relay on a real log whose broker writes down what it was given."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta

from statecast.clock import SystemClock
from statecast.components.broker.broker import Message, Outcome, Published, Settlement
from statecast.components.broker.memory import MemoryBroker
from statecast.components.manifest import Component
from statecast.components.state.commit import Commit, OutboxRecord, Upsert
from statecast.components.state.store import StateStore
from statecast.outbox.relay import Relay, RelayOptions

QUICK = RelayOptions(
    lease=timedelta(seconds=2),
    publish_timeout=timedelta(milliseconds=500),
    persist_every=timedelta(milliseconds=50),
    idle_wait=timedelta(milliseconds=20),
)


class Recorder(MemoryBroker):
    """Takes everything; `first` has the event ids of each key in the order of their first deliveries."""

    def __init__(self) -> None:
        super().__init__(Component("bus", "pubsub.in-memory"), app_id="orders", clock=SystemClock())
        self.first: dict[str, list[str]] = {}
        self.seen: set[str] = set()
        self.repeats = 0

    async def publish(
        self, messages: Sequence[Message], timeout: timedelta, settlement: Settlement = Settlement.STORED
    ) -> list[Outcome]:
        for message in messages:
            key, event_id = message.body.decode().split("#")
            if message.body.decode() in self.seen:
                self.repeats += 1
                continue
            self.seen.add(message.body.decode())
            self.first.setdefault(key, []).append(event_id)
        return [Published() for _ in messages]


def deed(key: str, number: int) -> Commit:
    """Write `number` to the key, and tell of it."""
    event = OutboxRecord(key, f"{key}#{number}", "bus", "orders", f"{key}#{number}".encode())
    return Commit((Upsert(key, b"%d" % number),), (event,))


@asynccontextmanager
async def relaying(store: StateStore, recorder: Recorder, name: str) -> AsyncIterator[Relay]:
    """Relay the store's log to `recorder` until this is left, and then to its end."""
    relay = Relay(store.log, {"bus": recorder}, name=name, clock=SystemClock(), options=QUICK)
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(relay.run(stop))
        try:
            yield relay
        finally:
            stop.set()
