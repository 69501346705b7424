"""What a producer tells of its sendings, on a server that is played: answers that a real one gives only in trouble."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, Self

import pytest

from statecast.clock import SystemClock
from statecast.components.broker.broker import Message
from statecast.components.broker.kafka import producer as producer_module
from statecast.components.broker.kafka.config import parse_config
from statecast.components.broker.kafka.patience import Patience
from statecast.components.broker.kafka.producer import (
    MessageRefused,
    NoLeader,
    Producer,
    SendFailed,
    Sending,
    TopicRefused,
)
from statecast.components.broker.kafka.records import encode
from statecast.components.manifest import Component

NODE, NOBODY = 0, -1


class MovedClock(SystemClock):
    def __init__(self) -> None:
        self.seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds


class PlayedServer:
    """The one node of a cluster with the topic `t`. It answers no request unless `answer` makes an answer of it."""

    def __init__(self, answer: Callable[[Any], Any] | None = None) -> None:
        self.requests: list[Any] = []
        self._answer = answer

    @classmethod
    def refusing(cls, code: int) -> Self:
        """Make one that answers every batch for partition 0 with the error."""
        return cls(lambda request: SimpleNamespace(API_VERSION=2, topics=[("t", [(0, code, -1, -1)])]))

    @classmethod
    def hiding(cls, code: int) -> Self:
        """Make one that answers with the error when it is asked for a topic."""
        return cls(lambda request: SimpleNamespace(topics=[(code, "unknown", False, [])]))

    def metadata(self, leaders: Sequence[int] = (NODE,)) -> Any:
        """Make an answer that knows topic `t` with a partition for each of the leaders."""
        partitions = [(0, number, leader, [NODE], [NODE]) for number, leader in enumerate(leaders)]
        topics = [(0, "t", False, partitions)]
        return SimpleNamespace(API_VERSION=1, brokers=[(NODE, "h", 1, None)], controller_id=NODE, topics=topics)

    # A connection of the driver's

    _writer = None

    def connected(self) -> bool:
        return True

    def send(self, request: Any, expect_response: bool = True) -> asyncio.Future[Any]:
        self.requests.append(request)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self._answer is not None:
            answer.set_result(self._answer(request))
        return answer

    async def close(self, **reason: Any) -> None:
        pass


def connected(server: PlayedServer) -> Producer:
    metadata = {"brokers": "h:1", "authType": "none"}
    producer = Producer(parse_config(Component(name="p", type="pubsub.kafka", metadata=metadata), "orders"))
    client = producer._driver.client
    client.cluster.update_metadata(server.metadata())
    client._conns[(NODE, 0)] = server
    client.bootstrap = _nothing
    return producer


@asynccontextmanager
async def started(server: PlayedServer) -> AsyncIterator[Producer]:
    producer = connected(server)
    producer._driver._txn_manager.set_pid_and_epoch(1, 0)
    await producer.start()
    await _steps(5)
    try:
        yield producer
    finally:
        await producer.close()


def sending_of(producer: Producer) -> Sending:
    return producer.prepare([encode(0, Message("t", b"1", "a"))], "t", 0)


def refresh_with(producer: Producer, metadata: Callable[[], Any]) -> None:
    """Have the driver learn this whenever it asks anew."""
    client = producer._driver.client

    async def learn() -> None:
        client.cluster.update_metadata(metadata())

    client.force_metadata_update = lambda: asyncio.ensure_future(learn())


async def _nothing() -> None:
    pass


async def _steps(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.mark.parametrize("steps", range(8))
async def test_what_was_not_sent_when_it_was_cancelled_is_never_sent(steps: int) -> None:
    """At one of the steps the driver has made the task of the request, and not begun it."""
    server = PlayedServer()
    async with started(server) as producer:
        sending = sending_of(producer)
        task = asyncio.ensure_future(producer.send(sending))
        await _steps(steps)
        task.cancel()
        await asyncio.wait([task])
        was_sent = sending.was_sent
        await _steps(20)

    assert len(server.requests) == was_sent


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        *((code, MessageRefused) for code in (2, 10, 18, 87)),
        *((code, TopicRefused) for code in (17, 29, 31, 32, 35, 43, 44, 76)),
        *((code, SendFailed) for code in (-1, 45, 57, 12345)),
    ],
)
async def test_an_error_of_the_server_is_about_the_message_the_topic_or_neither_and_is_told(
    code: int, kind: type[Exception]
) -> None:
    async with started(PlayedServer.refusing(code)) as producer:
        with pytest.raises(kind, match=rf"\({code}\)"):
            await producer.send(sending_of(producer))


async def test_what_the_server_says_while_the_driver_goes_on_sending_is_told() -> None:
    async with started(PlayedServer.refusing(19)) as producer:
        sending = sending_of(producer)
        sender = asyncio.ensure_future(producer.send(sending))
        await _steps(20)
        sender.cancel()
        await asyncio.wait([sender])

    assert sending.answer is not None
    assert sending.answer.startswith("NOT_ENOUGH_REPLICAS (19): ")


# What is missing


@pytest.mark.parametrize(
    ("code", "kind"), [(3, TopicRefused), (38, TopicRefused), (12345, TopicRefused), (5, SendFailed)]
)
async def test_a_topic_that_cannot_be_had_is_given_up_with_the_reason_when_the_patience_is_over(
    code: int, kind: type[Exception]
) -> None:
    clock = MovedClock()
    patience = Patience(2, clock)
    async with started(PlayedServer.hiding(code)) as producer:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await producer.partitions("unknown", patience, at_least=0)
        clock.seconds = 2
        with pytest.raises(kind, match=rf"\({code}\)"):
            await producer.partitions("unknown", patience, at_least=0)


async def test_a_topic_that_nobody_was_asked_for_gets_all_the_patience() -> None:
    """A call that failed, or was cancelled, before the server answered is no sign that the topic is missing."""
    clock = MovedClock()
    patience = Patience(2, clock)
    async with started(PlayedServer()) as silent, started(PlayedServer.hiding(3)) as producer:
        asking = asyncio.ensure_future(silent.partitions("unknown", patience, at_least=0))
        await _steps(5)
        asking.cancel()
        clock.seconds = 100
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await producer.partitions("unknown", patience, at_least=0)


async def test_a_partition_without_a_leader_is_waited_for_until_the_patience_is_over() -> None:
    clock = MovedClock()
    patience = Patience(1, clock)
    server = PlayedServer()
    async with started(server) as producer:
        leaders = [NODE, NOBODY]
        refresh_with(producer, lambda: server.metadata(leaders))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await producer.find_leader("t", 1, patience)
        clock.seconds = 1
        with pytest.raises(NoLeader):
            await producer.find_leader("t", 1, patience)


async def test_a_partition_that_gets_a_leader_in_time_is_found() -> None:
    server = PlayedServer()
    async with started(server) as producer:
        learned = [[NODE, NOBODY], [NODE, NOBODY], [NODE, NODE]]
        refresh_with(producer, lambda: server.metadata(learned.pop(0)))

        await producer.find_leader("t", 1, Patience(1, MovedClock()))

    assert learned == []


async def test_a_producer_that_gets_no_id_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would count as the one that is being opened, and every publish wait for it."""
    monkeypatch.setattr(producer_module, "START_SECONDS", 0.05)
    server = PlayedServer()
    producer = connected(server)

    with pytest.raises(SendFailed, match="no producer id"):
        await producer.start()
    await producer.close()

    assert [type(request).__name__ for request in server.requests] == ["InitProducerIdRequest"]


async def test_a_producer_that_knows_fewer_partitions_than_another_asks_anew() -> None:
    """Else the messages of one key would go to two partitions in turn, by the producer that each publish gets."""
    server = PlayedServer()
    patience = Patience(2, MovedClock())
    async with started(server) as producer:
        refresh_with(producer, lambda: server.metadata([NODE, NODE]))

        before = await producer.partitions("t", patience, at_least=1)
        after = await producer.partitions("t", patience, at_least=2)

    assert (before, after) == ([0], [0, 1])
