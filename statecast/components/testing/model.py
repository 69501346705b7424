"""A state store as a dict, and random commits that are applied to both and compared."""

from dataclasses import dataclass, field
from datetime import timedelta
from hashlib import blake2b
from itertools import count
from random import Random

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
from statecast.components.state.store import StateStore
from statecast.errors import Duplicate, ETagMismatch, Fenced, StatecastError

HOUR = timedelta(hours=1)


@dataclass
class Model:
    """What a store must hold. It says the rules once more, in its own way, and shares no code with the backends."""

    rows: dict[str, tuple[bytes, ETag]] = field(default_factory=dict)
    marks: dict[bytes, tuple[ETag | None, ...]] = field(default_factory=dict)
    """By digest, what the commit that set the mark was answered."""

    claims: dict[tuple[str, str], Guard] = field(default_factory=dict)
    records: list[OutboxRecord] = field(default_factory=list)

    def refusals(self, commit: Commit) -> set[type[StatecastError]]:
        """Tell the errors that a store may refuse the commit with: none, if it must be applied."""
        refusals: set[type[StatecastError]] = set()
        if any(mark.digest in self.marks for mark in commit.marks):
            refusals = {Duplicate}
        elif any(self.claims.get((guard.type, guard.id)) != guard for guard in commit.guards):
            refusals = {Fenced}
        elif not all(_holds(self._etag(operation.key), operation) for operation in commit.operations):
            refusals = {ETagMismatch}
        # What can hold in no state may be refused without a look at the state.
        return refusals if not refusals or _can_hold(commit) else refusals | {ETagMismatch}

    def _etag(self, key: str) -> ETag | None:
        return self.rows.get(key, (b"", None))[1]

    def apply(self, commit: Commit, etags: tuple[ETag | None, ...]) -> None:
        for operation, etag in zip(commit.operations, etags, strict=True):
            match operation:
                case Upsert(key=key, value=value):
                    # The etag is None where a later operation of this commit deletes the key.
                    self.rows[key] = (value, etag or ETag(""))
                case Delete(key=key):
                    self.rows.pop(key, None)
        self.marks.update({mark.digest: etags for mark in commit.marks})
        self.records.extend(commit.records)

    def etags_after(self, commit: Commit) -> tuple[ETag | None, ...]:
        """Tell the answer that a commit just applied must have had."""
        return tuple(self._etag(operation.key) for operation in commit.operations)


def _holds(current: ETag | None, operation: Operation) -> bool:
    if operation.etag:
        return current == operation.etag
    asks_for_absence = isinstance(operation, Check) or (
        isinstance(operation, Upsert) and operation.concurrency is Concurrency.FIRST_WRITE
    )
    return current is None or not asks_for_absence


def _can_hold(commit: Commit) -> bool:
    """Tell whether there is any state in which all conditions of the commit hold."""
    etags = {operation.etag or None for operation in commit.operations} | {None}
    keys = {operation.key for operation in commit.operations}
    return all(
        any(all(_holds(etag, each) for each in commit.operations if each.key == key) for etag in etags) for key in keys
    )


