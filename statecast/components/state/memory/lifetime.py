"""Whether a memory store is open: asked by everything it hands out."""

from statecast.errors import StoreUnavailable


class Lifetime:
    def __init__(self, name: str) -> None:
        self._name = name
        self.is_open = False

    def require_open(self) -> None:
        if not self.is_open:
            raise StoreUnavailable(f"state store {self._name!r} is not open")
