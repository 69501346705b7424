"""The relay's behaviour, on the memory log; its work on real servers is proven under tests/crash.

Tried by hand: without the renewal before a publish `test_a_relay_that_slept_past_its_lease...` fails; with positions
persisted ahead of what is published `test_what_was_not_published_is_published_by_the_next_relay` does; with entries
dropped that failed, `test_a_refused_event...` and its neighbours do.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta

import pytest

from statecast.clock import SystemClock
from statecast.components.broker.broker import (
    Broker,
    Message,
    Outcome,
    Published,
    Refused,
    Settlement,
    Unreachable,
)
from statecast.components.broker.memory import MemoryBroker
from statecast.components.manifest import Component
from statecast.components.state.commit import Commit, OutboxRecord, Upsert
from statecast.components.state.log import (
    Batch,
    Deferral,
    DeferredQueue,
    Lease,
    LogEntry,
    OutboxLog,
    QueueProgress,
    QueueStatus,
    SliceStatus,
    Topic,
)
from statecast.components.state.memory import MemoryStateStore
from statecast.components.testing import deadline
from statecast.errors import StoreUnavailable
from statecast.outbox.deferred import RetryOptions
from statecast.outbox.progress import BackOff
from statecast.outbox.relay import Relay, RelayOptions

QUICK = RelayOptions(
    lease=timedelta(milliseconds=600),
    publish_timeout=timedelta(milliseconds=200),
    persist_every=timedelta(milliseconds=20),
    idle_wait=timedelta(milliseconds=20),
    drain=timedelta(seconds=2),
    look_aside_every=timedelta(milliseconds=5),
    retry=RetryOptions(max_attempts=3, back_off=BackOff(timedelta(milliseconds=5), timedelta(milliseconds=20))),
)

PATIENT = replace(QUICK, retry=replace(QUICK.retry, max_attempts=1_000))


class ScriptedBroker(MemoryBroker):
    """A broker that answers for each message what `answer` says, and writes down what it took."""

    def __init__(self, answer: Callable[[Message], Outcome] = lambda message: Published()) -> None:
        super().__init__(Component("bus", "pubsub.in-memory"), app_id="shop", clock=SystemClock())
        self.answer = answer
        self.taken: list[str] = []
        self.before_publish: Callable[[], Awaitable[None]] | None = None

    async def publish(
        self, messages: Sequence[Message], timeout: timedelta, settlement: Settlement = Settlement.STORED
    ) -> list[Outcome]:
        if self.before_publish is not None:
            await self.before_publish()
        failed: set[tuple[str, str | None]] = set()
        outcomes: list[Outcome] = []
        for message in messages:
            held_back = (message.topic, message.key) in failed
            outcome = Unreachable("held back") if held_back else self.answer(message)
            if isinstance(outcome, Published):
                self.taken.append(message.body.decode())
            else:
                failed.add((message.topic, message.key))
            outcomes.append(outcome)
        return outcomes


def record(key: str, number: int, pubsub: str = "bus", topic: str = "orders") -> OutboxRecord:
    name = f"{key}:{number}"
    return OutboxRecord(key, name, pubsub, topic, name.encode(), {"partitionKey": key})


async def commit(store: MemoryStateStore, key: str, number: int, pubsub: str = "bus", topic: str = "orders") -> None:
    await store.transact(Commit((Upsert(key, b"1"),), (record(key, number, pubsub, topic),)))


async def until(fact: Callable[[], bool]) -> None:
    async def holds() -> bool:
        return fact()

    await deadline.until(holds)


@pytest.fixture
async def store() -> AsyncIterator[MemoryStateStore]:
    component = Component("statestore", "state.in-memory")
    async with MemoryStateStore(component, app_id="shop", clock=SystemClock()) as opened:
        yield opened


@asynccontextmanager
async def relaying(
    log: OutboxLog, broker: Broker, name: str = "one", options: RelayOptions = QUICK
) -> AsyncIterator[Relay]:
    relay = Relay(log, {"bus": broker}, name=name, clock=SystemClock(), options=options)
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(relay.run(stop))
        try:
            yield relay
        finally:
            stop.set()


def numbers_of(taken: Sequence[str], key: str) -> list[int]:
    """List a key's first deliveries."""
    numbers = [int(name.partition(":")[2]) for name in taken if name.startswith(f"{key}:")]
    return list(dict.fromkeys(numbers))


