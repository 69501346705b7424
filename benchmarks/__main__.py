"""`make bench`: every measurement beside its yardstick. `python -m benchmarks relay latency` runs those named."""

import importlib
import sys
import traceback
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import cast

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.loop import run
from benchmarks.ratio import Ratio

BENCHMARKS = (
    "postgresql_transact",
    "redis_transact",
    "sqlite_transact",
    "kafka_publish",
    "events",
    "relay",
    "relay_beside_writers",
    "latency",
    "broker_away",
    "space",
)


@dataclass(frozen=True, slots=True)
class Failure:
    """A benchmark that came to no measurement."""

    name: str
    error: Exception


async def measure_all(names: Sequence[str]) -> list[Ratio | Failure]:
    """Measure one after the other; one that fails, whose traceback goes to standard error, does not lose the others."""
    measured: list[Ratio | Failure] = []
    for name in names:
        print(f"measuring {name} ...", file=sys.stderr)
        try:
            measured += await measure(name)
        except Exception as error:
            traceback.print_exception(error)
            measured.append(Failure(name, error))
    return measured


async def measure(name: str) -> list[Ratio]:
    module = importlib.import_module(f"benchmarks.{name}")
    return await cast(Callable[[], Awaitable[list[Ratio]]], module.measure)()


def table_of(measured: Sequence[Ratio | Failure]) -> Table:
    table = Table("what", "ours", "yardstick", "", "ratio", "aim")
    for each in measured:
        table.add_row(*(cells_of(each) if isinstance(each, Ratio) else cells_of_failure(each)))
    return table


def cells_of(ratio: Ratio) -> tuple[str, ...]:
    style = "green" if ratio.is_met else "red"
    return (
        ratio.name,
        f"{ratio.ours:,.4g} {ratio.unit}" if ratio.ours < 1_000 else f"{ratio.ours:,.0f} {ratio.unit}",
        f"{ratio.yardstick:,.4g}" if ratio.yardstick < 1_000 else f"{ratio.yardstick:,.0f}",
        ratio.yardstick_name,
        f"[{style}]{ratio.value:.2f}[/{style}]",
        f"{ratio.target:g}",
    )


def cells_of_failure(failure: Failure) -> tuple[str, ...]:
    line, *_ = f"{type(failure.error).__name__}: {failure.error}".splitlines()
    return failure.name, "[red]failed[/red]", "", escape(line)


def main() -> None:
    names = sys.argv[1:] or BENCHMARKS
    if unknown := set(names) - set(BENCHMARKS):
        sys.exit(f"no such benchmark: {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    measured = run(measure_all(names))
    Console().print(table_of(measured))
    sys.exit(any(isinstance(each, Failure) for each in measured))


if __name__ == "__main__":
    main()
