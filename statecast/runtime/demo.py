"""`statecast demo`: orders from a file become state and events, and the events are watched arriving."""

import asyncio
import json
import logging
import multiprocessing
import os
import secrets
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import IO, Annotated, Any

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from statecast.components.manifest import Component
from statecast.components.state.keys import check_key
from statecast.components.state.value import encode
from statecast.errors import Duplicate, InvalidRequest, StatecastError
from statecast.outbox.relay import RelayOptions
from statecast.pubsub.cloudevent import CloudEvent
from statecast.runtime.app import Runtime, RuntimeOptions
from statecast.runtime.servers import ServerKind, Servers, component_metadata
from statecast.runtime.state import StateClient

STORE, PUBSUB = "statestore", "pubsub"
WRITERS = 16
ARRIVAL_TIMEOUT = 60.0

# Short leases, so that nobody has to wait long to see another process take over what a killed one held.
OPTIONS = RuntimeOptions(relay=RelayOptions(lease=timedelta(seconds=2), publish_timeout=timedelta(seconds=1)))


class DemoStore(StrEnum):
    SQLITE = "sqlite"
    POSTGRESQL = "postgresql"
    REDIS = "redis"


class DemoBroker(StrEnum):
    IN_MEMORY = "in-memory"
    REDIS = "redis"
    KAFKA = "kafka"


# PostgreSQL indexes no key of more than 2,700 bytes.
Word = Annotated[str, msgspec.Meta(max_length=200)]


class Order(msgspec.Struct, rename="camel"):
    """One line of the input; what stands beside these members is kept, and stays private."""

    order_id: Word
    status: Word
    total: float


class NotKilled(StatecastError):
    """The process that was to be killed ended by itself."""


@dataclass(frozen=True, slots=True)
class Line:
    number: int
    order: Order
    document: dict[str, Any]

    @property
    def key(self) -> str:
        return f"order-{self.order.order_id}"

    @property
    def public(self) -> dict[str, Any]:
        """Give what everybody may see of the order."""
        return {"orderId": self.order.order_id, "status": self.order.status, "total": self.order.total}


@dataclass(frozen=True, slots=True)
class Malformed:
    number: int
    reason: str


def parse_lines(texts: Iterable[str]) -> Iterator[Line | Malformed]:
    """Parse orders as JSON lines, empty ones left out; a line is told with its number, from 1.

    One that is no order, or an order that a store cannot keep, is malformed.
    """
    for number, text in enumerate(texts, start=1):
        if text.strip():
            yield _parse(number, text)


def sample_path() -> Path:
    """Find the sample that comes along: beside this module when installed, in `examples/` in a checkout."""
    installed = Path(__file__).with_name("orders.jsonl")
    return installed if installed.exists() else Path(__file__).parents[2] / "examples" / "orders" / "orders.jsonl"


@dataclass(slots=True)
class Tally:
    """What the demo saw. Times are seconds of the monotonic clock, by line number."""

    committed: dict[int, float] = field(default_factory=dict)
    received: dict[int, float] = field(default_factory=dict)
    newest: dict[str, int] = field(default_factory=dict)
    published: int = 0
    repeated: int = 0
    out_of_order: int = 0
    already_committed: set[int] = field(default_factory=set)

    def note_received(self, key: str, number: int, now: float) -> None:
        """Note an arrival: the first of a line must come after the first of every earlier line of its key."""
        if number in self.received:
            self.repeated += 1
            return
        self.received[number] = now
        if number < self.newest.get(key, 0):
            self.out_of_order += 1
        self.newest[key] = max(number, self.newest.get(key, 0))

    @property
    def latencies(self) -> list[float]:
        """Seconds from a commit's acknowledgement to the arrival of its event, of this process's commits, sorted."""
        both = (self.committed.keys() & self.received.keys()) - self.already_committed
        return sorted(max(self.received[number] - self.committed[number], 0.0) for number in both)

    @property
    def lost(self) -> int:
        return len(self.committed.keys() - self.received.keys())


def percentile(values: list[float], share: float) -> float:
    """Give the value below which that share of the sorted values lies; 0 for none."""
    return values[min(int(len(values) * share), len(values) - 1)] if values else 0.0


