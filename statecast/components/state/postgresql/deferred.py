"""What is put aside of the log, queue by queue: the statements, and their arguments and answers; no I/O here.

Every change is one statement, and made under leases that still hold. The slices' rows are locked first, then those of
the queues in their order.
"""

from collections.abc import Collection, Iterable, Sequence
from datetime import timedelta
from typing import Any, Final

from statecast.components.state.log import (
    Deferral,
    DeferredQueue,
    Failure,
    Lease,
    QueueProgress,
    QueueStatus,
    Topic,
)
from statecast.components.state.postgresql.entry import ENTRY_COLUMNS, up_to_read_bytes, write_metadata
from statecast.components.state.postgresql.schema import Layout

_NO_FAILURE: Final = Failure(0, timedelta(0), "")
_ENTRY_VALUES: Final = ENTRY_COLUMNS.replace("metadata", "metadata::json")
_NAMES: Final = ("slice", "order_key", "pubsub", "topic")
_QUEUE: Final = ", ".join(_NAMES)


class DeferredStatements:
    def __init__(self, layout: Layout, log: int, advance: str) -> None:
        """`advance` moves the leases' positions on, with six parameters, and returns the slices of those that hold."""
        queues, entries = layout.deferred_queues, layout.deferred
        self.advance = (
            f"with mine as ({advance}),"
            f" aside as (insert into {entries} (log, {ENTRY_COLUMNS})"
            f"  select {log}, {_ENTRY_VALUES} from unnest($7::bigint[], $8::smallint[], $9::text[], $10::text[],"
            "    $11::smallint[], $12::text[], $13::text[], $14::text[], $15::bytea[], $16::timestamptz[])"
            f"   as e({ENTRY_COLUMNS})"
            "  where e.slice = any (array(select slice from mine))"
            f"  on conflict do nothing returning {_QUEUE}),"
            # Each queue has one row with its failure, and one without for each of its entries: brought together by
            # sorting, where a join would compare each with each.
            f" parts as (select {_QUEUE}, attempts, pause, reason from unnest($17::smallint[], $18::text[],"
            f"   $19::text[], $20::text[], $21::integer[], $22::float8[], $23::text[])"
            f"   as f({_QUEUE}, attempts, pause, reason)"
            f"  union all select {_QUEUE}, null, null, null from aside),"
            f" noted as (insert into {queues} as q (log, {_QUEUE}, attempts, due_at, reason, pending)"
            f"  select {log}, {_QUEUE}, max(attempts), clock_timestamp() + make_interval(secs => max(pause)),"
            "   max(reason), count(*) - count(attempts)"
            f"  from parts group by {_QUEUE} having count(*) > count(attempts)"
            f"  order by {_QUEUE}"
            f"  on conflict (log, {_QUEUE}) do update set pending = q.pending + excluded.pending)"
            " select slice, epoch from mine"
        )
        status = (
            f"select {_queue_in('q')}, q.attempts, q.reason, q.pending,"
            " q.due_at is null as is_parked, coalesce(q.due_at <= now(), false) as is_due,"
            f" (select e.created_at from {entries} e where {_is_of('e', 'q', log)} order by e.id limit 1) as oldest_at"
        )
        self.queues = (
            f"{status} from {queues} q where q.log = {log} and q.slice = any ($1::smallint[])"
            " order by q.due_at nulls last, q.slice, q.order_key"
        )
        timed = f"select pubsub, topic from {queues} where log = {log} and due_at is not null"
        self.due = (
            # From topic to topic, by one look into the index for each: all queues of one that is left out may be due.
            f"with recursive topics as (({timed} order by pubsub, topic limit 1)"
            f" union all (select later.* from topics t cross join lateral ({timed}"
            "   and (pubsub, topic) > (t.pubsub, t.topic) order by pubsub, topic limit 1) later))"
            f"{status} from topics t cross join lateral (select * from {queues}"
            f"  where log = {log} and pubsub = t.pubsub and topic = t.topic and due_at <= now()"
            "   and slice = any ($1::smallint[]) order by due_at limit $2) q"
            " where (t.pubsub, t.topic) not in (select * from unnest($3::text[], $4::text[]))"
            " order by q.due_at limit $2"
        )
        self.read = up_to_read_bytes(
            f"select q.number, e.* from unnest($1::smallint[], $2::text[], $3::text[], $4::text[])"
            f" with ordinality as q({_QUEUE}, number)"
            f" cross join lateral (select {ENTRY_COLUMNS} from {entries} e where {_is_of('e', 'q', log)}"
            "  order by e.id limit $5) e order by q.number, e.id",
            order="number, id",
        )
        self.settle = (
            # A row that another statement holds is one of another owner's, or one of our own whose answer was lost:
            # waiting for it, this statement would not see what it has put aside meanwhile.
            f"with mine as (select s.slice from {layout.slices} s"
            "  join unnest($1::smallint[], $2::bigint[]) as l(slice, epoch) using (slice, epoch)"
            f"  where s.log = {log} and s.owner is not null order by s.slice for update of s skip locked),"
            " asked as (select * from unnest($3::smallint[], $4::text[], $5::text[], $6::text[], $7::integer[],"
            f"   $8::float8[], $9::text[]) with ordinality as a({_QUEUE}, attempts, pause, reason, number)"
            "  where slice = any (array(select slice from mine))),"
            f" held as (select a.*, q.pending from {queues} q join asked a on {_is_of('q', 'a', log)}"
            f"  order by {_queue_in('q')} for update of q),"
            f" gone as (delete from {entries} e using asked a, unnest($10::bigint[], $11::bigint[]) as p(number, id)"
            f"  where p.number = a.number and {_is_of('e', 'a', log)} and e.id = p.id returning a.number),"
            " rest as (select h.*, pending - (select count(*) from gone g where g.number = h.number) as remaining"
            "  from held h),"
            f" ended as (delete from {queues} q using rest r where {_is_of('q', 'r', log)} and r.remaining <= 0),"
            f" noted as (update {queues} q set attempts = r.attempts, reason = r.reason, pending = r.remaining,"
            "   due_at = clock_timestamp() + make_interval(secs => r.pause)"
            f"  from rest r where {_is_of('q', 'r', log)} and r.remaining > 0)"
            f" select {_queue_in('a')} from asked a left join rest r using (number)"
            " where coalesce(r.remaining, 0) <= 0"
        )
        self.replay = (
            f"with parked as (select {_QUEUE} from {queues}"
            f"  where log = {log} and due_at is null and ($1::text is null or order_key = $1)"
            f"  order by {_QUEUE} for update)"
            f" update {queues} q set attempts = 0, due_at = clock_timestamp() from parked p"
            f" where {_is_of('q', 'p', log)} returning 1"
        )


