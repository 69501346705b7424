from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statecast.components.broker.broker import Outcome, Published, Refused, Unreachable
from statecast.components.state.commit import OutboxRecord
from statecast.components.state.log import Batch, Deferral, DeferredQueue, Failure, Lease, LogEntry
from statecast.outbox.progress import MOST_ASIDE_BYTES, BackOff, Progress, Refusal, fair_share, message_of

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)
AWAY = Unreachable("no connection")
REFUSED = Refused("too large")
NO_TOPIC = Refused("unknown topic", is_about_topic=True)
FAILURE = Failure(1, timedelta(seconds=1), "too large")


def lease(number: int, position: int = 0) -> Lease:
    return Lease(number, "relay", 1, str(position))


def entry(number: int, name: str, *, topic: str = "orders", key: str = "") -> LogEntry:
    return LogEntry(number, name, OutboxRecord(key or f"key-{number}", name, "bus", topic, b"{}"), NOON)


def names(entries: list[LogEntry]) -> list[str]:
    return [each.record.event_id for each in entries]


def with_two_slices() -> Progress:
    progress = Progress()
    progress.add([lease(0), lease(1)])
    entries = (entry(0, "a1"), entry(1, "b1"), entry(0, "a2"), entry(1, "b2"))
    progress.take(Batch(entries, (lease(0, 10), lease(1, 10))))
    return progress


def test_a_slice_that_is_published_is_settled_behind_the_batch() -> None:
    progress = with_two_slices()
    due = progress.due(0.0)

    refusals = progress.settle(due, [Published()] * 4, now=0.0)

    assert names(due) == ["a1", "a2", "b1", "b2"]
    assert refusals == []
    assert progress.settled() == progress.readable() == [lease(0, 10), lease(1, 10)]


def settle(progress: Progress, outcomes: list[Outcome], now: float = 0.0) -> list[Refusal]:
    due = progress.due(now)
    progress.note_topics(due, outcomes, now)
    return progress.settle(due, outcomes, now)


def test_a_slice_whose_broker_is_away_keeps_its_position_and_only_what_is_left() -> None:
    progress = with_two_slices()

    settle(progress, [AWAY, Published(), Published(), Published()])

    assert names(progress.slices[0].waiting) == ["a1"]
    assert progress.settled() == [lease(0, 0), lease(1, 10)]
    assert progress.readable() == [lease(1, 10)]


def test_a_slice_whose_broker_is_away_is_due_again_only_after_its_pause() -> None:
    progress = with_two_slices()
    settle(progress, [AWAY, AWAY, Published(), Published()], now=5.0)

    assert progress.next_retry() == pytest.approx(5.1)
    assert progress.due(5.05) == []
    assert names(progress.due(5.2)) == ["a1", "a2"]


def test_a_refused_entry_goes_aside_with_all_that_waits_of_its_key() -> None:
    progress = Progress()
    progress.add([lease(0)])
    one, other, late = entry(0, "a1", key="a"), entry(0, "b1", key="b"), entry(0, "a2", key="a")
    progress.take(Batch((one, other, late), (lease(0, 9),)))

    (refusal,) = settle(progress, [REFUSED, Published(), Unreachable("held back")])
    progress.slices[0].defer(refusal.entry, FAILURE)

    assert progress.deferrals() == [Deferral((one, late), FAILURE)]
    assert progress.settled() == progress.readable() == [lease(0, 9)]
    assert progress.slices[0].retry_at == 0.0


def test_what_is_read_of_a_key_that_is_aside_goes_aside() -> None:
    progress = Progress()
    progress.add([lease(0)], [DeferredQueue(0, "a", "bus", "orders")])
    late, other = entry(0, "a2", key="a"), entry(0, "b1", key="b")

    progress.take(Batch((late, other), (lease(0, 9),)))

    assert progress.deferrals() == [Deferral((late,), None)]
    assert progress.due(0.0) == [other]


NO_ATTEMPT = Failure(0, timedelta(0), "unknown topic")


def test_what_waits_for_a_topic_that_takes_nothing_goes_aside_and_so_does_what_follows() -> None:
    progress = Progress()
    progress.add([lease(0), lease(1)])
    gone = [entry(0, "a1", topic="gone"), entry(1, "c1", topic="gone"), entry(0, "a2", topic="gone")]
    progress.take(Batch((gone[0], entry(0, "b1"), gone[1]), (lease(0, 5), lease(1, 5))))

    settle(progress, [NO_TOPIC, Published(), AWAY])
    progress.take(Batch((gone[2], entry(0, "b2")), (lease(0, 6),)))

    assert progress.deferrals() == [
        Deferral((gone[0],), NO_ATTEMPT),
        Deferral((gone[2],), None),
        Deferral((gone[1],), NO_ATTEMPT),
    ]
    assert names(progress.due(0.0)) == ["b2"]
    assert progress.settled() == [lease(0, 5), lease(1, 5)]


