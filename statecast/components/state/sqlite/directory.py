"""Actor claims on SQLite: one row per actor, with the token of its newest claim."""

from uuid import uuid4

import apsw

from statecast.components.state.commit import Guard
from statecast.components.state.sqlite.database import Database
from statecast.components.state.sqlite.schema import NOW


class SqliteDirectory:
    def __init__(self, database: Database, app_id: str) -> None:
        self._database = database
        self._app_id = app_id

    async def claim(self, type: str, id: str) -> Guard:
        guard = Guard(type, id, token=str(uuid4()))
        statement = f"""INSERT INTO statecast_claims (app_id, type, id, token, claimed_at) VALUES (?, ?, ?, ?, {NOW})
            ON CONFLICT DO UPDATE SET token = excluded.token, claimed_at = excluded.claimed_at"""

        def take(cursor: apsw.Cursor) -> None:
            cursor.execute(statement, (self._app_id, type, id, guard.token))

        await self._database.commit(take)
        return guard

    async def release(self, guard: Guard) -> None:
        statement = "DELETE FROM statecast_claims WHERE app_id = ? AND type = ? AND id = ? AND token = ?"

        def give_up(cursor: apsw.Cursor) -> None:
            cursor.execute(statement, (self._app_id, guard.type, guard.id, guard.token))

        await self._database.write(give_up)
