import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statecast.components.address import Address
from statecast.components.duration import parse_duration
from statecast.components.manifest import Component
from statecast.components.metadata import STATE_FIELDS, MetadataReader, is_secret_name, is_truthy
from statecast.errors import ComponentError


def reader(*, secret_fields: frozenset[str] = frozenset(), **metadata: str) -> MetadataReader:
    component = Component(
        "orders", "state.redis", metadata=metadata, secret_fields=secret_fields, origin="c/a.yaml, document 1"
    )
    return MetadataReader(component, STATE_FIELDS)


# Words and numbers


@pytest.mark.parametrize("word", ["y", "Yes", "TRUE", "t", "on", "1", " true "])
def test_truthy_words_are_true_in_any_case(word: str) -> None:
    assert is_truthy(word)
    assert reader(enableTLS=word).boolean("enableTLS") is True


@pytest.mark.parametrize("word", ["n", "No", "FALSE", "f", "off", "0"])
def test_their_opposites_are_false(word: str) -> None:
    assert not is_truthy(word)
    assert reader(disableWAL=word).boolean("disableWAL", default=True) is False


@pytest.mark.parametrize("word", ["ture", "2", "enabled"])
def test_a_word_that_is_neither_is_an_error_where_a_field_is_read(word: str) -> None:
    assert not is_truthy(word)
    with pytest.raises(ComponentError, match=f"enableTLS takes true or false; it is '{word}'"):
        reader(enableTLS=word).boolean("enableTLS")


def test_names_match_in_any_case() -> None:
    fields = reader(REDISHOST="h:1", redisdb="3")

    assert fields.text("redisHost") == "h:1"
    assert fields.integer("redisDB", default=0) == 3


def test_one_name_in_two_spellings_is_an_error() -> None:
    with pytest.raises(ComponentError, match="component 'orders': redishost is given twice"):
        reader(redisHost="a", redishost="b")


def test_an_empty_value_counts_as_not_given() -> None:
    fields = reader(redisHost="", redisDB="", cleanupInterval="", enableTLS="", redisType="")

    assert fields.text("redisHost", default="localhost") == "localhost"
    assert fields.integer("redisDB", default=7) == 7
    assert fields.duration("cleanupInterval", default=timedelta(hours=1)) == timedelta(hours=1)
    assert fields.boolean("enableTLS", default=True) is True
    assert fields.choice("redisType", ["node", "cluster"], default="node") == "node"


def test_a_text_is_given_as_it_stands_blanks_and_all() -> None:
    assert reader(prefix=" a ").text("prefix") == " a "


def test_a_text_is_trimmed_where_a_field_asks_for_it_and_blanks_are_nothing() -> None:
    assert reader(consumerID=" a b ").trimmed_text("consumerID") == "a b"
    assert reader(consumerID=" \t").trimmed_text("consumerID") is None


@pytest.mark.parametrize("value", [1, True, None, b"x", "a\0b", "\ud83d"])
def test_a_value_that_no_driver_can_take_as_text_is_an_error_that_names_the_field(value: Any) -> None:
    with pytest.raises(ComponentError, match="component 'orders': redisPassword must be text"):
        reader(redisPassword=value)


def test_a_field_is_given_also_when_it_is_empty() -> None:
    assert reader(authType="").is_given("AUTHTYPE")
    assert not reader().is_given("authType")


def test_an_alias_is_read_where_the_name_is_not_given() -> None:
    assert reader(url="x").text("connectionString", aliases=["url"]) == "x"
    assert reader(url="x", connectionString="y").text("connectionString", aliases=["url"]) == "y"


def test_a_required_field_that_is_missing_is_named_with_its_aliases_and_its_place() -> None:
    with pytest.raises(ComponentError) as failure:
        reader().required_text("connectionString", aliases=["url"])

    assert str(failure.value) == "c/a.yaml, document 1: component 'orders': connectionString (or url) is required"


@pytest.mark.parametrize("text", ["x", "1.0", "1 0", " ", "٣", "0x10", "9" * 5000])
def test_what_is_no_whole_number_is_an_error(text: str) -> None:
    with pytest.raises(ComponentError, match="redisDB takes a whole number"):
        reader(redisDB=text).integer("redisDB", default=0)


