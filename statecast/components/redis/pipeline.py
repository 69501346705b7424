"""Commands of one tick of the event loop leave as one write: the connection that all callers share."""

import asyncio
import logging
from collections.abc import Sequence
from hashlib import sha1
from types import TracebackType
from typing import Self

from statecast.components.redis.connection import (
    Argument,
    Command,
    Connection,
    ErrorReply,
    NotSent,
    Reply,
    Unanswered,
    connect,
    pack,
)
from statecast.components.redis.settings import RedisSettings
from statecast.components.settlement import wait_for_settlement

logger = logging.getLogger(__name__)

_CLOSING_PATIENCE = 2.0
"""How many seconds closing waits for what is in flight."""


class Script:
    """A Lua script that is called by its digest."""

    __slots__ = ("digest", "source")

    def __init__(self, source: str) -> None:
        self.source = source
        self.digest = sha1(source.encode(), usedforsecurity=False).hexdigest()


class Pipeline:
    """Sends what is submitted during one tick in one write, and connects again when the connection was lost.

    Nothing is ever sent twice. While the server does not take more, commands queue here and can be withdrawn.
    """

    def __init__(self, settings: RedisSettings, *, read_timeout: float | None = None) -> None:
        self._settings = settings
        self._read_timeout = read_timeout
        self._queue: list[Command] = []
        self._connection: Connection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._is_flush_due = False
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop = None
        self._fail_queue(NotSent("the connection is closed"))
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait([self._connecting])
        if (connection := self._connection) is not None:
            try:
                await _settled(connection)
            finally:
                connection.abort("the connection was closed")
                await connection.lost.wait()

    @property
    def is_open(self) -> bool:
        return self._loop is not None

    def submit(self, packed: bytes) -> Command:
        """Queue a command for this tick's write. Raises NotSent when the pipeline is not open."""
        if self._loop is None:
            raise NotSent("the connection is not open")
        command = Command(packed, self._loop.create_future())
        self._queue.append(command)
        if not self._is_flush_due:
            self._is_flush_due = True
            self._loop.call_soon(self._flush)
        return command

    async def call(self, packed: bytes) -> Reply:
        """Send a command and wait for its reply; an error of the server is a value here. Raises NotSent, Unanswered.

        Cancelled while the command is queued, it is withdrawn. Cancelled when it is sent, it waits for the outcome
        for a while, so that a caller who is gone has not left something behind that happens later.
        """
        command = self.submit(packed)
        try:
            return await command.reply
        except asyncio.CancelledError:
            _retrieve(command.reply)
            if command.is_sent and not command.is_answered:
                command.reply = asyncio.get_running_loop().create_future()
                command.reply.add_done_callback(_retrieve)
                await wait_for_settlement(command.reply)
            raise

    async def run(self, script: Script, *arguments: Argument) -> Reply:
        """Run a script; `arguments` are the number of keys, the keys, the rest.

        Raises NotSent, Unanswered, ErrorReply.
        """
        reply = await self.call(pack("EVALSHA", script.digest, *arguments))
        if type(reply) is ErrorReply and reply.code == "NOSCRIPT":
            reply = await self.call(_pack_with_source(script, arguments))
        if type(reply) is ErrorReply:
            raise reply
        return reply

    async def run_within(self, seconds: float, script: Script, *arguments: Argument) -> Reply:
        """Run a script, and wait no longer than `seconds`: then Unanswered, or NotSent if it had not left yet."""
        end = asyncio.get_running_loop().time() + seconds
        reply = await self._call_until(end, pack("EVALSHA", script.digest, *arguments))
        if type(reply) is ErrorReply and reply.code == "NOSCRIPT":
            reply = await self._call_until(end, _pack_with_source(script, arguments))
        if type(reply) is ErrorReply:
            raise reply
        return reply

    async def _call_until(self, end: float, packed: bytes) -> Reply:
        if end <= asyncio.get_running_loop().time():
            raise NotSent("no time was left to send the command in")
        command = self.submit(packed)
        try:
            async with asyncio.timeout_at(end):
                return await command.reply
        except TimeoutError:
            if not command.is_sent:
                raise NotSent("the command did not leave in time") from None
            if not command.is_answered:
                raise Unanswered("the server did not answer in time") from None
            if command.reply.cancelled():
                raise Unanswered("the answer came too late") from None
            return command.reply.result()

    async def command(self, *arguments: Argument) -> Reply:
        """Send one command and wait for its reply. Raises NotSent, Unanswered, ErrorReply."""
        reply = await self.call(pack(*arguments))
        if type(reply) is ErrorReply:
            raise reply
        return reply

    async def command_within(self, seconds: float, *arguments: Argument) -> Reply:
        """Send one command, and wait no longer than `seconds`: as `command`, and as `run_within`."""
        reply = await self._call_until(asyncio.get_running_loop().time() + seconds, pack(*arguments))
        if type(reply) is ErrorReply:
            raise reply
        return reply

    def abort(self, reason: str) -> None:
        """Give up what is in flight; the next command connects again."""
        if self._connection is not None:
            self._connection.abort(reason)

    def _flush(self) -> None:
        self._is_flush_due = False
        connection = self._connection
        if connection is None:
            self._connect()
        elif connection.is_writable and self._queue:
            # A caller that was cancelled meanwhile is withdrawn here: its command never leaves.
            commands = [command for command in self._queue if not command.reply.done()]
            self._queue.clear()
            if commands:
                connection.write(commands)

    def _connect(self) -> None:
        if self._connecting is None and self._loop is not None and self._queue:
            self._connecting = self._loop.create_task(self._open())

    async def _open(self) -> None:
        try:
            connection = await connect(
                self._settings, on_lost=self._lose, on_writable=self._flush, read_timeout=self._read_timeout
            )
        except NotSent as error:
            self._fail_queue(error)
        except Exception as error:
            logger.exception("connecting to Redis at %s failed", self._settings.address)
            self._fail_queue(NotSent(repr(error)))
        else:
            self._connection = connection
            if connection.lost.is_set():
                self._lose(connection)
        finally:
            self._connecting = None
        self._flush()

    def _lose(self, connection: Connection) -> None:
        if self._connection is not connection:
            return
        self._connection = None
        if not connection.is_retired:
            self._fail_queue(NotSent("the connection was lost before the command was sent"))
        self._flush()

    def _fail_queue(self, error: NotSent) -> None:
        commands, self._queue = self._queue, []
        for command in commands:
            command.fail(error)


def _pack_with_source(script: Script, arguments: Sequence[Argument]) -> bytes:
    """Call a script whose digest the server did not know, so that it has carried out nothing; from then on it does.
    Loading it beforehand needs a right that calling it does not."""
    return pack("EVAL", script.source, *arguments)


async def _settled(connection: Connection) -> None:
    replies = [command.reply for command in connection.owed]
    if replies:
        await asyncio.wait(replies, timeout=_CLOSING_PATIENCE)


def _retrieve(reply: asyncio.Future[Reply]) -> None:
    """Look at an outcome that nobody else will, so that the event loop does not complain about it."""
    if reply.done() and not reply.cancelled():
        reply.exception()
