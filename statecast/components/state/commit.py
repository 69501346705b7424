"""The values of a commit: what one transaction hands a state store, and what it reads back.

Keys in here are full keys, as they stand in the database (`orders||order-1`). Strings compare by code point in
Python, which is the order of their UTF-8 bytes, so `sorted` gives the one lock order that all processes share.
"""

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from enum import Enum, StrEnum
from typing import Any, Final, NewType, TypeVar, cast

import msgspec
import orjson

from statecast.errors import ETagMismatch, InvalidRequest

T = TypeVar("T")

ETag = NewType("ETag", str)


class Concurrency(StrEnum):
    FIRST_WRITE = "first-write"
    LAST_WRITE = "last-write"


class Consistency(StrEnum):
    EVENTUAL = "eventual"
    STRONG = "strong"


class Item(msgspec.Struct, frozen=True, gc=False):
    """A stored value as read. `etag` is `""` only for a value without a version, which another program wrote."""

    key: str
    value: bytes
    etag: ETag
    expires_at: datetime | None = None

    def json(self) -> Any:
        """Parse the value as JSON. Raises ValueError when it is none."""
        return orjson.loads(self.value)

    def decode(self, type: type[T]) -> T:
        """Parse the value as JSON into `type`: a msgspec struct, a dataclass, a pydantic model, `dict[str, int]` ...

        Raises ValueError when the value does not fit.
        """
        validate = getattr(type, "model_validate_json", None)
        if validate is not None:
            return cast(T, validate(self.value))
        return msgspec.json.decode(self.value, type=type)


class Upsert(msgspec.Struct, frozen=True, gc=False):
    """Write `value` at `key`.

    `etag` given: only if the key has it now. `concurrency` first-write without an etag: only if the key is absent.
    `ttl` None: the value does not expire; an expiry that the old value had is gone. `is_binary` tells the layouts
    that keep JSON text and bytes apart (SQLite) which of the two it is; text must be UTF-8.
    `metadata` is the caller's own and means nothing to a store.
    """

    key: str
    value: bytes
    etag: ETag | None = None
    concurrency: Concurrency | None = None
    consistency: Consistency | None = None
    ttl: timedelta | None = None
    is_binary: bool = False
    metadata: Mapping[str, str] = msgspec.field(default_factory=dict)


class Delete(msgspec.Struct, frozen=True, gc=False):
    """Remove `key`; with an etag only if the key has it now. A key that is absent is no error without an etag."""

    key: str
    etag: ETag | None = None
    metadata: Mapping[str, str] = msgspec.field(default_factory=dict)


class Check(msgspec.Struct, frozen=True, gc=False):
    """A read that the commit depends on: `key` must still have `etag`, or still be absent where `etag` is None.

    An etag of `""` is an InvalidRequest: whether a value without a version has changed, nobody can tell.
    """

    key: str
    etag: ETag | None

    def __post_init__(self) -> None:
        if self.etag == "":
            raise InvalidRequest(f"a commit cannot depend on the value at {self.key!r}: it has no etag")


Operation = Upsert | Delete | Check


class OutboxRecord(msgspec.Struct, frozen=True, gc=False):
    """One event, rendered completely, that is written in the commit which it tells of.

    `order_key` decides the slice: records with the same one are relayed in commit order. `pubsub`, `topic`, `body`
    and `metadata` are what the broker is given (`{"partitionKey": "order-1"}`). `format` tells a later version how
    to read the row.
    """

    order_key: str
    event_id: str
    pubsub: str
    topic: str
    body: bytes
    metadata: Mapping[str, str] = msgspec.field(default_factory=dict)
    format: int = 1


class Mark(msgspec.Struct, frozen=True):
    """The fact "this was done": a 16-byte digest that the commit sets, and that refuses a second commit for `ttl`."""

    digest: bytes
    ttl: timedelta

    def __post_init__(self) -> None:
        if len(self.digest) != 16:
            raise InvalidRequest(f"a mark is a digest of 16 bytes, not of {len(self.digest)}")
        if self.ttl <= timedelta(0):
            raise InvalidRequest(f"a mark holds for some time, not for {self.ttl}")


class Guard(msgspec.Struct, frozen=True):
    """An actor claim that must still hold when the commit is applied; made by `Directory.claim`."""

    type: str
    id: str
    token: str


class Commit(msgspec.Struct, frozen=True, gc=False):
    """What one transaction hands the store: applied as a whole or not at all."""

    operations: tuple[Operation, ...]
    records: tuple[OutboxRecord, ...] = ()
    marks: tuple[Mark, ...] = ()
    guards: tuple[Guard, ...] = ()


class Absent(Enum):
    ABSENT = "absent"


ABSENT: Final = Absent.ABSENT


class KeyChange(msgspec.Struct, frozen=True):
    """All that a commit wants of one key: what must hold before, and the one write that is left (None: only check)."""

    key: str
    expected: ETag | Absent | None
    write: Upsert | Delete | None


def collapse(operations: Iterable[Operation]) -> list[KeyChange]:
    """Bring a commit's operations to one change per key, sorted by key.

    All conditions speak of the state before the commit, and the last write of a key is the one that stays. Raises
    ETagMismatch where two conditions on one key cannot both hold.
    """
    changes: dict[str, KeyChange] = {}
    for operation in operations:
        earlier = changes.get(operation.key)
        expected = _expected(operation)
        write = None if isinstance(operation, Check) else operation
        if earlier is not None:
            expected = _both(operation.key, earlier.expected, expected)
            write = write or earlier.write
        changes[operation.key] = KeyChange(operation.key, expected, write)
    return sorted(changes.values(), key=lambda change: change.key)


def etags_after(operations: Iterable[Operation], written: Mapping[str, ETag]) -> tuple[ETag | None, ...]:
    """Tell for each operation the etag that its key has after the commit; `written` are the etags of the upserts."""
    operations = tuple(operations)
    kept = {operation.key: operation.etag for operation in operations if isinstance(operation, Check)}
    kept |= {operation.key: None for operation in operations if isinstance(operation, Delete)}
    return tuple(written.get(operation.key, kept.get(operation.key)) for operation in operations)


def _expected(operation: Operation) -> ETag | Absent | None:
    match operation:
        case Check(etag=None):
            return ABSENT
        case Upsert(etag=None | "", concurrency=Concurrency.FIRST_WRITE):
            return ABSENT
        case _:
            return operation.etag or None


def _both(key: str, one: ETag | Absent | None, other: ETag | Absent | None) -> ETag | Absent | None:
    if one is None or other is None or one == other:
        return one if other is None else other
    etags = [expected for expected in (one, other) if not isinstance(expected, Absent)]
    raise ETagMismatch(key, etags[-1])
