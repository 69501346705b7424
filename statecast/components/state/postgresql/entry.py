"""The columns of a log entry, the same in the ring and in what is put aside, and reading some of them."""

from typing import Any

import orjson

from statecast.components.state.commit import OutboxRecord
from statecast.components.state.log import READ_BYTES, LogEntry

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


def up_to_read_bytes(query: str, *, order: str) -> str:
    """Cut a query of entries where their bodies come to READ_BYTES; `found` tells how many rows it has by itself.

    The sizes of bodies are known without reading them.
    """
    return (
        f"select * from (select *, count(*) over () as found,"
        f"  sum(octet_length(body)) over (order by {order}) - octet_length(body) as bytes_ahead from ({query}) e) e"
        f" where bytes_ahead < {READ_BYTES} order by {order}"
    )


def write_metadata(record: OutboxRecord) -> str:
    return orjson.dumps(dict(record.metadata)).decode() if record.metadata else "{}"