async def pending(log: OutboxLog) -> int:
    return sum(each.pending for each in await log.status())


async def test_what_is_committed_is_published_in_order_per_key(store: MemoryStateStore) -> None:
    broker = ScriptedBroker()

    async with relaying(store.log, broker):
        for number in range(50):
            for key in ("a", "b", "c"):
                await commit(store, key, number)

    assert all(numbers_of(broker.taken, key) == list(range(50)) for key in ("a", "b", "c"))
    assert len(broker.taken) == 150


async def test_stopping_publishes_what_is_committed_and_gives_the_leases_back(store: MemoryStateStore) -> None:
    broker = ScriptedBroker()
    for number in range(5_000):
        await commit(store, "a", number)

    async with relaying(store.log, broker):
        pass

    assert len(broker.taken) == 5_000
    assert await pending(store.log) == 0
    assert {each.owner for each in await store.log.status()} == {None}


async def test_a_refused_event_holds_its_key_and_no_other(store: MemoryStateStore) -> None:
    broker = ScriptedBroker(lambda message: Refused("too large") if message.body == b"a:1" else Published())
    async with relaying(store.log, broker, options=PATIENT):
        for number in range(4):
            await commit(store, "a", number)
            await commit(store, "b", number)
        await until(lambda: len(numbers_of(broker.taken, "b")) == 4)
        while_refused = list(broker.taken)

        broker.answer = lambda message: Published()
        await until(lambda: len(numbers_of(broker.taken, "a")) == 4)
        await commit(store, "a", 4)

    assert numbers_of(while_refused, "a") == [0]
    assert [name for name in broker.taken if name.startswith("a:")] == [f"a:{number}" for number in range(5)]


async def test_a_refusal_says_which_event_and_why(store: MemoryStateStore, caplog: pytest.LogCaptureFixture) -> None:
    broker = ScriptedBroker(lambda message: Refused("message too large"))

    async with relaying(store.log, broker):
        await commit(store, "a", 1)
        await until(lambda: "message too large" in caplog.text)

    assert "event a:1 for topic 'orders' is refused" in caplog.text


async def test_a_key_refused_too_often_is_parked_until_it_is_replayed(store: MemoryStateStore) -> None:
    broker = ScriptedBroker(lambda message: Refused("too large") if message.body == b"a:0" else Published())
    async with relaying(store.log, broker) as relay:
        await commit(store, "a", 0)
        await until(lambda: relay.counts.parked == 1)
        await commit(store, "a", 1)
        await commit(store, "b", 0)
        await until(lambda: broker.taken == ["b:0"])
        (parked,) = await store.log.deferred(range(store.log.slices))

        broker.answer = lambda message: Published()
        replayed = await store.log.replay()
        await until(lambda: numbers_of(broker.taken, "a") == [0, 1])

    assert (parked.queue.order_key, parked.attempts, parked.is_parked, parked.reason) == ("a", 3, True, "too large")
    assert replayed == 1
    assert await store.log.deferred(range(store.log.slices)) == []


