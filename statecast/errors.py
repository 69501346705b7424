"""What can go wrong, as one tree: each kind tells the caller what to do next.

StatecastError
├── ComponentError      mend the component file: it names file, document, field and what is expected
├── InvalidRequest      mend the call; nothing was written
├── NotSupported        this build or this server cannot do that; nothing was written
├── ETagMismatch        read again, then decide again; nothing was written
├── Fenced              a newer claim exists: stop acting for this actor; nothing was written
├── Duplicate           it happened before under the same mark; nothing was written now
├── StoreUnavailable    try again later: it is proven that nothing was written
├── OutcomeUnknown      it may have been written: repeat the same commit with the same mark
├── CorruptState        the store holds something at this key that is not a state value; nothing was written
└── PublishFailed       the broker did not take the message
"""

from collections.abc import Sequence


class StatecastError(Exception):
    """The root: `except StatecastError` catches everything this package raises on purpose."""


class ComponentError(StatecastError):
    """A component cannot be loaded or opened as it is written."""


class InvalidRequest(StatecastError):
    """The call itself is wrong; the message names the value and the rule."""


class NotSupported(StatecastError):
    """What was asked for is not there, in this version or on this server."""


class ETagMismatch(StatecastError):
    """`key` does not have the etag that was expected; `expected` is None where the key had to be absent."""

    def __init__(self, key: str, expected: str | None) -> None:
        self.key = key
        self.expected = expected
        super().__init__(
            f"{key!r} exists already" if expected is None else f"{key!r} does not have etag {expected!r} (any more)"
        )


class Fenced(StatecastError):
    """The claim on actor (`type`, `id`) that a commit was guarded by does not hold any more."""

    def __init__(self, type: str, id: str) -> None:
        self.type = type
        self.id = id
        super().__init__(f"the claim on actor {type!r} {id!r} was taken over or released")


class Duplicate(StatecastError):
    """A mark of the commit was set before and has not expired: the commit it came with was applied.

    `etags` is what that commit was answered, one for each of its operations; None where it is not known any more.
    """

    def __init__(self, digest: bytes, etags: Sequence[str | None] | None = None) -> None:
        self.digest = digest
        self.etags = None if etags is None else tuple(etags)
        super().__init__(f"a commit with mark {digest.hex()} was applied before")


class StoreUnavailable(StatecastError):
    """The store could not be reached, or said no, before anything was written."""


class OutcomeUnknown(StatecastError):
    """The connection broke, or the time ran out, after a commit was sent and before its answer came."""


class CorruptState(StatecastError):
    """The value at `key` is of a kind that no state store writes."""

    def __init__(self, key: str, reason: str) -> None:
        self.key = key
        self.reason = reason
        super().__init__(f"{key!r} holds {reason}, which is not a state value")


class PublishFailed(StatecastError):
    """A message that was published directly (not through the outbox) did not reach the broker for certain."""

    def __init__(self, topic: str, reasons: Sequence[str]) -> None:
        self.topic = topic
        self.reasons = tuple(reasons)
        super().__init__(f"publishing to topic {topic!r} failed: {'; '.join(reasons)}")
