"""Which class a component type is: known by its path, imported when it is asked for, so that no driver is needed
that no component uses.

A third party's backend joins by an entry point in its own pyproject.toml,

    [project.entry-points."statecast.components"]
    "state.mine" = "package.module:Class"

or, in a program, by `installed().register("state.mine", "package.module:Class")`. Its class has the constructor of
`Factory`, and is proven by the suites in `statecast.components.testing`.
"""

import difflib
import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Final, Protocol, TypeVar, cast

from statecast.clock import Clock
from statecast.components.broker.broker import Broker
from statecast.components.manifest import Component, describe
from statecast.components.secrets import SECRET_STORE_TYPES
from statecast.components.state.store import StateStore
from statecast.errors import ComponentError

ENTRY_POINTS: Final = "statecast.components"
STATE_CATEGORY: Final = "state."
BROKER_CATEGORY: Final = "pubsub."

Made_co = TypeVar("Made_co", covariant=True)


class Factory(Protocol[Made_co]):
    """How every backend is made: without I/O, raising ComponentError where the component's metadata is broken."""

    def __call__(self, component: Component, *, app_id: str, clock: Clock) -> Made_co: ...


@dataclass(frozen=True, slots=True)
class Registration:
    """Where a class is (`package.module:Class`), which `version`s of its type it is, and what installs its driver."""

    target: str
    versions: frozenset[str] = frozenset({"", "v0", "v1"})
    extra: str = ""
    version_hint: str = "leave it out, or give v1"


@dataclass(frozen=True, slots=True)
class Registry:
    """The types that are known; a value, so that two runtimes in one process can know different ones."""

    registrations: Mapping[str, Registration]

    def register(self, type: str, target: str, *, versions: Iterable[str] = ("", "v0", "v1")) -> "Registry":
        """Make a registry that knows one type more, or knows it as another class.

        Raises ComponentError where `type` is no state store or broker by name, or `target` is not `module:Class`.
        """
        if not type.lower().startswith((STATE_CATEGORY, BROKER_CATEGORY)):
            raise ComponentError(f"cannot register {type!r}: a type begins with {STATE_CATEGORY} or {BROKER_CATEGORY}")
        if not all(target.partition(":")):
            raise ComponentError(f"cannot register {type!r} as {target!r}: it must be 'package.module:Class'")
        registration = Registration(target, frozenset(version.lower() for version in versions))
        return Registry({**self.registrations, type.lower(): registration})

    def state_store(self, component: Component, *, app_id: str, clock: Clock) -> StateStore:
        """Make the state store that the component describes, unopened. Raises ComponentError."""
        factory = cast(Factory[StateStore], self._import(component, STATE_CATEGORY))
        return factory(component, app_id=app_id, clock=clock)

    def broker(self, component: Component, *, app_id: str, clock: Clock) -> Broker:
        """Make the broker that the component describes, unopened. Raises ComponentError."""
        factory = cast(Factory[Broker], self._import(component, BROKER_CATEGORY))
        return factory(component, app_id=app_id, clock=clock)

    def check(self, component: Component) -> Registration:
        """Find the component's type and version, importing nothing. Raises ComponentError where they are unknown."""
        registration = self.registrations.get(component.type.lower())
        if registration is None:
            raise ComponentError(f"{describe(component)}: unknown type {component.type!r}{self._hint(component.type)}")
        if component.version.lower() not in registration.versions:
            version = f"version {component.version!r}" if component.version else "no version, which means v1"
            raise ComponentError(f"{describe(component)}: {component.type} has {version}: {registration.version_hint}")
        return registration

    def _import(self, component: Component, category: str) -> object:
        registration = self.check(component)
        if not component.type.lower().startswith(category):
            raise ComponentError(f"{describe(component)}: {component.type} is not one of the {category}* types")
        try:
            return _imported(registration.target)
        except ImportError as error:
            raise _not_importable(component, registration, error) from error

    def _hint(self, type: str) -> str:
        known = sorted([*self.registrations, *SECRET_STORE_TYPES])
        close = difflib.get_close_matches(type.lower(), known, n=1)
        meant = f"; did you mean {close[0]!r}?" if close else ";"
        return f"{meant} known types are {', '.join(known)}"


def installed() -> Registry:
    """Give the registry of what comes with statecast and what installed packages add by entry points."""
    return with_entry_points(BUILT_IN, entry_points(group=ENTRY_POINTS))


def with_entry_points(registry: Registry, found: Iterable[EntryPoint]) -> Registry:
    """Register each; an installed package takes no type over that is known already: ComponentError."""
    for point in found:
        if (known := registry.registrations.get(point.name.lower())) is not None:
            raise ComponentError(
                f"entry point {point.name!r} = {point.value!r} of {ENTRY_POINTS!r}: the type is {known.target} already"
            )
        registry = registry.register(point.name, point.value)
    return registry


def _imported(target: str) -> object:
    module, _, name = target.partition(":")
    found: object = getattr(importlib.import_module(module), name, None)
    if found is None:
        raise ImportError(f"module {module} has no {name}")
    return found


def _not_importable(component: Component, registration: Registration, error: ImportError) -> ComponentError:
    where = f"{describe(component)}: {component.type}"
    package = (error.name or "").partition(".")[0]
    own = registration.target.partition(".")[0]
    if registration.extra and isinstance(error, ModuleNotFoundError) and package != own:
        return ComponentError(
            f"{where} needs {package}, which is not installed: pip install 'statecast[{registration.extra}]'"
        )
    return ComponentError(f"{where} cannot be imported from {registration.target}: {error}")


_POSTGRESQL: Final = Registration(
    "statecast.components.state.postgresql.state:PostgresqlStateStore",
    versions=frozenset({"v2"}),
    extra="postgresql",
    version_hint="the v1 layout comes in a later release; write `version: v2` for the v2 layout",
)
_SQLITE: Final = Registration("statecast.components.state.sqlite.state:SqliteStateStore")

BUILT_IN: Final = Registry(
    {
        "state.in-memory": Registration("statecast.components.state.memory:MemoryStateStore"),
        "state.sqlite": _SQLITE,
        "state.sqlite3": _SQLITE,
        "state.postgresql": _POSTGRESQL,
        "state.postgres": _POSTGRESQL,
        "state.redis": Registration("statecast.components.state.redis.state:RedisStateStore", extra="redis"),
        "pubsub.in-memory": Registration("statecast.components.broker.memory:MemoryBroker"),
        "pubsub.redis": Registration("statecast.components.broker.redis.broker:RedisBroker", extra="redis"),
        "pubsub.kafka": Registration("statecast.components.broker.kafka.broker:KafkaBroker", extra="kafka"),
    }
)
