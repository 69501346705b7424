"""State keys: what an app calls `order-1` stands in the database as `orders||order-1`. Pure."""

from dataclasses import dataclass
from typing import Final

from statecast.components.manifest import Component
from statecast.components.metadata import MetadataReader
from statecast.errors import InvalidRequest

SEPARATOR: Final = "||"


@dataclass(frozen=True, slots=True)
class KeyPrefix:
    """What stands before every key of one app in one store, separator included: `orders||`, or `""` for none."""

    text: str

    def full_key(self, key: str) -> str:
        """Put the prefix before a key. Raises InvalidRequest where `key` is none that an app may use."""
        check_key(key)
        return self.text + key

    def logical_key(self, full_key: str) -> str:
        """Take the prefix off again; a key that another prefix wrote is given as it stands."""
        return full_key.removeprefix(self.text)


def check_key(key: str) -> None:
    """Raise InvalidRequest where `key` has the separator, or a sign that not every store can keep.

    The empty key is a key.
    """
    # The text is that of dapr pkg/components/state/state_config.go checkKeyIllegal.
    if SEPARATOR in key:
        raise InvalidRequest(f"input key/keyPrefix '{_shown(key)}' can't contain '{SEPARATOR}'")
    if (reason := _unstorable(key)) is not None:
        raise InvalidRequest(f"key {key!r} {reason}")


def key_prefix(component: Component, *, app_id: str, namespace: str = "") -> KeyPrefix:
    """Choose the prefix by the component's `keyPrefix`: appid (also when it is absent), name, namespace, none, or a
    word of its own, which is lower-cased; an empty word is one too (`||order-1`).

    `namespace` is the NAMESPACE of the environment; without one, `namespace` is the same as `appid`. Raises
    ComponentError where the prefix has the separator, or a sign that not every store can keep.
    """
    fields = MetadataReader(component, ())
    prefix = _prefix(fields, component.name, app_id, namespace)
    if prefix is None:
        return KeyPrefix("")
    reason = f"must not contain {SEPARATOR!r}" if SEPARATOR in prefix else _unstorable(prefix)
    if reason is not None:
        raise fields.error("keyPrefix", f"makes the prefix of all keys, which {reason}")
    return KeyPrefix(prefix + SEPARATOR)


def _prefix(fields: MetadataReader, name: str, app_id: str, namespace: str) -> str | None:
    word = (fields.text("keyPrefix") or "") if fields.is_given("keyPrefix") else "appid"
    match word.lower():
        case "appid":
            return app_id
        case "name":
            return name
        case "namespace":
            return f"{namespace}.{app_id}" if namespace else app_id
        case "none":
            return None
        case own:
            return own


def _unstorable(text: str) -> str | None:
    if "\0" in text:
        return "must not contain NUL, which PostgreSQL cannot keep in text"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "must not contain a lone surrogate, which has no UTF-8"
    return None


def _shown(text: str) -> str:
    """Give the text as it is, but for signs that have no UTF-8: the message has to be sent."""
    return text.encode("utf-8", "backslashreplace").decode()
