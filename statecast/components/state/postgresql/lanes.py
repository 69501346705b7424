"""Connections, each in the hands of one task, that work through what callers submit.

A caller only waits for an answer, so its cancellation never reaches the driver: no statement is broken off halfway,
no connection is left in an unknown state, and none can leak with a caller that has gone.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any, Generic, TypeVar

import asyncpg

from statecast.components.settlement import wait_for_settlement
from statecast.components.state.postgresql.failures import is_clean, translate
from statecast.errors import OutcomeUnknown, StatecastError, StoreUnavailable

T = TypeVar("T")

_CLOSING_SECONDS = 5.0

SERVER_LIFE = (
    "concat_ws(' ', extract(epoch from pg_postmaster_start_time()),"
    " (select extract(epoch from stats_reset) from pg_stat_bgwriter))"
)
"""Differs between two lives of a server: it was started anew, or it lost its memory, its statistics too, in a crash."""


class Withdrawn(Exception):
    """The caller has gone before anything of its write was sent."""


class Session:
    """One connection with its prepared statements; with none if the next statement may find another server's."""

    def __init__(self, connection: asyncpg.Connection, *, prepares: bool = True) -> None:
        self.connection = connection
        self._prepares = prepares
        self._statements: dict[str, Any] = {}
        self._life: str | None = None
        self._job: _Job[Any] | None = None

    async def read(self, query: str, *arguments: object) -> list[Any]:
        if not self._prepares:
            return await self.connection.fetch(query, *arguments)
        statement = self._statements.get(query) or await self._prepare(query)
        return await statement.fetch(*arguments)  # type: ignore[no-any-return]

    async def write(self, query: str, *arguments: object) -> list[Any]:
        """Like `read`, for a statement that changes something: from the moment it is sent its outcome counts."""
        statement = None
        if self._prepares:
            statement = self._statements.get(query) or await self._prepare(query)
        if self._job is not None:
            self._job.mark_sent()
        if statement is None:
            return await self.connection.fetch(query, *arguments)
        return await statement.fetch(*arguments)  # type: ignore[no-any-return]

    @asynccontextmanager
    async def in_one_life(self) -> AsyncIterator[str]:
        """Keep to one life of the server's, and tell which: what its transactions were numbered holds in it alone.

        A connection ends with the life that it is of, where it leads to the server itself.
        """
        if self._prepares:
            yield await self._server_life()
            return
        async with self.connection.transaction():
            self._life = None
            yield await self._server_life()

    async def _server_life(self) -> str:
        if self._life is None:
            (row,) = await self.read(f"select {SERVER_LIFE} as life")
            self._life = str(row["life"])
        return self._life

    def serve(self, job: "_Job[Any] | None") -> None:
        self._job = job

    @property
    def is_usable(self) -> bool:
        return not self.connection.is_closed() and not self.connection.is_in_transaction()

    async def _prepare(self, query: str) -> Any:
        statement = await self.connection.prepare(query)
        self._statements[query] = statement
        return statement


Work = Callable[[Session], Awaitable[T]]


class _Job(Generic[T]):
    """One piece of work with the answer that its caller waits for."""

    __slots__ = ("answer", "deadline", "is_sent", "settled", "work")

    def __init__(self, work: Work[T], deadline: float) -> None:
        loop = asyncio.get_running_loop()
        self.work = work
        self.deadline = deadline
        self.answer: asyncio.Future[T] = loop.create_future()
        self.settled: asyncio.Future[None] | None = None
        self.is_sent = False

    def mark_sent(self) -> None:
        if self.answer.cancelled():
            raise Withdrawn
        self.is_sent = True

    def succeed(self, result: T) -> None:
        if not self.answer.done():
            self.answer.set_result(result)
        self._settle()

    def fail(self, error: StatecastError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)
        self._settle()

    def _settle(self) -> None:
        if self.settled is not None and not self.settled.done():
            self.settled.set_result(None)


