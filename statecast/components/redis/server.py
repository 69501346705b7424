"""What a Redis server tells of itself, and whether it can be worked with."""

from collections.abc import Mapping
from typing import Final

_OLDEST: Final = (6, 2)
"""XTRIM MINID, XAUTOCLAIM and exclusive ranges are of 6.2."""


def parse_info(reply: bytes) -> Mapping[str, str]:
    """Read the answer to INFO, lines of `name:value`."""
    lines = reply.decode(errors="replace").splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line and not line.startswith("#"))


def find_problem(facts: Mapping[str, str]) -> str | None:
    """Tell why a server with these facts cannot be used, if it cannot."""
    version = facts.get("redis_version", "")
    if tuple(int(part) for part in version.split(".")[:2] if part.isdecimal()) < _OLDEST:
        return f"the server is Redis {version}; 6.2 or newer is needed"
    if facts.get("redis_mode") == "cluster":
        return "the server is a cluster: a script whose keys are in several hash slots cannot run there"
    return None
