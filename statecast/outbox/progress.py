"""How far one relay is in each slice it holds: plain state, changed by synchronous methods, without I/O."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from statecast.components.broker.broker import Message, Outcome, Published, Refused, Unknown, Unreachable
from statecast.components.state.commit import OutboxRecord
from statecast.components.state.log import Batch, Deferral, DeferredQueue, Failure, Lease, LogEntry, Topic
from statecast.outbox.event import PARTITION_KEY

MOST_ASIDE_BYTES = 16 * 1024 * 1024
"""With so many bytes to put aside the positions are persisted at once, not in their turn."""


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
        """Tell the pause after so many failures in a row; none after none."""
        return min(self.first * (1 << min(failures - 1, 20)), self.longest) if failures else timedelta(0)


@dataclass(slots=True)
class SliceProgress:
    """One leased slice: what of it was read and waits to be published, and up to where all of it is settled.

    `read_lease` stands behind everything that was read, `settled_lease` behind everything that is published or put
    aside; only the latter is ever persisted, together with `deferrals`. Entries whose queue is in `deferred` are put
    aside as they are read.
    """

    read_lease: Lease
    settled_lease: Lease
    waiting: list[LogEntry] = field(default_factory=list)
    deferrals: list[Deferral] = field(default_factory=list)
    deferred: set[DeferredQueue] = field(default_factory=set)
    failures: int = 0
    retry_at: float = 0.0

    @classmethod
    def start(cls, lease: Lease, deferred: Iterable[DeferredQueue]) -> "SliceProgress":
        return cls(lease, lease, deferred=set(deferred))

    def take(self, lease: Lease, entries: Iterable[LogEntry], blocked: "Mapping[Topic, TopicBlock]") -> None:
        """Take over what was read behind what waits already, or put it aside where its queue or its topic is."""
        self.read_lease = lease
        if self.deferred or blocked:
            self.waiting += [entry for entry in entries if not self._goes_aside(entry, blocked)]
        else:
            self.waiting += entries
        self._settle()

    def remove(self, entries: Iterable[LogEntry]) -> None:
        """Wait no more for these entries: they are published."""
        ids = {entry.id for entry in entries}
        self.waiting = [entry for entry in self.waiting if entry.id not in ids]
        self._settle()

    def defer(self, head: LogEntry, failure: Failure) -> None:
        """Put an entry that was refused aside, and with it all that waits of its queue."""
        queue = DeferredQueue.of(head)
        entries = [entry for entry in self.waiting if DeferredQueue.of(entry) == queue]
        self._put_aside(queue, entries, failure)
        self.remove(entries)

    def defer_blocked(self, blocked: "Mapping[Topic, TopicBlock]") -> None:
        """Put aside all that waits for one of these topics, each queue by itself."""
        queues: dict[DeferredQueue, list[LogEntry]] = {}
        for entry in self.waiting:
            if topic_of(entry) in blocked:
                queues.setdefault(DeferredQueue.of(entry), []).append(entry)
        for queue, entries in queues.items():
            self._put_aside(queue, entries, blocked[topic_of(entries[0])].failure)
            self.remove(entries)

    def _goes_aside(self, entry: LogEntry, blocked: "Mapping[Topic, TopicBlock]") -> bool:
        queue = DeferredQueue.of(entry)
        block = blocked.get(topic_of(entry))
        if queue in self.deferred:
            self.deferrals.append(Deferral((entry,), None))
        elif block is not None:
            self._put_aside(queue, [entry], block.failure)
        else:
            return False
        return True

    def _put_aside(self, queue: DeferredQueue, entries: list[LogEntry], failure: Failure) -> None:
        self.deferrals.append(Deferral(tuple(entries), failure))
        self.deferred.add(queue)

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
    """A topic that takes nothing; its entries wait aside while those of other topics go on."""

    reason: str
    failures: int
    retry_at: float

    @property
    def failure(self) -> Failure:
        """Tell why an entry of this topic is put aside: no fault of its own, so that no attempt is counted."""
        return Failure(0, timedelta(0), self.reason)


@dataclass(slots=True)
class Progress:
    """All slices that a relay holds. Times are seconds of the monotonic clock."""

    back_off: BackOff = field(default_factory=BackOff)
    slices: dict[int, SliceProgress] = field(default_factory=dict)
    blocked: dict[Topic, TopicBlock] = field(default_factory=dict)
    has_unpersisted: bool = False
    """Whether entries were published since the positions were last persisted."""

    def add(self, leases: Iterable[Lease], deferred: Iterable[DeferredQueue] = ()) -> None:
        queues: dict[int, list[DeferredQueue]] = {}
        for queue in deferred:
            queues.setdefault(queue.slice, []).append(queue)
        for lease in leases:
            self.slices[lease.slice] = SliceProgress.start(lease, queues.get(lease.slice, ()))

    def readable(self) -> list[Lease]:
        """List the leases to read on with: those of which nothing waits."""
        return [progress.read_lease for progress in self.slices.values() if not progress.waiting]

    def take(self, batch: Batch) -> None:
        """Take over what was read; a slice without a new entry is settled up to its new position at once."""
        entries: dict[int, list[LogEntry]] = {}
        for entry in batch.entries:
            entries.setdefault(entry.slice, []).append(entry)
        for lease in batch.leases:
            self.slices[lease.slice].take(lease, entries.get(lease.slice, ()), self.blocked)

    def due(self, now: float) -> list[LogEntry]:
        """List what is to be published now, each slice's entries in their order."""
        return [entry for progress in self.slices.values() if progress.retry_at <= now for entry in progress.waiting]

    def settle(self, entries: Sequence[LogEntry], outcomes: Sequence[Outcome], now: float) -> list[Refusal]:
        """Note the outcome of each entry; return for each queue the first one that was refused for its own sake.

        What waits for a topic that takes nothing goes aside; what a broker did not take for any other reason stays,
        in order. Call `note_topics` before.
        """
        results: dict[int, list[tuple[LogEntry, Outcome]]] = {entry.slice: [] for entry in entries}
        for entry, outcome in zip(entries, outcomes, strict=True):
            results[entry.slice].append((entry, outcome))
            self.has_unpersisted = self.has_unpersisted or isinstance(outcome, Published)
        refusals = [refusal for number, pairs in results.items() for refusal in self._settle_slice(number, pairs, now)]
        if self.blocked:
            for progress in self.slices.values():
                progress.defer_blocked(self.blocked)
        return refusals

    def note_topics(self, entries: Sequence[LogEntry], outcomes: Sequence[Outcome], now: float) -> list[Topic]:
        """Note which topics take nothing, and which take something again; return those newly blocked."""
        refused: dict[Topic, str] = {}
        for entry, outcome in zip(entries, outcomes, strict=True):
            if isinstance(outcome, Refused) and outcome.is_about_topic:
                refused[topic_of(entry)] = outcome.reason
            elif isinstance(outcome, Published):
                self.blocked.pop(topic_of(entry), None)
        new = [topic for topic in refused if topic not in self.blocked]
        for topic, reason in refused.items():
            failures = self.blocked[topic].failures + 1 if topic in self.blocked else 1
            self.blocked[topic] = TopicBlock(reason, failures, now + self.back_off.pause(failures).total_seconds())
        return new

    def closed(self, now: float) -> list[Topic]:
        """List the topics that are not to be tried now."""
        return [topic for topic, block in self.blocked.items() if block.retry_at > now]

    def deferrals(self) -> list[Deferral]:
        """List what is to be put aside when the positions are persisted."""
        return [deferral for progress in self.slices.values() for deferral in progress.deferrals]

    def has_much_aside(self) -> bool:
        """Tell whether what is to be put aside takes so much memory that it should not wait for its turn."""
        sizes = (len(entry.record.body) for deferral in self.deferrals() for entry in deferral.entries)
        return sum(sizes) >= MOST_ASIDE_BYTES

    def undefer(self, queues: Iterable[DeferredQueue]) -> None:
        """Let these queues flow again: nothing of them is aside."""
        for queue in queues:
            self.slices[queue.slice].deferred.discard(queue)

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
        """List the slices that have queues aside."""
        return [number for number, progress in self.slices.items() if progress.deferred]

    def next_retry(self) -> float | None:
        """Tell when the first entry that waits after a failure is due again."""
        return min((progress.retry_at for progress in self.slices.values() if progress.waiting), default=None)

    def _settle_slice(self, number: int, pairs: Sequence[tuple[LogEntry, Outcome]], now: float) -> list[Refusal]:
        progress = self.slices[number]
        progress.remove(entry for entry, outcome in pairs if isinstance(outcome, Published))
        refused: dict[DeferredQueue, Refusal] = {}
        for entry, outcome in pairs:
            if isinstance(outcome, Refused) and not outcome.is_about_topic:
                refused.setdefault(DeferredQueue.of(entry), Refusal(entry, outcome.reason))
        # Those that a broker held back behind one it refused are no sign of a broker that is away.
        is_away = any(
            isinstance(outcome, Unreachable | Unknown)
            and DeferredQueue.of(entry) not in refused
            and topic_of(entry) not in self.blocked
            for entry, outcome in pairs
        )
        progress.failures = progress.failures + 1 if is_away else 0
        progress.retry_at = now + self.back_off.pause(progress.failures).total_seconds() if is_away else 0.0
        return list(refused.values())


def topic_of(entry: LogEntry) -> Topic:
    return entry.record.pubsub, entry.record.topic