async def test_a_broker_that_is_away_is_asked_once_a_look_however_many_keys_are_aside(
    store: MemoryStateStore,
) -> None:
    broker = ScriptedBroker(lambda message: Refused("too large"))
    async with relaying(store.log, broker, options=PATIENT) as relay:
        for number in range(30):
            await commit(store, f"key-{number}", 0)
        await until(lambda: relay.counts.deferred == 30)
        broker.answer = lambda message: Unreachable("away")
        calls = looks = 0
        look = store.log.due_deferred

        async def count_calls() -> None:
            nonlocal calls
            calls += 1

        async def count_looks(
            slices: Collection[int], limit: int, but_for: Collection[Topic] = ()
        ) -> list[QueueStatus]:
            nonlocal looks
            looks += 1
            return await look(slices, limit, but_for)

        broker.before_publish = count_calls
        store.log.due_deferred = count_looks  # type: ignore[method-assign]
        await until(lambda: looks >= 10)
        asked = calls
        broker.answer = lambda message: Published()
        await until(lambda: len(set(broker.taken)) == 30)

    assert asked <= looks + 1


async def test_the_dead_letter_topic_gets_a_copy_at_parking(store: MemoryStateStore) -> None:
    dead: list[Message] = []

    def answer(message: Message) -> Outcome:
        if message.topic == "dead":
            dead.append(message)
            return Published()
        return Refused("too large")

    options = replace(QUICK, retry=replace(QUICK.retry, dead_letter_topic="dead"))
    async with relaying(store.log, ScriptedBroker(answer), options=options) as relay:
        await commit(store, "a", 0)
        await until(lambda: relay.counts.parked == 1)

    (copy,) = dead
    assert (copy.body, copy.metadata["deadLetterReason"], copy.metadata["deadLetterTopic"]) == (
        b"a:0",
        "too large",
        "orders",
    )


async def test_copies_of_keys_that_are_parked_together_do_not_wait_for_each_other(store: MemoryStateStore) -> None:
    """Fails when they are published one after the other, each for as long as its broker does not answer."""
    all_are_sent = asyncio.Barrier(3)

    class Slow(ScriptedBroker):
        async def publish(
            self, messages: Sequence[Message], timeout: timedelta, settlement: Settlement = Settlement.STORED
        ) -> list[Outcome]:
            if messages[0].topic == "dead":
                await all_are_sent.wait()
            return await super().publish(messages, timeout, settlement)

    broker = Slow(lambda message: Published() if message.topic == "dead" else Refused("too large"))
    options = replace(QUICK, retry=replace(QUICK.retry, dead_letter_topic="dead"))
    async with relaying(store.log, broker, options=options) as relay:
        await store.transact(Commit((), tuple(record(key, 0) for key in ("a", "b", "c"))))
        await until(lambda: relay.counts.parked == 3 and len(broker.taken) == 3)

    assert sorted(broker.taken) == ["a:0", "b:0", "c:0"]


async def test_a_key_that_is_aside_stays_aside_for_the_next_relay(store: MemoryStateStore) -> None:
    broker = ScriptedBroker(lambda message: Refused("too large") if message.body == b"a:0" else Published())
    async with relaying(store.log, broker, options=PATIENT) as relay:
        await commit(store, "a", 0)
        await until(lambda: relay.counts.deferred == 1)
    await commit(store, "a", 1)

    async with relaying(store.log, broker, "two", options=PATIENT):
        await commit(store, "b", 0)
        await until(lambda: broker.taken == ["b:0"])
        broker.answer = lambda message: Published()
        await until(lambda: numbers_of(broker.taken, "a") == [0, 1])


async def test_a_topic_that_takes_nothing_is_alarmed_once_and_parks_nothing(
    store: MemoryStateStore, caplog: pytest.LogCaptureFixture
) -> None:
    refusals: list[Message] = []

    def refuse(message: Message) -> Outcome:
        refusals.append(message)
        return Refused("unknown topic", is_about_topic=True)

    broker = ScriptedBroker(refuse)
    async with relaying(store.log, broker) as relay:
        for number in range(20):
            await commit(store, f"key-{number}", 0)
        await until(lambda: len(refusals) > 100)
        aside = await store.log.deferred(range(store.log.slices))
        broker.answer = lambda message: Published()
        await until(lambda: len(broker.taken) == 20)

    assert caplog.text.count("topic 'orders' of 'bus' takes nothing") == 1
    assert {(status.attempts, status.is_parked, status.reason) for status in aside} == {(0, False, "unknown topic")}
    assert (relay.counts.deferred, relay.counts.parked) == (0, 0)


