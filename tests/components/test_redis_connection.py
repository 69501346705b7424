"""The way to a server: one that leads nowhere, TLS, and the address that sentinels tell."""

import asyncio
import ssl
import subprocess
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis

from statecast.clock import SystemClock
from statecast.components.address import Address
from statecast.components.manifest import Component
from statecast.components.redis.connection import Connection, NotSent, connect
from statecast.components.redis.pipeline import Pipeline
from statecast.components.redis.settings import RedisSettings
from statecast.components.state.commit import Commit, Upsert
from statecast.components.state.redis.state import RedisStateStore
from statecast.components.testing.deadline import until
from statecast.errors import ComponentError, StatecastError, StoreUnavailable
from statecast.runtime.servers import PrivateServer, ServerKind
from tests.components.certificates import Certificate, make_certificate
from tests.components.redis_processes import free_port, redis_process

StartServer = Callable[[ServerKind], PrivateServer]


def redis_store(**metadata: str) -> RedisStateStore:
    return RedisStateStore(
        Component("statestore", "state.redis", metadata=metadata), app_id="orders", clock=SystemClock()
    )


async def is_written(store: RedisStateStore) -> bool:
    try:
        await store.transact(Commit((Upsert("orders||1", b"1"),)))
    except StatecastError:
        return False
    return True


# Ways that end


async def test_who_waited_for_the_end_of_a_connection_may_have_been_cancelled(redis_url: str) -> None:
    lost: list[Connection] = []
    settings = RedisSettings(Address("127.0.0.1", urlsplit(redis_url).port or 0))
    connection = await connect(settings, on_lost=lost.append, on_writable=lambda: None)
    waiting = asyncio.create_task(connection.lost.wait())
    await asyncio.sleep(0)
    waiting.cancel()

    connection.abort("the test is over")
    await connection.lost.wait()

    assert waiting.cancelled()
    assert lost == [connection]


async def test_a_connection_that_fails_for_a_reason_not_thought_of_fails_who_waits_for_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with asyncio.timeout(10), Pipeline(RedisSettings(Address("redis..example", 6379))) as pipeline:
        outcomes = await asyncio.gather(*(pipeline.command("PING") for _ in range(3)), return_exceptions=True)

    assert [type(outcome) for outcome in outcomes] == [NotSent] * 3
    assert "UnicodeError" in str(outcomes[0])
    assert "redis..example" in caplog.text


# TLS


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    return make_certificate(tmp_path)


@asynccontextmanager
async def tls_in_front_of(url: str, context: ssl.SSLContext) -> AsyncIterator[int]:
    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection(urlsplit(url).hostname, urlsplit(url).port)
        await asyncio.gather(pass_on(reader, upstream_writer), pass_on(upstream_reader, writer), return_exceptions=True)

    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context) as server:
        yield server.sockets[0].getsockname()[1]


async def test_with_tls_the_server_is_verified_unless_told_otherwise(redis_url: str, certificate: Certificate) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate.path)
    async with tls_in_front_of(redis_url, context) as port:
        metadata = {
            "redisHost": f"127.0.0.1:{port}",
            "redisDB": urlsplit(redis_url).path.strip("/"),
            "enableTLS": "true",
        }

        async with redis_store(**metadata, insecureSkipTLSVerify="true") as store:
            assert await is_written(store)
        with pytest.raises(StoreUnavailable, match=r"certificate|CERTIFICATE"):
            async with redis_store(**metadata):
                pass


async def test_with_tls_the_client_shows_its_certificate(redis_url: str, certificate: Certificate) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(certificate.path))
    context.load_cert_chain(certificate.path)
    context.verify_mode = ssl.CERT_REQUIRED
    async with tls_in_front_of(redis_url, context) as port:
        metadata = {
            "redisHost": f"127.0.0.1:{port}",
            "redisDB": urlsplit(redis_url).path.strip("/"),
            "enableTLS": "true",
            "insecureSkipTLSVerify": "true",
        }

        async with redis_store(**metadata, clientKey=certificate.key, clientCert=certificate.certificate) as store:
            assert await is_written(store)
        with pytest.raises(StoreUnavailable):
            async with redis_store(**metadata):
                pass


