from statecast.components.state.postgresql.state import PostgresqlStateStore

__all__ = ["PostgresqlStateStore"]
