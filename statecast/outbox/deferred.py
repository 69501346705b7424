"""Events that the broker refused wait aside, queue by queue: tried again, at last parked until they are replayed."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from statecast.components.broker.broker import Outcome, Published, Refused, Unknown, Unreachable
from statecast.components.state.log import DeferredQueue, Failure, LogEntry, QueueProgress, QueueStatus
from statecast.outbox.progress import BackOff
from statecast.outbox.publisher import Publisher

logger = logging.getLogger(__name__)

_Tried = list[tuple[LogEntry, Outcome]]


@dataclass(frozen=True, slots=True)
class RetryOptions:
    """An event that the broker refuses is tried `max_attempts` times; then its queue is parked, and a copy of the event
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
    """What becomes of queues that were tried again."""

    def __init__(self, publisher: Publisher, options: RetryOptions, counts: RelayCounts) -> None:
        self._publisher = publisher
        self._options = options
        self._counts = counts

    def first_failure(self, reason: str) -> Failure:
        """Make the failure of an event that was refused for the first time."""
        return Failure(1, self._options.back_off.pause(1), reason)

    async def judge(
        self, queues: Sequence[QueueStatus], entries: Sequence[LogEntry], outcomes: Sequence[Outcome]
    ) -> list[QueueProgress]:
        """Tell how far each queue is, of whose first entries these are the outcomes.

        One that is parked now is told of, and a copy of its first event goes to the dead-letter topic. Queues of which
        nothing was tried, or whose topic takes nothing, stay as they are.
        """
        tried: dict[DeferredQueue, _Tried] = {}
        for entry, outcome in zip(entries, outcomes, strict=True):
            tried.setdefault(DeferredQueue.of(entry), []).append((entry, outcome))
        # At the same time: copies that a broker does not answer to must not outlast the leases, however many they are.
        judging = (self._progress(status, tried[status.queue]) for status in queues if status.queue in tried)
        return [each for each in await asyncio.gather(*judging) if each is not None]

    async def _progress(self, status: QueueStatus, tried: _Tried) -> QueueProgress | None:
        published = tuple(entry.id for entry, outcome in tried if isinstance(outcome, Published))
        self._counts.published += len(published)
        for index, (entry, outcome) in enumerate(tried):
            if isinstance(outcome, Published):
                continue
            if _is_about_topic(outcome) and not published:
                return None
            # The attempts that are counted are those of the first entry.
            failure = await self._failure(entry, outcome, 0 if index else status.attempts)
            return QueueProgress(status.queue, published, failure)
        return QueueProgress(status.queue, published, None)

    async def _failure(self, entry: LogEntry, outcome: Refused | Unreachable | Unknown, attempts: int) -> Failure:
        if isinstance(outcome, Refused) and not outcome.is_about_topic:
            attempts += 1
            if attempts >= self._options.max_attempts:
                await self._park(entry, attempts, outcome.reason)
                return Failure(attempts, None, outcome.reason)
        return Failure(attempts, self._options.back_off.pause(max(attempts, 1)), outcome.reason)

    async def _park(self, entry: LogEntry, attempts: int, reason: str) -> None:
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


def _is_about_topic(outcome: Outcome) -> bool:
    return isinstance(outcome, Refused) and outcome.is_about_topic
