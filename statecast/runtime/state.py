"""A state store as the application uses it: logical keys, any JSON value, transactions with their events."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from msgspec.structs import replace

from statecast.clock import Clock
from statecast.components.state.commit import (
    Check,
    Commit,
    Concurrency,
    Consistency,
    ETag,
    Item,
    Mark,
    Operation,
    Upsert,
)
from statecast.components.state.keys import KeyPrefix
from statecast.components.state.store import StateStore
from statecast.components.state.value import delete, encode, resolve_ttl, upsert, with_content_type
from statecast.errors import CorruptState, Duplicate, ETagMismatch, InvalidRequest
from statecast.outbox.event import EventIds, EventSource, content_type_in
from statecast.outbox.plan import Announcement, Outbox, plan_commit
from statecast.pubsub.cloudevent import DEFAULT_TYPE, Data, TraceContext

OperationT = TypeVar("OperationT", bound=Operation)

IDEMPOTENCY_TTL = timedelta(days=7)


@dataclass(frozen=True, slots=True)
class StateSettings:
    """What the runtime knows of a store beside the store itself."""

    name: str
    app_id: str
    keys: KeyPrefix
    outbox: Outbox | None
    default_ttl: timedelta | None


class Transaction:
    """Collects operations and events; nothing is sent before its block ends.

    After the block `etags` has the new etag of every key that was upserted.
    """

    def __init__(self, client: "StateClient") -> None:
        self.etags: dict[str, ETag] = {}
        self._client = client
        self._operations: list[Operation] = []
        self._announcements: list[Announcement] = []
        self._reads: dict[str, Item | None] = {}

    async def get(self, key: str) -> Item | None:
        """Read a value that the commit depends on: if it has changed by then, the commit raises ETagMismatch.

        A key is read once; what this transaction has written itself is not seen here.
        """
        if key not in self._reads:
            item = await self._client.get(key)
            self._reads[key] = item
            self._operations.append(Check(key, None if item is None else item.etag))
        return self._reads[key]

    def upsert(
        self,
        key: str,
        value: Any,
        *,
        etag: str | None = None,
        concurrency: Concurrency | None = None,
        ttl: timedelta | None = None,
        content_type: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Write a value, and publish its event where the store has an outbox.

        `metadata` may override the event's attributes (`{"cloudevent.type": "OrderPlaced"}`), choose its topic
        (`outbox.topic`) or its Kafka key (`partitionKey`), make it a bare payload (`rawPayload`), or make this
        upsert a projection (`outbox.projection`): the event's data instead of a value.
        """
        self._operations.append(
            upsert(
                key,
                value,
                etag=etag,
                concurrency=concurrency,
                ttl=ttl,
                content_type=content_type,
                metadata=metadata,
            )
        )

    def delete(self, key: str, *, etag: str | None = None, metadata: Mapping[str, str] | None = None) -> None:
        """Remove a key; there is an event of it only where `outboxPublishDeletes` is set."""
        self._operations.append(delete(key, etag=etag, metadata=metadata))

    def publish(
        self,
        data: Any,
        *,
        type: str = DEFAULT_TYPE,
        key: str | None = None,
        topic: str | None = None,
        content_type: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Publish an event of its own in the same commit, to the outbox's topic unless `topic` says another.

        Events of one `key` are delivered in commit order if the key is also written in the same transaction;
        without a key no order is promised. Raises InvalidRequest for data that is neither bytes nor JSON.
        """
        body, is_binary = encode(data)
        metadata = with_content_type(metadata, content_type)
        data_to_send = Data(body, content_type_in(metadata), not is_binary)
        self._announcements.append(Announcement(data_to_send, type, key, topic, tuple(metadata.items())))

    async def _commit(self, marks: tuple[Mark, ...], trace: TraceContext) -> None:
        etags = await self._client._apply(self._operations, self._announcements, marks, trace)
        applied = zip(self._operations, etags, strict=True)
        self.etags = {operation.key: etag for operation, etag in applied if isinstance(operation, Upsert) and etag}


class StateClient:
    """One state store. Made by `Runtime.state`; usable as long as its runtime is open.

    Every call may raise StoreUnavailable (nothing was written: try again later), InvalidRequest and CorruptState;
    a writing one also ETagMismatch and OutcomeUnknown.
    """

    def __init__(self, store: StateStore, settings: StateSettings, *, ids: EventIds, clock: Clock) -> None:
        self._store = store
        self._settings = settings
        self._ids = ids
        self._clock = clock

    @property
    def name(self) -> str:
        return self._settings.name

    async def get(self, key: str) -> Item | None:
        """Read a value; None where there is none, or it has expired."""
        with self._logical_errors():
            item = await self._store.get(self._full(key))
        return None if item is None else replace(item, key=key)

    async def bulk_get(self, keys: Sequence[str]) -> list[Item | None]:
        """Read several values at once: one answer per key, in the order asked for."""
        with self._logical_errors():
            items = await self._store.bulk_get([self._full(key) for key in keys])
        return [None if item is None else replace(item, key=key) for key, item in zip(keys, items, strict=True)]

    async def set(
        self,
        key: str,
        value: Any,
        *,
        etag: str | None = None,
        concurrency: Concurrency | None = None,
        consistency: Consistency | None = None,
        ttl: timedelta | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> ETag:
        """Write one value and return its new etag. Publishes nothing: only transactions have events."""
        operation = upsert(
            key, value, etag=etag, concurrency=concurrency, consistency=consistency, ttl=ttl, metadata=metadata
        )
        return await self._write(self._resolved(operation))

    async def bulk_set(self, operations: Iterable[Upsert]) -> list[ETag]:
        """Write several values (made by `statecast.upsert`), each by itself, and return their new etags.

        When some fail the others stay written, and an ExceptionGroup has the errors of those that failed.
        """
        resolved = [self._resolved(operation) for operation in operations]
        results = await asyncio.gather(*map(self._write, resolved), return_exceptions=True)
        errors = [result for result in results if isinstance(result, Exception)]
        if errors:
            raise ExceptionGroup(f"{len(errors)} of {len(results)} values were not written", errors)
        return [result for result in results if not isinstance(result, BaseException)]

    async def delete(self, key: str, *, etag: str | None = None) -> None:
        """Remove a key; that it is absent is no error, unless an etag is given. Publishes nothing."""
        with self._logical_errors():
            await self._store.transact(Commit((self._resolved(delete(key, etag=etag)),)))

    @asynccontextmanager
    async def transaction(
        self, *, idempotency_key: str | None = None, trace: TraceContext | None = None
    ) -> AsyncIterator[Transaction]:
        """Collect operations; commit them all at the end of the block, or none if it raises.

        With an `idempotency_key` the commit happens at most once in 7 days, however often it is repeated: a
        repeat raises Duplicate, which is how to learn what became of a commit whose outcome is unknown.
        """
        transaction = Transaction(self)
        yield transaction
        await transaction._commit(self._marks(idempotency_key), trace or TraceContext())

    async def transact(
        self,
        operations: Iterable[Operation],
        *,
        idempotency_key: str | None = None,
        trace: TraceContext | None = None,
    ) -> tuple[ETag | None, ...]:
        """Apply operations made by `statecast.upsert`, `statecast.delete` and `Check`, all or none of them.

        Returns the etag that each operation's key has afterwards, None where it is absent then.
        """
        return await self._apply(list(operations), (), self._marks(idempotency_key), trace or TraceContext())

    async def _apply(
        self,
        operations: Sequence[Operation],
        announcements: Sequence[Announcement],
        marks: tuple[Mark, ...],
        trace: TraceContext,
    ) -> tuple[ETag | None, ...]:
        resolved = [self._resolved(operation) for operation in operations]
        keyed = [
            announcement if announcement.key is None else replace(announcement, key=self._full(announcement.key))
            for announcement in announcements
        ]
        source = EventSource(self._settings.app_id, self._clock.now(), trace, self._ids)
        commit = plan_commit(
            resolved,
            self._settings.outbox,
            source,
            self._settings.keys.logical_key,
            announcements=keyed,
            marks=marks,
        )
        try:
            with self._logical_errors():
                etags = await self._store.transact(commit)
        except Duplicate as error:
            if error.etags is None or len(error.etags) != len(commit.operations):
                raise
            raise Duplicate(error.digest, _with_projections(resolved, commit.operations, error.etags)) from None
        return _with_projections(resolved, commit.operations, etags)

    async def _write(self, resolved: Upsert) -> ETag:
        with self._logical_errors():
            (etag,) = await self._store.transact(Commit((resolved,)))
        assert etag is not None, "an upsert leaves an etag"
        return etag

    def _resolved(self, operation: OperationT) -> OperationT:
        key = self._full(operation.key)
        if isinstance(operation, Upsert):
            ttl = resolve_ttl(operation.ttl, operation.metadata, self._settings.default_ttl)
            return replace(operation, key=key, ttl=ttl)
        return replace(operation, key=key)

    def _full(self, key: str) -> str:
        return self._settings.keys.full_key(key)

    def _marks(self, idempotency_key: str | None) -> tuple[Mark, ...]:
        if idempotency_key is None:
            return ()
        if not idempotency_key:
            raise InvalidRequest("an idempotency key cannot be empty")
        text = "\0".join(("idempotency", self._settings.app_id, self._settings.name, idempotency_key))
        return (Mark(hashlib.sha256(text.encode()).digest()[:16], IDEMPOTENCY_TTL),)

    @contextmanager
    def _logical_errors(self) -> Iterator[None]:
        """Let errors speak of the keys that the caller knows."""
        try:
            yield
        except ETagMismatch as error:
            raise ETagMismatch(self._settings.keys.logical_key(error.key), error.expected) from None
        except CorruptState as error:
            raise CorruptState(self._settings.keys.logical_key(error.key), error.reason) from None


def _with_projections(
    asked: Sequence[Operation], persisted: Sequence[Operation], etags: Sequence[str | None]
) -> tuple[ETag | None, ...]:
    """Answer for all operations that were asked for, of which projections were not persisted, by their keys."""
    after = {
        operation.key: None if etag is None else ETag(etag) for operation, etag in zip(persisted, etags, strict=True)
    }
    return tuple(after.get(operation.key) for operation in asked)
