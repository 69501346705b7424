"""Commits of an upsert, a delete and a record by 64 tasks, beside redis-benchmark that sends the same script calls."""

import asyncio
import re
import shutil
import subprocess
import time
from statistics import median
from typing import Final
from urllib.parse import urlsplit

from benchmarks.loop import run
from benchmarks.ratio import Ratio
from statecast.clock import SystemClock
from statecast.components.manifest import Component
from statecast.components.state.commit import Commit, Delete, OutboxRecord, Upsert
from statecast.components.state.log import DEFAULT_SLICES
from statecast.components.state.redis.encoding import encode_commit
from statecast.components.state.redis.keys import KeyNames
from statecast.components.state.redis.scripts import COMMIT
from statecast.components.state.redis.state import RedisStateStore
from statecast.runtime.server_answers import run_redis
from statecast.runtime.servers import ServerKind, Servers

TASKS: Final = 64
SECONDS: Final = 3.0
ROUNDS: Final = 3
REQUESTS: Final = 150_000
TARGET: Final = 0.35

# redis-benchmark takes no argument with a zero byte, which is in the packed length of every text of 32 to 255 bytes.
NOTE: Final = b"please ring twice; " * 12
VALUE: Final = b'{"orderId": "order-1", "total": 250, "currency": "EUR", "note": "' + NOTE + b'"}'
EVENT: Final = b'{"specversion": "1.0", "id": "outbox-1", "source": "orders", "data": ' + VALUE + b"}"
KEY: Final = "orders||order-1"
METADATA: Final = {"partitionKey": "order-1", "note": NOTE.decode() * 2}
COMMIT_OF_ONE_ORDER: Final = Commit(
    (Upsert(KEY, VALUE), Delete("orders||cart-1")),
    (OutboxRecord(KEY, "outbox-1", "pubsub", "orders", EVENT, METADATA),),
)


async def measure() -> list[Ratio]:
    """Run both in turn on one server without persistence; each rate is the median of its rounds.

    Raises RuntimeError where redis-benchmark is not installed.
    """
    return await asyncio.to_thread(_measure)


def _measure() -> list[Ratio]:
    binary = shutil.which("redis-benchmark")
    if binary is None:
        raise RuntimeError("redis-benchmark is not installed; Debian has it in redis-tools")
    with Servers() as servers:
        address = servers.get(ServerKind.REDIS).address
        pairs = [_measure_both(binary, address) for _ in range(ROUNDS)]
    ours, yardstick = (median(rates) for rates in zip(*pairs, strict=True))
    return [Ratio(f"Redis transact, {TASKS} tasks", ours, yardstick, "commits/s", "redis-benchmark -P 16", TARGET)]


def _measure_both(binary: str, address: str) -> tuple[float, float]:
    run_redis(address, "FLUSHDB")
    ours = run(_statecast_rate(address))
    run_redis(address, "FLUSHDB")
    return ours, _redis_benchmark_rate(binary, address)


async def _statecast_rate(address: str) -> float:
    component = Component("statestore", "state.redis", metadata={"redisHost": urlsplit(address).netloc})
    async with RedisStateStore(component, app_id="orders", clock=SystemClock()) as store:
        count = 0

        async def commit_until(end: float) -> None:
            nonlocal count
            while time.perf_counter() < end:
                await store.transact(COMMIT_OF_ONE_ORDER)
                count += 1

        start = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(TASKS):
                tasks.create_task(commit_until(start + SECONDS))
        return count / (time.perf_counter() - start)


def _redis_benchmark_rate(binary: str, address: str) -> float:
    """Send the very calls that the store sends; the script is known to the server since the store was open."""
    encoded = encode_commit(COMMIT_OF_ONE_ORDER, KeyNames("orders", "statestore"), DEFAULT_SLICES)
    url = urlsplit(address)
    call = ["EVALSHA", COMMIT.digest, str(len(encoded.keys)), *encoded.keys]
    command = [binary, "-h", str(url.hostname), "-p", str(url.port), "-P", "16", "-n", str(REQUESTS), "-q", "-x", *call]
    told = subprocess.run(command, input=encoded.argument, capture_output=True, check=True).stdout
    rates = re.findall(rb": ([0-9.]+) requests per second", told)
    if not rates:
        raise RuntimeError(f"redis-benchmark told no rate: {told[-200:]!r}")
    return float(rates[-1])
