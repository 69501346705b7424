"""The ring under a steady writer, a transaction left open, and a dump: the benchmark of millions in small."""

import pytest

from benchmarks.space import SpacePlan, run_through, slowdown
from statecast.components.state.postgresql import log, schema

PARTITION_BITS = 12
"""A partition takes 4,096 ids here, so that the ring comes round often."""

PLAN = SpacePlan(events=500_000, ahead=4_000, trim_seconds=0.05, persist_seconds=0.05)

FEW_BYTES = 60_000_000
"""A fifth of all that is written, and less than is written while the transaction is open."""

FLAT = 5.0
"""A read of the last tenth takes no longer than this many of the first: generous, since the machine has other work."""


async def test_the_outbox_stays_as_small_and_as_quick_as_it_was(
    postgresql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails when a partition waits for open transactions that have nothing in it (tried)."""
    monkeypatch.setattr(schema, "PARTITION_BITS", PARTITION_BITS)
    monkeypatch.setattr(log, "PARTITION_BITS", PARTITION_BITS)

    report = await run_through(postgresql_url, PLAN)

    assert report.count == PLAN.events
    assert report.most_bytes(0, PLAN.dump[0]) < FEW_BYTES
    assert report.most_bytes(0.9, 1) < FEW_BYTES
    assert slowdown(report.reads) < FLAT
    assert slowdown(report.advances) < FLAT
