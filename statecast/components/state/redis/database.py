"""The server as the parts of the store use it, and the one place where its failures become this package's errors."""

import asyncio
from typing import Final

from statecast.components.redis.connection import Argument, ErrorReply, NotSent, Reply, Unanswered
from statecast.components.redis.pipeline import Pipeline, Script
from statecast.errors import OutcomeUnknown, StoreUnavailable

_REPLICATION_PATIENCE_MILLISECONDS: Final = 1000  # as dapr components-contrib state/redis/redis.go


class Database:
    """Runs scripts on the connection that all share; what must wait for replicas goes to a connection of its own."""

    def __init__(self, shared: Pipeline, replicated: Pipeline) -> None:
        self._shared = shared
        self._replicated = replicated
        self.replicas = 0
        """How many replicas a strong commit waits for."""

    async def ask(self, script: Script, *arguments: Argument) -> Reply:
        """Run a script whose outcome needs no certainty. Raises StoreUnavailable."""
        try:
            return await self._shared.run(script, *arguments)
        except (NotSent, Unanswered, ErrorReply) as error:
            raise StoreUnavailable(str(error)) from error

    async def command(self, *arguments: Argument) -> Reply:
        """Send a command whose outcome needs no certainty. Raises StoreUnavailable."""
        try:
            return await self._shared.command(*arguments)
        except (NotSent, Unanswered, ErrorReply) as error:
            raise StoreUnavailable(str(error)) from error

    async def commit(self, script: Script, *arguments: Argument) -> Reply:
        """Run a script that writes. Raises StoreUnavailable (it wrote nothing), OutcomeUnknown."""
        try:
            return await self._shared.run(script, *arguments)
        except (NotSent, Unanswered, ErrorReply) as error:
            raise _outcome(error) from error

    async def commit_replicated(self, script: Script, *arguments: Argument) -> Reply:
        """Run a script that writes, and wait until the replicas have it. Raises as `commit`; and OutcomeUnknown when
        not all of them have it in time: it is written, and lost if the server is lost before they have it.
        """
        # WAIT speaks of what its own connection wrote, so both must leave in one write: after a reconnect it would
        # have nothing to wait for. The source goes along, since a digest that is not known would let WAIT run first.
        reply, copies = await asyncio.gather(
            self._replicated.command("EVAL", script.source, *arguments),
            self._replicated.command("WAIT", self.replicas, _REPLICATION_PATIENCE_MILLISECONDS),
            return_exceptions=True,
        )
        if isinstance(reply, NotSent | Unanswered | ErrorReply):
            raise _outcome(reply) from reply
        if isinstance(reply, BaseException):
            raise reply
        if reply[0] != b"ok":
            return reply
        if isinstance(copies, BaseException):
            raise OutcomeUnknown(f"it is not known whether the replicas have the commit: {copies}") from copies
        if copies < self.replicas:
            raise OutcomeUnknown(f"{copies} of {self.replicas} replicas had the commit in time")
        return reply


def _outcome(error: NotSent | Unanswered | ErrorReply) -> StoreUnavailable | OutcomeUnknown:
    match error:
        case NotSent():
            return StoreUnavailable(str(error))
        case Unanswered():
            return OutcomeUnknown(str(error))
        case ErrorReply(is_refusal=True):
            return StoreUnavailable(str(error))
        case ErrorReply():
            return OutcomeUnknown(f"the server failed in the midst of a commit: {error}")
