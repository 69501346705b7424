"""The metadata of a `state.sqlite` component, parsed."""

import logging
import os
import re
from dataclasses import dataclass
from datetime import timedelta
from urllib.parse import parse_qsl, quote, unquote, urlencode

from statecast.components.manifest import Component
from statecast.components.metadata import STATE_FIELDS, MetadataReader, is_truthy

logger = logging.getLogger(__name__)

_IDENTIFIER = re.compile(r"[A-Za-z0-9_]+")
_PRAGMA = re.compile(r"\s*(\w+)\s*(?:\(\s*([\w.+-]+)\s*\)|=\s*([\w.+-]+))?\s*", re.ASCII)

# dapr common/authentication/sqlite/metadata.go: these three follow from other fields.
_FORBIDDEN_PRAGMAS = frozenset({"busy_timeout", "journal_mode", "foreign_keys"})

# Options of the Go driver: our transactions always begin immediate, and our times are text.
_DRIVER_OPTIONS = frozenset({"_pragma", "_txlock", "_time_format"})


@dataclass(frozen=True, slots=True, repr=False)
class SqliteConfig:
    """`uri` is what SQLite opens; `location` is how messages name it; `path` is None where there is no file.

    It has no `repr`, for any of it may come from a secret. A `busy_timeout` of nothing does not wait at all.
    """

    uri: str
    location: str
    path: str | None
    uses_wal: bool
    pragmas: tuple[tuple[str, str | None], ...]
    timeout: timedelta
    busy_timeout: timedelta
    table: str
    metadata_table: str
    cleanup_interval: timedelta | None

    @property
    def is_in_memory(self) -> bool:
        return self.path is None


def parse_config(component: Component) -> SqliteConfig:
    """Read the component's metadata. Raises ComponentError, which names the field."""
    reader = MetadataReader(component, STATE_FIELDS)
    connection = reader.text("connectionString", aliases=("url",))
    if connection is None:
        raise reader.error("connectionString", "is required: missing connection string")
    name, _, query = connection.partition("?")
    options = parse_qsl(query, keep_blank_values=True)
    path = _path_of(name, dict(options))
    stand_in = reader.stand_in("connectionString") or reader.stand_in("url")
    disables_wal = reader.boolean("disableWAL")
    table = _identifier(reader, "tableName", "state")
    metadata_table = _identifier(reader, "metadataTableName", "metadata")
    if table.lower() == metadata_table.lower():
        raise reader.error("metadataTableName", "must not be the table of the state")
    # dapr's default is no sweeping at all, which lets a table of short-lived values grow for ever.
    cleanup_interval = reader.duration(
        "cleanupInterval", aliases=("cleanupIntervalInSeconds",), default=timedelta(hours=1)
    )
    config = SqliteConfig(
        uri=_uri(path, options),
        location=stand_in or path or ":memory:",
        path=path,
        uses_wal=path is not None and not disables_wal and not _is_read_only(dict(options)),
        pragmas=tuple(_pragma(reader, text) for option, text in options if option == "_pragma"),
        timeout=reader.duration(
            "timeout",
            aliases=("timeoutInSeconds",),
            default=timedelta(seconds=20),
            minimum=timedelta(seconds=1),
        ),
        busy_timeout=max(reader.duration("busyTimeout", default=timedelta(seconds=2)), timedelta(0)),
        table=table,
        metadata_table=metadata_table,
        cleanup_interval=cleanup_interval if cleanup_interval > timedelta(0) else None,
    )
    reader.finish()
    return config


def _path_of(name: str, options: dict[str, str]) -> str | None:
    # dapr common/authentication/sqlite/metadata.go: this is how it tells an in-memory database.
    if name.lower().startswith((":memory:", "file::memory:")) or options.get("mode") == "memory":
        return None
    if not name.lower().startswith("file:"):
        return os.path.abspath(name)
    # https://www.sqlite.org/uri.html §3.1: file:data.db, file:/data.db, file:///data.db, file://localhost/data.db
    rest = re.sub(r"^//(localhost)?(?=/)", "", name[len("file:") :])
    return os.path.abspath(unquote(rest.partition("#")[0]))


def _uri(path: str | None, options: list[tuple[str, str]]) -> str:
    if path is None:
        return ":memory:"
    for option, _ in options:
        if option.startswith("_") and option not in _DRIVER_OPTIONS:
            logger.warning("SQLite connection string: option %r is not known and has no effect", option)
    # A cache shared between connections would let a reader see a transaction before it is committed.
    passed_on = [(name, value) for name, value in options if not name.startswith("_") and name != "cache"]
    return f"file:{quote(path)}" + (f"?{urlencode(passed_on, quote_via=quote)}" if passed_on else "")


def _is_read_only(options: dict[str, str]) -> bool:
    return options.get("mode") == "ro" or is_truthy(options.get("immutable", ""))


def _pragma(reader: MetadataReader, text: str) -> tuple[str, str | None]:
    match = _PRAGMA.fullmatch(text)
    if match is None:
        raise reader.error("connectionString", "has an option '_pragma' that is not `name(value)`")
    name = match[1].lower()
    if name in _FORBIDDEN_PRAGMAS:
        raise reader.error("connectionString", f"is refused: found forbidden option '_pragma={name}' in it")
    return name, match[2] or match[3]


def _identifier(reader: MetadataReader, field: str, default: str) -> str:
    name = reader.text(field) or default
    if not _IDENTIFIER.fullmatch(name):
        raise reader.error(field, "is an invalid identifier: it takes ASCII letters, digits and underscores")
    if name.lower().startswith(("sqlite_", "statecast_")):
        raise reader.error(field, "must not begin with `sqlite_` or `statecast_`")
    return name
