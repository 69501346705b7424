"""The columns of a log entry, the same in the ring and in what is put aside."""

from typing import Any

import orjson

from statecast.components.state.commit import OutboxRecord
from statecast.components.state.log import LogEntry

ENTRY_COLUMNS = "id, slice, order_key, event_id, format, pubsub, topic, metadata, body, created_at"


def read_entry(row: Any) -> LogEntry:
    record = OutboxRecord(
        order_key=row["order_key"],
        event_id=row["event_id"],
        pubsub=row["pubsub"],
        topic=row["topic"],
        body=row["body"],
        metadata=orjson.loads(row["metadata"]),
        format=row["format"],
    )
    return LogEntry(row["slice"], str(row["id"]), record, row["created_at"])


def write_metadata(record: OutboxRecord) -> str:
    return orjson.dumps(record.metadata).decode() if record.metadata else "{}"
