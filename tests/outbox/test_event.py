import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, cast

import orjson
import pytest
from cloudevents.core.exceptions import CloudEventValidationError
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from hypothesis import assume, given
from hypothesis import strategies as st

from statecast.components.state.commit import Commit, Delete, Operation, OutboxRecord, Upsert
from statecast.components.state.value import upsert
from statecast.errors import InvalidRequest
from statecast.outbox.event import EventIds, EventSource
from statecast.outbox.plan import Announcement, Outbox, plan_commit
from statecast.pubsub.cloudevent import Data, TraceContext

NOON = datetime(2026, 1, 2, 12, 0, 0, 250_000, tzinfo=UTC)
TRACE = TraceContext("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "vendor=1")
OUTBOX = Outbox("bus", "orders")


def logical(key: str) -> str:
    return key.removeprefix("shop||")


def plan(
    *operations: Operation, outbox: Outbox | None = OUTBOX, announcements: tuple[Announcement, ...] = ()
) -> Commit:
    source = EventSource("shop", NOON, TRACE, EventIds("outbox"))
    return plan_commit(operations, outbox, source, logical, announcements=announcements)


def events(*operations: Operation, outbox: Outbox = OUTBOX) -> list[dict[str, Any]]:
    return [json.loads(record.body) for record in plan(*operations, outbox=outbox).records]


def test_an_upsert_has_an_event_with_every_attribute() -> None:
    (event,) = events(upsert("shop||o1", {"n": 1}))

    assert event.pop("id").startswith("outbox-")
    assert event == {
        "specversion": "1.0",
        "source": "shop",
        "type": "com.dapr.event.sent",
        "time": "2026-01-02T12:00:00.250Z",
        "datacontenttype": "application/json",
        "topic": "orders",
        "pubsubname": "bus",
        "traceid": TRACE.traceparent,
        "traceparent": TRACE.traceparent,
        "tracestate": "vendor=1",
        "data": {"n": 1},
    }


def test_every_upsert_has_its_event_in_operation_order_and_a_delete_has_none() -> None:
    found = events(
        upsert("shop||a", 1), Delete("shop||a"), upsert("shop||b", 2), upsert("shop||a", 3), Delete("shop||c")
    )

    assert [event["data"] for event in found] == [1, 2, 3]
    assert len({event["id"] for event in found}) == 3


def test_a_delete_has_an_event_when_the_outbox_publishes_deletes() -> None:
    (event,) = events(Delete("shop||o1"), outbox=Outbox("bus", "orders", publishes_deletes=True))

    assert (event["type"], event["subject"], event["data"]) == ("com.dapr.event.sent.deleted", "o1", None)


@pytest.mark.parametrize("prefix", ["cloudevent.", "CloudEvent.", ""])
def test_metadata_overrides_attributes_prefixed_or_bare(prefix: str) -> None:
    metadata = {
        f"{prefix}id": "unique-business-process-id",
        f"{prefix}source": "CustomersApp",
        f"{prefix}type": "CustomerCreated",
        f"{prefix}subject": "123",
        "my-custom-ce-field": "abc",
    }

    (event,) = events(upsert("shop||o1", 1, metadata=metadata))

    assert event["id"] == "unique-business-process-id"
    assert event["source"] == "CustomersApp"
    assert event["type"] == "CustomerCreated"
    assert event["subject"] == "123"
    assert event["my-custom-ce-field"] == "abc"
    assert not [name for name in event if name.lower().startswith("cloudevent.")]


def test_a_prefixed_override_beats_the_bare_one() -> None:
    (event,) = events(upsert("shop||o1", 1, metadata={"cloudevent.type": "A", "type": "B"}))

    assert event["type"] == "A"


@pytest.mark.parametrize("name", ["id", "source", "type", "subject", "time", "datacontenttype", "dataschema"])
def test_an_empty_override_is_none_and_gives_way_to_a_bare_one(name: str) -> None:
    moment = "2026-01-02T03:04:05+01:00"

    (event,) = events(upsert("shop||o1", 1, metadata={f"cloudevent.{name}": "", name: moment}))

    assert event[name] == moment


@pytest.mark.parametrize(
    "time",
    ["yesterday", "1767355200", "2026-01-02", "2026-01-02 12:00:00Z", "2026-01-02T12:00:00", "2026-02-30T12:00:00Z"],
)
def test_a_time_that_is_none_refuses_the_transaction(time: str) -> None:
    with pytest.raises(InvalidRequest, match=f"must be as in RFC 3339, .*: actual is '{time}'"):
        plan(upsert("shop||o1", 1, metadata={"cloudevent.time": time}))


def test_text_that_is_no_unicode_refuses_the_transaction() -> None:
    with pytest.raises(InvalidRequest, match="the event cannot be written"):
        plan(upsert("shop||o1", 1, metadata={"cloudevent.type": "\ud800"}))


@pytest.mark.parametrize("name", ["data", "data_base64", "specversion", "topic", "pubsubname"])
def test_what_the_envelope_itself_says_cannot_be_overridden(name: str) -> None:
    plain, prefixed = events(
        upsert("shop||o1", {"n": 1}, metadata={name: "x"}),
        upsert("shop||o1", {"n": 1}, metadata={f"cloudevent.{name}": "x"}),
    )

    assert plain.get(name) != "x"
    assert prefixed.get(name) != "x"
    assert plain["data"] == prefixed["data"] == {"n": 1}


def test_words_of_the_runtime_never_leak_into_the_event() -> None:
    words = ["ttlInSeconds", "contentType", "partitionKey", "outbox.topic", "schema", "__key"]
    metadata = {**dict.fromkeys(words, "x"), "outbox.projection": "false", "rawPayload": "false"}

    (event,) = events(upsert("shop||o1", "v", metadata=metadata))

    assert not {name.lower() for name in event} & {name.lower() for name in metadata}


def test_an_empty_subject_is_absent() -> None:
    (event,) = events(upsert("shop||o1", 1, metadata={"cloudevent.subject": ""}))

    assert "subject" not in event


@pytest.mark.parametrize(
    "metadata",
    [
        {"traceparent": "00-aa-bb-01"},
        {"cloudevent.traceid": "00-aa-bb-01"},
        {"cloudevent.traceparent": "00-aa-bb-01", "cloudevent.traceid": "00-cc-dd-01"},
    ],
)
def test_an_overridden_trace_is_the_parent_and_the_id_and_the_parent_goes_first(metadata: dict[str, str]) -> None:
    (event,) = events(upsert("shop||o1", 1, metadata=metadata))

    assert event["traceparent"] == event["traceid"] == "00-aa-bb-01"


@pytest.mark.parametrize(
    ("value", "content_type", "expected_type", "expected_data"),
    [
        ({"a": 1}, None, "application/json", {"a": 1}),
        ([1, "a"], None, "application/json", [1, "a"]),
        (None, None, "application/json", None),
        (1_000_000, None, "application/json", 1_000_000),
        ("2", None, "text/plain", "2"),
        ("2", "application/json", "application/json", "2"),
        ({"a": 1}, "application/json; charset=utf-8", "application/json; charset=utf-8", {"a": 1}),
        ({"a": 1}, "text/plain", "text/plain", '{"a":1}'),
        ("<a/>", "application/xml", "application/xml", "<a/>"),
        (b'{"a":1}', None, "text/plain", '{"a":1}'),
        (b'{"a":1}', "application/json", "application/json", {"a": 1}),
        (b"{broken", "application/json", "application/json", "{broken"),
        (b"", "application/json", "application/json", ""),
        (b"\xff", "text/plain", "text/plain", "\ufffd"),
    ],
)
def test_data_follows_the_content_type(
    value: Any, content_type: str | None, expected_type: str, expected_data: Any
) -> None:
    (event,) = events(upsert("shop||o1", value, content_type=content_type))

    assert (event["datacontenttype"], event["data"]) == (expected_type, expected_data)


@pytest.mark.parametrize("content_type", [None, "application/octet-stream", "application/x-protobuf"])
def test_bytes_that_are_no_text_travel_in_base64(content_type: str | None) -> None:
    (event,) = events(upsert("shop||o1", b"\xff\x00", content_type=content_type))

    assert event["datacontenttype"] == (content_type or "application/octet-stream")
    assert event["data_base64"] == "/wA="
    assert "data" not in event


@pytest.mark.parametrize("name", ["datacontenttype", "cloudevent.datacontenttype", "CloudEvent.DataContentType"])
def test_an_overridden_datacontenttype_without_a_content_type_formats_the_data_too(name: str) -> None:
    (event,) = events(upsert("shop||o1", b'{"a":1}', metadata={name: "application/json"}))

    assert (event["datacontenttype"], event["data"]) == ("application/json", {"a": 1})


def test_large_integers_and_the_clients_spelling_survive() -> None:
    (record,) = plan(Upsert("shop||o1", b'{"b": 9007199254740993, "a": 1.50}')).records

    assert b'{"b": 9007199254740993, "a": 1.50}' in record.body


def test_the_record_is_ordered_by_its_full_key_and_partitioned_by_the_logical_one() -> None:
    plain, keyed = plan(upsert("shop||o1", 1), upsert("shop||o2", 2, metadata={"partitionKey": "customer-7"})).records

    assert (plain.order_key, plain.metadata) == ("shop||o1", {"partitionKey": "o1"})
    assert (keyed.order_key, keyed.metadata) == ("shop||o2", {"partitionKey": "customer-7"})


def test_an_operation_may_choose_its_topic() -> None:
    (record,) = plan(upsert("shop||o1", 1, metadata={"outbox.topic": "returns"})).records

    assert record.topic == "returns"
    assert json.loads(record.body)["topic"] == "returns"


def test_so_may_an_announcement() -> None:
    data = Data(b"1", is_json=True)
    chosen = Announcement(data, "T", metadata=(("outbox.topic", "returns"),))
    both = Announcement(data, "T", topic="audit", metadata=(("outbox.topic", "returns"),))

    assert [record.topic for record in plan(announcements=(chosen, both)).records] == ["returns", "audit"]


@pytest.mark.parametrize("name", ["OUTBOX.Projection", "Outbox.Topic", "cloudevent.cloudevent.type", "cloudevent."])
def test_a_word_of_the_runtime_never_leaves_however_it_is_written(name: str) -> None:
    (event,) = events(upsert("shop||o1", 1, metadata={name: "x"}))

    assert "x" not in event.values()


def test_a_raw_payload_is_the_data_alone() -> None:
    records = plan(
        upsert("shop||o1", {"a": 1}, metadata={"rawPayload": "true"}),
        upsert("shop||o1", "text", metadata={"rawPayload": "T"}),
        upsert("shop||o1", b"\xff", metadata={"rawPayload": "1"}),
    ).records

    assert [record.body for record in records] == [b'{"a":1}', b"text", b"\xff"]


def test_a_raw_payload_flag_that_is_no_boolean_refuses_the_transaction() -> None:
    with pytest.raises(InvalidRequest, match="rawPayload value must be a valid boolean: actual is 'yes'"):
        plan(upsert("shop||o1", 1, metadata={"rawPayload": "yes"}))


PROJECTION = {"outbox.projection": "true"}


def test_a_projection_is_published_instead_of_the_value_and_not_persisted() -> None:
    state = upsert("shop||o1", {"total": 3, "card": "4111"}, metadata={"cloudevent.type": "OrderPlaced"})
    view = upsert("shop||o1", {"total": 3}, metadata={**PROJECTION, "cloudevent.type": "ignored"})

    commit = plan(state, view)

    assert commit.operations == (state,)
    (record,) = commit.records
    assert json.loads(record.body)["data"] == {"total": 3}
    assert json.loads(record.body)["type"] == "OrderPlaced"


def test_a_projection_brings_its_content_type() -> None:
    (event,) = events(
        upsert("shop||o1", {"a": 1}),
        upsert("shop||o1", "<a/>", content_type="application/xml", metadata=PROJECTION),
    )

    assert (event["datacontenttype"], event["data"]) == ("application/xml", "<a/>")


@given(st.permutations(range(6)))
def test_the_first_projection_of_each_key_wins_wherever_it_stands(order: list[int]) -> None:
    operations: list[Operation] = [
        upsert("shop||a", "state a"),
        upsert("shop||b", "state b"),
        upsert("shop||a", "first a", metadata=PROJECTION),
        upsert("shop||a", "second a", metadata=PROJECTION),
        upsert("shop||b", "first b", metadata=PROJECTION),
        Delete("shop||c"),
    ]
    arranged = [operations[index] for index in order]
    first_of_a = next(each for each in arranged if each in (operations[2], operations[3]))
    assert isinstance(first_of_a, Upsert)

    commit = plan(*arranged)

    persisted = [operations[0], operations[1], operations[5]]
    assert list(commit.operations) == [operation for operation in arranged if operation in persisted]
    data = {record.order_key: json.loads(record.body)["data"] for record in commit.records}
    assert data == {"shop||a": orjson.loads(first_of_a.value), "shop||b": "first b"}


@pytest.mark.parametrize("others", [[], [Delete("shop||o1")], [upsert("shop||other", 1)]])
def test_a_projection_without_its_upsert_refuses_the_transaction(others: list[Operation]) -> None:
    with pytest.raises(InvalidRequest, match="projection of 'o1' has no upsert"):
        plan(upsert("shop||o1", 1, metadata=PROJECTION), *others)


def test_without_an_outbox_there_are_no_events() -> None:
    commit = plan(upsert("shop||o1", 1), outbox=None)

    assert commit.records == ()


def test_without_an_outbox_a_projection_is_refused_rather_than_stored() -> None:
    with pytest.raises(InvalidRequest, match="has no outbox"):
        plan(upsert("shop||o1", 1), upsert("shop||o1", 2, metadata=PROJECTION), outbox=None)


def test_an_announcement_without_a_type_has_the_usual_one() -> None:
    (record,) = plan(announcements=(Announcement(Data(b"1", is_json=True), type=""),)).records

    assert json.loads(record.body)["type"] == "com.dapr.event.sent"


def test_an_announcement_is_an_event_of_its_own() -> None:
    announcement = Announcement(Data(b'{"orderId":1}', is_json=True), type="OrderPlaced", key="shop||o1")

    commit = plan(upsert("shop||o1", 1), announcements=(announcement,))

    own = json.loads(commit.records[1].body)
    assert (own["type"], own["data"], commit.records[1].order_key) == ("OrderPlaced", {"orderId": 1}, "shop||o1")


# What the `cloudevents` package makes of it

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(), each, max_size=3),
    max_leaves=5,
)

