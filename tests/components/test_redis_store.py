import pytest

from statecast.clock import SystemClock
from statecast.components.manifest import Component
from statecast.components.state.redis.state import RedisStateStore
from statecast.components.testing import OutboxLogContract, SharedStateStoreContract
from statecast.components.testing.log import StoreFactory
from statecast.runtime.servers import ServerKind, component_metadata


def redis_store(url: str) -> RedisStateStore:
    metadata = component_metadata(ServerKind.REDIS, url)
    return RedisStateStore(Component("statestore", "state.redis", "v1", metadata), app_id="orders", clock=SystemClock())


class TestRedisStateStore(SharedStateStoreContract):
    @pytest.fixture
    def make_store(self, redis_url: str) -> StoreFactory:
        return lambda: redis_store(redis_url)


class TestRedisOutboxLog(OutboxLogContract):
    @pytest.fixture
    def make_store(self, redis_url: str) -> StoreFactory:
        return lambda: redis_store(redis_url)


class TestStateStoreOnAnOlderServer(SharedStateStoreContract):
    @pytest.fixture
    def make_store(self, older_redis_url: str) -> StoreFactory:
        return lambda: redis_store(older_redis_url)


class TestOutboxLogOnAnOlderServer(OutboxLogContract):
    @pytest.fixture
    def make_store(self, older_redis_url: str) -> StoreFactory:
        return lambda: redis_store(older_redis_url)
