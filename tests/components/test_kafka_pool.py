"""What becomes of the producers of a pool, which are played here."""

import asyncio
from collections.abc import Sequence

import pytest

from statecast.components.broker.broker import Message
from statecast.components.broker.kafka import broker as broker_module
from statecast.components.broker.kafka.config import KafkaConfig
from statecast.components.broker.kafka.patience import Patience
from statecast.components.broker.kafka.pool import ProducerPool
from statecast.components.broker.kafka.producer import SendFailed, Sending
from statecast.components.broker.kafka.records import Record
from statecast.components.testing import deadline
from statecast.components.testing.broker import LONG
from tests.components.kafka import kafka_broker

SLOW, QUICK = Message("t", b"slow", "a"), Message("t", b"quick", "b")


class PlayedProducer:
    """Stores everything at once, but a slow message never."""

    def __init__(self) -> None:
        self.is_sending = asyncio.Event()
        self.is_closed = False

    async def start(self) -> None:
        pass

    async def partitions(self, topic: str, patience: Patience, *, at_least: int) -> list[int]:
        return [0]

    async def find_leader(self, topic: str, partition: int, patience: Patience) -> None:
        pass

    def prepare(self, records: Sequence[Record], topic: str, partition: int) -> Sending:
        return Sending(topic, partition, records)

    async def send(self, sending: Sending) -> None:
        self.is_sending.set()
        if sending.builder[0].value == SLOW.body:
            await asyncio.Event().wait()

    def abandon(self) -> None:
        pass

    async def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def producers(monkeypatch: pytest.MonkeyPatch) -> list[PlayedProducer]:
    """What a broker has made, in order."""
    made: list[PlayedProducer] = []

    def make(config: KafkaConfig) -> PlayedProducer:
        made.append(PlayedProducer())
        return made[-1]

    monkeypatch.setattr(broker_module, "Producer", make)
    return made


async def test_a_producer_that_comes_back_to_a_closed_pool_is_closed() -> None:
    pool = ProducerPool(PlayedProducer)  # type: ignore[arg-type]  # it is played
    lent = await pool.borrow()

    await pool.close()
    pool.give_back(lent)
    with pytest.raises(SendFailed):
        await pool.borrow()
    await asyncio.sleep(0)

    assert isinstance(lent, PlayedProducer)
    assert lent.is_closed


async def test_a_broker_closes_its_idle_producers_even_when_its_closing_is_cancelled(
    producers: list[PlayedProducer],
) -> None:
    broker = kafka_broker("played:1")
    await broker.__aenter__()
    slow = asyncio.ensure_future(broker.publish([SLOW], LONG))
    await deadline.until(lambda: is_so(producers and producers[0].is_sending.is_set()))
    await broker.publish([QUICK], LONG)

    closing = asyncio.ensure_future(broker.__aexit__(None, None, None))
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.wait([closing, slow])
    await deadline.until(lambda: is_so(all(producer.is_closed for producer in producers)))

    assert closing.cancelled()
    assert len(producers) == 2


async def is_so(fact: object) -> bool:
    return bool(fact)
