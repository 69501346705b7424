"""The servers of `statecast.testing.fixtures`, the older ones of which some backends are tested on too, and time."""

from collections.abc import Generator, Iterator

import pytest
from hypothesis import settings

from statecast.runtime.servers import ServerKind, Servers, Variant
from statecast.testing.fixtures import empty_redis, fresh_database, shared_server

pytest_plugins = ["pytester"]

# A machine that is busy is no finding.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

_BEGAN = pytest.StashKey[float]()


@pytest.fixture
def older_postgresql_url(servers: Servers, request: pytest.FixtureRequest) -> Iterator[str]:
    """A fresh, empty database on PostgreSQL 15."""
    yield from fresh_database(shared_server(request, servers, ServerKind.POSTGRESQL, Variant.OLDER))


@pytest.fixture
def older_redis_url(servers: Servers, request: pytest.FixtureRequest) -> str:
    """An empty database on Redis 7.0, or on a Valkey that is no newer than that in what it can do."""
    return empty_redis(shared_server(request, servers, ServerKind.REDIS, Variant.OLDER))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail what went on for longer than its time: an event loop only logs a timeout that is raised in a callback."""
    report = yield
    began = item.stash.setdefault(_BEGAN, call.start)
    marker = item.get_closest_marker("timeout")
    seconds = float(marker.args[0] if marker else item.config.getini("timeout"))
    # The timer starts a moment before the first phase does.
    if call.when == "call" and report.passed and call.stop - began > 0.99 * seconds:
        report.outcome = "failed"
        report.longrepr = f"it took {call.stop - began:.0f} s; the time for a test is {seconds:.0f} s"
    return report