def only_orders(message: Message) -> Outcome:
    return Published() if message.topic == "orders" else Refused("unknown topic", is_about_topic=True)


async def test_a_topic_that_takes_nothing_holds_no_other_topic_of_its_keys(store: MemoryStateStore) -> None:
    broker = ScriptedBroker(only_orders)
    async with relaying(store.log, broker):
        for number in range(50):
            await commit(store, "a", number, topic="orders" if number % 2 else "audit")
        await until(lambda: numbers_of(broker.taken, "a") == list(range(1, 50, 2)))
        while_blocked = list(broker.taken)

        broker.answer = lambda message: Published()
        await until(lambda: len(broker.taken) == 50)
        await commit(store, "a", 50, topic="audit")

    assert numbers_of(broker.taken[len(while_blocked) :], "a") == [*range(0, 50, 2), 50]


async def test_however_much_waits_for_a_topic_that_takes_nothing_others_go_on(store: MemoryStateStore) -> None:
    broker = ScriptedBroker(only_orders)
    for number in range(3_000):
        await commit(store, "a", number, topic="audit")
    await commit(store, "a", 3_000)

    async with relaying(store.log, broker, options=replace(QUICK, drain=timedelta(milliseconds=50))):
        await until(lambda: broker.taken == ["a:3000"])

    assert await pending(store.log) == 0
    assert sum(status.pending for status in await store.log.deferred(range(store.log.slices))) == 3_000


async def test_what_was_published_past_a_topic_that_takes_nothing_is_not_published_again(
    store: MemoryStateStore,
) -> None:
    broker = ScriptedBroker(only_orders)
    async with relaying(store.log, broker):
        await commit(store, "a", 0, topic="audit")
        for number in range(1, 100):
            await commit(store, "a", number)
        await until(lambda: len(broker.taken) == 99)

    async with relaying(store.log, broker, "two"):
        await commit(store, "a", 100)

    assert broker.taken == [f"a:{number}" for number in range(1, 101)]


async def test_what_is_aside_for_a_topic_is_found_by_the_next_relay_too(
    store: MemoryStateStore, caplog: pytest.LogCaptureFixture
) -> None:
    broker = ScriptedBroker(only_orders)
    async with relaying(store.log, broker):
        await commit(store, "a", 0, topic="audit")
        await until(lambda: "takes nothing" in caplog.text)
    caplog.clear()

    async with relaying(store.log, broker, "two"):
        await until(lambda: "topic 'audit' of 'bus' takes nothing" in caplog.text)
        await commit(store, "a", 1, topic="audit")
        broker.answer = lambda message: Published()
        await until(lambda: broker.taken == ["a:0", "a:1"])


async def test_thousands_of_keys_flow_again_once_their_topic_does(store: MemoryStateStore) -> None:
    broker = ScriptedBroker(only_orders)
    async with relaying(store.log, broker) as relay:
        for number in range(6):
            for key in range(500):
                await commit(store, f"key-{key}", number, topic="audit")
        await until(lambda: len(relay._progress.with_deferred()) == 16)

        broker.answer = lambda message: Published()
        await until(lambda: len(broker.taken) == 3_000)

    assert all(numbers_of(broker.taken, f"key-{key}") == list(range(6)) for key in range(500))


