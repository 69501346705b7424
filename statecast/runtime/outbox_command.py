"""`statecast outbox status|parked|replay`: how far the relaying is, what the broker refuses, and trying that again."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from statecast.components.state.log import DeferredKey, SliceStatus
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
    """Show how far the relaying is: pending events, the oldest one's age, and each slice's owner and position."""

    async def ask() -> list[SliceStatus]:
        async with _opened(resources_path, app_id) as runtime:
            return await runtime.outbox_status(name)

    slices = asyncio.run(ask())
    now = datetime.now(UTC)
    _show(status_document(slices, now) if as_json else status_table(slices, now))


@outbox.command()
@_store_options
@click.option("--all", "with_retried", is_flag=True, help="Show also the keys that are still tried by themselves.")
def parked(resources_path: Path, app_id: str, name: str, as_json: bool, with_retried: bool) -> None:
    """Show the keys whose events the broker refused so often that they wait for `replay`, and why."""

    async def ask() -> list[DeferredKey]:
        async with _opened(resources_path, app_id) as runtime:
            return await runtime.outbox_deferred(name)

    keys = [key for key in asyncio.run(ask()) if key.is_parked or with_retried]
    now = datetime.now(UTC)
    _show(deferred_document(keys, now) if as_json else deferred_table(keys, now))


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


def status_document(slices: Sequence[SliceStatus], now: datetime) -> dict[str, object]:
    """Describe an outbox in plain values; ages are seconds, None where nothing is pending."""
    return {
        "pending": sum(each.pending for each in slices),
        "oldestAge": max((age for each in slices if (age := _age(each.oldest_at, now)) is not None), default=None),
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


def status_table(slices: Sequence[SliceStatus], now: datetime) -> Table:
    pending = sum(each.pending for each in slices)
    ages = [age for each in slices if (age := _age(each.oldest_at, now)) is not None]
    oldest = f", the oldest for {max(ages):.1f} s" if ages else ""
    table = Table("slice", "owner", "epoch", "pending", "oldest", "position", title=f"{pending:,} pending{oldest}")
    for each in slices:
        age = _age(each.oldest_at, now)
        shown_age = "" if age is None else f"{age:.1f} s"
        table.add_row(
            str(each.slice), each.owner or "nobody", str(each.epoch), f"{each.pending:,}", shown_age, each.position
        )
    return table


def deferred_document(keys: Sequence[DeferredKey], now: datetime) -> dict[str, object]:
    """Describe keys that are put aside in plain values; ages are seconds."""
    return {
        "parked": sum(each.is_parked for each in keys),
        "pending": sum(each.pending for each in keys),
        "keys": [
            {
                "key": each.order_key,
                "slice": each.slice,
                "isParked": each.is_parked,
                "pending": each.pending,
                "attempts": each.attempts,
                "oldestAge": _age(each.oldest_at, now),
                "reason": each.reason,
            }
            for each in keys
        ],
    }


def deferred_table(keys: Sequence[DeferredKey], now: datetime) -> Table:
    parked = sum(each.is_parked for each in keys)
    retried = f", {len(keys) - parked:,} tried again" if len(keys) > parked else ""
    title = f"{parked:,} {_keys(parked)} parked{retried}"
    table = Table("key", "waits for", "events", "attempts", "oldest", "reason", title=title)
    for each in keys:
        # Keys and reasons come from elsewhere: as text, so that their brackets are no markup.
        table.add_row(
            Text(each.order_key),
            "replay" if each.is_parked else "a retry",
            f"{each.pending:,}",
            str(each.attempts),
            f"{_age(each.oldest_at, now):.1f} s",
            Text(each.reason),
        )
    return table


def _keys(count: int) -> str:
    return "key" if count == 1 else "keys"


def _age(moment: datetime | None, now: datetime) -> float | None:
    return None if moment is None else max((now - moment).total_seconds(), 0.0)
