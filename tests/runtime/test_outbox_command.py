import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from statecast import Runtime, RuntimeOptions, upsert
from statecast.components.state.log import SliceStatus
from statecast.runtime.cli import command_line, status_document

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)


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


def status(folder: Path, *arguments: str, store: str = "statestore") -> Result:
    words = ["outbox", "status", "--resources-path", str(folder), "--app-id", "shop", "--store", store, *arguments]
    return CliRunner().invoke(command_line, words)


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


def test_a_store_that_is_not_there_is_named(folder: Path) -> None:
    result = status(folder, store="gone")

    assert result.exit_code != 0
    assert "'gone' is not loaded; loaded are: statestore" in str(result.exception)


def test_ages_are_seconds_and_none_where_nothing_is_pending() -> None:
    slices = [
        SliceStatus(0, "relay", 3, "7", 2, NOON - timedelta(seconds=90)),
        SliceStatus(1, None, 0, "0", 0, None),
    ]

    document = status_document(slices, NOON)

    assert (document["pending"], document["oldestAge"]) == (2, 90.0)
    assert document["slices"][1]["oldestAge"] is None  # type: ignore[index]


def test_nothing_pending_has_no_oldest() -> None:
    assert status_document([SliceStatus(0, None, 0, "0", 0, None)], NOON)["oldestAge"] is None
