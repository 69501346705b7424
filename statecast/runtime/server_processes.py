"""Servers as processes of this machine."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from statecast.runtime import server_guard
from statecast.runtime.ports import free_port, is_port_free
from statecast.runtime.server import Keeping, Server, ServerFailed, ServerKind
from statecast.runtime.server_answers import NoAnswer, ask_version
from statecast.runtime.server_guard import family, find_process, signal_all
from statecast.runtime.server_installations import Installation, plain_environment

_START_SECONDS = 60.0
_STOP_SECONDS = 20.0


class LocalServer:
    """A server process in a folder of its own, on a port of 127.0.0.1 that it keeps over restarts.

    It ends when this Python process does, in whatever way, unless it was detached.
    """

    def __init__(self, installation: Installation, folder: Path, port: int, keeping: Keeping) -> None:
        self._installation = installation
        self._folder = folder
        self._port = port
        self._keeping = keeping
        self._starter = os.getpid()
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._version = ""

    @classmethod
    def start(
        cls, installation: Installation, keeping: Keeping, *, folder: Path | None = None, port: int | None = None
    ) -> "LocalServer":
        """Start a server, by default in a new temporary folder on a random port, and return when it answers.

        Raises ServerFailed; then nothing is left of it.
        """
        home = _new_folder(installation.kind) if folder is None else folder
        server = cls(installation, home, free_port() if port is None else port, keeping)
        try:
            installation.prepare(home)
            server.restart()
        except BaseException:
            server.close()
            raise
        return server

    @property
    def kind(self) -> ServerKind:
        return self._installation.kind

    @property
    def address(self) -> str:
        return self._installation.address(self._port)

    @property
    def pid(self) -> int:
        """The server's first process; raises ServerFailed while it does not run."""
        if self._process is None:
            raise ServerFailed(f"{self.kind} at {self.address} is not running")
        return self._process.pid

    @property
    def folder(self) -> Path:
        return self._folder

    @property
    def stop_signal(self) -> signal.Signals:
        return self._installation.stop_signal

    def describe(self) -> Server:
        return Server(self.kind, self._version, f"local process, {self._installation.place}", self.address)

    def kill(self) -> None:
        if self._process is None:
            return
        _kill_family(self._process.pid)
        self._forget_process()

    def freeze(self) -> None:
        signal_all(family(self.pid), signal.SIGSTOP)

    def thaw(self) -> None:
        signal_all(family(self.pid), signal.SIGCONT)

    def restart(self) -> None:
        if self._process is not None:
            stop_family(self._process.pid, self.stop_signal)
            self._forget_process()
        self._spawn()
        self._wait_until_ready()

    def close(self) -> None:
        # A forked child has this object too, but the server is not the child's to end.
        if os.getpid() != self._starter:
            return
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def detach(self) -> None:
        """Let the server outlive this process, which from now on can only leave it alone."""
        self._dismiss_guard()
        self._process = None

    def _spawn(self) -> None:
        # Asked for its version, another server on this port would pass for ours.
        if not is_port_free(self._port):
            raise ServerFailed(f"port {self._port} of 127.0.0.1 is taken, {self.kind} cannot start there")
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._installation.command(self._folder, self._port, self._keeping),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._folder,
                env=plain_environment(),
                start_new_session=True,
            )
        self._guard = _start_guard(self._process.pid, self._folder)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while not self._is_ready():
            if self._process is None or self._process.poll() is not None:
                raise ServerFailed(f"{self.kind} ended while it started:\n{self._log_end()}")
            if time.monotonic() > deadline:
                raise ServerFailed(f"{self.kind} did not answer within {_START_SECONDS:.0f} s:\n{self._log_end()}")
            time.sleep(0.02)

    def _is_ready(self) -> bool:
        try:
            self._version = ask_version(self.kind, self.address, timeout=2.0)
        except NoAnswer:
            return False
        return self._process is not None and self._process.poll() is None

    def _forget_process(self) -> None:
        if self._process is not None:
            self._process.wait()
        self._process = None
        self._dismiss_guard()

    def _dismiss_guard(self) -> None:
        if self._guard is not None:
            self._guard.communicate(b".")
        self._guard = None

    def _log_end(self) -> str:
        return "\n".join((self._folder / "log").read_text(errors="replace").splitlines()[-15:])


def stop_family(pid: int, number: signal.Signals) -> None:
    """End the process in good order by its stop signal; after 20 s it is killed, with all its descendants."""
    signal_all(family(pid), signal.SIGCONT)
    signal_all([pid], number)
    _wait_until_gone([pid])
    _kill_family(pid)


def _kill_family(pid: int) -> None:
    members = family(pid)
    signal_all(members, signal.SIGKILL)
    _wait_until_gone(members)


def _wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + _STOP_SECONDS
    while any(find_process(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.005)


def _new_folder(kind: ServerKind) -> Path:
    return Path(tempfile.mkdtemp(prefix=f"statecast-{kind}-"))


def _start_guard(pid: int, folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-I", "-S", server_guard.__file__, str(pid), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )
