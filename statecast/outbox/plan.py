"""From the operations of a transaction to its commit: which events tell of it, and what is not persisted. Pure."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import msgspec

from statecast.components.manifest import Component
from statecast.components.metadata import MetadataReader, is_truthy
from statecast.components.state.commit import Commit, Delete, Mark, Operation, OutboxRecord, Upsert
from statecast.errors import InvalidRequest
from statecast.outbox.event import EventSource, content_type_in, render
from statecast.pubsub.cloudevent import DEFAULT_TYPE, Data

PROJECTION = "outbox.projection"
TOPIC = "outbox.topic"
DELETED_SUFFIX = ".deleted"

DEFAULT_MAX_ATTEMPTS = 10


@dataclass(frozen=True, slots=True)
class Outbox:
    """Where the events of one store go, and whether deletes have events too.

    An event that its broker refuses is tried `max_attempts` times; a copy of it goes to `dead_letter_topic` then.
    """

    pubsub: str
    topic: str
    publishes_deletes: bool = False
    max_attempts: int = DEFAULT_MAX_ATTEMPTS
    dead_letter_topic: str | None = None


class Announcement(msgspec.Struct, frozen=True):
    """An event that a transaction publishes beside those of its upserts; `key` is a full state key or None."""

    data: Data
    type: str = DEFAULT_TYPE
    key: str | None = None
    topic: str | None = None
    metadata: tuple[tuple[str, str], ...] = ()


def parse_outbox(component: Component) -> Outbox | None:
    """Read a state component's outbox fields. Raises ComponentError where one of the two required ones is missing.

    `outboxPubsub` and `outboxDiscardWhenMissingState` steer an intermediate topic that does not exist here; they
    are accepted and have nothing to do.
    """
    fields = MetadataReader(component, runtime_fields=())
    pubsub, topic = fields.text("outboxPublishPubsub"), fields.text("outboxPublishTopic")
    if not pubsub and not topic:
        return None
    if not pubsub:
        raise fields.error("outboxPublishPubsub", "is required beside outboxPublishTopic")
    if not topic:
        raise fields.error("outboxPublishTopic", "is required beside outboxPublishPubsub")
    return Outbox(
        pubsub,
        topic,
        publishes_deletes=fields.boolean("outboxPublishDeletes"),
        max_attempts=fields.integer("outboxMaxAttempts", default=DEFAULT_MAX_ATTEMPTS, minimum=1),
        dead_letter_topic=fields.text("outboxDeadLetterTopic"),
    )


def plan_commit(
    operations: Sequence[Operation],
    outbox: Outbox | None,
    source: EventSource,
    logical_key: Callable[[str], str],
    *,
    announcements: Iterable[Announcement] = (),
    marks: tuple[Mark, ...] = (),
) -> Commit:
    """Make the commit of these operations (keys are full keys): one event per upsert, in operation order.

    A projection is not persisted; the first one of a key replaces the data of the key's events. Raises
    InvalidRequest for a projection without an upsert of its key, and for anything that needs an outbox where there
    is none: nothing is to be written then.
    """
    persisted, projections = _without_projections(operations)
    announcements = tuple(announcements)
    if outbox is None:
        if projections or announcements:
            raise InvalidRequest(
                "this state store has no outbox to publish through: "
                "set outboxPublishPubsub and outboxPublishTopic on its component"
            )
        return Commit(persisted, marks=marks)
    if projections:
        _require_upserts(projections, persisted, logical_key)
    records = [
        _render(operation, projections, outbox, source, logical_key(operation.key))
        for operation in persisted
        if isinstance(operation, Upsert) or (outbox.publishes_deletes and isinstance(operation, Delete))
    ]
    records += [_announce(announcement, outbox, source, logical_key) for announcement in announcements]
    return Commit(persisted, tuple(records), marks)


def data_of(upsert: Upsert) -> Data:
    """Tell what an upsert's value is: the content type its metadata names, and whether it is JSON."""
    return Data(upsert.value, content_type_in(upsert.metadata), not upsert.is_binary)


def _without_projections(operations: Sequence[Operation]) -> tuple[tuple[Operation, ...], dict[str, Upsert]]:
    """Take the projections out; of those of one key the first counts."""
    persisted: list[Operation] = []
    projections: dict[str, Upsert] = {}
    for operation in operations:
        if isinstance(operation, Upsert) and _is_projection(operation):
            projections.setdefault(operation.key, operation)
        else:
            persisted.append(operation)
    return tuple(persisted), projections


def _is_projection(upsert: Upsert) -> bool:
    return PROJECTION in upsert.metadata and is_truthy(upsert.metadata[PROJECTION])


def _require_upserts(
    projections: dict[str, Upsert], persisted: Sequence[Operation], logical_key: Callable[[str], str]
) -> None:
    upserted = {operation.key for operation in persisted if isinstance(operation, Upsert)}
    for key in projections:
        if key not in upserted:
            raise InvalidRequest(f"the projection of {logical_key(key)!r} has no upsert of that key beside it")


def _render(
    operation: Upsert | Delete, projections: dict[str, Upsert], outbox: Outbox, source: EventSource, key: str
) -> OutboxRecord:
    is_upsert = isinstance(operation, Upsert)
    return render(
        data_of(projections.get(operation.key, operation)) if isinstance(operation, Upsert) else None,
        operation.metadata,
        source,
        pubsub=outbox.pubsub,
        topic=operation.metadata.get(TOPIC) or outbox.topic,
        order_key=operation.key,
        key=key,
        type=DEFAULT_TYPE if is_upsert else DEFAULT_TYPE + DELETED_SUFFIX,
        subject="" if is_upsert else key,
    )


def _announce(
    announcement: Announcement, outbox: Outbox, source: EventSource, logical_key: Callable[[str], str]
) -> OutboxRecord:
    metadata = dict(announcement.metadata)
    # Without a key no order is promised; an id of its own spreads such events over the slices.
    return render(
        announcement.data,
        metadata,
        source,
        pubsub=outbox.pubsub,
        topic=announcement.topic or metadata.get(TOPIC) or outbox.topic,
        order_key=source.ids.next() if announcement.key is None else announcement.key,
        key=None if announcement.key is None else logical_key(announcement.key),
        type=announcement.type,
    )
