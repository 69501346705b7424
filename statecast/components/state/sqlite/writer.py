"""The one writer thread: it commits in one transaction what has queued, and refuses one job without its neighbours."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import timedelta
from itertools import groupby
from queue import SimpleQueue
from typing import Any, Final, TypeVar

import apsw
import msgspec

from statecast.components.settlement import wait_for_settlement
from statecast.components.state.sqlite.errors import ALL_ALIKE, BREAKING, refused
from statecast.errors import OutcomeUnknown, StatecastError, StoreUnavailable

logger = logging.getLogger(__name__)

T = TypeVar("T")

Job = Callable[[apsw.Cursor], T]
"""What is done inside a transaction. Whatever it raises undoes it, and nothing else of its group.

The cursor is that of all jobs: making one takes longer than finding a prepared statement.

A job that checks first and writes then costs nothing more when it refuses. (A savepoint for every job does the same
and costs every job a fifth of its time in SQLite.) Any other failure undoes the group, and its jobs run one by one.
"""

Joint = Callable[[apsw.Cursor, Sequence[Any]], Iterable[T]]
"""Does many jobs at once, as if one after the other, and gives the result of each. It refuses none of them."""

GROUP_SIZE: Final = 512
"""A group takes no more ticks of the loop once it has so many jobs."""

# Who commits without a pause keeps every other process out: SQLite hands its lock to whoever happens to ask.
STRETCH: Final = 0.020
ROOM: Final = 0.001


class _Entry(msgspec.Struct, eq=False):
    """One job with its waiter. What the thread leaves in `value` or `error` the loop reads once it is delivered."""

    job: Job[Any]
    joint: Joint[Any] | None
    future: asyncio.Future[Any]
    announces: bool
    since: float
    is_taken: bool = False
    is_withdrawn: bool = False
    settled: asyncio.Future[None] | None = None
    value: Any = None
    error: Exception | None = None


class Writer:
    """Runs jobs in the order in which they are submitted; all methods are called on the event loop of `start`.

    `connect` is called in the thread, at the first job and after a connection broke. `announce` is called on the
    loop once jobs submitted with `announces` are committed.
    """

    def __init__(
        self, connect: Callable[[], apsw.Connection], location: str, timeout: timedelta, announce: Callable[[], None]
    ) -> None:
        self._connect = connect
        self._location = location
        self._timeout = timeout.total_seconds()
        self._announce = announce
        self._cursor: apsw.Cursor | None = None
        self._queue: SimpleQueue[list[_Entry] | None] = SimpleQueue()
        self._tick: list[_Entry] = []
        self._taking = threading.Lock()
        self._pending: dict[_Entry, None] = {}
        self._watchdog: asyncio.TimerHandle | None = None
        self._is_open = False
        self._is_ending = False
        self._stretch_began = 0.0
        self._freed_at = 0.0
        self._free = 0.0

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._ended = self._loop.create_future()
        # A daemon: a disk that hangs must not keep the process from ending. What is not committed then never was.
        self._thread = threading.Thread(target=self._run, name=f"sqlite writer {self._location}", daemon=True)
        self._is_open = True
        self._thread.start()

    async def close(self) -> None:
        """Refuse new jobs, finish the queued ones and end the thread; give up on it after the timeout."""
        if not self._is_open:
            return
        self._is_open = False
        self._hand_over()
        self._queue.put(None)
        await asyncio.wait([self._ended], timeout=self._timeout)
        if self._ended.done():
            self._thread.join()
        else:
            logger.warning("%s: the writer has not ended within %g s and is left behind", self._location, self._timeout)
        self._answer_all()

    def _finish(self, _: None) -> None:
        # Without `close` only when a bug ended the thread: then every call says so, and nobody waits in vain.
        self._is_open = False
        self._answer_all()
        self._ended.set_result(None)

    async def run(self, job: Job[T], *, joint: Joint[T] | None = None, announces: bool = False) -> T:
        """Run `job` in a transaction and return its result once that is committed.

        Jobs of one group that follow each other and have the same `joint` are done by one call of it.

        Raises what the job raises, StoreUnavailable when it is proven that nothing was written, OutcomeUnknown when
        it is not. Cancelled while it is queued, the job is withdrawn; cancelled in a group, it waits for the outcome,
        2 s at most.
        """
        if not self._is_open:
            raise StoreUnavailable(f"{self._location} is not open")
        loop = self._loop
        entry = _Entry(job, joint, loop.create_future(), announces, loop.time())
        self._pending[entry] = None
        if self._watchdog is None:
            self._watchdog = loop.call_at(entry.since + self._timeout, self._expire)
        if not self._tick:
            loop.call_soon(self._hand_over)
        self._tick.append(entry)
        try:
            return await entry.future  # type: ignore[no-any-return]  # set from this job's own result
        except asyncio.CancelledError:
            if not self._withdraw(entry):
                await self._settlement(entry)
            raise

    def _hand_over(self) -> None:
        """Give the thread what was submitted in this tick, in one go: it and the loop share one interpreter lock."""
        if self._tick:
            self._queue.put(self._tick)
            self._tick = []

    async def _settlement(self, entry: _Entry) -> None:
        if entry in self._pending:
            entry.settled = self._loop.create_future()
            await wait_for_settlement(entry.settled)

    def _withdraw(self, entry: _Entry) -> bool:
        with self._taking:
            if entry.is_taken:
                return False
            entry.is_withdrawn = True
        self._pending.pop(entry, None)
        return True

    def _expire(self) -> None:
        """Answer the jobs that have waited for too long, and look again when the next one will have."""
        self._watchdog = None
        now = self._loop.time()
        for entry in list(self._pending):
            due = entry.since + self._timeout
            if due > now:
                self._watchdog = self._loop.call_at(due, self._expire)
                return
            self._settle(entry, self._overdue(entry))

    def _answer_all(self) -> None:
        if self._watchdog is not None:
            self._watchdog.cancel()
            self._watchdog = None
        for entry in list(self._pending):
            self._settle(entry, self._overdue(entry))

    def _overdue(self, entry: _Entry) -> Exception:
        if self._withdraw(entry):
            return StoreUnavailable(f"{self._location}: the commit did not get its turn in time")
        return OutcomeUnknown(f"{self._location}: the commit was not answered in time")

    def _deliver(self, group: list[_Entry]) -> None:
        is_news = False
        for entry in group:
            self._settle(entry, entry.error)
            is_news = is_news or (entry.announces and entry.error is None)
        if is_news:
            self._announce()

    def _settle(self, entry: _Entry, error: Exception | None) -> None:
        self._pending.pop(entry, None)
        if entry.settled is not None and not entry.settled.done():
            entry.settled.set_result(None)
        if entry.future.done():
            return
        if error is None:
            entry.future.set_result(entry.value)
        else:
            entry.future.set_exception(error)

    # What follows runs in the thread.

    def _run(self) -> None:
        try:
            while not self._is_ending and (first := self._queue.get()) is not None:
                self._leave_room()
                self._tell(self._deliver, self._commit_next(first))
                self._freed_at = time.monotonic()
        finally:
            self._disconnect()
            self._tell(self._finish, None)

    def _tell(self, callback: Callable[[Any], object], value: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, value)
        except RuntimeError:
            # The loop was closed without closing the store: nobody is left to be told.
            self._is_ending = True

    def _leave_room(self) -> None:
        """Give other processes their turn: keep the lock free for a millisecond of every 20, all gaps together."""
        now = time.monotonic()
        self._free += now - self._freed_at
        if now - self._stretch_began < STRETCH:
            return
        if self._free < ROOM:
            time.sleep(ROOM - self._free)
        self._stretch_began = time.monotonic()
        self._free = 0.0

    def _commit_next(self, first: list[_Entry]) -> list[_Entry]:
        # Before the group is taken: who waits for another process to give the lock back can still be withdrawn.
        error = self._begin()
        group = self._take(first)
        if error is None:
            self._commit(group)
        else:
            self._undo(group, error)
        return group

    def _commit_alone(self, entry: _Entry) -> None:
        error = self._begin()
        if error is None:
            self._commit([entry])
        else:
            self._undo([entry], error)

    def _begin(self) -> Exception | None:
        try:
            if self._cursor is None:
                self._cursor = self._connect().cursor()
            self._cursor.execute("BEGIN IMMEDIATE")
        except Exception as error:
            return error
        return None

    def _take(self, first: list[_Entry]) -> list[_Entry]:
        entries = list(first)
        while len(entries) < GROUP_SIZE and not self._queue.empty():
            tick = self._queue.get_nowait()
            self._is_ending = tick is None
            entries += tick or ()
        with self._taking:
            group = [entry for entry in entries if not entry.is_withdrawn]
            for entry in group:
                entry.is_taken = True
        return group

    def _commit(self, group: list[_Entry]) -> None:
        cursor = self._cursor
        assert cursor is not None
        try:
            _apply(cursor, group)
        except Exception as error:
            self._undo(group, error)
            return
        try:
            cursor.execute("COMMIT")
        except (apsw.BusyError, apsw.FullError) as error:
            self._undo(group, error)
        except apsw.Error as error:
            # The commit's last page may stand in the file although its fsync failed, and come back to life when the
            # file is next recovered. (When the file was busy or the disk full, that page was not written.)
            self._disconnect()
            for entry in group:
                entry.error = OutcomeUnknown(f"{self._location}: the commit ended in: {error}")

    def _undo(self, group: list[_Entry], error: Exception) -> None:
        """Roll back; what failed may be one job's own fault, so let each of several try by itself."""
        self._roll_back(error)
        is_shared = len(group) == 1 or isinstance(error, ALL_ALIKE)
        for entry in group:
            entry.error = refused(error, self._location) if is_shared else None
            if not is_shared:
                self._commit_alone(entry)

    def _roll_back(self, error: Exception) -> None:
        if isinstance(error, BREAKING):
            self._disconnect()
        elif self._cursor is not None and self._cursor.connection.in_transaction:
            try:
                self._cursor.execute("ROLLBACK")
            except apsw.Error:
                self._disconnect()

    def _disconnect(self) -> None:
        cursor, self._cursor = self._cursor, None
        if cursor is not None:
            # Closing writes the log back into the database, which a disk that fails will not let it do.
            with suppress(apsw.Error):
                cursor.connection.close(True)


def _apply(cursor: apsw.Cursor, group: list[_Entry]) -> None:
    for joint, entries in groupby(group, _joint_of):
        if joint is None:
            _apply_each(cursor, entries)
        else:
            together = list(entries)
            for entry, value in zip(together, joint(cursor, [entry.job for entry in together]), strict=True):
                entry.value = value


def _joint_of(entry: _Entry) -> Joint[Any] | None:
    return entry.joint


def _apply_each(cursor: apsw.Cursor, entries: Iterable[_Entry]) -> None:
    total_changes = cursor.connection.total_changes
    for entry in entries:
        changes = total_changes()
        try:
            entry.value = entry.job(cursor)
        except StatecastError as refusal:
            if total_changes() != changes:
                raise
            # It refused before its first write, as commits do: nothing of it is there to be undone.
            entry.error = refusal
