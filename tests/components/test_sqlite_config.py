import logging
from datetime import timedelta
from pathlib import Path

import pytest

from statecast.components.manifest import Component
from statecast.components.state.sqlite.config import SqliteConfig, parse_config
from statecast.errors import ComponentError


def config_of(**metadata: str) -> SqliteConfig:
    return parse_config(Component("statestore", "state.sqlite", metadata=metadata))


def test_defaults() -> None:
    config = config_of(connectionString="data.db")

    assert config.timeout == timedelta(seconds=20)
    assert config.busy_timeout == timedelta(seconds=2)
    assert (config.table, config.metadata_table) == ("state", "metadata")
    assert config.cleanup_interval == timedelta(hours=1)
    assert config.uses_wal


def test_a_missing_connection_string_is_named() -> None:
    with pytest.raises(ComponentError, match="missing connection string"):
        config_of()


def test_other_spellings_are_taken() -> None:
    config = config_of(url="data.db", timeoutInSeconds="30", cleanupIntervalInSeconds="60", busyTimeout="5")

    assert config.timeout == timedelta(seconds=30)
    assert config.cleanup_interval == timedelta(minutes=1)
    assert config.busy_timeout == timedelta(seconds=5)


@pytest.mark.parametrize("timeout", ["0", "-1"])
def test_a_busy_timeout_of_nothing_or_less_does_not_wait(timeout: str) -> None:
    assert config_of(connectionString="data.db", busyTimeout=timeout).busy_timeout == timedelta(0)


@pytest.mark.parametrize("interval", ["0", "-1"])
def test_a_cleanup_interval_of_nothing_turns_sweeping_off(interval: str) -> None:
    assert config_of(connectionString="data.db", cleanupInterval=interval).cleanup_interval is None


@pytest.mark.parametrize(
    ("connection", "path"),
    [
        ("/tmp/data.db", "/tmp/data.db"),
        ("/tmp/da ta#1%41.db", "/tmp/da ta#1%41.db"),
        ("file:/tmp/data.db", "/tmp/data.db"),
        ("file:///tmp/data.db", "/tmp/data.db"),
        ("file://localhost/tmp/data.db?mode=rwc", "/tmp/data.db"),
        ("file:/tmp/da%20ta.db", "/tmp/da ta.db"),
        ("data.db?_txlock=immediate", str(Path("data.db").absolute())),
        ("file:data.db", str(Path("data.db").absolute())),
    ],
)
def test_a_path_is_found_in_every_spelling(connection: str, path: str) -> None:
    assert config_of(connectionString=connection).path == path


@pytest.mark.parametrize("connection", [":memory:", ":MEMORY:?cache=shared", "file::memory:", "file:x?mode=memory"])
def test_an_in_memory_database_is_recognised(connection: str) -> None:
    config = config_of(connectionString=connection)

    assert config.is_in_memory
    assert not config.uses_wal


@pytest.mark.parametrize("option", ["mode=ro", "immutable=1"])
def test_a_database_that_is_not_written_needs_no_log(option: str) -> None:
    assert not config_of(connectionString=f"file:data.db?{option}").uses_wal


def test_the_log_can_be_turned_off() -> None:
    assert not config_of(connectionString="data.db", disableWAL="true").uses_wal


def test_turning_the_log_off_is_no_unknown_word_where_there_is_none(caplog: pytest.LogCaptureFixture) -> None:
    config_of(connectionString=":memory:", disableWAL="true")

    assert not caplog.records
    with pytest.raises(ComponentError, match="disableWAL takes true or false"):
        config_of(connectionString=":memory:", disableWAL="ture")


def test_options_of_sqlite_are_passed_on_and_those_of_the_go_driver_are_not() -> None:
    config = config_of(connectionString="/tmp/data.db?mode=rw&cache=shared&_txlock=exclusive&_pragma=cache_size(-4000)")

    assert config.uri == "file:/tmp/data.db?mode=rw"
    assert config.pragmas == (("cache_size", "-4000"),)


@pytest.mark.parametrize("pragma", ["busy_timeout(1)", "JOURNAL_MODE(off)", "foreign_keys=1"])
def test_pragmas_that_other_fields_set_are_refused(pragma: str) -> None:
    name = pragma.partition("(")[0].partition("=")[0].lower()

    with pytest.raises(ComponentError, match=f"forbidden option '_pragma={name}'"):
        config_of(connectionString=f"data.db?_pragma={pragma}")


@pytest.mark.parametrize("pragma", ["cache_size(1); DROP TABLE state", "", "a b"])
def test_a_pragma_that_is_none_is_refused(pragma: str) -> None:
    with pytest.raises(ComponentError, match="_pragma"):
        config_of(connectionString=f"data.db?_pragma={pragma}")


@pytest.mark.parametrize("name", ["sta-te", "state; DROP", "größe", 'a"b', "sqlite_x", "statecast_state"])
@pytest.mark.parametrize("field", ["tableName", "metadataTableName"])
def test_a_table_name_that_is_no_identifier_is_refused(field: str, name: str) -> None:
    with pytest.raises(ComponentError, match=field):
        config_of(connectionString="data.db", **{field: name})


def test_both_tables_need_names_of_their_own() -> None:
    with pytest.raises(ComponentError, match="metadataTableName"):
        config_of(connectionString="data.db", tableName="same", metadataTableName="SAME")


def test_a_timeout_below_a_second_is_refused() -> None:
    with pytest.raises(ComponentError, match="timeout"):
        config_of(connectionString="data.db", timeout="500ms")


def test_an_unknown_option_of_the_connection_string_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        config_of(connectionString="data.db?_unknown=1")

    assert "_unknown" in caplog.text


@pytest.mark.parametrize("field", ["connectionString", "url"])
def test_a_connection_string_from_a_secret_is_not_shown(field: str) -> None:
    metadata = {field: "/tmp/hidden.db"}
    config = parse_config(
        Component("statestore", "state.sqlite", metadata=metadata, secret_fields=frozenset({field.lower()}))
    )

    assert config.location == f"<{field}>"
    assert "hidden" not in repr(config)


def test_a_table_name_from_a_secret_is_in_no_error() -> None:
    component = Component(
        "statestore",
        "state.sqlite",
        metadata={"connectionString": "data.db", "tableName": "hidden!"},
        secret_fields=frozenset({"tablename"}),
    )

    with pytest.raises(ComponentError) as failure:
        parse_config(component)

    assert "hidden" not in str(failure.value)
