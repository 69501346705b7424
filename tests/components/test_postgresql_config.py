"""The metadata of a `state.postgresql` component."""

import logging
import traceback
from datetime import timedelta
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from statecast.clock import SystemClock
from statecast.components.manifest import Component
from statecast.components.state.postgresql import PostgresqlStateStore
from statecast.components.state.postgresql.config import PostgresqlConfig, QualifiedName, read_config
from statecast.components.state.postgresql.connecting import require_files
from statecast.errors import ComponentError, StoreUnavailable


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
        "host": "db.example",
        "port": "5433",
        "user": "jo@n",
        "password": "p w",
        "dbname": "app",
        "sslmode": "require",
    }


def test_fields_of_their_own_win_over_the_connection_string() -> None:
    config = read(url="postgresql://a:b@c/d", host="h", port="1", user="u", password="'p\\", database="x")

    assert settings_of(config) == {"host": "h", "port": "1", "user": "u", "password": "'p\\", "dbname": "x"}


@pytest.mark.parametrize(
    ("hosts", "host", "port"),
    [
        ("a", "a", None),
        ("a:1", "a", "1"),
        ("a:1,b", "a,b", "1,5432"),
        ("[::1]:1,b:2", "[::1],b", "1,2"),
        ("%2Fvar%2Frun", "/var/run", None),
        ("%2Fvar%2Frun:1", "/var/run", "1"),
    ],
)
def test_each_host_of_a_url_has_its_port(hosts: str, host: str, port: str | None) -> None:
    settings = settings_of(read(connectionString=f"postgresql://u@{hosts}/d"))

    assert (settings["host"], settings.get("port")) == (host, port)


@pytest.mark.parametrize("field", ["host", "hostaddr"])
def test_a_host_that_is_given_apart_leaves_the_port_of_the_url(field: str) -> None:
    settings = settings_of(read(connectionString="postgresql://u@name:5433/d", **{field: "127.0.0.1"}))

    assert (settings["host"], settings["port"]) == ("127.0.0.1", "5433")


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
        ({"connectionString": "host=h pool_max_conns=" + "9" * 5000}, "connectionString"),
        ({"connectionString": "host=h sslmode=secret"}, "connectionString has sslmode, which is one of disable, allow"),
        ({"connectionString": "host=h target_session_attrs=secret"}, "connectionString has target_session_attrs"),
        ({"url": "host=h port=99999"}, "url"),
        ({"host": "h", "port": "99999"}, "port takes a port from 1 to 65535, .*; it is '99999'"),
        ({"host": "h", "port": "1,2"}, "host"),
        ({"host": "postgresql://u:secret@h/d"}, "host"),
        ({"host": "h" * 64}, "host"),
    ],
)
def test_an_error_names_file_component_and_field_and_no_secret(metadata: dict[str, str], field: str) -> None:
    with pytest.raises(ComponentError, match=rf"components/state.yaml: component 'statestore': {field}") as raised:
        read(**metadata)

    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    "text",
    [
        *("postgresql://u:pa#s3cr3t@127.0.0.1:1/db", "postgresql://u:s3cr3t/x@127.0.0.1:1/db"),
        *("postgresql://u:p?s3cr3t@127.0.0.1:1/db", "postgresql://u:p?s3cr3t=1@127.0.0.1:1/db"),
        *("postgresql://u:s3cr3t℀@127.0.0.1:1/db", "postgresql://u:s3cr3t[x@127.0.0.1:1/db"),
        *("postgresql://u:12#s3cr3t@127.0.0.1/db", "host=127.0.0.1 password=a s3cr3t", "host=h port=s3cr3t"),
    ],
)
def test_a_password_that_breaks_a_connection_string_is_in_no_error(text: str) -> None:
    with pytest.raises(ComponentError, match="connectionString takes postgresql://user:password@host") as raised:
        read(connectionString=text)

    assert "s3cr3t" not in "".join(traceback.format_exception(raised.value))


def test_files_are_named_by_their_setting(tmp_path: Path) -> None:
    config = read(connectionString=f"host=h sslcert={tmp_path}/client.pem", sslRootCert=f"{tmp_path}/ca.pem")

    with pytest.raises(ComponentError, match=rf"the file of sslrootcert '{tmp_path}/ca.pem' cannot be read"):
        require_files(config)
    (tmp_path / "ca.pem").touch()
    with pytest.raises(ComponentError, match="the file of sslcert"):
        require_files(config)


@pytest.mark.parametrize(
    ("metadata", "field"),
    [
        ({"host": "127.0.0.1", "port": "1"}, "host"),
        ({"hostaddr": "127.0.0.1", "port": "1"}, "hostaddr"),
        ({"url": "postgresql://u@127.0.0.1:1"}, "url"),
    ],
)
async def test_a_server_from_a_secret_is_in_no_error(metadata: dict[str, str], field: str) -> None:
    component = Component("s", "state.postgresql", "v2", metadata, secret_fields=frozenset({field}))

    with pytest.raises(StoreUnavailable) as raised:
        async with PostgresqlStateStore(component, app_id="orders", clock=SystemClock()):
            raise AssertionError("it opened")

    assert str(raised.value) == f"no connection to <{field}>: ConnectionRefusedError"
    assert "127.0.0.1" not in "".join(traceback.format_exception(raised.value))


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
