"""A server that is there, and cannot be worked with: full of clients, demoted, or not of the kind that is needed."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis

from statecast.clock import SystemClock
from statecast.components.broker.broker import Message, Outcome, Published, Unreachable
from statecast.components.broker.redis.broker import RedisBroker
from statecast.components.manifest import Component
from statecast.components.state.commit import Commit, Upsert
from statecast.components.state.redis.state import RedisStateStore
from statecast.components.testing.broker import LONG
from statecast.components.testing.deadline import until
from statecast.errors import ComponentError, StatecastError, StoreUnavailable
from statecast.runtime.servers import PrivateServer, ServerKind, ServerMissing, Servers, Variant
from tests.components.going_without import go_without
from tests.components.redis_processes import free_port, redis_process

StartServer = Callable[[], PrivateServer]
COMMIT = Commit((Upsert("orders||1", b"1"),))


@pytest.fixture(params=list(Variant))
def start_server(request: pytest.FixtureRequest, servers: Servers) -> Iterator[StartServer]:
    """Start servers of this test alone, of the current and of the older version."""
    with ExitStack() as running:

        def start() -> PrivateServer:
            try:
                server = servers.private(ServerKind.REDIS, variant=request.param)
            except ServerMissing as missing:
                go_without(missing)
            running.callback(server.close)
            return server

        yield start


@pytest.fixture
def server(start_server: StartServer) -> PrivateServer:
    return start_server()


@pytest.fixture
def admin(server: PrivateServer) -> Iterator[redis.Redis]:
    """A client that keeps its one connection to the server."""
    with redis.Redis.from_url(server.address, single_connection_client=True) as client:
        yield client


@pytest.fixture
def cluster_member(tmp_path: Path) -> tuple[str, tuple[str, ...]]:
    """The URL of a server that is not running yet, and what to run it with."""
    port = str(free_port())
    place = ("--port", port, "--bind", "127.0.0.1", "--dir", str(tmp_path), "--save", "")
    # Of itself it would take the port that is 10000 above, which may be above all ports.
    return f"redis://127.0.0.1:{port}", (*place, "--cluster-enabled", "yes", "--cluster-port", str(free_port()))


def component(url: str) -> Component:
    return Component("redis", "redis", "v1", {"redisHost": urlsplit(url).netloc})


def redis_broker(url: str) -> RedisBroker:
    return RedisBroker(component(url), app_id="orders", clock=SystemClock())


def redis_store(url: str) -> RedisStateStore:
    return RedisStateStore(component(url), app_id="orders", clock=SystemClock())


async def publish(broker: RedisBroker) -> Outcome:
    [outcome] = await broker.publish([Message("t", b"1", key="key")], LONG)
    return outcome


async def error_of(store: RedisStateStore) -> type[StatecastError] | None:
    try:
        await store.transact(COMMIT)
    except StatecastError as error:
        return type(error)
    return None


# No room for one more client


async def test_a_server_that_takes_no_more_clients_is_away_for_a_broker(
    server: PrivateServer, admin: redis.Redis
) -> None:
    admin.config_set("maxclients", 1)

    async with redis_broker(server.address) as broker:
        outcomes = [await publish(broker) for _ in range(10)]
        admin.config_set("maxclients", 100)
        roomy = await publish(broker)

    assert [type(outcome) for outcome in outcomes] == [Unreachable] * 10
    assert roomy == Published()
    assert admin.xlen("t") == 1


async def test_a_server_that_takes_no_more_clients_is_unavailable_for_a_store(
    server: PrivateServer, admin: redis.Redis
) -> None:
    async with redis_store(server.address) as store:
        admin.config_set("maxclients", 1)
        admin.client_kill_filter(_type="normal", skipme=True)
        await error_of(store)
        errors = [await error_of(store) for _ in range(10)]
        was_written = admin.exists("orders||1")
        admin.config_set("maxclients", 100)

        assert errors == [StoreUnavailable] * 10
        assert not was_written
        assert await error_of(store) is None


# A master that was demoted, while its name leads to another by now


async def test_a_broker_leaves_a_demoted_server_for_the_next_one(start_server: StartServer) -> None:
    old, new = start_server(), start_server()
    async with moving_name(old.address) as (url, move), redis_broker(url) as broker:
        before = await publish(broker)
        demote(old)
        move(new.address)

        after = [await publish(broker) for _ in range(3)]

    assert before == Published()
    assert [type(outcome) for outcome in after] == [Unreachable, Published, Published]


async def test_a_member_of_a_group_leaves_a_demoted_server_for_the_next_one(start_server: StartServer) -> None:
    old, new = start_server(), start_server()
    async with (
        moving_name(old.address) as (url, move),
        redis_broker(new.address) as publisher,
        redis_broker(url) as broker,
        broker.subscribe("t", "g") as deliveries,
    ):
        waiting = asyncio.ensure_future(anext(deliveries))
        demote(old)
        move(new.address)
        await publish(publisher)

        async with asyncio.timeout(20):
            delivery = await waiting

    assert delivery.message.body == b"1"


async def test_a_store_leaves_a_demoted_server_once_it_has_its_replies(start_server: StartServer) -> None:
    old, new = start_server(), start_server()
    async with moving_name(old.address) as (url, move), redis_store(url) as store:
        await store.transact(COMMIT)
        demote(old)
        move(new.address)

        error, item = await asyncio.gather(error_of(store), store.get("orders||1"))
        error_then = await error_of(store)
        item_then = await store.get("orders||1")

    assert error is StoreUnavailable
    assert item is not None
    assert error_then is None
    assert item_then is not None


def demote(server: PrivateServer) -> None:
    with redis.Redis.from_url(server.address) as client:
        client.replicaof("127.0.0.1", "1")


@asynccontextmanager
async def moving_name(url: str) -> AsyncIterator[tuple[str, Callable[[str], None]]]:
    """Give a URL that leads to a server, and a way to let it lead to another one; who is connected stays."""
    target = url

    def move(to: str) -> None:
        nonlocal target
        target = to

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(urlsplit(target).hostname, urlsplit(target).port)
        await asyncio.gather(pass_on(reader, back), pass_on(there, writer), return_exceptions=True)

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}", move


# Another kind of server


@pytest.mark.parametrize("make", [redis_broker, redis_store])
async def test_a_cluster_is_refused_at_opening(
    cluster_member: tuple[str, tuple[str, ...]], make: Callable[[str], RedisBroker | RedisStateStore]
) -> None:
    url, options = cluster_member
    with redis_process(*options):
        await until(lambda: answers(url))

        with pytest.raises(ComponentError, match="is a cluster"):
            async with make(url):
                pass


async def test_a_cluster_that_comes_later_is_never_published_to(cluster_member: tuple[str, tuple[str, ...]]) -> None:
    url, options = cluster_member
    async with redis_broker(url) as broker:
        with redis_process(*options):
            await until(lambda: answers(url))
            outcome = await publish(broker)

    assert isinstance(outcome, Unreachable)
    assert "is a cluster" in outcome.reason


async def answers(url: str) -> bool:
    try:
        return bool(redis.Redis.from_url(url).ping())
    except redis.ConnectionError:
        return False
