"""Commits that replicas must have before they are answered."""

import asyncio
from dataclasses import dataclass, field
from typing import Final

from statecast.components.redis.connection import Command, NotSent, Reply, pack
from statecast.components.redis.pipeline import Pipeline

_PATIENCE_MILLISECONDS: Final = 1000  # as dapr components-contrib state/redis/redis.go


@dataclass(frozen=True, slots=True)
class _Group:
    """Commits that leave together; `copies` will be the answer to the WAIT behind them: how many replicas have them."""

    copies: asyncio.Future[Reply]
    commits: list[Command] = field(default_factory=list)


class Replication:
    """Sends commits in groups, with one WAIT for each: what comes while one is on its way goes with the next.

    The server reads no further on a connection that waits. Commits that each waited for themselves would be answered
    one after the other, and the last one of many only when all the others' patience has ended.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._next: _Group | None = None
        self._is_under_way = False
        self.replicas = 0
        """How many replicas a commit waits for."""

    def submit(self, packed: bytes) -> tuple[Command, asyncio.Future[Reply]]:
        """Put a commit into the next group; return it and, shared by the group, what its WAIT will be answered."""
        loop = asyncio.get_running_loop()
        if self._next is None:
            self._next = _Group(loop.create_future())
            if not self._is_under_way:
                loop.call_soon(self._depart)
        commit = Command(packed, loop.create_future())
        self._next.commits.append(commit)
        return commit, self._next.copies

    def _depart(self) -> None:
        group, self._next = self._next, None
        self._is_under_way = group is not None
        if group is None:
            return
        group.copies.add_done_callback(self._arrive)
        # WAIT speaks of what its own connection wrote, so all must leave in one write: after a reconnect it would have
        # nothing to wait for.
        commands = [*group.commits, Command(pack("WAIT", self.replicas, _PATIENCE_MILLISECONDS), group.copies)]
        try:
            self._pipeline.enqueue(*commands)
        except NotSent as error:
            for command in commands:
                command.fail(error)

    def _arrive(self, copies: asyncio.Future[Reply]) -> None:
        copies.exception()  # if there is one, and nobody is left to see it, the loop must not complain
        self._depart()
