"""How a message looks as a Kafka record, and back."""

from collections.abc import Sequence
from dataclasses import dataclass

from statecast.components.broker.broker import Message

PARTITION_KEY_NAMES = ("partitionKey", "__key")
PARTITION_NUMBER = "partitionNumber"
_POSITION_NAMES = ("__topic", "__partition", "__offset", "__timestamp")

# Metadata that says where a record is or goes, and stands in the record itself: as a header it would come back twice.
_NOT_HEADERS = frozenset({*PARTITION_KEY_NAMES, *_POSITION_NAMES})

# dapr components-contrib common/component/kafka/producer.go: the JSON text null is a tombstone
_NULL = b"null"

_OVERHEAD_BYTES = 36
"""The most that one record takes besides its key, value and headers: lengths, attributes and deltas as varints."""


# Not frozen: setting the fields of a frozen one takes as long as all the rest of `encode`.
@dataclass(slots=True, eq=False)
class Record:
    """One message of a publish, encoded. `index` is its place in the call."""

    index: int
    topic: str
    key: str | None
    key_bytes: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes]]
    size: int


def key_of(message: Message) -> str | None:
    """Tell the record's key: the message's own, or else the one that its metadata names, as with Dapr."""
    if message.key is not None or not message.metadata:
        return message.key
    return next((message.metadata[name] for name in PARTITION_KEY_NAMES if name in message.metadata), None)


def encode(index: int, message: Message) -> Record:
    """Make the record.

    Raises UnicodeEncodeError for text with a lone surrogate in it, which no UTF-8 is.
    """
    key = key_of(message)
    if message.metadata:
        headers = [(name, value.encode()) for name, value in message.metadata.items() if name not in _NOT_HEADERS]
    else:
        headers = []
    key_bytes = None if key is None else key.encode()
    value = None if message.body == _NULL else message.body
    size = _OVERHEAD_BYTES + len(message.body) + len(key_bytes or b"")
    if headers:
        size += sum(10 + len(name.encode()) + len(content) for name, content in headers)
    return Record(index, message.topic, key, key_bytes, value, headers, size)


def decode(
    topic: str,
    partition: int,
    offset: int,
    timestamp: int,
    key: bytes | None,
    value: bytes | None,
    headers: Sequence[tuple[str, bytes | None]],
) -> Message:
    """Make the message. Its metadata is the headers and where it was: `{"__partition": "3", "__offset": "17", ...}`."""
    metadata = {name: (content or b"").decode(errors="replace") for name, content in headers}
    metadata |= {
        "__topic": topic,
        "__partition": str(partition),
        "__offset": str(offset),
        "__timestamp": str(timestamp),
    }
    text_key = None if key is None else key.decode(errors="replace")
    if text_key is not None:
        metadata["__key"] = text_key
    return Message(topic, _NULL if value is None else value, text_key, metadata)
