"""The tables: Dapr's own, and beside them ours, which begin with `statecast_`."""

from dataclasses import dataclass
from typing import Any

import apsw

from statecast.components.state.log import DEFAULT_SLICES
from statecast.components.state.sqlite.config import SqliteConfig

VERSION = 3

TIME_FORMAT = "%Y-%m-%d %H:%M:%f"

NOW = f"strftime('{TIME_FORMAT}', 'now')"
"""The database's clock as text in UTC, to the millisecond: `2026-01-02 03:04:05.250`.

Dapr writes `expiration_time` in whole seconds and compares it as text with CURRENT_TIMESTAMP, which has whole seconds
too. A fraction behind the same text keeps that comparison right: `…:05.250` sorts between `…:05` and `…:06`, so daprd
drops the row when second 6 begins (a value never dies early there), and its driver reads a fraction. For us it is the
exact millisecond, also against a row that daprd wrote: `…:05` sorts before `…:05.000`, so it has expired by then.
"""

# dapr state/sqlite/sqlite_migrations.go: the columns and types of its migration 1.
_DAPR_TABLES = """
CREATE TABLE IF NOT EXISTS "{metadata}" (key TEXT NOT NULL PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS "{state}" (
  key TEXT NOT NULL PRIMARY KEY,
  value TEXT NOT NULL,
  is_binary BOOLEAN NOT NULL,
  etag TEXT NOT NULL,
  expiration_time TIMESTAMP DEFAULT NULL,
  update_time TIMESTAMP NOT NULL DEFAULT CURRENT_TIMESTAMP
);
CREATE INDEX IF NOT EXISTS "statecast_{state}_expiration" ON "{state}" (expiration_time)
  WHERE expiration_time IS NOT NULL;
INSERT INTO "{metadata}" (key, value) VALUES ('migrations', '1') ON CONFLICT DO NOTHING;
"""

_OUR_TABLES = """
CREATE TABLE IF NOT EXISTS statecast_schema (version INTEGER NOT NULL PRIMARY KEY);
CREATE TABLE IF NOT EXISTS statecast_registry (
  log INTEGER PRIMARY KEY,
  app_id TEXT NOT NULL,
  component TEXT NOT NULL,
  slices INTEGER NOT NULL,
  UNIQUE (app_id, component)
);
CREATE TABLE IF NOT EXISTS statecast_slices (
  log INTEGER NOT NULL,
  slice INTEGER NOT NULL,
  owner TEXT,
  epoch INTEGER NOT NULL DEFAULT 0,
  position INTEGER NOT NULL DEFAULT 0,
  expires_at REAL NOT NULL DEFAULT 0,
  PRIMARY KEY (log, slice)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS statecast_relays (
  log INTEGER NOT NULL,
  owner TEXT NOT NULL,
  expires_at REAL NOT NULL,
  PRIMARY KEY (log, owner)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS statecast_marks (
  log INTEGER NOT NULL,
  digest BLOB NOT NULL,
  expires_at REAL NOT NULL,
  etags TEXT,
  PRIMARY KEY (log, digest)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS statecast_marks_expiration ON statecast_marks (expires_at);
CREATE TABLE IF NOT EXISTS statecast_claims (
  app_id TEXT NOT NULL,
  type TEXT NOT NULL,
  id TEXT NOT NULL,
  token TEXT NOT NULL,
  claimed_at TEXT NOT NULL,
  PRIMARY KEY (app_id, type, id)
) WITHOUT ROWID;
INSERT INTO statecast_schema (version) VALUES ({version}) ON CONFLICT DO NOTHING;
"""

# The index goes from topic to topic, and in each to what is due: a relay may ask often, however many queues are parked,
# are not due, or wait for a topic that takes nothing.
_DEFERRED_TABLES = """
CREATE TABLE IF NOT EXISTS statecast_deferred_queues (
  log INTEGER NOT NULL,
  slice INTEGER NOT NULL,
  order_key TEXT NOT NULL,
  pubsub TEXT NOT NULL,
  topic TEXT NOT NULL,
  attempts INTEGER NOT NULL,
  reason TEXT NOT NULL,
  due_at REAL,
  pending INTEGER NOT NULL,
  oldest_at TEXT NOT NULL,
  PRIMARY KEY (log, slice, order_key, pubsub, topic)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS statecast_deferred_due ON statecast_deferred_queues (log, pubsub, topic, due_at)
  WHERE due_at IS NOT NULL;
CREATE TABLE IF NOT EXISTS statecast_deferred_entries (
  log INTEGER NOT NULL,
  id INTEGER NOT NULL,
  slice INTEGER NOT NULL,
  order_key TEXT NOT NULL,
  event_id TEXT NOT NULL,
  format INTEGER NOT NULL,
  pubsub TEXT NOT NULL,
  topic TEXT NOT NULL,
  metadata TEXT NOT NULL,
  created_at TEXT NOT NULL,
  body BLOB NOT NULL,
  PRIMARY KEY (log, slice, order_key, pubsub, topic, id)
);
"""

