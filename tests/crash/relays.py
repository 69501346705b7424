"""Three relay processes on one outbox, of which some freeze past their leases and some die."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Self

from tests.crash.arena import APP
from tests.crash.children import Child, Children

SCRIPT = Path(__file__).with_name("relay_process.py")

RELAYS = 3
LEASE_SECONDS = 1.0
PUBLISH_SECONDS = 0.4
# Small batches leave positions in the midst of what a snapshot shows, large ones make long publishes to freeze in.
BATCHES = (20, 100, 1000)


class Provocation(Enum):
    KILL = "kill"
    FREEZE = "freeze"
    FREEZE_ALL = "freeze all"


@dataclass(slots=True)
class Fury:
    freezes: int = 0
    kills: int = 0


class Relays:
    def __init__(self, folder: Path, logs: Path) -> None:
        self.fury = Fury()
        self._folder = folder
        self._children = Children(logs)
        self._working: list[Child] = []

    async def __aenter__(self) -> Self:
        await self._children.__aenter__()
        try:
            self._working = [await self._start(batch) for batch in BATCHES]
            await asyncio.gather(*(child.is_ready() for child in self._working))
        except BaseException:
            await self._children.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._children.__aexit__(kind, error, traceback)

    async def leave(self) -> None:
        """Let every relay end by itself, and hold it to having done so well."""
        codes = await asyncio.gather(*(child.leave() for child in self._working))
        logs = self._children.logs()
        assert codes == [0] * RELAYS, logs
        assert "Traceback" not in logs, logs

    async def provoke(self, random: Random, rounds: int) -> None:
        """Disturb the relays in so many rounds: of three, one kills, one freezes, and one freezes all.

        When all are thawed there is much to publish at once; in the midst of that one freezes again and one is killed.
        """
        async with asyncio.TaskGroup() as freezes:
            for provocation in _shuffled(random, rounds):
                await asyncio.sleep(random.uniform(0.1, 0.5))
                place = random.randrange(RELAYS)
                match provocation:
                    case Provocation.FREEZE:
                        freezes.create_task(self._freeze(self._working[place], _past_the_lease(random)))
                    case Provocation.KILL:
                        await self._replace(place, random.choice(BATCHES))
                    case Provocation.FREEZE_ALL:
                        seconds = _past_the_lease(random)
                        await asyncio.gather(*(self._freeze(child, seconds) for child in self._working))
                        await asyncio.sleep(random.uniform(0, 0.1))
                        freezes.create_task(self._freeze(self._working[place - 1], _past_the_lease(random)))
                        await self._replace(place, random.choice(BATCHES))

    async def _freeze(self, child: Child, seconds: float) -> None:
        self.fury.freezes += 1
        child.freeze()
        await asyncio.sleep(seconds)
        child.thaw()

    async def _replace(self, place: int, batch: int) -> None:
        self.fury.kills += 1
        await self._working[place].kill()
        self._working[place] = await self._start(batch)
        await self._working[place].is_ready()

    async def _start(self, batch: int) -> Child:
        arguments: Sequence[object] = (self._folder, APP, LEASE_SECONDS, PUBLISH_SECONDS, batch)
        return await self._children.start(SCRIPT, *map(str, arguments))


def _shuffled(random: Random, rounds: int) -> list[Provocation]:
    provocations = [list(Provocation)[number % len(Provocation)] for number in range(rounds)]
    random.shuffle(provocations)
    return provocations


def _past_the_lease(random: Random) -> float:
    return random.uniform(1.1, 1.7) * LEASE_SECONDS
