"""The log where its server is not the one it was: crashed, restored from a dump, or a replica that took over."""

import asyncio
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest

from statecast.clock import SystemClock
from statecast.components.manifest import Component
from statecast.components.state.commit import Commit, OutboxRecord
from statecast.components.state.log import Lease, OutboxLog
from statecast.components.state.postgresql import PostgresqlStateStore
from statecast.components.state.postgresql.lanes import SERVER_LIFE
from statecast.components.state.postgresql.migration import MIGRATION_LOCK
from statecast.components.state.postgresql.position import Position
from statecast.components.testing.deadline import until
from statecast.errors import StoreUnavailable
from statecast.runtime.server import Keeping, PrivateServer, ServerKind, ServerMissing, Variant
from statecast.runtime.server_installations import Installation, find_installation
from statecast.runtime.server_processes import LocalServer
from tests.components.going_without import go_without
from tests.components.relaying import Recorder, deed, relaying

HOUR = timedelta(hours=1)


def store_on(url: str, **metadata: str) -> PostgresqlStateStore:
    component = Component(
        "statestore", "state.postgresql", "v2", {"connectionString": url, "maxConns": "4", **metadata}
    )
    return PostgresqlStateStore(component, app_id="orders", clock=SystemClock())


async def spend_transactions(connection: asyncpg.Connection, count: int) -> None:
    """Let the server number so many more transactions; nothing comes of them."""
    await connection.execute("create table if not exists spent (n int)")
    await connection.execute(
        f"do $$ begin for n in 1..{count} loop"
        " begin insert into spent values (n); raise exception 'undone'; exception when others then null; end;"
        " end loop; end $$"
    )


async def read_ids(log: OutboxLog, leases: list[Lease]) -> tuple[list[str], list[Lease]]:
    batch = await log.read(leases, 1_000)
    return [entry.record.event_id for entry in batch.entries], list(batch.leases)


# A server that crashed


@pytest.mark.parametrize("part", ["server", "backend"])
async def test_a_number_that_a_crash_gave_to_another_transaction_hides_nothing(
    private_server: Callable[[ServerKind], PrivateServer], part: str
) -> None:
    """It fails when positions outlive the server that they were read from (tried)."""
    server = private_server(ServerKind.POSTGRESQL)
    async with store_on(server.address) as store:
        admin = await asyncpg.connect(server.address)
        # What nobody waits for to be on disk is written there only now and then: not now.
        await admin.execute("alter system set wal_writer_delay = '10s'")
        await admin.execute("select pg_reload_conf()")
        leases = await store.log.acquire("relay", 16, HOUR)
        for _ in range(1_100):
            await admin.execute("begin; select pg_current_xact_id(); rollback")
        _, leases = await read_ids(store.log, leases)
        life = await admin.fetchval(f"select {SERVER_LIFE}")

        await crash(server, part)
        await until_it_lives_anew(server, life)
        await until_it_answers(store)
        await store.transact(Commit((), (OutboxRecord("orders||1", "after", "bus", "orders", b""),)))
        found, read = await read_ids(store.log, leases)
        kept = await store.log.advance(read, HOUR)
        leases = await store.log.acquire("relay", 16, HOUR)

        admin = await asyncpg.connect(server.address)
        number = int(await admin.fetchval("select xid::text from statecast_outbox_1"))
        assert number < int(Position.parse(read[0].position).prev.split(":")[1]), "no number was given again"
        assert (found, kept) == ([], [])
        assert len(leases) == 16
        assert (await read_ids(store.log, leases))[0] == ["after"]
        await admin.close()


async def crash(server: PrivateServer, part: str) -> None:
    if part == "server":
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.restart)
        return
    # The server ends all its backends when one ends like that, and recovers as from a crash of its own.
    victim, witness = await asyncpg.connect(server.address), await asyncpg.connect(server.address)
    pid = await victim.fetchval("select pg_backend_pid()")
    with suppress(asyncpg.PostgresError, OSError):  # the witness is ended too
        await witness.execute(f"copy (select 1) to program 'kill -KILL {pid}'")