# Each queue goes on with what was known of its key: what was parked waits until it is replayed.
_QUEUES_OF_KEYS = """
INSERT INTO statecast_deferred_entries SELECT * FROM statecast_deferred_entries_2;
INSERT INTO statecast_deferred_queues
  (log, slice, order_key, pubsub, topic, attempts, reason, due_at, pending, oldest_at)
SELECT log, e.slice, order_key, pubsub, topic, attempts, reason, due_at, count(*), min(created_at)
FROM statecast_deferred_entries_2 e JOIN statecast_deferred_keys USING (log, order_key)
GROUP BY log, order_key, pubsub, topic;
DROP TABLE statecast_deferred_entries_2;
DROP TABLE statecast_deferred_keys;
"""

# AUTOINCREMENT: a table that was trimmed empty must not begin again at 1, where every position has passed.
# No index on the slice: it costs a fifth of a commit. Reading and trimming go along the id.
_OUTBOX = """
CREATE TABLE IF NOT EXISTS "{outbox}" (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  slice INTEGER NOT NULL,
  order_key TEXT NOT NULL,
  event_id TEXT NOT NULL,
  format INTEGER NOT NULL,
  pubsub TEXT NOT NULL,
  topic TEXT NOT NULL,
  metadata TEXT NOT NULL,
  created_at TEXT NOT NULL,
  body BLOB NOT NULL
);
"""


@dataclass(frozen=True, slots=True)
class RegisteredLog:
    """The log of one (app id, component): its number, its table and its number of slices."""

    number: int
    slices: int

    @property
    def outbox(self) -> str:
        return f"statecast_outbox_{self.number}"


def migrate(connection: apsw.Connection, config: SqliteConfig) -> None:
    """Bring the schema up to date, as many processes as may do so at once: all but the first find it done."""
    if _is_current(connection, config):
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        connection.execute(_DAPR_TABLES.format(state=config.table, metadata=config.metadata_table))
        connection.execute(_OUR_TABLES.format(version=VERSION))
        _let_marks_remember_etags(connection)
        _let_topics_wait_apart(connection)
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def register_log(cursor: apsw.Cursor, app_id: str, component: str) -> RegisteredLog:
    """Find the log of (app id, component), or make it; inside the caller's transaction."""
    select = "SELECT log, slices FROM statecast_registry WHERE app_id = ? AND component = ?"
    insert = "INSERT INTO statecast_registry (app_id, component, slices) VALUES (?, ?, ?) RETURNING log, slices"
    rows: list[Any] = cursor.execute(select, (app_id, component)).fetchall()
    if rows:
        return RegisteredLog(*rows[0])
    inserted: list[Any] = cursor.execute(insert, (app_id, component, DEFAULT_SLICES)).fetchall()
    log = RegisteredLog(*inserted[0])
    cursor.execute(_OUTBOX.format(outbox=log.outbox))
    cursor.executemany(
        "INSERT INTO statecast_slices (log, slice) VALUES (?, ?)", [(log.number, slice) for slice in range(log.slices)]
    )
    return log


def _let_marks_remember_etags(connection: apsw.Connection) -> None:
    # Schema 1 had marks without them. A process of that version that is still running leaves the column null.
    columns = {str(row[1]) for row in connection.execute("PRAGMA table_info(statecast_marks)")}
    if "etags" not in columns:
        connection.execute("ALTER TABLE statecast_marks ADD COLUMN etags TEXT")


def _let_topics_wait_apart(connection: apsw.Connection) -> None:
    is_by_key = "statecast_deferred_keys" in _tables(connection)
    if is_by_key:
        connection.execute("ALTER TABLE statecast_deferred_entries RENAME TO statecast_deferred_entries_2")
    connection.execute(_DEFERRED_TABLES)
    if is_by_key:
        # Schema 2 had one queue for each order key. A process of that version that is still running finds the table of
        # its keys no more, and relays nothing from where it would put something aside.
        connection.execute(_QUEUES_OF_KEYS)


def _tables(connection: apsw.Connection) -> set[str]:
    return {str(name) for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def _is_current(connection: apsw.Connection, config: SqliteConfig) -> bool:
    if not _tables(connection) >= {config.table, config.metadata_table, "statecast_schema"}:
        return False
    select = f"""SELECT (SELECT max(version) FROM statecast_schema) >= ?
        AND EXISTS (SELECT 1 FROM "{config.metadata_table}" WHERE key = 'migrations')"""
    ((is_current,),) = connection.execute(select, (VERSION,)).fetchall()
    return bool(is_current)