async def test_events_of_a_parked_key_are_put_aside_in_their_turn(store: MemoryStateStore) -> None:
    """Fails when they have the positions persisted at once: a write for every one."""
    broker = ScriptedBroker(lambda message: Refused("too large") if message.key == "a" else Published())
    options = replace(QUICK, persist_every=timedelta(seconds=1), lease=timedelta(hours=1))
    async with relaying(store.log, broker, options=options) as relay:
        await commit(store, "a", 0)
        await until(lambda: relay.counts.parked == 1)
        advances = 0
        advance = store.log.advance

        async def count_advances(
            leases: Sequence[Lease], ttl: timedelta, deferrals: Sequence[Deferral] = ()
        ) -> list[Lease]:
            nonlocal advances
            advances += 1
            return await advance(leases, ttl, deferrals)

        store.log.advance = count_advances  # type: ignore[method-assign]
        for number in range(1, 20):
            await commit(store, "a", number)
            await commit(store, "b", number)
            await until(lambda number=number: f"b:{number}" in broker.taken)  # type: ignore[misc]
        while_relaying = advances

    assert while_relaying < 19
    (parked,) = await store.log.deferred(range(store.log.slices))
    assert (parked.pending, parked.is_parked) == (20, True)


async def test_a_relay_that_crashed_is_run_again_and_goes_on_at_once(store: MemoryStateStore) -> None:
    """Fails when it still believes in the leases that it gave back."""
    broker = ScriptedBroker()
    relay = Relay(
        store.log, {"bus": broker}, name="one", clock=SystemClock(), options=replace(QUICK, lease=timedelta(hours=1))
    )
    crashes = [RuntimeError("a bug")]

    async def crash() -> None:
        if len(broker.taken) >= 10 and crashes:
            raise crashes.pop()

    broker.before_publish = crash
    stop = asyncio.Event()

    async def run_twice() -> None:
        with pytest.raises(ExceptionGroup):
            await relay.run(stop)
        await relay.run(stop)

    async with asyncio.TaskGroup() as group:
        group.create_task(run_twice())
        for number in range(30):
            await commit(store, "a", number)
            await until(lambda number=number: len(broker.taken) > min(number, 9))  # type: ignore[misc]
        await until(lambda: len(set(broker.taken)) == 30)
        stop.set()

    assert numbers_of(broker.taken, "a") == list(range(30))
    assert relay.counts.fenced == 0


async def test_a_broker_that_is_away_is_waited_for_and_nothing_is_lost(store: MemoryStateStore) -> None:
    broker = ScriptedBroker(lambda message: Unreachable("connection refused"))

    async with relaying(store.log, broker) as relay:
        for number in range(20):
            await commit(store, "a", number)
        await until(lambda: relay.counts.failed > 40)
        broker.answer = lambda message: Published()

    assert numbers_of(broker.taken, "a") == list(range(20))


async def test_what_was_not_published_is_published_by_the_next_relay(store: MemoryStateStore) -> None:
    broker = ScriptedBroker(lambda message: Unreachable("away") if message.body == b"a:3" else Published())
    for number in range(6):
        await commit(store, "a", number)
    options = replace(QUICK, drain=timedelta(milliseconds=50))

    async with relaying(store.log, broker, options=options):
        await until(lambda: len(broker.taken) == 3)
    broker.answer = lambda message: Published()
    async with relaying(store.log, broker, "two"):
        pass

    assert numbers_of(broker.taken, "a") == list(range(6))
    assert set(broker.taken) == {f"a:{number}" for number in range(6)}


async def test_an_event_for_a_pubsub_that_is_not_loaded_waits_and_is_named(
    store: MemoryStateStore, caplog: pytest.LogCaptureFixture
) -> None:
    options = replace(QUICK, drain=timedelta(milliseconds=50))

    async with relaying(store.log, ScriptedBroker(), options=options):
        await commit(store, "a", 1, pubsub="gone")
        await until(lambda: "no pub/sub component named 'gone' is loaded" in caplog.text)

    (aside,) = await store.log.deferred(range(store.log.slices))
    assert (aside.queue.pubsub, aside.pending, aside.is_parked) == ("gone", 1, False)


