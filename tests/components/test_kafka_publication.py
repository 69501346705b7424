"""How a publish deals its messages out, on producers that are played."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from statecast.clock import SystemClock
from statecast.components.broker.broker import Message, Outcome, Published, Refused, Unreachable
from statecast.components.broker.kafka.patience import Patience
from statecast.components.broker.kafka.producer import MessageRefused, NoLeader, Sending
from statecast.components.broker.kafka.publication import Publication
from statecast.components.broker.kafka.records import Record
from statecast.components.broker.kafka.topics import TopicMemory
from statecast.components.testing.broker import numbered

POISON = b"poison"


class PlayedProducer:
    """Stores what has no poison in it, but for leaderless partitions. It tells the pool what it was given."""

    def __init__(self, pool: "SlowPool") -> None:
        self._pool = pool

    async def partitions(self, topic: str, patience: Patience, *, at_least: int) -> list[int]:
        self._pool.at_least.append(at_least)
        return [0, *self._pool.leaderless]

    async def find_leader(self, topic: str, partition: int, patience: Patience) -> None:
        if partition in self._pool.leaderless:
            raise NoLeader(f"no leader of partition {partition}")

    def prepare(self, records: Sequence[Record], topic: str, partition: int) -> Sending:
        return Sending(topic, partition, records)

    async def send(self, sending: Sending) -> None:
        sending.was_sent = True
        self._pool.batches.append(len(sending.builder))
        if any(record.value == POISON for record in sending.builder):
            raise MessageRefused("INVALID_RECORD")


class SlowPool:
    """Lends `producers` producers; who waits for one more has waited until the deadline."""

    def __init__(self, producers: int, leaderless: Sequence[int] = ()) -> None:
        self.leaderless = leaderless
        self.batches: list[int] = []
        self.at_least: list[int] = []
        self.is_empty = asyncio.Event()
        self._left = producers

    async def borrow(self) -> PlayedProducer:
        if self._left == 0:
            self.is_empty.set()
            await asyncio.Event().wait()
        self._left -= 1
        return PlayedProducer(self)

    def give_back(self, producer: PlayedProducer) -> None:
        self._left += 1

    def throw_away(self, producer: PlayedProducer) -> None:
        pass


async def publish(messages: Sequence[Message], memory: TopicMemory, pool: Any) -> list[Outcome]:
    publication = Publication(messages, 1_000_000, memory)
    sending = asyncio.ensure_future(publication.send(pool))
    deadline = asyncio.ensure_future(pool.is_empty.wait())
    await asyncio.wait([sending, deadline], return_when=asyncio.FIRST_COMPLETED)
    for task in (sending, deadline):
        task.cancel()
    await asyncio.wait([sending, deadline])
    if not sending.cancelled():
        sending.result()
    return publication.outcomes()


async def publish_until_refused(messages: Sequence[Message], memory: TopicMemory) -> list[Message]:
    """Publish as a relay does, again what was not published, with two producers a call; tell what is refused."""
    pending = list(messages)
    for _ in range(10):
        outcomes = await publish(pending, memory, SlowPool(producers=2))
        if refused := [message for message, each in zip(pending, outcomes, strict=True) if isinstance(each, Refused)]:
            return refused
        pending = [message for message, each in zip(pending, outcomes, strict=True) if each != Published()]
    return []


@pytest.mark.parametrize("place", [0, 500, 999])
async def test_poison_is_found_over_several_calls_when_each_has_time_for_few_refusals(place: int) -> None:
    """After each refusal the rest waits for another producer."""
    messages = numbered("t", 1000, keys=1000)
    messages[place] = Message("t", POISON, "poisoned")

    refused = await publish_until_refused(messages, TopicMemory(SystemClock()))

    assert refused == [messages[place]]


async def test_once_the_poison_is_found_batches_are_large_again() -> None:
    memory = TopicMemory(SystemClock())
    others = numbered("t", 100, keys=100)
    await publish_until_refused([Message("t", POISON, "poisoned"), *others], memory)

    pool = SlowPool(producers=1)
    outcomes = await publish(others, memory, pool)

    assert Counter(map(type, outcomes)) == {Published: 100}
    assert pool.batches == [100]


async def test_what_is_not_sent_while_poison_is_looked_for_is_unreachable() -> None:
    messages = [Message("t", POISON, "poisoned"), *numbered("t", 100)]

    outcomes = await publish(messages, TopicMemory(SystemClock()), SlowPool(producers=2))

    assert Counter(map(type, outcomes)) == {Unreachable: 101}


async def test_a_partition_without_a_leader_holds_up_no_other() -> None:
    messages = numbered("t", 100, keys=20)

    outcomes = await publish(messages, TopicMemory(SystemClock()), SlowPool(producers=1, leaderless=[1]))

    assert set(outcomes) == {Published(), Unreachable("no leader of partition 1")}


async def test_as_many_partitions_as_one_publish_saw_are_expected_of_the_next() -> None:
    memory = TopicMemory(SystemClock())
    pool = SlowPool(producers=1)

    for _ in range(2):
        await publish(numbered("t", 1), memory, pool)

    assert pool.at_least == [0, 1]