@dataclass(frozen=True, slots=True)
class Demo:
    """One demonstration: what it runs on, and the app id, topic and consumer group that are this run's alone."""

    store: DemoStore
    broker: DemoBroker
    components: tuple[Component, ...]
    app_id: str
    topic: str
    rate: float

    async def run(
        self,
        lines: list[Line],
        tally: Tally,
        console: Console,
        *,
        journal: IO[str] | None = None,
        kill_after: int | None = None,
    ) -> None:
        """Commit every line with its event and watch all of them arrive.

        `journal` gets every arrival at once; with `kill_after` this process kills itself after so many.
        """
        # Topics and groups are made when they are first used, and the driver calls their absence errors.
        logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
        complete = asyncio.Event()
        async with Runtime.open(self.components, app_id=self.app_id, options=OPTIONS) as runtime:

            @runtime.subscribe(PUBSUB, self.topic)
            def on_order(event: CloudEvent) -> None:
                key, number = event.subject, int(event.attributes["line"])
                if journal is not None:
                    print(key, number, file=journal, flush=True)
                tally.note_received(key, number, time.monotonic())
                if kill_after is not None and len(tally.received) >= kill_after:
                    os.kill(os.getpid(), signal.SIGKILL)
                if len(tally.received) >= len(lines):
                    complete.set()

            await runtime.ready()
            async with _shown(console, tally, len(lines)):
                await commit_all(runtime.state(STORE), lines, tally, self.rate)
                await _arrival(complete if lines else None, console)
            counts = runtime.relay_counts(STORE)
            tally.published += counts.published if counts else 0


async def commit_all(store: StateClient, lines: list[Line], tally: Tally, rate: float) -> None:
    """Commit the lines through some concurrent writers, `rate` a second, 0 for as fast as it goes.

    The lines of one order go through the same writer, in order.
    """
    queues: list[asyncio.Queue[Line | None]] = [asyncio.Queue() for _ in range(WRITERS)]

    async def write(queue: asyncio.Queue[Line | None]) -> None:
        while (line := await queue.get()) is not None:
            await commit(store, line, tally)

    async with asyncio.TaskGroup() as group:
        for queue in queues:
            group.create_task(write(queue))
        started = time.monotonic()
        for count, line in enumerate(lines):
            if rate:
                await asyncio.sleep(started + count / rate - time.monotonic())
            queues[hash(line.key) % WRITERS].put_nowait(line)
        for queue in queues:
            queue.put_nowait(None)


async def commit(store: StateClient, line: Line, tally: Tally) -> None:
    """Commit one order and its event: the state has all of it, the event only what everybody may see."""
    attributes = {"cloudevent.type": "OrderChanged", "cloudevent.subject": line.key, "line": str(line.number)}
    try:
        async with store.transaction(idempotency_key=f"line-{line.number}") as transaction:
            transaction.upsert(line.key, line.document, metadata=attributes)
            transaction.upsert(line.key, line.public, metadata={"outbox.projection": "true"})
    except Duplicate:
        tally.already_committed.add(line.number)
    tally.committed[line.number] = time.monotonic()


def make_demo(store: DemoStore, broker: DemoBroker, rate: float, folder: Path, servers: Servers) -> Demo:
    """Make a demo of its own; servers that it needs are started, unless their addresses are given."""
    suffix = secrets.token_hex(3)
    topic = f"orders-{suffix}"
    outbox = {"outboxPublishPubsub": PUBSUB, "outboxPublishTopic": topic}
    state = _state_component(store, folder, servers, outbox)
    return Demo(store, broker, (state, _broker_component(broker, servers)), f"demo-{suffix}", topic, rate)


def resumed(demo: Demo) -> Demo:
    """Make the demo that goes on after a crash.

    Where the broker keeps messages, a consumer group of its own reads them from the first on: what the killed
    process had fetched and not handled is held for that process's group for a while.
    """
    state, pubsub = demo.components
    group = {"consumerID": f"{demo.app_id}-resumed", "initialOffset": "oldest"}
    match demo.broker:
        case DemoBroker.IN_MEMORY:
            return demo
        case DemoBroker.REDIS:
            del group["initialOffset"]
    return replace(demo, components=(state, replace(pubsub, metadata={**pubsub.metadata, **group})))


async def run_with_crash(demo: Demo, lines: list[Line], tally: Tally, console: Console, folder: Path) -> None:
    """Let a child process run the demo and kill itself halfway, then go on where it stopped.

    Raises NotKilled where the child ends in another way, which shows nothing.
    """
    journal = folder / "arrivals"
    child = multiprocessing.get_context("spawn").Process(target=_run_and_crash, args=(demo, lines, journal))
    child.start()
    await asyncio.to_thread(child.join)
    if child.exitcode != -signal.SIGKILL:
        raise NotKilled(f"the first process was not killed halfway, it ended with exit code {child.exitcode}")
    arrivals = [line.split() for line in journal.read_text().splitlines()]
    console.print(f"the first process was ended by SIGKILL after {len(arrivals)} arrivals; a second one goes on")
    if demo.broker is DemoBroker.IN_MEMORY:
        for key, number in arrivals:
            tally.note_received(key, int(number), time.monotonic())
    await resumed(demo).run(lines, tally, console)