class Lane:
    """Random commits one after the other on keys, marks and actors that no other lane touches."""

    def __init__(self, store: StateStore, prefix: str, chance: Random) -> None:
        self.model = Model()
        self._store = store
        self._prefix = prefix
        self._chance = chance
        self._keys = [f"{prefix}||{name}" for name in ("a", "B", "c", "d", "é")]
        self._old_etags = [ETag("never"), ETag("0"), ETag("00000000-0000-0000-0000-000000000000")]
        self._old_guards: list[Guard] = []
        self._numbers = count()

    async def run(self, transactions: int, *, compare_every: int) -> None:
        for number in range(transactions):
            if self._chance.random() < 0.1:
                await self._claim()
            commit = self._random_commit()
            refusals = self.model.refusals(commit)
            if refusals:
                await self._expect(refusals, commit)
            else:
                await self._apply(commit)
            if refusals or number % compare_every == 0:
                await self._compare(commit)
        await self._compare(None)

    def compare_records(self, logged: list[OutboxRecord]) -> None:
        """Compare what the log holds of this lane with the model, per order key in commit order."""
        for key in self._keys:
            expected = [record for record in self.model.records if record.order_key == key]
            assert [record for record in logged if record.order_key == key] == expected

    async def _apply(self, commit: Commit) -> None:
        etags = await self._store.transact(commit)
        self._old_etags.extend(etag for _, etag in self.model.rows.values())
        self._old_etags = self._old_etags[-20:]
        self.model.apply(commit, etags)
        assert etags == self.model.etags_after(commit), commit

    async def _expect(self, refusals: set[type[StatecastError]], commit: Commit) -> None:
        expected = " or ".join(refusal.__name__ for refusal in refusals)
        refusal: StatecastError | None = None
        try:
            await self._store.transact(commit)
        except (Duplicate, Fenced, ETagMismatch) as error:
            refusal = error
        assert type(refusal) in refusals, f"{refusal!r} instead of {expected} for {commit}"
        if isinstance(refusal, Duplicate):
            assert refusal.etags == self.model.marks[refusal.digest], commit

    async def _compare(self, commit: Commit | None) -> None:
        stored = {item.key: (item.value, item.etag) for item in await self._store.bulk_get(self._keys) if item}
        assert stored == self.model.rows, f"after {commit}"

    async def _claim(self) -> None:
        id = f"{self._prefix}-{self._chance.choice('xy')}"
        guard = await self._store.directory.claim("Cart", id)
        self._old_guards.extend(each for each in self.model.claims.values() if each.id == id)
        self.model.claims["Cart", id] = guard

    def _random_commit(self) -> Commit:
        chance = self._chance
        keys = chance.choices(self._keys, k=chance.choice((1, 1, 2, 3, 5)))
        records = chance.choices(keys, k=chance.choice((0, 1, 1, 3)))
        return Commit(
            tuple(self._random_operation(key) for key in keys),
            tuple(self._random_record(key) for key in records),
            tuple(self._random_marks()),
            tuple(self._random_guards()),
        )

    def _random_operation(self, key: str) -> Operation:
        etag = self._random_etag(key)
        match self._chance.choice(("upsert", "upsert", "upsert", "first", "delete", "check")):
            case "upsert":
                return Upsert(key, self._random_value(), etag=etag, is_binary=True)
            case "first":
                return Upsert(key, self._random_value(), etag=etag, concurrency=Concurrency.FIRST_WRITE, is_binary=True)
            case "delete":
                return Delete(key, etag)
            case _:
                return Check(key, etag or None)

    def _random_etag(self, key: str) -> ETag | None:
        """Mostly none or the right one, so that commits of several operations are applied often enough."""
        kind = self._chance.choices(("none", "empty", "current", "old"), weights=(50, 5, 40, 5))[0]
        match kind:
            case "none":
                return None
            case "empty":
                return ETag("")
            case "current":
                return self.model.rows.get(key, (b"", None))[1]
            case _:
                return self._chance.choice(self._old_etags)

    def _random_value(self) -> bytes:
        return b"%d \xff" % next(self._numbers)

    def _random_record(self, key: str) -> OutboxRecord:
        return OutboxRecord(key, f"{self._prefix}-{next(self._numbers)}", "pubsub", "orders", self._random_value())

    def _random_marks(self) -> list[Mark]:
        if self._chance.random() < 0.7:
            return []
        if self.model.marks and self._chance.random() < 0.2:
            return [self._new_mark(), Mark(self._chance.choice(sorted(self.model.marks)), HOUR)]
        return [self._new_mark()]

    def _new_mark(self) -> Mark:
        return Mark(blake2b(f"{self._prefix}-{next(self._numbers)}".encode(), digest_size=16).digest(), HOUR)

    def _random_guards(self) -> list[Guard]:
        if not self.model.claims or self._chance.random() < 0.7:
            return []
        if self._old_guards and self._chance.random() < 0.2:
            return [self._chance.choice(self._old_guards)]
        return [self._chance.choice(list(self.model.claims.values()))]
