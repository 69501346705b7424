"""Ask a server over its own protocol whether it is ready and which version it is.

Written by hand, without the drivers: those belong to the backends, and need not be installed to start a server.
"""

import base64
import hashlib
import hmac
import secrets
import socket
import ssl
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import SplitResult, unquote, urlsplit

from statecast.runtime.server import ServerFailed, ServerKind

_METADATA_RELEASES = {21: "3.9", 25: "4.0", 27: "4.1"}  # the last metadata.version level of a Kafka release


class NoAnswer(ServerFailed):
    """The server at this address did not answer as one that is ready would."""


def ask_version(kind: ServerKind, address: str, *, timeout: float = 5.0) -> str:
    """Return the version of the server at `address`, which must be ready for use; raises NoAnswer.

    Kafka tells only its feature level: `"4.1"`, or `"metadata.version 30"` for a release newer than we know.
    """
    try:
        match kind:
            case ServerKind.POSTGRESQL:
                with _PostgresqlConnection.open(address, timeout) as connection:
                    return connection.parameters["server_version"].split()[0]
            case ServerKind.REDIS:
                return _ask_redis(address, timeout)
            case ServerKind.KAFKA:
                return _ask_kafka(address, timeout)
    except (OSError, EOFError, KeyError, ValueError, IndexError, struct.error) as error:
        raise NoAnswer(f"{kind} at {without_password(address)} does not answer: {error!r}") from error


def run_sql(url: str, statement: str, *, timeout: float = 60.0) -> None:
    """Run one statement that returns nothing of interest, in autocommit; raises NoAnswer with the server's words."""
    try:
        with _PostgresqlConnection.open(url, timeout) as connection:
            connection.execute(statement)
    except (OSError, EOFError) as error:
        raise NoAnswer(f"postgresql at {without_password(url)} broke off: {error!r}") from error


def run_redis(url: str, *words: str, timeout: float = 5.0) -> str:
    """Run one command and return its reply as text; raises NoAnswer with the server's words."""
    try:
        with _redis_connection(url, timeout) as connection:
            return connection.call(*words)
    except (OSError, EOFError) as error:
        raise NoAnswer(f"redis at {without_password(url)} broke off: {error!r}") from error


def without_password(address: str) -> str:
    if "@" not in address:
        return address
    parts = urlsplit(address)
    user = "" if parts.username is None else parts.username
    return parts._replace(netloc=f"{user}@{_host_and_port(parts)}").geturl()


def _host_and_port(parts: SplitResult) -> str:
    return parts.netloc.rpartition("@")[2]


# PostgreSQL documentation, "Frontend/Backend Protocol"


class _PostgresqlConnection:
    def __init__(self, connection: socket.socket) -> None:
        self._stream = connection.makefile("rb")
        self._connection = connection
        self.parameters: dict[str, str] = {}

    @classmethod
    @contextmanager
    def open(cls, url: str, timeout: float) -> Iterator["_PostgresqlConnection"]:
        parts = urlsplit(url)
        user = unquote(parts.username or "postgres")
        database = unquote(parts.path.lstrip("/")) or user
        with socket.create_connection((parts.hostname or "127.0.0.1", parts.port or 5432), timeout) as connection:
            session = cls(connection)
            session._start(user, unquote(parts.password or ""), database)
            yield session

    def execute(self, statement: str) -> None:
        self._send(b"Q", statement.encode() + b"\0")
        self._read_until_ready("")

    def _start(self, user: str, password: str, database: str) -> None:
        words = ["user", user, "database", database, "application_name", "statecast servers", ""]
        body = struct.pack("!i", 196608) + b"".join(word.encode() + b"\0" for word in words)
        self._connection.sendall(struct.pack("!i", len(body) + 4) + body)
        self._read_until_ready(password)

    def _send(self, kind: bytes, body: bytes) -> None:
        self._connection.sendall(kind + struct.pack("!i", len(body) + 4) + body)

    def _receive(self) -> tuple[bytes, bytes]:
        kind, size = struct.unpack("!ci", _read_exactly(self._stream.read, 5))
        return kind, _read_exactly(self._stream.read, size - 4)

    def _read_until_ready(self, password: str) -> None:
        refusal = None
        while True:
            match self._receive():
                case b"E", body:
                    refusal = _error_text(body)
                    if not self.parameters:
                        raise NoAnswer(f"postgresql refused the connection: {refusal}")
                case b"S", body:
                    name, value = body.decode().split("\0")[:2]
                    self.parameters[name] = value
                case b"R", body:
                    self._authenticate(body, password)
                case b"Z", _:
                    break
        if refusal is not None:
            raise NoAnswer(f"postgresql refused: {refusal}")

    def _authenticate(self, request: bytes, password: str) -> None:
        match struct.unpack("!i", request[:4])[0]:
            case 0 | 12:
                pass
            case 3:
                self._send(b"p", password.encode() + b"\0")
            case 10:
                self._authenticate_scram(password)
            case method:
                raise NoAnswer(f"postgresql asks for authentication method {method}: use scram-sha-256 or trust")

    def _authenticate_scram(self, password: str) -> None:
        # RFC 5802 §3 and RFC 7677; the user name of the startup message counts, so `n=` stays empty
        nonce = secrets.token_urlsafe(18)
        hello = f"n=,r={nonce}"
        first = f"n,,{hello}".encode()
        self._send(b"p", b"SCRAM-SHA-256\0" + struct.pack("!i", len(first)) + first)
        kind, body = self._receive()
        if kind != b"R":
            raise NoAnswer(f"postgresql refused the password: {_error_text(body)}")
        challenge = body[4:].decode()
        fields = dict(part.split("=", 1) for part in challenge.split(","))
        final = f"c=biws,r={fields['r']}"
        signed = f"{hello},{challenge},{final}".encode()
        salted = hashlib.pbkdf2_hmac("sha256", password.encode(), base64.b64decode(fields["s"]), int(fields["i"]))
        client_key = hmac.digest(salted, b"Client Key", "sha256")
        signature = hmac.digest(hashlib.sha256(client_key).digest(), signed, "sha256")
        proof = bytes(left ^ right for left, right in zip(client_key, signature, strict=True))
        self._send(b"p", f"{final},p={base64.b64encode(proof).decode()}".encode())


