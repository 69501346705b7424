from collections.abc import Callable
from urllib.parse import urlsplit

import pytest

from statecast.clock import SystemClock
from statecast.components.broker.broker import Broker
from statecast.components.broker.redis.broker import RedisBroker
from statecast.components.manifest import Component
from statecast.components.testing.broker import BrokerContract
from statecast.runtime.server_answers import run_redis


def redis_broker(url: str, **metadata: str) -> RedisBroker:
    address = {"redisHost": urlsplit(url).netloc, "redisDB": urlsplit(url).path.strip("/")}
    quick = {"redeliverInterval": "100ms", "processingTimeout": "60s"}
    component = Component("pubsub", "pubsub.redis", "v1", {**address, **quick, **metadata})
    return RedisBroker(component, app_id="orders", clock=SystemClock())


class TestRedisBroker(BrokerContract):
    carries_key = False

    @pytest.fixture
    def make_broker(self, redis_url: str) -> Callable[[], Broker]:
        return lambda: redis_broker(redis_url)

    @pytest.fixture
    def unknown_topic(self, redis_url: str) -> str:
        run_redis(redis_url, "SET", "no-stream", "text")
        return "no-stream"


class TestBrokerOnAnOlderServer(BrokerContract):
    carries_key = False

    @pytest.fixture
    def make_broker(self, older_redis_url: str) -> Callable[[], Broker]:
        return lambda: redis_broker(older_redis_url)

    @pytest.fixture
    def unknown_topic(self, older_redis_url: str) -> str:
        run_redis(older_redis_url, "SET", "no-stream", "text")
        return "no-stream"
