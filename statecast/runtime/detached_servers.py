"""Servers that outlive the command that started them, and the file that remembers them.

They keep their data from `up` to `down`, and are gone with it when the machine stops.
"""

import fcntl
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import msgspec

from statecast.runtime.ports import free_port, is_port_free
from statecast.runtime.server import Keeping, Server, ServerFailed, ServerKind, Variant
from statecast.runtime.server_answers import NoAnswer, ask_version
from statecast.runtime.server_containers import ContainerServer, find_image, is_container_running, remove_container
from statecast.runtime.server_guard import find_process
from statecast.runtime.server_processes import LocalServer, stop_family
from statecast.runtime.servers import find_means

_USUAL_PORTS = {ServerKind.POSTGRESQL: 5432, ServerKind.REDIS: 6379, ServerKind.KAFKA: 9092}
_KEEPING = Keeping(after_kill=True, durable=True)


class Condition(StrEnum):
    RUNNING = "running"
    SILENT = "does not answer"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class ProcessMark:
    """A process that can be told from a later one with its pid."""

    pid: int
    started: str
    stop_signal: str
    folder: str


@dataclass(frozen=True, slots=True)
class DetachedServer:
    """A server as the file remembers it; it runs as `process` or in the container with the id `container`."""

    server: Server
    process: ProcessMark | None = None
    container: str | None = None

    def condition(self) -> Condition:
        if not self._runs():
            return Condition.ENDED
        try:
            ask_version(self.server.kind, self.server.address, timeout=2.0)
        except NoAnswer:
            return Condition.SILENT
        return Condition.RUNNING

    def end(self) -> None:
        """End the server, if it is still this one that runs, and remove its data."""
        if self.container is not None:
            remove_container(self.container)
        if self.process is not None:
            if self._runs():
                stop_family(self.process.pid, signal.Signals[self.process.stop_signal])
            shutil.rmtree(self.process.folder, ignore_errors=True)

    def _runs(self) -> bool:
        if self.container is not None:
            return is_container_running(self.container)
        if self.process is None:
            return False
        found = find_process(self.process.pid)
        return found is not None and found.started == self.process.started


class DetachedServers:
    """The detached servers of this user. Two commands at once take turns."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._environment = environment
        state_home = environment.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        self._folder = Path(state_home, "statecast")
        self._file = self._folder / "servers.json"

    def up(self, kinds: Sequence[ServerKind]) -> Iterator[DetachedServer]:
        """Yield each kind's server as it answers; one that runs already is left as it is.

        Raises ServerMissing or ServerFailed; what was started before that goes on running.
        """
        with self._turn():
            for kind in kinds:
                yield self._find_running(kind) or self._start(kind)

    def down(self, kinds: Sequence[ServerKind]) -> list[DetachedServer]:
        """End the servers of these kinds, remove their data, and return what there was to end."""
        with self._turn():
            ended = [known for known in self._read() if known.server.kind in kinds]
            for known in ended:
                known.end()
                self._forget(known.server.kind)
            return ended

    def known(self) -> list[DetachedServer]:
        """Return what `up` started and `down` has not ended, whether it still runs or not."""
        return self._read()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "servers.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _find_running(self, kind: ServerKind) -> DetachedServer | None:
        for known in self._read():
            if known.server.kind is not kind:
                continue
            match known.condition():
                case Condition.RUNNING:
                    return known
                case Condition.SILENT:
                    raise ServerFailed(f"{kind} at {known.server.address} runs but does not answer: end it with `down`")
                case Condition.ENDED:
                    known.end()
        return None

    def _start(self, kind: ServerKind) -> DetachedServer:
        usual = _USUAL_PORTS[kind]
        port = usual if is_port_free(usual) else free_port()
        means = find_means(kind, Variant.CURRENT, self._environment)
        if means is None:
            return self._start_container(kind, port)
        folder = Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=self._folder))
        server = LocalServer.start(means, _KEEPING, folder=folder, port=port)
        known = DetachedServer(server.describe(), process=_mark(server))
        # Only now: until it is remembered, the server has to end with this command.
        self._remember(known)
        server.detach()
        return known

    def _start_container(self, kind: ServerKind, port: int) -> DetachedServer:
        server = ContainerServer.start(find_image(kind, Variant.CURRENT), _KEEPING, port=port, outliving=True)
        known = DetachedServer(server.describe(), container=server.container_id)
        self._remember(known)
        return known

    def _remember(self, known: DetachedServer) -> None:
        self._write([*(other for other in self._read() if other.server.kind != known.server.kind), known])

    def _forget(self, kind: ServerKind) -> None:
        self._write([known for known in self._read() if known.server.kind != kind])

    def _read(self) -> list[DetachedServer]:
        try:
            return msgspec.json.decode(self._file.read_bytes(), type=list[DetachedServer])
        except FileNotFoundError:
            return []
        except msgspec.DecodeError as error:
            raise ServerFailed(
                f"{self._file} cannot be read ({error}): end its servers by hand and remove it"
            ) from error

    def _write(self, known: Sequence[DetachedServer]) -> None:
        draft = self._file.with_suffix(".draft")
        draft.write_bytes(msgspec.json.format(msgspec.json.encode(known)))
        draft.replace(self._file)


def _mark(server: LocalServer) -> ProcessMark:
    process = find_process(server.pid)
    if process is None:
        raise ServerFailed(f"{server.kind} ended right after its start")
    return ProcessMark(process.pid, process.started, server.stop_signal.name, str(server.folder))