Form = tuple[Any, str | None, Any]
"""A value, its content type, and what a consumer is to see."""

FORMS: st.SearchStrategy[Form] = st.one_of(
    JSON.map(lambda value: (value, None, value)),
    JSON.map(lambda value: (value, "application/json; charset=utf-8", value)),
    JSON.map(lambda value: (orjson.dumps(value), "application/json", value)),
    JSON.filter(lambda value: not isinstance(value, str)).map(
        lambda value: (value, "text/plain", orjson.dumps(value).decode())
    ),
    st.text().map(lambda text: (text, "application/xml", text)),
    st.text().map(lambda text: (text.encode(), None, text)),
    st.text().map(lambda text: (text, "application/octet-stream", text.encode())),
    st.binary().map(lambda body: (body, "application/octet-stream", body)),
)

TIMES = st.datetimes(datetime(1000, 1, 1), timezones=st.just(UTC) | st.just(timezone(timedelta(hours=-9, minutes=-30))))

OVERRIDES = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(["id", "source", "type", "subject", "datacontenttype", "dataschema"], st.text()),
        "time": st.just("") | TIMES.map(datetime.isoformat),
    },
)

EXTENSIONS = st.dictionaries(st.from_regex("x[a-z0-9]{0,20}", fullmatch=True), st.text(), max_size=3)

