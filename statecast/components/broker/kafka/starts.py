"""Where a member of a group goes on with the partitions it is assigned."""

from collections.abc import Collection
from typing import Any

from aiokafka import TopicPartition

from statecast.components.broker.kafka.config import InitialOffset


async def find_starts(
    consumer: Any, assigned: Collection[TopicPartition], initial: InitialOffset
) -> dict[TopicPartition, int]:
    """Tell what the group has committed of each partition. What it has not begins now, and that is committed.

    Else a member that takes the partition over later would begin at what is then the newest. Each step is one request,
    whatever the number of partitions: no heartbeat is sent meanwhile. Raises KafkaError.
    """
    # The driver's own `committed` asks for one partition at a time.
    committed = await consumer._coordinator.fetch_committed_offsets(list(assigned))
    starts = {where: offset.offset for where, offset in committed.items()}
    if missing := [where for where in assigned if where not in starts]:
        is_oldest = initial is InitialOffset.OLDEST
        begun = await (consumer.beginning_offsets if is_oldest else consumer.end_offsets)(missing)
        await consumer.commit(begun)
        starts |= begun
    return starts
