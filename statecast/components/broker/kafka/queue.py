"""What of one publish is still to be sent to one partition, and in which batches: pure."""

from collections import deque
from collections.abc import Iterable

from statecast.components.broker.kafka.records import Record

Batch = tuple[Record, ...]


class PartitionQueue:
    """The records for one partition, in order. One batch is taken at a time, and the next one once it is stored.

    A batch that was refused is split in halves which go first, so that after a few more refusals the culprit is alone:
    about log2(n) of them for a batch of n. A record that will not be stored takes the later ones of its key along.
    """

    def __init__(self, topic: str, partition: int, records: Iterable[Record]) -> None:
        self.topic = topic
        self.partition = partition
        self.was_split = False
        self.has_culprit = False
        self._suspects: deque[Batch] = deque()
        self._rest = deque(records)

    def __bool__(self) -> bool:
        return bool(self._suspects or self._rest)

    def take(self, limit_bytes: int, *, limit_count: int) -> Batch:
        """Take the next batch: one at least, as many as fit in `limit_bytes`, and no more than `limit_count`."""
        if self._suspects:
            return self._suspects.popleft()
        batch = [self._rest.popleft()]
        size = batch[0].size
        while self._rest and len(batch) < limit_count and (size := size + self._rest[0].size) <= limit_bytes:
            batch.append(self._rest.popleft())
        return tuple(batch)

    def split(self, batch: Batch) -> None:
        self.was_split = True
        middle = len(batch) // 2
        self._suspects.extendleft((batch[middle:], batch[:middle]))

    def drop_keys(self, keys: Iterable[str | None]) -> list[Record]:
        """Remove and return all records of these keys; records without a key are no key's."""
        keys = frozenset(keys) - {None}
        dropped = [record for record in self._records() if record.key in keys]
        if dropped:
            kept = (tuple(record for record in batch if record.key not in keys) for batch in self._suspects)
            self._suspects = deque(batch for batch in kept if batch)
            self._rest = deque(record for record in self._rest if record.key not in keys)
        return dropped

    def drop_all(self) -> list[Record]:
        dropped = list(self._records())
        self._suspects.clear()
        self._rest.clear()
        return dropped

    def _records(self) -> Iterable[Record]:
        for batch in self._suspects:
            yield from batch
        yield from self._rest
