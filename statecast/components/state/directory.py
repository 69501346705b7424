"""The seam of the actor directory: who may commit for an actor."""

from typing import Protocol

from statecast.components.state.commit import Guard


class Directory(Protocol):
    """Claims on actors of one app, in the same database as their state."""

    async def claim(self, type: str, id: str) -> Guard:
        """Take the actor over: from now on only commits with this guard are applied for it.

        The token is new at every claim, also for the same owner, so what an earlier claim guards is fenced. State
        that is read after this call has returned is what no fenced commit can change any more.
        Raises StoreUnavailable, OutcomeUnknown (then claim again).
        """
        ...

    async def release(self, guard: Guard) -> None:
        """Give the claim up if it still is this one; commits guarded by it are fenced from now on."""
        ...
