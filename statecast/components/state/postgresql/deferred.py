"""What is put aside of the log, key by key: the statements, and their arguments and answers; no I/O here.

Every change is one statement, and made under a lease that still holds. The slice's row is locked first, then the
keys in their order.
"""

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any, Final

from statecast.components.state.log import Deferral, DeferredKey, Failure, Lease
from statecast.components.state.postgresql.entry import ENTRY_COLUMNS, write_metadata
from statecast.components.state.postgresql.schema import Layout

_NO_FAILURE: Final = Failure(0, timedelta(0), "")
_ENTRY_VALUES: Final = ENTRY_COLUMNS.replace("metadata", "metadata::json")


class DeferredStatements:
    def __init__(self, layout: Layout, log: int, advance: str) -> None:
        """`advance` moves the leases' positions on, with six parameters, and returns the slices of those that hold."""
        keys, entries = layout.deferred_keys, layout.deferred
        self.advance = (
            f"with mine as ({advance}),"
            f" aside as (insert into {entries} (log, {ENTRY_COLUMNS})"
            f"  select {log}, {_ENTRY_VALUES} from unnest($7::bigint[], $8::smallint[], $9::text[], $10::text[],"
            "    $11::smallint[], $12::text[], $13::text[], $14::text[], $15::bytea[], $16::timestamptz[])"
            f"   as e({ENTRY_COLUMNS})"
            "  where e.slice = any (array(select slice from mine))"
            "  on conflict (log, slice, order_key, id) do nothing returning slice, order_key),"
            " added as (select slice, order_key, count(*) as pending from aside group by slice, order_key),"
            f" noted as (insert into {keys} as k (log, slice, order_key, attempts, due_at, reason, pending)"
            f"  select {log}, slice, order_key, f.attempts, clock_timestamp() + make_interval(secs => f.pause),"
            "   f.reason, added.pending"
            "  from unnest($17::smallint[], $18::text[], $19::integer[], $20::float8[], $21::text[])"
            "   as f(slice, order_key, attempts, pause, reason) join added using (slice, order_key)"
            "  order by slice, order_key"
            "  on conflict (log, slice, order_key) do update set pending = k.pending + excluded.pending)"
            " select slice, epoch from mine"
        )
        self.keys = (
            "select k.slice, k.order_key, k.attempts, k.reason, k.pending, k.due_at is null as is_parked,"
            " coalesce(k.due_at <= clock_timestamp(), false) as is_due,"
            f" (select e.created_at from {entries} e where e.log = k.log and e.slice = k.slice"
            "   and e.order_key = k.order_key order by e.id limit 1) as oldest_at"
            f" from {keys} k where k.log = {log} and k.slice = any ($1::smallint[])"
            " order by k.due_at nulls last, k.slice, k.order_key"
        )
        self.read = (
            f"select {ENTRY_COLUMNS} from {entries}"
            f" where log = {log} and slice = $1 and order_key = $2 order by id limit $3"
        )
        of_key = f"x.log = {log} and x.slice = mine.slice and x.order_key = $3"
        self.settle = (
            # A row that another statement holds is one of another owner's, or one of our own whose answer was lost:
            # waiting for it, this statement would not see what it has put aside meanwhile.
            f"with mine as (select slice from {layout.slices}"
            f"  where log = {log} and slice = $1 and epoch = $2 and owner is not null for update skip locked),"
            f" gone as (delete from {entries} x using mine where {of_key} and x.id = any ($4::bigint[]) returning 1),"
            f" remains as (select exists (select from {entries} x where x.log = {log} and x.slice = $1"
            "   and x.order_key = $3 and x.id <> all ($4::bigint[])) as is_left),"
            f" undeferred as (delete from {keys} x using mine, remains where {of_key} and not remains.is_left),"
            f" noted as (update {keys} x set attempts = $5, due_at = clock_timestamp() + $6::interval, reason = $7,"
            "   pending = x.pending - (select count(*) from gone)"
            f"  from mine, remains where {of_key} and remains.is_left)"
            " select is_left or not exists (select from mine) as is_left from remains"
        )
        self.replay = (
            f"with parked as (select slice, order_key from {keys}"
            f"  where log = {log} and due_at is null and ($1::text is null or order_key = $1)"
            "  order by slice, order_key for update)"
            f" update {keys} k set attempts = 0, due_at = clock_timestamp() from parked p"
            f" where k.log = {log} and k.slice = p.slice and k.order_key = p.order_key returning 1"
        )


def deferral_columns(deferrals: Sequence[Deferral]) -> Iterable[list[object]]:
    """Make the arguments of `advance` behind the leases': the entries, and the first failure of each of their keys."""
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
    failures: dict[tuple[int, str], Failure] = {}
    for deferral in deferrals:
        for entry in deferral.entries[:1]:
            failures.setdefault((entry.slice, entry.record.order_key), deferral.failure or _NO_FAILURE)
    yield [slice for slice, _ in failures]
    yield [order_key for _, order_key in failures]
    yield [failure.attempts for failure in failures.values()]
    yield [None if failure.pause is None else failure.pause.total_seconds() for failure in failures.values()]
    yield [_storable(failure.reason) for failure in failures.values()]


def settlement_columns(
    lease: Lease, order_key: str, published: Sequence[str], failure: Failure | None
) -> Iterable[object]:
    failure = failure or _NO_FAILURE
    yield from (lease.slice, lease.epoch, order_key, [int(id) for id in published])
    yield from (failure.attempts, failure.pause, _storable(failure.reason))


def deferred_key(row: Any) -> DeferredKey:
    return DeferredKey(
        slice=row["slice"],
        order_key=row["order_key"],
        attempts=row["attempts"],
        reason=row["reason"],
        is_due=row["is_due"],
        is_parked=row["is_parked"],
        pending=row["pending"],
        oldest_at=row["oldest_at"],
    )


def _storable(reason: str) -> str:
    """Replace what PostgreSQL takes in no text; a broker's words may hold anything."""
    return reason.encode(errors="replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")
