"""`make bench`: every measurement beside its yardstick. `python -m benchmarks relay latency` runs those named."""

import importlib
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import cast

from rich.console import Console
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
    "space",
)


async def measure_all(names: Sequence[str]) -> list[Ratio]:
    ratios: list[Ratio] = []
    for name in names:
        module = importlib.import_module(f"benchmarks.{name}")
        measure = cast(Callable[[], Awaitable[list[Ratio]]], module.measure)
        print(f"measuring {name} ...", file=sys.stderr)
        ratios += await measure()
    return ratios


def table_of(ratios: Sequence[Ratio]) -> Table:
    table = Table("what", "ours", "yardstick", "", "ratio", "aim")
    for ratio in ratios:
        style = "green" if ratio.is_met else "red"
        table.add_row(
            ratio.name,
            f"{ratio.ours:,.4g} {ratio.unit}" if ratio.ours < 1_000 else f"{ratio.ours:,.0f} {ratio.unit}",
            f"{ratio.yardstick:,.4g}" if ratio.yardstick < 1_000 else f"{ratio.yardstick:,.0f}",
            ratio.yardstick_name,
            f"[{style}]{ratio.value:.2f}[/{style}]",
            f"{ratio.target:g}",
        )
    return table


def main() -> None:
    names = sys.argv[1:] or BENCHMARKS
    if unknown := set(names) - set(BENCHMARKS):
        sys.exit(f"no such benchmark: {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    Console().print(table_of(run(measure_all(names))))


if __name__ == "__main__":
    main()
