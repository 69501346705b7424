"""Opening connections with the settings that this store wants of a session."""

import asyncio
import os
from datetime import timedelta

import asyncpg

from statecast.components.state.postgresql.config import PostgresqlConfig
from statecast.errors import ComponentError, StatecastError, StoreUnavailable

# What another try cannot get past, as it is about the component: the password, the role, the database, the schema.
_CONFIGURED_WRONG = frozenset({"28P01", "28000", "3D000", "3F000", "42501"})

# PgBouncer's words, with the SQLSTATE that it has for everything.
_NO_PARAMETERS = "unsupported startup parameter"

OPENING_FAILURES = (OSError, TimeoutError, ValueError, asyncpg.PostgresError, asyncpg.InterfaceError)
"""What `failure_at_opening` translates."""

# The server ends a statement a little before its caller gives up: then its outcome is known.
_SERVER_SHARE = 0.9

# Each statement of the commit function must see what was committed while the one before it waited.
_ISOLATION = "read committed"

PLANNING = {
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "jit": "off",
}
"""The settings of all sessions for the planner.

A plan is made once and kept for as long as the connection, also one that was made while a table was small. So none may
read all of a table, and what is asked for is joined to a table by looking each up in an index.
"""

_ARRAYS = ("boolean", "smallint", "integer", "bigint", "float8", "text", "bytea", "uuid", "timestamptz")


async def connect(config: PostgresqlConfig, *, application: str, timeout: float | None = None) -> asyncpg.Connection:
    """Open a connection within `timeout` seconds; raises what the driver raises, without an address that is secret."""
    seconds = config.timeout.total_seconds() if timeout is None else timeout
    try:
        return await _connect(config, application, seconds)
    except OSError as error:
        if config.stand_in is None:
            raise
        raise ConnectionError(f"no connection to {config.stand_in}: {type(error).__name__}") from None


async def _connect(config: PostgresqlConfig, application: str, seconds: float) -> asyncpg.Connection:
    if config.is_pooled:
        async with asyncio.timeout(seconds):
            return await _connect_to_pooler(config, application, seconds)
    return await asyncpg.connect(
        config.url,
        timeout=seconds,
        server_settings={
            "application_name": application,
            "statement_timeout": str(_server_milliseconds(config)),
            "default_transaction_isolation": _ISOLATION,
            **PLANNING,
        },
    )


def require_files(config: PostgresqlConfig) -> None:
    """Raise ComponentError where a file is not there that the driver will read: it would not say which."""
    for path, name in config.files.items():
        if not os.access(path, os.R_OK):
            raise ComponentError(f"the file of {name} cannot be read")


def settings_of_statement(config: PostgresqlConfig) -> str:
    """Give what follows the SELECT of a statement so that it has its settings for itself, where none can be had for
    the whole connection: `` from set_config('jit', 'off', true) as jit, …``; nothing where the connection has them."""
    if not config.is_pooled:
        return ""
    # A time for the whole statement would count from the next one on.
    settings = {**PLANNING, "lock_timeout": str(_server_milliseconds(config))}
    return " from " + ", ".join(f"set_config('{name}', '{value}', true) as {name}" for name, value in settings.items())


async def _connect_to_pooler(config: PostgresqlConfig, application: str, timeout: float) -> asyncpg.Connection:
    """Open a connection that leaves nothing behind in those of the server: no prepared statement, no setting."""
    connection = await asyncpg.connect(
        config.url, timeout=timeout, statement_cache_size=0, server_settings={"application_name": application}
    )
    try:
        async with connection.transaction():
            # Types that the driver does not know it looks up with `jit` off, and sets that back: on the same
            # connection only inside a transaction.
            await connection.fetch(f"select {', '.join(f'null::{name}[]' for name in _ARRAYS)}")
            isolation = await connection.fetchval("select current_setting('transaction_isolation')")
        if isolation != _ISOLATION:
            raise ComponentError(
                f"with pooled the role or the database must have default_transaction_isolation {_ISOLATION!r}; "
                f"it is {isolation!r}"
            )
    except BaseException:
        connection.terminate()
        raise
    return connection


def _server_milliseconds(config: PostgresqlConfig) -> int:
    return config.timeout * _SERVER_SHARE // timedelta(milliseconds=1)


def failure_at_opening(error: Exception) -> StatecastError:
    """Tell apart what the component says wrong from a server that is away."""
    if isinstance(error, asyncpg.PostgresError) and error.sqlstate in _CONFIGURED_WRONG:
        return ComponentError(f"{error} (SQLSTATE {error.sqlstate})")
    if isinstance(error, asyncpg.PostgresError) and _NO_PARAMETERS in str(error):
        return ComponentError(f'{error}: behind PgBouncer in transaction mode give pooled: "true"')
    if isinstance(error, asyncpg.InterfaceError):
        return ComponentError(f"the connection string does not work: {error}")
    if isinstance(error, ValueError):
        # Python's own text quotes a value.
        return ComponentError("the connection string does not work")
    return StoreUnavailable(f"{error or type(error).__name__}")
