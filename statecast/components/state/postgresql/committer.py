"""Commits that wait together go together: several in one call of the commit function, which costs little more than one.

A batch waits for no lock: what is busy in it runs alone afterwards, waiting, and its neighbours are done. Nobody waits
for long at a time (docs/decisions/0010-nobody-waits-long-for-a-lock.md). Each commit has its own outcome. Commits with
a key, mark or claim in common never run at the same time, and keep the order in which they were submitted.
"""

import asyncio
import random
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from statecast.components.settlement import wait_for_settlement
from statecast.components.state.commit import Commit, ETag
from statecast.components.state.postgresql.call import Applied, Busy, CommitCall, Outcome, PreparedCommit, Refused
from statecast.components.state.postgresql.commit_function import MOST_LOCKS
from statecast.components.state.postgresql.failures import Contended
from statecast.components.state.postgresql.lanes import Lanes, Session
from statecast.components.state.postgresql.queue import CommitQueue, Limits, take_batch
from statecast.components.state.postgresql.wake import Waker
from statecast.errors import InvalidRequest, OutcomeUnknown, StatecastError, StoreUnavailable

_SLOT_SECONDS: Final = 0.05
_LOOK_SECONDS: Final = 0.05
_PAUSE_SECONDS: Final = 0.01
# All others wait while a large commit tries to be alone, so it tries seldom.
_LARGE_PAUSE_SECONDS: Final = 1.0
# A call that began in the last part of a commit's time might not be answered by its end.
_LAST_SHARE: Final = 0.1


@dataclass(frozen=True, slots=True)
class CommitterOptions:
    """`slots` calls are under way at a time, aside from those that wait for a lock, for which there are `places`."""

    limits: Limits
    slots: int
    places: int

    @classmethod
    def choose(cls, *, connections: int, groups: bool) -> "CommitterOptions":
        """Choose for so many connections, some of which are left for reads; without `groups` all commits go alone.

        Two calls keep both sides busy, one being made or read while the server works on the other; with more of them
        each has fewer commits.
        """
        running = max(1, connections - 2)
        spared = min(2, running - 1)
        limits = Limits(commits=128 if groups else 1, members=MOST_LOCKS, weight=1_000_000)
        # With one connection nobody may wait at it for another transaction.
        places = running - spared if connections > 1 else 0
        return cls(limits, slots=max(1, spared) if groups else running, places=places)


class _Waiting:
    """One commit with its caller; compared by identity."""

    __slots__ = (
        *("ahead", "answer", "deadline", "footprint", "is_finished", "is_sent"),
        *("obstacle", "prepared", "settled", "weight"),
    )

    def __init__(self, prepared: PreparedCommit, deadline: float, answer: "asyncio.Future[tuple[ETag | None, ...]]"):
        self.prepared = prepared
        self.footprint: Sequence[Hashable] = prepared.footprint
        self.weight = prepared.weight
        self.deadline = deadline
        self.answer = answer
        self.ahead = 0
        self.is_sent = False
        self.is_finished = False
        self.obstacle = "another transaction holds what it touches"
        self.settled: asyncio.Future[None] | None = None

    @property
    def is_withdrawn(self) -> bool:
        """Whether nobody waits for it any more, or it was answered without being tried."""
        return self.answer.done()

    def is_past_trying(self, earliest_answer: float) -> bool:
        """Whether it is not to be tried any more: nobody waits for it, or the answer would come too late."""
        return self.is_withdrawn or self.deadline <= earliest_answer

    def finish(self, outcome: tuple[ETag | None, ...] | StatecastError) -> None:
        self.is_sent = False
        self.is_finished = True
        if not self.answer.done():
            if isinstance(outcome, StatecastError):
                self.answer.set_exception(outcome)
            else:
                self.answer.set_result(outcome)
        if self.settled is not None and not self.settled.done():
            self.settled.set_result(None)


