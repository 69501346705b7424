"""How far one relay is in each slice it holds: plain state, changed by synchronous methods, without I/O."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from statecast.components.broker.broker import Message, Outcome, Published
from statecast.components.state.commit import OutboxRecord
from statecast.components.state.log import Batch, Lease, LogEntry
from statecast.outbox.event import PARTITION_KEY


def message_of(record: OutboxRecord) -> Message:
    """Make the broker's message of a record; the partition key becomes the key and travels nowhere else."""
    metadata = dict(record.metadata)
    return Message(record.topic, record.body, metadata.pop(PARTITION_KEY, None), metadata)


def fair_share(slices: int, relays: int) -> int:
    """Tell how many slices one of `relays` live relays may hold: none is left over, none has more than its share."""
    return -(-slices // max(relays, 1))


@dataclass(frozen=True, slots=True)
class BackOff:
    """Doubling pauses between `first` and `longest`."""

    first: timedelta = timedelta(milliseconds=100)
    longest: timedelta = timedelta(seconds=5)

    def pause(self, failures: int) -> timedelta:
        """Tell the pause after so many failures in a row, 1 or more."""
        return min(self.first * (1 << min(failures - 1, 20)), self.longest)


@dataclass(slots=True)
class SliceProgress:
    """One leased slice: what of it was read and waits to be published, and up to where all of it is.

    `read_lease` stands behind everything that was read, `settled_lease` behind everything that is published; only
    the latter is ever persisted.
    """

    read_lease: Lease
    settled_lease: Lease
    waiting: tuple[LogEntry, ...] = ()
    failures: int = 0
    retry_at: float = 0.0

    @classmethod
    def start(cls, lease: Lease) -> "SliceProgress":
        return cls(lease, lease)


@dataclass(slots=True)
class Progress:
    """All slices that a relay holds. Times are seconds of the monotonic clock."""

    back_off: BackOff = field(default_factory=BackOff)
    slices: dict[int, SliceProgress] = field(default_factory=dict)
    has_unpersisted: bool = False
    """Whether entries were published since the positions were last persisted."""

    def add(self, leases: Iterable[Lease]) -> None:
        for lease in leases:
            self.slices[lease.slice] = SliceProgress.start(lease)

    def readable(self) -> list[Lease]:
        """List the leases to read on with: those of which nothing waits to be published."""
        return [progress.read_lease for progress in self.slices.values() if not progress.waiting]

    def take(self, batch: Batch) -> None:
        """Take over what was read; a slice without a new entry is settled up to its new position at once."""
        waiting: dict[int, list[LogEntry]] = {}
        for entry in batch.entries:
            waiting.setdefault(entry.slice, []).append(entry)
        for lease in batch.leases:
            progress = self.slices[lease.slice]
            progress.read_lease = lease
            progress.waiting = tuple(waiting.get(lease.slice, ()))
            if not progress.waiting:
                progress.settled_lease = lease

    def due(self, now: float) -> list[LogEntry]:
        """List what is to be published now, each slice's entries in their order."""
        return [entry for progress in self.slices.values() if progress.retry_at <= now for entry in progress.waiting]

    def settle(self, entries: Sequence[LogEntry], outcomes: Sequence[Outcome], now: float) -> list[SliceProgress]:
        """Note the outcome of each entry; what is not published stays, in order. Return the slices that failed."""
        left: dict[int, list[LogEntry]] = {entry.slice: [] for entry in entries}
        for entry, outcome in zip(entries, outcomes, strict=True):
            if isinstance(outcome, Published):
                self.has_unpersisted = True
            else:
                left[entry.slice].append(entry)
        return [progress for number, rest in left.items() if (progress := self._settle_slice(number, rest, now))]

    def keep(self, leases: Iterable[Lease]) -> list[int]:
        """Note which leases are still mine after they were persisted; drop the others and return their numbers."""
        kept = {lease.slice for lease in leases}
        lost = [number for number in self.slices if number not in kept]
        for number in lost:
            del self.slices[number]
        self.has_unpersisted = False
        return lost

    def settled(self) -> list[Lease]:
        """List the leases with the positions that may be persisted."""
        return [progress.settled_lease for progress in self.slices.values()]

    def surplus(self, share: int) -> list[Lease]:
        """Choose the slices to give up so that no more than `share` are left, idle ones first."""
        idle_first = sorted(self.slices.values(), key=lambda progress: len(progress.waiting))
        return [progress.settled_lease for progress in idle_first[: max(len(idle_first) - share, 0)]]

    def drop(self, leases: Iterable[Lease]) -> None:
        for lease in leases:
            del self.slices[lease.slice]

    def next_retry(self) -> float | None:
        """Tell when the first slice that waits after a failure is due again."""
        return min((progress.retry_at for progress in self.slices.values() if progress.waiting), default=None)

    def _settle_slice(self, number: int, rest: list[LogEntry], now: float) -> SliceProgress | None:
        progress = self.slices[number]
        progress.waiting = tuple(rest)
        if not rest:
            progress.settled_lease = progress.read_lease
            progress.failures, progress.retry_at = 0, 0.0
            return None
        progress.failures += 1
        progress.retry_at = now + self.back_off.pause(progress.failures).total_seconds()
        return progress
