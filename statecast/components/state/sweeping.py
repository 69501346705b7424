"""The task of a store that removes, at intervals, what has expired; it is invisible before that."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Final

from statecast.clock import Clock
from statecast.errors import StatecastError

logger = logging.getLogger(__name__)

_PATIENCE_SECONDS: Final = 2.0

Sweep = Callable[[asyncio.Event], Awaitable[None]]


@asynccontextmanager
async def sweeping(sweep: Sweep, interval: timedelta | None, clock: Clock, *, name: str) -> AsyncIterator[None]:
    """Run `sweep(stop)` every `interval`, never if that is None, until the block ends.

    Then `stop` is set; a sweep that is under way has two seconds to end by itself. One that fails is logged, and the
    next one comes in its turn.
    """
    if interval is None:
        yield
        return
    stop = asyncio.Event()
    task = asyncio.create_task(_sweep_until(stop, sweep, interval, clock, name), name=f"sweeper of {name}")
    try:
        yield
    finally:
        stop.set()
        await asyncio.wait({task}, timeout=_PATIENCE_SECONDS)
        task.cancel()
        await asyncio.wait({task})


async def _sweep_until(stop: asyncio.Event, sweep: Sweep, interval: timedelta, clock: Clock, name: str) -> None:
    while not await clock.wait(stop, interval):
        try:
            await sweep(stop)
        except StatecastError as error:
            logger.warning("%s: what has expired is left for the next sweep, in %s: %s", name, interval, error)
        except Exception:
            logger.exception("%s: the sweep of what has expired crashed; the next one is in %s", name, interval)
