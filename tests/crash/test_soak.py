"""A minute of the soak, with a seed that stays."""

from collections.abc import Callable

import pytest
from rich.console import Console

from statecast.runtime.servers import PrivateServer, ServerKind
from tests.crash.soak import Grounds, soak, table_of

SECONDS = 60.0
SEED = 7


@pytest.fixture
def grounds(private_server: Callable[[ServerKind], PrivateServer]) -> Grounds:
    return Grounds(private_server)


@pytest.mark.timeout(480)
async def test_nothing_is_lost_doubled_reordered_or_made_up_in_a_minute(grounds: Grounds) -> None:
    """Tried with positions that are persisted before what they pass is published: events are lost."""
    tallies = await soak(grounds, SECONDS, SEED)

    Console(width=140).print(table_of(tallies))
    for pair, tally in tallies.items():
        assert tally.is_clean, f"{pair}: {tally.problems}"
        assert tally.relayed >= tally.committed > 0, f"{pair}: {tally}"
        assert tally.kills + tally.freezes + tally.restarts > 0, f"{pair}: nothing happened to it"
    assert all(sum(getattr(tally, what) for tally in tallies.values()) for what in ("kills", "freezes", "restarts"))
