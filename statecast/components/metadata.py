"""Reading a component's metadata: typed, with Dapr's spellings, and errors that name the field and what it takes."""

import logging
import re
from collections.abc import Iterable
from datetime import timedelta
from typing import Final, Literal, NamedTuple

from statecast.components.address import Address, parse_address
from statecast.components.duration import parse_duration
from statecast.components.manifest import Component, describe
from statecast.errors import ComponentError

logger = logging.getLogger(__name__)

STATE_FIELDS: Final = frozenset(
    {
        "keyPrefix",
        "actorStateStore",
        "primaryEncryptionKey",
        "secondaryEncryptionKey",
        "ttlInSeconds",
        "outboxPublishPubsub",
        "outboxPublishTopic",
        "outboxPublishDeletes",
        "outboxMaxAttempts",
        "outboxDeadLetterTopic",
        "outboxPubsub",
        "outboxDiscardWhenMissingState",
    }
)
"""Fields of every state store, which the runtime reads and a backend need not know."""

BROKER_FIELDS: Final = frozenset({"allowedTopics", "publishingScopes", "subscriptionScopes", "protectedTopics"})
"""Fields of every pub/sub component, likewise."""

_TRUE: Final = frozenset({"y", "yes", "true", "t", "on", "1"})
_FALSE: Final = frozenset({"n", "no", "false", "f", "off", "0"})
_TEXT: Final = re.compile(r"[^\0\ud800-\udfff]*")
"""What every driver can take: UTF-8 has no half of a surrogate pair, and C no NUL."""
_WHOLE_NUMBER: Final = re.compile(r"[+-]?[0-9]{1,40}")
_SECRET_ENDINGS: Final = (
    "password",
    "passphrase",
    "secret",
    "token",
    "key",
    "credentials",
    "connectionstring",
    "dsn",
    "url",
    "uri",
)


def is_truthy(text: str) -> bool:
    """Read a word as Dapr does: y, yes, true, t, on, 1 in any case are true, all else is false."""
    return text.strip().lower() in _TRUE


def is_secret_name(name: str) -> bool:
    """Tell by its name whether a field may hold a secret: `redisPassword`, `connectionString`, `clientKey`, `url`."""
    return name.lower().endswith(_SECRET_ENDINGS)


class _Given(NamedTuple):
    name: str
    value: str


class MetadataReader:
    """Hands out a component's metadata field by field; `finish` warns about what nobody asked for.

    Names match in any case, so the same name in two spellings is an error, as is a value of a component made by hand
    that is no text. An empty value counts as not given.
    Every reading method raises ComponentError, which names the field and what it takes, and its value unless that
    may be secret: the component says so, or the field's name does.
    """

    def __init__(self, component: Component, runtime_fields: Iterable[str]) -> None:
        self._component = component
        self._given = _by_lower_name(component)
        self._asked = {name.lower() for name in runtime_fields}

    def text(self, name: str, *, aliases: Iterable[str] = (), default: str | None = None) -> str | None:
        """Give the field's value, or that of the first of `aliases` that has one."""
        given = self._find(name, aliases)
        return default if given is None else given.value

    def trimmed_text(self, name: str) -> str | None:
        """Give the field's value without the blanks around it; only blanks count as not given."""
        return (self.text(name) or "").strip() or None

    def required_text(self, name: str, *, aliases: Iterable[str] = ()) -> str:
        aliases = tuple(aliases)
        value = self.text(name, aliases=aliases)
        if value is None:
            raise self.error(name, f"(or {', '.join(aliases)}) is required" if aliases else "is required")
        return value

    def boolean(self, name: str, *, default: bool = False) -> bool:
        given = self._find(name)
        if given is None:
            return default
        if given.value.strip().lower() not in _TRUE | _FALSE:
            raise self.error(given.name, "takes true or false")
        return is_truthy(given.value)

    def integer(self, name: str, *, default: int, minimum: int | None = None, maximum: int | None = None) -> int:
        given = self._find(name)
        if given is None:
            return default
        if not _WHOLE_NUMBER.fullmatch(given.value.strip()):
            raise self.error(given.name, "takes a whole number")
        number = int(given.value)
        if minimum is not None and number < minimum:
            raise self.error(given.name, f"must be {minimum} or more")
        if maximum is not None and number > maximum:
            raise self.error(given.name, f"must be {maximum} or less")
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
        given = self._find(name, aliases)
        if given is None:
            return default
        try:
            duration = parse_duration(given.value, bare)
        except ValueError:
            expectation = f"takes a duration such as 500ms, 20s or 1h, or a number of {bare}"
            raise self.error(given.name, expectation) from None
        if minimum is not None and duration < minimum:
            raise self.error(given.name, f"must be {minimum.total_seconds():g}s or more")
        return duration

    def choice(self, name: str, choices: Iterable[str], *, default: str) -> str:
        """Give the one of `choices` that the value is, in any case of letters."""
        given = self._find(name)
        if given is None:
            return default
        choices = tuple(choices)
        word = given.value.strip().lower()
        chosen = next((choice for choice in choices if choice.lower() == word), None)
        if chosen is None:
            raise self.error(given.name, f"takes one of {', '.join(choices)}")
        return chosen

    def addresses(self, name: str, *, default_port: int, default: str | None = None) -> tuple[Address, ...]:
        """Give the servers that the field names, with commas between them; it is required unless there is a default."""
        text = self.required_text(name) if default is None else self.text(name) or default
        try:
            return tuple(parse_address(each, default_port, self.stand_in(name)) for each in text.split(","))
        except ValueError:
            # What is no address may be a URL with a password.
            expectation = "takes host or host:port, or several with commas between"
            raise self.error(name, expectation, shows_value=False) from None

    def is_given(self, name: str) -> bool:
        """Tell whether the field is there at all, be it with an empty value."""
        return name.lower() in self._given

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

    def error(self, name: str, expectation: str, *, shows_value: bool = True) -> ComponentError:
        """Make the error for one field: `a.yaml, document 1: component 'x': redisDB must be 0 or more; it is '-1'`."""
        value = self._given.get(name.lower())
        is_shown = shows_value and value and not is_secret_name(name) and self.stand_in(name) is None
        shown = f"; it is {value!r}" if is_shown else ""
        return ComponentError(f"{describe(self._component)}: {name} {expectation}{shown}")

    def stand_in(self, name: str) -> str | None:
        """Give what messages have in place of a value that the component calls secret: `<redisHost>`; else None."""
        return f"<{name}>" if name.lower() in self._component.secret_fields else None

    def _find(self, name: str, aliases: Iterable[str] = ()) -> _Given | None:
        names = (name, *aliases)
        self._asked.update(each.lower() for each in names)
        return next((_Given(each, value) for each in names if (value := self._given.get(each.lower()))), None)


def _by_lower_name(component: Component) -> dict[str, str]:
    given: dict[str, str] = {}
    for name, value in component.metadata.items():
        if name.lower() in given:
            # dapr/kit metadata/utils.go: duplicate after lower-casing
            raise ComponentError(f"{describe(component)}: {name} is given twice, in different spellings; give one")
        if not isinstance(value, str) or not _TEXT.fullmatch(value):
            raise ComponentError(f"{describe(component)}: {name} must be text, without NUL and lone surrogates")
        given[name.lower()] = value
    return given
