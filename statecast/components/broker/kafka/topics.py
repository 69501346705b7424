"""What a broker learns of its topics in one publish for the next."""

from dataclasses import dataclass, field

SMALLEST_BATCH_BYTES = 1024

MOST_UNKNOWN_TOPICS = 1_000

_NO_LIMIT = 2**31


@dataclass(slots=True)
class TopicMemory:
    """The batch size that a topic takes, and since when it has been unknown."""

    unknown_since: dict[str, float] = field(default_factory=dict)
    _batch_bytes: dict[str, int] = field(default_factory=dict)
    _batch_count: dict[tuple[str, int], int] = field(default_factory=dict)

    def forget_some(self) -> None:
        """Forget what is cheap to learn again, before made-up topic names fill the memory."""
        if len(self.unknown_since) > MOST_UNKNOWN_TOPICS:
            self.unknown_since.clear()

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
