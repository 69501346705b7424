import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from statecast.clock import SystemClock
from statecast.components.manifest import Component
from statecast.components.registry import BUILT_IN, Registration, Registry, installed, with_entry_points
from statecast.components.state.memory import MemoryStateStore
from statecast.errors import ComponentError

BACKEND = """
import {driver}

class Backend:
    def __init__(self, component, *, app_id, clock):
        self.arguments = (component, app_id, clock)
"""


def component(type: str, version: str = "") -> Component:
    return Component("x", type, version, origin="c/a.yaml, document 1")


def failure_of(registry: Registry, type: str, version: str = "") -> str:
    with pytest.raises(ComponentError) as failure:
        registry.state_store(component(type, version), app_id="orders", clock=SystemClock())
    return str(failure.value)


@pytest.fixture
def backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A third party's package, importable under the name that is given back."""
    (tmp_path / "third_party_backend.py").write_text(BACKEND.format(driver="asyncio"))
    (tmp_path / "driverless_backend.py").write_text(BACKEND.format(driver="a_driver_that_nobody_has.core"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "third_party_backend", raising=False)
    return "third_party_backend"


def test_a_type_is_made_into_its_class() -> None:
    store = BUILT_IN.state_store(component("state.in-memory"), app_id="orders", clock=SystemClock())

    assert isinstance(store, MemoryStateStore)


def test_the_types_of_this_release_are_known() -> None:
    assert set(installed().registrations) >= {
        "state.in-memory",
        "state.sqlite",
        "state.sqlite3",
        "state.postgresql",
        "state.postgres",
        "state.redis",
        "pubsub.in-memory",
        "pubsub.redis",
        "pubsub.kafka",
    }


@pytest.mark.parametrize(
    ("type", "version", "metadata"),
    [
        ("state.in-memory", "v1", {}),
        ("state.sqlite", "v1", {"connectionString": ":memory:"}),
        ("state.sqlite3", "v1", {"connectionString": ":memory:"}),
        ("state.postgresql", "v2", {"connectionString": "postgresql://u@127.0.0.1:5432/d"}),
        ("state.postgres", "v2", {"connectionString": "postgresql://u@127.0.0.1:5432/d"}),
        ("state.redis", "v1", {"redisHost": "127.0.0.1:6379"}),
        ("pubsub.in-memory", "v1", {}),
        ("pubsub.redis", "v1", {"redisHost": "127.0.0.1:6379"}),
        ("pubsub.kafka", "v1", {"brokers": "127.0.0.1:9092", "authType": "none"}),
    ],
)
async def test_every_built_in_class_is_where_its_type_says_and_is_made_without_a_server(
    type: str, version: str, metadata: dict[str, str]
) -> None:
    described = Component("x", type, version, metadata=metadata)
    make = BUILT_IN.state_store if type.startswith("state.") else BUILT_IN.broker

    made = make(described, app_id="orders", clock=SystemClock())

    assert made.__class__.__name__ == BUILT_IN.registrations[type].target.partition(":")[2]


@pytest.mark.parametrize(
    ("type", "version", "field"),
    [
        ("state.sqlite", "v1", "connectionString"),
        ("state.postgresql", "v2", "connection"),
        ("pubsub.kafka", "", "brokers"),
    ],
)
def test_a_required_field_that_is_missing_is_an_error_that_names_file_document_and_field(
    type: str, version: str, field: str
) -> None:
    described = component(type, version)
    make = BUILT_IN.state_store if type.startswith("state.") else BUILT_IN.broker

    with pytest.raises(ComponentError, match=rf"c/a\.yaml, document 1: component 'x': .*{field}"):
        make(described, app_id="orders", clock=SystemClock())


def test_a_type_is_found_in_any_case() -> None:
    assert BUILT_IN.check(component("State.In-Memory", "V1")) == BUILT_IN.registrations["state.in-memory"]


@pytest.mark.parametrize("type", ["state.in-memory", "state.sqlite", "state.sqlite3", "state.redis", "pubsub.kafka"])
@pytest.mark.parametrize("version", ["", "v0", "v1"])
def test_no_version_v0_and_v1_are_the_same(type: str, version: str) -> None:
    assert BUILT_IN.check(component(type, version)) == BUILT_IN.registrations[type]


def test_another_version_is_an_error_that_says_what_to_give() -> None:
    assert failure_of(BUILT_IN, "state.redis", "v3") == (
        "c/a.yaml, document 1: component 'x': state.redis has version 'v3': leave it out, or give v1"
    )


@pytest.mark.parametrize("type", ["state.postgresql", "state.postgres"])
def test_postgresql_is_version_v2(type: str) -> None:
    assert BUILT_IN.check(component(type, "v2")).target.endswith(":PostgresqlStateStore")


def test_postgresql_v1_is_an_error_that_says_what_to_write() -> None:
    hint = "the v1 layout comes in a later release; write `version: v2` for the v2 layout"

    assert failure_of(BUILT_IN, "state.postgresql", "v1").endswith(f"state.postgresql has version 'v1': {hint}")
    assert failure_of(BUILT_IN, "state.postgres").endswith(f"state.postgres has no version, which means v1: {hint}")


def test_an_unknown_type_is_an_error_that_guesses_and_lists() -> None:
    message = failure_of(BUILT_IN, "state.reddis")

    assert message.startswith(
        "c/a.yaml, document 1: component 'x': unknown type 'state.reddis'; did you mean 'state.redis'? known types are "
    )
    assert all(type in message for type in BUILT_IN.registrations)
    assert "secretstores.local.file" in message


def test_a_type_like_no_other_is_not_guessed_at() -> None:
    message = failure_of(BUILT_IN, "nosql")

    assert "unknown type 'nosql'; known types are " in message


def test_a_broker_is_no_state_store_nor_the_other_way_round() -> None:
    with pytest.raises(ComponentError, match=r"pubsub\.in-memory is not one of the state\.\* types"):
        BUILT_IN.state_store(component("pubsub.in-memory"), app_id="orders", clock=SystemClock())
    with pytest.raises(ComponentError, match=r"state\.in-memory is not one of the pubsub\.\* types"):
        BUILT_IN.broker(component("state.in-memory"), app_id="orders", clock=SystemClock())


# What third parties bring


def test_a_registered_class_is_imported_when_asked_for_and_given_what_every_backend_is_given(backend: str) -> None:
    clock, described = SystemClock(), component("pubsub.mine", "v7")
    registry = BUILT_IN.register("pubsub.Mine", f"{backend}:Backend", versions=["V7"])
    assert backend not in sys.modules

    broker = registry.broker(described, app_id="orders", clock=clock)

    assert vars(broker)["arguments"] == (described, "orders", clock)


def test_registering_makes_another_registry() -> None:
    registry = BUILT_IN.register("state.mine", "package.module:Class")

    assert "state.mine" in registry.registrations
    assert "state.mine" not in BUILT_IN.registrations


def test_a_program_may_put_another_class_in_place_of_a_known_one(backend: str) -> None:
    registry = BUILT_IN.register("state.redis", f"{backend}:Backend")

    store = registry.state_store(component("state.redis"), app_id="orders", clock=SystemClock())

    assert type(store).__module__ == backend


@pytest.mark.parametrize(
    ("type", "target"), [("bindings.mine", "a:B"), ("state.mine", "a.B"), ("state.mine", "a:"), ("state.mine", ":B")]
)
def test_what_cannot_be_a_backend_is_not_registered(type: str, target: str) -> None:
    with pytest.raises(ComponentError, match="cannot register"):
        BUILT_IN.register(type, target)


def test_entry_points_of_installed_packages_are_registered(backend: str) -> None:
    point = EntryPoint("state.mine", f"{backend}:Backend", "statecast.components")

    registry = with_entry_points(BUILT_IN, [point])

    store = registry.state_store(component("state.mine", "v1"), app_id="orders", clock=SystemClock())
    assert type(store).__module__ == backend


def test_an_installed_package_takes_no_known_type_over() -> None:
    point = EntryPoint("State.Redis", "evil:Backend", "statecast.components")

    with pytest.raises(
        ComponentError, match=r"'State\.Redis' = 'evil:Backend' .* is statecast\.components\.state\.redis"
    ):
        with_entry_points(BUILT_IN, [point])


def test_a_package_that_is_installed_with_an_entry_point_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    information = tmp_path / "third_party-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[statecast.components]\nstate.mine = third_party:Backend\n")
    monkeypatch.syspath_prepend(tmp_path)

    assert installed().registrations["state.mine"].target == "third_party:Backend"


