"""Claims on actors: one hash per actor with the token of its claim and the number of commits made under it."""

import secrets

from statecast.components.state.commit import Guard
from statecast.components.state.redis.database import Database
from statecast.components.state.redis.keys import KeyNames
from statecast.components.state.redis.scripts import CLAIM, RELEASE_CLAIM


class RedisDirectory:
    def __init__(self, database: Database, names: KeyNames) -> None:
        self._database = database
        self._names = names

    async def claim(self, type: str, id: str) -> Guard:
        """Take the actor over: from now on only commits with this guard are applied for it."""
        token = secrets.token_hex(16)
        await self._database.commit(CLAIM, 1, self._names.claim(type, id), token)
        return Guard(type, id, token)

    async def release(self, guard: Guard) -> None:
        """Give the claim up if it still is this one."""
        await self._database.commit(RELEASE_CLAIM, 1, self._names.claim_of(guard), guard.token)
