"""What commits touch, and which of those that wait may go together: no I/O here."""

from collections.abc import Iterable, Set
from dataclasses import dataclass
from typing import Protocol, TypeVar

from statecast.components.state.commit import Commit, Upsert

Footprint = frozenset[str | bytes | tuple[str, str]]


def footprint(commit: Commit) -> Footprint:
    """Name everything that two commits of one batch may not have in common: state keys, marks, claims."""
    return frozenset(
        [
            *(operation.key for operation in commit.operations),
            *(mark.digest for mark in commit.marks),
            *((guard.type, guard.id) for guard in commit.guards),
        ]
    )


def weight(commit: Commit) -> int:
    """Tell about how many bytes a commit brings."""
    values = sum(len(operation.value) for operation in commit.operations if isinstance(operation, Upsert))
    return values + sum(len(record.body) for record in commit.records)


class Waiting(Protocol):
    """A commit that waits for its turn."""

    footprint: Footprint
    weight: int


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that one batch has: so many commits, of so many bytes, looked for among the first `scanned`."""

    commits: int
    weight: int
    scanned: int


WaitingT = TypeVar("WaitingT", bound=Waiting)


def next_batch(queue: Iterable[WaitingT], held: Set[str | bytes | tuple[str, str]], limits: Limits) -> list[WaitingT]:
    """Choose what goes together now, in the order of the queue; what touches something `held` is passed over.

    A commit that has something in common with one that was passed over is passed over too, so that the commits of
    one key keep their order. The first one that may go is taken however heavy it is.
    """
    touched = set(held)
    batch: list[WaitingT] = []
    weight_left = limits.weight
    for scanned, waiting in enumerate(queue):
        if len(batch) >= limits.commits or scanned >= limits.scanned:
            break
        is_free = touched.isdisjoint(waiting.footprint)
        touched |= waiting.footprint
        if not is_free:
            continue
        if batch and waiting.weight > weight_left:
            continue
        batch.append(waiting)
        weight_left -= waiting.weight
    return batch
