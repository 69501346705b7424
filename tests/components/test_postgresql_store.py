"""The contract suites on PostgreSQL, the newest and the oldest version that we support."""

import pytest

from statecast.clock import SystemClock
from statecast.components.manifest import Component
from statecast.components.state.postgresql import PostgresqlStateStore
from statecast.components.testing.log import OutboxLogContract, StoreFactory
from statecast.components.testing.state import SharedStateStoreContract


def stores_on(url: str) -> StoreFactory:
    component = Component(
        name="statestore", type="state.postgresql", version="v2", metadata={"connectionString": url, "maxConns": "8"}
    )
    return lambda: PostgresqlStateStore(component, app_id="orders", clock=SystemClock())


class TestPostgresqlStateStore(SharedStateStoreContract):
    @pytest.fixture
    def make_store(self, postgresql_url: str) -> StoreFactory:
        return stores_on(postgresql_url)


class TestPostgresqlOutboxLog(OutboxLogContract):
    @pytest.fixture
    def make_store(self, postgresql_url: str) -> StoreFactory:
        return stores_on(postgresql_url)


class TestStateStoreOnPostgresql15(SharedStateStoreContract):
    transactions = 1_000

    @pytest.fixture
    def make_store(self, older_postgresql_url: str) -> StoreFactory:
        return stores_on(older_postgresql_url)


class TestOutboxLogOnPostgresql15(OutboxLogContract):
    @pytest.fixture
    def make_store(self, older_postgresql_url: str) -> StoreFactory:
        return stores_on(older_postgresql_url)
