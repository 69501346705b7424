"""Tasks that commit random deeds side by side, note each in a journal before and after, and are cancelled at times."""

import asyncio
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import IO

from statecast import (
    Concurrency,
    Duplicate,
    ETagMismatch,
    Item,
    OutcomeUnknown,
    StateClient,
    StoreUnavailable,
    Transaction,
)
from tests.crash.deeds import Deed, Ending, note_key

TASKS = 8
_NOBODYS_ETAG = "4711"


@dataclass(frozen=True, slots=True)
class Attempt:
    """A deed with the values that it was decided on: committing it again is the same commit again."""

    deed: Deed
    found: Mapping[str, Item | None]

    async def commit(self, store: StateClient) -> Ending:
        """Commit under the deed's own mark, which tells whether an earlier try was applied."""
        try:
            async with store.transaction(idempotency_key=self.deed.token) as transaction:
                for account in self.deed.reads:
                    await transaction.get(account)
                self._fill(transaction)
        except Duplicate:
            return Ending.APPLIED
        except (ETagMismatch, StoreUnavailable):
            return Ending.REFUSED
        except OutcomeUnknown:
            return Ending.UNTOLD
        return Ending.APPLIED

    def _fill(self, transaction: Transaction) -> None:
        deed = self.deed
        for account in deed.accounts:
            self._write_account(transaction, account, is_stale=deed.is_stale and account == deed.accounts[-1])
        if deed.has_note:
            transaction.upsert(note_key(deed.token), {"note": deed.token})
        if deed.removes is not None:
            transaction.delete(note_key(deed.removes))
        if deed.announces:
            transaction.publish({"announced": deed.token}, type="Announced", key=deed.accounts[0])

    def _write_account(self, transaction: Transaction, account: str, *, is_stale: bool) -> None:
        item = self.found[account]
        value = {"account": account, "history": [*(item.json()["history"] if item else ()), self.deed.token]}
        if is_stale:
            transaction.upsert(account, value, etag=_NOBODYS_ETAG)
        elif item is None:
            transaction.upsert(account, value, concurrency=Concurrency.FIRST_WRITE)
        else:
            transaction.upsert(account, value, etag=item.etag)


async def write(store: StateClient, journal: IO[str], name: str, random: Random, deeds: int) -> None:
    """Commit so many deeds, from several tasks; `name` is told from those of all other writers."""
    tokens = iter([f"{name}-{number}" for number in range(1, deeds + 1)])
    async with asyncio.TaskGroup() as group:
        for _ in range(TASKS):
            group.create_task(_write_on(store, journal, tokens, Random(random.random())))


async def _write_on(store: StateClient, journal: IO[str], tokens: Iterator[str], random: Random) -> None:
    notes: list[str] = []
    for token in tokens:
        deed = Deed.draw(random, token, notes)
        _note(journal, deed.line())
        if deed.removes is not None:
            notes.remove(deed.removes)
        attempt = Attempt(deed, {account: await store.get(account) for account in deed.accounts})
        ending = await _commit(store, attempt, random)
        _note(journal, {"token": token, "ending": ending.value})
        if deed.has_note and ending is Ending.APPLIED:
            notes.append(token)


async def _commit(store: StateClient, attempt: Attempt, random: Random) -> Ending:
    """Commit, in one of three cases with a caller who loses patience, and who may ask again."""
    if random.random() < 0.67:
        return await attempt.commit(store)
    ending = await _commit_impatiently(store, attempt, random.uniform(0, 0.008))
    return await attempt.commit(store) if ending is Ending.UNTOLD and random.random() < 0.5 else ending


async def _commit_impatiently(store: StateClient, attempt: Attempt, seconds: float) -> Ending:
    committing = asyncio.create_task(attempt.commit(store))
    try:
        await asyncio.wait({committing}, timeout=seconds)
    finally:
        committing.cancel()
    await asyncio.wait({committing})
    return Ending.UNTOLD if committing.cancelled() else committing.result()


def _note(journal: IO[str], line: Mapping[str, object]) -> None:
    journal.write(json.dumps(line) + "\n")
    journal.flush()
