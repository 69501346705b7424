"""What is put aside of the log, as the scripts take it and tell of it. Pure."""

from collections.abc import Sequence
from datetime import MAXYEAR, UTC, datetime, timedelta
from typing import Any, Final

import msgpack  # type: ignore[import-untyped]  # has no stubs

from statecast.components.redis.connection import Reply
from statecast.components.state.log import Deferral, DeferredKey, Failure, Lease, LogEntry
from statecast.components.state.redis.encoding import decode_entry, encode_record, from_milliseconds, pack
from statecast.components.state.redis.keys import KeyNames

_NO_FAILURE: Final = Failure(0, timedelta(0), "")

_PARKED: Final = b"parked"
_NEVER: Final = datetime(MAXYEAR, 12, 31, tzinfo=UTC)


def encode_deferrals(
    leases: Sequence[Lease], deferrals: Sequence[Deferral], names: KeyNames
) -> tuple[list[str], bytes]:
    """Bring deferrals to further keys of the script, behind the two of each lease, and its argument."""
    numbers = {lease.slice: number for number, lease in enumerate(leases, 1)}
    places: dict[int, int] = {}
    keys: list[str] = []
    packed: list[tuple[Any, ...]] = []
    for deferral in deferrals:
        slice, order_key = deferral.entries[0].slice, deferral.entries[0].record.order_key
        if slice not in numbers:
            continue
        if slice not in places:
            places[slice] = 2 * len(leases) + len(keys) + 1
            keys += (names.deferred(slice), names.deferred_entries(slice))
        failure = False if deferral.failure is None else _fields(deferral.failure)
        entries = [(entry.id, _pack_fields(entry)) for entry in deferral.entries]
        packed.append((numbers[slice], places[slice], order_key, failure, entries))
    return keys, pack(packed)


def encode_failure(failure: Failure | None) -> bytes:
    return pack(_fields(failure or _NO_FAILURE))


def decode_keys(slices: Sequence[int], reply: Reply) -> list[DeferredKey]:
    """Read what the hashes of these slices hold, as of the time that stands before them; first due, first told."""
    now, *found = reply
    keys = [
        _decode_key(slice, order_key, state, now)
        for slice, fields in zip(slices, found, strict=True)
        for order_key, state in zip(fields[::2], fields[1::2], strict=True)
    ]
    return [key for _, key in sorted(keys, key=lambda each: each[0])]


def decode_entries(slice: int, reply: Reply) -> list[LogEntry]:
    return [
        decode_entry(slice, _stream_id(padded), msgpack.unpackb(fields, raw=True))
        for padded, fields in zip(reply[::2], reply[1::2], strict=True)
    ]


def _decode_key(slice: int, order_key: bytes, state: bytes, now: int) -> tuple[datetime, DeferredKey]:
    """Read a state such as `b"3 1700000000500 12 00000001700000000000-00000000000000000000 too large"`."""
    attempts, due, pending, oldest, reason = state.split(b" ", 4)
    is_parked = due == _PARKED
    key = DeferredKey(
        slice=slice,
        order_key=order_key.decode(),
        attempts=int(attempts),
        reason=reason.decode(errors="replace"),
        is_due=not is_parked and int(due) <= now,
        is_parked=is_parked,
        pending=int(pending),
        oldest_at=from_milliseconds(int(oldest.partition(b"-")[0])),
    )
    return _NEVER if is_parked else from_milliseconds(int(due)), key


def _pack_fields(entry: LogEntry) -> bytes:
    return pack([part for field in encode_record(entry.record).items() for part in field])


def _stream_id(padded: bytes) -> str:
    milliseconds, _, counter = padded.partition(b"-")
    return f"{int(milliseconds)}-{int(counter)}"


def _fields(failure: Failure) -> tuple[int, int | bool, str]:
    pause = failure.pause
    return failure.attempts, False if pause is None else max(0, -(-pause // timedelta(milliseconds=1))), failure.reason
