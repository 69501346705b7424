"""Rows of the state table as Dapr lays them out, read as items."""

import binascii
from base64 import b64decode
from datetime import UTC, datetime

from statecast.components.state.commit import ETag, Item
from statecast.components.state.sqlite.schema import NOW
from statecast.errors import CorruptState

ItemRow = tuple[str, str | bytes, int, str, str | None]


def select_items(table: str, keys: int) -> str:
    """Make the statement that reads the live ones of so many keys as rows of (key, value, is_binary, etag, expiry)."""
    wanted = "= ?" if keys == 1 else f"IN ({', '.join('?' * keys)})"
    return f"""SELECT key, value, is_binary, etag, expiration_time FROM "{table}"
        WHERE key {wanted} AND (expiration_time IS NULL OR expiration_time > {NOW})"""


def item_of(row: ItemRow) -> Item:
    """Read one row. Raises CorruptState where another program wrote what Dapr's layout does not have."""
    key, value, is_binary, etag, expiration = row
    return Item(key, _value(key, value, bool(is_binary)), ETag(etag), _expiry(key, expiration))


def utc(text: str) -> datetime:
    """Parse SQLite's `2026-01-02 03:04:05` or `2026-01-02 03:04:05.250`, which are in UTC."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def _value(key: str, value: str | bytes, is_binary: bool) -> bytes:
    if not is_binary:
        return value.encode() if isinstance(value, str) else value
    try:
        return b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise CorruptState(key, "a binary value that is no base64") from None


def _expiry(key: str, expiration: str | None) -> datetime | None:
    if expiration is None:
        return None
    try:
        return utc(expiration)
    except (TypeError, ValueError):
        raise CorruptState(key, f"the expiration time {expiration!r}") from None
