"""Time, passed in: what waits or compares times takes a `Clock`, so that a test can move it."""

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import Protocol


class Clock(Protocol):
    def now(self) -> datetime:
        """Tell the wall time, in UTC."""
        ...

    def monotonic(self) -> float:
        """Tell the seconds since some fixed moment; never goes back."""
        ...

    async def wait(self, event: asyncio.Event, timeout: timedelta) -> bool:
        """Wait until `event` is set or `timeout` has passed; tell whether it is set."""
        ...


class SystemClock:
    def now(self) -> datetime:
        return datetime.now(UTC)

    def monotonic(self) -> float:
        return time.monotonic()

    async def wait(self, event: asyncio.Event, timeout: timedelta) -> bool:
        try:
            async with asyncio.timeout(timeout.total_seconds()):
                await event.wait()
        except TimeoutError:
            pass
        return event.is_set()
