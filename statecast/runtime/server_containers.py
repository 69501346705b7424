"""Servers as Docker containers, through testcontainers, which also removes them when their starter is gone."""

import functools
import time
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING

from statecast.runtime.ports import free_port
from statecast.runtime.server import Keeping, Server, ServerFailed, ServerKind, ServerMissing, Variant
from statecast.runtime.server_answers import NoAnswer, ask_version
from statecast.runtime.server_installations import KAFKA_SETTINGS, KAFKA_VERSION, redis_options

if TYPE_CHECKING:
    from testcontainers.core.container import DockerContainer

_START_SECONDS = 90.0


@dataclass(frozen=True, slots=True)
class Image:
    """A container image and how to run it. In an environment value `{host}` and `{port}` are where clients connect."""

    kind: ServerKind
    name: str
    port: int
    environment: Mapping[str, str] = field(default_factory=dict)

    def address(self, host: str, port: int) -> str:
        match self.kind:
            case ServerKind.POSTGRESQL:
                return f"postgresql://postgres@{host}:{port}/postgres"
            case ServerKind.REDIS:
                return f"redis://{host}:{port}/0"
            case ServerKind.KAFKA:
                return f"{host}:{port}"


# The image takes its own settings only as long as no KAFKA_ variable is given, so all are.
KAFKA_ENVIRONMENT = {f"KAFKA_{name.upper().replace('.', '_')}": value for name, value in KAFKA_SETTINGS.items()} | {
    "KAFKA_LISTENERS": "PLAINTEXT://:9092,CONTROLLER://:9093",
    "KAFKA_ADVERTISED_LISTENERS": "PLAINTEXT://{host}:{port}",
    "KAFKA_CONTROLLER_QUORUM_VOTERS": "1@localhost:9093",
}

IMAGES = {
    (ServerKind.POSTGRESQL, Variant.CURRENT): Image(
        ServerKind.POSTGRESQL, "postgres:18-alpine", 5432, {"POSTGRES_HOST_AUTH_METHOD": "trust"}
    ),
    (ServerKind.POSTGRESQL, Variant.OLDER): Image(
        ServerKind.POSTGRESQL, "postgres:15-alpine", 5432, {"POSTGRES_HOST_AUTH_METHOD": "trust"}
    ),
    (ServerKind.REDIS, Variant.CURRENT): Image(ServerKind.REDIS, "redis:8", 6379),
    (ServerKind.REDIS, Variant.OLDER): Image(ServerKind.REDIS, "redis:7.0", 6379),
    (ServerKind.KAFKA, Variant.CURRENT): Image(
        ServerKind.KAFKA, f"apache/kafka:{KAFKA_VERSION}", 9092, KAFKA_ENVIRONMENT
    ),
}


def find_image(kind: ServerKind, variant: Variant) -> Image:
    if (kind, variant) not in IMAGES:
        raise ServerMissing(f"there is no {variant} variant of {kind}")
    return IMAGES[kind, variant]


@functools.cache
def why_no_docker() -> str | None:
    """Return None if a Docker engine answers and can be used, else the reason."""
    if find_spec("testcontainers") is None:
        return "testcontainers is not installed (pip install 'statecast[servers]')"
    from docker.errors import DockerException
    from testcontainers.core.docker_client import DockerClient

    try:
        with closing(DockerClient(timeout=5).client) as client:
            client.ping()
    except (DockerException, OSError) as error:
        return f"no Docker engine answers ({str(error).splitlines()[0][:120]})"
    return None


