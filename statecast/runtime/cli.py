"""The command line: `statecast demo`, `statecast outbox status`, `statecast servers`."""

import asyncio
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

import click
from rich.console import Console
from rich.table import Table

from statecast.components.state.log import SliceStatus
from statecast.errors import StatecastError
from statecast.runtime.app import Runtime, RuntimeOptions
from statecast.runtime.demo import DemoBroker, DemoStore, run_demo, sample_path
from statecast.runtime.servers import ServerFailed, ServerMissing
from statecast.runtime.servers_command import servers


@click.group()
@click.version_option(package_name="statecast")
def command_line() -> None:
    """State and the news of it, committed together."""


@command_line.command()
@click.option("--store", type=click.Choice([str(each) for each in DemoStore]), default="sqlite", show_default=True)
@click.option("--broker", type=click.Choice([str(each) for each in DemoBroker]), default="in-memory", show_default=True)
@click.option(
    "--input",
    "source",
    type=click.File("r", encoding="utf-8", errors="surrogateescape"),
    help="Orders as JSON lines; - reads them from standard input. Default: a sample of 1,000 changes of 250 orders.",
)
@click.option(
    "--rate",
    type=click.FloatRange(0),
    default=250,
    show_default=True,
    help="Commits per second; 0: as fast as it goes.",
)
@click.option("--crash", is_flag=True, help="Let the first process kill itself halfway, and a second one go on.")
@click.pass_context
def demo(context: click.Context, store: str, broker: str, source: IO[str] | None, rate: float, crash: bool) -> None:
    """Commit orders and their events in one transaction each, and watch the events arrive.

    Servers that are needed are started unless STATECAST_TEST_POSTGRESQL_URL, STATECAST_TEST_REDIS_URL or
    STATECAST_TEST_KAFKA_BOOTSTRAP name some.

    The exit code is 0; 1 when something was lost or out of order; 3 when malformed lines were left out.
    """
    with source or sample_path().open(encoding="utf-8") as lines:
        context.exit(run_demo(DemoStore(store), DemoBroker(broker), lines, rate=rate, crash=crash, console=Console()))


@command_line.group()
def outbox() -> None:
    """Look after the outbox of a state store."""


@outbox.command()
@click.option("--resources-path", type=click.Path(exists=True, path_type=Path), required=True, help="Component YAML.")
@click.option("--app-id", required=True, help="The app whose outbox it is.")
@click.option("--store", "name", required=True, help="The state component's name.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def status(resources_path: Path, app_id: str, name: str, as_json: bool) -> None:
    """Show how far the relaying is: pending events, the oldest one's age, and each slice's owner and position."""
    slices = asyncio.run(_status(resources_path, app_id, name))
    if as_json:
        click.echo(json.dumps(status_document(slices, datetime.now(UTC)), indent=2))
    else:
        Console().print(status_table(slices, datetime.now(UTC)))


async def _status(resources_path: Path, app_id: str, name: str) -> list[SliceStatus]:
    async with Runtime.open(resources_path, app_id=app_id, options=RuntimeOptions(relays=False)) as runtime:
        return await runtime.outbox_status(name)


def status_document(slices: list[SliceStatus], now: datetime) -> dict[str, object]:
    """Describe an outbox in plain values; ages are seconds, None where nothing is pending."""
    return {
        "pending": sum(each.pending for each in slices),
        "oldestAge": max((age for each in slices if (age := _age(each, now)) is not None), default=None),
        "slices": [
            {
                "slice": each.slice,
                "owner": each.owner,
                "epoch": each.epoch,
                "position": each.position,
                "pending": each.pending,
                "oldestAge": _age(each, now),
            }
            for each in slices
        ],
    }


def status_table(slices: list[SliceStatus], now: datetime) -> Table:
    pending = sum(each.pending for each in slices)
    ages = [age for each in slices if (age := _age(each, now)) is not None]
    oldest = f", the oldest for {max(ages):.1f} s" if ages else ""
    table = Table("slice", "owner", "epoch", "pending", "oldest", "position", title=f"{pending:,} pending{oldest}")
    for each in slices:
        age = _age(each, now)
        shown_age = "" if age is None else f"{age:.1f} s"
        table.add_row(
            str(each.slice), each.owner or "nobody", str(each.epoch), f"{each.pending:,}", shown_age, each.position
        )
    return table


def _age(each: SliceStatus, now: datetime) -> float | None:
    return None if each.oldest_at is None else max((now - each.oldest_at).total_seconds(), 0.0)


command_line.add_command(servers)


def main() -> None:
    """Run the command line; an error on purpose is one line on standard error and exit code 1."""
    try:
        command_line()
    except (StatecastError, ServerMissing, ServerFailed) as error:
        click.echo(f"statecast: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
