"""Events that the broker refused wait aside, key by key: tried again, at last parked until they are replayed."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from statecast.components.broker.broker import Outcome, Published, Refused
from statecast.components.state.log import DeferredKey, Failure, LogEntry, OutboxLog
from statecast.outbox.progress import BackOff, SliceProgress
from statecast.outbox.publisher import Publisher

logger = logging.getLogger(__name__)

BATCH = 1_000


@dataclass(frozen=True, slots=True)
class RetryOptions:
    """An event that the broker refuses is tried `max_attempts` times; then its key is parked, and a copy of the event
    goes to `dead_letter_topic` if there is one."""

    max_attempts: int = 10
    dead_letter_topic: str | None = None
    back_off: BackOff = field(default_factory=BackOff)


@dataclass(slots=True)
class RelayCounts:
    """What one relay did since it was made."""

    published: int = 0
    failed: int = 0
    fenced: int = 0
    deferred: int = 0
    parked: int = 0


class DeferredRetry:
    def __init__(self, log: OutboxLog, publisher: Publisher, options: RetryOptions, counts: RelayCounts) -> None:
        self._log = log
        self._publisher = publisher
        self._options = options
        self._counts = counts

    def first_failure(self, reason: str) -> Failure:
        """Make the failure of an event that was refused for the first time."""
        return Failure(1, self._options.back_off.pause(1), reason)

    async def retry(self, key: DeferredKey, progress: SliceProgress) -> bool:
        """Publish what is aside of a key, in order, up to the first event that is refused again.

        Tell whether the broker answered at all; where it did not, other keys need not be tried now.
        """
        entries = await self._log.read_deferred(key.slice, key.order_key, BATCH)
        outcomes = await self._publisher.publish(entries)
        published = [
            entry.id for entry, outcome in zip(entries, outcomes, strict=True) if isinstance(outcome, Published)
        ]
        self._counts.published += len(published)
        failure = await self._failure(key, entries, outcomes)
        is_left = await self._log.settle_deferred(progress.settled_lease, key.order_key, published, failure)
        if not is_left:
            progress.deferred_keys.discard(key.order_key)
        return not entries or isinstance(outcomes[0], Published | Refused)

    async def _failure(
        self, key: DeferredKey, entries: Sequence[LogEntry], outcomes: Sequence[Outcome]
    ) -> Failure | None:
        """Tell how the first event that was not published failed; None where all were."""
        for index, (entry, outcome) in enumerate(zip(entries, outcomes, strict=True)):
            if isinstance(outcome, Published):
                continue
            attempts = 0 if index else key.attempts
            if isinstance(outcome, Refused) and not outcome.is_about_topic:
                return await self._refused(entry, attempts + 1, outcome.reason)
            return Failure(attempts, self._options.back_off.pause(max(attempts, 1)), outcome.reason)
        return None

    async def _refused(self, entry: LogEntry, attempts: int, reason: str) -> Failure:
        if attempts < self._options.max_attempts:
            return Failure(attempts, self._options.back_off.pause(attempts), reason)
        logger.error(
            "event %s for topic %r was refused %d times, its key %r is parked until it is replayed: %s",
            entry.record.event_id,
            entry.record.topic,
            attempts,
            entry.record.order_key,
            reason,
        )
        self._counts.parked += 1
        if self._options.dead_letter_topic is not None:
            await self._publisher.publish_copy(entry, self._options.dead_letter_topic, reason)
        return Failure(attempts, None, reason)
