import asyncio
from datetime import timedelta

import pytest

from statecast.clock import SystemClock
from statecast.runtime.supervisor import Supervisor

SOON = timedelta(seconds=5)


async def test_what_crashes_is_logged_counted_and_run_again(caplog: pytest.LogCaptureFixture) -> None:
    ran_again = asyncio.Event()
    runs = 0

    async def run(stop: asyncio.Event) -> None:
        nonlocal runs
        runs += 1
        if runs < 3:
            raise ValueError(f"crash {runs}")
        ran_again.set()
        await stop.wait()

    async with Supervisor(SystemClock(), deadline=SOON) as supervisor, asyncio.timeout(5):
        supervisor.start("the relay", run)
        await ran_again.wait()

    assert supervisor.crashes == {"the relay": 2}
    assert "the relay crashed (2 times so far)" in caplog.text
    assert "ValueError: crash 2" in caplog.text


async def test_leaving_lets_tasks_end_by_themselves() -> None:
    ended = False

    async def run(stop: asyncio.Event) -> None:
        nonlocal ended
        await stop.wait()
        await asyncio.sleep(0.01)
        ended = True

    async with Supervisor(SystemClock(), deadline=SOON) as supervisor:
        supervisor.start("task", run)
        await asyncio.sleep(0)

    assert ended


async def test_a_task_that_does_not_stop_is_cancelled_at_the_deadline() -> None:
    cancelled = asyncio.Event()

    async def run(stop: asyncio.Event) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async with asyncio.timeout(5):
        async with Supervisor(SystemClock(), deadline=timedelta(milliseconds=20)) as supervisor:
            supervisor.start("task", run)
            await asyncio.sleep(0)

    assert cancelled.is_set()


async def test_nothing_starts_once_closing_has_begun() -> None:
    async with Supervisor(SystemClock(), deadline=SOON) as supervisor:
        pass

    async def run(stop: asyncio.Event) -> None: ...

    with pytest.raises(RuntimeError, match="closing has begun"):
        supervisor.start("late", run)
