"""Two Kafka nodes that keep every message both, so that one can lead while the other is away."""

import asyncio
import subprocess
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from statecast.runtime.server import Keeping, ServerKind, ServerMissing, Variant
from statecast.runtime.server_installations import Installation, find_installation
from statecast.runtime.server_processes import LocalServer, stop_family
from tests.components.going_without import go_without


class KafkaPair:
    """Nodes 1 and 2; the first is the cluster's only controller, without which a leader that dies has no heir."""

    def __init__(self, first: LocalServer, second: LocalServer) -> None:
        self._nodes = {1: first, 2: second}

    @property
    def address(self) -> str:
        return ",".join(node.address for node in self._nodes.values())

    def stop(self, number: int) -> None:
        """End a node in good order: it hands what it leads over to the other one first."""
        stop_family(self._nodes[number].pid, self._nodes[number].stop_signal)

    def kill(self, number: int) -> None:
        """End a node at once: the other one leads when its session has run out."""
        self._nodes[number].kill()

    def restart(self, number: int) -> None:
        self._nodes[number].restart()

    async def is_led_by(self, number: int, topic: str) -> bool:
        """Tell whether that node leads all of the topic."""
        return await self._are_all(topic, lambda partition: partition["leader"] == number)

    async def is_in_sync(self, topic: str) -> bool:
        """Tell whether both nodes have all of the topic."""
        return await self._are_all(topic, lambda partition: len(partition["isr"]) == len(self._nodes))

    def epochs(self, topic: str, partition: int) -> list[int]:
        """List the epochs of the partition's leaders, as the first node has written them down."""
        # org.apache.kafka.storage.internals.checkpoint.LeaderEpochCheckpointFile: two lines, then one for each epoch
        file = self._nodes[1].folder / "data" / f"{topic}-{partition}" / "leader-epoch-checkpoint"
        return [int(line.split()[0]) for line in file.read_text().splitlines()[2:]]

    async def _are_all(self, topic: str, fact: Callable[[Mapping[str, Any]], bool]) -> bool:
        admin = AIOKafkaAdminClient(bootstrap_servers=self.address)
        try:
            await admin.start()
            (found,) = await admin.describe_topics([topic])
        except KafkaError:
            return False  # the node that was asked has just gone
        finally:
            await admin.close()
        return all(map(fact, found["partitions"]))


@asynccontextmanager
async def kafka_pair() -> AsyncIterator[KafkaPair]:
    try:
        installation = find_installation(ServerKind.KAFKA, Variant.CURRENT)
    except ServerMissing as missing:
        go_without(missing)
    first = await asyncio.to_thread(LocalServer.start, installation, Keeping())
    try:
        second = await asyncio.to_thread(LocalServer.start, _SecondNode(installation, first.folder), Keeping())
        try:
            yield KafkaPair(first, second)
        finally:
            second.close()
    finally:
        first.close()


@dataclass(frozen=True, slots=True)
class _SecondNode:
    """Like the installation that the first node is of, in the cluster that the first node has made."""

    installation: Installation
    first: Path
    kind: ServerKind = ServerKind.KAFKA

    @property
    def place(self) -> str:
        return self.installation.place

    @property
    def stop_signal(self) -> Signals:
        return self.installation.stop_signal

    def address(self, port: int) -> str:
        return self.installation.address(port)

    def prepare(self, folder: Path) -> None:
        (folder / "controller-port").write_text((self.first / "controller-port").read_text())
        *java, _, settings = self.command(folder, 0, Keeping())
        identity = _read_properties(self.first / "data" / "meta.properties")["cluster.id"]
        subprocess.run(
            [*java, "kafka.tools.StorageTool", "format", "-t", identity, "-c", settings],
            capture_output=True,
            check=True,
        )

    def command(self, folder: Path, port: int, keeping: Keeping) -> list[str]:
        command = self.installation.command(folder, port, keeping)
        file = folder / "server.properties"
        settings = _read_properties(file) | {
            "process.roles": "broker",
            "node.id": "2",
            "listeners": f"PLAINTEXT://127.0.0.1:{port}",
        }
        file.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        return command


def _read_properties(file: Path) -> dict[str, str]:
    lines = file.read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if not line.startswith("#"))
