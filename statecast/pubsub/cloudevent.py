"""CloudEvents 1.0 in JSON: the envelope that leaves, and events as they come in.

The bytes are built here rather than by the `cloudevents` package, which parses and validates what we know to be
right; its parser reads in the tests what leaves.
"""

import base64
import builtins
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TypeVar

import msgspec
import orjson

T = TypeVar("T")

DEFAULT_TYPE = "com.dapr.event.sent"  # dapr pkg/runtime/pubsub, the type of every wrapped event
MEDIA_TYPE = "application/cloudevents+json"

_BYTES = frozenset({"application/octet-stream", "application/cloudevents+protobuf", "application/x-protobuf"})

VALID_ATTRIBUTE_NAME = re.compile(r"[a-z0-9]+")  # CloudEvents 1.0 §3.1

_TIMESTAMP = re.compile(  # RFC 3339 §5.6
    r"\d{4}-\d\d-\d\dT([01]\d|2[0-3]):\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)", re.ASCII | re.IGNORECASE
)


class TraceContext(msgspec.Struct, frozen=True):
    """The W3C trace that an event belongs to; empty where there is none."""

    traceparent: str = ""
    tracestate: str = ""


class Data(msgspec.Struct, frozen=True):
    """The data of an event as bytes, with what they are.

    `is_json`: the bytes are one JSON value, whatever the content type says of its presentation.
    """

    body: bytes
    content_type: str | None = None
    is_json: bool = False


class CloudEvent(msgspec.Struct, frozen=True):
    """An event as received. Nothing is required of it: absent attributes read as empty text.

    `attributes` are all members but the data, `data` is a JSON value, text, or bytes (from `data_base64`, and the
    whole message where it is no JSON object).
    """

    attributes: Mapping[str, Any]
    data: Any = None
    metadata: Mapping[str, str] = msgspec.field(default_factory=dict)

    @property
    def id(self) -> str:
        return str(self.attributes.get("id", ""))

    @property
    def source(self) -> str:
        return str(self.attributes.get("source", ""))

    @property
    def type(self) -> str:
        return str(self.attributes.get("type", ""))

    @property
    def subject(self) -> str:
        return str(self.attributes.get("subject", ""))

    def decode(self, into: builtins.type[T]) -> T:
        """Convert the data to a msgspec struct, a dataclass, `list[int]` ... Raises ValueError when it does not fit."""
        return msgspec.convert(self.data, into)


def parse_event(body: bytes, metadata: Mapping[str, str]) -> CloudEvent:
    """Read an event from a broker's message; a body that is no JSON object becomes the data of an event without
    attributes, because a message that came must not get lost over its form."""
    try:
        members = orjson.loads(body)
    except orjson.JSONDecodeError:
        members = None
    if not isinstance(members, dict):
        return CloudEvent({}, body, metadata)
    encoded = members.pop("data_base64", None)
    data = members.pop("data", None)
    if isinstance(encoded, str):
        data = _decoded(encoded)
    return CloudEvent(members, data, metadata)


def envelope(attributes: Mapping[str, str], data: Data | None) -> bytes:
    """Build the JSON of an event: the attributes in their order, then the data; None leaves `"data": null`."""
    name, value = ("data", None) if data is None else data_member(data)
    return orjson.dumps({**attributes, name: value})


def content_type_of(data: Data) -> str:
    """Tell the content type: the given one; else JSON for JSON that is no string, text for text.

    Bytes are not searched for JSON; only what is no UTF-8 text is called application/octet-stream.
    """
    if data.content_type:
        return data.content_type
    if data.is_json:
        return "text/plain" if data.body.lstrip()[:1] == b'"' else "application/json"
    try:
        data.body.decode()
    except UnicodeDecodeError:
        return "application/octet-stream"
    return "text/plain"


def data_member(data: Data) -> tuple[str, Any]:
    """Tell how the data stands in the envelope: the member's name, and a value that orjson writes.

    Follows dapr pkg/runtime/pubsub/cloudevents.go: JSON as it is, byte for byte; octet streams and protobuf in
    `data_base64`; all else as text, with U+FFFD for what is no UTF-8.
    """
    content_type = content_type_of(data)
    media_type = content_type if content_type == "application/json" else media_type_of(content_type)
    if media_type == "application/json" and (data.is_json or _is_json(data.body)):
        return "data", orjson.Fragment(data.body)
    body = plain_bytes(data)
    if media_type in _BYTES:
        return "data_base64", base64.b64encode(body).decode()
    return "data", body.decode(errors="replace")


def plain_bytes(data: Data) -> bytes:
    """Give the bytes that a consumer wants to see outside of an envelope: a JSON string as its text."""
    if data.is_json and media_type_of(content_type_of(data)) != "application/json":
        value = orjson.loads(data.body)
        if isinstance(value, str):
            return value.encode()
    return data.body


def media_type_of(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


def timestamp(moment: datetime) -> str:
    """Write a time as RFC 3339 in UTC, to the millisecond: `2026-01-02T03:04:05.678Z`."""
    if moment.tzinfo is not UTC:
        moment = moment.astimezone(UTC)
    # Several times as fast as `isoformat`; there is no fraction in it where that is 0.
    text: str = msgspec.to_builtins(moment)
    return f"{text[:23]}Z" if moment.microsecond else f"{text[:19]}.000Z"


def is_timestamp(text: str) -> bool:
    """Tell whether it is a time as RFC 3339 writes it; a leap second, which few programs can read, is none."""
    if not _TIMESTAMP.fullmatch(text):
        return False
    try:
        datetime.fromisoformat(text.upper())
    except ValueError:
        return False
    return True


def _is_json(body: bytes) -> bool:
    try:
        orjson.loads(body)
    except orjson.JSONDecodeError:
        return False
    return True


def _decoded(encoded: str) -> str | bytes:
    try:
        return base64.b64decode(encoded, validate=True)
    except ValueError:  # also of text that is not ASCII, which binascii.Error does not cover
        return encoded