def run_demo(
    store: DemoStore, broker: DemoBroker, input: IO[str], *, rate: float, crash: bool, console: Console
) -> int:
    """Run the demonstration and print what came of it.

    Returns 0; 1 when something was lost or out of order; 3 when it went well but malformed lines were left out.
    """
    parsed = list(parse_lines(input))
    lines = [line for line in parsed if isinstance(line, Line)]
    malformed = [line for line in parsed if isinstance(line, Malformed)]
    for line in malformed:
        console.print(f"[red]line {line.number} is no order and is left out: {escape(line.reason)}[/red]")
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="statecast-demo-") as folder, Servers() as servers:
        console.print(f"{len(lines)} orders, state in {store}, events through {broker}")
        demo = make_demo(store, broker, rate, Path(folder), servers)
        if crash:
            asyncio.run(run_with_crash(demo, lines, tally, console, Path(folder)))
        else:
            asyncio.run(demo.run(lines, tally, console))
    console.print(summary(tally))
    if tally.lost or tally.out_of_order:
        return 1
    return 3 if malformed else 0


def summary(tally: Tally) -> Table:
    table = Table(title="what became of the orders", show_header=False)
    latencies = tally.latencies
    rows = [
        ("committed", f"{len(tally.committed):,}"),
        ("published by the relay", f"{tally.published:,}"),
        ("received", f"{len(tally.received):,}"),
        ("lost", f"{tally.lost:,}"),
        ("out of order", f"{tally.out_of_order:,}"),
    ]
    if tally.already_committed:
        rows.append(("committed before the crash", f"{len(tally.already_committed):,}"))
    if tally.repeated:
        rows.append(("repeats (same event id)", f"{tally.repeated:,}"))
    for share in (0.50, 0.99) if latencies else ():
        rows.append((f"commit to delivery, p{share * 100:.0f}", f"{percentile(latencies, share) * 1e3:.1f} ms"))
    for row in rows:
        table.add_row(*row)
    return table


def _parse(number: int, text: str) -> Line | Malformed:
    try:
        line = Line(number, msgspec.json.decode(text.encode(), type=Order), json.loads(text))
        check_key(line.key)
        encode(line.document)
    except (ValueError, RecursionError, InvalidRequest) as error:
        return Malformed(number, str(error))
    return line


def _run_and_crash(demo: Demo, lines: list[Line], journal: Path) -> None:
    with journal.open("w") as file:
        quiet = Console(quiet=True)
        asyncio.run(demo.run(lines, Tally(), quiet, journal=file, kill_after=max(len(lines) // 2, 1)))


def _state_component(store: DemoStore, folder: Path, servers: Servers, outbox: dict[str, str]) -> Component:
    match store:
        case DemoStore.SQLITE:
            return Component(STORE, "state.sqlite", metadata={"connectionString": str(folder / "demo.db"), **outbox})
        case DemoStore.POSTGRESQL:
            return Component(STORE, "state.postgresql", "v2", _metadata(servers, ServerKind.POSTGRESQL) | outbox)
        case DemoStore.REDIS:
            return Component(STORE, "state.redis", metadata=_metadata(servers, ServerKind.REDIS) | outbox)


def _broker_component(broker: DemoBroker, servers: Servers) -> Component:
    match broker:
        case DemoBroker.IN_MEMORY:
            return Component(PUBSUB, "pubsub.in-memory")
        case DemoBroker.REDIS:
            return Component(PUBSUB, "pubsub.redis", metadata=_metadata(servers, ServerKind.REDIS))
        case DemoBroker.KAFKA:
            return Component(PUBSUB, "pubsub.kafka", metadata=_metadata(servers, ServerKind.KAFKA))


def _metadata(servers: Servers, kind: ServerKind) -> dict[str, str]:
    return component_metadata(kind, servers.get(kind).address)


async def _arrival(complete: asyncio.Event | None, console: Console) -> None:
    try:
        async with asyncio.timeout(ARRIVAL_TIMEOUT):
            if complete is not None:
                await complete.wait()
    except TimeoutError:
        console.print(f"[red]not everything arrived within {ARRIVAL_TIMEOUT:g} s[/red]")


@asynccontextmanager
async def _shown(console: Console, tally: Tally, total: int) -> AsyncIterator[None]:
    """Keep a progress line up to date while the block runs."""
    columns = (TextColumn("received"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total)

        async def refresh() -> None:
            while True:
                progress.update(task, completed=len(tally.received))
                await asyncio.sleep(0.1)

        async with asyncio.TaskGroup() as group:
            refreshing = group.create_task(refresh())
            try:
                yield
            finally:
                refreshing.cancel()
        progress.update(task, completed=len(tally.received))