USUAL: dict[str, str | None] = {"source": "shop", "type": "com.dapr.event.sent", "subject": None, "dataschema": None}

DEFAULTS = {
    "upsert": USUAL,
    "projection": USUAL,
    "announcement": USUAL | {"type": "Announced"},
    "delete": USUAL | {"type": "com.dapr.event.sent.deleted", "subject": "o1"},
}


def planned(kind: str, value: Any, content_type: str | None, metadata: Mapping[str, str]) -> OutboxRecord:
    state = upsert("shop||o1", value, content_type=content_type, metadata=metadata)
    match kind:
        case "upsert":
            commit = plan(state)
        case "projection":
            view = upsert("shop||o1", value, content_type=content_type, metadata=PROJECTION)
            commit = plan(upsert("shop||o1", "state", metadata=metadata), view)
        case "announcement":
            data = Data(state.value, content_type, not state.is_binary)
            commit = plan(announcements=(Announcement(data, "Announced", metadata=tuple(metadata.items())),))
        case _:
            commit = plan(Delete("shop||o1", metadata=metadata), outbox=replace(OUTBOX, publishes_deletes=True))
    (record,) = commit.records
    return record


def parsed(record: OutboxRecord) -> CloudEvent:
    return cast(CloudEvent, JSONFormat().read(CloudEvent, record.body))


