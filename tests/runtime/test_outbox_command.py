import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from statecast import Runtime, RuntimeOptions, upsert
from statecast.components.state.log import Failure, SliceStatus
from statecast.components.testing.log import put_each_aside
from statecast.runtime.cli import command_line
from statecast.runtime.outbox_command import status_document

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)

REFUSALS = {
    "shop||a": Failure(10, None, "[too] large"),
    "shop||b": Failure(3, timedelta(hours=1), "not now"),
    "shop||c": Failure(10, None, "too large"),
}


@pytest.fixture
async def folder(tmp_path: Path) -> Path:
    """A folder of components on a SQLite file whose outbox has three events that nobody relays."""
    (tmp_path / "components.yaml").write_text(f"""
apiVersion: dapr.io/v1alpha1
kind: Component
metadata: {{name: statestore}}
spec:
  type: state.sqlite
  metadata:
  - {{name: connectionString, value: "{tmp_path}/state.db"}}
  - {{name: outboxPublishPubsub, value: bus}}
  - {{name: outboxPublishTopic, value: orders}}
---
apiVersion: dapr.io/v1alpha1
kind: Component
metadata: {{name: bus}}
spec: {{type: pubsub.in-memory}}
""")
    options = RuntimeOptions(relays=False)
    async with Runtime.open(tmp_path, app_id="shop", environment={}, options=options) as runtime:
        await runtime.state("statestore").transact([upsert("a", 1), upsert("b", 2), upsert("a", 3)])
    return tmp_path


@pytest.fixture
async def refused(folder: Path) -> Path:
    """The same folder after a relay has put three keys aside and parked two of them."""
    options = RuntimeOptions(relays=False)
    async with Runtime.open(folder, app_id="shop", environment={}, options=options) as runtime:
        await runtime.state("statestore").transact([upsert("c", 1)])
        log = runtime._components.states["statestore"].store.log
        await log.release(await put_each_aside(log, REFUSALS))
    return folder


def outbox(command: str, folder: Path, *arguments: str, store: str = "statestore") -> Result:
    words = ["outbox", command, "--resources-path", str(folder), "--app-id", "shop", "--store", store, *arguments]
    return CliRunner().invoke(command_line, words)


def status(folder: Path, *arguments: str, store: str = "statestore") -> Result:
    return outbox("status", folder, *arguments, store=store)


def test_the_status_shows_what_is_pending_and_whose_the_slices_are(folder: Path) -> None:
    result = status(folder)

    assert result.exit_code == 0, result.output
    assert "3 pending, the oldest for" in result.output
    assert result.output.count("nobody") == 16


def test_the_status_is_json_on_demand(folder: Path) -> None:
    document = json.loads(status(folder, "--json").output)

    assert document["pending"] == 3
    assert document["oldestAge"] >= 0
    assert sorted(each["pending"] for each in document["slices"])[-2:] == [1, 2]


def test_the_status_counts_what_waits_aside_by_itself(refused: Path) -> None:
    document = json.loads(status(refused, "--json").output)

    assert (document["pending"], document["oldestAge"]) == (0, None)
    assert document["aside"].pop("oldestAge") >= 0
    assert document["aside"] == {"pending": 4, "parked": 2}
    assert "0 pending; 4 aside, the oldest for" in status(refused).output.replace("\n", " ")


def test_a_store_that_is_not_there_is_named(folder: Path) -> None:
    result = status(folder, store="gone")

    assert result.exit_code != 0
    assert "'gone' is not loaded; loaded are: statestore" in str(result.exception)


def test_ages_are_seconds_and_none_where_nothing_is_pending() -> None:
    slices = [
        SliceStatus(0, "relay", 3, "7", 2, NOON - timedelta(seconds=90)),
        SliceStatus(1, None, 0, "0", 0, None),
    ]

    document = status_document(slices, [], NOON)

    assert (document["pending"], document["oldestAge"]) == (2, 90.0)
    assert document["slices"][1]["oldestAge"] is None  # type: ignore[index]


def test_nothing_pending_has_no_oldest() -> None:
    assert status_document([SliceStatus(0, None, 0, "0", 0, None)], [], NOON)["oldestAge"] is None


def test_parked_keys_are_shown_with_their_reason(refused: Path) -> None:
    result = outbox("parked", refused)

    assert result.exit_code == 0, result.output
    assert "2 keys parked" in result.output
    assert "[too] large" in result.output
    assert "not now" not in result.output


def test_keys_that_are_still_tried_are_shown_on_demand(refused: Path) -> None:
    result = outbox("parked", refused, "--all")

    assert "2 keys parked, 1 tried again" in result.output
    assert "not now" in result.output


def test_parked_keys_are_json_on_demand(refused: Path) -> None:
    document = json.loads(outbox("parked", refused, "--json").output)

    assert (document["parked"], document["pending"]) == (2, 3)
    assert [each["key"] for each in document["keys"]] == ["a", "c"]
    first = document["keys"][0]
    assert first.pop("oldestAge") >= 0
    assert first.pop("slice") in range(16)
    assert first == {
        "key": "a",
        "pubsub": "bus",
        "topic": "orders",
        "isParked": True,
        "pending": 2,
        "attempts": 10,
        "reason": "[too] large",
    }


def test_nothing_parked_is_told(folder: Path) -> None:
    assert "0 keys parked" in outbox("parked", folder).output
    assert json.loads(outbox("parked", folder, "--json").output) == {"parked": 0, "pending": 0, "keys": []}


def test_replay_of_one_key_leaves_the_others(refused: Path) -> None:
    result = outbox("replay", refused, "--key", "a")

    assert result.exit_code == 0, result.output
    assert result.output == "1 parked key to be tried again\n"
    assert [each["key"] for each in json.loads(outbox("parked", refused, "--json").output)["keys"]] == ["c"]


def test_replay_of_everything_tells_how_many(refused: Path) -> None:
    result = outbox("replay", refused, "--json")

    assert json.loads(result.output) == {"replayed": 2}
    assert json.loads(outbox("replay", refused, "--json").output) == {"replayed": 0}
    assert json.loads(outbox("parked", refused, "--json").output)["keys"] == []
