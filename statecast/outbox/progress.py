"""How far one relay is in each slice it holds: plain state, changed by synchronous methods, without I/O."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from statecast.components.broker.broker import Message, Outcome, Published, Refused, Unknown, Unreachable
from statecast.components.state.commit import OutboxRecord
from statecast.components.state.log import Batch, Deferral, DeferredKey, Failure, Lease, LogEntry
from statecast.outbox.event import PARTITION_KEY

Topic = tuple[str, str]
"""A pub/sub component's name and a topic of it."""

MOST_HELD = 1_000
"""So many entries of blocked topics a slice holds, and reads on; with more it waits for the topics."""


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
    """One leased slice: what of it was read and waits to be published, and up to where all of it is settled.

    `read_lease` stands behind everything that was read, `settled_lease` behind everything that is published or put
    aside; only the latter is ever persisted, together with `deferrals`. Entries of `deferred_keys` are put aside as
    they are read.
    """

    read_lease: Lease
    settled_lease: Lease
    waiting: list[LogEntry] = field(default_factory=list)
    deferrals: list[Deferral] = field(default_factory=list)
    deferred_keys: set[str] = field(default_factory=set)
    failures: int = 0
    retry_at: float = 0.0

    @classmethod
    def start(cls, lease: Lease, deferred_keys: Iterable[str]) -> "SliceProgress":
        return cls(lease, lease, deferred_keys=set(deferred_keys))

    def take(self, lease: Lease, entries: Iterable[LogEntry]) -> None:
        """Take over what was read behind what waits already, or put it aside where its key is aside."""
        self.read_lease = lease
        for entry in entries:
            if entry.record.order_key in self.deferred_keys:
                self.deferrals.append(Deferral((entry,), None))
            else:
                self.waiting.append(entry)
        self._settle()

    def defer(self, head: LogEntry, failure: Failure) -> None:
        """Put an entry that was refused aside, and with it all that waits of its key."""
        key = head.record.order_key
        rest = tuple(entry for entry in self.waiting if entry.record.order_key == key)
        self.waiting = [entry for entry in self.waiting if entry.record.order_key != key]
        self.deferrals.append(Deferral(rest, failure))
        self.deferred_keys.add(key)
        self._settle()

    def publish(self, entries: Collection[LogEntry]) -> None:
        """Note entries as published."""
        ids = {entry.id for entry in entries}
        self.waiting = [entry for entry in self.waiting if entry.id not in ids]
        self._settle()

    def _settle(self) -> None:
        if not self.waiting:
            self.settled_lease = self.read_lease


@dataclass(frozen=True, slots=True)
class Refusal:
    """An entry that the broker refused for its own sake."""

    entry: LogEntry
    reason: str


@dataclass(slots=True)
class TopicBlock:
    """A topic that takes nothing; its entries wait while those of other topics go on."""

    reason: str
    failures: int
    retry_at: float


