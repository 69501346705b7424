"""The owner of every task that runs until closing: it restarts, counts and logs what crashes, and ends them all."""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import timedelta
from types import TracebackType
from typing import Self

from statecast.clock import Clock

logger = logging.getLogger(__name__)

Run = Callable[[asyncio.Event], Awaitable[None]]

_FIRST_PAUSE = timedelta(milliseconds=100)
_LONGEST_PAUSE = timedelta(seconds=10)
_STEADY_SECONDS = 60.0


class Supervisor:
    """Leaving it asks every task to stop, waits `deadline` for them to end by themselves, then cancels the rest."""

    def __init__(self, clock: Clock, *, deadline: timedelta) -> None:
        self.crashes: Counter[str] = Counter()
        self._clock = clock
        self._deadline = deadline
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        if not self._tasks:
            return
        try:
            await asyncio.wait(self._tasks, timeout=self._deadline.total_seconds())
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def start(self, name: str, run: Run) -> None:
        """Run `run(stop)` until it returns; when it raises, run it again after a pause that grows to 10 s."""
        if self._stop.is_set():
            raise RuntimeError(f"{name} cannot start: closing has begun")
        task = asyncio.create_task(self._supervise(name, run), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _supervise(self, name: str, run: Run) -> None:
        pause = _FIRST_PAUSE
        while not self._stop.is_set():
            started = self._clock.monotonic()
            try:
                await run(self._stop)
                return
            except Exception:
                self.crashes[name] += 1
                logger.exception("%s crashed (%d times so far)", name, self.crashes[name])
            if self._clock.monotonic() - started > _STEADY_SECONDS:
                pause = _FIRST_PAUSE
            await self._clock.wait(self._stop, pause)
            pause = min(pause * 2, _LONGEST_PAUSE)
