"""The claims of a memory store."""

from itertools import count

from statecast.components.state.commit import Guard
from statecast.components.state.memory.lifetime import Lifetime


class MemoryDirectory:
    def __init__(self, lifetime: Lifetime) -> None:
        self._lifetime = lifetime
        self._tokens = count(1)
        self._claims: dict[tuple[str, str], Guard] = {}

    async def claim(self, type: str, id: str) -> Guard:
        self._lifetime.require_open()
        guard = Guard(type, id, token=str(next(self._tokens)))
        self._claims[type, id] = guard
        return guard

    async def release(self, guard: Guard) -> None:
        self._lifetime.require_open()
        if self.holds(guard):
            del self._claims[guard.type, guard.id]

    def holds(self, guard: Guard) -> bool:
        return self._claims.get((guard.type, guard.id)) == guard
