"""The loop that publishes a log: leases slices, reads, publishes, persists how far it is.

First deliveries of one order key are in commit order, because one relay holds a slice at a time, publishes its
entries in their order and persists a position only behind what is published. What a crash or a lost lease repeats
has the same event ids.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from statecast.clock import Clock
from statecast.components.broker.broker import Broker, Outcome, Published, Refused, Unknown, Unreachable
from statecast.components.state.log import Lease, LogEntry, OutboxLog, QueueStatus
from statecast.errors import OutcomeUnknown, StoreUnavailable
from statecast.outbox.deferred import DeferredRetry, RelayCounts, RetryOptions
from statecast.outbox.progress import Progress, Refusal, fair_share
from statecast.outbox.publisher import Publisher

logger = logging.getLogger(__name__)

MOST_RETRIED = 100
"""So many queues that are aside are tried again in one round, so that the log is read in between."""


@dataclass(frozen=True, slots=True)
class RelayOptions:
    """`lease` must outlast `publish_timeout` by far: a publish is only begun under a lease that covers it."""

    lease: timedelta = timedelta(seconds=10)
    publish_timeout: timedelta = timedelta(seconds=4)
    persist_every: timedelta = timedelta(milliseconds=250)
    trim_every: timedelta = timedelta(seconds=10)
    look_aside_every: timedelta = timedelta(milliseconds=100)
    idle_wait: timedelta = timedelta(milliseconds=100)
    drain: timedelta = timedelta(seconds=5)
    batch: int = 1_000
    retry: RetryOptions = field(default_factory=RetryOptions)


class Relay:
    def __init__(
        self,
        log: OutboxLog,
        brokers: Mapping[str, Broker],
        *,
        name: str,
        clock: Clock,
        options: RelayOptions | None = None,
    ) -> None:
        """`name` tells this relay from every other one that lives, or lived: make it unique at every start."""
        self.counts = RelayCounts()
        self._log = log
        self._name = name
        self._clock = clock
        self._options = options or RelayOptions()
        self._publisher = Publisher(brokers, self._options.publish_timeout)
        self._aside = DeferredRetry(self._publisher, self._options.retry, self.counts)
        self._begin()

    def _begin(self) -> None:
        """Know of no lease: those of a run before, which ended or crashed, are given back."""
        self._progress = Progress(self._options.retry.back_off)
        # Leases that are held while the queues aside in them are not known yet.
        self._unlisted: list[Lease] = []
        self._store_failures = 0
        self._aside_failures = 0
        self._attend_at = 0.0
        self._persist_at = 0.0
        self._trim_at = 0.0
        self._look_aside_at = 0.0
        self._leased_until = 0.0

    async def run(self, stop: asyncio.Event) -> None:
        """Relay until `stop` is set, then go on until the log is empty, for the drain time at most.

        A store or a broker that is away is waited for; nothing of that ends the loop. Leaving gives the leases
        back, so that another relay goes on at once. It may be run again, after it crashed too.
        """
        self._begin()
        try:
            await self._relay_until(stop)
        finally:
            await self._give_up()

    async def _relay_until(self, stop: asyncio.Event) -> None:
        drain_until: float | None = None
        while drain_until is None or self._clock.monotonic() < drain_until:
            if stop.is_set() and drain_until is None:
                drain_until = self._clock.monotonic() + self._options.drain.total_seconds()
            try:
                was_busy = await self._round()
                if not was_busy:
                    # Only a round that began after `stop` was set has seen all that was committed before.
                    if drain_until is not None and self._progress.next_retry() is None:
                        return
                    await self._rest()
                self._store_failures = 0
            except (StoreUnavailable, OutcomeUnknown) as error:
                if stop.is_set():
                    return
                await self._wait_for_the_store(stop, error)

    async def _wait_for_the_store(self, stop: asyncio.Event, error: Exception) -> None:
        self._store_failures += 1
        logger.warning("relay %s: the store is away, trying again: %s", self._name, error)
        await self._clock.wait(stop, self._options.retry.back_off.pause(self._store_failures))

    async def _round(self) -> bool:
        """Do all that is due now; tell whether entries were read or published."""
        await self._attend()
        read = await self._read()
        entries = self._progress.due(self._clock.monotonic())
        if entries:
            await self._publish(entries)
        await self._persist_when_due()
        await self._retry_deferred()
        return read or bool(entries)

    async def _attend(self) -> None:
        """Say that this relay lives, take the slices that are its fair share, give up those that are not."""
        now = self._clock.monotonic()
        if now < self._attend_at:
            return
        relays = await self._log.heartbeat(self._name, self._options.lease)
        share = fair_share(self._log.slices, relays)
        await self._persist()
        surplus = self._progress.surplus(share)
        if surplus:
            await self._log.release(surplus)
            self._progress.drop(surplus)
        await self._acquire(share - len(self._progress.slices))
        # Slices that a dead relay still holds are looked for more often than a lease is renewed.
        is_complete = len(self._progress.slices) >= share
        self._attend_at = now + self._options.lease.total_seconds() / (3 if is_complete else 20)

    async def _acquire(self, missing: int) -> None:
        wanted = missing - len(self._unlisted)
        if wanted > 0:
            self._unlisted += await self._log.acquire(self._name, wanted, self._options.lease)
        if self._unlisted:
            # Before anything is read: what belongs to a queue that is aside must go aside too.
            deferred = await self._log.deferred([lease.slice for lease in self._unlisted])
            self._progress.add(self._unlisted, [status.queue for status in deferred])
            self._unlisted = []

    async def _read(self) -> bool:
        leases = self._progress.readable()
        if not leases:
            return False
        batch = await self._log.read(leases, self._options.batch)
        self._progress.take(batch)
        return bool(batch.entries)

    async def _publish(self, entries: list[LogEntry]) -> None:
        await self._renew_before_publishing()
        entries = [entry for entry in entries if entry.slice in self._progress.slices]
        outcomes = await self._publisher.publish(entries)
        self._note_topics(entries, outcomes)
        for refusal in self._progress.settle(entries, outcomes, self._clock.monotonic()):
            self._defer(refusal)
        self._count(entries, outcomes)

    async def _renew_before_publishing(self) -> None:
        # A broker that is slow must not make us a second sender.
        if self._clock.monotonic() + self._options.publish_timeout.total_seconds() > self._leased_until:
            await self._persist()

    def _defer(self, refusal: Refusal) -> None:
        """Put a refused entry and all behind it in its queue aside, so that the others go on."""
        failure = self._aside.first_failure(refusal.reason)
        self._progress.slices[refusal.entry.slice].defer(refusal.entry, failure)
        self.counts.deferred += 1
        logger.warning(
            "relay %s: event %s for topic %r is refused, its key waits aside: %s",
            self._name,
            refusal.entry.record.event_id,
            refusal.entry.record.topic,
            refusal.reason,
        )

    async def _persist_when_due(self) -> None:
        is_due = self._is_unpersisted and self._clock.monotonic() >= self._persist_at
        if is_due or self._progress.has_much_aside():
            await self._persist()
        if self._clock.monotonic() >= self._trim_at:
            self._trim_at = self._clock.monotonic() + self._options.trim_every.total_seconds()
            await self._log.trim()

    @property
    def _is_unpersisted(self) -> bool:
        return self._progress.has_unpersisted or bool(self._progress.deferrals())

    async def _persist(self) -> None:
        """Persist the positions and what is put aside, and renew the leases; drop what is another relay's now."""
        if not self._progress.slices:
            return
        started = self._clock.monotonic()
        kept = await self._log.advance(self._progress.settled(), self._options.lease, self._progress.deferrals())
        lost = self._progress.keep(kept)
        self._leased_until = started + self._options.lease.total_seconds()
        self._persist_at = self._clock.monotonic() + self._options.persist_every.total_seconds()
        if lost:
            self.counts.fenced += len(lost)
            logger.warning("relay %s: slices %s are another relay's now", self._name, lost)

    async def _retry_deferred(self) -> None:
        """Publish what is aside and due. Looked at often only while there is any."""
        if not self._progress.with_deferred() or self._clock.monotonic() < self._look_aside_at:
            return
        slices, closed = self._progress.with_deferred(), self._progress.closed(self._clock.monotonic())
        due = await self._log.due_deferred(slices, MOST_RETRIED, closed)
        was_heard = not due or await self._retry(due)
        self._aside_failures = 0 if was_heard else self._aside_failures + 1
        if len(due) < MOST_RETRIED or not was_heard:
            pause = self._options.look_aside_every + self._options.retry.back_off.pause(self._aside_failures)
            self._look_aside_at = self._clock.monotonic() + pause.total_seconds()

    async def _retry(self, due: Sequence[QueueStatus]) -> bool:
        """Publish the first entries of these queues; tell whether a broker answered."""
        # What is to go behind a queue must be there before the queue can be found empty.
        if self._progress.deferrals():
            await self._persist()
        await self._renew_before_publishing()
        queues = [status.queue for status in due if status.queue.slice in self._progress.slices]
        entries = await self._log.read_deferred(queues, self._options.batch)
        outcomes = await self._publisher.publish(entries)
        self._note_topics(entries, outcomes)
        progress = await self._aside.judge(due, entries, outcomes)
        self._progress.undefer(await self._log.settle_deferred(self._progress.settled(), progress))
        return not entries or any(isinstance(outcome, Published | Refused) for outcome in outcomes)

    async def _rest(self) -> None:
        now = self._clock.monotonic()
        moments = [now + self._options.idle_wait.total_seconds(), self._attend_at]
        if self._is_unpersisted:
            moments.append(self._persist_at)
        if (retry_at := self._progress.next_retry()) is not None:
            moments.append(retry_at)
        pause = timedelta(seconds=max(min(moments) - now, 0.001))
        await self._log.wait(self._progress.readable(), pause)

    async def _give_up(self) -> None:
        try:
            await self._persist()
            await self._log.release([*self._progress.settled(), *self._unlisted])
            await self._log.heartbeat(self._name, timedelta(0))
        except (StoreUnavailable, OutcomeUnknown) as error:
            logger.warning("relay %s: leases were not given back, they run out by themselves: %s", self._name, error)

    def _note_topics(self, entries: Sequence[LogEntry], outcomes: Sequence[Outcome]) -> None:
        """Note which topics take nothing; one error tells of it, until they take something again."""
        for pubsub, topic in self._progress.note_topics(entries, outcomes, self._clock.monotonic()):
            reason = self._progress.blocked[pubsub, topic].reason
            logger.error(
                "relay %s: topic %r of %r takes nothing, its events wait: %s", self._name, topic, pubsub, reason
            )

    def _count(self, entries: Sequence[LogEntry], outcomes: Sequence[Outcome]) -> None:
        """Count, and tell of what begins to fail; while it goes on failing, ever more rarely."""
        published = sum(isinstance(outcome, Published) for outcome in outcomes)
        self.counts.published += published
        self.counts.failed += len(entries) - published
        waiting = {
            (outcome.reason, self._progress.slices[entry.slice].failures): entry
            for entry, outcome in zip(entries, outcomes, strict=True)
            if isinstance(outcome, Unreachable | Unknown)
        }
        for (reason, failures), entry in waiting.items():
            if failures and not failures & (failures - 1):
                logger.warning(
                    "relay %s: event %s for topic %r is not published after %d tries: %s",
                    self._name,
                    entry.record.event_id,
                    entry.record.topic,
                    failures,
                    reason,
                )