async def test_relays_share_the_slices_and_take_over_those_of_one_that_leaves(store: MemoryStateStore) -> None:
    async def is_shared_evenly() -> bool:
        return Counter(each.owner for each in await store.log.status()) == {"one": 8, "two": 8}

    async def is_all_of_one() -> bool:
        return Counter(each.owner for each in await store.log.status()) == {"one": 16}

    async with relaying(store.log, ScriptedBroker(), "one"):
        async with relaying(store.log, ScriptedBroker(), "two"):
            await deadline.until(is_shared_evenly)
        await deadline.until(is_all_of_one)


async def test_a_relay_that_has_left_is_not_counted_any_more(store: MemoryStateStore) -> None:
    async with relaying(store.log, ScriptedBroker(), "one", replace(QUICK, lease=timedelta(hours=1))):
        pass

    assert await store.log.heartbeat("two", timedelta(hours=1)) == 1


async def test_a_relay_that_was_frozen_past_its_lease_publishes_nothing_out_of_order(store: MemoryStateStore) -> None:
    taken: list[str] = []
    frozen, other = ScriptedBroker(), ScriptedBroker()
    frozen.taken = other.taken = taken
    thawed = asyncio.Event()

    async def freeze() -> None:
        await thawed.wait()

    async with relaying(store.log, frozen, "frozen") as relay:
        await until(lambda: relay._progress.slices != {})
        frozen.before_publish = freeze
        for number in range(10):
            await commit(store, "a", number)
        async with relaying(store.log, other, "other"):
            await until(lambda: numbers_of(taken, "a") == list(range(10)))
            thawed.set()
            frozen.before_publish = None
            await until(lambda: relay.counts.fenced > 0)
            for number in range(10, 20):
                await commit(store, "a", number)
            await until(lambda: len(numbers_of(taken, "a")) == 20)

    assert numbers_of(taken, "a") == list(range(20))


async def test_a_cancelled_relay_gives_its_leases_back(store: MemoryStateStore) -> None:
    broker = ScriptedBroker()
    relay = Relay(store.log, {"bus": broker}, name="one", clock=SystemClock(), options=QUICK)

    async with asyncio.TaskGroup() as group:
        task = group.create_task(relay.run(asyncio.Event()))
        await until(lambda: relay._progress.slices != {})
        task.cancel()

    assert {each.owner for each in await store.log.status()} == {None}


class InterruptedLog:
    """A log that is away as long as `is_away` says so, and whose reads return only when they may."""

    def __init__(self, log: OutboxLog) -> None:
        self._log = log
        self.is_away = False
        self.fails_to_wait = False
        self.fails_to_list = False
        self.may_read = asyncio.Event()
        self.may_read.set()
        self.has_read = asyncio.Event()

    @property
    def slices(self) -> int:
        return self._log.slices

    def _require(self) -> OutboxLog:
        if self.is_away:
            raise StoreUnavailable("connection refused")
        return self._log

    async def heartbeat(self, owner: str, ttl: timedelta) -> int:
        return await self._require().heartbeat(owner, ttl)

    async def acquire(self, owner: str, limit: int, ttl: timedelta) -> list[Lease]:
        return await self._require().acquire(owner, limit, ttl)

    async def read(self, leases: Sequence[Lease], limit: int) -> Batch:
        batch = await self._require().read(leases, limit)
        self.has_read.set()
        await self.may_read.wait()
        return batch

    async def advance(self, leases: Sequence[Lease], ttl: timedelta, deferrals: Sequence[Deferral] = ()) -> list[Lease]:
        return await self._require().advance(leases, ttl, deferrals)

    async def deferred(self, slices: Collection[int]) -> list[QueueStatus]:
        if self.fails_to_list:
            raise StoreUnavailable("connection lost")
        return await self._require().deferred(slices)

    async def due_deferred(
        self, slices: Collection[int], limit: int, but_for: Collection[Topic] = ()
    ) -> list[QueueStatus]:
        return await self._require().due_deferred(slices, limit, but_for)

    async def read_deferred(self, queues: Sequence[DeferredQueue], limit: int) -> list[LogEntry]:
        return await self._require().read_deferred(queues, limit)

    async def settle_deferred(self, leases: Sequence[Lease], progress: Sequence[QueueProgress]) -> list[DeferredQueue]:
        return await self._require().settle_deferred(leases, progress)

    async def replay(self, order_key: str | None = None) -> int:
        return await self._require().replay(order_key)

    async def release(self, leases: Sequence[Lease]) -> None:
        await self._require().release(leases)

    async def wait(self, leases: Sequence[Lease], timeout: timedelta) -> None:
        if self.fails_to_wait:
            raise StoreUnavailable("connection lost")
        await self._require().wait(leases, timeout)

    async def trim(self) -> None:
        await self._require().trim()

    async def status(self) -> list[SliceStatus]:
        return await self._require().status()


