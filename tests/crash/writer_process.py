"""Commits random deeds to the components in a folder, and relays them, until it is done or its input closes.

python writer_process.py FOLDER APP_ID NAME SEED DEEDS JOURNAL
"""

import asyncio
import logging
import sys
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import IO

from statecast import RelayOptions, Runtime, RuntimeOptions
from tests.crash.arena import STORE
from tests.crash.parting import parting
from tests.crash.writing import write

# Short leases, so that the next process need not wait long for those of one that was killed.
_OPTIONS = RuntimeOptions(relay=RelayOptions(lease=timedelta(seconds=1), publish_timeout=timedelta(seconds=0.4)))


async def run(folder: Path, app_id: str, name: str, seed: str, deeds: int, journal: IO[str]) -> None:
    async with Runtime.open(folder, app_id=app_id, options=_OPTIONS) as runtime:
        print("ready", flush=True)
        writing = asyncio.create_task(write(runtime.state(STORE), journal, name, Random(seed), deeds))
        leaving = asyncio.create_task(parting())
        await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        if not writing.done():
            writing.cancel()
        await writing


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(levelname)s %(name)s %(message)s")
    with open(sys.argv[6], "x") as file:
        asyncio.run(run(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]), file))
