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
from statecast.components.broker.broker import Broker, Outcome, Refused, Settlement, Unreachable
from statecast.components.state.log import LogEntry, OutboxLog
from statecast.errors import OutcomeUnknown, StoreUnavailable
from statecast.outbox.progress import BackOff, Progress, SliceProgress, fair_share, message_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RelayOptions:
    """`lease` must outlast `publish_timeout` by far: a publish is only begun under a lease that covers it."""

    lease: timedelta = timedelta(seconds=10)
    publish_timeout: timedelta = timedelta(seconds=4)
    persist_every: timedelta = timedelta(milliseconds=250)
    trim_every: timedelta = timedelta(seconds=10)
    idle_wait: timedelta = timedelta(milliseconds=100)
    drain: timedelta = timedelta(seconds=5)
    batch: int = 1_000
    back_off: BackOff = field(default_factory=BackOff)


@dataclass(slots=True)
class RelayCounts:
    """What one relay did since it was made."""

    published: int = 0
    failed: int = 0
    fenced: int = 0


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
        self._brokers = brokers
        self._name = name
        self._clock = clock
        self._options = options or RelayOptions()
        self._progress = Progress(self._options.back_off)
        self._store_failures = 0
        self._attend_at = 0.0
        self._persist_at = 0.0
        self._trim_at = 0.0
        self._leased_until = 0.0

    async def run(self, stop: asyncio.Event) -> None:
        """Relay until `stop` is set, then go on until the log is empty, for the drain time at most.

        A store or a broker that is away is waited for; nothing of that ends the loop. Leaving gives the leases
        back, so that another relay goes on at once.
        """
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
            except (StoreUnavailable, OutcomeUnknown) as error:
                if stop.is_set():
                    return
                await self._wait_for_the_store(stop, error)
                continue
            self._store_failures = 0
            if was_busy:
                continue
            if stop.is_set() and self._progress.next_retry() is None:
                return
            await self._rest()

    async def _wait_for_the_store(self, stop: asyncio.Event, error: Exception) -> None:
        self._store_failures += 1
        logger.warning("relay %s: the store is away, trying again: %s", self._name, error)
        await self._clock.wait(stop, self._options.back_off.pause(self._store_failures))

    async def _round(self) -> bool:
        """Do all that is due now; tell whether entries were read or published."""
        await self._attend()
        read = await self._read()
        entries = self._progress.due(self._clock.monotonic())
        if entries:
            await self._publish(entries)
        await self._persist_when_due()
        return read or bool(entries)

    async def _attend(self) -> None:
        """Say that this relay lives, take the slices that are its fair share, give up those that are not."""
        now = self._clock.monotonic()
        if now < self._attend_at:
            return
        lease = self._options.lease
        relays = await self._log.heartbeat(self._name, lease)
        share = fair_share(self._log.slices, relays)
        surplus = self._progress.surplus(share)
        if surplus:
            await self._log.release(surplus)
            self._progress.drop(surplus)
        await self._persist()
        missing = share - len(self._progress.slices)
        if missing > 0:
            self._progress.add(await self._log.acquire(self._name, missing, lease))
        # Slices that a dead relay still holds are looked for more often than a lease is renewed.
        is_complete = len(self._progress.slices) >= share
        self._attend_at = now + lease.total_seconds() / (3 if is_complete else 20)

    async def _read(self) -> bool:
        leases = self._progress.readable()
        if not leases:
            return False
        batch = await self._log.read(leases, self._options.batch)
        self._progress.take(batch)
        return bool(batch.entries)

    async def _publish(self, entries: list[LogEntry]) -> None:
        # The lease is renewed before the publish: a broker that is slow must not make us a second sender.
        if self._clock.monotonic() + self._options.publish_timeout.total_seconds() > self._leased_until:
            await self._persist()
            entries = [entry for entry in entries if entry.slice in self._progress.slices]
        outcomes = await self._outcomes(entries)
        now = self._clock.monotonic()
        failed = self._progress.settle(entries, outcomes, now)
        left = sum(len(progress.waiting) for progress in failed)
        self.counts.published += len(entries) - left
        self.counts.failed += left
        if failed:
            self._tell(failed, entries, outcomes)

    async def _outcomes(self, entries: Sequence[LogEntry]) -> list[Outcome]:
        """Publish through the broker each entry names; entries of one broker go in one call."""
        outcomes: list[Outcome] = [Unreachable("not sent")] * len(entries)
        by_pubsub: dict[str, list[int]] = {}
        for index, entry in enumerate(entries):
            by_pubsub.setdefault(entry.record.pubsub, []).append(index)
        for pubsub, indexes in by_pubsub.items():
            published = await self._publish_through(pubsub, [entries[index] for index in indexes])
            for index, outcome in zip(indexes, published, strict=True):
                outcomes[index] = outcome
        return outcomes

    async def _publish_through(self, pubsub: str, entries: list[LogEntry]) -> list[Outcome]:
        broker = self._brokers.get(pubsub)
        if broker is None:
            reason = f"no pub/sub component named {pubsub!r} is loaded"
            return [Refused(reason, is_about_topic=True)] * len(entries)
        messages = [message_of(entry.record) for entry in entries]
        return await broker.publish(messages, self._options.publish_timeout, Settlement.HANDLED)

    async def _persist_when_due(self) -> None:
        if self._progress.has_unpersisted and self._clock.monotonic() >= self._persist_at:
            await self._persist()
        if self._clock.monotonic() >= self._trim_at:
            self._trim_at = self._clock.monotonic() + self._options.trim_every.total_seconds()
            await self._log.trim()

    async def _persist(self) -> None:
        """Persist the positions and renew the leases; stop relaying what turns out to be another's."""
        if not self._progress.slices:
            return
        started = self._clock.monotonic()
        lost = self._progress.keep(await self._log.advance(self._progress.settled(), self._options.lease))
        self._leased_until = started + self._options.lease.total_seconds()
        self._persist_at = self._clock.monotonic() + self._options.persist_every.total_seconds()
        if lost:
            self.counts.fenced += len(lost)
            logger.warning("relay %s: slices %s are another relay's now", self._name, lost)

    async def _rest(self) -> None:
        now = self._clock.monotonic()
        moments = [now + self._options.idle_wait.total_seconds(), self._attend_at]
        if self._progress.has_unpersisted:
            moments.append(self._persist_at)
        if (retry_at := self._progress.next_retry()) is not None:
            moments.append(retry_at)
        pause = timedelta(seconds=max(min(moments) - now, 0.001))
        await self._log.wait(self._progress.readable(), pause)

    async def _give_up(self) -> None:
        try:
            await self._log.release(self._progress.settled())
        except (StoreUnavailable, OutcomeUnknown) as error:
            logger.warning("relay %s: leases were not given back, they run out by themselves: %s", self._name, error)

    def _tell(self, failed: list[SliceProgress], entries: Sequence[LogEntry], outcomes: Sequence[Outcome]) -> None:
        """Log the first reason of each slice that failed, at its first failure and then ever more rarely."""
        for progress in failed:
            if progress.failures & (progress.failures - 1):
                continue
            head = progress.waiting[0]
            outcome = outcomes[next(index for index, entry in enumerate(entries) if entry is head)]
            logger.warning(
                "relay %s: slice %d waits: event %s for topic %r is not published after %d tries: %s",
                self._name,
                progress.read_lease.slice,
                head.record.event_id,
                head.record.topic,
                progress.failures,
                outcome,
            )
