import asyncio
import io
import json
import signal
from itertools import islice
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from statecast import Component, Runtime
from statecast.runtime.cli import command_line
from statecast.runtime.demo import Line, Malformed, Tally, commit_all, parse_lines, percentile, sample_path
from statecast.runtime.servers import ADDRESS_VARIABLES, ServerKind

ORDER = '{"orderId":"1","status":"placed","total":3.5,"customer":{"card":"4111"}}'

STORE_WITH_OUTBOX = Component(
    "statestore",
    "state.sqlite",
    metadata={"connectionString": ":memory:", "outboxPublishPubsub": "pubsub", "outboxPublishTopic": "orders"},
)


def nested(depth: int) -> str:
    return f'{{"orderId":"1","status":"placed","total":1,"lines":{"[" * depth}{"]" * depth}}}'


any_text = st.text(st.characters())  # with lone surrogates
any_value = st.recursive(
    st.none() | st.integers() | st.floats() | any_text,
    lambda inner: st.lists(inner) | st.dictionaries(any_text, inner),
    max_leaves=5,
)
nearly_orders = st.fixed_dictionaries(
    {
        "orderId": st.sampled_from(["1", "a||b", "a\0b", "\ud800", "x" * 5_000]) | any_text,
        "status": any_text,
        "total": st.integers() | st.floats(),
    },
    optional={"customer": any_value},
).map(json.dumps)


def run(*arguments: str, input: str | None = None) -> Result:
    return CliRunner().invoke(command_line, ["demo", "--rate", "0", *arguments], input=input)


def shown(result: Result, row: str) -> str:
    """Give the value that the final table shows in a row."""
    cells = [[cell.strip() for cell in line.split("│")] for line in result.output.splitlines() if "│" in line]
    (value,) = [value for _, name, value, _ in cells if name == row]
    return value


def committed(lines: list[Line]) -> set[int]:
    """Commit the lines to a store that is gone afterwards; tell the numbers of those that were."""
    tally = Tally()

    async def commit_them() -> None:
        components = [STORE_WITH_OUTBOX, Component("pubsub", "pubsub.in-memory")]
        async with Runtime.open(components, app_id="demo") as runtime:
            await commit_all(runtime.state("statestore"), lines, tally, rate=0)

    asyncio.run(commit_them())
    return set(tally.committed)


def test_the_sample_has_a_thousand_orders() -> None:
    with sample_path().open() as file:
        lines = list(parse_lines(file))

    assert len(lines) == 1_000
    assert all(isinstance(line, Line) for line in lines)


def test_lines_that_are_no_orders_are_told_by_number_and_empty_ones_left_out() -> None:
    texts = [ORDER, "", "{broken", '{"orderId":"2","status":"placed"}', "[]", ORDER]

    parsed = list(parse_lines(texts))

    assert [line.number for line in parsed if isinstance(line, Line)] == [1, 6]
    assert [line.number for line in parsed if isinstance(line, Malformed)] == [3, 4, 5]


@pytest.mark.parametrize(
    "text",
    [
        '{"orderId":"a||b","status":"placed","total":1}',
        r'{"orderId":"a\u0000b","status":"placed","total":1}',
        r'{"orderId":"\ud800","status":"placed","total":1}',
        r'{"orderId":"1","status":"placed","total":1,"note":"\ud800"}',
        '{"orderId":"1","status":"placed","total":1,"weight":18446744073709551616}',
        f'{{"orderId":"{"x" * 5_000}","status":"placed","total":1}}',
        nested(300),
        nested(100_000),
    ],
    ids=lambda text: text[:60],
)
def test_an_order_that_a_store_cannot_keep_is_malformed(text: str) -> None:
    (line,) = parse_lines([text])

    assert isinstance(line, Malformed)


@settings(deadline=None)
@given(
    st.lists(
        nearly_orders
        | st.integers(0, 2_000).map(nested)
        | st.binary(max_size=20).map(lambda body: body.decode("utf-8", "surrogateescape"))
    )
)
def test_whatever_the_input_each_line_is_malformed_or_can_be_committed(texts: list[str]) -> None:
    lines = [line for line in parse_lines(texts) if isinstance(line, Line)]

    assert committed(lines) == {line.number for line in lines}


@given(st.permutations(range(1, 7)))
def test_an_arrival_behind_a_later_one_of_its_key_is_out_of_order(numbers: list[int]) -> None:
    tally = Tally()

    for number in numbers:
        tally.note_received("key", number, 0.0)
        tally.note_received("key", number, 0.0)

    overtaken = [number for index, number in enumerate(numbers) if max(numbers[: index + 1]) > number]
    assert (tally.out_of_order, tally.repeated) == (len(overtaken), 6)


