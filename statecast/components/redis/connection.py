"""One connection to a Redis server: commands go out, replies come back in step. hiredis does the parsing."""

import asyncio
import re
import socket
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, cast

import hiredis

from statecast.components.address import Address
from statecast.components.redis.server import find_problem, parse_info
from statecast.components.redis.settings import Credentials, RedisSettings, Sentinel

_INCOMPLETE = object()

_TOLD_IN_SCRIPT: Final = re.compile(r"user_script: ?\d+: -([A-Z]+)")

_SAID_BEFORE_THE_FIRST_WRITE: Final = (
    "OOM",
    "READONLY",
    "LOADING",
    "MASTERDOWN",
    "MISCONF",
    "NOREPLICAS",
    "NOAUTH",
    "WRONGPASS",
    "DENIED",
    "NOSCRIPT",
    "BUSY",
    "CLUSTERDOWN",
    "MOVED",
    "ASK",
    "TRYAGAIN",
    "CROSSSLOT",
)
"""Errors that a server gives instead of beginning a command or a script, or at its first write and never after it."""

Argument = str | bytes | int | float
Reply = Any
"""What a server answered: bytes, int, None, a list of these, or an `ErrorReply`."""


class NotSent(Exception):
    """It is proven that the server has not seen the command."""


class UnfitServer(NotSent):
    """The server is none that can be worked with: it is too old, or a cluster."""


class Unanswered(Exception):
    """The command was sent and no reply came: it may have been carried out, or may be later."""


class ErrorReply(Exception):
    """The server's own error: `OOM command not allowed when used memory > 'maxmemory'.`"""

    @property
    def code(self) -> str:
        """The word that tells its kind: `OOM`. Redis 6.2 hides it behind its own words where a script's command was
        told it: `ERR Error running script (call to f_…): @user_script:30: @user_script: 30: -OOM command not …`."""
        told_in_script = _TOLD_IN_SCRIPT.search(str(self))
        return told_in_script[1] if told_in_script else str(self).partition(" ")[0]

    @property
    def is_refusal(self) -> bool:
        """Tell whether it is proven that the server has done nothing of the command, which may be a script."""
        if self.code == "NOPERM":
            return "script" not in str(self)
        return self.code in _SAID_BEFORE_THE_FIRST_WRITE or self.is_unknown_command

    @property
    def is_farewell(self) -> bool:
        """Tell whether its connection is of no use any more: the server was demoted, and another one may have its
        name by now; or it hangs up."""
        return self.code in ("READONLY", "MASTERDOWN", "UNBLOCKED") or str(self).startswith("ERR Protocol error")

    @property
    def is_unknown_command(self) -> bool:
        return str(self).startswith("ERR unknown command")

    @property
    def is_missing_right(self) -> bool:
        """Tell whether the user may not do that; within a script servers say so in words of their own."""
        text = str(self)
        return any(words in text for words in ("NOPERM", "ACL failure in script", "The user executing the script"))


def pack(*arguments: Argument) -> bytes:
    return cast(bytes, hiredis.pack_command(cast(Any, arguments)))


class Command:
    """One command on its way. Its reply, errors of the server included, becomes the result of `reply`."""

    __slots__ = ("is_answered", "is_sent", "packed", "reply")

    def __init__(self, packed: bytes, reply: asyncio.Future[Reply]) -> None:
        self.packed = packed
        self.reply = reply
        self.is_sent = False
        self.is_answered = False

    def fail(self, error: Exception) -> None:
        self.is_answered = True
        if not self.reply.done():
            self.reply.set_exception(error)