class Committer:
    """The queue of commits, and the calls that are under way. All methods belong to one event loop.

    A commit that waits for a lock has one of the places, and a slot only for a moment. When all places are taken, those
    that are busy stand aside: they take the places in turn, and all of them are tried again every now and then, so
    that however many keys are held, commits of other keys go on.
    """

    def __init__(self, lanes: Lanes, waker: Waker, statement: str, slices: int, options: CommitterOptions) -> None:
        self._lanes = lanes
        self._waker = waker
        self._statement = statement
        self._slices = slices
        self._limits = options.limits
        self._calls = options.slots
        self._slots = options.slots
        self._places = options.places
        self._queue: CommitQueue[_Waiting] = CommitQueue()
        self._queued: dict[_Waiting, None] = {}
        self._aside: deque[_Waiting] = deque()
        self._singles: deque[_Waiting] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._watch: asyncio.TimerHandle | None = None
        self._look: asyncio.TimerHandle | None = None
        self._look_at = 0
        self._running = 0
        self._is_turn_of_new = False
        self._is_dispatch_due = False
        self._is_open = True

    async def commit(self, commit: Commit) -> tuple[ETag | None, ...]:
        """Apply one commit, together with others if there are any. Raises as `StateStore.transact`."""
        if not self._is_open:
            raise _closed()
        loop = asyncio.get_running_loop()
        prepared = PreparedCommit(commit, self._slices)
        waiting = _Waiting(prepared, loop.time() + self._lanes.timeout_seconds, loop.create_future())
        self._queue.join(waiting)
        self._queued[waiting] = None
        self._dispatch_soon()
        self._keep_watch_later()
        try:
            return await waiting.answer
        except asyncio.CancelledError:
            self._queued.pop(waiting, None)
            if waiting.is_sent:
                waiting.settled = loop.create_future()
                await wait_for_settlement(waiting.settled)
            raise

    def stop(self) -> None:
        """Take no more commits, and refuse those that were not sent."""
        self._is_open = False
        for timer in (self._watch, self._look):
            if timer is not None:
                timer.cancel()
        for line in (self._queued, self._aside, self._singles):
            for waiting in line:
                waiting.finish(_closed())
            line.clear()

    async def join(self) -> None:
        """Wait for what is under way, which the lanes end when they close."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _dispatch_soon(self) -> None:
        if not self._is_dispatch_due and self._is_open:
            self._is_dispatch_due = True
            asyncio.get_running_loop().call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._is_dispatch_due = False
        while self._places and self._aside:
            self._start([self._aside.popleft()], _Permits(self, slots=0, places=1))
        while self._slots and (batch := self._next_batch()):
            places = 1 if len(batch) == 1 and self._places else 0
            self._start(batch, _Permits(self, slots=1, places=places))

    def _next_batch(self) -> list[_Waiting]:
        """Take in turn what is to be tried again, which may be much and in vain, and what is new."""
        self._is_turn_of_new = not self._is_turn_of_new
        if self._is_turn_of_new:
            return self._next_new() or self._next_again()
        return self._next_again() or self._next_new()

    def _next_again(self) -> list[_Waiting]:
        if self._singles:
            return [self._singles.popleft()]
        if self._look_at <= 0:
            return []
        batch = take_batch(self._aside, self._limits)
        self._look_at -= len(batch)
        return batch

    def _next_new(self) -> list[_Waiting]:
        batch = self._queue.next_batch(self._limits.share(len(self._queued) + self._running, self._calls))
        for waiting in batch:
            del self._queued[waiting]
        return batch

    def _start(self, batch: list[_Waiting], permits: "_Permits") -> None:
        running = self._run_one(batch[0], permits) if len(batch) == 1 else self._run_together(batch)
        task = asyncio.get_running_loop().create_task(running, name="postgresql commit")
        self._tasks.add(task)
        self._running += len(batch)
        task.add_done_callback(partial(self._end, batch, permits))

    def _end(self, batch: list[_Waiting], permits: "_Permits", task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._running -= len(batch)
        permits.give_back()
        if task.cancelled() or task.exception() is not None:
            for waiting in batch:
                if not waiting.is_finished:
                    self._finish(waiting, _broken_off(waiting))
        # Also where nothing was given back: those behind may have become free to go.
        self._dispatch_soon()

    async def _run_together(self, batch: list[_Waiting]) -> None:
        """Run a batch without waiting for locks; what is busy runs alone, its keys held all the time."""
        try:
            outcomes = await self._call(batch, wait=False)
        except (Contended, InvalidRequest):
            # The server rolled all of it back for the sake of one: which one, each shows by itself.
            for waiting in batch:
                if not self._is_over(waiting):
                    self._singles.append(waiting)
        except StatecastError as error:
            for waiting in batch:
                self._finish(waiting, type(error)(str(error)))
        else:
            for waiting, outcome in outcomes:
                self._tell(waiting, outcome)

    async def _run_one(self, waiting: _Waiting, permits: "_Permits") -> None:
        """Run one commit, waiting for its locks for a moment if it has a place; what came between it and them may have
        gone at its next try."""
        patience = asyncio.get_running_loop().call_later(_SLOT_SECONDS, permits.free_slot)
        is_large = len(waiting.footprint) > self._limits.members
        try:
            ((_, outcome),) = await self._call([waiting], wait=permits.has_place or is_large)
        except Contended as error:
            waiting.obstacle = str(error)
            outcome = Busy()
        except StatecastError as error:
            outcome = Refused(error)
        finally:
            patience.cancel()
        if not isinstance(outcome, Busy):
            self._tell(waiting, outcome)
        elif not self._is_over(waiting):
            permits.give_back()
            await asyncio.sleep(random.uniform(0.5, 1) * (_LARGE_PAUSE_SECONDS if is_large else _PAUSE_SECONDS))
            self._stand_aside(waiting)

    async def _call(self, batch: Sequence[_Waiting], *, wait: bool) -> list[tuple[_Waiting, Outcome]]:
        """Call the commit function for those of the batch whose callers are still there."""

        async def work(session: Session) -> list[tuple[_Waiting, Outcome]]:
            earliest = self._earliest_answer()
            taken: list[_Waiting] = []
            gone: list[tuple[_Waiting, Outcome]] = []
            for waiting in batch:
                if waiting.is_past_trying(earliest):
                    gone.append((waiting, Refused(_late(waiting))))
                else:
                    taken.append(waiting)
            if not taken:
                return gone
            call = CommitCall([waiting.prepared for waiting in taken])
            arguments = call.arguments(wait=wait)
            for waiting in taken:
                waiting.is_sent = True
            rows = await session.write(self._statement, *arguments)
            self._waker.ring(call.slices)
            return [*zip(taken, call.outcomes(rows[0][0]), strict=True), *gone]

        return await self._lanes.run(work, deadline=max(waiting.deadline for waiting in batch))

    def _tell(self, waiting: _Waiting, outcome: Outcome) -> None:
        match outcome:
            case Applied(etags):
                self._finish(waiting, etags)
            case Refused(error):
                self._finish(waiting, error)
            case Busy():
                self._stand_aside(waiting)

    def _finish(self, waiting: _Waiting, outcome: tuple[ETag | None, ...] | StatecastError) -> None:
        # The next batch is put together only after all callers of this one had the chance to come again.
        self._queue.leave(waiting)
        waiting.finish(outcome)

    def _stand_aside(self, waiting: _Waiting) -> None:
        """Let a busy commit wait for a place, or for the next look whether it is busy still."""
        if self._is_over(waiting):
            return
        self._aside.append(waiting)
        self._keep_watch_later()
        if self._look is None:
            self._look = asyncio.get_running_loop().call_later(_LOOK_SECONDS, self._look_again)

    def _is_over(self, waiting: _Waiting) -> bool:
        """Tell whether a commit that was proven not applied is not to be tried again; it is ended then."""
        waiting.is_sent = False
        if self._is_open and not waiting.is_withdrawn:
            return False
        self._finish(waiting, _closed())
        return True

    def _look_again(self) -> None:
        self._look = None
        self._look_at = len(self._aside)
        self._dispatch_soon()

    def _keep_watch_later(self) -> None:
        if self._watch is None:
            self._watch = asyncio.get_running_loop().call_later(self._lanes.timeout_seconds / 20, self._keep_watch)

    def _keep_watch(self) -> None:
        """Refuse what has not had its turn in time."""
        self._watch = None
        earliest = self._earliest_answer()
        for waiting in [waiting for waiting in self._queued if waiting.is_past_trying(earliest)]:
            del self._queued[waiting]
            waiting.finish(_late(waiting))
        for waiting in [waiting for waiting in self._aside if waiting.is_past_trying(earliest)]:
            self._aside.remove(waiting)
            self._finish(waiting, _late(waiting))
            self._dispatch_soon()
        if self._queued or self._aside:
            self._keep_watch_later()

    def _earliest_answer(self) -> float:
        """Tell by when a call that begins now is over, if the server answers at all."""
        return asyncio.get_running_loop().time() + self._lanes.timeout_seconds * _LAST_SHARE

    def permit(self, *, slots: int, places: int) -> None:
        self._slots += slots
        self._places += places
        if slots > 0 or places > 0:
            self._dispatch_soon()


class _Permits:
    """What a call that is under way takes: a slot, a place or both, each given back once."""

    def __init__(self, committer: Committer, *, slots: int, places: int) -> None:
        self._committer = committer
        self._slots = slots
        self._places = places
        committer.permit(slots=-slots, places=-places)

    @property
    def has_place(self) -> bool:
        return self._places > 0

    def free_slot(self) -> None:
        slots, self._slots = self._slots, 0
        self._committer.permit(slots=slots, places=0)

    def give_back(self) -> None:
        self.free_slot()
        places, self._places = self._places, 0
        self._committer.permit(slots=0, places=places)


def _closed() -> StoreUnavailable:
    return StoreUnavailable("the store is not open")


def _late(waiting: _Waiting) -> StoreUnavailable:
    return StoreUnavailable(f"the time was up before it was its turn: {waiting.obstacle}")


def _broken_off(waiting: _Waiting) -> StatecastError:
    return OutcomeUnknown("the store was closed before the answer came") if waiting.is_sent else _closed()
