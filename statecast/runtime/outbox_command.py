"""`statecast outbox status|parked|replay`: how far the relaying is, what the broker refuses, and trying that again."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar, overload

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from statecast.components.state.log import QueueStatus, SliceStatus
from statecast.runtime.app import Runtime, RuntimeOptions

_Command = TypeVar("_Command", bound=Callable[..., None])


@click.group()
def outbox() -> None:
    """Look after the outbox of a state store."""


def _store_options(command: _Command) -> _Command:
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text."),
        click.option("--store", "name", required=True, help="The state component's name."),
        click.option("--app-id", required=True, help="The app whose outbox it is."),
        click.option(
            "--resources-path", type=click.Path(exists=True, path_type=Path), required=True, help="Component YAML."
        ),
    ):
        command = option(command)
    return command


@outbox.command()
@_store_options
def status(resources_path: Path, app_id: str, name: str, as_json: bool) -> None:
    """Show how far the relaying is: pending events, the oldest one's age, and each slice's owner and position.

    Events that a broker refused, or that are for a topic which takes nothing, wait aside and are counted by themselves.
    """

    async def ask() -> tuple[list[SliceStatus], list[QueueStatus]]:
        async with _opened(resources_path, app_id) as runtime:
            return await runtime.outbox_status(name), await runtime.outbox_deferred(name)

    slices, aside = asyncio.run(ask())
    now = datetime.now(UTC)
    _show(status_document(slices, aside, now) if as_json else status_table(slices, aside, now))


@outbox.command()
@_store_options
@click.option("--all", "with_retried", is_flag=True, help="Show also the keys that are still tried by themselves.")
def parked(resources_path: Path, app_id: str, name: str, as_json: bool, with_retried: bool) -> None:
    """Show the keys whose events the broker refused so often that they wait for `replay`, and why."""

    async def ask() -> list[QueueStatus]:
        async with _opened(resources_path, app_id) as runtime:
            return await runtime.outbox_deferred(name)

    queues = [each for each in asyncio.run(ask()) if each.is_parked or with_retried]
    now = datetime.now(UTC)
    _show(deferred_document(queues, now) if as_json else deferred_table(queues, now))


@outbox.command()
@_store_options
@click.option("--key", help="Only this key, as `parked` shows it.")
def replay(resources_path: Path, app_id: str, name: str, as_json: bool, key: str | None) -> None:
    """Let the relays try parked keys again, from the first event of each, in order.

    It publishes nothing itself: the processes that relay this outbox do, at once.
    """

    async def replay() -> int:
        async with _opened(resources_path, app_id) as runtime:
            return await runtime.outbox_replay(name, key)

    replayed = asyncio.run(replay())
    _show({"replayed": replayed} if as_json else f"{replayed:,} parked {_keys(replayed)} to be tried again")


@asynccontextmanager
async def _opened(resources_path: Path, app_id: str) -> AsyncIterator[Runtime]:
    async with Runtime.open(resources_path, app_id=app_id, options=RuntimeOptions(relays=False)) as runtime:
        yield runtime


def _show(shown: dict[str, object] | Table | str) -> None:
    match shown:
        case dict():
            click.echo(json.dumps(shown, indent=2))
        case Table():
            Console().print(shown)
        case str():
            click.echo(shown)


def status_document(slices: Sequence[SliceStatus], aside: Sequence[QueueStatus], now: datetime) -> dict[str, object]:
    """Describe an outbox in plain values; ages are seconds, None where nothing is pending."""
    return {
        "pending": sum(each.pending for each in slices),
        "oldestAge": max((age for each in slices if (age := _age(each.oldest_at, now)) is not None), default=None),
        "aside": {
            "pending": sum(each.pending for each in aside),
            "oldestAge": max((_age(each.oldest_at, now) for each in aside), default=None),
            "parked": sum(each.is_parked for each in aside),
        },
        "slices": [
            {
                "slice": each.slice,
                "owner": each.owner,
                "epoch": each.epoch,
                "position": each.position,
                "pending": each.pending,
                "oldestAge": _age(each.oldest_at, now),
            }
            for each in slices
        ],
    }


def status_table(slices: Sequence[SliceStatus], aside: Sequence[QueueStatus], now: datetime) -> Table:
    title = _told("pending", slices, now) + (
        f"; {_told('aside', aside, now)}: see outbox parked --all" if aside else ""
    )
    table = Table("slice", "owner", "epoch", "pending", "oldest", "position", title=title)
    for each in slices:
        age = _age(each.oldest_at, now)
        shown_age = "" if age is None else f"{age:.1f} s"
        table.add_row(
            str(each.slice), each.owner or "nobody", str(each.epoch), f"{each.pending:,}", shown_age, each.position
        )
    return table


def _told(what: str, statuses: Sequence[SliceStatus] | Sequence[QueueStatus], now: datetime) -> str:
    ages = [age for each in statuses if (age := _age(each.oldest_at, now)) is not None]
    oldest = f", the oldest for {max(ages):.1f} s" if ages else ""
    return f"{sum(each.pending for each in statuses):,} {what}{oldest}"


def deferred_document(queues: Sequence[QueueStatus], now: datetime) -> dict[str, object]:
    """Describe keys that are put aside, by topic, in plain values; ages are seconds."""
    return {
        "parked": sum(each.is_parked for each in queues),
        "pending": sum(each.pending for each in queues),
        "keys": [
            {
                "key": each.queue.order_key,
                "pubsub": each.queue.pubsub,
                "topic": each.queue.topic,
                "slice": each.queue.slice,
                "isParked": each.is_parked,
                "pending": each.pending,
                "attempts": each.attempts,
                "oldestAge": _age(each.oldest_at, now),
                "reason": each.reason,
            }
            for each in queues
        ],
    }


def deferred_table(queues: Sequence[QueueStatus], now: datetime) -> Table:
    parked = sum(each.is_parked for each in queues)
    retried = f", {len(queues) - parked:,} tried again" if len(queues) > parked else ""
    title = f"{parked:,} {_keys(parked)} parked{retried}"
    table = Table("key", "topic", "waits for", "events", "attempts", "oldest", "reason", title=title)
    for each in queues:
        # Keys and reasons come from elsewhere: as text, so that their brackets are no markup.
        table.add_row(
            Text(each.queue.order_key),
            Text(f"{each.queue.topic} of {each.queue.pubsub}"),
            "replay" if each.is_parked else "a retry",
            f"{each.pending:,}",
            str(each.attempts),
            f"{_age(each.oldest_at, now):.1f} s",
            Text(each.reason),
        )
    return table


def _keys(count: int) -> str:
    return "key" if count == 1 else "keys"


@overload
def _age(moment: datetime, now: datetime) -> float: ...
@overload
def _age(moment: datetime | None, now: datetime) -> float | None: ...
def _age(moment: datetime | None, now: datetime) -> float | None:
    return None if moment is None else max((now - moment).total_seconds(), 0.0)
