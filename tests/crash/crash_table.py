"""What the crash matrix found, point by point and pair by pair, as one table. Pure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Finding:
    """What came of one kill: each a list of what is wrong, none of them when all is well.

    `made_up` are events without a commit. `repeats` counts what arrived again with its id, which is allowed.
    """

    lost: tuple[str, ...] = ()
    doubled: tuple[str, ...] = ()
    reordered: tuple[str, ...] = ()
    made_up: tuple[str, ...] = ()
    repeats: int = 0

    @property
    def is_good(self) -> bool:
        return not (self.lost or self.doubled or self.reordered or self.made_up)

    def __str__(self) -> str:
        return f"{len(self.lost)} {len(self.doubled)} {len(self.reordered)}"


@dataclass(slots=True)
class CrashTable:
    pairs: dict[str, Mapping[str, Finding | None]] = field(default_factory=dict)
    """By pair, the finding of each point; None where the pair does nothing of the kind."""

    def lines(self, points: Iterable[str]) -> Iterable[str]:
        points = list(points)
        width = max(map(len, points))
        yield "kill -9 at each point: lost, doubled in effect, reordered"
        yield "  ".join([" " * width, *self.pairs])
        for point in points:
            cells = (_cell(found, point).center(len(pair)) for pair, found in self.pairs.items())
            yield "  ".join([point.ljust(width), *cells]).rstrip()
        findings = [each for found in self.pairs.values() for each in found.values() if each is not None]
        missing = len(points) * len(self.pairs) - sum(map(len, self.pairs.values()))
        kills = f"{len(findings)} kills, {missing} MISSING" if missing else f"{len(findings)} kills"
        yield (
            f"{kills}: lost {sum(len(each.lost) for each in findings)},"
            f" doubled in effect {sum(len(each.doubled) for each in findings)},"
            f" reordered {sum(len(each.reordered) for each in findings)};"
            f" events without a commit {sum(len(each.made_up) for each in findings)};"
            f" repeats, which are allowed, {sum(each.repeats for each in findings)}"
        )


def _cell(found: Mapping[str, Finding | None], point: str) -> str:
    return str(found[point] or "-") if point in found else "?"
