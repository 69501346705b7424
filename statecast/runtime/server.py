"""Real servers as values: which there are, where one runs, and what one that we started can be made to do."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol
from urllib.parse import unquote, urlsplit

from statecast.errors import StatecastError


class ServerKind(StrEnum):
    POSTGRESQL = "postgresql"
    REDIS = "redis"
    KAFKA = "kafka"


class Variant(StrEnum):
    """CURRENT is the newest release we support, OLDER one that many users still run: Postgres 15, Redis 7."""

    CURRENT = "current"
    OLDER = "older"


@dataclass(frozen=True, slots=True)
class Server:
    """A server that answered. `version` is its own word; `origin` says where it came from, for people.

    `address`: `postgresql://postgres@127.0.0.1:PORT/postgres`, `redis://127.0.0.1:PORT/0`, `127.0.0.1:PORT` (Kafka).
    """

    kind: ServerKind
    version: str
    origin: str
    address: str


def component_metadata(kind: ServerKind, address: str) -> dict[str, str]:
    """Make the metadata with which a component of this kind reaches the server at such an address."""
    match kind:
        case ServerKind.POSTGRESQL:
            return {"connectionString": address}
        case ServerKind.REDIS:
            url = urlsplit(address)
            database = url.path.strip("/")
            given = {
                "redisHost": url.netloc.rpartition("@")[2],
                "redisDB": "" if database == "0" else database,
                "redisUsername": unquote(url.username or ""),
                "redisPassword": unquote(url.password or ""),
                "enableTLS": "true" if url.scheme == "rediss" else "",
            }
            return {name: value for name, value in given.items() if value}
        case ServerKind.KAFKA:
            return {"brokers": address, "authType": "none"}


@dataclass(frozen=True, slots=True)
class Keeping:
    """What must survive: `after_kill` the end of the server's process, `durable` also that of the machine.

    Neither: fast servers for tests. `durable` is each server's own default durability or better, for benchmarks.
    """

    after_kill: bool = False
    durable: bool = False


class ServerMissing(StatecastError):
    """A server of this kind cannot be had on this machine as it is; the message says what would bring it."""


class ServerFailed(StatecastError):
    """A server was there or was started, but did not answer; the message has the address or the end of its log."""


class PrivateServer(Protocol):
    """A server that belongs to its starter alone. The address stays the same over restarts."""

    @property
    def kind(self) -> ServerKind: ...

    @property
    def address(self) -> str: ...

    def describe(self) -> Server:
        """Name version and origin as they were at the start."""
        ...

    def kill(self) -> None:
        """End every process of the server with SIGKILL, and wait until they are gone. Again is harmless."""
        ...

    def freeze(self) -> None:
        """Stop every process of the server where it stands: connections stay open and nothing answers."""
        ...

    def thaw(self) -> None:
        """Let a frozen server go on."""
        ...

    def restart(self) -> None:
        """Start the server again on its data and return when it answers; one that runs is stopped in good order."""
        ...

    def close(self) -> None:
        """End the server and remove its data. Again is harmless."""
        ...
