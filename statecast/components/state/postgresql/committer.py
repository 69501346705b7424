"""Commits that wait together go together: several in one call of the commit function, which costs little more than one.

A batch never waits for a lock: what is busy in it runs alone afterwards, waiting, and its neighbours are done. Each
commit has its own outcome. Commits with a key, mark or claim in common never run at the same time, and keep the order
in which they were submitted.
"""

import asyncio
import random
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final

from statecast.components.settlement import wait_for_settlement
from statecast.components.state.commit import Commit, ETag, collapse
from statecast.components.state.postgresql.call import Applied, Busy, CommitCall, Outcome, Refused
from statecast.components.state.postgresql.failures import Contended
from statecast.components.state.postgresql.footprint import Limits, footprint, next_batch, weight
from statecast.components.state.postgresql.lanes import Lanes, Session
from statecast.components.state.postgresql.wake import Waker
from statecast.errors import InvalidRequest, OutcomeUnknown, StatecastError, StoreUnavailable

_TRIES: Final = 10
_LONGEST_PAUSE_SECONDS: Final = 0.2
_SLOT_SECONDS: Final = 0.05


@dataclass(frozen=True, slots=True)
class CommitterOptions:
    """`at_once` batches are under way at a time, those aside that wait for a lock; with these never more than
    `most_running`, so that some connections are left for reads."""

    limits: Limits
    at_once: int
    most_running: int

    @classmethod
    def choose(cls, *, connections: int, groups: bool) -> "CommitterOptions":
        """Choose for so many connections; without `groups` every commit goes by itself."""
        most_running = max(1, connections - 2)
        if not groups:
            return cls(Limits(commits=1, weight=0, scanned=1_000), most_running, most_running)
        return cls(Limits(commits=64, weight=1_000_000, scanned=1_000), min(2, most_running), most_running)


class _Waiting:
    """One commit with its caller; compared by identity."""

    __slots__ = ("answer", "commit", "footprint", "is_finished", "is_taken", "settled", "weight")

    def __init__(self, commit: Commit) -> None:
        self.commit = commit
        self.footprint = footprint(commit)
        self.weight = weight(commit)
        self.answer: asyncio.Future[tuple[ETag | None, ...]] = asyncio.get_running_loop().create_future()
        self.is_taken = False
        self.is_finished = False
        self.settled: asyncio.Future[None] | None = None

    def finish(self, outcome: tuple[ETag | None, ...] | StatecastError) -> None:
        self.is_finished = True
        if not self.answer.done():
            if isinstance(outcome, StatecastError):
                self.answer.set_exception(outcome)
            else:
                self.answer.set_result(outcome)
        if self.settled is not None and not self.settled.done():
            self.settled.set_result(None)