class Lanes:
    """Up to `limit` connections, opened when they are needed, and again after they broke."""

    def __init__(
        self,
        connect: Callable[[float], Awaitable[asyncpg.Connection]],
        *,
        limit: int,
        timeout: timedelta,
        prepares: bool = True,
    ) -> None:
        self._connect = connect
        self._limit = limit
        self._timeout = timeout.total_seconds()
        self._prepares = prepares
        self._queue: deque[_Job[Any]] = deque()
        self._idle: list[asyncio.Future[_Job[Any] | None]] = []
        self._lanes: set[asyncio.Task[None]] = set()
        self._busy: dict[Session, float] = {}
        self._watch: asyncio.TimerHandle | None = None
        self._is_open = False

    @property
    def timeout_seconds(self) -> float:
        return self._timeout

    def open(self) -> None:
        self._is_open = True
        self._keep_watch()

    async def close(self) -> None:
        """Take no more work, fail what is queued, let what is under way end for a while, and break off the rest."""
        self._is_open = False
        while self._queue:
            self._queue.popleft().fail(_closed())
        while self._idle:
            _hand_over(self._idle.pop(), None)
        await self._ended(_CLOSING_SECONDS)
        for session in list(self._busy):
            session.connection.terminate()
        await self._ended(1)
        for lane in list(self._lanes):
            lane.cancel()
        await asyncio.gather(*self._lanes, return_exceptions=True)
        if self._watch is not None:
            self._watch.cancel()

    async def run(self, work: Work[T], *, deadline: float | None = None) -> T:
        """Have `work` done on one of the connections, by `deadline` of the loop's time or in the usual time.

        Raises StoreUnavailable, OutcomeUnknown (only where `work` writes) and what `work` raises of our own errors.
        Cancelled before a write was sent, the work is withdrawn; afterwards its outcome is waited for, 2 s at most.
        """
        if not self._is_open:
            raise _closed()
        job = _Job(work, deadline or asyncio.get_running_loop().time() + self._timeout)
        self._submit(job)
        try:
            return await job.answer
        except asyncio.CancelledError:
            if job.is_sent:
                job.settled = asyncio.get_running_loop().create_future()
                await wait_for_settlement(job.settled)
            raise

    def _submit(self, job: _Job[Any]) -> None:
        while self._idle:
            # The one that was busy last: its connection and its plans are warm.
            if _hand_over(self._idle.pop(), job):
                return
        self._queue.append(job)
        if len(self._lanes) < self._limit:
            lane = asyncio.get_running_loop().create_task(self._serve(), name="postgresql lane")
            self._lanes.add(lane)
            lane.add_done_callback(self._lanes.discard)

    async def _serve(self) -> None:
        session: Session | None = None
        try:
            while (job := await self._next_job()) is not None:
                session = await self._perform(job, session)
        finally:
            if session is not None:
                await _goodbye(session.connection)

    async def _next_job(self) -> _Job[Any] | None:
        while self._queue:
            job = self._queue.popleft()
            if not job.answer.done():
                return job
        if not self._is_open:
            return None
        waiting: asyncio.Future[_Job[Any] | None] = asyncio.get_running_loop().create_future()
        self._idle.append(waiting)
        return await waiting

    async def _perform(self, job: _Job[Any], session: Session | None) -> Session | None:
        """Do one job on `session`, or on a new connection where that is no good; return the one for the next job."""
        if job.answer.done():
            return session
        try:
            if session is None or not session.is_usable:
                session = await self._open_session(job)
            self._busy[session] = job.deadline
            session.serve(job)
            job.succeed(await job.work(session))
        except Withdrawn:
            pass
        except Exception as error:
            job.fail(translate(error, is_sent=job.is_sent))
            if session is not None and not is_clean(error):
                session.connection.terminate()
        except asyncio.CancelledError:
            job.fail(OutcomeUnknown("the store was closed before the answer came") if job.is_sent else _closed())
            raise
        finally:
            if session is not None:
                session.serve(None)
                self._busy.pop(session, None)
        return session

    async def _open_session(self, job: _Job[Any]) -> Session:
        remaining = job.deadline - asyncio.get_running_loop().time()
        if remaining <= 0:
            raise StoreUnavailable("the time was up before a connection was free")
        return Session(await self._connect(remaining), prepares=self._prepares)

    def _keep_watch(self) -> None:
        """Break off what has taken too long: the answer, if one comes, comes too late for its caller."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        for session, deadline in list(self._busy.items()):
            if deadline <= now:
                session.connection.terminate()
        for job in [job for job in self._queue if job.deadline <= now]:
            self._queue.remove(job)
            job.fail(StoreUnavailable("the time was up before a connection was free"))
        self._watch = loop.call_later(self._timeout / 20, self._keep_watch)

    async def _ended(self, seconds: float) -> None:
        if self._lanes:
            await asyncio.wait(self._lanes, timeout=seconds)


def _hand_over(waiting: "asyncio.Future[_Job[Any] | None]", job: _Job[Any] | None) -> bool:
    if waiting.done():
        return False
    waiting.set_result(job)
    return True


async def _goodbye(connection: asyncpg.Connection) -> None:
    try:
        await connection.close(timeout=1)
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
        connection.terminate()


def _closed() -> StoreUnavailable:
    return StoreUnavailable("the store is not open")