async def test_a_relay_that_slept_past_its_lease_publishes_nothing_it_had_read(store: MemoryStateStore) -> None:
    log, sleeper, other = InterruptedLog(store.log), ScriptedBroker(), ScriptedBroker()

    async with relaying(log, sleeper, "sleeper") as relay:
        await until(lambda: len(relay._progress.slices) == 16)
        log.may_read.clear()
        for number in range(5):
            await commit(store, "a", number)
        async with relaying(store.log, other, "other", replace(QUICK, lease=timedelta(minutes=1))):
            await until(lambda: len(other.taken) == 5)
            log.may_read.set()
            await until(lambda: relay.counts.fenced > 0)

    assert sleeper.taken == []


async def test_stopping_publishes_what_is_committed_while_a_read_is_under_way(store: MemoryStateStore) -> None:
    log, broker = InterruptedLog(store.log), ScriptedBroker()

    async with relaying(log, broker):
        log.may_read.clear()
        await log.has_read.wait()
        await commit(store, "a", 1)
        # The read that found nothing returns when the relay is told to stop.
        asyncio.get_running_loop().call_soon(log.may_read.set)

    assert broker.taken == ["a:1"]


async def test_a_store_that_goes_away_right_after_slices_were_leased_leaves_none_alone(
    store: MemoryStateStore,
) -> None:
    """Fails when such leases are forgotten: the slices rest until they run out, here for an hour."""
    log, broker = InterruptedLog(store.log), ScriptedBroker()
    log.fails_to_list = True

    async with relaying(log, broker, options=replace(QUICK, lease=timedelta(hours=1))) as relay:
        await until(lambda: relay._store_failures > 0)
        log.fails_to_list = False
        await commit(store, "a", 1)
        await until(lambda: broker.taken == ["a:1"])


async def test_a_store_that_goes_away_while_the_relay_rests_is_waited_for_too(store: MemoryStateStore) -> None:
    log, broker = InterruptedLog(store.log), ScriptedBroker()

    async with relaying(log, broker) as relay:
        await until(lambda: len(relay._progress.slices) == 16)
        log.fails_to_wait = True
        await until(lambda: relay._store_failures > 0)
        log.fails_to_wait = False
        await commit(store, "a", 1)

    assert broker.taken == ["a:1"]


async def test_a_store_that_is_away_is_waited_for(store: MemoryStateStore, caplog: pytest.LogCaptureFixture) -> None:
    log, broker = InterruptedLog(store.log), ScriptedBroker()

    async with relaying(log, broker):
        await commit(store, "a", 1)
        await until(lambda: len(broker.taken) == 1)
        log.is_away = True
        await until(lambda: "the store is away" in caplog.text)
        await commit(store, "a", 2)
        log.is_away = False

    assert broker.taken == ["a:1", "a:2"]