def test_a_module_or_class_that_is_not_there_is_an_error_that_names_it(backend: str) -> None:
    no_module = BUILT_IN.register("state.mine", "no_such_package.module:Backend")
    no_class = BUILT_IN.register("state.mine", f"{backend}:Frontend")

    assert failure_of(no_module, "state.mine") == (
        "c/a.yaml, document 1: component 'x': state.mine cannot be imported from no_such_package.module:Backend: "
        "No module named 'no_such_package'"
    )
    assert failure_of(no_class, "state.mine").endswith(f"module {backend} has no Frontend")


# Drivers


@pytest.mark.usefixtures("backend")
def test_a_driver_that_is_not_installed_is_an_error_that_says_what_to_install() -> None:
    registry = Registry({"state.postgresql": Registration("driverless_backend:Backend", extra="postgresql")})

    assert failure_of(registry, "state.postgresql") == (
        "c/a.yaml, document 1: component 'x': state.postgresql needs a_driver_that_nobody_has, "
        "which is not installed: pip install 'statecast[postgresql]'"
    )


@pytest.mark.parametrize("type", ["state.in-memory", "pubsub.in-memory", "state.sqlite"])
def test_what_comes_with_the_package_asks_for_no_extra(type: str) -> None:
    assert BUILT_IN.registrations[type].extra == ""
