"""Rows of the outbox and of what is put aside of it, written from records and read as log entries."""

from typing import Any

import orjson

from statecast.components.state.commit import OutboxRecord
from statecast.components.state.log import LogEntry, slice_of
from statecast.components.state.sqlite.rows import utc

RecordRow = tuple[int, str, str, int, str, str, str, bytes]

RECORD_COLUMNS = "slice, order_key, event_id, format, pubsub, topic, metadata, body"
ENTRY_COLUMNS = f"id, {RECORD_COLUMNS}, created_at"


def record_row(record: OutboxRecord, slices: int) -> RecordRow:
    return (
        slice_of(record.order_key, slices),
        record.order_key,
        record.event_id,
        record.format,
        record.pubsub,
        record.topic,
        orjson.dumps(dict(record.metadata)).decode() if record.metadata else "{}",
        record.body,
    )


def entry_row(entry: LogEntry, slices: int) -> tuple[Any, ...]:
    """Make the row that `entry_of` reads as this entry again."""
    created_at = entry.created_at.replace(tzinfo=None).isoformat(" ", "milliseconds")
    return int(entry.id), *record_row(entry.record, slices), created_at


def entry_of(row: tuple[Any, ...]) -> LogEntry:
    id, slice, order_key, event_id, format, pubsub, topic, metadata, body, created_at = row
    fields = orjson.loads(metadata) if metadata != "{}" else {}
    record = OutboxRecord(order_key, event_id, pubsub, topic, body, fields, format)
    return LogEntry(slice, str(id), record, utc(created_at))