def _queue_in(row: str) -> str:
    return ", ".join(f"{row}.{name}" for name in _NAMES)


def _is_of(row: str, queue: str, log: int) -> str:
    return " and ".join([f"{row}.log = {log}", *(f"{row}.{name} = {queue}.{name}" for name in _NAMES)])


def deferral_columns(deferrals: Sequence[Deferral]) -> Iterable[list[object]]:
    """Make the arguments of `advance` behind the leases': the entries, and each queue with its first failure."""
    entries = [entry for deferral in deferrals for entry in deferral.entries]
    yield [int(entry.id) for entry in entries]
    yield [entry.slice for entry in entries]
    yield [entry.record.order_key for entry in entries]
    yield [entry.record.event_id for entry in entries]
    yield [entry.record.format for entry in entries]
    yield [entry.record.pubsub for entry in entries]
    yield [entry.record.topic for entry in entries]
    yield [write_metadata(entry.record) for entry in entries]
    yield [entry.record.body for entry in entries]
    yield [entry.created_at for entry in entries]
    failures: dict[DeferredQueue, Failure] = {}
    for deferral in deferrals:
        for entry in deferral.entries[:1]:
            failures.setdefault(DeferredQueue.of(entry), deferral.failure or _NO_FAILURE)
    yield from _queue_columns(failures)
    yield from _failure_columns(failures.values())


def due_columns(slices: Collection[int], limit: int, but_for: Collection[Topic]) -> Iterable[object]:
    yield from (list(slices), limit)
    yield [pubsub for pubsub, _ in but_for]
    yield [topic for _, topic in but_for]


def reading_columns(queues: Sequence[DeferredQueue], limit: int) -> Iterable[object]:
    """Make the arguments of `read`: of each queue up to `limit` entries."""
    yield from _queue_columns(queues)
    yield limit


def settlement_columns(leases: Sequence[Lease], progress: Sequence[QueueProgress]) -> Iterable[list[object]]:
    yield [lease.slice for lease in leases]
    yield [lease.epoch for lease in leases]
    yield from _queue_columns([each.queue for each in progress])
    yield from _failure_columns([each.failure or _NO_FAILURE for each in progress])
    yield [number for number, each in enumerate(progress, 1) for _ in each.published]
    yield [int(id) for each in progress for id in each.published]


def queue_of(row: Any) -> DeferredQueue:
    return DeferredQueue(row["slice"], row["order_key"], row["pubsub"], row["topic"])


def queue_status(row: Any) -> QueueStatus:
    return QueueStatus(
        queue=queue_of(row),
        attempts=row["attempts"],
        reason=row["reason"],
        is_due=row["is_due"],
        is_parked=row["is_parked"],
        pending=row["pending"],
        oldest_at=row["oldest_at"],
    )


def _queue_columns(queues: Collection[DeferredQueue]) -> Iterable[list[object]]:
    yield [queue.slice for queue in queues]
    yield [queue.order_key for queue in queues]
    yield [queue.pubsub for queue in queues]
    yield [queue.topic for queue in queues]


def _failure_columns(failures: Collection[Failure]) -> Iterable[list[object]]:
    yield [failure.attempts for failure in failures]
    yield [None if failure.pause is None else failure.pause.total_seconds() for failure in failures]
    yield [_storable(failure.reason) for failure in failures]


def _storable(reason: str) -> str:
    """Replace what PostgreSQL takes in no text; a broker's words may hold anything."""
    return reason.encode(errors="replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")