def test_what_was_committed_and_never_arrived_is_lost() -> None:
    tally = Tally(committed={1: 0.0, 2: 0.0})

    tally.note_received("key", 2, 1.0)

    assert (tally.lost, tally.latencies) == (1, [1.0])


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 1))
def test_a_percentile_is_one_of_the_values(values: list[float], share: float) -> None:
    assert percentile(sorted(values), share) in values


def test_the_demo_shows_that_everything_arrived_in_order() -> None:
    result = run()

    assert result.exit_code == 0, result.output
    assert shown(result, "committed") == shown(result, "received") == "1,000"
    assert (shown(result, "lost"), shown(result, "out of order")) == ("0", "0")


def test_the_demo_reads_standard_input_and_says_which_line_it_left_out() -> None:
    result = run("--input", "-", input=f"{ORDER}\n{{broken\n{ORDER}\n")

    assert result.exit_code == 3
    assert "line 2 is no order and is left out" in result.output
    assert shown(result, "received") == "2"


def test_the_demo_goes_on_after_orders_that_no_store_can_keep() -> None:
    result = run("--input", "-", input=f"{nested(300)}\n{ORDER.replace('1', 'a||b', 1)}\n{ORDER}\n")

    assert result.exit_code == 3
    assert "line 1 is no order and is left out" in result.output
    assert "line 2 is no order and is left out" in result.output
    assert shown(result, "received") == "1"


def test_the_demo_takes_a_file_of_nothing(tmp_path: Path) -> None:
    empty = tmp_path / "orders.jsonl"
    empty.write_text("")

    result = run("--input", str(empty))

    assert result.exit_code == 0
    assert shown(result, "received") == "0"


def test_the_event_has_nothing_of_the_customer() -> None:
    order = json.loads(ORDER)

    (line,) = parse_lines(io.StringIO(ORDER))

    assert isinstance(line, Line)
    assert line.document == order
    assert set(line.public) == {"orderId", "status", "total"}


def test_a_demo_that_is_killed_halfway_loses_nothing() -> None:
    result = run("--crash", "--rate", "400")

    assert result.exit_code == 0, result.output
    assert f"was ended by {signal.SIGKILL.name} after 500 arrivals" in result.output
    assert (shown(result, "received"), shown(result, "lost"), shown(result, "out of order")) == ("1,000", "0", "0")
    assert int(shown(result, "committed before the crash")) >= 500


def test_a_demo_whose_first_process_is_not_killed_has_failed(tmp_path: Path) -> None:
    empty = tmp_path / "orders.jsonl"
    empty.write_text("")

    result = run("--crash", "--input", str(empty))

    assert result.exit_code == 1
    assert "was not killed halfway" in str(result.exception)


@pytest.fixture
def orders(tmp_path: Path) -> Path:
    """The first 200 lines of the sample."""
    path = tmp_path / "orders.jsonl"
    with sample_path().open() as sample:
        path.write_text("".join(islice(sample, 200)))
    return path


def assert_all_orders_arrived(result: Result) -> None:
    assert result.exit_code == 0, result.output
    assert (shown(result, "committed"), shown(result, "received")) == ("200", "200")
    assert (shown(result, "lost"), shown(result, "out of order")) == ("0", "0")


with_and_without_crash = pytest.mark.parametrize("crash", [(), ("--crash",)], ids=["", "crash"])


@with_and_without_crash
def test_the_demo_on_postgresql_and_kafka(
    crash: tuple[str, ...], orders: Path, postgresql_url: str, kafka_bootstrap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ADDRESS_VARIABLES[ServerKind.POSTGRESQL], postgresql_url)
    monkeypatch.setenv(ADDRESS_VARIABLES[ServerKind.KAFKA], kafka_bootstrap)

    result = run("--store", "postgresql", "--broker", "kafka", "--input", str(orders), "--rate", "400", *crash)

    assert_all_orders_arrived(result)


@with_and_without_crash
def test_the_demo_on_redis_and_redis(
    crash: tuple[str, ...], orders: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ADDRESS_VARIABLES[ServerKind.REDIS], redis_url)

    result = run("--store", "redis", "--broker", "redis", "--input", str(orders), "--rate", "400", *crash)

    assert_all_orders_arrived(result)
