"""One outbox event, rendered at commit: which metadata overrides what, and which never leaves.

Follows Dapr's outbox how-to as documented: `cloudevent.type` and its kin override the attribute of that name, so
do the bare names; custom names become extension attributes.
"""

import logging
import os
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from itertools import count

from statecast.components.state.commit import OutboxRecord
from statecast.errors import InvalidRequest
from statecast.pubsub.cloudevent import (
    VALID_ATTRIBUTE_NAME,
    Data,
    TraceContext,
    content_type_of,
    envelope,
    plain_bytes,
    timestamp,
)

logger = logging.getLogger(__name__)

PARTITION_KEY = "partitionKey"

_PREFIX = "cloudevent."
_FIXED = frozenset({"data", "data_base64", "specversion", "topic", "pubsubname"})
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


@dataclass(frozen=True, slots=True)
class EventSource:
    """What all events of one commit have in common."""

    app_id: str
    time: datetime
    trace: TraceContext
    ids: EventIds


@dataclass(frozen=True, slots=True)
class Occurrence:
    """What one event tells of, before it is rendered. `key` is the logical state key, `order_key` the full one."""

    pubsub: str
    topic: str
    order_key: str
    key: str | None
    type: str
    subject: str
    data: Data | None
    metadata: Mapping[str, str]


def render(occurrence: Occurrence, source: EventSource) -> OutboxRecord:
    """Render an event completely. Raises InvalidRequest for a `rawPayload` that is no boolean."""
    overrides = dict(overridden_attributes(occurrence.metadata))
    event_id = overrides.pop("id", "") or source.ids.next()
    if is_raw(occurrence.metadata):
        body = plain_bytes(occurrence.data) if occurrence.data else b""
    else:
        body = envelope(_attributes(occurrence, source, event_id, overrides), occurrence.data)
    partition_key = _runtime_word(occurrence.metadata, PARTITION_KEY) or occurrence.key
    return OutboxRecord(
        order_key=occurrence.order_key,
        event_id=event_id,
        pubsub=occurrence.pubsub,
        topic=occurrence.topic,
        body=body,
        metadata={PARTITION_KEY: partition_key} if partition_key else {},
    )


def overridden_attributes(metadata: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    """Find the attributes that an operation's metadata sets; of a bare and a prefixed name the prefixed one is last."""
    prefixed = [name for name in metadata if name.lower().startswith(_PREFIX)]
    for name in metadata:
        if name not in prefixed and _may_be_set(name):
            yield name, metadata[name]
    for name in prefixed:
        if _may_be_set(bare := name.lower().removeprefix(_PREFIX)):
            yield bare, metadata[name]


def is_raw(metadata: Mapping[str, str]) -> bool:
    text = metadata.get("rawPayload", "")
    if text not in _RAW_PAYLOAD:
        raise InvalidRequest(f"rawPayload value must be a valid boolean: actual is {text!r}")
    return _RAW_PAYLOAD[text]


def _attributes(
    occurrence: Occurrence, source: EventSource, event_id: str, overrides: dict[str, str]
) -> dict[str, str]:
    trace = overrides.get("traceparent") or source.trace.traceparent
    attributes = {
        "specversion": "1.0",
        "id": event_id,
        "source": source.app_id,
        "type": occurrence.type,
        "time": timestamp(source.time),
        "datacontenttype": content_type_of(occurrence.data) if occurrence.data else "application/json",
        "topic": occurrence.topic,
        "pubsubname": occurrence.pubsub,
        "traceid": trace,
        "traceparent": trace,
        "tracestate": source.trace.tracestate,
        "subject": occurrence.subject,
        **overrides,
    }
    if not attributes["subject"]:
        del attributes["subject"]
    return attributes


def _may_be_set(name: str) -> bool:
    if name in _FIXED or name.lower() in _RUNTIME_WORDS or name.startswith("outbox.") or not name:
        return False
    if not VALID_ATTRIBUTE_NAME.fullmatch(name):
        _tell(name)
    return True


def _runtime_word(metadata: Mapping[str, str], word: str) -> str | None:
    return next((value for name, value in metadata.items() if name.lower() == word.lower()), None)


@lru_cache(maxsize=1024)  # once per name
def _tell(name: str) -> None:
    logger.warning("%r is no valid CloudEvents attribute name (lower-case letters and digits); sent as it is", name)
