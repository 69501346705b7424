"""The state store on Redis, in Dapr's layout: a hash with `data` and `version` under the full key."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from datetime import timedelta
from types import TracebackType
from typing import Final, Self

from statecast.clock import Clock
from statecast.components.manifest import Component, describe
from statecast.components.metadata import STATE_FIELDS, MetadataReader
from statecast.components.redis.connection import ErrorReply, UnfitServer
from statecast.components.redis.pipeline import Pipeline
from statecast.components.redis.server import parse_info
from statecast.components.redis.settings import read_settings
from statecast.components.state.commit import Commit, Consistency, ETag, Item, Upsert
from statecast.components.state.redis.database import Database
from statecast.components.state.redis.directory import RedisDirectory
from statecast.components.state.redis.encoding import decode_commit, decode_item, encode_commit
from statecast.components.state.redis.keys import KeyNames
from statecast.components.state.redis.log import RedisOutboxLog
from statecast.components.state.redis.scripts import COMMIT, READ, REHEARSE
from statecast.errors import ComponentError, StoreUnavailable

logger = logging.getLogger(__name__)

_REPLICATION_PATIENCE: Final = timedelta(seconds=1)


class RedisStateStore:
    """State, outbox log and claims in one Redis database; a commit is one script, and as durable as the server is.

    The commits and reads of one tick of the event loop leave in one write on one connection. A commit with a strong
    upsert goes over a connection of its own, where it waits until the replicas have it that were there at the start.
    """

    def __init__(self, component: Component, *, app_id: str, clock: Clock) -> None:
        fields = MetadataReader(component, STATE_FIELDS)
        settings = read_settings(fields)
        fields.unsupported("queryIndexes")
        fields.finish()
        self._described = describe(component)
        self._names = KeyNames(app_id, component.name)
        self._shared = Pipeline(settings)
        self._replicated = Pipeline(
            settings, read_timeout=(settings.read_timeout + _REPLICATION_PATIENCE).total_seconds()
        )
        self._database = Database(self._shared, self._replicated)
        self._log = RedisOutboxLog(self._database, self._names, settings, clock)
        self._directory = RedisDirectory(self._database, self._names)
        self._open = AsyncExitStack()

    @property
    def log(self) -> RedisOutboxLog:
        return self._log

    @property
    def directory(self) -> RedisDirectory:
        return self._directory

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as opening:
            await opening.enter_async_context(self._shared)
            await opening.enter_async_context(self._replicated)
            await self._examine_server()
            await opening.enter_async_context(self._log)
            self._open = opening.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._open.aclose()

    async def get(self, key: str) -> Item | None:
        """Read the live value at `key`; a plain string, which another program wrote, comes with etag `""`."""
        found = await self._database.ask(READ, 1, key)
        return decode_item(key, found[0])

    async def bulk_get(self, keys: Sequence[str]) -> list[Item | None]:
        """Read several keys at one moment; one answer per key asked for."""
        if not keys:
            return []
        found = await self._database.ask(READ, len(keys), *keys)
        return [decode_item(key, one) for key, one in zip(keys, found, strict=True)]

    async def transact(self, commit: Commit) -> tuple[ETag | None, ...]:
        """Apply everything in `commit` or nothing, in one round trip."""
        if not (commit.operations or commit.records or commit.marks or commit.guards):
            return ()
        encoded = encode_commit(commit, self._names, self._log.slices)
        run = self._database.commit_replicated if self._waits_for_replicas(commit) else self._database.commit
        reply = await run(COMMIT, len(encoded.keys), *encoded.keys, encoded.argument)
        etags = decode_commit(reply, commit, encoded)
        if encoded.slices:
            self._log.announce(encoded.slices)
        return etags

    def _waits_for_replicas(self, commit: Commit) -> bool:
        return self._database.replicas > 0 and any(
            isinstance(operation, Upsert) and operation.consistency is Consistency.STRONG
            for operation in commit.operations
        )

    async def _examine_server(self) -> None:
        try:
            await self._make_ready()
        except StoreUnavailable as error:
            match error.__cause__:
                case UnfitServer():
                    raise ComponentError(str(error)) from error
                case ErrorReply(is_missing_right=True):
                    raise ComponentError(f"the user lacks a right: {error}") from error
            raise

    async def _make_ready(self) -> None:
        facts = parse_info(await self._database.command("INFO"))
        if problem := _find_eviction(facts):
            raise ComponentError(problem)
        if facts.get("aof_enabled") == "0":
            logger.warning(
                "%s: the server keeps no append-only file: what was committed since its last snapshot is lost"
                " when it ends",
                self._described,
            )
        self._database.replicas = int(facts.get("connected_slaves", "0"))
        for script in (COMMIT, READ):
            await self._database.command("SCRIPT", "LOAD", script.source)
        await self._database.ask(REHEARSE, 1, self._names.rehearsal)


def _find_eviction(facts: Mapping[str, str]) -> str | None:
    policy = facts.get("maxmemory_policy", "")
    if not policy.startswith("allkeys-"):
        return None
    return f"the server's maxmemory-policy is {policy}, which throws state and events away; set noeviction"