async def until_it_lives_anew(server: PrivateServer, life: str) -> None:
    """Until then a backend may answer that is about to be ended with the others."""

    async def lives_anew() -> bool:
        try:
            connection = await asyncpg.connect(server.address)
            try:
                return bool(await connection.fetchval(f"select {SERVER_LIFE}") != life)
            finally:
                connection.terminate()
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
            return False

    await until(lives_anew)


async def until_it_answers(store: PostgresqlStateStore) -> None:
    async def answers() -> bool:
        try:
            await store.get("anything")
        except StoreUnavailable:
            return False
        return True

    await until(answers)


async def test_an_outbox_that_takes_long_to_bring_to_another_cluster_is_waited_for(postgresql_url: str) -> None:
    """Fails when it has to be done within the time of one call: each one begins it again, in vain."""
    async with store_on(postgresql_url) as store:
        await store.transact(Commit((), (OutboxRecord("orders||1", "before", "bus", "orders", b""),)))
    other = await asyncpg.connect(postgresql_url)
    await other.execute("update dapr_metadata set value = 'another' where key like 'cluster-statecast-%'")
    await other.execute("select pg_advisory_lock($1)", MIGRATION_LOCK)

    async with store_on(postgresql_url, timeout="1s") as store:
        for _ in range(2):
            with pytest.raises(StoreUnavailable, match="is being brought to another cluster"):
                await store.get("orders||1")
        await other.execute("select pg_advisory_unlock($1)", MIGRATION_LOCK)
        await until_it_answers(store)
        found, _ = await read_ids(store.log, await store.log.acquire("relay", 16, HOUR))

    assert found == ["before"]
    await other.close()


# A dump restored into another cluster


@pytest.mark.parametrize("numbers", ["larger", "smaller"])
@pytest.mark.parametrize("way", ["opened anew", "still open"])
async def test_what_was_pending_in_a_dump_is_relayed_from_where_it_is_restored(
    private_server: Callable[[ServerKind], PrivateServer], numbers: str, way: str
) -> None:
    """It fails when positions and rows are taken as they are: nothing is found, or new events are lost (tried)."""
    first, second = private_server(ServerKind.POSTGRESQL), private_server(ServerKind.POSTGRESQL)
    older, newer = await asyncpg.connect(first.address), await asyncpg.connect(second.address)
    await spend_transactions(older if numbers == "smaller" else newer, 20_000)
    detour = SwitchedWay(first.address)
    recorder = Recorder()
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(detour.open())
        store = await stack.enter_async_context(store_on(url))
        leases = await store.log.acquire("earlier", 16, HOUR)
        await write(store, range(20))
        _, leases = await read_ids(store.log, leases)
        await store.log.advance(leases, HOUR)
        await write(store, range(20, 40))

        await asyncio.to_thread(copy_by_dump, first.address, second.address)
        await detour.lead_to(second.address)
        if way == "opened anew":
            store = await stack.enter_async_context(store_on(second.address))
        await until_it_answers(store)
        await write(store, range(40, 60))
        async with relaying(store, recorder, "relay"):
            await until(lambda: has_seen(recorder, 40))

    assert recorder.first == {f"orders||{key}": [f"{n}" for n in range(20, 60) if n % 5 == key] for key in range(5)}
    assert recorder.repeats == 0
    for connection in (older, newer):
        await connection.close()


async def test_a_dump_in_the_middle_of_a_snapshot_goes_on_behind_what_was_published(
    private_server: Callable[[ServerKind], PrivateServer],
) -> None:
    first, second = private_server(ServerKind.POSTGRESQL), private_server(ServerKind.POSTGRESQL)
    async with store_on(first.address) as store:
        leases = await store.log.acquire("earlier", 16, HOUR)
        await store.transact(Commit((), tuple(OutboxRecord("one", str(n), "bus", "t", b"") for n in range(10))))
        batch = await store.log.read(leases, 4)
        await store.log.advance(batch.leases, HOUR)

    await asyncio.to_thread(copy_by_dump, first.address, second.address)

    async with store_on(second.address) as store:
        found, _ = await read_ids(store.log, await store.log.acquire("relay", 16, HOUR))
    assert [entry.record.event_id for entry in batch.entries] + found == [str(n) for n in range(10)]


