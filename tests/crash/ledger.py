"""What writers committed, what the topic tells, and where the two differ. Pure.

Every value that is written has its key, its number (one more than that of the value before) and a token that nobody
else gives: `{"key": "order-7", "number": 12, "token": "w3-118"}`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Tokens = dict[int, str]
"""By number, the token of the commit that wrote it."""


def next_value(key: str, before: Mapping[str, Any] | None, token: str) -> dict[str, Any]:
    return {"key": key, "number": before["number"] + 1 if before else 1, "token": token}


class Ledger:
    def __init__(self) -> None:
        self.committed: dict[str, Tokens] = {}

    def note(self, values: Iterable[Mapping[str, Any]]) -> None:
        """Note a commit of these values. Raises AssertionError where a number was given twice: an update was lost."""
        for value in values:
            tokens = self.committed.setdefault(value["key"], {})
            earlier = tokens.setdefault(value["number"], value["token"])
            assert earlier == value["token"], f"{value} was committed over {earlier}"

    @property
    def count(self) -> int:
        return sum(map(len, self.committed.values()))


@dataclass(slots=True)
class Findings:
    """What is wrong. `inverted` are first deliveries behind that of a later one of their key; `renamed` are repeats
    with another event id."""

    lost: list[str] = field(default_factory=list)
    uncommitted: list[str] = field(default_factory=list)
    inverted: list[str] = field(default_factory=list)
    renamed: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Told:
    """One event that arrived."""

    event_id: str
    key: str
    number: int
    token: str

    def __str__(self) -> str:
        return f"{self.key} #{self.number} {self.token}"

    @classmethod
    def parse(cls, envelope: Mapping[str, Any]) -> "Told":
        data = envelope["data"]
        return cls(envelope["id"], data["key"], data["number"], data["token"])


def first_deliveries(told: Iterable[Told]) -> dict[str, list[Told]]:
    """Give, for each key, what was told for the first time, in that order."""
    firsts: dict[str, list[Told]] = {}
    seen: set[tuple[str, int, str]] = set()
    for each in told:
        if (each.key, each.number, each.token) not in seen:
            seen.add((each.key, each.number, each.token))
            firsts.setdefault(each.key, []).append(each)
    return firsts


def compare(ledger: Ledger, told: Iterable[Told]) -> Findings:
    told = list(told)
    findings = Findings()
    firsts = first_deliveries(told)
    for key, tokens in ledger.committed.items():
        arrived = {each.number for each in firsts.get(key, ()) if tokens.get(each.number) == each.token}
        findings.lost += [
            f"{key} #{number} {token}" for number, token in sorted(tokens.items()) if number not in arrived
        ]
    for key, deliveries in firsts.items():
        tokens = ledger.committed.get(key, {})
        findings.uncommitted += [str(each) for each in deliveries if tokens.get(each.number) != each.token]
        highest = 0
        for each in deliveries:
            if each.number < highest:
                findings.inverted.append(f"{each} behind #{highest}")
            highest = max(highest, each.number)
    ids: dict[tuple[str, int, str], str] = {}
    for each in told:
        if ids.setdefault((each.key, each.number, each.token), each.event_id) != each.event_id:
            findings.renamed.append(str(each))
    return findings
