"""Which commits may go together, and what is sent of them: pure decisions, on any commits."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import islice
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statecast.components.state.commit import (
    Check,
    Commit,
    Concurrency,
    Delete,
    ETag,
    Guard,
    Mark,
    Operation,
    OutboxRecord,
    Upsert,
)
from statecast.components.state.postgresql.call import (
    Applied,
    CommitCall,
    PreparedCommit,
    Refused,
    change_rows,
    collapsed_rows,
)
from statecast.components.state.postgresql.queue import CommitQueue, Limits
from statecast.errors import Duplicate, ETagMismatch, InvalidRequest


@dataclass(eq=False)
class Waiting:
    number: int
    footprint: Sequence[str]
    weight: int
    is_withdrawn: bool = field(default=False)
    ahead: int = 0


footprints = st.lists(st.sampled_from("abcdefg"), unique=True, max_size=4)
limits = st.builds(Limits, st.integers(1, 5), st.integers(1, 8), st.integers(1, 20))


@st.composite
def waiting_commits(draw: st.DrawFn) -> list[Waiting]:
    parts = draw(st.lists(st.tuples(footprints, st.integers(0, 9), st.booleans()), max_size=30))
    return [Waiting(number, *part) for number, part in enumerate(parts)]


@given(waiting_commits(), limits, st.integers(0, 99))
def test_what_goes_together_has_nothing_in_common_is_bounded_and_keeps_the_order_of_every_key(
    commits: list[Waiting], limits: Limits, seed: int
) -> None:
    chance = Random(seed)
    queue: CommitQueue[Waiting] = CommitQueue()
    coming, running, gone = iter(commits), list[Waiting](), list[Waiting]()
    while len(gone) < sum(not each.is_withdrawn for each in commits):
        for each in islice(coming, chance.randrange(6)):
            queue.join(each)
        batch = queue.next_batch(limits)
        running += batch
        gone += batch

        members = [member for each in running for member in each.footprint]
        assert len(members) == len(set(members))
        assert len(batch) <= limits.commits
        assert len(batch) <= 1 or sum(each.weight for each in batch) <= limits.weight
        assert len(batch) <= 1 or sum(len(each.footprint) for each in batch) <= limits.members
        chance.shuffle(running)
        for each in running[: chance.randrange(3)]:
            running.remove(each)
            queue.leave(each)

    order: defaultdict[str, list[int]] = defaultdict(list)
    for each in gone:
        assert not each.is_withdrawn
        for member in each.footprint:
            order[member].append(each.number)
    assert all(numbers == sorted(numbers) for numbers in order.values())


def test_commits_behind_one_that_is_held_up_do_not_hold_up_others() -> None:
    queue: CommitQueue[Waiting] = CommitQueue()
    for number in range(5_000):
        queue.join(Waiting(number, ["held"], 0))
    queue.join(Waiting(5_000, ["free"], 0))

    batch = queue.next_batch(Limits(64, 1_000, 1_000))

    assert [each.number for each in batch] == [0, 5_000]


def test_what_is_too_large_for_any_batch_goes_by_itself() -> None:
    queue: CommitQueue[Waiting] = CommitQueue()
    for number, (weight, key) in enumerate([(1, "a"), (99, "b"), (1, "c")]):
        queue.join(Waiting(number, [key], weight))

    batches = [queue.next_batch(Limits(64, 1_000, 10)) for _ in range(3)]

    assert [[each.number for each in batch] for batch in batches] == [[0], [1], [2]]


@given(limits, st.integers(0, 1_000), st.integers(1, 10))
def test_every_call_has_a_part_of_what_is_waiting(limits: Limits, commits: int, calls: int) -> None:
    share = limits.share(commits, calls)

    assert 1 <= share.commits <= limits.commits
    assert share.commits * calls >= min(commits, limits.commits * calls)
    assert (share.commits - 1) * calls < max(1, commits)


# The rows of a commit

etags = st.none() | st.sampled_from([ETag(""), ETag("1"), ETag("nul\0")])
keys = st.sampled_from(["a", "é", "鍵", "🔑", "z"])
operations: st.SearchStrategy[Operation] = st.one_of(
    st.builds(
        Upsert,
        keys,
        st.binary(max_size=3),
        etag=etags,
        concurrency=st.none() | st.sampled_from(Concurrency),
        ttl=st.none() | st.timedeltas(timedelta(0), timedelta.max),
    ),
    st.builds(Delete, keys, etag=etags),
    st.builds(Check, keys, etag=etags.map(lambda etag: etag or None)),
)


@given(st.lists(operations, unique_by=lambda operation: operation.key))
def test_the_short_way_to_a_commits_rows_leads_where_the_long_way_does(chosen: list[Operation]) -> None:
    short, short_etags = change_rows(chosen)
    long, long_etags = collapsed_rows(chosen)

    assert [row[:5] for row in short] == [row[:5] for row in long]
    assert [row[1] for row in short] == sorted(row[1] for row in short)
    assert [etag and len(etag) == 36 for etag in short_etags] == [etag and len(etag) == 36 for etag in long_etags]
    answered = dict(zip((operation.key for operation in chosen), short_etags, strict=True))
    assert all(answered[row[1]] == row[5] for row in short if row[0] == "u")


def test_two_conditions_that_cannot_both_hold_are_refused_before_anything_is_sent() -> None:
    contradiction = (Check("a", ETag("1")), Upsert("a", b"", etag=ETag("2")))

    with pytest.raises(ETagMismatch):
        PreparedCommit(Commit(contradiction), 16)


@pytest.mark.parametrize(
    "record", [OutboxRecord("\ud800", "1", "p", "t", b""), OutboxRecord("k", "1", "p", "t", b"", {"a": "\ud800"})]
)
def test_a_record_that_cannot_be_written_is_refused_before_it_has_neighbours(record: OutboxRecord) -> None:
    with pytest.raises(InvalidRequest):
        PreparedCommit(Commit((), (record,)), 16)


def test_an_actor_named_by_two_guards_is_touched_once() -> None:
    guards = (Guard("Cart", "1", "one"), Guard("Cart", "1", "other"))

    assert PreparedCommit(Commit((), guards=guards), 16).footprint == [("Cart", "1")]


def test_a_refusal_is_told_of_the_part_that_the_function_names() -> None:
    mark = Mark(b"m" * 16, timedelta(hours=1))
    call = CommitCall(
        [
            PreparedCommit(Commit((Upsert("b", b""), Check("a", None))), 16),
            PreparedCommit(Commit((Upsert("d", b"", etag=ETag("7\0")), Delete("c"))), 16),
            PreparedCommit(Commit((), marks=(mark,)), 16),
            PreparedCommit(Commit((), marks=(Mark(b"n" * 16, timedelta(hours=1)),)), 16),
            PreparedCommit(Commit((Delete("e"),)), 16),
        ]
    )

    outcomes = call.outcomes(["etag 1", "etag 4", 'duplicate 1 ["x y", null]', "duplicate 2", None])

    errors = [outcome.error for outcome in outcomes if isinstance(outcome, Refused)]
    mismatches = [error for error in errors if isinstance(error, ETagMismatch)]
    assert [(error.key, error.expected) for error in mismatches] == [("a", None), ("d", "7\0")]
    duplicates = [error for error in errors if isinstance(error, Duplicate)]
    assert [(error.digest, error.etags) for error in duplicates] == [(b"m" * 16, ("x y", None)), (b"n" * 16, None)]
    assert outcomes[-1] == Applied((None,))
