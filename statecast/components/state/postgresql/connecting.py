"""Opening connections with the settings that this store wants of a session."""

from datetime import timedelta

import asyncpg

from statecast.components.state.postgresql.config import PostgresqlConfig
from statecast.errors import ComponentError, StatecastError, StoreUnavailable

# What another try cannot get past, as it is about the component: the password, the role, the database, the schema.
_CONFIGURED_WRONG = frozenset({"28P01", "28000", "3D000", "3F000", "42501"})

OPENING_FAILURES = (OSError, TimeoutError, ValueError, ComponentError, asyncpg.PostgresError, asyncpg.InterfaceError)
"""What `failure_at_opening` translates."""

# The server ends a statement a little before its caller gives up: then its outcome is known.
_SERVER_SHARE = 0.9


async def connect(config: PostgresqlConfig, *, application: str, timeout: float | None = None) -> asyncpg.Connection:
    """Open a connection within `timeout` seconds; raises what the driver raises."""
    statement_timeout = config.timeout * _SERVER_SHARE // timedelta(milliseconds=1)
    return await asyncpg.connect(
        config.url,
        timeout=config.timeout.total_seconds() if timeout is None else timeout,
        server_settings={
            "application_name": application,
            "statement_timeout": str(statement_timeout),
            # Each statement of the commit function must see what was committed while the one before it waited.
            "default_transaction_isolation": "read committed",
            # A plan made while a table was small is kept for as long as the connection; it must not read it all.
            "enable_seqscan": "off",
            "jit": "off",
        },
    )


def failure_at_opening(error: Exception) -> StatecastError:
    """Tell apart what the component says wrong from a server that is away."""
    if isinstance(error, StatecastError):
        return error
    if isinstance(error, asyncpg.PostgresError) and error.sqlstate in _CONFIGURED_WRONG:
        return ComponentError(f"{error} (SQLSTATE {error.sqlstate})")
    if isinstance(error, asyncpg.InterfaceError | ValueError):
        return ComponentError(f"the connection string does not work: {error}")
    return StoreUnavailable(f"{error or type(error).__name__}")
