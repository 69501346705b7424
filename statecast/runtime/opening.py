"""Opening components: state stores and brokers, each within its time, closed in reverse order."""

import asyncio
import logging
from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from typing import TypeVar

from statecast.clock import Clock
from statecast.components.broker.broker import Broker
from statecast.components.manifest import Component, describe
from statecast.components.metadata import BROKER_FIELDS, MetadataReader
from statecast.components.registry import BROKER_CATEGORY, STATE_CATEGORY, Registry
from statecast.components.state.store import StateStore
from statecast.errors import ComponentError, StatecastError
from statecast.outbox.plan import Outbox, parse_outbox

logger = logging.getLogger(__name__)

Opened = TypeVar("Opened")


@dataclass(frozen=True, slots=True)
class OpenState:
    component: Component
    store: StateStore
    outbox: Outbox | None


@dataclass(frozen=True, slots=True)
class OpenComponents:
    """What is open, by component name."""

    states: dict[str, OpenState] = field(default_factory=dict)
    brokers: dict[str, Broker] = field(default_factory=dict)


async def open_components(
    components: Iterable[Component], stack: AsyncExitStack, *, app_id: str, registry: Registry, clock: Clock
) -> OpenComponents:
    """Open every state store and broker on `stack`, in order.

    Raises ComponentError for one that cannot be made or opened within its `initTimeout`; with `ignoreErrors` it is
    left out with a warning instead.
    """
    opened = OpenComponents()
    for component in components:
        try:
            await _open(component, opened, stack, app_id, registry, clock)
        except ComponentError as error:
            if not component.ignore_errors:
                raise
            logger.warning("left out: %s", error)
    for state in opened.states.values():
        _require_broker(state, opened)
    return opened


async def _open(
    component: Component,
    opened: OpenComponents,
    stack: AsyncExitStack,
    app_id: str,
    registry: Registry,
    clock: Clock,
) -> None:
    if component.type.startswith(STATE_CATEGORY):
        _refuse_encryption(component)
        outbox = parse_outbox(component)
        store = registry.state_store(component, app_id=app_id, clock=clock)
        opened.states[component.name] = OpenState(component, await _entered(store, component, stack), outbox)
    elif component.type.startswith(BROKER_CATEGORY):
        MetadataReader(component, ()).unsupported(*sorted(BROKER_FIELDS))
        broker = registry.broker(component, app_id=app_id, clock=clock)
        opened.brokers[component.name] = await _entered(broker, component, stack)


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


def _refuse_encryption(component: Component) -> None:
    fields = MetadataReader(component, ())
    fields.unsupported("actorStateStore")
    for name in ("primaryEncryptionKey", "secondaryEncryptionKey"):
        if fields.text(name) is not None:
            raise ComponentError(
                f"{describe(component)}: {name}: automatic encryption is not supported yet, "
                "and values are not stored in plain text instead; remove the field to do so"
            )


def _require_broker(state: OpenState, opened: OpenComponents) -> None:
    if state.outbox is not None and state.outbox.pubsub not in opened.brokers:
        loaded = ", ".join(sorted(opened.brokers)) or "none"
        raise ComponentError(
            f"{describe(state.component)}: outboxPublishPubsub names {state.outbox.pubsub!r}, "
            f"which is no pub/sub component that is loaded (loaded: {loaded})"
        )
