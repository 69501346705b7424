"""Free ports of 127.0.0.1 for servers that are started here."""

import random
import socket


def free_port() -> int:
    """Return a free port of 127.0.0.1 below those that outgoing connections take, so that a restart finds it free."""
    while True:
        port = random.randrange(15_000, 32_000)
        if is_port_free(port):
            return port


def is_port_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
