"""Waking readers of the log: at once in this process, by NOTIFY in others, and by looking again in any case."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection
from datetime import timedelta

import asyncpg

from statecast.clock import Clock

logger = logging.getLogger(__name__)

LISTENING_POLL = timedelta(milliseconds=250)
DEAF_POLL = timedelta(milliseconds=20)
_QUIET = timedelta(milliseconds=5)
_QUIET_FACTOR = 10
_LONGEST_QUIET = timedelta(milliseconds=20)
_BACK_OFF = timedelta(seconds=1)


class Waker:
    """Passes the word that slices of the log have something new.

    The word is a hint: it may be lost, and a wait ends without it after LISTENING_POLL, or after DEAF_POLL while
    there is no connection to hear it on. It is sent outside of the commits, at most every 5 ms, since a NOTIFY takes
    a lock that the commits of all of a server's databases would queue for; and less often, the longer a busy server
    takes for it, down to every 20 ms.

    Without `connect`, where a pooler lets nobody listen, there is never such a connection.
    """

    def __init__(self, connect: Callable[[], Awaitable[asyncpg.Connection]] | None, channel: str, clock: Clock) -> None:
        self._connect = connect
        self._channel = channel
        self._clock = clock
        self._held: set[int] = set()
        self._rung: set[int] = set()
        self._untold: set[int] = set()
        self._waiters: dict[asyncio.Event, frozenset[int]] = {}
        self._is_listening = False
        self._something = asyncio.Event()
        self._closing = False
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        if self._connect is not None:
            self._task = asyncio.create_task(self._keep_in_touch(self._connect), name="postgresql outbox wake-up")

    async def close(self) -> None:
        self._closing = True
        self._something.set()
        for event in self._waiters:
            event.set()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    def hold(self, slices: Collection[int]) -> None:
        """These slices are read in this process: nobody else needs to be told of what it commits to them."""
        self._held.update(slices)

    def let_go(self, slices: Collection[int]) -> None:
        self._held.difference_update(slices)

    def ring(self, slices: Collection[int]) -> None:
        """Say that this process has committed records to these slices."""
        self._wake(slices)
        untold = set(slices) - self._held
        if untold:
            self._untold |= untold
            self._something.set()

    async def wait(self, slices: Collection[int], timeout: timedelta) -> None:
        """Return at the word of one of these slices, also one that came since the last wait, or to look again."""
        self._something.set()
        wanted = frozenset(slices)
        if self._rung & wanted or self._closing:
            self._rung -= wanted
            return
        event = asyncio.Event()
        self._waiters[event] = wanted
        try:
            await self._clock.wait(event, min(timeout, LISTENING_POLL if self._is_listening else DEAF_POLL))
        finally:
            del self._waiters[event]
            self._rung -= wanted

    def _wake(self, slices: Collection[int]) -> None:
        self._rung.update(slices)
        for event, wanted in self._waiters.items():
            if not wanted.isdisjoint(slices):
                event.set()

    async def _keep_in_touch(self, connect: Callable[[], Awaitable[asyncpg.Connection]]) -> None:
        """Keep a connection for the word, from the first time that there is someone to tell or to hear."""
        while True:
            await self._something.wait()
            try:
                await self._talk(await connect())
            except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
                logger.warning("no wake-ups from other processes for the moment: %s", error)
            await self._clock.wait(asyncio.Event(), _BACK_OFF)

    async def _talk(self, connection: asyncpg.Connection) -> None:
        try:
            lost = asyncio.Event()

            def give_up(_: object) -> None:
                lost.set()
                self._something.set()

            connection.add_termination_listener(give_up)
            # A hint is not worth a flush of the log.
            await connection.execute("set synchronous_commit = off")
            await connection.add_listener(self._channel, self._hear)
            self._is_listening = True
            while not lost.is_set():
                await self._tell(connection)
                self._something.clear()
                if not self._untold and not lost.is_set():
                    await self._something.wait()
        finally:
            self._is_listening = False
            connection.terminate()

    async def _tell(self, connection: asyncpg.Connection) -> None:
        if not self._untold:
            return
        slices, self._untold = self._untold, set()
        began = self._clock.monotonic()
        await connection.execute("select pg_notify($1, $2)", self._channel, ",".join(map(str, sorted(slices))))
        took = timedelta(seconds=self._clock.monotonic() - began)
        await self._clock.wait(asyncio.Event(), min(max(_QUIET, _QUIET_FACTOR * took), _LONGEST_QUIET))

    def _hear(self, connection: object, pid: int, channel: str, payload: object) -> None:
        self._wake([int(slice) for slice in str(payload).split(",") if slice.isdecimal()])