@given(st.integers(min_value=-(10**30), max_value=10**30))
def test_every_whole_number_is_read(number: int) -> None:
    assert reader(n=f" {number} ").integer("n", default=0) == number


def test_a_number_outside_its_bounds_is_an_error_that_says_the_bound() -> None:
    with pytest.raises(ComponentError, match="redisDB must be 0 or more; it is '-1'"):
        reader(redisDB="-1").integer("redisDB", default=0, minimum=0)
    with pytest.raises(ComponentError, match="port must be 65535 or less; it is '65536'"):
        reader(port="65536").integer("port", default=0, maximum=65535)


def test_a_choice_is_given_as_it_is_declared() -> None:
    assert reader(mode="SCRAM-sha-256").choice("mode", ["none", "SCRAM-SHA-256"], default="none") == "SCRAM-SHA-256"


def test_a_word_outside_a_choice_is_an_error_that_lists_it() -> None:
    with pytest.raises(ComponentError, match="redisType takes one of node, cluster; it is 'ring'"):
        reader(redisType="ring").choice("redisType", ["node", "cluster"], default="node")


def test_servers_are_listed_with_commas_between() -> None:
    fields = reader(redisHost="one, two:1")

    assert fields.addresses("redisHost", default_port=6379) == (Address("one", 6379), Address("two", 1))
    assert fields.addresses("host", default_port=1, default="localhost") == (Address("localhost", 1),)


@pytest.mark.parametrize("text", ["redis://:s3cr3t@127.0.0.1:1", ":s3cr3t@127.0.0.1:1", "a,,b", "h" * 70])
def test_what_is_no_list_of_servers_is_an_error_that_does_not_show_it(text: str) -> None:
    with pytest.raises(ComponentError) as failure:
        reader(redisHost=text).addresses("redisHost", default_port=6379)

    assert str(failure.value).endswith("redisHost takes host or host:port, or several with commas between")
    assert failure.value.__suppress_context__


# Durations


@pytest.mark.parametrize(
    ("text", "duration"),
    [
        ("0", timedelta()),
        ("20", timedelta(seconds=20)),
        ("-1", timedelta(seconds=-1)),
        ("+5s", timedelta(seconds=5)),
        ("-1.5h", timedelta(minutes=-90)),
        (".5s", timedelta(milliseconds=500)),
        ("1.s", timedelta(seconds=1)),
        ("1h30m", timedelta(minutes=90)),
        ("1h30m5s100ms", timedelta(hours=1, minutes=30, seconds=5, milliseconds=100)),
        ("300us", timedelta(microseconds=300)),
        ("300µs", timedelta(microseconds=300)),
        ("300μs", timedelta(microseconds=300)),
        ("1500ns", timedelta(microseconds=2)),
        (" 1m ", timedelta(minutes=1)),
    ],
)
def test_durations_are_gos_or_whole_seconds(text: str, duration: timedelta) -> None:
    assert parse_duration(text, "seconds") == duration


def test_a_bare_number_is_in_the_unit_that_the_field_has() -> None:
    assert reader(dialTimeout="250").duration("dialTimeout", default=timedelta(), bare="milliseconds") == timedelta(
        milliseconds=250
    )


@pytest.mark.parametrize(
    "text", ["", "s", "1 s", "1d", "1h-5m", "--1s", "1,5s", "٣s", "1e3s", "9" * 40, "9" * 40 + "h", "9" * 5000]
)
def test_what_is_no_duration_raises_nothing_but_value_error(text: str) -> None:
    with pytest.raises(ValueError, match="is no duration"):
        parse_duration(text, "seconds")