def test_a_key_that_is_encrypted_is_refused_and_nobody_is_asked_for_its_password(certificate: Certificate) -> None:
    encrypted = subprocess.run(
        ["openssl", "pkey", "-aes256", "-passout", "pass:s3cr3t"],
        input=certificate.key.encode(),
        capture_output=True,
        check=True,
    ).stdout.decode()

    with pytest.raises(ComponentError, match="clientKey and clientCert must be a matching pair in PEM, not encrypted"):
        redis_store(enableTLS="true", clientKey=encrypted, clientCert=certificate.certificate)


# Messages


async def test_a_host_from_a_secret_is_in_no_error() -> None:
    component = Component(
        "statestore", "state.redis", metadata={"redisHost": "127.0.0.1:1"}, secret_fields=frozenset({"redishost"})
    )

    with pytest.raises(StoreUnavailable) as failure:
        async with RedisStateStore(component, app_id="orders", clock=SystemClock()):
            raise AssertionError("it opened")

    assert str(failure.value) == "no connection to <redisHost>: ConnectionRefusedError"
    assert "127.0.0.1" not in "".join(traceback.format_exception(failure.value))


# Sentinels


@pytest.fixture
def start_sentinel(tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """Start a sentinel that watches the server at a URL as `mymaster`; it tells its own address."""
    running = ExitStack()

    def start(url: str) -> str:
        port = free_port()
        settings = tmp_path / f"sentinel-{port}.conf"
        settings.write_text(
            f"port {port}\nbind 127.0.0.1\ndir {tmp_path}\n"
            f"sentinel monitor mymaster 127.0.0.1 {urlsplit(url).port} 1\n"
            "sentinel down-after-milliseconds mymaster 200\nsentinel failover-timeout mymaster 1000\n"
        )
        running.enter_context(redis_process(str(settings), "--sentinel"))
        return f"127.0.0.1:{port}"

    with running:
        yield start


def run(url: str, *words: str | int) -> Any:
    return redis.Redis.from_url(url).execute_command(*words)  # type: ignore[no-untyped-call]


async def test_the_sentinels_tell_the_master_also_after_it_changed(
    private_server: StartServer, start_sentinel: Callable[[str], str]
) -> None:
    first, second = private_server(ServerKind.REDIS), private_server(ServerKind.REDIS)
    run(first.address, "CONFIG", "SET", "repl-diskless-sync-delay", "0")
    run(second.address, "REPLICAOF", "127.0.0.1", urlsplit(first.address).port or 0)
    sentinel = start_sentinel(first.address)
    gone = f"127.0.0.1:{free_port()}"
    await until(lambda: _knows_replica(sentinel))

    async with redis_store(redisHost=f"{gone},{sentinel}", failover="true", sentinelMasterName="mymaster") as store:
        before = await is_written(store)
        await asyncio.to_thread(first.kill)
        await until(lambda: is_written(store))

    assert before
    assert run(second.address, "HGET", "orders||1", "data") == b"1"


async def _knows_replica(sentinel: str) -> bool:
    try:
        master = run(f"redis://{sentinel}", "INFO", "sentinel")["master0"]
    except (redis.ConnectionError, KeyError):
        return False
    return int(master["slaves"]) == 1


async def test_a_master_that_no_sentinel_knows_is_named(
    private_server: StartServer, start_sentinel: Callable[[str], str]
) -> None:
    sentinel = start_sentinel(private_server(ServerKind.REDIS).address)
    await until(lambda: _answers(sentinel))

    with pytest.raises(StoreUnavailable, match="'othermaster'"):
        async with redis_store(redisHost=sentinel, failover="true", sentinelMasterName="othermaster"):
            pass


async def test_a_master_that_was_demoted_is_not_taken_though_a_sentinel_tells_it(
    private_server: StartServer, start_sentinel: Callable[[str], str]
) -> None:
    server = private_server(ServerKind.REDIS)
    sentinel = start_sentinel(server.address)
    await until(lambda: _answers(sentinel))
    run(server.address, "REPLICAOF", "127.0.0.1", "1")

    with pytest.raises(StoreUnavailable, match="not the master"):
        async with redis_store(redisHost=sentinel, failover="true", sentinelMasterName="mymaster"):
            pass


async def _answers(sentinel: str) -> bool:
    try:
        return bool(run(f"redis://{sentinel}", "PING"))
    except redis.ConnectionError:
        return False
