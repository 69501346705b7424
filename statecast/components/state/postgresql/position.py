"""How far a slice of the log is read, in terms of what transactions were visible. Pure.

A cursor on ids would lose what commits late with an early id. So a read takes what is visible in the snapshot `cur`
and was not in the snapshot `prev`, in the order of ids; one that finds more than it may give goes on behind the id
`after` with the same two snapshots, and only when all is given `cur` becomes the next `prev`.
"""

from dataclasses import dataclass, replace
from typing import Self

from statecast.components.state.log import Lease

# So many transactions behind, a read is as quick as at the end.
_WORTH_MOVING = 1_000


@dataclass(frozen=True, slots=True)
class Position:
    """`prev` and `cur` are PostgreSQL's text of a pg_snapshot, `730:735:730,732`; `cur` None: none is pinned yet."""

    prev: str
    cur: str | None = None
    after: int = 0

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `str` makes: `730:735:730,732 740:740: 17`, with `-` for no pinned snapshot."""
        prev, cur, after = text.split(" ")
        return cls(prev, None if cur == "-" else cur, int(after))

    def __str__(self) -> str:
        return f"{self.prev} {self.cur or '-'} {self.after}"

    def pin(self, snapshot: str) -> "Position":
        """Fix what is to be read to what is visible in `snapshot`, unless that is fixed already."""
        return self if self.cur is not None else replace(self, cur=snapshot)

    def behind(self, last_id: int | None, *, is_full: bool) -> "Position":
        """Move on after a read that found rows up to `last_id`, and found as many as it was allowed if `is_full`.

        After one that found nothing the position stays where it was for a while: to persist it, and every relay's
        heartbeat, is a transaction, so an idle log would move and be persisted for ever.
        """
        assert self.cur is not None
        if is_full and last_id is not None:
            return replace(self, after=last_id)
        if last_id is None and self.after == 0 and _end(self.cur) - _end(self.prev) < _WORTH_MOVING:
            return Position(self.prev)
        return Position(self.cur)

    @property
    def is_exhausted(self) -> bool:
        """Nothing became visible between the two snapshots."""
        return self.cur == self.prev


def _end(snapshot: str) -> int:
    """Tell the first transaction that is after the snapshot: the middle part of `730:735:730,732`."""
    return int(snapshot.split(":")[1])


def group(leases: list[Lease]) -> dict[Position, list[Lease]]:
    """Put those together that can be read by one query, since they stand at the same position."""
    groups: dict[Position, list[Lease]] = {}
    for lease in leases:
        groups.setdefault(Position.parse(lease.position), []).append(lease)
    return groups
