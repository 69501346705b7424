"""Actor claims in PostgreSQL: one row for an actor, with the token of its last claim."""

from uuid import UUID, uuid4

from statecast.components.state.commit import Guard
from statecast.components.state.postgresql.lanes import Lanes
from statecast.components.state.postgresql.schema import Layout


class PostgresqlDirectory:
    def __init__(self, lanes: Lanes, layout: Layout, app_id: str) -> None:
        self._lanes = lanes
        self._app_id = app_id
        self._claim = (
            f"insert into {layout.claims} (app_id, type, id, token) values ($1, $2, $3, $4)"
            " on conflict (app_id, type, id) do update set token = excluded.token"
        )
        self._release = f"delete from {layout.claims} where app_id = $1 and type = $2 and id = $3 and token = $4"

    async def claim(self, type: str, id: str) -> Guard:
        token = uuid4()
        # It waits for a guarded commit that is under way, which holds the row: what is read afterwards has it.
        await self._lanes.run(lambda session: session.write(self._claim, self._app_id, type, id, token))
        return Guard(type, id, str(token))

    async def release(self, guard: Guard) -> None:
        try:
            token = UUID(guard.token)
        except ValueError:
            return  # no token of ours, so no claim to give up
        await self._lanes.run(lambda session: session.write(self._release, self._app_id, guard.type, guard.id, token))
