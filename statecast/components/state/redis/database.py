"""The server as the parts of the store use it, and the one place where its failures become this package's errors."""

import asyncio

from statecast.components.redis.connection import Argument, ErrorReply, NotSent, Reply, Unanswered, pack
from statecast.components.redis.pipeline import Pipeline, Script, reply_to
from statecast.components.state.redis.replication import Replication
from statecast.errors import OutcomeUnknown, StoreUnavailable


class Database:
    """Runs scripts on the connection that all share; what must wait for replicas goes to a connection of its own."""

    def __init__(self, shared: Pipeline, replication: Replication) -> None:
        self._shared = shared
        self._replication = replication

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
        # The source goes along, since a digest that is not known would let WAIT run first.
        commit, copies = self._replication.submit(pack("EVAL", script.source, *arguments))
        try:
            reply = await reply_to(commit)
        except (NotSent, Unanswered) as error:
            raise _outcome(error) from error
        if isinstance(reply, ErrorReply):
            raise _outcome(reply) from reply
        if reply[0] == b"ok":
            await self._require_copies(copies)
        return reply

    async def _require_copies(self, copies: asyncio.Future[Reply]) -> None:
        try:
            # Others wait for it, too: who leaves must not cancel it.
            count = await asyncio.shield(copies)
        except Unanswered as error:
            raise OutcomeUnknown(f"it is not known whether the replicas have the commit: {error}") from error
        if isinstance(count, ErrorReply):
            raise OutcomeUnknown(f"it is not known whether the replicas have the commit: {count}") from count
        if count < self._replication.replicas:
            raise OutcomeUnknown(f"{count} of {self._replication.replicas} replicas had the commit in time")


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
