"""The metadata of a `state.postgresql` component, version v2, parsed."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from statecast.components.address import Address, parse_address
from statecast.components.manifest import Component, describe
from statecast.components.metadata import STATE_FIELDS, MetadataReader
from statecast.errors import ComponentError

_URL = re.compile(r"postgres(ql)?://", re.IGNORECASE)
_KEYWORD_PAIR = re.compile(r"\s*([A-Za-z_]\w*)\s*=\s*(?:'((?:[^'\\]|\\.)*)'|((?:[^\s'\\]|\\.)*))(?=\s|$)", re.DOTALL)
_NAME = r"[A-Za-z_][A-Za-z0-9_$]*"
_PREFIX = re.compile(rf"(?:(?P<schema>{_NAME})\.)?(?P<name>{_NAME})?")
_TABLE = re.compile(rf"(?:(?P<schema>{_NAME})\.)?(?P<name>{_NAME})")
_PORT = re.compile(r"[0-9]{0,5}")
_DEFAULT_PORT = 5432
_POOL_SIZE = re.compile(r"[0-9]{1,9}")

_STRINGS = ("connectionString", "url")
_FORM = (
    "takes postgresql://user:password@host:port/database, where signs such as / ? # @ in a password are "
    "percent-encoded, or host=… port=… user=… password=… dbname=…"
)
# https://www.postgresql.org/docs/current/libpq-connect.html
_WORDS = {
    "sslmode": ("disable", "allow", "prefer", "require", "verify-ca", "verify-full"),
    "target_session_attrs": ("any", "primary", "standby", "read-write", "read-only", "prefer-standby"),
}
_FILES = ("sslrootcert", "sslcert", "sslkey", "sslcrl")

# PostgreSQL cuts identifiers at 63 bytes; the longest that is made from a prefix adds less than 33 to it.
_LONGEST_PREFIX = 30

# Pool and protocol settings of pgx and connection settings of libpq that asyncpg would hand to the server, which
# refuses what it does not know.
_NOT_FOR_THE_SERVER = frozenset(
    {
        "hostaddr",
        "connect_timeout",
        "default_query_exec_mode",
        "statement_cache_capacity",
        "description_cache_capacity",
        "fallback_application_name",
        "keepalives",
        "keepalives_idle",
        "keepalives_interval",
        "keepalives_count",
        "tcp_user_timeout",
        "channel_binding",
        "gssencmode",
        "sslcompression",
        "sslsni",
        "client_encoding",
    }
)


@dataclass(frozen=True, slots=True)
class QualifiedName:
    """A name as PostgreSQL would read it unquoted: folded to lower case. `schema` None leaves it to the search path."""

    schema: str | None
    name: str


class _Setting(NamedTuple):
    """One of libpq's settings, and the metadata field that it is from."""

    text: str
    field: str


@dataclass(frozen=True, slots=True)
class PostgresqlConfig:
    """`url` is what the driver is given, kept out of `repr` since it may hold a password. `files` are those that it
    reads when it connects, by path, with what messages call them; `stand_in` is what messages have in place of a
    server that is secret.

    `cleanup_interval` None means that nothing is swept here. The name of `table_prefix` may be empty.
    `groups_commits` tells whether commits that wait together go in one call, `is_pooled` that what is connected to is
    PgBouncer in transaction mode: each transaction may be on another connection of the server's.
    """

    url: str = field(repr=False)
    files: Mapping[str, str] = field(repr=False)
    stand_in: str | None
    timeout: timedelta
    cleanup_interval: timedelta | None
    table_prefix: QualifiedName
    metadata_table: QualifiedName
    connections: int
    groups_commits: bool
    is_pooled: bool


