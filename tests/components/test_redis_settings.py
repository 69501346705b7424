from collections.abc import Callable
from datetime import timedelta

import pytest

from statecast.clock import SystemClock
from statecast.components.address import Address
from statecast.components.broker.redis.broker import RedisBroker
from statecast.components.manifest import Component
from statecast.components.metadata import MetadataReader
from statecast.components.redis.server import find_problem
from statecast.components.redis.settings import RedisSettings, read_settings
from statecast.components.state.redis.state import RedisStateStore
from statecast.errors import ComponentError


def settings_of(**metadata: str) -> RedisSettings:
    return read_settings(MetadataReader(Component("statestore", "state.redis", metadata=metadata), ()))


def test_without_metadata_it_is_the_server_of_this_machine() -> None:
    assert settings_of() == RedisSettings(Address("localhost", 6379))


def test_the_port_may_stand_apart() -> None:
    assert settings_of(redisHost="redis", redisPort="6380").address == Address("redis", 6380)
    assert settings_of(redisHost="redis:6380", redisPort="6380").address == Address("redis", 6380)


def test_a_bare_timeout_is_in_milliseconds_and_one_that_never_ends_is_the_default() -> None:
    settings = settings_of(dialTimeout="1500", readTimeout="-1")

    assert settings.dial_timeout == timedelta(milliseconds=1500)
    assert settings.read_timeout == timedelta(seconds=3)


def test_the_login_is_not_shown() -> None:
    assert "s3cret" not in repr(settings_of(redisUsername="s3cret", redisPassword="s3cret"))


def test_tls_verifies_the_server_unless_told_otherwise() -> None:
    verifying, trusting = (settings_of(enableTLS="true", insecureSkipTLSVerify=word).tls for word in ("", "true"))

    assert settings_of().tls is None
    assert verifying is not None
    assert verifying.check_hostname
    assert trusting is not None
    assert not trusting.check_hostname


def test_with_failover_the_hosts_are_sentinels() -> None:
    settings = settings_of(redisHost="one,two:26380", failover="true", sentinelMasterName="mymaster")

    assert settings.sentinel is not None
    assert settings.sentinel.addresses == (Address("one", 26379), Address("two", 26380))
    assert settings.sentinel.master == "mymaster"


@pytest.mark.parametrize(
    ("metadata", "field"),
    [
        ({"redisType": "cluster"}, "redisType"),
        ({"redisType": "sharded"}, "redisType"),
        ({"redisHost": "one,two"}, "redisHost"),
        ({"redisHost": "redis:port"}, "redisHost"),
        ({"redisHost": "redis://redis:6379"}, "redisHost"),
        ({"redisHost": "redis:6380", "redisPort": "6379"}, "redisPort"),
        ({"redisDB": "first"}, "redisDB"),
        ({"readTimeout": "soon"}, "readTimeout"),
        ({"failover": "true"}, "sentinelMasterName"),
        ({"enableTLS": "true", "clientCert": "PEM"}, "clientCert"),
        ({"enableTLS": "true", "clientCert": "PEM", "clientKey": "PEM"}, "clientKey"),
    ],
)
def test_a_field_that_cannot_be_is_named(metadata: dict[str, str], field: str) -> None:
    with pytest.raises(ComponentError, match=f"component 'statestore': {field} "):
        settings_of(**metadata)


def test_why_there_is_no_cluster_is_said() -> None:
    with pytest.raises(ComponentError, match="one hash slot"):
        settings_of(redisType="cluster")


@pytest.mark.parametrize("backend", [RedisStateStore, RedisBroker])
def test_a_field_that_has_no_effect_is_warned_about(
    backend: Callable[..., object], caplog: pytest.LogCaptureFixture
) -> None:
    component = Component("name", "type", metadata={"poolSize": "10", "redisHots": "redis", "redisDB": "1"})

    backend(component, app_id="orders", clock=SystemClock())

    assert "poolSize is not supported yet" in caplog.text
    assert "'redisHots'" in caplog.text
    assert "redisDB" not in caplog.text


@pytest.mark.parametrize(
    ("facts", "problem"),
    [
        ({"redis_version": "6.2.14", "redis_mode": "standalone"}, None),
        ({"redis_version": "7.0.15", "redis_mode": "sentinel"}, None),
        ({"redis_version": "8.2.3"}, None),
        ({"redis_version": "10.0.0"}, None),
        ({"redis_version": "6.0.16"}, "6.2"),
        ({"redis_version": "5.0.7"}, "6.2"),
        ({"redis_version": "7.2.4", "redis_mode": "cluster"}, "hash slot"),
    ],
)
def test_a_server_is_judged_by_what_it_tells(facts: dict[str, str], problem: str | None) -> None:
    found = find_problem(facts)

    assert found is None if problem is None else found is not None and problem in found
