"""Waiting for the outcome of what was sent, however often the one who waits is cancelled."""

import asyncio
from typing import Any, Final

PATIENCE_SECONDS: Final = 2.0
"""How long a cancelled caller waits for the outcome of a commit that was sent."""


async def wait_for_settlement(outcome: "asyncio.Future[Any]") -> None:
    """Wait until `outcome` is done, PATIENCE_SECONDS at most; for callers that were cancelled already.

    A further cancellation does not end the wait: the first one goes on afterwards in any case, and whoever sees it
    may rely on nothing happening any more behind it.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + PATIENCE_SECONDS
    while not outcome.done() and (left := deadline - loop.time()) > 0:
        try:
            await asyncio.wait([outcome], timeout=left)
        except asyncio.CancelledError:
            continue