async def test_an_event_of_a_transaction_that_was_open_while_a_dump_became_at_home_is_read(
    private_server: Callable[[ServerKind], PrivateServer],
) -> None:
    """It fails when positions begin at the transaction that restates them (tried)."""
    first, second = private_server(ServerKind.POSTGRESQL), private_server(ServerKind.POSTGRESQL)
    async with store_on(first.address) as store:
        await write(store, range(1))
    await asyncio.to_thread(copy_by_dump, first.address, second.address)
    writer = await asyncpg.connect(second.address)
    transaction = writer.transaction()
    await transaction.start()
    await writer.execute("select pg_current_xact_id()")

    async with store_on(second.address) as store:
        await writer.execute(
            "insert into statecast_outbox_1 (slice, order_key, event_id, format, pubsub, topic, metadata, body)"
            " values (0, 'late', 'late', 1, 'bus', 'orders', '{}', '')"
        )
        await transaction.commit()
        found, _ = await read_ids(store.log, await store.log.acquire("relay", 16, HOUR))

    assert set(found) == {"orders||0#0", "late"}
    await writer.close()


async def test_a_dump_restored_into_its_own_cluster_is_left_as_it_is(
    private_server: Callable[[ServerKind], PrivateServer],
) -> None:
    server = private_server(ServerKind.POSTGRESQL)
    admin = await asyncpg.connect(server.address)
    async with store_on(server.address) as store:
        await write(store, range(5))
    await admin.execute("create database copy")
    copy = urlsplit(server.address)._replace(path="/copy").geturl()
    await asyncio.to_thread(copy_by_dump, server.address, copy)

    async with store_on(copy) as store:
        found, _ = await read_ids(store.log, await store.log.acquire("relay", 16, HOUR))

    assert sorted(found) == sorted(f"orders||{n}#{n}" for n in range(5))
    copied = await asyncpg.connect(copy)
    rows = "select id, xid::text from statecast_outbox_1 order by id"
    assert await copied.fetch(rows) == await admin.fetch(rows)
    for connection in (admin, copied):
        await connection.close()


async def test_a_role_that_may_not_ask_which_cluster_it_is_opens_all_the_same(
    private_server: Callable[[ServerKind], PrivateServer],
) -> None:
    server = private_server(ServerKind.POSTGRESQL)
    admin = await asyncpg.connect(server.address)
    await admin.execute("create role plain login; grant create on schema public to plain")
    await admin.execute("revoke execute on function pg_control_system() from public")

    async with store_on(server.address.replace("postgres@", "plain@")) as store:
        await write(store, range(5))

    assert await admin.fetchval("select count(*) from statecast_outbox_1") == 5
    await admin.close()


async def write(store: PostgresqlStateStore, numbers: range) -> None:
    for number in numbers:
        await store.transact(deed(f"orders||{number % 5}", number))


async def has_seen(recorder: Recorder, count: int) -> bool:
    return len(recorder.seen) >= count


def copy_by_dump(source: str, target: str) -> None:
    dump = subprocess.run([tool("pg_dump"), source], capture_output=True, check=True)
    restore = [tool("psql"), "--quiet", "--no-psqlrc", "--set=ON_ERROR_STOP=1", target]
    subprocess.run(restore, input=dump.stdout, capture_output=True, check=True)


def tool(name: str) -> str:
    return str(Path(installation().place, name))


def installation() -> Installation:
    try:
        return find_installation(ServerKind.POSTGRESQL, Variant.CURRENT)
    except ServerMissing as missing:
        go_without(missing)


