"""How a child learns that it is to end: its standard input closes, which it does too when its parent dies."""

import asyncio
import sys


async def parting() -> None:
    """Return when the standard input is at its end."""
    loop = asyncio.get_running_loop()
    end = asyncio.Event()

    class Ending(asyncio.Protocol):
        def eof_received(self) -> None:
            end.set()

        def connection_lost(self, error: Exception | None) -> None:
            end.set()

    transport, _ = await loop.connect_read_pipe(Ending, sys.stdin)
    try:
        await end.wait()
    finally:
        transport.close()
