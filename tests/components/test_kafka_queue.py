from collections.abc import Mapping

from hypothesis import given
from hypothesis import strategies as some

from statecast.components.broker.broker import Message
from statecast.components.broker.kafka.queue import PartitionQueue
from statecast.components.broker.kafka.records import Record, encode

KEYS = some.sampled_from(["a", "b", "c", None])


def send_all(
    queue: PartitionQueue, poison: set[int], limit_bytes: int, limit_count: int
) -> tuple[list[int], list[int], list[int]]:
    """Play the server: it refuses a batch with poison in it. Tell what was stored, refused, and held back."""
    stored: list[int] = []
    refused: list[int] = []
    held_back: list[int] = []
    while queue:
        batch = queue.take(limit_bytes, limit_count=limit_count)
        if not any(record.index in poison for record in batch):
            stored += [record.index for record in batch]
        elif len(batch) > 1:
            queue.split(batch)
        else:
            refused.append(batch[0].index)
            held_back += [record.index for record in queue.drop_keys([batch[0].key])]
    return stored, refused, held_back


def expected(records: list[Record], poison: set[int]) -> tuple[list[int], set[int], set[int]]:
    broken: set[str] = set()
    stored, refused, held_back = [], set(), set()
    for record in records:
        if record.key in broken:
            held_back.add(record.index)
        elif record.index not in poison:
            stored.append(record.index)
        else:
            refused.add(record.index)
            if record.key is not None:
                broken.add(record.key)
    return stored, refused, held_back


@given(
    keys=some.lists(KEYS, max_size=60),
    poison=some.sets(some.integers(0, 59)),
    limit_bytes=some.integers(1, 2_000),
    limit_count=some.integers(1, 60),
)
def test_the_culprits_are_found_and_nothing_else_is_refused_or_overtaken(
    keys: list[str | None], poison: set[int], limit_bytes: int, limit_count: int
) -> None:
    records = [encode(index, Message("t", b"body", key)) for index, key in enumerate(keys)]

    stored, refused, held_back = send_all(PartitionQueue("t", 0, records), poison, limit_bytes, limit_count)

    assert (stored, set(refused), set(held_back)) == expected(records, poison)


def test_a_lone_culprit_in_a_batch_costs_few_refusals() -> None:
    records = [encode(index, Message("t", b"body", f"key-{index}")) for index in range(1024)]
    queue = PartitionQueue("t", 0, records)
    batches = 0

    while queue:
        batch = queue.take(1_000_000, limit_count=1024)
        batches += 1
        if len(batch) > 1 and any(record.index == 700 for record in batch):
            queue.split(batch)

    assert batches <= 2 * 10 + 1


def test_metadata_that_says_where_a_record_goes_is_no_header() -> None:
    metadata: Mapping[str, str] = {"partitionKey": "k", "__key": "k", "__offset": "1", "tenant": "north"}

    record = encode(0, Message("t", b"1", None, metadata))

    assert record.key == "k"
    assert record.headers == [("tenant", b"north")]


def test_the_json_text_null_is_a_tombstone() -> None:
    assert encode(0, Message("t", b"null", "a")).value is None


@given(count=some.integers(1, 60), limit=some.integers(1, 60))
def test_a_batch_has_no_more_records_than_it_may(count: int, limit: int) -> None:
    queue = PartitionQueue("t", 0, [encode(index, Message("t", b"body")) for index in range(count)])

    assert len(queue.take(1_000_000, limit_count=limit)) == min(count, limit)
