"""From what a caller has in hands to the values of a commit: JSON or bytes, and a time to live."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import msgspec
import orjson

from statecast.components.state.commit import Concurrency, Consistency, Delete, ETag, Item, Upsert
from statecast.errors import InvalidRequest

TTL_METADATA = "ttlInSeconds"
FOREVER = timedelta(seconds=-1)
"""The time to live that overrides a component's default: the value does not expire."""

LONGEST_TTL = timedelta(seconds=2_147_483_647)
_BINARY = (bytes, bytearray, memoryview)


def upsert(
    key: str,
    value: Any,
    *,
    etag: str | None = None,
    concurrency: Concurrency | None = None,
    consistency: Consistency | None = None,
    ttl: timedelta | None = None,
    content_type: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Upsert:
    """Make an upsert of any value: what orjson writes, pydantic models, msgspec structs and dataclasses become JSON;
    bytes are kept as given.

    `content_type` is the one that the value's event has, like metadata `contentType`. Raises InvalidRequest for a
    value that is neither bytes nor JSON.
    """
    body, is_binary = encode(value)
    return Upsert(
        key,
        body,
        etag=None if etag is None else ETag(etag),
        concurrency=concurrency,
        consistency=consistency,
        ttl=ttl,
        is_binary=is_binary,
        metadata=with_content_type(metadata, content_type),
    )


def delete(key: str, *, etag: str | None = None, metadata: Mapping[str, str] | None = None) -> Delete:
    """Make a delete."""
    return Delete(key, None if etag is None else ETag(etag), dict(metadata or {}))


def encode(value: Any) -> tuple[bytes, bool]:
    """Encode a value; tell whether it is binary, that is, not JSON text."""
    if isinstance(value, _BINARY):
        return bytes(value), True
    try:
        return orjson.dumps(value, default=_plain), False
    except TypeError as error:
        reason = error.__cause__ or error
        raise InvalidRequest(f"a value of type {type(value).__name__} cannot be stored: {reason}") from error


def resolve_ttl(ttl: timedelta | None, metadata: Mapping[str, str], default: timedelta | None) -> timedelta | None:
    """Tell how long a value lives: `ttl`, else metadata `ttlInSeconds`, else the component's default; None: forever.

    0 and -1 second mean forever, too. Raises InvalidRequest for anything below, above 2147483647 seconds, or for
    text that is no whole number.
    """
    if ttl is None:
        ttl = _ttl_of(metadata)
    if ttl is None:
        ttl = default
    if ttl is None or ttl in (timedelta(0), FOREVER):
        return None
    if not timedelta(0) < ttl <= LONGEST_TTL:
        raise InvalidRequest(f"a time to live is 1 to 2147483647 seconds, or 0 or -1 for ever, not {ttl}")
    return ttl


def with_content_type(metadata: Mapping[str, str] | None, content_type: str | None) -> dict[str, str]:
    return {**(metadata or {}), "contentType": content_type} if content_type else dict(metadata or {})


def _ttl_of(metadata: Mapping[str, str]) -> timedelta | None:
    text = metadata.get(TTL_METADATA, "")
    if not text:
        return None
    try:
        return timedelta(seconds=int(text))
    except (ValueError, OverflowError):
        raise InvalidRequest(f"metadata {TTL_METADATA!r} takes a whole number of seconds, not {text!r}") from None


def _plain(value: Any) -> Any:
    if isinstance(value, Item):
        raise TypeError("it is a value with its key and etag; the value itself is its `value`, or its `json()`")
    if isinstance(value, Upsert | Delete):
        raise TypeError("it is an operation, which belongs into a transaction")
    if isinstance(value, msgspec.Struct):
        return msgspec.to_builtins(value)
    if isinstance(value, msgspec.Raw):
        return orjson.Fragment(bytes(value))
    dump = getattr(value, "model_dump", None)  # pydantic, which is not imported for it
    if dump is not None:
        return dump(mode="json")
    raise TypeError(f"{type(value).__name__} is not JSON serializable")
