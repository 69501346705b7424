"""What a store may offer besides the seam: bringing its schema up to date ahead of time."""

from typing import Protocol, runtime_checkable


@runtime_checkable
class Migratable(Protocol):
    """A store whose schema someone with more rights than the app may bring up to date before the app opens it.

    Both connect by themselves, on a store that is not open, and raise ComponentError and StoreUnavailable, as opening
    does: whoever asked for it tells of which component.
    """

    async def pending_migrations(self) -> list[str]:
        """Tell the statements that opening would run now, in their order, meant for one transaction."""
        ...

    async def migrate(self) -> None:
        """Run them; nothing is changed or locked where there are none."""
        ...