def test_no_position_passes_what_was_read_together_with_an_entry_that_goes_aside() -> None:
    progress = Progress()
    progress.add([lease(0)], [DeferredQueue(0, "a", "bus", "orders")])

    progress.take(Batch((entry(0, "a1", key="a"), entry(0, "b1", key="b")), (lease(0, 9),)))

    assert progress.settled() == [lease(0, 0)]


def test_a_topic_that_takes_nothing_is_tried_ever_more_rarely_and_open_once_it_takes_something() -> None:
    progress = Progress(BackOff(timedelta(seconds=1), timedelta(seconds=60)))
    event = entry(0, "a1")

    told = [progress.note_topics([event], [NO_TOPIC], now=now) for now in (0.0, 1.0, 3.0)]
    closed = [progress.closed(now) for now in (3.0, 6.9, 7.0)]
    progress.note_topics([event], [Published()], now=7.0)

    assert told == [[("bus", "orders")], [], []]
    assert closed == [[("bus", "orders")], [("bus", "orders")], []]
    assert progress.blocked == {}


def test_what_is_to_be_put_aside_waits_for_its_turn_unless_it_is_much() -> None:
    progress = Progress()
    progress.add([lease(0)], [DeferredQueue(0, "key-0", "bus", "orders")])
    half = OutboxRecord("key-0", "half", "bus", "orders", b"x" * (MOST_ASIDE_BYTES // 2))

    told = []
    for number in range(2):
        progress.take(Batch((LogEntry(0, str(number), half, NOON),), (lease(0, number),)))
        told.append(progress.has_much_aside())

    assert told == [False, True]


def test_an_empty_read_moves_the_settled_position_too() -> None:
    progress = Progress()
    progress.add([lease(0)])

    progress.take(Batch((), (lease(0, 7),)))

    assert progress.settled() == [lease(0, 7)]


def test_what_is_another_relays_is_dropped() -> None:
    progress = with_two_slices()

    lost = progress.keep([lease(1)])

    assert lost == [0]
    assert names(progress.due(0.0)) == ["b1", "b2"]


def test_idle_slices_are_given_up_first() -> None:
    progress = with_two_slices()
    progress.add([lease(2)])

    assert progress.surplus(2) == [lease(2)]
    assert progress.surplus(3) == []


@given(st.integers(1, 64), st.integers(1, 20))
def test_fair_shares_cover_all_slices_and_none_is_too_large(slices: int, relays: int) -> None:
    share = fair_share(slices, relays)

    assert share * relays >= slices
    assert (share - 1) * relays < slices


@given(st.integers(1, 10_000))
def test_pauses_grow_and_stay_within_the_longest(failures: int) -> None:
    back_off = BackOff(timedelta(milliseconds=100), timedelta(seconds=5))

    assert back_off.pause(failures) <= back_off.pause(failures + 1) <= timedelta(seconds=5)


def test_the_partition_key_is_the_messages_key_and_no_header() -> None:
    record = OutboxRecord("shop||o1", "e", "bus", "orders", b"{}", {"partitionKey": "o1", "other": "x"})

    message = message_of(record)

    assert (message.key, message.metadata) == ("o1", {"other": "x"})


@given(st.data())
def test_every_entry_is_published_once_in_order_and_no_position_is_settled_before_it(data: st.DataObject) -> None:
    progress = Progress(BackOff(timedelta(0), timedelta(0)))
    progress.add([lease(0), lease(1), lease(2)])
    published: dict[int, list[int]] = {0: [], 1: [], 2: []}
    read = dict.fromkeys(published, 0)

    for _ in range(data.draw(st.integers(1, 10))):
        entries: list[LogEntry] = []
        moved: list[Lease] = []
        for each in progress.readable():
            count = data.draw(st.integers(0, 4))
            entries += [entry(each.slice, str(read[each.slice] + step + 1)) for step in range(count)]
            read[each.slice] += count
            moved.append(lease(each.slice, read[each.slice]))
        progress.take(Batch(tuple(entries), tuple(moved)))
        due = progress.due(0.0)
        outcomes = _outcomes_in_order(due, data)
        for each_entry, outcome in zip(due, outcomes, strict=True):
            if isinstance(outcome, Published):
                published[each_entry.slice].append(int(each_entry.record.event_id))
        progress.settle(due, outcomes, now=0.0)

        for settled in progress.settled():
            assert int(settled.position) <= len(published[settled.slice])

    assert all(numbers == list(range(1, len(numbers) + 1)) for numbers in published.values())


def _outcomes_in_order(due: list[LogEntry], data: st.DataObject) -> list[Outcome]:
    """Choose outcomes as a broker may give them: nothing of a key is published behind a failure of it."""
    failed: set[str] = set()
    outcomes: list[Outcome] = []
    for each in due:
        if each.record.order_key in failed or data.draw(st.booleans()):
            failed.add(each.record.order_key)
            outcomes.append(AWAY)
        else:
            outcomes.append(Published())
    return outcomes
