"""The contract of a state store, as pytest classes.

To prove a backend, subclass in a test module of your own and override one fixture:

    class TestMyStateStore(SharedStateStoreContract):
        @pytest.fixture
        def make_store(self, my_server_url: str) -> StoreFactory:
            component = Component(name="statestore", type="state.mine", metadata={"url": my_server_url})
            return lambda: MyStateStore(component, app_id="orders", clock=SystemClock())

`make_store` returns a callable that makes a new store, not opened yet. All stores that one test makes share one
database, which holds nothing when the test starts. `StateStoreContract` is for what lives in one process;
`SharedStateStoreContract` adds what two stores on the same database owe each other. Take `OutboxLogContract` of
`components.testing.log` with it: a store is only whole with its log.

The suites need pytest-asyncio with `asyncio_mode = "auto"`, and hypothesis. For readable failures put
`pytest.register_assert_rewrite("statecast.components.testing")` into the root `conftest.py`.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime, timedelta
from itertools import product
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from statecast.components.state.commit import (
    Check,
    Commit,
    Concurrency,
    Delete,
    ETag,
    Guard,
    Item,
    Mark,
    Operation,
    OutboxRecord,
    Upsert,
)
from statecast.components.state.log import Failure
from statecast.components.state.store import StateStore
from statecast.components.testing.deadline import PATIENCE, until
from statecast.components.testing.log import (
    HOUR,
    Follower,
    StoreFactory,
    acquire_all,
    assert_chains_are_read_in_order,
    by_key,
    by_slice,
    drain,
    new_record,
    put_each_aside,
    read_all,
    read_aside,
    read_some,
    settle,
    take_over,
)
from statecast.components.testing.model import Lane
from statecast.errors import (
    Duplicate,
    ETagMismatch,
    Fenced,
    InvalidRequest,
    OutcomeUnknown,
    StatecastError,
    StoreUnavailable,
)


class StateStoreContract:
    """What every state store owes its callers. See the head of this module for how to run it."""

    short_ttl = timedelta(milliseconds=200)
    """The shortest time to live that the store tells from none."""

    transactions = 10_000
    """How many random transactions are compared with the model."""

    seed: int | None = None
    """Set it to the seed that a failure of the random transactions names, to see the same ones again."""

    @pytest.fixture
    def make_store(self) -> StoreFactory:
        raise NotImplementedError(
            f"{type(self).__name__} must override the fixture make_store: a callable that returns a new store, "
            "not opened yet, on a database of this test's own"
        )

    @pytest.fixture
    async def store(self, make_store: StoreFactory) -> AsyncIterator[StateStore]:
        async with make_store() as store:
            yield store

    # Reading

    async def test_an_absent_key_reads_as_none(self, store: StateStore) -> None:
        assert await store.get("orders||nobody") is None

    async def test_a_written_value_reads_back_with_its_etag_and_without_expiry(self, store: StateStore) -> None:
        (etag,) = await store.transact(commit(Upsert("orders||1", b'{"total": 1}')))

        assert etag
        assert await store.get("orders||1") == Item("orders||1", b'{"total": 1}', etag, None)

    async def test_an_overwrite_gives_a_new_etag(self, store: StateStore) -> None:
        before = await put(store, "orders||1", b"1")

        after = await put(store, "orders||1", b"2")

        assert after != before

    async def test_writing_the_same_value_again_gives_a_new_etag(self, store: StateStore) -> None:
        before = await put(store, "orders||1", b"1")

        after = await put(store, "orders||1", b"1")

        assert after != before
        assert await etag_of(store, "orders||1") == after

    async def test_a_deleted_key_is_absent(self, store: StateStore) -> None:
        await put(store, "orders||1", b"1")

        await store.transact(commit(Delete("orders||1")))

        assert await store.get("orders||1") is None

    async def test_deleting_an_absent_key_is_no_error(self, store: StateStore) -> None:
        assert await store.transact(commit(Delete("orders||nobody"))) == (None,)

    async def test_bulk_get_answers_every_key_in_order_repeats_included(self, store: StateStore) -> None:
        await put(store, "orders||b", b"b")
        await put(store, "orders||a", b"a")

        items = await store.bulk_get(["orders||b", "orders||none", "orders||a", "orders||b", "orders||none"])

        assert values(items) == [b"b", None, b"a", b"b", None]
        assert items[0] == await store.get("orders||b")

    async def test_bulk_get_of_nothing_is_empty(self, store: StateStore) -> None:
        assert await store.bulk_get([]) == []

    async def test_bulk_get_takes_thousands_of_keys(self, store: StateStore) -> None:
        await put(store, "orders||4999", b"last")

        items = await store.bulk_get([f"orders||{number}" for number in range(5_000)])

        assert values(items) == [None] * 4_999 + [b"last"]

    async def test_bulk_get_leaves_expired_values_out(self, store: StateStore) -> None:
        await store.transact(commit(Upsert("orders||1", b"1", ttl=self.short_ttl), Upsert("orders||2", b"2")))

        await until_absent(store, "orders||1")

        assert values(await store.bulk_get(["orders||1", "orders||2"])) == [None, b"2"]

    # Values and keys

    @pytest.mark.parametrize("is_binary", [False, True], ids=["text", "binary"])
    @pytest.mark.parametrize(
        "value",
        [
            b"",
            b"null",
            b'""',
            b'{"b":1, "a":2.50, "a": [1e400]}',
            b" spaces kept \r\n",
            b"not json",
            '"größe 🚀 \\u0000"'.encode(),
            b"0",
            b"x" * 1_000_000,
        ],
        ids=["empty", "null", "empty text", "json", "spaces", "words", "unicode", "zero", "a megabyte"],
    )
    async def test_text_is_kept_byte_for_byte(self, store: StateStore, value: bytes, is_binary: bool) -> None:
        await store.transact(commit(Upsert("orders||1", value, is_binary=is_binary)))

        assert await value_of(store, "orders||1") == value

    @pytest.mark.parametrize(
        "value",
        [bytes(range(256)), b"\xff\xfe", b"\x00", b"\x80" * 1_000_000, b"aGVsbG8=", b"\\x00"],
        ids=["every byte", "no utf-8", "nul", "a megabyte", "looks like base64", "looks like hex"],
    )
    async def test_bytes_are_kept_byte_for_byte(self, store: StateStore, value: bytes) -> None:
        await store.transact(commit(Upsert("orders||1", value, is_binary=True)))

        assert await value_of(store, "orders||1") == value
        assert values(await store.bulk_get(["orders||1"])) == [value]

    async def test_text_over_bytes_and_bytes_over_text_read_back(self, store: StateStore) -> None:
        await store.transact(commit(Upsert("orders||1", b"\xff", is_binary=True), Upsert("orders||2", b"[1]")))

        await store.transact(commit(Upsert("orders||1", b"[2]"), Upsert("orders||2", b"\xfe", is_binary=True)))

        assert values(await store.bulk_get(["orders||1", "orders||2"])) == [b"[2]", b"\xfe"]

    async def test_keys_that_look_alike_are_different_keys(self, store: StateStore) -> None:
        keys = [
            "orders||key",
            "orders||Key",
            "orders||KEY",
            "orders||key ",
            "orders|| key",
            "ORDERS||key",
            "orders||k%y",
            "orders||k_y",
            "orders||k*y",
            "orders||{key}",
            "orders||'key\"",
            "orders||é",
            "orders||e\u0301",
            "orders||ключ",
            "orders||鍵🔑",
            "orders||straße",
            "orders||strasse",
            "orders||1",
            "orders||01",
            "orders||a\nb",
            "orders||" + "k" * 500,
        ]

        await store.transact(commit(*(Upsert(key, key.encode()) for key in keys)))

        assert values(await store.bulk_get(keys)) == [key.encode() for key in keys]

    @pytest.mark.parametrize("kind", ["upsert", "delete", "check"])
    async def test_a_key_that_has_no_utf8_refuses_the_whole_commit(self, store: StateStore, kind: str) -> None:
        operations = [Upsert("orders||1", b"1"), CONDITIONED[kind](LONE_SURROGATE, None)]

        await assert_refused_without_a_trace(
            store, InvalidRequest, operations, watched=["orders||1"], marks=[new_mark()]
        )

    async def test_a_key_that_has_no_utf8_cannot_be_asked_for(self, store: StateStore) -> None:
        with pytest.raises(InvalidRequest):
            await store.get(LONE_SURROGATE)
        with pytest.raises(InvalidRequest):
            await store.bulk_get(["orders||1", LONE_SURROGATE])

    @pytest.mark.parametrize("field", ["order_key", "event_id", "pubsub", "topic", "metadata"])
    async def test_a_record_that_has_no_utf8_refuses_the_whole_commit(self, store: StateStore, field: str) -> None:
        text = {"name": LONE_SURROGATE} if field == "metadata" else LONE_SURROGATE
        record = replace(new_record("orders||1"), **{field: text})
        mark = new_mark()

        with pytest.raises(InvalidRequest):
            await store.transact(
                commit(Upsert("orders||1", b"1"), records=[new_record("orders||1"), record], marks=[mark])
            )

        assert await store.get("orders||1") is None
        assert await drain(store.log) == []
        assert await is_applied(store, commit(marks=[mark]))

    # What a commit answers

    async def test_a_commit_of_nothing_answers_nothing(self, store: StateStore) -> None:
        assert await store.transact(Commit(())) == ()

    async def test_every_operation_is_answered_with_the_etag_its_key_has_afterwards(self, store: StateStore) -> None:
        old = await put(store, "orders||old", b"1")
        kept = await put(store, "orders||kept", b"1")

        etags = await store.transact(
            commit(
                Upsert("orders||z", b"z"),
                Check("orders||kept", kept),
                Delete("orders||old", old),
                Check("orders||none", None),
                Upsert("orders||a", b"a"),
                Delete("orders||none"),
            )
        )

        at_z, at_a = await etag_of(store, "orders||z"), await etag_of(store, "orders||a")
        assert etags == (at_z, kept, None, None, at_a, None)

    async def test_a_key_written_twice_keeps_the_last_value_and_answers_one_etag_twice(self, store: StateStore) -> None:
        etags = await store.transact(commit(Upsert("orders||1", b"first"), Upsert("orders||1", b"last")))

        item = await store.get("orders||1")
        assert item is not None
        assert item.value == b"last"
        assert etags == (item.etag, item.etag)

    async def test_a_key_written_then_deleted_is_absent(self, store: StateStore) -> None:
        await put(store, "orders||1", b"0")

        etags = await store.transact(commit(Upsert("orders||1", b"1"), Delete("orders||1")))

        assert etags == (None, None)
        assert await store.get("orders||1") is None

    async def test_a_key_deleted_then_written_has_the_new_value(self, store: StateStore) -> None:
        before = await put(store, "orders||1", b"0")

        etags = await store.transact(commit(Delete("orders||1", before), Upsert("orders||1", b"1")))

        item = await store.get("orders||1")
        assert item is not None
        assert item.value == b"1"
        assert etags == (item.etag, item.etag)

    async def test_the_last_write_of_a_key_decides_its_expiry(self, store: StateStore) -> None:
        await store.transact(commit(Upsert("orders||1", b"1", ttl=HOUR), Upsert("orders||1", b"2")))
        await store.transact(commit(Upsert("orders||2", b"1"), Upsert("orders||2", b"2", ttl=HOUR)))

        first, second = await store.bulk_get(["orders||1", "orders||2"])
        assert first is not None
        assert first.expires_at is None
        assert second is not None
        assert second.expires_at is not None

    async def test_ten_thousand_operations_are_one_commit(self, store: StateStore) -> None:
        keys = [f"orders||{number:05}" for number in range(10_000)]

        etags = await store.transact(commit(*(Upsert(key, key.encode()) for key in keys)))

        items = await store.bulk_get(keys)
        assert values(items) == [key.encode() for key in keys]
        assert [item.etag for item in items if item] == list(etags)

    # Conditions

    @pytest.mark.parametrize("presence", ["live", "absent", "expired"])
    async def test_every_condition_is_judged_by_one_rule(self, store: StateStore, presence: str) -> None:
        cases = {
            f"orders||{number}": case
            for number, case in enumerate(product(CONDITIONED, ("none", "empty", "current", "stale", "malformed")))
        }
        stale, current = await self._make(store, presence, list(cases))

        refused = []
        for key, (kind, etag) in cases.items():
            choice = {"none": None, "empty": "", "current": current[key], "stale": stale[key], "malformed": "no etag"}
            if await is_refused(store, key, CONDITIONED[kind](key, choice[etag])):
                refused.append((kind, etag))

        is_live = presence == "live"
        assert refused == [case for case in cases.values() if breaks_a_condition(*case, is_live=is_live)]

    async def _make(
        self, store: StateStore, presence: str, keys: Sequence[str]
    ) -> tuple[dict[str, ETag | None], dict[str, ETag | None]]:
        """Write all keys twice; tell their stale and their current etags."""
        stale = await store.transact(commit(*(Upsert(key, b"0") for key in keys)))
        ttl = self.short_ttl if presence == "expired" else None
        current = await store.transact(commit(*(Upsert(key, b"1", ttl=ttl) for key in keys)))
        if presence == "absent":
            await store.transact(commit(*(Delete(key) for key in keys)))
        if presence != "live":
            await until_absent(store, *keys)
        return dict(zip(keys, stale, strict=True)), dict(zip(keys, current, strict=True))

    async def test_an_etag_is_compared_as_opaque_text(self, store: StateStore) -> None:
        current = await put(store, "orders||1", b"1")
        accepted = [
            etag
            for etag in lookalikes(current)
            if not await is_refused(store, "orders||1", Upsert("orders||1", b"2", etag=ETag(etag)))
        ]

        assert accepted == []
        assert await value_of(store, "orders||1") == b"1"

    async def test_an_etag_that_has_no_utf8_is_a_mismatch(self, store: StateStore) -> None:
        await put(store, "orders||1", b"1")

        for make in CONDITIONED.values():
            assert await is_refused(store, "orders||1", make("orders||1", LONE_SURROGATE))

    async def test_a_mismatch_names_key_and_expected_etag(self, store: StateStore) -> None:
        await put(store, "orders||1", b"1")

        with pytest.raises(ETagMismatch) as stale:
            await store.transact(commit(Upsert("orders||1", b"2", etag=ETag("other"))))
        with pytest.raises(ETagMismatch) as first:
            await store.transact(commit(Upsert("orders||1", b"2", concurrency=Concurrency.FIRST_WRITE)))

        assert (stale.value.key, stale.value.expected) == ("orders||1", "other")
        assert (first.value.key, first.value.expected) == ("orders||1", None)

    async def test_first_write_takes_a_key_that_was_deleted(self, store: StateStore) -> None:
        await put(store, "orders||1", b"1")
        await store.transact(commit(Delete("orders||1")))

        await store.transact(commit(Upsert("orders||1", b"2", concurrency=Concurrency.FIRST_WRITE)))

        assert await value_of(store, "orders||1") == b"2"

    @pytest.mark.parametrize("end", ["deleted", "expired"])
    @pytest.mark.parametrize("kind", ["upsert", "delete", "check"])
    async def test_an_etag_of_a_value_that_ended_does_not_fit_the_one_that_follows(
        self, store: StateStore, end: str, kind: str
    ) -> None:
        (ended,) = await store.transact(commit(Upsert("orders||1", b"1", ttl=self.short_ttl)))
        if end == "deleted":
            await store.transact(commit(Delete("orders||1")))
        await until_absent(store, "orders||1")
        await put(store, "orders||1", b"2")

        assert await is_refused(store, "orders||1", CONDITIONED[kind]("orders||1", ended))

    async def test_no_etag_comes_again_however_often_a_key_is_made_anew(self, store: StateStore) -> None:
        seen: list[ETag | None] = []
        for _ in range(50):
            answers = await asyncio.gather(
                store.transact(commit(Upsert("orders||1", b"1"))),
                store.transact(commit(Upsert("orders||1", b"2"))),
                store.transact(commit(Delete("orders||1"))),
            )
            seen += [etag for answer in answers for etag in answer if etag]

        assert len(set(seen)) == len(seen) == 100

    async def test_conditions_on_a_repeated_key_speak_of_the_state_before(self, store: StateStore) -> None:
        before = await put(store, "orders||1", b"1")

        await store.transact(
            commit(
                Upsert("orders||1", b"2", etag=before),
                Upsert("orders||1", b"3", etag=before),
                Check("orders||1", before),
                Upsert("orders||new", b"1", concurrency=Concurrency.FIRST_WRITE),
                Check("orders||new", None),
                Upsert("orders||new", b"2", concurrency=Concurrency.FIRST_WRITE),
            )
        )

        assert values(await store.bulk_get(["orders||1", "orders||new"])) == [b"3", b"2"]

    async def test_a_condition_on_a_repeated_key_counts_wherever_it_stands(self, store: StateStore) -> None:
        await put(store, "orders||1", b"1")
        plain, conditional = Upsert("orders||1", b"2"), Upsert("orders||1", b"3", etag=ETag("other"))

        assert await is_refused(store, "orders||1", plain, conditional)
        assert await is_refused(store, "orders||1", conditional, plain)
        assert await is_refused(store, "orders||1", Delete("orders||1", ETag("other")), plain)
        assert await is_refused(store, "orders||1", plain, Check("orders||1", None))

    async def test_two_etags_expected_of_one_key_are_a_mismatch(self, store: StateStore) -> None:
        before = await put(store, "orders||1", b"1")

        assert await is_refused(
            store, "orders||1", Upsert("orders||1", b"2", etag=before), Delete("orders||1", ETag("x"))
        )
        assert await is_refused(
            store,
            "orders||1",
            Upsert("orders||1", b"2", etag=before),
            Upsert("orders||1", b"2", concurrency=Concurrency.FIRST_WRITE),
        )

    async def test_a_check_that_holds_writes_nothing(self, store: StateStore) -> None:
        etag = await put(store, "orders||1", b"1")

        await store.transact(commit(Check("orders||1", etag), Check("orders||none", None)))

        assert await store.bulk_get(["orders||1", "orders||none"]) == [Item("orders||1", b"1", etag, None), None]

    # All or nothing

    @pytest.mark.parametrize("position", [0, 1, 2, 3], ids=["first", "second", "third", "last"])
    @pytest.mark.parametrize("kind", ["stale upsert", "first write", "stale delete", "stale check", "absent check"])
    async def test_one_broken_condition_leaves_everything_as_it_was(
        self, store: StateStore, kind: str, position: int
    ) -> None:
        keys = [f"orders||{name}" for name in "abcd"]
        await store.transact(commit(*(Upsert(key, b"before") for key in keys[:3]), Upsert(keys[3], b"x", ttl=HOUR)))
        operations: list[Operation] = [
            Upsert(keys[0], b"after"),
            Delete(keys[1]),
            Upsert(keys[2], b"after", ttl=HOUR),
            Upsert(keys[3], b"after"),
            Upsert("orders||new", b"after"),
        ]
        operations[position] = BROKEN[kind](keys[position])

        await assert_refused_without_a_trace(
            store, ETagMismatch, operations, watched=[*keys, "orders||new"], marks=[new_mark()]
        )

    @pytest.mark.parametrize("position", [0, 1, 2])
    async def test_a_mark_set_before_leaves_everything_as_it_was(self, store: StateStore, position: int) -> None:
        marks = [new_mark(), new_mark(), new_mark()]
        await store.transact(commit(Upsert("orders||1", b"before"), marks=[marks[position]]))
        await drain(store.log)

        await assert_refused_without_a_trace(
            store,
            Duplicate,
            [Upsert("orders||1", b"after"), Upsert("orders||2", b"after")],
            watched=["orders||1", "orders||2"],
            marks=marks,
            set_before=marks[position],
        )

    @pytest.mark.parametrize("position", [0, 1, 2])
    async def test_a_lost_claim_leaves_everything_as_it_was(self, store: StateStore, position: int) -> None:
        await put(store, "orders||1", b"before")
        guards = [await store.directory.claim("Cart", name) for name in ("a", "b", "c")]
        await store.directory.claim("Cart", guards[position].id)

        await assert_refused_without_a_trace(
            store,
            Fenced,
            [Upsert("orders||1", b"after"), Upsert("orders||2", b"after")],
            watched=["orders||1", "orders||2"],
            marks=[new_mark()],
            guards=guards,
        )

    async def test_a_refused_commit_does_not_touch_its_neighbours(self, store: StateStore) -> None:
        await put(store, "orders||taken", b"1")
        commits = [
            commit(Upsert(f"orders||{number}", b"1"), *([FIRST_WRITE_OF_TAKEN] if number % 2 else []))
            for number in range(40)
        ]

        outcomes = await asyncio.gather(*(store.transact(each) for each in commits), return_exceptions=True)

        assert [isinstance(outcome, ETagMismatch) for outcome in outcomes] == [False, True] * 20
        stored = values(await store.bulk_get([f"orders||{number}" for number in range(40)]))
        assert stored == [b"1", None] * 20

    # Records

    async def test_a_commits_records_are_in_the_log_in_their_order(self, store: StateStore) -> None:
        records = [new_record("orders||1", str(number)) for number in range(5)]

        await store.transact(commit(Upsert("orders||1", b"1"), records=records))

        assert await drain(store.log) == records

    async def test_records_alone_are_a_commit(self, store: StateStore) -> None:
        record = new_record("orders||1")

        assert await store.transact(commit(records=[record])) == ()

        assert await drain(store.log) == [record]

    async def test_a_commit_without_records_appends_none(self, store: StateStore) -> None:
        await put(store, "orders||1", b"1")

        assert await drain(store.log) == []

    # Marks

    async def test_a_commit_with_a_mark_is_applied_once(self, store: StateStore) -> None:
        once = commit(Upsert("orders||1", b"1"), records=[new_record("orders||1")], marks=[new_mark()])
        (etag,) = await store.transact(once)

        with pytest.raises(Duplicate) as raised:
            await store.transact(once)

        assert raised.value.digest == once.marks[0].digest
        assert await etag_of(store, "orders||1") == etag
        assert await drain(store.log) == list(once.records)

    async def test_a_duplicate_tells_what_the_first_commit_was_answered(self, store: StateStore) -> None:
        kept = await put(store, "orders||kept", b"1")
        await put(store, "orders||gone", b"1")
        once = commit(
            Upsert("orders||1", b"1"),
            Check("orders||kept", kept),
            Delete("orders||gone"),
            Check("orders||none", None),
            Upsert("orders||2", b"1"),
            Upsert("orders||1", b"2"),
            Delete("orders||2"),
            marks=[new_mark()],
        )
        answer = await store.transact(once)
        await put(store, "orders||1", b"3")
        await store.transact(commit(Delete("orders||kept")))

        for _ in range(2):
            assert await first_answer(store, once) == answer

    async def test_a_duplicate_tells_the_answer_of_the_commit_that_its_mark_came_with(self, store: StateStore) -> None:
        """Also where another commit, of another length, brings the same mark as one of several."""
        first, second, unset = new_mark(), new_mark(), new_mark()
        answers = [
            await store.transact(commit(Upsert("orders||1", b"1"), Upsert("orders||2", b"1"), marks=[first])),
            await store.transact(commit(Upsert("orders||1", b"2"), marks=[second])),
        ]

        told = [await first_answer(store, commit(Delete("orders||1"), marks=[unset, mark])) for mark in (first, second)]

        assert told == answers

    async def test_each_mark_of_a_commit_tells_its_answer(self, store: StateStore) -> None:
        marks = [new_mark() for _ in range(3)]
        answer = await store.transact(commit(Upsert("orders||1", b"1"), marks=marks))

        assert [await first_answer(store, commit(marks=[mark])) for mark in marks] == [answer] * 3

    async def test_a_mark_tells_the_answer_of_a_commit_of_a_thousand_operations(self, store: StateStore) -> None:
        operations = [Upsert(f"orders||{number}", b"1") for number in range(1_000)]
        once = commit(*operations, marks=[new_mark()])

        answer = await store.transact(once)

        assert await first_answer(store, once) == answer

    async def test_a_commit_that_was_refused_leaves_no_answer(self, store: StateStore) -> None:
        once = commit(Upsert("orders||1", b"1", etag=ETag("stale")), marks=[new_mark()])
        with pytest.raises(ETagMismatch):
            await store.transact(once)

        again = commit(Upsert("orders||1", b"1"), marks=once.marks)
        answer = await store.transact(again)

        assert await first_answer(store, once) == answer

    async def test_marks_alone_are_a_commit(self, store: StateStore) -> None:
        mark = new_mark()

        assert await store.transact(commit(marks=[mark])) == ()

        assert await first_answer(store, commit(marks=[mark])) == ()

    async def test_marks_are_told_apart_by_every_byte(self, store: StateStore) -> None:
        digests = [bytes(16), bytes(15) + b"\x01", b"\x01" + bytes(15), b"\xff" * 16, b"aaaaaaaaaaaaaaaa", b"A" * 16]

        for digest in digests:
            await store.transact(commit(marks=[Mark(digest, HOUR)]))

        for digest in digests:
            with pytest.raises(Duplicate):
                await store.transact(commit(marks=[Mark(digest, HOUR)]))

    async def test_a_commit_repeated_with_its_mark_is_a_duplicate_although_its_etag_has_moved(
        self, store: StateStore
    ) -> None:
        etag = await put(store, "orders||1", b"0")
        once = commit(Upsert("orders||1", b"1", etag=etag), marks=[new_mark()])
        first_write = commit(Upsert("orders||2", b"1", concurrency=Concurrency.FIRST_WRITE), marks=[new_mark()])
        await store.transact(once)
        await store.transact(first_write)

        with pytest.raises(Duplicate):
            await store.transact(once)
        with pytest.raises(Duplicate):
            await store.transact(first_write)

    async def test_a_commit_repeated_with_its_mark_is_a_duplicate_although_its_claim_was_taken_over(
        self, store: StateStore
    ) -> None:
        guard = await store.directory.claim("Cart", "leroy")
        once = commit(Upsert("orders||1", b"1"), marks=[new_mark()], guards=[guard])
        await store.transact(once)
        await store.directory.claim("Cart", "leroy")

        with pytest.raises(Duplicate):
            await store.transact(once)

    async def test_a_mark_is_forgotten_after_its_time(self, store: StateStore) -> None:
        mark = Mark(uuid4().bytes, self.short_ttl)
        await store.transact(commit(Upsert("orders||1", b"1"), marks=[mark]))

        async def is_forgotten() -> bool:
            return await is_applied(store, commit(Upsert("orders||1", b"2"), marks=[mark]))

        await until(is_forgotten)

        assert await value_of(store, "orders||1") == b"2"

    async def test_a_mark_that_was_forgotten_and_set_again_holds_for_its_new_time(self, store: StateStore) -> None:
        digest = uuid4().bytes
        await store.transact(commit(Upsert("orders||1", b"1"), marks=[Mark(digest, self.short_ttl)]))
        again = commit(Upsert("orders||1", b"2"), marks=[Mark(digest, HOUR)])

        async def is_set_again() -> bool:
            return await is_applied(store, again)

        await until(is_set_again)

        assert await first_answer(store, again) == (await etag_of(store, "orders||1"),)

    async def test_one_of_many_commits_with_the_same_mark_is_applied(self, store: StateStore) -> None:
        mark = new_mark()
        commits = [
            commit(Upsert(f"orders||{number}", b"1"), records=[new_record("orders||1")], marks=[mark])
            for number in range(30)
        ]

        outcomes = await asyncio.gather(*(store.transact(each) for each in commits), return_exceptions=True)

        (answer,) = (outcome for outcome in outcomes if isinstance(outcome, tuple))
        duplicates = [outcome for outcome in outcomes if isinstance(outcome, Duplicate)]
        assert [duplicate.etags for duplicate in duplicates] == [answer] * 29
        stored = values(await store.bulk_get([f"orders||{number}" for number in range(30)]))
        assert [value is not None for value in stored] == [isinstance(outcome, tuple) for outcome in outcomes]
        assert len(await drain(store.log)) == 1

    # Claims

    async def test_a_guarded_commit_is_applied_while_the_claim_holds(self, store: StateStore) -> None:
        guard = await store.directory.claim("Cart", "leroy")

        for value in (b"1", b"2"):
            await store.transact(commit(Upsert("orders||1", value), guards=[guard]))

        assert await value_of(store, "orders||1") == b"2"

    async def test_a_second_claim_fences_the_first(self, store: StateStore) -> None:
        first = await store.directory.claim("Cart", "leroy")
        second = await store.directory.claim("Cart", "leroy")

        with pytest.raises(Fenced) as raised:
            await store.transact(commit(Upsert("orders||1", b"first"), guards=[first]))
        await store.transact(commit(Upsert("orders||1", b"second"), guards=[second]))

        assert (raised.value.type, raised.value.id) == ("Cart", "leroy")
        assert await value_of(store, "orders||1") == b"second"

    async def test_claims_of_other_actors_are_left_alone(self, store: StateStore) -> None:
        names = [("Cart", "leroy"), ("Cart", "Leroy"), ("cart", "leroy"), ("Cart||leroy", ""), ("Ca", "rtleroy")]
        guards = [await store.directory.claim(type, id) for type, id in names]

        await store.transact(commit(Upsert("orders||1", b"1"), guards=guards))

        assert await value_of(store, "orders||1") == b"1"

    async def test_a_released_claim_is_fenced(self, store: StateStore) -> None:
        guard = await store.directory.claim("Cart", "leroy")
        await store.directory.release(guard)

        with pytest.raises(Fenced):
            await store.transact(commit(Upsert("orders||1", b"1"), guards=[guard]))

        assert await store.get("orders||1") is None

    async def test_releasing_a_claim_that_was_taken_over_changes_nothing(self, store: StateStore) -> None:
        first = await store.directory.claim("Cart", "leroy")
        second = await store.directory.claim("Cart", "leroy")

        await store.directory.release(first)

        await store.transact(commit(Upsert("orders||1", b"1"), guards=[second]))
        assert await value_of(store, "orders||1") == b"1"

    async def test_a_claim_after_a_release_has_a_token_never_seen_before(self, store: StateStore) -> None:
        first = await store.directory.claim("Cart", "leroy")
        await store.directory.release(first)
        second = await store.directory.claim("Cart", "leroy")

        with pytest.raises(Fenced):
            await store.transact(commit(Upsert("orders||1", b"1"), guards=[first]))

        assert second.token != first.token

    async def test_a_guard_nobody_claimed_is_fenced(self, store: StateStore) -> None:
        with pytest.raises(Fenced):
            await store.transact(commit(Upsert("orders||1", b"1"), guards=[Guard("Cart", "leroy", "1")]))

    # Expiry

    async def test_an_expiring_value_tells_when_it_ends(self, store: StateStore) -> None:
        asked_at = datetime.now(UTC)

        await store.transact(commit(Upsert("orders||1", b"1", ttl=HOUR)))

        item = await store.get("orders||1")
        assert item is not None
        assert item.expires_at is not None
        assert item.expires_at.tzinfo is not None
        assert abs(item.expires_at - (asked_at + HOUR)) < PATIENCE
        assert await store.bulk_get(["orders||1"]) == [item]

    async def test_a_value_is_gone_after_its_time(self, store: StateStore) -> None:
        await store.transact(commit(Upsert("orders||1", b"1", ttl=self.short_ttl), Upsert("orders||2", b"2", ttl=HOUR)))

        async def is_gone() -> bool:
            return values(await store.bulk_get(["orders||1", "orders||2"])) == [None, b"2"]

        await until(is_gone)

        assert await store.get("orders||1") is None
        assert await value_of(store, "orders||2") == b"2"

    async def test_an_overwrite_without_a_time_to_live_stays(self, store: StateStore) -> None:
        await store.transact(
            commit(Upsert("orders||1", b"1", ttl=self.short_ttl), Upsert("orders||2", b"1", ttl=self.short_ttl))
        )

        await store.transact(commit(Upsert("orders||1", b"2")))

        await until_absent(store, "orders||2")
        item = await store.get("orders||1")
        assert item is not None
        assert (item.value, item.expires_at) == (b"2", None)

    async def test_an_overwrite_with_another_time_to_live_has_that(self, store: StateStore) -> None:
        await store.transact(commit(Upsert("orders||1", b"1", ttl=self.short_ttl), Upsert("orders||2", b"1", ttl=HOUR)))

        await store.transact(commit(Upsert("orders||1", b"2", ttl=HOUR), Upsert("orders||2", b"2", ttl=self.short_ttl)))

        await until_absent(store, "orders||2")
        assert await value_of(store, "orders||1") == b"2"

    async def test_a_value_and_a_mark_may_outlive_the_calendar(self, store: StateStore) -> None:
        mark = Mark(uuid4().bytes, timedelta.max)
        answer = await store.transact(commit(Upsert("orders||1", b"1", ttl=timedelta.max), marks=[mark]))

        item = await store.get("orders||1")

        assert item is not None
        assert item.expires_at is None or item.expires_at.year > 9_000
        assert await store.bulk_get(["orders||1"]) == [item]
        assert await first_answer(store, commit(marks=[mark])) == answer

    async def test_a_key_that_expired_can_be_written_again_and_stays(self, store: StateStore) -> None:
        await store.transact(commit(Upsert("orders||1", b"1", ttl=self.short_ttl)))
        await until_absent(store, "orders||1")

        etag = await put(store, "orders||1", b"2")

        assert await store.get("orders||1") == Item("orders||1", b"2", etag, None)

    # Concurrency and cancellation

    async def test_fifty_concurrent_increments_by_etag_end_at_fifty(self, store: StateStore) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(50):
                group.create_task(increment(store, "orders||counter"))

        assert await value_of(store, "orders||counter") == b"50"

    async def test_one_of_many_first_writes_wins(self, store: StateStore) -> None:
        writes = [Upsert("orders||1", b"%d" % number, concurrency=Concurrency.FIRST_WRITE) for number in range(30)]

        outcomes = await asyncio.gather(*(store.transact(commit(each)) for each in writes), return_exceptions=True)

        winners = [number for number, outcome in enumerate(outcomes) if isinstance(outcome, tuple)]
        assert sum(isinstance(outcome, ETagMismatch) for outcome in outcomes) == 29
        assert [await value_of(store, "orders||1")] == [b"%d" % number for number in winners]

    async def test_commits_that_share_keys_in_opposite_orders_all_end(self, store: StateStore) -> None:
        keys = [f"orders||{number}" for number in range(10)]

        async with asyncio.timeout(PATIENCE.total_seconds()), asyncio.TaskGroup() as group:
            for number in range(60):
                ordered = keys if number % 2 else keys[::-1]
                group.create_task(store.transact(commit(*(Upsert(key, b"%d" % number) for key in ordered))))

        assert len(set(values(await store.bulk_get(keys)))) == 1

    async def test_cancelled_commits_are_applied_as_a_whole_or_not_at_all_and_leak_nothing(
        self, store: StateStore
    ) -> None:
        chance = random.Random(7)
        records = [new_record(f"orders||{number}", str(number)) for number in range(200)]
        tasks = [
            asyncio.create_task(
                store.transact(commit(Upsert(f"orders||a{n}", b"1"), Upsert(f"orders||b{n}", b"1"), records=[record]))
            )
            for n, record in enumerate(records)
        ]

        while not all(task.done() for task in tasks):
            chance.choice(tasks).cancel()
            await asyncio.sleep(0)
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)

        first = values(await store.bulk_get([f"orders||a{number}" for number in range(200)]))
        second = values(await store.bulk_get([f"orders||b{number}" for number in range(200)]))
        logged = {record.event_id for record in await drain(store.log)}
        assert first == second
        assert logged == {str(number) for number in range(200) if first[number]}
        assert all(first[n] for n, outcome in enumerate(outcomes) if isinstance(outcome, tuple))
        await self._assert_that_calls_go_through(store, 200)

    async def test_a_cancelled_commit_that_is_repeated_with_its_mark_takes_effect_once(self, store: StateStore) -> None:
        chance = random.Random(11)
        records = [new_record(f"orders||{number}", str(number)) for number in range(60)]
        commits = [commit(Upsert(each.order_key, b"1"), records=[each], marks=[new_mark()]) for each in records]
        tasks = [asyncio.create_task(store.transact(each)) for each in commits]

        for task in tasks:
            task.cancel()
            if chance.random() < 0.3:
                await asyncio.sleep(0)
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(is_applied(store, each) for each in commits))

        assert by_key(await drain(store.log)) == by_key(records)
        assert values(await store.bulk_get([each.order_key for each in records])) == [b"1"] * len(records)

    async def test_cancelled_reads_leak_nothing(self, store: StateStore) -> None:
        tasks = [asyncio.create_task(store.get("orders||1")) for _ in range(200)]
        await asyncio.sleep(0)

        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

        await self._assert_that_calls_go_through(store, 200)

    async def _assert_that_calls_go_through(self, store: StateStore, calls: int) -> None:
        async with asyncio.timeout(PATIENCE.total_seconds()):
            await asyncio.gather(*(put(store, f"orders||after{number}", b"1") for number in range(calls)))
            items = await asyncio.gather(*(store.get(f"orders||after{number}") for number in range(calls)))
        assert values(items) == [b"1"] * calls

    # Random transactions

    @settings(
        max_examples=40,
        deadline=None,
        suppress_health_check=[
            HealthCheck.function_scoped_fixture,  # every example has keys of its own
            HealthCheck.differing_executors,  # every backend's class runs this one test
            HealthCheck.too_slow,
        ],
    )
    @given(chance=st.randoms(use_true_random=False), transactions=st.integers(1, 12))
    async def test_a_few_random_transactions_do_what_the_model_does(
        self, store: StateStore, chance: random.Random, transactions: int
    ) -> None:
        lane = Lane(store, f"orders||{uuid4().hex}", chance)

        await lane.run(transactions, compare_every=1)

        lane.compare_records(await drain(store.log))

    async def test_random_transactions_leave_no_partial_write_and_no_event_without_its_commit(
        self, store: StateStore
    ) -> None:
        seed = random.randrange(2**32) if self.seed is None else self.seed
        print(f"seed = {seed}")
        lanes = [Lane(store, f"orders||{number}", random.Random(seed + number)) for number in range(20)]

        async with asyncio.TaskGroup() as group:
            for lane in lanes:
                group.create_task(lane.run(self.transactions // len(lanes), compare_every=20))

        logged = await drain(store.log)
        for lane in lanes:
            lane.compare_records(logged)
        assert len(logged) == sum(len(lane.model.records) for lane in lanes)

    # Closed

    async def test_a_call_before_opening_says_unavailable(self, make_store: StoreFactory) -> None:
        store = make_store()

        await assert_unavailable(store)

    async def test_a_call_after_closing_says_unavailable(self, make_store: StoreFactory) -> None:
        async with make_store() as store:
            await put(store, "orders||1", b"1")

        await assert_unavailable(store)

    async def test_closing_ends_every_task(self, make_store: StoreFactory) -> None:
        before = asyncio.all_tasks()

        async with make_store() as store:
            await put(store, "orders||1", b"1")
            await drain(store.log)

        assert asyncio.all_tasks() == before


class SharedStateStoreContract(StateStoreContract):
    """What stores on the same database owe each other: other processes, and the same one after a restart."""

    @pytest.fixture
    async def other(self, make_store: StoreFactory, store: StateStore) -> AsyncIterator[StateStore]:
        async with make_store() as other:
            yield other

    async def test_everything_is_there_after_a_reopen(self, make_store: StoreFactory) -> None:
        mark, record = new_mark(), new_record("orders||1")
        async with make_store() as store:
            guard = await store.directory.claim("Cart", "leroy")
            answer = await store.transact(
                commit(
                    Upsert("orders||1", b"1"),
                    Upsert("orders||2", b"\xff", is_binary=True, ttl=HOUR),
                    records=[record],
                    marks=[mark],
                )
            )
            before = await store.bulk_get(["orders||1", "orders||2"])

        async with make_store() as store:
            assert await store.bulk_get(["orders||1", "orders||2"]) == before
            await store.transact(commit(Upsert("orders||1", b"2"), guards=[guard]))
            assert await first_answer(store, commit(marks=[mark])) == answer
            assert await drain(store.log) == [record]

    async def test_positions_and_epochs_of_the_log_are_kept_over_a_reopen(self, make_store: StoreFactory) -> None:
        records = [new_record("orders||1", str(number)) for number in range(10)]
        async with make_store() as store:
            await store.transact(commit(records=records))
            batch = await read_some(store.log, await acquire_all(store.log), limit=4)
            await store.log.release(batch.leases)

        async with make_store() as store:
            leases = await acquire_all(store.log)
            rest = await read_all(store.log, leases)

        assert [entry.record for entry in (*batch.entries, *rest)] == records
        assert all(new.epoch > old.epoch for new, old in zip(by_slice(leases), by_slice(batch.leases), strict=True))

    async def test_what_is_aside_is_kept_over_a_reopen(self, make_store: StoreFactory) -> None:
        async with make_store() as store:
            await store.transact(commit(records=[new_record("orders||1", str(number)) for number in range(10)]))
            await store.transact(commit(records=[new_record("orders||2")]))
            failures = {"orders||1": Failure(3, HOUR, "refused"), "orders||2": Failure(10, None, "too large")}
            leases = await put_each_aside(store.log, failures)
            keys = await store.log.deferred(range(store.log.slices))
            aside = await read_aside(store.log, "orders||1")
            await store.log.trim()
            await store.log.release(leases)

        async with make_store() as store:
            assert await store.log.deferred(range(store.log.slices)) == keys
            assert await read_aside(store.log, "orders||1") == aside
            ids = [entry.id for entry in aside]
            assert await settle(store.log, await acquire_all(store.log), "orders||1", ids, None) is False

    async def test_a_log_that_was_read_and_trimmed_to_the_end_goes_on_after_a_reopen(
        self, make_store: StoreFactory
    ) -> None:
        for number in range(3):
            async with make_store() as store:
                record = new_record("orders||1", str(number))
                await store.transact(commit(records=[record]))

                assert await drain(store.log) == [record]
                await store.log.trim()

    async def test_closing_with_commits_in_flight_ends_every_one_of_them(self, make_store: StoreFactory) -> None:
        keys = [f"orders||{number}" for number in range(50)]
        async with make_store() as store:
            tasks = [asyncio.create_task(store.transact(commit(Upsert(key, b"1")))) for key in keys]
            await asyncio.sleep(0)

        async with asyncio.timeout(PATIENCE.total_seconds()):
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)

        assert all(isinstance(outcome, tuple | StoreUnavailable | OutcomeUnknown) for outcome in outcomes), outcomes
        async with make_store() as store:
            stored = values(await store.bulk_get(keys))
        for value, outcome in zip(stored, outcomes, strict=True):
            assert value is not None or not isinstance(outcome, tuple)
            assert value is None or not isinstance(outcome, StoreUnavailable)

    async def test_ten_stores_open_at_once(self, make_store: StoreFactory) -> None:
        everyone_is_open = asyncio.Barrier(10)

        async def open_and_write(number: int) -> None:
            async with make_store() as store:
                await everyone_is_open.wait()
                await put(store, f"orders||{number}", b"1")

        async with asyncio.timeout(2 * PATIENCE.total_seconds()), asyncio.TaskGroup() as group:
            for number in range(10):
                group.create_task(open_and_write(number))

        async with make_store() as store:
            assert values(await store.bulk_get([f"orders||{number}" for number in range(10)])) == [b"1"] * 10

    async def test_a_commit_is_seen_by_the_other_store_at_once(self, store: StateStore, other: StateStore) -> None:
        for value in (b"1", b"2", b"3"):
            await put(store, "orders||1", value)

            assert await other.get("orders||1") == await store.get("orders||1")

    async def test_one_of_two_first_writes_wins(self, store: StateStore, other: StateStore) -> None:
        wins = 0
        for number in range(50):
            first_write = commit(Upsert(f"orders||{number}", b"1", concurrency=Concurrency.FIRST_WRITE))

            outcomes = await asyncio.gather(is_applied(store, first_write), is_applied(other, first_write))

            wins += sum(outcomes)
        assert wins == 50

    async def test_one_of_two_writes_with_the_same_etag_wins(self, store: StateStore, other: StateStore) -> None:
        wins = 0
        etag = await put(store, "orders||1", b"0")
        for number in range(50):
            write = commit(Upsert("orders||1", b"%d" % number, etag=etag))

            outcomes = await asyncio.gather(is_applied(store, write), is_applied(other, write))

            wins += sum(outcomes)
            etag = await etag_of(store, "orders||1")
        assert wins == 50

    async def test_increments_of_two_stores_add_up(self, store: StateStore, other: StateStore) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(25):
                group.create_task(increment(store, "orders||counter"))
                group.create_task(increment(other, "orders||counter"))

        assert await value_of(other, "orders||counter") == b"50"

    async def test_a_mark_set_by_one_store_refuses_the_other(self, store: StateStore, other: StateStore) -> None:
        once = commit(Upsert("orders||1", b"1"), marks=[new_mark()])

        outcomes = await asyncio.gather(store.transact(once), other.transact(once), return_exceptions=True)

        (answer,) = (outcome for outcome in outcomes if isinstance(outcome, tuple))
        (duplicate,) = (outcome for outcome in outcomes if isinstance(outcome, Duplicate))
        assert duplicate.etags == answer

    async def test_a_claim_by_one_store_fences_the_other(self, store: StateStore, other: StateStore) -> None:
        first = await store.directory.claim("Cart", "leroy")
        second = await other.directory.claim("Cart", "leroy")

        with pytest.raises(Fenced):
            await store.transact(commit(Upsert("orders||1", b"first"), guards=[first]))
        await other.transact(commit(Upsert("orders||1", b"second"), guards=[second]))

        assert await value_of(store, "orders||1") == b"second"

    async def test_a_claim_fences_what_the_other_store_writes_meanwhile(
        self, store: StateStore, other: StateStore
    ) -> None:
        for _ in range(20):
            guard = await store.directory.claim("Cart", "leroy")
            writes = [
                asyncio.create_task(is_applied(store, commit(Upsert("orders||1", b"%d" % n), guards=[guard])))
                for n in range(10)
            ]

            await other.directory.claim("Cart", "leroy")

            read = await value_of(other, "orders||1")
            await asyncio.gather(*writes)
            assert await value_of(other, "orders||1") == read

    async def test_records_of_one_store_are_read_by_the_other(self, store: StateStore, other: StateStore) -> None:
        records = [new_record("orders||1", str(number)) for number in range(10)]
        for number, record in enumerate(records):
            await (other if number % 2 else store).transact(commit(records=[record]))

        assert await drain(other.log) == records
        assert await drain(store.log) == []

    async def test_a_slice_is_leased_to_one_of_two_stores(self, store: StateStore, other: StateStore) -> None:
        first, second = await asyncio.gather(
            store.log.acquire("first", store.log.slices, HOUR), other.log.acquire("second", other.log.slices, HOUR)
        )

        assert sorted(lease.slice for lease in first + second) == list(range(store.log.slices))
        assert await store.log.acquire("third", store.log.slices, HOUR) == []

    async def test_a_lease_taken_over_by_the_other_store_cannot_advance(
        self, store: StateStore, other: StateStore
    ) -> None:
        records = [new_record("orders||1", str(number)) for number in range(5)]
        await store.transact(commit(records=records))
        leases = await store.log.acquire("frozen", store.log.slices, self.short_ttl)
        frozen = await read_some(store.log, leases, limit=10)
        owned = await take_over(other.log, "owner")

        assert await store.log.advance(frozen.leases, HOUR) == []
        await store.log.release(frozen.leases)

        assert [entry.record for entry in await read_all(other.log, owned)] == records
        assert len(await other.log.advance(owned, HOUR)) == other.log.slices

    async def test_what_one_store_put_aside_the_other_replays_and_settles(
        self, store: StateStore, other: StateStore
    ) -> None:
        await store.transact(commit(records=[new_record("orders||1"), new_record("orders||1")]))
        leases = await put_each_aside(store.log, {"orders||1": Failure(10, None, "too large")})
        aside = await read_aside(store.log, "orders||1")

        replayed = await other.log.replay()

        (key,) = await store.log.deferred(range(store.log.slices))
        assert (replayed, key.is_due, key.pending) == (1, True, 2)
        await store.log.release(leases)
        owned = await acquire_all(other.log)
        ids = [entry.id for entry in await read_aside(other.log, "orders||1")]
        assert ids == [entry.id for entry in aside]
        assert await settle(store.log, leases, "orders||1", ids, None) is True
        assert await settle(other.log, owned, "orders||1", ids, None) is False
        assert await store.log.deferred(range(store.log.slices)) == []

    async def test_relays_of_both_stores_are_counted(self, store: StateStore, other: StateStore) -> None:
        counts = [await store.log.heartbeat("first", HOUR), await other.log.heartbeat("second", HOUR)]

        assert counts == [1, 2]
        assert await store.log.heartbeat("first", HOUR) == 2

    async def test_a_wait_ends_after_a_commit_of_the_other_store(self, store: StateStore, other: StateStore) -> None:
        follower = Follower(store.log, await acquire_all(store.log), timeout=HOUR)

        async with asyncio.timeout(PATIENCE.total_seconds()):
            for number in range(10):
                await asyncio.gather(
                    follower.follow(number + 1), other.transact(commit(records=[new_record("orders||1", str(number))]))
                )

        assert follower.ids == [str(number) for number in range(10)]

    async def test_a_reader_along_with_writers_of_two_stores_loses_nothing_and_keeps_the_order_of_every_key(
        self, store: StateStore, other: StateStore
    ) -> None:
        await assert_chains_are_read_in_order([store, other], store.log)


# What a condition is made of: the operation for a key and an etag.
CONDITIONED: dict[str, Callable[[str, str | None], Operation]] = {
    "upsert": lambda key, etag: Upsert(key, b"2", etag=_etag(etag)),
    "first-write upsert": lambda key, etag: Upsert(key, b"2", etag=_etag(etag), concurrency=Concurrency.FIRST_WRITE),
    "last-write upsert": lambda key, etag: Upsert(key, b"2", etag=_etag(etag), concurrency=Concurrency.LAST_WRITE),
    "delete": lambda key, etag: Delete(key, _etag(etag)),
    "check": lambda key, etag: Check(key, _etag(etag or None)),
}

BROKEN: dict[str, Callable[[str], Operation]] = {
    "stale upsert": lambda key: Upsert(key, b"after", etag=ETag("stale")),
    "first write": lambda key: Upsert(key, b"after", concurrency=Concurrency.FIRST_WRITE),
    "stale delete": lambda key: Delete(key, ETag("stale")),
    "stale check": lambda key: Check(key, ETag("stale")),
    "absent check": lambda key: Check(key, None),
}

LONE_SURROGATE = "orders||\ud83d"

FIRST_WRITE_OF_TAKEN = Upsert("orders||taken", b"2", concurrency=Concurrency.FIRST_WRITE)


def breaks_a_condition(kind: str, etag: str, *, is_live: bool) -> bool:
    """Tell the one rule on etags: one that is given must match; without one, who asks for absence must find it."""
    if etag in ("none", "empty"):
        return is_live and kind in ("first-write upsert", "check")
    return not (is_live and etag == "current")


def lookalikes(etag: ETag) -> list[str]:
    """Make etags that a number, a UUID or a careless comparison could take for this one, or choke on."""
    padded = [f" {etag}", f"{etag} ", f"0{etag}", f"+{etag}", f"{etag}.0", f"{etag}\x00", f"W/{etag}", f'"{etag}"']
    as_uuid = [etag.upper(), etag.replace("-", ""), f"{{{etag}}}", f"urn:uuid:{etag}", str(UUID(int=0))]
    as_number = ["0", "-1", "1.0", "1e0", "nan", "9" * 400, "٣"]
    others = [" ", "\x00", "'", "%", "null", "None", "é"]
    return [each for each in padded + as_uuid + as_number + others if each != etag]


def _etag(text: str | None) -> ETag | None:
    return None if text is None else ETag(text)


def commit(
    *operations: Operation,
    records: Sequence[OutboxRecord] = (),
    marks: Sequence[Mark] = (),
    guards: Sequence[Guard] = (),
) -> Commit:
    return Commit(operations, tuple(records), tuple(marks), tuple(guards))


def new_mark() -> Mark:
    return Mark(uuid4().bytes, HOUR)


async def put(store: StateStore, key: str, value: bytes) -> ETag:
    (etag,) = await store.transact(commit(Upsert(key, value)))
    assert etag is not None
    return etag


async def value_of(store: StateStore, key: str) -> bytes | None:
    item = await store.get(key)
    return None if item is None else item.value


async def etag_of(store: StateStore, key: str) -> ETag:
    item = await store.get(key)
    assert item is not None
    return item.etag


def values(items: Sequence[Item | None]) -> list[bytes | None]:
    return [None if item is None else item.value for item in items]


async def until_absent(store: StateStore, *keys: str) -> None:
    async def are_absent() -> bool:
        return not any([await store.get(key) for key in keys])

    await until(are_absent)


async def is_applied(store: StateStore, wanted: Commit) -> bool:
    try:
        await store.transact(wanted)
    except (ETagMismatch, Duplicate, Fenced):
        return False
    return True


async def first_answer(store: StateStore, repeated: Commit) -> tuple[str | None, ...] | None:
    """Commit what carries a mark that is set; tell what the commit that set it was answered."""
    with pytest.raises(Duplicate) as raised:
        await store.transact(repeated)
    return raised.value.etags


async def is_refused(store: StateStore, key: str, *operations: Operation) -> bool:
    """Commit the operations; tell whether an etag refused them, which must leave `key` as it is."""
    before = await store.get(key)
    try:
        await store.transact(commit(*operations))
    except ETagMismatch:
        assert await store.get(key) == before
        return True
    return False


async def increment(store: StateStore, key: str) -> None:
    while True:
        item = await store.get(key)
        # Let the others read the same value, also where reading does not wait for anything.
        await asyncio.sleep(0)
        value = b"%d" % (int(item.value if item else b"0") + 1)
        etag = item.etag if item else None
        if await is_applied(store, commit(Upsert(key, value, etag=etag, concurrency=Concurrency.FIRST_WRITE))):
            return


async def assert_refused_without_a_trace(
    store: StateStore,
    refusal: type[StatecastError],
    operations: Sequence[Operation],
    *,
    watched: Sequence[str],
    marks: Sequence[Mark] = (),
    guards: Sequence[Guard] = (),
    set_before: Mark | None = None,
) -> None:
    """Commit what must be refused; the watched keys, the log and the marks must be as they were."""
    before = await store.bulk_get(watched)

    with pytest.raises(refusal):
        await store.transact(
            commit(*operations, records=[new_record("orders||a"), new_record("orders||b")], marks=marks, guards=guards)
        )

    assert await store.bulk_get(watched) == before
    assert await drain(store.log) == []
    for mark in marks:
        assert await is_applied(store, commit(marks=[mark])) == (mark != set_before)


async def assert_unavailable(store: StateStore) -> None:
    with pytest.raises(StoreUnavailable):
        await store.get("orders||1")
    with pytest.raises(StoreUnavailable):
        await store.bulk_get(["orders||1"])
    with pytest.raises(StoreUnavailable):
        await store.transact(commit(Upsert("orders||1", b"1")))
    with pytest.raises(StoreUnavailable):
        await store.directory.claim("Cart", "leroy")
    with pytest.raises(StoreUnavailable):
        await store.log.status()
