"""The names of our own keys, which stand beside the state: `statecast:orders:statestore:outbox:3`."""

from urllib.parse import quote

from statecast.components.state.commit import Guard, Mark


class KeyNames:
    """The keys of one (app id, component); neither name can be made to reach into another one's keys."""

    def __init__(self, app_id: str, component: str) -> None:
        self._prefix = f"statecast:{quote(app_id, safe='')}:{quote(component, safe='')}:"
        self.registry = f"{self._prefix}outbox"
        self.relays = f"{self._prefix}relays"
        self.rehearsal = f"{self._prefix}rehearsal"
        self._mark = f"{self._prefix}mark:"

    def stream(self, slice: int) -> str:
        return f"{self._prefix}outbox:{slice}"

    def lease(self, slice: int) -> str:
        return f"{self._prefix}lease:{slice}"

    def deferred(self, slice: int) -> str:
        return f"{self._prefix}deferred:{slice}"

    def deferred_entries(self, slice: int) -> str:
        return f"{self._prefix}deferred:{slice}:entries"

    def mark(self, mark: Mark) -> str:
        return self._mark + mark.digest.hex()

    def claim(self, type: str, id: str) -> str:
        return f"{self._prefix}claim:{quote(type, safe='')}:{id}"

    def claim_of(self, guard: Guard) -> str:
        return self.claim(guard.type, guard.id)
