"""Commits that wait for their turn, and which of them may go together: no I/O here."""

from collections import deque
from collections.abc import Collection, Hashable
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar


class Waiting(Protocol):
    """A commit that waits: everything that two commits at a time may not have in common, and how many bytes it brings.

    `ahead` is the queue's own: at how many of these a commit stands before it.
    """

    ahead: int

    @property
    def footprint(self) -> Collection[Hashable]: ...

    @property
    def weight(self) -> int: ...

    @property
    def is_withdrawn(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that one batch has: so many commits, with so many members of their footprints, of so many bytes."""

    commits: int
    members: int
    weight: int

    def share(self, commits: int, calls: int) -> "Limits":
        """Keep to a fair part of so many commits, so that all of so many calls have some.

        One call with all of them would leave the server idle while its answers are read, and the client idle meanwhile.
        """
        return replace(self, commits=max(1, min(self.commits, -(-commits // calls))))


WaitingT = TypeVar("WaitingT", bound=Waiting)


class CommitQueue(Generic[WaitingT]):
    """A line for every key, mark and claim: a commit may go when it is at the front of all of its lines.

    So commits that may go have nothing in common, those with something in common keep their order, and whoever is held
    up holds up only those behind it. A commit stays at the front until it leaves.
    """

    def __init__(self) -> None:
        # Those behind the front; the front itself is in no deque, since most have nobody behind them.
        self._lines: dict[Hashable, deque[WaitingT] | None] = {}
        self._ready: deque[WaitingT] = deque()

    def join(self, waiting: WaitingT) -> None:
        lines = self._lines
        ahead = 0
        for member in waiting.footprint:
            if member not in lines:
                lines[member] = None
                continue
            ahead += 1
            line = lines[member]
            if line is None:
                lines[member] = deque((waiting,))
            else:
                line.append(waiting)
        waiting.ahead = ahead
        if not ahead:
            self._ready.append(waiting)

    def leave(self, waiting: WaitingT) -> None:
        """Let those behind a commit that `next_batch` gave move up, for it is done."""
        lines = self._lines
        for member in waiting.footprint:
            line = lines[member]
            if not line:
                del lines[member]
                continue
            following = line.popleft()
            following.ahead -= 1
            if not following.ahead:
                self._ready.append(following)

    def next_batch(self, limits: Limits) -> list[WaitingT]:
        """Choose what goes together now, in the order in which it became free to go; lets go what was withdrawn."""
        while self._ready:
            batch = take_batch(self._ready, limits)
            for waiting in batch:
                if waiting.is_withdrawn:
                    self.leave(waiting)
            if batch := [waiting for waiting in batch if not waiting.is_withdrawn]:
                return batch
        return []


def take_batch(line: deque[WaitingT], limits: Limits) -> list[WaitingT]:
    """Take from the front of `line` what one batch may have; the first one however large it is."""
    batch: list[WaitingT] = []
    members_left, weight_left = limits.members, limits.weight
    while line and len(batch) < limits.commits:
        members_left -= len(line[0].footprint)
        weight_left -= line[0].weight
        if batch and (members_left < 0 or weight_left < 0):
            break
        batch.append(line.popleft())
    return batch
