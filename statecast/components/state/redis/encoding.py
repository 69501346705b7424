"""A commit as the server's script takes it, and what the script answers as values and errors. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import msgpack  # type: ignore[import-untyped]  # has no stubs

from statecast.components.redis.connection import Reply
from statecast.components.state.commit import (
    ABSENT,
    Commit,
    Delete,
    ETag,
    Item,
    KeyChange,
    Operation,
    OutboxRecord,
    Upsert,
    collapse,
    etags_after,
)
from statecast.components.state.log import LogEntry, slice_of
from statecast.components.state.redis.keys import KeyNames
from statecast.errors import CorruptState, Duplicate, ETagMismatch, Fenced, InvalidRequest, StatecastError

_ONLY_CHECK: Final = 0
_UPSERT: Final = 1
_DELETE: Final = 2

_NEVER: Final = ()
"""A condition that no version fulfils: to the server it is an empty table, and a version is text."""

_LARGEST_ARGUMENT = 511 * 1024 * 1024
"""Redis' proto-max-bulk-len is 512 MiB: more than that, and the server drops the connection. What is left is for the
names that go along with an event when it is put aside."""

_packer = msgpack.Packer(use_bin_type=False, unicode_errors="surrogatepass")
_strict_packer = msgpack.Packer(use_bin_type=False)


def pack(value: Any) -> bytes:
    """Pack a value for the server, whose cmsgpack knows no bin type."""
    packed: bytes = _packer.pack(value)
    return packed


@dataclass(frozen=True, slots=True)
class EncodedCommit:
    """`keys` are those of the script, in its order; `changes` are the operations they begin with.

    `contradiction`: the commit's own conditions exclude each other. It is sent all the same, to be refused for its
    marks and guards first.
    """

    keys: list[str]
    argument: bytes
    changes: Sequence[KeyChange]
    slices: tuple[int, ...]
    contradiction: ETagMismatch | None = None


def encode_commit(commit: Commit, names: KeyNames, slices: int) -> EncodedCommit:
    """Bring a commit to keys and one argument. Raises InvalidRequest when it is too large."""
    contradiction = None
    answers: list[int | str | bool] = []
    try:
        changes = collapse(commit.operations)
        operations = [_encode_change(change) for change in changes]
        if commit.marks:
            answers = _answers(commit.operations, changes)
    except ETagMismatch as mismatch:
        contradiction = mismatch
        changes = [KeyChange(mismatch.key, None, None)]
        operations = [(_NEVER, _ONLY_CHECK)]
    written_slices, events = _encode_records(commit.records, slices)
    argument = pack(
        (
            operations,
            [_milliseconds(max(mark.ttl, timedelta(milliseconds=1))) for mark in commit.marks],
            [guard.token for guard in commit.guards],
            len(written_slices),
            events,
            answers,
        )
    )
    if len(argument) > _LARGEST_ARGUMENT:
        raise InvalidRequest(f"a commit of {len(argument)} bytes is more than a Redis server takes in one command")
    keys = [change.key for change in changes]
    keys += map(names.mark, commit.marks)
    keys += map(names.claim_of, commit.guards)
    keys += map(names.stream, written_slices)
    return EncodedCommit(keys, argument, changes, written_slices, contradiction)


def decode_commit(reply: Reply, commit: Commit, encoded: EncodedCommit) -> tuple[ETag | None, ...]:
    """Tell the etags after the commit. Raises what the script refused it for."""
    if reply[0] != b"ok":
        raise _refusal(reply, commit, encoded)
    written = {
        change.key: ETag(version.decode())
        for change, version in zip(encoded.changes, reply[1:], strict=True)
        if version is not None
    }
    return etags_after(commit.operations, written)


def decode_item(key: str, found: Reply) -> Item | None:
    """Read one answer of the read script. Raises CorruptState."""
    if found is None:
        return None
    if len(found) == 1:
        raise CorruptState(key, found[0].decode())
    value, version, expiry = found
    return Item(key, value, ETag(version.decode()), None if expiry < 0 else from_milliseconds(expiry))


def encode_record(record: OutboxRecord) -> tuple[bytes, bytes]:
    """Bring a record to the two fields of an entry in the log, `head` and `body`.

    All but the body is packed: the server's Lua takes its time with every single value. Raises InvalidRequest for
    text that has no UTF-8, since nobody could read it again.
    """
    head = (
        record.format,
        record.order_key,
        record.event_id,
        record.pubsub,
        record.topic,
        dict(record.metadata),
    )
    try:
        return _strict_packer.pack(head), record.body
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"event {record.event_id!r} has text with a lone surrogate: {error}") from error


def decode_record(head: bytes, body: bytes) -> OutboxRecord:
    """Read what `encode_record` wrote."""
    format, order_key, event_id, pubsub, topic, metadata = msgpack.unpackb(head)
    return OutboxRecord(order_key, event_id, pubsub, topic, body, metadata, format)


def decode_entry(slice: int, id: str, head: bytes, body: bytes) -> LogEntry:
    """Read an entry of the log; its id, `1700000000000-0`, begins with the time of its commit."""
    return LogEntry(slice, id, decode_record(head, body), from_milliseconds(int(id.partition("-")[0])))


def from_milliseconds(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds // 1000, UTC) + timedelta(milliseconds=milliseconds % 1000)


def _encode_change(change: KeyChange) -> tuple[Any, ...]:
    expected = change.expected
    condition = True if expected is ABSENT else expected or False
    match change.write:
        case Upsert() as upsert:
            ttl = upsert.ttl
            return (condition, _UPSERT, upsert.value, False if ttl is None else _milliseconds(ttl))
        case Delete():
            return (condition, _DELETE)
        case None:
            return (condition, _ONLY_CHECK)


def _answers(operations: Sequence[Operation], changes: Sequence[KeyChange]) -> list[int | str | bool]:
    """Tell how each operation is answered, for the marks to remember: by the version that a change will give its key
    (its number, from 1), else by an etag that is known already or none."""
    writing = {change.key: number for number, change in enumerate(changes, 1) if isinstance(change.write, Upsert)}
    known = etags_after(operations, {})
    return [writing.get(operation.key, etag or False) for operation, etag in zip(operations, known, strict=True)]


def _decode_answers(packed: bytes) -> tuple[ETag | None, ...] | None:
    """Read what a mark remembers; nothing where it was set before marks did."""
    if not packed:
        return None
    return tuple(ETag(etag.decode()) if etag else None for etag in msgpack.unpackb(packed, raw=True))


def _encode_records(records: Sequence[OutboxRecord], slices: int) -> tuple[tuple[int, ...], list[tuple[Any, ...]]]:
    places: dict[int, int] = {}
    events: list[tuple[Any, ...]] = []
    for record in records:
        # Before its slice is told, which takes the order key's UTF-8.
        head, body = encode_record(record)
        place = places.setdefault(slice_of(record.order_key, slices), len(places) + 1)
        events.append((place, head, body))
    return tuple(places), events


def _milliseconds(ttl: timedelta) -> str:
    # As text: the server's Lua would turn a large number into floating point notation.
    return str(-(-ttl // timedelta(milliseconds=1)))


def _refusal(reply: Reply, commit: Commit, encoded: EncodedCommit) -> StatecastError:
    reason, index = reply[0], reply[1] - 1
    match reason:
        case b"etag" if encoded.contradiction is not None:
            return encoded.contradiction
        case b"etag":
            expected = encoded.changes[index].expected
            return ETagMismatch(encoded.keys[index], None if expected is ABSENT else expected)
        case b"duplicate":
            return Duplicate(commit.marks[index].digest, _decode_answers(reply[2]))
        case b"fenced":
            return Fenced(commit.guards[index].type, commit.guards[index].id)
        case _:
            return CorruptState(encoded.keys[index], reply[2].decode())
