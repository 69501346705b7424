"""What is put aside of the log, as the scripts take it and tell of it. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import MAXYEAR, UTC, datetime, timedelta
from typing import Final, Self

import msgpack  # type: ignore[import-untyped]  # has no stubs

from statecast.components.redis.connection import Reply
from statecast.components.state.log import (
    Deferral,
    DeferredQueue,
    Failure,
    Lease,
    LogEntry,
    QueueProgress,
    QueueStatus,
)
from statecast.components.state.redis.encoding import decode_entry, encode_record, from_milliseconds, pack
from statecast.components.state.redis.keys import queue_name, read_queue_name

_PORTION_BYTES: Final = 16 * 1024 * 1024

_NO_FAILURE: Final = Failure(0, timedelta(0), "")

_PARKED: Final = b"parked"
_NEVER: Final = datetime(MAXYEAR, 12, 31, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class EncodedDeferral:
    slice: int
    queue: bytes
    failure: tuple[int, int | bool, str] | bool
    entries: list[tuple[str, bytes]]

    @classmethod
    def begin(cls, deferral: Deferral) -> Self:
        queue = DeferredQueue.of(deferral.entries[0])
        failure = False if deferral.failure is None else _fields(deferral.failure)
        return cls(queue.slice, queue_name(queue), failure, [])


def portions_of(deferrals: Iterable[Deferral]) -> list[list[EncodedDeferral]]:
    """Divide deferrals so that no portion has much more than 16 MiB; there is one at least, if an empty one.

    A server takes no more than 512 MiB in one argument, and everybody else waits while it takes it. A deferral that
    is divided keeps its failure in all parts, which only counts for a queue that is not there yet.
    """
    portions: list[list[EncodedDeferral]] = [[]]
    room = _PORTION_BYTES
    for deferral in deferrals:
        portions[-1].append(EncodedDeferral.begin(deferral))
        for entry in deferral.entries:
            if room <= 0:
                portions.append([EncodedDeferral.begin(deferral)])
                room = _PORTION_BYTES
            packed = pack(encode_record(entry.record))
            portions[-1][-1].entries.append((entry.id, packed))
            room -= len(packed)
    return portions


def pack_portion(leases: Sequence[Lease], portion: Iterable[EncodedDeferral]) -> bytes:
    """Bring those deferrals to the script's argument of whose slices there are leases."""
    numbers = numbers_of(lease.slice for lease in leases)
    return pack(
        [
            (numbers[each.slice], each.queue, each.failure, each.entries)
            for each in portion
            if each.slice in numbers and each.entries
        ]
    )


def encode_progress(leases: Sequence[Lease], progress: Iterable[QueueProgress]) -> bytes:
    numbers = numbers_of(lease.slice for lease in leases)
    return pack(
        [
            (
                numbers[each.queue.slice],
                queue_name(each.queue),
                _fields(each.failure or _NO_FAILURE),
                each.published,
            )
            for each in progress
        ]
    )


def encode_queues(slices: Sequence[int], queues: Iterable[DeferredQueue]) -> bytes:
    numbers = numbers_of(slices)
    return pack([(numbers[queue.slice], queue_name(queue)) for queue in queues])


def numbers_of(slices: Iterable[int]) -> Mapping[int, int]:
    """Number slices as the scripts do, from 1."""
    return {slice: number for number, slice in enumerate(slices, 1)}


def decode_states(slices: Sequence[int], reply: Reply) -> list[QueueStatus]:
    """Read what the hashes of these slices hold, as of the time that stands before them; first due, first told."""
    now, *found = reply
    states = [
        _decode_state(slice, queue, state, now)
        for slice, fields in zip(slices, found, strict=True)
        for queue, state in zip(fields[::2], fields[1::2], strict=True)
    ]
    return [status for _, status in sorted(states, key=lambda each: each[0])]


def decode_due(slices: Sequence[int], reply: Reply) -> list[QueueStatus]:
    now, due = reply
    return [_decode_state(slices[number - 1], queue, state, now)[1] for number, queue, state in due]


def decode_entries(queues: Sequence[DeferredQueue], reply: Reply) -> list[LogEntry]:
    return [
        decode_entry(queue.slice, _stream_id(padded), *msgpack.unpackb(fields, raw=True))
        for queue, found in zip(queues, reply, strict=True)
        for padded, fields in zip(found[::2], found[1::2], strict=True)
    ]


def _decode_state(slice: int, queue: bytes, state: bytes, now: int) -> tuple[datetime, QueueStatus]:
    """Read a state such as `b"3 1700000000500 12 00000001700000000000-00000000000000000000 too large"`."""
    attempts, due, pending, oldest, reason = state.split(b" ", 4)
    is_parked = due == _PARKED
    status = QueueStatus(
        queue=read_queue_name(slice, queue),
        attempts=int(attempts),
        reason=reason.decode(errors="replace"),
        is_due=not is_parked and int(due) <= now,
        is_parked=is_parked,
        pending=int(pending),
        oldest_at=from_milliseconds(int(oldest.partition(b"-")[0])),
    )
    return _NEVER if is_parked else from_milliseconds(int(due)), status


def _stream_id(padded: bytes) -> str:
    milliseconds, _, counter = padded.partition(b"-")
    return f"{int(milliseconds)}-{int(counter)}"


def _fields(failure: Failure) -> tuple[int, int | bool, str]:
    pause = failure.pause
    return failure.attempts, False if pause is None else max(0, -(-pause // timedelta(milliseconds=1))), failure.reason
