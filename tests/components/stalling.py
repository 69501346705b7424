"""Calls of the commit function that stand still for no lock, as on a slow disk: nobody's patience ends them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

import asyncpg

from statecast.components.testing.deadline import until

_TRIGGER = """
create table if not exists stalling (key text);
create or replace function stall() returns trigger language plpgsql as $$ begin
  while exists (select from stalling where new.key like key) loop perform pg_sleep(0.002); end loop;
  return new;
end $$;
create or replace trigger stall before insert on state for each row execute function stall();
"""


@asynccontextmanager
async def stalled(admin: asyncpg.Connection, keys: str = "%") -> AsyncIterator[None]:
    """Let writes of keys that are like this stand still until the end of the block."""
    await admin.execute(_TRIGGER)
    await admin.execute("insert into stalling values ($1)", keys)
    yield
    await admin.execute("delete from stalling")


async def until_stalled(admin: asyncpg.Connection, calls: int = 1, age: timedelta = timedelta(0)) -> None:
    """Wait until so many calls stand still, and have been under way for so long."""

    async def is_so() -> bool:
        found = await admin.fetchval(
            "select count(*) from pg_stat_activity where wait_event = 'PgSleep'"
            " and datname = current_database() and clock_timestamp() - query_start >= $1",
            age,
        )
        return int(found) >= calls

    await until(is_so)
