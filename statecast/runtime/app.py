"""The runtime in a process: components open, relays and subscriptions running, until the block ends."""

import asyncio
import logging
import os
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

from msgspec import structs

from statecast.clock import Clock, SystemClock
from statecast.components.broker.broker import Broker, Published
from statecast.components.loader import Source, load
from statecast.components.registry import Registry, installed
from statecast.components.state.log import OutboxLog, QueueStatus, SliceStatus
from statecast.components.state.value import encode, with_content_type
from statecast.errors import InvalidRequest, NotSupported, PublishFailed
from statecast.outbox.deferred import RelayCounts
from statecast.outbox.event import EventIds, EventSource, content_type_in, render
from statecast.outbox.plan import Outbox
from statecast.outbox.progress import message_of
from statecast.outbox.relay import Relay, RelayOptions
from statecast.pubsub.cloudevent import DEFAULT_TYPE, Data, TraceContext
from statecast.pubsub.subscription import Handler, Subscription
from statecast.runtime.opening import OpenComponents, OpenState, Surroundings, open_components
from statecast.runtime.state import StateClient
from statecast.runtime.supervisor import Run, Supervisor

logger = logging.getLogger(__name__)

AnyHandler = TypeVar("AnyHandler", bound=Handler)


@dataclass(frozen=True, slots=True)
class RuntimeOptions:
    """`relays=False`: commit, but leave the publishing to other processes. `publish_timeout` is that of `publish`.

    How often a refused event is tried, and where it goes then, says the store's component, whatever `relay` says.
    Relaying begins when the subscriptions made at the start stand, or after `subscriptions_within`. `close` bounds how
    long closing waits for relays to drain, and then again for handlers to finish.
    """

    relays: bool = True
    relay: RelayOptions = field(default_factory=RelayOptions)
    publish_timeout: timedelta = timedelta(seconds=10)
    subscriptions_within: timedelta = timedelta(seconds=3)
    close: timedelta = timedelta(seconds=10)


