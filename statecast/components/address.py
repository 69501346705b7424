"""Addresses of servers as component files have them."""

import re
from dataclasses import dataclass
from ipaddress import IPv6Address
from typing import Final

_ADDRESS: Final = re.compile(r"(?:\[(?P<literal>[^\[\]]+)\]|(?P<name>[\w.-]+))(?::(?P<port>[0-9]{1,5}))?")


@dataclass(frozen=True, slots=True, repr=False)
class Address:
    """`stand_in` is what messages have in place of an address that is secret: `<redisHost>`."""

    host: str
    port: int
    stand_in: str | None = None

    def __str__(self) -> str:
        return self.stand_in or self.text

    def __repr__(self) -> str:
        return f"Address({self})"

    @property
    def text(self) -> str:
        """The address itself, as drivers take it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def reason(self, error: Exception) -> str:
        """Tell why there is no connection; the system's own words have the address in them."""
        is_telling = self.stand_in is not None and isinstance(error, OSError)
        return type(error).__name__ if is_telling else str(error)


def parse_address(text: str, default_port: int, stand_in: str | None = None) -> Address:
    """Parse `host`, `host:port`, `::1`, `[::1]:port`. Raises ValueError, whose text may have the address in it."""
    text = text.strip()
    match = _ADDRESS.fullmatch(text if text.count(":") < 2 or text.startswith("[") else f"[{text}]")
    if match is None or not 0 < (port := int(match["port"] or default_port)) < 65536:
        raise ValueError(f"{text!r} is no address")
    if (literal := match["literal"]) is not None:
        return Address(str(IPv6Address(literal)), port, stand_in)
    match["name"].encode("idna")  # as the system will: it takes no label that is empty or longer than 63 signs
    return Address(match["name"], port, stand_in)