class Connection(asyncio.Protocol):
    """Carries commands in order and gives each its reply, whether or not somebody still waits for it.

    When nothing comes for `read_timeout` seconds while replies are owed, or the connection breaks, every command that
    was written fails as Unanswered and `on_lost` is called once; the connection is of no use then. After a reply that
    says farewell nothing more is written, and the connection ends once the replies that are owed have come.
    """

    def __init__(
        self,
        read_timeout: float,
        *,
        on_lost: Callable[["Connection"], None] = lambda connection: None,
        on_writable: Callable[[], None] = lambda: None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._read_timeout = read_timeout
        self._on_lost = on_lost
        self._on_writable = on_writable
        self._reader = hiredis.Reader(replyError=ErrorReply, notEnoughData=_INCOMPLETE)
        self._owed: deque[Command] = deque()
        self._transport: asyncio.Transport | None = None
        self._watchdog: asyncio.TimerHandle | None = None
        self._last_sign = 0.0
        self._reason = "the server closed the connection"
        self.lost = asyncio.Event()
        self.is_writable = False
        self.is_retired = False

    @property
    def owed(self) -> Iterable[Command]:
        """The commands that were written and have no reply yet."""
        return self._owed

    def write(self, commands: Sequence[Command]) -> None:
        """Write all commands in one go."""
        transport = self._transport
        assert transport is not None
        if not self._owed:
            self._last_sign = self._loop.time()
        for command in commands:
            command.is_sent = True
        self._owed.extend(commands)
        transport.write(b"".join([command.packed for command in commands]))
        if self._watchdog is None:
            self._watchdog = self._loop.call_later(self._read_timeout, self._watch)

    async def call(self, *arguments: Argument) -> Reply:
        """Send one command and wait for its reply. Raises Unanswered, ErrorReply."""
        command = Command(pack(*arguments), self._loop.create_future())
        if not self.is_writable:
            raise NotSent(self._reason)
        self.write([command])
        reply = await command.reply
        if isinstance(reply, ErrorReply):
            raise reply
        return reply

    def abort(self, reason: str) -> None:
        self._reason = reason
        self.is_writable = False
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.is_writable = True
        _keep_alive(transport.get_extra_info("socket"))

    def data_received(self, data: bytes) -> None:
        self._last_sign = self._loop.time()
        gets, owed = self._reader.gets, self._owed
        try:
            self._reader.feed(data)
            while (reply := gets()) is not _INCOMPLETE:
                command = owed.popleft()
                command.is_answered = True
                if not command.reply.done():
                    command.reply.set_result(reply)
                if type(reply) is ErrorReply and reply.is_farewell:
                    self._retire(str(reply))
        except IndexError:
            self.abort(f"the server said, unasked: {reply}")
        except hiredis.HiredisError as error:
            self.abort(f"the server sent what is no reply: {error}")
        if self.is_retired and not owed:
            self.abort(self._reason)

    def pause_writing(self) -> None:
        self.is_writable = False

    def resume_writing(self) -> None:
        self.is_writable = not self.is_retired
        self._on_writable()

    def connection_lost(self, error: Exception | None) -> None:
        self.is_writable = False
        if self._watchdog is not None:
            self._watchdog.cancel()
        reason = f"{self._reason}: {error}" if error else self._reason
        while self._owed:
            self._owed.popleft().fail(Unanswered(reason))
        self.lost.set()
        self._on_lost(self)

    def _retire(self, reason: str) -> None:
        self._reason = reason
        self.is_retired = True
        self.is_writable = False

    def _watch(self) -> None:
        """End a connection on which the server is silent; one timer serves all commands."""
        self._watchdog = None
        if not self._owed:
            return
        left = self._last_sign + self._read_timeout - self._loop.time()
        if left > 0:
            self._watchdog = self._loop.call_later(left, self._watch)
        else:
            self.abort(f"the server was silent for {self._read_timeout:g} s")


def _keep_alive(connection: socket.socket) -> None:
    """Let the system find out about an idle connection that something on the way has dropped: a commit would be sent
    into it, and its outcome unknown."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, seconds in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), seconds)


async def connect(
    settings: RedisSettings,
    *,
    on_lost: Callable[[Connection], None],
    on_writable: Callable[[], None],
    read_timeout: float | None = None,
) -> Connection:
    """Open a connection that is authenticated, in its database, and to a server that answers.

    Raises NotSent, with the reason; UnfitServer for one that lasts.
    """
    address = settings.address
    if read_timeout is None:
        read_timeout = settings.read_timeout.total_seconds()
    try:
        async with asyncio.timeout(settings.dial_timeout.total_seconds()):
            if settings.sentinel is not None:
                address = await _master_address(settings, settings.sentinel)
            connection = await _dial(address, settings, read_timeout, on_lost=on_lost, on_writable=on_writable)
            try:
                await _greet(connection, settings)
            except BaseException:
                connection.abort("the handshake failed")
                raise
            return connection
    except TimeoutError:
        raise NotSent(f"no answer from {address} within {settings.dial_timeout.total_seconds():g} s") from None
    except (OSError, ErrorReply, Unanswered) as error:
        reason = f"no connection to {address}: {address.reason(error)}"
        raise NotSent(reason) from (None if address.stand_in else error)


async def _dial(
    address: Address,
    settings: RedisSettings,
    read_timeout: float,
    *,
    on_lost: Callable[[Connection], None] = lambda connection: None,
    on_writable: Callable[[], None] = lambda: None,
) -> Connection:
    _, connection = await asyncio.get_running_loop().create_connection(
        lambda: Connection(read_timeout, on_lost=on_lost, on_writable=on_writable),
        address.host,
        address.port,
        ssl=settings.tls,
    )
    return connection


async def _greet(connection: Connection, settings: RedisSettings) -> None:
    await _authenticate(connection, settings.credentials)
    await _examine(connection)
    if settings.database:
        await connection.call("SELECT", settings.database)
    if settings.sentinel is not None:
        # A sentinel may still name a master that has been demoted.
        role = await connection.call("ROLE")
        if role[0] != b"master":
            raise NotSent("the sentinels name a server that is not the master")


async def _authenticate(connection: Connection, credentials: Credentials) -> None:
    if credentials.password is None:
        return
    if credentials.username is None:
        await connection.call("AUTH", credentials.password)
    else:
        await connection.call("AUTH", credentials.username, credentials.password)


async def _examine(connection: Connection) -> None:
    """Find out what kind of server it is, and so whether it serves at all: one that takes no more clients says so in
    the place of its first reply, whatever that was asked for."""
    try:
        facts = parse_info(await connection.call("INFO", "server"))
    except ErrorReply as error:
        if error.is_missing_right or error.is_unknown_command:
            return
        raise
    if problem := find_problem(facts):
        raise UnfitServer(problem)


async def _master_address(settings: RedisSettings, sentinel: Sentinel) -> Address:
    reasons: list[str] = []
    for address in sentinel.addresses:
        try:
            return await _ask_sentinel(address, settings, sentinel)
        except (OSError, ErrorReply, Unanswered, NotSent) as error:
            reasons.append(f"{address}: {address.reason(error)}")
    raise NotSent(f"no sentinel knows master {sentinel.shown_master} ({'; '.join(reasons)})")


async def _ask_sentinel(address: Address, settings: RedisSettings, sentinel: Sentinel) -> Address:
    # A sentinel that is gone must leave time to ask the next one.
    share = settings.dial_timeout.total_seconds() / (len(sentinel.addresses) + 1)
    async with asyncio.timeout(share):
        connection = await _dial(address, settings, settings.read_timeout.total_seconds())
        try:
            await _authenticate(connection, sentinel.credentials)
            named = await connection.call("SENTINEL", "GET-MASTER-ADDR-BY-NAME", sentinel.master)
        finally:
            connection.abort("asked")
            await connection.lost.wait()
    if named is None:
        raise NotSent("is not known there")
    return Address(named[0].decode(), int(named[1]))
