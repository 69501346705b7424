"""Durations as Go writes them, which is how component files have them: `1h30m`, `500ms`, or a bare whole number."""

import re
from datetime import timedelta
from decimal import Decimal
from typing import Final, Literal

_MICROSECONDS: Final = {
    "ns": Decimal("0.001"),
    "us": Decimal(1),
    "µs": Decimal(1),  # U+00B5, the micro sign
    "μs": Decimal(1),  # U+03BC, the Greek letter: Go takes both
    "ms": Decimal(1_000),
    "s": Decimal(1_000_000),
    "m": Decimal(60_000_000),
    "h": Decimal(3_600_000_000),
}
_NUMBER: Final = r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+"
_PART: Final = re.compile(rf"({_NUMBER})({'|'.join(_MICROSECONDS)})")
_DURATION: Final = re.compile(rf"([+-]?)((?:{_PART.pattern})+)")
_BARE: Final = re.compile(r"[+-]?[0-9]+")


def parse_duration(text: str, bare: Literal["seconds", "milliseconds"]) -> timedelta:
    """Parse Go's `1h30m`, `500ms`, `-1.5s`, or a bare whole number in the given unit, to the nearest microsecond.

    Raises ValueError, also for what is longer than a timedelta can be.
    """
    text = text.strip()
    try:
        if _BARE.fullmatch(text):
            return timedelta(**{bare: int(text)})
        if match := _DURATION.fullmatch(text):
            return timedelta(microseconds=_signed(match[1], _sum_of_parts(match[2])))
    except (OverflowError, ValueError):
        pass  # more digits than int, or more days than timedelta, can take
    raise ValueError(f"{text!r} is no duration")


def _sum_of_parts(text: str) -> int:
    return round(sum(Decimal(number) * _MICROSECONDS[unit] for number, unit in _PART.findall(text)))


def _signed(sign: str, number: int) -> int:
    return -number if sign == "-" else number
