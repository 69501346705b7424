"""Building an outbox event, beside the `cloudevents` SDK: both from a Python dict to the bytes that leave.

Ours also makes the commit of it, with the value for the store.
"""

import time
from collections.abc import Callable
from datetime import UTC, datetime

from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent

from benchmarks.ratio import Ratio
from statecast.components.state.value import upsert
from statecast.outbox.event import EventIds, EventSource
from statecast.outbox.plan import Outbox, plan_commit
from statecast.pubsub.cloudevent import TraceContext

ROUNDS = 5
ROUND_SECONDS = 1.0
ORDER = {"orderId": 1, "total": 250.5, "items": [{"sku": f"sku-{number}", "quantity": number} for number in range(5)]}
TRACE = TraceContext("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
OUTBOX = Outbox("pubsub", "orders")
IDS = EventIds("outbox")
FORMAT = JSONFormat()


async def measure() -> list[Ratio]:
    rounds = [(_per_second(_ours), _per_second(_theirs)) for _ in range(ROUNDS)]
    ours, theirs = map(max, zip(*rounds, strict=True))
    return [Ratio("building an event", ours, theirs, "events/s", "the cloudevents SDK", 2.5)]


def _ours() -> bytes:
    operation = upsert("shop||order-1", ORDER, metadata={"cloudevent.type": "OrderPlaced"})
    source = EventSource("shop", datetime.now(UTC), TRACE, IDS)
    return plan_commit([operation], OUTBOX, source, str).records[0].body


def _theirs() -> bytes:
    attributes = {
        "id": IDS.next(),
        "source": "shop",
        "type": "OrderPlaced",
        "specversion": "1.0",
        "time": datetime.now(UTC),
        "datacontenttype": "application/json",
        "topic": "orders",
        "pubsubname": "pubsub",
        "traceid": TRACE.traceparent,
        "traceparent": TRACE.traceparent,
        "tracestate": TRACE.tracestate,
    }
    return FORMAT.write(CloudEvent(attributes, ORDER))


def _per_second(build: Callable[[], bytes]) -> float:
    count = 0
    started = time.perf_counter()
    while (elapsed := time.perf_counter() - started) < ROUND_SECONDS:
        for _ in range(100):
            build()
        count += 100
    return count / elapsed