@given(st.timedeltas(min_value=timedelta(days=-100_000), max_value=timedelta(days=100_000)))
def test_a_duration_written_as_go_writes_it_is_read_exactly(duration: timedelta) -> None:
    seconds, microseconds = divmod(abs(duration) // timedelta(microseconds=1), 1_000_000)
    hours, seconds = divmod(seconds, 3600)
    sign = "-" if duration < timedelta() else ""

    assert parse_duration(f"{sign}{hours}h{seconds // 60}m{seconds % 60}.{microseconds:06}s", "seconds") == duration


@given(st.text())
def test_any_text_is_a_duration_or_a_value_error(text: str) -> None:
    try:
        parse_duration(text, "milliseconds")
    except ValueError as error:
        assert "is no duration" in str(error)  # noqa: PT017 - most texts raise, some do not


def test_a_broken_duration_is_an_error_that_names_the_spelling_in_use() -> None:
    with pytest.raises(ComponentError, match=r"timeoutInSeconds takes a duration such as .* it is 'soon'"):
        reader(timeoutInSeconds="soon").duration("timeout", default=timedelta(), aliases=["timeoutInSeconds"])


def test_a_duration_below_its_minimum_is_an_error_that_says_the_bound() -> None:
    with pytest.raises(ComponentError, match="timeout must be 1s or more; it is '500ms'"):
        reader(timeout="500ms").duration("timeout", default=timedelta(), minimum=timedelta(seconds=1))


# What nobody asked for


def test_a_field_that_nobody_asked_for_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    fields = reader(redisHost="h", redisHots="h")

    fields.text("redisHost")
    fields.finish()

    assert [record.getMessage() for record in caplog.records] == [
        "component 'orders': state.redis knows no metadata field 'redisHots'; it has no effect"
    ]


def test_what_the_runtime_reads_is_not_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    reader(KEYPREFIX="none", outboxPublishPubsub="pubsub").finish()

    assert not caplog.records


def test_a_known_field_that_has_no_effect_is_warned_about_once_and_only_if_given(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fields = reader(useEntraID="true")

    fields.unsupported("useEntraID", "useOIDC")
    fields.finish()

    assert [record.getMessage() for record in caplog.records] == [
        "component 'orders': useEntraID is not supported yet and has no effect"
    ]


# Secrets

SECRET = "s3cr3t"


@pytest.mark.parametrize(
    "name", ["redisPassword", "password", "connectionString", "url", "saslPassword", "clientKey", "OIDCClientSecret"]
)
def test_fields_that_hold_secrets_are_known_by_name(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize("name", ["redisHost", "keyPrefix", "brokers", "consumerGroup", "secretsFile", "tablePrefix"])
def test_other_fields_are_shown(name: str) -> None:
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    "read",
    [
        lambda fields: fields.integer("pin", default=0),
        lambda fields: fields.boolean("pin"),
        lambda fields: fields.duration("pin", default=timedelta()),
        lambda fields: fields.choice("pin", ["a"], default="a"),
    ],
)
def test_the_value_of_a_secret_field_is_in_no_error(read: Callable[[MetadataReader], object]) -> None:
    fields = reader(PIN=SECRET, secret_fields=frozenset({"pin"}))

    with pytest.raises(ComponentError, match="pin takes") as failure:
        read(fields)

    assert SECRET not in str(failure.value)


def test_a_field_with_a_secret_name_is_in_no_error_though_nobody_marked_it() -> None:
    with pytest.raises(ComponentError) as failure:
        raise reader(connectionString=SECRET).error("connectionString", "must be a DSN")

    assert SECRET not in str(failure.value)


def test_a_message_names_the_field_in_place_of_a_secret_value() -> None:
    fields = reader(host=SECRET, user="clerk", secret_fields=frozenset({"host"}))

    assert fields.stand_in("Host") == "<Host>"
    assert fields.stand_in("user") is None


def test_an_error_may_leave_the_value_out() -> None:
    assert SECRET not in str(reader(host=SECRET).error("host", "takes host:port", shows_value=False))


def test_no_warning_shows_a_value(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    fields = reader(useOIDC=SECRET, other=SECRET)

    fields.unsupported("useOIDC")
    fields.finish()

    assert len(caplog.records) == 2
    assert SECRET not in caplog.text


def test_a_component_and_its_reader_do_not_show_values_in_repr() -> None:
    component = Component("orders", "state.redis", metadata={"a": SECRET})

    assert SECRET not in repr(component) + str(component) + repr(MetadataReader(component, ()))
