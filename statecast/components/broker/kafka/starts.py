"""Where a member of a group goes on with the partitions it is assigned."""

from collections.abc import Collection, Iterable
from typing import Any

from aiokafka import TopicPartition
from aiokafka.structs import OffsetAndMetadata

from statecast.components.broker.kafka.config import InitialOffset


async def find_starts(
    consumer: Any, assigned: Collection[TopicPartition], initial: InitialOffset
) -> dict[TopicPartition, OffsetAndMetadata]:
    """Tell what the group has committed of each partition. What it has not begins now, and that is committed.

    Else a member that takes the partition over later would begin at what is then the newest. Each step is one request,
    whatever the number of partitions: no heartbeat is sent meanwhile. Raises KafkaError.
    """
    coordinator = consumer._coordinator
    # The driver's own `committed` asks for one partition at a time.
    committed = await coordinator.fetch_committed_offsets([*_all_partitions(consumer).union(assigned)])
    if missing := [where for where in assigned if where not in committed]:
        birth = f"begun in generation {coordinator.generation}"
        is_oldest = initial is InitialOffset.OLDEST or _is_older(committed.values(), birth)
        offsets = await (consumer.beginning_offsets if is_oldest else consumer.end_offsets)(missing)
        begun = {where: OffsetAndMetadata(offset, birth) for where, offset in offsets.items()}
        await consumer.commit(begun)
        committed |= begun
    return {where: committed[where] for where in assigned}


def _all_partitions(consumer: Any) -> set[TopicPartition]:
    return {
        TopicPartition(topic, partition)
        for topic in consumer.subscription()
        for partition in consumer.partitions_for_topic(topic) or ()
    }


def _is_older(committed: Iterable[OffsetAndMetadata], birth: str) -> bool:
    """Tell whether the group was there before its present generation, by what it has committed of any partition.

    Then a partition without an offset was added meanwhile, and all of it is new to the group. A new group has offsets
    too, as soon as the quickest of its first members has begun; that is why each tells the generation of its birth.
    """
    return any(offset.metadata != birth for offset in committed)
