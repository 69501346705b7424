"""Opening components: state stores and brokers, each within its time, closed in reverse order."""

import asyncio
from collections.abc import Iterable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

from statecast.clock import Clock
from statecast.components.broker.broker import Broker
from statecast.components.manifest import Component, describe, leaving_out_broken
from statecast.components.metadata import BROKER_FIELDS, MetadataReader
from statecast.components.registry import BROKER_CATEGORY, STATE_CATEGORY, Registry
from statecast.components.state.keys import key_prefix
from statecast.components.state.store import StateStore
from statecast.components.state.value import LONGEST_TTL
from statecast.errors import ComponentError, StatecastError
from statecast.outbox.plan import parse_outbox
from statecast.runtime.state import StateSettings

Opened = TypeVar("Opened")


@dataclass(frozen=True, slots=True)
class OpenState:
    store: StateStore
    settings: StateSettings


@dataclass(frozen=True, slots=True)
class OpenComponents:
    """What is open, by component name."""

    states: dict[str, OpenState] = field(default_factory=dict)
    brokers: dict[str, Broker] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What components are opened with; `namespace` is the NAMESPACE of the environment."""

    app_id: str
    namespace: str
    registry: Registry
    clock: Clock


async def open_components(
    components: Iterable[Component], stack: AsyncExitStack, surroundings: Surroundings
) -> OpenComponents:
    """Open every broker on `stack`, then every state store, whose outbox needs one of them; each kind in order.

    Raises ComponentError for one that cannot be made or opened within its `initTimeout`; with `ignoreErrors` it is
    left out with a warning instead.
    """
    opened = OpenComponents()
    for component in sorted(components, key=_is_state_store):
        with leaving_out_broken(ignore_errors=component.ignore_errors):
            if _is_state_store(component):
                opened.states[component.name] = await _open_state(component, opened.brokers, stack, surroundings)
            elif component.type.lower().startswith(BROKER_CATEGORY):
                opened.brokers[component.name] = await _open_broker(component, stack, surroundings)
    return opened


def _is_state_store(component: Component) -> bool:
    return component.type.lower().startswith(STATE_CATEGORY)


async def _open_state(
    component: Component, brokers: Mapping[str, Broker], stack: AsyncExitStack, surroundings: Surroundings
) -> OpenState:
    fields = MetadataReader(component, ())
    fields.unsupported("actorStateStore")
    _refuse_encryption(fields)
    settings = StateSettings(
        name=component.name,
        app_id=surroundings.app_id,
        keys=key_prefix(component, app_id=surroundings.app_id, namespace=surroundings.namespace),
        outbox=parse_outbox(component),
        default_ttl=_default_ttl(fields),
    )
    if settings.outbox is not None and settings.outbox.pubsub not in brokers:
        loaded = ", ".join(sorted(brokers)) or "none"
        raise fields.error("outboxPublishPubsub", f"names no pub/sub component that is loaded (loaded: {loaded})")
    store = surroundings.registry.state_store(component, app_id=surroundings.app_id, clock=surroundings.clock)
    return OpenState(await _entered(store, component, stack), settings)


async def _open_broker(component: Component, stack: AsyncExitStack, surroundings: Surroundings) -> Broker:
    MetadataReader(component, ()).unsupported(*sorted(BROKER_FIELDS))
    broker = surroundings.registry.broker(component, app_id=surroundings.app_id, clock=surroundings.clock)
    return await _entered(broker, component, stack)


async def _entered(
    entering: AbstractAsyncContextManager[Opened, bool | None], component: Component, stack: AsyncExitStack
) -> Opened:
    try:
        async with asyncio.timeout(component.init_timeout.total_seconds()):
            return await stack.enter_async_context(entering)
    except TimeoutError as error:
        seconds = component.init_timeout.total_seconds()
        raise ComponentError(f"{describe(component)}: did not open within {seconds:g} s (initTimeout)") from error
    except StatecastError as error:
        raise ComponentError(f"{describe(component)}: cannot be opened: {error}") from error


def _refuse_encryption(fields: MetadataReader) -> None:
    for name in ("primaryEncryptionKey", "secondaryEncryptionKey"):
        # A key that its secret or variable left empty must not turn encryption off without a word.
        if fields.is_given(name):
            raise fields.error(
                name,
                "cannot be given: automatic encryption is not supported yet, and values are not stored in plain text "
                "instead; remove the field to do so",
            )


def _default_ttl(fields: MetadataReader) -> timedelta | None:
    seconds = fields.integer("ttlInSeconds", default=0, minimum=-1, maximum=LONGEST_TTL // timedelta(seconds=1))
    return timedelta(seconds=seconds) if seconds > 0 else None