@given(
    form=FORMS,
    kind=st.sampled_from([*DEFAULTS]),
    overrides=OVERRIDES,
    prefix=st.sampled_from(["", "cloudevent.", "CloudEvent."]),
    extensions=EXTENSIONS,
)
def test_whatever_leaves_is_read_by_the_cloudevents_package_as_it_was_meant(
    form: Form, kind: str, overrides: dict[str, str], prefix: str, extensions: dict[str, str]
) -> None:
    """Fails where empty attributes are sent, or bytes are sent as text (tried)."""
    value, content_type, data = form
    # Where nothing else tells a content type, the data would follow the override.
    assume(content_type or not overrides.get("datacontenttype"))
    metadata = {f"{prefix}{name}": text for name, text in (overrides | extensions).items()}

    record = planned(kind, value, content_type, metadata)
    event = parsed(record)

    attributes = event.get_attributes()
    assert event.get_data() == (None if kind == "delete" else data)
    for name, default in DEFAULTS[kind].items():
        assert attributes.get(name) == (overrides.get(name) or default)
    assert overrides.get("datacontenttype") in ("", None, event.get_datacontenttype())
    assert event.get_id() == (overrides.get("id") or record.event_id)
    assert event.get_time() == (datetime.fromisoformat(overrides["time"]) if overrides.get("time") else NOON)
    assert {name: attributes[name] for name in extensions} == extensions


def test_names_that_are_no_valid_ones_are_all_that_the_cloudevents_package_objects_to() -> None:
    names = ["my-custom-ce-field", "tenantId", "größe"]

    (record,) = plan(upsert("shop||o1", 1, metadata=dict.fromkeys(names, "x"))).records

    with pytest.raises(CloudEventValidationError) as refused:
        parsed(record)
    assert sorted(refused.value.errors) == sorted(names)
    assert {json.loads(record.body)[name] for name in names} == {"x"}


def test_event_ids_are_unique_and_change_after_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = EventIds("outbox")
    before = [ids.next() for _ in range(1_000)]

    monkeypatch.setattr("os.getpid", lambda: -5)
    after = ids.next()

    assert len(set(before)) == 1_000
    assert after.rpartition("-")[0] != before[0].rpartition("-")[0]
