"""`statecast servers`: each command is a process of its own, as a user's is."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from statecast.runtime.server import ServerKind
from statecast.runtime.server_answers import NoAnswer, ask_version, run_redis, run_sql

_COMMAND = [sys.executable, "-c", "from statecast.runtime.servers_command import servers; servers()"]


class Command:
    def __init__(self, state_home: Path) -> None:
        self._state_home = state_home

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"XDG_STATE_HOME": str(self._state_home), "STATECAST_TEST_SERVERS": "local"}
        return subprocess.run(
            [*_COMMAND, *words], env=environment, capture_output=True, text=True, check=False, start_new_session=True
        )

    def run_json(self, *words: str) -> list[dict[str, Any]]:
        done = self.run(*words, "--json")
        assert done.returncode == 0, done.stderr
        answer: list[dict[str, Any]] = json.loads(done.stdout)
        return answer

    def pid(self, kind: ServerKind) -> int:
        known = json.loads((self._state_home / "statecast" / "servers.json").read_text())
        return next(int(one["process"]["pid"]) for one in known if one["server"]["kind"] == kind)


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Command]:
    command = Command(tmp_path)
    yield command
    command.run("down")


@pytest.mark.parametrize("kind", [ServerKind.REDIS, ServerKind.POSTGRESQL])
def test_a_server_outlives_up_and_ends_with_down(command: Command, tmp_path: Path, kind: ServerKind) -> None:
    (started,) = command.run_json("up", kind)

    version = ask_version(kind, started["address"])
    (ended,) = command.run_json("down", kind)

    assert version == started["version"] == ended["version"]
    with pytest.raises(NoAnswer):
        ask_version(kind, started["address"])
    assert command.run_json("status") == []
    assert {path.name for path in (tmp_path / "statecast").iterdir()} == {"servers.json", "servers.lock"}


def test_up_again_leaves_a_running_server_as_it_is(command: Command) -> None:
    (first,) = command.run_json("up", "redis")
    run_redis(first["address"], "SET", "kept", "7")

    (second,) = command.run_json("up", "redis")

    assert second == first
    assert run_redis(second["address"], "GET", "kept") == "7"


def test_up_starts_a_server_anew_that_has_died(command: Command) -> None:
    command.run("up", "redis")
    os.kill(command.pid(ServerKind.REDIS), signal.SIGKILL)
    died = command.run_json("status")

    (again,) = command.run_json("up", "redis")

    assert [one["condition"] for one in died] == ["ended"]
    assert ask_version(ServerKind.REDIS, again["address"]) == again["version"]
    assert len(command.run_json("status")) == 1


def test_down_ends_no_process_that_took_over_the_pid(command: Command, tmp_path: Path) -> None:
    command.run("up", "redis")
    file = tmp_path / "statecast" / "servers.json"
    known = json.loads(file.read_text())
    server_pid = known[0]["process"]["pid"]
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as bystander:
        known[0]["process"]["pid"] = bystander.pid
        file.write_text(json.dumps(known))

        done = command.run("down")

        survived = bystander.poll() is None
        bystander.communicate(b"\n")
    os.kill(server_pid, signal.SIGKILL)
    assert done.returncode == 0
    assert survived


def test_down_names_what_it_ended_and_nothing_else_is_touched(command: Command) -> None:
    command.run("up", "redis", "postgresql")

    ended = command.run_json("down", "redis")

    (left,) = command.run_json("status")
    assert [one["kind"] for one in ended] == ["redis"]
    assert (left["kind"], left["condition"]) == ("postgresql", "running")
    run_sql(left["address"], "SELECT 1")


def test_a_server_that_runs_but_does_not_answer_is_told(command: Command) -> None:
    command.run("up", "redis")
    os.kill(command.pid(ServerKind.REDIS), signal.SIGSTOP)

    (silent,) = command.run_json("status", "redis")
    again = command.run("up", "redis")

    assert silent["condition"] == "does not answer"
    assert again.returncode == 1
    assert "runs but does not answer" in again.stderr
    assert command.run("down").returncode == 0


def test_up_prints_components_that_name_the_address(command: Command) -> None:
    done = command.run("up", "redis")

    (running,) = command.run_json("status")
    documents = list(yaml.safe_load_all(done.stdout))
    host = running["address"].removeprefix("redis://").removesuffix("/0")
    assert [document["spec"]["type"] for document in documents] == ["state.redis", "pubsub.redis"]
    assert all(document["spec"]["metadata"] == [{"name": "redisHost", "value": host}] for document in documents)


def test_a_file_that_cannot_be_read_is_an_error_that_names_it(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "statecast" / "servers.json"
    file.parent.mkdir()
    file.write_text("[{")

    done = command.run("status")
    file.unlink()

    assert done.returncode == 1
    assert f"{file} cannot be read" in done.stderr
