"""A slow way to a server: what is sent to it is under way for long enough that its sender can freeze or die."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from random import Random
from urllib.parse import urlsplit

_SECONDS = (0.005, 0.03)
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class LastWords:
    """Once a sender's `text` has been passed on, nothing more is, though it stays connected: as if it froze then."""

    text: bytes
    are_spoken: asyncio.Event = field(default_factory=asyncio.Event)


@asynccontextmanager
async def detour(url: str, random: Random, *, last_words: LastWords | None = None) -> AsyncIterator[str]:
    """Give the URL of the detour to `url`. What a sender has under way when it ends does not arrive."""
    parts = urlsplit(url)
    ways: set[asyncio.Task[None]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        way = asyncio.current_task()
        assert way is not None
        ways.add(way)
        way.add_done_callback(ways.discard)
        with suppress(ConnectionError, asyncio.CancelledError):
            there, back = await asyncio.open_connection(parts.hostname, parts.port)
            await _join(reader, back, there, writer, random, last_words)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        user, at, _ = parts.netloc.rpartition("@")
        yield parts._replace(netloc=f"{user}{at}127.0.0.1:{port}").geturl()
    finally:
        server.close()
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways)


async def _join(
    sender: asyncio.StreamReader,
    to_server: asyncio.StreamWriter,
    server: asyncio.StreamReader,
    to_sender: asyncio.StreamWriter,
    random: Random,
    last_words: LastWords | None,
) -> None:
    try:
        async with asyncio.TaskGroup() as group:
            answers = group.create_task(_pass_on(server, to_sender))
            await _pass_on_slowly(sender, to_server, random, last_words)
            answers.cancel()
    except* ConnectionError:
        pass
    finally:
        to_server.close()
        to_sender.close()


async def _pass_on_slowly(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, random: Random, last_words: LastWords | None
) -> None:
    while chunk := await reader.read(_CHUNK_BYTES):
        await asyncio.sleep(random.uniform(*_SECONDS))
        if reader.at_eof():
            return
        writer.write(chunk)
        await writer.drain()
        if last_words is not None and last_words.text in chunk:
            last_words.are_spoken.set()
            await asyncio.Event().wait()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while chunk := await reader.read(_CHUNK_BYTES):
        writer.write(chunk)
        await writer.drain()
    # The sender sees that the server has gone; what it still sends goes nowhere.
    writer.close()
