"""Relays the outbox of the components in a folder until its standard input closes.

python relay_process.py FOLDER APP_ID LEASE_SECONDS PUBLISH_SECONDS BATCH
"""

import asyncio
import logging
import sys
from datetime import timedelta
from pathlib import Path

from statecast import RelayOptions, Runtime, RuntimeOptions
from tests.crash.parting import parting


def read_options(lease: str, publish_timeout: str, batch: str) -> RelayOptions:
    return RelayOptions(
        lease=timedelta(seconds=float(lease)),
        publish_timeout=timedelta(seconds=float(publish_timeout)),
        trim_every=timedelta(milliseconds=500),
        batch=int(batch),
    )


async def relay(folder: Path, app_id: str, options: RelayOptions) -> None:
    async with Runtime.open(folder, app_id=app_id, options=RuntimeOptions(relay=options)):
        print("ready", flush=True)
        await parting()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(levelname)s %(name)s %(message)s")
    asyncio.run(relay(Path(sys.argv[1]), sys.argv[2], read_options(*sys.argv[3:6])))
