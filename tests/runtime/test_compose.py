"""docker-compose.yml, as far as it can be checked without an engine: it says the same as our own containers do."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from statecast.runtime.server import ServerKind, Variant
from statecast.runtime.server_containers import find_image
from statecast.runtime.servers import ADDRESS_VARIABLES

_COMPOSE_FILE = Path(__file__).parents[2] / "docker-compose.yml"


@pytest.fixture
def services() -> dict[str, Any]:
    services: dict[str, Any] = yaml.safe_load(_COMPOSE_FILE.read_text())["services"]
    return services


def test_there_is_one_service_per_kind_of_server(services: dict[str, Any]) -> None:
    assert set(services) == {kind.value for kind in ServerKind}


@pytest.mark.parametrize("kind", list(ServerKind))
def test_image_port_and_settings_are_those_of_our_own_containers(services: dict[str, Any], kind: ServerKind) -> None:
    image = find_image(kind, Variant.CURRENT)

    service = services[kind.value]

    assert service["image"] == image.name
    assert service["ports"] == [f"127.0.0.1:{image.port}:{image.port}"]
    assert service.get("environment", {}) == {
        name: value.format(host="127.0.0.1", port=image.port) for name, value in image.environment.items()
    }


@pytest.mark.parametrize("kind", list(ServerKind))
def test_the_addresses_it_tells_are_those_of_its_ports(kind: ServerKind) -> None:
    image = find_image(kind, Variant.CURRENT)

    told = f"export {ADDRESS_VARIABLES[kind]}={image.address('127.0.0.1', image.port)}\n"

    assert told in _COMPOSE_FILE.read_text()


def test_compose_can_wait_for_every_service(services: dict[str, Any]) -> None:
    checks = [service["healthcheck"] for service in services.values()]

    assert all(check["test"][0] == "CMD" and check["retries"] > 1 for check in checks)
