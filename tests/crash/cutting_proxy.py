"""A way to a server that ends after a chosen byte: of what was asked, or of what was answered."""

import asyncio
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

_CHUNK_BYTES = 1 << 16
_PATIENCE_SECONDS = 10
# What is done but not ended, PostgreSQL holds the locks of until the rest comes: a repeated commit would wait for that.
_SYNC_BYTES = 5
_BYTES_UNDONE = _SYNC_BYTES + 1
_RESET_AT_CLOSE = struct.pack("ii", 1, 0)


class Side(Enum):
    REQUEST = "request"
    REPLY = "reply"


class Ending(Enum):
    """How a connection ends for the client: the server hangs up, it is reset, or it hangs up while what the client
    has sent is still under way to the server."""

    HANGS_UP = "hangs up"
    RESET = "reset"
    LATE = "late"


@dataclass(frozen=True, slots=True)
class Cut:
    """The end of all connections as soon as so many bytes of this side have passed; with 0, in place of the first."""

    side: Side
    after_bytes: int
    ending: Ending = Ending.HANGS_UP


@dataclass(eq=False, slots=True)
class _Way:
    """One client's connection, and the one to the server that was opened for it; `late` is what was still to be
    passed on to the server when the client was cut off."""

    from_client: asyncio.StreamReader
    to_client: asyncio.StreamWriter
    from_server: asyncio.StreamReader
    to_server: asyncio.StreamWriter
    ending: Ending | None = None
    late: bytearray = field(default_factory=bytearray)

    def end(self, ending: Ending) -> None:
        self.ending = ending
        if ending is not Ending.LATE:
            _close(self.to_server, ending)
        if ending is Ending.RESET:
            _close(self.to_client, ending)
        elif not self.to_client.is_closing():
            # That the client hangs up too tells that it has noticed.
            self.to_client.write_eof()


class CuttingProxy:
    """Passes on all bytes, until the one that a cut was armed for; a client that connects again passes again."""

    def __init__(self, url: str) -> None:
        self._server = urlsplit(url)
        self._listener: asyncio.Server | None = None
        self._ways: dict[asyncio.Task[None], _Way] = {}
        self._cut: Cut | None = None
        self._left = 0
        self._late: list[_Way] = []

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._listener is not None
        self._listener.close()
        ways = list(self._ways)
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        await self.deliver_late()

    @property
    def url(self) -> str:
        assert self._listener is not None
        port = self._listener.sockets[0].getsockname()[1]
        user, at, _ = self._server.netloc.rpartition("@")
        return self._server._replace(netloc=f"{user}{at}127.0.0.1:{port}").geturl()

    def arm(self, cut: Cut) -> None:
        """Cut all connections once, counting from now."""
        self._cut, self._left = cut, cut.after_bytes

    def disarm(self) -> bool:
        """Make no cut any more; tell whether the one that was armed had still to be made."""
        was_armed, self._cut = self._cut is not None, None
        return was_armed

    async def sever(self) -> None:
        """End all connections, and return when the clients have noticed."""
        for way in self._ways.values():
            way.end(Ending.HANGS_UP)
        async with asyncio.timeout(_PATIENCE_SECONDS):
            await asyncio.gather(*self._ways, return_exceptions=True)

    async def deliver_late(self) -> int:
        """Let arrive what was under way when its sender was cut off; return how many bytes, once the server is done."""
        ways, self._late = self._late, []
        for way in ways:
            way.to_server.write(bytes(way.late))
            way.to_server.write_eof()
            async with asyncio.timeout(_PATIENCE_SECONDS):
                with suppress(ConnectionError):
                    await way.from_server.read()
            way.to_server.close()
        return sum(len(way.late) for way in ways)

    async def _accept(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            with suppress(ConnectionError, asyncio.CancelledError):
                way = _Way(
                    from_client,
                    to_client,
                    *await asyncio.open_connection(self._server.hostname, self._server.port),
                )
                self._ways[task] = way
                await self._carry(way)
        finally:
            to_client.close()
            self._ways.pop(task, None)

    async def _carry(self, way: _Way) -> None:
        requests = asyncio.create_task(self._pass_on(way, Side.REQUEST))
        replies = asyncio.create_task(self._pass_on(way, Side.REPLY))
        try:
            # The client's end is the end: after the server's own it still has to notice.
            await requests
        finally:
            replies.cancel()
            await asyncio.wait({replies})
            if way not in self._late:
                way.to_server.close()

    async def _pass_on(self, way: _Way, side: Side) -> None:
        reader, writer = (way.from_client, way.to_server) if side is Side.REQUEST else (way.from_server, way.to_client)
        with suppress(ConnectionError):
            while chunk := await reader.read(_CHUNK_BYTES):
                self._hand_over(way, side, chunk, writer)
            if side is Side.REPLY and not writer.is_closing():
                writer.write_eof()

    def _hand_over(self, way: _Way, side: Side, chunk: bytes, writer: asyncio.StreamWriter) -> None:
        if way.ending is not None or writer.is_closing():
            if way.ending is Ending.LATE and side is Side.REQUEST:
                way.late += chunk
            return
        cut = self._cut
        if cut is None or cut.side is not side:
            writer.write(chunk)
            return
        passed, rest = chunk[: self._left], chunk[self._left :]
        self._left -= len(passed)
        if cut.ending is Ending.LATE and 0 < len(rest) <= _SYNC_BYTES:
            passed, rest = chunk[:-_BYTES_UNDONE], chunk[-_BYTES_UNDONE:]
        writer.write(passed)
        if self._left == 0:
            self._make(cut, way, rest)

    def _make(self, cut: Cut, way: _Way, rest: bytes) -> None:
        self._cut = None
        if cut.ending is Ending.LATE:
            way.late += rest
            self._late.append(way)
        for each in self._ways.values():
            each.end(cut.ending)


def _close(writer: asyncio.StreamWriter, ending: Ending) -> None:
    if ending is Ending.RESET and not writer.is_closing():
        connection: socket.socket = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE)
    writer.close()
