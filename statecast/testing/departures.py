"""The moment at which a request has left this process for a server, watched at each backend's rim."""

import importlib
import os
import signal
from collections.abc import Coroutine, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, NoReturn


class _Deed:
    """What is under way and ends with its next request. Tasks that it starts know it too, and when it is over."""

    is_over = False


_deed: Final[ContextVar[_Deed | None]] = ContextVar("statecast_deed_under_way", default=None)
_deeds: Final[list[_Deed]] = []
_watched: Final[set[str]] = set()


def kill_this_process() -> NoReturn:
    """End this process at once: nothing is closed, flushed or told."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("no process outlives SIGKILL")


@contextmanager
def last_deed() -> Iterator[None]:
    """Within the block, kill this process as soon as a request of the block's has left for a server."""
    deed = _Deed()
    token = _deed.set(deed)
    _deeds.append(deed)
    try:
        yield
    finally:
        deed.is_over = True
        _deeds.remove(deed)
        _deed.reset(token)


def watch_departures() -> None:
    """Watch the backends whose drivers are installed."""
    for watch in (_watch_postgresql, _watch_redis, _watch_sqlite, _watch_kafka):
        if watch.__name__ in _watched:
            continue
        try:
            watch()
        except ModuleNotFoundError:
            continue
        _watched.add(watch.__name__)


def _watch_postgresql() -> None:
    """The task of a connection does a caller's work, and commits go together: the deed is handed along to them.

    Where statements are not prepared once, as behind a pooler, what leaves first is not yet the statement itself: there
    nothing is watched.
    """
    committer = _module("statecast.components.state.postgresql.committer").Committer
    waiting = _module("statecast.components.state.postgresql.committer")._Waiting
    lanes = _module("statecast.components.state.postgresql.lanes").Lanes
    session = _module("statecast.components.state.postgresql.lanes").Session
    connection = _module("asyncpg.connection").Connection
    wait, call, run = waiting.__init__, committer._call, lanes.run
    write, execute = session.write, connection.execute
    last_commits: list[object] = []

    def wait_watched(self: Any, *arguments: Any) -> None:
        wait(self, *arguments)
        if _is_last():
            last_commits.append(self)

    async def call_watched(self: Any, batch: Any, **options: Any) -> Any:
        if not _have_common(batch, last_commits):
            return await call(self, batch, **options)
        with last_deed():
            return await call(self, batch, **options)

    async def run_watched(self: Any, work: Any, **options: Any) -> Any:
        async def last(connected: Any) -> Any:
            with last_deed():
                return await work(connected)

        return await run(self, last if _is_last() else work, **options)

    async def write_watched(self: Any, query: str, *arguments: object) -> Any:
        if not (_is_last() and self._prepares):
            return await write(self, query, *arguments)
        if query not in self._statements:
            await self._prepare(query)
        _send_and_die(write(self, query, *arguments))

    async def execute_watched(self: Any, query: str, *arguments: object, **options: Any) -> Any:
        if not _is_last():
            return await execute(self, query, *arguments, **options)
        _send_and_die(execute(self, query, *arguments, **options))

    waiting.__init__, committer._call, lanes.run = wait_watched, call_watched, run_watched
    session.write, connection.execute = write_watched, execute_watched


def _watch_redis() -> None:
    pipeline = _module("statecast.components.redis.pipeline").Pipeline
    connection = _module("statecast.components.redis.connection").Connection
    enqueue, write = pipeline.enqueue, connection.write
    last_commands: list[object] = []

    def enqueue_watched(self: Any, *commands: Any) -> None:
        enqueue(self, *commands)
        if _is_last():
            last_commands.extend(commands)

    def write_watched(self: Any, commands: Any) -> None:
        write(self, commands)
        if _have_common(commands, last_commands):
            kill_this_process()

    pipeline.enqueue, connection.write = enqueue_watched, write_watched


def _watch_sqlite() -> None:
    """What is sent here is what stands in the transaction when it is about to be committed."""
    writer = _module("statecast.components.state.sqlite.writer").Writer
    run, commit = writer.run, writer._commit
    last_jobs: list[object] = []

    async def run_watched(self: Any, job: Any, **options: Any) -> Any:
        if _is_last():
            last_jobs.append(job)
        return await run(self, job, **options)

    def commit_watched(self: Any, group: Any) -> None:
        if not _have_common([entry.job for entry in group], last_jobs):
            commit(self, group)
            return
        connection = self._cursor.connection
        connection.set_commit_hook(kill_this_process)
        commit(self, group)
        # It changed nothing, so there was nothing to commit.
        connection.set_commit_hook(None)

    writer.run, writer._commit = run_watched, commit_watched


def _watch_kafka() -> None:
    """The driver sends from a task of its own, which knows no caller: any produce request is taken for the last."""
    connection = _module("aiokafka.conn").AIOKafkaConnection
    send = connection.send

    def send_watched(self: Any, request: Any, **options: Any) -> Any:
        answer = send(self, request, **options)
        if _deeds and type(request).__name__.startswith("ProduceRequest"):
            kill_this_process()
        return answer

    connection.send = send_watched


def _is_last() -> bool:
    deed = _deed.get()
    return deed is not None and not deed.is_over


def _have_common(some: Iterable[object], others: list[object]) -> bool:
    return bool(others) and any(each is other for each in some for other in others)


def _send_and_die(request: Coroutine[Any, Any, Any]) -> NoReturn:
    """Drive a request up to where it waits for its answer: then the driver has written it to the socket."""
    request.send(None)
    kill_this_process()


def _module(name: str) -> Any:
    # By name, as no module here may depend on a driver being installed.
    return importlib.import_module(name)
