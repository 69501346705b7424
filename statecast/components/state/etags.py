"""Drawing etags."""

import os
from itertools import count
from random import SystemRandom

from statecast.components.state.commit import ETag


class _Series:
    """The etags that one process draws: a beginning that they have in common, and consecutive numbers.

    Each has the form of a random UUID (RFC 9562 §5.4), as those of Dapr, and no two processes draw the same one: the
    beginning has 74 random bits, and the numbers begin at random too. Random bits for each would take much longer.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        random = SystemRandom()
        digits = f"{random.getrandbits(72):018x}"
        self._beginning = f"{digits[:8]}-{digits[8:12]}-4{digits[12:15]}-{random.choice('89ab')}{digits[15:]}-"
        # These have 12 digits, and at a million a second they would last for more than four years.
        self._numbers = count(random.randrange(1 << 44, 1 << 47))

    def draw(self) -> ETag:
        return ETag(f"{self._beginning}{next(self._numbers):x}")


_series = _Series()
if hasattr(os, "register_at_fork"):
    # Two processes that fork from one must not draw the same.
    os.register_at_fork(after_in_child=_series.begin)

new_etag = _series.draw
