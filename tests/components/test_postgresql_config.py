"""The metadata of a `state.postgresql` component."""

import logging
from datetime import timedelta
from urllib.parse import parse_qs, urlsplit

import pytest

from statecast.components.manifest import Component
from statecast.components.state.postgresql.config import PostgresqlConfig, QualifiedName, read_config
from statecast.errors import ComponentError


def read(version: str = "v2", **metadata: str) -> PostgresqlConfig:
    return read_config(Component("statestore", "state.postgresql", version, metadata, origin="components/state.yaml"))


def settings_of(config: PostgresqlConfig) -> dict[str, str]:
    return {name: values[-1] for name, values in parse_qs(urlsplit(config.url).query).items()}


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://jo%40n:p%20w@db.example:5433/app?sslmode=require",
        "postgres://jo%40n@db.example:5433/app?sslmode=require&password=p%20w",
        "host=db.example:5433 user=jo@n password='p w' dbname=app sslmode=require",
        r"host = db.example:5433 user=jo@n password=p\ w  dbname='app' sslmode=require",
    ],
)
def test_both_forms_of_a_connection_string_say_the_same(text: str) -> None:
    assert settings_of(read(connectionString=text)) == {
        "host": "db.example:5433",
        "user": "jo@n",
        "password": "p w",
        "dbname": "app",
        "sslmode": "require",
    }


def test_fields_of_their_own_win_over_the_connection_string() -> None:
    config = read(url="postgresql://a:b@c/d", host="h", port="1", user="u", password="'p\\", database="x")

    assert settings_of(config) == {"host": "h", "port": "1", "user": "u", "password": "'p\\", "dbname": "x"}


def test_a_numeric_address_is_connected_to_in_place_of_the_name() -> None:
    assert settings_of(read(connectionString="host=name hostaddr=::1"))["host"] == "[::1]"


def test_what_only_pgx_and_libpq_know_does_not_reach_the_server() -> None:
    config = read(connectionString="host=h pool_max_conns=7 pool_max_conn_lifetime=1h connect_timeout=5 search_path=x")

    assert settings_of(config) == {"host": "h", "search_path": "x"}
    assert config.connections == 7


def test_defaults_are_daprs() -> None:
    config = read(connectionString="host=h", cleanupInterval="")

    assert config.timeout == timedelta(seconds=20)
    assert config.cleanup_interval == timedelta(hours=1)
    assert config.table_prefix == QualifiedName(None, "")
    assert config.metadata_table == QualifiedName(None, "dapr_metadata")


@pytest.mark.parametrize("interval", ["0", "-1", "-5m"])
def test_sweeping_can_be_switched_off(interval: str) -> None:
    assert read(connectionString="host=h", cleanupIntervalInSeconds=interval).cleanup_interval is None


def test_names_are_folded_as_postgresql_folds_them() -> None:
    config = read(connectionString="host=h", tablePrefix="Shop.My_", metadataTableName="Shop.Versions")

    assert config.table_prefix == QualifiedName("shop", "my_")
    assert config.metadata_table == QualifiedName("shop", "versions")


@pytest.mark.parametrize(
    ("metadata", "field"),
    [
        ({}, "connectionString"),
        ({"connectionString": "secret nonsense"}, "connectionString"),
        ({"connectionString": "host=h", "timeout": "500ms"}, "timeout"),
        ({"connectionString": "host=h", "tablePrefix": 'x"; drop table state; --'}, "tablePrefix"),
        ({"connectionString": "host=h", "tablePrefix": "p" * 31}, "tablePrefix"),
        ({"connectionString": "host=h", "metadataTableName": "a.b.c"}, "metadataTableName"),
        ({"connectionString": "host=h", "maxConns": "0"}, "maxConns"),
        ({"connectionString": "host=h pool_max_conns=x"}, "connectionString"),
    ],
)
def test_an_error_names_file_component_and_field_and_no_secret(metadata: dict[str, str], field: str) -> None:
    with pytest.raises(ComponentError, match=rf"components/state.yaml: component 'statestore': {field}") as raised:
        read(**metadata)

    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("version", ["", "v1"])
def test_the_other_layout_is_refused_by_name(version: str) -> None:
    with pytest.raises(ComponentError, match="version must be v2"):
        read(version, connectionString="host=h")


def test_a_password_is_in_no_repr() -> None:
    assert "hidden" not in repr(read(connectionString="host=h password=hidden"))


def test_what_is_not_supported_and_what_is_unknown_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        read(connectionString="host=h", useAWSIAM="true", queryExecMode="exec", tabelPrefix="x", keyPrefix="none")

    warned = " ".join(record.getMessage() for record in caplog.records)
    assert all(name in warned for name in ("useAWSIAM", "queryExecMode", "tabelPrefix"))
    assert "keyPrefix" not in warned
