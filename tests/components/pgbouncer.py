"""A PgBouncer in transaction mode before a PostgreSQL server, for tests."""

import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from statecast.runtime.server import Keeping, ServerKind, ServerMissing
from statecast.runtime.server_processes import LocalServer

SERVER_CONNECTIONS = 6
"""So many connections of the server's all the pooler's clients share: fewer than one store would open by itself."""

_NOBODY = 65534


def start_pgbouncer(upstream: str) -> LocalServer:
    """Start one for all databases of the server at the URL `upstream`; raises ServerMissing without a binary."""
    binary = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if binary is None:
        raise ServerMissing("no PgBouncer: apt-get install pgbouncer")
    return LocalServer.start(_Pgbouncer(Path(binary), upstream), Keeping())


@dataclass(frozen=True, slots=True)
class _Pgbouncer:
    """To its clients it is a PostgreSQL server, so it is started and asked like one."""

    binary: Path
    upstream: str
    kind: ServerKind = ServerKind.POSTGRESQL
    stop_signal: signal.Signals = signal.SIGTERM

    @property
    def place(self) -> str:
        return str(self.binary)

    def address(self, port: int) -> str:
        return f"postgresql://postgres@127.0.0.1:{port}/postgres"

    def prepare(self, folder: Path) -> None:
        pass

    def command(self, folder: Path, port: int, keeping: Keeping) -> list[str]:
        server = urlsplit(self.upstream)
        settings = {
            "listen_addr": "127.0.0.1",
            "listen_port": port,
            "unix_socket_dir": "",
            "auth_type": "any",
            "pool_mode": "transaction",
            "default_pool_size": SERVER_CONNECTIONS,
            "max_client_conn": 500,
            # Each transaction gets the connection that was idle for longest: seldom the one that the last one had.
            "server_round_robin": 1,
        }
        lines = [
            "[databases]",
            f"* = host={server.hostname} port={server.port} user={server.username}",
            "[pgbouncer]",
            *(f"{name} = {value}" for name, value in settings.items()),
        ]
        (folder / "pgbouncer.ini").write_text("\n".join(lines))
        return [*_as_nobody(), str(self.binary), "-q", f"{folder}/pgbouncer.ini"]


def _as_nobody() -> list[str]:
    # It refuses to run as root.
    if os.geteuid() != 0:
        return []
    return ["unshare", f"--map-user={_NOBODY}", f"--map-group={_NOBODY}", "--"]
