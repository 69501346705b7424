"""Reading a component's metadata: typed, with Dapr's spellings, and errors that name the field and what it takes."""

import logging
import re
from collections.abc import Iterable
from datetime import timedelta
from typing import Literal

from statecast.components.manifest import Component
from statecast.errors import ComponentError

logger = logging.getLogger(__name__)

STATE_FIELDS = frozenset(
    {
        "keyPrefix",
        "actorStateStore",
        "primaryEncryptionKey",
        "secondaryEncryptionKey",
        "ttlInSeconds",
        "outboxPublishPubsub",
        "outboxPublishTopic",
        "outboxPublishDeletes",
        "outboxPubsub",
        "outboxDiscardWhenMissingState",
    }
)
"""Fields of every state store, which the runtime reads and a backend need not know."""

BROKER_FIELDS = frozenset({"allowedTopics", "publishingScopes", "subscriptionScopes", "protectedTopics"})
"""Fields of every pub/sub component, likewise."""

_TRUE = frozenset({"y", "yes", "true", "t", "on", "1"})
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")
_DURATION = re.compile(rf"[+-]?(?:{_DURATION_PART.pattern})+")


def is_truthy(text: str) -> bool:
    """Read a word as Dapr does: y, yes, true, t, on, 1 in any case are true, all else is false."""
    return text.strip().lower() in _TRUE


def parse_duration(text: str, bare: Literal["seconds", "milliseconds"]) -> timedelta:
    """Parse Go's `1h30m`, `500ms`, or a bare whole number in the given unit. Raises ValueError."""
    text = text.strip()
    if re.fullmatch(r"[+-]?\d+", text):
        return timedelta(**{bare: int(text)})
    if not _DURATION.fullmatch(text):
        raise ValueError(f"{text!r} is no duration")
    seconds = sum(float(number) * _UNITS[unit] for number, unit in _DURATION_PART.findall(text))
    return timedelta(seconds=-seconds if text.startswith("-") else seconds)


class MetadataReader:
    """Hands out a component's metadata field by field; `finish` warns about what nobody asked for.

    Names match in any case. An empty value counts as not given. Every reading method raises ComponentError, which
    names the field and what it takes, and its value unless that is secret.
    """

    def __init__(self, component: Component, runtime_fields: Iterable[str]) -> None:
        self._component = component
        self._values = {name.lower(): value for name, value in component.metadata.items()}
        self._asked = {name.lower() for name in runtime_fields}

    def text(self, name: str, *, aliases: Iterable[str] = (), default: str | None = None) -> str | None:
        names = [name.lower(), *(alias.lower() for alias in aliases)]
        self._asked.update(names)
        return next((value for each in names if (value := self._values.get(each))), default)

    def required_text(self, name: str, *, aliases: Iterable[str] = ()) -> str:
        value = self.text(name, aliases=aliases)
        if value is None:
            raise self.error(name, "is required")
        return value

    def boolean(self, name: str, *, default: bool = False) -> bool:
        value = self.text(name)
        return default if value is None else is_truthy(value)

    def integer(self, name: str, *, default: int, minimum: int | None = None, maximum: int | None = None) -> int:
        value = self.text(name)
        if value is None:
            return default
        if not re.fullmatch(r"[+-]?\d+", value.strip()):
            raise self.error(name, "takes a whole number")
        number = int(value)
        if minimum is not None and number < minimum:
            raise self.error(name, f"must be {minimum} or more")
        if maximum is not None and number > maximum:
            raise self.error(name, f"must be {maximum} or less")
        return number

    def duration(
        self,
        name: str,
        *,
        default: timedelta,
        bare: Literal["seconds", "milliseconds"] = "seconds",
        aliases: Iterable[str] = (),
        minimum: timedelta | None = None,
    ) -> timedelta:
        value = self.text(name, aliases=aliases)
        if value is None:
            return default
        try:
            duration = parse_duration(value, bare)
        except ValueError:
            raise self.error(name, f"takes a duration such as 500ms, 20s or 1h, or a number of {bare}") from None
        if minimum is not None and duration < minimum:
            raise self.error(name, f"must be {minimum.total_seconds():g}s or more")
        return duration

    def choice(self, name: str, choices: Iterable[str], *, default: str) -> str:
        value = self.text(name)
        if value is None:
            return default
        choices = tuple(choices)
        if value.strip().lower() not in choices:
            raise self.error(name, f"takes one of {', '.join(choices)}")
        return value.strip().lower()

    def unsupported(self, *names: str) -> None:
        """Name fields that Dapr knows and this version does not act on: a warning for each one that is given."""
        for name in names:
            if self.text(name) is not None:
                logger.warning("component %r: %s is not supported yet and has no effect", self._component.name, name)

    def finish(self) -> None:
        """Warn about every field that was not asked for."""
        for name in self._component.metadata:
            if name.lower() not in self._asked:
                logger.warning(
                    "component %r: %s knows no metadata field %r; it has no effect",
                    self._component.name,
                    self._component.type,
                    name,
                )

    def error(self, name: str, expectation: str) -> ComponentError:
        """Make the error for one field: `components/a.yaml, document 1: component 'x', field 'y' ...`."""
        shown = ""
        if (value := self._values.get(name.lower())) and name.lower() not in self._component.secret_fields:
            shown = f"; it is {value!r}"
        origin = f"{self._component.origin}: " if self._component.origin else ""
        return ComponentError(f"{origin}component {self._component.name!r}: {name} {expectation}{shown}")
