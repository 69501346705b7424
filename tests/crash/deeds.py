"""Random transactions of several operations, and what must be found once they are all over. Pure.

An account's value is its history: the token of every transaction that has written it. So the state itself tells what
was committed, and an event of an account, which is its value at that moment, tells at which place in the history.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from random import Random
from typing import Any

ACCOUNTS = tuple(f"account-{number}" for number in range(12))


class Ending(StrEnum):
    """What the caller of a commit was told; `UNTOLD`: it was cancelled, or the outcome is unknown."""

    APPLIED = "applied"
    REFUSED = "refused"
    UNTOLD = "untold"


@dataclass(frozen=True, slots=True)
class Deed:
    """One transaction: it writes `accounts`, and a note of its own if `has_note`; it depends on `reads`, deletes the
    note of the transaction `removes`, and publishes an event beside if `announces`. `is_stale`: one of the etags
    that it gives is no account's, so it is to be refused."""

    token: str
    accounts: tuple[str, ...]
    reads: tuple[str, ...] = ()
    has_note: bool = False
    removes: str | None = None
    announces: bool = False
    is_stale: bool = False

    @classmethod
    def draw(cls, random: Random, token: str, notes: Sequence[str]) -> "Deed":
        """Draw one; `notes` are the tokens whose notes it may delete."""
        accounts = random.sample(ACCOUNTS, random.choice((1, 2, 3, 4)))
        split = random.randint(1, len(accounts))
        return cls(
            token,
            tuple(accounts[:split]),
            tuple(accounts[split:]),
            has_note=random.random() < 0.5,
            removes=random.choice(notes) if notes and random.random() < 0.5 else None,
            announces=random.random() < 0.3,
            is_stale=random.random() < 0.1,
        )

    @classmethod
    def parse(cls, line: Mapping[str, Any]) -> "Deed":
        return cls(**{**line, "accounts": tuple(line["accounts"]), "reads": tuple(line["reads"])})

    def line(self) -> dict[str, Any]:
        return asdict(self)


def note_key(token: str) -> str:
    return f"note-{token}"


@dataclass(slots=True)
class Journal:
    """What the writers did, by token; one that was killed has begun deeds without an ending."""

    begun: dict[str, Deed] = field(default_factory=dict)
    ended: dict[str, Ending] = field(default_factory=dict)

    def read(self, lines: Iterable[Mapping[str, Any]]) -> None:
        for line in lines:
            if "ending" in line:
                self.ended[line["token"]] = Ending(line["ending"])
            else:
                self.begun[line["token"]] = Deed.parse(line)

    def count(self, ending: Ending) -> int:
        return sum(each is ending for each in self.ended.values())


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is found in the end: histories by account, the tokens of the notes that stand, and all events that
    arrived (repeats too) in their order."""

    histories: Mapping[str, Sequence[str]]
    notes: frozenset[str]
    events: Sequence[Mapping[str, Any]]

    @property
    def committed(self) -> frozenset[str]:
        return frozenset(token for history in self.histories.values() for token in history)


def problems(journal: Journal, outcome: Outcome) -> list[str]:
    """List all that contradicts "everything or nothing, and the event with its commit"."""
    return [
        *_broken_promises(journal, outcome),
        *_halves(journal, outcome),
        *_wrong_notes(journal, outcome),
        *_wrong_account_events(outcome),
        *_wrong_other_events(journal, outcome),
    ]


def _broken_promises(journal: Journal, outcome: Outcome) -> Iterable[str]:
    committed = outcome.committed
    for token, ending in journal.ended.items():
        if ending is Ending.APPLIED and token not in committed:
            yield f"{token} was acknowledged, and is not there"
        if ending is Ending.REFUSED and token in committed:
            yield f"{token} was refused, and is there"
        if ending is Ending.APPLIED and journal.begun[token].is_stale:
            yield f"{token} was acknowledged in spite of a stale etag"
    for token in committed - journal.begun.keys():
        yield f"{token} is there, and nobody wrote it"


def _halves(journal: Journal, outcome: Outcome) -> Iterable[str]:
    for account, history in outcome.histories.items():
        for token, times in Counter(history).items():
            if times > 1:
                yield f"{token} was applied to {account} {times} times"
            if token in journal.begun and account not in journal.begun[token].accounts:
                yield f"{token} was applied to {account}, which it did not write"
    for token in outcome.committed & journal.begun.keys():
        for account in journal.begun[token].accounts:
            if token not in outcome.histories.get(account, ()):
                yield f"{token} was committed, but not to {account}"


def _wrong_notes(journal: Journal, outcome: Outcome) -> Iterable[str]:
    deeds = [journal.begun[token] for token in outcome.committed & journal.begun.keys()]
    removed = {deed.removes for deed in deeds}
    expected = {deed.token for deed in deeds if deed.has_note} - removed
    yield from (f"the note of {token} is missing" for token in expected - outcome.notes)
    yield from (f"the note of {token} should not be there" for token in outcome.notes - expected)


def _wrong_account_events(outcome: Outcome) -> Iterable[str]:
    told: dict[str, list[Sequence[str]]] = {account: [] for account in outcome.histories}
    for event in _first_deliveries(outcome.events):
        if "account" in event["data"]:
            told.setdefault(event["data"]["account"], []).append(event["data"]["history"])
    for account, histories in told.items():
        final = outcome.histories.get(account, ())
        if histories != [final[:place] for place in range(1, len(final) + 1)]:
            yield f"{account} has the history {final}, and its events told {[history[-1] for history in histories]}"


def _wrong_other_events(journal: Journal, outcome: Outcome) -> Iterable[str]:
    deeds = [journal.begun[token] for token in outcome.committed & journal.begun.keys()]
    events = [event["data"] for event in _first_deliveries(outcome.events)]
    for what, expected in (
        ("note", [deed.token for deed in deeds if deed.has_note]),
        ("announced", [deed.token for deed in deeds if deed.announces]),
    ):
        told = Counter(data[what] for data in events if what in data)
        for token, times in (told - Counter(expected)).items():
            yield f"{times} events told {what} of {token} without a commit of their own"
        for token in Counter(expected) - told:
            yield f"no event told {what} of {token}"


def _first_deliveries(events: Iterable[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
    firsts: dict[str, Mapping[str, Any]] = {}
    for event in events:
        firsts.setdefault(event["id"], event)
    return firsts.values()
