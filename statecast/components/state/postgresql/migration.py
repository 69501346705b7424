"""Bringing the schema up to date.

What is missing is found first, so that a current schema can be used without the rights to change it.
"""

from dataclasses import dataclass

import asyncpg

from statecast.components.state.log import DEFAULT_SLICES
from statecast.components.state.postgresql.commit_function import (
    COMMIT_PARAMETERS,
    COMMIT_REVISION,
    commit_statement,
)
from statecast.components.state.postgresql.config import PostgresqlConfig, QualifiedName
from statecast.components.state.postgresql.schema import (
    Layout,
    log_statements,
    metadata_statements,
    own_statements,
    state_statements,
)
from statecast.errors import ComponentError

Connection = asyncpg.Connection

MIGRATION_LOCK = 0x5CA57000_5CA57000
"""The advisory lock of those who change more than rows of their own."""


@dataclass(frozen=True, slots=True)
class Log:
    """The log of this (app id, component): its number among the logs of the database, and how many slices it has."""

    number: int
    slices: int


@dataclass(frozen=True, slots=True)
class _Levels:
    """What stands in the database: levels of 0 are not there yet. `next_log` is a number to take, `function` the
    revision of the commit function."""

    state: int
    own: int
    log: Log | None
    next_log: int
    function: int


async def find_layout(connection: Connection, config: PostgresqlConfig) -> Layout:
    """Find the schemas of the tables: where they are, else where they would be created."""
    prefix = config.table_prefix
    schema = await _schema_of(connection, QualifiedName(prefix.schema, f"{prefix.name}state"))
    metadata_schema = await _schema_of(connection, config.metadata_table)
    return Layout(schema, prefix.name, QualifiedName(metadata_schema, config.metadata_table.name))


async def migrate(connection: Connection, layout: Layout, app_id: str, component: str) -> Log:
    """Bring the schema up to date, in one transaction that only one process at a time is in; return the log.

    Nothing is changed, locked or asked for when it is current.
    """
    levels = await _levels(connection, layout, app_id, component)
    if levels.log is not None and not _missing(layout, levels, app_id, component):
        return levels.log
    async with connection.transaction():
        await connection.execute("set local statement_timeout = 0")
        await connection.execute("select pg_advisory_xact_lock($1)", MIGRATION_LOCK)
        for statement in metadata_statements(layout):
            await connection.execute(statement)
        levels = await _levels(connection, layout, app_id, component)
        for statement in _missing(layout, levels, app_id, component):
            await connection.execute(statement)
    return levels.log or Log(levels.next_log, DEFAULT_SLICES)


async def pending_statements(connection: Connection, layout: Layout, app_id: str, component: str) -> list[str]:
    """Tell the statements that `migrate` would run now, for someone with the rights to run them in one transaction."""
    missing = _missing(layout, await _levels(connection, layout, app_id, component), app_id, component)
    return [*metadata_statements(layout), *missing] if missing else []


def _missing(layout: Layout, levels: _Levels, app_id: str, component: str) -> list[str]:
    statements = state_statements(layout, levels.state) + own_statements(layout, levels.own)
    log = levels.log
    if log is None:
        log = Log(levels.next_log, DEFAULT_SLICES)
        statements += log_statements(layout, log.number, log.slices, app_id, component)
    # Not where it is newer: two releases beside each other would replace it in turn.
    if levels.function < COMMIT_REVISION:
        statements.append(commit_statement(layout, log.number, app_id))
    return statements


async def _schema_of(connection: Connection, table: QualifiedName) -> str:
    if table.schema is not None:
        return table.schema
    schema = await connection.fetchval(
        "select coalesce("
        " (select n.nspname from pg_class c join pg_namespace n on n.oid = c.relnamespace"
        "  where c.oid = to_regclass($1)),"
        " current_schema())::text",
        f'"{table.name}"',
    )
    if schema is None:
        raise ComponentError(f"the search path names no schema that exists, so table {table.name!r} has no place")
    return str(schema)


async def _levels(connection: Connection, layout: Layout, app_id: str, component: str) -> _Levels:
    if await connection.fetchval("select to_regclass($1) is null", layout.metadata):
        return _Levels(state=0, own=0, log=None, next_log=1, function=0)
    rows = await connection.fetch(
        f"select key, value from {layout.metadata} where key = any ($1::text[])",
        [layout.state_level_key, layout.own_level_key],
    )
    levels = {row["key"]: int(row["value"]) for row in rows}
    state, own = levels.get(layout.state_level_key, 0), levels.get(layout.own_level_key, 0)
    if own == 0:
        return _Levels(state, own, log=None, next_log=1, function=0)
    row = await connection.fetchrow(
        f"select (select coalesce(max(log), 0) + 1 from {layout.logs}) as next_log,"
        f" (select log from {layout.logs} where app_id = $1 and component = $2) as log,"
        f" (select slices from {layout.logs} where app_id = $1 and component = $2) as slices",
        app_id,
        component,
    )
    assert row is not None
    if row["log"] is None:
        return _Levels(state, own, log=None, next_log=row["next_log"], function=0)
    log = Log(row["log"], row["slices"])
    function = await connection.fetchval(
        "select coalesce(max(substring(p.prosrc from '-- revision ([0-9]+)')::int), 0)"
        " from pg_proc p join pg_namespace n on n.oid = p.pronamespace"
        " where n.nspname = $1 and p.proname = $2 and p.pronargs = $3",
        layout.schema,
        layout.commit_name(log.number),
        len(COMMIT_PARAMETERS),
    )
    return _Levels(state, own, log, row["next_log"], function)
