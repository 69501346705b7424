"""How long something may be missing before that is believed, over several calls."""

from collections.abc import Hashable

from statecast.clock import Clock

MOST_REMEMBERED = 1_000


class Patience:
    """Counts from the moment at which something is first found missing to the one at which it is found.

    A server that is asked for a topic may be making it, and a partition without a leader is about to get one. So the
    first who ask wait, and those who ask later are told at once.
    """

    def __init__(self, seconds: float, clock: Clock) -> None:
        self._seconds = seconds
        self._clock = clock
        self._since: dict[Hashable, float] = {}

    def is_over(self, what: Hashable) -> bool:
        """Note that it is missing; tell whether it has been for too long."""
        now = self._clock.monotonic()
        if len(self._since) > MOST_REMEMBERED:
            # Names that are made up shall not fill the memory.
            self._since.clear()
        return now - self._since.setdefault(what, now) >= self._seconds

    def found(self, what: Hashable) -> None:
        self._since.pop(what, None)
