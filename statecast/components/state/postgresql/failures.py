"""What the driver raises, read as what the caller can do: the one place where asyncpg's errors are translated."""

import asyncpg

from statecast.errors import InvalidRequest, OutcomeUnknown, StatecastError, StoreUnavailable

_TRY_AGAIN = frozenset(
    {
        "40001",  # serialization_failure
        "40P01",  # deadlock_detected
        "55P03",  # lock_not_available
        "53200",  # out_of_memory: the lock table is full
        "SC001",  # a first write that another program's write came before
        "26000",  # the prepared statement is gone: a pooler between us and the server changed hands
    }
)
_READ_ONLY = "25006"
# Data exceptions, limits of the server, and constraints and triggers that users have put on the tables.
_INVALID = ("22", "23", "44", "54", "P0")


class Contended(StoreUnavailable):
    """The server rolled the statement back for something that another try is likely to get past."""


def is_clean(error: BaseException) -> bool:
    """Tell whether the connection is good for the next statement after `error`."""
    if isinstance(error, asyncpg.PostgresError):
        return _is_rolled_back(error) and error.sqlstate not in (_READ_ONLY, "26000")
    return isinstance(error, asyncpg.DataError)


def translate(error: BaseException, *, is_sent: bool) -> StatecastError:
    """Make one of our errors of `error`; `is_sent` tells whether a write was under way to the server."""
    if isinstance(error, StatecastError):
        return error
    if isinstance(error, asyncpg.DataError):
        return InvalidRequest(str(error))
    if isinstance(error, asyncpg.PostgresError) and _is_rolled_back(error):
        return _refused(error)
    if is_sent:
        return OutcomeUnknown(f"no answer came to what was sent: {_told(error)}")
    return StoreUnavailable(_told(error))


def _is_rolled_back(error: asyncpg.PostgresError) -> bool:
    # Errors that asyncpg makes itself, of a connection that broke, have no severity. FATAL proves nothing: it may
    # come after the commit.
    return getattr(error, "severity_en", None) == "ERROR"


def _refused(error: asyncpg.PostgresError) -> StatecastError:
    state = error.sqlstate or ""
    if state in _TRY_AGAIN:
        return Contended(_told(error))
    if state.startswith(_INVALID):
        return InvalidRequest(_told(error))
    return StoreUnavailable(_told(error))


def _told(error: BaseException) -> str:
    state = getattr(error, "sqlstate", None)
    return f"{str(error) or type(error).__name__}{f' (SQLSTATE {state})' if state else ''}"
