"""Commits on through every failure: repeats what it does not know the outcome of until it knows it.

python steady_writer.py FOLDER APP_ID NAME SEED JOURNAL
"""

import asyncio
import json
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import IO, Any, Protocol

from statecast import (
    Check,
    Concurrency,
    Duplicate,
    ETag,
    ETagMismatch,
    Item,
    OutcomeUnknown,
    Runtime,
    RuntimeOptions,
    StateClient,
    StoreUnavailable,
    upsert,
)
from tests.crash.arena import STORE
from tests.crash.ledger import Ledger, next_value
from tests.crash.parting import parting

KEYS = tuple(f"order-{number}" for number in range(30))
TASKS = 3
_PAUSE_SECONDS = 0.05

Value = dict[str, Any]


class Notes(Protocol):
    def begin(self, token: str, values: Sequence[Value]) -> None:
        """Note what is going to be committed."""
        ...

    def end(self, token: str, values: Sequence[Value], *, is_applied: bool) -> None:
        """Note what became of it."""
        ...


@dataclass(slots=True)
class LedgerNotes:
    """Notes of a writer that nobody kills."""

    ledger: Ledger

    def begin(self, token: str, values: Sequence[Value]) -> None:
        pass

    def end(self, token: str, values: Sequence[Value], *, is_applied: bool) -> None:
        if is_applied:
            self.ledger.note(values)


@dataclass(slots=True)
class FileNotes:
    file: IO[str]

    def begin(self, token: str, values: Sequence[Value]) -> None:
        self._write({"token": token, "values": values})

    def end(self, token: str, values: Sequence[Value], *, is_applied: bool) -> None:
        self._write({"token": token, "is_applied": is_applied})

    def _write(self, line: Mapping[str, object]) -> None:
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()


@dataclass(slots=True)
class Journal:
    """What is noted in files: values by token, and whether they were applied, where that was noted."""

    values: dict[str, list[Value]] = field(default_factory=dict)
    is_applied: dict[str, bool] = field(default_factory=dict)

    def read(self, files: Iterable[Path]) -> None:
        for file in files:
            # The line that a killed writer was writing has no end.
            for line in (json.loads(text) for text in file.read_text().splitlines(keepends=True) if text[-1] == "\n"):
                if "values" in line:
                    self.values[line["token"]] = line["values"]
                else:
                    self.is_applied[line["token"]] = line["is_applied"]

    @property
    def untold(self) -> list[str]:
        return [token for token in self.values if token not in self.is_applied]

    def ledger(self) -> Ledger:
        """Bring what was applied together. Raises AssertionError where an update was lost."""
        ledger = Ledger()
        for token, values in self.values.items():
            if self.is_applied[token]:
                ledger.note(values)
        return ledger


async def write(store: StateClient, notes: Notes, name: str, random: Random, stop: asyncio.Event) -> None:
    """Write on in some keys at a time, each over the value that was read; `name` is told from those of all others."""
    attempt = 0
    while not stop.is_set():
        attempt += 1
        token = f"{name}-{attempt}"
        try:
            items = await store.bulk_get(keys := random.sample(KEYS, random.choice((1, 1, 2, 3))))
        except StoreUnavailable:
            await asyncio.sleep(_PAUSE_SECONDS)
            continue
        found = dict(zip(keys, items, strict=True))
        values = [next_value(key, item.json() if item else None, token) for key, item in found.items()]
        notes.begin(token, values)
        notes.end(token, values, is_applied=await commit(store, found, values, token))
        await asyncio.sleep(random.uniform(0, 0.01))


async def commit(store: StateClient, found: Mapping[str, Item | None], values: Sequence[Value], token: str) -> bool:
    """Commit the values over what was found, and again until the outcome is known; tell whether they are applied."""
    operations = [
        upsert(value["key"], value, etag=item.etag)
        if (item := found[value["key"]])
        else upsert(value["key"], value, concurrency=Concurrency.FIRST_WRITE)
        for value in values
    ]
    may_be_applied = False
    while True:
        try:
            await store.transact(operations, idempotency_key=token)
        except Duplicate:
            assert may_be_applied, f"{token} was said not to be applied, and was"
        except ETagMismatch:
            return False
        except StoreUnavailable:
            await asyncio.sleep(_PAUSE_SECONDS)
            continue
        except OutcomeUnknown:
            may_be_applied = True
            await asyncio.sleep(_PAUSE_SECONDS)
            continue
        return True


async def was_applied(store: StateClient, token: str) -> bool:
    """Tell whether the commit with this mark was applied, by one that would be refused for anything else."""
    try:
        await store.transact([Check("nothing", ETag("1"))], idempotency_key=token)
    except Duplicate:
        return True
    except ETagMismatch:
        return False
    raise AssertionError("there is no such key")


async def run(folder: Path, app_id: str, name: str, seed: str, file: IO[str]) -> None:
    async with Runtime.open(folder, app_id=app_id, options=RuntimeOptions(relays=False)) as runtime:
        print("ready", flush=True)
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for number in range(TASKS):
                random = Random(f"{seed} {number}")
                group.create_task(write(runtime.state(STORE), FileNotes(file), f"{name}-{number}", random, stop))
            await parting()
            stop.set()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(process)d %(levelname)s %(name)s %(message)s")
    with open(sys.argv[5], "x") as journal:
        asyncio.run(run(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4], journal))
