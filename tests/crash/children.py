"""Processes that a test starts, freezes, thaws and kills; none of them outlives its block."""

import asyncio
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

_LONGEST_START_SECONDS = 30
_LONGEST_END_SECONDS = 30


class Child:
    """A Python script in a process of its own. It says `ready` on its standard output, and ends by itself when its
    standard input closes: should the test die without a word, so does the child."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process = process
        self._log = log
        self.was_killed = False

    @classmethod
    async def start(
        cls, script: Path, *arguments: str, log: Path, environment: Mapping[str, str] | None = None
    ) -> Self:
        """Start the script, with more variables in its environment; its standard error is appended to `log`."""
        with log.open("ab") as errors:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, str(script), *arguments),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                env={**os.environ, **(environment or {})},
                # A group of its own, but of this session: the kernel wakes a frozen child whose parent has died.
                process_group=0,
            )
        return cls(process, log)

    async def is_ready(self) -> None:
        """Return when the script is at work. Raises AssertionError if it ended instead."""
        assert self._process.stdout is not None
        async with asyncio.timeout(_LONGEST_START_SECONDS):
            line = await self._process.stdout.readline()
        assert line == b"ready\n", f"the child said {line!r}; its log:\n{self._log.read_text()}"

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    async def kill(self) -> None:
        self.was_killed = True
        self._signal(signal.SIGKILL)
        await self._process.wait()

    async def ended(self) -> int:
        """Wait until the script ends by itself, and return its exit code."""
        async with asyncio.timeout(_LONGEST_END_SECONDS):
            return await self._process.wait()

    async def leave(self) -> int:
        """Ask the script to end, and return its exit code."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return await self.ended()

    @property
    def is_running(self) -> bool:
        return self._process.returncode is None

    def _signal(self, number: signal.Signals) -> None:
        if self.is_running:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)


class Children:
    """Starts children, and has killed all that are left when its block ends, however it ends."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._all: list[Child] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for child in self._all:
            child._signal(signal.SIGKILL)
        for child in self._all:
            await asyncio.shield(child._process.wait())

    async def start(self, script: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> Child:
        log = self._logs / f"child-{len(self._all) + 1}.log"
        child = await Child.start(script, *arguments, log=log, environment=environment)
        self._all.append(child)
        return child

    def logs(self) -> str:
        """Give all that the children have written to their standard error."""
        return "\n".join(path.read_text() for path in sorted(self._logs.glob("child-*.log")))
