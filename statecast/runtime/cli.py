"""The command line: `statecast demo`, `statecast migrate`, `statecast outbox`, `statecast servers`."""

import sys
from collections.abc import Iterator
from typing import IO

import click
from rich.console import Console

from statecast.errors import StatecastError
from statecast.runtime.demo import DemoBroker, DemoStore, run_demo, sample_path
from statecast.runtime.migrate_command import migrate
from statecast.runtime.outbox_command import outbox
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

    The exit code is 0; 1 when something was lost or out of order, or --crash killed nothing; 3 when malformed lines
    were left out.
    """
    with source or sample_path().open(encoding="utf-8") as lines:
        context.exit(run_demo(DemoStore(store), DemoBroker(broker), lines, rate=rate, crash=crash, console=Console()))


command_line.add_command(migrate)
command_line.add_command(outbox)
command_line.add_command(servers)


def main() -> None:
    """Run the command line; an error on purpose is one line on standard error and exit code 1.

    Of a group, which is what a task group raises, each error that says something else is a line.
    """
    try:
        command_line()
    except* StatecastError as group:
        for message in dict.fromkeys(_messages(group)):
            click.echo(f"statecast: {message}", err=True)
    sys.exit(1)  # click has exited by itself where there was no error


def _messages(error: Exception) -> Iterator[str]:
    if not isinstance(error, ExceptionGroup):
        yield str(error)
        return
    for each in error.exceptions:
        yield from _messages(each)


if __name__ == "__main__":
    main()