class Committer:
    """The queue of commits, and the batches that are under way. All methods belong to one event loop."""

    def __init__(self, lanes: Lanes, waker: Waker, statement: str, slices: int, options: CommitterOptions) -> None:
        self._lanes = lanes
        self._waker = waker
        self._statement = statement
        self._slices = slices
        self._limits = options.limits
        self._slots = options.at_once
        self._most_running = options.most_running
        self._queue: dict[_Waiting, None] = {}
        self._held: set[Any] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_dispatch_due = False
        self._is_open = True

    async def commit(self, commit: Commit) -> tuple[ETag | None, ...]:
        """Apply one commit, together with others if there are any. Raises as `StateStore.transact`."""
        if not self._is_open:
            raise _closed()
        if len({operation.key for operation in commit.operations}) < len(commit.operations):
            collapse(commit.operations)  # raises for one that contradicts itself, before it has neighbours
        waiting = _Waiting(commit)
        self._queue[waiting] = None
        self._dispatch_soon()
        try:
            return await waiting.answer
        except asyncio.CancelledError:
            self._queue.pop(waiting, None)
            if waiting.is_taken and not waiting.is_finished:
                waiting.settled = asyncio.get_running_loop().create_future()
                await wait_for_settlement(waiting.settled)
            raise

    def stop(self) -> None:
        """Take no more commits, and refuse those that are queued."""
        self._is_open = False
        while self._queue:
            self._queue.popitem()[0].finish(_closed())

    async def join(self) -> None:
        """Wait for what is under way, which the lanes end when they close."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _dispatch_soon(self) -> None:
        if not self._is_dispatch_due:
            self._is_dispatch_due = True
            asyncio.get_running_loop().call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._is_dispatch_due = False
        while self._slots and len(self._tasks) < self._most_running:
            batch = next_batch(self._queue, self._held, self._limits)
            if not batch:
                return
            for waiting in batch:
                del self._queue[waiting]
                self._held |= waiting.footprint
            self._start(self._run_in_slot(batch))

    def _start(self, running: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(running, name="postgresql commit")
        self._tasks.add(task)
        task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._dispatch_soon()

    async def _run_in_slot(self, batch: list[_Waiting]) -> None:
        """Run a batch. One that waits for a lock, which only a lone commit does, gives its slot to others."""
        slot = _Slot(self)
        patience = asyncio.get_running_loop().call_later(_SLOT_SECONDS, slot.free)
        try:
            if len(batch) == 1:
                await self._run_alone(batch[0])
            else:
                await self._run_together(batch)
        finally:
            patience.cancel()
            slot.free()

    async def _run_together(self, batch: list[_Waiting]) -> None:
        """Run a batch without waiting for locks; what is busy runs alone, its keys held all the time."""
        try:
            outcomes = await self._call(batch, wait=False)
        except (Contended, InvalidRequest):
            # The server rolled all of it back for the sake of one: which one, each shows by itself.
            alone = batch
        except StatecastError as error:
            for waiting in batch:
                self._finish(waiting, type(error)(str(error)))
            return
        except BaseException:
            for waiting in batch:
                self._finish(waiting, _broken_off(waiting))
            raise
        else:
            alone = [waiting for waiting, outcome in outcomes if isinstance(outcome, Busy)]
            for waiting, outcome in outcomes:
                self._tell(waiting, outcome)
        for waiting in alone:
            self._start(self._run_alone(waiting))

    async def _run_alone(self, waiting: _Waiting) -> None:
        """Run one commit, which waits for its locks, and again where the server undid it for others' sake."""
        try:
            for attempt in range(1, _TRIES + 1):
                try:
                    ((_, outcome),) = await self._call([waiting], wait=True)
                    self._tell(waiting, outcome)
                    return
                except Contended:
                    if attempt == _TRIES:
                        raise
                    await asyncio.sleep(random.uniform(0, min(_LONGEST_PAUSE_SECONDS, 0.002 * 2**attempt)))
        except StatecastError as error:
            self._finish(waiting, error)
        except BaseException:
            self._finish(waiting, _broken_off(waiting))
            raise

    async def _call(self, batch: Sequence[_Waiting], *, wait: bool) -> list[tuple[_Waiting, Outcome]]:
        """Call the commit function for those of the batch whose callers are still there."""

        async def work(session: Session) -> list[tuple[_Waiting, Outcome]]:
            taken = [waiting for waiting in batch if not waiting.answer.cancelled()]
            gone: list[tuple[_Waiting, Outcome]] = [
                (waiting, Refused(_closed())) for waiting in batch if waiting.answer.cancelled()
            ]
            if not taken:
                return gone
            call = CommitCall([waiting.commit for waiting in taken], self._slices)
            arguments = call.arguments(wait=wait)
            for waiting in taken:
                waiting.is_taken = True
            rows = await session.write(self._statement, *arguments)
            self._waker.ring(call.slices)
            return [*zip(taken, call.outcomes(rows[0][0]), strict=True), *gone]

        return await self._lanes.run(work)

    def _tell(self, waiting: _Waiting, outcome: Outcome) -> None:
        match outcome:
            case Applied(etags):
                self._finish(waiting, etags)
            case Refused(error):
                self._finish(waiting, error)
            case Busy():
                pass

    def _finish(self, waiting: _Waiting, outcome: tuple[ETag | None, ...] | StatecastError) -> None:
        # The next batch is put together only after all callers of this one had the chance to come again.
        self._held -= waiting.footprint
        waiting.finish(outcome)

    def free_slot(self) -> None:
        self._slots += 1
        self._dispatch_soon()


class _Slot:
    """One of the places for batches under way, taken when it is made and given back once."""

    def __init__(self, committer: Committer) -> None:
        self._committer: Committer | None = committer
        committer._slots -= 1

    def free(self) -> None:
        committer, self._committer = self._committer, None
        if committer is not None:
            committer.free_slot()


def _closed() -> StoreUnavailable:
    return StoreUnavailable("the store is not open")


def _broken_off(waiting: _Waiting) -> StatecastError:
    return OutcomeUnknown("the store was closed before the answer came") if waiting.is_taken else _closed()
