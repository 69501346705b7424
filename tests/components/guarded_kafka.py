"""A Kafka with users, passwords and rights, beside which everybody who is nobody may do everything."""

import asyncio
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from aiokafka import AIOKafkaConsumer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.protocol.admin import CreateAclsRequest, DeleteAclsRequest, DescribeAclsRequest

from statecast.components.testing import deadline
from statecast.runtime.ports import free_port
from statecast.runtime.server import Keeping, ServerKind
from statecast.runtime.server_installations import Installation
from statecast.runtime.server_processes import LocalServer

PASSWORDS = {"alice": "secret of alice", "stranger": "secret of stranger"}
"""The users. All may log in by PLAIN, alice also by SCRAM."""

_PLAIN_USERS = " ".join(f'user_{name}="{password}"' for name, password in PASSWORDS.items())
_SECURITY = {
    "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
    "super.users": "User:ANONYMOUS",
    "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,USERS:SASL_PLAINTEXT",
    "listener.name.users.sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-256,SCRAM-SHA-512",
    "listener.name.users.plain.sasl.jaas.config": (
        f"org.apache.kafka.common.security.plain.PlainLoginModule required {_PLAIN_USERS};"
    ),
    "listener.name.users.scram-sha-256.sasl.jaas.config": (
        "org.apache.kafka.common.security.scram.ScramLoginModule required;"
    ),
    "listener.name.users.scram-sha-512.sasl.jaas.config": (
        "org.apache.kafka.common.security.scram.ScramLoginModule required;"
    ),
}


# org.apache.kafka.common.resource.ResourceType, org.apache.kafka.common.acl.AclOperation
class Resource(IntEnum):
    TOPIC = 2
    GROUP = 3


class Right(IntEnum):
    READ = 3
    WRITE = 4
    DESCRIBE = 8


_LITERAL = 3
_ALLOW = 3


class GuardedKafka:
    """`users` is the address for those with a name and a password."""

    def __init__(self, installation: Installation) -> None:
        guarded = _Guarded(installation, free_port())
        self.users = guarded.address(guarded.users_port)
        self._server = LocalServer.start(guarded, Keeping())
        try:
            # The server takes one change of a user at a time.
            for bits in (256, 512):
                self._give_alice_scram(guarded.java(self._server.folder), bits)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._server.close()

    async def make_topic(self, topic: str) -> None:
        async with self._administrator() as client:
            await client.create_topics([NewTopic(topic, 1, 1)])

    async def grant(self, user: str, right: Right, name: str, resource: Resource = Resource.TOPIC) -> None:
        """Give the right, and return when the server acts by it."""
        rule = (resource, name, _LITERAL, f"User:{user}", "*", right, _ALLOW)
        async with self._administrator() as client:
            answer = await client._send_request(CreateAclsRequest(*rule))
            assert [error for error, _ in answer.creation_responses] == [0]

            async def is_known() -> bool:
                return bool((await client._send_request(DescribeAclsRequest(*rule))).resources)

            await deadline.until(is_known)

    async def withdraw(self, user: str, right: Right, name: str, resource: Resource = Resource.TOPIC) -> None:
        """Take the right, and return when the server acts by it."""
        rule = (resource, name, _LITERAL, f"User:{user}", "*", right, _ALLOW)
        async with self._administrator() as client:
            await client._send_request(DeleteAclsRequest(*rule))

            async def is_forgotten() -> bool:
                return not (await client._send_request(DescribeAclsRequest(*rule))).resources

            await deadline.until(is_forgotten)

    async def read(self, topic: str, count: int) -> list[bytes]:
        """Read the first `count` bodies of the topic."""
        consumer = AIOKafkaConsumer(topic, bootstrap_servers=self._server.address, auto_offset_reset="earliest")
        async with consumer, asyncio.timeout(deadline.PATIENCE.total_seconds()):
            return [(await anext(consumer)).value for _ in range(count)]

    @asynccontextmanager
    async def _administrator(self) -> AsyncIterator[AIOKafkaAdminClient]:
        client = AIOKafkaAdminClient(bootstrap_servers=self._server.address)
        await client.start()
        try:
            yield client
        finally:
            await client.close()

    def _give_alice_scram(self, java: list[str], bits: int) -> None:
        whom = ["--entity-type", "users", "--entity-name", "alice"]
        command = [*java, "kafka.admin.ConfigCommand", "--bootstrap-server", self._server.address, "--alter", *whom]
        command += ["--add-config", f"SCRAM-SHA-{bits}=[password={PASSWORDS['alice']}]"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@dataclass(frozen=True, slots=True)
class _Guarded:
    """Like the installation that it is made of, with one more listener."""

    installation: Installation
    users_port: int
    kind: ServerKind = ServerKind.KAFKA
    stop_signal: signal.Signals = signal.SIGTERM

    @property
    def place(self) -> str:
        return self.installation.place

    def address(self, port: int) -> str:
        return self.installation.address(port)

    def prepare(self, folder: Path) -> None:
        self.installation.prepare(folder)

    def command(self, folder: Path, port: int, keeping: Keeping) -> list[str]:
        command = self.installation.command(folder, port, keeping)
        file = folder / "server.properties"
        settings = dict(line.split("=", 1) for line in file.read_text().splitlines()) | _SECURITY
        for name in ("listeners", "advertised.listeners"):
            settings[name] += f",USERS://127.0.0.1:{self.users_port}"
        file.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        return command

    def java(self, folder: Path) -> list[str]:
        """Name the command that runs a class of Kafka's."""
        *java, _, _ = self.installation.command(folder, 0, Keeping())
        return java
