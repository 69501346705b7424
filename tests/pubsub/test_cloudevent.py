import json
from datetime import UTC, datetime, timedelta, timezone

import pytest
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent as PackageEvent
from hypothesis import given
from hypothesis import strategies as st

from statecast.pubsub.cloudevent import Data, content_type_of, data_member, envelope, parse_event, timestamp

ATTRIBUTES = {"specversion": "1.0", "id": "1", "source": "shop", "type": "T"}


def test_an_envelope_without_trace_passes_the_parser_of_the_cloudevents_package() -> None:
    body = envelope({**ATTRIBUTES, "traceid": "", "traceparent": "", "tracestate": ""}, Data(b"{}", is_json=True))

    event = JSONFormat().read(PackageEvent, body)

    assert (event.get_id(), event.get_data()) == ("1", {})


def test_no_data_is_null() -> None:
    assert json.loads(envelope(ATTRIBUTES, None)) == {**ATTRIBUTES, "data": None}


@given(st.binary())
def test_any_bytes_come_back_as_they_left(body: bytes) -> None:
    data = Data(body, "application/octet-stream")

    event = parse_event(envelope(ATTRIBUTES, data), {})

    assert event.data == body


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back_as_it_left(text: str) -> None:
    event = parse_event(envelope(ATTRIBUTES, Data(text.encode())), {})

    assert event.data == text


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (Data(b'{"a":1}', is_json=True), "application/json"),
        (Data(b'  "text"', is_json=True), "text/plain"),
        (Data(b'{"a":1}'), "text/plain"),
        (Data(b"\xff"), "application/octet-stream"),
        (Data(b"\xff", "image/png"), "image/png"),
        (Data(b""), "text/plain"),
    ],
)
def test_the_content_type_is_the_given_one_or_follows_from_the_bytes(data: Data, expected: str) -> None:
    assert content_type_of(data) == expected


@pytest.mark.parametrize("content_type", ["application/vnd.acme+json", "text/xml", "image/png"])
def test_other_content_types_travel_as_text(content_type: str) -> None:
    assert data_member(Data(b"<a>\xc3\xa9</a>", content_type)) == ("data", "<a>é</a>")


def test_a_content_type_counts_in_any_case_and_without_its_parameters() -> None:
    name, _ = data_member(Data(b"x", "Application/Octet-Stream; a=b"))

    assert name == "data_base64"


@pytest.mark.parametrize("body", [b"", b"plain", b"[1]", b'"text"', b"\xff\x00"])
def test_a_message_that_is_no_event_is_the_data_of_one_without_attributes(body: bytes) -> None:
    event = parse_event(body, {"partition": "3"})

    assert event.data == body
    assert (event.id, event.type, event.source, event.metadata) == ("", "", "", {"partition": "3"})


def test_an_event_without_id_and_source_is_taken_as_it_comes() -> None:
    event = parse_event(b'{"type":"T","data":{"a":1},"extra":"e"}', {})

    assert (event.id, event.type, event.data, event.attributes["extra"]) == ("", "T", {"a": 1}, "e")


@pytest.mark.parametrize("encoded", ["%%%", "é", "QQ"])
def test_broken_base64_is_left_as_it_came(encoded: str) -> None:
    assert parse_event(json.dumps({"data_base64": encoded}).encode(), {}).data == encoded


@given(st.dictionaries(st.sampled_from(["id", "data", "data_base64", "type"]), st.text() | st.integers() | st.none()))
def test_whatever_comes_is_an_event(members: dict[str, object]) -> None:
    event = parse_event(json.dumps(members).encode(), {})

    assert event.attributes.keys() <= members.keys()


def test_data_converts_to_a_type() -> None:
    assert parse_event(b'{"data":{"a":1}}', {}).decode(dict[str, int]) == {"a": 1}


def test_data_that_does_not_fit_the_type_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="int"):
        parse_event(b'{"data":{"a":"x"}}', {}).decode(dict[str, int])


@pytest.mark.parametrize("zone", [UTC, timezone(timedelta(0)), timezone(timedelta(hours=2))])
@pytest.mark.parametrize(("microsecond", "fraction"), [(0, "000"), (678_999, "678")])
def test_a_time_is_told_in_utc_and_always_to_the_millisecond(zone: timezone, microsecond: int, fraction: str) -> None:
    moment = datetime(2026, 1, 2, 3, 4, 5, microsecond, tzinfo=UTC).astimezone(zone)

    assert timestamp(moment) == f"2026-01-02T03:04:05.{fraction}Z"
