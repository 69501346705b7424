"""Calls of the commit function that stand still for no lock, as on a slow disk: nobody's patience ends them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

import asyncpg

from statecast.components.testing.deadline import until

_TRIGGER = """
create table if not exists stalling (is_so boolean);
create or replace function stall() returns trigger language plpgsql as $$ begin
  while exists (select from stalling) loop perform pg_sleep(0.002); end loop;
  return new;
end $$;
create or replace trigger stall before insert on state for each row execute function stall();
"""


@asynccontextmanager
async def stalled(admin: asyncpg.Connection) -> AsyncIterator[None]:
    """Let writes stand still until the end of the block."""
    await stall(admin)
    yield
    await admin.execute("delete from stalling")


async def stall(admin: asyncpg.Connection) -> None:
    await admin.execute(_TRIGGER)
    await admin.execute("insert into stalling values (true)")


async def until_stalled(admin: asyncpg.Connection, age: timedelta = timedelta(0)) -> None:
    """Wait until a call stands still, and has been under way for so long."""

    async def is_so() -> bool:
        found = await admin.fetchval(
            "select exists (select from pg_stat_activity where wait_event = 'PgSleep'"
            " and datname = current_database() and clock_timestamp() - query_start >= $1)",
            age,
        )
        return bool(found)

    await until(is_so)
