"""One outbox event, rendered at commit: which metadata overrides what, and which never leaves.

Follows Dapr's outbox how-to as documented: `cloudevent.type` and its kin override the attribute of that name, so
do the bare names; custom names become extension attributes.
"""

import logging
import os
import secrets
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from itertools import count

import msgspec

from statecast.components.state.commit import OutboxRecord
from statecast.errors import InvalidRequest
from statecast.pubsub.cloudevent import (
    DEFAULT_TYPE,
    VALID_ATTRIBUTE_NAME,
    Data,
    TraceContext,
    content_type_of,
    envelope,
    is_timestamp,
    plain_bytes,
    timestamp,
)

logger = logging.getLogger(__name__)

PARTITION_KEY = "partitionKey"

_PREFIX = "cloudevent."
_NEVER_LEAVE = (_PREFIX, "outbox.")
_FIXED = frozenset({"data", "data_base64", "specversion", "topic", "pubsubname"})
# CloudEvents 1.0 §3.1: these may not be empty, so empty is not given.
_NEVER_EMPTY = frozenset({"id", "source", "type", "subject", "time", "datacontenttype", "dataschema", "traceparent"})
_RUNTIME_WORDS = frozenset(
    {
        "__key",
        "contenttype",
        "partitionkey",
        "partitionnumber",
        "rawpayload",
        "schema",
        "ttl",
        "ttlinseconds",
        "valueschematype",
    }
)
_RAW_PAYLOAD = {  # Go's strconv.ParseBool, as dapr contrib metadata/utils.go reads it
    **dict.fromkeys(["", "0", "f", "F", "false", "FALSE", "False"], False),
    **dict.fromkeys(["1", "t", "T", "true", "TRUE", "True"], True),
}


class EventIds:
    """Event ids that no other process and no other run gives: `outbox-<random>-<count>`.

    They are cheap, and stable over retries because an event is rendered once. A forked child gets a random part of
    its own.
    """

    def __init__(self, label: str) -> None:
        self._label = label
        self._process = -1

    def next(self) -> str:
        if self._process != os.getpid():
            self._process = os.getpid()
            self._prefix = secrets.token_hex(8)
            self._numbers = count(1)
        return f"{self._label}-{self._prefix}-{next(self._numbers)}"


class EventSource(msgspec.Struct, frozen=True):
    """What all events of one commit have in common."""

    app_id: str
    time: datetime
    trace: TraceContext
    ids: EventIds


def render(
    data: Data | None,
    metadata: Mapping[str, str],
    source: EventSource,
    *,
    pubsub: str,
    topic: str,
    order_key: str,
    key: str | None,
    type: str,
    subject: str = "",
) -> OutboxRecord:
    """Render one event completely; `key` is the logical state key, `order_key` the full one.

    No data at all is `"data": null`. Raises InvalidRequest for a `rawPayload` that is no boolean, a `time` that is
    none, and text that is no Unicode.
    """
    overrides = overridden_attributes(metadata) if metadata else {}
    event_id = overrides.pop("id", None) or source.ids.next()
    if metadata and is_raw(metadata):
        body = plain_bytes(data) if data else b""
    else:
        trace = overrides.get("traceparent") or overrides.get("traceid") or source.trace.traceparent
        attributes = {
            "specversion": "1.0",
            "id": event_id,
            "source": source.app_id,
            "type": type or DEFAULT_TYPE,
            "time": timestamp(source.time),
            "datacontenttype": content_type_of(data) if data else "application/json",
            "topic": topic,
            "pubsubname": pubsub,
            "traceid": trace,
            "traceparent": trace,
            "tracestate": source.trace.tracestate,
        }
        if subject:
            attributes["subject"] = subject
        if overrides:
            _require_time(overrides.get("time"))
            attributes |= overrides | {"traceid": trace, "traceparent": trace}
        try:
            body = envelope(attributes, data)
        except TypeError as error:
            raise InvalidRequest(f"the event cannot be written: {error}") from error
    partition_key = metadata.get(PARTITION_KEY) or key
    return OutboxRecord(
        order_key, event_id, pubsub, topic, body, {PARTITION_KEY: partition_key} if partition_key else {}
    )


def overridden_attributes(metadata: Mapping[str, str]) -> dict[str, str]:
    """Find the attributes that an operation's metadata sets; a name with the prefix goes before the bare one.

    An empty value of one that may not be empty sets nothing: the default stays.
    """
    bare: dict[str, str] = {}
    prefixed: dict[str, str] = {}
    for name, value in metadata.items():
        attribute = _attribute_of(name)
        if attribute is not None and (value or attribute not in _NEVER_EMPTY):
            (bare if attribute == name else prefixed)[attribute] = value
    return bare | prefixed


def content_type_in(metadata: Mapping[str, str]) -> str | None:
    """Tell the content type that metadata names: `contentType`, else an override of `datacontenttype`."""
    if not metadata:
        return None
    return metadata.get("contentType") or overridden_attributes(metadata).get("datacontenttype")


def is_raw(metadata: Mapping[str, str]) -> bool:
    text = metadata.get("rawPayload")
    if text is None:
        return False
    if text not in _RAW_PAYLOAD:
        raise InvalidRequest(f"rawPayload value must be a valid boolean: actual is {text!r}")
    return _RAW_PAYLOAD[text]


def _require_time(text: str | None) -> None:
    if text is not None and not is_timestamp(text):
        raise InvalidRequest(f"an event's time must be as in RFC 3339, 2026-01-02T03:04:05Z: actual is {text!r}")


@lru_cache(maxsize=4096)
def _attribute_of(metadata_name: str) -> str | None:
    """Tell the attribute that a metadata name sets; None for a word of the runtime, and for what cannot be set.

    An attribute whose name is no valid one is told of in the log, once per name as long as it is remembered here.
    """
    lowered = metadata_name.lower()
    name = lowered.removeprefix(_PREFIX) if lowered.startswith(_PREFIX) else metadata_name
    if not name or name in _FIXED or name.lower() in _RUNTIME_WORDS or name.lower().startswith(_NEVER_LEAVE):
        return None
    if not VALID_ATTRIBUTE_NAME.fullmatch(name):
        logger.warning("%r is no valid CloudEvents attribute name (lower-case letters and digits); sent as it is", name)
    return name
