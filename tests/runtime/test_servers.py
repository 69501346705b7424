"""Starting real servers: where they come from, what they survive, and that none is left behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import asyncpg
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from redis.asyncio import Redis

from statecast.runtime.ports import free_port
from statecast.runtime.server import Keeping, PrivateServer, ServerFailed, ServerKind, ServerMissing, Variant
from statecast.runtime.server_answers import NoAnswer, ask_version, run_redis, run_sql
from statecast.runtime.server_guard import family, find_process
from statecast.runtime.server_installations import find_installation
from statecast.runtime.server_processes import LocalServer
from statecast.runtime.servers import ADDRESS_VARIABLES, Servers
from tests.components.going_without import go_without

StartServer = Callable[[ServerKind], PrivateServer]

_KINDS = list(ServerKind)
_LOCAL = {"STATECAST_TEST_SERVERS": "local"}


class BrokenInstallation:
    kind = ServerKind.REDIS
    place = "nowhere"
    stop_signal = signal.SIGTERM

    def address(self, port: int) -> str:
        return f"redis://127.0.0.1:{port}/0"

    def prepare(self, folder: Path) -> None:
        pass

    def command(self, folder: Path, port: int, keeping: Keeping) -> list[str]:
        return ["sh", "-c", "echo cannot go on >&2; exit 1"]


@pytest.fixture
def local_server() -> Iterator[Callable[[ServerKind], LocalServer]]:
    started: list[LocalServer] = []

    def start(kind: ServerKind) -> LocalServer:
        try:
            installation = find_installation(kind, Variant.CURRENT)
        except ServerMissing as missing:
            go_without(missing)
        started.append(LocalServer.start(installation, Keeping(after_kill=True)))
        return started[-1]

    yield start
    for server in started:
        server.close()


def _unused_address(kind: ServerKind) -> str:
    scheme = "" if kind is ServerKind.KAFKA else f"{kind}://"
    return f"{scheme}127.0.0.1:{free_port()}"


def _wait_until(fact: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)


def _answers(server: PrivateServer) -> bool:
    try:
        ask_version(server.kind, server.address, timeout=0.5)
    except NoAnswer:
        return False
    return True


class TestGivenAddresses:
    @pytest.mark.parametrize("kind", _KINDS)
    def test_one_that_does_not_answer_is_an_error_and_never_a_reason_to_start_another(self, kind: ServerKind) -> None:
        variable = ADDRESS_VARIABLES[kind]

        with (
            Servers(environment=_LOCAL | {variable: _unused_address(kind)}) as servers,
            pytest.raises(ServerFailed, match=f"{variable} is set, but {kind} at .* does not answer"),
        ):
            servers.get(kind)

        assert servers.used == {}

    def test_one_that_speaks_another_protocol_is_an_error(self, private_server: StartServer) -> None:
        redis = private_server(ServerKind.REDIS)
        as_kafka = redis.address.removeprefix("redis://").removesuffix("/0")

        with pytest.raises(NoAnswer):
            ask_version(ServerKind.KAFKA, as_kafka, timeout=1)

    def test_one_that_answers_is_used_as_it_is(self, private_server: StartServer) -> None:
        redis = private_server(ServerKind.REDIS)

        with Servers(environment={"STATECAST_TEST_REDIS_URL": redis.address}) as servers:
            given = servers.get(ServerKind.REDIS)

        assert given.address == redis.address
        assert given.version == redis.describe().version
        assert given.origin == "given by STATECAST_TEST_REDIS_URL"
        assert _answers(redis)

    def test_a_wrong_password_is_an_error_that_does_not_show_it(self, private_server: StartServer) -> None:
        redis = private_server(ServerKind.REDIS)
        run_redis(redis.address, "CONFIG", "SET", "requirepass", "right")
        host = redis.address.removeprefix("redis://")

        assert ask_version(ServerKind.REDIS, f"redis://:right@{host}") == redis.describe().version
        with pytest.raises(ServerFailed) as refused:
            ask_version(ServerKind.REDIS, f"redis://:s3cret@{host}")

        assert "s3cret" not in str(refused.value)

    def test_postgresql_is_asked_with_its_password_by_scram(
        self, local_server: Callable[[ServerKind], LocalServer]
    ) -> None:
        server = local_server(ServerKind.POSTGRESQL)
        run_sql(server.address, "CREATE ROLE tester LOGIN PASSWORD 'r!ght'")
        rules = "host all postgres 127.0.0.1/32 trust\nhost all tester 127.0.0.1/32 scram-sha-256\n"
        (server.folder / "data" / "pg_hba.conf").write_text(rules)
        server.restart()
        host = server.address.removeprefix("postgresql://postgres@")

        assert ask_version(ServerKind.POSTGRESQL, f"postgresql://tester:r%21ght@{host}") == server.describe().version
        with pytest.raises(NoAnswer, match="28P01"):
            ask_version(ServerKind.POSTGRESQL, f"postgresql://tester:wrong@{host}")


class TestChoice:
    def test_an_unknown_word_is_an_error(self) -> None:
        with (
            Servers(environment={"STATECAST_TEST_SERVERS": "podman"}) as servers,
            pytest.raises(ServerFailed, match="'podman'; it can be local or docker"),
        ):
            servers.get(ServerKind.REDIS)

    def test_docker_alone_without_an_engine_is_said_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("statecast.runtime.servers.why_no_docker", lambda: "no Docker engine answers")

        with (
            Servers(environment={"STATECAST_TEST_SERVERS": "docker"}) as servers,
            pytest.raises(ServerMissing, match="STATECAST_TEST_SERVERS is docker, but no Docker engine answers"),
        ):
            servers.get(ServerKind.REDIS)

    def test_what_cannot_be_had_is_told_with_the_ways_to_get_it(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("PATH", "")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

        with Servers(environment=_LOCAL) as servers, pytest.raises(ServerMissing) as missing:
            servers.get(ServerKind.KAFKA)

        for way in ("STATECAST_TEST_KAFKA_BOOTSTRAP", "Docker", "apt-get install openjdk"):
            assert way in str(missing.value)

    def test_a_kind_is_started_once_and_shared(self) -> None:
        with Servers() as servers:
            first = servers.get(ServerKind.REDIS)
            second = servers.get(ServerKind.REDIS)

        assert first is second
        assert servers.used == {(ServerKind.REDIS, Variant.CURRENT): first}


class TestPrivateServers:
    @pytest.mark.parametrize("kind", _KINDS)
    def test_a_frozen_one_is_silent_until_it_is_thawed(self, private_server: StartServer, kind: ServerKind) -> None:
        server = private_server(kind)

        server.freeze()
        answered_while_frozen = _answers(server)
        server.thaw()

        assert not answered_while_frozen
        _wait_until(lambda: _answers(server))

    def test_a_killed_one_leaves_no_process(self, local_server: Callable[[ServerKind], LocalServer]) -> None:
        server = local_server(ServerKind.POSTGRESQL)
        members = family(server.pid)

        server.kill()
        server.kill()

        assert len(members) > 1
        assert [pid for pid in members if find_process(pid)] == []

    async def test_postgresql_keeps_its_data_over_kill_and_restart(self, private_server: StartServer) -> None:
        server = private_server(ServerKind.POSTGRESQL)
        run_sql(server.address, "CREATE TABLE kept AS SELECT 7 AS value")

        server.kill()
        server.restart()

        connection = await asyncpg.connect(server.address)
        value = await connection.fetchval("SELECT value FROM kept")
        await connection.close()
        assert value == 7

    async def test_redis_keeps_its_data_over_kill_and_restart(self, private_server: StartServer) -> None:
        server = private_server(ServerKind.REDIS)
        async with Redis.from_url(server.address) as redis:
            await redis.set("kept", "7")

        server.kill()
        server.restart()

        async with Redis.from_url(server.address) as redis:
            assert await redis.get("kept") == b"7"

    async def test_kafka_keeps_its_data_over_kill_and_restart(self, private_server: StartServer) -> None:
        server = private_server(ServerKind.KAFKA)
        async with AIOKafkaProducer(bootstrap_servers=server.address, acks="all") as producer:
            await producer.send_and_wait("kept", b"7")

        server.kill()
        server.restart()

        async with AIOKafkaConsumer("kept", bootstrap_servers=server.address, auto_offset_reset="earliest") as consumer:
            message = await consumer.getone()
        assert message.value == b"7"

    @pytest.mark.parametrize("kind", _KINDS)
    def test_one_that_runs_is_restarted_at_the_same_address(
        self, private_server: StartServer, kind: ServerKind
    ) -> None:
        server = private_server(kind)
        address = server.address

        server.restart()

        assert server.address == address
        assert _answers(server)

    @pytest.mark.parametrize(("durable", "fsync"), [(False, "off"), (True, "on")])
    async def test_only_durable_postgresql_waits_for_the_disk(
        self, servers: Servers, *, durable: bool, fsync: str
    ) -> None:
        server = servers.private(ServerKind.POSTGRESQL, durable=durable)

        connection = await asyncpg.connect(server.address)
        setting = await connection.fetchval("SHOW fsync")

        await connection.close()
        server.close()
        assert setting == fsync


class TestNothingLeftBehind:
    def test_closing_ends_the_processes_and_removes_their_data(
        self, local_server: Callable[[ServerKind], LocalServer]
    ) -> None:
        server = local_server(ServerKind.REDIS)
        pid = server.pid

        server.close()
        server.close()

        assert find_process(pid) is None
        assert not server.folder.exists()

    def test_a_server_outlives_the_thread_that_started_it(
        self, local_server: Callable[[ServerKind], LocalServer]
    ) -> None:
        servers: list[LocalServer] = []
        thread = threading.Thread(target=lambda: servers.append(local_server(ServerKind.REDIS)))

        thread.start()
        thread.join()

        assert _answers(servers[0])

    @pytest.mark.parametrize("kind", [ServerKind.REDIS, ServerKind.POSTGRESQL])
    @pytest.mark.parametrize("frozen", [False, True])
    def test_a_killed_run_takes_its_servers_and_their_data_with_it(self, kind: ServerKind, *, frozen: bool) -> None:
        with subprocess.Popen(
            [sys.executable, "-c", _RUN, kind, str(frozen)], stdout=subprocess.PIPE, text=True, env=os.environ | _LOCAL
        ) as run:
            assert run.stdout is not None
            pid, folder = run.stdout.readline().split()
            members = family(int(pid))
            assert all(find_process(member) for member in members)

            run.send_signal(signal.SIGKILL)

            _wait_until(lambda: not any(find_process(member) for member in members))
            _wait_until(lambda: not Path(folder).exists())

    def test_a_taken_port_is_an_error_and_never_another_server_mistaken_for_ours(
        self, local_server: Callable[[ServerKind], LocalServer], tmp_path: Path
    ) -> None:
        other = local_server(ServerKind.REDIS)
        port = int(other.address.rpartition(":")[2].removesuffix("/0"))
        folder = tmp_path / "second"
        folder.mkdir()

        with pytest.raises(ServerFailed, match=f"port {port} of 127.0.0.1 is taken"):
            LocalServer.start(find_installation(ServerKind.REDIS, Variant.CURRENT), Keeping(), folder=folder, port=port)

        assert not folder.exists()
        assert _answers(other)

    def test_a_start_that_fails_leaves_nothing_and_tells_the_log(self, tmp_path: Path) -> None:
        folder = tmp_path / "broken"
        folder.mkdir()

        with pytest.raises(ServerFailed, match="redis ended while it started:\ncannot go on"):
            LocalServer.start(BrokenInstallation(), Keeping(), folder=folder)

        assert not folder.exists()


def test_the_drivers_and_testcontainers_are_not_needed_to_import_it() -> None:
    names = "{'asyncpg', 'redis', 'aiokafka', 'docker', 'testcontainers'}"

    done = subprocess.run(
        [sys.executable, "-c", f"import statecast.runtime.servers, sys; print({names} & set(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout == "set()\n"


@pytest.mark.parametrize(("ci", "outcome"), [("", "1 skipped"), ("true", "1 error")])
def test_a_server_that_cannot_be_had_skips_its_tests_and_fails_them_on_ci(
    tmp_path: Path, ci: str, outcome: str
) -> None:
    chosen = [f"{Path(__file__).parent}/test_server_fixtures.py", "-k", "kafka", "-p", "no:cacheprovider"]
    environment = os.environ | _LOCAL | {"CI": ci, "PATH": "", "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("STATECAST_TEST_KAFKA_BOOTSTRAP", None)

    done = subprocess.run(
        [sys.executable, "-m", "pytest", *chosen], env=environment, capture_output=True, text=True, check=False
    )

    assert outcome in done.stdout
    assert "kafka: none; no kafka server: set STATECAST_TEST_KAFKA_BOOTSTRAP" in done.stdout


_RUN = """
import sys, time
from statecast.runtime.server import ServerKind
from statecast.runtime.servers import Servers

server = Servers().private(ServerKind(sys.argv[1]))
if sys.argv[2] == "True":
    server.freeze()
print(server.pid, server.folder, flush=True)
time.sleep(600)
"""
