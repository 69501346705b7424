"""The metadata of a `state.postgresql` component, version v2, parsed."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from statecast.components.manifest import Component, describe
from statecast.components.metadata import STATE_FIELDS, MetadataReader
from statecast.errors import ComponentError

_URL = re.compile(r"postgres(ql)?://", re.IGNORECASE)
_KEYWORD_PAIR = re.compile(r"\s*([A-Za-z_]\w*)\s*=\s*(?:'((?:[^'\\]|\\.)*)'|((?:[^\s'\\]|\\.)*))(?=\s|$)", re.DOTALL)
_NAME = r"[A-Za-z_][A-Za-z0-9_$]*"
_PREFIX = re.compile(rf"(?:(?P<schema>{_NAME})\.)?(?P<name>{_NAME})?")
_TABLE = re.compile(rf"(?:(?P<schema>{_NAME})\.)?(?P<name>{_NAME})")
# PostgreSQL cuts identifiers at 63 bytes; the longest that is made from a prefix adds less than 33 to it.
_LONGEST_PREFIX = 30

# Pool and protocol settings of pgx and connection settings of libpq that asyncpg would hand to the server, which
# refuses what it does not know.
_NOT_FOR_THE_SERVER = frozenset(
    {
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


@dataclass(frozen=True, slots=True)
class PostgresqlConfig:
    """`url` is what the driver is given, kept out of `repr` since it may hold a password.

    `cleanup_interval` None means that nothing is swept here. The name of `table_prefix` may be empty.
    `groups_commits` tells whether commits that wait together go in one call, `is_pooled` that what is connected to is
    PgBouncer in transaction mode: each transaction may be on another connection of the server's.
    """

    url: str = field(repr=False)
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
        url=_driver_url(settings),
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


def _connection_settings(reader: MetadataReader) -> dict[str, str]:
    text = reader.text("connectionString", aliases=("url",))
    try:
        settings = parse_connection_string(text or "")
    except ValueError as error:
        raise reader.error("connectionString", f"cannot be read: {error}") from None
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
            settings[keyword] = value
    if not settings:
        raise reader.error("connectionString", "is required, or host, database, user and password in its place")
    return settings


def _parse_url(text: str) -> dict[str, str]:
    parts = urlsplit(text)
    credentials, _, hosts = parts.netloc.rpartition("@")
    user, _, password = credentials.partition(":")
    named = {
        "user": unquote(user),
        "password": unquote(password),
        "host": unquote(hosts),
        "dbname": unquote(parts.path.removeprefix("/")),
    }
    settings = {keyword: value for keyword, value in named.items() if value}
    query = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
    if "database" in query:
        query["dbname"] = query.pop("database")
    return settings | query


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


def _driver_url(settings: Mapping[str, str]) -> str:
    known = {
        keyword: value
        for keyword, value in settings.items()
        if keyword not in _NOT_FOR_THE_SERVER and not keyword.startswith("pool_") and value
    }
    address = known.pop("hostaddr", None)
    if address is not None:
        known["host"] = f"[{address}]" if ":" in address else address
    return f"postgresql://?{urlencode(known, quote_via=quote)}"


def _pool_size(settings: Mapping[str, str], reader: MetadataReader) -> int:
    size = settings.get("pool_max_conns", "16")  # pgx's own spelling, inside the connection string
    if not size.isdecimal() or int(size) < 1:
        raise reader.error("connectionString", "has a pool_max_conns that is no whole number, 1 or more")
    return int(size)


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