class SwitchedWay:
    """An address that leads to one server, and then to another; what is connected is cut off between."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._ways: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        yield f"postgresql://postgres@127.0.0.1:{port}/postgres"
        server.close()
        await self._cut()

    async def lead_to(self, url: str) -> None:
        self._url = url
        await self._cut()

    async def _cut(self) -> None:
        for way in list(self._ways):
            way.cancel()
        await asyncio.gather(*self._ways, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        way = asyncio.current_task()
        assert way is not None
        self._ways.add(way)
        way.add_done_callback(self._ways.discard)
        parts = urlsplit(self._url)
        there, back = await asyncio.open_connection(parts.hostname, parts.port)
        try:
            with suppress(ConnectionError, asyncio.CancelledError):
                await asyncio.gather(_pass_on(reader, back), _pass_on(there, writer))
        finally:
            writer.close()
            back.close()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while chunk := await reader.read(1 << 16):
        writer.write(chunk)
        await writer.drain()
    writer.close()


# A replica that took over


@pytest.fixture
def replica_of() -> Iterator[Callable[[PrivateServer], LocalServer]]:
    """Start a streaming replica of a server."""
    started: list[LocalServer] = []

    def start(primary: PrivateServer) -> LocalServer:
        started.append(LocalServer.start(_Replica(primary.address, installation()), Keeping(after_kill=True)))
        return started[-1]

    yield start
    for server in started:
        server.close()


@dataclass(frozen=True, slots=True)
class _Replica:
    """Like the installation that it is made of, but with the data of another server."""

    primary: str
    installation: Installation
    kind: ServerKind = ServerKind.POSTGRESQL
    stop_signal: signal.Signals = signal.SIGINT

    @property
    def place(self) -> str:
        return self.installation.place

    def address(self, port: int) -> str:
        return self.installation.address(port)

    def prepare(self, folder: Path) -> None:
        backup = [tool("pg_basebackup"), "--dbname", self.primary, "--pgdata", f"{folder}/data"]
        subprocess.run([*backup, "--write-recovery-conf", "--checkpoint=fast"], capture_output=True, check=True)

    def command(self, folder: Path, port: int, keeping: Keeping) -> list[str]:
        return self.installation.command(folder, port, keeping)


async def test_a_replica_that_is_promoted_relays_on_without_losing_what_it_has(
    private_server: Callable[[ServerKind], PrivateServer], replica_of: Callable[[PrivateServer], LocalServer]
) -> None:
    """The store stays open: its address names both servers, of which one at a time is the primary."""
    primary = private_server(ServerKind.POSTGRESQL)
    replica = await asyncio.to_thread(replica_of, primary)
    hosts = ",".join(urlsplit(server.address).netloc.partition("@")[2] for server in (primary, replica))
    url = f"postgresql://postgres@{hosts}/postgres?target_session_attrs=primary"
    recorder = Recorder()
    async with store_on(url) as store, relaying(store, recorder, "relay"):
        await write(store, range(50))
        await until(lambda: has_seen(recorder, 50))
        await until_replayed(primary.address)

        await asyncio.to_thread(primary.kill)
        admin = await asyncpg.connect(replica.address)
        await admin.fetchval("select pg_promote()")
        await until_it_answers(store)
        await write(store, range(50, 100))

        await until(lambda: has_seen(recorder, 100))

    assert recorder.first == {f"orders||{key}": [f"{n}" for n in range(100) if n % 5 == key] for key in range(5)}
    assert (await admin.fetchval("select pg_walfile_name(pg_current_wal_lsn())")).startswith("00000002")
    await admin.close()


async def until_replayed(url: str) -> None:
    """Wait until the replica has all that is committed."""
    admin = await asyncpg.connect(url)
    written = await admin.fetchval("select pg_current_wal_lsn()::text")

    async def is_replayed() -> bool:
        query = "select bool_and(replay_lsn >= $1::text::pg_lsn) from pg_stat_replication"
        return bool(await admin.fetchval(query, written))

    await until(is_replayed)
    await admin.close()