class ContainerServer:
    """A server in a container, on a host port that it keeps over restarts: one that Docker chooses it would not."""

    def __init__(self, image: Image, container: "DockerContainer", address: str) -> None:
        self._image = image
        self._container = container
        self._address = address
        self._version = ""

    @classmethod
    def start(
        cls, image: Image, keeping: Keeping, *, port: int | None = None, outliving: bool = False
    ) -> "ContainerServer":
        """Start a container and return when the server in it answers; raises ServerFailed.

        With `outliving` it stays when this process ends, until it is removed by its id.
        """
        from docker.errors import DockerException
        from testcontainers.core.config import testcontainers_config

        reaper_was_disabled = testcontainers_config.ryuk_disabled
        testcontainers_config.ryuk_disabled = outliving or reaper_was_disabled
        container, address = _configure(image, keeping, free_port() if port is None else port)
        server = cls(image, container, address)
        try:
            container.start()
            server._wait_until_ready()
        except DockerException as error:
            server.close()
            raise ServerFailed(f"{image.name} could not be started: {error}") from error
        except BaseException:
            server.close()
            raise
        finally:
            testcontainers_config.ryuk_disabled = reaper_was_disabled
        return server

    @property
    def kind(self) -> ServerKind:
        return self._image.kind

    @property
    def address(self) -> str:
        return self._address

    @property
    def container_id(self) -> str:
        return self._container.get_container_id()

    def describe(self) -> Server:
        return Server(self.kind, self._version, f"Docker, {self._image.name}", self._address)

    def kill(self) -> None:
        container = self._container.get_wrapped_container()
        container.reload()
        if container.status in ("running", "paused"):
            container.kill()
            container.wait()

    def freeze(self) -> None:
        self._container.get_wrapped_container().pause()

    def thaw(self) -> None:
        self._container.get_wrapped_container().unpause()

    def restart(self) -> None:
        container = self._container.get_wrapped_container()
        container.reload()
        if container.status == "paused":
            container.unpause()
        container.restart()
        self._wait_until_ready()

    def close(self) -> None:
        from docker.errors import NotFound

        with suppress(NotFound):
            self._container.stop()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                self._version = ask_version(self.kind, self._address, timeout=2.0)
                return
            except NoAnswer as error:
                container = self._container.get_wrapped_container()
                container.reload()
                if container.status == "exited" or time.monotonic() > deadline:
                    log = container.logs(tail=15).decode(errors="replace")
                    raise ServerFailed(f"{self._image.name} did not answer: {error}\n{log}") from error
            time.sleep(0.1)


def remove_container(container_id: str) -> None:
    """Remove a container that outlived its starter; one that is gone already is as it should be."""
    from docker.errors import NotFound
    from testcontainers.core.docker_client import DockerClient

    with suppress(NotFound), closing(DockerClient().client) as client:
        client.containers.get(container_id).remove(force=True, v=True)


def is_container_running(container_id: str) -> bool:
    from docker.errors import DockerException
    from testcontainers.core.docker_client import DockerClient

    try:
        with closing(DockerClient().client) as client:
            return bool(client.containers.get(container_id).status == "running")
    except DockerException:
        return False


def _configure(image: Image, keeping: Keeping, port: int) -> tuple["DockerContainer", str]:
    from testcontainers.core.container import DockerContainer

    container = DockerContainer(image.name)
    host = container.get_docker_client().host()
    interface = "127.0.0.1" if host in ("localhost", "127.0.0.1") else "0.0.0.0"
    host = "127.0.0.1" if interface == "127.0.0.1" else host
    container.ports = {f"{image.port}/tcp": (interface, port)}  # type: ignore[dict-item]  # docker-py takes the pair
    for name, value in image.environment.items():
        container.with_env(name, value.format(host=host, port=port))
    command = _command(image.kind, keeping)
    if command:
        container.with_command(command)
    return container, image.address(host, port)


def _command(kind: ServerKind, keeping: Keeping) -> list[str]:
    match kind:
        case ServerKind.POSTGRESQL:
            return ["postgres", "-c", "max_connections=200", *([] if keeping.durable else ["-c", "fsync=off"])]
        case ServerKind.REDIS:
            # Protected, it would refuse whoever does not come from inside of the container.
            return ["redis-server", "--protected-mode", "no", *redis_options(keeping)]
        case ServerKind.KAFKA:
            return []
