"""SQLite's errors in our words: the one place where they are translated."""

import apsw

from statecast.errors import InvalidRequest, StoreUnavailable

BREAKING = (apsw.IOError, apsw.CorruptError, apsw.NotADBError, apsw.CantOpenError)
"""After one of these the connection is not used again."""

ALL_ALIKE = (*BREAKING, apsw.BusyError, apsw.ReadOnlyError, StoreUnavailable)
"""These are no single job's fault, and trying each job by itself would only fail as often."""


def refused(error: Exception, location: str) -> Exception:
    """Translate an error of a statement whose effects were rolled back for certain."""
    match error:
        case UnicodeEncodeError():
            return InvalidRequest(f"{error.object!r} is no text that UTF-8 can hold")
        case apsw.TooBigError():
            return InvalidRequest(f"{location}: {error}")
        case apsw.Error():
            return StoreUnavailable(f"{location}: {error}")
        case StoreUnavailable():
            # Several callers may be told: each raises an error of its own.
            return StoreUnavailable(*error.args)
        case _:
            return error
