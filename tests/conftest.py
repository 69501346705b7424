"""Real servers as fixtures. Where one cannot be had its tests are skipped with the reason, and fail with CI=true."""

import itertools
import os
import secrets
from collections.abc import Callable, Generator, Iterator
from typing import NoReturn
from urllib.parse import urlsplit

import pytest
from hypothesis import settings

from statecast.runtime.server_answers import run_redis, run_sql
from statecast.runtime.servers import (
    ADDRESS_VARIABLES,
    PrivateServer,
    Server,
    ServerKind,
    ServerMissing,
    Servers,
    Variant,
)

# A machine that is busy is no finding.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

_SERVERS = pytest.StashKey[Servers]()
_BEGAN = pytest.StashKey[float]()
_MISSING = pytest.StashKey[dict[str, str]]()
_redis_databases = itertools.cycle(range(16))


@pytest.fixture(scope="session")
def servers(request: pytest.FixtureRequest) -> Iterator[Servers]:
    with Servers() as all_servers:
        request.config.stash[_SERVERS] = all_servers
        yield all_servers


@pytest.fixture
def postgresql_url(servers: Servers, request: pytest.FixtureRequest) -> Iterator[str]:
    """A fresh, empty database."""
    yield from _fresh_database(_have(request, servers, ServerKind.POSTGRESQL).address)


@pytest.fixture
def older_postgresql_url(servers: Servers, request: pytest.FixtureRequest) -> Iterator[str]:
    """A fresh, empty database on PostgreSQL 15."""
    yield from _fresh_database(_have(request, servers, ServerKind.POSTGRESQL, Variant.OLDER).address)


@pytest.fixture
def redis_url(servers: Servers, request: pytest.FixtureRequest) -> str:
    """An empty database: of 16 in turn on a server of our own, the very one of a URL that was given."""
    return _empty_redis(_have(request, servers, ServerKind.REDIS))


@pytest.fixture
def older_redis_url(servers: Servers, request: pytest.FixtureRequest) -> str:
    """An empty database on Redis 7.0, or on a Valkey that is no newer than that in what it can do."""
    return _empty_redis(_have(request, servers, ServerKind.REDIS, Variant.OLDER))


@pytest.fixture
def kafka_bootstrap(servers: Servers, request: pytest.FixtureRequest) -> str:
    """A broker that all tests share: each takes topics, groups and transactional ids of its own, and deletes none."""
    return _have(request, servers, ServerKind.KAFKA).address


@pytest.fixture
def private_server(servers: Servers, request: pytest.FixtureRequest) -> Iterator[Callable[[ServerKind], PrivateServer]]:
    """Start servers that this test alone uses, and may kill, freeze, thaw and restart with their data."""
    started: list[PrivateServer] = []

    def start(kind: ServerKind) -> PrivateServer:
        try:
            started.append(servers.private(kind))
        except ServerMissing as missing:
            _go_without(request, f"private {kind}", missing)
        return started[-1]

    yield start
    for server in started:
        server.close()


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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    servers = config.stash.get(_SERVERS, None)
    missing = config.stash.get(_MISSING, {})
    if servers is None or not (servers.used or missing):
        return
    terminalreporter.section("servers")
    for (kind, variant), server in sorted(servers.used.items()):
        terminalreporter.line(f"{_label(kind, variant)}: {server.version} ({server.origin})")
    for label, reason in sorted(missing.items()):
        terminalreporter.line(f"{label}: none; {reason}")


def _have(
    request: pytest.FixtureRequest, servers: Servers, kind: ServerKind, variant: Variant = Variant.CURRENT
) -> Server:
    try:
        return servers.get(kind, variant=variant)
    except ServerMissing as missing:
        _go_without(request, _label(kind, variant), missing)


def _go_without(request: pytest.FixtureRequest, label: str, missing: ServerMissing) -> NoReturn:
    request.config.stash.setdefault(_MISSING, {})[label] = str(missing)
    if os.environ.get("CI") == "true":
        pytest.fail(str(missing), pytrace=False)
    pytest.skip(str(missing))


def _label(kind: ServerKind, variant: Variant) -> str:
    return kind.value if variant is Variant.CURRENT else f"{variant} {kind}"


def _fresh_database(server_url: str) -> Iterator[str]:
    name = f"test_{secrets.token_hex(8)}"
    # A copy of the template's files takes 0.03 s; logging the copy, which is the default, three times as long.
    run_sql(server_url, f"CREATE DATABASE {name} STRATEGY file_copy")
    yield urlsplit(server_url)._replace(path=f"/{name}").geturl()
    run_sql(server_url, f"DROP DATABASE {name} WITH (FORCE)")


def _empty_redis(server: Server) -> str:
    url = server.address
    if os.environ.get(ADDRESS_VARIABLES[ServerKind.REDIS]) != url:
        url = urlsplit(url)._replace(path=f"/{next(_redis_databases)}").geturl()
    run_redis(url, "FLUSHDB")
    return url
