"""A role with the rights that a process needs at its work, and with no right to make or change a table."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit
from uuid import uuid4

import asyncpg

TABLE_RIGHTS = "select, insert, update, delete, truncate"
SEQUENCE_RIGHTS = "usage, select"


@dataclass(frozen=True, slots=True)
class PlainRole:
    """`url` is that of the database, for this role."""

    url: str
    _name: str
    _admin: asyncpg.Connection

    async def grant(self) -> None:
        """Give the rights on all that there is now."""
        await self._admin.execute(
            f"grant {TABLE_RIGHTS} on all tables in schema public to {self._name};"
            f"grant {SEQUENCE_RIGHTS} on all sequences in schema public to {self._name}"
        )


@asynccontextmanager
async def plain_role(database: str) -> AsyncIterator[PlainRole]:
    """Make a role that has no rights yet; it is dropped at the end."""
    parts, name = urlsplit(database), f"plain_{uuid4().hex}"
    admin = await asyncpg.connect(database)
    try:
        await admin.execute(f"create role {name} login")
        yield PlainRole(parts._replace(netloc=f"{name}@{parts.hostname}:{parts.port}").geturl(), name, admin)
        await admin.execute(f"drop owned by {name}; drop role {name}")
    finally:
        await admin.close()
