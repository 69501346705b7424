"""A dict whose entries may have an end."""

from datetime import datetime
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Expiring(Generic[K, V]):
    """An entry is absent from the moment of its end on; `sweep` gives back its space."""

    def __init__(self) -> None:
        self._values: dict[K, V] = {}
        self._ends: dict[K, datetime] = {}

    def __len__(self) -> int:
        """Count the entries, also those that have ended since the last sweep."""
        return len(self._values)

    def get(self, key: K, now: datetime) -> V | None:
        return None if self._has_ended(key, now) else self._values.get(key)

    def put(self, key: K, value: V, ends_at: datetime | None) -> None:
        self.discard(key)
        self._values[key] = value
        if ends_at is not None:
            self._ends[key] = ends_at

    def discard(self, key: K) -> None:
        self._values.pop(key, None)
        self._ends.pop(key, None)

    def sweep(self, now: datetime) -> None:
        for key in [key for key in self._ends if self._has_ended(key, now)]:
            self.discard(key)

    def _has_ended(self, key: K, now: datetime) -> bool:
        ends_at = self._ends.get(key)
        return ends_at is not None and ends_at <= now