def read_config(component: Component) -> PostgresqlConfig:
    """Parse the metadata of `component`. Raises ComponentError, which names the field and what it takes."""
    reader = MetadataReader(component, STATE_FIELDS)
    if component.version in ("", "v1"):
        # An empty version is v1 in Dapr, a different table: taking it for v2 would hide the data that is there.
        raise ComponentError(
            f"{describe(component)}: version must be v2: the table layout of v1, which an empty version stands for, "
            "is not supported yet"
        )
    reader.unsupported(
        "connectionMaxIdleTime",
        "queryExecMode",
        "useAzureAD",
        "useAWSIAM",
        "awsRegion",
        "awsAccessKey",
        "awsSecretKey",
        "awsSessionToken",
        "awsIamRoleArn",
    )
    settings = _connection_settings(reader)
    cleanup_interval = reader.duration(
        "cleanupInterval", aliases=("cleanupIntervalInSeconds",), default=timedelta(hours=1)
    )
    config = PostgresqlConfig(
        url=_driver_url(settings, _servers(settings, reader)),
        files=_files(settings, reader),
        stand_in=_stand_in(settings, reader),
        timeout=reader.duration(
            "timeout", aliases=("timeoutInSeconds",), default=timedelta(seconds=20), minimum=timedelta(seconds=1)
        ),
        cleanup_interval=cleanup_interval if cleanup_interval > timedelta() else None,
        table_prefix=_prefix(reader),
        metadata_table=_table(reader),
        connections=reader.integer("maxConns", default=_pool_size(settings, reader), minimum=1),
        groups_commits=reader.boolean("statecastGroupCommit", default=True),
        is_pooled=reader.boolean("pooled"),
    )
    reader.finish()
    return config


def parse_connection_string(text: str) -> dict[str, str]:
    """Parse libpq's two forms, `postgresql://…` and `host=… user=…`, into keywords and values. Raises ValueError."""
    return _parse_url(text) if _URL.match(text) else _parse_keywords(text)


def _connection_settings(reader: MetadataReader) -> dict[str, _Setting]:
    string, url = map(reader.text, _STRINGS)
    source = "url" if string is None and url is not None else "connectionString"
    try:
        parsed = parse_connection_string(string or url or "")
    except ValueError:
        # Its text quotes what cannot be read, which may be a password.
        raise reader.error(source, _FORM) from None
    settings = {keyword: _Setting(value, source) for keyword, value in parsed.items() if value}
    for name, keyword in (
        ("host", "host"),
        ("hostaddr", "hostaddr"),
        ("port", "port"),
        ("database", "dbname"),
        ("user", "user"),
        ("password", "password"),
        ("sslRootCert", "sslrootcert"),
    ):
        if (value := reader.text(name)) is not None:
            settings[keyword] = _Setting(value, name)
    if not settings:
        raise reader.error(source, "is required, or host, database, user and password in its place")
    for keyword, words in _WORDS.items():
        if (setting := settings.get(keyword)) is not None and setting.text not in words:
            raise reader.error(setting.field, f"has {keyword}, which is one of {', '.join(words)}")
    return settings


def _parse_url(text: str) -> dict[str, str]:
    parts = urlsplit(text)
    if parts.fragment:
        raise ValueError("a connection string has no fragment")
    credentials, _, servers = parts.netloc.rpartition("@")
    user, _, password = credentials.partition(":")
    hosts, ports = zip(*(_split_port(each) for each in servers.split(",")), strict=True)
    named = {
        "user": unquote(user),
        "password": unquote(password),
        "host": unquote(",".join(hosts)),
        "port": ",".join(ports) if any(ports) else "",
        "dbname": unquote(parts.path.removeprefix("/")),
    }
    settings = {keyword: value for keyword, value in named.items() if value}
    query = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
    if "database" in query:
        query["dbname"] = query.pop("database")
    return settings | query


def _split_port(server: str) -> tuple[str, str]:
    host, colon, port = server.rpartition(":")
    return (host, port) if colon and not server.endswith("]") else (server, "")


def _parse_keywords(text: str) -> dict[str, str]:
    settings: dict[str, str] = {}
    at = 0
    while text[at:].strip():
        pair = _KEYWORD_PAIR.match(text, at)
        if pair is None:
            raise ValueError("it takes postgresql://user:password@host:port/database or host=… port=… user=…")
        keyword, quoted, bare = pair.groups()
        settings[keyword] = re.sub(r"\\(.)", r"\1", quoted if quoted is not None else bare, flags=re.DOTALL)
        at = pair.end()
    return settings


