"""How far a slice of the log is read, in terms of what transactions were visible. Pure.

A cursor on ids would lose what commits late with an early id. So a read takes what is visible in the snapshot `cur`
and was not in the snapshot `prev`, in the order of ids; one that finds more than it may give goes on behind the id
`after` with the same two snapshots, and only when all is given `cur` becomes the next `prev`.
"""

from collections.abc import Sequence
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

    def behind(self, last_id: int) -> "Position":
        return replace(self, after=last_id)

    @property
    def end(self) -> "Position":
        """Where all that is visible in `cur` has been read."""
        assert self.cur is not None
        return Position(self.cur)

    def is_near(self, earlier: "Position") -> bool:
        """Tell whether hardly more transactions began between an earlier position and this one than a read minds."""
        return not earlier.after and _end(self.prev) - _end(earlier.prev) < _WORTH_MOVING


def _end(snapshot: str) -> int:
    """Tell the first transaction that is after the snapshot: the middle part of `730:735:730,732`."""
    return int(snapshot.split(":")[1])


def group(leases: Sequence[Lease]) -> dict[Position, list[Lease]]:
    """Put those together that can be read by one query, since they stand at the same position."""
    groups: dict[Position, list[Lease]] = {}
    for lease in leases:
        groups.setdefault(Position.parse(lease.position), []).append(lease)
    return groups
