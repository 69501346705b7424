from collections.abc import Mapping, Sequence
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statecast.components.state.commit import (
    ABSENT,
    Check,
    Concurrency,
    Delete,
    ETag,
    KeyChange,
    Mark,
    Operation,
    Upsert,
    collapse,
    etags_after,
)
from statecast.errors import ETagMismatch, InvalidRequest

keys = st.sampled_from(["a", "B", "é", "\uff5a", "🔑"])
etags = st.sampled_from([ETag("1"), ETag("2")])
upserts = st.builds(
    Upsert,
    keys,
    st.binary(max_size=2),
    etag=st.none() | st.just(ETag("")) | etags,
    concurrency=st.none() | st.sampled_from(Concurrency),
)
deletes = st.builds(Delete, keys, st.none() | st.just(ETag("")) | etags)
checks = st.builds(Check, keys, st.none() | etags)
operation_lists = st.lists(upserts | deletes | checks, max_size=8)
states = st.dictionaries(keys, etags)


def holds(operation: Operation, state: Mapping[str, ETag]) -> bool:
    current = state.get(operation.key)
    if operation.etag:
        return current == operation.etag
    is_first_write = isinstance(operation, Upsert) and operation.concurrency is Concurrency.FIRST_WRITE
    return current is None or not (is_first_write or isinstance(operation, Check))


def change_holds(change: KeyChange, state: Mapping[str, ETag]) -> bool:
    if change.expected is ABSENT:
        return change.key not in state
    return change.expected is None or state.get(change.key) == change.expected


def collapsed_holds(operations: Sequence[Operation], state: Mapping[str, ETag]) -> bool:
    try:
        return all(change_holds(change, state) for change in collapse(operations))
    except ETagMismatch:
        return False


@given(operations=operation_lists, state=states)
def test_the_changes_hold_in_exactly_the_states_in_which_every_operation_does(
    operations: list[Operation], state: dict[str, ETag]
) -> None:
    assert collapsed_holds(operations, state) == all(holds(operation, state) for operation in operations)


@given(operations=st.lists(st.builds(Upsert, keys, st.binary()) | st.builds(Delete, keys) | checks, max_size=8))
def test_the_last_write_of_each_key_is_the_one_that_stays(operations: list[Operation]) -> None:
    writes = {operation.key: operation for operation in operations if not isinstance(operation, Check)}

    try:
        changes = collapse(operations)
    except ETagMismatch:
        return

    assert {change.key: change.write for change in changes if change.write} == writes
    assert {change.key for change in changes} == {operation.key for operation in operations}


# A full-width letter and an emoji: UTF-8 sorts them the other way round than UTF-16 does.
@given(texts=st.lists(st.text() | st.sampled_from(["\uff5a", "🔑"]), unique=True))
def test_changes_are_sorted_by_the_bytes_of_their_keys(texts: list[str]) -> None:
    changes = collapse(Upsert(key, b"") for key in texts)

    assert [change.key for change in changes] == sorted(texts, key=str.encode)


@given(operations=operation_lists)
def test_the_order_of_conditions_does_not_matter(operations: list[Operation]) -> None:
    for state in ({}, {"a": ETag("1"), "B": ETag("2")}):
        assert collapsed_holds(operations, state) == collapsed_holds(operations[::-1], state)


@given(operations=operation_lists)
def test_etags_after_are_those_of_the_state_after(operations: list[Operation]) -> None:
    state = {operation.key: operation.etag for operation in operations if isinstance(operation, Check)}
    for operation in operations:
        if isinstance(operation, Upsert):
            state[operation.key] = ETag(f"new {operation.key}")
        elif isinstance(operation, Delete):
            state[operation.key] = None
    written = {key: etag for key, etag in state.items() if etag and etag.startswith("new")}

    answer = etags_after(operations, written)

    assert answer == tuple(state[operation.key] for operation in operations)


def test_two_etags_expected_of_one_key_name_the_key_and_one_of_them() -> None:
    with pytest.raises(ETagMismatch) as raised:
        collapse([Upsert("a", b"", etag=ETag("1")), Check("a", None)])

    assert (raised.value.key, raised.value.expected) == ("a", "1")


@pytest.mark.parametrize("length", [0, 15, 17, 32])
def test_a_mark_of_another_length_is_an_invalid_request(length: int) -> None:
    with pytest.raises(InvalidRequest, match="16 bytes"):
        Mark(bytes(length), timedelta(days=7))


@pytest.mark.parametrize("ttl", [timedelta(0), timedelta(microseconds=-1)])
def test_a_mark_that_never_holds_is_an_invalid_request(ttl: timedelta) -> None:
    with pytest.raises(InvalidRequest, match="some time"):
        Mark(bytes(16), ttl)


def test_a_check_of_a_value_without_an_etag_is_an_invalid_request() -> None:
    with pytest.raises(InvalidRequest, match=r"'orders\|\|1': it has no etag"):
        Check("orders||1", ETag(""))
