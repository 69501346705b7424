"""Real servers for tests, the demo, the benchmarks and `statecast servers`.

A server is looked for in this order: the address that an environment variable gives (one that does not answer is an
error, never a reason to look further), a Docker container if an engine answers, a process of this machine.
STATECAST_TEST_SERVERS=docker or =local allows only that one of the last two.

Everything here blocks; asyncio code calls it through `asyncio.to_thread`.
"""

import os
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from statecast.runtime.server import (
    Keeping,
    PrivateServer,
    Server,
    ServerFailed,
    ServerKind,
    ServerMissing,
    Variant,
    component_metadata,
)
from statecast.runtime.server_answers import ask_version
from statecast.runtime.server_containers import ContainerServer, find_image, why_no_docker
from statecast.runtime.server_installations import Installation, find_installation
from statecast.runtime.server_processes import LocalServer

__all__ = [
    "ADDRESS_VARIABLES",
    "CHOICE_VARIABLE",
    "Keeping",
    "PrivateServer",
    "Server",
    "ServerFailed",
    "ServerKind",
    "ServerMissing",
    "Servers",
    "Variant",
    "component_metadata",
    "find_means",
    "start_server",
]

ADDRESS_VARIABLES = {
    ServerKind.POSTGRESQL: "STATECAST_TEST_POSTGRESQL_URL",
    ServerKind.REDIS: "STATECAST_TEST_REDIS_URL",
    ServerKind.KAFKA: "STATECAST_TEST_KAFKA_BOOTSTRAP",
}
CHOICE_VARIABLE = "STATECAST_TEST_SERVERS"


class Servers:
    """The servers of one run: each kind is started when it is first asked for and shared until the end.

    `durable` starts them with the settings that a production server has; without, they may lose data when the machine
    stops, but not what is asked of them here. May be used from several threads.
    """

    def __init__(self, *, durable: bool = False, environment: Mapping[str, str] = os.environ) -> None:
        self._durable = durable
        self._environment = environment
        self._lock = threading.RLock()
        self._owned = ExitStack()
        self._shared: dict[tuple[ServerKind, Variant], Server] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def used(self) -> Mapping[tuple[ServerKind, Variant], Server]:
        """The shared servers that were asked for so far; still told after `close`."""
        return self._shared

    def get(self, kind: ServerKind, *, variant: Variant = Variant.CURRENT) -> Server:
        """Return the shared server of this kind, started if need be; raises ServerMissing or ServerFailed."""
        with self._lock:
            if (kind, variant) not in self._shared:
                self._shared[kind, variant] = self._given(kind, variant) or self._start_shared(kind, variant)
            return self._shared[kind, variant]

    def private(
        self, kind: ServerKind, *, variant: Variant = Variant.CURRENT, durable: bool | None = None
    ) -> PrivateServer:
        """Start a server that the caller may kill, freeze and restart; what it stored survives that.

        It is never one given by address, and ends with this object if the caller has not closed it.
        """
        keeping = Keeping(after_kill=True, durable=self._durable if durable is None else durable)
        server = start_server(kind, keeping, variant=variant, environment=self._environment)
        with self._lock:
            self._owned.callback(server.close)
        return server

    def close(self) -> None:
        """End every server that was started here, and remove its data."""
        with self._lock:
            self._owned.close()

    def _given(self, kind: ServerKind, variant: Variant) -> Server | None:
        variable = ADDRESS_VARIABLES[kind]
        address = self._environment.get(variable)
        if variant is not Variant.CURRENT or not address:
            return None
        try:
            return Server(kind, ask_version(kind, address), f"given by {variable}", address)
        except ServerFailed as error:
            raise ServerFailed(f"{variable} is set, but {error}") from error

    def _start_shared(self, kind: ServerKind, variant: Variant) -> Server:
        keeping = Keeping(durable=self._durable)
        server = start_server(kind, keeping, variant=variant, environment=self._environment)
        self._owned.callback(server.close)
        return server.describe()


def start_server(
    kind: ServerKind,
    keeping: Keeping,
    *,
    variant: Variant = Variant.CURRENT,
    environment: Mapping[str, str] = os.environ,
) -> PrivateServer:
    """Start a server in a container or, where that cannot be, as a process; raises ServerMissing or ServerFailed.

    It ends with this Python process at the latest.
    """
    installation = find_means(kind, variant, environment)
    if installation is None:
        return ContainerServer.start(find_image(kind, variant), keeping)
    return LocalServer.start(installation, keeping)


def find_means(kind: ServerKind, variant: Variant, environment: Mapping[str, str]) -> Installation | None:
    """Find what runs a server as a process here, or None where Docker shall; raises ServerMissing if nothing can."""
    no_docker = _reason_against_docker(environment)
    if no_docker is None:
        return None
    if environment.get(CHOICE_VARIABLE) == "docker":
        raise ServerMissing(f"no {kind} server: {CHOICE_VARIABLE} is docker, but {no_docker}")
    try:
        return find_installation(kind, variant)
    except ServerMissing as missing:
        raise ServerMissing(_how_to_get(kind, variant, no_docker, missing)) from missing


def _reason_against_docker(environment: Mapping[str, str]) -> str | None:
    match environment.get(CHOICE_VARIABLE, ""):
        case "local":
            return f"{CHOICE_VARIABLE} is local"
        case "" | "docker":
            return why_no_docker()
        case other:
            raise ServerFailed(f"{CHOICE_VARIABLE} is {other!r}; it can be local or docker")


def _how_to_get(kind: ServerKind, variant: Variant, no_docker: str, missing: ServerMissing) -> str:
    given = f"set {ADDRESS_VARIABLES[kind]}, or " if variant is Variant.CURRENT else ""
    return f"no {kind} server: {given}start Docker ({no_docker}), or install {missing}"