def _error_text(body: bytes) -> str:
    fields = {part[:1]: part[1:].decode(errors="replace") for part in body.split(b"\0") if part}
    return f"{fields.get(b'C', '')} {fields.get(b'M', '')}".strip()


# Redis documentation, "Redis serialization protocol specification" (RESP2)


class _RedisConnection:
    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._stream = connection.makefile("rb")

    def call(self, *words: str) -> str:
        encoded = [word.encode() for word in words]
        request = b"*%d\r\n" % len(encoded) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in encoded)
        self._connection.sendall(request)
        line = self._stream.readline()
        if not line.endswith(b"\r\n"):
            raise EOFError("closed by the server")
        match line[:1]:
            case b"-":
                raise NoAnswer(f"redis refused {words[0]}: {line[1:].decode().strip()}")
            case b"$" if int(line[1:]) >= 0:
                return _read_exactly(self._stream.read, int(line[1:]) + 2)[:-2].decode()
            case _:
                return line[1:].decode().strip()


@contextmanager
def _redis_connection(url: str, timeout: float) -> Iterator[_RedisConnection]:
    parts = urlsplit(url)
    host = parts.hostname or "127.0.0.1"
    with socket.create_connection((host, parts.port or 6379), timeout) as plain:
        secured = (
            ssl.create_default_context().wrap_socket(plain, server_hostname=host) if parts.scheme == "rediss" else plain
        )
        connection = _RedisConnection(secured)
        if parts.password:
            connection.call("AUTH", unquote(parts.username or "default"), unquote(parts.password))
        if parts.path.strip("/"):
            connection.call("SELECT", parts.path.strip("/"))
        yield connection


def _ask_redis(url: str, timeout: float) -> str:
    with _redis_connection(url, timeout) as connection:
        connection.call("PING")
        information = connection.call("INFO", "server")
    facts = dict(line.split(":", 1) for line in information.splitlines() if ":" in line)
    if "valkey_version" in facts:
        return f"{facts['redis_version']} (Valkey {facts['valkey_version']})"
    return facts["redis_version"]


# Kafka documentation, "Protocol"


def _ask_kafka(bootstrap: str, timeout: float) -> str:
    host, _, port = bootstrap.split(",")[0].rpartition(":")
    with socket.create_connection((host, int(port)), timeout) as connection:
        level = _metadata_level(_kafka_request(connection, _API_VERSIONS_V3))
        _require_brokers(_kafka_request(connection, _METADATA_V4))
    return _METADATA_RELEASES.get(level, f"metadata.version {level}")


_CLIENT = b"statecast"
_NAME = struct.pack("!h", len(_CLIENT)) + _CLIENT
_API_VERSIONS_V3 = (
    struct.pack("!hhi", 18, 3, 1) + _NAME + b"\0" + bytes([len(_CLIENT) + 1]) + _CLIENT + b"\x02" + b"0" + b"\0"
)
_METADATA_V4 = struct.pack("!hhi", 3, 4, 2) + _NAME + struct.pack("!i?", 0, False)


def _kafka_request(connection: socket.socket, request: bytes) -> "_KafkaReader":
    connection.sendall(struct.pack("!i", len(request)) + request)
    size = struct.unpack("!i", _read_exactly(connection.recv, 4))[0]
    return _KafkaReader(_read_exactly(connection.recv, size)[4:])


class _KafkaReader:
    def __init__(self, body: bytes) -> None:
        self._body = body
        self._at = 0

    def take(self, size: int) -> bytes:
        self._at += size
        if self._at > len(self._body):
            raise EOFError("the answer ends early")
        return self._body[self._at - size : self._at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big", signed=True)

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    def skip_tags(self) -> None:
        for _ in range(self.varint()):
            self.varint()
            self.take(self.varint())


def _metadata_level(answer: _KafkaReader) -> int:
    if code := answer.number(2):
        raise ValueError(f"ApiVersions was refused with error {code}")
    for _ in range(answer.varint() - 1):
        answer.take(6)
        answer.skip_tags()
    answer.take(4)
    for _ in range(answer.varint()):
        tag, field = answer.varint(), _KafkaReader(answer.take(answer.varint()))
        if tag == 2:  # FinalizedFeatures
            return _feature_levels(field).get("metadata.version", 0)
    return 0


def _feature_levels(field: _KafkaReader) -> dict[str, int]:
    levels = {}
    for _ in range(field.varint() - 1):
        name = field.take(field.varint() - 1).decode()
        levels[name] = field.number(2)
        field.take(2)
        field.skip_tags()
    return levels


def _require_brokers(answer: _KafkaReader) -> None:
    # A broker that is still fenced by the controller answers ApiVersions, but is not yet in the cluster's metadata.
    answer.take(4)
    if answer.number(4) < 1:
        raise ValueError("the cluster has no live broker yet")


def _read_exactly(read: Callable[[int], bytes], size: int) -> bytes:
    body = b""
    while len(body) < size:
        part = read(size - len(body))
        if not part:
            raise EOFError("closed by the server")
        body += part
    return body
