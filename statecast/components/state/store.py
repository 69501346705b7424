"""The seam of a state store. A backend is written from these docstrings and proven by `components.testing`."""

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

from statecast.components.state.commit import Commit, ETag, Item
from statecast.components.state.directory import Directory
from statecast.components.state.log import OutboxLog


class StateStore(Protocol):
    """Transactional state, its outbox log and its actor claims, behind one commit.

    `async with` connects, brings the schema up to date and starts the sweeping of expired rows; leaving ends all of
    it. A call outside of that raises StoreUnavailable. After a lost connection the next call connects again.
    """

    @property
    def log(self) -> OutboxLog:
        """The log that this store's commits write their records to; it belongs to (app id, component name)."""
        ...

    @property
    def directory(self) -> Directory: ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    async def get(self, key: str) -> Item | None:
        """Read the live value at `key`; None where there is none or it has expired by the database's clock.

        Raises StoreUnavailable, CorruptState, and InvalidRequest for a key that has no UTF-8.
        """
        ...

    async def bulk_get(self, keys: Sequence[str]) -> list[Item | None]:
        """Read several keys in one round trip: one answer per key asked for, in that order, repeats included."""
        ...

    async def transact(self, commit: Commit) -> tuple[ETag | None, ...]:
        """Apply everything in `commit` or nothing, in one round trip.

        In this order: no mark may be set already, guards must hold, every condition (etags, first-write, checks)
        must hold in the state before the commit; an expired value counts as absent, judged by the database's clock
        at the moment of the check, under the lock. Then the operations take effect as if done one after the other,
        one version step per key, each mark is set for its time and the records are appended to the log in their
        order. What is equal to no etag is a mismatch, however malformed; an etag of `""` is none.

        The first rule broken is the one that is raised, in whatever order a backend finds out. The mark comes first
        because a commit that is repeated after OutcomeUnknown must learn that it happened (Duplicate), although its
        own first application has moved the etags it asks for, or its claim was taken over since. Only what no state
        can meet (two etags expected of one key) may be an ETagMismatch without asking.

        Returns for each operation the etag that its key has after the commit, None where the key is then absent
        (or, for a check, was). A commit of nothing is `()` and needs no round trip; one of marks, guards or records
        alone is a commit like any other.

        Raises Fenced, ETagMismatch, Duplicate, CorruptState, InvalidRequest, StoreUnavailable: then nothing was
        written; and OutcomeUnknown, when the connection broke or the time ran out after the commit was sent. A key
        or a record that has no UTF-8 is an InvalidRequest. A time to live may reach beyond the calendar.

        Cancelled while it is still queued, the commit is withdrawn. Cancelled once it is sent, it waits for the
        outcome, 2 s at most, before CancelledError goes on. It is never sent twice.
        """
        ...