class Runtime:
    """All of statecast in one process; made by `Runtime.open`."""

    def __init__(
        self,
        components: OpenComponents,
        supervisor: Supervisor,
        *,
        app_id: str,
        clock: Clock,
        options: RuntimeOptions,
    ) -> None:
        self.app_id = app_id
        self._components = components
        self._supervisor = supervisor
        self._clock = clock
        self._options = options
        self._outbox_ids = EventIds("outbox")
        self._event_ids = EventIds("event")
        self._clients = {
            name: StateClient(state.store, state.settings, ids=self._outbox_ids, clock=clock)
            for name, state in components.states.items()
        }
        self._relays: dict[str, Relay] = {}
        self._subscriptions: dict[str, list[Subscription]] = {name: [] for name in components.brokers}

    @staticmethod
    @asynccontextmanager
    async def open(
        components: Source | Iterable[Source],
        *,
        app_id: str,
        environment: Mapping[str, str] | None = None,
        registry: Registry | None = None,
        clock: Clock | None = None,
        options: RuntimeOptions | None = None,
    ) -> "AsyncIterator[Runtime]":
        """Open the components (a folder or a file of YAML, `Component` values, or several) and run their relays.

        Leaving the block closes in reverse: relays publish what is committed, as far as they get in the time of
        `options.close`, handlers finish what they hold, then brokers and stores close. What was not published is
        published by the next process that opens the store.

        Raises ComponentError, which names file, document, field and what is expected.
        """
        clock, options = clock or SystemClock(), options or RuntimeOptions()
        registry = registry or installed()
        environment = os.environ if environment is None else environment
        loaded = await asyncio.to_thread(load, components, app_id, environment, registry=registry)
        async with AsyncExitStack() as stack:
            surroundings = Surroundings(app_id, environment.get("NAMESPACE", ""), registry, clock)
            opened = await open_components(loaded, stack, surroundings)
            consumers = await stack.enter_async_context(Supervisor(clock, deadline=options.close))
            relays = await stack.enter_async_context(Supervisor(clock, deadline=options.close))
            runtime = Runtime(opened, consumers, app_id=app_id, clock=clock, options=options)
            if options.relays:
                runtime._start_relays(relays)
            yield runtime

    def state(self, name: str) -> StateClient:
        """Give the client of a state store. Raises InvalidRequest where there is none of that name."""
        self._state_named(name)
        return self._clients[name]

    async def publish(
        self,
        pubsub: str,
        topic: str,
        data: Any,
        *,
        type: str = DEFAULT_TYPE,
        key: str | None = None,
        content_type: str | None = None,
        metadata: Mapping[str, str] | None = None,
        trace: TraceContext | None = None,
    ) -> None:
        """Publish one event at once, bound to no state; use a transaction for news of a change.

        Returns when the broker has it. Raises PublishFailed where that is not certain; InvalidRequest for data that
        is neither bytes nor JSON, or a component that is not there.
        """
        broker = self._broker_named(pubsub)
        body, is_binary = encode(data)
        metadata = with_content_type(metadata, content_type)
        record = render(
            Data(body, content_type_in(metadata), is_json=not is_binary),
            metadata,
            EventSource(self.app_id, self._clock.now(), trace or TraceContext(), self._event_ids),
            pubsub=pubsub,
            topic=topic,
            order_key=key or "",
            key=key,
            type=type,
        )
        message = message_of(record)
        (outcome,) = await broker.publish([message], self._options.publish_timeout)
        if not isinstance(outcome, Published):
            raise PublishFailed(topic, [outcome.reason])

    def subscribe(self, pubsub: str, topic: str, *, store: str | None = None) -> Callable[[AnyHandler], AnyHandler]:
        """Decorate the handler of a topic: it gets every event at least once, in the order the broker gives them.

        One member of the group (all processes with this app id, unless the component's `consumerID` says another)
        gets each event. A handler that raises gets the same event again, with growing pauses, before any later one.
        Await `ready` to know that the subscription stands.
        """
        if store is not None:
            raise NotSupported("a subscription with a store (the inbox) is not supported yet; leave out store=")
        broker = self._broker_named(pubsub)

        def start(handler: AnyHandler) -> AnyHandler:
            subscription = Subscription(broker, topic, self.app_id, handler, clock=self._clock)
            self._subscriptions[pubsub].append(subscription)
            self._supervisor.start(f"subscription of {topic!r} on {pubsub!r}", subscription.run)
            return handler

        return start

    async def ready(self, pubsub: str | None = None) -> None:
        """Return once every subscription made so far (of one pub/sub component, or of all) stands."""
        for name, subscriptions in self._subscriptions.items():
            if pubsub in (None, name):
                for subscription in tuple(subscriptions):
                    await subscription.is_standing.wait()

    async def outbox_status(self, store: str) -> list[SliceStatus]:
        """Tell how far the relaying of a store's outbox is, slice by slice. Raises InvalidRequest, StoreUnavailable."""
        return await self._log_of(store).status()

    async def outbox_deferred(self, store: str) -> list[QueueStatus]:
        """List the keys whose events a broker refused, by topic: those due first first, parked ones last.

        An event that was published without a key waits under a name of its own. Raises InvalidRequest,
        StoreUnavailable.
        """
        log, keys = self._log_of(store), self._state_named(store).settings.keys
        found = await log.deferred(range(log.slices))
        return [
            structs.replace(each, queue=structs.replace(each.queue, order_key=keys.logical_key(each.queue.order_key)))
            for each in found
        ]

    async def outbox_replay(self, store: str, key: str | None = None) -> int:
        """Let relays try parked keys again (all, or this one as `outbox_deferred` names it); return how many they are.

        A key that is parked for two topics counts twice. Raises InvalidRequest, StoreUnavailable.
        """
        log = self._log_of(store)
        if key is None:
            return await log.replay()
        # What has no key of the app, or one under an earlier prefix, is named as it stands.
        return await log.replay(self._state_named(store).settings.keys.text + key) or await log.replay(key)

    def relay_counts(self, store: str) -> RelayCounts | None:
        """Tell what this process's relay of a store has done; None where it runs none."""
        relay = self._relays.get(store)
        return None if relay is None else relay.counts

    def _start_relays(self, supervisor: Supervisor) -> None:
        for name, state in self._components.states.items():
            if (outbox := state.settings.outbox) is None:
                continue
            relay = Relay(
                state.store.log,
                self._components.brokers,
                name=f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}",
                clock=self._clock,
                options=_relay_options(self._options.relay, outbox),
            )
            self._relays[name] = relay
            supervisor.start(f"outbox relay of {name!r}", self._after_subscriptions(relay, outbox.pubsub))

    def _after_subscriptions(self, relay: Relay, pubsub: str) -> Run:
        """Let the relay wait for the subscriptions made at the start: a broker that keeps nothing would drop what
        was left over from an earlier run. A subscription that cannot come about does not hold it for long."""

        async def run(stop: asyncio.Event) -> None:
            try:
                async with asyncio.timeout(self._options.subscriptions_within.total_seconds()):
                    await self.ready(pubsub)
            except TimeoutError:
                logger.warning("subscriptions on %r do not stand yet; relaying begins without them", pubsub)
            await relay.run(stop)

        return run

    def _log_of(self, store: str) -> OutboxLog:
        state = self._state_named(store)
        if state.settings.outbox is None:
            raise InvalidRequest(f"state store {store!r} has no outbox: outboxPublishPubsub is not set")
        return state.store.log

    def _state_named(self, name: str) -> OpenState:
        if name not in self._components.states:
            raise InvalidRequest(f"state store {name!r} is not loaded; loaded are: {_listed(self._components.states)}")
        return self._components.states[name]

    def _broker_named(self, name: str) -> Broker:
        if name not in self._components.brokers:
            raise InvalidRequest(f"pub/sub {name!r} is not loaded; loaded are: {_listed(self._components.brokers)}")
        return self._components.brokers[name]


def _relay_options(options: RelayOptions, outbox: Outbox) -> RelayOptions:
    retry = replace(options.retry, max_attempts=outbox.max_attempts, dead_letter_topic=outbox.dead_letter_topic)
    return replace(options, retry=retry)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
