"""Certificates that tests make for themselves."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from statecast.runtime.servers import ServerMissing
from tests.components.going_without import go_without


@dataclass(frozen=True, slots=True)
class Certificate:
    """A key and its own certificate, as PEM text and in one file."""

    path: Path
    key: str
    certificate: str


def make_certificate(folder: Path) -> Certificate:
    """Make a new one for 127.0.0.1."""
    if shutil.which("openssl") is None:
        go_without(ServerMissing("no openssl: apt-get install openssl"))
    pem = folder / "both.pem"
    wanted = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "-", *wanted],
        capture_output=True,
        check=True,
    )
    pem.write_bytes(made.stdout)
    key, begin, body = made.stdout.decode().partition("-----BEGIN CERTIFICATE-----")
    return Certificate(pem, key, begin + body)
