"""A measurement beside its yardstick in the same run: machines differ, the ratio stays."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ratio:
    """`ours` and `yardstick` in the same unit; `target` is the least `ours / yardstick` that is aimed at."""

    name: str
    ours: float
    yardstick: float
    unit: str
    yardstick_name: str
    target: float

    @property
    def value(self) -> float:
        return self.ours / self.yardstick

    @property
    def is_met(self) -> bool:
        return self.value >= self.target
