import pytest

from statecast.clock import SystemClock
from statecast.components.manifest import Component
from statecast.components.state.memory import MemoryStateStore
from statecast.components.testing import OutboxLogContract, StateStoreContract
from statecast.components.testing.log import StoreFactory


def make_memory_store() -> MemoryStateStore:
    return MemoryStateStore(Component("statestore", "state.in-memory"), app_id="orders", clock=SystemClock())


class TestMemoryStateStore(StateStoreContract):
    @pytest.fixture
    def make_store(self) -> StoreFactory:
        return make_memory_store


class TestMemoryOutboxLog(OutboxLogContract):
    @pytest.fixture
    def make_store(self) -> StoreFactory:
        return make_memory_store
