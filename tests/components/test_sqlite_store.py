from pathlib import Path

import pytest

from statecast.clock import SystemClock
from statecast.components.manifest import Component
from statecast.components.state.sqlite.state import SqliteStateStore
from statecast.components.testing import OutboxLogContract, SharedStateStoreContract, StateStoreContract
from statecast.components.testing.log import StoreFactory


def new_store(connection: str | Path, **metadata: str) -> SqliteStateStore:
    component = Component("statestore", "state.sqlite", metadata={"connectionString": str(connection), **metadata})
    return SqliteStateStore(component, app_id="orders", clock=SystemClock())


class TestSqliteStateStore(SharedStateStoreContract):
    @pytest.fixture
    def make_store(self, tmp_path: Path) -> StoreFactory:
        return lambda: new_store(tmp_path / "state.db")


class TestSqliteOutboxLog(OutboxLogContract):
    @pytest.fixture
    def make_store(self, tmp_path: Path) -> StoreFactory:
        return lambda: new_store(tmp_path / "state.db")


class TestSqliteStateStoreWithoutWal(SharedStateStoreContract):
    transactions = 1_000

    @pytest.fixture
    def make_store(self, tmp_path: Path) -> StoreFactory:
        return lambda: new_store(tmp_path / "state.db", disableWAL="true")


class TestSqliteStateStoreInMemory(StateStoreContract):
    transactions = 1_000

    @pytest.fixture
    def make_store(self) -> StoreFactory:
        return lambda: new_store(":memory:")


class TestSqliteOutboxLogInMemory(OutboxLogContract):
    @pytest.fixture
    def make_store(self) -> StoreFactory:
        return lambda: new_store(":memory:")
