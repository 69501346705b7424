"""The ring under a steady writer, a transaction left open, and a dump: the benchmark of millions in small."""

import pytest

from benchmarks.space import SpacePlan, run_through
from statecast.components.state.postgresql import log, schema

PARTITION_BITS = 12
"""A partition takes 4,096 ids here, so that the ring comes round often."""

PLAN = SpacePlan(events=500_000, ahead=4_000, trim_seconds=0.05, persist_seconds=0.05)

FEW_BYTES = 60_000_000
"""A fifth of all that is written, and less than is written while the transaction is open."""

FEW_LOOKS = 8.0
"""Some 3 are usual, and some 10 while a dump keeps the ring from being emptied."""

FEW_BLOCKS = 10.0
"""To persist a position takes some 4, and some 40 while the transaction is open and keeps old versions."""


async def test_the_outbox_stays_small_and_each_event_is_looked_at_a_few_times(
    postgresql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How long that takes is measured by the benchmark.

    Fails when a partition waits for open transactions that have nothing in it, and when a read does not begin at an
    id (tried).
    """
    monkeypatch.setattr(schema, "PARTITION_BITS", PARTITION_BITS)
    monkeypatch.setattr(log, "PARTITION_BITS", PARTITION_BITS)

    report = await run_through(postgresql_url, PLAN)

    assert report.count == PLAN.events
    assert report.most_bytes(0, PLAN.dump[0]) < FEW_BYTES
    assert report.most_bytes(0.9, 1) < FEW_BYTES
    assert report.looks < FEW_LOOKS
    assert report.blocks(0.8, 1) < FEW_BLOCKS
