"""Real servers as pytest fixtures: `pytest_plugins = ["statecast.testing.fixtures"]` in your topmost `conftest.py`.

`postgresql_url`, `redis_url` and `kafka_bootstrap` are addresses; `postgresql_metadata`, `redis_metadata` and
`kafka_metadata` what a `Component` needs to reach the same. `private_server` starts servers that a test may kill.

A kind of server is started when the first test asks for it, or taken from where an address is given, in the order that
`statecast.runtime.servers` tells; all tests share it until the run ends. A test that cannot have its server is skipped
with the reason, and with CI=true it fails. The summary tells which server of which version the tests ran on.
"""

import itertools
import os
import secrets
from collections.abc import Callable, Iterator
from typing import NoReturn
from urllib.parse import urlsplit

import pytest

from statecast.runtime.server_answers import run_redis, run_sql
from statecast.runtime.servers import (
    ADDRESS_VARIABLES,
    PrivateServer,
    Server,
    ServerKind,
    ServerMissing,
    Servers,
    Variant,
    component_metadata,
)

_SERVERS = pytest.StashKey[Servers]()
_MISSING = pytest.StashKey[dict[str, str]]()
_redis_databases = itertools.cycle(range(16))


@pytest.fixture(scope="session")
def servers(request: pytest.FixtureRequest) -> Iterator[Servers]:
    """The servers that the tests of this run share; see `shared_server`."""
    with Servers() as all_servers:
        request.config.stash[_SERVERS] = all_servers
        yield all_servers


@pytest.fixture
def postgresql_url(servers: Servers, request: pytest.FixtureRequest) -> Iterator[str]:
    """A fresh, empty database, for a component's `connectionString`; dropped after the test."""
    yield from fresh_database(shared_server(request, servers, ServerKind.POSTGRESQL))


@pytest.fixture
def redis_url(servers: Servers, request: pytest.FixtureRequest) -> str:
    """An empty database: of 16 in turn on a server of our own, the very one of a URL that was given.

    It is emptied (FLUSHDB) before the test: give STATECAST_TEST_REDIS_URL none that holds anything of value.
    """
    return empty_redis(shared_server(request, servers, ServerKind.REDIS))


@pytest.fixture
def kafka_bootstrap(servers: Servers, request: pytest.FixtureRequest) -> str:
    """A broker that all tests share, as `host:port`: each takes topics, groups and transactional ids of its own."""
    return shared_server(request, servers, ServerKind.KAFKA).address


@pytest.fixture
def postgresql_metadata(postgresql_url: str) -> dict[str, str]:
    return component_metadata(ServerKind.POSTGRESQL, postgresql_url)


@pytest.fixture
def redis_metadata(redis_url: str) -> dict[str, str]:
    return component_metadata(ServerKind.REDIS, redis_url)


@pytest.fixture
def kafka_metadata(kafka_bootstrap: str) -> dict[str, str]:
    return component_metadata(ServerKind.KAFKA, kafka_bootstrap)


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


def shared_server(
    request: pytest.FixtureRequest, servers: Servers, kind: ServerKind, variant: Variant = Variant.CURRENT
) -> Server:
    """Return the shared server of this kind; where none can be had the test ends here, skipped or failed."""
    try:
        return servers.get(kind, variant=variant)
    except ServerMissing as missing:
        _go_without(request, _label(kind, variant), missing)


def fresh_database(server: Server) -> Iterator[str]:
    """Make a database on a PostgreSQL server, yield its URL and drop the database."""
    name = f"test_{secrets.token_hex(8)}"
    # A copy of the template's files takes 0.03 s; logging the copy, which is the default, three times as long.
    run_sql(server.address, f"CREATE DATABASE {name} STRATEGY file_copy")
    yield urlsplit(server.address)._replace(path=f"/{name}").geturl()
    run_sql(server.address, f"DROP DATABASE {name} WITH (FORCE)")


def empty_redis(server: Server) -> str:
    """Empty the next database of a Redis server, or the one of the address that was given, and return its URL."""
    url = server.address
    if os.environ.get(ADDRESS_VARIABLES[ServerKind.REDIS]) != url:
        url = urlsplit(url)._replace(path=f"/{next(_redis_databases)}").geturl()
    run_redis(url, "FLUSHDB")
    return url


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


def _go_without(request: pytest.FixtureRequest, label: str, missing: ServerMissing) -> NoReturn:
    request.config.stash.setdefault(_MISSING, {})[label] = str(missing)
    if os.environ.get("CI") == "true":
        pytest.fail(str(missing), pytrace=False)
    pytest.skip(str(missing))


def _label(kind: ServerKind, variant: Variant) -> str:
    return kind.value if variant is Variant.CURRENT else f"{variant} {kind}"