@dataclass(slots=True)
class Progress:
    """All slices that a relay holds. Times are seconds of the monotonic clock."""

    back_off: BackOff = field(default_factory=BackOff)
    slices: dict[int, SliceProgress] = field(default_factory=dict)
    blocked: dict[Topic, TopicBlock] = field(default_factory=dict)
    has_unpersisted: bool = False
    """Whether entries were published since the positions were last persisted."""

    def add(self, leases: Iterable[Lease], deferred: Iterable[DeferredKey] = ()) -> None:
        keys: dict[int, list[str]] = {}
        for each in deferred:
            keys.setdefault(each.slice, []).append(each.order_key)
        for lease in leases:
            self.slices[lease.slice] = SliceProgress.start(lease, keys.get(lease.slice, ()))

    def readable(self) -> list[Lease]:
        """List the leases to read on with: those of which nothing waits, but for some entries of blocked topics."""
        return [progress.read_lease for progress in self.slices.values() if self._is_readable(progress)]

    def take(self, batch: Batch) -> None:
        """Take over what was read; a slice without a new entry is settled up to its new position at once."""
        entries: dict[int, list[LogEntry]] = {}
        for entry in batch.entries:
            entries.setdefault(entry.slice, []).append(entry)
        for lease in batch.leases:
            self.slices[lease.slice].take(lease, entries.get(lease.slice, ()))

    def due(self, now: float) -> list[LogEntry]:
        """List what is to be published now, each slice's entries in their order."""
        return [
            entry
            for progress in self.slices.values()
            if progress.retry_at <= now
            for entry in progress.waiting
            if self._is_open(entry, now)
        ]

    def settle(self, entries: Sequence[LogEntry], outcomes: Sequence[Outcome], now: float) -> list[Refusal]:
        """Note the outcome of each entry; return for each key the first one that was refused for its own sake.

        What a broker did not take for any other reason stays, in order: for a topic that takes nothing its entries
        alone, else the slice. Call `note_topics` before.
        """
        results: dict[int, list[tuple[LogEntry, Outcome]]] = {entry.slice: [] for entry in entries}
        for entry, outcome in zip(entries, outcomes, strict=True):
            results[entry.slice].append((entry, outcome))
            self.has_unpersisted = self.has_unpersisted or isinstance(outcome, Published)
        return [refusal for number, pairs in results.items() for refusal in self._settle_slice(number, pairs, now)]

    def note_topics(self, entries: Sequence[LogEntry], outcomes: Sequence[Outcome], now: float) -> list[Topic]:
        """Note which topics take nothing, and which take something again; return those newly blocked."""
        refused: dict[Topic, str] = {}
        for entry, outcome in zip(entries, outcomes, strict=True):
            if isinstance(outcome, Refused) and outcome.is_about_topic:
                refused[_topic_of(entry)] = outcome.reason
            elif isinstance(outcome, Published):
                self.blocked.pop(_topic_of(entry), None)
        new = [topic for topic in refused if topic not in self.blocked]
        for topic, reason in refused.items():
            failures = self.blocked[topic].failures + 1 if topic in self.blocked else 1
            self.blocked[topic] = TopicBlock(reason, failures, now + self.back_off.pause(failures).total_seconds())
        return new

    def deferrals(self) -> list[Deferral]:
        """List what is to be put aside when the positions are persisted."""
        return [deferral for progress in self.slices.values() for deferral in progress.deferrals]

    def keep(self, leases: Iterable[Lease]) -> list[int]:
        """Note which leases are still mine after they were persisted; drop the others and return their numbers."""
        kept = {lease.slice for lease in leases}
        lost = [number for number in self.slices if number not in kept]
        for number in lost:
            del self.slices[number]
        for progress in self.slices.values():
            progress.deferrals.clear()
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

    def with_deferred(self) -> list[int]:
        """List the slices that have keys aside."""
        return [number for number, progress in self.slices.items() if progress.deferred_keys]

    def next_retry(self) -> float | None:
        """Tell when the first entry that waits after a failure is due again."""
        moments = [
            max(progress.retry_at, self.blocked[_topic_of(entry)].retry_at if self._is_blocked(entry) else 0.0)
            for progress in self.slices.values()
            for entry in progress.waiting[:1]
        ]
        return min(moments, default=None)

    def _settle_slice(self, number: int, pairs: Sequence[tuple[LogEntry, Outcome]], now: float) -> list[Refusal]:
        progress = self.slices[number]
        progress.publish([entry for entry, outcome in pairs if isinstance(outcome, Published)])
        refused: dict[str, Refusal] = {}
        for entry, outcome in pairs:
            if isinstance(outcome, Refused) and not outcome.is_about_topic:
                refused.setdefault(entry.record.order_key, Refusal(entry, outcome.reason))
        # Those that a broker held back behind one it refused are no sign of a broker that is away.
        is_away = any(
            isinstance(outcome, Unreachable | Unknown)
            and entry.record.order_key not in refused
            and not self._is_blocked(entry)
            for entry, outcome in pairs
        )
        progress.failures = progress.failures + 1 if is_away else 0
        progress.retry_at = now + self.back_off.pause(progress.failures).total_seconds() if is_away else 0.0
        return list(refused.values())

    def _is_readable(self, progress: SliceProgress) -> bool:
        return len(progress.waiting) < MOST_HELD and all(self._is_blocked(entry) for entry in progress.waiting)

    def _is_blocked(self, entry: LogEntry) -> bool:
        return _topic_of(entry) in self.blocked

    def _is_open(self, entry: LogEntry, now: float) -> bool:
        block = self.blocked.get(_topic_of(entry))
        return block is None or block.retry_at <= now


def _topic_of(entry: LogEntry) -> Topic:
    return entry.record.pubsub, entry.record.topic
