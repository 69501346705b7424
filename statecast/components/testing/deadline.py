"""Waiting for a fact with a deadline, in the place of a sleep."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta

PATIENCE = timedelta(seconds=20)
"""How long a suite waits for what a backend owes it: a limit for broken ones, not a measure of good ones."""


async def until(fact: Callable[[], Awaitable[bool]]) -> None:
    """Return as soon as `fact` holds; raises TimeoutError when it does not come true in time."""
    async with asyncio.timeout(PATIENCE.total_seconds()):
        while not await fact():  # noqa: ASYNC110 - a store has no event to wait for
            await asyncio.sleep(0.01)
