import dataclasses
from datetime import timedelta
from typing import Any

import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from statecast.components.state.commit import Delete, ETag, Item, Upsert
from statecast.components.state.value import FOREVER, encode, resolve_ttl, upsert
from statecast.errors import InvalidRequest


class StructOrder(msgspec.Struct):
    total: int


@dataclasses.dataclass
class DataOrder:
    total: int


class ModelOrder(pydantic.BaseModel):
    total: int


@pytest.mark.parametrize("value", [{"total": 3}, StructOrder(3), DataOrder(3), ModelOrder(total=3)])
def test_objects_of_every_kind_become_the_same_json(value: Any) -> None:
    assert encode(value) == (b'{"total":3}', False)


@pytest.mark.parametrize("value", [{"order": StructOrder(3)}, {"order": ModelOrder(total=3)}])
def test_objects_within_objects_become_json_too(value: Any) -> None:
    assert encode(value) == (b'{"order":{"total":3}}', False)


@pytest.mark.parametrize("value", [b"\x00\xff", bytearray(b"\x00\xff"), memoryview(b"\x00\xff")])
def test_bytes_are_kept_as_given(value: Any) -> None:
    assert encode(value) == (b"\x00\xff", True)


def test_raw_json_is_kept_byte_for_byte() -> None:
    assert encode(msgspec.Raw(b'{"b": 1.50, "a": 2}')) == (b'{"b": 1.50, "a": 2}', False)


def test_what_is_no_json_is_refused_by_its_type() -> None:
    with pytest.raises(InvalidRequest, match="a value of type object cannot be stored"):
        encode(object())


@pytest.mark.parametrize(
    ("value", "advice"),
    [
        (Item("k", b"1", ETag("1")), r"Item cannot be stored: .*`json\(\)`"),
        ({"item": Item("k", b"1", ETag("1"))}, r"`json\(\)`"),
        (Upsert("k", b"1"), "Upsert cannot be stored: .*transaction"),
        (Delete("k"), "Delete cannot be stored: .*transaction"),
    ],
)
def test_what_a_store_gave_or_takes_is_no_value_to_be_stored(value: Any, advice: str) -> None:
    with pytest.raises(InvalidRequest, match=advice):
        encode(value)


@pytest.mark.parametrize("type", [StructOrder, DataOrder, ModelOrder])
def test_an_item_decodes_into_the_type_it_was(type: Any) -> None:
    item = Item("k", b'{"total":3}', ETag("1"))

    assert item.decode(type) == type(total=3)
    assert item.json() == {"total": 3}


@pytest.mark.parametrize("type", [StructOrder, DataOrder, ModelOrder])
def test_an_item_that_does_not_fit_the_type_is_a_value_error(type: Any) -> None:
    with pytest.raises(ValueError, match="total"):
        Item("k", b'{"total":"x"}', ETag("1")).decode(type)


def test_the_content_type_stands_in_the_metadata() -> None:
    assert upsert("k", "<a/>", content_type="text/xml", metadata={"a": "b"}).metadata == {
        "a": "b",
        "contentType": "text/xml",
    }


HOUR = timedelta(hours=1)
MINUTE = timedelta(minutes=1)


@pytest.mark.parametrize(
    ("ttl", "metadata", "default", "expected"),
    [
        (None, {}, None, None),
        (None, {}, HOUR, HOUR),
        (MINUTE, {}, HOUR, MINUTE),
        (FOREVER, {}, HOUR, None),
        (timedelta(0), {}, HOUR, None),
        (None, {"ttlInSeconds": "60"}, HOUR, MINUTE),
        (None, {"ttlInSeconds": "+060"}, HOUR, MINUTE),
        (None, {"ttlInSeconds": "-1"}, HOUR, None),
        (None, {"ttlInSeconds": "0"}, HOUR, None),
        (None, {"ttlInSeconds": ""}, HOUR, HOUR),
        (MINUTE, {"ttlInSeconds": "5"}, HOUR, MINUTE),
        (timedelta(milliseconds=5), {}, None, timedelta(milliseconds=5)),
    ],
)
def test_a_value_lives_as_long_as_it_or_its_component_says(
    ttl: timedelta | None, metadata: dict[str, str], default: timedelta | None, expected: timedelta | None
) -> None:
    assert resolve_ttl(ttl, metadata, default) == expected


@pytest.mark.parametrize(
    "text", ["foo", "1.5", "10s", "-5", "2147483648", "9" * 400, "9" * 5_000, "1_000", " 5", "5\n", "٣", "--1", "+"]
)
def test_a_time_to_live_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        resolve_ttl(None, {"ttlInSeconds": text}, None)


@given(st.integers(1, 2_147_483_647))
def test_every_whole_number_of_seconds_is_taken(seconds: int) -> None:
    assert resolve_ttl(None, {"ttlInSeconds": str(seconds)}, None) == timedelta(seconds=seconds)
