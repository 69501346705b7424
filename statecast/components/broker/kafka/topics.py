"""What a broker learns of its topics in one publish for the next."""

from statecast.clock import Clock
from statecast.components.broker.kafka.patience import Patience

SMALLEST_BATCH_BYTES = 1024

UNKNOWN_SECONDS = 2.0
"""How long a topic may be unknown while the server may be making it."""

LEADERLESS_SECONDS = 1.0
"""How long a publish waits for a partition whose leader is gone."""

_NO_LIMIT = 2**31


class TopicMemory:
    """What of the topics was missing, how many partitions each has, and how large its batches may be."""

    def __init__(self, clock: Clock) -> None:
        self.unknown = Patience(UNKNOWN_SECONDS, clock)
        self.leaderless = Patience(LEADERLESS_SECONDS, clock)
        self.partition_count: dict[str, int] = {}
        self._batch_bytes: dict[str, int] = {}
        self._batch_count: dict[tuple[str, int], int] = {}

    # How large a batch may be

    def batch_bytes(self, topic: str, limit: int) -> int:
        return self._batch_bytes.get(topic, limit)

    def halve_bytes(self, topic: str, limit: int) -> None:
        """Batches were refused although no message of theirs was: send smaller ones to this topic from now on."""
        self._batch_bytes[topic] = max(self.batch_bytes(topic, limit) // 2, SMALLEST_BATCH_BYTES)

    def batch_count(self, topic: str, partition: int) -> int:
        return self._batch_count.get((topic, partition), _NO_LIMIT)

    def suspect(self, topic: str, partition: int, count: int) -> None:
        """A batch of `count` messages was refused: the next one has half as many at most.

        A call that has no time to find the culprit leaves that to the next one, which would else begin with all again.
        """
        self._batch_count[topic, partition] = count // 2

    def trust_more(self, topic: str, partition: int) -> None:
        """A batch was stored: the next one may have twice as many."""
        if (topic, partition) in self._batch_count:
            self._batch_count[topic, partition] *= 2

    def trust_again(self, topic: str, partition: int) -> None:
        """The culprit was found, or there was none."""
        self._batch_count.pop((topic, partition), None)