def _servers(settings: Mapping[str, _Setting], reader: MetadataReader) -> dict[str, str]:
    """Give hosts and ports as the driver takes them; what is not given it looks for in the environment."""
    ports = _ports(settings, reader)
    given = _hosts(settings)
    if given is None:
        return {"port": ",".join(map(str, ports))} if "port" in settings else {}
    hosts = given.text.split(",")
    try:
        servers = [_server(*each) for each in zip(hosts, ports * len(hosts) if len(ports) == 1 else ports, strict=True)]
    except ValueError:
        expectation = "takes a host, or several with commas between and as many ports, or one"
        raise _refused(given, expectation, reader, shows_value=False) from None
    known = {"host": ",".join(f"[{server.host}]" if ":" in server.host else server.host for server in servers)}
    if "port" in settings or any(server.port != _DEFAULT_PORT for server in servers):
        known["port"] = ",".join(str(server.port) for server in servers)
    return known


def _hosts(settings: Mapping[str, _Setting]) -> _Setting | None:
    return settings.get("hostaddr") or settings.get("host")


def _ports(settings: Mapping[str, _Setting], reader: MetadataReader) -> list[int]:
    given = settings.get("port", _Setting("", ""))
    texts = given.text.split(",")
    if not all(_PORT.fullmatch(text) and 0 < int(text or _DEFAULT_PORT) < 65536 for text in texts):
        raise _refused(given, "takes a port from 1 to 65535, or one for each host", reader)
    return [int(text or _DEFAULT_PORT) for text in texts]


def _server(host: str, port: int) -> Address:
    return Address(host, port) if host.startswith("/") else parse_address(host, port)


def _refused(
    setting: _Setting, expectation: str, reader: MetadataReader, *, shows_value: bool = True
) -> ComponentError:
    """Where a connection string breaks may be in the midst of its password, so of that the whole form is told."""
    is_string = setting.field in _STRINGS
    return reader.error(setting.field, _FORM if is_string else expectation, shows_value=shows_value)


def _files(settings: Mapping[str, _Setting], reader: MetadataReader) -> dict[str, str]:
    given = {keyword: settings[keyword] for keyword in _FILES if keyword in settings}
    return {
        setting.text: f"{keyword} {reader.stand_in(setting.field) or repr(setting.text)}"
        for keyword, setting in given.items()
    }


def _stand_in(settings: Mapping[str, _Setting], reader: MetadataReader) -> str | None:
    given = _hosts(settings)
    return None if given is None else reader.stand_in(given.field)


def _driver_url(settings: Mapping[str, _Setting], servers: Mapping[str, str]) -> str:
    known = {
        keyword: setting.text
        for keyword, setting in settings.items()
        if keyword not in _NOT_FOR_THE_SERVER and not keyword.startswith("pool_")
    }
    return f"postgresql://?{urlencode({**known, **servers}, quote_via=quote)}"


def _pool_size(settings: Mapping[str, _Setting], reader: MetadataReader) -> int:
    size = settings.get("pool_max_conns", _Setting("16", ""))  # pgx's own spelling, inside the connection string
    if not _POOL_SIZE.fullmatch(size.text) or int(size.text) < 1:
        raise reader.error(size.field, "has a pool_max_conns that is no whole number, 1 or more")
    return int(size.text)


def _prefix(reader: MetadataReader) -> QualifiedName:
    text = reader.text("tablePrefix", default="") or ""
    match = _PREFIX.fullmatch(text)
    if match is None or len(match["name"] or "") > _LONGEST_PREFIX:
        raise reader.error(
            "tablePrefix",
            f"takes up to {_LONGEST_PREFIX} letters, digits and underscores, if need be behind a schema and a dot",
        )
    return QualifiedName(_folded(match["schema"]), _folded(match["name"]) or "")


def _table(reader: MetadataReader) -> QualifiedName:
    text = reader.text("metadataTableName", default="dapr_metadata") or ""
    match = _TABLE.fullmatch(text)
    if match is None:
        raise reader.error("metadataTableName", "takes the name of a table, if need be behind a schema and a dot")
    return QualifiedName(_folded(match["schema"]), match["name"].lower())


def _folded(name: str | None) -> str | None:
    return None if name is None else name.lower()
