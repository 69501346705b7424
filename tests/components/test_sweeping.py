"""The task that sweeps: what fails does not end it, and closing does not wait for ever."""

import asyncio
import logging
from datetime import timedelta

import pytest

from statecast.clock import SystemClock
from statecast.components.state.sweeping import sweeping
from statecast.errors import OutcomeUnknown

SOON = timedelta(milliseconds=1)


@pytest.mark.parametrize("failure", [OutcomeUnknown("no answer came"), KeyError("a bug")])
async def test_a_sweep_that_fails_is_told_of_and_followed_by_the_next(
    failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    has_succeeded = asyncio.Event()
    failures = [failure]

    async def sweep(stop: asyncio.Event) -> None:
        if failures:
            raise failures.pop()
        has_succeeded.set()

    with caplog.at_level(logging.WARNING):
        async with sweeping(sweep, SOON, SystemClock(), name="orders"):
            await has_succeeded.wait()

    assert [record.message.partition(":")[0] for record in caplog.records] == ["orders"]


async def test_closing_lets_a_sweep_end_that_listens() -> None:
    began, ended = asyncio.Event(), asyncio.Event()

    async def sweep(stop: asyncio.Event) -> None:
        began.set()
        await stop.wait()
        ended.set()

    async with sweeping(sweep, SOON, SystemClock(), name="orders"):
        await began.wait()

    assert ended.is_set()


async def test_closing_breaks_off_a_sweep_that_does_not_end() -> None:
    began, was_cancelled = asyncio.Event(), asyncio.Event()

    async def sweep(stop: asyncio.Event) -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            was_cancelled.set()

    async with sweeping(sweep, SOON, SystemClock(), name="orders"):
        await began.wait()

    assert was_cancelled.is_set()


async def test_without_an_interval_nothing_is_swept() -> None:
    async def sweep(stop: asyncio.Event) -> None:
        raise AssertionError("nobody asked for it")

    tasks = asyncio.all_tasks()
    async with sweeping(sweep, None, SystemClock(), name="orders"):
        assert asyncio.all_tasks() == tasks
